//! Matrix products over packed weights: inputs rounded and interleaved as the kernels read them, panels handed out to
//! lanes as tasks, and what follows the sum (bias, residual, SwiGLU) done while the sums are at hand.
//!
//! ```text
//!  Activations ──rows──▶ InputRows ─┐
//!  PackedMatrix ────────────────────┼─▶ Matmul ──tasks──▶ OutputRows      one unit of work: a panel, or gate and up
//!  Epilogue ────────────────────────┘
//! ```
//! Each panel is read once a pass, whatever the rows: all of a step's rows are multiplied while it is in the cache.

use std::marker::PhantomData;
use std::ops::Range;

use crate::DeviceError;
use crate::cpu::isa::Isa;
use crate::cpu::kernel::{self, Form, Sums, Tile};
use crate::cpu::lanes::{Lanes, on_isa};
use crate::cpu::math;
use crate::cpu::memory::HugeBuffer;
use crate::cpu::pack::{PANEL, PackedMatrix};
use crate::cpu::pool::{Pool, TaskCounter};
use crate::ops::Format;

/// Room for a matmul's inputs in the form that the kernels read: `[tile][inputs][rows of the tile]`, bf16 as pairs where
/// the processor has the dot product, f32 otherwise (rounded to bf16 where the weights are bf16).
#[derive(Debug)]
pub struct Activations {
    words: HugeBuffer<u32>,
    /// By row, where bf16 numbers are kept as f32: the least exponent, as [`PackedMatrix`] has it by panel.
    least_exponents: HugeBuffer<u8>,
    layout: Layout,
}

/// The inputs of one product: `rows × inputs` of an [`Activations`].
#[derive(Clone, Copy, Debug)]
pub struct InputRows<'a> {
    room: &'a Activations,
    rows: usize,
    inputs: usize,
}

/// Where a product goes: f32, `[rows, width]`, row-major, a row perhaps going on behind it. Lanes write it at once, each its
/// own columns.
#[derive(Clone, Copy, Debug)]
pub struct OutputRows<'a> {
    data: *mut f32,
    rows: usize,
    width: usize,
    /// From one row to the next.
    stride: usize,
    borrows: PhantomData<&'a mut [f32]>,
}

// SAFETY: an address and two counts; it is written through only in `Matmul::run_units`, whose caller promises that no two
// threads write the same columns and that nobody else touches the memory meanwhile.
unsafe impl Send for OutputRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for OutputRows<'_> {}

/// What is done with a product's sums. A bias is as wide as the product (gate ‖ up for both halves) and added to the sum
/// first.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// `out = sum (+ bias)`. A gate-and-up matrix gives both halves, gate first.
    Store {
        /// Added to each row's sums.
        bias: Option<&'a [f32]>,
    },
    /// `out += sum (+ bias)`: the residual.
    Add {
        /// Added to each row's sums.
        bias: Option<&'a [f32]>,
    },
    /// `out = silu(gate) * up`, half as wide as the matrix.
    SwiGlu {
        /// Added to each row's sums.
        bias: Option<&'a [f32]>,
    },
}

/// One product: `inputs · weightsᵀ`, and what follows.
#[derive(Clone, Copy, Debug)]
pub struct Matmul<'a> {
    isa: Isa,
    weights: &'a PackedMatrix,
    inputs: InputRows<'a>,
    epilogue: Epilogue<'a>,
}

/// A lane's own room and count.
#[derive(Debug)]
pub struct Workspace {
    sums: Box<Sums>,
    /// Bytes of weights that this lane's kernels fetched: a panel counts once a pass.
    pub weight_bytes_read: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    isa: Isa,
    /// Of the inputs: f32 or bf16.
    format: Format,
}

impl Layout {
    /// Words of one row.
    fn row_words(self, inputs: usize) -> usize {
        match self.format {
            Format::Bf16 if self.pairs() => inputs.div_ceil(2),
            Format::Bf16 => inputs.next_multiple_of(2),
            Format::F32 | Format::F16 => inputs,
        }
    }

    fn pairs(self) -> bool {
        self.format == Format::Bf16 && self.isa == Isa::Avx512Bf16
    }

    /// The rows of tile `index` of a step of `rows`: as few tiles as can be, as equal as can be.
    fn tile(self, rows: usize, index: usize) -> Range<usize> {
        let tiles = self.tiles(rows);
        rows * index / tiles..rows * (index + 1) / tiles
    }

    fn tiles(self, rows: usize) -> usize {
        rows.div_ceil(kernel::rows_max(self.isa))
    }

    fn tile_of(self, rows: usize, row: usize) -> Range<usize> {
        self.tile(rows, ((row + 1) * self.tiles(rows) - 1) / rows)
    }
}

impl Activations {
    /// Room for `rows × inputs`, or any shape of no more rows and numbers. `format` is that of the inputs
    /// ([`Format::activation`] of the weights'), `isa` that of the products.
    ///
    /// *Errors*: [`DeviceError::Memory`].
    pub fn new(isa: Isa, format: Format, rows: usize, inputs: usize) -> Result<Activations, DeviceError> {
        let layout = Layout { isa, format: format.activation() };
        let words = layout.row_words(inputs).saturating_mul(rows);
        Ok(Activations {
            words: HugeBuffer::zeroed("matmul inputs", words)?,
            least_exponents: HugeBuffer::zeroed("matmul inputs", rows)?,
            layout,
        })
    }

    /// A view of the room as `rows × inputs`, to be filled row by row.
    ///
    /// *Panics*: if the room is too small.
    pub fn rows(&self, rows: usize, inputs: usize) -> InputRows<'_> {
        let fits =
            rows <= self.least_exponents.len() && rows * self.layout.row_words(inputs) <= self.words.len();
        assert!(fits, "{rows} x {inputs} matmul inputs exceed what was allocated");
        InputRows { room: self, rows, inputs }
    }

    /// Fills the room with rows of `inputs` numbers each, one after the other in `values`.
    ///
    /// *Panics*: if `values` is no whole number of rows, or the room is too small.
    pub fn fill(&mut self, inputs: usize, values: &[f32]) -> InputRows<'_> {
        assert!(values.len().is_multiple_of(inputs), "{} numbers in rows of {inputs}", values.len());
        let rows = self.rows(values.len() / inputs, inputs);
        for (row, values) in values.chunks_exact(inputs).enumerate() {
            // SAFETY: `self` is borrowed mutably, so nobody else reads or writes the room.
            unsafe { rows.set_row(row, values) };
        }
        rows
    }
}

impl InputRows<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Writes a row, rounding it to the format of the inputs.
    ///
    /// *Panics*: if there is no such row, or `values` is not as long as a row.
    ///
    /// # Safety
    /// Nobody reads the room or writes the same row meanwhile. Different rows may be written at once.
    pub unsafe fn set_row(&self, row: usize, values: &[f32]) {
        assert!(row < self.rows && values.len() == self.inputs, "row {row} of {} numbers", values.len());
        let layout = self.room.layout;
        let tile = layout.tile_of(self.rows, row);
        let first = tile.start * layout.row_words(self.inputs) + (row - tile.start);
        let mut words = [0_u32; CHUNK];
        let mut halves = [0_u16; CHUNK];
        let mut least = u32::MAX;
        for (chunk, values) in values.chunks(CHUNK).enumerate() {
            let words = match layout.format {
                Format::Bf16 => {
                    // The last of an odd count has a zero beside it.
                    halves[values.len() / 2 * 2..].fill(0);
                    math::round_bf16(layout.isa, values, &mut halves[..values.len()]);
                    let halves = &halves[..values.len().next_multiple_of(2)];
                    if layout.pairs() {
                        let (pairs, _) = halves.as_chunks::<2>();
                        words
                            .iter_mut()
                            .zip(pairs)
                            .for_each(|(word, [a, b])| *word = u32::from(*a) | u32::from(*b) << 16);
                        &words[..pairs.len()]
                    } else {
                        let words = &mut words[..halves.len()];
                        least = least.min(widen(layout.isa, halves, words));
                        words
                    }
                }
                Format::F32 | Format::F16 => {
                    words.iter_mut().zip(values).for_each(|(word, x)| *word = x.to_bits());
                    &words[..values.len()]
                }
            };
            let steps = chunk * if layout.pairs() { CHUNK / 2 } else { CHUNK };
            // SAFETY: step `s` of the row stands `s × rows of the tile` after its first: inside the tile's part of the room,
            // which `Activations::rows` found large enough, and no other row's.
            unsafe {
                let to = self.room.words.as_ptr().add(first + steps * tile.len());
                for (step, word) in words.iter().enumerate() {
                    *to.add(step * tile.len()) = *word;
                }
            }
        }
        // SAFETY: `row` is below the rows, for which there is room; its exponent is this row's alone.
        unsafe { *self.room.least_exponents.as_ptr().add(row) = (least.saturating_add(1) >> 23) as u8 };
    }
}

impl<'a> OutputRows<'a> {
    /// All of `values`, in rows of `width`.
    ///
    /// *Panics*: if that is no whole number of rows.
    pub fn new(values: &'a mut [f32], width: usize) -> OutputRows<'a> {
        assert!(values.len().is_multiple_of(width), "{} numbers in rows of {width}", values.len());
        let rows = values.len() / width;
        OutputRows { data: values.as_mut_ptr(), rows, width, stride: width, borrows: PhantomData }
    }

    /// The same from an address, the first `width` of each `stride` numbers.
    ///
    /// *Panics*: if the rows are wider than their stride.
    ///
    /// # Safety
    /// `data` is valid for reads and writes of `rows × stride` f32 for as long as the view is used.
    pub unsafe fn from_raw(data: *mut f32, rows: usize, width: usize, stride: usize) -> OutputRows<'a> {
        assert!(width <= stride, "rows of {width} numbers, one every {stride}");
        OutputRows { data, rows, width, stride, borrows: PhantomData }
    }

    /// Writes zeros behind the product, where `row` goes on.
    ///
    /// # Safety
    /// Nobody else touches that part of the row.
    pub unsafe fn zero_rest(&self, row: usize) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let rest = self.width..self.stride;
        // SAFETY: inside the row, which the memory holds; alone by the caller.
        unsafe { self.data.add(row * self.stride + rest.start).write_bytes(0, rest.len()) };
    }

    /// A part of a row.
    ///
    /// # Safety
    /// Nobody else has the part, or touches it, while the slice lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(row < self.rows && columns.end <= self.width, "row {row}, columns {columns:?}");
        // SAFETY: inside the memory by the assertion; alone by the caller.
        unsafe {
            std::slice::from_raw_parts_mut(self.data.add(row * self.stride + columns.start), columns.len())
        }
    }
}

impl OutputRows<'_> {
    /// Writes a panel's values to some rows.
    ///
    /// # Safety
    /// As [`OutputRows::part`], for the columns of the rows.
    unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, values: &[[f32; PANEL]]) {
        for (row, values) in rows.zip(values) {
            // SAFETY: by the caller.
            let out = unsafe { self.part(row, columns.clone()) };
            match out.as_mut_array::<PANEL>() {
                Some(out) => *out = *values,
                None => out.copy_from_slice(&values[..out.len()]),
            }
        }
    }
}

impl Workspace {
    /// For one lane.
    pub fn new() -> Workspace {
        Workspace { sums: Sums::new(), weight_bytes_read: 0 }
    }
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Matmul<'a> {
    /// A product.
    ///
    /// *Panics*: if the inputs' format or width is not the weights', a bias is not as wide as the product, or SwiGLU is
    /// asked of a matrix that is no gate and up.
    pub fn new(
        isa: Isa,
        weights: &'a PackedMatrix,
        inputs: InputRows<'a>,
        epilogue: Epilogue<'a>,
    ) -> Matmul<'a> {
        let layout = Layout { isa, format: weights.format().activation() };
        assert!(inputs.room.layout == layout, "inputs of {:?} for weights of {layout:?}", inputs.room.layout);
        assert!(inputs.inputs == weights.inputs(), "{} inputs for {}", inputs.inputs, weights.inputs());
        let (Epilogue::Store { bias } | Epilogue::Add { bias } | Epilogue::SwiGlu { bias }) = epilogue;
        assert!(bias.is_none_or(|bias| bias.len() == weights.outputs()), "a bias as wide as the product");
        assert!(
            weights.is_gate_up() || !matches!(epilogue, Epilogue::SwiGlu { .. }),
            "SwiGLU of gate and up"
        );
        Matmul { isa, weights, inputs, epilogue }
    }

    /// Width of the output.
    pub fn width(&self) -> usize {
        match self.epilogue {
            Epilogue::SwiGlu { .. } => self.weights.outputs() / 2,
            Epilogue::Store { .. } | Epilogue::Add { .. } => self.weights.outputs(),
        }
    }

    /// Units of work: panels, or pairs of a gate's and an up's.
    pub fn units(&self) -> usize {
        self.weights.panels() / self.panels_of_unit()
    }

    /// Units that a lane takes at once: few where there are many rows, and a sixteenth of a lane's share for a few rows.
    pub fn units_of_task(&self, threads: usize) -> usize {
        let least = self.panels_of_group() / self.panels_of_unit();
        if self.inputs.rows > kernel::ROWS_MAX {
            least
        } else {
            (self.units() / (16 * threads)).max(1).next_multiple_of(least)
        }
    }

    /// Computes `units` of the output's columns, for all rows.
    ///
    /// *Panics*: if `out` has another shape than the product, or there are no such units.
    ///
    /// # Safety
    /// While this runs nobody writes the inputs, and nobody touches the columns of `out` that belong to `units`: no other
    /// lane computes the same units into it.
    pub unsafe fn run_units(&self, units: Range<usize>, out: OutputRows<'_>, workspace: &mut Workspace) {
        let rows = self.inputs.rows;
        assert!(out.rows == rows && out.width == self.width(), "{} x {} for a product", out.rows, out.width);
        let layout = self.inputs.room.layout;
        let end = units.end * self.panels_of_unit();
        let mut panel = units.start * self.panels_of_unit();
        while panel < end {
            let panels = panel..end.min(panel + self.panels_of_group());
            workspace.weight_bytes_read += size_of_val(self.weights.panel_words(panels.clone())) as u64;
            for tile in 0..layout.tiles(rows) {
                let tile = layout.tile(rows, tile);
                self.multiply(panels.clone(), tile.clone(), &mut workspace.sums);
                // SAFETY: the columns are those of `units`, this caller's alone.
                unsafe { self.finish(panels.clone(), tile, &mut workspace.sums, out) };
            }
            panel = panels.end;
        }
    }

    /// Takes tasks until none is left. Every lane of a region calls it; the product is whole after the next barrier.
    ///
    /// # Safety
    /// As [`Matmul::run_units`] for all units, and: all who compute this product into `out` take from one counter, which
    /// was reset before.
    pub unsafe fn run(
        &self,
        tasks: &TaskCounter,
        threads: usize,
        out: OutputRows<'_>,
        workspace: &mut Workspace,
    ) {
        while let Some(units) = tasks.take(self.units(), self.units_of_task(threads)) {
            // SAFETY: a counter gives each unit once; the rest by the caller.
            unsafe { self.run_units(units, out, workspace) };
        }
    }

    /// Computes the whole product, in a region of its own, and gives the bytes of weights read.
    ///
    /// *Errors*: [`DeviceError::Poisoned`].
    pub fn run_in(&self, pool: &mut Pool, out: &mut [f32]) -> Result<u64, DeviceError> {
        let (tasks, out) = (TaskCounter::default(), OutputRows::new(out, self.width()));
        let bytes = std::sync::atomic::AtomicU64::new(0);
        pool.region(|lane| {
            let mut workspace = Workspace::new();
            // SAFETY: the counter is new and only this region's; `out` is borrowed mutably, the inputs immutably.
            unsafe { self.run(&tasks, lane.threads(), out, &mut workspace) };
            bytes.fetch_add(workspace.weight_bytes_read, std::sync::atomic::Ordering::Relaxed);
        })?;
        Ok(bytes.into_inner())
    }

    fn panels_of_unit(&self) -> usize {
        if self.weights.is_gate_up() { 2 } else { 1 }
    }

    /// Panels that are multiplied before their sums are finished: whole units.
    fn panels_of_group(&self) -> usize {
        let rows = self.inputs.rows.div_ceil(self.inputs.room.layout.tiles(self.inputs.rows).max(1));
        kernel::panels_at_once(self.isa, rows).next_multiple_of(self.panels_of_unit())
    }

    fn multiply(&self, panels: Range<usize>, rows: Range<usize>, sums: &mut Sums) {
        let room = self.inputs.room;
        let row_words = room.layout.row_words(self.inputs.inputs);
        let mut form = Form::of(self.isa, self.weights.format());
        if form == Form::WideFlushed {
            let least =
                room.least_exponents.as_slice()[rows.clone()].iter().min().copied().unwrap_or(u8::MAX);
            if never_denormal(self.weights.least_exponent(panels.clone()), least) {
                form = Form::Wide;
            }
        }
        let tile = Tile {
            rows: rows.len(),
            inputs: &room.words.as_slice()[rows.start * row_words..rows.end * row_words],
            panels: panels.len(),
            weights: self.weights.panel_words(panels),
            steps: self.weights.steps(),
            slices: self.weights.slices(),
        };
        kernel::multiply(self.isa, form, &tile, sums);
    }

    /// # Safety
    /// Nobody else touches the columns of `panels`.
    unsafe fn finish(&self, panels: Range<usize>, rows: Range<usize>, sums: &mut Sums, out: OutputRows<'_>) {
        let (Epilogue::Store { bias } | Epilogue::Add { bias } | Epilogue::SwiGlu { bias }) = self.epilogue;
        if let Some(bias) = bias {
            for (panel, sums) in panels.clone().zip(sums.rows.chunks_exact_mut(rows.len())) {
                let bias = &bias[self.weights.panel_outputs(panel)];
                sums.iter_mut()
                    .for_each(|sums| sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias));
            }
        }
        let by_panel = panels.clone().zip(sums.rows.chunks_exact(rows.len()));
        match self.epilogue {
            Epilogue::Store { .. } => {
                for (panel, sums) in by_panel {
                    // SAFETY: by the caller.
                    unsafe { out.store(rows.clone(), self.weights.panel_outputs(panel), sums) };
                }
            }
            Epilogue::Add { .. } => {
                for (panel, sums) in by_panel {
                    let columns = self.weights.panel_outputs(panel);
                    for (row, sums) in rows.clone().zip(sums) {
                        // SAFETY: by the caller.
                        let out = unsafe { out.part(row, columns.clone()) };
                        out.iter_mut().zip(sums).for_each(|(x, sum)| *x += sum);
                    }
                }
            }
            Epilogue::SwiGlu { .. } => {
                let mut products = [[0.0; PANEL]; kernel::ROWS_MAX];
                let products = &mut products[..rows.len()];
                for (panel, sums) in panels.step_by(2).zip(sums.rows.chunks_exact(2 * rows.len())) {
                    let (gates, ups) = sums.split_at(rows.len());
                    math::swiglu(
                        self.isa,
                        gates.as_flattened(),
                        ups.as_flattened(),
                        products.as_flattened_mut(),
                    );
                    // SAFETY: by the caller.
                    unsafe { out.store(rows.clone(), self.weights.panel_outputs(panel), products) };
                }
            }
        }
    }
}

/// Numbers rounded at once.
const CHUNK: usize = 128;

/// Whether no result of a bf16 chain can be denormal, given the least biased exponents of its weights and inputs.
///
/// A bf16 number is a multiple of 2^(exponent − 7), so every product, and every rounded sum of products, is a multiple of
/// 2^(both exponents − 14): if that is 2^-126 or more, what is not zero is normal, and flushing changes nothing.
fn never_denormal(weights: u8, inputs: u8) -> bool {
    const BIAS: i32 = 127;
    i32::from(weights) + i32::from(inputs) - 2 * BIAS - 14 >= -126
}

/// f32 to bf16: nearest even, a denormal to a zero of its sign, NaN quieted, as the hardware's instruction.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let chosen = match magnitude {
        0..0x0080_0000 => bits & 0x8000_0000,
        0x7f80_0001.. => bits | 0x0040_0000,
        _ => rounded,
    };
    (chosen >> 16) as u16
}

/// Widens bf16 to f32 bits. Gives the least magnitude that is not zero, less one: zero wraps to the largest.
fn widen(isa: Isa, halves: &[u16], words: &mut [u32]) -> u32 {
    on_isa!(isa, widen_on(halves: &[u16], words: &mut [u32]) -> u32)
}

#[inline(always)]
fn widen_on<S: Lanes>(_: S, halves: &[u16], words: &mut [u32]) -> u32 {
    let mut least = u32::MAX;
    for (word, half) in words.iter_mut().zip(halves) {
        *word = u32::from(*half) << 16;
        least = least.min((*word & 0x7fff_ffff).wrapping_sub(1));
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least bound that will do: one exponent lower, and a sum of two products that cancel is denormal.
    #[test]
    fn a_chain_without_flushing_is_right_up_to_the_bound_on_exponents() {
        let isa = Isa::Portable;
        for (weight, input) in [(71, 71), (100, 42), (17, 125), (71, 70), (100, 41), (17, 124)] {
            // (1 + 2^-7)² - 1 · (1 + 2^-6) = 2^-14, in units of the exponents' product.
            let number = |exponent: u32, fraction: u32| exponent << 23 | fraction << 16;
            let weights = [number(weight, 1) >> 16 | number(weight, 2) | 1 << 31; PANEL];
            let inputs = [number(input, 1), number(input, 0)];
            let tile = Tile { rows: 1, inputs: &inputs, panels: 1, weights: &weights, steps: 1, slices: 1 };
            let sum_of = |form| {
                let mut sums = Sums::new();
                kernel::multiply(isa, form, &tile, &mut sums);
                sums.rows[0][0]
            };
            let (wide, flushed) = (sum_of(Form::Wide), sum_of(Form::WideFlushed));
            assert!(wide > 0.0, "{weight} {input}: {wide:e}");
            assert_eq!(
                wide == flushed,
                never_denormal(weight as u8, input as u8),
                "{weight} {input}: {wide:e} {flushed:e}"
            );
        }
    }
}
