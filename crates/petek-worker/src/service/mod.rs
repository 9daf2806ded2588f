//! What routers call: `petek.worker.v1.WorkerService`, thin tasks around the engine.

mod execute;

mod feeds;

mod card;

mod guard;

mod server;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use petek_core::ids::Epoch;
use petek_core::params::ModelLimits;
use petek_core::refusal::{Reason, Refusal};
use petek_proto::refusal::{WireRefusal, status};
use petek_proto::worker::v1::worker_service_server::WorkerService;
use petek_proto::worker::v1::{
    DrainRequest, DrainResponse, EngineStatus, ExecuteRequest, GetModelCardRequest, GetModelCardResponse,
    GetStatusRequest, GetStatusResponse, RouterHello, WatchKvEventsRequest, WatchKvEventsResponse,
    WatchLoadRequest, WatchLoadResponse, WorkerHello, WorkerState,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

pub(crate) use self::card::CardMessages;
pub(crate) use self::guard::ClusterToken;
pub(crate) use self::server::Served;

use crate::engine::EngineHandle;
use crate::settings::WorkerSettings;

/// How far a worker is, for all that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not registered yet.
    Loading,
    /// It takes requests.
    Serving,
    /// It says that it drains, and still takes requests of routers that have not heard.
    Announcing,
    /// It takes none.
    Draining,
}

impl Phase {
    pub(crate) fn state(self) -> WorkerState {
        match self {
            Phase::Loading => WorkerState::Loading,
            Phase::Serving => WorkerState::Serving,
            Phase::Announcing | Phase::Draining => WorkerState::Draining,
        }
    }
}

/// An operator's order to drain. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DrainOrder {
    /// Nobody asked.
    #[default]
    None,
    /// What runs may finish.
    Finish,
    /// What still runs then is ended.
    Until(tokio::time::Instant),
}

/// All that a call needs. One per worker.
pub(crate) struct Context {
    pub(crate) settings: WorkerSettings,
    pub(crate) hello: WorkerHello,
    pub(crate) epoch: Epoch,
    pub(crate) limits: ModelLimits,
    pub(crate) card: CardMessages,
    pub(crate) engine: EngineHandle,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) drain: watch::Sender<DrainOrder>,
    /// True once all streams are to end.
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) streams: Arc<Semaphore>,
    pub(crate) watchers: Arc<Semaphore>,
    pub(crate) links: std::sync::atomic::AtomicU64,
}

impl Context {
    fn status(&self) -> EngineStatus {
        let state = self.phase.borrow().state();
        let uptime_ms = (self.engine.clock)().as_millis() as u64;
        self.engine.report.borrow().status(&self.hello.worker, self.epoch, state, uptime_ms)
    }

    fn watcher(&self) -> Result<OwnedSemaphorePermit, Status> {
        let full = |_| full("subscriptions", self.settings.feed.watchers_max);
        self.watchers.clone().try_acquire_owned().map_err(full)
    }

    /// A stream whose messages a task of its own writes, at most so many ahead of the transport; it ends with the
    /// worker, or when nobody reads any more.
    fn stream<T: Send + 'static, F>(
        self: &Arc<Self>,
        permit: OwnedSemaphorePermit,
        write: impl FnOnce(Arc<Context>, mpsc::Sender<Result<T, Status>>) -> F,
    ) -> Sent<T>
    where
        F: Future<Output = Result<(), Stop>> + Send + 'static,
    {
        let (out, messages) = mpsc::channel(self.settings.feed.watch_queue);
        let (closed, mut stopping) = (out.clone(), self.stopping.clone());
        let writing = write(self.clone(), out);
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = writing => ended,
                () = closed.closed() => Ok(()),
                _ = stopping.wait_for(|stop| *stop) => Ok(()),
            };
            if let Err(Stop(status)) = ended {
                // Whoever reads may be gone.
                let _ = closed.send(Err(*status)).await;
            }
            drop(permit);
        });
        Box::pin(ReceiverStream::new(messages))
    }
}

/// A stream's end with a status.
struct Stop(Box<Status>);

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Stop(Box::new(status))
    }
}

const ENGINE_GONE: &str = "the worker's engine has ended";

/// What a stream ends with that the worker cannot go on with: its requests may go elsewhere.
pub(crate) fn lost(why: impl Into<String>) -> Status {
    let lost = WireRefusal::from(&Refusal::WorkerLost { output_tokens: 0 });
    WireRefusal { message: why.into(), ..lost }.into()
}

fn full(what: &str, max: usize) -> Status {
    let refusal = WireRefusal {
        code: Code::ResourceExhausted,
        message: format!("{max} {what} are open, as many as there may be"),
        reason: Reason::QueueFull.as_str().into(),
        metadata: [("limit".into(), max.to_string())].into(),
        field: None,
        retry_ms: Some(1_000),
    };
    refusal.into()
}

fn greeted(hello: Option<RouterHello>) -> Result<RouterHello, Status> {
    let problem = || Refusal::Protocol { problem: "hello must be set".into() };
    let hello = hello.ok_or_else(|| status(&problem()))?;
    hello.check().map_err(|refusal| status(&refusal))?;
    Ok(hello)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Service(pub(crate) Arc<Context>);

#[tonic::async_trait]
impl WorkerService for Service {
    type ExecuteStream = crate::outbox::Answers;
    type WatchLoadStream = Sent<WatchLoadResponse>;
    type WatchKvEventsStream = Sent<WatchKvEventsResponse>;
    type GetModelCardStream = Sent<GetModelCardResponse>;

    async fn execute(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        execute::open(self.0.clone(), request.into_inner()).await.map(Response::new)
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(GetStatusResponse { status: Some(self.0.status()) }))
    }

    async fn watch_load(
        &self,
        request: Request<WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        greeted(request.into_inner().hello)?;
        Ok(Response::new(self.0.stream(self.0.watcher()?, feeds::load)))
    }

    async fn watch_kv_events(
        &self,
        request: Request<WatchKvEventsRequest>,
    ) -> Result<Response<Self::WatchKvEventsStream>, Status> {
        let WatchKvEventsRequest { hello, resume } = request.into_inner();
        greeted(hello)?;
        let write = |context, out| feeds::kv_events(context, resume, out);
        Ok(Response::new(self.0.stream(self.0.watcher()?, write)))
    }

    async fn get_model_card(
        &self,
        request: Request<GetModelCardRequest>,
    ) -> Result<Response<Self::GetModelCardStream>, Status> {
        greeted(request.into_inner().hello)?;
        Ok(Response::new(self.0.stream(self.0.watcher()?, card::send)))
    }

    /// Answers once the drain is announced.
    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let DrainRequest { epoch, deadline_ms } = request.into_inner();
        let context = &self.0;
        if epoch != 0 && epoch != context.epoch.0 {
            return Err(status(&Refusal::StaleEpoch { named: epoch, current: context.epoch.0 }));
        }
        let until = |ms| tokio::time::Instant::now().checked_add(Duration::from_millis(ms));
        let order = deadline_ms.and_then(until).map_or(DrainOrder::Finish, DrainOrder::Until);
        context.drain.send_modify(|before| {
            *before = match (*before, order) {
                (DrainOrder::Until(a), DrainOrder::Until(b)) => DrainOrder::Until(a.min(b)),
                (until @ DrainOrder::Until(_), _) => until,
                (_, order) => order,
            };
        });
        let mut phases = context.phase.subscribe();
        let announced = phases.wait_for(|phase| *phase == Phase::Draining);
        let mut stopping = context.stopping.clone();
        tokio::select! {
            _ = announced => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
        Ok(Response::new(DrainResponse { status: Some(context.status()) }))
    }
}
