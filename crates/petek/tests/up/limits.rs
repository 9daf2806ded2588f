//! Requests at the limits and beyond them: what is refused is refused by name and number, and harms nobody.

use std::fs;
use std::path::Path;

use petek_proto::inference::v1::{
    ChatMessage, ChatRequest, ChatSpec, FinishReason, GetModelRequest, RequestOptions, SamplingParams,
    TemplateValue, TokenizeRequest, ToolChoice, tokenize_request, tool_choice,
};
use petek_tests::chain::{Chain, VOCAB};
use petek_tests::llama::{LazyTensor, read_weights, write_weights};
use petek_tests::random::Random;
use safetensors::Dtype;
use tonic::Code;

use super::api::{Answer, Client, greedy, refusal, spec, text_spec, until, with};
use super::process::Up;

const FOREVER: u32 = 1;
/// "a few", and then a token that breaks the numbers.
const FEW: u32 = 3;
const POISON: u32 = 5;

fn write_model(dir: &Path) {
    let strings = ["forever", "x", "few", "y", "poison"];
    Chain::bytes(&strings)
        .then(&[FOREVER, 2, 2])
        .then(&[FEW, 4, POISON])
        .write(dir)
        .expect("write the model");
}

/// One weight of the folder becomes NaN: of the embedding of this id, so that only who has it in its text is hit.
fn poison(dir: &Path, id: u32) {
    let shape = Chain::shape();
    let mut weights = read_weights(dir, &shape).expect("read the model");
    weights.get_mut("model.embed_tokens.weight").expect("there")[id as usize * VOCAB] = f32::NAN;
    let tensors = shape.tensors().into_iter().map(|(name, shape)| {
        let values = weights[&name].clone();
        (name, LazyTensor { dtype: Dtype::F32, shape, values: Box::new(move || values.clone()) })
    });
    write_weights(dir, tensors.collect()).expect("write the model");
}

/// BEHAVIOUR 6.4: not the worker, not its neighbours, and not who comes after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nan_ends_its_request_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    poison(dir.path(), POISON);
    let model = dir.path().to_str().expect("a plain path");
    let up = Up::start(&["--model", model, "--workers", "1", "--threads", "1"]);
    let client = Client::of(&up).await;
    let endless = SamplingParams { ignore_eos: true, logprobs: Some(1), ..greedy(2_000) };
    let neighbour = {
        let (client, endless) = (client.clone(), endless.clone());
        tokio::spawn(async move { client.stream(spec(&[FOREVER], endless)).await })
    };
    // In the prompt, and in mid-stream. A third one within a minute would drain the worker.
    for (prompt, before) in [([POISON; 40].as_slice(), &[][..]), (&[FEW; 40], &[4, POISON])] {
        let answer = client.stream(spec(prompt, greedy(9))).await;
        let why = answer.refusal();
        assert_eq!((why.code, &*why.reason), (Code::Internal, "NUMERICAL_ERROR"), "{why:?}");
        let ids = answer.sequences.first().map_or(&[][..], |one| &one.ids);
        assert_eq!(ids, before);
    }
    let answer = neighbour.await.expect("it runs");
    assert_eq!((answer.text().len(), answer.reason()), (2_000, FinishReason::Length));
    // The same worker serves on, with clean blocks.
    let after = client.stream(spec(&[FOREVER], endless)).await;
    assert_eq!(after.sequences[0].logprobs, answer.sequences[0].logprobs);
    assert_eq!(up.metric("petek_worker_numerical_errors_total", &[]), 2.0);
    assert_eq!(up.metric("petek_router_requests_total", &[r#"outcome="failed""#]), 2.0);
}

/// BEHAVIOUR 4.2: the context is used to its last token, and one more is refused with both numbers.
#[tokio::test]
async fn the_context_holds_what_it_says() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    let model = dir.path().to_str().expect("a plain path");
    let up = Up::start(&["--model", model, "--context", "100", "--threads", "1"]);
    let client = Client::of(&up).await;
    let endless = |max_tokens: Option<u32>| SamplingParams { max_tokens, ignore_eos: true, ..greedy(1) };
    let answer = client.both(spec(&[FOREVER; 99], endless(Some(1)))).await;
    assert_eq!((answer.usage(), answer.reason()), ((99, answer.usage().1, 1), FinishReason::Length));
    for max_tokens in [Some(1), None] {
        let answer = client.both(spec(&[FOREVER; 100], endless(max_tokens))).await;
        let why = answer.refusal();
        assert_eq!((why.code, &*why.reason), (Code::InvalidArgument, "CONTEXT_LENGTH_EXCEEDED"));
        assert_eq!((why.number("prompt_tokens"), why.number("context_tokens")), (Some(100), Some(100)));
        assert!(why.message.contains("100 tokens"), "{}", why.message);
        assert_eq!(why.field.as_ref().expect("a field").path, "spec.prompt");
    }
    // Beyond the rest it is clamped, and by default it is the rest.
    for max_tokens in [Some(1_000_000), None] {
        let answer = client.both(spec(&[FOREVER; 90], endless(max_tokens))).await;
        assert_eq!((answer.ids().len(), answer.reason()), (10, FinishReason::Length));
        assert_eq!(answer.started.as_ref().expect("started").max_tokens, 10);
    }
}

/// BEHAVIOUR 4.3: the context is what the pool holds, said aloud; and what can never fit harms nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_pool_lowers_the_context_aloud() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    let model = dir.path().to_str().expect("a plain path");
    // A block of 16 tokens: 1 layer × 2 heads × 32 × keys and values × 4 bytes = 8 KiB. Eight of them are 128 tokens.
    let small = ["--block-size", "16", "--kv-memory", "64KiB", "--workers", "1", "--threads", "1"];
    let up = Up::start(&[&["--model", model], &small[..]].concat());
    let client = Client::of(&up).await;
    let shown = client.0.clone().get_model(GetModelRequest::default()).await.expect("it shows").into_inner();
    assert_eq!(shown.model.expect("a model").context_tokens, 128);
    let warning = up.said();
    let lines: Vec<&str> = warning.lines().filter(|line| line.contains("context is lowered")).collect();
    let [line] = lines[..] else { panic!("said once: {warning}") };
    assert!(line.contains("WARN") && line.contains("4096") && line.contains("128"), "{line}");

    let endless = |n: u32| SamplingParams { n: Some(n), ignore_eos: true, ..greedy(4_000) };
    let neighbour = {
        let client = client.clone();
        tokio::spawn(async move { client.stream(spec(&[FOREVER], endless(1))).await })
    };
    let answer = client.stream(spec(&[FOREVER; 128], endless(1))).await;
    assert_eq!(answer.refusal().reason, "CONTEXT_LENGTH_EXCEEDED");
    // Each sequence fits alone: together they take turns.
    let answer = client.stream(spec(&[FOREVER; 17], endless(4))).await;
    assert!(answer.sequences.iter().all(|one| one.text == "x".repeat(111)), "{answer:?}");
    assert_eq!(neighbour.await.expect("it runs").text(), "x".repeat(127));
}

/// BEHAVIOUR 4.4, and a deadline in the queue.
#[tokio::test]
async fn a_full_queue_says_when_to_come_again() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    let model = dir.path().to_str().expect("a plain path");
    let narrow = ["--workers", "1", "--slots", "1", "--queue", "1", "--threads", "1"];
    let up = Up::start(&[&["--model", model], &narrow[..]].concat());
    let client = Client::of(&up).await;
    let endless = || spec(&[FOREVER], SamplingParams { ignore_eos: true, ..greedy(4_000) });
    let mut running = client.open(endless()).await.expect("it streams");
    let mut read = Answer::default();
    read.tokens(&mut running, 1).await;
    let waits = client.open(endless()).await.expect("it waits");
    until(|| up.metric("petek_worker_sequences", &[r#"state="waiting""#]) == 1.0).await;
    let answer = client.both(endless()).await;
    let why = answer.refusal();
    assert_eq!(
        (why.code, &*why.reason, why.number("waiting")),
        (Code::ResourceExhausted, "QUEUE_FULL", Some(1))
    );
    assert!(why.retry_ms.is_some_and(|ms| ms > 0), "{why:?}");
    drop(waits);
    // The first one never noticed.
    read.tokens(&mut running, 50).await;
}

/// BEHAVIOUR 6.2: whoever leaves, in whatever way and whenever, leaves no block behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_leaves_leaves_nothing_behind() {
    const SEED: u64 = 0x5eed;
    const CLIENTS: usize = 8;
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    let model = dir.path().to_str().expect("a plain path");
    let few = ["--workers", "1", "--threads", "1", "--slots", "4", "--block-size", "16"];
    let up = Up::start(&[&["--model", model], &few[..]].concat());
    eprintln!("seed {SEED:#x}");
    let leave = async |number: usize| {
        // A connection of its own, so that it may be dropped too.
        let mut random = Random::of_part(SEED, &format!("client {number}"));
        for _ in 0..40 {
            let client = Client::of(&up).await;
            let prompt = vec![FOREVER; 1 + random.below(200)];
            let n = 1 + random.below(3) as u32;
            let asked = spec(&prompt, SamplingParams { n: Some(n), ignore_eos: true, ..greedy(3_000) });
            // At once: often before it is sent to a worker.
            for _ in 0..4 {
                drop(client.open(asked.clone()).await.expect("it streams"));
            }
            if random.below(4) == 0 {
                let patience = std::time::Duration::from_millis(random.below(5) as u64);
                let _ = tokio::time::timeout(patience, client.unary(asked)).await;
                continue;
            }
            let mut events = client.open(asked).await.expect("it streams");
            for _ in 0..random.below(6) {
                events.message().await.expect("it goes on");
            }
        }
    };
    let before = up.metric("petek_worker_blocks", &[r#"state="free""#]);
    futures::future::join_all((0..CLIENTS).map(leave)).await;
    let blocks = |state: &str| up.metric("petek_worker_blocks", &[state]);
    until(|| up.metric("petek_worker_sequences", &[]) == 0.0).await;
    until(|| blocks(r#"state="held""#) == 0.0).await;
    assert_eq!(blocks(r#"state="free""#) + blocks(r#"state="cached""#), before);
    until(|| up.metric("petek_router_streams_open", &[]) == 0.0).await;
    // Each has one end, and it is this one: nobody is refused, and nobody's worker is lost.
    let ended = |labels: &[&str]| up.metric("petek_router_requests_total", labels);
    until(|| ended(&[]) > 0.0 && ended(&[]) == ended(&[r#"outcome="cancelled""#])).await;
}

/// SAFETY 1: what goes out has a limit too, and says so in numbers.
#[tokio::test]
async fn an_answer_that_is_too_large_for_a_message_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    let model = dir.path().to_str().expect("a plain path");
    let up = Up::start(&["--model", model, "--workers", "1", "--threads", "1"]);
    let client = Client::of(&up).await;
    let large = SamplingParams { n: Some(64), logprobs: Some(20), ignore_eos: true, ..greedy(300) };
    let answer = client.unary(spec(&[FOREVER], large)).await;
    let why = answer.refusal();
    assert_eq!((why.code, &*why.reason), (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"));
    assert_eq!(why.number("limit_bytes"), Some(4 << 20));
    let text = tokenize_request::Input::Text("x".repeat(1_000_000));
    let request = TokenizeRequest { input: Some(text), include_pieces: true, ..TokenizeRequest::default() };
    let status = client.0.clone().tokenize(request).await.expect_err("each token with its piece");
    assert_eq!(refusal(&status).reason, "MESSAGE_TOO_LARGE");
}

type Change = fn(&mut SamplingParams);
type ChatChange<'a> = &'a dyn Fn(&mut ChatSpec);

/// Each by code, reason and field, streamed and not; 10 MB, unknown enum values and all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_by_name() {
    let up = Up::start(&[]);
    let client = Client::of(&up).await;
    let bad = Code::InvalidArgument;
    let check =
        async |asked: petek_proto::inference::v1::GenerationSpec, code: Code, reason: &str, field: &str| {
            let answer = client.both(asked).await;
            let why = answer.refusal();
            assert_eq!((why.code, &*why.reason), (code, reason), "{field}: {why:?}");
            assert_eq!(why.field.as_ref().map_or("", |field| &field.path), field, "{why:?}");
            assert!(why.message.len() < 512 && !why.message.contains('\n'), "{}", why.message);
        };
    let p = |change: fn(&mut SamplingParams)| {
        let mut params = greedy(4);
        change(&mut params);
        spec(&[8], params)
    };
    check(text_spec("", greedy(4)), bad, "INVALID_FIELD", "spec.prompt").await;
    check(spec(&[], greedy(4)), bad, "INVALID_FIELD", "spec.prompt").await;
    check(spec(&[8, 1_024], greedy(4)), bad, "INVALID_FIELD", "spec.token_ids.ids[1]").await;
    check(spec(&[8, u32::MAX], greedy(4)), bad, "INVALID_FIELD", "spec.token_ids.ids[1]").await;
    check(text_spec(&"dream ".repeat(5_000), greedy(4)), bad, "CONTEXT_LENGTH_EXCEEDED", "spec.prompt").await;
    check(text_spec(&"a".repeat(5_000_000), greedy(4)), bad, "INVALID_FIELD", "spec.text").await;
    check(text_spec(&"a".repeat(10_000_000), greedy(4)), Code::ResourceExhausted, "MESSAGE_TOO_LARGE", "")
        .await;
    let invalid: [(Change, &str); 17] = [
        (|p| p.temperature = Some(-0.1), "temperature"),
        (|p| p.temperature = Some(2.1), "temperature"),
        (|p| p.temperature = Some(f32::NAN), "temperature"),
        (|p| p.temperature = Some(f32::INFINITY), "temperature"),
        (|p| p.top_p = Some(0.0), "top_p"),
        (|p| p.top_p = Some(f32::NAN), "top_p"),
        (|p| p.min_p = Some(-1.0), "min_p"),
        (|p| p.min_p = Some(f32::NAN), "min_p"),
        (|p| p.top_k = Some(-2), "top_k"),
        (|p| p.n = Some(0), "n"),
        (|p| p.n = Some(65), "n"),
        (|p| p.max_tokens = Some(0), "max_tokens"),
        (|p| p.min_tokens = Some(5), "min_tokens"),
        (|p| p.logprobs = Some(21), "logprobs"),
        (|p| p.stop = vec!["a".into(); 17], "stop"),
        (|p| p.stop = vec!["a".into(), String::new()], "stop[1]"),
        (|p| p.stop_token_ids = vec![3, 5_000], "stop_token_ids[1]"),
    ];
    for (change, field) in invalid {
        check(p(change), bad, "INVALID_FIELD", &format!("spec.params.{field}")).await;
    }
    let unsupported: [(Change, &str); 9] = [
        (|p| p.repetition_penalty = Some(1.1), "repetition_penalty"),
        (|p| p.frequency_penalty = Some(0.5), "frequency_penalty"),
        (|p| p.presence_penalty = Some(0.5), "presence_penalty"),
        (|p| p.typical_p = Some(0.5), "typical_p"),
        (|p| p.logit_bias = [(3, 1.0)].into(), "logit_bias"),
        (|p| p.allowed_token_ids = vec![3], "allowed_token_ids"),
        (|p| p.banned_token_ids = vec![3], "banned_token_ids"),
        (|p| p.bad_words = vec!["a".into()], "bad_words"),
        (|p| p.prompt_logprobs = Some(1), "prompt_logprobs"),
    ];
    for (change, field) in unsupported {
        check(p(change), bad, "UNSUPPORTED_PARAMETER", &format!("spec.params.{field}")).await;
    }
    let options = |change: fn(&mut RequestOptions)| {
        let mut options = RequestOptions::default();
        change(&mut options);
        with(options, spec(&[8], greedy(4)))
    };
    check(options(|o| o.adapter = "a".into()), bad, "UNSUPPORTED_PARAMETER", "spec.options.adapter").await;
    check(options(|o| o.priority = 8), bad, "INVALID_FIELD", "spec.options.priority").await;
    check(
        options(|o| o.client_request_id = "a\nb".into()),
        bad,
        "INVALID_FIELD",
        "spec.options.client_request_id",
    )
    .await;
    check(options(|o| o.resumed_ids = vec![5_000]), bad, "INVALID_FIELD", "spec.options.resumed_ids[0]")
        .await;
    let mut unknown = spec(&[8], greedy(4));
    unknown.model = "nobody".into();
    check(unknown, Code::NotFound, "UNKNOWN_MODEL", "spec.model").await;
    check(Default::default(), bad, "INVALID_FIELD", "spec.prompt").await;

    // Of a conversation.
    let message = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: Some(content.into()),
        ..ChatMessage::default()
    };
    let chat = |change: &dyn Fn(&mut ChatSpec)| {
        let mut spec = ChatSpec {
            messages: vec![message("user", "hi")],
            params: Some(greedy(4)),
            ..ChatSpec::default()
        };
        change(&mut spec);
        let mut client = client.0.clone();
        async move {
            client.chat(ChatRequest { spec: Some(spec) }).await.map(drop).map_err(|status| refusal(&status))
        }
    };
    chat(&|_| {}).await.expect("a plain conversation");
    let kwarg = |name: &str| {
        let name = name.to_owned();
        move |spec: &mut ChatSpec| {
            drop(spec.template_kwargs.insert(name.clone(), TemplateValue { value: None }))
        }
    };
    let mode = |mode| {
        move |spec: &mut ChatSpec| {
            spec.tool_choice = Some(ToolChoice { choice: Some(tool_choice::Choice::Mode(mode)) });
        }
    };
    let cases: [(ChatChange, &str, &str); 6] = [
        (&|spec| spec.messages.clear(), "INVALID_FIELD", "spec.messages"),
        (&|spec| spec.messages[0].role.clear(), "INVALID_FIELD", "spec.messages[0].role"),
        (&mode(99), "INVALID_FIELD", "spec.tool_choice.mode"),
        (&mode(-1), "INVALID_FIELD", "spec.tool_choice.mode"),
        (&kwarg("enable_thinking"), "INVALID_FIELD", "spec.template_kwargs[\"enable_thinking\"]"),
        (
            &|spec| spec.messages = vec![message("user", &"a".repeat(5_000_000))],
            "INVALID_FIELD",
            "spec.messages",
        ),
    ];
    for (change, reason, field) in cases {
        let why = chat(change).await.expect_err(field);
        let its_field = why.field.as_ref().map_or("", |field| &field.path);
        assert_eq!((why.code, &*why.reason, its_field), (bad, reason, field), "{why:?}");
    }
    // After all that the same connection is served.
    assert_eq!(client.both(text_spec("I have a dream", greedy(4))).await.ids().len(), 4);
}

/// A template that the client cannot be blamed for is refused at the start; one that says no speaks to the client.
#[tokio::test]
async fn what_a_template_says_reaches_the_client() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path());
    let template = "{{ raise_exception('roles must alternate') }}";
    fs::write(dir.path().join("chat_template.jinja"), template).expect("write the template");
    let model = dir.path().to_str().expect("a plain path");
    let up = Up::start(&["--model", model, "--threads", "1"]);
    let client = Client::of(&up).await;
    let message = ChatMessage { role: "user".into(), content: Some("hi".into()), ..ChatMessage::default() };
    let spec = ChatSpec { messages: vec![message], ..ChatSpec::default() };
    let status = client.0.clone().chat(ChatRequest { spec: Some(spec) }).await.expect_err("it raises");
    let why = refusal(&status);
    assert_eq!((why.code, &*why.reason), (Code::InvalidArgument, "INVALID_FIELD"));
    assert!(why.message.contains("roles must alternate"), "{}", why.message);
}
