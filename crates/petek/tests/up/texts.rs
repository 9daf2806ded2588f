//! Text, byte for byte: a model that emits any token sequence shows what a client reads of it.
//!
//! Greedy from one id, the model follows a path of its own; `a|b` in comments is tokens.

use petek_proto::inference::v1::sequence_finish::Matched;
use petek_proto::inference::v1::{
    DetokenizeRequest, FinishReason, RequestOptions, SamplingParams, TokenizeRequest, tokenize_request,
};
use petek_tests::chain::Chain;
use petek_tests::llama::EosPlaces;
use tempfile::TempDir;

use super::api::{Answer, Client, ends, greedy, spec, text_spec, with};
use super::process::Up;

/// What a prompt of this one id is continued with; the ids below it.
const SEEK: u32 = 1;
const NOTE: u32 = 4;
const FLOWER: u32 = 8;
const EURO: u32 = 11;
const ABC: u32 = 14;
const FAMILY: u32 = 17;
const BROKEN: u32 = 22;
const TALK: u32 = 26;
const FOREVER: u32 = 31;
const BOS: u32 = 33;

/// The paths, by the ids of their tokens. A path that ends in `Chain::END` ends the sequence.
fn model() -> (TempDir, Chain) {
    let strings: [&[u8]; 34] = [
        b"seek",               // 1
        "求".as_bytes(),       // 2
        b"Z",                  // 3
        b"note",               // 4
        b" Note",              // 5
        b"!",                  // 6
        b"ok?\n",              // 7
        b"\xF0\x9F\x8C",       // 8: the beginning of 🌶
        b"\xB6",               // 9: its end
        b"k",                  // 10
        b"euro",               // 11
        b"\xE2\x82",           // 12: the beginning of €
        b"\xAC",               // 13: its end
        b"letters",            // 14
        b"abc",                // 15
        b"de",                 // 16
        b"family",             // 17
        b"\xF0\x9F",           // 18 to 21: 👩‍👧, cut inside all of its three characters
        b"\x91\xA9\xE2",       // 19
        b"\x80\x8D\xF0\x9F",   // 20
        b"\x91\xA7",           // 21
        b"broken",             // 22
        b"\xE2\x82(",          // 23: never a €
        b"\xF0\x9F\x8D",       // 24: the beginning of 🍏, and then
        b"\xF0\x9F\x8E",       // 25: the beginning of 🎏, and the end
        b"talk",               // 26
        b"<|user|>",           // 27: special
        "Işık, ".as_bytes(),   // 28
        "e\u{301}".as_bytes(), // 29: é, of two characters
        b"<|stop|>",           // 30: special
        b"forever",            // 31
        b"-",                  // 32
        b"<|begin|>",          // 33: BOS
        b"hi",                 // 34
    ];
    let chain = Chain::bytes(&strings)
        .then(&[SEEK, 2, 3, 2])
        .then(&[NOTE, 5, 6, 7, Chain::END])
        .then(&[FLOWER, 9, 10, Chain::END])
        .then(&[EURO, 12, 13, Chain::END])
        .then(&[ABC, 15, 16, Chain::END])
        .then(&[FAMILY, 18, 19, 20, 21, Chain::END])
        .then(&[BROKEN, 23, 24, 25, Chain::END])
        .then(&[TALK, 27, 28, 29, 30, Chain::END])
        .then(&[FOREVER, 32, 32])
        .then(&[BOS, 34, Chain::END])
        .special(&[27, 30])
        .adds_bos(BOS);
    let dir = tempfile::tempdir().expect("a folder");
    chain.write(dir.path()).expect("write the model");
    (dir, chain)
}

fn start(dir: &TempDir, more: &[&str]) -> Up {
    let model = dir.path().to_str().expect("a plain path");
    Up::start(&[&["--model", model, "--name", "chain", "--threads", "1"], more].concat())
}

fn stops(stop: &[&str], params: SamplingParams) -> SamplingParams {
    SamplingParams { stop: stop.iter().map(|stop| stop.to_string()).collect(), ..params }
}

/// After each delta the client has seen one of these beginnings of the text, or all of it. (Deltas that wait for a
/// client are merged, so it need not have seen them all.)
#[track_caller]
fn check_shown(answer: &Answer, beginnings: &[&str]) {
    let mut shown = String::new();
    for (text, _) in &answer.sequences[0].deltas {
        shown.push_str(text);
        let is_one = beginnings.contains(&&*shown) || shown == answer.sequences[0].text;
        assert!(is_one, "{shown:?} was shown of {:?}", answer.sequences[0].deltas);
    }
}

/// Everything here happens beside streams that never pause, and none of it shows in them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_is_exact_whatever_the_tokens_are_cut_into() {
    let (dir, _) = model();
    let up = start(&dir, &[]);
    let client = Client::of(&up).await;
    let neighbours: Vec<_> = (0..4)
        .map(|_| {
            let client = client.clone();
            let asked = SamplingParams { logprobs: Some(1), ..greedy(3_000) };
            tokio::spawn(async move { client.stream(spec(&[FOREVER], asked)).await })
        })
        .collect();

    held_back(&client).await;
    characters(&client).await;
    stopping(&client).await;
    special_tokens(&client).await;
    resuming(&client).await;

    for neighbour in neighbours {
        let answer = neighbour.await.expect("it runs");
        assert_eq!((answer.text().to_owned(), answer.reason()), ("-".repeat(3_000), FinishReason::Length));
        assert_eq!(answer.sequences[0].logprobs.len(), 3_000);
    }
}

/// [vllm#44620, llama.cpp#10914, #9867]
async fn held_back(client: &Client) {
    let check = async |from: u32, stop: &[&str], max_tokens: u32, text: &str, reason: FinishReason| {
        let answer = client.both(spec(&[from], stops(stop, greedy(max_tokens)))).await;
        assert_eq!((answer.text(), answer.reason()), (text, reason), "{stop:?}");
        answer
    };
    // 求|Z|求: what could begin "ZZZ" is held back, and comes when it does not, or when it ends.
    check(SEEK, &["ZZZ"], 3, "求Z求", FinishReason::Length).await;
    check(SEEK, &["ZZZ"], 2, "求Z", FinishReason::Length).await;
    let answer = check(SEEK, &["Z求Z!"], 4, "求Z求Z", FinishReason::Length).await;
    check_shown(&answer, &["", "求"]);
    // " Note"|"!"|"ok?\n"
    let answer = check(NOTE, &["\n", "Note:"], 9, " Note!ok?", FinishReason::StopSequence).await;
    assert_eq!(answer.ids(), [5, 6, 7]);
    assert_eq!(ends(&answer)[0].1, Some(Matched::StopString("\n".into())));
}

/// Characters over several tokens, and what is none.
async fn characters(client: &Client) {
    // A prompt that ends inside a character gives nothing of it to the output. [vllm#48853 a]
    let answer = client.both(spec(&[FLOWER], greedy(9))).await;
    assert_eq!((answer.text(), answer.ids()), ("\u{FFFD}k", &[9, 10, Chain::END][..]));
    check_shown(&answer, &["\u{FFFD}", "\u{FFFD}k"]);

    let asked = SamplingParams { logprobs: Some(0), ..greedy(9) };
    let answer = client.both(spec(&[FAMILY], asked)).await;
    assert_eq!(answer.text(), "👩\u{200D}👧");
    let sequence = &answer.sequences[0];
    check_shown(&answer, &["", "👩", "👩\u{200D}"]);
    let entries: Vec<u32> = sequence.logprobs.iter().map(|entry| entry.token_id).collect();
    assert_eq!((&entries, &entries[..]), (&sequence.ids, &[18, 19, 20, 21, Chain::END][..]));
    assert_eq!(sequence.logprobs[1].raw, b"\x91\xA9\xE2"[..]);
    assert_eq!(sequence.logprobs[1].text, "\u{FFFD}\u{FFFD}\u{FFFD}");

    let answer = client.both(spec(&[BROKEN], greedy(9))).await;
    assert_eq!(answer.text(), "\u{FFFD}(\u{FFFD}\u{FFFD}");
    // What can become a character waits, until the next token or the end shows that it does not.
    check_shown(&answer, &["\u{FFFD}(", "\u{FFFD}(\u{FFFD}"]);
    let cut = client.both(spec(&[BROKEN], greedy(2))).await;
    assert_eq!((cut.text(), cut.reason()), ("\u{FFFD}(\u{FFFD}", FinishReason::Length));
}

/// Stops over token borders, and the limits that stand against them.
async fn stopping(client: &Client) {
    // "abc"|"de" with stop "cd": "c" was never streamed, and no id after the one that completed it.
    let answer = client.both(spec(&[ABC], stops(&["cd"], greedy(9)))).await;
    assert_eq!((answer.text(), answer.ids()), ("ab", &[15, 16][..]));
    check_shown(&answer, &["", "ab"]);
    let matched = Some(Matched::StopString("cd".into()));
    assert_eq!(ends(&answer), [(FinishReason::StopSequence, matched, 2)]);
    let kept = SamplingParams { include_stop: true, ..stops(&["cd"], greedy(9)) };
    assert_eq!(client.both(spec(&[ABC], kept)).await.text(), "abcd");
    // The one that is complete first wins; of two at once the one that began first; never the list's order.
    for list in [["e", "cd", "d"], ["d", "cd", "e"]] {
        let answer = client.both(spec(&[ABC], stops(&list, greedy(9)))).await;
        assert_eq!(
            (answer.text(), ends(&answer)[0].1.clone()),
            ("ab", Some(Matched::StopString("cd".into())))
        );
    }

    // min_tokens: stops that are complete at or before token 5 do not count.
    let asked = SamplingParams { min_tokens: Some(5), ..stops(&["-"], greedy(9)) };
    let answer = client.both(spec(&[FOREVER], asked)).await;
    assert_eq!((answer.text(), answer.ids().len()), ("-----", 6));
    // EOS is masked below it: "hi", and then whatever is next likely, the lowest id but EOS.
    let asked = SamplingParams { min_tokens: Some(2), ..greedy(2) };
    let answer = client.both(spec(&[BOS], asked)).await;
    assert_eq!((answer.ids(), answer.reason()), (&[34, 1][..], FinishReason::Length));
    // Exactly one token.
    let answer = client.both(spec(&[FOREVER], greedy(1))).await;
    assert_eq!((answer.ids(), answer.reason()), (&[32][..], FinishReason::Length));
    let answer = client.both(spec(&[34], greedy(1))).await;
    assert_eq!(
        (answer.text(), answer.ids(), answer.reason()),
        ("", &[Chain::END][..], FinishReason::StopEos)
    );
    // A stop id's text is left out too, its id and logprob stay.
    let asked = SamplingParams { stop_token_ids: vec![6], logprobs: Some(0), ..greedy(9) };
    let answer = client.both(spec(&[NOTE], asked.clone())).await;
    assert_eq!((answer.text(), answer.ids()), (" Note", &[5, 6][..]));
    assert_eq!(answer.sequences[0].logprobs.len(), 2);
    assert_eq!(ends(&answer), [(FinishReason::StopToken, Some(Matched::StopTokenId(6)), 2)]);
    let kept = SamplingParams { include_stop: true, ..asked };
    assert_eq!(client.both(spec(&[NOTE], kept)).await.text(), " Note!");
}

/// They stand in ids, usage and logprobs whatever the text shows.
async fn special_tokens(client: &Client) {
    for (skip, text) in [(None, "Işık, e\u{301}"), (Some(false), "<|user|>Işık, e\u{301}<|stop|><|end|>")]
    {
        let include_stop = skip.is_some();
        let asked =
            SamplingParams { skip_special_tokens: skip, include_stop, logprobs: Some(0), ..greedy(9) };
        let answer = client.both(spec(&[TALK], asked)).await;
        assert_eq!((answer.text(), answer.ids()), (text, &[27, 28, 29, 30, Chain::END][..]));
        assert_eq!((answer.usage().2, answer.sequences[0].logprobs.len()), (5, 5));
    }
    // In a prompt they are parsed, unless they are not to be.
    for (parse_special, token_ids) in [(None, &[BOS, 27][..]), (Some(false), &[BOS])] {
        let input = Some(tokenize_request::Input::Text("<|user|>".into()));
        let request = TokenizeRequest { input, parse_special, ..TokenizeRequest::default() };
        let tokenized = client.0.clone().tokenize(request).await.expect("it encodes").into_inner();
        assert_eq!(tokenized.token_ids, token_ids, "the vocabulary has none of its letters");
    }
    // A tokeniser that adds a BOS makes a prompt of no text.
    let answer = client.both(text_spec("", greedy(9))).await;
    assert_eq!((answer.text(), answer.usage().0), ("hi", 1));
}

/// [vllm#48853 c] The bytes of resumed ids belong to the output.
async fn resuming(client: &Client) {
    let from = |resumed_ids: &[u32]| {
        let options = RequestOptions { resumed_ids: resumed_ids.into(), ..RequestOptions::default() };
        with(options, spec(&[EURO], greedy(9)))
    };
    let answer = client.both(from(&[12])).await;
    assert_eq!(answer.sequences[0].deltas[0].0, "€");
    assert_eq!((answer.text(), answer.sequences[0].first_index), ("€", Some(1)));
    assert_eq!(answer.usage().2, 3, "resumed tokens are output");
    // Wherever a stream broke, what had come and what comes are the unbroken text.
    for start in [SEEK, NOTE, FAMILY, BROKEN, TALK] {
        let asked = stops(&["ZZ", "k?\nx"], greedy(4));
        let whole = client.stream(spec(&[start], asked.clone())).await;
        let deltas = &whole.sequences[0].deltas;
        for cut in 0..deltas.len() {
            let had: String = deltas[..cut].iter().map(|(text, _)| &**text).collect();
            let count: usize = deltas[..cut].iter().map(|(_, ids)| ids).sum();
            let resumed_ids = whole.ids()[..count].to_vec();
            if resumed_ids.len() == whole.ids().len() {
                continue;
            }
            let options = RequestOptions { resumed_ids, ..RequestOptions::default() };
            let rest = client.both(with(options, spec(&[start], asked.clone()))).await;
            assert_eq!(had + rest.text(), whole.text(), "from {start}, cut at delta {cut}");
            assert_eq!(rest.ids(), &whole.ids()[count..]);
        }
    }
}

/// [vllm#48853 b] Output is a continuation: its first space is its own.
#[tokio::test]
async fn a_sentencepiece_answer_keeps_its_first_space() {
    let dir = tempfile::tempdir().expect("a folder");
    // The last two are what a plain "a" becomes.
    let pieces = ["▁go", "▁in", "▁the", "▁sea", "<0xE2>", "<0x82>", "<0xAC>", "▁", "a"];
    let chain = Chain::sentence_piece(&pieces);
    chain.then(&[1, 2, 3, 4, 5, 6, 7, Chain::END]).write(dir.path()).expect("write the model");
    let up = start(&dir, &[]);
    let client = Client::of(&up).await;
    let answer = client.both(spec(&[1], greedy(9))).await;
    assert_eq!(answer.text(), " in the sea€");
    check_shown(&answer, &["", " in", " in the", " in the sea"]);
    // Detokenize reads a text, unless it is told to read a continuation.
    for (continuation, text) in [(false, "in the sea€"), (true, " in the sea€")] {
        let token_ids = answer.ids().to_vec();
        let request = DetokenizeRequest { token_ids, continuation, ..DetokenizeRequest::default() };
        let decoded = client.0.clone().detokenize(request).await.expect("it decodes").into_inner();
        assert_eq!(decoded.text, text);
    }
}

/// [Blaizzy/mlx-vlm#2112, vllm#4589] EOS is what any file says, and is ignored or masked as a whole.
#[tokio::test]
async fn eos_is_what_any_file_says() {
    let dir = tempfile::tempdir().expect("a folder");
    let chain = Chain::bytes(&["ok", "2", "no", "go"]).then(&[4, 1, 2, 3, 0]).special(&[2]);
    let eos =
        EosPlaces { config: None, generation_config: vec![0], tokenizer_config: Some(chain.text_of(2)) };
    chain.eos(eos).write(dir.path()).expect("write the model");
    let up = start(&dir, &[]);
    let client = Client::of(&up).await;
    let answer = client.both(spec(&[4], greedy(4))).await;
    assert_eq!((answer.text(), answer.ids(), answer.reason()), ("ok", &[1, 2][..], FinishReason::StopEos));
    let ignored = SamplingParams { ignore_eos: true, ..greedy(4) };
    let answer = client.both(spec(&[4], ignored.clone())).await;
    assert_eq!((answer.ids(), answer.reason()), (&[1, 2, 3, 0][..], FinishReason::Length));
    let stop_id = SamplingParams { stop_token_ids: vec![2], ..ignored };
    let answer = client.both(spec(&[4], stop_id)).await;
    assert_eq!((answer.ids(), answer.reason()), (&[1, 2][..], FinishReason::StopToken));
    // Two masked in place of EOS: after "ok" all other logits are 0, and the lowest id that is allowed is 1.
    let masked = SamplingParams { min_tokens: Some(3), ..greedy(4) };
    let answer = client.both(spec(&[4], masked.clone())).await;
    assert_eq!((answer.ids(), answer.reason()), (&[1, 1, 1, 2][..], FinishReason::StopEos));
    // After "no" comes 0, which is masked as well.
    let answer = client.both(spec(&[3], masked)).await;
    assert!(!answer.ids()[..3].iter().any(|id| [0, 2].contains(id)), "{:?}", answer.ids());
}

/// On a model whose text is of all kinds, drawn hot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deltas_joined_are_the_unary_text_and_the_one_shot_decode() {
    const SEEDS: u64 = 200;
    let up = Up::start(&[]);
    let client = Client::of(&up).await;
    let one = async |seed: u64| {
        let asked = SamplingParams {
            seed: Some(seed),
            temperature: Some(2.0),
            max_tokens: Some(32),
            ignore_eos: true,
            logprobs: Some(0),
            ..SamplingParams::default()
        };
        let answer: Answer = client.both(text_spec("I have a dream", asked)).await;
        let token_ids = answer.ids().to_vec();
        assert_eq!(token_ids.len(), 32, "seed {seed}");
        let raw: Vec<u8> = answer.sequences[0].logprobs.iter().flat_map(|entry| entry.raw.to_vec()).collect();
        let request = DetokenizeRequest { token_ids, continuation: true, ..DetokenizeRequest::default() };
        let decoded = client.0.clone().detokenize(request.clone()).await.expect("it decodes").into_inner();
        assert_eq!(answer.text(), decoded.text, "seed {seed}");
        let whole = DetokenizeRequest { skip_special_tokens: Some(false), ..request };
        let whole = client.0.clone().detokenize(whole).await.expect("it decodes").into_inner();
        assert_eq!(String::from_utf8_lossy(&raw), whole.text, "seed {seed}");
        let is_split = answer.sequences[0].logprobs.iter().any(|entry| entry.text.contains('\u{FFFD}'));
        (answer.text().to_owned(), is_split)
    };
    let seeds: Vec<u64> = (0..SEEDS).collect();
    let (mut texts, mut with_split) = (std::collections::HashSet::new(), 0);
    for few in seeds.chunks(8) {
        for (text, is_split) in futures::future::join_all(few.iter().map(|seed| one(*seed))).await {
            texts.insert(text);
            with_split += usize::from(is_split);
        }
    }
    assert_eq!(texts.len() as u64, SEEDS, "each seed draws another text");
    assert!(with_split > 0, "no character was cut: the test shows nothing");
}
