//! What the engine's thread and a router spend per block and per step: `cargo bench -p petek-core`.
#![allow(missing_docs)] // criterion's macros make undocumented functions.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use petek_core::hash::{BlockHasher, HashFields, Revision};
use petek_core::ids::TokenId;
use petek_core::params::{CacheUse, ModelLimits, RawParams, SamplingDefaults};
use petek_core::plan::{Draw, SampledToken, SpanSample, StepOutcome, StepPlan};
use petek_core::scheduler::{NewRequest, NewSequence, Scheduler, SchedulerConfig};

criterion_group!(benches, block_hashes, scheduler_step, admission_of_a_cached_prompt);
criterion_main!(benches);

/// An 8,192-token prompt's chain: what a router computes for each request.
fn block_hashes(c: &mut Criterion) {
    let ids: Vec<TokenId> = (0..8_192).collect();
    let mut group = c.benchmark_group("block_hashes_8192_tokens");
    for block_size in [16, 32, 64] {
        let mut hasher = BlockHasher::new(&HashFields::new(Revision([1; 32]), block_size));
        group.throughput(Throughput::Elements((ids.len() / block_size as usize) as u64));
        group.bench_function(BenchmarkId::from_parameter(block_size), |b| {
            b.iter(|| hasher.chain(black_box(&ids)))
        });
    }
}

/// Plan, a made-up outcome, apply and events of one step in which every sequence decodes. A sequence ends every 4,096
/// steps and another takes its place.
fn scheduler_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler_step");
    for running in [1u32, 8, 64, 256, 512] {
        let mut scheduler = engine(running);
        let mut sent = 0;
        group.throughput(Throughput::Elements(running.into()));
        group.bench_function(BenchmarkId::from_parameter(running), |b| {
            b.iter(|| {
                while scheduler.load().waiting + scheduler.load().running < running as usize {
                    scheduler.submit(request((sent..sent + 64).collect(), 4_096), Duration::ZERO);
                    sent += 100;
                }
                let plan = scheduler.plan(Duration::ZERO).expect("something runs");
                scheduler.apply(outcome(&plan)).expect("as planned");
                black_box(scheduler.drain_kv_events().count());
                black_box(scheduler.drain_events().count());
            });
        });
    }
}

/// A request of 8,192 tokens, all but the last block cached, from `submit` to its one token.
fn admission_of_a_cached_prompt(c: &mut Criterion) {
    let mut scheduler = engine(8);
    let prompt: Arc<[TokenId]> = (0..8_192).collect();
    c.bench_function("cached_prompt_8192_tokens", |b| {
        b.iter(|| {
            scheduler.submit(request(prompt.clone(), 1), Duration::ZERO);
            while let Some(plan) = scheduler.plan(Duration::ZERO) {
                scheduler.apply(outcome(&plan)).expect("as planned");
            }
            black_box(scheduler.drain_kv_events().count());
            black_box(scheduler.drain_events().count());
        });
    });
}

fn engine(slots: u32) -> Scheduler {
    let config = SchedulerConfig {
        revision: Revision([1; 32]),
        blocks: 264 * slots + 512,
        block_size: 16,
        slots,
        step_rows: 1_024.max(2 * slots),
        queue: 1_024,
        prefix_cache: CacheUse::Shared,
    };
    Scheduler::new(config).expect("a configuration that works")
}

fn request(prompt: Arc<[TokenId]>, max_tokens: i64) -> NewRequest {
    let model = ModelLimits {
        vocabulary: u32::MAX,
        context_tokens: 1 << 20,
        eos_ids: [2].into(),
        defaults: SamplingDefaults::BUILT_IN,
    };
    let raw = RawParams { max_tokens: Some(max_tokens), ..RawParams::default() };
    let params = raw.check(&model, 7).expect("good parameters");
    let max_tokens = params.max_tokens_after(&prompt, &model).expect("a good prompt");
    let sequences = vec![NewSequence { index: 0, seed: 7, resumed_ids: [].into() }];
    NewRequest { prompt, params, max_tokens, sequences, tenant: Vec::new(), deadline: None }
}

fn outcome(plan: &StepPlan) -> StepOutcome {
    let sampling = plan.spans.iter().enumerate().filter(|(_, span)| span.sample == SpanSample::Draw);
    let token = |(at, _): (usize, _)| SampledToken {
        span: at as u32,
        draw: Draw::Token(9),
        logprob: 0.0,
        rank: 0,
        top: Vec::new(),
        logits_hash: None,
    };
    StepOutcome { step: plan.step, tokens: sampling.map(token).collect(), seconds: 0.01 }
}
