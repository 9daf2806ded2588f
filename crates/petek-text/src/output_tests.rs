use super::*;
use crate::limits::STOPS_MAX;
use crate::testing::Random;

/// A table of these byte strings, none of them special.
fn table(tokens: &[&[u8]]) -> Arc<TokenTable> {
    TokenTable::of(&tokens.iter().map(|&bytes| (bytes, false)).collect::<Vec<_>>())
}

fn options(stops: &[&str]) -> OutputOptions {
    OutputOptions {
        special: SpecialText::Skipped,
        include_stop: false,
        stops: StopStrings::new(stops).unwrap(),
        min_tokens: 0,
        eos_ids: Arc::new([]),
        stop_ids: Arc::new([]),
    }
}

/// The deltas as (text, ids), one token pushed at a time and the end last; the ending.
fn stream(output: &mut Output<()>, ids: &[u32]) -> (Vec<(String, Vec<u32>)>, Option<Ending>) {
    let mut deltas = Vec::new();
    let mut ending = None;
    let mut next = output.token_count();
    let mut keep = |pushed: Pushed<()>| {
        if let Some(delta) = pushed.delta {
            assert_eq!((delta.first_index, delta.entries.len()), (next, delta.ids.len()));
            next += delta.ids.len() as u32;
            deltas.push((delta.text, delta.ids));
        }
        ending = ending.take().or(pushed.ending);
    };
    for &id in ids {
        keep(output.push([(id, ())]));
    }
    keep(output.finish());
    (deltas, ending)
}

/// `tokens` in their order through `options`; the deltas must be these (text, ids).
fn check(tokens: &[&[u8]], options: OutputOptions, deltas: &[(&str, &[u32])], ending: Option<Ending>) {
    let ids: Vec<u32> = (0..tokens.len() as u32).collect();
    let (got, end) = stream(&mut Output::new(table(tokens), options), &ids);
    let want: Vec<_> = deltas.iter().map(|&(text, ids)| (text.to_owned(), ids.to_vec())).collect();
    assert_eq!((got, end), (want, ending), "tokens {tokens:?}");
}

fn stopped(text: &str) -> Option<Ending> {
    Some(Ending::StopString(text.to_owned()))
}

#[test]
fn characters_over_several_tokens_come_whole() {
    check(&[b"\xE2", b"\x82", b"\xAC"], options(&[]), &[("€", &[0, 1, 2])], None);
    // The decided part of a token is not held for its unfinished ending.
    check(&[b"a\xF0\x9F", b"\x8C\xB6b"], options(&[]), &[("a", &[0]), ("🌶b", &[1])], None);
    check(&[b"\xE2\x82", b"x"], options(&[]), &[("\u{FFFD}x", &[0, 1])], None);
    // An unfinished ending becomes U+FFFD in the last delta, not earlier.
    check(&[b"x", b"\xE2\x82"], options(&[]), &[("x", &[0]), ("\u{FFFD}", &[1])], None);
    // A family of emoji, Turkish, a combining mark: each character goes as soon as it is whole.
    let family = "👩‍👧".as_bytes();
    check(
        &[&family[..2], &family[2..6], &family[6..], "ığ".as_bytes(), b"e", "\u{301}".as_bytes()],
        options(&[]),
        &[("👩", &[0, 1]), ("\u{200D}👧", &[2]), ("ığ", &[3]), ("e", &[4]), ("\u{301}", &[5])],
        None,
    );
}

#[test]
fn a_prompts_unfinished_bytes_are_used_by_echo_alone_and_resumed_ones_always() {
    // The prompt ends with F0 9F 8C; the output is B6, "k".
    let tokens = table(&[b"\xB6", b"k"]);
    let mut plain = Output::new(tokens.clone(), options(&[]));
    assert_eq!(stream(&mut plain, &[0, 1]).0, [("\u{FFFD}".to_owned(), vec![0]), ("k".to_owned(), vec![1])]);
    let mut echo = Output::<()>::new(tokens, options(&[]));
    let first = echo.echo(b"hot \xF0\x9F\x8C").unwrap();
    assert_eq!((first.text.as_str(), first.ids.len(), first.first_index), ("hot ", 0, 0));
    assert_eq!(stream(&mut echo, &[0, 1]).0, [("🌶".to_owned(), vec![0]), ("k".to_owned(), vec![1])]);
    // Echo alone, and an echo whose ending stays unfinished.
    let mut alone = Output::<()>::new(table(&[]), options(&[]));
    assert_eq!(alone.echo(b"\xF0\x9F"), None);
    assert_eq!(alone.finish().delta.unwrap().text, "\u{FFFD}");

    // resumed_ids [E2 82], then AC: the first delta is "€", at position 1.
    let mut resumed = Output::new(table(&[b"\xE2\x82", b"\xAC"]), options(&[]));
    resumed.resume(&[0]);
    assert_eq!(resumed.token_count(), 1);
    let delta = resumed.push([(1, ())]).delta.unwrap();
    assert_eq!((delta.text.as_str(), delta.ids, delta.first_index), ("€", vec![1], 1));
}

#[test]
fn a_stop_string_is_found_across_tokens_and_cut() {
    let tokens: &[&[u8]] = &[b"abc", b"de"];
    check(tokens, options(&["cd"]), &[("ab", &[0]), ("", &[1])], stopped("cd"));
    let included = OutputOptions { include_stop: true, ..options(&["cd"]) };
    check(tokens, included, &[("ab", &[0]), ("cd", &[1])], stopped("cd"));
    // Text before a stop in the same token.
    check(&[b"so Note: x"], options(&["Note:"]), &[("so ", &[0])], stopped("Note:"));
    // The first to complete wins, then the one that begins first; the list's order never matters.
    for stops in [["bcd", "cd", "d!"], ["d!", "cd", "bcd"]] {
        check(&[b"ab", b"cd!"], options(&stops), &[("a", &[0]), ("", &[1])], stopped("bcd"));
    }
    check(&[b"abcdef"], options(&["abcdef", "bc"]), &[("a", &[0])], stopped("bc"));
}

#[test]
fn a_held_beginning_is_flushed_when_it_was_none() {
    let tokens: &[&[u8]] = &["求".as_bytes(), b"Z", "求".as_bytes()];
    check(tokens, options(&["ZZZ"]), &[("求", &[0]), ("Z求", &[1, 2])], None);
    let tokens: &[&[u8]] = &[b" Note", b"!", b"ok?\n"];
    let stops = ["\n", "Note:"];
    check(tokens, options(&stops), &[(" ", &[0]), ("Note!", &[1]), ("ok?", &[2])], stopped("\n"));
    // At the end of the request.
    check(&[b"a", b"ZZ"], options(&["ZZZ"]), &[("a", &[0]), ("ZZ", &[1])], None);
    // A character that shares its first bytes with the stop's is no beginning of it.
    check(&["汁".as_bytes(), b"x"], options(&["求"]), &[("汁", &[0]), ("x", &[1])], None);
    // Part of a beginning is let go when only a shorter one is left; what is sent is what the ids release.
    let tokens: &[&[u8]] = &[b"abc", b"d", b"e", b"f"];
    check(tokens, options(&["cdX", "deZ"]), &[("ab", &[0]), ("c", &[1, 2]), ("def", &[3])], None);
}

#[test]
fn stops_at_or_before_min_tokens_do_not_count() {
    let least = |min_tokens, stops: &[&str]| OutputOptions { min_tokens, ..options(stops) };
    let letters: Vec<&[u8]> = vec![b"x", b"x", b"x", b"x", b"x", b"x", b"x"];
    let sent: Vec<(&str, &[u32])> =
        vec![("x", &[0]), ("x", &[1]), ("x", &[2]), ("x", &[3]), ("x", &[4]), ("", &[5])];
    check(&letters, least(5, &["x"]), &sent, stopped("x"));
    // Began before, completes after: counts, with its beginning cut.
    check(&[b"a", b"b", b"c"], least(2, &["bc"]), &[("a", &[0]), ("", &[1, 2])], stopped("bc"));
    // Completes before: ignored, and its text is sent; its end may begin another.
    check(&[b"aa", b"a", b"b"], least(1, &["aa"]), &[("a", &[0]), ("", &[1])], stopped("aa"));
    // A token that completes one after another: the ignored one does not hide the next token's.
    check(&[b"a.b.", b"c."], least(1, &["."]), &[("a.b.", &[0]), ("c", &[1])], stopped("."));
}

#[test]
fn eos_and_stop_ids_end_without_their_text() {
    let tokens = TokenTable::of(&[
        (b"ok", false),
        (b"</s>", true),
        (b"END", false),
        (b"\xE2\x82", false),
        (b"N", false),
    ]);
    let base = OutputOptions { eos_ids: Arc::new([1]), stop_ids: Arc::new([2]), ..options(&["No"]) };
    let included = OutputOptions { include_stop: true, ..base.clone() };
    let named = OutputOptions { special: SpecialText::Kept, ..included.clone() };
    let run = |options: &OutputOptions, ids: &[u32]| {
        let (deltas, ending) = stream(&mut Output::new(tokens.clone(), options.clone()), ids);
        let text: String = deltas.iter().map(|(text, _)| text.as_str()).collect();
        let got: Vec<u32> = deltas.into_iter().flat_map(|(_, ids)| ids).collect();
        (text, got.len(), ending.unwrap())
    };
    let (eos, stop) = (Ending::Eos(1), Ending::StopToken(2));
    // Ids and counts keep the ending one; text only where it is asked for, and a special one only if shown at all.
    assert_eq!(run(&base, &[0, 1]), ("ok".to_owned(), 2, eos.clone()));
    assert_eq!(run(&included, &[0, 1]), ("ok".to_owned(), 2, eos.clone()));
    assert_eq!(run(&named, &[0, 1]), ("ok</s>".to_owned(), 2, eos.clone()));
    assert_eq!(run(&base, &[0, 2]), ("ok".to_owned(), 2, stop.clone()));
    assert_eq!(run(&included, &[0, 2]), ("okEND".to_owned(), 2, stop.clone()));
    // What was held or unfinished is flushed.
    assert_eq!(run(&base, &[0, 4, 1]), ("okN".to_owned(), 3, eos.clone()));
    assert_eq!(run(&base, &[3, 1]), ("\u{FFFD}".to_owned(), 2, eos.clone()));
    // ignore_eos lets it pass; as a stop id it still ends.
    let ignored = OutputOptions { eos_ids: Arc::new([]), stop_ids: Arc::new([1]), ..base.clone() };
    assert_eq!(run(&ignored, &[0, 1]), ("ok".to_owned(), 2, Ending::StopToken(1)));
    // Tokens past the ending one are dropped and counted.
    let mut output = Output::new(tokens.clone(), base.clone());
    let pushed = output.push([(0, 'a'), (1, 'b'), (0, 'c'), (0, 'd')]);
    assert_eq!((pushed.delta.unwrap().entries, pushed.dropped), (vec!['a', 'b'], 2));
    assert!(output.has_ended() && output.token_count() == 2);
    assert_eq!(output.push([(0, 'e')]), Pushed { delta: None, ending: None, dropped: 1 });
    assert_eq!(output.finish(), Pushed { delta: None, ending: None, dropped: 0 });
}

#[test]
fn special_tokens_are_left_out_of_text_only() {
    let tokens = TokenTable::of(&[(b"<x>", true), (b"a", false), (b"\xE2\x82", false), (b"\xAC", false)]);
    let (deltas, _) = stream(&mut Output::new(tokens.clone(), options(&[])), &[1, 0, 1, 7]);
    let want: Vec<(String, Vec<u32>)> =
        vec![("a".into(), vec![1]), ("".into(), vec![0]), ("a".into(), vec![1]), ("".into(), vec![7])];
    assert_eq!(deltas, want);
    // A character, and a stop string, may span one.
    let (deltas, _) = stream(&mut Output::new(tokens.clone(), options(&[])), &[2, 0, 3]);
    assert_eq!(deltas, [("€".to_owned(), vec![2, 0, 3])]);
    let (deltas, ending) = stream(&mut Output::new(tokens.clone(), options(&["aa"])), &[1, 0, 1]);
    assert_eq!((deltas, ending), (vec![("".to_owned(), vec![1, 0, 1])], stopped("aa")));
    let kept = OutputOptions { special: SpecialText::Kept, ..options(&[]) };
    let (deltas, _) = stream(&mut Output::new(tokens, kept), &[1, 0]);
    assert_eq!(deltas, [("a".to_owned(), vec![1]), ("<x>".to_owned(), vec![0])]);
}

#[test]
fn an_unfinished_ending_can_complete_a_stop_string() {
    let mut output = Output::new(table(&[b"a", b"\xE2\x82"]), options(&["a\u{FFFD}"]));
    let (deltas, ending) = stream(&mut output, &[0, 1]);
    assert_eq!((deltas, ending), (vec![("".to_owned(), vec![0, 1])], stopped("a\u{FFFD}")));
}

/// What a sequence must come to, found by looking at whole texts: (text, tokens, ending).
fn by_looking(tokens: &TokenTable, options: &OutputOptions, ids: &[u32]) -> (String, usize, Option<Ending>) {
    let special = options.special;
    let id_end = ids.iter().position(|id| options.eos_ids.contains(id) || options.stop_ids.contains(id));
    let count = id_end.map_or(ids.len(), |at| at + 1);
    let with_text = if options.include_stop { count } else { id_end.unwrap_or(count) };
    let text = tokens.decode(&ids[..with_text], special);
    // The text that is decided once `n` tokens are known.
    let decided = |n: usize| {
        if n == count {
            return text.len();
        }
        let bytes: Vec<u8> =
            ids[..n].iter().flat_map(|&id| tokens.text_bytes(id, special)).copied().collect();
        let unfinished = bytes.utf8_chunks().last().map_or(0, |chunk| {
            let incomplete = str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if incomplete { chunk.invalid().len() } else { 0 }
        });
        String::from_utf8_lossy(&bytes[..bytes.len() - unfinished]).len()
    };
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let token = (1..=count).find(|&n| decided(n) >= end).unwrap();
        let stops = (0..STOPS_MAX).map_while(|i| options.stops.get(i));
        let here = stops.filter(|stop| text[..end].ends_with(stop)).max_by_key(|stop| stop.len());
        if let (Some(stop), true) = (here, token as u32 > options.min_tokens) {
            let keep = if options.include_stop { end } else { end - stop.len() };
            return (text[..keep].to_owned(), token, Some(Ending::StopString(stop.to_owned())));
        }
    }
    let ending = id_end.map(|at| match ids[at] {
        id if options.eos_ids.contains(&id) => Ending::Eos(id),
        id => Ending::StopToken(id),
    });
    (text, count, ending)
}

#[test]
fn random_streams_equal_the_one_shot_text_and_can_be_resumed_anywhere() {
    let (mut stopped, mut resumed_inside) = (0, 0);
    for seed in 0..1500 {
        let mut random = Random::new(seed);
        let parts: Vec<(Vec<u8>, bool)> =
            (0..12).map(|_| (random.textlike_bytes(3), random.chance(15))).collect();
        let tokens =
            TokenTable::of(&parts.iter().map(|(bytes, special)| (&bytes[..], *special)).collect::<Vec<_>>());
        let ids: Vec<u32> = (0..1 + random.below(30)).map(|_| random.below(13) as u32).collect();
        // Stop strings out of what the text will be, so that they are met, or nearly.
        let text: Vec<char> = tokens.decode(&ids, SpecialText::Skipped).chars().collect();
        let mut stops = Vec::new();
        while !text.is_empty() && stops.len() < 3 && random.chance(60) {
            let from = random.below(text.len());
            let mut stop: String = text[from..(from + 1 + random.below(4)).min(text.len())].iter().collect();
            if random.chance(40) {
                stop += random.word("ab€", 2).as_str();
            }
            stops.push(stop);
        }
        let options = OutputOptions {
            special: *random.pick(&[SpecialText::Skipped, SpecialText::Kept]),
            include_stop: random.chance(30),
            stops: StopStrings::new(&stops).unwrap(),
            min_tokens: if random.chance(50) { 0 } else { random.below(20) as u32 },
            eos_ids: if random.chance(30) { Arc::new([11]) } else { Arc::new([]) },
            stop_ids: if random.chance(30) { Arc::new([10]) } else { Arc::new([]) },
        };
        let (want_text, want_count, want_ending) = by_looking(&tokens, &options, &ids);

        // Unary (all at once), and streamed in steps of several tokens.
        let entries = |ids: &[u32], first: usize| -> Vec<(u32, usize)> {
            ids.iter().enumerate().map(|(i, &id)| (id, first + i)).collect()
        };
        let mut unary = Output::new(tokens.clone(), options.clone());
        let all = unary.push(entries(&ids, 0));
        let end = unary.finish();
        let joined: String =
            [&all, &end].iter().filter_map(|p| p.delta.as_ref()).map(|d| d.text.as_str()).collect();
        assert_eq!(
            (joined, all.ending.or(end.ending)),
            (want_text.clone(), want_ending.clone()),
            "seed {seed}"
        );

        let mut output = Output::new(tokens.clone(), options.clone());
        let (mut sent, mut sent_ids, mut fed, mut ending, mut dropped) =
            (String::new(), Vec::new(), 0, None, 0);
        loop {
            let next = (fed + 1 + random.below(3)).min(ids.len());
            let pushed =
                if fed < ids.len() { output.push(entries(&ids[fed..next], fed)) } else { output.finish() };
            let over = fed >= ids.len();
            fed = next;
            dropped += pushed.dropped;
            ending = ending.or(pushed.ending);
            if let Some(delta) = pushed.delta {
                assert_eq!(delta.first_index as usize, sent_ids.len(), "seed {seed}");
                let entries: Vec<usize> = (sent_ids.len()..sent_ids.len() + delta.ids.len()).collect();
                assert_eq!(delta.entries, entries, "seed {seed}");
                assert!(!delta.text.is_empty() || !delta.ids.is_empty(), "seed {seed}");
                sent += &delta.text;
                sent_ids.extend(delta.ids);
            }
            if over {
                break;
            }
            if !output.has_ended() {
                // Nothing is held that cannot begin a stop string, and nothing is sent that can.
                let known = want_prefix(&tokens, &options, &ids[..fed]);
                let begins = |n: &usize| {
                    let tail = &known[known.len() - n..];
                    (0..STOPS_MAX)
                        .map_while(|i| options.stops.get(i))
                        .any(|s| s.len() > *n && s.starts_with(tail))
                };
                let borders = (0..=known.len()).rev().filter(|n| known.is_char_boundary(known.len() - n));
                let held = { borders }.find(begins).unwrap_or(0);
                assert_eq!(sent, known[..known.len() - held], "seed {seed}");

                // A client that has this much goes on with its ids and gets exactly the rest.
                let mut again = Output::new(tokens.clone(), options.clone());
                again.resume(&sent_ids);
                let (rest, _) = stream_entries(&mut again, &ids[sent_ids.len()..]);
                assert_eq!(sent.clone() + &rest, want_text, "seed {seed}, resumed after {}", sent_ids.len());
                resumed_inside += usize::from(sent_ids.len() < fed);
            }
        }
        stopped += usize::from(matches!(want_ending, Some(Ending::StopString(_))));
        assert_eq!((sent, ending), (want_text, want_ending), "seed {seed}");
        assert_eq!(sent_ids, ids[..want_count], "seed {seed}");
        assert_eq!(dropped, ids.len() - want_count, "seed {seed}");
    }
    // The inputs reach what they are for.
    assert!(
        stopped > 300 && resumed_inside > 300,
        "{stopped} stopped, {resumed_inside} resumed with text held back"
    );
}

/// All text that these tokens decide.
fn want_prefix(tokens: &TokenTable, options: &OutputOptions, ids: &[u32]) -> String {
    let mut text = String::new();
    let mut detokenizer = Detokenizer::default();
    ids.iter().for_each(|&id| detokenizer.push(tokens.text_bytes(id, options.special), &mut text));
    text
}

fn stream_entries(output: &mut Output<()>, ids: &[u32]) -> (String, Option<Ending>) {
    let (deltas, ending) = stream(output, ids);
    (deltas.into_iter().map(|(text, _)| text).collect(), ending)
}
