//! The scheduler: which sequences run in the next step, on which blocks, and what became of the last one.
//!
//! ```text
//!   submit ─▶ Waiting ──admit──▶ Running ──▶ Finished | Refused
//!                ▲                 │  │
//!                └────preempt──────┘  └─prompt computed─▶ its siblings: Dormant ─▶ Forked ─▶ Running
//! ```
//!
//! A step has one budget of rows. In this order: each running sequence that decodes takes one (oldest first, which
//! may cost the youngest its blocks), prefills take what is left, siblings of a computed prompt start, and then
//! the head of the queue is admitted, again and again until something is short. Nobody overtakes the head: it waits
//! for what runs, which is bounded. Blocks for all known tokens are taken at admission, so only decoding asks for
//! more, and a prefill that has begun is never the one that runs out.
//!
//! *Preemption* gives back all blocks of the sequence admitted last and puts it where it stood in the queue; its
//! output is kept and computed again as prefill. The sequence admitted first is never preempted while another runs,
//! and each fits the pool alone: so something always advances.
//!
//! Two steps may be in flight. What a step's outcome says of a sequence that has left its slot since is dropped: every
//! stay in a slot (a *run*) has its own number.

// In the order to read them.
mod values;

mod request;

mod queue;

mod plan;

mod admit;

mod apply;

mod pace;

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

pub use self::pace::{HALF_LIFE_S, Pace};
pub use self::values::{Counters, Drawn, Event, FinishReason, Load, NewRequest, NewSequence, Usage};

use self::queue::Queue;
use self::request::{Request, RequestKey, Sequence, SequenceKey, State, StepRecord};
use crate::hash::{BlockHash, BlockHasher, HashFields, Revision};
use crate::ids::{RequestNumber, SlotId, StepNumber, TokenId};
use crate::limits;
use crate::params::CacheUse;
use crate::pool::{KvEvent, Pool};
use crate::refusal::Refusal;

/// What a scheduler is given at its start and keeps.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Part of every block hash.
    pub revision: Revision,
    /// Blocks of the pool.
    pub blocks: u32,
    /// Tokens per block: a power of two.
    pub block_size: u32,
    /// Sequences that run at once.
    pub slots: u32,
    /// Rows of one step: at least as many as slots.
    pub step_rows: u32,
    /// Requests that wait; one more is refused.
    pub queue: usize,
    /// Whether anyone reads or writes the prefix cache.
    pub prefix_cache: CacheUse,
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be {must}, not {got}")]
pub struct ConfigFault {
    /// Which value.
    pub what: &'static str,
    /// What it must be.
    pub must: String,
    /// What it is.
    pub got: u64,
}

/// An outcome that does not fit what was planned: the runner is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutcomeFault {
    /// Not the oldest step in flight.
    #[error("the outcome is of step {got}; the oldest step in flight is {expected:?}")]
    WrongStep {
        /// Of the outcome.
        got: StepNumber,
        /// The oldest in flight.
        expected: Option<StepNumber>,
    },
    /// A sampling span without its token, or a token without its span.
    #[error("step {step}: sampling span {span:?} expected a token; the outcome's next is of span {got:?}")]
    WrongToken {
        /// The step.
        step: StepNumber,
        /// The span whose turn it was; none: there was none left.
        span: Option<u32>,
        /// The span that the outcome names next; none: it has no more tokens.
        got: Option<u32>,
    },
}

/// Decides what runs. See the module's head.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: Pool,
    requests: Slab<Request>,
    by_number: HashMap<RequestNumber, RequestKey>,
    sequences: Slab<Sequence>,
    queue: Queue,
    /// In the order of admission.
    running: Vec<SequenceKey>,
    /// Siblings that hold their part of a computed prompt and wait for a slot.
    forks: VecDeque<SequenceKey>,
    deadlines: BTreeSet<(Duration, RequestKey)>,
    free_slots: Vec<SlotId>,
    /// Slots that the runner has not heard are free.
    releases: Vec<SlotId>,
    in_flight: VecDeque<StepRecord>,
    step: StepNumber,
    last_request: RequestNumber,
    last_run: u64,
    events: Vec<Event>,
    kv_events: Vec<KvEvent>,
    pace: Pace,
    counters: Counters,
}

impl SchedulerConfig {
    /// What a served engine keeps to beyond what [`Scheduler::new`] needs: the block sizes that all executors and the
    /// wire know.
    ///
    /// # Errors
    /// The first value that cannot be served, and what it must be.
    pub fn check_served(&self) -> Result<(), ConfigFault> {
        self.check(limits::engine::BLOCK_TOKENS_MIN)?;
        if self.block_size.is_power_of_two() {
            return Ok(());
        }
        Err(ConfigFault { what: "block size", must: "a power of two".into(), got: self.block_size.into() })
    }

    fn check(&self, block_size_min: u32) -> Result<(), ConfigFault> {
        use limits::engine as limit;
        let check = |what, got: u64, low: u64, high: u64| {
            let must = format!("from {low} to {high}");
            if got >= low && got <= high { Ok(()) } else { Err(ConfigFault { what, must, got }) }
        };
        check("block size", self.block_size.into(), block_size_min.into(), limit::BLOCK_TOKENS_MAX.into())?;
        check("blocks", self.blocks.into(), 1, u64::from(u32::MAX) - 1)?;
        check("slots", self.slots.into(), 1, limit::SLOTS_MAX.into())?;
        // The budget covers every decode row, so that no running sequence ever waits for one.
        check("rows of a step", self.step_rows.into(), self.slots.into(), limit::STEP_ROWS_MAX.into())?;
        check("queue", self.queue as u64, 1, u32::MAX.into())
    }
}

impl Scheduler {
    /// An idle scheduler with an empty pool.
    ///
    /// # Errors
    /// A configuration that cannot work. Blocks may be as small as a token, which only tests want: see
    /// [`SchedulerConfig::check_served`].
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigFault> {
        config.check(1)?;
        Ok(Scheduler {
            pool: Pool::new(config.blocks, config.block_size),
            requests: Slab::new(),
            by_number: HashMap::new(),
            sequences: Slab::new(),
            queue: Queue::default(),
            running: Vec::with_capacity(config.slots as usize),
            forks: VecDeque::new(),
            deadlines: BTreeSet::new(),
            free_slots: (0..config.slots).rev().map(SlotId).collect(),
            releases: Vec::new(),
            in_flight: VecDeque::with_capacity(limits::engine::STEPS_IN_FLIGHT_MAX),
            step: StepNumber(0),
            last_request: RequestNumber(0),
            last_run: 0,
            events: Vec::new(),
            kv_events: Vec::new(),
            pace: Pace::default(),
            counters: Counters::default(),
            config,
        })
    }

    /// Takes a request. What becomes of it, a refusal at once included, comes as events under the number returned.
    /// `now` is of any monotonic clock.
    pub fn submit(&mut self, new: NewRequest, now: Duration) -> RequestNumber {
        self.last_request.0 += 1;
        let number = self.last_request;
        if let Err(refusal) = self.check_new(&new) {
            self.events.push(Event::Refused { request: number, refusal, unfinished: Vec::new() });
            return number;
        }
        let request = self.request_of(number, &new);
        let uncached = self.uncached_tokens(&request.prompt, &request.prompt_hashes);
        if let Err(refusal) = self.check_deadline(new.deadline, now, uncached) {
            self.events.push(Event::Refused { request: number, refusal, unfinished: Vec::new() });
            return number;
        }
        let key = self.requests.insert(request);
        self.by_number.insert(number, key);
        if let Some(deadline) = new.deadline {
            self.deadlines.insert((deadline, key));
        }
        for sequence in &new.sequences {
            let sampling = Arc::new(new.params.slot_sampling_seeded(sequence.seed));
            let sequence = Sequence::new(key, &new.prompt, sequence, sampling);
            let sequence = self.sequences.insert(sequence);
            self.requests[key].sequences.push(sequence);
        }
        self.wake_a_sibling(key);
        number
    }

    /// Ends sequences of a request, all of them where `indexes` is none. Those that have ended already, and requests
    /// that nobody knows any more, are none of it: a cancel and an end may cross on the way.
    pub fn cancel(&mut self, number: RequestNumber, indexes: Option<&[u32]>) {
        let Some(&key) = self.by_number.get(&number) else { return };
        let mut named = self.requests[key].sequences.clone();
        named.retain(|s| indexes.is_none_or(|list| list.contains(&self.sequences[*s].index)));
        // The one that computes the prompt goes last: otherwise its place would pass to a sibling about to go.
        named.sort_by_key(|s| !matches!(self.sequences[*s].state, State::Dormant));
        for sequence in named {
            self.finish(sequence, FinishReason::Cancelled);
        }
    }

    /// Ends every request with the same refusal: the runner is lost, or the process goes.
    pub fn refuse_all(&mut self, refusal: &Refusal) {
        let keys: Vec<RequestKey> = self.requests.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.refuse(key, refusal.clone());
        }
    }

    /// Events since the last call, in order. They are kept until somebody takes them: do so after each plan and apply.
    pub fn drain_events(&mut self) -> std::vec::Drain<'_, Event> {
        self.events.drain(..)
    }

    /// Changes of the cache that became true with the outcomes applied since the last call, in order; kept like events.
    pub fn drain_kv_events(&mut self) -> std::vec::Drain<'_, KvEvent> {
        self.kv_events.drain(..)
    }

    /// The load as it is now.
    pub fn load(&self) -> Load {
        // Each decoding sequence has one position left.
        let left = |key: &SequenceKey| u64::from(self.sequences[*key].positions_left().saturating_sub(1));
        let begun = self.running.iter().map(left);
        Load {
            uncached_tokens_waiting: self.queue.uncached_tokens() + begun.sum::<u64>(),
            waiting: self.queue.len(),
            running: self.running.len() + self.forks.len(),
            blocks_free: self.pool.available() + self.pool.in_limbo(),
            step_s: self.pace.step_s(),
            step_one_more_s: self.pace.step_one_more_s(),
            prefill_tokens_per_s: self.pace.prefill_tokens_per_s(),
        }
    }

    /// Begins to count anew: a warm-up is nobody's work.
    pub fn forget_totals(&mut self) {
        self.counters = Counters::default();
    }

    /// Begins to measure anew: the first steps of all, on cold memory, are no measure of what comes.
    pub fn forget_pace(&mut self) {
        self.pace = Pace::default();
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What it was given at its start.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// The pool, to look at: its digest and snapshot are for routers.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whether nobody waits, runs or is in flight.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.in_flight.is_empty()
    }

    fn check_new(&self, new: &NewRequest) -> Result<(), Refusal> {
        if new.prompt.is_empty() {
            return Err(Refusal::invalid("prompt", "must have at least one token"));
        }
        if new.max_tokens == 0 {
            return Err(Refusal::invalid("max_tokens", "must be at least 1, not 0"));
        }
        let most = limits::request::SEQUENCES_MAX as usize;
        if new.sequences.is_empty() || new.sequences.len() > most {
            let problem = format!("must be from 1 to {most}, not {}", new.sequences.len());
            return Err(Refusal::invalid("sequences", problem));
        }
        for (at, sequence) in new.sequences.iter().enumerate() {
            let field = |name: &str| format!("sequences[{at}].{name}");
            if new.sequences[..at].iter().any(|other| other.index == sequence.index) {
                return Err(Refusal::invalid(
                    field("index"),
                    format!("{} stands there twice", sequence.index),
                ));
            }
            if sequence.resumed_ids.len() > new.max_tokens as usize {
                let (got, max) = (sequence.resumed_ids.len(), new.max_tokens);
                let problem = format!("are {got} tokens, but max_tokens is {max}");
                return Err(Refusal::invalid(field("resumed_ids"), problem));
            }
        }
        // The last token's keys and values are never needed. Siblings need no more than this alone, for they can
        // wait for each other.
        let positions = new.prompt.len() as u64 + u64::from(new.max_tokens) - 1;
        let needed_blocks = positions.div_ceil(self.config.block_size.into());
        if needed_blocks > self.config.blocks.into() {
            return Err(Refusal::PoolExceeded { needed_blocks, pool_blocks: self.config.blocks.into() });
        }
        if self.queue.len() >= self.config.queue {
            let wait_ms = self.pace.prefill_ms(self.queue.uncached_tokens()).unwrap_or(1_000);
            let retry_ms = NonZeroU64::new(wait_ms.clamp(100, 10_000)).expect("at least 100");
            return Err(Refusal::QueueFull { waiting: self.queue.len() as u64, retry_ms });
        }
        Ok(())
    }

    fn check_deadline(
        &self,
        deadline: Option<Duration>,
        now: Duration,
        uncached: u64,
    ) -> Result<(), Refusal> {
        let Some(deadline) = deadline else { return Ok(()) };
        let deadline_ms = deadline.saturating_sub(now).as_millis() as u64;
        let before = self.load().uncached_tokens_waiting;
        let estimate_ms = self.pace.prefill_ms(before + uncached).unwrap_or(0);
        if deadline_ms == 0 || deadline_ms < estimate_ms {
            return Err(Refusal::DeadlineUnreachable { deadline_ms, estimate_ms });
        }
        Ok(())
    }

    fn request_of(&self, number: RequestNumber, new: &NewRequest) -> Request {
        let cache_use = match self.config.prefix_cache {
            CacheUse::Shared => new.params.cache_use,
            CacheUse::Bypassed => CacheUse::Bypassed,
        };
        let mut hasher = (cache_use == CacheUse::Shared).then(|| {
            BlockHasher::new(&HashFields {
                salt: new.params.cache_salt.to_vec(),
                tenant: new.tenant.clone(),
                ..HashFields::new(self.config.revision, self.config.block_size)
            })
        });
        Request {
            number,
            prompt: new.prompt.clone(),
            prompt_hashes: hasher.as_mut().map(|h| h.chain(&new.prompt)).unwrap_or_default(),
            hasher,
            eos_ids: new.params.eos_ids.clone(),
            stop_ids: new.params.stop_ids.clone(),
            max_tokens: new.max_tokens,
            priority: new.params.priority,
            deadline: new.deadline,
            since: self.step,
            cached_tokens: None,
            prompt_planned: 0,
            prompt_done: 0,
            prompt_shared: false,
            sequences: Vec::with_capacity(new.sequences.len()),
        }
    }

    /// Ends a sequence, and its request with the last one.
    fn finish(&mut self, key: SequenceKey, reason: FinishReason) {
        self.vacate(key);
        let sequence = self.sequences.remove(key);
        let request = &mut self.requests[sequence.request];
        request.sequences.retain(|s| *s != key);
        self.events.push(Event::Finished {
            request: request.number,
            index: sequence.index,
            reason,
            usage: match reason {
                FinishReason::Cancelled => sequence.usage(request),
                _ => Usage { prompt_tokens: request.prompt.len() as u32, ..sequence.usage(request) },
            },
        });
        if request.sequences.is_empty() {
            self.forget(sequence.request);
        } else {
            self.wake_a_sibling(sequence.request);
        }
    }

    /// Ends a request with all its sequences.
    fn refuse(&mut self, key: RequestKey, refusal: Refusal) {
        let mut unfinished = Vec::new();
        for sequence in std::mem::take(&mut self.requests[key].sequences) {
            self.vacate(sequence);
            let sequence = self.sequences.remove(sequence);
            unfinished.push((sequence.index, sequence.usage(&self.requests[key])));
        }
        let request = self.requests[key].number;
        self.events.push(Event::Refused { request, refusal, unfinished });
        self.forget(key);
    }

    fn forget(&mut self, key: RequestKey) {
        let request = self.requests.remove(key);
        self.by_number.remove(&request.number);
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, key));
        }
    }

    /// Takes a sequence from wherever it is; its blocks and slot with it.
    fn vacate(&mut self, key: SequenceKey) {
        let sequence = &mut self.sequences[key];
        match std::mem::replace(&mut sequence.state, State::Dormant) {
            State::Dormant => {}
            State::Waiting => {
                let request = &self.requests[sequence.request];
                self.queue.remove(request.priority, (request.number, sequence.index));
            }
            State::Forked(fork) => {
                self.forks.retain(|s| *s != key);
                fork.source.into_iter().for_each(|block| self.pool.release(block));
            }
            State::Running(run) => {
                self.running.retain(|s| *s != key);
                self.free_slots.push(run.slot);
                self.releases.push(run.slot);
            }
        }
        // Children first: what the pool's order of eviction is made of.
        for block in self.sequences[key].blocks.drain(..).rev() {
            self.pool.release(block);
        }
    }

    /// Puts a sequence that holds nothing where it belongs in the queue.
    fn enqueue(&mut self, key: SequenceKey) {
        let sequence = &mut self.sequences[key];
        let request = &mut self.requests[sequence.request];
        if let Some(hasher) = &mut request.hasher {
            hasher.extend_chain(&mut sequence.hashes, &sequence.ids);
        }
        let sequence = &self.sequences[key];
        let request = &self.requests[sequence.request];
        let uncached = self.uncached_tokens(&sequence.ids, &sequence.hashes);
        self.queue.insert(request.priority, (request.number, sequence.index), key, request.since, uncached);
        self.sequences[key].state = State::Waiting;
    }

    /// Where no sequence of a request computes its prompt and none has, lets the next one do it. Siblings whose
    /// resumed tokens are all that they may have end with the request's admission, and so here if nothing else is left.
    fn wake_a_sibling(&mut self, key: RequestKey) {
        let request = &self.requests[key];
        let dormant = |s: &&SequenceKey| matches!(self.sequences[**s].state, State::Dormant);
        if !request.sequences.iter().all(|s| dormant(&s)) {
            return;
        }
        match request.sequences.iter().find(|s| self.sequences[**s].ending(request).is_none()) {
            Some(&sibling) => {
                let sequence = &mut self.sequences[sibling];
                sequence.begin(&request.prompt, &request.prompt_hashes);
                self.enqueue(sibling);
            }
            None => self.admitted(key, 0),
        }
    }

    /// Reports a request's first admission.
    fn admitted(&mut self, key: RequestKey, cached_tokens: u32) {
        let request = &mut self.requests[key];
        if request.cached_tokens.is_some() {
            return;
        }
        request.cached_tokens = Some(cached_tokens);
        self.counters.prompt_tokens_cached += u64::from(cached_tokens);
        self.events.push(Event::Admitted { request: request.number, cached_tokens });
        for sibling in request.sequences.clone() {
            if let Some(reason) = self.sequences[sibling].ending(&self.requests[key]) {
                self.finish(sibling, reason);
            }
        }
    }

    /// Known tokens that an admission now would have to compute.
    fn uncached_tokens(&self, ids: &[TokenId], hashes: &[BlockHash]) -> u64 {
        (ids.len() - self.hits(ids, hashes).count() * self.config.block_size as usize) as u64
    }
}
