//! What an operator asks: who is there, and why a request would go where it would go.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use petek_core::refusal::Refusal;
use petek_proto::admin::v1::admin_service_server::AdminService;
use petek_proto::admin::v1::watch_workers_response::Event;
use petek_proto::admin::v1::{
    CandidateState, DrainWorkerRequest, DrainWorkerResponse, ExplainRouteRequest, ExplainRouteResponse,
    IndexState, ListWorkersRequest, ListWorkersResponse, RouteCandidate, RouteDecision, RouterView,
    WatchWorkersRequest, WatchWorkersResponse, Worker, WorkerSnapshot, explain_route_request,
};
use petek_proto::refusal::{WireRefusal, status};
use petek_proto::worker::v1 as worker;
use tonic::{Request, Response, Status};

use super::inference::{chat, generation, small_enough, taken_in};
use crate::feed::{Freshness, WorkerState};
use crate::gateway::{Gateway, Prepared, random};
use crate::link::Link;
use crate::lock;
use crate::route::{TIE_SHARE, WAIT_WEIGHT_PER_S};
use crate::workers::{Candidate, Explained, Wanted};

/// See the head of this file.
pub(super) struct Admin {
    pub(super) gateway: Arc<Gateway>,
}

#[tonic::async_trait]
impl AdminService for Admin {
    type WatchWorkersStream = Pin<Box<dyn Stream<Item = Result<WatchWorkersResponse, Status>> + Send>>;

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        let of = self.filter(&request.into_inner().model)?;
        small_enough(ListWorkersResponse {
            workers: workers(&self.gateway, of.as_deref()),
            registry_stale: stale(&self.gateway),
        })
    }

    async fn watch_workers(
        &self,
        request: Request<WatchWorkersRequest>,
    ) -> Result<Response<Self::WatchWorkersStream>, Status> {
        let of = self.filter(&request.into_inner().model)?;
        let gateway = self.gateway.clone();
        let changes = gateway.workers.changes();
        let watch = Watch { gateway, of, changes, seen: None };
        let events = stream::unfold(watch, |mut watch| async move { Some((watch.next().await?, watch)) });
        Ok(Response::new(events.flat_map(|batch| stream::iter(batch.into_iter().map(Ok))).boxed()))
    }

    async fn drain_worker(
        &self,
        request: Request<DrainWorkerRequest>,
    ) -> Result<Response<DrainWorkerResponse>, Status> {
        let (_, arrival, request) = taken_in(request)?;
        let DrainWorkerRequest { worker: id, epoch, deadline_ms } = request;
        let unknown = || Refusal::invalid("worker", "no worker of this id is known; ListWorkers shows them");
        let link = self.gateway.workers.link(&id).ok_or_else(|| status(&unknown()))?;
        let current = link.entry.epoch.0;
        if let Some(named) = epoch.filter(|named| *named != current) {
            return Err(status(&Refusal::StaleEpoch { named, current }));
        }
        let drain = worker::DrainRequest { epoch: current, deadline_ms };
        let drained = tokio::time::timeout_at(arrival.deadline, link.drain(drain)).await;
        drained.map_err(|_| status(&Refusal::DeadlineExceeded { output_tokens: 0 }))??;
        small_enough(DrainWorkerResponse { worker: Some(described(&link)) })
    }

    async fn explain_route(
        &self,
        request: Request<ExplainRouteRequest>,
    ) -> Result<Response<ExplainRouteResponse>, Status> {
        let (_, arrival, request) = taken_in(request)?;
        let (at, input) = match request.request {
            None => return Err(status(&Refusal::invalid("request", "must be set: generation or chat"))),
            Some(explain_route_request::Request::Generation(spec)) => ("generation", generation(Some(spec))),
            Some(explain_route_request::Request::Chat(spec)) => ("chat", chat(Some(spec))),
        };
        let prepared = async {
            let input = input?;
            let served = self.gateway.workers.resolve(input.model())?;
            self.gateway.prepare(input, served, arrival.deadline).await
        };
        let prepared =
            prepared.await.map_err(|refusal| Status::from(WireRefusal::from(&refusal).placed(at)))?;
        small_enough(ExplainRouteResponse { decision: Some(explained(&prepared)) })
    }
}

impl Admin {
    /// The name to show workers of; none is all.
    fn filter(&self, model: &str) -> Result<Option<String>, Status> {
        if model.is_empty() {
            return Ok(None);
        }
        // Also of a model that nobody serves right now.
        let known = self.gateway.workers.links().iter().any(|link| link.entry.name == model);
        let resolved = || self.gateway.workers.resolve(model).map(|served| served.pool.name.clone());
        let name = if known { Ok(model.to_owned()) } else { resolved() };
        name.map(Some).map_err(|refusal| status(&refusal))
    }
}

/// One client that watches: what it was told last.
struct Watch {
    gateway: Arc<Gateway>,
    of: Option<String>,
    changes: tokio::sync::watch::Receiver<u64>,
    seen: Option<(BTreeMap<String, Worker>, bool)>,
}

impl Watch {
    /// All workers first, then what is different at each change; a change that shows in nothing gives nothing.
    async fn next(&mut self) -> Option<Vec<WatchWorkersResponse>> {
        if self.seen.is_some() {
            self.changes.changed().await.ok()?;
        }
        self.changes.mark_unchanged();
        let list = workers(&self.gateway, self.of.as_deref());
        let now: BTreeMap<String, Worker> =
            list.iter().map(|worker| (worker.id.clone(), lasting(worker))).collect();
        let is_stale = stale(&self.gateway);
        let events = match &self.seen {
            None => {
                let snapshot = Event::Snapshot(WorkerSnapshot { workers: list });
                std::iter::once(snapshot).chain(is_stale.then_some(Event::RegistryStale(true))).collect()
            }
            Some((before, was_stale)) => {
                let changed = list.into_iter().filter(|worker| before.get(&worker.id) != now.get(&worker.id));
                let removed = before.keys().filter(|id| !now.contains_key(*id));
                let events = changed.map(Event::Changed).chain(removed.cloned().map(Event::Removed));
                let stale = (is_stale != *was_stale).then_some(Event::RegistryStale(is_stale));
                events.chain(stale).collect::<Vec<_>>()
            }
        };
        self.seen = Some((now, is_stale));
        Some(events.into_iter().map(|event| WatchWorkersResponse { event: Some(event) }).collect())
    }
}

fn workers(gateway: &Gateway, of: Option<&str>) -> Vec<Worker> {
    let links = gateway.workers.links();
    let shown = links.iter().filter(|link| of.is_none_or(|name| link.entry.name == name));
    shown.map(|link| described(link)).collect()
}

fn stale(gateway: &Gateway) -> bool {
    gateway.workers.freshness() == Freshness::Stale
}

fn described(link: &Link) -> Worker {
    let entry = &link.entry;
    Worker {
        id: entry.id.clone(),
        epoch: entry.epoch.0,
        addresses: entry.addresses.clone(),
        model: entry.name.clone(),
        revision: entry.revision.to_string(),
        text_hash: entry.text_hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        numerics_id: entry.numerics_id.clone(),
        block_size_tokens: entry.block_size,
        hash_scheme: entry.hash_scheme,
        context_tokens: entry.context_tokens,
        blocks_total: entry.blocks_total,
        tp: entry.tp,
        roles: entry.roles.clone(),
        adapters: Vec::new(),
        state: match link.state() {
            WorkerState::Loading => worker::WorkerState::Loading,
            WorkerState::Serving => worker::WorkerState::Serving,
            WorkerState::Draining => worker::WorkerState::Draining,
        }
        .into(),
        wire: Some(entry.wire),
        started_unix_ms: entry.started_unix_ms,
        view: Some(router_view(link)),
    }
}

fn router_view(link: &Link) -> RouterView {
    let (seen, link_error) = link.seen();
    let (load, load_age) = link.load(link.common.now()).unzip();
    let (index_seq, index_resyncs) = link.kv_progress();
    let index = lock(&link.common.index);
    let state = if index.is_synced(link.key()) { IndexState::Synced } else { IndexState::Syncing };
    let held = index.held(link.key());
    RouterView {
        link: seen.into(),
        link_error,
        load,
        load_age_ms: load_age.map(ms),
        own_requests: link.own_requests(),
        index: state.into(),
        index_blocks: held.blocks,
        index_seq,
        index_resyncs,
        index_digest: held.digest.0.to_vec().into(),
    }
}

/// What of a worker is worth telling that it changed: not what always does.
fn lasting(worker: &Worker) -> Worker {
    let view = worker.view.as_ref().map(|view| RouterView {
        link: view.link,
        link_error: view.link_error.clone(),
        index: view.index,
        index_resyncs: view.index_resyncs,
        load: view.load.as_ref().map(|load| worker::LoadReport { state: load.state, ..Default::default() }),
        ..RouterView::default()
    });
    Worker { view, ..worker.clone() }
}

fn explained(prepared: &Prepared) -> RouteDecision {
    let (pool, ask) = (&prepared.served.pool, prepared.ask());
    let wanted = Wanted { ask, names: &prepared.block_names };
    let Explained { candidates: seen, decision } = pool.explain(&wanted, random());
    let mut candidates: Vec<RouteCandidate> = Vec::with_capacity(seen.len());
    for (Candidate { link, view, .. }, cost) in seen.iter().zip(&decision.costs) {
        let predicted = view.predicted_blocks.saturating_mul(ask.block_size);
        candidates.push(RouteCandidate {
            worker: link.entry.id.clone(),
            epoch: link.entry.epoch.0,
            state: view.state.into(),
            cost_s: cost.total_s(),
            wait_s: cost.wait_s,
            prefill_s: cost.prefill_s,
            decode_s: cost.decode_s,
            matched_tokens: cost.matched_tokens,
            predicted_tokens: predicted.min(cost.matched_tokens),
            uncached_tokens: cost.uncached_tokens,
            waiting_tokens: view.waiting_uncached_tokens,
            own_waiting_tokens: view.own_waiting_tokens,
            running: view.running,
            prefill_tokens_per_s: view.rates.prefill_tokens_per_s,
            step_s: view.rates.step_s,
            step_one_more_s: view.rates.step_one_more_s,
            load_age_ms: view.load_age.map_or(0.0, ms),
        });
    }
    let unable = |candidate: &RouteCandidate| candidate.state() != CandidateState::Eligible;
    candidates.sort_by(|a, b| unable(a).cmp(&unable(b)).then(a.cost_s.total_cmp(&b.cost_s)));
    RouteDecision {
        model: pool.name.clone(),
        revision: pool.revision.to_string(),
        prompt_tokens: ask.prompt_tokens,
        block_size_tokens: ask.block_size,
        prompt_blocks: prepared.block_names.len() as u32,
        decode_tokens: ask.decode_tokens(),
        mean_wait_s: decision.mean_wait_s,
        wait_weight_per_s: WAIT_WEIGHT_PER_S,
        tie_share: TIE_SHARE,
        worker: decision.chosen.map(|at| seen[at].link.entry.id.clone()).unwrap_or_default(),
        reason: decision.reason.into(),
        candidates,
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
