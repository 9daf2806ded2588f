//! The scheduler and its pool against the fake model: a million random operations, every text compared with what the
//! model says without any paging, every promise checked on the way. Failures name the seed of their episode.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use petek_core::hash::{BlockName, Revision};
use petek_core::ids::{RequestNumber, TokenId};
use petek_core::params::{CacheUse, ModelLimits, Params, RawParams, SamplingDefaults};
use petek_core::plan::Draw;
use petek_core::pool::KvEvent;
use petek_core::refusal::{Reason, Refusal};
use petek_core::scheduler::{Event, FinishReason, NewRequest, NewSequence, Scheduler, SchedulerConfig};
use petek_core::seed::sequence_seed;

use crate::fake::{FakeModel, FakeRunner, NotFinite};
use crate::runner::{StepRunner, Ticket};

const EOS: TokenId = 2;
const VOCABULARY: u32 = 40;

#[test]
fn a_million_random_operations_lose_nothing() {
    let seen = run_episodes(500, 2_000, |r| Shape {
        cancel_in: 40,
        not_finite: if r.one_in(3) { NotFinite::OneIn(400) } else { NotFinite::Never },
        ..Shape::random(r)
    });
    // What was to be tried was tried, and often.
    eprintln!("{seen:?}");
    let Seen { preemptions, copies, hits, evictions, cancels, refusals, finishes, dropped } = seen;
    assert!(preemptions > 10_000 && copies > 5_000 && hits > 5_000 && evictions > 50_000);
    assert!(cancels > 5_000 && finishes > 50_000 && dropped > 5_000);
    for reason in [Reason::QueueFull, Reason::PoolExceeded, Reason::DeadlineExceeded, Reason::NumericalError]
    {
        assert!(refusals[&reason] > 500, "{reason}");
    }
}

#[test]
fn ten_thousand_random_cancels_leave_no_block_behind() {
    let seen = run_episodes(200, 400, |r| Shape { cancel_in: 3, ..Shape::random(r) });
    assert!(seen.cancels >= 10_000, "only {} requests were cancelled", seen.cancels);
}

/// Runs episodes with seeds from 1 on.
fn run_episodes(episodes: u64, operations: u64, shape: impl Fn(&mut Random) -> Shape) -> Seen {
    let mut seen = Seen::default();
    for seed in 1..=episodes {
        eprintln!("episode with seed {seed}");
        let mut random = Random(seed);
        let shape = shape(&mut random);
        let mut episode = Episode::new(random, shape, seen);
        (0..operations).for_each(|_| episode.operate());
        episode.drain();
        seen = episode.seen;
    }
    seen
}

/// How often something happened, over all episodes.
#[derive(Debug, Default)]
struct Seen {
    preemptions: u64,
    /// Partial blocks copied for a sibling.
    copies: u64,
    /// Requests that found something in the cache.
    hits: u64,
    evictions: u64,
    /// Live requests cancelled, or some of their sequences.
    cancels: u64,
    refusals: HashMap<Reason, u64>,
    finishes: u64,
    /// Tokens drawn for a sequence that had gone when they came.
    dropped: u64,
}

/// What an episode's engine is like.
struct Shape {
    config: SchedulerConfig,
    /// Steps in flight before one is collected.
    depth: usize,
    /// One operation of so many cancels something.
    cancel_in: u64,
    not_finite: NotFinite,
}

impl Shape {
    fn random(r: &mut Random) -> Self {
        let slots = 1 + r.below(12) as u32;
        Shape {
            config: SchedulerConfig {
                revision: Revision([7; 32]),
                blocks: 8 + r.below(60) as u32,
                block_size: [1, 2, 4, 8, 16][r.below(5) as usize],
                slots,
                step_rows: slots + r.below(40) as u32,
                queue: 1 + r.below(24) as usize,
                prefix_cache: if r.one_in(8) { CacheUse::Bypassed } else { CacheUse::Shared },
            },
            depth: 1 + r.below(2) as usize,
            cancel_in: u64::MAX,
            not_finite: NotFinite::Never,
        }
    }
}

/// One engine, its clients, and what they expect.
struct Episode {
    random: Random,
    shape: Shape,
    model: FakeModel,
    scheduler: Scheduler,
    runner: FakeRunner,
    tickets: VecDeque<Ticket>,
    now: Duration,
    bases: Vec<Vec<TokenId>>,
    clients: HashMap<RequestNumber, Client>,
    /// Hashes that the KV events so far leave.
    cached: HashSet<BlockName>,
    /// For each salted prefix of whole blocks the first two requests that contain it.
    prefixes: HashMap<u64, Vec<RequestNumber>>,
    /// Steps since the queue was empty or moved, and how many there may be.
    stalled: u64,
    stalled_max: u64,
    seen: Seen,
}

/// What the sender of one request has seen, and must see.
struct Client {
    prompt: Arc<[TokenId]>,
    salt: Vec<u8>,
    params: Params,
    max_tokens: u32,
    deadline: Option<Duration>,
    admitted: Option<u32>,
    open: HashMap<u32, Expected>,
    cancelled: HashSet<u32>,
}

struct Expected {
    draws: VecDeque<Draw>,
    resumed: u32,
    seen: u32,
    /// How it ended, by what the client has seen.
    last: Option<TokenId>,
}

impl Episode {
    fn new(mut random: Random, shape: Shape, seen: Seen) -> Self {
        let c = &shape.config;
        let model = FakeModel { vocabulary: VOCABULARY, not_finite: shape.not_finite };
        Episode {
            runner: FakeRunner::new(model, c.blocks, c.block_size, c.slots),
            scheduler: Scheduler::new(c.clone()).unwrap(),
            bases: (0..3)
                .map(|_| (0..200).map(|_| random.below(VOCABULARY.into()) as TokenId).collect())
                .collect(),
            model,
            tickets: VecDeque::new(),
            now: Duration::ZERO,
            clients: HashMap::new(),
            cached: HashSet::new(),
            prefixes: HashMap::new(),
            stalled: 0,
            stalled_max: 0,
            seen,
            random,
            shape,
        }
    }

    fn operate(&mut self) {
        if self.random.one_in(self.shape.cancel_in) {
            self.cancel();
        } else if self.random.one_in(4) {
            self.submit();
        } else {
            self.step();
        }
        self.listen();
        if self.random.one_in(64) {
            self.scheduler.pool().check().unwrap();
        }
    }

    /// Runs until nothing is left; then everything must be as at the start.
    fn drain(&mut self) {
        while !self.scheduler.is_idle() {
            self.step();
            self.listen();
        }
        assert!(self.clients.is_empty(), "{} requests never ended", self.clients.len());
        let pool = self.scheduler.pool();
        pool.check().unwrap();
        assert_eq!(pool.available(), pool.blocks(), "blocks leaked");
        let load = self.scheduler.load();
        assert_eq!((load.waiting, load.running, load.uncached_tokens_waiting), (0, 0, 0));
        self.seen.preemptions += self.scheduler.counters().preemptions;
        self.seen.dropped += self.scheduler.counters().tokens_dropped;
        self.seen.copies += self.runner.copies();
    }

    fn submit(&mut self) {
        let capacity = self.shape.config.blocks * self.shape.config.block_size;
        let model = ModelLimits {
            vocabulary: VOCABULARY,
            context_tokens: capacity + 1 + self.random.below(3) as u32,
            eos_ids: [EOS].into(),
            defaults: SamplingDefaults::BUILT_IN,
        };
        let r = &mut self.random;
        let base = &self.bases[r.below(3) as usize];
        let prompt_len = 1 + r.below(u64::from(capacity.min(120))) as usize;
        let shared = r.below(prompt_len as u64 + 1) as usize;
        let tail: Vec<TokenId> = (shared..prompt_len).map(|_| r.below(4) as TokenId).collect();
        let prompt: Arc<[TokenId]> = [&base[..shared], &tail].concat().into();

        let max_tokens = 1 + r.below(40) as i64;
        let n = if r.one_in(4) { 1 + r.below(5) } else { 1 };
        let raw = RawParams {
            temperature: Some(if r.one_in(2) { 0.0 } else { 1.0 }),
            max_tokens: Some(max_tokens),
            min_tokens: Some(if r.one_in(4) { r.below(max_tokens as u64 + 1) as i64 } else { 0 }),
            stop_token_ids: (0..r.below(3)).map(|_| r.below(VOCABULARY.into()) as TokenId).collect(),
            ignore_eos: Some(r.one_in(3)),
            seed: Some(r.next()),
            n: Some(n as i64),
            cache_salt: vec![b'x'; r.below(2) as usize],
            bypass_prefix_cache: Some(r.one_in(10)),
            priority: Some(r.below(8) as i64),
            logprobs: r.one_in(5).then_some(3),
            ..RawParams::default()
        };
        let params = raw.check(&model, 0).unwrap();
        let Ok(max_tokens) = params.max_tokens_after(&prompt, &model) else { return };
        let deadline = r.one_in(20).then(|| self.now + Duration::from_millis(1 + r.below(60)));

        let mut sequences = Vec::new();
        let mut open = HashMap::new();
        for index in 0..n as u32 {
            let sampling = params.slot_sampling(index);
            let mut draws: VecDeque<Draw> =
                self.model.expected(&prompt, &[], &sampling, max_tokens as usize).into();
            let ending = |draw: &Draw| match draw {
                Draw::Token(id) => params.eos_ids.contains(id) || params.stop_ids.contains(id),
                Draw::NotFinite | Draw::NoneAllowed => true,
            };
            let end = draws.iter().position(ending).map_or(draws.len(), |at| at + 1);
            draws.truncate(end);
            // Of what will be drawn, some may be known from an earlier call, even all of it.
            let known = if r.one_in(6) { r.below(draws.len() as u64 + 1) as usize } else { 0 };
            let tokens = draws.iter().take(known).map_while(|draw| match draw {
                Draw::Token(id) => Some(*id),
                _ => None,
            });
            let resumed_ids: Arc<[TokenId]> = tokens.collect();
            draws.drain(..resumed_ids.len());
            let (resumed, last) = (resumed_ids.len() as u32, resumed_ids.last().copied());
            open.insert(index, Expected { draws, resumed, seen: 0, last });
            sequences.push(NewSequence { index, seed: sequence_seed(params.seed, index), resumed_ids });
        }
        let new = NewRequest {
            prompt: prompt.clone(),
            params: params.clone(),
            max_tokens,
            sequences,
            tenant: Vec::new(),
            deadline,
        };
        let number = self.scheduler.submit(new, self.now);
        let salt = params.cache_salt.to_vec();
        let client = Client {
            prompt,
            salt,
            params,
            max_tokens,
            deadline,
            admitted: None,
            open,
            cancelled: HashSet::new(),
        };
        self.note_prefixes(number, &client);
        self.clients.insert(number, client);
        self.allow_for_stalls();
    }

    /// Remembers which whole blocks this request may ever give to the cache.
    fn note_prefixes(&mut self, number: RequestNumber, client: &Client) {
        if client.params.cache_use == CacheUse::Bypassed {
            return;
        }
        for index in 0..client.params.n {
            let sampling = client.params.slot_sampling(index);
            let draws = self.model.expected(&client.prompt, &[], &sampling, client.max_tokens as usize);
            let output = draws.iter().map_while(|draw| match draw {
                Draw::Token(id) => Some(*id),
                _ => None,
            });
            let ids: Vec<TokenId> = client.prompt.iter().copied().chain(output).collect();
            for end in (0..ids.len()).step_by(self.shape.config.block_size as usize) {
                let owners = self.prefixes.entry(prefix(&client.salt, &ids[..end])).or_default();
                if owners.len() < 2 && owners.last() != Some(&number) {
                    owners.push(number);
                }
            }
        }
    }

    fn cancel(&mut self) {
        let mut numbers: Vec<RequestNumber> = self.clients.keys().copied().collect();
        numbers.sort();
        if numbers.is_empty() {
            return;
        }
        let number = numbers[self.random.below(numbers.len() as u64) as usize];
        let client = self.clients.get_mut(&number).unwrap();
        let mut indexes: Vec<u32> = client.open.keys().copied().collect();
        indexes.sort();
        if self.random.one_in(2) {
            indexes.retain(|_| self.random.one_in(2));
            client.cancelled.extend(&indexes);
            // An index that never was, and those that have ended, are none of it.
            indexes.push(99);
            self.scheduler.cancel(number, Some(&indexes));
        } else {
            client.cancelled.extend(&indexes);
            self.scheduler.cancel(number, None);
        }
        self.seen.cancels += 1;
    }

    /// Plans and submits a step, and collects the oldest when there are as many as may be in flight.
    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        let waiting = self.scheduler.load().waiting;
        let plan = self.scheduler.plan(self.now);
        let planned = plan.is_some();
        if let Some(plan) = plan {
            assert!(plan.rows() <= self.shape.config.step_rows as usize);
            self.tickets.push_back(self.runner.submit(&plan).unwrap());
        }
        if (self.tickets.len() >= self.shape.depth || !planned)
            && let Some(ticket) = self.tickets.pop_front()
        {
            self.scheduler.apply(self.runner.collect(ticket).unwrap()).unwrap();
            self.follow_kv_events();
        } else {
            assert!(planned || self.scheduler.is_idle() || self.tickets.is_empty());
            let idle = self.clients.is_empty() || planned || !self.tickets.is_empty();
            assert!(idle || waiting == 0 || self.scheduler.load().waiting < waiting, "nothing moves");
        }
        self.stalled += 1;
        let now_waiting = self.scheduler.load().waiting;
        if now_waiting == 0 || now_waiting != waiting {
            self.stalled = 0;
            self.stalled_max = 0;
            self.allow_for_stalls();
        }
        assert!(
            self.stalled <= self.stalled_max,
            "{now_waiting} wait and none advanced in {} steps",
            self.stalled
        );
    }

    /// A non-empty queue advances within what those in the engine may still draw and must still compute.
    fn allow_for_stalls(&mut self) {
        let mut tokens = 0;
        let mut prompts = 0;
        for client in self.clients.values() {
            for open in client.open.values() {
                tokens += u64::from(client.max_tokens - open.resumed - open.seen);
                prompts += client.prompt.len() as u64 + u64::from(open.resumed + open.seen);
            }
        }
        let steps = tokens + prompts.div_ceil(self.shape.config.step_rows.into());
        self.stalled_max = self.stalled_max.max(self.stalled + steps + self.shape.depth as u64);
    }

    fn follow_kv_events(&mut self) {
        for event in self.scheduler.drain_kv_events() {
            match event {
                KvEvent::Stored { parent, block } => {
                    assert!(
                        parent == BlockName::ROOT || self.cached.contains(&parent),
                        "stored without its parent"
                    );
                    assert!(self.cached.insert(block), "stored twice");
                }
                KvEvent::Removed { block } => {
                    assert!(self.cached.remove(&block), "removed what was not there");
                    self.seen.evictions += 1;
                }
            }
        }
        if self.random.one_in(32) {
            let pool = self.scheduler.pool();
            let mut seen = HashSet::from([BlockName::ROOT]);
            for (parent, block) in pool.snapshot() {
                assert!(seen.contains(&parent), "a snapshot says parents first");
                assert!(seen.insert(block));
            }
            seen.remove(&BlockName::ROOT);
            assert_eq!(seen, self.cached);
            assert_eq!(pool.digest().0, self.cached.len());
        }
    }

    /// Takes the engine's events as clients would.
    fn listen(&mut self) {
        let events: Vec<Event> = self.scheduler.drain_events().collect();
        for event in events {
            match event {
                Event::Admitted { request, cached_tokens } => self.on_admitted(request, cached_tokens),
                Event::Token { request, index, position, token } => {
                    let open = self
                        .clients
                        .get_mut(&request)
                        .unwrap()
                        .open
                        .get_mut(&index)
                        .expect("token after end");
                    assert_eq!(position, open.resumed + open.seen, "a token is lost or doubled");
                    assert_eq!(
                        open.draws.pop_front(),
                        Some(Draw::Token(token.id)),
                        "not the text of {request}"
                    );
                    open.seen += 1;
                    open.last = Some(token.id);
                }
                Event::Finished { request, index, reason, usage } => {
                    let client = self.clients.get_mut(&request).unwrap();
                    let open = client.open.remove(&index).expect("ended twice");
                    let output = open.resumed + open.seen;
                    assert_eq!(usage.output_tokens, output);
                    assert_eq!(usage.cached_tokens, client.admitted.unwrap_or(0));
                    if reason == FinishReason::Cancelled {
                        assert!(client.cancelled.contains(&index), "nobody cancelled it");
                        assert!(usage.prompt_tokens >= usage.cached_tokens);
                    } else {
                        assert_eq!(usage.prompt_tokens as usize, client.prompt.len());
                        assert!(client.admitted.is_some() && open.draws.is_empty(), "ended early");
                        let last = open.last.unwrap();
                        let expected = if client.params.eos_ids.contains(&last) {
                            FinishReason::StopEos
                        } else if client.params.stop_ids.contains(&last) {
                            FinishReason::StopToken(last)
                        } else {
                            assert_eq!(output, client.max_tokens);
                            FinishReason::Length
                        };
                        assert_eq!(reason, expected);
                        self.seen.finishes += 1;
                    }
                    if client.open.is_empty() {
                        self.clients.remove(&request);
                    }
                }
                Event::Refused { request, refusal, unfinished } => {
                    let client = self.clients.remove(&request).expect("refused after its end");
                    self.check_refusal(&client, &refusal);
                    let at_once = [Reason::QueueFull, Reason::PoolExceeded].contains(&refusal.reason());
                    assert_eq!(unfinished.len(), if at_once { 0 } else { client.open.len() });
                    for (index, usage) in unfinished {
                        let open = &client.open[&index];
                        assert_eq!(usage.output_tokens, open.resumed + open.seen);
                        assert!(
                            (usage.cached_tokens..=client.prompt.len() as u32).contains(&usage.prompt_tokens)
                        );
                    }
                    *self.seen.refusals.entry(refusal.reason()).or_default() += 1;
                }
            }
        }
    }

    fn on_admitted(&mut self, request: RequestNumber, cached: u32) {
        let client = self.clients.get_mut(&request).unwrap();
        assert_eq!(client.admitted.replace(cached), None, "admitted twice");
        let resumed = client.open.values().any(|open| open.resumed > 0);
        assert!((cached as usize) < client.prompt.len() || resumed, "nothing left to compute");
        if cached == 0 {
            return;
        }
        self.seen.hits += 1;
        assert!(
            client.params.cache_use == CacheUse::Shared && self.shape.config.prefix_cache == CacheUse::Shared
        );
        let whole = cached - cached % self.shape.config.block_size;
        let owners = &self.prefixes[&prefix(&client.salt, &client.prompt[..whole as usize])];
        assert!(owners.iter().any(|owner| *owner != request), "a hit on what nobody with this salt computed");
    }

    fn check_refusal(&self, client: &Client, refusal: &Refusal) {
        match refusal {
            Refusal::QueueFull { waiting, .. } => assert!(*waiting >= self.shape.config.queue as u64),
            Refusal::PoolExceeded { needed_blocks, pool_blocks } => assert!(needed_blocks > pool_blocks),
            Refusal::DeadlineExceeded { .. } => assert!(client.deadline.unwrap() <= self.now),
            Refusal::NumericalError { position } => {
                let right = |e: &Expected| {
                    e.draws.front() == Some(&Draw::NotFinite) && u64::from(e.resumed + e.seen) == *position
                };
                assert!(client.open.values().any(right), "no NaN is due at {position}");
            }
            other => panic!("unexpected: {other}"),
        }
    }
}

/// Names a prefix of tokens under a salt.
fn prefix(salt: &[u8], ids: &[TokenId]) -> u64 {
    ids.iter().fold(salt.len() as u64, |hash, id| Random(hash.rotate_left(9) ^ u64::from(*id)).next())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
