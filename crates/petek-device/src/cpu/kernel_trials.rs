//! Instructions on trial, before a matmul: do they give the portable form's bits, which of two ways is faster, and how fast
//! are the registers at best?

use std::hint::black_box;
use std::time::Instant;

use crate::cpu::isa::Isa;
use crate::cpu::kernel::{Form, ROWS_MAX, Sums, Tile, Vector, multiply};
use crate::cpu::pack::PANEL;

/// The instructions of `isa` that do not give the portable form's bits.
pub(crate) fn differing_instructions(isa: Isa) -> Vec<&'static str> {
    let mut differing = Vec::new();
    if isa == Isa::Avx512Bf16 && !bf16_form_is_portable(isa, Form::Dot) {
        differing.push("vdpbf16ps");
    }
    if isa >= Isa::Avx2 && !f16_is_portable(isa) {
        differing.push("vcvtph2ps");
    }
    differing
}

/// 4,096 random tiles, half of them where results are or border on denormal.
fn bf16_form_is_portable(isa: Isa, form: Form) -> bool {
    const STEPS: usize = 4;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let [mut special, mut portable] = [Sums::new(), Sums::new()];
    (0..4096).all(|tile| {
        // bf16 from 2^-8 to 2^7; or about 2^-63, whose products are about 2^-126 and cancel to less.
        let mut number = || {
            // xorshift64: any spread of bits serves.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let exponent = if tile % 2 == 0 { 119 + (random >> 16) % 16 } else { 60 + (random >> 16) % 8 };
            (random & 0x807f) as u32 | (exponent as u32) << 7
        };
        let mut pair = || number() | number() << 16;
        let weights: [u32; STEPS * PANEL] = std::array::from_fn(|_| pair());
        let inputs: [u32; STEPS] = std::array::from_fn(|_| pair());
        let wide: [u32; 2 * STEPS] =
            std::array::from_fn(|i| [inputs[i / 2] << 16, inputs[i / 2] & 0xffff_0000][i % 2]);
        let tile = |inputs| Tile { rows: 1, inputs, panels: 1, weights: &weights, steps: STEPS, slices: 1 };
        multiply(isa, form, &tile(if form == Form::Dot { &inputs } else { &wide }), &mut special);
        multiply(Isa::Portable, Form::WideFlushed, &tile(&wide), &mut portable);
        special.rows[0].map(f32::to_bits) == portable.rows[0].map(f32::to_bits)
    })
}

/// All f16 numbers.
fn f16_is_portable(isa: Isa) -> bool {
    let [mut special, mut portable] = [Sums::new(), Sums::new()];
    let one = [1.0_f32.to_bits()];
    (0..=u16::MAX).step_by(PANEL).all(|first| {
        let pair = |i: usize| (u32::from(first) + 2 * i as u32) | (u32::from(first) + 2 * i as u32 + 1) << 16;
        let weights: [u32; PANEL / 2] = std::array::from_fn(pair);
        let tile = Tile { rows: 1, inputs: &one, panels: 1, weights: &weights, steps: 1, slices: 1 };
        multiply(isa, Form::F16, &tile, &mut special);
        multiply(Isa::Portable, Form::F16, &tile, &mut portable);
        special.rows[0].map(f32::to_bits) == portable.rows[0].map(f32::to_bits)
    })
}

/// Whether two multiply-adds and the widening of a pair are faster than its dot product, on a tile in the cache: Emerald
/// Rapids does two of the former a cycle and not half of the latter. A trial of some 50 µs; the bits are the same.
pub(crate) fn dot_is_slow() -> bool {
    const STEPS: usize = 128;
    let (weights, inputs) = (vec![0x3f80_3f80; STEPS * PANEL], vec![0x3f80_0000; 2 * STEPS * ROWS_MAX]);
    let mut sums = Sums::new();
    let mut best = |isa, form, step_inputs: usize| {
        let inputs = &inputs[..step_inputs * STEPS * ROWS_MAX];
        let tile = Tile { rows: ROWS_MAX, inputs, panels: 1, weights: &weights, steps: STEPS, slices: 1 };
        let trial = |_| {
            let since = Instant::now();
            multiply(isa, form, &tile, &mut sums);
            since.elapsed()
        };
        (0..16).map(trial).min().unwrap_or_default()
    };
    best(Isa::Avx512, Form::Wide, 2) < best(Isa::Avx512Bf16, Form::Dot, 1)
}

/// Runs rounds of independent operations in registers: dot products, or multiply-adds. Gives the multiplications and
/// additions done.
pub(crate) fn spin_in_registers(isa: Isa, dot: bool, rounds: usize) -> usize {
    assert!(isa.available() && (!dot || isa == Isa::Avx512Bf16), "{isa} has the instructions");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the processor has the instructions.
    let of_round = unsafe { crate::cpu::kernel_x86::spin_x86(isa, dot, rounds) };
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the plain form asks for no instructions of its own.
    let of_round = unsafe { spin::<crate::cpu::kernel_plain::Plain, 12>(rounds) };
    of_round * rounds
}

/// `N` chains of multiply-adds. Gives the multiplications and additions of a round.
///
/// # Safety
/// As [`Vector`]'s methods.
#[inline(always)]
pub(crate) unsafe fn spin<V: Vector, const N: usize>(rounds: usize) -> usize {
    let one = black_box([1.0_f32.to_bits()]);
    // SAFETY: by the caller; the address is of a live word.
    unsafe {
        let a = V::splat(one.as_ptr());
        // Hidden from the compiler, which would else see that all chains are one.
        let mut sums = black_box([V::zero(); N]);
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.fma(a, a);
            }
        }
        black_box(sums);
    }
    N * V::LANES * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_processor_passes() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            assert_eq!(differing_instructions(isa), Vec::<&str>::new(), "{isa}");
        }
    }

    /// The trial of the dot product finds an instruction that does not flush, as multiply-adds do not.
    #[test]
    fn a_form_with_other_bits_does_not_pass() {
        let isa = Isa::detect().expect("a processor that can run petek");
        let isa = isa.min(Isa::Avx512);
        assert!(!bf16_form_is_portable(isa, Form::Wide));
        assert!(bf16_form_is_portable(isa, Form::WideFlushed));
    }
}
