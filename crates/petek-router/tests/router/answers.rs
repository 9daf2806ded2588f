//! What a request gets: text, ids and numbers, whole and once.

use std::collections::HashSet;

use petek_core::seed::sequence_seed;
use petek_proto::inference::v1::sequence_finish::Matched;
use petek_proto::inference::v1::{
    ChatMessage, ChatRequest, ChatSpec, DetokenizeRequest, FinishReason, GenerationSpec, GetModelRequest,
    ListModelsRequest, RequestOptions, RouteReason, SamplingParams, TokenizeRequest, tokenize_request,
};

use crate::support::{
    AfterLast, Cluster, EOS, NAME, Script, TOKENS, Worker, X, refusal, settings, spec, stream,
};
use crate::{both, params, plays};

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
    assert_eq!(
        (started.seed, started.prompt_tokens, started.max_tokens),
        (5, 3, crate::support::CONTEXT - 3)
    );
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
    // abc | de with stop "cd"; the worker does not end it by itself.
    let mut workers = [Worker::start("w0", plays(&[3, 4, X]))];
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
    assert_eq!(
        (&tokenized.token_ids[..], tokenized.context_tokens),
        (&[8, 9, EOS][..], crate::support::CONTEXT)
    );
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
