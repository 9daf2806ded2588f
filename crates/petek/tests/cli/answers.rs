//! `generate` and `chat`: the text, the footer, the lines of JSON, and every way in which an answer fails.

use std::num::NonZeroU64;

use petek_core::refusal::Refusal;
use petek_proto::inference::v1::generation_event::Kind;
use petek_proto::inference::v1::generation_spec::Prompt;
use petek_proto::inference::v1::sequence_finish::Matched;
use petek_proto::inference::v1::{
    Delta, FinishReason, Finished, RequestOptions, RouteReason, SamplingParams, SequenceFinish, Started,
    Timings, TokenIds, TokenLogprob, TopLogprob, Usage,
};
use petek_proto::refusal::status;
use serde_json::json;
use tonic::Status;

use super::router::{Answer, Router, Said};
use super::{Ran, ended, json_lines, petek, read, run, run_with, soon};

/// Beyond 2⁵³: a seed that a JSON number would lose.
const SEED: u64 = u64::MAX - 1;

fn started() -> Said {
    Ok(Kind::Started(Started {
        request_id: "0192".into(),
        model: "demo".into(),
        worker: "w1".into(),
        seed: SEED,
        prompt_tokens: 5,
        cached_tokens: 3,
        max_tokens: 8,
        route_reason: RouteReason::Cache.into(),
        ..Started::default()
    }))
}

fn delta(index: u32, text: &str, first_index: u32, ids: &[u32]) -> Said {
    let (text, token_ids) = (text.into(), ids.to_vec());
    Ok(Kind::Delta(Delta { index, text, token_ids, first_index, ..Delta::default() }))
}

fn finished(completion_tokens: u32, ends: &[(FinishReason, Option<Matched>)]) -> Said {
    let sequences = ends.iter().zip(0..).map(|((reason, matched), index)| SequenceFinish {
        index,
        reason: (*reason).into(),
        matched: matched.clone(),
        seed: SEED,
        ..SequenceFinish::default()
    });
    Ok(Kind::Finished(Finished {
        sequences: sequences.collect(),
        usage: Some(Usage { prompt_tokens: 5, cached_tokens: 3, completion_tokens, ..Usage::default() }),
        timings: Some(Timings { ttft_ms: Some(12.0), total_ms: 112.0, ..Timings::default() }),
        moves: 0,
    }))
}

/// " of honey" in two deltas of two tokens each.
fn honey() -> Answer {
    Answer::of([
        started(),
        delta(0, " of", 0, &[7, 8]),
        delta(0, " honey", 2, &[9, 10]),
        finished(4, &[(FinishReason::Length, None)]),
    ])
}

const HONEY_FOOTER: &str = "[5 prompt tokens, 3 of them cached; 4 new, TTFT 12 ms, 30.0 tokens/s; length; worker \
                            w1, seed 18446744073709551614]\n";

#[test]
fn text_and_footer() {
    let router = Router::answering([honey()]);
    let ran = run(&router, &["generate", "I have a dream"]);
    assert_eq!(ran, Ran { code: Some(0), out: " of honey\n".into(), err: HONEY_FOOTER.into() });
}

#[test]
fn text_goes_through_byte_for_byte_into_a_pipe() {
    let router = Router::answering([Answer::of([
        started(),
        delta(0, "\x1b[1mgüne", 0, &[1]),
        delta(0, "ş\r\n蜂", 1, &[2]),
        finished(2, &[(FinishReason::StopSequence, Some(Matched::StopString("c\nd".into())))]),
    ])]);
    let ran = run(&router, &["generate", "x"]);
    assert_eq!((ran.code, &ran.out[..]), (Some(0), "\x1b[1mgüneş\r\n蜂\n"));
    assert!(ran.err.contains("; stop_sequence \"c\\nd\"; "), "{}", ran.err);
}

#[test]
fn text_comes_while_it_is_made() {
    let (sender, answer) = Answer::fed();
    let router = Router::answering([answer]);
    let child = petek(&router, &["generate", "x"]).spawn().unwrap();
    sender.send(started()).unwrap();
    sender.send(delta(0, "now", 0, &[1])).unwrap();
    let (child, text) = read(child, 3);
    assert_eq!(text, "now");
    sender.send(finished(1, &[(FinishReason::StopEos, Some(Matched::StopTokenId(2)))])).unwrap();
    drop(sender);
    let ran = ended(child);
    assert_eq!((ran.code, &ran.out[..]), (Some(0), "\n"));
    // One token has no rate.
    assert!(ran.err.contains("1 new, TTFT 12 ms; stop_eos 2; worker w1"), "{}", ran.err);
}

#[test]
fn several_answers_stand_one_below_the_other() {
    let ends = [(FinishReason::Length, None), (FinishReason::Length, None)];
    let router = Router::answering([Answer::of([
        started(),
        delta(1, "B", 0, &[2]),
        delta(0, "a", 0, &[1]),
        delta(1, "C", 1, &[3]),
        delta(0, "b", 1, &[2]),
        finished(4, &ends),
    ])]);
    let ran = run(&router, &["generate", "x", "-n", "2"]);
    assert_eq!((ran.code, &ran.out[..]), (Some(0), "--- 0 ---\nab\n--- 1 ---\nBC\n"));
    assert_eq!(router.script.lock().unwrap().generations[0].params.as_ref().unwrap().n, Some(2));
}

#[test]
fn every_flag_arrives() {
    let router = Router::answering([honey()]);
    let words = "generate --ids 1,2,3 --model demo --max-tokens 9 --min-tokens 2 --temperature nan --top-p -1 \
                 --top-k -1 --min-p 0.25 --seed 18446744073709551615 -n 1 --stop -- --stop b --include-stop \
                 --stop-token-ids 4,5 --ignore-eos --logprobs 20 --no-skip-special-tokens --bypass-prefix-cache \
                 --cache-salt s --resume-ids 7,8 --deadline-ms 60000 --json";
    let words: Vec<&str> = words.split_whitespace().collect();
    assert_eq!(run(&router, &words).code, Some(0));
    let spec = router.script.lock().unwrap().generations.remove(0);
    assert_eq!(
        (&spec.model[..], spec.prompt),
        ("demo", Some(Prompt::TokenIds(TokenIds { ids: vec![1, 2, 3] })))
    );
    let mut params = spec.params.unwrap();
    // NaN goes to the server as it is: it refuses.
    assert!(params.temperature.take().unwrap().is_nan());
    let expected = SamplingParams {
        top_p: Some(-1.0),
        top_k: Some(-1),
        min_p: Some(0.25),
        seed: Some(u64::MAX),
        n: Some(1),
        stop: vec!["--".into(), "b".into()],
        include_stop: true,
        stop_token_ids: vec![4, 5],
        ignore_eos: true,
        min_tokens: Some(2),
        max_tokens: Some(9),
        logprobs: Some(20),
        skip_special_tokens: Some(false),
        ..SamplingParams::default()
    };
    assert_eq!(params, expected);
    let expected = RequestOptions {
        deadline_ms: Some(60_000),
        cache_salt: "s".into(),
        bypass_prefix_cache: true,
        resumed_ids: vec![7, 8],
        ..RequestOptions::default()
    };
    assert_eq!(spec.options, Some(expected));
}

#[test]
fn what_is_left_out_stays_out() {
    let router = Router::answering([honey()]);
    assert_eq!(run(&router, &["generate", ""]).code, Some(0));
    let spec = router.script.lock().unwrap().generations.remove(0);
    assert_eq!((&spec.model[..], spec.prompt), ("", Some(Prompt::Text(String::new()))));
    assert_eq!(spec.params, Some(SamplingParams::default()));
    assert_eq!(spec.options, Some(RequestOptions::default()));
}

#[test]
fn json_is_one_event_a_line() {
    let top = TopLogprob { token_id: 7, logprob: -0.1, raw: vec![0xe2].into(), text: "\u{fffd}".into() };
    let logprob = TokenLogprob {
        token_id: 7,
        logprob: Some(-0.1),
        rank: 1,
        raw: vec![0xe2].into(),
        text: "\u{fffd}".into(),
        top: vec![top],
    };
    let logprobs = vec![logprob];
    let with_logprob = Delta { text: "€".into(), token_ids: vec![7], logprobs, ..Delta::default() };
    let router = Router::answering([Answer::of([
        started(),
        Ok(Kind::Delta(with_logprob)),
        finished(1, &[(FinishReason::StopToken, Some(Matched::StopTokenId(7)))]),
    ])]);
    let ran = run(&router, &["generate", "x", "--json", "--logprobs", "1"]);
    assert_eq!((ran.code, &ran.err[..]), (Some(0), ""));
    let lines = json_lines(&ran.out);
    assert_eq!(lines.len(), 3);
    let started = &lines[0]["started"];
    assert_eq!(started["seed"], json!("18446744073709551614"));
    assert_eq!((&started["worker"], &started["route_reason"]), (&json!("w1"), &json!("ROUTE_REASON_CACHE")));
    assert_eq!((&started["cached_tokens"], &started["revision"]), (&json!(3), &json!("")));
    let delta = &lines[1]["delta"];
    assert_eq!((&delta["text"], &delta["token_ids"], &delta["index"]), (&json!("€"), &json!([7]), &json!(0)));
    let token = &delta["logprobs"][0];
    assert_eq!((&token["raw"], &token["rank"]), (&json!("4g=="), &json!(1)));
    // The shortest text that is this float32 again, not what it is as a double.
    assert!(ran.out.contains("\"logprob\":-0.1,"), "{}", ran.out);
    assert_eq!(token["top"][0]["token_id"], json!(7));
    let finished = &lines[2]["finished"];
    assert_eq!(finished["sequences"][0]["reason"], json!("FINISH_REASON_STOP_TOKEN"));
    assert_eq!(finished["sequences"][0]["stop_token_id"], json!(7));
    assert_eq!(finished["usage"]["completion_tokens"], json!(1));
    assert_eq!(finished["timings"]["ttft_ms"], json!(12.0));
}

/// The one line that a person gets.
#[track_caller]
fn check_refused(answer: Answer, expected: &str) {
    let router = Router::answering([answer]);
    let ran = run(&router, &["generate", "x"]);
    assert_eq!((ran.code, &ran.out[..], &ran.err[..]), (Some(5), "", &format!("petek: {expected}\n")[..]));
}

#[test]
fn refusals_say_what_why_where_and_what_to_do() {
    let invalid = Refusal::invalid("spec.params.stop[3]", "must not be empty");
    let expected = "spec.params.stop[3]: must not be empty (INVALID_FIELD, spec.params.stop[3]); see --stop";
    check_refused(Answer::Refused(status(&invalid)), expected);
    // The same when the stream had begun.
    check_refused(Answer::of([Err(status(&invalid))]), expected);
    let retry_ms = NonZeroU64::new(250).unwrap();
    check_refused(
        Answer::Refused(status(&Refusal::QueueFull { waiting: 8, retry_ms })),
        "8 requests wait, as many as the queue holds; try again (QUEUE_FULL); the same again may work in 250 ms",
    );
    check_refused(
        Answer::Refused(status(&Refusal::UnknownModel { model: "lama".into(), served: "demo".into() })),
        "no model is called \"lama\"; served here: demo (UNKNOWN_MODEL, model); `petek models` lists the models",
    );
    check_refused(Answer::Refused(status(&Refusal::Internal)), &format!("{} (INTERNAL)", Refusal::Internal));
    // Not petek's own: a proxy, say. Its text commands no terminal.
    let foreign = Status::permission_denied("who\x1b[2Jare\nyou");
    check_refused(Answer::Refused(foreign), "who\\u{1b}[2Jare\\nyou (PERMISSION_DENIED)");
}

#[test]
fn a_lost_worker_is_gone_on_from() {
    let lost = || Err(status(&Refusal::WorkerLost { output_tokens: 2 }));
    let broken = || Answer::of([started(), delta(0, " of", 0, &[7, 8]), lost()]);
    let router = Router::answering([broken(), Answer::of([started(), lost()]), honey(), broken()]);
    let ran = run(&router, &["generate", "x"]);
    assert_eq!((ran.code, &ran.out[..]), (Some(5), " of\n"));
    let hint = "; to go on, the same command with --seed 18446744073709551614 --resume-ids 7,8\n";
    assert!(ran.err.contains("(WORKER_LOST); ") && ran.err.ends_with(hint), "{}", ran.err);

    let ran = run(&router, &["generate", "x"]);
    let hint = "; the same command with --seed 18446744073709551614 gives the same answer\n";
    assert!(ran.err.ends_with(hint), "{}", ran.err);

    // Going on: the ids so far are not new, and they stand before those that come.
    let words = ["generate", "x", "--seed", "1", "--seed", "2", "--resume-ids", "9", "--resume-ids", "5,6"];
    let ran = run(&router, &words);
    assert!(ran.err.contains("; 2 new, TTFT 12 ms, 10.0 tokens/s; "), "{}", ran.err);
    let ran = run(&router, &words);
    assert!(ran.err.ends_with(" --resume-ids 5,6,7,8\n"), "{}", ran.err);
    let spec = router.script.lock().unwrap().generations.pop().unwrap();
    assert_eq!((spec.params.unwrap().seed, spec.options.unwrap().resumed_ids), (Some(2), vec![5, 6]));
}

#[test]
fn a_lost_answer_in_json_ends_with_an_error() {
    let lost = status(&Refusal::WorkerLost { output_tokens: 2 });
    let router = Router::answering([Answer::of([started(), delta(0, " of", 0, &[7, 8]), Err(lost)])]);
    let ran = run(&router, &["generate", "x", "--json"]);
    assert_eq!(ran.code, Some(5));
    assert!(ran.err.contains("--resume-ids 7,8"), "{}", ran.err);
    let lines = json_lines(&ran.out);
    let error = &lines[2]["error"];
    assert_eq!((&error["code"], &error["reason"]), (&json!("UNAVAILABLE"), &json!("WORKER_LOST")));
    assert_eq!((&error["retry_ms"], &error["metadata"]["output_tokens"]), (&json!("0"), &json!("2")));
    assert_eq!(error["resume"], json!({ "seed": "18446744073709551614", "resumed_ids": [7, 8] }));
}

#[test]
fn what_the_server_will_not_go_on_with_is_not_gone_on_from() {
    let failed = Refusal::NumericalError { position: 2 };
    let router =
        Router::answering([Answer::of([started(), delta(0, " of", 0, &[7, 8]), Err(status(&failed))])]);
    let ran = run(&router, &["generate", "x"]);
    assert_eq!((ran.code, &ran.out[..]), (Some(5), " of\n"));
    assert_eq!(ran.err, format!("petek: {failed} (NUMERICAL_ERROR)\n"));
}

#[test]
fn several_answers_are_not_gone_on_from() {
    let lost = Err(status(&Refusal::WorkerLost { output_tokens: 1 }));
    let router = Router::answering([Answer::of([started(), delta(0, "a", 0, &[1]), lost])]);
    let ran = run(&router, &["generate", "x", "-n", "2"]);
    assert_eq!((ran.code, ran.err.contains("--resume-ids")), (Some(5), false), "{}", ran.err);
}

#[test]
fn a_stream_without_an_end_is_an_error() {
    let router = Router::answering([Answer::of([started(), delta(0, " of", 0, &[7, 8])])]);
    let ran = run(&router, &["generate", "x"]);
    assert_eq!((ran.code, &ran.out[..]), (Some(5), " of\n"));
    let expected = "petek: the stream ended in the middle of the answer (UNAVAILABLE); to go on, the same command \
                    with --seed 18446744073709551614 --resume-ids 7,8\n";
    assert_eq!(ran.err, expected);
}

#[test]
fn a_router_that_dies_is_gone_on_from() {
    let (sender, answer) = Answer::fed();
    let router = Router::answering([answer]);
    let child = petek(&router, &["generate", "x"]).spawn().unwrap();
    sender.send(started()).unwrap();
    sender.send(delta(0, "now", 0, &[7])).unwrap();
    let (child, _) = read(child, 3);
    drop(router);
    let ran = ended(child);
    assert_eq!(ran.code, Some(5));
    assert!(ran.err.ends_with(" --seed 18446744073709551614 --resume-ids 7\n"), "{}", ran.err);
    assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
}

#[test]
fn nobody_there_is_one_line() {
    let router = Router::answering([]);
    let address = router.address.clone();
    let mut command = petek(&router, &["generate", "x"]);
    drop(router);
    let ran = ended(command.spawn().unwrap());
    assert_eq!((ran.code, &ran.out[..]), (Some(4), ""));
    assert!(ran.err.starts_with(&format!("petek: no router answers at {address}: ")), "{}", ran.err);
    assert!(ran.err.contains("`petek up`") && ran.err.lines().count() == 1, "{}", ran.err);
}

#[test]
fn a_reader_that_goes_ends_the_command_and_the_request() {
    let (sender, answer) = Answer::fed();
    let router = Router::answering([answer]);
    let child = petek(&router, &["generate", "x"]).spawn().unwrap();
    sender.send(started()).unwrap();
    sender.send(delta(0, "line\n", 0, &[1])).unwrap();
    let (mut child, line) = read(child, 5);
    assert_eq!(line, "line\n");
    drop(child.stdout.take());
    // More text finds nobody to read it, and the server sees that the client has gone.
    sender.send(delta(0, "more", 1, &[2])).unwrap();
    let ran = ended(child);
    assert_eq!((ran.code, &ran.err[..]), (Some(0), ""));
    gone(&sender);
}

#[test]
fn interrupt_ends_the_command_and_the_request() {
    let (sender, answer) = Answer::fed();
    let router = Router::answering([answer]);
    let child = petek(&router, &["generate", "x"]).spawn().unwrap();
    sender.send(started()).unwrap();
    sender.send(delta(0, "now", 0, &[1])).unwrap();
    let (child, _) = read(child, 3);
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    assert_eq!(ended(child).code, Some(130));
    gone(&sender);
}

/// Waits until the server knows that the client has gone.
fn gone(sender: &tokio::sync::mpsc::UnboundedSender<Said>) {
    let sender = sender.clone();
    soon(move || tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(sender.closed()));
}

#[test]
fn a_full_disk_is_an_error() {
    let router = Router::answering([honey()]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let ran = ended(petek(&router, &["generate", "x"]).stdout(full).spawn().unwrap());
    assert_eq!(ran.code, Some(4));
    assert!(ran.err.starts_with("petek: write to standard output: "), "{}", ran.err);
}

#[test]
fn usage_is_checked_before_anything_is_asked() {
    let router = Router::answering([]);
    for words in [
        &["generate"][..],
        &["generate", "x", "--ids", "1"],
        &["generate", "x", "--resume-ids", "1;2"],
        &["generate", "x", "--seed", "-1"],
        &["generate", "x", "--logprobs", "2"],
        &["generate", "x", "--endpoint", "https://127.0.0.1:1"],
        &["chat", "-n", "2"],
        &["chat", "--resume-ids", "1"],
    ] {
        let ran = run(&router, words);
        assert_eq!((ran.code, &ran.out[..]), (Some(2), ""), "{words:?}: {}", ran.err);
    }
    let script = router.script.lock().unwrap();
    assert!(script.generations.is_empty() && script.chats.is_empty());
}

fn said(chats: &[petek_proto::inference::v1::ChatSpec], at: usize) -> Vec<(&str, &str)> {
    chats[at].messages.iter().map(|message| (&message.role[..], message.content())).collect()
}

#[test]
fn a_conversation_remembers_until_it_is_reset() {
    let router = Router::answering([honey(), honey(), honey()]);
    let lines = "What is it?\n\r\n  \nMore\r\n/reset\nAnew\n/quit\nnever asked\n";
    let ran = run_with(&router, &["chat", "--system", "Be kind.", "--temperature", "0"], lines);
    assert_eq!((ran.code, &ran.out[..]), (Some(0), " of honey\n of honey\n of honey\n"));
    assert_eq!(ran.err, HONEY_FOOTER.repeat(3));
    let chats = &router.script.lock().unwrap().chats;
    let (system, first, answer) =
        (("system", "Be kind."), ("user", "What is it?"), ("assistant", " of honey"));
    assert_eq!(said(chats, 0), [system, first]);
    assert_eq!(said(chats, 1), [system, first, answer, ("user", "More")]);
    assert_eq!(said(chats, 2), [system, ("user", "Anew")]);
    assert_eq!((chats.len(), chats[2].params.as_ref().unwrap().temperature), (3, Some(0.0)));
}

#[test]
fn a_conversation_of_one_turn() {
    let lost = Err(status(&Refusal::WorkerLost { output_tokens: 2 }));
    let broken = Answer::of([started(), delta(0, " of", 0, &[7, 8]), lost]);
    let router = Router::answering([honey(), broken]);
    let words = ["chat", "--once", "Hello", "--system", "Be kind."];
    // Standard input is not looked at.
    let ran = run_with(&router, &words, "not a turn\n");
    assert_eq!((ran.code, &ran.out[..]), (Some(0), " of honey\n"));
    assert_eq!(said(&router.script.lock().unwrap().chats, 0), [("system", "Be kind."), ("user", "Hello")]);
    let ran = run(&router, &words);
    assert!(ran.code == Some(5) && ran.err.ends_with(" --resume-ids 7,8\n"), "{}", ran.err);
}

#[test]
fn a_conversation_ends_at_an_answer_that_fails() {
    let retry_ms = NonZeroU64::new(250).unwrap();
    let full = Answer::Refused(status(&Refusal::QueueFull { waiting: 8, retry_ms }));
    let router = Router::answering([honey(), full, honey()]);
    let ran = run_with(&router, &["chat"], "one\ntwo\nthree\n");
    assert_eq!((ran.code, &ran.out[..]), (Some(5), " of honey\n"));
    assert!(ran.err.contains("(QUEUE_FULL)"), "{}", ran.err);
    assert_eq!(router.script.lock().unwrap().chats.len(), 2);
}

#[test]
fn a_conversation_that_keeps_going_goes_on_where_it_broke_off() {
    let lost = || Err(status(&Refusal::WorkerLost { output_tokens: 2 }));
    let retry_ms = NonZeroU64::new(250).unwrap();
    let full = Answer::Refused(status(&Refusal::QueueFull { waiting: 8, retry_ms }));
    let router = Router::answering([
        full,
        Answer::of([started(), delta(0, "a", 0, &[1]), lost()]),
        Answer::of([started(), delta(0, "b", 1, &[2]), lost()]),
        Answer::of([started(), delta(0, "c", 2, &[3]), finished(3, &[(FinishReason::Length, None)])]),
        honey(),
    ]);
    let lines = "refused\n/resume\nasked\n/resume\n/resume\nnext\n";
    let ran = run_with(&router, &["chat", "--keep-going"], lines);
    assert_eq!((ran.code, &ran.out[..]), (Some(0), "a\nb\nc\n of honey\n"));
    assert!(ran.err.contains("petek: no answer broke off\n"), "{}", ran.err);
    assert!(ran.err.contains("(WORKER_LOST); /resume goes on where it stopped\n"), "{}", ran.err);
    let chats = &router.script.lock().unwrap().chats;
    // What was refused is not part of the conversation; what went on twice is one answer.
    assert_eq!(said(chats, 3), [("user", "asked")]);
    assert_eq!(said(chats, 4), [("user", "asked"), ("assistant", "abc"), ("user", "next")]);
    let asked = |at: usize| {
        let resumed = &chats[at].options.as_ref().unwrap().resumed_ids;
        (chats[at].params.as_ref().unwrap().seed, &resumed[..])
    };
    assert_eq!([asked(1), asked(2), asked(3)], [(None, &[][..]), (Some(SEED), &[1]), (Some(SEED), &[1, 2])]);
    assert_eq!(asked(4), (None, &[][..]));
}

#[test]
fn a_new_turn_gives_up_the_answer_that_broke_off() {
    let lost = Err(status(&Refusal::WorkerLost { output_tokens: 1 }));
    let router = Router::answering([Answer::of([started(), delta(0, "a", 0, &[1]), lost]), honey(), honey()]);
    let ran = run_with(&router, &["chat", "--keep-going"], "given up\nother\n/resume\nnext\n");
    assert_eq!((ran.code, &ran.out[..]), (Some(0), "a\n of honey\n of honey\n"));
    assert!(ran.err.contains("petek: no answer broke off\n"), "{}", ran.err);
    let chats = &router.script.lock().unwrap().chats;
    assert_eq!(said(chats, 2), [("user", "other"), ("assistant", " of honey"), ("user", "next")]);
}
