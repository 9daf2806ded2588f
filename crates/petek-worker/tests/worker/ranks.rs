//! The real runner: its tickets, and a worker on the demo model.

use std::sync::Arc;

use petek_core::ids::{BlockId, SlotId, StepNumber};
use petek_core::params::{ModelLimits, RawParams, SamplingDefaults};
use petek_core::plan::{Draw, SlotFill, Span, SpanInput, SpanSample, StepPlan};
use petek_core::scheduler::{Event, NewRequest, NewSequence, Scheduler, SchedulerConfig};
use petek_core::seed::sequence_seed;
use petek_model::folder::{ModelFolder, Texts};
use petek_model::rank::LogitsHash;
use petek_model::replica::{CpuModel, CpuOptions, ReplicaOptions};
use petek_worker::ranks::RankRunner;
use petek_worker::runner::{RunnerFault, StepRunner};

use super::support::{Ask, Shape};

const VOCABULARY: u32 = 1_024;

fn runner(config: &SchedulerConfig, tp: usize) -> RankRunner {
    let texts =
        Texts { config: include_bytes!("../../../petek/demo/config.json").to_vec(), ..Texts::default() };
    let folder =
        ModelFolder::embedded("demo", texts, include_bytes!("../../../petek/demo/model.safetensors"))
            .unwrap();
    let options = CpuOptions { format: None, tp, context: 512, vocabulary_drawn: VOCABULARY as usize };
    let options_of_replica = ReplicaOptions {
        threads: tp,
        threads_beside: 0,
        block_tokens: config.block_size as usize,
        blocks: config.blocks as usize,
        slots: config.slots as usize,
        step_rows: config.step_rows as usize,
        logits_hash: LogitsHash::Off,
    };
    let model = Arc::new(CpuModel::new(folder, options).unwrap());
    RankRunner::new(model.start(options_of_replica).unwrap())
}

fn config() -> SchedulerConfig {
    SchedulerConfig { blocks: 32, block_size: 16, slots: 4, step_rows: 32, ..Shape::default().scheduler }
}

fn limits() -> ModelLimits {
    let defaults = SamplingDefaults::BUILT_IN;
    ModelLimits { vocabulary: VOCABULARY, context_tokens: 512, eos_ids: [].into(), defaults }
}

#[test]
fn tickets_are_collected_in_order_and_two_steps_are_in_flight_at_most() {
    let mut runner = runner(&config(), 1);
    let params = RawParams { temperature: Some(0.0), ..RawParams::default() }.check(&limits(), 0).unwrap();
    let fill = SlotFill {
        slot: SlotId(0),
        ids: [5, 6, 7].into(),
        prompt_tokens: 3,
        sampling: Arc::new(params.slot_sampling(0)),
    };
    let span = |start, len, input, blocks: &[u32]| Span {
        slot: SlotId(0),
        start,
        len,
        input,
        drafts: Vec::new(),
        new_blocks: blocks.iter().copied().map(BlockId).collect(),
        sample: SpanSample::Draw,
    };
    let plan = |step, fills, spans| StepPlan { step: StepNumber(step), fills, spans, ..StepPlan::default() };
    let first = runner.submit(&plan(1, vec![fill], vec![span(0, 3, SpanInput::Ids, &[0])])).unwrap();
    let second = runner.submit(&plan(2, vec![], vec![span(3, 1, SpanInput::LastSampled, &[])])).unwrap();
    let third = plan(3, vec![], vec![span(4, 1, SpanInput::LastSampled, &[])]);
    assert!(matches!(runner.submit(&third), Err(RunnerFault::TooManyInFlight { in_flight: 2, .. })));
    assert!(matches!(runner.collect(second), Err(RunnerFault::WrongTicket { .. })));
    let first = runner.collect(first).unwrap();
    assert_eq!((first.step, first.tokens.len()), (StepNumber(1), 1));
    assert!(matches!(first.tokens[0].draw, Draw::Token(_)) && first.seconds > 0.0);
    // There is room again.
    let third = runner.submit(&third).unwrap();
    assert_eq!(runner.collect(petek_worker::runner::Ticket(StepNumber(2))).unwrap().step, StepNumber(2));
    assert_eq!(runner.collect(third).unwrap().step, StepNumber(3));
    assert!(matches!(
        runner.submit(&plan(4, vec![], vec![span(9, 1, SpanInput::Ids, &[])])),
        Err(RunnerFault::Device { .. })
    ));
}

fn asks() -> Vec<Ask> {
    let ask = |at: u32| {
        let raw = RawParams {
            temperature: Some(1.5),
            seed: Some(u64::from(at) * 77),
            max_tokens: Some(20),
            n: Some(1 + i64::from(at % 2)),
            logprobs: Some(2),
            ..RawParams::default()
        };
        let prompt = (0..10 + 17 * at).map(|i| (at / 3 + 5 * i) % VOCABULARY).collect();
        Ask { prompt, raw, deadline_ms: None }
    };
    (0..6).map(ask).collect()
}

/// What the scheduler and the runner give by themselves, one request at a time.
fn alone(ask: &Ask, scheduler: &mut Scheduler, runner: &mut RankRunner) -> Vec<Vec<u32>> {
    let params = ask.raw.check(&limits(), 0).unwrap();
    let sequence =
        |index| NewSequence { index, seed: sequence_seed(params.seed, index), resumed_ids: Arc::default() };
    let new = NewRequest {
        prompt: ask.prompt.as_slice().into(),
        params: params.clone(),
        max_tokens: 20,
        sequences: (0..params.n).map(sequence).collect(),
        tenant: Vec::new(),
        deadline: None,
    };
    scheduler.submit(new, Default::default());
    let mut texts = vec![Vec::new(); params.n as usize];
    while let Some(plan) = scheduler.plan(Default::default()) {
        let ticket = runner.submit(&plan).unwrap();
        scheduler.apply(runner.collect(ticket).unwrap()).unwrap();
        for event in scheduler.drain_events() {
            if let Event::Token { index, token, .. } = event {
                texts[index as usize].push(token.id);
            }
        }
    }
    texts
}

#[tokio::test]
async fn a_worker_streams_what_the_scheduler_alone_gives() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    let mut one = runner(&config(), 1);
    let expected: Vec<_> = asks().iter().map(|ask| alone(ask, &mut scheduler, &mut one)).collect();
    assert_ne!(expected[1][0], expected[1][1], "its sequences differ");
    for (tp, steps_in_flight) in [(1, 1), (2, 2)] {
        let shape = Shape { scheduler: config(), ..Shape::default() };
        let settings = petek_worker::WorkerSettings { steps_in_flight, ..shape.settings.clone() };
        let shape = Shape { settings, ..shape };
        let house = shape.start_on(Box::new(runner(&config(), tp)), limits()).await;
        let status = house.status().await;
        assert_eq!(
            (status.steps, status.blocks_free, status.blocks_cached),
            (0, 32, 0),
            "the warm-up left no trace"
        );
        let mut router = house.router(1).await;
        for (at, ask) in asks().iter().enumerate() {
            let params = ask.raw.check(&limits(), 0).unwrap();
            router.submit_as(ask.submit_for(&params, 20, at as u64 + 1)).await;
        }
        router.finish().await;
        for (at, texts) in expected.iter().enumerate() {
            for (index, ids) in texts.iter().enumerate() {
                let heard = &router.heard[&(at as u64 + 1, index as u32)];
                assert_eq!((&heard.ids, heard.logprobs), (ids, 20), "request {at} at TP {tp}");
            }
        }
        house.at_rest().await;
        house.stop().await.unwrap();
    }
}
