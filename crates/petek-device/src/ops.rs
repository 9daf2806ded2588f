//! The seam between a decoder and a device: tensor operations that are *enqueued*.
//!
//! ```text
//!  load    load_matrix · load_vector · load_rotary · buffer · allocate_kv          handles come out
//!  step    begin(&StepInputs) → embed → (norm_qkv → rope_kv_attention → o_residual
//!          → norm_gate_up_swiglu → down_residual) × layers → pick → norm_logits → sample → submit
//!  after   draws() · read(buffer)
//! ```
//!
//! An enqueue takes handles and gives nothing back; it allocates nothing and reads nothing back. All that changes between
//! steps (positions, block tables, lengths) is read from what [`Ops::begin`] wrote, so the same calls can be
//! recorded once and replayed. A fused operation has a default made of its parts: the parts are its oracle.
//!
//! Every [`Buffer`] is f32, row-major, as long as its [`Extent`]; an operation works on the extent of its output, and all its
//! buffers have that extent (but for [`Ops::pick`]). Rounding to the weights' activation format happens where a matmul (or the KV cache) takes its input, never in a buffer.

use std::sync::Arc;

use crate::DeviceError;
use crate::collective::Collective;

/// How numbers stand in weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE binary32; matmul inputs and KV cache are f32 too.
    F32,
    /// bfloat16; matmul inputs, KV cache and attention probabilities are bfloat16 too.
    Bf16,
    /// IEEE binary16, widened exactly in the kernel; all else as F32.
    F16,
}

impl Format {
    /// The format of matmul inputs and of the KV cache that goes with weights of this one.
    pub fn activation(self) -> Format {
        match self {
            Format::Bf16 => Format::Bf16,
            Format::F32 | Format::F16 => Format::F32,
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 | Format::F16 => 2,
        }
    }

    /// Its name in configs, flags and the numerics id.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
        }
    }
}

/// A part of a row-major tensor in a file: `rows × cols` from (`row0`, `col0`) of a tensor whose rows are `stride` long.
///
/// *Shape*: `[outputs, inputs]`, as Hugging Face stores a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// For errors.
    pub name: &'a str,
    /// How the file stores it (little-endian).
    pub format: Format,
    /// The whole tensor's bytes, perhaps unaligned.
    pub bytes: &'a [u8],
    /// Numbers in a whole row.
    pub stride: usize,
    /// First row taken.
    pub row0: usize,
    /// Rows taken.
    pub rows: usize,
    /// First column taken.
    pub col0: usize,
    /// Columns taken.
    pub cols: usize,
}

impl Tensor<'_> {
    /// Checks that the part lies inside the bytes.
    ///
    /// *Errors*: [`DeviceError::Shape`] naming the tensor.
    pub fn check(&self) -> Result<(), DeviceError> {
        let whole_rows = self.bytes.len() / (self.stride.max(1) * self.format.bytes());
        let fits = self.col0.checked_add(self.cols).is_some_and(|end| end <= self.stride)
            && self.row0.checked_add(self.rows).is_some_and(|end| end <= whole_rows);
        if fits {
            return Ok(());
        }
        Err(DeviceError::shape(
            self.name,
            format!("rows {}+{} and columns {}+{} inside", self.row0, self.rows, self.col0, self.cols),
            format!("{whole_rows} x {}", self.stride),
        ))
    }

    /// The number at (`row`, `col`) of the part, widened exactly. For references and tests: kernels have their own ways.
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let index = (self.row0 + row) * self.stride + self.col0 + col;
        match self.format {
            Format::F32 => {
                let b: [u8; 4] = self.bytes[index * 4..index * 4 + 4].try_into().unwrap_or_default();
                f32::from_le_bytes(b)
            }
            Format::Bf16 => {
                half::bf16::from_le_bytes([self.bytes[index * 2], self.bytes[index * 2 + 1]]).to_f32()
            }
            Format::F16 => {
                half::f16::from_le_bytes([self.bytes[index * 2], self.bytes[index * 2 + 1]]).to_f32()
            }
        }
    }
}

/// The parts of one matrix and how they lie in it.
#[derive(Clone, Copy, Debug)]
pub enum Parts<'a> {
    /// One below the other: q, k, v; or a single tensor.
    Stack(&'a [Tensor<'a>]),
    /// Two of one shape, [gate, up]; their outputs are taken as pairs by [`Ops::swiglu`].
    GateUp([Tensor<'a>; 2]),
}

/// A matrix to load.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSpec<'a> {
    /// What it is made of.
    pub parts: Parts<'a>,
    /// The format it is kept in; the file's is converted at load.
    pub format: Format,
    /// In how many equal contiguous slices the inputs are summed (a power of two; 1: one chain): `o` and `down`.
    /// The slices' sums are added as a balanced tree, so that the tensor-parallel degree does not show in the bits. A
    /// rank that holds a part of the inputs says here how many of the slices it holds.
    pub slices: usize,
}

/// A loaded matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix(pub u32);

/// A loaded vector (f32): a norm's weights or a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vector(pub u32);

/// What the rows of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The rows of the step.
    Rows,
    /// The picked rows: those from which a token is drawn.
    Picks,
}

/// A buffer of the step: f32, `[its extent, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer(pub u32);

/// Heads of this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; divides `query`.
    pub kv: usize,
    /// Width of one head.
    pub dim: usize,
}

impl Heads {
    /// Width of a q ‖ k ‖ v row.
    pub fn qkv_width(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }

    /// Width of an attention output row.
    pub fn query_width(&self) -> usize {
        self.query * self.dim
    }
}

/// The paged KV cache to allocate, once.
#[derive(Clone, Copy, Debug)]
pub struct KvSpec {
    /// Layers of the model.
    pub layers: usize,
    /// Heads of this rank.
    pub heads: Heads,
    /// Tokens of a block: a power of two, 16 to 256.
    pub block_tokens: usize,
    /// Blocks.
    pub blocks: usize,
    /// f32 or bf16.
    pub format: Format,
}

impl KvSpec {
    /// Bytes of the cache, all layers.
    pub fn bytes(&self) -> usize {
        self.blocks * self.block_bytes()
    }

    /// Bytes of one block, all layers: a key and a value for each token and head, the value's width rounded up to a vector
    /// of 16.
    pub fn block_bytes(&self) -> usize {
        let token = (self.heads.dim + self.heads.dim.next_multiple_of(16)) * self.format.bytes();
        self.layers * self.heads.kv * self.block_tokens * token
    }
}

/// The most a step may hold: sizes of all buffers, fixed at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepCapacity {
    /// Rows of a step.
    pub rows: usize,
    /// Spans of a step.
    pub spans: usize,
    /// Rows from which tokens are drawn.
    pub picks: usize,
    /// Blocks of one sequence.
    pub blocks_per_span: usize,
}

/// One sequence's rows in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanRows {
    /// First row.
    pub row0: u32,
    /// Rows.
    pub rows: u32,
    /// Position of the first row; all positions before it are in the cache.
    pub start: u32,
    /// Where the sequence's block table begins in [`StepInputs::tables`].
    pub table0: u32,
}

/// What a row of logits holds: `[size, of which drawn come first]`, then padding that means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// The model's: logprobs and ranks are over all of it.
    pub size: usize,
    /// Ids from here on are in the model but not in the tokeniser, and never drawn.
    pub drawn: usize,
}

/// How one row's token is drawn (`BEHAVIOUR.md` 2; random numbers as `WIRE.md` 9).
#[derive(Clone, Debug, PartialEq)]
pub struct DrawSpec {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep at most this many; 0 is off.
    pub top_k: u32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// The sequence's seed.
    pub seed: u64,
    /// Output position of the token to draw.
    pub position: u32,
    /// Ids that cannot be drawn.
    pub masked: Arc<[u32]>,
    /// None: no logprobs wanted. Some(n): chosen, rank, and the n largest.
    pub logprobs: Option<u8>,
}

/// What a draw gave.
#[derive(Clone, Debug, PartialEq)]
pub enum DrawResult {
    /// A token.
    Token {
        /// Its id.
        id: u32,
        /// Its logprob of the raw logits; 0 if not asked for.
        logprob: f32,
        /// 1 + larger logits + equal ones of a lower id; 0 if not asked for.
        rank: u32,
        /// The largest, with logprobs.
        top: Vec<(u32, f32)>,
    },
    /// NaN or infinity among the logits.
    NotFinite,
    /// Everything was masked.
    NoneAllowed,
}

/// What changes from step to step. [`Ops::begin`] copies it to the device.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs<'a> {
    /// Token of each row.
    pub ids: &'a [u32],
    /// Position of each row.
    pub positions: &'a [u32],
    /// The sequences' rows, ascending and without gaps: together all rows.
    pub spans: &'a [SpanRows],
    /// Block tables, one after the other; a sequence's table covers all its positions up to its last row's.
    pub tables: &'a [u32],
    /// Blocks set to zero before anything else: they held what came of a NaN.
    pub zeroes: &'a [u32],
    /// Blocks copied (from, to) before anything is computed. None reads what another writes, or what is zeroed.
    pub copies: &'a [(u32, u32)],
    /// Rows whose logits are made, ascending.
    pub picks: &'a [u32],
    /// How each picked row's token is drawn; as long as `picks`, or empty on a rank that does not sample.
    pub draws: &'a [DrawSpec],
}

impl StepInputs<'_> {
    /// Checks the inputs against what was allocated, and against themselves.
    ///
    /// *Errors*: [`DeviceError::Shape`] naming the first that does not fit.
    pub fn check(&self, kv: &KvSpec, capacity: &StepCapacity) -> Result<(), DeviceError> {
        let at_most = |what: &str, count: usize, most: usize| {
            if count <= most {
                Ok(())
            } else {
                Err(DeviceError::shape(what, format!("at most {most}"), count.to_string()))
            }
        };
        let rows = self.ids.len();
        at_most("rows of the step", rows, capacity.rows)?;
        at_most("spans of the step", self.spans.len(), capacity.spans)?;
        at_most("picked rows of the step", self.picks.len(), capacity.picks)?;
        if self.positions.len() != rows {
            return Err(DeviceError::shape(
                "positions",
                format!("{rows}, one a row"),
                self.positions.len().to_string(),
            ));
        }
        let mut row = 0;
        for (index, span) in self.spans.iter().enumerate() {
            let what = |part: &str| format!("span {index}: {part}");
            if span.row0 != row || span.rows == 0 {
                let actual = format!("{} rows from row {}", span.rows, span.row0);
                return Err(DeviceError::shape(what("rows"), format!("some, from row {row}"), actual));
            }
            row += span.rows;
            let blocks = (span.start as usize + span.rows as usize).div_ceil(kv.block_tokens);
            at_most(&what("blocks"), blocks, capacity.blocks_per_span)?;
            let table = self.tables.get(span.table0 as usize..).and_then(|table| table.get(..blocks));
            let Some(table) = table else {
                let actual = format!("{} in all, from {}", self.tables.len(), span.table0);
                return Err(DeviceError::shape(what("block table"), format!("{blocks} blocks"), actual));
            };
            if let Some(block) = table.iter().find(|block| **block as usize >= kv.blocks) {
                return Err(DeviceError::shape(
                    what("block"),
                    format!("below {}", kv.blocks),
                    block.to_string(),
                ));
            }
            let positions = self.positions.get(span.row0 as usize..row as usize).unwrap_or_default();
            let ascending = positions.iter().zip(span.start..).all(|(have, want)| *have == want);
            if positions.len() != span.rows as usize || !ascending {
                return Err(DeviceError::shape(
                    what("positions"),
                    format!("ascending from {}", span.start),
                    "others",
                ));
            }
        }
        if row as usize != rows {
            return Err(DeviceError::shape("spans", format!("{rows} rows in all"), row.to_string()));
        }
        if let Some(pick) = self.picks.iter().find(|pick| **pick as usize >= rows) {
            return Err(DeviceError::shape("picked row", format!("below {rows}"), pick.to_string()));
        }
        if !self.draws.is_empty() && self.draws.len() != self.picks.len() {
            let expected = format!("{}, one a picked row", self.picks.len());
            return Err(DeviceError::shape("draws", expected, self.draws.len().to_string()));
        }
        let mut touched = self.copies.iter().flat_map(|(from, to)| [from, to]).chain(self.zeroes);
        match touched.find(|block| **block as usize >= kv.blocks) {
            Some(block) => Err(DeviceError::shape(
                "copied or zeroed block",
                format!("below {}", kv.blocks),
                block.to_string(),
            )),
            None => Ok(()),
        }
    }
}

/// Tensor operations of one rank. See the module's page for the order of calls.
///
/// *Errors*: enqueues never fail: a wrong handle or width is a bug of the caller and panics at once, before anything
/// runs. What fails while running comes out of [`Ops::submit`].
pub trait Ops: Send {
    /// The format of matmul inputs.
    fn activation(&self) -> Format;

    /// The group that [`Ops::all_reduce`] and [`Ops::all_gather`] speak to.
    fn collective(&self) -> &Arc<dyn Collective>;

    // ---- load -------------------------------------------------------------------------------------------------

    /// Takes a matrix in, converted and packed.
    fn load_matrix(&mut self, spec: MatrixSpec<'_>) -> Result<Matrix, DeviceError>;

    /// Takes a vector in.
    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, DeviceError>;

    /// Takes the rotary tables in: cos and sin, each `[positions, head_dim / 2]`.
    fn load_rotary(&mut self, cos: &[f32], sin: &[f32]) -> Result<(), DeviceError>;

    /// Makes a buffer, as long as the capacity given to [`Ops::allocate_kv`], which stands before.
    fn buffer(&mut self, extent: Extent, width: usize) -> Result<Buffer, DeviceError>;

    /// Allocates the KV cache and everything a step's inputs need. Once.
    fn allocate_kv(&mut self, kv: KvSpec, capacity: StepCapacity) -> Result<(), DeviceError>;

    /// Bytes of weights held by this rank (padding included).
    fn weight_bytes(&self) -> usize;

    // ---- a step: parts ----------------------------------------------------------------------------------------

    /// Begins a step: copies its inputs to the device. Must stand before the step's enqueues.
    ///
    /// *Errors*: [`DeviceError::Shape`] where an input exceeds the capacity or a block or token id is out of range.
    fn begin(&mut self, inputs: &StepInputs<'_>) -> Result<(), DeviceError>;

    /// `out[row] = table[ids[row] - first_id] + 0.0`, and zeros for ids that this rank's `table` does not hold: the sum
    /// over the ranks is then exact. `table` is `[ids, hidden]`, loaded as any matrix; it may be the head too.
    fn embed(&mut self, table: Matrix, first_id: u32, out: Buffer);

    /// `out = x / sqrt(mean(x²) + eps) * weight`, the sum by the fixed reduction tree.
    fn rms_norm(&mut self, x: Buffer, weight: Vector, eps: f32, out: Buffer);

    /// `out = a · wᵀ (+ bias)`; for a [`Parts::GateUp`] matrix the width of `out` is that of both halves, gate first. `out` may
    /// be wider than `w` has outputs: the rest is zeros.
    fn matmul(&mut self, a: Buffer, w: Matrix, bias: Option<Vector>, out: Buffer);

    /// Rotates q and k of `qkv` by their rows' positions, writes k and v to the layer's cache and q, rotated, to `q`.
    fn rope_kv(&mut self, qkv: Buffer, layer: usize, q: Buffer);

    /// Causal attention of each row over its sequence's cache, its own position included. `scale` multiplies q·k.
    fn attention(&mut self, q: Buffer, layer: usize, scale: f32, out: Buffer);

    /// `out = silu(gate) * up` of a `[gate ‖ up]` row.
    fn swiglu(&mut self, gate_up: Buffer, out: Buffer);

    /// `x += y (+ bias)`.
    fn add(&mut self, x: Buffer, y: Buffer, bias: Option<Vector>);

    /// Copies the step's picked rows of `x` to `out`, whose extent is the picks.
    fn pick(&mut self, x: Buffer, out: Buffer);

    /// Norm, then the head's projection, of picked rows. `normed` is scratch.
    fn norm_logits(&mut self, x: Buffer, norm: Norm, w: Matrix, normed: Buffer, out: Buffer) {
        self.rms_norm(x, norm.weight, norm.eps, normed);
        self.matmul(normed, w, None, out);
    }

    /// Draws a token from each picked row's logits.
    fn sample(&mut self, logits: Buffer, vocabulary: Vocabulary);

    /// Sums `x` over the ranks, as one balanced tree in rank order. Solo: nothing.
    fn all_reduce(&mut self, x: Buffer);

    /// Puts the ranks' `part` rows (picks) side by side in `whole`, in rank order.
    fn all_gather(&mut self, part: Buffer, whole: Buffer);

    // ---- a step: fused, with defaults made of their parts -----------------------------------------------------

    /// Norm, then the q ‖ k ‖ v projection. `normed` is scratch.
    fn norm_qkv(
        &mut self,
        x: Buffer,
        norm: Norm,
        w: Matrix,
        bias: Option<Vector>,
        normed: Buffer,
        qkv: Buffer,
    ) {
        self.rms_norm(x, norm.weight, norm.eps, normed);
        self.matmul(normed, w, bias, qkv);
    }

    /// Rotary, KV write, attention. `q` is scratch.
    fn rope_kv_attention(&mut self, qkv: Buffer, layer: usize, scale: f32, q: Buffer, out: Buffer) {
        self.rope_kv(qkv, layer, q);
        self.attention(q, layer, scale, out);
    }

    /// The attention's output projection, summed over the ranks, added to `x`. `partial` is scratch.
    fn o_residual(&mut self, attention: Buffer, w: Matrix, bias: Option<Vector>, partial: Buffer, x: Buffer) {
        self.matmul(attention, w, None, partial);
        self.all_reduce(partial);
        self.add(x, partial, bias);
    }

    /// Norm, the gate and up projections, SwiGLU. `normed` and `gate_up` are scratch.
    #[allow(clippy::too_many_arguments)]
    fn norm_gate_up_swiglu(
        &mut self,
        x: Buffer,
        norm: Norm,
        w: Matrix,
        bias: Option<Vector>,
        normed: Buffer,
        gate_up: Buffer,
        out: Buffer,
    ) {
        self.rms_norm(x, norm.weight, norm.eps, normed);
        self.matmul(normed, w, bias, gate_up);
        self.swiglu(gate_up, out);
    }

    /// The MLP's down projection, summed over the ranks, added to `x`. `partial` is scratch.
    fn down_residual(&mut self, hidden: Buffer, w: Matrix, bias: Option<Vector>, partial: Buffer, x: Buffer) {
        self.o_residual(hidden, w, bias, partial, x);
    }

    // ---- run and read -----------------------------------------------------------------------------------------

    /// Runs what was enqueued since [`Ops::begin`], to its end.
    ///
    /// *Errors*: a collective's failure, a compute thread's panic. The executor is then unusable.
    fn submit(&mut self) -> Result<(), DeviceError>;

    /// What [`Ops::sample`] drew, in the order of the picks.
    fn draws(&self) -> &[DrawResult];

    /// Reads `rows` rows of a buffer (tests, hooks).
    fn read(&self, buffer: Buffer, rows: usize) -> Vec<f32>;

    /// Bytes of weights fetched by kernels since the start, counted where a panel is fetched.
    fn weight_bytes_read(&self) -> u64;
}

/// A norm's weight and epsilon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The weights.
    pub weight: Vector,
    /// Added to the mean square.
    pub eps: f32,
}
