//! A scripted worker: it does what a test says, and tells the test what it heard.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{Stream, StreamExt};
use petek_core::ids::Epoch;
use petek_proto::hello::{CLUSTER_TOKEN_KEY, WIRE, WorkerIdentity};
use petek_proto::refusal::rpc_status;
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use petek_proto::worker::v1::{
    Admitted, Cancel, DrainRequest, DrainResponse, EngineStatus, ExecuteRequest, ExecuteResponse,
    FinishReason, Finished, GetModelCardRequest, GetModelCardResponse, GetStatusRequest, GetStatusResponse,
    LoadReport, Logprobs, ModelCardChunk, ModelCardFile, ModelCardHeader, Refused, RouterHello, Step,
    StepEntry, Submit, Usage, WatchKvEventsRequest, WatchKvEventsResponse, WatchLoadRequest,
    WatchLoadResponse, WorkerHello, WorkerState as ReportedState, get_model_card_response,
    watch_load_response,
};
use petek_router::{WorkerEntry, WorkerState};
use petek_text::{CardFile, ModelCard};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::cache::Cache;
use super::{BLOCK, CLUSTER_TOKEN, CONTEXT, EOS, NAME, REVISION, TOKENS, chain, soon};

const EPOCH: Epoch = Epoch(0xFEDC_BA98_7654_3210);
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
    /// A router began a stream.
    Hello(RouterHello),
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
    /// What it says of its load, on change and every 100 ms; with none it is silent.
    pub(crate) load: watch::Sender<Option<LoadReport>>,
    pub(crate) cache: Arc<Cache>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Worker {
    pub(crate) fn start(id: &str, script: Script) -> Self {
        Self::start_as(id, script, |_| {})
    }

    /// The same worker, started again: under another epoch, and empty.
    pub(crate) fn start_again(id: &str, script: Script) -> Self {
        Self::start_in(id, script, Epoch(EPOCH.0 + 1), |_| {})
    }

    /// One whose greeting is not what its record says.
    pub(crate) fn start_as(id: &str, script: Script, change: impl FnOnce(&mut WorkerHello)) -> Self {
        Self::start_in(id, script, EPOCH, change)
    }

    fn start_in(id: &str, script: Script, epoch: Epoch, change: impl FnOnce(&mut WorkerHello)) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let entry = WorkerEntry { epoch, ..entry(id, address) };
        let mut hello = hello_of(&entry);
        change(&mut hello);
        let (hearing, heard) = mpsc::unbounded_channel();
        let load = watch::Sender::new(Some(idle(&hello)));
        let cache = Arc::new(Cache::new(hello.clone()));
        let service = Scripted { hello, script, hearing, load: load.clone(), cache: cache.clone() };
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let server =
                Server::builder().add_service(WorkerServiceServer::with_interceptor(service, authenticated));
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Worker { entry, heard, load, cache, runtime: Some(runtime) }
    }

    /// The next request.
    pub(crate) async fn submit(&mut self) -> (Box<Submit>, Reply) {
        soon(async {
            loop {
                match self.heard.recv().await.expect("the worker lives") {
                    Heard::Submit(submit, reply) => return (submit, reply),
                    Heard::Hello(_) | Heard::Cancel(_) | Heard::Heartbeat => {}
                }
            }
        })
        .await
    }

    /// How the next router names itself.
    pub(crate) async fn hello(&mut self) -> RouterHello {
        soon(async {
            loop {
                if let Heard::Hello(hello) = self.heard.recv().await.expect("the worker lives") {
                    return hello;
                }
            }
        })
        .await
    }

    /// Changes what it says of its load; it may have said nothing before.
    pub(crate) fn reports(&self, change: impl FnOnce(&mut LoadReport)) {
        let mut report = idle(&hello_of(&self.entry));
        change(&mut report);
        self.load.send_replace(Some(report));
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
        epoch: EPOCH,
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
    load: watch::Sender<Option<LoadReport>>,
    cache: Arc<Cache>,
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
        tokio::spawn(run_engine(request.into_inner(), reply, script, self.cache.clone(), hearing));
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
        let mut load = self.load.subscribe();
        let (reports, answers) = mpsc::channel(1);
        let hello = watch_load_response::Message::Hello(self.hello.clone());
        tokio::spawn(async move {
            let mut message = Some(hello);
            loop {
                if message.is_some() && reports.send(Ok(WatchLoadResponse { message })).await.is_err() {
                    return;
                }
                message = load.borrow_and_update().clone().map(watch_load_response::Message::Report);
                let heard = tokio::time::timeout(Duration::from_millis(100), load.changed()).await;
                if matches!(heard, Ok(Err(_))) || reports.is_closed() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers).boxed()))
    }

    async fn watch_kv_events(
        &self,
        request: Request<WatchKvEventsRequest>,
    ) -> Result<Response<Self::WatchKvEventsStream>, Status> {
        let WatchKvEventsRequest { hello, resume } = request.into_inner();
        assert!(hello.unwrap_or_default().check().is_ok());
        Ok(Response::new(self.cache.subscribe(resume).map(Ok).boxed()))
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
    cache: Arc<Cache>,
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
            Up::Hello(hello) => {
                assert!(hello.check().is_ok());
                let _ = hearing.send(Heard::Hello(hello));
            }
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
                        let cached_tokens = cache.cached_tokens(&submit);
                        reply.say(Down::Admitted(Admitted { dispatch, cached_tokens, queue_ms: 1.0 }));
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
