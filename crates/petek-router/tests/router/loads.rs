//! What workers say of their load decides, each request counted once, and silence is judged with care.

use petek_proto::admin::v1::{CandidateState, Link, RouteCandidate};
use petek_proto::worker::v1::RouterProgress;

use crate::params;
use crate::support::{Cluster, Script, Worker, settings, spec, stream, until};

const PROMPT: [u32; 40] = [8; 40];

async fn candidates(cluster: &Cluster) -> Vec<RouteCandidate> {
    let mut candidates = cluster.explain(spec(&PROMPT, params())).await.candidates;
    candidates.sort_by(|a, b| a.worker.cmp(&b.worker));
    candidates
}

/// Sends a request and leaves it to its worker.
async fn send(cluster: &Cluster) -> tokio::task::JoinHandle<()> {
    let mut client = cluster.client().await;
    tokio::spawn(async move {
        let _ = stream(&mut client, spec(&PROMPT, params())).await;
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_includes_a_dispatch_is_not_counted_twice() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let router = workers[0].hello().await;
    let _running = send(&cluster).await;
    let (submit, _reply) = workers[0].submit().await;
    let counted = async || {
        let candidate = candidates(&cluster).await.remove(0);
        (candidate.waiting_tokens, candidate.own_waiting_tokens, candidate.running)
    };
    // At once by the router's own count, before any report.
    assert_eq!(counted().await, (40, 40, 1));
    let progress =
        |dispatch| vec![RouterProgress { router_id: router.router_id, stream: router.stream, dispatch }];
    // Of another router's work, and none of ours yet: both count.
    workers[0].reports(|report| {
        (report.waiting_tokens, report.running, report.routers) = (100, 2, progress(submit.dispatch - 1));
    });
    until(async || counted().await.0 > 40).await;
    assert_eq!(counted().await, (140, 40, 3));
    // Ours is in it now.
    workers[0].reports(|report| {
        (report.waiting_tokens, report.running, report.routers) = (140, 3, progress(submit.dispatch));
    });
    until(async || counted().await.1 == 0).await;
    assert_eq!(counted().await, (140, 0, 3));
    let view = cluster.view("w0").await;
    assert_eq!((view.own_requests, view.load.unwrap().waiting_tokens), (1, 140));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_worker_gets_no_new_work_and_comes_back() {
    let mut workers = ["w0", "w1", "w2"].map(|id| Worker::start(id, Script::Silent));
    let cluster = Cluster::start(settings(), &workers).await;
    // The others are busy: as long as it speaks, all goes to the first one.
    for busy in &workers[1..] {
        busy.reports(|report| report.waiting_tokens = 100_000);
    }
    until(async || candidates(&cluster).await[1..].iter().all(|busy| busy.waiting_tokens == 100_000)).await;
    let best = async || cluster.explain(spec(&PROMPT, params())).await.worker;
    assert_eq!(best().await, "w0");

    workers[0].load.send_replace(None);
    cluster.watched(|views| views.get("w0").is_some_and(|view| view.link() == Link::Suspect)).await;
    assert_eq!(cluster.view("w0").await.link_error, "its load reports have stopped");
    until(async || cluster.metric(r#"petek_router_suspicions_total{suspect="worker"}"#) == 1).await;
    let suspect = &candidates(&cluster).await[0];
    assert_eq!((suspect.state(), suspect.cost_s), (CandidateState::Suspect, 0.0));
    let [w0, w1, w2] = &mut workers;
    let sent = send(&cluster).await;
    tokio::select! {
        _ = w0.submit() => panic!("a suspect got work"),
        _ = w1.submit() => {}
        _ = w2.submit() => {}
    }
    sent.abort();

    w0.reports(|_| {});
    cluster.watched(|views| views.get("w0").is_some_and(|view| view.link() == Link::Connected)).await;
    until(async || best().await == "w0").await;
    let _sent = send(&cluster).await;
    w0.submit().await;
}

/// More than half at once is the router's own fault, not theirs.
#[tokio::test(flavor = "multi_thread")]
async fn when_most_fall_silent_nobody_is_dropped() {
    let workers = ["w0", "w1", "w2"].map(|id| Worker::start(id, Script::Silent));
    let silence_ms = settings().link.load_silence_ms_max as f64;
    let cluster = Cluster::start(settings(), &workers).await;
    workers[..2].iter().for_each(|worker| drop(worker.load.send_replace(None)));
    // Their last reports came up to 100 ms apart, and in between only one of them is silent for too long.
    let silent_for = async |ms: f64| {
        let silent = candidates(&cluster).await;
        let both = silent[..2].iter().all(|candidate| candidate.load_age_ms > ms);
        (both, silent.iter().map(|candidate| candidate.state()).collect::<Vec<_>>())
    };
    until(async || silent_for(silence_ms).await.0).await;
    until(async || {
        let (both, states) = silent_for(1.5 * silence_ms).await;
        assert_eq!(states, [CandidateState::Eligible; 3]);
        both
    })
    .await;
    until(async || cluster.metric(r#"petek_router_suspicions_total{suspect="router"}"#) >= 1).await;
    cluster
        .watched(|views| views.len() == 3 && views.values().all(|view| view.link() == Link::Connected))
        .await;
}
