//! The open expressions of the numerics `n1` outside matmuls, each once: what is rounded where, in which order sums run.
//! Every function is written over `Lanes` and gives the same bits on every level.
//!
//! | what | expression |
//! |---|---|
//! | 2^x | k = round x, r = x − k; 1 + r·(degree 5 in r), Horner by FMA; × 2^k. 0 below 2^-126, ∞ from 2^128 |
//! | exp x | 2^(x · log2 e), the product rounded to f32 |
//! | ln x | x = m·2^e, m in [√½, √2), f = m − 1; f + (f³·(degree 8 in f) + e·lo − ½f²) + e·hi |
//! | sum, max | 4 accumulators of 16 lanes, ascending; (0+1)+(2+3); lanes halved 8-4-2-1 |
//! | norm | s = Σ fma(x, x, ·); r = 1 ÷ √(s ÷ n + eps); (x · r) · weight |
//! | SwiGLU | (g ÷ (1 + exp(−g))) · up |
//! | residual | x + y, or x + (y + bias) |
//! | rotary | fma(a, cos, 0 − b·sin), fma(b, cos, a·sin) for the pair (a, b) = (i, i + D/2) |
//! | softmax of a segment | t = s·c; m = max t; p = 2^(t − m); l = Σ p, as any sum, by a token's place in its segment |
//! | merge | m = max; u = 2^(m₁ − m), v = 2^(m₂ − m); l = fma(l₂, v, l₁·u), O likewise; at the end O · (1 ÷ l) + 0.0 |
//! | logprob | (x − max) − ln Σ exp(x − max) |

use crate::cpu::isa::Isa;
use crate::cpu::lanes::{LANES, Lanes, on_isa};

/// log2 e.
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// Tokens of a segment of attention: sums over more are merged at absolute multiples of it.
pub const SEG: usize = 256;

// ---- elementwise ------------------------------------------------------------------------------------------------

/// 2^x. Error below 0.77 units in the last place.
#[inline(always)]
#[allow(clippy::approx_constant, reason = "fitted coefficients, not constants")]
pub(crate) fn exp2<S: Lanes>(s: S, x: S::F) -> S::F {
    const C: [f32; 6] =
        [0.693_147_2, 0.240_226_48, 0.055_503_596, 0.009_618_499, 0.001_339_097, 0.000_153_293_1];
    let whole = s.round(x);
    let r = s.sub(x, whole);
    let mut p = s.splat(C[5]);
    for c in [C[4], C[3], C[2], C[1], C[0], 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    let inside = s.select_lt(x, s.splat(128.0), s.scale(p, whole), s.splat(f32::INFINITY));
    let y = s.select_lt(x, s.splat(-126.0), s.splat(0.0), inside);
    // NaN fails every comparison: it would have come out as infinity.
    s.select_nan(x, x, y)
}

/// e^x.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(s: S, x: S::F) -> S::F {
    exp2(s, s.mul(x, s.splat(LOG2_E)))
}

/// Natural logarithm: −∞ at zero, NaN below. Error below 0.81 units in the last
/// place.
#[inline(always)]
pub(crate) fn ln<S: Lanes>(s: S, x: S::F) -> S::F {
    const C: [f32; 9] = [
        0.333_333_13,
        -0.250_000_1,
        0.200_020_73,
        -0.166_679_96,
        0.142_203_27,
        -0.124_060_32,
        0.118_835_68,
        -0.116_714_49,
        0.067_509_56,
    ];
    // ln 2 in two parts: `HIGH` has 9 bits, so that its multiples are exact.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -0.000_212_194_44;
    let (zero, least) = (s.splat(0.0), s.splat(f32::MIN_POSITIVE));
    let normal = s.select_lt(x, least, s.mul(x, s.splat(8_388_608.0)), x);
    let (m, e) = s.split(normal);
    let e = s.sub(e, s.select_lt(x, least, s.splat(23.0), zero));
    let f = s.sub(m, s.splat(1.0));
    let mut q = s.splat(C[8]);
    for c in [C[7], C[6], C[5], C[4], C[3], C[2], C[1], C[0]] {
        q = s.fma(q, f, s.splat(c));
    }
    let square = s.mul(f, f);
    let small = s.fma(s.mul(square, f), q, s.mul(e, s.splat(LOW)));
    let y = s.fma(e, s.splat(HIGH), s.add(f, s.fma(square, s.splat(-0.5), small)));
    let y = s.select_lt(zero, x, y, s.splat(f32::NEG_INFINITY));
    let y = s.select_lt(x, zero, s.splat(f32::NAN), y);
    let y = s.select_lt(x, s.splat(f32::INFINITY), y, s.splat(f32::INFINITY));
    s.select_nan(x, x, y)
}

/// silu(gate) · up.
#[inline(always)]
fn swiglu_lanes<S: Lanes>(s: S, gate: S::F, up: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), gate));
    s.mul(s.div(gate, s.add(s.splat(1.0), e)), up)
}

/// `out = silu(gate) * up`.
///
/// *Panics*: if lengths differ.
pub fn swiglu(isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len(), "gate, up and out are as long as each other");
    on_isa!(isa, swiglu_on(gate: &[f32], up: &[f32], out: &mut [f32]))
}

#[inline(always)]
fn swiglu_on<S: Lanes>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gates, gate_rest) = gate.as_chunks::<LANES>();
    let (ups, up_rest) = up.as_chunks::<LANES>();
    let (outs, out_rest) = out.as_chunks_mut::<LANES>();
    for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
        s.store(swiglu_lanes(s, s.load(gate), s.load(up)), out);
    }
    if !out_rest.is_empty() {
        s.store_part(swiglu_lanes(s, s.load_part(gate_rest, 0.0), s.load_part(up_rest, 0.0)), out_rest);
    }
}

/// `x += y (+ bias)`.
///
/// *Panics*: if lengths differ.
pub fn add(isa: Isa, x: &mut [f32], y: &[f32], bias: Option<&[f32]>) {
    assert!(x.len() == y.len() && bias.is_none_or(|bias| bias.len() == y.len()), "rows of one length");
    on_isa!(isa, add_on(x: &mut [f32], y: &[f32], bias: Option<&[f32]>))
}

#[inline(always)]
fn add_on<S: Lanes>(_: S, x: &mut [f32], y: &[f32], bias: Option<&[f32]>) {
    // One addition a lane: no form that the compiler may choose has other bits.
    match bias {
        None => {
            for (x, y) in x.iter_mut().zip(y) {
                *x += y;
            }
        }
        Some(bias) => {
            for ((x, y), bias) in x.iter_mut().zip(y).zip(bias) {
                *x += y + bias;
            }
        }
    }
}

/// Rotates one head, of which `from` and `to` are each the whole: pairs are (i, i + D/2), angles those of the position.
///
/// *Panics*: if lengths do not fit.
pub fn rotate(isa: Isa, from: &[f32], cos: &[f32], sin: &[f32], to: &mut [f32]) {
    let half = cos.len();
    assert!(
        sin.len() == half && from.len() == 2 * half && to.len() == 2 * half,
        "half a head of cos and sin"
    );
    on_isa!(isa, rotate_on(from: &[f32], cos: &[f32], sin: &[f32], to: &mut [f32]))
}

#[inline(always)]
fn rotate_on<S: Lanes>(s: S, from: &[f32], cos: &[f32], sin: &[f32], to: &mut [f32]) {
    let half = cos.len();
    let ((from_a, from_b), (to_a, to_b)) = (from.split_at(half), to.split_at_mut(half));
    let mut i = 0;
    while i < half {
        let end = half.min(i + LANES);
        let (a, b) = (s.load_part(&from_a[i..end], 0.0), s.load_part(&from_b[i..end], 0.0));
        let (cos, sin) = (s.load_part(&cos[i..end], 0.0), s.load_part(&sin[i..end], 0.0));
        let minus = s.sub(s.splat(0.0), s.mul(b, sin));
        s.store_part(s.fma(a, cos, minus), &mut to_a[i..end]);
        s.store_part(s.fma(b, cos, s.mul(a, sin)), &mut to_b[i..end]);
        i = end;
    }
}

// ---- reductions -------------------------------------------------------------------------------------------------

/// What a reduction takes of each number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Term {
    /// Itself, added.
    Sum,
    /// Its square, added by FMA.
    Square,
    /// e^(x − shift), added.
    Exp,
    /// Itself, the larger kept.
    Max,
}

/// Σ x.
pub fn sum(isa: Isa, x: &[f32]) -> f32 {
    on_isa!(isa, sum_on(x: &[f32]) -> f32)
}

/// The largest; −∞ of none. NaN counts as −∞.
pub fn max(isa: Isa, x: &[f32]) -> f32 {
    on_isa!(isa, max_on(x: &[f32]) -> f32)
}

/// Σ e^(x − shift).
pub fn sum_exp(isa: Isa, x: &[f32], shift: f32) -> f32 {
    on_isa!(isa, sum_exp_on(x: &[f32], shift: f32) -> f32)
}

#[inline(always)]
pub(crate) fn sum_on<S: Lanes>(s: S, x: &[f32]) -> f32 {
    reduce(s, Term::Sum, x, 0.0)
}

#[inline(always)]
pub(crate) fn max_on<S: Lanes>(s: S, x: &[f32]) -> f32 {
    reduce(s, Term::Max, x, 0.0)
}

#[inline(always)]
pub(crate) fn sum_exp_on<S: Lanes>(s: S, x: &[f32], shift: f32) -> f32 {
    reduce(s, Term::Exp, x, shift)
}

/// The fixed tree. `term` is a constant where this is inlined.
///
/// Lanes that a short end lacks add +0, which changes no sum: one that begins at +0 is never −0.
#[inline(always)]
fn reduce<S: Lanes>(s: S, term: Term, x: &[f32], shift: f32) -> f32 {
    let shift = s.splat(shift);
    let least = if term == Term::Max || term == Term::Exp { f32::NEG_INFINITY } else { 0.0 };
    let mut sums = [s.splat(if term == Term::Max { f32::NEG_INFINITY } else { 0.0 }); 4];
    let (fours, rest) = x.as_chunks::<{ 4 * LANES }>();
    for four in fours {
        let (vectors, _) = four.as_chunks::<LANES>();
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = reduce_step(s, term, *sum, s.load(vector), shift);
        }
    }
    for (sum, vector) in sums.iter_mut().zip(rest.chunks(LANES)) {
        *sum = reduce_step(s, term, *sum, s.load_part(vector, least), shift);
    }
    reduce_tree(s, term, sums)
}

#[inline(always)]
fn reduce_step<S: Lanes>(s: S, term: Term, sum: S::F, x: S::F, shift: S::F) -> S::F {
    match term {
        Term::Sum => s.add(sum, x),
        Term::Square => s.fma(x, x, sum),
        Term::Exp => s.add(sum, exp(s, s.sub(x, shift))),
        Term::Max => s.max(x, sum),
    }
}

#[inline(always)]
fn reduce_tree<S: Lanes>(s: S, term: Term, [a, b, c, d]: [S::F; 4]) -> f32 {
    let max = term == Term::Max;
    let whole = if max { s.max(s.max(a, b), s.max(c, d)) } else { s.add(s.add(a, b), s.add(c, d)) };
    let mut lanes = s.lanes(whole);
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            let (x, y) = (lanes[i], lanes[i + half]);
            lanes[i] = if !max {
                x + y
            } else if x > y {
                x
            } else {
                y
            };
        }
    }
    lanes[0]
}

/// `out = x / sqrt(mean(x²) + eps) * weight`.
///
/// *Panics*: if lengths differ.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == out.len() && weight.len() == out.len(), "x, weight and out are as long as each other");
    on_isa!(isa, rms_norm_on(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]))
}

#[inline(always)]
fn rms_norm_on<S: Lanes>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = reduce(s, Term::Square, x, 0.0) / x.len() as f32;
    let r = 1.0 / (mean + eps).sqrt();
    // Two multiplications a lane: no form that the compiler may choose has other bits.
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        *out = (x * r) * weight;
    }
}

// ---- attention's ------------------------------------------------------------------------------------------------

/// What a row has seen of its sequence so far, beside its O.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// The largest t.
    pub(crate) max: f32,
    /// Σ p.
    pub(crate) sum: f32,
}

/// Softmax of a segment's scores over its first `visible` tokens, in place: s becomes p. Scores behind them are left alone
/// up to the next multiple of 16, where they become +0.
#[inline(always)]
pub(crate) fn soften<S: Lanes>(s: S, scores: &mut [f32; SEG], visible: usize, c: f32) -> Seen {
    const INDEX: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    let (vectors, _) = scores.as_chunks_mut::<LANES>();
    let vectors = &mut vectors[..visible.div_ceil(LANES)];
    let (lowest, c) = (s.splat(f32::NEG_INFINITY), s.splat(c));
    let mut tops = [lowest; 4];
    for (i, vector) in vectors.iter_mut().enumerate() {
        // A select, not a product: what stands behind the visible may be NaN.
        let seen = s.splat((visible - i * LANES) as f32);
        let t = s.select_lt(s.load(&INDEX), seen, s.mul(s.load(vector), c), lowest);
        tops[i % 4] = s.max(t, tops[i % 4]);
        s.store(t, vector);
    }
    let max = reduce_tree(s, Term::Max, tops);
    let mut sums = [s.splat(0.0); 4];
    for (i, vector) in vectors.iter_mut().enumerate() {
        let p = exp2(s, s.sub(s.load(vector), s.splat(max)));
        sums[i % 4] = s.add(sums[i % 4], p);
        s.store(p, vector);
    }
    Seen { max, sum: reduce_tree(s, Term::Sum, sums) }
}

/// Merges a later segment into what was seen before: `o` and `seen` change.
#[inline(always)]
pub(crate) fn merge<S: Lanes>(s: S, seen: &mut Seen, o: &mut [f32], later: Seen, later_o: &[f32]) {
    let max = if later.max > seen.max { later.max } else { seen.max };
    let u = exp2(s, s.splat(seen.max - max));
    let v = exp2(s, s.splat(later.max - max));
    let sum = s.fma(s.splat(later.sum), v, s.mul(s.splat(seen.sum), u));
    *seen = Seen { max, sum: s.lanes(sum)[0] };
    let (o, _) = o.as_chunks_mut::<LANES>();
    let (later_o, _) = later_o.as_chunks::<LANES>();
    for (o, later) in o.iter_mut().zip(later_o) {
        s.store(s.fma(s.load(later), v, s.mul(s.load(o), u)), o);
    }
}

/// The result of a row: O ÷ l, with no −0.
#[inline(always)]
pub(crate) fn finish<S: Lanes>(_: S, seen: Seen, o: &[f32], out: &mut [f32]) {
    let r = 1.0 / seen.sum;
    for (o, out) in o.iter().zip(out) {
        *out = o * r + 0.0;
    }
}

// ---- bf16 -------------------------------------------------------------------------------------------------------

/// Rounds to bf16.
///
/// *Panics*: if lengths differ.
pub fn round_bf16(isa: Isa, x: &[f32], out: &mut [u16]) {
    assert!(x.len() == out.len(), "x and out are as long as each other");
    on_isa!(isa, round_bf16_on(x: &[f32], out: &mut [u16]))
}

#[inline(always)]
pub(crate) fn round_bf16_on<S: Lanes>(s: S, x: &[f32], out: &mut [u16]) {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let (outs, out_rest) = out.as_chunks_mut::<LANES>();
    for (x, out) in vectors.iter().zip(outs) {
        s.store_bf16(s.load(x), out);
    }
    if !rest.is_empty() {
        let mut whole = [0; LANES];
        s.store_bf16(s.load_part(rest, 0.0), &mut whole);
        out_rest.copy_from_slice(&whole[..rest.len()]);
    }
}

/// bf16 to f32, exactly.
#[cfg(test)]
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::kernel_plain::fma_flushed;
    use crate::cpu::matmul::bf16_bits;

    /// The levels of this processor.
    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.available())
    }

    /// xorshift64, seeded: numbers of all magnitudes come by `from_bits`.
    struct Random(u64);

    impl Random {
        fn bits(&mut self) -> u32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 32) as u32
        }

        /// In (−1, 1).
        fn unit(&mut self) -> f32 {
            self.bits() as i32 as f32 / 2_147_483_648.0
        }

        fn row(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.unit() * 8.0).collect()
        }
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    /// One lane function over a row whose length is a multiple of 16.
    macro_rules! over_row {
        ($name:ident, $function:ident) => {
            fn $name(isa: Isa, x: &mut [f32]) {
                #[inline(always)]
                fn row<S: Lanes>(s: S, x: &mut [f32]) {
                    for x in x.as_chunks_mut::<LANES>().0 {
                        s.store($function(s, s.load(x)), x);
                    }
                }
                on_isa!(isa, row(x: &mut [f32]))
            }
        };
    }
    over_row!(exp2_row, exp2);
    over_row!(ln_row, ln);

    /// Error of `y` in units of the last place of f32 at `exact`.
    fn ulps(y: f32, exact: f64) -> f64 {
        let ulp = f64::from_bits((exact.to_bits() >> 52 & 0x7ff) << 52) / 8_388_608.0;
        ((f64::from(y) - exact) / ulp).abs()
    }

    /// In a release build every number is tried, else every 61st.
    const STRIDE: usize = if cfg!(debug_assertions) { 61 } else { 1 };

    #[test]
    fn ln_is_close_on_all_positive_numbers() {
        // ln x = ln mantissa + exponent · ln 2: so few logarithms serve all numbers.
        let mantissas: Vec<f64> = (0..1 << 23).map(|m| libm::log1p(f64::from(m) / 8_388_608.0)).collect();
        let exact = |x: f32| {
            let wide = f64::from(x).to_bits();
            let exponent = (wide >> 52) as i32 - 1023;
            mantissas[(wide >> 29 & 0x7f_ffff) as usize] + f64::from(exponent) * std::f64::consts::LN_2
        };
        let isa = Isa::detect().expect("a level");
        let mut worst = 0.0_f64;
        let mut x = vec![0.0; 4096];
        for first in (1..0x7f80_0000_u32).step_by(4096 * STRIDE) {
            let number = |i: usize| f32::from_bits((first + (i * STRIDE) as u32).min(0x7f7f_ffff));
            for (i, x) in x.iter_mut().enumerate() {
                *x = number(i);
            }
            ln_row(isa, &mut x);
            for (i, y) in x.iter().enumerate() {
                let exact = exact(number(i));
                let error = if exact == 0.0 { f64::from(y.abs()) } else { ulps(*y, exact) };
                worst = worst.max(error);
            }
        }
        assert!(worst < 0.81, "{worst} units in the last place");
    }

    #[test]
    fn powers_of_two_are_close_everywhere() {
        let isa = Isa::detect().expect("a level");
        let mut worst = 0.0_f64;
        let mut row = vec![0.0; 4096];
        // From −126 to 128, by 2^-17, at which the step is finer than f32 near the ends.
        let step = 1.0 / 131_072.0_f32;
        for first in (0..254 << 17).step_by(4096 * STRIDE) {
            let number =
                |i: usize| (-126.0 + (first + i * STRIDE) as f64 * f64::from(step)).min(127.999) as f32;
            for (i, x) in row.iter_mut().enumerate() {
                *x = number(i);
            }
            exp2_row(isa, &mut row);
            for (i, y) in row.iter().enumerate() {
                worst = worst.max(ulps(*y, libm::exp2(f64::from(number(i)))));
            }
        }
        assert!(worst < 0.77, "{worst} units in the last place");
    }

    #[test]
    fn the_ends_of_exp2_and_ln_are_as_stated() {
        let (infinity, nan) = (f32::INFINITY, f32::NAN);
        let below = |x: f32| x.next_down();
        for isa in levels() {
            let mut x = [0.0; 16];
            let cases = [
                (0.0, 1.0),
                (-0.0, 1.0),
                (1.0, 2.0),
                (-1.0, 0.5),
                (127.0, 2.0_f32.powi(127)),
                (128.0, infinity),
                (infinity, infinity),
                (-126.0, f32::MIN_POSITIVE),
                (below(-126.0), 0.0),
                (-1e30, 0.0),
                (1e30, infinity),
                (-infinity, 0.0),
            ];
            for (i, case) in cases.iter().enumerate() {
                x[i] = case.0;
            }
            exp2_row(isa, &mut x);
            assert_eq!(bits(&x[..cases.len()]), bits(&cases.map(|case| case.1)), "{isa}");
            let mut x =
                [1.0, 0.0, -0.0, infinity, -1.0, -infinity, nan, -1e-40, nan, 1., 1., 1., 1., 1., 1., 1.];
            ln_row(isa, &mut x);
            assert_eq!(bits(&x[..4]), bits(&[0.0, -infinity, -infinity, infinity]), "{isa}");
            assert!(x[4..9].iter().all(|y| y.is_nan()), "{isa}: {x:?}");
            let mut x = [nan; 16];
            exp2_row(isa, &mut x);
            assert!(x.iter().all(|y| y.is_nan()), "{isa}");
        }
    }

    #[test]
    fn levels_agree_on_exp2_and_ln_in_every_bit() {
        let mut random = Random(0x5eed_0001);
        let numbers: Vec<f32> = (0..1 << 18)
            .map(|i| if i % 2 == 0 { random.unit() * 140.0 } else { f32::from_bits(random.bits()) })
            .filter(|x| !x.is_nan())
            .collect();
        let numbers = &numbers[..numbers.len() / 16 * 16];
        for row in [exp2_row, ln_row] {
            let mut expected = numbers.to_vec();
            row(Isa::Portable, &mut expected);
            for isa in levels() {
                let mut actual = numbers.to_vec();
                row(isa, &mut actual);
                let differs = |i: &usize| {
                    let (a, b) = (actual[*i], expected[*i]);
                    a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan())
                };
                let first = (0..numbers.len()).find(differs);
                assert!(first.is_none(), "{isa}: {:?}", first.map(|i| (numbers[i], actual[i], expected[i])));
            }
        }
    }

    /// The reduction as the page has it, one number after the other.
    fn plain_tree(
        x: &[f32],
        start: f32,
        step: impl Fn(f32, f32) -> f32,
        join: impl Fn(f32, f32) -> f32,
    ) -> f32 {
        let mut sums = [[start; 16]; 4];
        for (i, x) in x.iter().enumerate() {
            let sum = &mut sums[i / 16 % 4][i % 16];
            *sum = step(*sum, *x);
        }
        let [a, b, c, d] = sums;
        let mut lanes: [f32; 16] = std::array::from_fn(|i| join(join(a[i], b[i]), join(c[i], d[i])));
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = join(lanes[i], lanes[i + half]);
            }
        }
        lanes[0]
    }

    #[test]
    fn reductions_follow_the_tree_on_every_level() {
        let mut random = Random(0x5eed_0002);
        for n in (0..200).chain([255, 256, 576, 2048, 4097]) {
            let x = random.row(n);
            let add = |a: f32, b: f32| a + b;
            let larger = |a: f32, b: f32| if a > b { a } else { b };
            let sum = plain_tree(&x, 0.0, add, add);
            let max = plain_tree(&x, f32::NEG_INFINITY, larger, larger);
            let mut powers: Vec<f32> = x.iter().map(|x| (x - 8.0) * LOG2_E).collect();
            powers.resize(n.next_multiple_of(16), 0.0);
            exp2_row(Isa::Portable, &mut powers);
            let exps = plain_tree(&powers[..n], 0.0, add, add);
            for isa in levels() {
                let actual = [super::sum(isa, &x), super::max(isa, &x), sum_exp(isa, &x, 8.0)];
                assert_eq!(bits(&actual), bits(&[sum, max, exps]), "{n} numbers, {isa}");
            }
        }
    }

    #[test]
    fn the_norm_is_the_pages_expression_on_every_level() {
        let mut random = Random(0x5eed_0003);
        for n in [2, 16, 30, 64, 100, 576, 2048] {
            let (x, weight) = (random.row(n), random.row(n));
            let squares = plain_tree(&x, 0.0, |sum, x| x.mul_add(x, sum), |a, b| a + b);
            let r = 1.0 / (squares / n as f32 + 1e-5).sqrt();
            let expected: Vec<f32> = x.iter().zip(&weight).map(|(x, w)| (x * r) * w).collect();
            for isa in levels() {
                let mut out = vec![0.0; n];
                rms_norm(isa, &x, &weight, 1e-5, &mut out);
                assert_eq!(bits(&out), bits(&expected), "{n}, {isa}");
            }
        }
    }

    #[test]
    fn rows_are_close_to_f64_and_equal_on_every_level() {
        let mut random = Random(0x5eed_0004);
        for n in [2, 16, 30, 64, 100, 128] {
            let (gate, up) = (random.row(n), random.row(n));
            let angles: Vec<f64> = (0..n / 2).map(|i| i as f64 * 0.7).collect();
            let (cos, sin): (Vec<f32>, Vec<f32>) =
                angles.iter().map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
            let mut first: Option<[Vec<u32>; 3]> = None;
            for isa in levels() {
                let (mut glu, mut sum, mut turned) = (vec![0.0; n], gate.clone(), vec![0.0; n]);
                swiglu(isa, &gate, &up, &mut glu);
                add(isa, &mut sum, &up, Some(&glu));
                rotate(isa, &gate, &cos, &sin, &mut turned);
                for i in 0..n {
                    let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                    let exact = g / (1.0 + (-g).exp()) * u;
                    // exp's argument is rounded: 8 · log2 e · 2^-24 relative, and a few roundings more.
                    assert!(
                        (f64::from(glu[i]) - exact).abs() <= 2e-6 * exact.abs() + 1e-12,
                        "{g} {u}: {}",
                        glu[i]
                    );
                    assert_eq!(sum[i].to_bits(), (gate[i] + (up[i] + glu[i])).to_bits());
                    let (j, half) = (i % (n / 2), n / 2);
                    let (a, b) = (f64::from(gate[j]), f64::from(gate[j + half]));
                    let (c, s) = (angles[j].cos(), angles[j].sin());
                    let exact = if i < half { a * c - b * s } else { b * c + a * s };
                    assert!((f64::from(turned[i]) - exact).abs() <= 3e-6, "{a} {b}: {}", turned[i]);
                }
                let all = [bits(&glu), bits(&sum), bits(&turned)];
                assert_eq!(first.get_or_insert_with(|| all.clone()), &all, "{n}, {isa}");
            }
        }
    }

    #[test]
    fn bf16_rounding_is_the_instructions_on_every_level() {
        let edges = [
            0,
            1,
            0x7f_ffff,
            0x80_0000,
            0x3f80_8000,
            0x3f81_8000,
            0x7f7f_ffff,
            0x7f80_0000,
            0x7f80_0001,
            0x7fc1_2345,
        ];
        let mut random = Random(0x5eed_0005);
        let numbers: Vec<f32> = edges
            .iter()
            .flat_map(|bits| [*bits, bits | 0x8000_0000])
            .chain((0..100_001).map(|_| random.bits()))
            .map(f32::from_bits)
            .collect();
        for isa in levels() {
            let mut rounded = vec![0; numbers.len()];
            round_bf16(isa, &numbers, &mut rounded);
            for (x, y) in numbers.iter().zip(&rounded) {
                let exact = half::bf16::from_f32(*x).to_bits();
                let expected = if x.abs() < f32::MIN_POSITIVE { exact & 0x8000 } else { exact };
                assert_eq!((*y, *y), (expected, bf16_bits(*x)), "{x:e} {isa}");
                assert!(x.is_nan() == widen(*y).is_nan());
            }
        }
    }

    fn dot_all(isa: Isa, acc: &mut [f32; LANES], a: &[u32; LANES], b: &[u32; LANES]) {
        #[inline(always)]
        fn dot<S: Lanes>(s: S, acc: &mut [f32; LANES], a: &[u32; LANES], b: &[u32; LANES]) {
            s.store(s.dot(s.load(acc), s.load_words(a), s.load_words(b)), acc);
        }
        on_isa!(isa, dot(acc: &mut [f32; LANES], a: &[u32; LANES], b: &[u32; LANES]))
    }

    /// Half of the tiles are where results are, or border on, denormal.
    #[test]
    fn the_pair_step_is_two_flushed_fmas_odd_first_on_every_level() {
        let mut random = Random(0x5eed_0006);
        for round in 0..20_000 {
            let mut number = || {
                let bits = random.bits();
                let exponent = if round % 2 == 0 { 119 + (bits >> 16) % 16 } else { 60 + (bits >> 16) % 8 };
                (bits & 0x807f) | exponent << 7
            };
            let a: [u32; LANES] = std::array::from_fn(|_| number() | number() << 16);
            let b: [u32; LANES] = std::array::from_fn(|_| number() | number() << 16);
            let acc: [f32; LANES] =
                std::array::from_fn(|i| if i % 3 == 0 { 0.0 } else { widen(number() as u16) });
            let acc = if round % 2 == 0 { acc } else { acc.map(|x| x * f32::from_bits((127 - 62) << 23)) };
            let acc = acc.map(|x| if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x });
            let expected: [u32; LANES] = std::array::from_fn(|i| {
                let (odd, even) = (|w: u32| widen((w >> 16) as u16), |w: u32| widen(w as u16));
                let sum = fma_flushed(odd(a[i]), odd(b[i]), acc[i]);
                fma_flushed(even(a[i]), even(b[i]), sum).to_bits()
            });
            for isa in levels() {
                let mut actual = acc;
                dot_all(isa, &mut actual, &a, &b);
                assert_eq!(actual.map(f32::to_bits), expected, "round {round}, {isa}");
            }
        }
    }
}
