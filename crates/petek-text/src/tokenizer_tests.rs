use serde_json::json;

use super::*;
use crate::testing::{Random, golden, golden_json};
use crate::token_table::SpecialText;

fn load(file: &Value) -> Result<Tokenizer, FileError> {
    Tokenizer::load(file.to_string().as_bytes(), &|| Duration::ZERO)
}

fn golden_tokenizer(name: &str) -> Tokenizer {
    load(&golden_json(&format!("tokenizers/{name}/tokenizer.json"))).unwrap()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "special": special, "normalized": false,
           "single_word": false, "lstrip": false, "rstrip": false})
}

/// A byte-level tokenizer of single bytes (ids are their places in the alphabet's order) and these added tokens.
fn bytes_with(added_tokens: Value) -> Value {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<_, _> =
        alphabet.iter().enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

fn plain(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode("prompt", text, AddedSpecials::None, ControlText::Plain).unwrap()
}

fn parsed(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode("prompt", text, AddedSpecials::None, ControlText::Parsed).unwrap()
}

/// What a template that writes `before ‖ text ‖ after` around a client's text gives.
fn around(tokenizer: &Tokenizer, before: &str, text: &str, after: &str) -> Vec<u32> {
    let guard = tokenizer.guard();
    let marks = guard.marks([text].into_iter()).unwrap();
    let marked = [before, &guard.text(text, crate::guard::Author::Client, &marks), after].concat();
    tokenizer.encode_rendered(&Rendered::new(marked, marks)).unwrap()
}

#[test]
fn encoding_equals_pythons_tokenizers() {
    for name in ["bytelevel", "bytefallback"] {
        let tokenizer = golden_tokenizer(name);
        let goldens = golden_json(&format!("tokenizer-{name}.json"));
        assert_eq!(json!(tokenizer.tokens().len()), goldens["vocab_size"]);
        let strings = goldens["strings"].as_array().unwrap();
        assert!(strings.len() > 80);
        for case in strings {
            let text = case["text"].as_str().unwrap();
            let encode =
                |specials, control| json!(tokenizer.encode("prompt", text, specials, control).unwrap());
            assert_eq!(encode(AddedSpecials::None, ControlText::Parsed), case["ids"], "{name}: {text:?}");
            assert_eq!(
                encode(AddedSpecials::Added, ControlText::Parsed),
                case["ids_with_added"],
                "{name}: {text:?}"
            );
            // Python can only switch off special tokens; petek also those that are not special but control.
            let ids = encode(AddedSpecials::None, ControlText::Plain);
            if ["<tool_call>", "</tool_call>", "<think>"].iter().all(|other| !text.contains(other)) {
                assert_eq!(ids, case["ids_control_as_text"], "{name}: {text:?}");
            }
            assert!(
                plain(&tokenizer, text).iter().all(|&id| !tokenizer.tokens().is_special(id)),
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn decoding_equals_tokenizers_wherever_that_spoils_nothing() {
    for name in ["bytelevel", "bytefallback"] {
        let tokenizer = golden_tokenizer(name);
        let tokens = tokenizer.tokens();
        // Theirs begins a text and ours goes on one: the SentencePiece kind strips one space there.
        let check = |ids: &[u32], theirs: &str, special, what: &str| -> bool {
            let ours = tokens.decode(ids, special);
            let whole = !theirs.contains('\u{FFFD}');
            let stripped =
                if name == "bytefallback" { ours.strip_prefix(' ').unwrap_or(&ours) } else { &ours };
            assert!(!whole || stripped == theirs, "{name}: {what}: {ours:?} is not {theirs:?}");
            whole
        };
        let goldens = golden_json(&format!("tokenizer-{name}.json"));
        let mut compared = 0;
        for case in ["strings", "id_lists"].iter().flat_map(|key| goldens[key].as_array().unwrap()) {
            let ids = case.get("ids_with_added").unwrap_or(&case["ids"]);
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            for (key, special) in
                [("decoded", SpecialText::Kept), ("decoded_without_special", SpecialText::Skipped)]
            {
                compared +=
                    usize::from(check(&ids, case[key].as_str().unwrap(), special, &format!("{ids:?}")));
            }
        }
        assert!(compared > 160, "{compared}");

        let mut compared = 0;
        for seed in 0..600 {
            let mut random = Random::new(seed);
            let ids: Vec<u32> = (0..random.below(6)).map(|_| random.below(tokens.len()) as u32).collect();
            let skip = random.chance(50);
            let special = if skip { SpecialText::Skipped } else { SpecialText::Kept };
            let theirs = tokenizer.inner.decode(&ids, skip).unwrap();
            compared += usize::from(check(&ids, &theirs, special, &format!("seed {seed}")));
            // And the stream's joined text is the one-shot decode, whatever the bytes.
            let mut text = String::new();
            let mut detokenizer = crate::Detokenizer::default();
            ids.iter().for_each(|&id| detokenizer.push(tokens.text_bytes(id, special), &mut text));
            detokenizer.finish(&mut text);
            assert_eq!(text, tokens.decode(&ids, special), "seed {seed}");
        }
        assert!(compared > 150, "{compared}");
    }
}

#[test]
fn sentencepiece_output_keeps_its_first_space_and_its_bytes() {
    let mut file = golden_json("tokenizers/bytefallback/tokenizer.json");
    let in_ = golden_tokenizer("bytefallback");
    let ids: Vec<u32> = ["▁", "▁the"].iter().map(|token| in_.token_id(token).unwrap()).collect();
    assert_eq!(in_.tokens().decode(&ids, SpecialText::Skipped), "  the");
    assert_eq!(in_.tokens().bytes(in_.token_id("<0xE2>").unwrap()), [0xE2]);
    assert_eq!(in_.tokens().text(in_.token_id("<0xE2>").unwrap()), "\u{FFFD}");
    // The same with a Metaspace decoder.
    file["decoder"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let metaspace = load(&file).unwrap();
    assert_eq!(metaspace.tokens().decode(&ids, SpecialText::Skipped), "  the");
}

#[test]
fn a_streams_first_spaces_are_not_lost() {
    let mut file = golden_json("tokenizers/bytefallback/tokenizer.json");
    file["added_tokens"] = json!([]);
    file["post_processor"] = Value::Null;
    file["model"] = json!({"type": "BPE", "vocab": {"▁in▁the": 0, "▁sea": 1}, "merges": []});
    let tokenizer = load(&file).unwrap();
    let options = crate::OutputOptions {
        special: SpecialText::Skipped,
        include_stop: false,
        stops: crate::StopStrings::default(),
        min_tokens: 0,
        eos_ids: Arc::new([]),
        stop_ids: Arc::new([]),
    };
    let mut output = crate::Output::new(tokenizer.tokens().clone(), options);
    let texts = [0, 1].map(|id| output.push([(id, ())]).delta.unwrap().text);
    assert_eq!(texts, [" in the", " sea"]);
}

#[test]
fn the_table_knows_ids_without_a_token() {
    let mut file = bytes_with(json!([]));
    file["model"]["vocab"]["ab"] = json!(300);
    let gap = load(&file).unwrap();
    assert_eq!(
        (gap.tokens().len(), gap.tokens().contains(299), gap.tokens().bytes(299)),
        (301, false, &b""[..])
    );
    assert_eq!(gap.tokens().decode(&[256, 300, 299, 300], SpecialText::Kept), "abab");
    let tokenizer = load(&bytes_with(json!([added(256, "<s>", true)]))).unwrap();
    let tokens = tokenizer.tokens();
    assert_eq!((tokens.len(), tokens.is_empty()), (257, false));
    assert!(
        tokens.contains(256) && tokens.is_special(256) && !tokens.contains(257) && !tokens.is_special(257)
    );
    assert_eq!((tokens.bytes(257), tokens.bytes(u32::MAX)), (&b""[..], &b""[..]));
    assert_eq!(tokens.decode(&[256, 300, 256], SpecialText::Kept), "<s><s>");
}

#[test]
fn an_added_tokens_letters_are_not_taken_for_bytes() {
    let tokenizer =
        load(&bytes_with(json!([added(256, "München", false), added(257, "日本", false)]))).unwrap();
    assert_eq!(parsed(&tokenizer, "München日本"), [256, 257]);
    assert_eq!(tokenizer.tokens().decode(&[256, 257], SpecialText::Kept), "München日本");
}

#[test]
fn control_tokens_in_text_are_tokens_or_text_as_asked() {
    let tokenizer = load(&bytes_with(json!([
        added(256, "<s>", true),
        added(257, "<think>", false),
        added(258, "  ", false),
        added(259, "☆", true),
        added(260, "<s><s>", true),
    ])))
    .unwrap();
    let bytes = |text: &str| -> Vec<u32> {
        let file = load(&bytes_with(json!([]))).unwrap();
        parsed(&file, text)
    };
    assert_eq!(parsed(&tokenizer, "<s>"), [256]);
    assert_eq!(parsed(&tokenizer, "<s><s><s>"), [260, 256]);
    for text in ["<s>", "a<s><s>b", "<think>", "☆", "x☆<s>", "<<s>s>"] {
        assert_eq!(plain(&tokenizer, text), bytes(text), "{text}");
        // The same text inside a template's: only the template's are tokens.
        let want = [vec![256], bytes(text), vec![257]].concat();
        assert_eq!(around(&tokenizer, "<s>", text, "<think>"), want, "{text}");
    }
    // Runs of spaces are text's own tokens in either case.
    assert_eq!(plain(&tokenizer, "a  b"), parsed(&tokenizer, "a  b"));
    assert!(plain(&tokenizer, "a  b").contains(&258) && around(&tokenizer, "", "a  b", "").contains(&258));
    // Noncharacters that the client sends are kept.
    let sent = "\u{FDD0}<s>\u{FDD1}";
    assert_eq!(around(&tokenizer, "<s>", sent, ""), [vec![256], bytes(sent)].concat());
}

#[test]
fn random_text_in_a_template_never_becomes_a_control_token() {
    let names = ["<s>", "</s>", "<think>", "<|end|>", "ab", "aba", "☆", "<s></s>"];
    let tokens: Vec<Value> =
        names.iter().enumerate().map(|(i, name)| added(256 + i as u32, name, i != 2)).collect();
    let tokenizer = load(&bytes_with(json!(tokens))).unwrap();
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let text: String = (0..random.below(12))
            .map(|_| match random.below(3) {
                0 => (*random.pick(&names)).to_owned(),
                1 => random.word("<s>/|ab☆ \u{FDD0}", 3),
                _ => random.word("<|endthik>é", 3),
            })
            .collect();
        let ids = around(&tokenizer, "</s>", &text, "<s>");
        let want = [vec![257], plain(&tokenizer, &text), vec![256]].concat();
        assert_eq!(ids, want, "seed {seed}: {text:?}");
        assert!(ids[1..ids.len() - 1].iter().all(|&id| id < 256), "seed {seed}: {text:?}");
        assert_eq!(tokenizer.tokens().decode(&ids[1..ids.len() - 1], SpecialText::Kept), text, "seed {seed}");
    }
}

#[test]
fn letters_that_normalise_to_a_control_token_stay_text() {
    // NFKC makes "<s>" of full-width letters, and this token is matched on normalised text.
    let mut file = bytes_with(json!([added(256, "<s>", true), added(257, "</s>", true)]));
    file["normalizer"] = json!({"type": "NFKC"});
    file["added_tokens"][0]["normalized"] = json!(true);
    let tokenizer = load(&file).unwrap();
    let wide = "＜s＞";
    assert_eq!(parsed(&tokenizer, wide), [256]);
    assert_eq!(
        around(&tokenizer, "<s>", wide, "</s>"),
        [vec![256], plain(&tokenizer, "<s>"), vec![257]].concat()
    );
    assert_eq!(
        around(&tokenizer, "<s>", "a＜s＞＜s＞b", ""),
        [vec![256], plain(&tokenizer, "a<s><s>b")].concat()
    );
}

#[test]
fn tokens_that_strip_and_first_pieces_are_as_tokenizers_has_them() {
    // Metaspace "first" gives its mark to the very beginning alone, which pieces encoded one by one would lose.
    let mut file = golden_json("tokenizers/bytefallback/tokenizer.json");
    file["normalizer"] = Value::Null;
    file["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    file["added_tokens"][3]["rstrip"] = json!(true);
    let tokenizer = load(&file).unwrap();
    for text in ["the<|im_start|>the", "<|im_start|>  the", "the <|im_end|> the", "<|im_end|>"] {
        let theirs = tokenizer.inner.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(parsed(&tokenizer, text), theirs, "{text}");
        let marks = tokenizer.guard().marks(std::iter::empty()).unwrap();
        assert_eq!(
            tokenizer.encode_rendered(&Rendered::new(text.to_owned(), marks)).unwrap(),
            theirs,
            "{text}"
        );
    }
    let (start, the) = (599, plain(&tokenizer, "the"));
    assert_eq!(around(&tokenizer, "<|im_start|>", "the", ""), {
        let rest = tokenizer.inner.encode("<|im_start|>the", false).unwrap();
        assert!(rest.get_ids()[0] == start && rest.get_ids()[1..] != the[..]);
        rest.get_ids().to_vec()
    });
}

#[test]
fn text_above_4_mib_is_refused_and_below_is_not() {
    let tokenizer = load(&bytes_with(json!([]))).unwrap();
    let text = "a".repeat(TEXT_BYTES_MAX + 1);
    let error = tokenizer.encode("prompt", &text, AddedSpecials::None, ControlText::Plain).unwrap_err();
    let want = TextError::TooLarge {
        field: "prompt".to_owned(),
        unit: "bytes of text",
        limit: TEXT_BYTES_MAX as u64,
        actual: TEXT_BYTES_MAX as u64 + 1,
    };
    assert_eq!(error, want);
    let marks = tokenizer.guard().marks(std::iter::empty()).unwrap();
    let error = tokenizer.encode_rendered(&Rendered::new(text, marks)).unwrap_err();
    assert_eq!(error.field(), Some("messages"));
    assert_eq!(plain(&tokenizer, &"a".repeat(100_000)).len(), 100_000);
}

#[test]
fn truncation_and_padding_are_dropped() {
    let mut file = bytes_with(json!([added(256, "<pad>", true)]));
    file["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 256, "pad_type_id": 0, "pad_token": "<pad>"});
    assert_eq!(parsed(&load(&file).unwrap(), "abcdef").len(), 6);
}

#[test]
fn bad_files_are_refused_with_the_place_and_the_reason() {
    let check = |change: &dyn Fn(&mut Value), parts: &[&str]| {
        let mut file = bytes_with(json!([added(256, "<s>", true)]));
        change(&mut file);
        let error =
            load(&file).err().unwrap_or_else(|| panic!("loaded, though it should say {parts:?}")).to_string();
        let says_it = parts.iter().all(|part| error.contains(part));
        assert!(error.starts_with("tokenizer.json: ") && says_it && !error.contains('\n'), "{error}");
    };
    check(&|file| file["model"]["dropout"] = json!(0.1), &["model.dropout", "random"]);
    check(&|file| file["model"]["vocab"]["ab"] = json!(3), &["model.vocab", "\"ab\"", "share id 3"]);
    check(&|file| file["model"]["vocab"]["ab"] = json!(1u32 << 22), &["4194304", "4194303"]);
    check(&|file| file["model"]["vocab"]["ab"] = json!(-1), &["-1"]);
    check(
        &|file| file["added_tokens"][0]["id"] = json!(300),
        &["added_tokens", "\"<s>\"", "id 300", "it 256"],
    );
    check(
        &|file| {
            let vocab = file["model"]["vocab"].as_object_mut().unwrap();
            vocab.remove("!");
            vocab.insert("ab".to_owned(), json!(256));
        },
        &["added_tokens", "\"<s>\" and \"ab\" share id 256"],
    );
    check(&|file| file["added_tokens"][0]["id"] = json!("x"), &["line 1 column", "u32"]);
    check(&|file| file["decoder"] = Value::Null, &["decoder", "none is given"]);
    check(
        &|file| file["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        &["WordPiece"],
    );
    check(&|file| file["decoder"] = json!({"type": "BPEDecoder", "suffix": "</w>"}), &["BPEDecoder"]);
    let strip =
        |start: usize, stop: usize| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let sequence = |list: Value| json!({"type": "Sequence", "decoders": list});
    check(&|file| file["decoder"] = sequence(json!([{"type": "Fuse"}, strip(1, 1)])), &["leading spaces"]);
    check(&|file| file["decoder"] = sequence(json!([strip(1, 0), {"type": "Fuse"}])), &["Strip before Fuse"]);
    check(
        &|file| {
            file["decoder"] = sequence(
                json!([{"type": "ByteFallback"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}]),
            )
        },
        &["only Fuse and Strip may follow"],
    );
    check(&|file| file["model"] = json!({"type": "BPE", "vocab": {}}), &["its content"]);
    check(&|file| drop(file.as_object_mut().unwrap().remove("model")), &["missing field `model`"]);
    check(
        &|file| {
            let pattern = json!({"Regex": "(a"});
            file["pre_tokenizer"] =
                json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
        },
        &["its content"],
    );

    let error = Tokenizer::load(b"{\n  \"model\": ", &|| Duration::ZERO).err().unwrap();
    assert_eq!(error.to_string(), "tokenizer.json: line 2 column 11: EOF while parsing a value");
    for bytes in [&b""[..], b"[]", b"null", b"\xFF", b"{}", b"3"] {
        assert_eq!(Tokenizer::load(bytes, &|| Duration::ZERO).err().unwrap().file(), "tokenizer.json");
    }
    let error = Tokenizer::load(&vec![b' '; TOKENIZER_FILE_BYTES_MAX + 1], &|| Duration::ZERO).err().unwrap();
    assert_eq!(error.to_string(), "tokenizer.json: its size in bytes is 67108865; the limit is 67108864");
}

#[test]
fn cut_and_changed_files_are_errors_and_never_panics() {
    let whole = golden("tokenizers/bytefallback/tokenizer.json");
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut file = whole.clone();
        if random.chance(50) {
            file.truncate(random.below(file.len()));
        } else {
            // Structure stands at the beginning; the vocabulary after it is long.
            let end = file.len().min(4000);
            for _ in 0..3 {
                file[random.below(end)] = b" \"{}[]:,0a\\"[random.below(11)];
            }
        }
        if let Err(error) = Tokenizer::load(&file, &|| Duration::ZERO) {
            assert!(!error.to_string().contains("panics"), "seed {seed}: {error}");
        }
    }
}

#[test]
fn an_unknown_pattern_is_tested_against_the_clock_and_a_known_one_is_not() {
    let ticks = std::cell::Cell::new(0);
    let clock = || {
        ticks.set(ticks.get() + 1);
        Duration::from_millis(400 * ticks.get())
    };
    let load = |pattern: &str| {
        let mut file = bytes_with(json!([]));
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split, file["pre_tokenizer"]]});
        Tokenizer::load(file.to_string().as_bytes(), &clock)
    };
    assert!(load(r"\p{N}{1,3}").is_ok());
    assert_eq!(ticks.get(), 0);
    let error = load("[a-m]+|[n-z]+").err().unwrap().to_string();
    assert!(error.contains("[a-m]+|[n-z]+") && error.contains("the limit is 1000 ms"), "{error}");
    // Each text takes one tick of 400 ms, so the third is too much: two readings each.
    assert_eq!(ticks.get(), 6);
}

#[test]
fn a_space_before_the_first_word_is_the_tokenisers_or_the_texts_own() {
    let check = |kind: &str, text: &str, whole: &str, continued: &str| {
        let file = golden(&format!("tokenizers/{kind}/tokenizer.json"));
        let tokenizer = Tokenizer::load(&file, &Default::default).unwrap();
        let ids = tokenizer.encode("text", text, AddedSpecials::None, ControlText::Plain).unwrap();
        assert_eq!(tokenizer.decode_whole(&ids, SpecialText::Skipped), whole, "{kind}");
        assert_eq!(tokenizer.tokens().decode(&ids, SpecialText::Skipped), continued, "{kind}");
    };
    check("bytefallback", "a b", "a b", " a b");
    check("bytelevel", "a b", "a b", "a b");
    check("bytelevel", " a b", " a b", " a b");
}
