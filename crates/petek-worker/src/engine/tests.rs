//! The engine by itself, on a clock that the test moves.

use std::collections::HashSet;
use std::sync::Mutex;

use futures::StreamExt;
use petek_core::hash::Revision;
use petek_core::ids::TokenId;
use petek_core::params::{CacheUse, RawParams, SamplingDefaults};
use petek_core::plan::{Draw, StepOutcome, StepPlan};
use petek_core::refusal::Reason;
use petek_core::scheduler::NewSequence;
use petek_proto::blocks::read_names;
use petek_proto::refusal::WireRefusal;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::kv_event::Kind;
use petek_proto::worker::v1::{FinishReason, Finished, Heartbeat, Refused, Usage};
use petek_service::{Outcome, Registry};

use super::*;
use crate::fake::{FakeModel, FakeRunner, NotFinite};
use crate::kv_feed::KvNext;
use crate::outbox::Answers;

const MODEL: FakeModel = FakeModel { vocabulary: 1_000, not_finite: NotFinite::Never };
const LINK: LinkId = LinkId(1);

fn config() -> SchedulerConfig {
    SchedulerConfig {
        revision: Revision([3; 32]),
        blocks: 64,
        block_size: 16,
        slots: 8,
        step_rows: 32,
        queue: 4,
        prefix_cache: CacheUse::Shared,
    }
}

fn limits() -> ModelLimits {
    let defaults = SamplingDefaults::BUILT_IN;
    ModelLimits { vocabulary: 1_000, context_tokens: 1_000, eos_ids: [].into(), defaults }
}

/// Moves the clock by a millisecond with each step.
struct Ticking {
    inner: FakeRunner,
    now: Arc<Mutex<Duration>>,
    /// Steps that may be computed; what comes after fails or waits as said.
    script: Arc<dyn Fn(u64) -> Act + Send + Sync>,
}

#[derive(Clone, Copy)]
enum Act {
    Compute,
    Fail,
    Panic,
}

impl StepRunner for Ticking {
    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, RunnerFault> {
        match (self.script)(plan.step.0) {
            Act::Compute => self.inner.submit(plan),
            Act::Fail => {
                Err(RunnerFault::Device { step: plan.step, cause: "the card fell off the bus".into() })
            }
            Act::Panic => panic!("a bug in a step"),
        }
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutcome, RunnerFault> {
        *self.now.lock().unwrap() += Duration::from_millis(1);
        self.inner.collect(ticket)
    }
}

struct Bench {
    handle: EngineHandle,
    end: EngineEnd,
    answers: Answers,
    now: Arc<Mutex<Duration>>,
    metrics: Arc<WorkerMetrics>,
}

/// An engine on the fake, and its clock.
fn parts(
    model: FakeModel,
    script: impl Fn(u64) -> Act + Send + Sync + 'static,
) -> (EngineParts, Arc<Mutex<Duration>>) {
    let now = Arc::new(Mutex::new(Duration::ZERO));
    let (inner, read) = (FakeRunner::new(model, 64, 16, 8).saying(0.001, 0.0001), now.clone());
    let parts = EngineParts {
        scheduler: config(),
        limits: limits(),
        runner: Box::new(Ticking { inner, now: now.clone(), script: Arc::new(script) }),
        steps_in_flight: 1,
        command_queue: 16,
        numerical_errors_max: 3,
        numerical_error_window: Duration::from_secs(60),
        kv_batch_max: Duration::from_millis(5),
        kv_ring_batches: 64,
        metrics: Arc::new(WorkerMetrics::new(&Registry::new(), "w", "m")),
        clock: Arc::new(move || *read.lock().unwrap()),
    };
    (parts, now)
}

/// Steps of the warm-up come before any request's.
async fn bench(model: FakeModel, script: impl Fn(u64) -> Act + Send + Sync + 'static) -> Bench {
    bench_of(parts(model, script)).await
}

async fn bench_of((parts, now): (EngineParts, Arc<Mutex<Duration>>)) -> Bench {
    let metrics = parts.metrics.clone();
    let (handle, end) = start(parts).await.unwrap();
    let outbox = Outbox::new(1 << 20);
    let attach = Command::Attach { link: LINK, router_id: 77, stream: 1, outbox: outbox.clone() };
    handle.commands.send(attach).await.unwrap();
    let mut answers = Answers::new(Down::Heartbeat(Heartbeat {}), outbox, Duration::from_secs(3_600));
    answers.next().await;
    Bench { handle, end, answers, now, metrics }
}

fn request(prompt: &[TokenId], max_tokens: u32, n: u32) -> Box<NewRequest> {
    let raw =
        RawParams { max_tokens: Some(max_tokens.into()), temperature: Some(0.0), ..RawParams::default() };
    let sequence = |index| NewSequence { index, seed: 0, resumed_ids: Arc::default() };
    Box::new(NewRequest {
        prompt: prompt.into(),
        params: raw.check(&limits(), 0).unwrap(),
        max_tokens,
        sequences: (0..n).map(sequence).collect(),
        tenant: Vec::new(),
        deadline: None,
    })
}

impl Bench {
    fn now(&self) -> Duration {
        *self.now.lock().unwrap()
    }

    async fn submit(&self, dispatch: u64, request: Box<NewRequest>, came: Duration) {
        let request = Ok(request);
        let submit = Command::Submit { link: LINK, dispatch, request, came, span: Span::none() };
        self.handle.commands.send(submit).await.unwrap();
    }

    async fn next(&mut self) -> Down {
        self.answers.next().await.expect("the stream goes on").expect("without an error").message.unwrap()
    }

    async fn finished(&mut self) -> Finished {
        loop {
            if let Down::Finished(finished) = self.next().await {
                return finished;
            }
        }
    }
}

#[tokio::test]
async fn usage_says_how_long_each_part_took() {
    let mut bench = bench(MODEL, |_| Act::Compute).await;
    *bench.now.lock().unwrap() = Duration::from_millis(500);
    // 100 tokens at 32 rows a step are 4 steps, the last of which draws; 3 more tokens are 3 more steps.
    bench.submit(1, request(&[5; 100], 4, 1), Duration::from_millis(490)).await;
    let Down::Admitted(admitted) = bench.next().await else { panic!("admitted first") };
    assert_eq!((admitted.dispatch, admitted.cached_tokens, admitted.queue_ms), (1, 0, 10.0));
    let finished = bench.finished().await;
    let usage = Usage {
        prompt_tokens: 100,
        completion_tokens: 4,
        queue_ms: 10.0,
        prefill_ms: 4.0,
        decode_ms: 3.0,
        ..Usage::default()
    };
    assert_eq!((finished.reason(), finished.usage), (FinishReason::Length, Some(usage)));
    // What was cached the second time is the whole of its full blocks.
    bench.submit(2, request(&[5; 100], 1, 1), bench.now()).await;
    let finished = bench.finished().await.usage.unwrap();
    assert_eq!((finished.cached_tokens, finished.prefill_ms, finished.decode_ms), (96, 1.0, 0.0));
    assert_eq!(bench.metrics.requests.of(Outcome::Finished).get(), 2);
    assert_eq!((bench.metrics.prompt_tokens.get(), bench.metrics.cached_tokens.get()), (200, 96));
}

#[tokio::test]
async fn a_warm_up_primes_the_rates_and_leaves_nothing_behind() {
    let bench = bench(MODEL, |_| Act::Compute).await;
    let report = bench.handle.report.borrow().clone();
    assert_eq!((report.counters, report.blocks_cached, report.kv_seq), Default::default());
    assert_eq!((report.load.blocks_free, report.requests), (64, 0));
    // A step says 1 ms and 0.1 ms a row: a prefill of 32 rows 4.2 ms.
    let rate = report.load.prefill_tokens_per_s.unwrap();
    assert!((rate - 32.0 / 0.0042).abs() < 1.0, "{rate}");
    let slope = report.load.step_one_more_s.unwrap() - report.load.step_s.unwrap();
    assert!((slope - 0.0001).abs() < 1e-6, "{slope}");
    assert_eq!(bench.handle.kv.held().seq, 0);
    assert_eq!(bench.metrics.steps.get(), 0);
}

#[tokio::test]
async fn a_step_that_fails_ends_everything_with_a_status() {
    for act in [Act::Fail, Act::Panic] {
        // The warm-up has fewer steps than that.
        let script = move |step| if step == 60 { act } else { Act::Compute };
        let mut bench = bench(MODEL, script).await;
        bench.submit(1, request(&[5; 10], 400, 2), Duration::ZERO).await;
        let mut failed = Vec::new();
        let end = loop {
            match bench.answers.next().await.expect("it ends with a status") {
                Ok(message) => {
                    if let Some(Down::Finished(finished)) = message.message {
                        failed.push(finished);
                    }
                }
                Err(end) => break end,
            }
        };
        assert_eq!((failed.len(), WireRefusal::read(&end).unwrap().reason), (2, "WORKER_LOST".into()));
        for finished in failed {
            assert_eq!(finished.reason(), FinishReason::Failed);
            let refusal = WireRefusal::read_rpc(finished.error.as_ref().unwrap()).unwrap();
            assert_eq!(refusal.known_reason(), Some(Reason::WorkerLost));
            let usage = finished.usage.unwrap();
            assert_eq!(refusal.number("output_tokens"), Some(u64::from(usage.completion_tokens)));
            assert!(usage.completion_tokens > 0 || matches!(act, Act::Panic), "what it took is said");
        }
        let fault = bench.end.await.unwrap().unwrap_err().to_string();
        let says = if matches!(act, Act::Fail) { "the card fell off the bus" } else { "a bug in a step" };
        assert!(fault.contains(says), "{fault}");
        assert!(bench.handle.commands.is_closed());
        assert_eq!(bench.metrics.requests.of(Outcome::Failed).get(), 1);
        assert!(bench.answers.next().await.is_none());
    }
}

#[tokio::test]
async fn a_runner_that_fails_in_the_warm_up_is_no_worker() {
    let (failing, _) = parts(MODEL, |_| Act::Fail);
    let fault = start(failing).await.err().expect("it fails").to_string();
    assert!(fault.contains("the card fell off the bus"), "{fault}");
    let (sound, _) = parts(MODEL, |_| Act::Compute);
    let none = EngineParts { scheduler: SchedulerConfig { slots: 0, ..config() }, ..sound };
    assert!(matches!(start(none).await.err().expect("it fails"), EngineFault::Config(_)));
}

/// What a plan evicts is told with an outcome after it; a snapshot is of neither more nor less than its batch.
#[tokio::test]
async fn a_snapshot_is_what_its_batch_says_whatever_is_in_flight() {
    let (parts, now) = parts(MODEL, |_| Act::Compute);
    let scheduler = SchedulerConfig { blocks: 12, ..config() };
    let parts = EngineParts {
        scheduler,
        steps_in_flight: 2,
        // One command a step: they fall between steps as they come.
        command_queue: 1,
        kv_ring_batches: 100_000,
        ..parts
    };
    let bench = bench_of((parts, now)).await;
    let (mut evictions, mut seq, mut blocks) = (0, 0, HashSet::new());
    for dispatch in 1..300 {
        bench.submit(dispatch, request(&[dispatch as TokenId; 70], 40, 1), bench.now()).await;
        let (asks, answer) = oneshot::channel();
        bench.handle.commands.send(Command::Snapshot(asks)).await.unwrap();
        let snapshot = answer.await.unwrap();
        while seq < snapshot.seq {
            let KvNext::Batch(at, batch) = bench.handle.kv.next(seq) else { panic!("batch {seq} is kept") };
            seq = at;
            for event in batch.events {
                match event.kind.unwrap() {
                    Kind::Stored(stored) => blocks.extend(read_names("", &stored.blocks).unwrap()),
                    Kind::Removed(removed) => {
                        for block in read_names("", &removed.blocks).unwrap() {
                            assert!(blocks.remove(&block));
                            evictions += 1;
                        }
                    }
                    Kind::Cleared(_) => panic!("nothing is cleared"),
                }
            }
        }
        assert_eq!(snapshot.blocks.iter().map(|(_, block)| *block).collect::<HashSet<_>>(), blocks);
    }
    assert!(evictions > 20, "{evictions} evictions");
}

/// SAFETY 20: three within a minute, and not two and then one.
#[tokio::test]
async fn requests_that_break_the_numbers_end_alone_and_too_many_make_the_engine_sick() {
    let model = FakeModel { not_finite: NotFinite::OneIn(7), ..MODEL };
    let sampling = request(&[1], 1, 1).params.slot_sampling_seeded(0);
    let first = |id: TokenId| model.expected(&[id], &[], &sampling, 1)[0];
    let broken: Vec<TokenId> = (0..1_000).filter(|id| first(*id) == Draw::NotFinite).take(5).collect();
    let mut bench = bench(model, |_| Act::Compute).await;
    let second = |s: u64| Duration::from_secs(s);
    for (dispatch, at, is_sick) in [(1, 1, false), (2, 30, false), (3, 62, false), (4, 80, true)] {
        *bench.now.lock().unwrap() = second(at);
        bench.submit(dispatch, request(&[broken[dispatch as usize]], 5, 1), second(at)).await;
        let finished = bench.finished().await;
        let refusal = WireRefusal::read_rpc(finished.error.as_ref().unwrap()).unwrap();
        assert_eq!(
            (finished.reason(), refusal.known_reason()),
            (FinishReason::Failed, Some(Reason::NumericalError))
        );
        let mut report = bench.handle.report.clone();
        report.wait_for(|report| report.requests == 0).await.unwrap();
        let sick = futures::poll!(std::pin::pin!(bench.handle.sick.notified())).is_ready();
        assert_eq!(sick, is_sick, "at {at} s");
    }
    assert_eq!(bench.metrics.numerical_errors.get(), 4);
}

#[tokio::test]
async fn what_is_refused_was_never_taken() {
    let mut bench = bench(MODEL, |_| Act::Compute).await;
    let refused = async |bench: &mut Bench| loop {
        if let Down::Refused(Refused { dispatch, status }) = bench.next().await {
            return (dispatch, WireRefusal::read_rpc(&status.unwrap()).unwrap().known_reason().unwrap());
        }
    };
    bench.submit(1, request(&[5; 900], 200, 1), Duration::ZERO).await;
    assert_eq!(refused(&mut bench).await, (1, Reason::PoolExceeded));
    let overdue = NewRequest { deadline: Some(Duration::ZERO), ..*request(&[5], 2, 1) };
    bench.submit(2, Box::new(overdue), Duration::ZERO).await;
    assert_eq!(refused(&mut bench).await, (2, Reason::DeadlineUnreachable));
    bench.handle.commands.send(Command::Drain).await.unwrap();
    bench.submit(3, request(&[5], 2, 1), Duration::ZERO).await;
    assert_eq!(refused(&mut bench).await, (3, Reason::Draining));
    let mut report = bench.handle.report.clone();
    let report = report
        .wait_for(|report| report.routers.first().is_some_and(|r| r.dispatch == 3))
        .await
        .unwrap()
        .clone();
    assert_eq!((report.requests, report.waiting, report.intake), (0, 0, Intake::Closed));
    bench.handle.commands.send(Command::Stop).await.unwrap();
    assert!(bench.answers.next().await.is_none(), "a clean end");
    assert!(bench.end.await.unwrap().is_ok());
    assert_eq!(bench.metrics.requests.of(Outcome::Refused).get(), 3);
}
