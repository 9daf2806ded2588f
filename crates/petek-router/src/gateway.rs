//! A request's way through the router: resolved, checked, tokenised, placed on a worker, and read by its client.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use petek_core::hash::{BlockHash, BlockHasher, BlockName, HashFields};
use petek_core::ids::TokenId;
use petek_core::params::{CacheUse, Params, RawParams};
use petek_core::refusal::Refusal;
use petek_proto::refusal::WireRefusal;
use petek_proto::request::{ChatInput, GenerationInput, Prompt, RequestHead};
use petek_proto::worker::v1::Submit;
use petek_service::{Outcome, RouteReason as Counted, RouterMetrics, Shutdown};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::link::Job;
use crate::prepare;
use crate::relay::{Asked, Cause, Journal, Live, Outgoing, Placement, RETRY_MS, Standing};
use crate::route::Ask;
use crate::settings::RouterSettings;
use crate::text_pool::TextPool;
use crate::workers::{Placed, Pool, Served, Wanted, Workers};

use petek_core::limits::link::QUEUE_FULL_RETRIES_MAX;
use petek_proto::inference::v1::RouteReason;

/// Ids that are hashed at once: some 100 µs. More of them take a thread that may be busy for longer.
const HASHED_AT_ONCE: usize = 8_192;

/// All that a call needs. One per router.
pub(crate) struct Gateway {
    pub(crate) settings: RouterSettings,
    pub(crate) workers: Arc<Workers>,
    pub(crate) text: TextPool,
    pub(crate) metrics: Arc<RouterMetrics>,
    pub(crate) shutdown: Shutdown,
    /// A permit per request; all of them are back when nothing runs.
    pub(crate) requests: Arc<Semaphore>,
}

/// What is to be continued.
pub(crate) enum Input {
    Generation(Box<GenerationInput>),
    Chat(Box<ChatInput>),
}

/// When a request came, and what its call says of it.
pub(crate) struct Call {
    pub(crate) request_id: Uuid,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Instant,
    pub(crate) client_request_id: Option<String>,
    pub(crate) reading: Reading,
    pub(crate) span: Span,
}

/// How a client reads its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Event by event: it can be slow.
    Streamed,
    /// All at once, when this router has put it together.
    Whole,
}

/// A request that was checked and tokenised.
pub(crate) struct Prepared {
    pub(crate) served: Served,
    pub(crate) params: Params,
    pub(crate) prompt_ids: Vec<TokenId>,
    /// Of the full blocks of the prompt and what is resumed behind it; none, where no cache is used.
    pub(crate) block_names: Arc<[BlockName]>,
    pub(crate) max_tokens: u32,
}

/// Reads a request's events. Dropped before the last one, it cancels the request.
pub(crate) struct Reader {
    live: Arc<Live>,
    gateway: Arc<Gateway>,
}

impl Prepared {
    /// What is asked of a worker: resumed tokens are computed as the prompt is.
    pub(crate) fn ask(&self) -> Ask {
        Ask {
            prompt_tokens: (self.prompt_ids.len() + self.params.resumed_ids.len()) as u32,
            max_tokens: self.max_tokens,
            block_size: self.served.pool.block_size,
        }
    }
}

impl Input {
    pub(crate) fn model(&self) -> &str {
        match self {
            Input::Generation(input) => &input.model,
            Input::Chat(input) => &input.model,
        }
    }

    fn parts(&self) -> (&RawParams, &RequestHead) {
        match self {
            Input::Generation(input) => (&input.params, &input.head),
            Input::Chat(input) => (&input.params, &input.head),
        }
    }
}

impl Gateway {
    /// Checks a request and computes its token ids.
    ///
    /// # Errors
    /// What is wrong with it, by field; or there is no room or no time.
    pub(crate) async fn prepare(
        &self,
        input: Input,
        served: Served,
        deadline: Instant,
    ) -> Result<Prepared, Refusal> {
        let (raw, _) = input.parts();
        let params = raw.check(&served.limits, random())?;
        let hashing = Hashing::of(&params, &served.pool);
        let (prompt_ids, block_names) = match input {
            Input::Generation(input) if matches!(&input.prompt, Prompt::Ids(ids) if ids.len() <= HASHED_AT_ONCE) =>
            {
                let ids = prepare::prompt_ids(&served.model.text, input.prompt)?;
                let names = hashing.names(&ids);
                (ids, names)
            }
            Input::Generation(input) => {
                let model = served.model.clone();
                let ids = move || prepare::prompt_ids(&model.text, input.prompt);
                self.text.run(deadline, move || ids().map(|ids| hashing.with_names(ids))).await?
            }
            Input::Chat(input) => {
                let (model, now) = (served.model.clone(), unix_s());
                let ids = move || prepare::chat_ids(&model.text, &input, now).map(|(_, ids)| ids);
                self.text.run(deadline, move || ids().map(|ids| hashing.with_names(ids))).await?
            }
        };
        let max_tokens = params.max_tokens_after(&prompt_ids, &served.limits)?;
        Ok(Prepared { served, params, prompt_ids, block_names, max_tokens })
    }

    /// Takes a request in and sets it going.
    ///
    /// # Errors
    /// A refusal, `input`'s own or another: nothing runs, and it is counted.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        input: Result<Input, Refusal>,
        call: Call,
    ) -> Result<Reader, Refusal> {
        let (call_span, arrived) = (call.span.clone(), call.arrived);
        let mut name = String::new();
        let begun = async {
            let input = input?;
            let served = self.workers.resolve(input.model())?;
            name.clone_from(&served.pool.name);
            self.admit(input, served, call).await
        };
        let begun = begun.instrument(call_span.clone()).await;
        if let Err(refusal) = &begun {
            call_span.in_scope(|| tracing::debug!(reason = refusal.reason().as_str(), "request refused"));
            self.metrics.model(&name).ended_at_the_door(Outcome::Refused, arrived.elapsed());
        }
        begun
    }

    async fn admit(self: &Arc<Self>, input: Input, served: Served, call: Call) -> Result<Reader, Refusal> {
        if self.shutdown.is_draining() {
            return Err(Refusal::Draining { retry_ms: RETRY_MS });
        }
        let permit = self.requests.clone().try_acquire_owned().map_err(|_| Refusal::QueueFull {
            waiting: self.settings.requests_max as u64,
            retry_ms: RETRY_MS,
        })?;
        let (_, head) = input.parts();
        let client_request_id = head.client_request_id.clone().or(call.client_request_id).unwrap_or_default();
        let deadline =
            self.deadline(head, call.arrived)?.map_or(call.deadline, |asked| asked.min(call.deadline));
        let prepared = self.prepare(input, served, deadline).await?;
        let ask = prepared.ask();
        let Prepared { served, params, prompt_ids, block_names, max_tokens } = prepared;

        call.span.record("model", &served.pool.name);
        if !client_request_id.is_empty() {
            call.span.record("client_request_id", &client_request_id);
        }
        let series = self.metrics.model(&served.pool.name);
        let prompt_tokens = prompt_ids.len() as u32;
        let submit = Submit {
            request_id: call.request_id.into_bytes().to_vec().into(),
            traceparent: petek_service::traceparent(&call.span).unwrap_or_default(),
            ..Submit::of(&params, prompt_ids, max_tokens)
        };
        let asked = Asked {
            request_id: call.request_id.to_string(),
            client_request_id,
            model: served.pool.name.clone(),
            revision: served.pool.revision.to_string(),
            prompt_tokens,
            max_tokens,
            params,
            tokens: served.model.text.tokenizer.tokens().clone(),
        };
        let patience = match call.reading {
            Reading::Streamed => self.settings.patience(),
            Reading::Whole => self.settings.patience_with_itself(),
        };
        let journal = Journal::new(asked, patience).map_err(prepare::refusal)?;
        let live = Live::new(journal, call.arrived, deadline, patience.time, series, permit);
        let live = Arc::new(live);

        let driver = drive(live.clone(), self.clone(), served.pool, ask, block_names, submit);
        tokio::spawn(watch_over(live.clone(), driver).instrument(call.span));
        self.metrics.streams_open.inc();
        Ok(Reader { live, gateway: self.clone() })
    }

    /// The deadline that a request itself names.
    fn deadline(&self, head: &RequestHead, arrived: Instant) -> Result<Option<Instant>, Refusal> {
        let most = self.settings.deadline_ms_max;
        match head.deadline_ms {
            Some(ms) if ms > most => {
                Err(Refusal::invalid("deadline_ms", format!("must be at most {most}, not {ms}")))
            }
            asked => Ok(asked.map(|ms| arrived + Duration::from_millis(ms))),
        }
    }
}

impl Reader {
    /// The next event; the last one is Finished or Failed.
    pub(crate) async fn next(&self) -> Outgoing {
        self.live.next().await
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Of a request that is over nothing comes of it.
        self.live.tell(|journal, now| journal.stop(Cause::ClientGone, now));
        self.gateway.metrics.streams_open.dec();
    }
}

/// Runs a driver; should it fail, the request still gets its end.
async fn watch_over(live: Arc<Live>, driver: impl Future<Output = ()>) {
    struct End(Arc<Live>);
    impl Drop for End {
        fn drop(&mut self) {
            self.0.tell(|journal, now| journal.stop(Cause::Internal, now));
        }
    }
    let _end = End(live);
    driver.await;
}

/// Takes a request to a worker, and to another one where that one does not take it, until it is over.
async fn drive(
    live: Arc<Live>,
    gateway: Arc<Gateway>,
    pool: Arc<Pool>,
    ask: Ask,
    names: Arc<[BlockName]>,
    submit: Submit,
) {
    let wanted = Wanted { ask, names: &names };
    let prompt_tokens = submit.prompt_ids.len() as u32;
    let series = gateway.metrics.model(&pool.name);
    let sequences = submit.sequences.len() as u32;
    let mut tried: Vec<String> = Vec::new();
    let mut refusal = WireRefusal::from(&Refusal::NoWorker { model: pool.name.clone(), retry_ms: RETRY_MS });
    while tried.len() <= QUEUE_FULL_RETRIES_MAX as usize {
        let Some(placed) = pool.place(&wanted, sequences, &tried, random()) else { break };
        let Placed { link, session, in_flight, reason, matched_tokens, waiting_tokens } = placed;
        let retry = !tried.is_empty();
        let reason = if retry { RouteReason::Retry } else { reason };
        let placement = Placement {
            worker: link.entry.id.clone(),
            numerics_id: session.identity.numerics_id.clone(),
            reason,
            // Resumed tokens are output, which is never counted as cached.
            predicted_tokens: matched_tokens.min(prompt_tokens),
        };
        tried.push(link.entry.id.clone());
        series.decisions.of(counted(reason, matched_tokens)).inc();
        tracing::debug!(worker = %link.entry.id, reason = reason.as_str_name(), waiting_tokens, matched_tokens, "placed");
        let Some((attempt, sequences)) = live.begin_attempt(placement, in_flight) else { return };
        let submit = Submit {
            attempt,
            epoch: session.identity.epoch.0,
            believed_queue_tokens: waiting_tokens,
            sequences,
            ..submit.clone()
        };
        let job = Job { live: live.clone(), attempt, submit };
        let standing = tokio::select! {
            standing = live.settled() => standing,
            // Sent or dropped, the journal knows it; what is waited for is what comes of it.
            standing = async { session.submit(job).await; live.settled().await } => standing,
        };
        match standing {
            Standing::TurnedAway(why) => refusal = why,
            Standing::Over | Standing::Dispatched => return,
        }
    }
    live.tell(|journal, now| journal.refuse(refusal, now));
}

/// What the blocks of a request are called, as its worker will call them.
struct Hashing {
    /// None, where no cache is used.
    hasher: Option<BlockHasher>,
    resumed_ids: Arc<[TokenId]>,
}

impl Hashing {
    fn of(params: &Params, pool: &Pool) -> Self {
        let fields = HashFields {
            salt: params.cache_salt.to_vec(),
            ..HashFields::new(pool.revision, pool.block_size)
        };
        let shared = params.cache_use == CacheUse::Shared;
        Hashing { hasher: shared.then(|| BlockHasher::new(&fields)), resumed_ids: params.resumed_ids.clone() }
    }

    fn names(self, prompt_ids: &[TokenId]) -> Arc<[BlockName]> {
        let Some(mut hasher) = self.hasher else { return Arc::default() };
        let hashes = match &self.resumed_ids[..] {
            [] => hasher.chain(prompt_ids),
            resumed_ids => hasher.chain(&[prompt_ids, resumed_ids].concat()),
        };
        hashes.iter().map(BlockHash::name).collect()
    }

    fn with_names(self, prompt_ids: Vec<TokenId>) -> (Vec<TokenId>, Arc<[BlockName]>) {
        let names = self.names(&prompt_ids);
        (prompt_ids, names)
    }
}

fn counted(reason: RouteReason, matched_tokens: u32) -> Counted {
    match reason {
        RouteReason::OnlyWorker => Counted::Only,
        RouteReason::NearTie => Counted::Near,
        RouteReason::Retry | RouteReason::Moved | RouteReason::Replay => Counted::Retried,
        RouteReason::Cache | RouteReason::Load | RouteReason::Unspecified => {
            if matched_tokens > 0 {
                Counted::Cached
            } else {
                Counted::Idle
            }
        }
    }
}

/// 64 random bits: seeds of requests that name none, and draws among near-ties.
pub(crate) fn random() -> u64 {
    // The system's source does not fail after start; if it did, nothing here would be safe to go on with.
    getrandom::u64().expect("the system gives random numbers")
}

/// What templates take for now.
pub(crate) fn unix_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
