//! A cluster in one process: scripted workers over loopback, a router, and clients.
//!
//! A scripted worker is the real service with an engine that does as data says: which tokens each sequence gets, or
//! that nothing happens by itself and the test speaks for it.

pub(crate) mod chain;

mod cache;

mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use petek_core::hash::Revision;
use petek_proto::admin::v1::admin_service_client::AdminServiceClient;
use petek_proto::admin::v1::watch_workers_response::Event;
use petek_proto::admin::v1::{
    ExplainRouteRequest, IndexState, Link, ListWorkersRequest, RouteDecision, RouterView,
    WatchWorkersRequest, explain_route_request,
};
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{
    Finished as PublicFinished, GenerationEvent, GenerationSpec, SamplingParams, Started,
    StreamGenerateRequest, TokenIds, generation_event, generation_spec,
};
use petek_proto::refusal::WireRefusal;
use petek_router::{Freshness, LinkSettings, Listeners, Router, RouterSettings, WorkerEntry, WorkerList};
use petek_service::{Registry, RouterMetrics, Shutdown};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub(crate) use cache::names;
pub(crate) use worker::{AfterLast, Heard, Script, Worker};

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
pub(crate) const REVISION: Revision = Revision([7; 32]);
const CLUSTER_TOKEN: &str = "comb";

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
        let whole = |view: &RouterView| {
            view.link() == Link::Connected && view.load.is_some() && view.index() == IndexState::Synced
        };
        soon(self.router.ready()).await;
        self.watched(|views| views.values().filter(|view| whole(view)).count() >= count).await;
    }

    /// Waits until the router sees its workers so.
    pub(crate) async fn watched(&self, is_so: impl Fn(&HashMap<String, RouterView>) -> bool) {
        let mut events =
            self.admin().await.watch_workers(WatchWorkersRequest::default()).await.unwrap().into_inner();
        let mut views: HashMap<String, RouterView> = HashMap::new();
        // However many changes come, it is waited for as a whole.
        soon(async {
            while !is_so(&views) {
                match events.message().await.unwrap().unwrap().event.unwrap() {
                    Event::Snapshot(snapshot) => {
                        views.extend(snapshot.workers.into_iter().map(|w| (w.id, w.view.unwrap())));
                    }
                    Event::Changed(worker) => drop(views.insert(worker.id, worker.view.unwrap())),
                    Event::Removed(id) => drop(views.remove(&id)),
                    Event::RegistryStale(_) => {}
                }
            }
        })
        .await;
    }

    pub(crate) async fn client(&self) -> InferenceServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.router.public_address())).unwrap();
        InferenceServiceClient::new(endpoint.connect().await.unwrap())
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.router.admin_address())).unwrap();
        AdminServiceClient::new(endpoint.connect().await.unwrap())
    }

    /// How the router sees a worker now.
    pub(crate) async fn view(&self, worker: &str) -> RouterView {
        let listed = self.admin().await.list_workers(ListWorkersRequest::default()).await.unwrap();
        let known = listed.into_inner().workers.into_iter().find(|known| known.id == worker);
        known.and_then(|known| known.view).expect("the router knows the worker")
    }

    /// Where a request would go now.
    pub(crate) async fn explain(&self, spec: GenerationSpec) -> RouteDecision {
        let request = Some(explain_route_request::Request::Generation(spec));
        let explained = self.admin().await.explain_route(ExplainRouteRequest { request }).await.unwrap();
        explained.into_inner().decision.unwrap()
    }

    /// What a metric of one value, or with these labels, is now; 0, where nothing was counted.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.registry.text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a whole number"))
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
