//! The router's side of a worker: one connection with one Execute stream, and another one beside it for the worker's
//! load and KV events, made again for as long as the worker's record stands.
//!
//! ```text
//! Connecting ──hello is what the record says──▶ Connected ──broken or silent──▶ Lost ──pause──▶ Connecting
//!     └─────── it is not ──▶ Refused ──pause──▶ Connecting
//! ```

mod client;

mod session;

mod load;

mod kv;

mod subscriptions;

mod vigil;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use petek_core::hash::BlockName;
use petek_core::refusal::Refusal;
use petek_proto::admin::v1::{CandidateState, Link as LinkState};
use petek_proto::hello::WorkerIdentity;
use petek_proto::worker::v1::{DrainRequest, LoadReport, RouterHello, WorkerState as ReportedState};
use petek_service::RouterMetrics;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tonic::Status;

pub(crate) use client::{Client, ClusterToken, Dialler};
pub(crate) use kv::KvView;
pub(crate) use session::{Job, Session};

use self::load::{OwnLoad, Share, Weight};
use self::session::Ended;
use self::vigil::Vigil;
use crate::feed::{WorkerEntry, WorkerState};
use crate::index::{Index, Match, PredictionId, WorkerKey};
use crate::lock;
use crate::route::{Cost, Rates, WorkerView};

/// What the links of one router share.
pub(crate) struct Common {
    pub(crate) dialler: Dialler,
    pub(crate) index: Mutex<Index>,
    pub(crate) metrics: Arc<RouterMetrics>,
    /// Counted up at each change that an operator may see, or that may make a model usable.
    pub(crate) changed: watch::Sender<u64>,
    /// A permit per snapshot under way.
    snapshots: Semaphore,
    vigil: Mutex<Vigil>,
    started: Instant,
}

/// A worker as its record has it, and the router's connections to it.
pub(crate) struct Link {
    pub(crate) entry: WorkerEntry,
    pub(crate) common: Arc<Common>,
    key: WorkerKey,
    kv: Mutex<KvView>,
    own: Arc<OwnLoad>,
    /// Its last load report, and when it came.
    report: Mutex<Option<(LoadReport, Duration)>>,
    /// By its record, which may change it without changing anything else.
    state: Mutex<WorkerState>,
    phase: Mutex<Phase>,
    /// Set by an operator through this router, before the record says so.
    draining: AtomicBool,
    /// Whether it is silent, as of the last look at its pool: for operators.
    suspect: AtomicBool,
    /// True once the record is gone: nothing new goes there, and when the last request ends the task ends too.
    dismissed: watch::Sender<bool>,
    /// The number of the last Execute stream.
    stream: AtomicU32,
}

#[derive(Clone)]
enum Phase {
    Connecting,
    Connected(Arc<Session>),
    Lost(String),
    Refused(String),
}

/// One request on a worker: what it weighs there, and what the worker is expected to hold because of it. Taken back
/// when this is dropped, however that comes about.
pub(crate) struct InFlight {
    link: Arc<Link>,
    share: Share,
    prompt_tokens: u32,
    /// None once the prompt is computed: from then on events or time say the rest.
    prediction: Option<PredictionId>,
}

impl Common {
    pub(crate) fn new(dialler: Dialler, index_bytes_max: usize, metrics: Arc<RouterMetrics>) -> Self {
        let settings = dialler.settings();
        let snapshots = Semaphore::new(settings.snapshots_max);
        let vigil = Mutex::new(Vigil::new(settings.vigil_period(), Duration::ZERO));
        let index = Mutex::new(Index::new(index_bytes_max));
        let (changed, started) = (watch::Sender::new(0), Instant::now());
        Common { dialler, index, metrics, changed, snapshots, vigil, started }
    }

    /// Since the start of this router.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The timer of the vigil fired. Says whether this router slept.
    pub(crate) fn tick(&self) -> bool {
        lock(&self.vigil).tick(self.now())
    }

    /// How long this router has been awake.
    pub(crate) fn awake(&self, now: Duration) -> Duration {
        lock(&self.vigil).awake(now)
    }

    fn change(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}

impl Link {
    /// Begins to connect, in tasks that live until [`Link::dismiss`].
    pub(crate) fn start(entry: WorkerEntry, common: Arc<Common>) -> Arc<Self> {
        let link = Arc::new(Link::new(entry, common, Phase::Connecting));
        tokio::spawn(link.clone().keep_connected());
        tokio::spawn(subscriptions::keep_subscribed(link.clone()));
        link
    }

    /// One that is never connected: its record contradicts its pool.
    pub(crate) fn refused(entry: WorkerEntry, common: Arc<Common>, why: &Refusal) -> Arc<Self> {
        tracing::error!(worker = %entry.id, %why, "refuse a worker");
        Arc::new(Link::new(entry, common, Phase::Refused(why.to_string())))
    }

    fn new(entry: WorkerEntry, common: Arc<Common>, phase: Phase) -> Self {
        let key = lock(&common.index).add_worker();
        Link {
            state: Mutex::new(entry.state),
            entry,
            common,
            key,
            kv: Mutex::new(KvView::new(key)),
            own: Arc::default(),
            report: Mutex::default(),
            phase: Mutex::new(phase),
            draining: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
            stream: AtomicU32::new(0),
            dismissed: watch::Sender::new(false),
        }
    }

    /// Gives it no new work, and forgets its cache at once, whatever still comes of it; what runs there ends by itself.
    pub(crate) fn dismiss(&self) {
        lock(&self.common.index).remove_worker(self.key);
        self.dismissed.send_replace(true);
    }

    /// The session to dispatch through, if there is one.
    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        match self.phase() {
            Phase::Connected(session) => Some(session),
            _ => None,
        }
    }

    /// How an operator sees the connection, and what is wrong with it.
    pub(crate) fn seen(&self) -> (LinkState, String) {
        match self.phase() {
            Phase::Connecting => (LinkState::Connecting, String::new()),
            Phase::Connected(_) if self.suspect.load(Ordering::Relaxed) => {
                (LinkState::Suspect, "its load reports have stopped".into())
            }
            Phase::Connected(_) => (LinkState::Connected, String::new()),
            Phase::Lost(why) => (LinkState::Lost, why),
            Phase::Refused(why) => (LinkState::Refused, why),
        }
    }

    /// What it does with new work: by its record, by its own word, and by what an operator told it through this
    /// router. Whichever takes less, for they learn of it at different times.
    pub(crate) fn state(&self) -> WorkerState {
        let said = lock(&self.report).as_ref().map(|(report, _)| report.state());
        match (*lock(&self.state), said) {
            _ if self.draining.load(Ordering::Relaxed) => WorkerState::Draining,
            (WorkerState::Draining, _) | (_, Some(ReportedState::Draining)) => WorkerState::Draining,
            (WorkerState::Loading, _) | (_, Some(ReportedState::Loading)) => WorkerState::Loading,
            (WorkerState::Serving, _) => WorkerState::Serving,
        }
    }

    /// Takes over what the record now says of new work.
    pub(crate) fn set_state(&self, state: WorkerState) {
        *lock(&self.state) = state;
    }

    /// Takes over whether it is silent. Says whether it has just become so.
    pub(crate) fn set_suspect(&self, suspect: bool) -> bool {
        let was = self.suspect.swap(suspect, Ordering::Relaxed);
        if was != suspect {
            tracing::warn!(worker = %self.entry.id, suspect, "load reports stopped, or came again");
            self.change();
        }
        suspect && !was
    }

    /// This router's own requests there.
    pub(crate) fn own_requests(&self) -> u32 {
        self.own.requests()
    }

    /// Its last load report, and how old it is.
    pub(crate) fn load(&self, now: Duration) -> Option<(LoadReport, Duration)> {
        let report = lock(&self.report);
        report.as_ref().map(|(report, at)| (report.clone(), now.saturating_sub(*at)))
    }

    /// Its place in the index.
    pub(crate) fn key(&self) -> WorkerKey {
        self.key
    }

    /// The last batch of its events that is in the index, and the snapshots taken after the first one.
    pub(crate) fn kv_progress(&self) -> (u64, u64) {
        let kv = lock(&self.kv);
        (kv.seq(), kv.resyncs())
    }

    /// What a decision may know of it: its last report, and this router's own requests since.
    pub(crate) fn view(&self, session: Option<&Session>, matched: Match, now: Duration) -> WorkerView {
        let state = match self.state() {
            WorkerState::Loading => CandidateState::Loading,
            WorkerState::Draining => CandidateState::Draining,
            WorkerState::Serving if session.is_none() => CandidateState::NotConnected,
            WorkerState::Serving => CandidateState::Eligible,
        };
        let report = lock(&self.report);
        let Weight { waiting_tokens: own_waiting_tokens, sequences } = self.own.unreported();
        let known = report.as_ref().map(|(report, at)| (report, now.saturating_sub(*at)));
        WorkerView {
            state,
            waiting_uncached_tokens: own_waiting_tokens
                + known.map_or(0, |(report, _)| report.waiting_tokens),
            own_waiting_tokens,
            running: sequences + known.map_or(0, |(report, _)| report.running),
            matched_blocks: matched.blocks,
            predicted_blocks: matched.predicted,
            rates: known.map_or(Rates::NOMINAL, |(report, _)| rates(report)),
            load_age: known.map(|(_, age)| age),
        }
    }

    /// Counts a request at once, before anything is sent, and expects its prompt to be held once it is computed.
    pub(crate) fn count(
        self: &Arc<Self>,
        cost: &Cost,
        prompt_tokens: u32,
        names: &[BlockName],
        sequences: u32,
        now: Duration,
    ) -> InFlight {
        let weight = Weight { waiting_tokens: cost.uncached_tokens.into(), sequences };
        let share = Share::new(self.own.clone(), weight);
        // Predicted times are no promises: twice as long, and a little more for short ones.
        let until = now + Duration::from_secs_f64(2.0 * cost.time_to_compute_s()) + self.grace();
        let predict = || lock(&self.common.index).predict(self.key, names, now, until);
        let prediction = (!names.is_empty()).then(predict).flatten();
        InFlight { link: self.clone(), share, prompt_tokens, prediction }
    }

    /// A connection of its own for calls beside the stream.
    ///
    /// # Errors
    /// What the transport says.
    pub(crate) async fn dial(&self) -> Result<Client, Status> {
        self.common.dialler.dial(&self.entry.addresses).await
    }

    /// How this router names itself on a call beside the stream.
    pub(crate) fn hello(&self) -> RouterHello {
        self.common.dialler.hello(self.stream.load(Ordering::Relaxed).max(1))
    }

    /// Tells the worker to take no new work.
    ///
    /// # Errors
    /// What the worker or the transport says.
    pub(crate) async fn drain(&self, request: DrainRequest) -> Result<(), Status> {
        let mut client = self.dial().await?;
        client.drain(request).await?;
        self.draining.store(true, Ordering::Relaxed);
        self.change();
        Ok(())
    }

    /// Takes in a load report. Its sums and what is left of this router's own change together.
    fn reported(&self, report: LoadReport) {
        let router = self.common.dialler.router_id();
        let (state, now) = (report.state(), self.common.now());
        let mut last = lock(&self.report);
        for own in report.routers.iter().filter(|progress| progress.router_id == router) {
            self.own.reported(own.stream, own.dispatch);
        }
        let before = last.replace((report, now));
        drop(last);
        if before.is_none_or(|(before, _)| before.state() != state) {
            self.change();
        }
    }

    fn grace(&self) -> Duration {
        Duration::from_millis(self.common.dialler.settings().prediction_grace_ms)
    }

    async fn keep_connected(self: Arc<Self>) {
        let mut dismissed = self.dismissed.subscribe();
        let settings = self.common.dialler.settings().clone();
        let shortest = Duration::from_millis(settings.retry_ms_min);
        let longest = Duration::from_millis(settings.retry_ms_max);
        let mut pause = shortest;
        for stream in 1.. {
            self.stream.store(stream, Ordering::Relaxed);
            let opened = tokio::select! {
                opened = session::open(&self, stream) => opened,
                _ = dismissed.wait_for(|dismissed| *dismissed) => return,
            };
            let ended = match opened {
                Err(ended) => ended,
                Ok(open) => {
                    pause = shortest;
                    let identity = &open.session.identity;
                    tracing::info!(worker = %self.entry.id, epoch = %identity.epoch, "worker connected");
                    self.set(Phase::Connected(open.session.clone()));
                    open.run(dismissed.clone()).await
                }
            };
            match ended {
                Ended::Dismissed => return self.set(Phase::Lost("its record is gone".into())),
                Ended::Lost(why) if *dismissed.borrow() => {
                    tracing::info!(worker = %self.entry.id, why, "a worker that was dismissed left");
                    return self.set(Phase::Lost(why));
                }
                Ended::Lost(why) => {
                    tracing::warn!(worker = %self.entry.id, why, "worker lost");
                    self.set(Phase::Lost(why));
                }
                Ended::Refused(why) => {
                    tracing::error!(worker = %self.entry.id, %why, "refuse a worker");
                    self.common.dialler.count_bad_record();
                    self.set(Phase::Refused(why.to_string()));
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = dismissed.wait_for(|dismissed| *dismissed) => return,
            }
            pause = (pause * 2).min(longest);
        }
    }

    fn phase(&self) -> Phase {
        lock(&self.phase).clone()
    }

    fn set(&self, phase: Phase) {
        *lock(&self.phase) = phase;
        self.change();
    }

    fn change(&self) {
        self.common.change();
    }
}

impl InFlight {
    /// It goes out under this number.
    pub(crate) fn sent(&mut self, stream: u32, dispatch: u64) {
        self.share.sent(stream, dispatch);
    }

    /// The worker has begun with it: from now on only the prompt itself takes time.
    pub(crate) fn admitted(&mut self, cached_tokens: u32) {
        let report = lock(&self.link.report);
        let rate = report.as_ref().map_or(Rates::NOMINAL, |(report, _)| rates(report)).prefill_tokens_per_s;
        drop(report);
        let prefill_s = f64::from(self.prompt_tokens.saturating_sub(cached_tokens)) / rate.max(1.0);
        self.expect_for(Duration::from_secs_f64(2.0 * prefill_s));
    }

    /// The prompt is computed: its tokens wait no more, and its blocks are about to be told of.
    pub(crate) fn prefilled(&mut self) {
        self.share.prefilled();
        self.expect_for(Duration::ZERO);
        self.prediction = None;
    }

    fn expect_for(&self, time: Duration) {
        if let Some(prediction) = self.prediction {
            let common = &self.link.common;
            lock(&common.index).retime(prediction, common.now() + time + self.link.grace());
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(prediction) = self.prediction {
            lock(&self.link.common.index).withdraw(prediction);
        }
    }
}

fn rates(report: &LoadReport) -> Rates {
    Rates {
        prefill_tokens_per_s: report.prefill_tokens_per_s,
        step_s: report.step_s,
        step_one_more_s: report.step_one_more_s,
    }
}

/// Holds a worker's first message against its record.
///
/// # Errors
/// The first thing that differs.
fn check_identity(entry: &WorkerEntry, hello: &WorkerIdentity) -> Result<(), Refusal> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let pairs = [
        ("worker id", entry.id.clone(), hello.worker.clone()),
        ("epoch", entry.epoch.to_string(), hello.epoch.to_string()),
        ("revision", entry.revision.to_string(), hello.revision.to_string()),
        ("text hash", hex(&entry.text_hash), hex(&hello.text_hash)),
        ("block size", entry.block_size.to_string(), hello.block_size.to_string()),
        ("numerics id", entry.numerics_id.clone(), hello.numerics_id.clone()),
    ];
    match pairs.into_iter().find(|(_, record, said)| record != said) {
        None => Ok(()),
        Some((what, ours, theirs)) => Err(Refusal::PeerMismatch { what, ours, theirs }),
    }
}
