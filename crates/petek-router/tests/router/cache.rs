//! Prompts go where they are held, whatever happens to the events that say so.

use petek_core::hash::BlockName;
use petek_proto::admin::v1::{CandidateState, IndexState, RouteCandidate, RouteDecision};
use petek_proto::inference::v1::{GenerationSpec, RequestOptions, RouteReason};
use petek_proto::worker::v1::KvResume;

use crate::support::{BLOCK, Cluster, EOS, Script, TOKENS, Worker, names, settings, spec, stream, until};
use crate::{params, plays};

const PROMPT_BLOCKS: u32 = 5;

/// Five full blocks and a token, all unlike.
fn prompt() -> Vec<u32> {
    (0..=PROMPT_BLOCKS * BLOCK).map(|at| 1 + (at * at + at / BLOCK) % (TOKENS.len() as u32 - 1)).collect()
}

fn salted(salt: &str, bypass_prefix_cache: bool) -> GenerationSpec {
    let options =
        RequestOptions { cache_salt: salt.into(), bypass_prefix_cache, ..RequestOptions::default() };
    GenerationSpec { options: Some(options), ..spec(&prompt(), params()) }
}

fn of<'a>(decision: &'a RouteDecision, worker: &str) -> &'a RouteCandidate {
    decision.candidates.iter().find(|candidate| candidate.worker == worker).expect("it is a candidate")
}

/// Blocks of the prompt that each worker holds, by what its events said: predictions are left out.
async fn matched(cluster: &Cluster, workers: &[&str]) -> Vec<u32> {
    let decision = cluster.explain(spec(&prompt(), params())).await;
    let held = |of: &RouteCandidate| (of.matched_tokens - of.predicted_tokens) / BLOCK;
    workers.iter().map(|worker| held(of(&decision, worker))).collect()
}

/// Waits until the router believes that a worker holds so many blocks.
async fn believed(cluster: &Cluster, worker: &str, blocks: u64) {
    until(async || {
        let view = cluster.view(worker).await;
        view.index() == IndexState::Synced && view.index_blocks == blocks
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_goes_to_the_worker_that_holds_it() {
    let workers = ["w0", "w1", "w2"].map(|id| Worker::start(id, plays(&[EOS])));
    let cluster = Cluster::start(settings(), &workers).await;
    let names = names(&prompt(), b"");
    assert_eq!(names.len() as u32, PROMPT_BLOCKS);
    workers[1].cache.store(&names[..4]);
    workers[2].cache.store(&names[..1]);
    believed(&cluster, "w1", 4).await;
    believed(&cluster, "w2", 1).await;

    let decision = cluster.explain(spec(&prompt(), params())).await;
    assert_eq!((&*decision.worker, decision.reason()), ("w1", RouteReason::Cache));
    assert_eq!((decision.prompt_blocks, decision.block_size_tokens), (PROMPT_BLOCKS, BLOCK));
    for (worker, blocks) in [("w0", 0), ("w1", 4), ("w2", 1)] {
        let candidate = of(&decision, worker);
        let uncached = decision.prompt_tokens - blocks * BLOCK;
        assert_eq!((candidate.matched_tokens, candidate.uncached_tokens), (blocks * BLOCK, uncached));
        assert_eq!((candidate.predicted_tokens, candidate.state()), (0, CandidateState::Eligible));
    }
    let view = cluster.view("w1").await;
    assert_eq!((view.index_seq, view.index_blocks, view.index_resyncs), (1, 4, 0));

    let read = stream(&mut cluster.client().await, spec(&prompt(), params())).await;
    let started = read.started.as_ref().unwrap();
    assert_eq!((&*started.worker, started.route_reason()), ("w1", RouteReason::Cache));
    assert_eq!((started.cached_tokens, read.finished().usage.unwrap().cached_tokens), (4 * BLOCK, 4 * BLOCK));
    assert_eq!(cluster.metric(r#"petek_router_predictions_total{model="chain",prediction="exact"}"#), 1);

    // What is given up is not matched any more, and the rest of its chain neither.
    workers[1].cache.remove(&names[1..2]);
    believed(&cluster, "w1", 3).await;
    assert_eq!(matched(&cluster, &["w0", "w1", "w2"]).await, [0, 1, 1]);
    workers[1].cache.store_after(names[0], &names[1..2]);
    believed(&cluster, "w1", 4).await;
    assert_eq!(matched(&cluster, &["w1"]).await, [4]);
}

/// What was just sent somewhere is expected to be held there, before any event says so, and only for as long as the
/// request may still bring it about.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_under_way_is_predicted() {
    let mut workers = ["w0", "w1"].map(|id| Worker::start(id, Script::Silent));
    // Time alone ends no prediction here.
    let mut patient = settings();
    patient.link.prediction_grace_ms = 3_600_000;
    let cluster = Cluster::start(patient, &workers).await;
    let mut client = cluster.client().await;
    let first = tokio::spawn(async move { stream(&mut client, spec(&prompt(), params())).await });
    let [w0, w1] = &mut workers;
    let (there, elsewhere) = tokio::select! {
        _ = w0.submit() => ("w0", "w1"),
        _ = w1.submit() => ("w1", "w0"),
    };
    let decision = cluster.explain(spec(&prompt(), params())).await;
    let all = PROMPT_BLOCKS * BLOCK;
    assert_eq!((of(&decision, there).matched_tokens, of(&decision, there).predicted_tokens), (all, all));
    assert_eq!(of(&decision, elsewhere).matched_tokens, 0);
    // It is taken back with the request.
    first.abort();
    until(async || {
        let decision = cluster.explain(spec(&prompt(), params())).await;
        decision.candidates.iter().all(|candidate| candidate.matched_tokens == 0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn salts_and_bypass_keep_apart() {
    let workers = ["w0", "w1"].map(|id| Worker::start(id, plays(&[EOS])));
    let cluster = Cluster::start(settings(), &workers).await;
    workers[0].cache.store(&names(&prompt(), b"mine"));
    workers[1].cache.store(&names(&prompt(), b""));
    believed(&cluster, "w0", PROMPT_BLOCKS.into()).await;
    believed(&cluster, "w1", PROMPT_BLOCKS.into()).await;
    let all = PROMPT_BLOCKS * BLOCK;
    for (asked, looked_up, held) in [
        (salted("mine", false), PROMPT_BLOCKS, [all, 0]),
        (salted("", false), PROMPT_BLOCKS, [0, all]),
        (salted("yours", false), PROMPT_BLOCKS, [0, 0]),
        (salted("mine", true), 0, [0, 0]),
        (salted("", true), 0, [0, 0]),
    ] {
        let decision = cluster.explain(asked.clone()).await;
        assert_eq!(decision.prompt_blocks, looked_up);
        assert_eq!(["w0", "w1"].map(|worker| of(&decision, worker).matched_tokens), held, "{asked:?}");
        let read = stream(&mut cluster.client().await, asked).await;
        let started = read.started.unwrap();
        assert!(held == [0, 0] || started.route_reason() == RouteReason::Cache, "{started:?}");
        assert_eq!(started.cached_tokens, held[usize::from(started.worker == "w1")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_batch_is_resynced_and_counted() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let (cache, names) = (&workers[0].cache, names(&prompt(), b""));
    cache.store(&names[1..]);
    believed(&cluster, "w0", 4).await;
    assert_eq!(matched(&cluster, &["w0"]).await, [0], "the first block of the prompt is not there");
    // Batch 2, in which it comes, is lost; with batch 3 that is noticed.
    cache.store_unsaid(names[0]);
    let other = BlockName([9; 16]);
    cache.store(&[other]);
    believed(&cluster, "w0", 6).await;
    assert_eq!(matched(&cluster, &["w0"]).await, [5]);
    let view = cluster.view("w0").await;
    assert_eq!((view.index_seq, view.index_resyncs), (3, 1));
    // First it asks to go on where it was, which this worker cannot do.
    let after = Some(KvResume { epoch: workers[0].entry.epoch.0, after_seq: 1 });
    assert_eq!(cache.resumes(), [None, after, None]);
    for (cause, count) in [("gap", 1), ("behind", 1), ("digest", 0), ("stray", 0)] {
        let name = format!(r#"petek_router_kv_relapses_total{{cause="{cause}"}}"#);
        assert_eq!(cluster.metric(&name), count, "{cause}");
    }
    assert_eq!(cluster.metric("petek_router_kv_snapshots_total"), 2);

    // Where the lost one is the last, a heartbeat tells.
    cache.store_unsaid(BlockName([8; 16]));
    cache.beat();
    believed(&cluster, "w0", 7).await;
    assert_eq!(cluster.metric(r#"petek_router_kv_relapses_total{cause="gap"}"#), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_that_differs_brings_a_snapshot() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let (cache, names) = (&workers[0].cache, names(&prompt(), b""));
    cache.store(&names[..2]);
    believed(&cluster, "w0", 2).await;
    // One that agrees changes nothing, one with as many blocks of other names does.
    cache.beat();
    let other = BlockName([9; 16]);
    cache.swap_unsaid(names[1], other);
    cache.beat();
    until(async || cluster.view("w0").await.index_resyncs == 1).await;
    believed(&cluster, "w0", 2).await;
    assert_eq!(matched(&cluster, &["w0"]).await, [1]);
    assert_eq!(cluster.metric(r#"petek_router_kv_relapses_total{cause="digest"}"#), 1);
    assert_eq!(cluster.metric("petek_router_kv_snapshots_total"), 2);
    assert_eq!(cache.resumes(), [None, None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_go_on_where_a_broken_stream_ended() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let (cache, names) = (&workers[0].cache, names(&prompt(), b""));
    cache.store(&names[..2]);
    believed(&cluster, "w0", 2).await;
    cache.hang_up();
    until(async || cache.resumes().len() == 2).await;
    let after = Some(KvResume { epoch: workers[0].entry.epoch.0, after_seq: 1 });
    assert_eq!(cache.resumes(), [None, after]);
    cache.store_after(names[1], &names[2..]);
    believed(&cluster, "w0", 5).await;
    assert_eq!((matched(&cluster, &["w0"]).await, cluster.view("w0").await.index_resyncs), (vec![5], 0));
}

/// [llmd#1738]
#[tokio::test(flavor = "multi_thread")]
async fn of_a_worker_that_left_nothing_is_believed() {
    let stays = Worker::start("w1", plays(&[EOS]));
    let left = Worker::start("w0", Script::Silent);
    let names = names(&prompt(), b"");
    let cluster = Cluster::start_unready(settings(), vec![stays.entry.clone()]).await;
    cluster.connected(1).await;
    stays.cache.store(&names[..1]);
    believed(&cluster, "w1", 1).await;
    let figures = || {
        ["blocks", "holder_blocks", "bytes"].map(|what| cluster.metric(&format!("petek_router_index_{what}")))
    };
    // It is told of ten times a second.
    until(async || figures()[1] == 1).await;
    let before = figures();

    cluster.list.send_modify(|list| list.workers.push(left.entry.clone()));
    cluster.connected(2).await;
    left.cache.store(&names);
    believed(&cluster, "w0", PROMPT_BLOCKS.into()).await;
    // Its record goes while 500 batches are still on their way, and it is back at once: another epoch, and empty.
    for batch in 0..500u128 {
        left.cache.store(&[BlockName((1_000 + batch).to_le_bytes())]);
    }
    let again = Worker::start_again("w0", plays(&[EOS]));
    cluster.list.send_modify(|list| list.workers = vec![stays.entry.clone(), again.entry.clone()]);
    cluster.watched(|views| views.contains_key("w0")).await;
    assert_eq!(matched(&cluster, &["w0", "w1"]).await, [0, 1]);
    cluster.connected(2).await;
    assert_eq!(cluster.view("w0").await.index_blocks, 0);
    assert_eq!(matched(&cluster, &["w0", "w1"]).await, [0, 1]);
    // The old one still speaks, to nobody.
    left.cache.store(&[BlockName([9; 16])]);
    until(async || figures()[..2] == before[..2]).await;
    assert!(figures()[2] <= before[2] + before[2] / 5, "{:?} B, and before {:?}", figures()[2], before[2]);

    again.cache.store(&names[..3]);
    believed(&cluster, "w0", 3).await;
    assert_eq!(matched(&cluster, &["w0", "w1"]).await, [3, 1]);
    let read = stream(&mut cluster.client().await, spec(&prompt(), params())).await;
    assert_eq!(read.started.unwrap().cached_tokens, 3 * BLOCK);
}
