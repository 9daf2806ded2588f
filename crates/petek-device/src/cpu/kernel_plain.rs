//! The kernels' plain form: arrays and scalar expressions, which say what the special instructions do. It runs everywhere,
//! and every other form is held against it.

use crate::cpu::kernel::Vector;
#[cfg(not(target_arch = "x86_64"))]
use crate::cpu::kernel::{F16, F32, Form, Kernel, Wide, WideFlushed, by_shape, tile};

/// Eight numbers in an array: the plain form, which compilers widen as far as they may.
#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; 8]);

impl Vector for Plain {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Plain([0.0; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: by the caller.
        Plain(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: by the caller.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self {
        // SAFETY: by the caller.
        Plain([f32::from_bits(unsafe { *from }); 8])
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], self.0[i])))
    }

    #[inline(always)]
    unsafe fn fma_flushed(self, a: Self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| fma_flushed(a.0[i], b.0[i], self.0[i])))
    }

    #[inline(always)]
    unsafe fn even(from: *const u32) -> Self {
        // SAFETY: by the caller.
        let pairs = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        Plain(pairs.map(|pair| f32::from_bits(pair << 16)))
    }

    #[inline(always)]
    unsafe fn odd(from: *const u32) -> Self {
        // SAFETY: by the caller.
        let pairs = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        Plain(pairs.map(|pair| f32::from_bits(pair & 0xffff_0000)))
    }

    #[inline(always)]
    unsafe fn f16(from: *const u32) -> Self {
        // SAFETY: by the caller.
        let pairs = unsafe { from.cast::<[u32; 4]>().read_unaligned() };
        Plain(std::array::from_fn(|i| f16_widened((pairs[i / 2] >> (i % 2 * 16)) as u16)))
    }
}

/// `a * b + c` with one rounding, as `vdpbf16ps` does each of its two: a result that is denormal once rounded to 24 bits,
/// as if the exponent had no end, becomes a zero of its sign.
#[inline(always)]
pub(crate) fn fma_flushed(a: f32, b: f32, c: f32) -> f32 {
    let sum = a.mul_add(b, c);
    if sum.abs() > f32::MIN_POSITIVE || sum.is_nan() {
        return sum;
    }
    // The smallest normal number may have been rounded up from below, on the coarser grid of denormals. The same sum 2^96
    // higher has the full grid. Scaling is exact: so small a sum has small terms, or a zero that makes NaN, which is no
    // denormal.
    let scaled = (a * TWO_48).mul_add(b * TWO_48, c * (TWO_48 * TWO_48));
    if scaled.abs() < f32::MIN_POSITIVE * TWO_48 * TWO_48 { 0.0_f32.copysign(sum) } else { sum }
}

/// 2^48.
pub(crate) const TWO_48: f32 = 281_474_976_710_656.0;

/// An f16, widened exactly, by integers and one exact multiplication; NaN is quieted, as the instruction does.
#[inline(always)]
pub(crate) fn f16_widened(bits: u16) -> f32 {
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let magnitude = match rest {
        0x7c00 => 0x7f80_0000,
        0x7c01.. => 0x7fc0_0000 | rest << 13,
        // Exponent and fraction in f32's places are 2^112 too small; denormals come out right too.
        _ => (f32::from_bits(rest << 13) * f32::from_bits((127 + 112) << 23)).to_bits(),
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn kernel(form: Form, shape: (usize, usize)) -> Kernel {
    match form {
        Form::Dot => unreachable!("the portable level has no dot product"),
        Form::Wide => by_shape!(shape, tile, Wide<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
        Form::WideFlushed => by_shape!(shape, tile, WideFlushed<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
        Form::F32 => by_shape!(shape, tile, F32<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
        Form::F16 => by_shape!(shape, tile, F16<Plain>, 4: 1 x 1, 2 x 1, 3 x 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (got, want) = (f16_widened(bits), half::f16::from_bits(bits).to_f32());
            assert_eq!((got.to_bits(), got.is_nan()), (want.to_bits(), want.is_nan()), "{bits:#06x}");
        }
    }

    /// Found on the hardware, both with the dot product's first product and with its second: 2^-126 less a fraction of the
    /// last place that it would have with an exponent without end.
    #[test]
    fn a_result_is_flushed_by_its_full_precision() {
        let least = f32::MIN_POSITIVE;
        for (fraction, flushed) in
            [(0.25, false), (0.5, false), (0.625, true), (0.9375, true), (1.0, true), (2.0, true)]
        {
            let (a, b) = (-fraction * 0.5_f32.powi(75), 0.5_f32.powi(75));
            for sign in [1.0, -1.0_f32] {
                let expected = if flushed { 0.0 } else { least } * sign;
                assert_eq!(
                    fma_flushed(a * sign, b, least * sign).to_bits(),
                    expected.to_bits(),
                    "{fraction} {sign}"
                );
            }
        }
        assert_eq!(fma_flushed(f32::MAX, 0.0, least), least);
        assert_eq!(fma_flushed(-0.0, 1.0, -0.0).to_bits(), (-0.0_f32).to_bits());
        assert!(fma_flushed(f32::INFINITY, 0.0, 1.0).is_nan());
    }
}
