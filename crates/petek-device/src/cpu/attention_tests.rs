//! Attention against the page's expressions, one number after the other, bit for bit; and against f64.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::cpu::kernel_plain::fma_flushed;
use crate::cpu::matmul::bf16_bits;

/// One sequence: rotated q and k, and v, of all its tokens.
struct Sequence {
    heads: Heads,
    format: Format,
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const SCALE: f32 = 0.3;

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }

    fn row(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.bits() as i32 as f32 / 2_147_483_648.0 * size).collect()
    }
}

impl Sequence {
    fn new(heads: Heads, format: Format, tokens: usize, seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let q = random.row(tokens * heads.query * heads.dim, 3.0);
        let k = random.row(tokens * heads.kv * heads.dim, 3.0);
        let v = random.row(tokens * heads.kv * heads.dim, 5.0);
        Self { heads, format, tokens, q, k, v }
    }

    fn spec(&self, block_tokens: usize) -> KvSpec {
        let blocks = self.tokens.div_ceil(block_tokens) + 3;
        KvSpec { layers: 2, heads: self.heads, block_tokens, blocks, format: self.format }
    }

    fn q(&self, token: usize, head: usize) -> &[f32] {
        &self.q[(token * self.heads.query + head) * self.heads.dim..][..self.heads.dim]
    }

    fn k(&self, token: usize, head: usize) -> &[f32] {
        &self.k[(token * self.heads.kv + head) * self.heads.dim..][..self.heads.dim]
    }

    fn v(&self, token: usize, head: usize) -> &[f32] {
        &self.v[(token * self.heads.kv + head) * self.heads.dim..][..self.heads.dim]
    }

    fn rounded(&self, x: f32) -> f32 {
        if self.format == Format::Bf16 { math::widen(bf16_bits(x)) } else { x }
    }

    /// The page, in scalars.
    fn plain(&self) -> Vec<f32> {
        let Heads { query, kv, dim } = self.heads;
        let mut out = Vec::new();
        for token in 0..self.tokens {
            for head in 0..query {
                let of = head / (query / kv);
                let mut merged: Option<(f32, f32, Vec<f32>)> = None;
                for segment in 0..=token / SEG {
                    let seen = segment * SEG..(token + 1).min((segment + 1) * SEG);
                    let c = SCALE * std::f32::consts::LOG2_E;
                    let t: Vec<f32> = seen
                        .clone()
                        .map(|other| self.dot(self.q(token, head), self.k(other, of)) * c)
                        .collect();
                    let max = t.iter().fold(f32::NEG_INFINITY, |max, t| if *t > max { *t } else { max });
                    let p: Vec<f32> = t.iter().map(|t| exp2(t - max)).collect();
                    let sum = tree(&p);
                    let p: Vec<f32> = p.iter().map(|p| self.rounded(*p)).collect();
                    let o: Vec<f32> = (0..dim)
                        .map(|d| {
                            let v: Vec<f32> =
                                seen.clone().map(|other| self.rounded(self.v(other, of)[d])).collect();
                            self.chain(&p, &v)
                        })
                        .collect();
                    merged = Some(match merged {
                        None => (max, sum, o),
                        Some((max1, sum1, o1)) => {
                            let most = if max > max1 { max } else { max1 };
                            let (u, v) = (exp2(max1 - most), exp2(max - most));
                            let o = o1.iter().zip(&o).map(|(o1, o2)| o2.mul_add(v, o1 * u)).collect();
                            (most, sum.mul_add(v, sum1 * u), o)
                        }
                    });
                }
                let (_, sum, o) = merged.expect("every row sees itself");
                let r = 1.0 / sum;
                out.extend(o.iter().map(|o| o * r + 0.0));
            }
        }
        out
    }

    fn dot(&self, q: &[f32], k: &[f32]) -> f32 {
        let rounded = |x: &[f32]| x.iter().map(|x| self.rounded(*x)).collect::<Vec<f32>>();
        self.chain(&rounded(q), &rounded(k))
    }

    /// The chain of the format: pairs, odd first, flushed; or one after the other. A last one alone pairs with zeroes.
    fn chain(&self, a: &[f32], b: &[f32]) -> f32 {
        let mut sum = 0.0_f32;
        if self.format == Format::F32 {
            for (a, b) in a.iter().zip(b) {
                sum = a.mul_add(*b, sum);
            }
            return sum;
        }
        for (a, b) in a.chunks(2).zip(b.chunks(2)) {
            let (odd_a, odd_b) = if a.len() == 2 { (a[1], b[1]) } else { (0.0, 0.0) };
            sum = fma_flushed(a[0], b[0], fma_flushed(odd_a, odd_b, sum));
        }
        sum
    }

    /// The same in f64, from numbers rounded as the cache and the matmul round them, and the largest |v|.
    fn exact(&self, token: usize, head: usize) -> (Vec<f64>, f64) {
        let of = head / (self.heads.query / self.heads.kv);
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(self.rounded(*x))).collect::<Vec<f64>>();
        let q = wide(self.q(token, head));
        let scores: Vec<f64> = (0..=token)
            .map(|other| {
                q.iter().zip(wide(self.k(other, of))).map(|(q, k)| q * k).sum::<f64>() * f64::from(SCALE)
            })
            .collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(*s));
        let (mut sum, mut o, mut largest) = (0.0, vec![0.0; self.heads.dim], 0.0_f64);
        for (other, score) in scores.iter().enumerate() {
            let p = (score - max).exp();
            sum += p;
            for (o, v) in o.iter_mut().zip(wide(self.v(other, of))) {
                *o += p * v;
                largest = largest.max(v.abs());
            }
        }
        (o.iter().map(|o| o / sum).collect(), largest)
    }
}

fn exp2(x: f32) -> f32 {
    on_isa!(Isa::Portable, exp2_on(x: f32) -> f32)
}

#[inline(always)]
fn exp2_on<S: Lanes>(s: S, x: f32) -> f32 {
    s.lanes(math::exp2(s, s.splat(x)))[0]
}

/// The fixed tree of sums.
fn tree(x: &[f32]) -> f32 {
    let mut sums = [[0.0; 16]; 4];
    for (i, x) in x.iter().enumerate() {
        sums[i / 16 % 4][i % 16] += x;
    }
    let mut lanes: [f32; 16] = std::array::from_fn(|i| (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// A cache that knew other tokens before: all of it is NaN.
fn stale_cache(spec: KvSpec) -> KvCache {
    let kv = KvCache::new(spec).expect("memory");
    let nan = vec![f32::NAN; spec.heads.kv * spec.heads.dim];
    for (layer, block, slot) in (0..spec.layers * spec.blocks * spec.block_tokens).map(|i| {
        let (share, slot) = (i / spec.block_tokens, i % spec.block_tokens);
        (share / spec.blocks, (share % spec.blocks) as u32, slot)
    }) {
        // SAFETY: one thread.
        unsafe { kv.write(layer, block, slot, &nan, &nan) };
    }
    kv
}

/// What threads share to write their own parts of.
#[derive(Clone, Copy)]
struct Out(*mut f32);

// SAFETY: tasks and merges write their own parts.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Runs a step's attention on `threads` threads.
fn attend(room: &mut AttentionRoom, threads: usize, of: &Attention<'_>) {
    room.plan(of.spans);
    let Attention { kv, layer, spans, tables, q, scale, out } = *of;
    let (out, room) = (Out(out), &*room);
    let phase = |count: usize, merge: bool| {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let next = &next;
                scope.spawn(move || {
                    let of = Attention { kv, layer, spans, tables, q, scale, out: out.get() };
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= count {
                            return;
                        }
                        // SAFETY: `out` is as long as `q`; each task and merge runs once, merges after tasks, and a
                        // thread uses its own room.
                        unsafe {
                            if merge { room.run_merge(index, &of) } else { room.run_task(index, thread, &of) }
                        }
                    }
                });
            }
        });
    };
    phase(room.tasks(), false);
    phase(room.merges(), true);
}

fn capacity(spec: &KvSpec) -> StepCapacity {
    StepCapacity { rows: 2048, spans: 8, picks: 8, blocks_per_span: spec.blocks }
}

/// The sequence in chunks, on a stale cache with a scattered block table.
fn chunked(of: &Sequence, isa: Isa, block_tokens: usize, chunk: usize, threads: usize) -> Vec<f32> {
    let spec = of.spec(block_tokens);
    let kv = stale_cache(spec);
    let mut room = AttentionRoom::new(isa, spec, capacity(&spec), threads).expect("memory");
    // Odd multiples visit all blocks of a power of two; here any order without repetition will do.
    let mut tables: Vec<u32> = (0..spec.blocks as u32).collect();
    let mut random = Random(0x5eed);
    for i in (1..tables.len()).rev() {
        tables.swap(i, random.below(i + 1));
    }
    let (kv_width, q_width) = (of.heads.kv * of.heads.dim, of.heads.query_width());
    let mut out = vec![f32::NAN; of.q.len()];
    for start in (0..of.tokens).step_by(chunk) {
        let rows = chunk.min(of.tokens - start);
        for token in start..start + rows {
            let (k, v) = (&of.k[token * kv_width..][..kv_width], &of.v[token * kv_width..][..kv_width]);
            // SAFETY: one thread.
            unsafe { kv.write(1, tables[token / block_tokens], token % block_tokens, k, v) };
        }
        let q = &of.q[start * q_width..][..rows * q_width];
        let spans = [SpanRows { row0: 0, rows: rows as u32, start: start as u32, table0: 0 }];
        let out = out[start * q_width..][..rows * q_width].as_mut_ptr();
        let of = Attention { kv: &kv, layer: 1, spans: &spans, tables: &tables, q, scale: SCALE, out };
        attend(&mut room, threads, &of);
    }
    out
}

fn same(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let first = actual.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(first.is_none(), "{what}: at {first:?} of {}", actual.len());
}

fn levels() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

const FORMATS: [Format; 2] = [Format::F32, Format::Bf16];

#[test]
fn chunks_blocks_levels_and_threads_give_the_bits_of_the_page() {
    for format in FORMATS {
        let sequence = Sequence::new(Heads { query: 6, kv: 2, dim: 32 }, format, 700, 0x5eed_0001);
        let expected = sequence.plain();
        for isa in levels() {
            for chunk in [1, 64, 100, 333, 700] {
                for threads in [1, 2] {
                    let actual = chunked(&sequence, isa, 32, chunk, threads);
                    same(
                        &actual,
                        &expected,
                        &format!("{format:?} {isa} chunks of {chunk}, {threads} threads"),
                    );
                }
            }
            for block_tokens in [16, 64, 128, 256] {
                for chunk in [1, 100] {
                    let actual = chunked(&sequence, isa, block_tokens, chunk, 2);
                    same(
                        &actual,
                        &expected,
                        &format!("{format:?} {isa} blocks of {block_tokens}, chunks of {chunk}"),
                    );
                }
            }
        }
    }
}

#[test]
fn every_head_shape_gives_the_bits_of_the_page() {
    let shapes = [
        (1, 1, 2),
        (4, 4, 16),
        (6, 2, 30),
        (8, 2, 64),
        (8, 1, 80),
        (3, 3, 96),
        (4, 1, 128),
        (7, 1, 64),
        (16, 2, 6),
    ];
    for format in FORMATS {
        for (query, kv, dim) in shapes {
            let sequence = Sequence::new(Heads { query, kv, dim }, format, 270, 0x5eed_0002 + dim as u64);
            let expected = sequence.plain();
            for isa in levels() {
                for (block_tokens, chunk) in [(16, 1), (32, 13), (64, 270), (32, 5)] {
                    let actual = chunked(&sequence, isa, block_tokens, chunk, 1);
                    same(
                        &actual,
                        &expected,
                        &format!("{format:?} {isa} {query}/{kv} x {dim}, chunks of {chunk}"),
                    );
                }
            }
        }
    }
}

/// From inputs already rounded, what is left is: P rounded to bf16, at most 2^-9 of each, so at most 2^-9 × the largest |v|
/// in the result; and f32's roundings: a score is off by at most D × 2^-24 × Σ|q·k|·scale (here 64 · 2^-24 · 64·9·0.3), its
/// power by as much, and the sums over 600 tokens by 600 · 2^-24: together below 1e-3 in either format, and 1e-4 as errors of
/// random sign come out.
#[test]
fn attention_is_close_to_f64() {
    for format in FORMATS {
        let sequence = Sequence::new(Heads { query: 4, kv: 1, dim: 64 }, format, 600, 0x5eed_0003);
        let out = chunked(&sequence, Isa::detect().expect("a level"), 32, 200, 1);
        let share = 1e-4 + if format == Format::Bf16 { 1.0 / 512.0 } else { 0.0 };
        for token in [0, 1, 15, 255, 256, 257, 511, 512, 599] {
            for head in 0..4 {
                let (exact, largest) = sequence.exact(token, head);
                let actual = &out[(token * 4 + head) * 64..][..64];
                for (a, e) in actual.iter().zip(&exact) {
                    assert!(
                        (f64::from(*a) - e).abs() <= share * largest,
                        "{format:?} token {token}: {a} for {e}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_comes_later_in_the_same_step_never_reaches_a_row() {
    for format in FORMATS {
        for (poison, from) in [(f32::NAN, 41), (f32::INFINITY, 258), (f32::NAN, 300)] {
            let heads = Heads { query: 4, kv: 2, dim: 64 };
            let clean = Sequence::new(heads, format, 320, 0x5eed_0004);
            let expected = chunked(&clean, Isa::Portable, 32, 320, 1);
            let mut poisoned = Sequence::new(heads, format, 320, 0x5eed_0004);
            poisoned.k[from * 128..].fill(poison);
            poisoned.v[from * 128..].fill(poison);
            for isa in levels() {
                for chunk in [320, 7] {
                    let actual = chunked(&poisoned, isa, 64, chunk, 1);
                    let rows = from * heads.query_width();
                    same(
                        &actual[..rows],
                        &expected[..rows],
                        &format!("{format:?} {isa} {poison} from {from}"),
                    );
                    assert!(
                        actual[rows..].iter().all(|x| !x.is_finite()),
                        "{format:?} {isa}: it reaches its own"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_in_a_batch_gives_the_bits_that_it_gives_alone() {
    let heads = Heads { query: 8, kv: 2, dim: 64 };
    for format in FORMATS {
        // (tokens before, rows of this step): decode rows long and short, a verification of 3, prefills.
        let mixes: [&[(usize, usize)]; 4] = [
            &[(1500, 1), (10, 1), (255, 1), (256, 1), (0, 1)],
            &[(510, 3), (0, 40), (700, 1)],
            &[(1030, 1)],
            &[(0, 130), (254, 4), (333, 77), (5, 1), (767, 2)],
        ];
        for (index, mix) in mixes.iter().enumerate() {
            for isa in levels() {
                for threads in [1, 2, 16] {
                    check_mix(heads, format, isa, threads, mix, index as u64);
                }
            }
        }
    }
}

fn check_mix(heads: Heads, format: Format, isa: Isa, threads: usize, mix: &[(usize, usize)], seed: u64) {
    let block_tokens = 32;
    let sequences: Vec<Sequence> = (0..)
        .zip(mix)
        .map(|(i, (before, rows))| {
            Sequence::new(heads, format, before + rows, 0x5eed_0005 + 16 * seed + 2 * i)
        })
        .collect();
    let blocks: usize = sequences.iter().map(|of| of.tokens.div_ceil(block_tokens)).sum();
    let spec = KvSpec { layers: 1, heads, block_tokens, blocks, format };
    let kv = stale_cache(spec);
    let mut room = AttentionRoom::new(isa, spec, capacity(&spec), threads).expect("memory");
    let (mut spans, mut tables, mut q) = (Vec::new(), Vec::new(), Vec::new());
    for (of, (before, rows)) in sequences.iter().zip(mix) {
        let row0 = (q.len() / heads.query_width()) as u32;
        spans.push(SpanRows { row0, rows: *rows as u32, start: *before as u32, table0: tables.len() as u32 });
        let first = tables.len() as u32;
        for token in 0..of.tokens {
            if token % block_tokens == 0 {
                tables.push(first + (token / block_tokens) as u32);
            }
            let block = first + (token / block_tokens) as u32;
            let width = heads.kv * heads.dim;
            let (k, v) = (&of.k[token * width..][..width], &of.v[token * width..][..width]);
            // SAFETY: one thread.
            unsafe { kv.write(0, block, token % block_tokens, k, v) };
        }
        q.extend_from_slice(&of.q[before * heads.query_width()..]);
    }
    let mut out = vec![f32::NAN; q.len()];
    let of = Attention {
        kv: &kv,
        layer: 0,
        spans: &spans,
        tables: &tables,
        q: &q,
        scale: SCALE,
        out: out.as_mut_ptr(),
    };
    attend(&mut room, threads, &of);
    for (of, span) in sequences.iter().zip(&spans) {
        let alone = chunked(of, Isa::detect().expect("a level"), 64, 50, 1);
        let width = heads.query_width();
        let actual = &out[span.row0 as usize * width..][..span.rows as usize * width];
        same(
            actual,
            &alone[span.start as usize * width..],
            &format!("{format:?} {isa} {threads} threads, {span:?}"),
        );
    }
}

#[test]
fn a_plan_covers_every_row_head_and_segment_once_and_grows_nothing() {
    let mut random = Random(0x5eed_0006);
    for round in 0..300 {
        let kv_heads = 1 + random.below(4);
        let heads = Heads { query: kv_heads * (1 + random.below(8)), kv: kv_heads, dim: 16 };
        let (spans_max, rows_max, threads) =
            (1 + random.below(40), 1 + random.below(600), 1 + random.below(20));
        let spec = KvSpec { layers: 1, heads, block_tokens: 16, blocks: 128, format: Format::Bf16 };
        let capacity = StepCapacity { rows: rows_max, spans: spans_max, picks: 1, blocks_per_span: 128 };
        let mut room = AttentionRoom::new(Isa::Portable, spec, capacity, threads).expect("memory");
        let (tasks, splits) = (room.tasks.capacity(), room.splits.capacity());
        for _ in 0..5 {
            let (mut spans, mut row0) = (Vec::new(), 0);
            while spans.len() < spans_max && row0 < rows_max {
                let rows = if random.below(3) == 0 { 1 + random.below(rows_max - row0) } else { 1 };
                let start = random.below(2048 - rows + 1);
                spans.push(SpanRows { row0: row0 as u32, rows: rows as u32, start: start as u32, table0: 0 });
                row0 += rows;
            }
            room.plan(&spans);
            check_plan(&room, &spans, &format!("round {round}: {heads:?}, {threads} threads, {spans:?}"));
            assert_eq!((tasks, splits), (room.tasks.capacity(), room.splits.capacity()), "round {round}");
        }
    }
}

fn check_plan(room: &AttentionRoom, spans: &[SpanRows], what: &str) {
    let mut covered = std::collections::BTreeMap::new();
    let mut slots = std::collections::BTreeSet::new();
    for task in &room.tasks {
        let group = room.heads.query / room.heads.kv;
        assert!(task.tokens as usize * task.heads as usize * group <= room.task_rows, "{what}: {task:?}");
        for token in task.token0..task.token0 + task.tokens {
            for head in task.head0..task.head0 + task.heads {
                for segment in task.segment0..task.segment0 + task.segments {
                    *covered.entry((task.span, token, head, segment)).or_insert(0) += 1;
                    if let Some(of) = task.split {
                        let slot = of.first + token * of.segments + segment;
                        assert!(
                            (slot as usize) < room.slots && slots.insert((slot, head)),
                            "{what}: slot {slot}"
                        );
                    } else {
                        assert_eq!(task.segment0, 0, "{what}: a whole task begins at the beginning");
                    }
                }
            }
        }
    }
    for (index, span) in (0..).zip(spans) {
        for token in 0..span.rows {
            for head in 0..room.heads.kv as u32 {
                for segment in 0..=(span.start + token) / SEG as u32 {
                    assert_eq!(
                        covered.get(&(index, token, head, segment)),
                        Some(&1),
                        "{what}: {token} {segment}"
                    );
                }
            }
        }
    }
    let split_rows: u32 = room.splits.iter().map(|split| spans[split.span as usize].rows).sum();
    assert_eq!(room.merges(), split_rows as usize * room.heads.query, "{what}");
}
