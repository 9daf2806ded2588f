//! Stop strings, found in a text that arrives in pieces. Linear: each string is followed by its own
//! Knuth-Morris-Pratt automaton, at most 16 of them, and what could still be a beginning is their longest state.

use std::sync::Arc;

use crate::error::TextError;
use crate::limits::{STOP_BYTES_MAX, STOPS_MAX};

/// The checked stop strings of a request. Cheap to clone: all sequences of a request share them.
#[derive(Debug, Clone, Default)]
pub struct StopStrings(Arc<[Stop]>);

#[derive(Debug)]
struct Stop {
    text: Box<str>,
    /// `borders[n]` is the length of the longest proper prefix of `text[..=n]` that is also its suffix.
    borders: Box<[u32]>,
}

impl StopStrings {
    /// *Errors*: more than 16, an empty one, or one above 4 KiB, naming `stop` or `stop[i]`.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopStrings, TextError> {
        TextError::check("stop", "strings", stops.len(), STOPS_MAX)?;
        let stops = stops.iter().map(AsRef::as_ref).enumerate().map(|(i, text)| {
            let field = format!("stop[{i}]");
            if text.is_empty() {
                return Err(TextError::invalid(field, "a stop string must not be empty"));
            }
            TextError::check(&field, "bytes", text.len(), STOP_BYTES_MAX)?;
            Ok(Stop { text: text.into(), borders: borders(text.as_bytes()) })
        });
        Ok(StopStrings(stops.collect::<Result<_, _>>()?))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One of the strings, as [`StopMatch`] names it.
    pub fn get(&self, index: usize) -> Option<&str> {
        self.0.get(index).map(|stop| &*stop.text)
    }
}

fn borders(text: &[u8]) -> Box<[u32]> {
    let mut borders = vec![0u32; text.len()];
    for n in 1..text.len() {
        let mut border = borders[n - 1] as usize;
        while border > 0 && text[border] != text[n] {
            border = borders[border - 1] as usize;
        }
        borders[n] = (border + usize::from(text[border] == text[n])) as u32;
    }
    borders.into()
}

/// A stop string that completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopMatch {
    /// Which one: see [`StopStrings::get`].
    pub index: usize,
    /// Bytes of the pushed piece up to and with the string's last one.
    pub end: usize,
    /// The string's length in bytes; it began `end - bytes` from the piece's beginning, often before it.
    pub bytes: usize,
}

/// Follows one sequence's text.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: StopStrings,
    /// How much of each string the text's end is.
    matched: Box<[u32]>,
}

impl StopMatcher {
    /// At the beginning of a text.
    pub fn new(stops: StopStrings) -> Self {
        let matched = vec![0; stops.0.len()].into();
        StopMatcher { stops, matched }
    }

    /// Follows the next piece (whole characters) to the first place where a stop string completes, or to its end.
    /// Of strings that complete together the longest is meant: the one that begins first.
    pub fn push(&mut self, piece: &str) -> Option<StopMatch> {
        if self.stops.is_empty() {
            return None;
        }
        for (at, &byte) in piece.as_bytes().iter().enumerate() {
            let mut found: Option<StopMatch> = None;
            for (index, stop) in self.stops.0.iter().enumerate() {
                let text = stop.text.as_bytes();
                let mut matched = self.matched[index] as usize;
                while matched > 0 && text[matched] != byte {
                    matched = stop.borders[matched - 1] as usize;
                }
                matched += usize::from(text[matched] == byte);
                if matched == text.len() {
                    if found.is_none_or(|other| other.bytes < matched) {
                        found = Some(StopMatch { index, end: at + 1, bytes: matched });
                    }
                    matched = stop.borders[matched - 1] as usize;
                }
                self.matched[index] = matched as u32;
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Bytes at the text's end that could be the beginning of a stop string. Always whole characters, as the
    /// strings and the text are.
    pub fn held_bytes(&self) -> usize {
        self.matched.iter().copied().max().unwrap_or(0) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// (the text up to where the first string completes, its index, its beginning), found by looking.
    fn by_looking(text: &str, stops: &[String]) -> Option<(usize, usize, usize)> {
        (1..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            let here = |stop: &String| text[..end].ends_with(stop.as_str());
            let (index, stop) = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| here(stop))
                .max_by_key(|(i, stop)| (stop.len(), usize::MAX - i))?;
            Some((end, index, end - stop.len()))
        })
    }

    #[test]
    fn matches_and_holds_as_a_plain_search_does() {
        for seed in 0..600 {
            let mut random = Random::new(seed);
            let text = random.word("abé求", 24);
            let stops: Vec<String> =
                (0..1 + random.below(4)).map(|_| random.word("abé求", 4)).filter(|s| !s.is_empty()).collect();
            let mut matcher = StopMatcher::new(StopStrings::new(&stops).unwrap());
            let chars: Vec<(usize, char)> = text.char_indices().collect();
            let (mut fed, mut found) = (0, None);
            while fed < chars.len() && found.is_none() {
                let next = (fed + 1 + random.below(3)).min(chars.len());
                let end = |n: usize| chars.get(n).map_or(text.len(), |&(at, _)| at);
                let (from, to) = (end(fed), end(next));
                found =
                    matcher.push(&text[from..to]).map(|m| (from + m.end, m.index, from + m.end - m.bytes));
                fed = next;
                if found.is_none() {
                    // Held: the longest end of the text that a string begins with, and no more.
                    let begins = |n: usize| {
                        text.is_char_boundary(to - n)
                            && stops.iter().any(|stop| stop.len() > n && stop.starts_with(&text[to - n..to]))
                    };
                    assert_eq!(
                        matcher.held_bytes(),
                        (0..=to).rev().find(|&n| begins(n)).unwrap_or(0),
                        "seed {seed}"
                    );
                }
            }
            assert_eq!(found, by_looking(&text, &stops), "seed {seed}: {text:?} {stops:?}");
        }
    }

    #[test]
    fn goes_on_after_a_match_that_is_ignored() {
        let mut matcher = StopMatcher::new(StopStrings::new(&["aa"]).unwrap());
        assert_eq!(matcher.push("aaxaa"), Some(StopMatch { index: 0, end: 2, bytes: 2 }));
        // The last "a" may begin another one; the match itself may not.
        assert_eq!(matcher.held_bytes(), 1);
        assert_eq!(matcher.push("xaa"), Some(StopMatch { index: 0, end: 3, bytes: 2 }));
    }

    #[test]
    fn checks_its_strings() {
        let error = StopStrings::new(&["a"; 17]).unwrap_err();
        assert_eq!(error.to_string(), "stop has 17 strings; at most 16 are taken");
        assert_eq!(StopStrings::new(&["a", ""]).unwrap_err().field(), Some("stop[1]"));
        assert_eq!(StopStrings::new(&["a".repeat(4097)]).unwrap_err().field(), Some("stop[0]"));
        assert!(StopStrings::new(&["a"; 16]).is_ok());
    }
}
