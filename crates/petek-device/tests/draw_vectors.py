"""Makes src/cpu/draw_vectors.rs: scores and draws from the pages alone (BEHAVIOUR 2, WIRE 9, the table in math.rs), in exact
fractions with each rounding to f32 written out; nothing of our code runs.

    python3 tests/draw_vectors.py > src/cpu/draw_vectors.rs
"""
import struct
from fractions import Fraction

INFINITY = "infinity"  # The one number beside fractions that comes up: E for the largest word.


def f32(x):
    """Rounds a fraction to f32: nearest, even among equals."""
    x = Fraction(x)
    if x == 0:
        return x
    exponent = max(_floor_log2(abs(x)), -126) - 23
    unit = Fraction(2) ** exponent
    return round(x / unit) * unit  # Python rounds halves to even.


def _floor_log2(x):
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def bits(x):
    if x == INFINITY:
        return 0x7F800000
    return struct.unpack("<I", struct.pack("<f", float(x)))[0]


def of_bits(b):
    return Fraction(struct.unpack("<f", struct.pack("<I", b))[0])


def add(a, b):
    return f32(a + b)


def mul(a, b):
    return f32(a * b)


def fma(a, b, c):
    return f32(a * b + c)


def literals(*texts):
    return [f32(Fraction(text)) for text in texts]


EXP2 = literals("1", "0.6931472", "0.24022648", "0.055503596", "0.009618499", "0.001339097", "0.0001532931")
LN = literals("0.33333313", "-0.2500001", "0.20002073", "-0.16667996", "0.14220327", "-0.12406032", "0.11883568",
              "-0.11671449", "0.06750956")
HIGH, LOW = literals("0.6933594", "-0.00021219444")
LOG2_E = f32(Fraction("1.4426950408889634"))


def exp2(x):
    if x < -126:
        return Fraction(0)
    k = round(x)
    r, p = add(x, -k), EXP2[6]
    for c in EXP2[5::-1]:
        p = fma(p, r, c)
    return p * Fraction(2) ** k


def exp(x):
    return exp2(mul(x, LOG2_E))


def ln(x):
    """x = m 2^e with m in [root half, root two), root half being the f32 0x3f3504f3."""
    e = _floor_log2(x)
    m = x / Fraction(2) ** e
    if m / 2 >= of_bits(0x3F3504F3):
        m, e = m / 2, e + 1
    f, q = add(m, -1), LN[8]
    for c in LN[7::-1]:
        q = fma(q, f, c)
    square = mul(f, f)
    small = fma(mul(square, f), q, mul(Fraction(e), LOW))
    return fma(Fraction(e), HIGH, add(f, fma(square, Fraction(-1, 2), small)))


def tree(x):
    sums = [[Fraction(0)] * 16 for _ in range(4)]
    for i, value in enumerate(x):
        lane = sums[i // 16 % 4]
        lane[i % 16] = add(lane[i % 16], value)
    lanes = [add(add(sums[0][i], sums[1][i]), add(sums[2][i], sums[3][i])) for i in range(16)]
    for half in (8, 4, 2, 1):
        lanes = [add(lanes[i], lanes[i + half]) for i in range(half)]
    return lanes[0]


def philox(counter, key):
    for i in range(10):
        if i:
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b % 2**32, a >> 32 ^ counter[3] ^ key[1], a % 2**32]
    return counter


def exponential(word):
    v = mul(add(f32(word >> 1), Fraction(1, 2)), Fraction(1, 2**31))
    u = add(1, -v)
    if u == 1:
        return v
    if u == 0:
        return INFINITY
    return mul(-ln(u), f32(v / add(1, -u)))


def score(z, word):
    e = exponential(word)
    return None if e == INFINITY else add(z, -ln(e))


def logits(n, salt):
    """Eighths from -16 to 15.875, each often."""
    return [Fraction(((i + salt) * 2654435761 % 2**32) >> 24, 8) - 16 for i in range(n)]


def draw(row, temperature, top_k, top_p, min_p, seed, position):
    kept = [(i, f32(z / temperature)) for i, z in enumerate(row)]
    by_size = lambda token: (-token[1], token[0])
    if top_k:
        kept = sorted(sorted(kept, key=by_size)[:top_k])
    largest = max(z for _, z in kept)
    weight = lambda z: exp(add(z, -largest))
    if top_p < 1:
        enough, before, keep = mul(top_p, tree([weight(z) for _, z in kept])), Fraction(0), []
        for token in sorted(kept, key=by_size):
            if before >= enough:
                break
            keep.append(token)
            before = add(before, weight(token[1]))
        kept = sorted(keep)
    kept = [(i, z) for i, z in kept if weight(z) >= min_p]
    best = None
    for i, z in kept:
        word = philox([i // 4, position, 0, 0], [seed % 2**32, seed >> 32])[i % 4]
        s = score(z, word)
        if s is not None and (best is None or s > best[1]):
            best = (i, s)
    return best


def logprob(row, i):
    largest = max(row)
    return add(add(row[i], -largest), -ln(tree([exp(add(z, -largest)) for z in row])))


WORDS = [0, 1, 2, 3, 200, 0x7FFFFFFF, 0x80000000, 0x12345678, 0xDEADBEEF, 0xFFFFFF00, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFF]
CASES = [
    ("1", 0, "1", "0", 0, 0),
    ("1", 0, "1", "0", 1, 7),
    ("0.5", 0, "1", "0", 2**64 - 1, 4_000_000_000),
    ("1.5", 40, "1", "0", 12345678901234567890, 3),
    ("0.7", 0, "0.9", "0", 42, 1),
    ("2", 50, "0.95", "0.05", 43, 2),
    ("1.3", 0, "1", "0.001", 44, 100),
    ("2", 0, "0.5", "0", 45, 0),
]

print("//! Made by `tests/draw_vectors.py`, which says how. Changing them breaks every recorded seed.\n")
print("/// (random word, bits of E).")
print("pub(super) const EXPONENTIALS: &[(u32, u32)] = &[")
for word in WORDS:
    print(f"    ({word:#x}, {bits(exponential(word)):#x}),")
print("];\n")
print("/// (vocabulary, salt of its logits, [temperature, top_p, min_p], top_k, seed, position): (id, bits of its score and logprob).")
print("#[allow(clippy::type_complexity)]")
print("pub(super) const DRAWS: &[((u32, u32, [f32; 3], u32, u64, u32), (u32, u32, u32))] = &[")
for index, (temperature, top_k, top_p, min_p, seed, position) in enumerate(CASES):
    for n in (1, 37, 300):
        numbers = [f32(Fraction(text)) for text in (temperature, top_p, min_p)]
        row = logits(n, index)
        i, s = draw(row, numbers[0], top_k if top_k < n else 0, numbers[1], numbers[2], seed, position)
        texts = ", ".join(text if "." in text else text + ".0" for text in (temperature, top_p, min_p))
        print(f"    (({n}, {index}, [{texts}], {top_k}, {seed}, {position}), ({i}, {bits(s):#x}, {bits(logprob(row, i)):#x})),")
print("];")
