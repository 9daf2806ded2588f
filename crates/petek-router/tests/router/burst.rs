//! Many requests at once, and what is counted of them.

use std::collections::HashSet;

use petek_proto::admin::v1::ListWorkersRequest;
use petek_proto::inference::v1::{SamplingParams, StreamGenerateRequest};
use petek_proto::worker::v1 as worker;

use crate::support::{Cluster, EOS, Heard, Script, TOKENS, Worker, X, settings, soon, spec, stream, until};
use crate::{params, plays};

#[tokio::test(flavor = "multi_thread")]
async fn channels_of_capacity_one_are_enough() {
    let mut tight = settings();
    tight.link.submit_queue = 1;
    let workers: Vec<Worker> =
        (0..2).map(|i| Worker::start(&format!("w{i}"), plays(&[1, 2, 3, EOS]))).collect();
    let cluster = Cluster::start(tight, &workers).await;
    let client = cluster.client().await;
    let calls = (0..100).map(|_| {
        let mut client = client.clone();
        tokio::spawn(async move { stream(&mut client, spec(&[8, 9], params())).await })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap().text(), "abcdabc");
    }
}

/// [vrouter#215, smg#1714]
#[tokio::test(flavor = "multi_thread")]
async fn in_flight_work_counts_at_once_and_never_leaks() {
    let mut workers: Vec<Worker> = (0..4).map(|i| Worker::start(&format!("w{i}"), Script::Silent)).collect();
    let cluster = Cluster::start(settings(), &workers).await;
    let mut admin = cluster.admin().await;
    let mut own = async || {
        let workers = admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
        workers.iter().map(|worker| worker.view.as_ref().unwrap().own_requests).sum::<u32>()
    };
    let prompt =
        |i: u32| (0..512).map(|at| 1 + (i * 31 + at * at) % (TOKENS.len() as u32 - 1)).collect::<Vec<_>>();
    // A connection has room for 256 streams.
    let clients = [cluster.client().await, cluster.client().await];
    let open = async |i: u32| {
        let asked = StreamGenerateRequest { spec: Some(spec(&prompt(i), params())) };
        clients[i as usize % 2].clone().stream_generate(asked).await.unwrap()
    };
    let dropped: Vec<_> = futures::future::join_all((0..400).map(open)).await;
    // Each call has been answered; its driver may still be on its way.
    until(async || own().await == 400).await;
    drop(dropped);
    until(async || own().await == 0).await;
    for worker in &mut workers {
        while worker.heard.try_recv().is_ok() {}
    }

    let held: Vec<_> = futures::future::join_all((400..500).map(open)).await;
    let mut shares = Vec::new();
    let mut seen = HashSet::new();
    for worker in &mut workers {
        let mut share = 0;
        // What was dropped before it was sent may be among what is read; each of the 100 has another prompt.
        while share < 15 {
            let (submit, _) = worker.submit().await;
            share += usize::from(
                (400..500).any(|i| prompt(i) == submit.prompt_ids) && seen.insert(submit.request_id),
            );
        }
        shares.push(share);
    }
    while seen.len() < 100 {
        for (worker, share) in workers.iter_mut().zip(&mut shares) {
            while let Ok(heard) = worker.heard.try_recv() {
                let Heard::Submit(submit, _) = heard else { continue };
                *share += usize::from(
                    (400..500).any(|i| prompt(i) == submit.prompt_ids) && seen.insert(submit.request_id),
                );
            }
        }
        tokio::task::yield_now().await;
    }
    assert!(shares.iter().all(|share| (15..=35).contains(share)), "{shares:?}");
    drop(held);
    until(async || own().await == 0).await;
}

/// [sglang#39706, vllm#55634]
#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_each_request_once() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    for tokens in [Some(7), Some(7), None, Some(3)] {
        let asked = spec(&[8, 9], SamplingParams { max_tokens: Some(7), ..params() });
        let mut events =
            client.stream_generate(StreamGenerateRequest { spec: Some(asked) }).await.unwrap().into_inner();
        let (submit, reply) = workers[0].submit().await;
        let count = tokens.unwrap_or(0);
        if tokens.is_some() {
            reply.admit(submit.dispatch);
            soon(events.message()).await.unwrap().unwrap();
        }
        for at in 0..count {
            reply.tokens(submit.dispatch, 0, at, &[X]);
            soon(events.message()).await.unwrap().unwrap();
        }
        if count == 7 {
            reply.finish(submit.dispatch, 0, worker::FinishReason::Length);
            while soon(events.message()).await.unwrap().is_some() {}
        }
        drop(events);
        if count < 7 {
            workers[0].cancel().await;
        }
    }
    assert_eq!(stream(&mut client, spec(&[], params())).await.reason(), "INVALID_FIELD");
    for line in [
        r#"petek_router_requests_total{model="chain",outcome="finished"} 2"#,
        r#"petek_router_requests_total{model="chain",outcome="cancelled"} 2"#,
        r#"petek_router_requests_total{model="chain",outcome="refused"} 1"#,
        r#"petek_router_requests_total{model="chain",outcome="failed"} 0"#,
        r#"petek_router_time_to_first_token_seconds_count{model="chain"} 3"#,
        r#"petek_router_inter_token_seconds_count{model="chain"} 14"#,
        r#"petek_router_output_tokens_total{model="chain"} 17"#,
        r#"petek_router_prompt_tokens_total{model="chain"} 6"#,
        r#"petek_router_request_seconds_count{model="chain"} 5"#,
        "petek_router_streams_open 0",
        "petek_router_workers 1",
    ] {
        assert!(cluster.has_metric(line), "{line} is not in\n{}", cluster.registry.text());
    }
}
