//! Every metric there is. A dashboard may rely on each name, label and unit here: changing one is a release note.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use super::{Counter, Counters, Gauge, Gauges, Histogram, Registry, labels};

/// How many models of a router have series of their own; those after it share the model `other`.
const MODELS_MAX: usize = 64;

/// Time to the first token: from a warm cache on a small model to a long prompt in a queue.
const TTFT_SECONDS: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0];

/// Between two tokens of a sequence: from a GPU's step to a starved laptop's.
const ITL_SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];

/// Whole requests: up to the longest call, an hour.
const REQUEST_SECONDS: [f64; 14] =
    [0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];

/// One step of the engine.
const STEP_SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 5.0];

labels! {
    /// How a request ended: the one terminal event that each has.
    Outcome, "outcome":
    /// All its sequences finished.
    Finished "finished",
    /// It was not begun: bad, or no room.
    Refused "refused",
    /// Its client went away or took it back.
    Cancelled "cancelled",
    /// A part failed.
    Failed "failed",
}

labels! {
    /// Why the router chose a worker.
    RouteReason, "reason":
    /// It is the only one.
    Only "only",
    /// It had the least cost, the request's cached prefix counted.
    Cached "cached",
    /// It had the least cost; none had anything of the prompt.
    Idle "idle",
    /// It was drawn among those whose costs were close.
    Near "near",
    /// A fuller one had refused.
    Retried "retried",
}

labels! {
    /// The router's guess of a request's cached tokens beside what its worker then counted.
    Prediction, "prediction":
    /// Just as many.
    Exact "exact",
    /// Fewer were cached than it believed.
    Over "over",
    /// More were cached than it believed.
    Under "under",
}

labels! {
    /// What a worker's KV events said of blocks.
    KvChange, "change":
    /// They can be found there now.
    Stored "stored",
    /// They cannot any more.
    Removed "removed",
    /// They were removed and had not been there: skipped.
    Unknown "unknown",
}

labels! {
    /// What became of a batch of KV events.
    KvBatchFate, "fate":
    /// It is in the index.
    Applied "applied",
    /// It was there already: dropped.
    Repeated "repeated",
}

labels! {
    /// Why a worker's KV events had to be asked for again.
    KvRelapse, "cause":
    /// Batches were missing.
    Gap "gap",
    /// Blocks were stored behind one that was not there.
    Stray "stray",
    /// Worker and index differed in what is held.
    Digest "digest",
    /// The worker no longer had what was missed.
    Behind "behind",
    /// The worker had started again.
    Epoch "epoch",
    /// It was nothing that a worker says.
    Protocol "protocol",
    /// The stream broke or fell silent.
    Lost "lost",
}

labels! {
    /// Whom a router does not believe, by the silence of load reports.
    Suspect, "suspect":
    /// A worker: it gets no new work until it is heard of.
    Worker "worker",
    /// Itself: too many were silent at once, or its own timer was late.
    Router "router",
}

labels! {
    /// What a block of the KV cache is doing.
    BlockState, "state":
    /// Nothing: it holds no tokens.
    Free "free",
    /// Sequences use it.
    Held "held",
    /// Nobody uses it; it can be found by its hash until it is evicted.
    Cached "cached",
}

labels! {
    /// Where a sequence of a worker is.
    SequenceState, "state":
    /// In the queue.
    Waiting "waiting",
    /// In the steps of the engine.
    Running "running",
}

/// The metrics of a router.
pub struct RouterMetrics {
    registry: Registry,
    models: RwLock<BTreeMap<String, Arc<RouterSeries>>>,
    other: Arc<RouterSeries>,
    /// Workers of the cluster that the router knows.
    pub workers: Gauge,
    /// Streams to clients that are open.
    pub streams_open: Gauge,
    /// Records of workers that were malformed or contradicted their worker, and ignored.
    pub records_bad: Counter,
    /// Differences between the watched view and a full list.
    pub view_differences: Counter,
    /// Blocks that KV events named, by what became of them.
    pub kv_blocks: Counters<KvChange>,
    /// Batches of KV events, by what became of them.
    pub kv_batches: Counters<KvBatchFate>,
    /// Times that a worker's KV events had to be asked for again, by cause.
    pub kv_relapses: Counters<KvRelapse>,
    /// Snapshots of workers' caches that were read to their end.
    pub kv_snapshots: Counter,
    /// Blocks in the prefix index, each once.
    pub index_blocks: Gauge,
    /// Pairs of a block and a worker that holds it.
    pub index_holder_blocks: Gauge,
    /// Memory of the prefix index.
    pub index_bytes: Gauge,
    /// Pairs of a block and a worker that the index forgot for want of room.
    pub index_forgotten: Counter,
    /// Prompts whose blocks were not predicted for want of room.
    pub index_unpredicted: Counter,
    /// Times that workers fell silent, by whom the router then suspected.
    pub suspicions: Counters<Suspect>,
}

/// The metrics of a router for one model.
pub struct RouterSeries {
    /// Requests that ended, by how.
    pub requests: Counters<Outcome>,
    /// From its arrival to its terminal event.
    pub request_seconds: Histogram,
    /// Tokens of prompts, each prompt once.
    pub prompt_tokens: Counter,
    /// Those of them that a worker did not have to compute.
    pub cached_tokens: Counter,
    /// Those of them of which the router believed so.
    pub predicted_cached_tokens: Counter,
    /// Requests, by how the two compared.
    pub predictions: Counters<Prediction>,
    /// Tokens sent to clients.
    pub output_tokens: Counter,
    /// Tokens that came after a sequence had ended: sent to nobody, billed to nobody.
    pub dropped_tokens: Counter,
    /// From a request's arrival to its first token, at the router.
    pub ttft_seconds: Histogram,
    /// Between two tokens of a sequence, at the router; those of one message share its gap.
    pub itl_seconds: Histogram,
    /// Choices of a worker, by their reason.
    pub decisions: Counters<RouteReason>,
}

impl RouterMetrics {
    /// Registers them. Panics if they are there already: one router per registry.
    pub fn new(registry: &Registry) -> Self {
        let all = registry.scope(&[]);
        Self {
            workers: all.gauge("petek_router_workers", "Workers of the cluster that the router knows."),
            streams_open: all.gauge("petek_router_streams_open", "Open streams to clients."),
            records_bad: all.counter("petek_router_records_bad_total", "Ignored records of workers."),
            view_differences: all.counter(
                "petek_router_view_differences_total",
                "Differences between the watched view of the registry and a full list.",
            ),
            kv_blocks: all.counters(
                "petek_router_kv_blocks_total",
                "Blocks that workers' KV events named, by what became of them.",
            ),
            kv_batches: all
                .counters("petek_router_kv_batches_total", "Batches of KV events, by what became of them."),
            kv_relapses: all.counters(
                "petek_router_kv_relapses_total",
                "Times that a worker's KV events had to be asked for again, by cause.",
            ),
            kv_snapshots: all.counter(
                "petek_router_kv_snapshots_total",
                "Snapshots of workers' caches that were read to their end.",
            ),
            index_blocks: all.gauge("petek_router_index_blocks", "Blocks in the prefix index, each once."),
            index_holder_blocks: all.gauge(
                "petek_router_index_holder_blocks",
                "Pairs of a block in the prefix index and a worker that holds it.",
            ),
            index_bytes: all.gauge("petek_router_index_bytes", "Memory of the prefix index."),
            index_forgotten: all.counter(
                "petek_router_index_forgotten_total",
                "Pairs of a block and a worker that the prefix index forgot for want of room.",
            ),
            index_unpredicted: all.counter(
                "petek_router_index_unpredicted_total",
                "Prompts whose blocks were not predicted for want of room.",
            ),
            suspicions: all.counters(
                "petek_router_suspicions_total",
                "Times that workers fell silent, by whom the router then suspected.",
            ),
            registry: registry.clone(),
            models: RwLock::default(),
            other: Arc::new(RouterSeries::new(registry, "other")),
        }
    }

    /// Gives a model of the cluster its own series. Only for names that workers serve, never for what a client
    /// asked for: past 64 models this does nothing, and the model counts as `other`.
    pub fn add_model(&self, name: &str) {
        let mut models = self.models.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if models.len() < MODELS_MAX && name != "other" && !models.contains_key(name) {
            models.insert(name.into(), Arc::new(RouterSeries::new(&self.registry, name)));
        }
    }

    /// The series of a model; of `other` for a name that was not added. Look up once per request.
    pub fn model(&self, name: &str) -> Arc<RouterSeries> {
        let models = self.models.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        models.get(name).unwrap_or(&self.other).clone()
    }
}

impl RouterSeries {
    fn new(registry: &Registry, model: &str) -> Self {
        let scope = registry.scope(&[("model", model)]);
        Self {
            requests: scope.counters("petek_router_requests_total", "Requests that ended, by how."),
            request_seconds: scope.histogram(
                "petek_router_request_seconds",
                "From a request's arrival to its end.",
                &REQUEST_SECONDS,
            ),
            prompt_tokens: scope.counter("petek_router_prompt_tokens_total", "Tokens of prompts."),
            cached_tokens: scope
                .counter("petek_router_cached_tokens_total", "Tokens of prompts that a worker's cache held."),
            predicted_cached_tokens: scope.counter(
                "petek_router_predicted_cached_tokens_total",
                "Tokens of prompts that the router believed cached.",
            ),
            predictions: scope.counters(
                "petek_router_predictions_total",
                "Requests, by how the believed cached tokens compared to the true ones.",
            ),
            output_tokens: scope.counter("petek_router_output_tokens_total", "Tokens sent to clients."),
            dropped_tokens: scope.counter(
                "petek_router_dropped_tokens_total",
                "Tokens that came after their sequence had ended.",
            ),
            ttft_seconds: scope.histogram(
                "petek_router_time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                &TTFT_SECONDS,
            ),
            itl_seconds: scope.histogram(
                "petek_router_inter_token_seconds",
                "Between two tokens of a sequence.",
                &ITL_SECONDS,
            ),
            decisions: scope.counters("petek_router_decisions_total", "Choices of a worker, by reason."),
        }
    }

    /// Counts a request that ended so long after its arrival, before it went to any worker.
    pub fn ended_at_the_door(&self, outcome: Outcome, after: Duration) {
        self.requests.of(outcome).inc();
        self.request_seconds.observe(after.as_secs_f64());
    }

    /// Counts what a worker said about a request's cached tokens beside what was believed.
    pub fn count_cached(&self, predicted_tokens: u64, actual_tokens: u64) {
        self.predicted_cached_tokens.inc_by(predicted_tokens);
        self.cached_tokens.inc_by(actual_tokens);
        let prediction = match predicted_tokens.cmp(&actual_tokens) {
            std::cmp::Ordering::Equal => Prediction::Exact,
            std::cmp::Ordering::Greater => Prediction::Over,
            std::cmp::Ordering::Less => Prediction::Under,
        };
        self.predictions.of(prediction).inc();
    }
}

/// The metrics of a worker. Several workers of one process each have their own, told apart by the label `worker`.
pub struct WorkerMetrics {
    /// Requests that ended, by how.
    pub requests: Counters<Outcome>,
    /// Tokens of prompts, each admitted prompt once.
    pub prompt_tokens: Counter,
    /// Those of them that the cache held at the first admission.
    pub cached_tokens: Counter,
    /// Tokens drawn.
    pub output_tokens: Counter,
    /// From a request's arrival to its place in the batch.
    pub queue_seconds: Histogram,
    /// Requests that ended because the model's numbers were not finite.
    pub numerical_errors: Counter,
    /// Streams of routers that are open.
    pub streams_open: Gauge,
    /// Streams that were ended because their router did not read them.
    pub streams_cut: Counter,
    /// Steps of the engine.
    pub steps: Counter,
    /// One step, from its plan to its outcome.
    pub step_seconds: Histogram,
    /// Sequences that lost their blocks to others and had to begin again.
    pub preemptions: Counter,
    /// Sequences, by where they are.
    pub sequences: Gauges<SequenceState>,
    /// Blocks of the KV cache, by what they are doing; the sum is the pool.
    pub blocks: Gauges<BlockState>,
}

impl WorkerMetrics {
    /// Registers them for one worker of one model, names from configuration. Panics if that worker has them.
    pub fn new(registry: &Registry, worker: &str, model: &str) -> Self {
        let scope = registry.scope(&[("worker", worker), ("model", model)]);
        Self {
            requests: scope.counters("petek_worker_requests_total", "Requests that ended, by how."),
            prompt_tokens: scope.counter("petek_worker_prompt_tokens_total", "Tokens of admitted prompts."),
            cached_tokens: scope.counter(
                "petek_worker_cached_tokens_total",
                "Tokens of admitted prompts that the cache held.",
            ),
            output_tokens: scope.counter("petek_worker_output_tokens_total", "Tokens drawn."),
            queue_seconds: scope.histogram(
                "petek_worker_queue_seconds",
                "From a request's arrival to its place in the batch.",
                &TTFT_SECONDS,
            ),
            numerical_errors: scope
                .counter("petek_worker_numerical_errors_total", "Requests whose logits were not finite."),
            streams_open: scope.gauge("petek_worker_streams_open", "Open streams of routers."),
            streams_cut: scope
                .counter("petek_worker_streams_cut_total", "Streams that their router did not read."),
            steps: scope.counter("petek_worker_steps_total", "Steps of the engine."),
            step_seconds: scope.histogram(
                "petek_worker_step_seconds",
                "One step, from its plan to its outcome.",
                &STEP_SECONDS,
            ),
            preemptions: scope
                .counter("petek_worker_preemptions_total", "Sequences that had to begin again."),
            sequences: scope.gauges("petek_worker_sequences", "Sequences, by where they are."),
            blocks: scope.gauges("petek_worker_blocks", "Blocks of the KV cache, by what they are doing."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(registry: &Registry, line: &str) {
        let text = registry.text();
        assert!(text.lines().any(|l| l == line), "`{line}` is not in\n{text}");
    }

    #[test]
    fn a_routers_series() {
        let registry = Registry::new();
        let metrics = RouterMetrics::new(&registry);
        metrics.add_model("demo");
        check(&registry, r#"petek_router_requests_total{model="demo",outcome="failed"} 0"#);

        let demo = metrics.model("demo");
        demo.requests.of(Outcome::Finished).inc();
        demo.decisions.of(RouteReason::Cached).inc_by(2);
        demo.ttft_seconds.observe(0.02);
        demo.count_cached(32, 32);
        demo.count_cached(64, 0);
        demo.count_cached(0, 16);
        metrics.model("what a client says").requests.of(Outcome::Refused).inc();
        metrics.workers.set(2);

        for line in [
            "# TYPE petek_router_requests_total counter",
            r#"petek_router_requests_total{model="demo",outcome="finished"} 1"#,
            r#"petek_router_requests_total{model="other",outcome="refused"} 1"#,
            r#"petek_router_decisions_total{model="demo",reason="cached"} 2"#,
            r#"petek_router_time_to_first_token_seconds_bucket{model="demo",le="0.01"} 0"#,
            r#"petek_router_time_to_first_token_seconds_bucket{model="demo",le="0.025"} 1"#,
            r#"petek_router_predictions_total{model="demo",prediction="exact"} 1"#,
            r#"petek_router_predictions_total{model="demo",prediction="over"} 1"#,
            r#"petek_router_predictions_total{model="demo",prediction="under"} 1"#,
            r#"petek_router_predicted_cached_tokens_total{model="demo"} 96"#,
            r#"petek_router_cached_tokens_total{model="demo"} 48"#,
            "petek_router_workers 2",
        ] {
            check(&registry, line);
        }
        assert!(!registry.text().contains("client says"));
    }

    #[test]
    fn models_are_bounded() {
        let registry = Registry::new();
        let metrics = RouterMetrics::new(&registry);
        for number in 0..=MODELS_MAX {
            metrics.add_model(&format!("m{number}"));
            metrics.add_model(&format!("m{number}"));
        }
        metrics.add_model("other");
        metrics.model("m0").output_tokens.inc();
        metrics.model(&format!("m{MODELS_MAX}")).output_tokens.inc_by(3);
        check(&registry, r#"petek_router_output_tokens_total{model="m0"} 1"#);
        check(&registry, r#"petek_router_output_tokens_total{model="other"} 3"#);
        let series =
            registry.text().lines().filter(|l| l.starts_with("petek_router_output_tokens_total{")).count();
        assert_eq!(series, MODELS_MAX + 1);
    }

    #[test]
    fn two_workers_in_one_process() {
        let registry = Registry::new();
        let [a, b] = ["a", "b"].map(|worker| WorkerMetrics::new(&registry, worker, "demo"));
        a.blocks.of(BlockState::Free).set(7);
        b.sequences.of(SequenceState::Running).inc();
        b.steps.inc();
        check(&registry, r#"petek_worker_blocks{model="demo",state="free",worker="a"} 7"#);
        check(&registry, r#"petek_worker_blocks{model="demo",state="free",worker="b"} 0"#);
        check(&registry, r#"petek_worker_sequences{model="demo",state="running",worker="b"} 1"#);
        check(&registry, r#"petek_worker_steps_total{model="demo",worker="b"} 1"#);
    }

    #[test]
    fn names_follow_the_rules() {
        let registry = Registry::new();
        RouterMetrics::new(&registry);
        WorkerMetrics::new(&registry, "w", "demo");
        for line in registry.text().lines().filter(|line| line.starts_with("# TYPE ")) {
            let [_, _, name, kind] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            assert!(name.starts_with("petek_"), "{name}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert_eq!(kind == "histogram", name.ends_with("_seconds"), "{line}");
            let other_units = ["_ms", "_milliseconds", "_mb", "_percent", "_rate", "_ratio", "_per_second"];
            assert!(!other_units.iter().any(|unit| name.contains(unit)), "{name}");
        }
    }
}
