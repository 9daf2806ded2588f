//! The regular expressions of tokenizer.json. Those of well-known families are near linear and pass; any other
//! must prove it at load, on texts that make bad ones slow: a client could send such a text at any time.

use std::time::Duration;

use serde_json::Value;

use crate::error::FileError;
use crate::tokenizer::FILE;

/// What the search for an unknown pattern's slowest text may take, and then that text at its full length. Known
/// patterns need about a tenth of it for each, on a core that four other programs want too.
const SELF_TEST_BUDGET: Duration = Duration::from_secs(1);
/// The lengths at which texts are searched and at which the slowest is judged: at 4 s per MiB the full 4 MiB of a
/// request would hold a thread for 16 s.
const SEARCHED_BYTES: usize = 1 << 10;
const JUDGED_BYTES: usize = 256 << 10;

/// Patterns that are known to be near linear, as tokenizer.json spells them.
const KNOWN: &[&str] = &[
    // GPT-2; the second is Falcon's beside it.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[0-9][0-9][0-9]",
    // Llama 3, GPT-4's cl100k.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 2 and 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // GPT-4o's o200k, Mistral's Tekken.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // DeepSeek V3 and R1.
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// What the texts of the self-test are made of: runs of one of these, each ended by [`RUN_END`].
const PROBES: &[&str] = &["a", " ", "\n", "1", "!", "aA", " \n"];
/// No pattern wants it: one that needs another end goes back over the whole run.
const RUN_END: &str = "\u{1}";
/// Repetitions in a run. The regex library gives up a search after 10⁶ steps back and leaves the rest unsplit, so an
/// exponential pattern is slow in short runs only: of 15 to 29, whether each character doubles its steps or
/// multiplies them by 1.6; a quadratic one in long runs.
const RUNS: &[usize] = &[12, 14, 16, 17, 18, 19, 20, 22, 24, 26, 28, 29, 48, 96, 300, 900];

/// Every regular expression below a pre-tokeniser or a normaliser that is not [known](KNOWN).
pub(crate) fn unknown_patterns(parts: &[&Value]) -> Vec<String> {
    let mut found = Vec::new();
    for part in parts {
        collect(part, &mut found);
    }
    found
}

/// Recursion is as deep as serde_json lets a file be (128).
fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(pattern) if key == "Regex" && !KNOWN.contains(&pattern.as_str()) => {
                        found.push(pattern.clone());
                    }
                    other => collect(other, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

/// Finds the text that `split` (normaliser and pre-tokeniser) is slowest on, and judges it at its full length, by
/// doubling it: one that fails costs little more than the budget.
pub(crate) fn self_test(
    patterns: &[String],
    clock: &dyn Fn() -> Duration,
    split: impl Fn(&str) -> Result<(), String>,
) -> Result<(), FileError> {
    let Some(pattern) = patterns.first() else { return Ok(()) };
    let time = |(probe, run): (&str, usize), bytes: usize| -> Result<Duration, FileError> {
        let run = probe.repeat(run) + RUN_END;
        let text = run.repeat(bytes.div_ceil(run.len()));
        let start = clock();
        split(&text).map_err(|why| FileError::invalid(FILE, "pre_tokenizer", why))?;
        Ok(clock().saturating_sub(start))
    };
    let refuse = |(probe, run): (&str, usize), bytes: usize, spent: Duration| {
        let why = format!(
            "the unknown pattern {:?} takes over {} ms for {} KiB of runs of {run} × {probe:?}; the limit is {} ms for \
             {} KiB, since such a text would stall the tokeniser",
            pattern.chars().take(64).collect::<String>(),
            spent.as_millis(),
            bytes >> 10,
            SELF_TEST_BUDGET.as_millis(),
            JUDGED_BYTES >> 10,
        );
        Err(FileError::invalid(FILE, "pre_tokenizer", why))
    };

    let mut slowest = (Duration::ZERO, (PROBES[0], RUNS[0]));
    let mut searched = Duration::ZERO;
    for text in PROBES.iter().flat_map(|&probe| RUNS.iter().map(move |&run| (probe, run))) {
        // The least of two: a busy machine slows one, a bad pattern both.
        let mut least = Duration::MAX;
        for _ in 0..2 {
            let spent = time(text, SEARCHED_BYTES)?;
            (least, searched) = (least.min(spent), searched + spent);
            if searched > SELF_TEST_BUDGET {
                let (spent, text) = slowest.max((spent, text));
                return refuse(text, SEARCHED_BYTES, spent);
            }
        }
        slowest = slowest.max((least, text));
    }
    let mut bytes = SEARCHED_BYTES;
    while bytes < JUDGED_BYTES {
        bytes *= 2;
        let spent = time(slowest.1, bytes)?;
        if spent > SELF_TEST_BUDGET {
            return refuse(slowest.1, bytes, spent);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_unknown_patterns_are_found() {
        let part = serde_json::json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": KNOWN[2]}, "behavior": "Isolated", "invert": false},
            {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": false},
            {"type": "Split", "pattern": {"String": "(a+)+c"}, "behavior": "Isolated", "invert": false},
        ]});
        assert_eq!(unknown_patterns(&[&part, &Value::Null]), ["(a+)+b"]);
    }

    /// Judges a pattern whose steps for a run of `n` characters are `steps(n)`, at 10 ns each, with a search given up
    /// after 10⁶; returns the refusal and the time that the test took.
    fn judge(steps: impl Fn(&str) -> f64) -> (Option<String>, Duration) {
        let now = Cell::new(Duration::ZERO);
        let result = self_test(&["(a+)+b".to_owned()], &|| now.get(), |text| {
            for run in text.split_inclusive(RUN_END) {
                let steps = steps(run);
                now.set(now.get() + Duration::from_nanos(10 * steps.min(1e6) as u64));
                if steps > 1e6 {
                    break;
                }
            }
            Ok(())
        });
        (result.err().map(|error| error.to_string()), now.get())
    }

    #[test]
    fn slow_patterns_are_refused_by_what_they_are_slow_on() {
        let chars = |run: &str| run.chars().count() as f64;
        let (refusal, took) = judge(|run| 10.0 * chars(run));
        assert_eq!(refusal, None);
        assert!(took < SELF_TEST_BUDGET, "{took:?}");
        // Each slow in one text alone: exponential by 2 and by 1.6 for one letter, quadratic, cubic.
        let slow: [(&str, &dyn Fn(f64) -> f64); 4] =
            [("a", &|n| n.exp2()), ("1", &|n| 1.618f64.powf(n)), ("\n", &|n| n * n), (" ", &|n| n * n * n)];
        for (probe, cost) in slow {
            let is_slow = |run: &str| run.trim_end_matches(RUN_END).trim_start_matches(probe).is_empty();
            let (refusal, took) = judge(|run| if is_slow(run) { cost(chars(run)) } else { chars(run) });
            let refusal = refusal.unwrap_or_else(|| panic!("{probe:?} passed in {took:?}"));
            let names = refusal.contains("(a+)+b") && refusal.contains(&format!("{probe:?}"));
            assert!(names, "{refusal}");
            assert!(took < 8 * SELF_TEST_BUDGET, "{took:?}");
        }
    }

    #[test]
    fn without_an_unknown_pattern_nothing_is_run() {
        self_test(&[], &|| panic!("the clock was read"), |_| panic!("a text was split")).unwrap();
    }
}
