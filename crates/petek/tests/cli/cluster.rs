//! `workers`, `models` and `routes explain`: tables and JSON.

use petek_proto::admin::v1::explain_route_request::Request;
use petek_proto::admin::v1::watch_workers_response::Event;
use petek_proto::admin::v1::{
    CandidateState, ExplainRouteResponse, IndexState, Link, ListWorkersResponse, RouteCandidate,
    RouteDecision, RouterView, WatchWorkersResponse, Worker, WorkerSnapshot,
};
use petek_proto::inference::v1::{ListModelsResponse, Model, RouteReason};
use petek_proto::worker::v1::{LoadReport, WorkerState};
use serde_json::json;

use super::router::{Router, Script};
use super::{json_lines, run};

fn worker(id: &str, link: Link, state: WorkerState) -> Worker {
    let load = LoadReport { running: 3, waiting: 1, blocks_free: 90, ..LoadReport::default() };
    let is_up = link == Link::Connected;
    Worker {
        id: id.into(),
        epoch: u64::MAX,
        addresses: vec![format!("http://{id}:7413"), "http://other:1".into()],
        model: "demo".into(),
        blocks_total: 128,
        tp: 2,
        state: state.into(),
        view: Some(RouterView {
            link: link.into(),
            link_error: if is_up { String::new() } else { "no\nroute".into() },
            load: is_up.then_some(load),
            index: IndexState::Synced.into(),
            index_blocks: 40,
            ..RouterView::default()
        }),
        ..Worker::default()
    }
}

fn two_workers() -> Vec<Worker> {
    vec![worker("w2", Link::Lost, WorkerState::Draining), worker("w1", Link::Connected, WorkerState::Serving)]
}

const W1: &str =
    "w1      demo   serving   connected        3        1    90     128       40   2  http://w1:7413\n";

#[test]
fn workers() {
    let workers = ListWorkersResponse { workers: two_workers(), registry_stale: true };
    let router = Router::start(Script { workers, ..Script::default() });
    let ran = run(&router, &["workers"]);
    let head = "WORKER  MODEL  STATE     LINK       RUNNING  WAITING  FREE  BLOCKS  INDEXED  TP  ADDRESS\n";
    let w2 =
        "w2      demo   draining  lost             -        -     -     128       40   2  http://w2:7413\n";
    assert_eq!((ran.code, ran.out), (Some(0), [head, W1, w2].concat()));
    assert!(ran.err.starts_with("petek: warning: the registry is out of reach"), "{}", ran.err);
    assert!(ran.err.ends_with("petek: w2 gets no work: no\\nroute\n"), "{}", ran.err);

    let ran = run(&router, &["workers", "--json", "--model", "demo"]);
    let list = &json_lines(&ran.out)[0];
    assert_eq!(list["registry_stale"], json!(true));
    assert_eq!(list["workers"][1]["epoch"], json!("18446744073709551615"));
    assert_eq!(list["workers"][1]["view"]["load"]["running"], json!(3));
    assert_eq!(list["workers"][0]["state"], json!("WORKER_STATE_DRAINING"));
    assert_eq!(router.script.lock().unwrap().worker_filters, ["", "demo"]);
}

#[test]
fn workers_are_watched() {
    let all = || Event::Snapshot(WorkerSnapshot { workers: two_workers() });
    let events =
        [all(), Event::Removed("w2".into()), Event::RegistryStale(true), Event::Removed("w1".into())];
    let changes = || events.iter().map(|event| WatchWorkersResponse { event: Some(event.clone()) }).collect();
    let router = Router::start(Script { changes: changes(), ..Script::default() });
    let ran = run(&router, &["workers", "--watch"]);
    // The scripted stream ends; a router's would not.
    assert_eq!(ran.code, Some(5));
    let tables: Vec<&str> = ran.out.split("\n\n").collect();
    assert_eq!(
        (tables.len(), tables[0].lines().count(), tables[1].lines().count()),
        (4, 3, 2),
        "{}",
        ran.out
    );
    assert!(tables[1].contains("\nw1 ") && tables[2] == tables[1], "{}", ran.out);
    assert_eq!(tables[3], "no workers\n");
    assert_eq!(ran.err.matches("the registry is out of reach").count(), 2, "{}", ran.err);

    router.script.lock().unwrap().changes = changes();
    let lines = json_lines(&run(&router, &["workers", "--watch", "--json"]).out);
    assert_eq!(lines[0]["snapshot"]["workers"][0]["id"], json!("w2"));
    assert_eq!(lines[1..3], [json!({ "removed": "w2" }), json!({ "registry_stale": true })]);
}

#[test]
fn models() {
    let model = Model {
        name: "demo".into(),
        aliases: vec!["d".into(), "little".into()],
        revision: "0123456789abcdef".repeat(4),
        context_tokens: 2_048,
        vocabulary_tokens: 1_024,
        has_chat_template: true,
        workers_serving: 2,
        block_size_tokens: 32,
        ..Model::default()
    };
    let models = ListModelsResponse { models: vec![model] };
    let router = Router::start(Script { models, ..Script::default() });
    let ran = run(&router, &["models"]);
    let head = "MODEL  ALIASES   REVISION      WORKERS  CONTEXT  VOCABULARY  BLOCK  CHAT\n";
    let row = "demo   d,little  0123456789ab        2     2048        1024     32  yes\n";
    assert_eq!((ran.code, ran.out, ran.err), (Some(0), [head, row].concat(), String::new()));
    let list = &json_lines(&run(&router, &["models", "--json"]).out)[0];
    assert_eq!(list["models"][0]["has_chat_template"], json!(true));

    router.script.lock().unwrap().models = ListModelsResponse::default();
    assert_eq!(run(&router, &["models"]).out, "no models\n");
}

#[test]
fn routes_are_explained() {
    let candidate = RouteCandidate {
        worker: "w1".into(),
        state: CandidateState::Eligible.into(),
        cost_s: 0.0125,
        wait_s: 0.01,
        prefill_s: 0.002,
        decode_s: 0.0005,
        matched_tokens: 64,
        uncached_tokens: 6,
        prefill_tokens_per_s: 3_000.0,
        step_s: 0.004,
        load_age_ms: 20.0,
        ..RouteCandidate::default()
    };
    let lost = RouteCandidate {
        worker: "w2\x1b[2J".into(),
        state: CandidateState::NotConnected.into(),
        ..RouteCandidate::default()
    };
    let decision = RouteDecision {
        model: "demo".into(),
        revision: "ab".repeat(32),
        prompt_tokens: 70,
        block_size_tokens: 32,
        prompt_blocks: 2,
        decode_tokens: 256,
        mean_wait_s: 0.01,
        wait_weight_per_s: 4.0,
        tie_share: 0.05,
        worker: "w1".into(),
        reason: RouteReason::Cache.into(),
        candidates: vec![candidate, lost],
    };
    let route = ExplainRouteResponse { decision: Some(decision) };
    let router = Router::start(Script { route, ..Script::default() });
    let ran = run(&router, &["routes", "explain", "I have a dream", "--max-tokens", "300"]);
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!((ran.code, lines.len(), lines[0]), (Some(0), 6, "to w1: cache"), "{}", ran.out);
    assert!(
        lines[1].contains("70 prompt tokens, 2 full blocks of 32; 256 output tokens count"),
        "{}",
        ran.out
    );
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let w1 = "w1 eligible 12.5 10.0 2.0 0.5 64 0 6 0 0 3000 4.0 20";
    assert_eq!(words(lines[4]), words(w1));
    let w2 = "w2\\u{1b}[2J not_connected - - - - 0 0 0 0 0 0 0.0 0";
    assert_eq!(words(lines[5]), words(w2));
    assert_eq!(words(lines[3]).len(), words(w1).len());

    let ran = run(&router, &["routes", "explain", "--chat", "Hello", "--json"]);
    assert_eq!(json_lines(&ran.out)[0]["decision"]["candidates"][0]["cost_s"], json!(0.0125));
    let explains = &router.script.lock().unwrap().explains;
    let Some(Request::Generation(spec)) = &explains[0].request else { panic!("{explains:?}") };
    assert_eq!(spec.params.as_ref().unwrap().max_tokens, Some(300));
    let Some(Request::Chat(spec)) = &explains[1].request else { panic!("{explains:?}") };
    assert_eq!((&spec.messages[0].role[..], spec.messages[0].content()), ("user", "Hello"));
}
