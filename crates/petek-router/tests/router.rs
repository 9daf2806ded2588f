//! A router with scripted workers, through its public API over loopback.

mod support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use petek_core::seed::sequence_seed;
use petek_proto::admin::v1::{
    CandidateState, DrainWorkerRequest, ExplainRouteRequest, Link, ListWorkersRequest, RouterView,
    explain_route_request,
};
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::sequence_finish::Matched;
use petek_proto::inference::v1::{
    ChatMessage, ChatRequest, ChatSpec, DetokenizeRequest, FinishReason, GenerateRequest, GenerationSpec,
    GetModelRequest, ListModelsRequest, RequestOptions, RouteReason, SamplingParams, StreamGenerateRequest,
    TokenizeRequest, generation_spec, tokenize_request,
};
use petek_proto::worker::v1 as worker;
use petek_proto::worker::v1::WorkerState;
use petek_router::{LinkSettings, RouterSettings};
use petek_service::Shutdown;
use support::{
    AfterLast, Cluster, EOS, Heard, NAME, Read, Script, TOKENS, Worker, X, refusal, settings, soon, spec,
    stream, until,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

fn plays(list: &[u32]) -> Script {
    Script::Play(vec![list.into()], AfterLast::Waits)
}

fn endless() -> Script {
    Script::Play(vec![vec![X]], AfterLast::GoesOn)
}

fn params() -> SamplingParams {
    SamplingParams { seed: Some(5), ..SamplingParams::default() }
}

async fn unary(client: &mut InferenceServiceClient<Channel>, spec: GenerationSpec) -> Read {
    let mut read = Read::default();
    match soon(client.generate(GenerateRequest { spec: Some(spec) })).await {
        Err(status) => read.error = Some(refusal(&status)),
        Ok(response) => {
            assert!(response.metadata().contains_key("x-request-id"));
            let generation = response.into_inner().generation.unwrap();
            read.started = generation.started;
            let joined = |d: petek_proto::inference::v1::Delta| (d.text, d.token_ids, d.logprobs.len());
            read.sequences = generation.sequences.into_iter().map(joined).collect();
            read.finished = generation.finished;
        }
    }
    read
}

/// Asks both ways, expects the same, and returns it.
async fn both(client: &mut InferenceServiceClient<Channel>, spec: GenerationSpec) -> Read {
    let streamed = stream(client, spec.clone()).await;
    let joined = unary(client, spec).await;
    assert_eq!(streamed.sequences, joined.sequences);
    let reasons = |read: &Read| {
        read.finished
            .as_ref()
            .map(|f| f.sequences.iter().map(|s| (s.reason(), s.matched.clone())).collect::<Vec<_>>())
    };
    assert_eq!(reasons(&streamed), reasons(&joined));
    streamed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_all_the_way() {
    let mut workers = [Worker::start("w0", plays(&[1, 2, 10, EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let options = RequestOptions {
        client_request_id: "mine".into(),
        cache_salt: "s".into(),
        ..RequestOptions::default()
    };
    let asked = GenerationSpec {
        options: Some(options),
        ..spec(&[8, 9, 8], SamplingParams { logprobs: Some(2), ..params() })
    };
    let read = both(&mut client, asked).await;
    assert_eq!((read.text(), read.ids()), ("abcd求", &[1, 2, 10, EOS][..]));
    assert_eq!(read.sequences[0].2, 4, "a logprob for each id");

    let started = read.started.as_ref().unwrap();
    assert_eq!((&*started.model, &*started.worker, &*started.client_request_id), (NAME, "w0", "mine"));
    assert_eq!((started.seed, started.prompt_tokens, started.max_tokens), (5, 3, support::CONTEXT - 3));
    assert_eq!((started.route_reason(), started.revision.len()), (RouteReason::OnlyWorker, 64));
    let id = uuid(&started.request_id);
    assert_eq!(id.get_version_num(), 7);

    let finished = read.finished();
    assert_eq!(finished.sequences[0].reason(), FinishReason::StopEos);
    assert_eq!(finished.sequences[0].matched, Some(Matched::StopTokenId(EOS)));
    let usage = finished.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (3, 0, 4));
    assert!(finished.timings.unwrap().ttft_ms.is_some());

    let (submit, _) = workers[0].submit().await;
    assert_eq!((submit.dispatch, submit.attempt, submit.epoch), (1, 1, workers[0].entry.epoch.0));
    assert_eq!((&submit.prompt_ids[..], &submit.cache_salt[..]), (&[8, 9, 8][..], &b"s"[..]));
    assert_eq!(submit.request_id[..], id.as_bytes()[..]);
    assert!(submit.deadline_ms.is_some_and(|ms| (1..=600_000).contains(&ms)));
    let drawn = submit.params.unwrap();
    assert_eq!(
        (drawn.temperature, drawn.logprobs),
        (Some(0.5), Some(2)),
        "the model's own default is filled in"
    );
    assert_eq!(workers[0].submit().await.0.dispatch, 2);
}

fn uuid(text: &str) -> uuid::Uuid {
    text.parse().expect("a UUID")
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_end_a_stream_across_tokens() {
    // abc | de with stop "cd"; the worker goes on until it is cancelled.
    let mut workers = [Worker::start("w0", Script::Play(vec![vec![3, 4, X]], AfterLast::GoesOn))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    for (include_stop, text) in [(false, "ab"), (true, "abcd")] {
        let asked = SamplingParams { stop: vec!["cd".into()], include_stop, ..params() };
        let read = both(&mut client, spec(&[8], asked)).await;
        assert_eq!((read.text(), read.ids()), (text, &[3, 4][..]));
        let ended = &read.finished().sequences[0];
        assert_eq!(
            (ended.reason(), &ended.matched),
            (FinishReason::StopSequence, &Some(Matched::StopString("cd".into())))
        );
        assert_eq!(ended.usage.unwrap().completion_tokens, 2);
        for _ in 0..2 {
            assert_eq!(workers[0].cancel().await.indexes, [0]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn held_text_comes_once_and_whole() {
    // [vllm#44620, llama.cpp#10914, #9867]
    let check = async |list: &[u32], stop: &[&str], text: &str, reason| {
        let workers = [Worker::start("w0", plays(list))];
        let cluster = Cluster::start(settings(), &workers).await;
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        let asked = SamplingParams { stop, max_tokens: Some(list.len() as u32), ..params() };
        let read = both(&mut cluster.client().await, spec(&[8], asked)).await;
        assert_eq!((read.text(), read.finished().sequences[0].reason()), (text, reason));
    };
    check(&[10, 11, 10], &["ZZZ"], "求Z求", FinishReason::Length).await;
    check(&[12, 13, 14], &["\n", "Note:"], " Note!ok?", FinishReason::StopSequence).await;
    // An ending that can still become a character waits, and is U+FFFD when nothing comes.
    check(&[1, 5], &[], "ab\u{FFFD}", FinishReason::Length).await;
    check(&[5, 6, 5, X], &[], "€\u{FFFD}x", FinishReason::Length).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_sequences_share_a_prompt() {
    let lists = vec![vec![1, 2, EOS], vec![3, EOS], vec![4, X, X, X]];
    let mut workers = [Worker::start("w0", Script::Play(lists, AfterLast::Waits))];
    let cluster = Cluster::start(settings(), &workers).await;
    let asked = SamplingParams { n: Some(3), max_tokens: Some(4), ..params() };
    let read = both(&mut cluster.client().await, spec(&[8, 9], asked)).await;
    let texts: Vec<&str> = read.sequences.iter().map(|(text, ..)| &**text).collect();
    assert_eq!(texts, ["abcd", "abc", "dexxx"]);
    let finished = read.finished();
    let usage = finished.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (2, 3 + 2 + 4));
    for (index, ended) in finished.sequences.iter().enumerate() {
        assert_eq!((ended.index, ended.seed), (index as u32, sequence_seed(5, index as u32)));
    }
    let seeds: Vec<u64> =
        workers[0].submit().await.0.sequences.iter().map(|sequence| sequence.seed).collect();
    assert_eq!(seeds, finished.sequences.iter().map(|ended| ended.seed).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_seed_gets_one() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let mut seeds = HashSet::new();
    for _ in 0..4 {
        let read = stream(&mut client, spec(&[8], SamplingParams::default())).await;
        assert_eq!(read.started.as_ref().unwrap().seed, read.finished().sequences[0].seed);
        seeds.insert(read.started.unwrap().seed);
    }
    assert_eq!(seeds.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_goes_on_with_resumed_ids() {
    // [vllm#48853 c] The euro sign's first two bytes were held back; all else was sent.
    let mut workers = [Worker::start("w0", plays(&[1, 5, 6, X]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let whole = stream(&mut client, spec(&[8], SamplingParams { max_tokens: Some(4), ..params() })).await;
    assert_eq!((whole.text(), whole.ids()), ("ab€x", &[1, 5, 6, X][..]));
    for cut in 1..4 {
        let resumed_ids = whole.ids()[..cut].to_vec();
        let options = Some(RequestOptions { resumed_ids: resumed_ids.clone(), ..RequestOptions::default() });
        let asked = spec(&[8], SamplingParams { max_tokens: Some(4), ..params() });
        let rest = both(&mut client, GenerationSpec { options, ..asked }).await;
        let expected = ["€x", "€x", "x"][cut - 1];
        assert_eq!((rest.text(), rest.ids()), (expected, &whole.ids()[cut..]));
        assert_eq!(rest.finished().usage.unwrap().completion_tokens, 4);
        while workers[0].submit().await.0.sequences[0].resumed_ids != resumed_ids {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_is_cancelled() {
    let mut workers = [Worker::start("w0", endless())];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let asked = || spec(&[8], SamplingParams { n: Some(2), ..params() });
    let mut events =
        client.stream_generate(StreamGenerateRequest { spec: Some(asked()) }).await.unwrap().into_inner();
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
async fn what_is_wrong_is_named() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let p = SamplingParams::default;
    let mut refused = 0;
    let mut check = async |asked: GenerationSpec, code: Code, reason: &str, field: &str| {
        refused += 2;
        for read in [stream(&mut client, asked.clone()).await, unary(&mut client, asked.clone()).await] {
            let error = read.error.unwrap_or_else(|| panic!("{reason} {field} was taken"));
            assert_eq!((error.code, &*error.reason), (code, reason), "{field}: {error:?}");
            assert_eq!(error.field.map(|field| field.path).unwrap_or_default(), field);
        }
    };
    let bad = Code::InvalidArgument;
    let invalid = "INVALID_FIELD";
    check(GenerationSpec::default(), bad, invalid, "spec.prompt").await;
    check(spec(&[], p()), bad, invalid, "spec.prompt").await;
    check(spec(&[8, 99], p()), bad, invalid, "spec.token_ids.ids[1]").await;
    check(spec(&[8; 1_024], p()), bad, "CONTEXT_LENGTH_EXCEEDED", "spec.prompt").await;
    check(
        spec(&[8], SamplingParams { temperature: Some(-1.0), ..p() }),
        bad,
        invalid,
        "spec.params.temperature",
    )
    .await;
    check(
        spec(&[8], SamplingParams { temperature: Some(f32::NAN), ..p() }),
        bad,
        invalid,
        "spec.params.temperature",
    )
    .await;
    check(spec(&[8], SamplingParams { top_p: Some(0.0), ..p() }), bad, invalid, "spec.params.top_p").await;
    check(spec(&[8], SamplingParams { max_tokens: Some(0), ..p() }), bad, invalid, "spec.params.max_tokens")
        .await;
    check(
        spec(&[8], SamplingParams { stop: vec!["a".into(), String::new()], ..p() }),
        bad,
        invalid,
        "spec.params.stop[1]",
    )
    .await;
    check(spec(&[8], SamplingParams { stop: vec!["a".into(); 17], ..p() }), bad, invalid, "spec.params.stop")
        .await;
    let unsupported = "UNSUPPORTED_PARAMETER";
    check(
        spec(&[8], SamplingParams { prompt_logprobs: Some(1), ..p() }),
        bad,
        unsupported,
        "spec.params.prompt_logprobs",
    )
    .await;
    let options = |change: fn(&mut RequestOptions)| {
        let mut options = RequestOptions::default();
        change(&mut options);
        GenerationSpec { options: Some(options), ..spec(&[8], SamplingParams::default()) }
    };
    check(options(|o| o.client_request_id = "a b".into()), bad, invalid, "spec.options.client_request_id")
        .await;
    check(options(|o| o.deadline_ms = Some(3_600_001)), bad, invalid, "spec.options.deadline_ms").await;
    check(options(|o| o.priority = 8), bad, invalid, "spec.options.priority").await;
    check(options(|o| o.resumed_ids = vec![77]), bad, invalid, "spec.options.resumed_ids[0]").await;
    let unknown = GenerationSpec { model: "lama".into(), ..spec(&[8], p()) };
    check(unknown, Code::NotFound, "UNKNOWN_MODEL", "spec.model").await;
    let empty = GenerationSpec {
        prompt: Some(generation_spec::Prompt::Text(String::new())),
        ..GenerationSpec::default()
    };
    check(empty, bad, invalid, "spec.prompt").await;
    let long = GenerationSpec {
        prompt: Some(generation_spec::Prompt::Text("h".repeat((4 << 20) + 1))),
        ..GenerationSpec::default()
    };
    check(long, bad, invalid, "spec.text").await;
    let echo = GenerationSpec { echo: true, ..spec(&[8], p()) };
    check(echo, bad, unsupported, "spec.echo").await;
    // Each once, under its model where one was meant.
    let text = cluster.registry.text();
    let counts = text.lines().filter(|line| line.starts_with("petek_router_requests_total"));
    let counted: u32 = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<u32>().ok()).sum();
    assert_eq!(counted, refused);

    let mut request = Request::new(GenerateRequest { spec: Some(spec(&[8], p())) });
    request.metadata_mut().insert("x-request-id", "no spaces please".parse().unwrap());
    let status = cluster.client().await.generate(request).await.unwrap_err();
    assert_eq!(refusal(&status).field.unwrap().path, "x-request-id");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_the_limit_is_refused_with_numbers() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let text = "h".repeat((8 << 20) + 1);
    let asked =
        GenerationSpec { prompt: Some(generation_spec::Prompt::Text(text)), ..GenerationSpec::default() };
    let read = stream(&mut client, asked).await;
    let error = read.error.unwrap();
    assert_eq!((error.code, &*error.reason), (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"));
    assert_eq!(error.number("limit_bytes"), Some(8 << 20));
    assert!(error.number("bytes").is_some_and(|bytes| bytes > 8 << 20));
    // The connection is none the worse for it.
    assert_eq!(stream(&mut client, spec(&[8], params())).await.ids(), [EOS]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_tried_on_two_others_at_most() {
    let mut workers: Vec<Worker> = (0..4).map(|i| Worker::start(&format!("w{i}"), Script::Full)).collect();
    let cluster = Cluster::start(settings(), &workers).await;
    let read = stream(&mut cluster.client().await, spec(&[8], params())).await;
    let error = read.error.as_ref().unwrap();
    assert_eq!(
        (error.code, &*error.reason, error.retry_ms),
        (Code::ResourceExhausted, "QUEUE_FULL", Some(7))
    );
    let mut attempts = Vec::new();
    for worker in &mut workers {
        while let Ok(heard) = worker.heard.try_recv() {
            if let Heard::Submit(submit, _) = heard {
                attempts.push(submit.attempt);
            }
        }
    }
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 2, 3]);

    // With two full ones and one that is not, it always gets there.
    let mixed = [
        Worker::start("a", Script::Full),
        Worker::start("b", Script::Full),
        Worker::start("c", plays(&[1, EOS])),
    ];
    let cluster = Cluster::start(settings(), &mixed).await;
    let mut client = cluster.client().await;
    let mut reasons = HashSet::new();
    for _ in 0..20 {
        let read = stream(&mut client, spec(&[8], params())).await;
        assert_eq!(read.text(), "ab");
        reasons.insert(read.started.unwrap().route_reason().as_str_name());
    }
    assert!(reasons.contains("ROUTE_REASON_RETRY"), "{reasons:?}");
}

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
async fn conversations_and_texts_become_ids() {
    let mut workers = [Worker::start("w0", plays(&[1, EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let message =
        ChatMessage { role: "user".into(), content: Some("hi<bot>".into()), ..ChatMessage::default() };
    let chat = ChatSpec { messages: vec![message], params: Some(params()), ..ChatSpec::default() };
    let answer = client.chat(ChatRequest { spec: Some(chat.clone()) }).await.unwrap().into_inner();
    assert_eq!(answer.generation.unwrap().sequences[0].text, "ab");
    // The client's "<bot>" is text, of which this vocabulary has no letter but… none; the template's is a token.
    let (submit, _) = workers[0].submit().await;
    assert_eq!((&submit.prompt_ids[..2], submit.prompt_ids.last()), (&[8, 9][..], Some(&15)));
    assert_eq!(submit.prompt_ids.iter().filter(|id| **id == 15).count(), 1);

    let bare = ChatSpec { params: None, ..chat };
    let request =
        TokenizeRequest { input: Some(tokenize_request::Input::Chat(bare)), ..TokenizeRequest::default() };
    let tokenized = client.tokenize(request).await.unwrap().into_inner();
    assert_eq!((tokenized.token_ids, &*tokenized.rendered), (submit.prompt_ids, "hi<bot><bot>"));

    let text = tokenize_request::Input::Text("hi<eos>".into());
    let request = TokenizeRequest {
        input: Some(text),
        include_pieces: true,
        model: "alias".into(),
        ..TokenizeRequest::default()
    };
    let tokenized = client.tokenize(request).await.unwrap().into_inner();
    assert_eq!((&tokenized.token_ids[..], tokenized.context_tokens), (&[8, 9, EOS][..], support::CONTEXT));
    assert_eq!(tokenized.pieces.iter().map(|piece| &*piece.text).collect::<Vec<_>>(), ["h", "i", "<eos>"]);
    let request = DetokenizeRequest { token_ids: tokenized.token_ids, ..DetokenizeRequest::default() };
    assert_eq!(client.detokenize(request.clone()).await.unwrap().into_inner().text, "hi");
    let kept = DetokenizeRequest { skip_special_tokens: Some(false), ..request };
    assert_eq!(client.detokenize(kept).await.unwrap().into_inner().text, "hi<eos>");
    // Of a byte-level text a first space is its own.
    let spaced = DetokenizeRequest { token_ids: vec![12], ..DetokenizeRequest::default() };
    assert_eq!(client.detokenize(spaced).await.unwrap().into_inner().text, " Note");
    let outside = DetokenizeRequest { token_ids: vec![1, 99], ..DetokenizeRequest::default() };
    assert_eq!(refusal(&client.detokenize(outside).await.unwrap_err()).field.unwrap().path, "token_ids[1]");

    let models = client.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let model = client
        .get_model(GetModelRequest { model: "alias".into() })
        .await
        .unwrap()
        .into_inner()
        .model
        .unwrap();
    assert_eq!((models.len(), &models[0]), (1, &model));
    assert_eq!((&*model.name, model.workers_serving, model.has_chat_template), (NAME, 1, true));
    assert_eq!((&model.eos_token_ids[..], model.vocabulary_tokens), (&[EOS][..], TOKENS.len() as u32));
    assert_eq!(model.defaults.unwrap().temperature, Some(0.5));
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_workers_and_reasons() {
    let mut workers = [Worker::start("w0", Script::Silent), Worker::start("w1", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut admin = cluster.admin().await;
    let _running = cluster
        .client()
        .await
        .stream_generate(StreamGenerateRequest { spec: Some(spec(&[7; 40], params())) })
        .await
        .unwrap();
    let explain = ExplainRouteRequest {
        request: Some(explain_route_request::Request::Generation(spec(
            &[8; 40],
            SamplingParams { max_tokens: Some(300), ..params() },
        ))),
    };
    let decision = admin.explain_route(explain.clone()).await.unwrap().into_inner().decision.unwrap();
    assert_eq!((decision.prompt_tokens, decision.prompt_blocks, decision.decode_tokens), (40, 2, 256));
    assert_eq!(
        (decision.wait_weight_per_s, decision.tie_share, decision.reason()),
        (4.0, 0.05, RouteReason::Load)
    );
    let [best, busy] = &decision.candidates[..] else { panic!("two candidates: {decision:?}") };
    assert_eq!(
        (&best.worker, best.waiting_tokens, busy.waiting_tokens, busy.running),
        (&decision.worker, 0, 40, 1)
    );
    for candidate in [best, busy] {
        let wait = candidate.waiting_tokens as f64 / candidate.prefill_tokens_per_s;
        let prefill = (1.0 + 4.0 * decision.mean_wait_s) * 40.0 / candidate.prefill_tokens_per_s;
        assert!(
            (candidate.wait_s - wait).abs() < 1e-9 && (candidate.prefill_s - prefill).abs() < 1e-9,
            "{candidate:?}"
        );
        assert!((candidate.cost_s - wait - prefill - candidate.decode_s).abs() < 1e-9, "{candidate:?}");
    }

    let drained = admin
        .drain_worker(DrainWorkerRequest { worker: best.worker.clone(), ..DrainWorkerRequest::default() })
        .await;
    assert_eq!(drained.unwrap().into_inner().worker.unwrap().state(), WorkerState::Draining);
    let decision = admin.explain_route(explain).await.unwrap().into_inner().decision.unwrap();
    assert_eq!((&decision.worker, decision.reason()), (&busy.worker, RouteReason::OnlyWorker));
    assert_eq!(decision.candidates[1].state(), CandidateState::Draining);
    let stale = DrainWorkerRequest { worker: "w0".into(), epoch: Some(1), ..DrainWorkerRequest::default() };
    assert_eq!(refusal(&admin.drain_worker(stale).await.unwrap_err()).reason, "STALE_EPOCH");

    // A record that goes away takes its worker with it; what it runs is finished.
    let busy_at = usize::from(busy.worker != "w0");
    let (submit, reply) = workers[busy_at].submit().await;
    cluster.list.send_modify(|list| list.workers.clear());
    until(async || {
        let workers = admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
        workers.is_empty()
    })
    .await;
    reply.admit(submit.dispatch);
    reply.tokens(submit.dispatch, 0, 0, &[EOS]);
    reply.finish(submit.dispatch, 0, worker::FinishReason::StopEos);
    let mut events = _running.into_inner();
    let mut read = Read::default();
    while let Some(response) = soon(events.message()).await.unwrap() {
        read.take(response.event.unwrap());
    }
    assert_eq!(read.ids(), [EOS]);
    assert_eq!(stream(&mut cluster.client().await, spec(&[8], params())).await.reason(), "NO_WORKER");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_not_what_its_record_says_gets_no_work() {
    type Change = fn(&mut worker::WorkerHello);
    let lies: [(Change, &str); 7] = [
        (|hello| hello.worker = "w1".into(), "worker id"),
        (|hello| hello.epoch += 1, "epoch"),
        (|hello| hello.revision = vec![8; 32].into(), "revision"),
        (|hello| hello.text_hash = vec![8; 32].into(), "text hash"),
        (|hello| hello.block_size_tokens = 32, "block size"),
        (|hello| hello.numerics_id.clear(), "numerics id"),
        (|hello| hello.wire = None, "wire version"),
    ];
    for (change, what) in lies {
        let liar = Worker::start_as("w0", Script::Silent, change);
        let cluster = Cluster::start_unready(settings(), vec![liar.entry.clone()]).await;
        let mut admin = cluster.admin().await;
        let mut view = RouterView::default();
        until(async || {
            let workers =
                admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
            view = workers.into_iter().next().and_then(|worker| worker.view).unwrap_or_default();
            view.link() == Link::Refused
        })
        .await;
        assert!(view.link_error.contains(what), "{what}: {}", view.link_error);
        assert_eq!(stream(&mut cluster.client().await, spec(&[8], params())).await.reason(), "NO_WORKER");
        assert!(!cluster.has_metric("petek_router_records_bad_total 0"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_unlike_its_pool_is_refused() {
    let good = Worker::start("a", plays(&[EOS]));
    let mut unlike = Worker::start("b", plays(&[EOS])).entry.clone();
    unlike.block_size = 2 * support::BLOCK;
    let cluster = Cluster::start_unready(settings(), vec![good.entry.clone(), unlike]).await;
    cluster.connected(1).await;
    let workers =
        cluster.admin().await.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
    let view = workers[1].view.as_ref().unwrap();
    assert_eq!((view.link(), &*view.link_error), (Link::Refused, "block size: ours is 16, the peer's 32"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_comes_back_after_its_restart() {
    let mut first = Worker::start("w0", Script::Silent);
    let mut quick = settings();
    quick.link = LinkSettings { retry_ms_max: 1, ..quick.link };
    let cluster = Cluster::start(quick, std::slice::from_ref(&first)).await;
    first.kill();
    let mut admin = cluster.admin().await;
    let mut link = async || {
        let workers = admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
        workers[0].view.as_ref().unwrap().link()
    };
    until(async || link().await != Link::Connected).await;
    let second = Worker::start("w0", plays(&[1, EOS]));
    cluster.list.send_modify(|list| list.workers = vec![second.entry.clone()]);
    until(async || link().await == Link::Connected).await;
    assert_eq!(stream(&mut cluster.client().await, spec(&[8], params())).await.text(), "ab");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_speak_for_every_service() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let worker = Worker::start("w0", Script::Silent);
    let cluster = Cluster::start_unready(settings(), vec![]).await;
    let at = |address: std::net::SocketAddr| Endpoint::from_shared(format!("http://{address}")).unwrap();
    let public = at(cluster.router.public_address()).connect().await.unwrap();
    let admin = at(cluster.router.admin_address()).connect().await.unwrap();
    let check = async |channel: &Channel, service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status()
    };
    let inference = "petek.inference.v1.InferenceService";
    assert_eq!(check(&public, inference).await, ServingStatus::NotServing, "there is no worker yet");
    assert_eq!(check(&admin, "petek.admin.v1.AdminService").await, ServingStatus::Serving);
    cluster.list.send_modify(|list| list.workers = vec![worker.entry.clone()]);
    cluster.connected(1).await;
    assert_eq!(check(&public, inference).await, ServingStatus::Serving);
    assert_eq!(check(&public, "").await, ServingStatus::Serving);

    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileContainingSymbol(inference.into())),
    };
    let mut answers = ServerReflectionClient::new(public)
        .server_reflection_info(futures::stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    assert!(matches!(answer, Some(MessageResponse::FileDescriptorResponse(_))), "{answer:?}");
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

/// [0xMiden/node#2273] The age of a connection never cuts what runs on it.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_finishes_its_streams() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let young = Duration::from_millis(10);
    let settings = RouterSettings { connection_age_ms: young.as_millis() as u64, ..settings() };
    let cluster = Cluster::start(settings, &workers).await;
    let mut client = cluster.client().await;
    let asked = StreamGenerateRequest { spec: Some(spec(&[8], params())) };
    let mut events = client.stream_generate(asked).await.unwrap().into_inner();
    let (submit, reply) = workers[0].submit().await;
    reply.admit(submit.dispatch);
    let mut read = Read::default();
    read.take(events.message().await.unwrap().unwrap().event.unwrap());
    let (begun, mut at) = (Instant::now(), 0);
    while begun.elapsed() < 10 * young {
        reply.tokens(submit.dispatch, 0, at, &[X]);
        read.take(soon(events.message()).await.unwrap().unwrap().event.unwrap());
        at += 1;
        // Paced: an unhurried stream of far fewer tokens than the context has.
        tokio::time::sleep(young / 10).await;
    }
    reply.tokens(submit.dispatch, 0, at, &[EOS]);
    reply.finish(submit.dispatch, 0, worker::FinishReason::StopEos);
    while let Some(response) = soon(events.message()).await.unwrap() {
        read.take(response.event.unwrap());
    }
    assert_eq!(read.ids().len() as u32, at + 1);
    // Another call goes over another connection, to the same worker over the same stream.
    let _other = client.stream_generate(StreamGenerateRequest { spec: Some(spec(&[9], params())) }).await;
    assert_eq!(workers[0].submit().await.0.dispatch, submit.dispatch + 1);
}
