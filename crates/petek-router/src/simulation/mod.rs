//! Rules of routing against each other in virtual time: the real decision and the real index before workers that are
//! a model, with events and loads that arrive at once. An ordering of ideas, not a forecast: see [`engine`] for what
//! the model leaves out.
//!
//! ```text
//!  trace ──▶ rule ◀── index ◀── stored, removed ──┐
//!              └──▶ worker: queue ──▶ step ──▶ cache (LRU)
//! ```
//! A request is good if its first token comes within a second and twice what its whole prompt takes to compute.

mod engine;

mod trace;

use std::fmt::Write;
use std::time::Duration;

use petek_proto::admin::v1::CandidateState;

use self::engine::{Engine, PREFILL_TOKENS_PER_S, step_time};
use self::trace::{BLOCK, Request};
use crate::draw::Draw;
use crate::index::{Index, PredictionId, WorkerKey};
use crate::route::{Ask, Decision, Rates, WorkerView, decide};
use crate::settings::LinkSettings;

const WORKERS: usize = 16;
/// At this speed of the trace sixteen workers are near saturation: all they hold together, as one, could just serve it.
const SPEED: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// What this router does.
    Ours,
    /// Least of: tokens that wait, and eight times what the request itself would have to compute.
    EightfoldWork,
    LeastRequests,
    LongestMatch,
}

const RULES: [Rule; 4] = [Rule::Ours, Rule::EightfoldWork, Rule::LeastRequests, Rule::LongestMatch];

/// What came of a trace under a rule.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    /// The share of good requests.
    goodput: f64,
    /// The share of prompt tokens that were not computed because they were held.
    hit: f64,
}

/// A cluster in virtual time.
struct Cluster<'a> {
    trace: &'a [Request],
    rule: Rule,
    draw: Draw,
    index: Index,
    workers: Vec<(WorkerKey, Engine)>,
    /// By request, from its dispatch to its first token.
    predictions: Vec<Option<PredictionId>>,
    good: usize,
    cached_tokens: u64,
}

impl<'a> Cluster<'a> {
    fn new(trace: &'a [Request], rule: Rule, draw: Draw) -> Self {
        let mut index = Index::new(256 << 20);
        let mut worker = || {
            let key = index.add_worker();
            index.synced(key);
            (key, Engine::new())
        };
        let workers = (0..WORKERS).map(|_| worker()).collect();
        let predictions = vec![None; trace.len()];
        Cluster { trace, rule, draw, index, workers, predictions, good: 0, cached_tokens: 0 }
    }

    /// Serves the whole trace.
    fn run(mut self) -> Outcome {
        let mut arrivals = (0..self.trace.len()).peekable();
        loop {
            let of = |at: usize| Some((self.workers[at].1.step_ends()?, at));
            let step = (0..WORKERS).filter_map(of).min();
            match (arrivals.peek(), step) {
                (Some(&request), step) if step.is_none_or(|(end, _)| self.trace[request].at < end) => {
                    arrivals.next();
                    self.arrive(request);
                }
                (_, Some((now, worker))) => self.step(worker, now),
                (_, None) => break,
            }
        }
        self.index.expire(Duration::MAX);
        for (key, engine) in &self.workers {
            assert_eq!(self.index.held(*key).blocks as usize, engine.blocks_held(), "the index is exact");
        }
        let prompts: u64 = self.trace.iter().map(|request| u64::from(request.prompt_tokens)).sum();
        Outcome {
            goodput: self.good as f64 / self.trace.len() as f64,
            hit: self.cached_tokens as f64 / prompts as f64,
        }
    }

    fn arrive(&mut self, number: usize) {
        let request = &self.trace[number];
        let now = request.at;
        // As much output as nobody knows yet.
        let ask = Ask { prompt_tokens: request.prompt_tokens, max_tokens: 1_024, block_size: BLOCK };
        let names = &request.names[..ask.reusable_blocks() as usize];
        let matches = self.index.matches(names, now);
        let view = |(key, engine): &(WorkerKey, Engine)| {
            let matched = matches.of(*key);
            WorkerView {
                state: CandidateState::Eligible,
                waiting_uncached_tokens: engine.waiting_tokens(),
                own_waiting_tokens: 0,
                running: engine.running(),
                matched_blocks: matched.blocks,
                predicted_blocks: matched.predicted,
                rates: rates(engine),
                load_age: Some(Duration::ZERO),
            }
        };
        let views: Vec<WorkerView> = self.workers.iter().map(view).collect();
        let decision = decide(&ask, &views, self.draw.bits());
        let chosen = self.choose(&decision, &views);

        // As a link counts a request.
        let (key, engine) = &mut self.workers[chosen];
        let until = now + Duration::from_secs_f64(2.0 * decision.costs[chosen].time_to_compute_s()) + grace();
        self.predictions[number] = self.index.predict(*key, &request.names, now, until);
        engine.submit(number, request);
        if engine.step_ends().is_none() {
            self.begin_step(chosen, now);
        }
    }

    fn choose(&mut self, decision: &Decision, views: &[WorkerView]) -> usize {
        let costs = &decision.costs;
        match self.rule {
            Rule::Ours => decision.chosen.expect("all are eligible"),
            Rule::EightfoldWork => {
                let work = |at: usize| 8 * u64::from(costs[at].uncached_tokens);
                self.least(|_, at| views[at].waiting_uncached_tokens + work(at))
            }
            Rule::LeastRequests => self.least(|engine, _| engine.requests() as u64),
            Rule::LongestMatch => self.least(|_, at| u64::from(costs[at].uncached_tokens)),
        }
    }

    /// The worker with the least of something; of equals any.
    fn least(&mut self, of: impl Fn(&Engine, usize) -> u64) -> usize {
        let each: Vec<u64> = (0..WORKERS).map(|at| of(&self.workers[at].1, at)).collect();
        let least = each.iter().min();
        let equal: Vec<usize> = (0..WORKERS).filter(|at| each.get(*at) == least).collect();
        *self.draw.pick(&equal)
    }

    fn begin_step(&mut self, worker: usize, now: Duration) {
        let (key, engine) = &mut self.workers[worker];
        for admitted in engine.begin_step(self.trace, now) {
            self.cached_tokens += u64::from(admitted.cached_tokens);
            self.index.removed(*key, admitted.evicted.iter().copied());
            if let Some(prediction) = self.predictions[admitted.request] {
                let uncached = self.trace[admitted.request].prompt_tokens - admitted.cached_tokens;
                let prefill_s = f64::from(uncached) / PREFILL_TOKENS_PER_S;
                self.index.retime(prediction, now + Duration::from_secs_f64(2.0 * prefill_s) + grace());
            }
        }
    }

    /// A worker's step is over.
    fn step(&mut self, worker: usize, now: Duration) {
        let (key, engine) = &mut self.workers[worker];
        for computed in engine.end_step(self.trace) {
            let request = &self.trace[computed.request];
            let stored = self.index.stored(*key, computed.parent, computed.stored.iter().copied());
            stored.expect("a chain is stored from its start");
            if computed.is_whole {
                let prompt_s = f64::from(request.prompt_tokens) / PREFILL_TOKENS_PER_S;
                let good = Duration::from_secs(1) + Duration::from_secs_f64(2.0 * prompt_s);
                self.good += usize::from(now - request.at <= good);
                if let Some(prediction) = self.predictions[computed.request].take() {
                    self.index.retime(prediction, now + grace());
                }
            }
        }
        self.begin_step(worker, now);
    }
}

fn rates(engine: &Engine) -> Rates {
    Rates {
        prefill_tokens_per_s: PREFILL_TOKENS_PER_S,
        step_s: step_time(0, engine.running()).as_secs_f64(),
        step_one_more_s: step_time(0, engine.running() + 1).as_secs_f64(),
    }
}

fn grace() -> Duration {
    Duration::from_millis(LinkSettings::default().prediction_grace_ms)
}

/// Runs all rules over a trace, prints what came of it, and expects ours to be far ahead of those that see only the
/// load or only the cache.
#[expect(clippy::print_stdout, reason = "the table is what the simulation is for")]
fn compare(name: &str, trace: &[Request], draw: &Draw) -> Outcome {
    let outcomes = RULES.map(|rule| Cluster::new(trace, rule, draw.clone()).run());
    let mut table =
        format!("{name}: {} requests on {WORKERS} workers\n  goodput    hit  rule\n", trace.len());
    for (rule, outcome) in RULES.iter().zip(&outcomes) {
        writeln!(table, "  {:7.3}  {:5.3}  {rule:?}", outcome.goodput, outcome.hit)
            .expect("a string takes all");
    }
    println!("{table}");
    let [ours, eightfold_work, least_requests, longest_match] = outcomes;
    for other in [least_requests, longest_match] {
        assert!(ours.goodput >= other.goodput + 0.3, "ours is not far ahead:\n{table}");
    }
    // A price of queued work that is far off shows in the share of hits first.
    let is_level = ours.goodput >= eightfold_work.goodput - 0.01 && ours.hit >= 0.9 * eightfold_work.hit;
    assert!(is_level, "ours is behind:\n{table}");
    ours
}

#[test]
fn on_conversations_ours_is_far_ahead() {
    let mut draw = Draw::announced("routing of drawn conversations", 1);
    let trace = trace::drawn(&mut draw, Duration::from_secs(3_600), SPEED);
    compare("drawn conversations", &trace, &draw);
}

/// The one test that may lack what it needs also where nothing else may be skipped: the trace is nobody's to copy.
#[test]
#[expect(clippy::print_stdout, reason = "a skip is said aloud")]
fn on_the_conversation_trace_ours_is_far_ahead() {
    let file = trace::folder().join("conversation_trace.jsonl");
    if !file.is_file() {
        println!("SKIPPED (allowed): routing over a real trace, for want of {}", file.display());
        return;
    }
    let mut draw = Draw::announced("routing of the conversation trace", 1);
    let trace = trace::read(&file, &mut draw, SPEED);
    let ours = compare("conversation trace", &trace, &draw);
    // What a rule that holds sessions to their workers reaches here.
    assert!(ours.goodput >= 0.98 && ours.hit >= 0.237, "{ours:?}");
}
