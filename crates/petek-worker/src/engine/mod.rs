//! The engine: scheduler and runner on one named thread.
//!
//! ```text
//!  Execute streams ──commands (bounded)──▶ ┌ obey all that wait ┐
//!                                          │ plan ─▶ submit     │──▶ outboxes, one push per step and router
//!                                          │ collect ─▶ apply   │──▶ KV feed
//!                                          └ report             ┘──▶ load, status
//! ```
//! It waits for nobody but the runner and, when there is nothing to compute, for the next command. Whatever ends it,
//! each stream hears of it: a fault of the runner and a panic end all requests with WORKER_LOST, and then the worker.

mod desk;

mod report;

mod warm_up;

#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use petek_core::params::ModelLimits;
use petek_core::refusal::Refusal;
use petek_core::scheduler::{ConfigFault, Event, NewRequest, OutcomeFault, Scheduler, SchedulerConfig};
use petek_service::{BlockState, SequenceState, WorkerMetrics};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::Span;

pub(crate) use self::report::{EngineReport, Intake};

use self::desk::{Arrival, Desk, Live};
use crate::kv_feed::{KvBatcher, KvFeed, KvSnapshot};
use crate::outbox::Outbox;
use crate::runner::{RunnerFault, StepRunner, Ticket};
use crate::service::lost;

/// A monotonic clock of any origin.
pub(crate) type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// When a client may try another worker: at once, but not in a tight loop.
const DRAINING_RETRY_MS: std::num::NonZeroU64 = std::num::NonZeroU64::new(100).unwrap();

/// More rounds than this without a plan are no accident: the scheduler promises that something always advances.
const ROUNDS_STALLED_MAX: u32 = 8;

/// Names an Execute stream of this worker; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LinkId(pub(crate) u64);

/// What the engine is told.
pub(crate) enum Command {
    /// A stream has greeted.
    Attach { link: LinkId, router_id: u64, stream: u32, outbox: Arc<Outbox> },
    /// A request of a stream, or why it is none. `came` is on the engine's clock.
    Submit {
        link: LinkId,
        dispatch: u64,
        request: Result<Box<NewRequest>, Refusal>,
        came: Duration,
        span: Span,
    },
    /// Ends sequences early; none named: all.
    Cancel { link: LinkId, dispatch: u64, indexes: Vec<u32> },
    /// A stream is gone, and its requests with it.
    Detach { link: LinkId },
    /// Asks for all blocks that can be found.
    Snapshot(oneshot::Sender<KvSnapshot>),
    /// Refuse all that comes from now on.
    Drain,
    /// End all that runs.
    EndAll(Refusal),
    /// End the streams and the thread.
    Stop,
}

/// What an engine is made of.
pub(crate) struct EngineParts {
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) limits: ModelLimits,
    pub(crate) runner: Box<dyn StepRunner + Send>,
    pub(crate) steps_in_flight: usize,
    pub(crate) command_queue: usize,
    pub(crate) numerical_errors_max: usize,
    pub(crate) numerical_error_window: Duration,
    pub(crate) kv_batch_max: Duration,
    pub(crate) kv_ring_batches: usize,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) clock: Clock,
}

/// A running engine, as the rest of the worker has it.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) report: watch::Receiver<EngineReport>,
    pub(crate) kv: Arc<KvFeed>,
    /// Notified when too many requests broke the numbers.
    pub(crate) sick: Arc<Notify>,
    pub(crate) clock: Clock,
}

/// How an engine ended, once it has.
pub(crate) type EngineEnd = oneshot::Receiver<Result<(), EngineFault>>;

/// Why an engine could not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineFault {
    #[error("the scheduler's configuration: {0}")]
    Config(#[from] ConfigFault),
    #[error("start the engine's thread: {0}")]
    Thread(#[source] std::io::Error),
    #[error("{}", chain(.0))]
    Runner(#[from] RunnerFault),
    #[error("the runner's outcome is not what was planned: {0}")]
    Outcome(#[from] OutcomeFault),
    #[error("a bug: {requests} requests are open and nothing can be planned")]
    Stalled { requests: usize },
    #[error("a bug: the engine panicked: {0}")]
    Panic(String),
}

/// Starts an engine and warms it up. Returns once it takes requests.
///
/// # Errors
/// A configuration that cannot be, no thread, a runner that fails in the warm-up.
pub(crate) async fn start(parts: EngineParts) -> Result<(EngineHandle, EngineEnd), EngineFault> {
    let scheduler = Scheduler::new(parts.scheduler.clone())?;
    let (commands, inbox) = mpsc::channel(parts.command_queue);
    let (report, reported) = watch::channel(EngineReport::default());
    let (is_warm, warm) = oneshot::channel();
    let (ends, ended) = oneshot::channel();
    let kv = KvFeed::new(parts.kv_ring_batches);
    let sick = Arc::new(Notify::new());
    let handle = EngineHandle {
        commands,
        report: reported,
        kv: kv.clone(),
        sick: sick.clone(),
        clock: parts.clock.clone(),
    };
    let engine = Engine {
        scheduler,
        runner: parts.runner,
        clock: parts.clock,
        inbox,
        commands_at_once: parts.command_queue,
        steps_in_flight: parts.steps_in_flight,
        tickets: VecDeque::new(),
        desk: Desk::new(parts.metrics.clone()),
        kv: KvBatcher::new(kv, parts.kv_batch_max),
        intake: Intake::Open,
        report,
        metrics: parts.metrics,
        preemptions_counted: 0,
        numerical_errors: VecDeque::new(),
        idle_since: None,
        numerical_errors_max: parts.numerical_errors_max,
        numerical_error_window: parts.numerical_error_window,
        sick,
        step: 0,
        rounds_stalled: 0,
    };
    let limits = parts.limits;
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            // Whoever waits for it may be gone.
            let _ = ends.send(engine.live(&limits, is_warm));
        })
        .map_err(EngineFault::Thread)?;
    match warm.await {
        Ok(()) => Ok((handle, ended)),
        Err(_) => Err(match ended.await {
            Ok(Err(fault)) => fault,
            _ => EngineFault::Panic("in its warm-up".into()),
        }),
    }
}

struct Engine {
    scheduler: Scheduler,
    runner: Box<dyn StepRunner + Send>,
    clock: Clock,
    inbox: mpsc::Receiver<Command>,
    /// The most commands between two steps, so that a flood of them does not keep the batch waiting.
    commands_at_once: usize,
    steps_in_flight: usize,
    /// Steps in flight, and when each was planned.
    tickets: VecDeque<(Ticket, Duration)>,
    desk: Desk,
    kv: KvBatcher,
    intake: Intake,
    report: watch::Sender<EngineReport>,
    metrics: Arc<WorkerMetrics>,
    preemptions_counted: u64,
    /// When requests broke the numbers, lately.
    numerical_errors: VecDeque<Duration>,
    /// Since when there is nothing to compute.
    idle_since: Option<Duration>,
    numerical_errors_max: usize,
    numerical_error_window: Duration,
    sick: Arc<Notify>,
    /// The last one collected.
    step: u64,
    /// Rounds in a row in which nothing was planned or collected though requests are open.
    rounds_stalled: u32,
}

/// Whether the engine goes on.
enum Flow {
    On,
    /// Something was asked of it.
    Obeyed,
    Stop,
}

impl Engine {
    /// The thread's whole life.
    fn live(mut self, limits: &ModelLimits, is_warm: oneshot::Sender<()>) -> Result<(), EngineFault> {
        let run = AssertUnwindSafe(|| {
            warm_up::warm_up(&mut self.scheduler, &mut *self.runner, limits)?;
            self.tell();
            // Without anyone who waits, the commands end too.
            let _ = is_warm.send(());
            self.run()
        });
        let ended = catch_unwind(run).unwrap_or_else(|panic| Err(EngineFault::Panic(panic_text(&*panic))));
        // Whatever state a panic left the rest in: this looks at the desk alone.
        let closing = AssertUnwindSafe(|| {
            if let Err(fault) = &ended {
                tracing::error!(%fault, "the engine failed: all requests end, and the worker");
                let now = (self.clock)();
                self.desk.abandon(&Refusal::WorkerLost { output_tokens: 0 }, now);
            }
            self.desk.end_streams(&match &ended {
                Ok(()) => Ok(()),
                Err(_) => Err(lost("the worker's engine failed; its log says why")),
            });
        });
        match catch_unwind(closing) {
            Ok(()) => ended,
            Err(panic) => Err(EngineFault::Panic(panic_text(&*panic))),
        }
    }

    fn run(&mut self) -> Result<(), EngineFault> {
        loop {
            match self.obey_all() {
                Flow::Stop => return Ok(()),
                Flow::Obeyed => {
                    self.deliver();
                    // Before the step, which may be long: routers add to this report what it does not include.
                    self.tell();
                }
                Flow::On => {}
            }
            let stepped = self.step();
            if stepped.is_err() {
                // With what each sequence took; what the scheduler cannot say any more, the desk does.
                self.scheduler.refuse_all(&Refusal::WorkerLost { output_tokens: 0 });
                self.deliver();
            }
            self.tell();
            stepped?;
        }
    }

    /// Obeys what waits; while there is nothing to compute, sleeps until something comes.
    fn obey_all(&mut self) -> Flow {
        let is_idle = self.scheduler.is_idle() && self.tickets.is_empty();
        let first = if is_idle {
            self.kv.flush();
            self.tell();
            // All senders gone: nobody can ask for anything any more.
            let Some(first) = self.inbox.blocking_recv() else { return Flow::Stop };
            Some(first)
        } else {
            self.inbox.try_recv().ok()
        };
        let Some(first) = first else { return Flow::On };
        let rest = std::iter::from_fn(|| self.inbox.try_recv().ok()).take(self.commands_at_once - 1);
        let commands: Vec<Command> = std::iter::once(first).chain(rest).collect();
        let mut snapshots = Vec::new();
        for command in commands {
            match command {
                Command::Stop => return Flow::Stop,
                Command::Snapshot(asked) => snapshots.push(asked),
                other => self.obey(other),
            }
        }
        self.answer_snapshots(snapshots);
        Flow::Obeyed
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach { link, router_id, stream, outbox } => {
                self.desk.attach(link, router_id, stream, outbox);
            }
            Command::Submit { link, dispatch, request, came, span } => {
                self.submit(Arrival { link, dispatch, came, span }, request);
            }
            Command::Cancel { link, dispatch, indexes } => {
                if let Some(number) = self.desk.number(link, dispatch) {
                    self.scheduler.cancel(number, (!indexes.is_empty()).then_some(&indexes));
                }
            }
            Command::Detach { link } => {
                for number in self.desk.detach(link) {
                    self.scheduler.cancel(number, None);
                }
            }
            Command::Drain => self.intake = Intake::Closed,
            Command::EndAll(refusal) => self.scheduler.refuse_all(&refusal),
            Command::Snapshot(_) | Command::Stop => unreachable!("taken out before"),
        }
    }

    fn submit(&mut self, arrival: Arrival, request: Result<Box<NewRequest>, Refusal>) {
        if !self.desk.expect(&arrival) {
            return;
        }
        let new = match (request, self.intake) {
            (Ok(new), Intake::Open) => new,
            (Ok(_), Intake::Closed) => {
                return self.desk.refuse(&arrival, &Refusal::Draining { retry_ms: DRAINING_RETRY_MS });
            }
            (Err(refusal), _) => return self.desk.refuse(&arrival, &refusal),
        };
        let live = Live::new(arrival, &new);
        let number = self.scheduler.submit(*new, (self.clock)());
        self.desk.open(number, live);
    }

    /// Plans and submits while steps may be in flight, and collects the oldest.
    fn step(&mut self) -> Result<(), EngineFault> {
        let mut moves = false;
        while self.tickets.len() < self.steps_in_flight {
            let now = (self.clock)();
            let plan = self.scheduler.plan(now);
            self.deliver();
            let Some(plan) = plan else { break };
            self.tickets.push_back((self.runner.submit(&plan)?, now));
            moves = true;
        }
        moves |= self.collect()?;
        self.rounds_stalled = if moves || self.scheduler.is_idle() { 0 } else { self.rounds_stalled + 1 };
        if self.rounds_stalled > ROUNDS_STALLED_MAX {
            return Err(EngineFault::Stalled { requests: self.desk.requests() });
        }
        Ok(())
    }

    /// Collects the oldest step in flight. False: there is none.
    fn collect(&mut self) -> Result<bool, EngineFault> {
        let Some((ticket, planned)) = self.tickets.pop_front() else { return Ok(false) };
        let outcome = self.runner.collect(ticket)?;
        let now = (self.clock)();
        self.step = outcome.step.0;
        self.metrics.steps.inc();
        self.metrics.step_seconds.observe(now.saturating_sub(planned).as_secs_f64());
        self.scheduler.apply(outcome)?;
        for event in self.scheduler.drain_kv_events() {
            self.kv.push(event, now);
        }
        // The next events come with the next outcome at the earliest.
        let step_s = self.scheduler.load().step_s.unwrap_or(0.0);
        self.kv.flush_by(now + Duration::from_secs_f64(step_s));
        self.deliver();
        Ok(true)
    }

    /// Hands on what the scheduler has to say.
    fn deliver(&mut self) {
        let now = (self.clock)();
        loop {
            for event in self.scheduler.drain_events() {
                if matches!(&event, Event::Refused { refusal: Refusal::NumericalError { .. }, .. }) {
                    self.numerical_errors.push_back(now);
                }
                self.desk.hear(event, now);
            }
            let gone = self.desk.send(self.step, now);
            if gone.is_empty() {
                break;
            }
            gone.into_iter().for_each(|number| self.scheduler.cancel(number, None));
        }
        self.numerical_errors.retain(|at| now.saturating_sub(*at) <= self.numerical_error_window);
        if self.numerical_errors.len() >= self.numerical_errors_max {
            self.numerical_errors.clear();
            self.sick.notify_one();
        }
    }

    /// All snapshots that were asked for since the last step are one: it takes time linear in the cache.
    ///
    /// Between two rounds the feed has all that the pool has: after each plan an outcome was applied, and with it is
    /// told what the plan evicted.
    fn answer_snapshots(&mut self, asked: Vec<oneshot::Sender<KvSnapshot>>) {
        if asked.is_empty() {
            return;
        }
        self.kv.flush();
        let held = self.kv.held();
        let pool = self.scheduler.pool();
        debug_assert_eq!((held.blocks as usize, held.digest), (pool.digest().0, pool.digest().1.0));
        let snapshot = KvSnapshot { seq: held.seq, blocks: pool.snapshot().into() };
        for asked in asked {
            // Whoever asked may be gone.
            let _ = asked.send(snapshot.clone());
        }
    }

    /// Says how things stand.
    fn tell(&mut self) {
        let is_idle = self.scheduler.is_idle() && self.tickets.is_empty();
        self.idle_since = is_idle.then(|| self.idle_since.unwrap_or_else(|| (self.clock)()));
        let (load, counters, pool) =
            (self.scheduler.load(), self.scheduler.counters(), self.scheduler.pool());
        let (blocks_cached, digest) = pool.digest();
        let report = EngineReport {
            intake: self.intake,
            requests: self.desk.requests(),
            waiting: self.desk.waiting(),
            load,
            idle_since: self.idle_since,
            counters,
            blocks_total: pool.blocks() as u32,
            blocks_cached: blocks_cached as u32,
            kv_seq: self.kv.held().seq,
            kv_digest: digest.0,
            routers: self.desk.progress(),
        };
        let metrics = &self.metrics;
        metrics.preemptions.inc_by(counters.preemptions - self.preemptions_counted);
        self.preemptions_counted = counters.preemptions;
        metrics.sequences.of(SequenceState::Waiting).set(load.waiting as i64);
        metrics.sequences.of(SequenceState::Running).set(load.running as i64);
        let found_unheld = pool.evictable();
        metrics.blocks.of(BlockState::Cached).set(found_unheld as i64);
        metrics.blocks.of(BlockState::Free).set((load.blocks_free - found_unheld) as i64);
        metrics.blocks.of(BlockState::Held).set((pool.blocks() - load.blocks_free) as i64);
        self.report.send_if_modified(|old| {
            let is_news = *old != report;
            if is_news {
                *old = report;
            }
            is_news
        });
    }
}

/// A fault with its causes, in one line.
fn chain(fault: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(fault.source(), |cause| cause.source());
    causes.fold(fault.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a word").to_owned()
}
