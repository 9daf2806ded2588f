//! A client that never reads, and channels that hold one thing: both slow down nobody but whom they should.

use petek_proto::inference::v1::generation_spec::Prompt;
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{
    GenerationSpec, StreamGenerateRequest, TokenIds, TokenizeRequest, tokenize_request::Input,
};
use tonic::Code;
use tonic::transport::Channel;

use crate::client::{Bytes, Client, Running, ask, client, read, spec};
use crate::server::Etcd;
use crate::stage::{Launch, Stage, until};

/// What a stream of HTTP/2 takes before its reader says more.
const WINDOW_BYTES: u32 = 4 << 10;
/// Of the deltas that wait for a client.
const SLOW_BYTES: u64 = 16 << 10;

fn stories(count: u64, max_tokens: u32) -> Vec<GenerationSpec> {
    (0..count).map(|n| spec(&format!("Chapter {n}: the bees and the bear"), 70 + n, max_tokens)).collect()
}

async fn one_by_one(client: &Client, asked: &[GenerationSpec]) -> Vec<Bytes> {
    let mut answers = Vec::new();
    for spec in asked {
        answers.push(ask(client, spec.clone()).await.bytes());
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_is_ended_and_its_neighbours_notice_nothing() {
    let Some(etcd) = Etcd::shared("a_client_that_never_reads_is_ended") else { return };
    let stage = Stage::new(etcd.endpoint());
    let worker = stage.worker("w").start();
    let router = stage.router("r").set("ROUTER__SLOW_CONSUMER_BYTES", &SLOW_BYTES.to_string());
    let router = router.set("ROUTER__SLOW_CONSUMER_MS", "1000").start();
    router.reaches(&["w"]).await;
    let readers = client(&router).await;
    let asked = stories(4, 600);
    let alone = one_by_one(&readers, &asked).await;
    let mut endless = spec("Read me", 1, 900);
    endless.params.get_or_insert_default().logprobs = Some(20);
    let unbroken = ask(&readers, endless.clone()).await.bytes();

    let narrow = Channel::from_shared(format!("http://{}", router.address("public").await));
    let narrow = narrow.expect("an address").initial_stream_window_size(WINDOW_BYTES);
    let narrow = InferenceServiceClient::new(narrow.connect().await.expect("connect to the router"));
    let request = StreamGenerateRequest { spec: Some(endless) };
    let mut unread = narrow.clone().stream_generate(request).await.expect("it begins").into_inner();
    // Some of them on the very connection.
    let beside = asked.iter().enumerate().map(|(n, spec)| {
        let over = if n % 2 == 0 { &readers } else { &narrow };
        Running::start(over, spec.clone())
    });
    let beside: Vec<Running> = beside.collect();
    let failed = r#"petek_router_requests_total{model="demo",outcome="failed"}"#;
    until("the router gives up on the client", async || router.metric(failed).await == Some(1.0)).await;
    for (running, alone) in beside.into_iter().zip(alone) {
        assert_eq!(running.ended().await.bytes(), alone);
    }
    until("its blocks are back", async || {
        let status = worker.status().await;
        status.running == 0 && status.blocks_free == status.blocks_total
    })
    .await;

    // Whatever reached it is good, and then it is told why there is no more.
    let answer = read(&mut unread).await;
    let why = answer.refusal();
    assert_eq!((why.code, &*why.reason), (Code::ResourceExhausted, "SLOW_CONSUMER"));
    let (bytes, ms) = (why.number("waiting_bytes"), why.number("waited_ms"));
    assert!(bytes > Some(SLOW_BYTES) || ms >= Some(1_000), "{why:?}");
    let got = answer.ids.len();
    assert!(got < 900 && answer.ids == unbroken.1[..got] && answer.logprobs == unbroken.2[..got], "{got}");
    assert!(unbroken.0.starts_with(&answer.text));
}

/// The same requests by ids, so that no thread that tokenises is in the way.
async fn by_ids(client: &mut Client, asked: &[GenerationSpec]) -> Vec<GenerationSpec> {
    let mut by_ids = Vec::new();
    for spec in asked {
        let Some(Prompt::Text(text)) = spec.prompt.clone() else { panic!("{spec:?}") };
        let request = TokenizeRequest { input: Some(Input::Text(text)), ..TokenizeRequest::default() };
        let ids = client.tokenize(request).await.expect("tokenise a text").into_inner().token_ids;
        by_ids.push(GenerationSpec { prompt: Some(Prompt::TokenIds(TokenIds { ids })), ..spec.clone() });
    }
    by_ids
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_of_one_place_change_no_byte() {
    let Some(etcd) = Etcd::shared("channels_of_one_place_change_no_byte") else { return };
    let wide = Stage::new(etcd.endpoint());
    let (_workers, [router]) = wide.start(["w"], ["r"]).await;
    let mut wide = client(&router).await;
    let asked = by_ids(&mut wide, &stories(16, 120)).await;
    let expected = one_by_one(&wide, &asked).await;

    let stage = Stage::new(etcd.endpoint());
    let narrowed = |launch: Launch, of: &str, keys: &[&str]| {
        keys.iter().fold(launch, |launch, key| launch.set(&format!("{of}__{key}"), "1"))
    };
    let keys = ["COMMAND_QUEUE", "STEPS_IN_FLIGHT", "FEED__WATCH_QUEUE", "FEED__KV_RING_BATCHES"];
    let _workers = ["a", "b"].map(|id| narrowed(stage.worker(id), "WORKER", &keys).start());
    let keys = ["REGISTRY_QUEUE", "TOKENIZE_THREADS", "TOKENIZE_QUEUE", "LINK__SUBMIT_QUEUE"];
    let keys = [&keys[..], &["LINK__SNAPSHOTS_MAX"]].concat();
    let routers = ["first", "second"].map(|name| narrowed(stage.router(name), "ROUTER", &keys).start());
    for router in &routers {
        router.reaches(&["a", "b"]).await;
    }
    // Cold, and then from the cache.
    for _ in 0..2 {
        let mut running = Vec::new();
        for router in &routers {
            let client = client(router).await;
            running.extend(asked.iter().map(|spec| Running::start(&client, spec.clone())));
        }
        for (running, expected) in running.into_iter().zip(expected.iter().cycle()) {
            assert_eq!(&running.ended().await.bytes(), expected);
        }
    }
}
