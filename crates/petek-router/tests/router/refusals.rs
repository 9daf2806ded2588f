//! What is refused, by name and with numbers.

use std::collections::HashSet;

use petek_proto::inference::v1::{
    ChatMessage, ChatRequest, ChatSpec, GenerateRequest, GenerationSpec, ListModelsRequest, RequestOptions,
    SamplingParams, generation_spec,
};
use tonic::{Code, Request};

use crate::support::{Cluster, EOS, Heard, Script, Worker, refusal, settings, soon, spec, stream};
use crate::{params, plays, unary};

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

    let others = r#"petek_router_requests_total{model="other",outcome="refused"}"#;
    let before = cluster.metric(others);
    let mut request = Request::new(GenerateRequest { spec: Some(spec(&[8], p())) });
    request.metadata_mut().insert("x-request-id", "no spaces please".parse().unwrap());
    let status = cluster.client().await.generate(request).await.unwrap_err();
    assert_eq!(refusal(&status).field.unwrap().path, "x-request-id");
    // Refused before its message was read, and counted all the same.
    assert_eq!(cluster.metric(others), before + 1);
    let mut request = Request::new(ListModelsRequest {});
    request.metadata_mut().insert("x-request-id", "no spaces please".parse().unwrap());
    assert_eq!(cluster.client().await.list_models(request).await.unwrap_err().code(), bad);
    assert_eq!(cluster.metric(others), before + 1, "that is no request to be counted");
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
    assert_eq!(cluster.metric(r#"petek_router_requests_total{model="other",outcome="refused"}"#), 1);
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

/// A template may write a role between the marks of a special token.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_is_none_is_refused_by_name() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let say =
        |role: &str| ChatMessage { role: role.into(), content: Some("hi".into()), ..ChatMessage::default() };
    let spec = ChatSpec { messages: vec![say("user"), say("bot>")], ..ChatSpec::default() };
    let status = cluster.client().await.chat(ChatRequest { spec: Some(spec.clone()) }).await.unwrap_err();
    let why = refusal(&status);
    assert_eq!((why.code, &*why.reason), (Code::InvalidArgument, "INVALID_FIELD"));
    assert_eq!(why.field.unwrap().path, "spec.messages[1].role");
    let fine = ChatSpec { messages: vec![say("developer"), say("user")], ..spec };
    assert!(cluster.client().await.chat(ChatRequest { spec: Some(fine) }).await.is_ok());
}

/// SAFETY 1: what a client's transport may ask for has limits too; a connection outlives a call that asks for more.
#[tokio::test(flavor = "multi_thread")]
async fn compressed_requests_and_long_headers_are_refused() {
    let workers = [Worker::start("w0", plays(&[EOS]))];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut client = cluster.client().await;
    let mut ask = async |name: &'static str, value: String| {
        let mut request = Request::new(GenerateRequest { spec: Some(spec(&[8], params())) });
        request.metadata_mut().insert(name, value.parse().unwrap());
        soon(client.generate(request)).await.map(drop)
    };
    ask("x-of-the-client", "a".repeat(8 << 10)).await.expect("half the limit");
    let long = ask("x-of-the-client", "a".repeat(20 << 10)).await.expect_err("beyond the limit");
    assert!(long.message().contains("431"), "{long:?}");
    let compressed = ask("grpc-encoding", "gzip".into()).await.expect_err("compression is off");
    assert_eq!(compressed.code(), Code::Unimplemented, "{compressed:?}");
    ask("x-of-the-client", "a".into()).await.expect("nothing broke");
}
