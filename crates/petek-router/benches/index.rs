//! What placing a request and learning of caches cost: `cargo bench -p petek-router --bench index`. Sizes are printed
//! first.
#![allow(missing_docs)] // criterion's macros make undocumented functions.
#![allow(clippy::print_stdout, reason = "sizes are what is measured")]

use std::hint::black_box;
use std::iter;
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use petek_core::hash::{BlockHash, BlockHasher, BlockName, HashFields, Revision};
use petek_core::ids::TokenId;
use petek_proto::admin::v1::CandidateState;
use petek_router::index::{Index, WorkerKey};
use petek_router::route::{Ask, Rates, WorkerView, decide};

criterion_group!(benches, sizes, look_up, decision, ingest);
criterion_main!(benches);

const WORKERS: usize = 64;
const BLOCK: u32 = 16;
/// Of a prompt of 8,192 tokens.
const PROMPT_BLOCKS: usize = 512;
/// Of all workers together.
const BLOCKS: usize = 1_000_000;
/// Of a batch of events: what arises in 5 ms of a busy engine.
const BATCH_BLOCKS: usize = 256;
const BYTES_MAX: usize = 4 << 30;

/// Chains as long as the prompt, numbered; each differs from all others from its first block on.
fn chain(number: usize) -> impl Iterator<Item = BlockName> {
    (0..PROMPT_BLOCKS).map(move |at| name(number * PROMPT_BLOCKS + at))
}

/// A name for a number, spread as a hash is.
fn name(number: usize) -> BlockName {
    let spread = (number as u128 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    BlockName((spread ^ spread >> 61).to_le_bytes())
}

fn synced(index: &mut Index) -> WorkerKey {
    let key = index.add_worker();
    index.synced(key);
    key
}

/// An index of so many blocks; each chain is held by `holders` workers.
fn filled(blocks: usize, holders: usize) -> (Index, Vec<WorkerKey>) {
    let mut index = Index::new(BYTES_MAX);
    let workers: Vec<WorkerKey> = (0..WORKERS).map(|_| synced(&mut index)).collect();
    for number in 0..blocks / PROMPT_BLOCKS {
        for holder in 0..holders {
            let worker = workers[(number * 7 + holder) % WORKERS];
            index.stored(worker, BlockName::ROOT, chain(number)).expect("a chain from its start");
        }
    }
    (index, workers)
}

fn prompt() -> Vec<TokenId> {
    (0..PROMPT_BLOCKS as u32 * BLOCK).collect()
}

fn hasher() -> BlockHasher {
    BlockHasher::new(&HashFields::new(Revision([1; 32]), BLOCK))
}

/// Bytes per pair of a block and its holder, and what is left of them when all is given up.
fn sizes(_: &mut Criterion) {
    for holders in [1, 2, 8] {
        let empty = Index::new(BYTES_MAX).figures().bytes;
        let (mut index, workers) = filled(BLOCKS, holders);
        let full = index.figures();
        let each = full.bytes as f64 / full.holder_blocks as f64;
        for number in 0..BLOCKS / PROMPT_BLOCKS {
            // The ends of chains go first, as a worker evicts them.
            let mut names: Vec<BlockName> = chain(number).collect();
            names.reverse();
            for worker in &workers {
                index.removed(*worker, names.iter().copied());
            }
        }
        let left = index.figures();
        assert_eq!(left.holder_blocks, 0);
        let share = 100.0 * (left.bytes.saturating_sub(empty)) as f64 / full.bytes as f64;
        println!(
            "{} blocks, {holders} holders each: {each:.1} B per holder-block; all given up: {} B left, {share:.2} %",
            full.blocks, left.bytes
        );
    }
}

/// How much of a prompt each worker holds, with the prompt's names at hand.
fn look_up(c: &mut Criterion) {
    let mut group = c.benchmark_group("look_up_512_blocks");
    group.throughput(Throughput::Elements(PROMPT_BLOCKS as u64));
    for holders in [1, 8, WORKERS] {
        let (mut index, _) = filled(BLOCKS, holders);
        let names: Vec<Vec<BlockName>> = (0..BLOCKS / PROMPT_BLOCKS).map(|n| chain(n).collect()).collect();
        let mut prompts = names.iter().cycle();
        group.bench_function(BenchmarkId::new("holders", holders), |b| {
            b.iter(|| index.matches(prompts.next().expect("they go round"), Duration::ZERO))
        });
    }
    group.finish();
}

/// All that is done to place a prompt of 8,192 tokens on one of 64 workers: hash, look up, score. Its worst times are
/// printed beside: a mean hides what waits behind.
fn decision(c: &mut Criterion) {
    let (mut index, workers) = filled(BLOCKS, 2);
    let (prompt, mut hasher) = (prompt(), hasher());
    let hashed: Vec<BlockName> = hasher.chain(&prompt).iter().map(BlockHash::name).collect();
    // A fresh conversation's worth on every fourth worker, the whole of it on one.
    for (at, worker) in workers.iter().enumerate().step_by(4) {
        let held = if at == 0 { hashed.len() } else { at * 8 };
        index.stored(*worker, BlockName::ROOT, hashed[..held].iter().copied()).expect("a chain");
    }
    let ask = Ask { prompt_tokens: prompt.len() as u32, max_tokens: 256, block_size: BLOCK };
    let rates = Rates { prefill_tokens_per_s: 20_000.0, step_s: 0.010, step_one_more_s: 0.01005 };
    let mut decide_once = |random: u64| {
        let names: Vec<BlockName> = hasher.chain(black_box(&prompt)).iter().map(BlockHash::name).collect();
        let matches = index.matches(&names, Duration::ZERO);
        let view = |(at, key): (usize, &WorkerKey)| {
            let found = matches.of(*key);
            WorkerView {
                state: CandidateState::Eligible,
                waiting_uncached_tokens: (at as u64 * 977) % 40_000,
                own_waiting_tokens: 0,
                running: 8,
                matched_blocks: found.blocks,
                predicted_blocks: found.predicted,
                rates,
                load_age: Some(Duration::from_millis(20)),
            }
        };
        let views: Vec<WorkerView> = workers.iter().enumerate().map(view).collect();
        decide(&ask, &views, random)
    };
    let mut times: Vec<Duration> = iter::repeat_with(|| {
        let begun = Instant::now();
        black_box(decide_once(1 << 40));
        begun.elapsed()
    })
    .take(20_000)
    .collect();
    times.sort_unstable();
    let at = |share: f64| times[(times.len() as f64 * share) as usize];
    println!("decision: p50 {:?}, p99 {:?}, p99.9 {:?}", at(0.5), at(0.99), at(0.999));
    c.bench_function("decision_512_blocks_64_workers", |b| b.iter(|| decide_once(1 << 40)));
}

/// Events of one worker beside what 63 others hold: chains stored in batches, and given up again.
fn ingest(c: &mut Criterion) {
    const CHAINS: usize = 256;
    let (index, workers) = filled(BLOCKS, 1);
    let index = std::cell::RefCell::new(index);
    let worker = workers[3];
    let mut group = c.benchmark_group("ingest");
    group.throughput(Throughput::Elements((CHAINS * PROMPT_BLOCKS) as u64));
    let store = |first: usize| {
        let mut index = index.borrow_mut();
        for number in first..first + CHAINS {
            let names: Vec<BlockName> = chain(number).collect();
            let mut parent = BlockName::ROOT;
            for batch in names.chunks(BATCH_BLOCKS) {
                index.stored(worker, parent, batch.iter().copied()).expect("after its parent");
                parent = batch[batch.len() - 1];
            }
        }
    };
    let remove = |first: usize| {
        let mut index = index.borrow_mut();
        for number in first..first + CHAINS {
            index.removed(worker, chain(number).collect::<Vec<_>>().into_iter().rev());
        }
    };
    // Blocks that nobody held, and blocks that others hold already.
    for (what, first) in [("new_blocks", BLOCKS), ("shared_blocks", 4)] {
        group.bench_function(BenchmarkId::new("stored", what), |b| {
            b.iter_batched(|| remove(first), |()| store(first), BatchSize::PerIteration)
        });
        store(first);
        group.bench_function(BenchmarkId::new("removed", what), |b| {
            b.iter_batched(|| store(first), |()| remove(first), BatchSize::PerIteration)
        });
        remove(first);
    }
    group.finish();
}
