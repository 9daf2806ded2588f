//! A worker as a model: steps that take time, a queue, and a prefix cache.
//!
//! A step takes 8 ms, what its prompt tokens take at 20,000 per second (at most 8,192 of them), and 0.05 ms for each
//! sequence that runs. The cache holds 1,000 blocks, those in use pinned, the least recently used given up first.
//! Left out: output is not held for a next prompt, and no request is preempted.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use petek_core::hash::BlockName;

use super::trace::{BLOCK, Request};

pub(super) const PREFILL_TOKENS_PER_S: f64 = 20_000.0;
/// A step of nothing.
const STEP: Duration = Duration::from_millis(8);
const CHUNK_TOKENS_MAX: u32 = 8_192;
const BLOCKS: usize = 1_000;

/// A step that computes so many prompt tokens while so many sequences run.
pub(super) fn step_time(prefill_tokens: u32, running: u32) -> Duration {
    // A second divided by 20,000 tokens is the 0.05 ms of a sequence.
    STEP + Duration::from_micros(50) * (prefill_tokens + running)
}

/// See the head of this file.
pub(super) struct Engine {
    cache: Cache,
    /// Whose prompts are not computed yet; the first ones may be admitted.
    queue: VecDeque<Job>,
    /// The last step of sequences that run, and their requests.
    running: BTreeMap<u64, Vec<usize>>,
    running_count: u32,
    waiting_tokens: u64,
    steps: u64,
    step: Option<Step>,
}

struct Job {
    request: usize,
    uncached_tokens: u32,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Waits,
    Admitted,
}

struct Step {
    ends: Duration,
    /// Tokens of the first jobs of the queue.
    chunks: Vec<u32>,
}

/// A request that was given its blocks.
pub(super) struct Admitted {
    pub(super) request: usize,
    pub(super) cached_tokens: u32,
    /// What is held no more for it.
    pub(super) evicted: Vec<BlockName>,
}

/// What a step computed of a prompt.
pub(super) struct Computed {
    pub(super) request: usize,
    /// The block before `stored`.
    pub(super) parent: BlockName,
    pub(super) stored: Vec<BlockName>,
    /// Whether that was the last of it: its first token is there.
    pub(super) is_whole: bool,
}

impl Engine {
    pub(super) fn new() -> Self {
        Engine {
            cache: Cache::default(),
            queue: VecDeque::new(),
            running: BTreeMap::new(),
            running_count: 0,
            waiting_tokens: 0,
            steps: 0,
            step: None,
        }
    }

    /// When the step under way ends; none where there is none.
    pub(super) fn step_ends(&self) -> Option<Duration> {
        self.step.as_ref().map(|step| step.ends)
    }

    /// Uncached tokens of prompts that are not computed.
    pub(super) fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    pub(super) fn running(&self) -> u32 {
        self.running_count
    }

    pub(super) fn requests(&self) -> usize {
        self.queue.len() + self.running_count as usize
    }

    pub(super) fn blocks_held(&self) -> usize {
        self.cache.held.len()
    }

    pub(super) fn submit(&mut self, number: usize, request: &Request) {
        let uncached_tokens = request.prompt_tokens - self.cache.matched(request) as u32 * BLOCK;
        self.waiting_tokens += u64::from(uncached_tokens);
        self.queue.push_back(Job { request: number, uncached_tokens, state: State::Waits });
    }

    /// Begins a step, if there is anything to do, and says whom it admitted.
    pub(super) fn begin_step(&mut self, trace: &[Request], now: Duration) -> Vec<Admitted> {
        assert!(self.step.is_none(), "one step at a time");
        let mut admitted = Vec::new();
        let mut chunks = Vec::new();
        let mut room = CHUNK_TOKENS_MAX;
        for job in &mut self.queue {
            if room == 0 {
                break;
            }
            if job.state == State::Waits {
                let request = &trace[job.request];
                let Some((matched, evicted)) = self.cache.admit(request) else { break };
                let cached_tokens = matched as u32 * BLOCK;
                self.waiting_tokens -= u64::from(job.uncached_tokens);
                job.uncached_tokens = request.prompt_tokens - cached_tokens;
                self.waiting_tokens += u64::from(job.uncached_tokens);
                job.state = State::Admitted;
                admitted.push(Admitted { request: job.request, cached_tokens, evicted });
            }
            let chunk = job.uncached_tokens.min(room);
            room -= chunk;
            chunks.push(chunk);
        }
        let tokens = chunks.iter().sum();
        if tokens > 0 || self.running_count > 0 {
            self.step = Some(Step { ends: now + step_time(tokens, self.running_count), chunks });
        } else {
            assert!(self.queue.is_empty(), "whatever fits the cache alone is admitted when nothing runs");
        }
        admitted
    }

    /// Ends the step under way, and says what it computed.
    pub(super) fn end_step(&mut self, trace: &[Request]) -> Vec<Computed> {
        let Step { chunks, .. } = self.step.take().expect("a step is under way");
        self.steps += 1;
        for ended in self.running.remove(&self.steps).unwrap_or_default() {
            self.running_count -= 1;
            self.cache.release(&trace[ended]);
        }
        let mut computed = Vec::new();
        for (job, tokens) in self.queue.iter_mut().zip(chunks) {
            let request = &trace[job.request];
            let blocks_at = |uncached: u32| ((request.prompt_tokens - uncached) / BLOCK) as usize;
            let before = blocks_at(job.uncached_tokens);
            job.uncached_tokens -= tokens;
            self.waiting_tokens -= u64::from(tokens);
            let stored = request.names[before..blocks_at(job.uncached_tokens)].to_vec();
            stored.iter().for_each(|name| self.cache.store(*name));
            computed.push(Computed {
                request: job.request,
                parent: before.checked_sub(1).map_or(BlockName::ROOT, |last| request.names[last]),
                stored,
                is_whole: job.uncached_tokens == 0,
            });
        }
        let whole = computed.iter().filter(|computed| computed.is_whole).count();
        for job in self.queue.drain(..whole) {
            // Its first token came with its prompt.
            match trace[job.request].output_tokens {
                0 | 1 => self.cache.release(&trace[job.request]),
                tokens => {
                    self.running_count += 1;
                    let last = self.steps + u64::from(tokens) - 1;
                    self.running.entry(last).or_default().push(job.request);
                }
            }
        }
        computed
    }
}

/// Blocks by name, each with those who use it.
#[derive(Default)]
struct Cache {
    held: HashMap<BlockName, Held>,
    /// Blocks that nobody uses, by when they were given back.
    idle: BTreeMap<u64, BlockName>,
    /// For prompts that are being computed, and for the last, partial block of those that run.
    reserved: usize,
    releases: u64,
}

#[derive(Default)]
struct Held {
    users: u32,
    /// Its place among those that nobody uses.
    released: u64,
}

impl Cache {
    /// Leading blocks of a prompt that are held and need not be computed.
    fn matched(&self, request: &Request) -> usize {
        let reusable = (request.prompt_tokens as usize - 1) / BLOCK as usize;
        request.names[..reusable].iter().take_while(|name| self.held.contains_key(*name)).count()
    }

    /// Pins what is held of a prompt and makes room for the rest. Says how many blocks were held, and what was given
    /// up; none where those in use leave no room.
    fn admit(&mut self, request: &Request) -> Option<(usize, Vec<BlockName>)> {
        let matched = self.matched(request);
        let needed = request.blocks() - matched;
        let unused = |name: &&BlockName| self.held[*name].users == 0;
        let idle = self.idle.len() - request.names[..matched].iter().filter(unused).count();
        if self.held.len() - idle + self.reserved + needed > BLOCKS {
            return None;
        }
        request.names[..matched].iter().for_each(|name| self.pin(*name));
        self.reserved += needed;
        let mut evicted = Vec::new();
        while self.held.len() + self.reserved > BLOCKS {
            let (_, name) = self.idle.pop_first().expect("what is not in use makes room");
            self.held.remove(&name);
            evicted.push(name);
        }
        Some((matched, evicted))
    }

    /// A block of an admitted prompt is computed; another request may have computed it meanwhile.
    fn store(&mut self, name: BlockName) {
        self.reserved -= 1;
        self.pin(name);
    }

    fn pin(&mut self, name: BlockName) {
        let held = self.held.entry(name).or_default();
        held.users += 1;
        if held.users == 1 {
            self.idle.remove(&held.released);
        }
    }

    /// A request is over. The end of its chain is given up before its beginning.
    fn release(&mut self, request: &Request) {
        self.reserved -= request.blocks() - request.names.len();
        for name in request.names.iter().rev() {
            let held = self.held.get_mut(name).expect("what is in use is held");
            held.users -= 1;
            if held.users == 0 {
                self.releases += 1;
                held.released = self.releases;
                self.idle.insert(self.releases, *name);
            }
        }
    }
}
