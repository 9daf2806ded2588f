//! A worker over loopback on the fake model, and routers that a test plays itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use petek_cluster::{Cluster, MemoryRegistry, Registry as _, Times, Wait, WorkerRecord};
use petek_core::hash::Revision;
use petek_core::ids::{Epoch, TokenId};
use petek_core::params::{CacheUse, ModelLimits, Params, RawParams, SamplingDefaults};
use petek_core::plan::{Draw, StepOutcome, StepPlan};
use petek_core::scheduler::SchedulerConfig;
use petek_core::seed::sequence_seed;
use petek_proto::hello::{CLUSTER_TOKEN_KEY, WIRE, WorkerIdentity};
use petek_proto::refusal::WireRefusal;
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::worker_service_client::WorkerServiceClient;
use petek_proto::worker::v1::{
    Cancel, EngineStatus, ExecuteRequest, ExecuteResponse, FinishReason, Finished, GetStatusRequest,
    Heartbeat, RouterHello, Submit, SubmitSequence,
};
use petek_service::{Failure, Registry, Shutdown, WorkerMetrics};
use petek_text::{CardFile, ModelCard};
use petek_worker::fake::{FakeModel, FakeRunner, NotFinite};
use petek_worker::runner::{RunnerFault, StepRunner, Ticket};
use petek_worker::{FeedSettings, LinkSettings, RegistrationSettings, Worker, WorkerParts, WorkerSettings};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// Far beyond what anything here takes. A test that would wait for ever fails instead.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("what is waited for does not come")
}

pub(crate) const EOS: TokenId = 2;
pub(crate) const VOCABULARY: u32 = 50;
pub(crate) const NAME: &str = "fake";
pub(crate) const REVISION: Revision = Revision([7; 32]);
pub(crate) const EPOCH: Epoch = Epoch(0xFEDC_BA98_7654_3210);
pub(crate) const TOKEN: &str = "comb";

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What a test says to the runner while it runs.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    /// Steps that may still be computed; none: all.
    steps: Option<u64>,
    fails: bool,
}

impl Gate {
    /// Lets only so many more steps be computed; the next one waits.
    pub(crate) fn allow(&self, steps: u64) {
        self.change(|state| state.steps = Some(steps));
    }

    pub(crate) fn open(&self) {
        self.change(|state| state.steps = None);
    }

    /// The next step fails.
    pub(crate) fn fail(&self) {
        self.change(|state| state.fails = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
    }

    fn pass(&self, plan: &StepPlan) -> Result<(), RunnerFault> {
        let state = self.0.0.lock().unwrap();
        let mut state = self.0.1.wait_while(state, |state| state.steps == Some(0)).unwrap();
        if let Some(steps) = &mut state.steps {
            *steps -= 1;
        }
        if state.fails {
            return Err(RunnerFault::Device { step: plan.step, cause: "it is on fire".into() });
        }
        Ok(())
    }
}

/// The fake behind a gate.
struct Gated {
    inner: FakeRunner,
    gate: Gate,
}

impl StepRunner for Gated {
    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, RunnerFault> {
        self.gate.pass(plan)?;
        self.inner.submit(plan)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutcome, RunnerFault> {
        self.inner.collect(ticket)
    }
}

/// What a worker of a test is like.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) id: &'static str,
    pub(crate) epoch: Epoch,
    pub(crate) settings: WorkerSettings,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) model: FakeModel,
    pub(crate) card: ModelCard,
    pub(crate) registry: MemoryRegistry,
    pub(crate) wait: Wait,
}

impl Default for Shape {
    fn default() -> Self {
        let mut card = ModelCard::default();
        card.insert(CardFile::Config, b"{}".to_vec());
        Shape {
            id: "w1",
            epoch: EPOCH,
            // Patient with a slow machine; a test of time itself sets its own.
            settings: WorkerSettings {
                drain_notice_ms: 1,
                linger_ms: 2_000,
                link: LinkSettings {
                    heartbeat_interval_ms: 50,
                    router_silence_ms_max: 60_000,
                    ..LinkSettings::default()
                },
                feed: FeedSettings { kv_heartbeat_interval_ms: 20, ..FeedSettings::default() },
                ..WorkerSettings::default()
            },
            scheduler: SchedulerConfig {
                revision: REVISION,
                blocks: 64,
                block_size: 16,
                slots: 16,
                step_rows: 64,
                queue: 1_000,
                prefix_cache: CacheUse::Shared,
            },
            model: FakeModel { vocabulary: VOCABULARY, not_finite: NotFinite::Never },
            card,
            registry: MemoryRegistry::new(),
            wait: Wait::Forever,
        }
    }
}

impl Shape {
    pub(crate) fn limits(&self) -> ModelLimits {
        ModelLimits {
            vocabulary: VOCABULARY,
            context_tokens: self.scheduler.blocks * self.scheduler.block_size,
            eos_ids: [EOS].into(),
            defaults: SamplingDefaults::BUILT_IN,
        }
    }

    pub(crate) fn identity(&self) -> WorkerIdentity {
        WorkerIdentity {
            worker: self.id.into(),
            epoch: self.epoch,
            revision: REVISION,
            text_hash: *self.card.text_hash().as_bytes(),
            block_size: self.scheduler.block_size,
            numerics_id: "ab".repeat(16),
            wire: 1,
        }
    }

    pub(crate) fn registration(&self) -> RegistrationSettings {
        RegistrationSettings {
            registry: Arc::new(self.registry.clone()),
            cluster: Cluster::new("test").unwrap(),
            times: Times { backoff_min: Duration::from_millis(1), ..Times::default() },
            wait: self.wait,
        }
    }

    /// Starts it; it may fail to register later.
    pub(crate) async fn try_start(self) -> Result<House, Failure> {
        let registration = self.registration();
        self.try_start_with(registration, None).await
    }

    /// `real` is another runner than the gated fake, with what its model allows.
    async fn try_start_with(
        self,
        registration: RegistrationSettings,
        real: Option<(Box<dyn StepRunner + Send>, ModelLimits)>,
    ) -> Result<House, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let gate = Gate::default();
        let SchedulerConfig { blocks, block_size, slots, .. } = self.scheduler;
        let inner = FakeRunner::new(self.model, blocks, block_size, slots).saying(0.001, 0.0001);
        let fake = || -> (Box<dyn StepRunner + Send>, ModelLimits) {
            (Box::new(Gated { inner, gate: gate.clone() }), self.limits())
        };
        let (runner, limits) = real.unwrap_or_else(fake);
        let parts = WorkerParts {
            identity: self.identity(),
            name: NAME.into(),
            aliases: vec!["alias".into()],
            card: self.card.clone(),
            limits,
            tp: 1,
            scheduler: self.scheduler.clone(),
            runner,
        };
        let registry = Registry::new();
        let metrics = Arc::new(WorkerMetrics::new(&registry, self.id, NAME));
        let shutdown = Shutdown::without_signals();
        let worker = Worker::start(
            self.settings.clone(),
            parts,
            Some(TOKEN),
            listener,
            vec![address.clone()],
            registration,
            metrics.clone(),
            shutdown.clone(),
        );
        let worker = soon(worker).await?;
        assert_eq!(worker.address().to_string(), address);
        Ok(House { shape: self, worker, gate, metrics, shutdown })
    }

    pub(crate) async fn start(self) -> House {
        let registration = self.registration();
        self.start_with(registration).await
    }

    pub(crate) async fn start_with(self, registration: RegistrationSettings) -> House {
        let house = self.try_start_with(registration, None).await.unwrap();
        soon(house.worker.ready()).await;
        house
    }

    pub(crate) async fn start_on(self, runner: Box<dyn StepRunner + Send>, limits: ModelLimits) -> House {
        let registration = self.registration();
        let house = self.try_start_with(registration, Some((runner, limits))).await.unwrap();
        soon(house.worker.ready()).await;
        house
    }
}

/// A worker that runs.
pub(crate) struct House {
    pub(crate) shape: Shape,
    pub(crate) worker: Worker,
    pub(crate) gate: Gate,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) shutdown: Shutdown,
}

pub(crate) type Client = WorkerServiceClient<InterceptedService<Channel, Token>>;

/// Puts a token into every call.
#[derive(Clone)]
pub(crate) struct Token(Option<MetadataValue<Ascii>>);

impl tonic::service::Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(CLUSTER_TOKEN_KEY, token.clone());
        }
        Ok(request)
    }
}

pub(crate) fn hello(router_id: u64) -> RouterHello {
    RouterHello { router_id, wire: Some(WIRE), stream: 1 }
}

impl House {
    pub(crate) async fn channel(&self) -> Channel {
        self.channel_with(|endpoint| endpoint).await
    }

    pub(crate) async fn channel_with(&self, change: impl FnOnce(Endpoint) -> Endpoint) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.worker.address())).unwrap();
        soon(change(endpoint).connect()).await.unwrap()
    }

    pub(crate) async fn client(&self) -> Client {
        client(self.channel().await, Some(TOKEN))
    }

    pub(crate) async fn router(&self, router_id: u64) -> Router {
        Router::open(self.client().await, router_id).await
    }

    pub(crate) async fn status(&self) -> EngineStatus {
        status(&mut self.client().await).await
    }

    /// Waits until the engine is as said.
    pub(crate) async fn until(&self, is_so: impl Fn(&EngineStatus) -> bool) -> EngineStatus {
        let mut client = self.client().await;
        soon(async {
            loop {
                let status = status(&mut client).await;
                if is_so(&status) {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }

    /// Waits until nothing runs; then every block is back.
    pub(crate) async fn at_rest(&self) -> EngineStatus {
        let status = self.until(|status| status.running == 0 && status.waiting == 0).await;
        assert_eq!((status.blocks_free, status.waiting_tokens), (status.blocks_total, 0), "blocks leaked");
        status
    }

    /// What stands in the registry, if anything does.
    pub(crate) async fn record(&self) -> Option<WorkerRecord> {
        record(&self.shape).await
    }

    pub(crate) async fn stop(self) -> Result<(), Failure> {
        self.shutdown.drain();
        soon(self.worker.stopped()).await
    }
}

pub(crate) async fn record(shape: &Shape) -> Option<WorkerRecord> {
    let key = shape
        .registration()
        .cluster
        .worker_key(&petek_cluster::WorkerKey { name: NAME.into(), worker: shape.id.into() });
    let entry = shape.registry.another_client().get(&key).await.unwrap()?;
    let key = petek_cluster::WorkerKey { name: NAME.into(), worker: shape.id.into() };
    Some(WorkerRecord::parse(&key, &entry.value).unwrap())
}

pub(crate) fn client(channel: Channel, token: Option<&str>) -> Client {
    WorkerServiceClient::with_interceptor(channel, Token(token.map(|token| token.parse().unwrap())))
        .max_decoding_message_size(16 << 20)
}

pub(crate) async fn status(client: &mut Client) -> EngineStatus {
    soon(client.get_status(GetStatusRequest {})).await.unwrap().into_inner().status.unwrap()
}

pub(crate) fn refusal(status: &Status) -> WireRefusal {
    WireRefusal::read(status).unwrap_or_else(|| panic!("not one of ours: {status:?}"))
}

/// A request as a test asks it.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) raw: RawParams,
    pub(crate) deadline_ms: Option<u64>,
}

impl Ask {
    /// Greedy, and for as long as it may.
    pub(crate) fn new(prompt: &[TokenId], max_tokens: u32) -> Self {
        let raw = RawParams {
            temperature: Some(0.0),
            max_tokens: Some(max_tokens.into()),
            ignore_eos: Some(true),
            ..RawParams::default()
        };
        Ask { prompt: prompt.to_vec(), raw, deadline_ms: None }
    }

    /// What its sequences must get, by the model alone: the draws after resumed tokens, ended as they are to end.
    pub(crate) fn expected(&self, shape: &Shape) -> BTreeMap<u32, (Vec<TokenId>, FinishReason)> {
        let limits = shape.limits();
        let params = self.raw.check(&limits, 0).unwrap();
        let max_tokens = params.max_tokens_after(&self.prompt, &limits).unwrap() as usize;
        let of = |index| {
            let sampling = params.slot_sampling(index);
            let resumed = &params.resumed_ids;
            // What was resumed may be the end already.
            if let Some(last) = resumed.last() {
                if params.eos_ids.contains(last) {
                    return (Vec::new(), FinishReason::StopEos);
                }
                if params.stop_ids.contains(last) {
                    return (Vec::new(), FinishReason::StopToken);
                }
            }
            let draws = shape.model.expected(&self.prompt, resumed, &sampling, max_tokens - resumed.len());
            let mut ids = Vec::new();
            for draw in draws {
                let Draw::Token(id) = draw else { return (ids, FinishReason::Failed) };
                ids.push(id);
                if params.eos_ids.contains(&id) {
                    return (ids, FinishReason::StopEos);
                }
                if params.stop_ids.contains(&id) {
                    return (ids, FinishReason::StopToken);
                }
            }
            (ids, FinishReason::Length)
        };
        (0..params.n).map(|index| (index, of(index))).collect()
    }

    pub(crate) fn submit(&self, shape: &Shape, dispatch: u64) -> Submit {
        let limits = shape.limits();
        let params = self.raw.check(&limits, 0).unwrap();
        let max_tokens = params.max_tokens_after(&self.prompt, &limits).unwrap();
        Submit { epoch: shape.epoch.0, ..self.submit_for(&params, max_tokens, dispatch) }
    }

    pub(crate) fn submit_for(&self, params: &Params, max_tokens: u32, dispatch: u64) -> Submit {
        let submit = Submit::of(params, self.prompt.clone(), max_tokens);
        assert_eq!(submit.sequences.last().unwrap().seed, sequence_seed(params.seed, params.n - 1));
        Submit {
            dispatch,
            request_id: vec![9; 16].into(),
            attempt: 1,
            epoch: EPOCH.0,
            deadline_ms: self.deadline_ms,
            ..submit
        }
    }
}

/// One Execute stream, played by the test.
pub(crate) struct Router {
    up: mpsc::Sender<ExecuteRequest>,
    down: Streaming<ExecuteResponse>,
    pub(crate) dispatch: u64,
    /// By dispatch and index.
    pub(crate) heard: BTreeMap<(u64, u32), Heard>,
    pub(crate) admitted: BTreeMap<u64, u32>,
    pub(crate) refused: BTreeMap<u64, WireRefusal>,
    /// Per dispatch, how many of its sequences have not ended.
    open: BTreeMap<u64, usize>,
    last_step: u64,
}

/// What came of a sequence.
#[derive(Default)]
pub(crate) struct Heard {
    /// Output position of the first token that is due.
    pub(crate) resumed: u32,
    pub(crate) ids: Vec<TokenId>,
    pub(crate) logprobs: usize,
    pub(crate) finished: Option<Finished>,
}

impl Router {
    pub(crate) async fn open(mut client: Client, router_id: u64) -> Self {
        let (up, messages) = mpsc::channel(1_024);
        up.try_send(ExecuteRequest { message: Some(Up::Hello(hello(router_id))) }).unwrap();
        let down = soon(client.execute(ReceiverStream::new(messages))).await.unwrap().into_inner();
        let mut router = Router {
            up,
            down,
            dispatch: 0,
            heard: BTreeMap::new(),
            admitted: BTreeMap::new(),
            refused: BTreeMap::new(),
            open: BTreeMap::new(),
            last_step: 0,
        };
        let first = soon(router.down.message()).await.unwrap().unwrap().message;
        let Some(Down::Hello(hello)) = first else { panic!("it greets first, not with {first:?}") };
        WorkerIdentity::try_from(hello).unwrap();
        router
    }

    pub(crate) async fn say(&self, message: Up) {
        soon(self.up.send(ExecuteRequest { message: Some(message) })).await.unwrap();
    }

    pub(crate) async fn heartbeat(&self) {
        self.say(Up::Heartbeat(Heartbeat {})).await;
    }

    pub(crate) async fn submit(&mut self, shape: &Shape, ask: &Ask) -> u64 {
        let submit = ask.submit(shape, self.dispatch + 1);
        self.submit_as(submit).await
    }

    pub(crate) async fn submit_as(&mut self, submit: Submit) -> u64 {
        self.dispatch = submit.dispatch;
        self.open.insert(submit.dispatch, submit.sequences.len());
        for SubmitSequence { index, resumed_ids, .. } in &submit.sequences {
            let heard = Heard { resumed: resumed_ids.len() as u32, ..Heard::default() };
            self.heard.insert((submit.dispatch, *index), heard);
        }
        self.say(Up::Submit(submit)).await;
        self.dispatch
    }

    pub(crate) async fn cancel(&self, dispatch: u64, indexes: &[u32]) {
        self.say(Up::Cancel(Cancel { dispatch, indexes: indexes.to_vec() })).await;
    }

    /// Takes one message in, and checks that it may come now.
    ///
    /// # Errors
    /// The stream's end; none with it is a clean one.
    pub(crate) async fn hear(&mut self) -> Result<(), Option<Status>> {
        let message = soon(self.down.message()).await.map_err(Some)?.ok_or(None)?;
        match message.message.expect("no empty message") {
            Down::Heartbeat(_) => {}
            Down::Hello(_) | Down::Moved(_) => panic!("not now"),
            Down::Admitted(admitted) => {
                let before = self.admitted.insert(admitted.dispatch, admitted.cached_tokens);
                assert_eq!(before, None, "admitted twice");
            }
            Down::Step(step) => {
                assert!(!step.entries.is_empty() && step.step > self.last_step, "steps go up");
                self.last_step = step.step;
                for entry in step.entries {
                    entry.check().unwrap();
                    assert!(self.admitted.contains_key(&entry.dispatch), "tokens before the admission");
                    let heard = self.heard.get_mut(&(entry.dispatch, entry.index)).expect("asked for");
                    assert!(heard.finished.is_none(), "a token after the end");
                    let due = heard.resumed + heard.ids.len() as u32;
                    assert_eq!(entry.first_index, due, "a token is lost or doubled");
                    heard.logprobs += entry.logprobs.map_or(0, |logprobs| logprobs.rows().unwrap().len());
                    heard.ids.extend(entry.ids);
                }
            }
            Down::Finished(finished) => {
                let heard = self.heard.get_mut(&(finished.dispatch, finished.index)).expect("asked for");
                let usage = finished.usage.unwrap();
                assert_eq!(usage.completion_tokens, heard.resumed + heard.ids.len() as u32);
                assert!(heard.finished.is_none(), "finished twice");
                let dispatch = finished.dispatch;
                heard.finished = Some(finished);
                let open = self.open.entry(dispatch).or_default();
                *open = open.saturating_sub(1);
                if *open == 0 {
                    self.open.remove(&dispatch);
                }
            }
            Down::Refused(refused) => {
                assert!(!self.admitted.contains_key(&refused.dispatch), "what was taken cannot be refused");
                let refusal = WireRefusal::read_rpc(&refused.status.unwrap()).unwrap();
                self.open.remove(&refused.dispatch);
                assert!(self.refused.insert(refused.dispatch, refusal).is_none(), "refused twice");
            }
        }
        Ok(())
    }

    /// Listens until something is so.
    pub(crate) async fn until(&mut self, is_so: impl Fn(&Router) -> bool) {
        while !is_so(self) {
            self.hear().await.expect("the stream goes on");
        }
    }

    /// Listens until all that was asked has ended.
    pub(crate) async fn finish(&mut self) {
        self.until(|router| router.open.is_empty()).await;
    }

    pub(crate) fn is_over(&self, dispatch: u64) -> bool {
        dispatch <= self.dispatch && !self.open.contains_key(&dispatch)
    }

    /// Listens to the stream's end.
    pub(crate) async fn end(&mut self) -> Option<Status> {
        loop {
            if let Err(end) = self.hear().await {
                return end;
            }
        }
    }

    pub(crate) fn reason(&self, dispatch: u64, index: u32) -> FinishReason {
        self.heard[&(dispatch, index)].finished.as_ref().expect("it has ended").reason()
    }

    /// Why a sequence failed.
    pub(crate) fn failure(&self, dispatch: u64, index: u32) -> WireRefusal {
        assert_eq!(self.reason(dispatch, index), FinishReason::Failed);
        let finished = self.heard[&(dispatch, index)].finished.as_ref().unwrap();
        WireRefusal::read_rpc(finished.error.as_ref().unwrap()).unwrap()
    }
}
