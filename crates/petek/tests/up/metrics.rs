//! What operators read: the metrics of a cluster, and what must stand in no log.

use petek_proto::inference::v1::{RequestOptions, SamplingParams};
use petek_tests::chain::Chain;
use tempfile::TempDir;

use super::api::{Answer, Client, greedy, spec, text_spec, until, with};
use super::process::Up;

/// Emits "x" for ever, and "y" seven times after `SEVEN`.
fn model() -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let strings = ["forever", "x", "seven", "y1", "y2", "y3", "y4", "y5", "y6"];
    let chain = Chain::bytes(&strings).then(&[FOREVER, 2, 2]).then(&[SEVEN, 4, 5, 6, 7, 8, 9, Chain::END]);
    chain.write(dir.path()).expect("write the model");
    dir
}

const FOREVER: u32 = 1;
const SEVEN: u32 = 3;

/// [sglang#39706, vllm#55634] Two finish with 7 tokens, one is cancelled before any, one after some, one is refused.
#[tokio::test]
async fn each_request_counts_once_and_cancelled_ones_with_what_they_cost() {
    let dir = model();
    let model = dir.path().to_str().expect("a plain path");
    let up =
        Up::start(&["--model", model, "--name", "m", "--workers", "1", "--threads", "1", "--slots", "1"]);
    let client = Client::of(&up).await;
    let waiting = || up.metric("petek_worker_sequences", &[r#"state="waiting""#]);
    let running = || up.metric("petek_worker_sequences", &[r#"state="running""#]);

    // It has the one slot, so that the next one waits.
    let endless = spec(&[FOREVER], SamplingParams { ignore_eos: true, ..greedy(4_000) });
    let mut cut = Answer::default();
    let mut events = client.open(endless.clone()).await.expect("it streams");
    cut.tokens(&mut events, 3).await;
    let unheard = client.open(endless).await.expect("it waits");
    until(|| waiting() == 1.0).await;
    drop(unheard);
    until(|| waiting() == 0.0).await;
    drop(events);
    until(|| running() == 0.0).await;
    for _ in 0..2 {
        assert_eq!(client.stream(spec(&[SEVEN], greedy(9))).await.usage(), (1, 0, 7));
    }
    let refused = client.stream(spec(&[SEVEN], SamplingParams { top_p: Some(0.0), ..greedy(9) })).await;
    assert_eq!(refused.refusal().reason, "INVALID_FIELD");

    // A stream's end reaches its client a little before its count.
    until(|| up.metric("petek_router_request_seconds_count", &[]) == 5.0).await;
    until(|| up.metric("petek_worker_requests_total", &[]) == 4.0).await;
    for (outcome, router, worker) in
        [("finished", 2.0, 2.0), ("cancelled", 2.0, 2.0), ("refused", 1.0, 0.0), ("failed", 0.0, 0.0)]
    {
        let label = format!("outcome=\"{outcome}\"");
        assert_eq!(up.metric("petek_router_requests_total", &[&label, r#"model="m""#]), router, "{outcome}");
        assert_eq!(up.metric("petek_worker_requests_total", &[&label]), worker, "{outcome}");
    }
    assert_eq!(up.metric("petek_router_time_to_first_token_seconds_count", &[]), 3.0);
    // How many tokens the cancelled one had is its own affair; each but the first of each request has a gap.
    let output = up.metric("petek_router_output_tokens_total", &[]);
    assert_eq!(up.metric("petek_router_inter_token_seconds_count", &[]), output - 3.0);
    let cancelled = output - 14.0;
    assert!(cancelled >= cut.sequences[0].ids.len() as f64, "{cancelled}");
    // A worker counts what it drew, and the router what came of it before the client went.
    assert!(up.metric("petek_worker_output_tokens_total", &[]) >= output);
    // Of the one that only waited nothing was computed.
    for prompts in ["petek_router_prompt_tokens_total", "petek_worker_prompt_tokens_total"] {
        assert_eq!(up.metric(prompts, &[]), 3.0, "{prompts}");
    }
    until(|| up.metric("petek_router_streams_open", &[]) == 0.0).await;
    for state in ["waiting", "running"] {
        assert_eq!(up.metric("petek_worker_sequences", &[&format!("state=\"{state}\"")]), 0.0, "{state}");
    }
    assert_eq!(up.metric("petek_worker_blocks", &[r#"state="held""#]), 0.0);
    let decisions = up.metric("petek_router_decisions_total", &[]);
    assert_eq!((decisions, up.metric("petek_router_decisions_total", &[r#"reason="only""#])), (4.0, 4.0));
}

/// Not even where everything is logged: neither text nor ids of a prompt or an answer, nor what a client calls a model.
#[tokio::test]
async fn what_clients_say_stands_in_no_log_and_no_metric() {
    const SECRET: &str = "mellifluous";
    let up = Up::start(&["--log-filter", "trace,h2=info"]);
    let client = Client::of(&up).await;
    let options = RequestOptions { cache_salt: format!("{SECRET}-salt"), ..RequestOptions::default() };
    let asked = SamplingParams { stop: vec![format!("{SECRET}-stop")], ..greedy(8) };
    client.both(with(options, text_spec(&format!("The {SECRET} bee"), asked))).await.finished();
    let mut unknown = text_spec("x", greedy(1));
    unknown.model = format!("{SECRET}\n\u{1b}[31mmodel");
    assert_eq!(client.stream(unknown).await.refusal().reason, "UNKNOWN_MODEL");
    let said = up.said();
    assert!(
        said.lines().count() > 20 && said.contains("placed"),
        "nothing is logged, so nothing is shown: {said}"
    );
    let line = said.lines().find(|line| line.contains(SECRET));
    assert_eq!(line, None, "a log line holds what a client said");
    assert!(!up.metrics().contains(SECRET));
}
