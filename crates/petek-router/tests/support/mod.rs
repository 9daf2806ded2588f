//! A cluster in one process: scripted workers over loopback, a router, and clients.
//!
//! A scripted worker is the real service with an engine that does as data says: which tokens each sequence gets, or
//! that nothing happens by itself and the test speaks for it.

pub(crate) mod chain;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{Stream, StreamExt};
use petek_core::hash::Revision;
use petek_core::ids::Epoch;
use petek_proto::hello::{CLUSTER_TOKEN_KEY, WIRE, WorkerIdentity};
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{
    Finished as PublicFinished, GenerationEvent, GenerationSpec, SamplingParams, Started,
    StreamGenerateRequest, TokenIds, generation_event, generation_spec,
};
use petek_proto::refusal::{WireRefusal, rpc_status};
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::watch_kv_events_response::Body;
use petek_proto::worker::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use petek_proto::worker::v1::{
    Admitted, Cancel, DrainRequest, DrainResponse, EngineStatus, ExecuteRequest, ExecuteResponse,
    FinishReason, Finished, GetModelCardRequest, GetModelCardResponse, GetStatusRequest, GetStatusResponse,
    KvSnapshotPage, LoadReport, Logprobs, ModelCardChunk, ModelCardFile, ModelCardHeader, Refused, Step,
    StepEntry, Submit, Usage, WatchKvEventsRequest, WatchKvEventsResponse, WatchLoadRequest,
    WatchLoadResponse, WorkerHello, WorkerState as ReportedState, get_model_card_response,
    watch_load_response,
};
use petek_router::{
    Freshness, LinkSettings, Listeners, Router, RouterSettings, WorkerEntry, WorkerList, WorkerState,
};
use petek_service::{Registry, RouterMetrics, Shutdown};
use petek_text::{CardFile, ModelCard};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// Far beyond what anything here takes. A test that would wait for ever fails instead.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("what is waited for does not come")
}

/// Waits until something is so.
pub(crate) async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    soon(async {
        while !is_so().await {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// The model: its tokens' bytes, ids from 0.
pub(crate) const TOKENS: &[&[u8]] = &[
    b"<eos>",
    b"ab",
    b"cd",
    b"abc",
    b"de",
    b"\xE2\x82",
    b"\xAC",
    b"x",
    b"h",
    b"i",
    "求".as_bytes(),
    b"Z",
    b" Note",
    b"!",
    b"ok?\n",
    b"<bot>",
];
pub(crate) const EOS: u32 = 0;
pub(crate) const X: u32 = 7;
pub(crate) const CONTEXT: u32 = 1_024;
pub(crate) const BLOCK: u32 = 16;
pub(crate) const NAME: &str = "chain";
const REVISION: Revision = Revision([7; 32]);
const CLUSTER_TOKEN: &str = "comb";
/// Messages of a worker that wait for the transport. The engine steps only while half of them is free.
const MESSAGES_MAX: usize = 1_024;

/// What a worker's engine does.
#[derive(Clone, Debug)]
pub(crate) enum Script {
    /// Sequence i gets these tokens (the last list, where there are more sequences), one per step from the position
    /// after its resumed ids on, until EOS, a stop id, max_tokens or a Cancel ends it. After the last one of a list
    /// it goes on for ever if so said, else it waits.
    Play(Vec<Vec<u32>>, AfterLast),
    /// Every request is refused: the queue is full.
    Full,
    /// Nothing by itself.
    Silent,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum AfterLast {
    Waits,
    GoesOn,
}

/// What a worker heard.
#[derive(Debug)]
pub(crate) enum Heard {
    Submit(Box<Submit>, Reply),
    Cancel(Cancel),
    Heartbeat,
}

/// Speaks for a silent worker.
#[derive(Clone, Debug)]
pub(crate) struct Reply(mpsc::Sender<ExecuteResponse>);

impl Reply {
    pub(crate) fn say(&self, message: Down) {
        match self.0.try_send(ExecuteResponse { message: Some(message) }) {
            // The router may be gone; then nobody is there to be told.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                panic!("the stream is full: the router does not drain it")
            }
        }
    }

    pub(crate) fn admit(&self, dispatch: u64) {
        self.say(Down::Admitted(Admitted { dispatch, cached_tokens: 0, queue_ms: 1.0 }));
    }

    pub(crate) fn tokens(&self, dispatch: u64, index: u32, first_index: u32, ids: &[u32]) {
        let entry = StepEntry { dispatch, index, first_index, ids: ids.into(), logprobs: None };
        self.say(Down::Step(Step { step: 1, entries: vec![entry], prompts: vec![] }));
    }

    pub(crate) fn finish(&self, dispatch: u64, index: u32, reason: FinishReason) {
        let usage = Some(Usage::default());
        self.say(Down::Finished(Finished {
            dispatch,
            index,
            reason: reason.into(),
            usage,
            ..Finished::default()
        }));
    }
}

/// A worker in a runtime of its own, so that it can be killed.
pub(crate) struct Worker {
    pub(crate) entry: WorkerEntry,
    pub(crate) heard: mpsc::UnboundedReceiver<Heard>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Worker {
    pub(crate) fn start(id: &str, script: Script) -> Self {
        Self::start_as(id, script, |_| {})
    }

    /// One whose greeting is not what its record says.
    pub(crate) fn start_as(id: &str, script: Script, change: impl FnOnce(&mut WorkerHello)) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let entry = entry(id, address);
        let mut hello = hello_of(&entry);
        change(&mut hello);
        let (hearing, heard) = mpsc::unbounded_channel();
        let load = watch::Sender::new(idle(&hello));
        let service = Scripted { hello, script, hearing, load };
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let server =
                Server::builder().add_service(WorkerServiceServer::with_interceptor(service, authenticated));
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Worker { entry, heard, runtime: Some(runtime) }
    }

    /// The next request.
    pub(crate) async fn submit(&mut self) -> (Box<Submit>, Reply) {
        soon(async {
            loop {
                match self.heard.recv().await.expect("the worker lives") {
                    Heard::Submit(submit, reply) => return (submit, reply),
                    Heard::Cancel(_) | Heard::Heartbeat => {}
                }
            }
        })
        .await
    }

    /// The next Cancel.
    pub(crate) async fn cancel(&mut self) -> Cancel {
        soon(async {
            loop {
                if let Heard::Cancel(cancel) = self.heard.recv().await.expect("the worker lives") {
                    return cancel;
                }
            }
        })
        .await
    }

    /// As SIGKILL would: its connections break.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn card() -> ModelCard {
    let mut card = ModelCard::default();
    let config = format!(r#"{{"vocab_size": {}, "eos_token_id": {EOS}}}"#, TOKENS.len());
    card.insert(CardFile::Config, config.into_bytes());
    card.insert(CardFile::GenerationConfig, br#"{"temperature": 0.5}"#.to_vec());
    card.insert(CardFile::Tokenizer, chain::tokenizer_json(TOKENS));
    let template =
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}";
    card.insert(CardFile::ChatTemplate, template.as_bytes().to_vec());
    card
}

fn entry(id: &str, address: SocketAddr) -> WorkerEntry {
    WorkerEntry {
        id: id.into(),
        epoch: Epoch(0xFEDC_BA98_7654_3210),
        addresses: vec![address.to_string()],
        name: NAME.into(),
        revision: REVISION,
        text_hash: *card().text_hash().as_bytes(),
        numerics_id: "ab".repeat(16),
        block_size: BLOCK,
        hash_scheme: 1,
        context_tokens: CONTEXT,
        blocks_total: 64,
        tp: 1,
        roles: vec!["generate".into()],
        state: WorkerState::Serving,
        wire: WIRE,
        started_unix_ms: 1,
    }
}

fn hello_of(entry: &WorkerEntry) -> WorkerHello {
    WorkerHello::from(WorkerIdentity {
        worker: entry.id.clone(),
        epoch: entry.epoch,
        revision: entry.revision,
        text_hash: entry.text_hash,
        block_size: entry.block_size,
        numerics_id: entry.numerics_id.clone(),
        wire: 1,
    })
}

/// Rates of a small worker that has nothing to do.
fn idle(hello: &WorkerHello) -> LoadReport {
    LoadReport {
        worker: hello.worker.clone(),
        epoch: hello.epoch,
        state: ReportedState::Serving.into(),
        blocks_free: 64,
        blocks_total: 64,
        step_s: 0.02,
        step_one_more_s: 0.02,
        prefill_tokens_per_s: 1_000.0,
        ..LoadReport::default()
    }
}

#[allow(clippy::result_large_err, reason = "tonic's own signature")]
fn authenticated(request: Request<()>) -> Result<Request<()>, Status> {
    match request.metadata().get(CLUSTER_TOKEN_KEY) {
        Some(token) if token == CLUSTER_TOKEN => Ok(request),
        _ => Err(Status::unauthenticated("the cluster's token is missing")),
    }
}

struct Scripted {
    hello: WorkerHello,
    script: Script,
    hearing: mpsc::UnboundedSender<Heard>,
    /// It is idle, and knows of no dispatch.
    load: watch::Sender<LoadReport>,
}

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for Scripted {
    type ExecuteStream = Sent<ExecuteResponse>;
    type WatchLoadStream = Sent<WatchLoadResponse>;
    type WatchKvEventsStream = Sent<WatchKvEventsResponse>;
    type GetModelCardStream = Sent<GetModelCardResponse>;

    async fn execute(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let (down, answers) = mpsc::channel(MESSAGES_MAX);
        let reply = Reply(down);
        reply.say(Down::Hello(self.hello.clone()));
        let (script, hearing) = (self.script.clone(), self.hearing.clone());
        tokio::spawn(run_engine(request.into_inner(), reply, script, hearing));
        Ok(Response::new(ReceiverStream::new(answers).map(Ok).boxed()))
    }

    async fn get_model_card(
        &self,
        request: Request<GetModelCardRequest>,
    ) -> Result<Response<Self::GetModelCardStream>, Status> {
        request
            .into_inner()
            .hello
            .unwrap_or_default()
            .check()
            .map_err(|refusal| petek_proto::refusal::status(&refusal))?;
        let card = card();
        let files = card.files().map(|(file, bytes, hash)| ModelCardFile {
            name: file.name().into(),
            length_bytes: bytes.len() as u64,
            blake3: hash.as_bytes().to_vec().into(),
        });
        let header = ModelCardHeader {
            wire: Some(WIRE),
            name: NAME.into(),
            aliases: vec!["alias".into()],
            revision: REVISION.0.to_vec().into(),
            text_hash: card.text_hash().as_bytes().to_vec().into(),
            files: files.collect(),
        };
        let mut messages = vec![get_model_card_response::Message::Header(header)];
        for (file, (_, bytes, _)) in card.files().enumerate() {
            // In small chunks, so that there are several.
            for (at, data) in bytes.chunks(500).enumerate() {
                messages.push(get_model_card_response::Message::Chunk(ModelCardChunk {
                    file: file as u32,
                    offset_bytes: at as u64 * 500,
                    data: data.to_vec().into(),
                }));
            }
        }
        let responses =
            messages.into_iter().map(|message| Ok(GetModelCardResponse { message: Some(message) }));
        Ok(Response::new(futures::stream::iter(responses.collect::<Vec<_>>()).boxed()))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Ok(Response::new(DrainResponse { status: Some(EngineStatus::default()) }))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Err(Status::unimplemented("no test asks"))
    }

    async fn watch_load(
        &self,
        request: Request<WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        assert!(request.into_inner().hello.unwrap_or_default().check().is_ok());
        let (mut load, down) = (self.load.subscribe(), mpsc::channel(1));
        let (reports, answers) = down;
        let hello = watch_load_response::Message::Hello(self.hello.clone());
        tokio::spawn(async move {
            let mut message = hello;
            while reports.send(Ok(WatchLoadResponse { message: Some(message) })).await.is_ok() {
                let report = load.borrow_and_update().clone();
                message = watch_load_response::Message::Report(report);
                // On change, and every 100 ms without one.
                let _ = tokio::time::timeout(Duration::from_millis(100), load.changed()).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(answers).boxed()))
    }

    async fn watch_kv_events(
        &self,
        request: Request<WatchKvEventsRequest>,
    ) -> Result<Response<Self::WatchKvEventsStream>, Status> {
        assert!(request.into_inner().hello.unwrap_or_default().check().is_ok());
        // It holds nothing, and goes on holding nothing.
        let say = |body| WatchKvEventsResponse {
            worker: self.hello.worker.clone(),
            epoch: self.hello.epoch,
            seq: 0,
            body: Some(body),
        };
        let page = KvSnapshotPage { last: true, ..KvSnapshotPage::default() };
        let messages = [say(Body::Hello(self.hello.clone())), say(Body::Page(page))];
        Ok(Response::new(tokio_stream::iter(messages).map(Ok).chain(futures::stream::pending()).boxed()))
    }
}

/// A sequence in the scripted engine: what it has, and what comes.
struct Running {
    submit: Arc<Submit>,
    index: u32,
    at: usize,
}

async fn run_engine(
    mut inbound: Streaming<ExecuteRequest>,
    reply: Reply,
    script: Script,
    hearing: mpsc::UnboundedSender<Heard>,
) {
    let running: Arc<Mutex<HashMap<(u64, u32), Running>>> = Arc::default();
    let mut step = 0;
    loop {
        let busy = steps_by_itself(&script, &running);
        let message = tokio::select! {
            biased;
            message = inbound.next() => message,
            room = reply.0.reserve_many(MESSAGES_MAX / 2), if busy => {
                // Given back at once: nobody but this engine writes so much.
                let Ok(_) = room else { return };
                step += 1;
                one_step(step, &script, &running, &reply);
                continue;
            }
        };
        let Some(Ok(ExecuteRequest { message: Some(message) })) = message else { return };
        match message {
            Up::Hello(hello) => assert!(hello.check().is_ok()),
            Up::Heartbeat(heartbeat) => {
                reply.say(Down::Heartbeat(heartbeat));
                let _ = hearing.send(Heard::Heartbeat);
            }
            Up::Cancel(cancel) => {
                for index in &cancel.indexes {
                    if running.lock().unwrap().remove(&(cancel.dispatch, *index)).is_some() {
                        reply.finish(cancel.dispatch, *index, FinishReason::Cancelled);
                    }
                }
                let _ = hearing.send(Heard::Cancel(cancel));
            }
            Up::Submit(submit) => {
                let _ = hearing.send(Heard::Submit(Box::new(submit.clone()), reply.clone()));
                let dispatch = submit.dispatch;
                match script {
                    Script::Silent => {}
                    Script::Full => {
                        let retry_ms = 7.try_into().unwrap();
                        let full = petek_core::refusal::Refusal::QueueFull { waiting: 3, retry_ms };
                        reply.say(Down::Refused(Refused { dispatch, status: Some(rpc_status(&full)) }));
                    }
                    Script::Play(..) => {
                        reply.say(Down::Admitted(Admitted { dispatch, cached_tokens: 0, queue_ms: 1.0 }));
                        let submit = Arc::new(submit);
                        for sequence in &submit.sequences {
                            let (index, at) = (sequence.index, sequence.resumed_ids.len());
                            let state = Running { submit: submit.clone(), index, at };
                            running.lock().unwrap().insert((dispatch, index), state);
                        }
                    }
                }
            }
        }
    }
}

fn play(script: &Script, index: u32) -> (&[u32], AfterLast) {
    let Script::Play(lists, after) = script else { return (&[], AfterLast::Waits) };
    (lists.get(index as usize).or(lists.last()).map_or(&[], |list| list), *after)
}

fn steps_by_itself(script: &Script, running: &Mutex<HashMap<(u64, u32), Running>>) -> bool {
    running.lock().unwrap().values().any(|sequence| {
        let (list, after) = play(script, sequence.index);
        sequence.at < list.len() || after == AfterLast::GoesOn
    })
}

/// One step of the engine: a token for every sequence that has one, in one message.
fn one_step(step: u64, script: &Script, running: &Mutex<HashMap<(u64, u32), Running>>, reply: &Reply) {
    let mut running = running.lock().unwrap();
    let mut entries = Vec::new();
    let mut ended = Vec::new();
    for (&(dispatch, index), sequence) in running.iter_mut() {
        let (list, after) = play(script, index);
        let Some(&id) = list.get(sequence.at).or(list.last().filter(|_| after == AfterLast::GoesOn)) else {
            continue;
        };
        let params = sequence.submit.params.clone().unwrap_or_default();
        let logprobs = params.logprobs.map(|top| {
            let mut logprobs = Logprobs::default();
            let top: Vec<(u32, f32)> = (0..top).map(|i| (i % TOKENS.len() as u32, -(i as f32))).collect();
            logprobs.push(-0.25, 2, &top);
            logprobs
        });
        entries.push(StepEntry { dispatch, index, first_index: sequence.at as u32, ids: vec![id], logprobs });
        sequence.at += 1;
        let ends = if id == EOS && !params.ignore_eos {
            Some(FinishReason::StopEos)
        } else if params.stop_token_ids.contains(&id) {
            Some(FinishReason::StopToken)
        } else {
            (sequence.at == params.max_tokens as usize).then_some(FinishReason::Length)
        };
        ended.extend(ends.map(|reason| (dispatch, index, reason)));
    }
    reply.say(Down::Step(Step { step, entries, prompts: vec![] }));
    for (dispatch, index, reason) in ended {
        running.remove(&(dispatch, index));
        reply.finish(dispatch, index, reason);
    }
}

/// A router and what it needs to run.
pub(crate) struct Cluster {
    pub(crate) router: Router,
    pub(crate) registry: Registry,
    pub(crate) shutdown: Shutdown,
    pub(crate) list: watch::Sender<WorkerList>,
}

pub(crate) fn settings() -> RouterSettings {
    RouterSettings {
        linger_ms: 100,
        // Ten times as long as usual: a busy test machine is no fault of a worker.
        link: LinkSettings { retry_ms_min: 1, load_silence_ms_max: 3_000, ..LinkSettings::default() },
        ..RouterSettings::default()
    }
}

impl Cluster {
    /// Ready, where there is a worker.
    pub(crate) async fn start(settings: RouterSettings, workers: &[Worker]) -> Self {
        let entries: Vec<WorkerEntry> = workers.iter().map(|worker| worker.entry.clone()).collect();
        let cluster = Self::start_unready(settings, entries).await;
        cluster.connected(workers.len()).await;
        cluster
    }

    pub(crate) async fn start_unready(settings: RouterSettings, workers: Vec<WorkerEntry>) -> Self {
        let (list, feed) = watch::channel(WorkerList { workers, freshness: Freshness::Current });
        let listeners = Listeners {
            public: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            admin: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        };
        let registry = Registry::new();
        let metrics = Arc::new(RouterMetrics::new(&registry));
        let shutdown = Shutdown::without_signals();
        let router =
            Router::start(settings, Some(CLUSTER_TOKEN), feed, listeners, metrics, shutdown.clone()).unwrap();
        Cluster { router, registry, shutdown, list }
    }

    /// Waits until so many workers are connected, have said how busy they are and what they hold, and the model is
    /// there.
    pub(crate) async fn connected(&self, count: usize) {
        use petek_proto::admin::v1::{IndexState, Link, RouterView};
        let whole = |view: &RouterView| {
            view.link() == Link::Connected && view.load.is_some() && view.index() == IndexState::Synced
        };
        soon(self.router.ready()).await;
        self.watched(|views| views.values().filter(|view| whole(view)).count() >= count).await;
    }

    /// Waits until the router sees its workers so.
    pub(crate) async fn watched(
        &self,
        is_so: impl Fn(&HashMap<String, petek_proto::admin::v1::RouterView>) -> bool,
    ) {
        use petek_proto::admin::v1::{RouterView, WatchWorkersRequest, watch_workers_response::Event};
        let mut events =
            self.admin().await.watch_workers(WatchWorkersRequest::default()).await.unwrap().into_inner();
        let mut views: HashMap<String, RouterView> = HashMap::new();
        while !is_so(&views) {
            match soon(events.message()).await.unwrap().unwrap().event.unwrap() {
                Event::Snapshot(snapshot) => {
                    views.extend(snapshot.workers.into_iter().map(|w| (w.id, w.view.unwrap())));
                }
                Event::Changed(worker) => drop(views.insert(worker.id, worker.view.unwrap())),
                Event::Removed(id) => drop(views.remove(&id)),
                Event::RegistryStale(_) => {}
            }
        }
    }

    pub(crate) async fn client(&self) -> InferenceServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.router.public_address())).unwrap();
        InferenceServiceClient::new(endpoint.connect().await.unwrap())
    }

    pub(crate) async fn admin(
        &self,
    ) -> petek_proto::admin::v1::admin_service_client::AdminServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.router.admin_address())).unwrap();
        petek_proto::admin::v1::admin_service_client::AdminServiceClient::new(
            endpoint.connect().await.unwrap(),
        )
    }

    pub(crate) fn has_metric(&self, line: &str) -> bool {
        self.registry.text().lines().any(|shown| shown == line)
    }
}

/// A request of these prompt ids.
pub(crate) fn spec(prompt: &[u32], params: SamplingParams) -> GenerationSpec {
    GenerationSpec {
        prompt: Some(generation_spec::Prompt::TokenIds(TokenIds { ids: prompt.into() })),
        params: Some(params),
        ..GenerationSpec::default()
    }
}

/// A stream read to its end.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) started: Option<Started>,
    /// By sequence: text, ids, entries of logprobs.
    pub(crate) sequences: Vec<(String, Vec<u32>, usize)>,
    pub(crate) finished: Option<PublicFinished>,
    pub(crate) error: Option<WireRefusal>,
}

impl Read {
    pub(crate) fn take(&mut self, event: GenerationEvent) {
        match event.kind.expect("an event is of a kind") {
            generation_event::Kind::Started(started) => {
                assert!(self.started.is_none() && self.sequences.is_empty(), "started comes first and once");
                self.started = Some(started);
            }
            generation_event::Kind::Delta(delta) => {
                assert!(self.started.is_some() && self.finished.is_none());
                let index = delta.index as usize;
                self.sequences.resize_with(self.sequences.len().max(index + 1), Default::default);
                let (text, ids, entries) = &mut self.sequences[index];
                if !ids.is_empty() {
                    let first = delta.first_index as usize;
                    assert!(delta.token_ids.is_empty() || first >= ids.len(), "no id comes twice");
                }
                text.push_str(&delta.text);
                ids.extend(delta.token_ids);
                *entries += delta.logprobs.len();
            }
            generation_event::Kind::Finished(finished) => {
                assert!(self.finished.is_none(), "finished comes once");
                self.finished = Some(finished);
            }
        }
    }

    pub(crate) fn text(&self) -> &str {
        &self.sequences[0].0
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.sequences[0].1
    }

    pub(crate) fn finished(&self) -> &PublicFinished {
        self.finished.as_ref().unwrap_or_else(|| panic!("it did not finish: {:?}", self.error))
    }

    #[track_caller]
    pub(crate) fn reason(&self) -> &str {
        &self.error.as_ref().unwrap_or_else(|| panic!("it did not fail: {:?}", self.finished)).reason
    }
}

pub(crate) fn refusal(status: &Status) -> WireRefusal {
    WireRefusal::read(status).unwrap_or_else(|| panic!("an error without details: {status:?}"))
}

/// Streams a request to its end.
pub(crate) async fn stream(client: &mut InferenceServiceClient<Channel>, spec: GenerationSpec) -> Read {
    let mut read = Read::default();
    match client.stream_generate(StreamGenerateRequest { spec: Some(spec) }).await {
        Ok(response) => {
            let mut events = response.into_inner();
            loop {
                match soon(events.message()).await {
                    Ok(Some(response)) => read.take(response.event.expect("a response has an event")),
                    Ok(None) => break,
                    Err(status) => {
                        read.error = Some(refusal(&status));
                        break;
                    }
                }
            }
            assert!(read.finished.is_some() != read.error.is_some(), "a stream has one end");
        }
        Err(status) => read.error = Some(refusal(&status)),
    }
    read
}
