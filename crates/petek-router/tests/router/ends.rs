//! How requests end that nobody finishes: clients that leave or do not read, workers that die, time that is over.

use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{
    GenerateRequest, GenerationSpec, RequestOptions, SamplingParams, StreamGenerateRequest,
};
use petek_proto::worker::v1 as worker;
use petek_router::RouterSettings;
use petek_service::Shutdown;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

use crate::params;
use crate::support::{
    AfterLast, Cluster, EOS, Read, Script, Worker, X, refusal, settings, soon, spec, stream,
};

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_is_cancelled() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let asked = || spec(&[8], SamplingParams { n: Some(2), ..params() });
    let mut events =
        client.stream_generate(StreamGenerateRequest { spec: Some(asked()) }).await.unwrap().into_inner();
    let (submit, reply) = workers[0].submit().await;
    reply.admit(submit.dispatch);
    soon(events.message()).await.unwrap().unwrap();
    drop(events);
    assert_eq!(workers[0].cancel().await.indexes, [0, 1]);

    // A unary one, too. A worker that only listens never answers it.
    let mut silent = [Worker::start("w1", Script::Silent)];
    let cluster = Cluster::start(settings(), &silent).await;
    let mut client = cluster.client().await;
    let call = tokio::spawn(async move { client.generate(GenerateRequest { spec: Some(asked()) }).await });
    let (submit, _) = silent[0].submit().await;
    call.abort();
    let cancel = silent[0].cancel().await;
    assert_eq!((cancel.dispatch, &cancel.indexes[..]), (submit.dispatch, &[0, 1][..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_ends_its_streams_at_once_and_no_others() {
    let mut workers = [Worker::start("w0", Script::Silent), Worker::start("w1", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let open = async |client: &mut InferenceServiceClient<Channel>| {
        client
            .stream_generate(StreamGenerateRequest { spec: Some(spec(&[8], params())) })
            .await
            .unwrap()
            .into_inner()
    };
    // One on each: the second request sees the first one's load.
    let mut streams = [open(&mut client).await, open(&mut client).await];
    let mut replies = Vec::new();
    for worker in &mut workers {
        let (submit, reply) = worker.submit().await;
        reply.admit(submit.dispatch);
        reply.tokens(submit.dispatch, 0, 0, &[1, 5]);
        replies.push((submit.dispatch, reply));
    }
    let mut reads = [Read::default(), Read::default()];
    for (events, read) in streams.iter_mut().zip(&mut reads) {
        while read.sequences.is_empty() {
            read.take(events.message().await.unwrap().unwrap().event.unwrap());
        }
    }
    let on = |read: &Read| read.started.as_ref().unwrap().worker.clone();
    let lost = usize::from(on(&reads[0]) != "w0");
    workers[0].kill();
    let status = soon(streams[lost].message()).await.unwrap_err();
    let why = refusal(&status);
    assert_eq!((status.code(), &*why.reason, why.retry_ms), (Code::Unavailable, "WORKER_LOST", Some(0)));
    // "€" is only begun, so its token is not the client's.
    assert_eq!(
        (reads[lost].text(), why.number("output_tokens")),
        ("ab", Some(reads[lost].ids().len() as u64))
    );
    assert!(status.metadata().contains_key("x-request-id"));

    let (dispatch, reply) = &replies[1];
    reply.tokens(*dispatch, 0, 2, &[6, EOS]);
    reply.finish(*dispatch, 0, worker::FinishReason::StopEos);
    let other = 1 - lost;
    while reads[other].finished.is_none() {
        reads[other].take(streams[other].message().await.unwrap().unwrap().event.unwrap());
    }
    assert_eq!(reads[other].text(), "ab€");
    // New requests go to the one that lives.
    for _ in 0..3 {
        let waiting = open(&mut client).await;
        let (submit, _) = workers[1].submit().await;
        assert_eq!(submit.prompt_ids, [8]);
        drop(waiting);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_harms_nobody_else() {
    let lists = Script::Play(vec![vec![X]], AfterLast::GoesOn);
    let mut workers = [Worker::start("w0", lists)];
    // With one place for a request: the neighbour gets it as soon as the slow one is given up.
    let settings = RouterSettings { slow_consumer_bytes: 16 << 10, requests_max: 1, ..settings() };
    let cluster = Cluster::start(settings, &workers).await;
    let address = format!("http://{}", cluster.router.public_address());
    let narrow = Endpoint::from_shared(address).unwrap();
    let narrow = narrow.initial_stream_window_size(4 << 10).initial_connection_window_size(4 << 10);
    let mut slow = InferenceServiceClient::new(narrow.connect().await.unwrap());
    let asked = spec(&[8], SamplingParams { logprobs: Some(15), ..params() });
    let mut unread =
        slow.stream_generate(StreamGenerateRequest { spec: Some(asked.clone()) }).await.unwrap().into_inner();
    assert_eq!(workers[0].cancel().await.indexes, [0], "it was given up");

    let limited = SamplingParams { max_tokens: Some(50), ..params() };
    let read = stream(&mut cluster.client().await, spec(&[8], limited)).await;
    assert_eq!(read.ids().len(), 50);
    // When it reads at last it is told why.
    let status = loop {
        match soon(unread.message()).await {
            Ok(event) => assert!(event.is_some(), "a stream is never cut without a word"),
            Err(status) => break status,
        }
    };
    let why = refusal(&status);
    assert_eq!((status.code(), &*why.reason), (Code::ResourceExhausted, "SLOW_CONSUMER"));
    assert!(why.number("waiting_bytes").is_some_and(|bytes| bytes > 16 << 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_what_runs() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    // On a busy machine a deadline may pass before the request was sent: then nobody hears of it, and it is asked
    // again with a later one.
    let mut deadline_ms = 60;
    loop {
        let options = Some(RequestOptions { deadline_ms: Some(deadline_ms), ..RequestOptions::default() });
        let call = stream(&mut client, GenerationSpec { options, ..spec(&[8], params()) });
        let mut call = std::pin::pin!(call);
        let mut read = None;
        let was_sent = tokio::select! {
            biased;
            _ = workers[0].submit() => true,
            early = &mut call => { read = Some(early); false }
        };
        let read = match read {
            Some(read) => read,
            None => call.await,
        };
        assert_eq!(read.error.unwrap().code, Code::DeadlineExceeded);
        if was_sent {
            break assert_eq!(workers[0].cancel().await.indexes, [0]);
        }
        deadline_ms *= 2;
    }
    let mut request = Request::new(GenerateRequest { spec: Some(spec(&[8], params())) });
    request.metadata_mut().insert("grpc-timeout", "60m".parse().unwrap());
    // tonic's channel has a timer of its own, which could be the first to speak; hyper's client has none.
    let mut http = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new());
    let http = http.http2_only(true).build_http::<tonic::body::Body>();
    let origin = format!("http://{}", cluster.router.public_address()).parse().unwrap();
    let mut patient = InferenceServiceClient::with_origin(http, origin);
    let status = soon(patient.generate(request)).await.unwrap_err();
    assert_eq!(refusal(&status).reason, "DEADLINE_EXCEEDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_refuses_new_work_and_finishes_the_old() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let Cluster { router, registry: _, shutdown, list } = Cluster::start(settings(), &workers).await;
    let shutdown: Shutdown = shutdown;
    let endpoint = Endpoint::from_shared(format!("http://{}", router.public_address())).unwrap();
    let mut client = InferenceServiceClient::new(endpoint.connect().await.unwrap());
    let asked = StreamGenerateRequest { spec: Some(spec(&[8], params())) };
    let mut events = client.stream_generate(asked.clone()).await.unwrap().into_inner();
    let (submit, reply) = workers[0].submit().await;
    reply.admit(submit.dispatch);
    soon(events.message()).await.unwrap().unwrap();
    shutdown.drain();
    let why = refusal(&client.stream_generate(asked).await.unwrap_err());
    assert_eq!((why.code, &*why.reason), (Code::Unavailable, "DRAINING"));
    assert!(why.retry_ms.is_some());
    reply.tokens(submit.dispatch, 0, 0, &[1, EOS]);
    reply.finish(submit.dispatch, 0, worker::FinishReason::StopEos);
    let mut read = Read { started: Some(Default::default()), ..Read::default() };
    while let Some(response) = soon(events.message()).await.unwrap() {
        read.take(response.event.unwrap());
    }
    assert_eq!((read.text(), read.finished.is_some()), ("ab", true));
    soon(router.stopped()).await;
    drop(list);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_breaks_the_protocol_ends_its_request_alone() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let client = cluster.client().await;
    let call = || {
        let mut client = client.clone();
        tokio::spawn(async move {
            stream(&mut client, spec(&[8], SamplingParams { max_tokens: Some(2), ..params() })).await
        })
    };
    let (bad, good) = (call(), call());
    let (first, reply) = workers[0].submit().await;
    let (second, _) = workers[0].submit().await;
    reply.admit(first.dispatch);
    reply.admit(second.dispatch);
    reply.tokens(first.dispatch, 0, 1, &[X]);
    assert_eq!(workers[0].cancel().await.dispatch, first.dispatch);
    reply.tokens(second.dispatch, 0, 0, &[X, X]);
    reply.finish(second.dispatch, 0, worker::FinishReason::Length);
    let reads = [bad.await.unwrap(), good.await.unwrap()];
    let failed = reads.iter().filter_map(|read| read.error.as_ref()).collect::<Vec<_>>();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].reason, "PROTOCOL");
}
