//! Weights as the kernels want them: panels of 32 outputs, each contiguous over all inputs, so that one matmul pass reads
//! each panel once, front to back.
//!
//! ```text
//!  bf16   [outputs / 32][inputs / 2][32][2]     the dot product's pairs; an odd count of inputs gets a zero
//!  f32    [outputs / 32][inputs][32]
//!  f16    [outputs / 32][inputs][32]            widened in the kernel
//! ```
//! The last panel is filled up with zeros. The panels of a gate and an up projection alternate (g0 u0 g1 u1 …), so that
//! SwiGLU finds both sums in one task.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::slice::HalfFloatSliceExt;

use crate::DeviceError;
use crate::cpu::memory::HugeBuffer;
use crate::cpu::pool::Pool;
use crate::ops::{Format, MatrixSpec, Parts, Tensor};

/// Outputs of a panel.
pub const PANEL: usize = 32;

/// Slices that the inputs may be summed in, at most.
pub const SLICES_MAX: usize = 8;

/// Numbers converted at once: 32 rows of them fit the first-level cache.
const CHUNK: usize = 64;

/// A matrix in panels, read-only: executors of one process share it in an `Arc`.
#[derive(Debug)]
pub struct PackedMatrix {
    words: HugeBuffer<u32>,
    format: Format,
    outputs: usize,
    inputs: usize,
    slices: usize,
    gate_up: bool,
    /// By panel, of a bf16 matrix: the least biased exponent among its numbers that are not zero (255: none).
    least_exponents: Vec<u8>,
}

impl PackedMatrix {
    /// Converts and packs, on all lanes of `pool`.
    ///
    /// *Errors*: [`DeviceError::Shape`] if a part lies outside its tensor, parts do not fit together, or the slices do not
    /// divide the inputs; [`DeviceError::Memory`].
    pub fn pack(spec: &MatrixSpec<'_>, pool: &mut Pool) -> Result<PackedMatrix, DeviceError> {
        let (parts, gate_up) = match &spec.parts {
            Parts::Stack(parts) => (*parts, false),
            Parts::GateUp(pair) => (&pair[..], true),
        };
        let (outputs, inputs) = checked_shape(parts, gate_up)?;
        let first = parts[0].name;
        let slice_unit = spec.slices * if spec.format == Format::Bf16 && spec.slices > 1 { 2 } else { 1 };
        if !spec.slices.is_power_of_two() || spec.slices > SLICES_MAX || !inputs.is_multiple_of(slice_unit) {
            let expected = "1, 2, 4 or 8 slices of equal, in bf16 even, count of inputs";
            return Err(DeviceError::shape(
                first,
                expected,
                format!("{} slices of {inputs} inputs", spec.slices),
            ));
        }
        let panels = if gate_up { 2 * (outputs / 2).div_ceil(PANEL) } else { outputs.div_ceil(PANEL) };
        let panel_words = steps(spec.format, inputs).checked_mul(step_words(spec.format));
        let words = panel_words.and_then(|words| words.checked_mul(panels)).unwrap_or(usize::MAX);
        let mut packed = PackedMatrix {
            words: HugeBuffer::zeroed(first, words)?,
            format: spec.format,
            outputs,
            inputs,
            slices: spec.slices,
            gate_up,
            least_exponents: vec![u8::MAX; panels],
        };
        let source = Source { parts, gate_up, format: spec.format };
        let panel_words = packed.words_of_panel();
        let chunks = packed.words.as_mut_slice().chunks_exact_mut(panel_words);
        let tasks = Mutex::new(chunks.zip(&mut packed.least_exponents).enumerate());
        pool.region(|_| {
            loop {
                // Taken apart from the loop's body, or the lock would be held through it.
                let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((panel, (words, least_exponent))) = task else { return };
                source.pack_panel(panel, words);
                if spec.format == Format::Bf16 {
                    *least_exponent =
                        words.iter().map(|pair| least_exponent_of_pair(*pair)).min().unwrap_or(u8::MAX);
                }
            }
        })?;
        Ok(packed)
    }

    /// Outputs: rows of the matrix; of both halves together for gate and up.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Inputs: columns of the matrix.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// How its numbers are kept.
    pub fn format(&self) -> Format {
        self.format
    }

    /// In how many slices the inputs are summed.
    pub fn slices(&self) -> usize {
        self.slices
    }

    /// Whether it is a gate and an up projection, by turns.
    pub fn is_gate_up(&self) -> bool {
        self.gate_up
    }

    /// Bytes of all panels, padding included.
    pub fn bytes(&self) -> usize {
        self.words.len() * 4
    }

    /// The memory of all panels, for measuring the read rate on the very bytes that a step reads.
    pub fn words(&self) -> &[u32] {
        self.words.as_slice()
    }

    /// Panels.
    pub fn panels(&self) -> usize {
        self.least_exponents.len()
    }

    /// Reads a row (one output's weights) back, widened exactly: a token's embedding, where embedding and head are one.
    ///
    /// *Panics*: if there is no such row or `out` is not as wide as the matrix.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.outputs && out.len() == self.inputs,
            "row {row} of {} x {}",
            self.outputs,
            self.inputs
        );
        let half = self.outputs / 2;
        let (panel, lane) = match self.gate_up {
            false => (row / PANEL, row % PANEL),
            true if row < half => (row / PANEL * 2, row % PANEL),
            true => ((row - half) / PANEL * 2 + 1, (row - half) % PANEL),
        };
        let words = self.panel_words(panel..panel + 1);
        match self.format {
            Format::Bf16 => {
                for (pair, step) in out.chunks_mut(2).zip(words.chunks_exact(PANEL)) {
                    let bits = [step[lane] << 16, step[lane] & 0xffff_0000];
                    pair.iter_mut().zip(bits).for_each(|(x, bits)| *x = f32::from_bits(bits));
                }
            }
            Format::F32 => {
                for (x, step) in out.iter_mut().zip(words.chunks_exact(PANEL)) {
                    *x = f32::from_bits(step[lane]);
                }
            }
            Format::F16 => {
                for (x, step) in out.iter_mut().zip(words.chunks_exact(PANEL / 2)) {
                    let bits = (step[lane / 2] >> (lane % 2 * 16)) as u16;
                    *x = half::f16::from_bits(bits).to_f32();
                }
            }
        }
    }

    /// The words of some panels, one panel after the other.
    pub(crate) fn panel_words(&self, panels: Range<usize>) -> &[u32] {
        let words = self.words_of_panel();
        &self.words.as_slice()[panels.start * words..panels.end * words]
    }

    /// Which columns of a product a panel gives: fewer than 32 in the last.
    pub(crate) fn panel_outputs(&self, panel: usize) -> Range<usize> {
        let (from, end) = match self.gate_up {
            false => (panel * PANEL, self.outputs),
            true => (panel % 2 * (self.outputs / 2) + panel / 2 * PANEL, self.outputs / 2 * (1 + panel % 2)),
        };
        from..end.min(from + PANEL)
    }

    /// The least biased exponent of bf16 panels' numbers that are not zero; 255 if all are.
    pub(crate) fn least_exponent(&self, panels: Range<usize>) -> u8 {
        self.least_exponents[panels].iter().min().copied().unwrap_or(u8::MAX)
    }

    /// Kernel steps over all inputs.
    pub(crate) fn steps(&self) -> usize {
        steps(self.format, self.inputs)
    }

    fn words_of_panel(&self) -> usize {
        self.steps() * step_words(self.format)
    }
}

/// Steps of a kernel over `inputs`: a pair each in bf16, one each otherwise.
pub(crate) fn steps(format: Format, inputs: usize) -> usize {
    if format == Format::Bf16 { inputs.div_ceil(2) } else { inputs }
}

/// Words of a panel that a step reads.
pub(crate) fn step_words(format: Format) -> usize {
    if format == Format::F16 { PANEL / 2 } else { PANEL }
}

/// The least biased exponent of two bf16 numbers that are not zero; 255 if both are.
pub(crate) fn least_exponent_of_pair(pair: u32) -> u8 {
    // Denormals were flushed: exponent 0 is zero, and wraps to the largest.
    let wrapped = |exponent: u32| (exponent as u8).wrapping_sub(1);
    wrapped(pair >> 7).min(wrapped(pair >> 23)).saturating_add(1)
}

/// Outputs and inputs of all parts together.
fn checked_shape(parts: &[Tensor<'_>], gate_up: bool) -> Result<(usize, usize), DeviceError> {
    let Some(first) = parts.first() else {
        return Err(DeviceError::shape("matrix", "at least one part", "none"));
    };
    let mut outputs = 0_usize;
    for part in parts {
        part.check()?;
        if part.cols != first.cols || (gate_up && part.rows != first.rows) {
            let shape = |tensor: &Tensor<'_>| format!("{} x {}", tensor.rows, tensor.cols);
            return Err(DeviceError::shape(
                part.name,
                format!("to go with {} of {}", shape(first), first.name),
                shape(part),
            ));
        }
        outputs += part.rows;
    }
    if outputs == 0 || first.cols == 0 {
        return Err(DeviceError::shape(
            first.name,
            "outputs and inputs",
            format!("{outputs} x {}", first.cols),
        ));
    }
    Ok((outputs, first.cols))
}

struct Source<'a> {
    parts: &'a [Tensor<'a>],
    gate_up: bool,
    format: Format,
}

impl<'a> Source<'a> {
    /// The part and the row in it that an output of a panel comes from.
    fn row_of(&self, panel: usize, lane: usize) -> Option<(&'a Tensor<'a>, usize)> {
        let (parts, mut row) = match self.gate_up {
            true => (&self.parts[panel % 2..panel % 2 + 1], panel / 2 * PANEL + lane),
            false => (self.parts, panel * PANEL + lane),
        };
        for part in parts {
            if row < part.rows {
                return Some((part, row));
            }
            row -= part.rows;
        }
        None
    }

    fn pack_panel(&self, panel: usize, words: &mut [u32]) {
        let inputs = self.parts[0].cols;
        let rows: [Option<(&Tensor<'_>, usize)>; PANEL] =
            std::array::from_fn(|lane| self.row_of(panel, lane));
        // What is never written below stays zero: the lanes and the last odd input that are padding.
        let mut numbers = [[0.0_f32; CHUNK]; PANEL];
        let mut halves = [[0_u16; CHUNK]; PANEL];
        let steps_of_chunk = steps(self.format, CHUNK);
        for (chunk, words) in words.chunks_mut(steps_of_chunk * step_words(self.format)).enumerate() {
            let first = chunk * CHUNK;
            let count = CHUNK.min(inputs - first);
            for (lane, row) in rows.iter().enumerate() {
                let Some((part, row)) = row else { continue };
                read(part, *row, first, &mut numbers[lane][..count]);
                numbers[lane][count..].fill(0.0);
                match self.format {
                    Format::F32 => {}
                    Format::Bf16 => {
                        for (half, x) in halves[lane].iter_mut().zip(&numbers[lane]) {
                            *half = super::matmul::bf16_bits(*x);
                        }
                    }
                    Format::F16 => {
                        let halves: &mut [half::f16] =
                            half::slice::HalfBitsSliceExt::reinterpret_cast_mut(&mut halves[lane][..]);
                        halves.convert_from_f32_slice(&numbers[lane]);
                    }
                }
            }
            match self.format {
                Format::F32 => {
                    for (k, step) in words.chunks_exact_mut(PANEL).enumerate() {
                        step.iter_mut().zip(&numbers).for_each(|(word, row)| *word = row[k].to_bits());
                    }
                }
                Format::Bf16 => {
                    for (pair, step) in words.chunks_exact_mut(PANEL).enumerate() {
                        let joined = |row: &[u16; CHUNK]| {
                            u32::from(row[2 * pair]) | u32::from(row[2 * pair + 1]) << 16
                        };
                        step.iter_mut().zip(&halves).for_each(|(word, row)| *word = joined(row));
                    }
                }
                Format::F16 => {
                    for (k, step) in words.chunks_exact_mut(PANEL / 2).enumerate() {
                        let joined =
                            |rows: &[[u16; CHUNK]]| u32::from(rows[0][k]) | u32::from(rows[1][k]) << 16;
                        step.iter_mut()
                            .zip(halves.chunks_exact(2))
                            .for_each(|(word, rows)| *word = joined(rows));
                    }
                }
            }
        }
    }
}

/// Reads numbers of a row from column `first` on, widened exactly.
fn read(part: &Tensor<'_>, row: usize, first: usize, out: &mut [f32]) {
    let size = part.format.bytes();
    let start = ((part.row0 + row) * part.stride + part.col0 + first) * size;
    let bytes = &part.bytes[start..start + out.len() * size];
    match part.format {
        Format::F32 => {
            let (numbers, _) = bytes.as_chunks::<4>();
            out.iter_mut().zip(numbers).for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
        }
        Format::Bf16 => {
            let (numbers, _) = bytes.as_chunks::<2>();
            let widened = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            out.iter_mut().zip(numbers).for_each(|(x, bytes)| *x = widened(bytes));
        }
        Format::F16 => {
            let mut halves = [half::f16::ZERO; CHUNK];
            let (numbers, _) = bytes.as_chunks::<2>();
            halves.iter_mut().zip(numbers).for_each(|(half, bytes)| *half = half::f16::from_le_bytes(*bytes));
            halves[..out.len()].convert_to_f32_slice(out);
        }
    }
}
