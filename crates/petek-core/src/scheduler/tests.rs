//! The scheduler alone, driven by outcomes that the test makes up. Its texts are proven with the fake model, in
//! petek-worker.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::ids::BlockId;
use crate::limits::engine::AGEING_STEPS;
use crate::params::{ModelLimits, RawParams, SamplingDefaults};
use crate::plan::{Draw, SampledToken, SpanInput, SpanSample, StepOutcome, StepPlan};
use crate::refusal::Reason;

const EOS: TokenId = 2;

/// A scheduler and a runner that draws what it is told.
struct Engine {
    scheduler: Scheduler,
    now: Duration,
    events: Vec<Event>,
}

fn config() -> SchedulerConfig {
    SchedulerConfig {
        revision: Revision([1; 32]),
        blocks: 64,
        block_size: 16,
        slots: 8,
        step_rows: 128,
        queue: 4,
        prefix_cache: CacheUse::Shared,
    }
}

fn prompt(tokens: usize) -> Arc<[TokenId]> {
    (100..).take(tokens).collect()
}

fn request(prompt: Arc<[TokenId]>, raw: RawParams) -> NewRequest {
    let model = ModelLimits {
        vocabulary: 1_000_000,
        context_tokens: 1_000_000,
        eos_ids: [EOS].into(),
        defaults: SamplingDefaults::BUILT_IN,
    };
    let params = raw.check(&model, 7).unwrap();
    let max_tokens = params.max_tokens_after(&prompt, &model).unwrap();
    let sequence = |index| NewSequence { index, seed: 0, resumed_ids: params.resumed_ids.clone() };
    let sequences = (0..params.n).map(sequence).collect();
    NewRequest { prompt, params, max_tokens, sequences, tenant: Vec::new(), deadline: None }
}

/// Parameters with so many tokens at most.
fn at_most(max_tokens: i64) -> RawParams {
    RawParams { max_tokens: Some(max_tokens), ..RawParams::default() }
}

/// One token of id 9 for each sampling span.
fn nines(plan: &StepPlan) -> StepOutcome {
    outcome(plan, |_| Draw::Token(9))
}

fn outcome(plan: &StepPlan, draw: impl Fn(u32) -> Draw) -> StepOutcome {
    let sampling = plan.spans.iter().enumerate().filter(|(_, span)| span.sample == SpanSample::Draw);
    let token = |at: usize| SampledToken {
        span: at as u32,
        draw: draw(plan.spans[at].slot.0),
        logprob: 0.0,
        rank: 0,
        top: Vec::new(),
        logits_hash: None,
    };
    StepOutcome { step: plan.step, tokens: sampling.map(|(at, _)| token(at)).collect(), seconds: 0.1 }
}

impl Engine {
    fn new(config: SchedulerConfig) -> Self {
        Engine { scheduler: Scheduler::new(config).unwrap(), now: Duration::ZERO, events: Vec::new() }
    }

    fn submit(&mut self, new: NewRequest) -> RequestNumber {
        let number = self.scheduler.submit(new, self.now);
        self.hear();
        number
    }

    fn cancel(&mut self, number: RequestNumber, indexes: Option<&[u32]>) {
        self.scheduler.cancel(number, indexes);
        self.hear();
    }

    fn hear(&mut self) {
        self.events.extend(self.scheduler.drain_events());
        self.scheduler.pool().check().unwrap();
    }

    /// One step, if there is anything to do.
    fn step(&mut self) -> Option<StepPlan> {
        self.step_with(nines)
    }

    fn step_with(&mut self, outcome: impl Fn(&StepPlan) -> StepOutcome) -> Option<StepPlan> {
        let plan = self.scheduler.plan(self.now);
        self.hear();
        let plan = plan?;
        self.scheduler.apply(outcome(&plan)).unwrap();
        self.hear();
        Some(plan)
    }

    /// Steps until nothing is left; their plans.
    fn run(&mut self) -> Vec<StepPlan> {
        let plans = std::iter::from_fn(|| self.step()).collect();
        assert!(self.scheduler.is_idle());
        assert_eq!(self.scheduler.pool().available(), self.scheduler.pool().blocks());
        plans
    }

    fn admitted(&self, number: RequestNumber) -> Option<u32> {
        self.events.iter().find_map(|event| match event {
            Event::Admitted { request, cached_tokens } if *request == number => Some(*cached_tokens),
            _ => None,
        })
    }

    fn tokens(&self, number: RequestNumber) -> usize {
        let of = |event: &&Event| matches!(event, Event::Token { request, .. } if *request == number);
        self.events.iter().filter(of).count()
    }

    fn ends(&self, number: RequestNumber) -> Vec<(u32, FinishReason, Usage)> {
        let ends = self.events.iter().filter_map(|event| match event {
            Event::Finished { request, index, reason, usage } if *request == number => {
                Some((*index, *reason, *usage))
            }
            _ => None,
        });
        ends.collect()
    }

    fn refusal(&self, number: RequestNumber) -> Option<&Refusal> {
        self.events.iter().find_map(|event| match event {
            Event::Refused { request, refusal, .. } if *request == number => Some(refusal),
            _ => None,
        })
    }

    fn blocks_cached(&self) -> usize {
        self.scheduler.pool().digest().0
    }
}

fn rows(plans: &[StepPlan]) -> usize {
    plans.iter().map(StepPlan::rows).sum()
}

/// BEHAVIOUR 5.1 and 5.6, with the prompt whole and in chunks: rows planned = prompt - cached.
#[test]
fn a_prompt_is_computed_but_for_what_is_cached() {
    for step_rows in [8, 30, 128] {
        let mut engine = Engine::new(SchedulerConfig { step_rows, ..config() });
        // Length, and how much of it the cache has by then. A token of output adds no row.
        for (tokens, cached) in [(64, 0), (64, 48), (63, 48), (65, 64), (40, 32), (17, 16), (16, 0), (1, 0)] {
            let number = engine.submit(request(prompt(tokens), at_most(1)));
            let before = engine.scheduler.counters();
            let plans = engine.run();
            let usage = Usage {
                prompt_tokens: tokens as u32,
                cached_tokens: cached,
                output_tokens: 1,
                ..Usage::default()
            };
            assert_eq!(engine.ends(number), [(0, FinishReason::Length, usage)]);
            assert_eq!(engine.admitted(number), Some(cached));
            assert_eq!(rows(&plans), tokens - cached as usize, "{tokens} tokens, {step_rows} rows a step");
            assert!(plans.iter().all(|plan| plan.rows() <= step_rows as usize));
            let computed = engine.scheduler.counters().prompt_tokens_computed - before.prompt_tokens_computed;
            assert_eq!(computed, tokens as u64 - u64::from(cached));
        }
    }
}

/// CASES, cache: block 16, 64-token prompt, n 3, cold, then again.
#[test]
fn a_prompt_is_no_hit_of_its_own_siblings() {
    let mut engine = Engine::new(config());
    for (cached, computed) in [(0, 64), (48, 16)] {
        let before = engine.scheduler.counters().prompt_tokens_computed;
        let number = engine.submit(request(prompt(64), RawParams { n: Some(3), ..at_most(5) }));
        engine.run();
        assert_eq!(engine.admitted(number), Some(cached));
        let usage = Usage { prompt_tokens: 64, cached_tokens: cached, output_tokens: 5, ..Usage::default() };
        let mut ends = engine.ends(number);
        ends.sort_by_key(|end| end.0);
        assert_eq!(ends, [0, 1, 2].map(|index| (index, FinishReason::Length, usage)));
        assert_eq!(engine.tokens(number), 15);
        assert_eq!(engine.scheduler.counters().prompt_tokens_computed - before, computed);
    }
}

#[test]
fn siblings_share_full_blocks_and_copy_the_last() {
    let mut engine = Engine::new(config());
    engine.submit(request(prompt(70), RawParams { n: Some(3), ..at_most(8) }));
    let first = engine.step().unwrap();
    assert_eq!((first.rows(), first.spans[0].new_blocks.len()), (70, 5));
    let table = first.spans[0].new_blocks.clone();
    let second = engine.step().unwrap();
    // The first decodes; the others begin with the prompt's last token.
    let starts: Vec<_> = second.spans.iter().map(|span| (span.start, span.len)).collect();
    assert_eq!(starts, [(70, 1), (69, 1), (69, 1)]);
    let copies: Vec<BlockId> = second.copies.iter().map(|copy| copy.from).collect();
    assert_eq!(copies, [table[4]; 2]);
    for (span, copy) in second.spans[1..].iter().zip(&second.copies) {
        assert_eq!(span.new_blocks, [&table[..4], &[copy.to]].concat());
    }
    engine.run();
    // One that has ended leaves its block to the last of the others.
    let mut engine = Engine::new(config());
    engine.submit(request(prompt(70), RawParams { n: Some(2), ..at_most(1) }));
    assert_eq!(engine.run().iter().map(|plan| plan.copies.len()).sum::<usize>(), 0);
}

/// BEHAVIOUR 5.2, 5.5.
#[test]
fn salts_tenants_and_bypass_keep_apart() {
    let mut engine = Engine::new(config());
    let mut check = |new: NewRequest, cached: u32, blocks: usize| {
        let number = engine.submit(new);
        engine.run();
        assert_eq!((engine.admitted(number), engine.blocks_cached()), (Some(cached), blocks));
    };
    let salted = |salt: &str| RawParams { cache_salt: salt.into(), ..at_most(1) };
    let plain = || request(prompt(40), at_most(1));
    check(plain(), 0, 2);
    check(plain(), 32, 2);
    check(request(prompt(40), salted("a")), 0, 4);
    check(request(prompt(40), salted("a")), 32, 4);
    check(request(prompt(40), salted("b")), 0, 6);
    check(NewRequest { tenant: b"acme".to_vec(), ..plain() }, 0, 8);
    let bypass =
        |tokens| request(prompt(tokens), RawParams { bypass_prefix_cache: Some(true), ..at_most(1) });
    check(bypass(40), 0, 8);
    check(bypass(80), 0, 8);
    check(plain(), 32, 8);

    let mut off = Engine::new(SchedulerConfig { prefix_cache: CacheUse::Bypassed, ..config() });
    for _ in 0..2 {
        let number = off.submit(request(prompt(40), at_most(1)));
        off.run();
        assert_eq!((off.admitted(number), off.blocks_cached()), (Some(0), 0));
    }
}

/// BEHAVIOUR 5.4; and events come with `apply`, never with `plan`.
#[test]
fn only_full_blocks_of_confirmed_tokens_are_cached() {
    let mut engine = Engine::new(SchedulerConfig { blocks: 4, ..config() });
    engine.submit(request(prompt(30), at_most(20)));
    // 30 of the prompt, then a position per step: the second block is full with the third step.
    let cached: Vec<usize> = std::iter::from_fn(|| engine.step().map(|_| engine.blocks_cached())).collect();
    assert_eq!(cached[..3], [1, 1, 2]);
    // The last token's position is never computed: 49 of 50, so three full blocks.
    assert_eq!(cached.last(), Some(&3));
    assert_eq!(engine.scheduler.drain_kv_events().count(), 3);

    engine.submit(request((500..560).collect(), at_most(1)));
    let plan = engine.scheduler.plan(engine.now).unwrap();
    assert_eq!(engine.blocks_cached(), 0, "evicted by the plan");
    assert_eq!(engine.scheduler.drain_kv_events().count(), 0, "said by the outcome");
    engine.scheduler.apply(nines(&plan)).unwrap();
    assert_eq!(engine.scheduler.drain_kv_events().count(), 3 + 3);
}

/// BEHAVIOUR 6.1, 5.6: nothing is lost or sent twice, and the first admission's cached tokens stay.
#[test]
fn the_youngest_is_preempted_and_its_output_kept() {
    let mut engine = Engine::new(SchedulerConfig { blocks: 9, ..config() });
    let cold = engine.submit(request(prompt(32), at_most(1)));
    engine.run();
    let old = engine.submit(request(prompt(48), at_most(60)));
    let young = engine.submit(request((900..940).collect(), at_most(60)));
    engine.run();
    assert!(engine.scheduler.counters().preemptions > 0);
    assert_eq!(
        (engine.admitted(cold), engine.admitted(old), engine.admitted(young)),
        (Some(0), Some(32), Some(0))
    );
    let preempted = engine.scheduler.counters().preemptions as u32;
    for (number, prompt_tokens, cached_tokens, preemptions) in [(old, 48, 32, 0), (young, 40, 0, preempted)] {
        let usage = Usage { prompt_tokens, cached_tokens, output_tokens: 60, preemptions };
        assert_eq!(engine.ends(number), [(0, FinishReason::Length, usage)]);
        let positions = engine.events.iter().filter_map(|event| match event {
            Event::Token { request, position, .. } if *request == number => Some(*position),
            _ => None,
        });
        assert!(positions.eq(0..60));
    }
    // What it had computed before it computed again; the counter of prompts does not move for that.
    assert_eq!(engine.scheduler.counters().prompt_tokens_computed, 32 + 16 + 40);
    let end = |number| {
        engine.events.iter().position(|e| matches!(e, Event::Finished { request, .. } if *request == number))
    };
    assert!(end(old) < end(young), "the older one is never the one to wait");
}

/// BEHAVIOUR 6.2, 6.6: at every stage, all sequences or one, blocks are back and the usage says what was done.
#[test]
fn a_cancel_frees_blocks_at_every_stage() {
    for steps in 0..12 {
        for n in [1, 3] {
            let mut engine = Engine::new(SchedulerConfig { step_rows: 16, ..config() });
            let number = engine.submit(request(prompt(40), RawParams { n: Some(n), ..at_most(6) }));
            (0..steps).for_each(|_| drop(engine.step()));
            let drawn = engine.tokens(number);
            let left = n as usize - engine.ends(number).len();
            engine.cancel(number, None);
            engine.cancel(number, None);
            let pool = engine.scheduler.pool();
            assert_eq!(
                (pool.available(), engine.scheduler.is_idle()),
                (64, true),
                "{n} cancelled after {steps} steps"
            );
            let ends = engine.ends(number);
            assert_eq!(ends.len(), n as usize, "each ends once");
            assert_eq!(ends.iter().filter(|end| end.1 == FinishReason::Cancelled).count(), left);
            assert_eq!(ends.iter().map(|end| end.2.output_tokens as usize).sum::<usize>(), drawn);
            if left > 0 {
                assert_eq!(ends.last().unwrap().2.prompt_tokens, (16 * steps).min(40), "after {steps} steps");
            }
        }
    }
}

#[test]
fn a_cancelled_sequence_leaves_its_prompt_to_the_others() {
    for (steps, cancelled) in [(0, 0), (1, 0), (1, 1), (3, 0), (3, 2), (4, 0)] {
        let mut engine = Engine::new(SchedulerConfig { step_rows: 16, ..config() });
        let number = engine.submit(request(prompt(40), RawParams { n: Some(3), ..at_most(6) }));
        (0..steps).for_each(|_| drop(engine.step()));
        engine.cancel(number, Some(&[cancelled, 17]));
        engine.run();
        let mut ends: Vec<_> =
            engine.ends(number).iter().map(|(index, reason, _)| (*index, *reason)).collect();
        ends.sort_by_key(|end| end.0);
        let reason = |i| if i == cancelled { FinishReason::Cancelled } else { FinishReason::Length };
        assert_eq!(ends, [0, 1, 2].map(|i| (i, reason(i))), "{cancelled} after {steps} steps");
        assert_eq!(engine.events.iter().filter(|e| matches!(e, Event::Admitted { .. })).count(), 1);
    }
}

#[test]
fn sequences_end_at_eos_stop_ids_and_length() {
    let check = |raw: RawParams, drawn: &[TokenId], reason: FinishReason| {
        let mut engine = Engine::new(config());
        let number = engine.submit(request(prompt(3), raw));
        for id in drawn {
            assert!(engine.ends(number).is_empty());
            engine.step_with(|plan| outcome(plan, |_| Draw::Token(*id))).unwrap();
        }
        let usage = Usage {
            prompt_tokens: 3,
            cached_tokens: 0,
            output_tokens: drawn.len() as u32,
            ..Usage::default()
        };
        assert_eq!(engine.ends(number), [(0, reason, usage)]);
        assert!(engine.scheduler.is_idle() && engine.step().is_none());
    };
    let stops = |ids: &[TokenId]| RawParams { stop_token_ids: ids.to_vec(), ..at_most(4) };
    let ignoring = |raw| RawParams { ignore_eos: Some(true), ..raw };
    check(at_most(1), &[9], FinishReason::Length);
    check(at_most(1), &[EOS], FinishReason::StopEos);
    check(at_most(4), &[9, EOS], FinishReason::StopEos);
    check(ignoring(at_most(4)), &[9, EOS, EOS, 9], FinishReason::Length);
    check(stops(&[5, 4]), &[9, 4], FinishReason::StopToken(4));
    check(ignoring(stops(&[EOS])), &[9, EOS], FinishReason::StopToken(EOS));
    check(stops(&[EOS]), &[9, EOS], FinishReason::StopEos);
}

#[test]
fn resumed_tokens_are_computed_and_never_reported() {
    let mut engine = Engine::new(config());
    let resumed =
        |ids: &[TokenId], max| RawParams { seed: Some(1), resumed_ids: ids.to_vec(), ..at_most(max) };
    let number = engine.submit(request(prompt(10), resumed(&[5, 6, 7], 5)));
    let plan = engine.step().unwrap();
    assert_eq!((plan.rows(), plan.fills[0].prompt_tokens, plan.fills[0].ids.len()), (13, 10, 13));
    engine.run();
    let positions = engine.events.iter().filter_map(|event| match event {
        Event::Token { position, .. } => Some(*position),
        _ => None,
    });
    assert_eq!(positions.collect::<Vec<_>>(), [3, 4]);
    assert_eq!(engine.ends(number)[0].2.output_tokens, 5);
    // Nothing is left to do for these: they end at once, and with what they had.
    for (raw, reason) in
        [(resumed(&[5, EOS], 9), FinishReason::StopEos), (resumed(&[5, 6], 2), FinishReason::Length)]
    {
        let number = engine.submit(request(prompt(10), raw));
        assert_eq!(engine.admitted(number), Some(0));
        let usage = Usage { prompt_tokens: 10, cached_tokens: 0, output_tokens: 2, ..Usage::default() };
        assert_eq!(engine.ends(number), [(0, reason, usage)]);
        assert!(engine.scheduler.is_idle());
    }
}

#[test]
fn what_can_never_run_is_refused_at_once_and_alone() {
    let mut engine = Engine::new(SchedulerConfig { blocks: 4, ..config() });
    let fine = engine.submit(request(prompt(40), at_most(10)));
    engine.step();
    let mut check = |new: NewRequest, reason: Reason, says: &str| {
        let number = engine.submit(new);
        let refusal = engine.refusal(number).expect(says);
        assert_eq!(refusal.reason(), reason);
        assert!(refusal.to_string().contains(says), "{refusal}");
    };
    let good = || request(prompt(10), at_most(5));
    // 60 + 6 - 1 positions are 5 blocks; one token less fits.
    check(
        request(prompt(60), at_most(6)),
        Reason::PoolExceeded,
        "needs 5 blocks of the KV cache and the worker has 4",
    );
    check(NewRequest { prompt: prompt(0), ..good() }, Reason::InvalidField, "prompt");
    check(NewRequest { max_tokens: 0, ..good() }, Reason::InvalidField, "max_tokens");
    check(NewRequest { sequences: Vec::new(), ..good() }, Reason::InvalidField, "sequences");
    let sequence = NewSequence { index: 3, seed: 0, resumed_ids: [1; 6].into() };
    check(
        NewRequest { sequences: vec![sequence.clone()], ..good() },
        Reason::InvalidField,
        "sequences[0].resumed_ids",
    );
    let twice = NewSequence { resumed_ids: [].into(), ..sequence };
    let twice = vec![twice.clone(), twice];
    check(NewRequest { sequences: twice, ..good() }, Reason::InvalidField, "sequences[1].index");
    engine.submit(request(prompt(60), at_most(5)));
    engine.run();
    assert_eq!(engine.ends(fine)[0].1, FinishReason::Length);
}

/// BEHAVIOUR 4.4.
#[test]
fn a_full_queue_refuses_with_a_hint_from_what_was_measured() {
    let mut engine = Engine::new(SchedulerConfig { slots: 1, step_rows: 100, ..config() });
    engine.submit(request(prompt(100), at_most(1)));
    engine.run();
    // Measured: 100 tokens in 0.1 s. One runs, four wait with 200 tokens each.
    let long = |i: u32| request((i * 1_000..).take(200).collect(), at_most(5));
    engine.submit(long(0));
    engine.step();
    for i in 1..=4 {
        let number = engine.submit(long(i));
        assert_eq!(engine.refusal(number), None);
    }
    let refused = engine.submit(long(5));
    let retry_ms = NonZeroU64::new(800).unwrap();
    assert_eq!(engine.refusal(refused), Some(&Refusal::QueueFull { waiting: 4, retry_ms }));
    assert_eq!(engine.scheduler.load().uncached_tokens_waiting, 800 + 99);
    engine.run();
}

#[test]
fn deadlines_are_kept_or_refused() {
    let mut engine = Engine::new(SchedulerConfig { slots: 1, step_rows: 100, ..config() });
    let within = |ms, new: NewRequest| NewRequest { deadline: Some(Duration::from_millis(ms)), ..new };
    let running = engine.submit(within(500, request(prompt(100), at_most(50))));
    let waiting = engine.submit(within(300, request(prompt(150), at_most(50))));
    engine.step();
    engine.step();
    // 1,000 tokens a second; 150 wait before it, counted when they came.
    let refused = engine.submit(within(349, request((5_000..).take(200).collect(), at_most(1))));
    let unreachable = Refusal::DeadlineUnreachable { deadline_ms: 349, estimate_ms: 350 };
    assert_eq!(engine.refusal(refused), Some(&unreachable));
    let past = engine.submit(within(0, request(prompt(1), at_most(1))));
    assert_eq!(engine.refusal(past).unwrap().reason(), Reason::DeadlineUnreachable);
    let reachable = engine.submit(within(20_000, request((5_000..).take(200).collect(), at_most(1))));
    engine.now = Duration::from_millis(300);
    engine.step();
    assert_eq!(engine.refusal(waiting), Some(&Refusal::DeadlineExceeded { output_tokens: 0 }));
    engine.now = Duration::from_millis(500);
    engine.run();
    assert_eq!(engine.refusal(running), Some(&Refusal::DeadlineExceeded { output_tokens: 3 }));
    assert_eq!(engine.ends(reachable)[0].1, FinishReason::Length);
}

/// BEHAVIOUR 6.5: against a stream of higher priorities that never ends.
#[test]
fn the_lowest_priority_is_admitted_within_a_bounded_number_of_steps() {
    let mut engine = Engine::new(SchedulerConfig { slots: 1, ..config() });
    let with = |priority, max| request(prompt(20), RawParams { priority: Some(priority), ..at_most(max) });
    let low = engine.submit(with(7, 3));
    let mut steps = 0;
    while engine.admitted(low).is_none() {
        while engine.scheduler.load().waiting < 4 {
            engine.submit(with(0, 3));
        }
        engine.step();
        steps += 1;
        assert!(steps <= 7 * AGEING_STEPS + 4, "starved");
    }
    assert!(steps > 7 * AGEING_STEPS - 4, "it is the lowest all the same");
}

#[test]
fn first_come_first_served_and_nobody_overtakes_a_large_head() {
    let mut engine = Engine::new(SchedulerConfig { blocks: 8, ..config() });
    let running = engine.submit(request(prompt(64), at_most(20)));
    engine.step();
    let large = engine.submit(request((900..980).collect(), at_most(4)));
    let small = engine.submit(request((700..710).collect(), at_most(4)));
    let urgent = engine.submit(request((600..610).collect(), RawParams { priority: Some(0), ..at_most(4) }));
    engine.run();
    let admission = |number| {
        engine.events.iter().position(|e| matches!(e, Event::Admitted { request, .. } if *request == number))
    };
    let order = [running, large, small, urgent].map(admission);
    assert!(order.is_sorted() && order[0].is_some(), "{order:?}");
}

/// BEHAVIOUR 6.4, SAFETY 20.
#[test]
fn a_nan_ends_its_request_alone_and_its_blocks_are_zeroed() {
    let mut engine = Engine::new(SchedulerConfig { blocks: 10, ..config() });
    engine.submit(request(prompt(32), at_most(1)));
    engine.run();
    let neighbour = engine.submit(request((900..940).collect(), at_most(30)));
    let broken = engine.submit(request(prompt(60), at_most(30)));
    let plan = engine.step().unwrap();
    let slot = plan.fills[1].slot.0;
    let own: Vec<BlockId> = plan.spans[1].new_blocks[2..].to_vec();
    assert_eq!(engine.blocks_cached(), 2 + 2 + 1);
    let nan = |s: u32| if s == slot { Draw::NotFinite } else { Draw::Token(9) };
    engine.step_with(|plan| outcome(plan, nan));
    assert_eq!(engine.refusal(broken), Some(&Refusal::NumericalError { position: 1 }));
    assert_eq!(engine.blocks_cached(), 2 + 2, "what others had computed stays");
    let mut plans = engine.run();
    assert_eq!(engine.ends(neighbour)[0].1, FinishReason::Length);
    let next = engine.submit(request((2_000..).take(140).collect(), at_most(20)));
    plans.extend(engine.run());
    assert_eq!(engine.ends(next)[0].1, FinishReason::Length);
    let mut zeroed: Vec<BlockId> = plans.iter().flat_map(|plan| plan.zeroes.clone()).collect();
    zeroed.sort();
    let mut own = own;
    own.sort();
    assert_eq!(zeroed, own);
}

#[test]
fn masks_that_leave_nothing_end_the_request() {
    let mut engine = Engine::new(config());
    let number = engine.submit(request(prompt(5), RawParams { n: Some(2), ..at_most(9) }));
    engine.step();
    engine.step_with(|plan| outcome(plan, |_| Draw::NoneAllowed));
    assert_eq!(engine.refusal(number), Some(&Refusal::NoTokenAllowed { position: 1 }));
    assert_eq!(engine.tokens(number), 1);
    engine.run();
}

#[test]
fn two_steps_are_in_flight_and_the_second_takes_what_the_first_draws() {
    let mut engine = Engine::new(config());
    let number = engine.submit(request(prompt(20), at_most(3)));
    let first = engine.scheduler.plan(engine.now).unwrap();
    let second = engine.scheduler.plan(engine.now).unwrap();
    assert!(engine.scheduler.plan(engine.now).is_none(), "two are in flight");
    let span = &second.spans[0];
    assert_eq!((span.start, span.len, span.input), (20, 1, SpanInput::LastSampled));
    engine.scheduler.apply(nines(&first)).unwrap();
    let third = engine.scheduler.plan(engine.now).unwrap();
    engine.scheduler.apply(nines(&second)).unwrap();
    assert!(engine.scheduler.plan(engine.now).is_none(), "the third token is the last");
    engine.scheduler.apply(nines(&third)).unwrap();
    engine.hear();
    assert_eq!((engine.tokens(number), engine.scheduler.is_idle()), (3, true));

    // It ends with EOS while a step that still computes it is in flight: its blocks wait for that one.
    engine.submit(request(prompt(20), at_most(3)));
    let first = engine.scheduler.plan(engine.now).unwrap();
    let second = engine.scheduler.plan(engine.now).unwrap();
    engine.scheduler.apply(outcome(&first, |_| Draw::Token(EOS))).unwrap();
    assert_eq!((engine.scheduler.pool().in_limbo(), engine.scheduler.load().running), (2, 0));
    engine.scheduler.apply(nines(&second)).unwrap();
    assert_eq!((engine.scheduler.pool().in_limbo(), engine.scheduler.counters().tokens_dropped), (0, 1));
}

#[test]
fn blocks_that_a_step_in_flight_still_touches_are_waited_for_not_taken_from_others() {
    let mut engine = Engine::new(SchedulerConfig { blocks: 7, ..config() });
    // Three prompts on two blocks each: at position 32 each asks for a third, and one is left.
    for from in [1_000, 2_000, 3_000] {
        engine.submit(request((from..).take(30).collect(), at_most(20)));
    }
    let mut in_flight = VecDeque::from([engine.scheduler.plan(engine.now).unwrap()]);
    let mut spans = Vec::new();
    for _ in 0..4 {
        let plan = engine.scheduler.plan(engine.now).unwrap();
        spans.push(plan.spans.len());
        in_flight.push_back(plan);
        engine.scheduler.apply(nines(&in_flight.pop_front().unwrap())).unwrap();
        engine.hear();
    }
    // The first takes it, the third gives way, and the second, whose block a step in flight may still touch, waits for
    // that one: it loses a step and not its blocks.
    assert_eq!(spans, [3, 3, 1, 2]);
    assert_eq!((engine.scheduler.counters().preemptions, engine.scheduler.load().running), (1, 2));
}

#[test]
fn an_outcome_that_was_not_planned_is_a_fault() {
    let mut engine = Engine::new(SchedulerConfig { step_rows: 16, ..config() });
    engine.submit(request(prompt(10), at_most(3)));
    engine.submit(request(prompt(10), at_most(3)));
    let plan = engine.scheduler.plan(engine.now).unwrap();
    let good = nines(&plan);
    assert_eq!((plan.spans.len(), good.tokens.len()), (2, 1), "the second prompt's chunk draws nothing");
    let mut check = |outcome: StepOutcome, says: &str| {
        let fault = engine.scheduler.apply(outcome).expect_err(says);
        assert!(fault.to_string().contains(says), "{fault}");
    };
    check(StepOutcome { step: StepNumber(7), ..good.clone() }, "is of step 7");
    check(StepOutcome { tokens: Vec::new(), ..good.clone() }, "span Some(0) expected");
    check(
        StepOutcome { tokens: [good.tokens.clone(), good.tokens.clone()].concat(), ..good.clone() },
        "span None",
    );
    let other = SampledToken { span: 1, ..good.tokens[0].clone() };
    check(StepOutcome { tokens: vec![other], ..good.clone() }, "next is of span Some(1)");
    engine.scheduler.apply(good.clone()).unwrap();
    let late = engine.scheduler.apply(good).unwrap_err();
    assert!(matches!(late, OutcomeFault::WrongStep { expected: None, .. }));
}

#[test]
fn when_the_runner_is_lost_every_request_ends_once() {
    let mut engine = Engine::new(SchedulerConfig { slots: 2, ..config() });
    let numbers: Vec<_> =
        (0..4).map(|_| engine.submit(request(prompt(20), RawParams { n: Some(2), ..at_most(9) }))).collect();
    engine.step();
    engine.step();
    engine.scheduler.refuse_all(&Refusal::Internal);
    engine.hear();
    for number in numbers {
        assert_eq!(engine.refusal(number), Some(&Refusal::Internal));
        assert!(engine.ends(number).is_empty());
    }
    assert_eq!((engine.scheduler.is_idle(), engine.scheduler.pool().available()), (true, 64));
}

#[test]
fn a_configuration_that_cannot_work_is_named() {
    let check = |config: SchedulerConfig, says: &str| {
        let fault = config.check_served().expect_err(says);
        assert_eq!(fault.to_string(), says);
    };
    config().check_served().unwrap();
    check(SchedulerConfig { block_size: 8, ..config() }, "block size must be from 16 to 256, not 8");
    check(SchedulerConfig { block_size: 48, ..config() }, "block size must be a power of two, not 48");
    check(SchedulerConfig { blocks: 0, ..config() }, "blocks must be from 1 to 4294967294, not 0");
    check(SchedulerConfig { slots: 0, ..config() }, "slots must be from 1 to 4096, not 0");
    check(SchedulerConfig { step_rows: 7, ..config() }, "rows of a step must be from 8 to 65536, not 7");
    check(SchedulerConfig { queue: 0, ..config() }, "queue must be from 1 to 4294967295, not 0");
    assert!(Scheduler::new(SchedulerConfig { step_rows: 7, ..config() }).is_err());
}
