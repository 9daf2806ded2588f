//! Whose request is which: turns what the scheduler says of numbers into what routers hear of dispatches.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use petek_core::ids::{RequestNumber, TokenId};
use petek_core::refusal::Refusal;
use petek_core::scheduler::{Event, FinishReason as CoreReason, NewRequest, Usage as CoreUsage};
use petek_proto::refusal::rpc_status;
use petek_proto::worker::v1::{Admitted, FinishReason, Finished, Refused, RouterProgress, Usage};
use petek_service::{Outcome, WorkerMetrics};
use tonic::Status;
use tracing::Span;

use super::LinkId;
use crate::outbox::{AskedLogprobs, News, Outbox, Standing};

/// The Execute streams and the requests that came by them.
pub(super) struct Desk {
    links: HashMap<LinkId, Link>,
    requests: HashMap<RequestNumber, Live>,
    /// Requests that have not been admitted.
    waiting: u32,
    metrics: Arc<WorkerMetrics>,
}

/// One Execute stream.
struct Link {
    router_id: u64,
    stream: u32,
    /// The last dispatch that came.
    dispatch: u64,
    outbox: Arc<Outbox>,
    requests: HashMap<u64, RequestNumber>,
    /// Of this step, not yet in the outbox.
    news: Vec<News>,
}

/// A request that has not ended.
pub(super) struct Live {
    link: LinkId,
    dispatch: u64,
    prompt_tokens: u64,
    logprobs: AskedLogprobs,
    came: Duration,
    admitted: Option<Duration>,
    /// Those that have not ended.
    sequences: Vec<LiveSequence>,
    /// What it will count as, by the sequences that have ended.
    outcome: Outcome,
    span: Span,
}

struct LiveSequence {
    index: u32,
    first_token: Option<Duration>,
    last_id: Option<TokenId>,
}

/// A request on its way into the scheduler.
pub(super) struct Arrival {
    pub(super) link: LinkId,
    pub(super) dispatch: u64,
    pub(super) came: Duration,
    pub(super) span: Span,
}

impl Live {
    /// What is kept of a request that is about to be handed to the scheduler.
    pub(super) fn new(arrival: Arrival, new: &NewRequest) -> Self {
        let Arrival { link, dispatch, came, span } = arrival;
        let logprobs = new.params.logprobs.map_or(AskedLogprobs::No, |_| AskedLogprobs::Yes);
        let sequences = new.sequences.iter().map(|sequence| LiveSequence {
            index: sequence.index,
            first_token: None,
            last_id: sequence.resumed_ids.last().copied(),
        });
        Live {
            link,
            dispatch,
            prompt_tokens: new.prompt.len() as u64,
            logprobs,
            came,
            admitted: None,
            sequences: sequences.collect(),
            outcome: Outcome::Finished,
            span,
        }
    }

    /// Closes one sequence and says what it took.
    fn close(&mut self, index: u32, used: CoreUsage, now: Duration) -> Usage {
        let at = self.sequences.iter().position(|sequence| sequence.index == index);
        let first_token = at.and_then(|at| self.sequences.swap_remove(at).first_token);
        let ms = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() * 1e3;
        let admitted = self.admitted.unwrap_or(now);
        Usage {
            prompt_tokens: used.prompt_tokens,
            cached_tokens: used.cached_tokens,
            completion_tokens: used.output_tokens,
            drafted_tokens: 0,
            accepted_tokens: 0,
            preemptions: used.preemptions,
            queue_ms: ms(self.came, admitted),
            prefill_ms: first_token.map_or(0.0, |first| ms(admitted, first)),
            decode_ms: first_token.map_or(0.0, |first| ms(first, now)),
        }
    }
}

impl Desk {
    pub(super) fn new(metrics: Arc<WorkerMetrics>) -> Self {
        Desk { links: HashMap::new(), requests: HashMap::new(), waiting: 0, metrics }
    }

    /// Requests that have not ended.
    pub(super) fn requests(&self) -> usize {
        self.requests.len()
    }

    /// Requests that have not been admitted.
    pub(super) fn waiting(&self) -> u32 {
        self.waiting
    }

    /// How far each stream has been read.
    pub(super) fn progress(&self) -> Vec<RouterProgress> {
        let progress = self.links.values().map(|link| RouterProgress {
            router_id: link.router_id,
            stream: link.stream,
            dispatch: link.dispatch,
        });
        let mut all: Vec<_> = progress.collect();
        all.sort_unstable_by_key(|router| (router.router_id, router.stream));
        all
    }

    pub(super) fn attach(&mut self, id: LinkId, router_id: u64, stream: u32, outbox: Arc<Outbox>) {
        let link =
            Link { router_id, stream, dispatch: 0, outbox, requests: HashMap::new(), news: Vec::new() };
        self.links.insert(id, link);
        self.metrics.streams_open.set(self.links.len() as i64);
    }

    /// Forgets a stream; what is still to be cancelled of it.
    pub(super) fn detach(&mut self, id: LinkId) -> Vec<RequestNumber> {
        let link = self.links.remove(&id);
        self.metrics.streams_open.set(self.links.len() as i64);
        link.map(|link| link.requests.into_values().collect()).unwrap_or_default()
    }

    /// Notes that a dispatch has come. False: its stream is gone, and nobody waits for it.
    pub(super) fn expect(&mut self, arrival: &Arrival) -> bool {
        let Some(link) = self.links.get_mut(&arrival.link) else { return false };
        link.dispatch = arrival.dispatch;
        true
    }

    /// Opens a request under the scheduler's number.
    pub(super) fn open(&mut self, number: RequestNumber, live: Live) {
        if let Some(link) = self.links.get_mut(&live.link) {
            link.requests.insert(live.dispatch, number);
        }
        self.requests.insert(number, live);
        self.waiting += 1;
    }

    /// Refuses what never reached the scheduler.
    pub(super) fn refuse(&mut self, arrival: &Arrival, refusal: &Refusal) {
        self.metrics.requests.of(Outcome::Refused).inc();
        refused(&arrival.span, refusal);
        let status = Some(rpc_status(refusal));
        self.say(arrival.link, News::Refused(Refused { dispatch: arrival.dispatch, status }));
    }

    pub(super) fn number(&self, link: LinkId, dispatch: u64) -> Option<RequestNumber> {
        self.links.get(&link)?.requests.get(&dispatch).copied()
    }

    /// Takes an event of the scheduler.
    pub(super) fn hear(&mut self, event: Event, now: Duration) {
        match event {
            Event::Admitted { request, cached_tokens } => self.admitted(request, cached_tokens, now),
            Event::Token { request, index, position, token } => {
                let Some(live) = self.requests.get_mut(&request) else { return };
                if let Some(sequence) = live.sequences.iter_mut().find(|s| s.index == index) {
                    sequence.first_token.get_or_insert(now);
                    sequence.last_id = Some(token.id);
                }
                let (link, dispatch, logprobs) = (live.link, live.dispatch, live.logprobs);
                self.metrics.output_tokens.inc();
                self.say(link, News::Token { dispatch, index, position, token, logprobs });
            }
            Event::Finished { request, index, reason, usage } => {
                let Some(live) = self.requests.get_mut(&request) else { return };
                if reason == CoreReason::Cancelled {
                    live.outcome = Outcome::Cancelled;
                }
                let last_id = live.sequences.iter().find(|s| s.index == index).and_then(|s| s.last_id);
                let (reason, stop_token_id) = match reason {
                    CoreReason::StopEos => (FinishReason::StopEos, last_id),
                    CoreReason::StopToken(id) => (FinishReason::StopToken, Some(id)),
                    CoreReason::Length => (FinishReason::Length, None),
                    CoreReason::Cancelled => (FinishReason::Cancelled, None),
                };
                let finished = Finished {
                    dispatch: live.dispatch,
                    index,
                    reason: reason.into(),
                    stop_token_id,
                    error: None,
                    usage: Some(live.close(index, usage, now)),
                };
                let (link, is_over) = (live.link, live.sequences.is_empty());
                self.say(link, News::Finished(finished));
                if is_over {
                    self.close(request);
                }
            }
            Event::Refused { request, refusal, unfinished } => {
                self.ended(request, &refusal, &unfinished, now);
            }
        }
    }

    /// Hands over what each router is to hear of this step. Requests of streams that nobody reads any more are
    /// returned: they are to be cancelled.
    pub(super) fn send(&mut self, step: u64, now: Duration) -> Vec<RequestNumber> {
        let mut gone = Vec::new();
        for (id, link) in &mut self.links {
            if link.news.is_empty() {
                continue;
            }
            match link.outbox.push(step, now, link.news.drain(..)) {
                Standing::Open => {}
                Standing::Closed => gone.push(*id),
                Standing::CutOff => {
                    self.metrics.streams_cut.inc();
                    tracing::warn!(
                        router = format_args!("{:016x}", link.router_id),
                        "a router does not read its stream: cut off"
                    );
                    gone.push(*id);
                }
            }
        }
        gone.into_iter().flat_map(|id| self.detach(id)).collect()
    }

    /// Ends all streams, each after what it has not read.
    pub(super) fn end_streams(&mut self, end: &Result<(), Status>) {
        for link in self.links.values() {
            link.outbox.end(end.clone());
        }
        self.links.clear();
        self.metrics.streams_open.set(0);
    }

    /// Ends what is still open where the scheduler cannot be asked any more.
    pub(super) fn abandon(&mut self, refusal: &Refusal, now: Duration) {
        let numbers: Vec<RequestNumber> = self.requests.keys().copied().collect();
        for number in numbers {
            let live = &self.requests[&number];
            let unfinished: Vec<_> = live.sequences.iter().map(|s| (s.index, CoreUsage::default())).collect();
            self.ended(number, refusal, &unfinished, now);
        }
        self.send(0, now);
    }

    fn admitted(&mut self, request: RequestNumber, cached_tokens: u32, now: Duration) {
        let Some(live) = self.requests.get_mut(&request) else { return };
        live.admitted = Some(now);
        live.span.record("cached_tokens", cached_tokens);
        let queued = now.saturating_sub(live.came);
        let queue_ms = queued.as_secs_f64() * 1e3;
        self.metrics.prompt_tokens.inc_by(live.prompt_tokens);
        self.metrics.cached_tokens.inc_by(cached_tokens.into());
        self.metrics.queue_seconds.observe(queued.as_secs_f64());
        self.waiting -= 1;
        let (link, dispatch) = (live.link, live.dispatch);
        self.say(link, News::Admitted(Admitted { dispatch, cached_tokens, queue_ms }));
    }

    /// A request has ended with a refusal. Before its admission it was not taken; after it, each of its sequences
    /// that had not finished has failed.
    fn ended(
        &mut self,
        request: RequestNumber,
        refusal: &Refusal,
        unfinished: &[(u32, CoreUsage)],
        now: Duration,
    ) {
        let Some(live) = self.requests.get_mut(&request) else { return };
        let (link, dispatch) = (live.link, live.dispatch);
        refused(&live.span, refusal);
        if matches!(refusal, Refusal::NumericalError { .. }) {
            self.metrics.numerical_errors.inc();
        }
        if live.admitted.is_none() && live.outcome == Outcome::Finished {
            live.outcome = Outcome::Refused;
            let status = Some(rpc_status(refusal));
            self.say(link, News::Refused(Refused { dispatch, status }));
        } else {
            live.outcome = Outcome::Failed;
            let mut all = Vec::with_capacity(unfinished.len());
            for &(index, used) in unfinished {
                // What a client may resume with is its own sequence's.
                let refusal = match refusal {
                    Refusal::WorkerLost { .. } => {
                        &Refusal::WorkerLost { output_tokens: used.output_tokens.into() }
                    }
                    other => other,
                };
                all.push(News::Finished(Finished {
                    dispatch,
                    index,
                    reason: FinishReason::Failed.into(),
                    stop_token_id: None,
                    error: Some(rpc_status(refusal)),
                    usage: Some(live.close(index, used, now)),
                }));
            }
            all.into_iter().for_each(|news| self.say(link, news));
        }
        self.close(request);
    }

    fn close(&mut self, request: RequestNumber) {
        let Some(live) = self.requests.remove(&request) else { return };
        if live.admitted.is_none() {
            self.waiting -= 1;
        }
        self.metrics.requests.of(live.outcome).inc();
        if let Some(link) = self.links.get_mut(&live.link) {
            link.requests.remove(&live.dispatch);
        }
    }

    fn say(&mut self, link: LinkId, news: News) {
        // Where the stream is gone, nobody wants to know.
        if let Some(link) = self.links.get_mut(&link) {
            link.news.push(news);
        }
    }
}

fn refused(span: &Span, refusal: &Refusal) {
    let reason = refusal.reason().as_str();
    span.record("refusal", reason);
    span.in_scope(|| tracing::debug!(reason, "request refused"));
}
