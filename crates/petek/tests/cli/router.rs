//! A router that says what a test tells it to, over real gRPC on loopback, and remembers what it was asked.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use petek_proto::admin::v1::admin_service_server::{AdminService, AdminServiceServer};
use petek_proto::admin::v1::{
    DrainWorkerRequest, DrainWorkerResponse, ExplainRouteRequest, ExplainRouteResponse, ListWorkersRequest,
    ListWorkersResponse, WatchWorkersRequest, WatchWorkersResponse,
};
use petek_proto::inference::v1::generation_event::Kind;
use petek_proto::inference::v1::inference_service_server::{InferenceService, InferenceServiceServer};
use petek_proto::inference::v1::{
    ChatRequest, ChatResponse, ChatSpec, DetokenizeRequest, DetokenizeResponse, GenerateRequest,
    GenerateResponse, GenerationEvent, GenerationSpec, GetModelRequest, GetModelResponse, ListModelsRequest,
    ListModelsResponse, StreamChatRequest, StreamChatResponse, StreamGenerateRequest, StreamGenerateResponse,
    TokenizeRequest, TokenizeResponse,
};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// What a stream says next.
pub(crate) type Said = Result<Kind, Status>;

/// How the router answers one streaming call.
pub(crate) enum Answer {
    /// Before the stream begins.
    Refused(Status),
    /// With what comes through the channel; it ends when the sender is dropped.
    Stream(UnboundedReceiver<Said>),
}

impl Answer {
    /// All of it at once.
    pub(crate) fn of(said: impl IntoIterator<Item = Said>) -> Self {
        let (sender, answer) = Answer::fed();
        said.into_iter().for_each(|said| sender.send(said).expect("the answer is here"));
        answer
    }

    /// Piece by piece. The sender also tells when the client is gone.
    pub(crate) fn fed() -> (UnboundedSender<Said>, Self) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (sender, Answer::Stream(receiver))
    }
}

/// What the router answers and what it was asked.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) answers: VecDeque<Answer>,
    pub(crate) models: ListModelsResponse,
    pub(crate) workers: ListWorkersResponse,
    pub(crate) changes: Vec<WatchWorkersResponse>,
    pub(crate) route: ExplainRouteResponse,
    pub(crate) generations: Vec<GenerationSpec>,
    pub(crate) chats: Vec<ChatSpec>,
    pub(crate) explains: Vec<ExplainRouteRequest>,
    pub(crate) worker_filters: Vec<String>,
}

/// The router; it goes when this is dropped, with its connections.
pub(crate) struct Router {
    pub(crate) address: String,
    pub(crate) script: Arc<Mutex<Script>>,
    runtime: Option<Runtime>,
}

impl Router {
    pub(crate) fn start(script: Script) -> Self {
        let script = Arc::new(Mutex::new(script));
        let runtime = Runtime::new().expect("start a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("it listens"));
        let service = Service(script.clone());
        let server = Server::builder()
            .add_service(InferenceServiceServer::new(service.clone()))
            .add_service(AdminServiceServer::new(service));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, script, runtime: Some(runtime) }
    }

    /// One that answers so, call by call.
    pub(crate) fn answering(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self::start(Script { answers: answers.into_iter().collect(), ..Script::default() })
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.runtime.take().expect("dropped once").shutdown_background();
    }
}

#[derive(Clone)]
struct Service(Arc<Mutex<Script>>);

type Streamed<T> = Result<Response<Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>>, Status>;

impl Service {
    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.0.lock().expect("no test panics with the script in hand")
    }

    fn streamed<T: 'static>(&self, wrap: fn(Option<GenerationEvent>) -> T) -> Streamed<T> {
        match self.script().answers.pop_front() {
            None => Err(Status::internal("the script has no answer left")),
            Some(Answer::Refused(status)) => Err(status),
            Some(Answer::Stream(said)) => {
                let event = move |kind| wrap(Some(GenerationEvent { kind: Some(kind) }));
                Ok(Response::new(Box::pin(
                    UnboundedReceiverStream::new(said).map(move |said| said.map(event)),
                )))
            }
        }
    }
}

fn not_scripted<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("no command calls this"))
}

#[tonic::async_trait]
impl InferenceService for Service {
    type StreamGenerateStream = Pin<Box<dyn Stream<Item = Result<StreamGenerateResponse, Status>> + Send>>;
    type StreamChatStream = Pin<Box<dyn Stream<Item = Result<StreamChatResponse, Status>> + Send>>;

    async fn stream_generate(
        &self,
        request: Request<StreamGenerateRequest>,
    ) -> Streamed<StreamGenerateResponse> {
        self.script().generations.extend(request.into_inner().spec);
        self.streamed(|event| StreamGenerateResponse { event })
    }

    async fn stream_chat(&self, request: Request<StreamChatRequest>) -> Streamed<StreamChatResponse> {
        self.script().chats.extend(request.into_inner().spec);
        self.streamed(|event| StreamChatResponse { event })
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(self.script().models.clone()))
    }

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<GenerateResponse>, Status> {
        not_scripted()
    }

    async fn chat(&self, _: Request<ChatRequest>) -> Result<Response<ChatResponse>, Status> {
        not_scripted()
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        not_scripted()
    }

    async fn detokenize(
        &self,
        _: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        not_scripted()
    }

    async fn get_model(&self, _: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        not_scripted()
    }
}

#[tonic::async_trait]
impl AdminService for Service {
    type WatchWorkersStream = Pin<Box<dyn Stream<Item = Result<WatchWorkersResponse, Status>> + Send>>;

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        self.script().worker_filters.push(request.into_inner().model);
        Ok(Response::new(self.script().workers.clone()))
    }

    async fn watch_workers(&self, request: Request<WatchWorkersRequest>) -> Streamed<WatchWorkersResponse> {
        self.script().worker_filters.push(request.into_inner().model);
        let changes = std::mem::take(&mut self.script().changes);
        Ok(Response::new(Box::pin(tokio_stream::iter(changes.into_iter().map(Ok)))))
    }

    async fn explain_route(
        &self,
        request: Request<ExplainRouteRequest>,
    ) -> Result<Response<ExplainRouteResponse>, Status> {
        self.script().explains.push(request.into_inner());
        Ok(Response::new(self.script().route.clone()))
    }

    async fn drain_worker(
        &self,
        _: Request<DrainWorkerRequest>,
    ) -> Result<Response<DrainWorkerResponse>, Status> {
        not_scripted()
    }
}
