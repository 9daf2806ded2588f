//! `cargo bench -p petek-device --bench attention [-- threads=1,2 contexts=1024,8192 blocks=16,32,64]`
//!
//! Decode attention as a share of this machine's read rate, measured on the very same cache; prefill attention as a share of
//! the registers' peak; the cost of a draw. Shares are by processor time and by the wall; on a machine that is shared, the
//! first is the kernels' own.
#![allow(unsafe_code, clippy::print_stdout)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use petek_device::DeviceError;
use petek_device::cpu::attention::{Attention, AttentionRoom};
use petek_device::cpu::isa::Isa;
use petek_device::cpu::kv::KvCache;
use petek_device::cpu::pool::{Pool, PoolOptions, TaskCounter};
use petek_device::cpu::roofs::{Rate, best_rate, flop_rate, read_rate};
use petek_device::cpu::sample::Sampler;
use petek_device::ops::{DrawSpec, Format, Heads, KvSpec, SpanRows, StepCapacity};

/// The shape of a 1B Llama.
const HEADS: Heads = Heads { query: 32, kv: 8, dim: 64 };
const VOCABULARY: usize = 128_256;
/// Bytes of KV of a decode: more than caches keep.
const CACHE_BYTES: usize = 512 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let isa = Isa::detect()?;
    println!("instructions: {isa}");
    for threads in numbers_of("threads", &[1, 2]) {
        let mut pool = Pool::new(PoolOptions { threads, ..PoolOptions::default() })?;
        for context in numbers_of("contexts", &[1024, 4096, 8192]) {
            for block_tokens in numbers_of("blocks", &[16, 32, 64, 128]) {
                decode(&mut pool, isa, context, block_tokens, 1)?;
            }
        }
        decode(&mut pool, isa, 1024, 32, 8)?;
        let peak = flop_rate(&mut pool, isa, Format::Bf16)?;
        for start in [0, 512, 4096] {
            prefill(&mut pool, isa, start, peak)?;
        }
    }
    draws(isa);
    Ok(())
}

/// `name=1,2` of the command line.
fn numbers_of(name: &str, otherwise: &[usize]) -> Vec<usize> {
    let given = std::env::args().find_map(|arg| arg.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
    let numbers = given.map(|list| list.split(',').filter_map(|number| number.parse().ok()).collect());
    numbers.unwrap_or_else(|| otherwise.to_vec())
}

/// Numbers of a fixed stream, in (−1, 1).
fn random(count: usize) -> Vec<f32> {
    let mut state = 0x5eed_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as i32 as f32 / 2_147_483_648.0
    };
    (0..count).map(|_| next()).collect()
}

fn filled_cache(spec: KvSpec) -> Result<KvCache, DeviceError> {
    let kv = KvCache::new(spec)?;
    let row = random(spec.heads.kv * spec.heads.dim);
    for layer in 0..spec.layers {
        for token in 0..spec.blocks * spec.block_tokens {
            let (block, slot) = ((token / spec.block_tokens) as u32, token % spec.block_tokens);
            // SAFETY: one thread.
            unsafe { kv.write(layer, block, slot, &row, &row) };
        }
    }
    Ok(kv)
}

/// What lanes share to write their own parts of.
struct Out(*mut f32);

// SAFETY: tasks and merges write their own parts.
unsafe impl Sync for Out {}

impl Out {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// One step of all layers.
fn step(
    pool: &mut Pool,
    room: &AttentionRoom,
    kv: &KvCache,
    (spans, tables, q): (&[SpanRows], &[u32], &[f32]),
) -> Result<(), DeviceError> {
    let mut out = vec![0.0; q.len()];
    let out = Out(out.as_mut_ptr());
    let counters: Vec<TaskCounter> = (0..kv.spec().layers).map(|_| TaskCounter::default()).collect();
    pool.region(|lane| {
        for (layer, counter) in counters.iter().enumerate() {
            let of = Attention { kv, layer, spans, tables, q, scale: 0.125, out: out.get() };
            while let Some(tasks) = counter.take(room.tasks(), 1) {
                // SAFETY: `out` is as long as `q`; each task once; a lane uses its own room; nobody writes the cache.
                tasks.for_each(|task| unsafe { room.run_task(task, lane.thread(), &of) });
            }
            lane.barrier();
            // SAFETY: as above; all tasks have run.
            lane.share(room.merges()).for_each(|merge| unsafe { room.run_merge(merge, &of) });
            lane.barrier();
        }
    })
}

fn shares(rate: Rate, roof: Rate) -> String {
    let share = rate.share_of(roof);
    format!(
        "{:.2} busy, {:.2} wall, of {:.1} and {:.1} G/s",
        share.busy,
        share.wall,
        roof.busy / 1e9,
        roof.wall / 1e9
    )
}

/// One token of each of `sequences`.
fn decode(
    pool: &mut Pool,
    isa: Isa,
    context: usize,
    block_tokens: usize,
    sequences: usize,
) -> Result<(), DeviceError> {
    let each = context / block_tokens;
    let mut spec =
        KvSpec { layers: 1, heads: HEADS, block_tokens, blocks: each * sequences, format: Format::Bf16 };
    spec.layers = CACHE_BYTES.div_ceil(spec.bytes());
    let mut kv = filled_cache(spec)?;
    // A scattered table: a prime stride visits every block.
    let tables: Vec<u32> = (0..spec.blocks).map(|i| (i * 13_807 % spec.blocks) as u32).collect();
    let start = context as u32 - 1;
    let span = |i: u32| SpanRows { row0: i, rows: 1, start, table0: i * each as u32 };
    let spans: Vec<SpanRows> = (0..sequences as u32).map(span).collect();
    let capacity = StepCapacity { rows: 64, spans: 64, picks: 64, blocks_per_span: each };
    let mut room = AttentionRoom::new(isa, spec, capacity, pool.threads())?;
    room.plan(&spans);
    let q = random(sequences * HEADS.query_width());
    let rate =
        best_rate(pool.threads(), 3, spec.bytes() as f64, || step(pool, &room, &kv, (&spans, &tables, &q)))?;
    let roof = read_rate(pool, isa, &[kv.words()])?;
    let threads = pool.threads();
    println!(
        "decode {sequences} x {context}, blocks of {block_tokens}, {threads} threads: {}",
        shares(rate, roof)
    );
    Ok(())
}

/// 512 tokens behind `start`.
fn prefill(pool: &mut Pool, isa: Isa, start: usize, peak: Rate) -> Result<(), DeviceError> {
    let (rows, block_tokens) = (512, 32);
    let blocks = (start + rows) / block_tokens;
    let spec = KvSpec { layers: 4, heads: HEADS, block_tokens, blocks, format: Format::Bf16 };
    let kv = filled_cache(spec)?;
    let tables: Vec<u32> = (0..blocks as u32).collect();
    let spans = [SpanRows { row0: 0, rows: rows as u32, start: start as u32, table0: 0 }];
    let capacity = StepCapacity { rows, spans: 1, picks: 1, blocks_per_span: blocks };
    let mut room = AttentionRoom::new(isa, spec, capacity, pool.threads())?;
    room.plan(&spans);
    let q = random(rows * HEADS.query_width());
    let seen: usize = (start + 1..=start + rows).sum();
    let flops = (4 * seen * HEADS.query_width() * spec.layers) as f64;
    let rate = best_rate(pool.threads(), 3, flops, || step(pool, &room, &kv, (&spans, &tables, &q)))?;
    println!("prefill 512 behind {start}, {} threads: {}", pool.threads(), shares(rate, peak));
    Ok(())
}

fn draws(isa: Isa) {
    // About normal, as a model's logits are: the sum of some even ones.
    let eights = random(8 * VOCABULARY);
    let flat: Vec<f32> = eights.as_chunks::<8>().0.iter().map(|x| x.iter().sum::<f32>() * 1.5).collect();
    let mut peaked = flat.clone();
    (peaked[17], peaked[100_000]) = (24.0, 22.0);
    let plain = DrawSpec {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        position: 0,
        masked: Arc::new([]),
        logprobs: None,
    };
    let specs = [
        ("greedy", DrawSpec { temperature: 0.0, ..plain.clone() }),
        ("greedy, one masked", DrawSpec { temperature: 0.0, masked: Arc::new([5]), ..plain.clone() }),
        ("greedy, 20 logprobs", DrawSpec { temperature: 0.0, logprobs: Some(20), ..plain.clone() }),
        ("temperature 1", plain.clone()),
        ("top_k 50", DrawSpec { top_k: 50, ..plain.clone() }),
        ("top_k 1000", DrawSpec { top_k: 1000, ..plain.clone() }),
        ("top_p 0.9", DrawSpec { top_p: 0.9, ..plain.clone() }),
        ("min_p 0.05", DrawSpec { min_p: 0.05, ..plain }),
    ];
    let mut sampler = Sampler::default();
    for (shape, logits) in [("flat", &flat), ("peaked", &peaked)] {
        for (name, spec) in &specs {
            let mut times: Vec<Duration> = (0..300)
                .map(|position| {
                    let spec = DrawSpec { position, ..spec.clone() };
                    let since = Instant::now();
                    black_box(sampler.draw(isa, black_box(logits), &spec, VOCABULARY));
                    since.elapsed()
                })
                .collect();
            // The lower quartile: other users of the machine interrupt some.
            times.sort_unstable();
            let micros = times[times.len() / 4].as_secs_f64() * 1e6;
            println!("draw from {VOCABULARY}, {shape}, {name}: {micros:.1} us");
        }
    }
}
