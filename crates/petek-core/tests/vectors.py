"""Makes src/vectors.rs: the vectors of block hashes and seeds, from the wire's page alone, not from our code.

    python3 -m venv v && v/bin/pip install blake3==1.0.11 && v/bin/python tests/vectors.py > src/vectors.rs
"""
import struct
from blake3 import blake3

REVISION = bytes(range(32))


def chain(tokens, size, adapter=None, salt=b"", tenant=b""):
    fields = [(1, REVISION), (5, struct.pack("<I", size))]
    if adapter:
        fields += [(2, adapter[0]), (3, struct.pack("<Q", adapter[1]))]
    if salt:
        fields.append((4, salt))
    if tenant:
        fields.append((6, tenant))
    encoded = b"".join(struct.pack("<BI", tag, len(value)) + value for tag, value in sorted(fields))
    parent, hashes = bytes(32), []
    for at in range(0, len(tokens) - size + 1, size):
        ids = struct.pack(f"<{size}I", *tokens[at : at + size])
        parent = blake3(parent + encoded + ids, derive_key_context="petek/block/1").digest()
        hashes.append(parent.hex())
    return hashes


def seed(seed, index):
    if index == 0:
        return seed
    return struct.unpack("<Q", blake3(b"petek/seed/1" + struct.pack("<QQ", seed, index)).digest()[:8])[0]


def ids(n):
    return [i * i + 7 for i in range(n)]


CHAINS = [
    chain(ids(40), 16),
    chain(ids(40), 16, salt=b"pepper"),
    chain(ids(16), 16, tenant=b"acme"),
    chain(ids(512), 256, adapter=(b"sql", 3)),
    chain(ids(64), 32, adapter=(b"sql", 3), salt=b"pepper", tenant=b"acme"),
]
SEEDS = [(s, i) for s in (0, 1, 42, 2**63, 2**64 - 1) for i in (0, 1, 2, 63)]

print("//! Test vectors made by tests/vectors.py with Python's blake3 1.0.11. Changing one breaks every cache and seed.\n")
print("pub(crate) const CHAINS: [&[&str]; 5] = [")
for hashes in CHAINS:
    print("    &[")
    for h in hashes:
        print(f'        "{h}",')
    print("    ],")
print("];\n")
print("pub(crate) const SEEDS: &[(u64, u32, u64)] = &[")
for s, i in SEEDS:
    print(f"    ({s}, {i}, {seed(s, i)}),")
print("];")
