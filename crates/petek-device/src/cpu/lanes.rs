//! Sixteen f32 lanes on every instruction level: the vocabulary in which [`math`](super::math), attention and sampling
//! are written once, so that every level runs the same expressions in the same order and gives the same bits.
//!
//! A level is a token. To have one is to know that the processor can run it, so its operations are safe to call; they
//! become single instructions because every function on the way from [`on_isa!`] down is `#[inline(always)]`. No
//! closure stands on that way: one that is not inlined would lose the level's instructions.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::cpu::kernel_plain::TWO_48;
use crate::cpu::matmul::bf16_bits;

/// Lanes of every level: two registers of AVX2, one of AVX-512.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of f32, or of words that hold a pair of bf16 each (the even element in the low half).
pub(crate) trait Lanes: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 words.
    type W: Copy;
    /// Rows of which two vectors of sums each fit the registers, beside two of memory: for attention's scores.
    const SCORE_ROWS: usize;
    /// Rows of which four fit, beside four of memory: for attention's weighted values.
    const WEIGH_ROWS: usize;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: b where one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { x } else { y }`.
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// `if a is NaN { x } else { y }`.
    fn select_nan(self, a: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// To the nearest whole number, even among equals.
    fn round(self, x: Self::F) -> Self::F;
    /// `x * 2^k` for a whole k, where x and the result are normal: k is added to the exponent's bits.
    fn scale(self, x: Self::F, k: Self::F) -> Self::F;
    /// (m, e) with `x = m * 2^e` and m in [√½, √2), for normal positive x.
    fn split(self, x: Self::F) -> (Self::F, Self::F);
    fn abs(self, x: Self::F) -> Self::F;
    /// A zero of x's sign.
    fn signed_zero(self, x: Self::F) -> Self::F;
    /// Bit i: `x[i] >= y[i]`.
    fn mask_ge(self, x: Self::F, y: Self::F) -> u16;

    fn splat_word(self, w: u32) -> Self::W;
    fn load_words(self, w: &[u32; LANES]) -> Self::W;
    fn words_as_f32(self, w: Self::W) -> Self::F;
    /// A word's upper 31 bits as a number.
    fn halves_as_f32(self, w: Self::W) -> Self::F;
    /// The words whose odd elements are cleared.
    fn even_only(self, w: Self::W) -> Self::W;
    /// The bf16 step of the numerics: `fma(a.even, b.even, fma(a.odd, b.odd, acc))`, each result flushed.
    fn dot(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F;
    /// Rounds to bf16.
    fn store_bf16(self, x: Self::F, out: &mut [u16; LANES]);

    /// As [`fma_flushed`](crate::cpu::kernel_plain::fma_flushed), whose comments say why.
    #[inline(always)]
    fn fma_flushed(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let sum = self.fma(a, b, c);
        let size = self.abs(sum);
        let normal = self.mask_ge(size, self.splat(f32::MIN_POSITIVE.next_up()));
        if normal == u16::MAX {
            return sum;
        }
        let (a, b) = (self.mul(a, self.splat(TWO_48)), self.mul(b, self.splat(TWO_48)));
        let c = self.mul(c, self.splat(TWO_48 * TWO_48));
        let scaled = self.abs(self.fma(a, b, c));
        let least = self.splat(f32::MIN_POSITIVE * TWO_48 * TWO_48);
        let flushed = self.select_lt(scaled, least, self.signed_zero(sum), sum);
        self.select_lt(size, self.splat(f32::MIN_POSITIVE.next_up()), flushed, sum)
    }

    /// The first lanes from a short slice, `fill` in the rest.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::F {
        let mut whole = [fill; LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load(&whole)
    }

    /// The first lanes to a short slice.
    #[inline(always)]
    fn store_part(self, x: Self::F, out: &mut [f32]) {
        let n = out.len();
        out.copy_from_slice(&self.lanes(x)[..n]);
    }

    /// The lanes as an array.
    #[inline(always)]
    fn lanes(self, x: Self::F) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        self.store(x, &mut out);
        out
    }
}

/// Runs `$kernel::<level>(token, args…)` as machine code of the level `$isa`.
///
/// *Panics*: if the processor lacks the level.
macro_rules! on_isa {
    ($isa:expr, $kernel:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $out:ty)?) => {{
        #[cfg_attr(target_arch = "x86_64", target_feature(enable = "fma"))]
        #[allow(clippy::too_many_arguments)]
        fn portable($($arg: $ty),*) $(-> $out)? {
            $kernel($crate::cpu::lanes::Portable::new(), $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        #[allow(clippy::too_many_arguments)]
        fn avx2($($arg: $ty),*) $(-> $out)? {
            $kernel($crate::cpu::lanes::Avx2::new(), $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
        #[allow(clippy::too_many_arguments)]
        fn avx512($($arg: $ty),*) $(-> $out)? {
            $kernel($crate::cpu::lanes::Avx512::<false>::new(), $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
        #[allow(clippy::too_many_arguments)]
        fn avx512_bf16($($arg: $ty),*) $(-> $out)? {
            $kernel($crate::cpu::lanes::Avx512::<true>::bf16(), $($arg),*)
        }
        let isa: $crate::cpu::isa::Isa = $isa;
        assert!(isa.available(), "this processor has no {isa}");
        // SAFETY: `available` has just said that the processor has every feature of the level.
        #[allow(unused_unsafe)]
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::isa::Isa::Avx2 => avx2($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::isa::Isa::Avx512 => avx512($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::isa::Isa::Avx512Bf16 => avx512_bf16($($arg),*),
                _ => portable($($arg),*),
            }
        }
    }};
}
pub(crate) use on_isa;

// ---- portable ---------------------------------------------------------------------------------------------------

/// Arrays and loops of a fixed length, which the compiler may widen: lanes never meet.
#[derive(Clone, Copy)]
pub(crate) struct Portable(());

impl Portable {
    /// Asks for the fused multiply-add, so that `mul_add` is an instruction and not a call into the system's library.
    #[inline]
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "fma"))]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// An array of lanes, each made by an expression of its index.
macro_rules! each {
    ($i:ident => $lane:expr) => {{
        let mut out = [Default::default(); LANES];
        let mut $i = 0;
        while $i < LANES {
            out[$i] = $lane;
            $i += 1;
        }
        out
    }};
}

impl Lanes for Portable {
    type F = [f32; LANES];
    type W = [u32; LANES];
    const SCORE_ROWS: usize = 2;
    const WEIGH_ROWS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each!(i => a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        each!(i => if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn select_nan(self, a: Self::F, x: Self::F, y: Self::F) -> Self::F {
        each!(i => if a[i].is_nan() { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        // Beyond 2^23 every f32 is whole. Below, adding 1.5 * 2^23 leaves no bits for the fraction.
        const WHOLE: f32 = 12_582_912.0;
        each!(i => if x[i].abs() < 8_388_608.0 { (x[i] + WHOLE) - WHOLE } else { x[i] })
    }
    #[inline(always)]
    fn scale(self, x: Self::F, k: Self::F) -> Self::F {
        each!(i => f32::from_bits(x[i].to_bits().wrapping_add((k[i] as i32 as u32) << 23)))
    }
    #[inline(always)]
    fn split(self, x: Self::F) -> (Self::F, Self::F) {
        let e = each!(i => (x[i].to_bits().wrapping_sub(ROOT_HALF) as i32) >> 23);
        let m = each!(i => f32::from_bits(x[i].to_bits().wrapping_sub((e[i] as u32) << 23)));
        (m, each!(i => e[i] as f32))
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        each!(i => x[i].abs())
    }
    #[inline(always)]
    fn signed_zero(self, x: Self::F) -> Self::F {
        each!(i => f32::from_bits(x[i].to_bits() & SIGN))
    }
    #[inline(always)]
    fn mask_ge(self, x: Self::F, y: Self::F) -> u16 {
        let bits: [u16; LANES] = each!(i => u16::from(x[i] >= y[i]) << i);
        bits.iter().fold(0, |mask, bit| mask | bit)
    }

    #[inline(always)]
    fn splat_word(self, w: u32) -> Self::W {
        [w; LANES]
    }
    #[inline(always)]
    fn load_words(self, w: &[u32; LANES]) -> Self::W {
        *w
    }
    #[inline(always)]
    fn words_as_f32(self, w: Self::W) -> Self::F {
        each!(i => f32::from_bits(w[i]))
    }
    #[inline(always)]
    fn halves_as_f32(self, w: Self::W) -> Self::F {
        each!(i => (w[i] >> 1) as f32)
    }
    #[inline(always)]
    fn even_only(self, w: Self::W) -> Self::W {
        each!(i => w[i] & 0xffff)
    }
    #[inline(always)]
    fn dot(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F {
        let acc = self.fma_flushed(each!(i => odd(a[i])), each!(i => odd(b[i])), acc);
        self.fma_flushed(each!(i => even(a[i])), each!(i => even(b[i])), acc)
    }
    #[inline(always)]
    fn store_bf16(self, x: Self::F, out: &mut [u16; LANES]) {
        *out = each!(i => bf16_bits(x[i]));
    }
}

/// Bits of √½, rounded down: where [`Lanes::split`] cuts.
const ROOT_HALF: u32 = 0x3f35_04f3;

const SIGN: u32 = 0x8000_0000;

/// A pair's odd element.
#[inline(always)]
fn odd(w: u32) -> f32 {
    f32::from_bits(w & 0xffff_0000)
}

/// A pair's even element.
#[inline(always)]
fn even(w: u32) -> f32 {
    f32::from_bits(w << 16)
}

// ---- AVX2 -------------------------------------------------------------------------------------------------------

/// Two registers of AVX2.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// Both halves, each by an expression of its index, with the token's features.
#[cfg(target_arch = "x86_64")]
macro_rules! both {
    ($i:ident => $half:expr) => {{
        // SAFETY: whoever holds the token `Avx2` got it on a processor with AVX2 and FMA; arrays are as long as
        // the loads and stores that take their halves.
        unsafe {
            [
                {
                    const $i: usize = 0;
                    $half
                },
                {
                    const $i: usize = 1;
                    $half
                },
            ]
        }
    }};
}

#[cfg(target_arch = "x86_64")]
#[allow(non_upper_case_globals)]
impl Lanes for Avx2 {
    type F = [__m256; 2];
    type W = [__m256i; 2];
    const SCORE_ROWS: usize = 2;
    const WEIGH_ROWS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        both!(_i => _mm256_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        both!(i => _mm256_loadu_ps(x.as_ptr().add(8 * i)))
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        both!(i => _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), x[i]));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(i => _mm256_add_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(i => _mm256_sub_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(i => _mm256_mul_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(i => _mm256_div_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(i => _mm256_fmadd_ps(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(i => _mm256_max_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        both!(i => _mm256_blendv_ps(y[i], x[i], _mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i])))
    }
    #[inline(always)]
    fn select_nan(self, a: Self::F, x: Self::F, y: Self::F) -> Self::F {
        both!(i => _mm256_blendv_ps(y[i], x[i], _mm256_cmp_ps::<_CMP_UNORD_Q>(a[i], a[i])))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        both!(i => _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x[i]))
    }
    #[inline(always)]
    fn scale(self, x: Self::F, k: Self::F) -> Self::F {
        both!(i => {
            let k = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(k[i]));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x[i]), k))
        })
    }
    #[inline(always)]
    fn split(self, x: Self::F) -> (Self::F, Self::F) {
        let e = both!(i => {
            let bits = _mm256_castps_si256(x[i]);
            _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, _mm256_set1_epi32(ROOT_HALF as i32)))
        });
        let m = both!(i => {
            let bits = _mm256_castps_si256(x[i]);
            _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(e[i])))
        });
        (m, both!(i => _mm256_cvtepi32_ps(e[i])))
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        both!(i => _mm256_andnot_ps(_mm256_set1_ps(-0.0), x[i]))
    }
    #[inline(always)]
    fn signed_zero(self, x: Self::F) -> Self::F {
        both!(i => _mm256_and_ps(_mm256_set1_ps(-0.0), x[i]))
    }
    #[inline(always)]
    fn mask_ge(self, x: Self::F, y: Self::F) -> u16 {
        let [low, high] = both!(i => _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x[i], y[i])));
        (low | (high << 8)) as u16
    }

    #[inline(always)]
    fn splat_word(self, w: u32) -> Self::W {
        both!(_i => _mm256_set1_epi32(w as i32))
    }
    #[inline(always)]
    fn load_words(self, w: &[u32; LANES]) -> Self::W {
        both!(i => _mm256_loadu_si256(w.as_ptr().add(8 * i).cast()))
    }
    #[inline(always)]
    fn words_as_f32(self, w: Self::W) -> Self::F {
        both!(i => _mm256_castsi256_ps(w[i]))
    }
    #[inline(always)]
    fn halves_as_f32(self, w: Self::W) -> Self::F {
        both!(i => _mm256_cvtepi32_ps(_mm256_srli_epi32::<1>(w[i])))
    }
    #[inline(always)]
    fn even_only(self, w: Self::W) -> Self::W {
        both!(i => _mm256_and_si256(w[i], _mm256_set1_epi32(0xffff)))
    }
    #[inline(always)]
    fn dot(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F {
        let high = both!(_i => _mm256_set1_epi32(0xffff_0000_u32 as i32));
        let a_odd = both!(i => _mm256_castsi256_ps(_mm256_and_si256(a[i], high[i])));
        let b_odd = both!(i => _mm256_castsi256_ps(_mm256_and_si256(b[i], high[i])));
        let acc = self.fma_flushed(a_odd, b_odd, acc);
        let a_even = both!(i => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a[i])));
        let b_even = both!(i => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b[i])));
        self.fma_flushed(a_even, b_even, acc)
    }
    #[inline(always)]
    fn store_bf16(self, x: Self::F, out: &mut [u16; LANES]) {
        let [low, high] = both!(i => bf16_avx2(x[i]));
        // SAFETY: as in `both!`; `out` is 32 bytes long. The pack works within halves of 128 bits, the permutation
        // puts its quarters in order.
        unsafe {
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), packed);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn flush_avx2(x: __m256) -> __m256 {
    let sign = _mm256_set1_ps(-0.0);
    let small = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, x), _mm256_set1_ps(f32::MIN_POSITIVE));
    _mm256_andnot_ps(_mm256_andnot_ps(sign, small), x)
}

/// As [`bf16_bits`], in the low halves of the words.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bf16_avx2(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(flush_avx2(x));
    let high = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    let nearest = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
    let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_blendv_epi8(nearest, quiet, nan)
}

// ---- AVX-512 ----------------------------------------------------------------------------------------------------

/// One register of AVX-512; with `BF16`, its dot products and conversions too.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(());

#[cfg(target_arch = "x86_64")]
impl Avx512<false> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512<true> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
    pub(crate) fn bf16() -> Self {
        Self(())
    }
}

/// An expression with the token's features.
#[cfg(target_arch = "x86_64")]
macro_rules! wide {
    ($x:expr) => {{
        // SAFETY: whoever holds the token `Avx512` got it on a processor with AVX-512 F, BW, VL and DQ (and BF16 where
        // the token says so); arrays are as long as the loads and stores that take them.
        unsafe { $x }
    }};
}

#[cfg(target_arch = "x86_64")]
impl<const BF16: bool> Lanes for Avx512<BF16> {
    type F = __m512;
    type W = __m512i;
    const SCORE_ROWS: usize = 8;
    const WEIGH_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        wide!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        wide!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        wide!(_mm512_storeu_ps(out.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        wide!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        wide!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        wide!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        wide!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        wide!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        wide!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        wide!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn select_nan(self, a: Self::F, x: Self::F, y: Self::F) -> Self::F {
        wide!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), y, x))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        wide!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }
    #[inline(always)]
    fn scale(self, x: Self::F, k: Self::F) -> Self::F {
        wide!({
            let k = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(k));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), k))
        })
    }
    #[inline(always)]
    fn split(self, x: Self::F) -> (Self::F, Self::F) {
        wide!({
            let bits = _mm512_castps_si512(x);
            let e = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(ROOT_HALF as i32)));
            let m = _mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(e));
            (_mm512_castsi512_ps(m), _mm512_cvtepi32_ps(e))
        })
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        wide!(_mm512_abs_ps(x))
    }
    #[inline(always)]
    fn signed_zero(self, x: Self::F) -> Self::F {
        wide!(_mm512_and_ps(_mm512_set1_ps(-0.0), x))
    }
    #[inline(always)]
    fn mask_ge(self, x: Self::F, y: Self::F) -> u16 {
        wide!(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, y))
    }

    #[inline(always)]
    fn splat_word(self, w: u32) -> Self::W {
        wide!(_mm512_set1_epi32(w as i32))
    }
    #[inline(always)]
    fn load_words(self, w: &[u32; LANES]) -> Self::W {
        wide!(_mm512_loadu_si512(w.as_ptr().cast()))
    }
    #[inline(always)]
    fn words_as_f32(self, w: Self::W) -> Self::F {
        wide!(_mm512_castsi512_ps(w))
    }
    #[inline(always)]
    fn halves_as_f32(self, w: Self::W) -> Self::F {
        wide!(_mm512_cvtepi32_ps(_mm512_srli_epi32::<1>(w)))
    }
    #[inline(always)]
    fn even_only(self, w: Self::W) -> Self::W {
        wide!(_mm512_and_si512(w, _mm512_set1_epi32(0xffff)))
    }
    #[inline(always)]
    fn dot(self, acc: Self::F, a: Self::W, b: Self::W) -> Self::F {
        if BF16 {
            // SAFETY: a token with `BF16` was got on a processor that has it; a register of bf16 and one of words are
            // the same 64 bytes.
            return unsafe {
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(a),
                    std::mem::transmute::<__m512i, __m512bh>(b),
                )
            };
        }
        let high = wide!(_mm512_set1_epi32(0xffff_0000_u32 as i32));
        let a_odd = wide!(_mm512_castsi512_ps(_mm512_and_si512(a, high)));
        let b_odd = wide!(_mm512_castsi512_ps(_mm512_and_si512(b, high)));
        let acc = self.fma_flushed(a_odd, b_odd, acc);
        let a_even = wide!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)));
        let b_even = wide!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)));
        self.fma_flushed(a_even, b_even, acc)
    }
    #[inline(always)]
    fn store_bf16(self, x: Self::F, out: &mut [u16; LANES]) {
        // SAFETY: as in `dot` and `wide!`; `out` is 32 bytes long.
        unsafe {
            let rounded: __m256i = if BF16 {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))
            } else {
                bf16_avx512(x)
            };
            _mm256_storeu_si256(out.as_mut_ptr().cast(), rounded);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn flush_avx512(x: __m512) -> __m512 {
    let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), _mm512_set1_ps(f32::MIN_POSITIVE));
    _mm512_mask_and_ps(x, small, x, _mm512_set1_ps(-0.0))
}

/// As [`bf16_bits`].
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn bf16_avx512(x: __m512) -> __m256i {
    let bits = _mm512_castps_si512(flush_avx512(x));
    let high = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    let nearest = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, nearest, quiet))
}
