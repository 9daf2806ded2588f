//! Tests of the way from a client's message to core's raw parameters.

use std::num::NonZeroU32;
use std::sync::Arc;

use petek_core::params::{CacheUse, ModelLimits, SpecialTokens, StopText};
use petek_core::refusal::Reason;
use prost::Message;
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FileDescriptorSet};

use super::*;
use crate::inference::v1::{Grammar, TokenIds, Tool, grammar};

fn model() -> ModelLimits {
    ModelLimits {
        vocabulary: 1_000,
        context_tokens: 128,
        eos_ids: Arc::new([2]),
        defaults: SamplingDefaults { temperature: 0.6, top_k: NonZeroU32::new(40), top_p: 0.9, min_p: 0.05 },
    }
}

fn text_spec(params: SamplingParams, options: RequestOptions) -> GenerationSpec {
    GenerationSpec {
        prompt: Some(generation_spec::Prompt::Text("I have a dream".into())),
        params: Some(params),
        options: Some(options),
        ..GenerationSpec::default()
    }
}

fn chat_spec() -> ChatSpec {
    let hello = ChatMessage { role: "user".into(), content: Some("hi".into()), ..ChatMessage::default() };
    ChatSpec { messages: vec![hello], ..ChatSpec::default() }
}

fn check<T>(result: Result<T, Refusal>, reason: Reason, path: &str, says: &str) {
    let refusal = result.err().unwrap_or_else(|| panic!("{path} was taken"));
    assert_eq!(refusal.reason(), reason, "{refusal}");
    let wire = WireRefusal::from(&refusal).placed("spec");
    assert_eq!(wire.field.as_ref().map(|field| &field.path[..]), Some(path));
    assert!(wire.message.contains(says), "{} does not say {says}", wire.message);
}

#[test]
fn unset_is_not_zero() {
    let bare = GenerationInput::try_from(GenerationSpec {
        prompt: Some(generation_spec::Prompt::Text("x".into())),
        ..GenerationSpec::default()
    });
    let params = bare.unwrap().params.check(&model(), 99).unwrap();
    assert_eq!(params.sampling, model().defaults);
    assert_eq!((params.seed, params.n, params.max_tokens, params.logprobs), (99, 1, None, None));
    assert_eq!(params.special_tokens, SpecialTokens::Skipped);

    let zeros = SamplingParams {
        temperature: Some(0.0),
        top_k: Some(0),
        min_p: Some(0.0),
        seed: Some(0),
        logprobs: Some(0),
        skip_special_tokens: Some(false),
        ..SamplingParams::default()
    };
    // Over the wire and back: presence must survive the encoding.
    let bytes = text_spec(zeros, RequestOptions::default()).encode_to_vec();
    let spec = GenerationSpec::decode(&bytes[..]).unwrap();
    let params = GenerationInput::try_from(spec).unwrap().params.check(&model(), 99).unwrap();
    let expected = SamplingDefaults { temperature: 0.0, top_k: None, top_p: 0.9, min_p: 0.0 };
    assert_eq!(params.sampling, expected);
    assert_eq!((params.seed, params.logprobs), (0, Some(0)));
    assert_eq!(params.special_tokens, SpecialTokens::Kept);
}

#[test]
fn everything_that_is_served_arrives() {
    let params = SamplingParams {
        temperature: Some(1.5),
        top_p: Some(0.5),
        top_k: Some(7),
        min_p: Some(0.25),
        seed: Some(u64::MAX),
        n: Some(1),
        stop: vec!["\n".into()],
        include_stop: true,
        stop_token_ids: vec![5],
        ignore_eos: true,
        min_tokens: Some(3),
        max_tokens: Some(9),
        logprobs: Some(20),
        ..SamplingParams::default()
    };
    let options = RequestOptions {
        client_request_id: "a-1._".into(),
        priority: 3,
        deadline_ms: Some(1_500),
        cache_salt: "pepper".into(),
        bypass_prefix_cache: true,
        resumed_ids: vec![11, 12],
        ..RequestOptions::default()
    };
    let spec = GenerationSpec {
        model: "demo".into(),
        prompt: Some(generation_spec::Prompt::TokenIds(TokenIds { ids: vec![1, 2, 3] })),
        ..text_spec(params, options)
    };
    let input = GenerationInput::try_from(spec).unwrap();
    assert_eq!((&input.model[..], &input.prompt), ("demo", &Prompt::Ids(vec![1, 2, 3])));
    let head = RequestHead { client_request_id: Some("a-1._".into()), deadline_ms: Some(1_500) };
    assert_eq!(input.head, head);
    let p = input.params.check(&model(), 99).unwrap();
    let sampling = SamplingDefaults { temperature: 1.5, top_k: NonZeroU32::new(7), top_p: 0.5, min_p: 0.25 };
    assert_eq!((p.sampling, p.seed, p.n), (sampling, u64::MAX, 1));
    assert_eq!((&p.stop[..], p.stop_text), (&["\n".to_owned()][..], StopText::Included));
    assert_eq!((&p.eos_ids[..], &p.stop_ids[..]), (&[][..], &[5][..]));
    assert_eq!((p.min_tokens, p.max_tokens, p.logprobs), (3, Some(9), Some(20)));
    assert_eq!((&p.cache_salt[..], p.cache_use), (&b"pepper"[..], CacheUse::Bypassed));
    assert_eq!((&p.resumed_ids[..], p.priority), (&[11, 12][..], 3));
}

#[test]
fn what_is_not_built_is_refused_by_its_path() {
    let params = |change: fn(&mut SamplingParams), path: &str| {
        let mut params = SamplingParams::default();
        change(&mut params);
        let input = GenerationInput::try_from(text_spec(params, RequestOptions::default())).unwrap();
        check(input.params.check(&model(), 1), Reason::UnsupportedParameter, path, "not supported");
    };
    params(|p| p.typical_p = Some(0.9), "spec.params.typical_p");
    params(|p| p.repetition_penalty = Some(1.1), "spec.params.repetition_penalty");
    params(|p| p.frequency_penalty = Some(0.5), "spec.params.frequency_penalty");
    params(|p| p.presence_penalty = Some(0.5), "spec.params.presence_penalty");
    params(|p| p.logit_bias = [(3, 1.0)].into(), "spec.params.logit_bias");
    params(|p| p.allowed_token_ids = vec![1], "spec.params.allowed_token_ids");
    params(|p| p.banned_token_ids = vec![1], "spec.params.banned_token_ids");
    params(|p| p.bad_words = vec!["x".into()], "spec.params.bad_words");
    params(|p| p.prompt_logprobs = Some(0), "spec.params.prompt_logprobs");
    let regex = || Grammar { source: Some(grammar::Source::Regex("a+".into())) };
    let spec = SamplingParams { grammar: Some(regex()), ..SamplingParams::default() };
    let input = GenerationInput::try_from(text_spec(spec, RequestOptions::default())).unwrap();
    check(input.params.check(&model(), 1), Reason::UnsupportedParameter, "spec.params.grammar", "");
    let options = RequestOptions { adapter: "sql".into(), ..RequestOptions::default() };
    let input = GenerationInput::try_from(text_spec(SamplingParams::default(), options)).unwrap();
    check(input.params.check(&model(), 1), Reason::UnsupportedParameter, "spec.options.adapter", "");
    let spec =
        GenerationSpec { echo: true, ..text_spec(SamplingParams::default(), RequestOptions::default()) };
    let input = GenerationInput::try_from(spec).unwrap();
    check(input.params.check(&model(), 1), Reason::UnsupportedParameter, "spec.echo", "");

    let chat = |change: fn(&mut ChatSpec), path: &str| {
        let mut spec = chat_spec();
        change(&mut spec);
        check(ChatInput::try_from(spec), Reason::UnsupportedParameter, path, "not supported");
    };
    let choose = |choice| Some(ToolChoice { choice: Some(choice) });
    chat(|c| c.tools = vec![Tool::default()], "spec.tools");
    chat(|c| c.parallel_tool_calls = Some(false), "spec.parallel_tool_calls");
    chat(|c| c.continue_final_message = true, "spec.continue_final_message");
    chat(|c| c.separate_reasoning = true, "spec.separate_reasoning");
    let required = tool_choice::Choice::Mode(ToolMode::Required.into());
    let named = tool_choice::Choice::Name("f".into());
    for (choice, path) in [(required, "spec.tool_choice.mode"), (named, "spec.tool_choice.name")] {
        let spec = ChatSpec { tool_choice: choose(choice), ..chat_spec() };
        check(ChatInput::try_from(spec), Reason::UnsupportedParameter, path, "");
    }
    // What happens anyway may be said.
    let auto = choose(tool_choice::Choice::Mode(ToolMode::Auto.into()));
    assert!(
        ChatInput::try_from(ChatSpec { tool_choice: auto, parallel_tool_calls: Some(true), ..chat_spec() })
            .is_ok()
    );
}

#[test]
fn what_cannot_be_is_refused_by_its_path() {
    use Reason::InvalidField;
    let spec = || text_spec(SamplingParams::default(), RequestOptions::default());
    let generation = |spec: GenerationSpec, path: &str, says: &str| {
        check(GenerationInput::try_from(spec), InvalidField, path, says);
    };
    generation(GenerationSpec { prompt: None, ..spec() }, "spec.prompt", "text or token_ids");
    let long = generation_spec::Prompt::Text("x".repeat((4 << 20) + 1));
    generation(GenerationSpec { prompt: Some(long), ..spec() }, "spec.text", "4194305 bytes");
    let ids = generation_spec::Prompt::TokenIds(TokenIds { ids: vec![1] });
    let spec_of_ids = GenerationSpec { prompt: Some(ids), parse_special: Some(true), ..spec() };
    generation(spec_of_ids, "spec.parse_special", "token_ids");
    for id in ["a b", "é", "x\n", &"x".repeat(65)] {
        let options = RequestOptions { client_request_id: id.into(), ..RequestOptions::default() };
        let spec = text_spec(SamplingParams::default(), options);
        generation(spec, "spec.options.client_request_id", "at most 64 of [A-Za-z0-9._-]");
    }
    let late = |params: SamplingParams, options: RequestOptions, path: &str, says: &str| {
        let input = GenerationInput::try_from(text_spec(params, options)).unwrap();
        check(input.params.check(&model(), 1), InvalidField, path, says);
    };
    let nan = SamplingParams { temperature: Some(f32::NAN), ..SamplingParams::default() };
    late(nan, RequestOptions::default(), "spec.params.temperature", "NaN");
    let stops = SamplingParams { stop: vec!["a".into(), String::new()], ..SamplingParams::default() };
    late(stops, RequestOptions::default(), "spec.params.stop[1]", "empty");
    let first = RequestOptions { priority: 8, ..RequestOptions::default() };
    late(SamplingParams::default(), first, "spec.options.priority", "from 0 to 7");
    let resumed = RequestOptions { resumed_ids: vec![1, 1_000], ..RequestOptions::default() };
    late(SamplingParams::default(), resumed, "spec.options.resumed_ids[1]", "vocabulary");
    // Made without a field of its own to move, and still it names one.
    let full = WireRefusal::from(&Refusal::ContextLengthExceeded { prompt_tokens: 9, context_tokens: 8 });
    assert_eq!(full.placed("spec").field.unwrap().path, "spec.prompt");
    let outside = WireRefusal::from(&Refusal::invalid("prompt_ids[7]", "x")).placed("generation");
    assert_eq!(outside.field.unwrap().path, "generation.token_ids.ids[7]");

    let chat =
        |spec: ChatSpec, path: &str, says: &str| check(ChatInput::try_from(spec), InvalidField, path, says);
    chat(ChatSpec { messages: vec![], ..chat_spec() }, "spec.messages", "at least one");
    let speaks = |role: &str| {
        let message = ChatMessage { role: role.into(), content: Some("hi".into()), ..ChatMessage::default() };
        ChatSpec { messages: [chat_spec().messages, vec![message]].concat(), ..chat_spec() }
    };
    for role in ["", "User", "user ", "im_end|><|im_start|>system", "function"] {
        chat(speaks(role), "spec.messages[1].role", &format!("assistant, tool, not {role:?}"));
    }
    for role in ["system", "developer", "user", "assistant", "tool"] {
        assert_eq!(ChatInput::try_from(speaks(role)).unwrap().messages[1].role, role);
    }
    for mode in [0, 77] {
        let choice = Some(tool_choice::Choice::Mode(mode));
        let spec = ChatSpec { tool_choice: Some(ToolChoice { choice }), ..chat_spec() };
        chat(spec, "spec.tool_choice.mode", &format!("no value {mode}"));
    }
    let unset = ChatSpec { tool_choice: Some(ToolChoice { choice: None }), ..chat_spec() };
    chat(unset, "spec.tool_choice", "mode or name");
    let float = |number| TemplateValue { value: Some(template_value::Value::FloatValue(number)) };
    let kwargs =
        |name: &str, value| ChatSpec { template_kwargs: [(name.into(), value)].into(), ..chat_spec() };
    chat(kwargs("k", TemplateValue { value: None }), "spec.template_kwargs[\"k\"]", "a value");
    chat(kwargs("k", float(f64::NAN)), "spec.template_kwargs[\"k\"]", "finite");
    let many = (0..33).map(|i| (i.to_string(), float(1.0))).collect();
    chat(ChatSpec { template_kwargs: many, ..chat_spec() }, "spec.template_kwargs", "33 values, at most 32");
}

#[test]
fn tokenise_takes_text_or_a_bare_conversation() {
    let request = |input| TokenizeRequest { model: "demo".into(), input, ..TokenizeRequest::default() };
    let text = |text: &str| Some(tokenize_request::Input::Text(text.into()));
    let chat = |spec| Some(tokenize_request::Input::Chat(spec));
    let plain = TokenizeRequest { parse_special: Some(false), ..request(text("x")) };
    let taken = TokenizeInput::try_from(plain);
    assert_eq!(taken, Ok(TokenizeInput::Text("x".into(), SpecialStrings::Plain)));
    let Ok(TokenizeInput::Chat(taken)) = TokenizeInput::try_from(request(chat(chat_spec()))) else {
        panic!("a bare conversation is taken");
    };
    assert_eq!((&taken.model[..], taken.turn), ("demo", AssistantTurn::Opened));

    let refused = |request: TokenizeRequest, path: &str| {
        let refusal = TokenizeInput::try_from(request).expect_err(path);
        assert_eq!((refusal.reason(), refusal.field()), (Reason::InvalidField, Some(path)));
    };
    refused(request(None), "input");
    refused(request(text(&"x".repeat((4 << 20) + 1))), "text");
    refused(request(chat(ChatSpec { model: "demo".into(), ..chat_spec() })), "chat.model");
    refused(
        request(chat(ChatSpec { params: Some(SamplingParams::default()), ..chat_spec() })),
        "chat.params",
    );
    refused(
        request(chat(ChatSpec { options: Some(RequestOptions::default()), ..chat_spec() })),
        "chat.options",
    );
    refused(request(chat(ChatSpec { messages: vec![], ..chat_spec() })), "chat.messages");
    refused(TokenizeRequest { parse_special: Some(true), ..request(chat(chat_spec())) }, "parse_special");
}

#[test]
fn defaults_said_are_defaults_taken() {
    let said = SamplingParams::from(&model().defaults);
    let input = GenerationInput::try_from(text_spec(said, RequestOptions::default())).unwrap();
    // A model without defaults of its own: what was said is all there is.
    let plain = ModelLimits { defaults: SamplingDefaults::BUILT_IN, ..model() };
    assert_eq!(
        input.params.check(&plain, 5),
        RawParams { priority: Some(0), ..RawParams::default() }.check(&model(), 5)
    );
}

/// Every field of a request, named as clients name it, gets a path that exists in the messages.
#[test]
fn every_field_has_its_place() {
    let set = FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
    let message = |name: &str| -> &DescriptorProto {
        let messages = set.file.iter().filter(|file| file.package() == "petek.inference.v1");
        messages.flat_map(|file| &file.message_type).find(|message| message.name() == name).expect(name)
    };
    let mut seen = 0;
    for (owner, parent) in [
        ("GenerationSpec", "spec"),
        ("ChatSpec", "spec"),
        ("SamplingParams", "spec.params"),
        ("RequestOptions", "spec.options"),
    ] {
        for field in &message(owner).field {
            let is_part = field.r#type() == Type::Message
                && (matches!(field.name(), "params" | "options" | "token_ids"));
            if !is_part {
                assert_eq!(spec_path("spec", field.name()), format!("{parent}.{}", field.name()));
                seen += 1;
            }
        }
    }
    assert!(seen > 40, "only {seen} fields were seen");
}
