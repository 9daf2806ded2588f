//! Paged causal attention: decode and prefill are one code, so a row gives the same bits in either.
//!
//! Tokens are cut at absolute multiples of [`SEG`]. A row's segment, over the tokens it sees alone: scores, their softmax, O =
//! Σ p·V with tokens ascending; then the segments, ascending, are merged ([`math`] has the expressions). A *task* is a tile of
//! a sequence's rows × some KV heads × some segments:
//!
//! ```text
//!  prefill   4–8 tokens × 1 KV head × all segments: K and V are read once for all rows of the tile and of the head's group
//!  decode    1 token × all KV heads × 1 segment: blocks outer, heads inner, so that memory is read in long runs
//! ```
//! Where tasks are plenty, a decode row is one task with all its segments, merged as they come. Where they are few, each
//! segment is a task; its result waits in a slot, and a second phase merges. How work is cut never shows in the bits.
//!
//! Nothing that a row does not see enters its sums: a tile shares what all its rows see, and each row ends alone.

use std::cell::UnsafeCell;

use crate::DeviceError;
use crate::cpu::isa::Isa;
use crate::cpu::kv::{KvCache, KvLayout, PANEL_DIMS_MAX};
use crate::cpu::lanes::{LANES, Lanes, on_isa};
use crate::cpu::math::{self, SEG, Seen};
use crate::cpu::memory::HugeBuffer;
use crate::ops::{Format, Heads, KvSpec, SpanRows, StepCapacity};

/// Rows of a prefill tile to aim at; tokens of one, at least and at most.
const TILE_ROWS: usize = 32;
const TILE_TOKENS: std::ops::RangeInclusive<usize> = 4..=8;
/// With fewer tasks than this for each thread, decode rows are cut into segments.
const TASKS_MIN: usize = 8;
/// With fewer than this even then, into groups of heads.
const TASKS_MIN_AT_ALL: usize = 2;
/// Slots for each thread, at least: rows × segments that may wait for their merge.
const SLOTS: usize = 64;

/// One layer's attention in a step.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Where K and V are, those of this step's rows included.
    pub kv: &'a KvCache,
    /// The layer.
    pub layer: usize,
    /// As [`AttentionRoom::plan`] saw them.
    pub spans: &'a [SpanRows],
    /// Block tables.
    pub tables: &'a [u32],
    /// Rotated queries, `[rows, query heads, head dim]`.
    pub q: &'a [f32],
    /// Multiplies q·k.
    pub scale: f32,
    /// The result, `[rows, query heads, head dim]`: tasks and merges write it, each its own part.
    pub out: *mut f32,
}

/// How a step's attention is cut into tasks, and all room it needs: allocated once.
#[derive(Debug)]
pub struct AttentionRoom {
    isa: Isa,
    heads: Heads,
    value_dims: usize,
    threads: usize,
    tile_tokens: usize,
    /// Rows of a task at most, over all its heads.
    task_rows: usize,
    tasks: Vec<Task>,
    splits: Vec<Split>,
    merges: usize,
    /// Spans of one tile, the longest sequence first.
    short: Vec<u32>,
    slots: usize,
    /// By slot: `[query heads]` of O (padded), then of (max, sum).
    partials: HugeBuffer<f32>,
    rooms: Vec<ThreadRoom>,
}

/// A tile of a span's rows, for some KV heads, over some segments.
#[derive(Clone, Copy, Debug)]
struct Task {
    span: u32,
    token0: u32,
    tokens: u32,
    head0: u32,
    heads: u32,
    segment0: u32,
    segments: u32,
    /// Where the span's results wait, if this is not all that its rows see.
    split: Option<Slots>,
}

/// Slots of a span: `first + token * segments + segment`.
#[derive(Clone, Copy, Debug)]
struct Slots {
    first: u32,
    segments: u32,
}

/// A span whose segments are merged in the second phase.
#[derive(Clone, Copy, Debug)]
struct Split {
    span: u32,
    slots: Slots,
    /// Its first merge; one for each row and query head follows.
    merge0: usize,
}

/// A thread's own room.
#[derive(Debug)]
struct ThreadRoom(UnsafeCell<TaskRoom>);

// SAFETY: a room is touched by `run_task` alone, whose caller promises that one thread at a time names it.
unsafe impl Sync for ThreadRoom {}

#[derive(Debug)]
struct TaskRoom {
    /// `[row][step]`.
    q: Vec<u32>,
    scores: Vec<[f32; SEG]>,
    /// Probabilities by step.
    p: Vec<[u32; SEG]>,
    /// A segment's O, `[row][value dims]`, and what was seen for it.
    o: Vec<f32>,
    seen: Vec<Seen>,
    /// The same of all segments so far.
    o_before: Vec<f32>,
    seen_before: Vec<Seen>,
}

impl AttentionRoom {
    /// Makes room for steps of `capacity` on `threads` threads.
    ///
    /// *Errors*: [`DeviceError::Memory`].
    pub fn new(isa: Isa, kv: KvSpec, capacity: StepCapacity, threads: usize) -> Result<Self, DeviceError> {
        let (heads, threads) = (kv.heads, threads.max(1));
        let group = heads.query / heads.kv;
        let tile_tokens = (TILE_ROWS / group).clamp(*TILE_TOKENS.start(), *TILE_TOKENS.end());
        let task_rows = heads.query.max(tile_tokens * group);
        let value_dims = heads.dim.next_multiple_of(LANES);
        let segments_max = (capacity.blocks_per_span * kv.block_tokens).div_ceil(SEG).max(1);
        let slots = segments_max.max(SLOTS * threads);
        let tiles = capacity.rows / tile_tokens + capacity.spans;
        let room = || {
            ThreadRoom(UnsafeCell::new(TaskRoom {
                q: vec![0; task_rows * heads.dim],
                scores: vec![[0.0; SEG]; task_rows],
                p: vec![[0; SEG]; task_rows],
                o: vec![0.0; task_rows * value_dims],
                seen: vec![Seen { max: 0.0, sum: 0.0 }; task_rows],
                o_before: vec![0.0; task_rows * value_dims],
                seen_before: vec![Seen { max: 0.0, sum: 0.0 }; task_rows],
            }))
        };
        Ok(Self {
            isa,
            heads,
            value_dims,
            threads,
            tile_tokens,
            task_rows,
            tasks: Vec::with_capacity(tiles * heads.kv + slots * heads.kv.min(TASKS_MIN_AT_ALL * threads)),
            splits: Vec::with_capacity(capacity.spans),
            merges: 0,
            short: Vec::with_capacity(capacity.spans),
            slots,
            partials: HugeBuffer::zeroed(
                "attention's partial results",
                slots * heads.query * (value_dims + 2),
            )?,
            rooms: (0..threads).map(|_| room()).collect(),
        })
    }

    /// Cuts a step's attention into tasks, longest first. The same for all its layers.
    pub fn plan(&mut self, spans: &[SpanRows]) {
        self.tasks.clear();
        self.splits.clear();
        self.short.clear();
        self.merges = 0;
        let segments = |span: &SpanRows| (span.start + span.rows).div_ceil(SEG as u32);
        for (index, span) in (0_u32..).zip(spans) {
            if span.rows as usize <= self.tile_tokens {
                self.short.push(index);
                continue;
            }
            for token0 in (0..span.rows).step_by(self.tile_tokens) {
                let tokens = (span.rows - token0).min(self.tile_tokens as u32);
                let segments = (span.start + token0 + tokens).div_ceil(SEG as u32);
                let tile = Task {
                    span: index,
                    token0,
                    tokens,
                    head0: 0,
                    heads: 1,
                    segment0: 0,
                    segments,
                    split: None,
                };
                self.tasks.extend((0..self.heads.kv as u32).map(|head0| Task { head0, ..tile }));
            }
        }
        self.short
            .sort_unstable_by_key(|index| (std::cmp::Reverse(segments(&spans[*index as usize])), *index));
        let few = self.tasks.len() + self.short.len() < TASKS_MIN * self.threads;
        let (mut slots, mut cut) = (0, self.tasks.len());
        for index in &self.short {
            let span = &spans[*index as usize];
            let (rows, segments) = (span.rows as usize, segments(span) as usize);
            if few && segments > 1 && slots + rows * segments <= self.slots {
                let split = Slots { first: slots as u32, segments: segments as u32 };
                self.splits.push(Split { span: *index, slots: split, merge0: self.merges });
                self.merges += rows * self.heads.query;
                slots += rows * segments;
                cut += segments;
            } else {
                cut += 1;
            }
        }
        let parts = (TASKS_MIN_AT_ALL * self.threads).div_ceil(cut.max(1));
        let mut splits = self.splits.iter().peekable();
        for index in &self.short {
            let span = &spans[*index as usize];
            let split = splits.next_if(|split| split.span == *index).map(|split| split.slots);
            let rows_each = span.rows as usize * (self.heads.query / self.heads.kv);
            let heads = self.heads.kv.div_ceil(parts).min(self.task_rows / rows_each);
            for head0 in (0..self.heads.kv).step_by(heads) {
                let task = Task {
                    span: *index,
                    token0: 0,
                    tokens: span.rows,
                    head0: head0 as u32,
                    heads: heads.min(self.heads.kv - head0) as u32,
                    segment0: 0,
                    segments: segments(span),
                    split,
                };
                match split {
                    None => self.tasks.push(task),
                    Some(slots) => self.tasks.extend((0..slots.segments).map(|segment0| Task {
                        segment0,
                        segments: 1,
                        ..task
                    })),
                }
            }
        }
        // Reading K and V costs as much as computing 4 rows of them, about.
        let cost = |task: &Task| (task.tokens + 4) * task.heads * task.segments;
        self.tasks.sort_unstable_by_key(|task| {
            (std::cmp::Reverse(cost(task)), task.span, task.token0, task.segment0, task.head0)
        });
    }

    /// Tasks of the plan, all independent.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// Merges of the plan, all independent, to be run when all tasks are done.
    pub fn merges(&self) -> usize {
        self.merges
    }

    /// Runs a task, in the room of thread `thread`.
    ///
    /// *Panics*: if the plan, the spans, the tables and the cache do not fit each other.
    ///
    /// # Safety
    /// `of.out` holds as many numbers as `of.q`, and nobody else touches it but tasks and merges of this layer. Each task
    /// runs once a layer, no two at a time with one `thread`. Nobody writes the layer's cache meanwhile.
    pub unsafe fn run_task(&self, task: usize, thread: usize, of: &Attention<'_>) {
        let task = &self.tasks[task];
        // SAFETY: one thread at a time, says the caller.
        let room = unsafe { &mut *self.rooms[thread].0.get() };
        let isa = self.isa;
        let plan = self;
        match of.kv.spec().format {
            Format::Bf16 => {
                on_isa!(isa, run_task_bf16(plan: &AttentionRoom, task: &Task, room: &mut TaskRoom, of: &Attention<'_>))
            }
            Format::F32 | Format::F16 => {
                on_isa!(isa, run_task_f32(plan: &AttentionRoom, task: &Task, room: &mut TaskRoom, of: &Attention<'_>))
            }
        }
    }

    /// Merges one head of one row whose segments were tasks of their own.
    ///
    /// # Safety
    /// As for [`AttentionRoom::run_task`]; all tasks have run, and each merge runs once a layer.
    pub unsafe fn run_merge(&self, merge: usize, of: &Attention<'_>) {
        let split = &self.splits[self.splits.partition_point(|split| split.merge0 <= merge) - 1];
        let span = &of.spans[split.span as usize];
        let (token, head) =
            ((merge - split.merge0) / self.heads.query, (merge - split.merge0) % self.heads.query);
        let segments = (span.start as usize + token) / SEG + 1;
        let first = split.slots.first as usize + token * split.slots.segments as usize;
        let row = span.row0 as usize + token;
        // SAFETY: the part of `out` belongs to this merge: its row and head have no other, and no task writes it.
        let out = unsafe { self.out(of, row, head) };
        let (isa, plan) = (self.isa, self);
        on_isa!(isa, run_merge_on(plan: &AttentionRoom, first: usize, segments: usize, head: usize, out: &mut [f32]));
    }

    /// A row and head's part of the result.
    ///
    /// # Safety
    /// Nobody else has it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    unsafe fn out<'a>(&self, of: &Attention<'a>, row: usize, head: usize) -> &'a mut [f32] {
        let first = (row * self.heads.query + head) * self.heads.dim;
        assert!(head < self.heads.query && first + self.heads.dim <= of.q.len(), "row {row}, head {head}");
        // SAFETY: `out` is as long as `q`; alone by the caller.
        unsafe { std::slice::from_raw_parts_mut(of.out.add(first), self.heads.dim) }
    }

    /// Where a slot's O of a head and its (max, sum) are.
    fn partial(&self, slot: usize, head: usize) -> (*mut f32, *mut [f32; 2]) {
        assert!(slot < self.slots && head < self.heads.query, "slot {slot}, head {head}");
        let first = slot * self.heads.query * (self.value_dims + 2);
        let seen = first + self.heads.query * self.value_dims + head * 2;
        // SAFETY: slot and head are in range, so both lie inside the buffer.
        unsafe {
            let partials = self.partials.as_ptr();
            (partials.add(first + head * self.value_dims), partials.add(seen).cast())
        }
    }
}

#[inline(always)]
fn run_task_bf16<S: Lanes>(s: S, plan: &AttentionRoom, task: &Task, room: &mut TaskRoom, of: &Attention<'_>) {
    run_task_on::<S, true>(s, plan, task, room, of);
}

#[inline(always)]
fn run_task_f32<S: Lanes>(s: S, plan: &AttentionRoom, task: &Task, room: &mut TaskRoom, of: &Attention<'_>) {
    run_task_on::<S, false>(s, plan, task, room, of);
}

/// A task's place in its step.
#[derive(Clone, Copy)]
struct Tile {
    /// Position of the first token.
    position0: usize,
    tokens: usize,
    /// Query heads of a KV head.
    group: usize,
    head0: usize,
    heads: usize,
}

impl Tile {
    /// Rows of one KV head.
    fn rows(&self) -> usize {
        self.tokens * self.group
    }

    /// Tokens of a segment that a row sees.
    fn visible(&self, row: usize, segment: usize) -> usize {
        (self.position0 + row % self.rows() / self.group + 1).saturating_sub(segment * SEG).min(SEG)
    }
}

#[inline(always)]
fn run_task_on<S: Lanes, const BF16: bool>(
    s: S,
    plan: &AttentionRoom,
    task: &Task,
    room: &mut TaskRoom,
    of: &Attention<'_>,
) {
    let span = &of.spans[task.span as usize];
    let group = plan.heads.query / plan.heads.kv;
    let tile = Tile {
        position0: (span.start + task.token0) as usize,
        tokens: task.tokens as usize,
        group,
        head0: task.head0 as usize,
        heads: task.heads as usize,
    };
    let rows = tile.heads * tile.rows();
    let (width, dims) = (plan.heads.dim, plan.value_dims);
    let row0 = (span.row0 + task.token0) as usize;
    // Of a row of the tile: its row in the step, and its query head.
    let place = |row: usize| {
        let (head, within) = (row / tile.rows(), row % tile.rows());
        (row0 + within / group, (tile.head0 + head) * group + within % group)
    };
    let steps = of.kv.layout().key_steps;
    for row in 0..rows {
        let (step_row, head) = place(row);
        let q = &of.q[(step_row * plan.heads.query + head) * width..][..width];
        round_to_words::<S, BF16>(s, q, &mut room.q[row * steps..][..steps]);
    }
    // One constant, rounded once; it enters after the dot product.
    let c = of.scale * math::LOG2_E;
    let table = &of.tables[span.table0 as usize..];
    for segment in task.segment0 as usize..(task.segment0 + task.segments) as usize {
        run_segment::<S, BF16>(s, of, &tile, table, segment, c, room);
        for row in 0..rows {
            if tile.visible(row, segment) == 0 {
                continue;
            }
            let (o, seen) = (&room.o[row * dims..][..dims], room.seen[row]);
            if let Some(slots) = task.split {
                let (_, head) = place(row);
                let token = (task.token0 as usize) + row % tile.rows() / group;
                let slot = slots.first as usize + token * slots.segments as usize + segment;
                let (to, seen_to) = plan.partial(slot, head);
                // SAFETY: this slot and head belong to this task alone; the merge reads them when all tasks are done.
                unsafe {
                    std::ptr::copy_nonoverlapping(o.as_ptr(), to, dims);
                    seen_to.write([seen.max, seen.sum]);
                }
            } else if segment == 0 {
                room.o_before[row * dims..][..dims].copy_from_slice(o);
                room.seen_before[row] = seen;
            } else {
                math::merge(s, &mut room.seen_before[row], &mut room.o_before[row * dims..][..dims], seen, o);
            }
        }
    }
    if task.split.is_none() {
        for row in 0..rows {
            let (step_row, head) = place(row);
            // SAFETY: this row and head belong to this task alone.
            let out = unsafe { plan.out(of, step_row, head) };
            math::finish(s, room.seen_before[row], &room.o_before[row * dims..][..width], out);
        }
    }
}

/// One segment for all rows of a tile: `room.o` and `room.seen`.
#[inline(always)]
fn run_segment<S: Lanes, const BF16: bool>(
    s: S,
    of: &Attention<'_>,
    tile: &Tile,
    table: &[u32],
    segment: usize,
    c: f32,
    room: &mut TaskRoom,
) {
    let (layout, block_tokens) = (of.kv.layout(), of.kv.spec().block_tokens);
    let (rows, dims) = (tile.rows(), layout.value_dims);
    let visible_max = tile.visible(tile.rows() - 1, segment);
    let blocks = &table[segment * SEG / block_tokens..][..visible_max.div_ceil(block_tokens)];
    for (index, block) in blocks.iter().enumerate() {
        // SAFETY: nobody writes the layer's cache meanwhile, says the caller of `run_task`.
        let block = unsafe { of.kv.block(of.layer, *block) };
        let tokens = (visible_max - index * block_tokens).min(block_tokens);
        for head in 0..tile.heads {
            let keys = &block[layout.keys(tile.head0 + head)..][..layout.key_words];
            let q = &room.q[head * rows * layout.key_steps..][..rows * layout.key_steps];
            let scores = &mut room.scores[head * rows..][..rows];
            score::<S, BF16>(s, layout, keys, tokens, q, scores, index * block_tokens);
        }
    }
    for row in 0..tile.heads * rows {
        let visible = tile.visible(row, segment);
        if visible > 0 {
            room.seen[row] = math::soften(s, &mut room.scores[row], visible, c);
            let tokens = visible.next_multiple_of(LANES);
            let steps = if BF16 { tokens / 2 } else { tokens };
            round_to_words::<S, BF16>(s, &room.scores[row][..tokens], &mut room.p[row][..steps]);
        }
    }
    room.o[..tile.heads * rows * dims].fill(0.0);
    for (index, block) in blocks.iter().enumerate() {
        // SAFETY: as above.
        let block = unsafe { of.kv.block(of.layer, *block) };
        let first = index * block_tokens;
        for head in 0..tile.heads {
            let values = &block[layout.values(tile.head0 + head)..][..layout.value_words];
            let p = &room.p[head * rows..][..rows];
            let o = &mut room.o[head * rows * dims..][..rows * dims];
            let view = View { tile, segment, first, tokens: block_tokens };
            weigh::<S, BF16>(s, layout, values, &view, p, o);
        }
    }
}

/// Numbers to words: pairs of bf16, or f32 as they are.
#[inline(always)]
fn round_to_words<S: Lanes, const BF16: bool>(s: S, x: &[f32], words: &mut [u32]) {
    if !BF16 {
        for (x, word) in x.iter().zip(words) {
            *word = x.to_bits();
        }
        return;
    }
    for (x, words) in x.chunks(LANES).zip(words.chunks_mut(LANES / 2)) {
        let mut halves = [0; LANES];
        match x.as_array() {
            Some(whole) => s.store_bf16(s.load(whole), &mut halves),
            None => s.store_bf16(s.load_part(x, 0.0), &mut halves),
        }
        for (word, [even, odd]) in words.iter_mut().zip(halves.as_chunks::<2>().0) {
            *word = u32::from(*even) | u32::from(*odd) << 16;
        }
    }
}

/// One step of a chain: a word of memory times a word of q or p.
#[inline(always)]
fn step<S: Lanes, const BF16: bool>(s: S, sum: S::F, memory: S::W, word: u32) -> S::F {
    if BF16 {
        s.dot(sum, memory, s.splat_word(word))
    } else {
        s.fma(s.words_as_f32(memory), s.splat(f32::from_bits(word)), sum)
    }
}

/// Instantiates a tile function for each count of rows up to 8 and calls the one asked for.
macro_rules! for_rows {
    ($rows:expr, $limit:expr, $function:ident::<$s:ty, $bf16:ident, $vectors:literal>($($arg:expr),*)) => {
        match $rows {
            1 => $function::<$s, $bf16, 1, $vectors>($($arg),*),
            2 if $limit >= 2 => $function::<$s, $bf16, 2, $vectors>($($arg),*),
            3 if $limit >= 3 => $function::<$s, $bf16, 3, $vectors>($($arg),*),
            4 if $limit >= 4 => $function::<$s, $bf16, 4, $vectors>($($arg),*),
            5 if $limit >= 5 => $function::<$s, $bf16, 5, $vectors>($($arg),*),
            6 if $limit >= 6 => $function::<$s, $bf16, 6, $vectors>($($arg),*),
            7 if $limit >= 7 => $function::<$s, $bf16, 7, $vectors>($($arg),*),
            8 if $limit >= 8 => $function::<$s, $bf16, 8, $vectors>($($arg),*),
            rows => unreachable!("{rows} rows of a tile"),
        }
    };
}

/// Scores of one head's rows with a block's first `tokens` tokens, rounded up to panels: written from `first` on.
#[inline(always)]
fn score<S: Lanes, const BF16: bool>(
    s: S,
    layout: &KvLayout,
    keys: &[u32],
    tokens: usize,
    q: &[u32],
    scores: &mut [[f32; SEG]],
    first: usize,
) {
    let panel_words = layout.key_steps * layout.panel_tokens;
    for (index, panel) in
        keys.chunks_exact(panel_words).take(tokens.div_ceil(layout.panel_tokens)).enumerate()
    {
        let first = first + index * layout.panel_tokens;
        for (at, rows) in parts(scores.len(), S::SCORE_ROWS) {
            let q = &q[at * layout.key_steps..][..rows * layout.key_steps];
            let scores = &mut scores[at..][..rows];
            if layout.panel_tokens == LANES {
                for_rows!(rows, S::SCORE_ROWS, score_rows::<S, BF16, 1>(s, panel, q, scores, first));
            } else {
                for_rows!(rows, S::SCORE_ROWS, score_rows::<S, BF16, 2>(s, panel, q, scores, first));
            }
        }
    }
}

/// `count` cut into parts of at most `most`, as equal as can be: where each begins, and how long it is.
#[inline(always)]
fn parts(count: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let parts = count.div_ceil(most);
    (0..parts).map(move |i| (count * i / parts, count * (i + 1) / parts - count * i / parts))
}

/// R rows × a panel of N vectors of tokens: one chain over the head's dims for each.
#[inline(always)]
fn score_rows<S: Lanes, const BF16: bool, const R: usize, const N: usize>(
    s: S,
    panel: &[u32],
    q: &[u32],
    scores: &mut [[f32; SEG]],
    first: usize,
) {
    let mut sums = [[s.splat(0.0); N]; R];
    let steps = q.len() / R;
    let (vectors, _) = panel.as_chunks::<LANES>();
    let (vectors, _) = vectors.as_chunks::<N>();
    let q: [&[u32]; R] = std::array::from_fn(|row| &q[row * steps..][..steps]);
    for (index, keys) in vectors[..steps].iter().enumerate() {
        let mut k = [s.splat_word(0); N];
        for (k, keys) in k.iter_mut().zip(keys) {
            *k = s.load_words(keys);
        }
        for (sums, q) in sums.iter_mut().zip(&q) {
            for (sum, k) in sums.iter_mut().zip(k) {
                *sum = step::<S, BF16>(s, *sum, k, q[index]);
            }
        }
    }
    for (sums, scores) in sums.iter().zip(scores) {
        let (out, _) = scores[first..][..N * LANES].as_chunks_mut::<LANES>();
        for (sum, out) in sums.iter().zip(out) {
            s.store(*sum, out);
        }
    }
}

/// What rows see of a block.
struct View<'a> {
    tile: &'a Tile,
    segment: usize,
    /// The block's first token in the segment.
    first: usize,
    /// Tokens of a block.
    tokens: usize,
}

impl View<'_> {
    fn visible(&self, row: usize) -> usize {
        self.tile.visible(row, self.segment).saturating_sub(self.first).min(self.tokens)
    }
}

/// `o += p · V` over a block, for one head's rows.
#[inline(always)]
fn weigh<S: Lanes, const BF16: bool>(
    s: S,
    layout: &KvLayout,
    values: &[u32],
    view: &View<'_>,
    p: &[[u32; SEG]],
    o: &mut [f32],
) {
    let dims = layout.value_dims;
    let per = if BF16 { 2 } else { 1 };
    for first in (0..dims).step_by(PANEL_DIMS_MAX) {
        let width = PANEL_DIMS_MAX.min(dims - first);
        let panel = &values[first * layout.value_steps..][..width * layout.value_steps];
        for (at, rows) in parts(p.len(), S::WEIGH_ROWS) {
            // Rows ascend in what they see, so the first sees the least.
            let common = view.visible(at) / per;
            let p_common = &p[at..][..rows];
            let o = &mut o[at * dims..][..rows * dims];
            let block =
                Block { panel, width, step0: view.first / per, steps: 0..common, odd: false, first, dims };
            weigh_by_width::<S, BF16>(s, rows, &block, p_common, o);
            for row in 0..rows {
                let visible = view.visible(at + row);
                let (steps, odd) = (common..visible / per, visible % per == 1);
                if !steps.is_empty() || odd {
                    let block = Block { steps, odd, ..block.clone() };
                    let (p, o) = (&p[at + row..][..1], &mut o[row * dims..][..dims]);
                    weigh_by_width::<S, BF16>(s, 1, &block, p, o);
                }
            }
        }
    }
}

/// A panel of a block's values, and which steps of it to take.
#[derive(Clone)]
struct Block<'a> {
    panel: &'a [u32],
    width: usize,
    /// The block's first step in the segment.
    step0: usize,
    /// Steps of the block.
    steps: std::ops::Range<usize>,
    /// Whether the even token of the step behind them is taken too.
    odd: bool,
    /// First dim of the panel, and dims of a row.
    first: usize,
    dims: usize,
}

#[inline(always)]
fn weigh_by_width<S: Lanes, const BF16: bool>(
    s: S,
    rows: usize,
    block: &Block<'_>,
    p: &[[u32; SEG]],
    o: &mut [f32],
) {
    match block.width / LANES {
        4 => for_rows!(rows, S::WEIGH_ROWS, weigh_rows::<S, BF16, 4>(s, block, p, o)),
        3 => for_rows!(rows, S::WEIGH_ROWS, weigh_rows::<S, BF16, 3>(s, block, p, o)),
        2 => for_rows!(rows, S::WEIGH_ROWS, weigh_rows::<S, BF16, 2>(s, block, p, o)),
        _ => for_rows!(rows, S::WEIGH_ROWS, weigh_rows::<S, BF16, 1>(s, block, p, o)),
    }
}

/// R rows × N vectors of dims: the chains over tokens go on from what `o` holds.
#[inline(always)]
fn weigh_rows<S: Lanes, const BF16: bool, const R: usize, const N: usize>(
    s: S,
    block: &Block<'_>,
    p: &[[u32; SEG]],
    o: &mut [f32],
) {
    let (vectors, _) = block.panel.as_chunks::<LANES>();
    let (vectors, _) = vectors.as_chunks::<N>();
    let p: [&[u32; SEG]; R] = std::array::from_fn(|row| &p[row]);
    let mut sums = [[s.splat(0.0); N]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        let (from, _) = o[row * block.dims + block.first..][..N * LANES].as_chunks::<LANES>();
        for (sum, from) in sums.iter_mut().zip(from) {
            *sum = s.load(from);
        }
    }
    for index in block.steps.clone() {
        let values = &vectors[index];
        let mut v = [s.splat_word(0); N];
        for (v, values) in v.iter_mut().zip(values) {
            *v = s.load_words(values);
        }
        for (sums, p) in sums.iter_mut().zip(&p) {
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum = step::<S, BF16>(s, *sum, v, p[block.step0 + index]);
            }
        }
    }
    if block.odd {
        let index = block.steps.end;
        for (sums, p) in sums.iter_mut().zip(&p) {
            for (sum, values) in sums.iter_mut().zip(&vectors[index]) {
                // The odd token is not seen, and may be NaN.
                let v = s.even_only(s.load_words(values));
                *sum = step::<S, BF16>(s, *sum, v, p[block.step0 + index]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        let (to, _) = o[row * block.dims + block.first..][..N * LANES].as_chunks_mut::<LANES>();
        for (sum, to) in sums.iter().zip(to) {
            s.store(*sum, to);
        }
    }
}

#[inline(always)]
fn run_merge_on<S: Lanes>(
    s: S,
    plan: &AttentionRoom,
    first: usize,
    segments: usize,
    head: usize,
    out: &mut [f32],
) {
    // SAFETY: all tasks are done, says the caller of `run_merge`: slots are read and no longer written, but for this merge's
    // first one, in which it gathers. A slot's head has `value_dims` numbers.
    let slot = |segment: usize| unsafe {
        let (o, seen) = plan.partial(first + segment, head);
        let [max, sum] = seen.read();
        (o, Seen { max, sum })
    };
    let (o, mut seen) = slot(0);
    // SAFETY: as above.
    let o = unsafe { std::slice::from_raw_parts_mut(o, plan.value_dims) };
    for segment in 1..segments {
        let (later_o, later) = slot(segment);
        // SAFETY: as above; another slot.
        let later_o = unsafe { std::slice::from_raw_parts(later_o, plan.value_dims) };
        math::merge(s, &mut seen, o, later, later_o);
    }
    math::finish(s, seen, &o[..out.len()], out);
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
