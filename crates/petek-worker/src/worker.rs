//! A worker from its listener to its end.
//!
//! ```text
//!  start: bind ▶ warm up ▶ serve ▶ register ▶ Serving ──signal, operator, NaNs, replaced──▶ Announcing ▶ Draining ▶ leave
//!                                    └─ engine fails, at any time ─▶ streams end, leave, exit 70
//! ```
//! A drain is announced first, in the record, in load reports and in health; only then is new work refused. What runs
//! is finished, the record is taken away, and the streams end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use petek_cluster::{
    Cluster, Probe, Probed, RegisterError, Registration, RegistrationOptions, RegistrationPhase, Registry,
    Times, Wait, WorkerRecord, WorkerState,
};
use petek_core::hash::HASH_SCHEME;
use petek_core::ids::Epoch;
use petek_core::limits::{link, listener as limit};
use petek_core::params::ModelLimits;
use petek_core::refusal::Refusal;
use petek_core::scheduler::SchedulerConfig;
use petek_proto::hello::{CLUSTER_TOKEN_KEY, WIRE, WorkerIdentity};
use petek_proto::worker::v1::GetStatusRequest;
use petek_proto::worker::v1::worker_service_client::WorkerServiceClient;
use petek_service::{Exit, Failure, Shutdown, WorkerMetrics};
use petek_text::ModelCard;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, sleep_until, timeout};
use tonic::Request;
use tonic::transport::Endpoint;
use tonic_health::ServingStatus;

use crate::engine::{self, Command, EngineEnd, EngineFault, EngineParts, EngineReport, Intake};
use crate::runner::StepRunner;
use crate::service::{CardMessages, ClusterToken, Context, DrainOrder, Phase, Served, Service};
use crate::settings::WorkerSettings;

/// What a client that is turned away at the end of a drain is told to wait.
const ENDED_RETRY_MS: std::num::NonZeroU64 = std::num::NonZeroU64::new(100).unwrap();

/// What a worker serves, and what computes it.
pub struct WorkerParts {
    /// Who it is; revision, text hash and block size are those of `card` and `scheduler`.
    pub identity: WorkerIdentity,
    /// What clients call the model.
    pub name: String,
    /// What else they may call it.
    pub aliases: Vec<String>,
    /// What routers need of the model.
    pub card: ModelCard,
    /// What requests may ask; the context is one that the pool can hold.
    pub limits: ModelLimits,
    /// Ranks that share the model.
    pub tp: u32,
    /// The pool, the slots, the step.
    pub scheduler: SchedulerConfig,
    /// Computes steps.
    pub runner: Box<dyn StepRunner + Send>,
}

/// Where and how a worker registers.
pub struct RegistrationSettings {
    /// The registry.
    pub registry: Arc<dyn Registry>,
    /// The cluster in it.
    pub cluster: Cluster,
    /// The waits.
    pub times: Times,
    /// How long to wait for a registry that is away at the start.
    pub wait: Wait,
}

/// A worker that runs. It ends when its [`Shutdown`] drains, when an operator drains it, or by itself; dropping this
/// changes nothing.
#[derive(Debug)]
pub struct Worker {
    address: SocketAddr,
    ready: watch::Receiver<bool>,
    stopped: JoinHandle<Result<(), Failure>>,
}

impl Worker {
    /// Starts a worker, inside a tokio runtime: warms it up, serves on `listener`, and begins to register it. It is
    /// [`ready`](Self::ready) once it is registered; that a registration cannot be shows in
    /// [`stopped`](Self::stopped).
    ///
    /// `cluster_token` is what every call must carry; none: the listener is for nobody else to reach. `advertised` is
    /// where routers reach the listener, `host:port`, the best first. Where an operator drains the worker, or it
    /// drains itself, `shutdown` drains too.
    ///
    /// # Errors
    /// [`Exit::Configuration`] for settings or parts that cannot be, [`Exit::Environment`] where the listener has no
    /// address or there is no thread, [`Exit::Fault`] where the runner fails in its warm-up.
    #[expect(clippy::too_many_arguments, reason = "each is another thing, named where it is called")]
    pub async fn start(
        settings: WorkerSettings,
        parts: WorkerParts,
        cluster_token: Option<&str>,
        listener: TcpListener,
        advertised: Vec<String>,
        registration: RegistrationSettings,
        metrics: Arc<WorkerMetrics>,
        shutdown: Shutdown,
    ) -> Result<Worker, Failure> {
        settings.check().map_err(|(key, why)| configuration(format!("settings: {key}: {why}")))?;
        let token = ClusterToken::new(cluster_token).ok_or_else(|| {
            configuration("the cluster token must be plain ASCII text, and some of it".into())
        })?;
        check(&parts)?;
        let address = listener.local_addr().map_err(|error| {
            Failure::new(Exit::Environment, format!("read the listener's address: {error}"), "")
        })?;
        let record = record(&parts, advertised);
        let WorkerParts { identity, name, aliases, card, limits, tp: _, scheduler, runner } = parts;
        let card = CardMessages::new(name, aliases, identity.revision, &card)
            .map_err(|bytes| configuration(format!("the model card has {bytes} bytes, more than is sent")))?;
        let started = Instant::now();
        let (engine, engine_end) = engine::start(EngineParts {
            scheduler,
            limits: limits.clone(),
            runner,
            steps_in_flight: settings.steps_in_flight,
            command_queue: settings.command_queue,
            numerical_errors_max: settings.numerical_errors_max,
            numerical_error_window: Duration::from_millis(settings.numerical_error_window_ms),
            kv_batch_max: Duration::from_millis(settings.feed.kv_batch_ms_max),
            kv_ring_batches: settings.feed.kv_ring_batches,
            metrics,
            clock: Arc::new(move || started.elapsed()),
        })
        .await
        .map_err(|fault| fault_of(&fault))?;
        let (stop, stopping) = watch::channel(false);
        let context = Arc::new(Context {
            epoch: identity.epoch,
            hello: identity.into(),
            limits,
            card,
            engine,
            phase: watch::Sender::new(Phase::Loading),
            drain: watch::Sender::new(DrainOrder::None),
            stopping,
            streams: Arc::new(Semaphore::new(settings.link.streams_max)),
            watchers: Arc::new(Semaphore::new(settings.feed.watchers_max)),
            links: AtomicU64::new(1),
            settings,
        });
        let served = Served::new(Service(context.clone()), token.clone()).await;
        let (is_ready, ready) = watch::channel(false);
        let life =
            Life { context, served, record, registration, token, shutdown, is_ready, engine_end, stop };
        Ok(Worker { address, ready, stopped: tokio::spawn(life.live(listener)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it is registered and takes requests. Returns, too, when the worker stops before.
    ///
    /// *Cancel safety*: may be dropped and called again at any point.
    pub async fn ready(&self) {
        // An error says that it stopped.
        let _ = self.ready.clone().wait_for(|ready| *ready).await;
    }

    /// Waits until all that ran is finished and the listener is closed.
    ///
    /// # Errors
    /// Why it ended otherwise than by a drain: [`Exit::Environment`] where the registry cannot be used or another
    /// worker has its id, [`Exit::Configuration`] where the cluster runs this revision with other settings,
    /// [`Exit::Fault`] where the engine failed.
    pub async fn stopped(self) -> Result<(), Failure> {
        self.stopped.await.unwrap_or_else(|error| {
            Err(Failure::new(Exit::Fault, format!("the worker's own task failed: {error}"), ""))
        })
    }
}

/// What a worker's task holds.
struct Life {
    context: Arc<Context>,
    served: Served,
    record: WorkerRecord,
    registration: RegistrationSettings,
    token: ClusterToken,
    shutdown: Shutdown,
    is_ready: watch::Sender<bool>,
    engine_end: EngineEnd,
    stop: watch::Sender<bool>,
}

/// Why a worker ends.
enum Cause {
    /// A signal, or an operator.
    Asked,
    /// Too many requests broke the numbers.
    Sick,
    /// Another worker has its place in the registry.
    Replaced(RegisterError),
    /// The engine ended by itself.
    Engine(Failure),
}

impl Life {
    async fn live(mut self, listener: TcpListener) -> Result<(), Failure> {
        let settings = self.context.settings.link.clone();
        let mut server = tokio::spawn(self.served.serve(listener, settings, self.context.stopping.clone()));
        let ended = self.conduct().await;
        // The engine first, so that each stream ends after its last message. It may be gone already.
        let _ = self.context.engine.commands.send(Command::Stop).await;
        self.stop.send_replace(true);
        // A router that never reads its last bytes holds nobody up.
        if timeout(self.linger(), &mut server).await.is_err() {
            server.abort();
        }
        ended
    }

    async fn conduct(&mut self) -> Result<(), Failure> {
        let Some(mut registration) = self.register().await? else { return Ok(()) };
        self.context.phase.send_replace(Phase::Serving);
        self.served.set_health(ServingStatus::Serving).await;
        self.is_ready.send_replace(true);
        self.shutdown.serving();

        let cause = self.cause(&mut registration).await;
        if matches!(cause, Cause::Sick) {
            let many = self.context.settings.numerical_errors_max;
            tracing::error!(
                many,
                "too many requests broke the model's numbers: draining; look at this machine"
            );
        }
        let replaced = matches!(cause, Cause::Replaced(_));
        let drained = match cause {
            Cause::Engine(failure) => {
                self.context.phase.send_replace(Phase::Draining);
                self.served.set_health(ServingStatus::NotServing).await;
                Err(failure)
            }
            cause => self.drain(&registration).await.and(match cause {
                Cause::Replaced(error) => Err(register_failure(&error)),
                _ => Ok(()),
            }),
        };
        if !replaced {
            match timeout(self.linger(), registration.leave()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "leave the registry: the record goes with its lease")
                }
                Err(_) => tracing::warn!("leave the registry: no answer; the record goes with its lease"),
            }
        }
        drained
    }

    /// None: the process is to end before it began to serve.
    async fn register(&mut self) -> Result<Option<Registration>, Failure> {
        let RegistrationSettings { registry, cluster, times, wait } = &self.registration;
        let options = RegistrationOptions {
            cluster: cluster.clone(),
            record: self.record.clone(),
            times: *times,
            wait: *wait,
        };
        let starting = Registration::start(registry.clone(), options, probe(self.token.clone()));
        tokio::select! {
            started = starting => started.map(Some).map_err(|error| register_failure(&error)),
            () = self.shutdown.draining() => Ok(None),
            ended = &mut self.engine_end => Err(engine_failure(ended.ok())),
        }
    }

    async fn cause(&mut self, registration: &mut Registration) -> Cause {
        let mut orders = self.context.drain.subscribe();
        let sick = self.context.engine.sick.clone();
        loop {
            tokio::select! {
                () = self.shutdown.draining() => return Cause::Asked,
                _ = orders.wait_for(|order| *order != DrainOrder::None) => return Cause::Asked,
                () = sick.notified() => return Cause::Sick,
                ended = &mut self.engine_end => return Cause::Engine(engine_failure(ended.ok())),
                // A lease that was lost is registered again; until then the worker serves on.
                status = registration.changed() => {
                    if let RegistrationPhase::Ended(error) = status.phase {
                        return Cause::Replaced(error);
                    }
                }
            }
        }
    }

    /// Announces the drain, refuses new work, and waits until what runs has finished.
    async fn drain(&mut self, registration: &Registration) -> Result<(), Failure> {
        self.shutdown.drain();
        let context = &self.context;
        context.phase.send_replace(Phase::Announcing);
        let announced = timeout(self.linger(), registration.set_state(WorkerState::Draining)).await;
        if !matches!(announced, Ok(Ok(()))) {
            tracing::warn!("the registry does not hear that this worker drains; load reports say so");
        }
        self.served.set_health(ServingStatus::NotServing).await;
        tracing::info!("draining");
        let notice = Duration::from_millis(context.settings.drain_notice_ms);
        let commands = &context.engine.commands;
        let mut report = context.engine.report.clone();
        let finished = async {
            sleep(notice).await;
            // An engine that is gone is seen beside this.
            let _ = commands.send(Command::Drain).await;
            let _ = report.wait_for(|report| report.intake == Intake::Closed).await.map(drop);
            context.phase.send_replace(Phase::Draining);
            tokio::select! {
                () = idle(&mut report) => return,
                () = overdue(context.drain.subscribe()) => {}
            }
            tracing::warn!("the drain's deadline has passed: what still runs ends");
            let refusal = Refusal::Draining { retry_ms: ENDED_RETRY_MS };
            let _ = commands.send(Command::EndAll(refusal)).await;
            idle(&mut report).await;
        };
        tokio::select! {
            () = finished => Ok(()),
            ended = &mut self.engine_end => Err(engine_failure(ended.ok())),
        }
    }

    fn linger(&self) -> Duration {
        Duration::from_millis(self.context.settings.linger_ms)
    }
}

/// Waits until no request is open.
async fn idle(report: &mut watch::Receiver<EngineReport>) {
    let _ = report.wait_for(|report| report.requests == 0).await;
}

/// Waits until the deadline of the drain, which a later order may set or bring forward.
async fn overdue(mut orders: watch::Receiver<DrainOrder>) {
    loop {
        let order = *orders.borrow_and_update();
        let DrainOrder::Until(deadline) = order else {
            // The sender lives as long as the worker does.
            let _ = orders.changed().await;
            continue;
        };
        tokio::select! {
            () = sleep_until(deadline) => return,
            _ = orders.changed() => {}
        }
    }
}

fn configuration(what: String) -> Failure {
    Failure::new(Exit::Configuration, what, "")
}

fn fault_of(fault: &EngineFault) -> Failure {
    let exit = match fault {
        EngineFault::Config(_) => Exit::Configuration,
        EngineFault::Thread(_) => Exit::Environment,
        _ => Exit::Fault,
    };
    Failure::new(exit, fault.to_string(), "")
}

/// Of an engine that ended while nobody had stopped it.
fn engine_failure(ended: Option<Result<(), EngineFault>>) -> Failure {
    match ended {
        Some(Err(fault)) => fault_of(&fault),
        _ => Failure::new(Exit::Fault, "the engine ended without a word", ""),
    }
}

fn register_failure(error: &RegisterError) -> Failure {
    let (exit, hint) = match error {
        RegisterError::Record(_) | RegisterError::SettingsDiffer { .. } => (Exit::Configuration, ""),
        RegisterError::Registry(error) if error.is_passing() => {
            (Exit::Environment, "start the registry, or name another endpoint")
        }
        RegisterError::Registry(_)
        | RegisterError::SettingsBad { .. }
        | RegisterError::IdTaken { .. }
        | RegisterError::Replaced { .. } => (Exit::Environment, ""),
    };
    Failure::new(exit, format!("register: {error}"), hint)
}

/// The parts must say the same of what they share: routers would else find another worker than the record's.
fn check(parts: &WorkerParts) -> Result<(), Failure> {
    let WorkerParts { identity, card, scheduler, .. } = parts;
    scheduler.check_served().map_err(|fault| configuration(fault.to_string()))?;
    let pairs = [
        ("revision", identity.revision == scheduler.revision),
        ("block size", identity.block_size == scheduler.block_size),
        ("text hash", identity.text_hash == *card.text_hash().as_bytes()),
    ];
    match pairs.into_iter().find(|(_, agree)| !agree) {
        None => Ok(()),
        Some((what, _)) => Err(configuration(format!("the worker's parts have more than one {what}"))),
    }
}

fn record(parts: &WorkerParts, addresses: Vec<String>) -> WorkerRecord {
    let identity = &parts.identity;
    // A clock before 1970 is shown as that.
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WorkerRecord {
        worker: identity.worker.clone(),
        epoch: identity.epoch,
        addresses,
        name: parts.name.clone(),
        revision: identity.revision,
        text_hash: identity.text_hash,
        numerics_id: identity.numerics_id.clone(),
        block_size_tokens: identity.block_size,
        hash_scheme: HASH_SCHEME,
        context_tokens: parts.limits.context_tokens,
        blocks_total: parts.scheduler.blocks,
        tp: parts.tp,
        roles: ["generate".to_owned()].into(),
        adapters: Vec::new(),
        state: WorkerState::Serving,
        wire: petek_cluster::record::WireVersions { min: WIRE.min, max: WIRE.max },
        started_unix_ms: started.as_millis() as u64,
    }
}

/// Asks whoever is at an old record's addresses for its epoch.
fn probe(token: ClusterToken) -> Probe {
    Arc::new(move |old: WorkerRecord| {
        let token = token.clone();
        async move {
            for address in &old.addresses {
                match epoch_at(address, &token).await {
                    Ok(epoch) => return Probed::Answers(epoch),
                    Err(why) => tracing::debug!(address, why, "an old record's worker does not answer"),
                }
            }
            Probed::Silent
        }
        .boxed()
    })
}

async fn epoch_at(address: &str, token: &ClusterToken) -> Result<Epoch, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
    let endpoint = endpoint
        .connect_timeout(Duration::from_millis(link::CONNECT_MS_MAX))
        .http2_max_header_list_size(limit::HEADER_LIST_BYTES);
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let mut request = Request::new(GetStatusRequest {});
    if let Some(token) = token.value() {
        request.metadata_mut().insert(CLUSTER_TOKEN_KEY, token.clone());
    }
    let answer = WorkerServiceClient::new(channel).get_status(request).await;
    let status = answer.map_err(|status| status.message().to_owned())?.into_inner().status;
    status.map(|status| Epoch(status.epoch)).ok_or_else(|| "an answer without a status".into())
}
