//! The kernels of x86-64: vectors of AVX2 and AVX-512, and the entries that carry the instructions' names.
// Loops over `0..NV` are unrolled whole, so that their indices are constants: an iterator would hide that.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::cpu::isa::Isa;
use crate::cpu::kernel::{F16, F32, Form, Kernel, RawTile, Step, Vector, Wide, WideFlushed, by_shape, tile};
use crate::cpu::kernel_plain::{Plain, TWO_48};
use crate::cpu::kernel_trials::spin;

/// Shapes of AVX-512: 32 registers hold 28 vectors of sums.
macro_rules! of_avx512 {
    ($shape:expr, $kernel:ident, $step:ty) => {
        by_shape!($shape, $kernel, $step, 2: 1 x 2, 2 x 2, 3 x 2, 4 x 2, 5 x 2, 6 x 2, 7 x 2, 1 x 1, 2 x 1, 3 x 1, 4 x 1,
            5 x 1, 6 x 1, 7 x 1, 8 x 1, 9 x 1, 10 x 1, 11 x 1, 12 x 1, 13 x 1, 14 x 1)
    };
}

/// Shapes of AVX2: 16 registers hold 12 vectors of sums, of one row of two panels, or of half a panel for many rows.
macro_rules! of_avx2 {
    ($shape:expr, $step:ty) => {
        match $shape.0 {
            1 | 2 => by_shape!($shape, avx2_tile, $step, 4: 1 x 2, 1 x 1, 2 x 1),
            _ => by_shape!($shape, avx2_tile, $step, 2: 3 x 1, 4 x 1, 5 x 1, 6 x 1),
        }
    };
}

/// Kernels of AVX-512, with and without bf16.
pub(crate) fn avx512(form: Form, shape: (usize, usize)) -> Kernel {
    match form {
        Form::Dot => of_avx512!(shape, avx512_bf16_tile, Dot),
        Form::Wide => of_avx512!(shape, avx512_tile, Wide<Zmm>),
        Form::WideFlushed => by_shape!(shape, avx512_tile, WideFlushed<Zmm>, 2: 1 x 1, 2 x 1, 3 x 1),
        Form::F32 => of_avx512!(shape, avx512_tile, F32<Zmm>),
        Form::F16 => of_avx512!(shape, avx512_tile, F16<Zmm>),
    }
}

/// Kernels of AVX2.
pub(crate) fn avx2(form: Form, shape: (usize, usize)) -> Kernel {
    match form {
        Form::Dot => unreachable!("AVX2 has no dot product"),
        Form::Wide => of_avx2!(shape, Wide<Ymm>),
        Form::WideFlushed => by_shape!(shape, avx2_tile, WideFlushed<Ymm>, 2: 1 x 1, 2 x 1, 3 x 1),
        Form::F32 => of_avx2!(shape, F32<Ymm>),
        Form::F16 => of_avx2!(shape, F16<Ymm>),
    }
}

/// Kernels that ask for fused multiply-add alone.
pub(crate) fn portable(form: Form, shape: (usize, usize)) -> Kernel {
    match form {
        Form::Dot => unreachable!("the portable level has no dot product"),
        Form::Wide => by_shape!(shape, fma_tile, Wide<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
        Form::WideFlushed => by_shape!(shape, fma_tile, WideFlushed<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
        Form::F32 => by_shape!(shape, fma_tile, F32<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
        Form::F16 => by_shape!(shape, fma_tile, F16<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn avx512_bf16_tile<S: Step, const MR: usize, const NV: usize, const NP: usize>(raw: &RawTile) {
    // SAFETY: by the caller; the instructions are this function's.
    unsafe { tile::<S, MR, NV, NP>(raw) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn avx512_tile<S: Step, const MR: usize, const NV: usize, const NP: usize>(raw: &RawTile) {
    // SAFETY: by the caller; the instructions are this function's.
    unsafe { tile::<S, MR, NV, NP>(raw) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_tile<S: Step, const MR: usize, const NV: usize, const NP: usize>(raw: &RawTile) {
    // SAFETY: by the caller; the instructions are this function's.
    unsafe { tile::<S, MR, NV, NP>(raw) }
}

#[target_feature(enable = "fma")]
unsafe fn fma_tile<S: Step, const MR: usize, const NV: usize, const NP: usize>(raw: &RawTile) {
    // SAFETY: by the caller; the instructions are this function's.
    unsafe { tile::<S, MR, NV, NP>(raw) }
}

/// A round of independent multiply-adds, or dot products, as often as told: what the registers can do. Gives the
/// multiplications and additions of a round.
///
/// # Safety
/// The processor has the level, and bf16 for dot products.
pub(crate) unsafe fn spin_x86(isa: Isa, dot: bool, rounds: usize) -> usize {
    // SAFETY: by the caller.
    unsafe {
        match isa {
            Isa::Avx512Bf16 if dot => spin_dot(rounds),
            Isa::Avx512Bf16 | Isa::Avx512 => spin_avx512(rounds),
            Isa::Avx2 => spin_avx2(rounds),
            Isa::Portable => spin_fma(rounds),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn spin_avx512(rounds: usize) -> usize {
    // SAFETY: the instructions are this function's.
    unsafe { spin::<Zmm, 24>(rounds) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn spin_avx2(rounds: usize) -> usize {
    // SAFETY: the instructions are this function's.
    unsafe { spin::<Ymm, 12>(rounds) }
}

#[target_feature(enable = "fma")]
unsafe fn spin_fma(rounds: usize) -> usize {
    // SAFETY: the instructions are this function's.
    unsafe { spin::<Plain, 12>(rounds) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
fn spin_dot(rounds: usize) -> usize {
    const CHAINS: usize = 24;
    let a = pairs(_mm512_set1_epi32(black_box(0x3f80_3f80)));
    let mut sums = black_box([_mm512_setzero_ps(); CHAINS]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, a);
        }
    }
    black_box(sums);
    CHAINS * 16 * 4
}

/// Sixteen numbers.
#[derive(Clone, Copy)]
pub(crate) struct Zmm(__m512);

impl Vector for Zmm {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: inlined into a function with AVX-512.
        Zmm(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        Zmm(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as `zero`; the address by the caller.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        Zmm(unsafe { _mm512_set1_ps(f32::from_bits(*from)) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as `zero`.
        Zmm(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: as `zero`.
        Zmm(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn fma_flushed(self, a: Self, b: Self) -> Self {
        // As `kernel::fma_flushed`, whose comments say why.
        // SAFETY: as `zero`.
        unsafe {
            let sum = _mm512_fmadd_ps(a.0, b.0, self.0);
            let least = _mm512_set1_ps(f32::MIN_POSITIVE);
            let small = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(sum), least);
            if small == 0 {
                return Zmm(sum);
            }
            let up = _mm512_set1_ps(TWO_48);
            let raised = _mm512_mul_ps(self.0, _mm512_set1_ps(TWO_48 * TWO_48));
            let scaled = _mm512_fmadd_ps(_mm512_mul_ps(a.0, up), _mm512_mul_ps(b.0, up), raised);
            let bound = _mm512_set1_ps(f32::MIN_POSITIVE * TWO_48 * TWO_48);
            let tiny = _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(small, _mm512_abs_ps(scaled), bound);
            Zmm(_mm512_mask_and_ps(sum, tiny, sum, _mm512_set1_ps(-0.0)))
        }
    }

    #[inline(always)]
    unsafe fn even(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        unsafe { Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn odd(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            Zmm(_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from.cast()), high)))
        }
    }

    #[inline(always)]
    unsafe fn f16(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        unsafe { Zmm(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
}

/// bf16 pairs by the dot product instruction.
pub(crate) struct Dot;

impl Step for Dot {
    type V = Zmm;
    const INPUTS: usize = 1;
    const WORDS: usize = crate::cpu::pack::PANEL;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        sums: &mut [[Zmm; NV]; MR],
        inputs: *const u32,
        _: usize,
        weights: *const u32,
    ) {
        // SAFETY: as `kernel::tile`, whose pointers these are; inlined into a function with bf16.
        unsafe {
            let mut w = [_mm512_setzero_si512(); NV];
            for v in 0..NV {
                w[v] = _mm512_loadu_si512(weights.add(v * 16).cast());
            }
            for m in 0..MR {
                let a = pairs(_mm512_set1_epi32((*inputs.add(m)) as i32));
                for v in 0..NV {
                    sums[m][v].0 = _mm512_dpbf16_ps(sums[m][v].0, a, pairs(w[v]));
                }
            }
        }
    }
}

/// The same bits as bf16 pairs.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are a value.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// Eight numbers.
#[derive(Clone, Copy)]
pub(crate) struct Ymm(__m256);

impl Vector for Ymm {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: inlined into a function with AVX2.
        Ymm(unsafe { _mm256_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        Ymm(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as `zero`; the address by the caller.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        Ymm(unsafe { _mm256_set1_ps(f32::from_bits(*from)) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as `zero`.
        Ymm(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: as `zero`.
        Ymm(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn fma_flushed(self, a: Self, b: Self) -> Self {
        // As `kernel::fma_flushed`, whose comments say why.
        // SAFETY: as `zero`.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            let sum = _mm256_fmadd_ps(a.0, b.0, self.0);
            let least = _mm256_set1_ps(f32::MIN_POSITIVE);
            let small = _mm256_cmp_ps::<_CMP_LE_OQ>(_mm256_andnot_ps(sign, sum), least);
            if _mm256_movemask_ps(small) == 0 {
                return Ymm(sum);
            }
            let up = _mm256_set1_ps(TWO_48);
            let raised = _mm256_mul_ps(self.0, _mm256_set1_ps(TWO_48 * TWO_48));
            let scaled = _mm256_fmadd_ps(_mm256_mul_ps(a.0, up), _mm256_mul_ps(b.0, up), raised);
            let bound = _mm256_set1_ps(f32::MIN_POSITIVE * TWO_48 * TWO_48);
            let tiny =
                _mm256_and_ps(small, _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, scaled), bound));
            Ymm(_mm256_blendv_ps(sum, _mm256_and_ps(sum, sign), tiny))
        }
    }

    #[inline(always)]
    unsafe fn even(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        unsafe { Ymm(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn odd(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            Ymm(_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(from.cast()), high)))
        }
    }

    #[inline(always)]
    unsafe fn f16(from: *const u32) -> Self {
        // SAFETY: as `zero`; the address by the caller.
        unsafe { Ymm(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }
}
