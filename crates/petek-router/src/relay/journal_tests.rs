use petek_core::params::{ModelLimits, RawParams, SamplingDefaults};
use petek_proto::worker::v1::Logprobs;
use petek_text::Tokenizer;

use super::*;

#[path = "../../tests/support/chain.rs"]
mod chain;

const MS: Duration = Duration::from_millis(1);
const TOKENS: &[&[u8]] = &[b"ab", b"cd", b"abc", b"de", b"<eos>", b"\xE2\x82", b"\xAC", b"x"];
const EOS: TokenId = 4;

/// A journal beside the worker's side of its talk, with times that go up by a millisecond.
struct Talk {
    journal: Journal,
    attempt: u32,
    at_ms: u32,
}

fn placement(worker: &str) -> Placement {
    Placement {
        worker: worker.into(),
        numerics_id: "n".repeat(32),
        reason: RouteReason::NearTie,
        predicted_tokens: 3,
    }
}

/// Dispatched and admitted.
fn talk(raw: RawParams) -> Talk {
    let mut talk = dispatched(raw);
    talk.admit();
    talk
}

fn dispatched(raw: RawParams) -> Talk {
    let limits = ModelLimits {
        vocabulary: TOKENS.len() as u32,
        context_tokens: 64,
        eos_ids: [EOS].into(),
        defaults: SamplingDefaults::BUILT_IN,
    };
    let params = raw.check(&limits, 7).expect("good parameters");
    let tokenizer = Tokenizer::load(&chain::tokenizer_json(TOKENS), &|| Duration::ZERO).expect("a good file");
    let asked = Asked {
        request_id: "r".into(),
        client_request_id: String::new(),
        model: "m".into(),
        revision: "0".repeat(64),
        prompt_tokens: 5,
        max_tokens: params.max_tokens_after(&[0; 5], &limits).expect("it fits"),
        params,
        tokens: tokenizer.tokens().clone(),
    };
    let patience = Patience { bytes: 400, time: 1_000 * MS };
    let mut talk = Talk { journal: Journal::new(asked, patience).expect("good stops"), attempt: 0, at_ms: 0 };
    talk.dispatch("w1");
    talk
}

impl Talk {
    fn now(&mut self) -> Duration {
        self.at_ms += 1;
        self.at_ms * MS
    }

    fn dispatch(&mut self, worker: &str) -> Vec<SubmitSequence> {
        let (attempt, sequences) = self.journal.begin_attempt(placement(worker)).expect("it is not over");
        self.attempt = attempt;
        sequences
    }

    fn admit(&mut self) {
        let now = self.now();
        let admitted = Admitted { dispatch: 1, cached_tokens: 2, queue_ms: 0.5 };
        self.journal.admitted(self.attempt, admitted, now);
    }

    fn tokens(&mut self, index: u32, first_index: u32, ids: &[TokenId]) {
        let now = self.now();
        let entry = StepEntry { dispatch: 1, index, first_index, ids: ids.into(), logprobs: None };
        self.journal.tokens(self.attempt, entry, now);
    }

    fn finished(&mut self, index: u32, reason: FinishReason) {
        let now = self.now();
        let usage = Some(worker::Usage { prefill_ms: 4.0, ..Default::default() });
        let finished =
            WorkerFinished { dispatch: 1, index, reason: reason.into(), usage, ..WorkerFinished::default() };
        self.journal.finished(self.attempt, finished, now);
    }

    /// All that the client gets by now: the deltas of sequence 0 joined, and the last event.
    fn read(&mut self) -> (String, Vec<TokenId>, Option<Outgoing>) {
        let (mut text, mut ids) = (String::new(), Vec::new());
        let now = self.at_ms * MS;
        while let Some(next) = self.journal.take(now) {
            match next {
                Outgoing::Started(_) => {}
                Outgoing::Delta(delta) if delta.index == 0 => {
                    text.push_str(&delta.text);
                    ids.extend(delta.token_ids);
                }
                Outgoing::Delta(_) => {}
                last => return (text, ids, Some(last)),
            }
        }
        (text, ids, None)
    }
}

fn finish_of(last: Option<Outgoing>) -> Finished {
    match last {
        Some(Outgoing::Finished(finished)) => finished,
        other => panic!("not finished: {other:?}"),
    }
}

fn reason_of(last: Option<Outgoing>) -> String {
    match last {
        Some(Outgoing::Failed(refusal)) => refusal.reason,
        other => panic!("not failed: {other:?}"),
    }
}

fn stops(stop: &str) -> RawParams {
    RawParams { stop: vec![stop.into()], max_tokens: Some(6), ..RawParams::default() }
}

#[test]
fn a_request_goes_all_the_way() {
    let mut talk = talk(RawParams { max_tokens: Some(3), ..RawParams::default() });
    let effects = talk.journal.take_effects();
    assert_eq!(effects.cached, Some((3, 2)));
    talk.tokens(0, 0, &[0]);
    talk.tokens(0, 1, &[1, 3]);
    talk.finished(0, FinishReason::Length);
    let effects = talk.journal.take_effects();
    assert_eq!((effects.ttft, &effects.gaps[..], effects.prefilled), (Some(2 * MS), &[(2, MS)][..], true));
    let account = Account { outcome: Outcome::Finished, prompt_tokens: 5, output_tokens: 3, total: 4 * MS };
    assert_eq!((effects.over, effects.cancel), (Some(account), vec![]));
    let (text, ids, last) = talk.read();
    assert_eq!((&*text, &ids[..]), ("abcdde", &[0, 1, 3][..]));
    let finished = finish_of(last);
    let sequence = &finished.sequences[0];
    assert_eq!(
        (sequence.reason(), sequence.seed, &sequence.matched),
        (public::FinishReason::Length, 7, &None)
    );
    let usage = finished.usage.expect("usage is always there");
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (5, 2, 3));
    let timings = finished.timings.expect("timings are always there");
    assert_eq!((timings.queue_ms, timings.prefill_ms, timings.ttft_ms), (0.5, 4.0, Some(2.0)));
    assert_eq!(talk.journal.standing(), &Standing::Over);
}

/// "abc" + "de" with stop "cd": "c" was never streamed, and what comes after is nobody's.
#[test]
fn a_stop_string_is_the_routers_business() {
    for (include, expected) in [(false, "ab"), (true, "abcd")] {
        let mut talk = talk(RawParams { include_stop: Some(include), ..stops("cd") });
        talk.tokens(0, 0, &[2]);
        let (text, ids, _) = talk.read();
        assert_eq!((&*text, &ids[..]), ("ab", &[2][..]));
        talk.tokens(0, 1, &[3, 7]);
        let effects = talk.journal.take_effects();
        assert_eq!((&effects.cancel[..], effects.dropped_tokens), (&[0][..], 1));
        // Until the worker heard of it more may come, and its own reason may be another.
        talk.tokens(0, 3, &[7]);
        talk.finished(0, FinishReason::Cancelled);
        let effects = talk.journal.take_effects();
        assert_eq!((effects.cancel, effects.dropped_tokens), (vec![], 1));
        let (text, ids, last) = talk.read();
        assert_eq!((format!("ab{text}"), &ids[..]), (expected.into(), &[3][..]));
        let finished = finish_of(last);
        assert_eq!(finished.sequences[0].matched, Some(Matched::StopString("cd".into())));
        assert_eq!(finished.usage.map(|usage| usage.completion_tokens), Some(2));
    }
}

#[test]
fn eos_ends_it_at_both_ends() {
    let mut talk = talk(RawParams::default());
    talk.tokens(0, 0, &[0, EOS]);
    talk.finished(0, FinishReason::StopEos);
    let effects = talk.journal.take_effects();
    assert_eq!((effects.cancel, effects.over.map(|over| over.output_tokens)), (vec![], Some(2)));
    let (text, ids, last) = talk.read();
    assert_eq!((&*text, &ids[..]), ("ab", &[0, EOS][..]));
    let finished = finish_of(last);
    assert_eq!(finished.sequences[0].reason(), public::FinishReason::StopEos);
    assert_eq!(finished.sequences[0].matched, Some(Matched::StopTokenId(EOS)));
}

#[test]
fn tokens_that_are_there_are_dropped_and_a_gap_is_a_fault() {
    let mut talk = talk(RawParams { max_tokens: Some(6), ..RawParams::default() });
    talk.tokens(0, 0, &[0, 1]);
    talk.tokens(0, 0, &[0]);
    talk.tokens(0, 1, &[1, 3]);
    assert_eq!(talk.journal.take_effects().dropped_tokens, 2);
    assert_eq!(talk.read().1, [0, 1, 3]);
    talk.tokens(0, 4, &[7]);
    let effects = talk.journal.take_effects();
    assert_eq!((&effects.cancel[..], effects.fault.as_deref()), {
        (&[0][..], Some("sequence 0 goes on at 4, 3 is the next one"))
    });
    assert_eq!(reason_of(talk.read().2), "PROTOCOL");
}

#[test]
fn what_no_worker_of_petek_says_is_a_fault() {
    type Says = fn(&mut Talk);
    let faults: [Says; 8] = [
        |talk| talk.tokens(1, 0, &[0]),
        |talk| talk.tokens(0, 0, &[]),
        |talk| talk.tokens(0, 0, &[0; 7]),
        |talk| talk.finished(1, FinishReason::Length),
        |talk| talk.finished(0, FinishReason::Length),
        |talk| talk.finished(0, FinishReason::StopEos),
        |talk| talk.finished(0, FinishReason::Unspecified),
        |talk| {
            let mut logprobs = Logprobs::default();
            logprobs.push(-1.0, 1, &[]);
            let entry =
                StepEntry { index: 0, ids: vec![0], logprobs: Some(logprobs), ..StepEntry::default() };
            talk.journal.tokens(1, entry, MS);
        },
    ];
    for (at, says) in faults.into_iter().enumerate() {
        let mut talk = talk(RawParams { max_tokens: Some(6), ..RawParams::default() });
        says(&mut talk);
        let effects = talk.journal.take_effects();
        assert!(effects.fault.is_some(), "fault {at}");
        assert_eq!(effects.over.map(|over| over.outcome), Some(Outcome::Failed), "fault {at}");
        assert_eq!(reason_of(talk.read().2), "PROTOCOL", "fault {at}");
    }
}

/// A journal has all that a replay needs, and of the attempt before nothing is taken.
#[test]
fn another_attempt_begins_where_the_last_one_ended() {
    let mut talk = talk(RawParams { n: Some(2), max_tokens: Some(4), ..RawParams::default() });
    talk.tokens(0, 0, &[0, 1]);
    talk.tokens(1, 0, &[7, EOS]);
    talk.finished(1, FinishReason::StopEos);
    let before = talk.attempt;
    let sequences = talk.dispatch("w2");
    assert_eq!(talk.attempt, 2);
    assert_eq!(
        sequences.iter().map(|s| (s.index, &s.resumed_ids[..])).collect::<Vec<_>>(),
        [(0, &[0, 1][..])]
    );

    let late = StepEntry { index: 0, first_index: 2, ids: vec![3], ..StepEntry::default() };
    talk.journal.tokens(before, late, 9 * MS);
    talk.journal.lost(before, 9 * MS);
    assert_eq!(talk.journal.take_effects().dropped_tokens, 1);
    talk.admit();
    talk.tokens(0, 2, &[3, 7]);
    talk.finished(0, FinishReason::Length);
    let (text, _, last) = talk.read();
    assert_eq!(text, "abcddex");
    let finished = finish_of(last);
    assert_eq!((finished.moves, finished.usage.map(|usage| usage.completion_tokens)), (1, Some(6)));
}

#[test]
fn a_lost_worker_says_how_to_go_on() {
    let mut talk = talk(stops("cdx"));
    talk.tokens(0, 0, &[0, 0, 1]);
    talk.journal.lost(1, 9 * MS);
    let (text, ids, last) = talk.read();
    // "cd" may begin the stop: it is held back.
    assert_eq!((&*text, &ids[..]), ("abab", &[0, 0][..]));
    let Some(Outgoing::Failed(refusal)) = last else { panic!("it failed") };
    assert_eq!((refusal.code, &*refusal.reason), (tonic::Code::Unavailable, "WORKER_LOST"));
    assert_eq!((refusal.number("output_tokens"), refusal.retry_ms), (Some(2), Some(0)));
    assert_eq!(talk.journal.take_effects().cancel, Vec::<u32>::new(), "there is nobody to cancel it");
}

#[test]
fn what_a_lost_worker_had_not_begun_with_goes_elsewhere() {
    let mut talk = dispatched(RawParams { max_tokens: Some(2), ..RawParams::default() });
    talk.journal.lost(1, 9 * MS);
    assert!(matches!(talk.journal.standing(), Standing::TurnedAway(why) if why.reason == "NO_WORKER"));
    assert_eq!(talk.read().2, None, "its client hears nothing of it");
    talk.dispatch("w2");
    talk.admit();
    talk.tokens(0, 0, &[0, 1]);
    talk.finished(0, FinishReason::Length);
    assert_eq!(finish_of(talk.read().2).moves, 0);
}

#[test]
fn a_lost_worker_does_no_harm_to_what_is_complete() {
    let mut talk = talk(stops("cd"));
    talk.tokens(0, 0, &[1]);
    talk.journal.lost(1, 9 * MS);
    let finished = finish_of(talk.read().2);
    assert_eq!(finished.sequences[0].reason(), public::FinishReason::StopSequence);
}

#[test]
fn resumed_ids_are_output_that_is_not_sent_again() {
    // The euro sign's first two bytes were held back when the stream broke.
    let mut talk = talk(RawParams {
        seed: Some(1),
        resumed_ids: vec![0, 5],
        max_tokens: Some(4),
        ..RawParams::default()
    });
    talk.tokens(0, 2, &[6, 7]);
    talk.finished(0, FinishReason::Length);
    let effects = talk.journal.take_effects();
    assert_eq!(effects.over.map(|over| over.output_tokens), Some(2));
    let (text, ids, last) = talk.read();
    assert_eq!((&*text, &ids[..]), ("€x", &[6, 7][..]));
    assert_eq!(finish_of(last).usage.map(|usage| usage.completion_tokens), Some(4));
}

#[test]
fn every_request_has_one_end() {
    let ends: [(Cause, Outcome, &str); 3] = [
        (Cause::ClientGone, Outcome::Cancelled, "CANCELLED"),
        (Cause::Deadline, Outcome::Failed, "DEADLINE_EXCEEDED"),
        (Cause::Internal, Outcome::Failed, "INTERNAL"),
    ];
    for (cause, outcome, reason) in ends {
        let mut talk = talk(RawParams { n: Some(3), max_tokens: Some(4), ..RawParams::default() });
        talk.tokens(0, 0, &[0, 1]);
        talk.journal.stop(cause, 9 * MS);
        talk.journal.stop(Cause::Internal, 9 * MS);
        talk.tokens(1, 0, &[0]);
        talk.finished(0, FinishReason::Cancelled);
        talk.journal.lost(1, 9 * MS);
        talk.journal.judge_client(5_000 * MS);
        let effects = talk.journal.take_effects();
        assert_eq!(effects.over.map(|over| (over.outcome, over.output_tokens)), Some((outcome, 2)));
        assert_eq!((effects.cancel, effects.dropped_tokens), (vec![0, 1, 2], 1));
        assert_eq!(reason_of(talk.read().2), reason);
        assert_eq!(talk.read().2, None);
    }
}

#[test]
fn a_slow_client_loses_what_waits_and_no_more() {
    let mut talk = talk(RawParams { max_tokens: Some(60), ..RawParams::default() });
    let mut at = 0;
    while talk.journal.standing() == &Standing::Dispatched {
        talk.tokens(0, at, &[0]);
        at += 1;
    }
    assert!((20..60).contains(&at), "{at} deltas were taken");
    assert_eq!(talk.journal.take_effects().cancel, [0]);
    let (text, _, last) = talk.read();
    assert_eq!((&*text, reason_of(last)), ("", "SLOW_CONSUMER".into()));

    let mut talk = self::talk(RawParams::default());
    talk.tokens(0, 0, &[0]);
    // Since the first event, at 1 ms.
    assert!(!talk.journal.is_slow(1_000 * MS) && talk.journal.is_slow(1_001 * MS));
    talk.journal.judge_client(1_000 * MS);
    assert_eq!(talk.journal.standing(), &Standing::Dispatched);
    talk.journal.judge_client(1_001 * MS);
    assert_eq!(reason_of(talk.read().2), "SLOW_CONSUMER");
}

#[test]
fn a_refusal_is_for_the_driver_where_another_worker_may_do() {
    let check = |refusal: &Refusal, elsewhere: bool| {
        let mut talk = talk(RawParams::default());
        // As if nothing had been admitted.
        talk.journal.admitted = None;
        talk.journal.refused(1, WireRefusal::from(refusal), 9 * MS);
        let turned_away = matches!(talk.journal.standing(), Standing::TurnedAway(_));
        assert_eq!(turned_away, elsewhere, "{refusal}");
        let over = talk.journal.take_effects().over.map(|over| over.outcome);
        assert_eq!(over, (!elsewhere).then_some(Outcome::Refused), "{refusal}");
    };
    let retry_ms = std::num::NonZeroU64::MIN;
    check(&Refusal::QueueFull { waiting: 9, retry_ms }, true);
    check(&Refusal::Draining { retry_ms }, true);
    check(&Refusal::StaleEpoch { named: 1, current: 2 }, true);
    check(&Refusal::PoolExceeded { needed_blocks: 9, pool_blocks: 8 }, false);
    check(&Refusal::invalid("n", "is too large"), false);
}
