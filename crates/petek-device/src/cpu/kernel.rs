//! The inner loops of a matmul, written once over a trait of vectors: a tile of rows × 32 outputs, over all inputs, each
//! output one chain of fused multiply-adds from zero (one a slice, and a fixed tree over the slices' sums).
//!
//! Lanes are outputs, so nothing is ever summed across lanes, and every form and tile gives the same bits. Nothing here
//! depends on how many rows a step has.
// Loops over `0..NV` are unrolled whole, so that their indices are constants: an iterator would hide that.
#![allow(clippy::needless_range_loop)]

use crate::cpu::isa::{self, Isa};
#[cfg(not(target_arch = "x86_64"))]
use crate::cpu::kernel_plain;
use crate::cpu::pack::{PANEL, SLICES_MAX};
use crate::ops::Format;

/// Sums that wait on the stack while the slices are walked.
const STACK: usize = SLICES_MAX.ilog2() as usize;
/// Rows of a tile at most, over all levels of instructions.
pub(crate) const ROWS_MAX: usize = 14;

/// Bytes of a cache line.
const LINE: usize = 64;

/// How a step of a panel is multiplied and added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// bf16 pairs by the dot product instruction; inputs are pairs too.
    Dot,
    /// bf16 pairs widened to f32, two multiply-adds, odd input first; inputs are f32. For numbers so large that no
    /// result can be denormal.
    Wide,
    /// The same for any numbers: each result is flushed as the instruction flushes it.
    WideFlushed,
    /// f32.
    F32,
    /// f16, widened exactly.
    F16,
}

impl Form {
    /// The form for weights of `format`, where nothing is known of the numbers.
    pub(crate) fn of(isa: Isa, format: Format) -> Form {
        match format {
            Format::Bf16 if isa == Isa::Avx512Bf16 => Form::Dot,
            Format::Bf16 => Form::WideFlushed,
            Format::F32 => Form::F32,
            Format::F16 => Form::F16,
        }
    }
}

/// Rows of a tile at most: its sums, a step's weights and one input fill the registers.
pub(crate) fn rows_max(isa: Isa) -> usize {
    match isa {
        Isa::Avx512Bf16 | Isa::Avx512 => ROWS_MAX,
        Isa::Avx2 => 6,
        Isa::Portable => 3,
    }
}

/// Panels that one kernel reads side by side for a tile of few rows: more streams from memory, and more chains at once.
/// With them a tile has no more sums than one of [`ROWS_MAX`] rows of one panel.
pub(crate) fn panels_at_once(isa: Isa, rows: usize) -> usize {
    match (isa, rows) {
        (Isa::Avx512Bf16 | Isa::Avx512, ..=7) | (Isa::Avx2, ..=1) => 2,
        _ => 1,
    }
}

/// Rows of a tile at most in the flushing form, which needs more registers; a taller tile is walked in groups.
const ROWS_MAX_FLUSHED: usize = 3;

/// What a tile kernel reads.
pub(crate) struct Tile<'a> {
    /// Rows of the tile.
    pub(crate) rows: usize,
    /// `[steps × inputs a step][rows]`.
    pub(crate) inputs: &'a [u32],
    /// Panels of the tile.
    pub(crate) panels: usize,
    /// `[panels][steps][words a step]`.
    pub(crate) weights: &'a [u32],
    /// Steps of all slices.
    pub(crate) steps: usize,
    /// Slices, a power of two.
    pub(crate) slices: usize,
}

/// Room for a tile's sums: where they come out, and the stack of slices' sums.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Sums {
    /// `[panels][rows][32]`.
    pub(crate) rows: [[f32; PANEL]; SUMS_MAX],
    stack: [[[f32; PANEL]; ROWS_MAX]; STACK],
}

/// Rows × panels of a tile at most: a gate's and an up's.
pub(crate) const SUMS_MAX: usize = 2 * ROWS_MAX;

impl Sums {
    pub(crate) fn new() -> Box<Sums> {
        Box::new(Sums { rows: [[0.0; PANEL]; SUMS_MAX], stack: [[[0.0; PANEL]; ROWS_MAX]; STACK] })
    }
}

/// Multiplies a tile; the sums come out in the first of `sums.rows`.
///
/// *Panics*: if the slices do not hold what the shape says, or there are too many rows, panels or slices.
pub(crate) fn multiply(isa: Isa, form: Form, tile: &Tile<'_>, sums: &mut Sums) {
    let Tile { rows, panels, steps, slices, .. } = *tile;
    let (step_inputs, step_words) = match form {
        Form::Wide | Form::WideFlushed => (2, PANEL),
        Form::Dot | Form::F32 => (1, PANEL),
        Form::F16 => (1, PANEL / 2),
    };
    assert!(
        isa.available() && (form != Form::Dot || isa == Isa::Avx512Bf16),
        "{isa} has the instructions of {form:?}"
    );
    assert!(rows <= rows_max(isa) && rows * panels <= SUMS_MAX, "a tile of {rows} rows x {panels} panels");
    assert!(slices.is_power_of_two() && slices <= SLICES_MAX, "{slices} slices");
    assert!(steps.is_multiple_of(slices), "{steps} steps in {slices} slices");
    assert!(tile.inputs.len() == steps * step_inputs * rows, "inputs as long as the steps");
    assert!(tile.weights.len() == panels * steps * step_words, "panels as long as the steps");
    let ahead_bytes = isa::prefetch_bytes();
    let flushed = form == Form::WideFlushed;
    let rows_at_once = if flushed { ROWS_MAX_FLUSHED } else { ROWS_MAX };
    for row in (0..rows).step_by(rows_at_once) {
        let rows_now = rows_at_once.min(rows - row);
        let at_once = if flushed { 1 } else { panels_at_once(isa, rows) };
        let mut panel = 0;
        while panel < panels {
            let panels_now = if panels - panel < at_once { 1 } else { at_once };
            let raw = RawTile {
                inputs: tile.inputs[row..].as_ptr(),
                stride: rows,
                weights: tile.weights[panel * steps * step_words..].as_ptr(),
                steps: steps / slices,
                slices,
                ahead_bytes,
                sums: sums.rows[panel * rows + row..].as_mut_ptr().cast(),
                stack: sums.stack.as_mut_ptr().cast(),
            };
            // SAFETY: the processor has the instructions (asserted). The kernel reads `rows_now` inputs from `row` on of each
            // of `steps × step_inputs` groups of `rows`, and `panels_now` panels from `panel` on: inside the slices, by the
            // assertions above. It writes `rows_now × panels_now` rows of sums, which stand together because only whole
            // tiles have several panels at once, and as many of each stack entry: at most `ROWS_MAX`, as `panels_at_once` says.
            unsafe { kernel_of(isa, form, (rows_now, panels_now))(&raw) };
            panel += panels_now;
        }
    }
}

/// The same as [`Tile`] and [`Sums`], as the kernels take it.
pub(crate) struct RawTile {
    inputs: *const u32,
    stride: usize,
    weights: *const u32,
    steps: usize,
    slices: usize,
    /// How far ahead of the kernel weights are asked for.
    ahead_bytes: usize,
    sums: *mut f32,
    stack: *mut f32,
}

pub(crate) type Kernel = unsafe fn(&RawTile);

fn kernel_of(isa: Isa, form: Form, shape: (usize, usize)) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::cpu::kernel_x86;
        match isa {
            Isa::Avx512Bf16 | Isa::Avx512 => kernel_x86::avx512(form, shape),
            Isa::Avx2 => kernel_x86::avx2(form, shape),
            Isa::Portable => kernel_x86::portable(form, shape),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        debug_assert_eq!(isa, Isa::Portable);
        kernel_plain::kernel(form, shape)
    }
}

/// A vector of f32, and how weights of each format are loaded into one.
///
/// Every method is inlined into a kernel that has the instructions, never called by itself.
pub(crate) trait Vector: Copy {
    /// Numbers in it.
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// One number in all lanes.
    unsafe fn splat(from: *const u32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// `a * b + self`, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// `a * b + self` as the dot product instruction gives it: a result that rounds to a denormal becomes a signed zero.
    unsafe fn fma_flushed(self, a: Self, b: Self) -> Self;
    /// The first of each bf16 pair.
    unsafe fn even(from: *const u32) -> Self;
    /// The second of each bf16 pair.
    unsafe fn odd(from: *const u32) -> Self;
    /// f16 numbers, two a word.
    unsafe fn f16(from: *const u32) -> Self;
}

/// What one step adds to the sums of `MR` rows × `NV` vectors.
pub(crate) trait Step {
    type V: Vector;
    /// Inputs of a row that a step takes.
    const INPUTS: usize;
    /// Words of a panel that a step takes.
    const WORDS: usize;
    unsafe fn step<const MR: usize, const NV: usize>(
        sums: &mut [[Self::V; NV]; MR],
        inputs: *const u32,
        stride: usize,
        weights: *const u32,
    );
}

/// [`Form::F32`].
pub(crate) struct F32<V>(std::marker::PhantomData<V>);
/// [`Form::F16`].
pub(crate) struct F16<V>(std::marker::PhantomData<V>);
/// [`Form::Wide`].
pub(crate) struct Wide<V>(std::marker::PhantomData<V>);
/// [`Form::WideFlushed`].
pub(crate) struct WideFlushed<V>(std::marker::PhantomData<V>);

impl<V: Vector> Step for F32<V> {
    type V = V;
    const INPUTS: usize = 1;
    const WORDS: usize = PANEL;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        sums: &mut [[V; NV]; MR],
        inputs: *const u32,
        _: usize,
        weights: *const u32,
    ) {
        // SAFETY: as `tile`, whose pointers these are.
        unsafe {
            let mut w = [V::zero(); NV];
            for v in 0..NV {
                w[v] = V::load(weights.add(v * V::LANES).cast());
            }
            add_products(sums, inputs, &w);
        }
    }
}

impl<V: Vector> Step for F16<V> {
    type V = V;
    const INPUTS: usize = 1;
    const WORDS: usize = PANEL / 2;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        sums: &mut [[V; NV]; MR],
        inputs: *const u32,
        _: usize,
        weights: *const u32,
    ) {
        // SAFETY: as `tile`, whose pointers these are.
        unsafe {
            let mut w = [V::zero(); NV];
            for v in 0..NV {
                w[v] = V::f16(weights.add(v * V::LANES / 2));
            }
            add_products(sums, inputs, &w);
        }
    }
}

impl<V: Vector> Step for Wide<V> {
    type V = V;
    const INPUTS: usize = 2;
    const WORDS: usize = PANEL;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        sums: &mut [[V; NV]; MR],
        inputs: *const u32,
        stride: usize,
        weights: *const u32,
    ) {
        // SAFETY: as `tile`, whose pointers these are.
        unsafe {
            let mut w = [V::zero(); NV];
            for v in 0..NV {
                w[v] = V::odd(weights.add(v * V::LANES));
            }
            add_products(sums, inputs.add(stride), &w);
            let weights = if MR > 3 { again(weights) } else { weights };
            for v in 0..NV {
                w[v] = V::even(weights.add(v * V::LANES));
            }
            add_products(sums, inputs, &w);
        }
    }
}

impl<V: Vector> Step for WideFlushed<V> {
    type V = V;
    const INPUTS: usize = 2;
    const WORDS: usize = PANEL;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        sums: &mut [[V; NV]; MR],
        inputs: *const u32,
        stride: usize,
        weights: *const u32,
    ) {
        // SAFETY: as `tile`, whose pointers these are.
        unsafe {
            for v in 0..NV {
                let (odd, even) = (V::odd(weights.add(v * V::LANES)), V::even(weights.add(v * V::LANES)));
                for m in 0..MR {
                    sums[m][v] = sums[m][v].fma_flushed(V::splat(inputs.add(stride).add(m)), odd);
                    sums[m][v] = sums[m][v].fma_flushed(V::splat(inputs.add(m)), even);
                }
            }
        }
    }
}

/// Adds each row's input times the weights.
///
/// # Safety
/// As [`tile`], whose pointer this is.
#[inline(always)]
unsafe fn add_products<V: Vector, const MR: usize, const NV: usize>(
    sums: &mut [[V; NV]; MR],
    inputs: *const u32,
    w: &[V; NV],
) {
    for m in 0..MR {
        // SAFETY: by the caller.
        unsafe {
            let a = V::splat(inputs.add(m));
            for v in 0..NV {
                sums[m][v] = sums[m][v].fma(a, w[v]);
            }
        }
    }
}

/// Asks for a line in the second-level cache. Any address will do.
#[inline(always)]
pub(crate) fn prefetch(line: *const u32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = line;
    }
}

/// The same address, which the compiler takes for another: what is loaded from it is loaded where it stands, not early,
/// when every register has a sum in it.
#[inline(always)]
fn again(mut weights: *const u32) -> *const u32 {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) weights, options(readonly, nostack, preserves_flags)) };
    weights
}

/// The kernel: `MR` rows × `NP` panels at once, each panel's outputs by `NV` vectors at a time.
///
/// # Safety
/// The processor has the instructions of `S`. With `n = slices × steps`: `inputs` is readable for `MR` words at each of
/// `n × S::INPUTS` strides, `weights` for `NP × n × S::WORDS` words; `sums` is writable for `NP × MR` rows of 32, and
/// `stack` for as many at each of [`STACK`] places [`ROWS_MAX`] rows apart; `NP × MR` is at most [`ROWS_MAX`].
#[inline(always)]
pub(crate) unsafe fn tile<S: Step, const MR: usize, const NV: usize, const NP: usize>(tile: &RawTile) {
    // Indices into `sums` are constants once the loops over them are unrolled: anything else would keep the sums in memory.
    let lanes = S::V::LANES;
    let panel_words = tile.slices.wrapping_mul(tile.steps).wrapping_mul(S::WORDS);
    let input_words = S::INPUTS.wrapping_mul(tile.stride);
    // SAFETY: the offsets below stay inside what the caller promises: columns below 32, steps below slices × steps, and on
    // the stack as many sums as `slice` has one-bits: below log2 of the slices, but for the last slice, which pops them all.
    unsafe {
        for column in (0..PANEL).step_by(NV * lanes) {
            let (mut inputs, mut weights) = (tile.inputs, tile.weights.add(column * S::WORDS / PANEL));
            let mut stack = tile.stack.add(column);
            for slice in 0..tile.slices {
                let mut sums = [[[S::V::zero(); NV]; MR]; NP];
                for _ in 0..tile.steps {
                    for p in 0..NP {
                        let weights = again(weights.add(panel_words.wrapping_mul(p)));
                        let inputs = again(inputs);
                        prefetch(weights.wrapping_byte_add(tile.ahead_bytes));
                        if S::WORDS == PANEL {
                            prefetch(weights.wrapping_byte_add(tile.ahead_bytes + LINE));
                        }
                        S::step::<MR, NV>(&mut sums[p], inputs, tile.stride, weights);
                    }
                    if MR > 8 {
                        prefetch(inputs.wrapping_byte_add(tile.ahead_bytes));
                        if S::INPUTS == 2 {
                            prefetch(inputs.wrapping_byte_add(tile.ahead_bytes + LINE));
                        }
                    }
                    inputs = inputs.add(input_words);
                    weights = weights.add(S::WORDS);
                }
                for _ in 0..slice.trailing_ones() {
                    stack = stack.sub(ROWS_MAX * PANEL);
                    for p in 0..NP {
                        for m in 0..MR {
                            for v in 0..NV {
                                let below = S::V::load(stack.add((p * MR + m) * PANEL + v * lanes));
                                sums[p][m][v] = below.add(sums[p][m][v]);
                            }
                        }
                    }
                }
                let last = slice.wrapping_add(1) == tile.slices;
                let to = if last { tile.sums.add(column) } else { stack };
                stack = stack.wrapping_add(ROWS_MAX * PANEL);
                for p in 0..NP {
                    for m in 0..MR {
                        for v in 0..NV {
                            sums[p][m][v].store(to.add((p * MR + m) * PANEL + v * lanes));
                        }
                    }
                }
            }
        }
    }
}

/// Instantiates a kernel for each shape `rows x panels` and gives the one asked for; `vectors` of a panel at a time.
macro_rules! by_shape {
    ($shape:expr, $kernel:ident, $step:ty, $vectors:literal: $($rows:literal x $panels:literal),* $(,)?) => {
        match $shape {
            $(($rows, $panels) => $kernel::<$step, $rows, $vectors, $panels> as $crate::cpu::kernel::Kernel,)*
            (rows, panels) => unreachable!("no kernel for {rows} rows of {panels} panels"),
        }
    };
}
pub(crate) use by_shape;
