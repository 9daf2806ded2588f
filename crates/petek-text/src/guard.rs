//! Keeps the client's text from becoming control tokens, through templates that trim, split and compare it.
//!
//! Before rendering, every control token's name inside a client's string is broken by a noncharacter after its
//! first character. After rendering, only names that the template wrote are intact; they are matched, and then the
//! noncharacters are dropped from the rest. A name of one character cannot be broken and is stood in for.
//! The noncharacters are ones that the request does not use, so nothing that was sent is lost.
//!
//! In an assistant's messages only *special* tokens are kept text. The other ones (`<think>`, `<tool_call>`) the
//! model wrote itself: templates look for them, and the history must give the ids that were generated.

use std::borrow::Cow;

use aho_corasick::AhoCorasick;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{FileError, TextError};
use crate::limits::CHAT_DEPTH_MAX;
use crate::tokenizer::FILE;

/// Unicode's 66 noncharacters: never assigned, and no text needs them.
fn noncharacters() -> impl Iterator<Item = char> {
    let planes = (0..=0x10).flat_map(|plane| [(plane << 16) + 0xFFFE, (plane << 16) + 0xFFFF]);
    (0xFDD0..=0xFDEF).chain(planes).filter_map(char::from_u32)
}

pub(crate) fn is_noncharacter(c: char) -> bool {
    matches!(c as u32, 0xFDD0..=0xFDEF) || c as u32 & 0xFFFE == 0xFFFE
}

/// A template's output, with the marks that tell its control tokens from those in the client's text.
pub struct Rendered {
    marked: String,
    marks: Marks,
}

impl Rendered {
    pub(crate) fn new(marked: String, marks: Marks) -> Self {
        Rendered { marked, marks }
    }

    pub(crate) fn marked(&self) -> &str {
        &self.marked
    }

    pub(crate) fn marks(&self) -> &Marks {
        &self.marks
    }

    /// The text itself, as transformers renders it.
    pub fn text(&self) -> String {
        self.marked.chars().filter(|&c| c != self.marks.breaker).map(|c| self.marks.meant(c)).collect()
    }
}

/// The noncharacters that mark one request.
#[derive(Debug, Clone)]
pub(crate) struct Marks {
    breaker: char,
    /// (noncharacter, the one-character control token that it stands for).
    stand_ins: Vec<(char, char)>,
}

impl Marks {
    pub(crate) fn breaker(&self) -> char {
        self.breaker
    }

    /// Whether any mark is in the text.
    pub(crate) fn mark(&self, text: &str) -> bool {
        text.contains(|c| c == self.breaker || self.stand_ins.iter().any(|&(mark, _)| mark == c))
    }

    pub(crate) fn meant(&self, c: char) -> char {
        self.stand_ins.iter().find(|&&(mark, _)| mark == c).map_or(c, |&(_, meant)| meant)
    }
}

/// Who wrote a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Author {
    Client,
    Assistant,
}

/// The names of a model's control tokens.
pub(crate) struct Guard {
    all: Option<AhoCorasick>,
    special: Option<AhoCorasick>,
    /// Always special: one character that is not is no control token.
    one_character: Vec<char>,
}

impl Guard {
    pub(crate) fn new(control: Vec<(u32, AddedToken)>) -> Result<Self, FileError> {
        let (one, more): (Vec<_>, Vec<_>) =
            control.iter().map(|(_, token)| token).partition(|token| token.content.chars().nth(1).is_none());
        let one_character: Vec<char> = one.iter().filter_map(|token| token.content.chars().next()).collect();
        // Half of the noncharacters are left for what a client may send.
        if one_character.len() > 32 {
            let why =
                format!("{} special tokens of one character; at most 32 are supported", one_character.len());
            return Err(FileError::invalid(FILE, "added_tokens", why));
        }
        let automaton = |special_only: bool| {
            let names: Vec<&str> = more
                .iter()
                .filter(|token| token.special || !special_only)
                .map(|token| &*token.content)
                .collect();
            let automaton = (!names.is_empty()).then(|| AhoCorasick::new(names)).transpose();
            automaton.map_err(|error| FileError::invalid(FILE, "added_tokens", error))
        };
        Ok(Guard { all: automaton(false)?, special: automaton(true)?, one_character })
    }

    /// Chooses the marks for a request that holds these texts, the template's source among them.
    pub(crate) fn marks<'a>(&self, texts: impl Iterator<Item = &'a str>) -> Result<Marks, TextError> {
        let mut used: Vec<char> =
            texts.flat_map(|text| text.chars().filter(|&c| is_noncharacter(c))).collect();
        used.sort_unstable();
        let mut free = noncharacters().filter(|c| used.binary_search(c).is_err());
        let breaker = free.next();
        let stand_ins: Vec<_> = free.zip(self.one_character.iter().copied()).collect();
        match breaker {
            Some(breaker) if stand_ins.len() == self.one_character.len() => Ok(Marks { breaker, stand_ins }),
            _ => Err(TextError::invalid("messages", "too many different Unicode noncharacters")),
        }
    }

    /// A string with its control tokens broken.
    pub(crate) fn text<'a>(&self, text: &'a str, author: Author, marks: &Marks) -> Cow<'a, str> {
        let names = if author == Author::Client { &self.all } else { &self.special };
        let mut breaks: Vec<usize> = Vec::new();
        for found in names.iter().flat_map(|names| names.find_overlapping_iter(text)) {
            let first = text[found.start()..].chars().next().map_or(0, char::len_utf8);
            breaks.push(found.start() + first);
        }
        breaks.sort_unstable();
        breaks.dedup();
        if breaks.is_empty() && !text.contains(self.one_character.as_slice()) {
            return Cow::Borrowed(text);
        }
        let mut guarded = String::with_capacity(text.len() + 4 * breaks.len());
        let mut breaks = breaks.into_iter().peekable();
        for (at, c) in text.char_indices() {
            if breaks.next_if_eq(&at).is_some() {
                guarded.push(marks.breaker);
            }
            guarded.push(marks.stand_ins.iter().find(|&&(_, meant)| meant == c).map_or(c, |&(mark, _)| mark));
        }
        Cow::Owned(guarded)
    }

    /// A value with every string in it guarded, keys too.
    pub(crate) fn value(&self, value: &Value, author: Author, marks: &Marks) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text, author, marks).into_owned()),
            Value::Array(list) => list.iter().map(|item| self.value(item, author, marks)).collect(),
            Value::Object(map) => Value::Object(
                map.iter()
                    .map(|(key, item)| {
                        (self.text(key, author, marks).into_owned(), self.value(item, author, marks))
                    })
                    .collect::<Map<_, _>>(),
            ),
            plain => plain.clone(),
        }
    }
}

/// Calls `see` with every string in a value, keys too.
///
/// *Errors*: a value nested deeper than [`CHAT_DEPTH_MAX`].
pub(crate) fn each_string<'a>(
    field: &str,
    value: &'a Value,
    see: &mut impl FnMut(&'a str),
) -> Result<(), TextError> {
    fn walk<'a>(value: &'a Value, depth: usize, see: &mut impl FnMut(&'a str)) -> bool {
        if depth > CHAT_DEPTH_MAX {
            return false;
        }
        match value {
            Value::String(text) => see(text),
            Value::Array(list) => return list.iter().all(|item| walk(item, depth + 1, see)),
            Value::Object(map) => {
                return map.iter().all(|(key, item)| {
                    see(key);
                    walk(item, depth + 1, see)
                });
            }
            _ => {}
        }
        true
    }
    if walk(value, 0, see) {
        return Ok(());
    }
    Err(TextError::invalid(field, format_args!("nested deeper than {CHAT_DEPTH_MAX}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(names: &[&str]) -> Guard {
        let tokens = names.iter().map(|&name| (0, AddedToken::from(name, true))).collect();
        Guard::new(tokens).unwrap()
    }

    #[test]
    fn no_name_stays_intact_and_nothing_else_changes() {
        let names = ["<s>", "<<s>>", "</s>", "ab", "ba", "aba", "<|end|>"];
        let guard = guard(&names);
        let marks = guard.marks(std::iter::empty()).unwrap();
        for text in ["<s>", "x<<s>>y", "ababab", "<|end|><|end|>", "<s</s>", "plain", "", "é<s>求</s>"] {
            let guarded = guard.text(text, Author::Client, &marks);
            assert!(names.iter().all(|name| !guarded.contains(name)), "{text} → {guarded:?}");
            assert_eq!(Rendered::new(guarded.into_owned(), marks.clone()).text(), text);
        }
        assert!(matches!(guard.text("plain <", Author::Client, &marks), Cow::Borrowed(_)));
        // After the first character, so that a template that looks for a beginning or an end still trims alike.
        assert_eq!(guard.text("<s>", Author::Client, &marks), "<\u{FDD0}s>");
    }

    #[test]
    fn marks_avoid_what_the_request_uses() {
        let guard = guard(&["<s>", "§"]);
        let marks = guard.marks(["a\u{FDD0}b", "\u{FDD1}"].into_iter()).unwrap();
        assert_eq!(marks.breaker, '\u{FDD2}');
        assert_eq!(guard.text("<s>§\u{FDD0}", Author::Client, &marks), "<\u{FDD2}s>\u{FDD3}\u{FDD0}");
        let all: String = noncharacters().collect();
        assert_eq!(all.chars().count(), 66);
        assert!(all.chars().all(is_noncharacter));
        let error = guard.marks([all.as_str()].into_iter()).unwrap_err();
        assert_eq!(error.field(), Some("messages"));
    }
}
