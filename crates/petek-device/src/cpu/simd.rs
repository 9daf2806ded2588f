//! The executor that serves on CPUs: packed weights, one order of every sum, its own threads.
//!
//! An enqueue appends *phases* to the step's list; `submit` runs the list as one region of the pool. All lanes run every
//! phase, each on its own rows, columns or tasks, and meet at a barrier after it:
//!
//! ```text
//!  norm_qkv              norm → inputs │ matmul                 │ = barrier
//!  rope_kv_attention     rotate, write K V │ tasks │ merges, where segments were tasks of their own
//!  o_residual            inputs │ matmul, x += sum               (ranks: matmul │ all-reduce │ x +=)
//!  norm_gate_up_swiglu   norm → inputs │ matmul, silu(gate) × up
//!  down_residual         inputs │ matmul, x += sum
//! ```
//! A phase that fails (only a collective can) marks the step as failed: the phases after it are passed over, barriers and
//! all, so no lane waits for another.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::DeviceError;
use crate::collective::{Collective, CollectiveError, HostMemory};
use crate::cpu::attention::{Attention, AttentionRoom};
use crate::cpu::isa::{Isa, IsaReport};
use crate::cpu::kv::KvCache;
use crate::cpu::math;
use crate::cpu::matmul::{Activations, Epilogue, Matmul, OutputRows, Workspace};
use crate::cpu::memory::HugeBuffer;
use crate::cpu::pack::PackedMatrix;
use crate::cpu::pool::{Lane, Pool, PoolOptions, TaskCounter};
use crate::cpu::sample::Sampler;
use crate::ops::{
    Buffer, DrawResult, DrawSpec, Extent, Format, KvSpec, Matrix, MatrixSpec, Norm, Ops, SpanRows,
    StepCapacity, StepInputs, Vector, Vocabulary,
};

/// How a CPU executor runs.
#[derive(Clone, Debug, Default)]
pub struct SimdOptions {
    /// Threads and where they run.
    pub pool: PoolOptions,
    /// The instructions to use; none: the best there are.
    pub isa: Option<Isa>,
}

/// The CPU executor.
pub struct Simd {
    activation: Format,
    collective: Arc<dyn Collective>,
    report: IsaReport,
    pool: Pool,
    weights: Weights,
    allocated: Option<Allocated>,
    phases: Vec<Phase>,
    lanes: Vec<LaneRoom>,
    draws: Vec<DrawResult>,
    weight_bytes_read: AtomicU64,
}

/// What an executor has loaded, to be computed with by others as well: read-only, held once, cheap to clone.
#[derive(Clone)]
pub struct SharedWeights {
    activation: Format,
    weights: Weights,
}

/// What is loaded: shared by the executors of one process, read-only.
#[derive(Clone, Default)]
struct Weights {
    matrices: Vec<Arc<PackedMatrix>>,
    vectors: Vec<Arc<[f32]>>,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
}

/// What serving needs, allocated once.
struct Allocated {
    capacity: StepCapacity,
    kv: KvCache,
    buffers: Vec<Rows>,
    /// The inputs of the matmul that follows: filled by one phase, read by the next.
    inputs: Activations,
    attention: AttentionRoom,
    step: Step,
    /// One for each phase of a step; they grow to the longest list and stay.
    counters: Vec<TaskCounter>,
    drawn: Vec<Mutex<Option<DrawResult>>>,
}

/// The step's inputs, copied.
#[derive(Default)]
struct Step {
    ids: Vec<u32>,
    positions: Vec<u32>,
    spans: Vec<SpanRows>,
    tables: Vec<u32>,
    zeroes: Vec<u32>,
    copies: Vec<(u32, u32)>,
    picks: Vec<u32>,
    draws: Vec<DrawSpec>,
}

/// A buffer's memory: row-major.
struct Rows {
    extent: Extent,
    width: usize,
    data: HugeBuffer<f32>,
}

/// A lane's own room, used by that lane alone inside a region.
struct LaneRoom(UnsafeCell<LaneOwn>);

struct LaneOwn {
    matmul: Workspace,
    sampler: Sampler,
    /// A normed row.
    row: Vec<f32>,
    /// The rotated keys of a row.
    keys: Vec<f32>,
}

// SAFETY: lane i of a region touches room i only (`Run::own`), and between regions the executor is borrowed mutably.
unsafe impl Sync for LaneRoom {}

/// What all lanes do between two barriers.
#[derive(Clone, Copy, Debug)]
enum Phase {
    TouchBlocks,
    Embed { table: Matrix, first_id: u32, out: Buffer },
    Norm { x: Buffer, norm: Norm, out: Buffer },
    NormInputs { x: Buffer, norm: Norm },
    Inputs { a: Buffer },
    Multiply { w: Matrix, bias: Option<Vector>, out: Buffer, then: Then },
    RopeKv { qkv: Buffer, layer: usize, q: Buffer },
    AttentionTasks(Attend),
    AttentionMerges(Attend),
    Swiglu { gate_up: Buffer, out: Buffer },
    Add { x: Buffer, y: Buffer, bias: Option<Vector> },
    Pick { x: Buffer, out: Buffer },
    Sample { logits: Buffer, vocabulary: Vocabulary },
    AllReduce { x: Buffer },
    AllGather { part: Buffer, whole: Buffer },
}

/// One layer's attention.
#[derive(Clone, Copy, Debug)]
struct Attend {
    q: Buffer,
    layer: usize,
    scale: f32,
    out: Buffer,
}

/// What is done with a product's sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Store,
    Add,
    SwiGlu,
}

type Result<T> = std::result::Result<T, DeviceError>;

impl Simd {
    /// An executor for weights whose activation format is `activation`, as a member of `collective`.
    ///
    /// *Errors*: a processor without fused multiply-add, or without the instructions asked for; threads that cannot be started
    /// or pinned.
    pub fn new(options: SimdOptions, activation: Format, collective: Arc<dyn Collective>) -> Result<Self> {
        let report = Isa::choose(options.isa)?;
        let pool = Pool::new(options.pool).map_err(DeviceError::Threads)?;
        let lanes = (0..pool.threads())
            .map(|_| {
                let own = LaneOwn {
                    matmul: Workspace::new(),
                    sampler: Sampler::default(),
                    row: Vec::new(),
                    keys: Vec::new(),
                };
                LaneRoom(UnsafeCell::new(own))
            })
            .collect();
        Ok(Self {
            activation: activation.activation(),
            collective,
            report,
            pool,
            weights: Weights::default(),
            allocated: None,
            phases: Vec::new(),
            lanes,
            draws: Vec::new(),
            weight_bytes_read: AtomicU64::new(0),
        })
    }

    /// The loaded weights, for other executors of this process.
    pub fn weights(&self) -> SharedWeights {
        SharedWeights { activation: self.activation, weights: self.weights.clone() }
    }

    /// An executor over weights that another one loaded: handles mean the same, the memory is held once.
    ///
    /// *Errors*: as [`Simd::new`].
    pub fn over(
        weights: SharedWeights,
        options: SimdOptions,
        collective: Arc<dyn Collective>,
    ) -> Result<Self> {
        let SharedWeights { activation, weights } = weights;
        Ok(Self { weights, ..Self::new(options, activation, collective)? })
    }

    /// The instructions in use, and any that failed their self-test.
    pub fn isa(&self) -> &IsaReport {
        &self.report
    }

    /// The loaded matrices, for measuring the read rate on the very bytes that a step reads.
    pub fn packed(&self) -> impl Iterator<Item = &PackedMatrix> {
        self.weights.matrices.iter().map(|matrix| &**matrix)
    }

    fn allocated(&mut self) -> &mut Allocated {
        self.allocated.as_mut().expect("allocate_kv stands before buffers and steps")
    }

    fn multiply(&mut self, w: Matrix, bias: Option<Vector>, out: Buffer, then: Then) {
        self.phases.push(Phase::Multiply { w, bias, out, then });
    }
}

impl Ops for Simd {
    fn activation(&self) -> Format {
        self.activation
    }

    fn collective(&self) -> &Arc<dyn Collective> {
        &self.collective
    }

    fn load_matrix(&mut self, spec: MatrixSpec<'_>) -> Result<Matrix> {
        if spec.format.activation() != self.activation {
            return Err(DeviceError::Format {
                what: "a matrix".to_owned(),
                format: format!("{} beside {} activations", spec.format.name(), self.activation.name()),
                executor: "CPU",
            });
        }
        self.weights.matrices.push(Arc::new(PackedMatrix::pack(&spec, &mut self.pool)?));
        Ok(Matrix(self.weights.matrices.len() as u32 - 1))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector> {
        self.weights.vectors.push(values.into());
        Ok(Vector(self.weights.vectors.len() as u32 - 1))
    }

    fn load_rotary(&mut self, cos: &[f32], sin: &[f32]) -> Result<()> {
        (self.weights.cos, self.weights.sin) = (cos.into(), sin.into());
        Ok(())
    }

    fn buffer(&mut self, extent: Extent, width: usize) -> Result<Buffer> {
        let allocated = self.allocated();
        let rows = match extent {
            Extent::Rows => allocated.capacity.rows,
            Extent::Picks => allocated.capacity.picks,
        };
        allocated.buffers.push(Rows {
            extent,
            width,
            data: HugeBuffer::zeroed("a step's buffer", rows * width)?,
        });
        Ok(Buffer(allocated.buffers.len() as u32 - 1))
    }

    fn allocate_kv(&mut self, kv: KvSpec, capacity: StepCapacity) -> Result<()> {
        let widest = self.weights.matrices.iter().map(|matrix| matrix.inputs()).max().unwrap_or(0);
        let rows = capacity.rows.max(capacity.picks);
        let inputs = Activations::new(self.report.isa_matmul, self.activation, rows, widest)?;
        for lane in &mut self.lanes {
            lane.0.get_mut().row = vec![0.0; widest];
            lane.0.get_mut().keys = vec![0.0; kv.heads.kv * kv.heads.dim];
        }
        self.allocated = Some(Allocated {
            capacity,
            kv: KvCache::new(kv)?,
            buffers: Vec::new(),
            inputs,
            attention: AttentionRoom::new(self.report.isa, kv, capacity, self.pool.threads())?,
            step: Step::default(),
            counters: Vec::new(),
            drawn: (0..capacity.picks).map(|_| Mutex::new(None)).collect(),
        });
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        let matrices: usize = self.weights.matrices.iter().map(|matrix| matrix.bytes()).sum();
        matrices + self.weights.vectors.iter().map(|vector| vector.len() * 4).sum::<usize>()
    }

    fn begin(&mut self, inputs: &StepInputs<'_>) -> Result<()> {
        self.phases.clear();
        let allocated = self.allocated();
        inputs.check(allocated.kv.spec(), &allocated.capacity)?;
        let step = &mut allocated.step;
        fn copy<T: Clone>(to: &mut Vec<T>, from: &[T]) {
            to.clear();
            to.extend_from_slice(from);
        }
        copy(&mut step.ids, inputs.ids);
        copy(&mut step.positions, inputs.positions);
        copy(&mut step.spans, inputs.spans);
        copy(&mut step.tables, inputs.tables);
        copy(&mut step.zeroes, inputs.zeroes);
        copy(&mut step.copies, inputs.copies);
        copy(&mut step.picks, inputs.picks);
        copy(&mut step.draws, inputs.draws);
        allocated.attention.plan(&step.spans);
        if !inputs.copies.is_empty() || !inputs.zeroes.is_empty() {
            self.phases.push(Phase::TouchBlocks);
        }
        Ok(())
    }

    fn embed(&mut self, table: Matrix, first_id: u32, out: Buffer) {
        self.phases.push(Phase::Embed { table, first_id, out });
    }

    fn rms_norm(&mut self, x: Buffer, weight: Vector, eps: f32, out: Buffer) {
        self.phases.push(Phase::Norm { x, norm: Norm { weight, eps }, out });
    }

    fn matmul(&mut self, a: Buffer, w: Matrix, bias: Option<Vector>, out: Buffer) {
        self.phases.push(Phase::Inputs { a });
        self.multiply(w, bias, out, Then::Store);
    }

    fn rope_kv(&mut self, qkv: Buffer, layer: usize, q: Buffer) {
        self.phases.push(Phase::RopeKv { qkv, layer, q });
    }

    fn attention(&mut self, q: Buffer, layer: usize, scale: f32, out: Buffer) {
        let attend = Attend { q, layer, scale, out };
        self.phases.push(Phase::AttentionTasks(attend));
        if self.allocated().attention.merges() > 0 {
            self.phases.push(Phase::AttentionMerges(attend));
        }
    }

    fn swiglu(&mut self, gate_up: Buffer, out: Buffer) {
        self.phases.push(Phase::Swiglu { gate_up, out });
    }

    fn add(&mut self, x: Buffer, y: Buffer, bias: Option<Vector>) {
        self.phases.push(Phase::Add { x, y, bias });
    }

    fn pick(&mut self, x: Buffer, out: Buffer) {
        self.phases.push(Phase::Pick { x, out });
    }

    fn sample(&mut self, logits: Buffer, vocabulary: Vocabulary) {
        self.phases.push(Phase::Sample { logits, vocabulary });
    }

    fn all_reduce(&mut self, x: Buffer) {
        if self.collective.ranks() > 1 {
            self.phases.push(Phase::AllReduce { x });
        }
    }

    fn all_gather(&mut self, part: Buffer, whole: Buffer) {
        self.phases.push(Phase::AllGather { part, whole });
    }

    fn norm_qkv(
        &mut self,
        x: Buffer,
        norm: Norm,
        w: Matrix,
        bias: Option<Vector>,
        _normed: Buffer,
        qkv: Buffer,
    ) {
        self.phases.push(Phase::NormInputs { x, norm });
        self.multiply(w, bias, qkv, Then::Store);
    }

    fn o_residual(&mut self, attention: Buffer, w: Matrix, bias: Option<Vector>, partial: Buffer, x: Buffer) {
        self.phases.push(Phase::Inputs { a: attention });
        if self.collective.ranks() == 1 {
            self.multiply(w, bias, x, Then::Add);
        } else {
            self.multiply(w, None, partial, Then::Store);
            self.all_reduce(partial);
            self.add(x, partial, bias);
        }
    }

    fn norm_gate_up_swiglu(
        &mut self,
        x: Buffer,
        norm: Norm,
        w: Matrix,
        bias: Option<Vector>,
        _normed: Buffer,
        _gate_up: Buffer,
        out: Buffer,
    ) {
        self.phases.push(Phase::NormInputs { x, norm });
        self.multiply(w, bias, out, Then::SwiGlu);
    }

    fn norm_logits(&mut self, x: Buffer, norm: Norm, w: Matrix, _normed: Buffer, out: Buffer) {
        self.phases.push(Phase::NormInputs { x, norm });
        self.multiply(w, None, out, Then::Store);
    }

    fn submit(&mut self) -> Result<()> {
        let Self { pool, phases, lanes, weights, report, collective, weight_bytes_read, .. } = self;
        let allocated = self.allocated.as_mut().expect("allocate_kv stands before a step");
        allocated.counters.resize_with(allocated.counters.len().max(phases.len()), TaskCounter::default);
        allocated.counters.iter().for_each(TaskCounter::reset);
        let run = Run {
            isa: report.isa,
            isa_matmul: report.isa_matmul,
            weights,
            collective: &**collective,
            lanes,
            allocated: &*allocated,
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        };
        let outcome = pool.region(|lane| {
            for (index, phase) in phases.iter().enumerate() {
                if !run.failed.load(Ordering::Acquire)
                    && let Err(failure) = run.phase(lane, index, *phase)
                {
                    run.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
                    run.failed.store(true, Ordering::Release);
                }
                lane.barrier();
            }
        });
        let failure = run.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        for lane in lanes.iter_mut() {
            *weight_bytes_read.get_mut() += std::mem::take(&mut lane.0.get_mut().matmul.weight_bytes_read);
        }
        if let Err(poisoned) = outcome {
            collective.abort(&poisoned.to_string());
            return Err(poisoned);
        }
        if let Some(failure) = failure {
            return Err(failure.into());
        }
        self.draws.clear();
        let picks = if phases.iter().any(|phase| matches!(phase, Phase::Sample { .. })) {
            allocated.step.picks.len()
        } else {
            0
        };
        for drawn in &mut allocated.drawn[..picks] {
            self.draws.extend(drawn.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        }
        Ok(())
    }

    fn draws(&self) -> &[DrawResult] {
        &self.draws
    }

    fn read(&self, buffer: Buffer, rows: usize) -> Vec<f32> {
        let allocated = self.allocated.as_ref().expect("allocate_kv stands before a step");
        let buffer = &allocated.buffers[buffer.0 as usize];
        buffer.data.as_slice()[..rows * buffer.width].to_vec()
    }

    fn weight_bytes_read(&self) -> u64 {
        self.weight_bytes_read.load(Ordering::Relaxed)
    }
}

/// One region: what its lanes see.
struct Run<'a> {
    isa: Isa,
    isa_matmul: Isa,
    weights: &'a Weights,
    collective: &'a dyn Collective,
    lanes: &'a [LaneRoom],
    allocated: &'a Allocated,
    failed: AtomicBool,
    failure: Mutex<Option<CollectiveError>>,
}

// The way every phase stays sound: a phase reads buffers that phases before it wrote, with a barrier between, and writes
// one buffer (or the cache) that nobody reads in the same phase. Inside it, lanes write different rows, columns or tasks.
impl Run<'_> {
    /// This lane's part of a phase.
    fn phase(&self, lane: &Lane<'_>, index: usize, phase: Phase) -> std::result::Result<(), CollectiveError> {
        let Allocated { step, kv, attention, inputs, .. } = self.allocated;
        let tasks = &self.allocated.counters[index];
        match phase {
            Phase::TouchBlocks => {
                if lane.thread() == 0 {
                    // SAFETY: this lane alone, and no other phase touches the cache meanwhile.
                    unsafe {
                        step.zeroes.iter().for_each(|block| kv.zero_block(*block));
                        step.copies.iter().for_each(|(from, to)| kv.copy_block(*from, *to));
                    }
                }
            }
            Phase::Embed { table, first_id, out } => {
                let table = &self.weights.matrices[table.0 as usize];
                for row in lane.share(step.ids.len()) {
                    // SAFETY: rows are shared out to lanes.
                    let out = unsafe { self.row_mut(out, row) };
                    match step.ids[row].checked_sub(first_id).map(|id| id as usize) {
                        Some(id) if id < table.outputs() => table.row(id, out),
                        _ => out.fill(0.0),
                    }
                    // The sum over ranks turns -0 into 0; so does this, at every degree.
                    out.iter_mut().for_each(|x| *x += 0.0);
                }
            }
            Phase::Norm { x, norm, out } => {
                for row in lane.share(self.rows(x)) {
                    // SAFETY: rows are shared out to lanes; `x` is not written in this phase.
                    let (x, out) = unsafe { (self.row(x, row), self.row_mut(out, row)) };
                    math::rms_norm(self.isa, x, &self.weights.vectors[norm.weight.0 as usize], norm.eps, out);
                }
            }
            Phase::NormInputs { x, norm } => {
                let rows = self.rows(x);
                let inputs = inputs.rows(rows, self.width(x));
                // SAFETY: a lane's room is its own.
                let normed = &mut unsafe { self.own(lane) }.row[..self.width(x)];
                for row in lane.share(rows) {
                    // SAFETY: `x` is not written in this phase.
                    let x = unsafe { self.row(x, row) };
                    math::rms_norm(
                        self.isa,
                        x,
                        &self.weights.vectors[norm.weight.0 as usize],
                        norm.eps,
                        normed,
                    );
                    // SAFETY: rows are shared out to lanes, and no matmul reads the inputs in this phase.
                    unsafe { inputs.set_row(row, normed) };
                }
            }
            Phase::Inputs { a } => {
                let rows = self.rows(a);
                let inputs = inputs.rows(rows, self.width(a));
                for row in lane.share(rows) {
                    // SAFETY: `a` is not written in this phase; rows of the inputs are shared out to lanes.
                    unsafe { inputs.set_row(row, self.row(a, row)) };
                }
            }
            Phase::Multiply { w, bias, out, then } => {
                let weights = &self.weights.matrices[w.0 as usize];
                let rows = self.rows(out);
                let bias = bias.map(|bias| &*self.weights.vectors[bias.0 as usize]);
                let epilogue = match then {
                    Then::Store => Epilogue::Store { bias },
                    Then::Add => Epilogue::Add { bias },
                    Then::SwiGlu => Epilogue::SwiGlu { bias },
                };
                let matmul =
                    Matmul::new(self.isa_matmul, weights, inputs.rows(rows, weights.inputs()), epilogue);
                // A stored product may be narrower than its buffer (a rank's last rows of the vocabulary): zeros follow.
                let stride = self.width(out);
                let width = if then == Then::Store { matmul.width().min(stride) } else { stride };
                // SAFETY: the buffer holds `rows` rows of its width; the inputs were filled in the phase before; this phase's
                // counter gives each unit of columns to one lane, and what follows them is shared out by rows; a lane's room
                // is its own.
                unsafe {
                    let out = OutputRows::from_raw(self.buffer(out).data.as_ptr(), rows, width, stride);
                    matmul.run(tasks, lane.threads(), out, &mut self.own(lane).matmul);
                    lane.share(rows).for_each(|row| out.zero_rest(row));
                }
            }
            Phase::RopeKv { qkv, layer, q } => {
                let KvSpec { heads, block_tokens, .. } = *kv.spec();
                let (dim, half) = (heads.dim, heads.dim / 2);
                // SAFETY: a lane's room is its own.
                let keys = &mut unsafe { self.own(lane) }.keys;
                let rows = lane.share(step.ids.len());
                // Spans are ascending: the one that holds this lane's first row, and then the ones after it.
                let first =
                    step.spans.partition_point(|span| ((span.row0 + span.rows) as usize) <= rows.start);
                for span in &step.spans[first..] {
                    let of_span = span.row0 as usize..(span.row0 + span.rows) as usize;
                    for row in of_span.start.max(rows.start)..of_span.end.min(rows.end) {
                        let position = step.positions[row] as usize;
                        let table = position * half..(position + 1) * half;
                        let (cos, sin) = (&self.weights.cos[table.clone()], &self.weights.sin[table]);
                        // SAFETY: rows are shared out to lanes; `qkv` is not written in this phase.
                        let (qkv, q) = unsafe { (self.row(qkv, row), self.row_mut(q, row)) };
                        let (queries, rest) = qkv.split_at(heads.query_width());
                        let (keys_from, values) = rest.split_at(heads.kv * dim);
                        for (from, to) in queries.chunks_exact(dim).zip(q.chunks_exact_mut(dim)) {
                            math::rotate(self.isa, from, cos, sin, to);
                        }
                        for (from, to) in keys_from.chunks_exact(dim).zip(keys.chunks_exact_mut(dim)) {
                            math::rotate(self.isa, from, cos, sin, to);
                        }
                        let block = step.tables[span.table0 as usize + position / block_tokens];
                        // SAFETY: each position of each sequence is written by the lane that has its row, and read in the
                        // next phase.
                        unsafe { kv.write(layer, block, position % block_tokens, keys, values) };
                    }
                }
            }
            Phase::AttentionTasks(attend) => {
                let of = self.attention(attend);
                while let Some(some) = tasks.take(attention.tasks(), 1) {
                    // SAFETY: `out` is as wide as `q`, and only this phase and the next touch it; the counter gives each task
                    // once, a lane names its own room, and keys and values were written in a phase before.
                    some.for_each(|task| unsafe { attention.run_task(task, lane.thread(), &of) });
                }
            }
            Phase::AttentionMerges(attend) => {
                let of = self.attention(attend);
                // SAFETY: as above; all tasks ran in the phase before, and merges are shared out to lanes.
                lane.share(attention.merges()).for_each(|merge| unsafe { attention.run_merge(merge, &of) });
            }
            Phase::Swiglu { gate_up, out } => {
                for row in lane.share(self.rows(out)) {
                    // SAFETY: rows are shared out to lanes; `gate_up` is not written in this phase.
                    let (gate_up, out) = unsafe { (self.row(gate_up, row), self.row_mut(out, row)) };
                    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
                    math::swiglu(self.isa, gate, up, out);
                }
            }
            Phase::Add { x, y, bias } => {
                let bias = bias.map(|bias| &*self.weights.vectors[bias.0 as usize]);
                for row in lane.share(self.rows(x)) {
                    // SAFETY: rows are shared out to lanes; `y` is not written in this phase.
                    let (x, y) = unsafe { (self.row_mut(x, row), self.row(y, row)) };
                    math::add(self.isa, x, y, bias);
                }
            }
            Phase::Pick { x, out } => {
                for (index, row) in step.picks.iter().enumerate().skip(lane.thread()).step_by(lane.threads())
                {
                    // SAFETY: picks are shared out to lanes; `x` is not written in this phase.
                    unsafe { self.row_mut(out, index).copy_from_slice(self.row(x, *row as usize)) };
                }
            }
            Phase::Sample { logits, vocabulary } => {
                while let Some(picks) = tasks.take(step.draws.len(), 1) {
                    for pick in picks {
                        // SAFETY: logits are not written in this phase; a lane's room is its own.
                        let (row, own) =
                            unsafe { (&self.row(logits, pick)[..vocabulary.size], self.own(lane)) };
                        let result = own.sampler.draw(self.isa, row, &step.draws[pick], vocabulary.drawn);
                        let mut place =
                            self.allocated.drawn[pick].lock().unwrap_or_else(PoisonError::into_inner);
                        *place = Some(result);
                    }
                }
            }
            Phase::AllReduce { x } => {
                let memory = self.memory(x);
                // SAFETY: buffers live as long as the executor, and a region ends only when all its lanes have returned from
                // this call; nobody else touches `x` in this phase.
                unsafe { self.collective.all_reduce(lane.into(), memory)? };
            }
            Phase::AllGather { part, whole } => {
                let (rows, part, whole) = (self.rows(part), self.memory(part), self.memory(whole));
                // SAFETY: as above.
                unsafe { self.collective.all_gather(lane.into(), rows, part, whole)? };
            }
        }
        Ok(())
    }

    fn attention(&self, Attend { q, layer, scale, out }: Attend) -> Attention<'_> {
        let Allocated { kv, step, .. } = self.allocated;
        assert!(self.width(q) == self.width(out), "attention gives what it takes: one vector a query head");
        let memory = self.memory(q);
        // SAFETY: inside the buffer; queries are written in a phase before and not in this one.
        let q = unsafe { std::slice::from_raw_parts(memory.data, memory.len) };
        let out = self.memory(out).data;
        Attention { kv, layer, spans: &step.spans, tables: &step.tables, q, scale, out }
    }

    fn buffer(&self, buffer: Buffer) -> &Rows {
        &self.allocated.buffers[buffer.0 as usize]
    }

    fn width(&self, buffer: Buffer) -> usize {
        self.buffer(buffer).width
    }

    /// Rows of this step.
    fn rows(&self, buffer: Buffer) -> usize {
        match self.buffer(buffer).extent {
            Extent::Rows => self.allocated.step.ids.len(),
            Extent::Picks => self.allocated.step.picks.len(),
        }
    }

    /// This step's part of a buffer.
    fn memory(&self, buffer: Buffer) -> HostMemory {
        HostMemory { data: self.buffer(buffer).data.as_ptr(), len: self.rows(buffer) * self.width(buffer) }
    }

    /// # Safety
    /// Nobody writes the row while the slice lives.
    unsafe fn row(&self, buffer: Buffer, row: usize) -> &[f32] {
        assert!(row < self.rows(buffer), "row {row} of {}", self.rows(buffer));
        let Rows { width, data, .. } = self.buffer(buffer);
        // SAFETY: inside the buffer, which holds at least the step's rows; unwritten by the caller.
        unsafe { std::slice::from_raw_parts(data.as_ptr().add(row * width), *width) }
    }

    /// # Safety
    /// Nobody else has the row, or touches it, while the slice lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row_mut(&self, buffer: Buffer, row: usize) -> &mut [f32] {
        assert!(row < self.rows(buffer), "row {row} of {}", self.rows(buffer));
        let Rows { width, data, .. } = self.buffer(buffer);
        // SAFETY: inside the buffer; alone by the caller.
        unsafe { std::slice::from_raw_parts_mut(data.as_ptr().add(row * width), *width) }
    }

    /// # Safety
    /// Only the lane itself asks, and lets go before it asks again.
    #[allow(clippy::mut_from_ref)]
    unsafe fn own(&self, lane: &Lane<'_>) -> &mut LaneOwn {
        // SAFETY: one lane, one room; see `LaneRoom`.
        unsafe { &mut *self.lanes[lane.thread()].0.get() }
    }
}
