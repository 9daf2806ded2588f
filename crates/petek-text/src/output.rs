//! One sequence's way from token ids to what its client gets: special tokens left out, bytes read as text, stop
//! strings found, and each token handed on with its text.
//!
//! ```text
//!  token ids ──▶ bytes ──▶ text decided so far
//!                          ├─ released ─────────┬─ held: may begin a stop string ─┬─ unfinished character ─┤
//! ```
//! **What a delta's ids are.** After every delta, the text sent so far is exactly what the ids sent so far release:
//! a machine that is given these ids alone holds back the same rest. So a client whose stream broke can go on with
//! its ids as `resumed_ids` and gets the rest, byte for byte, also where a delta ended inside a token's text.

use std::sync::Arc;

use crate::detokenize::Detokenizer;
use crate::stop::{StopMatcher, StopStrings};
use crate::token_table::{SpecialText, TokenTable};

/// What a request says about its text. Shared by its sequences.
#[derive(Debug, Clone)]
pub struct OutputOptions {
    /// `skip_special_tokens`.
    pub special: SpecialText,
    /// Whether the string or token that ends the sequence is part of the text.
    pub include_stop: bool,
    /// Stop strings.
    pub stops: StopStrings,
    /// Stop strings that complete at or before this token do not count. Units: output tokens, resumed ones too.
    pub min_tokens: u32,
    /// Ids that end the sequence as EOS: empty under `ignore_eos`.
    pub eos_ids: Arc<[u32]>,
    /// Ids that the client wants to stop at.
    pub stop_ids: Arc<[u32]>,
}

/// A piece of the output. `entries` are one per id: logprobs, or whatever the caller hands in.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta<E> {
    /// The new text; may be empty when only tokens without text came.
    pub text: String,
    /// The tokens that this text releases.
    pub ids: Vec<u32>,
    /// One for each of `ids`.
    pub entries: Vec<E>,
    /// The output position of the first id (of the next one, where there is none): its index in resumed ‖ new ids.
    pub first_index: u32,
}

/// What ended a sequence, as the text shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// A stop string completed.
    StopString(String),
    /// An EOS id came.
    Eos(u32),
    /// A stop id came.
    StopToken(u32),
}

/// What pushing tokens gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Pushed<E> {
    /// To be sent, if there is anything.
    pub delta: Option<Delta<E>>,
    /// Set once: the sequence is over, and the delta is its last.
    pub ending: Option<Ending>,
    /// Tokens past the ending one: never sent, never billed.
    pub dropped: usize,
}

/// The output of one sequence, from its first token to its end.
#[derive(Debug, Clone)]
pub struct Output<E> {
    tokens: Arc<TokenTable>,
    options: OutputOptions,
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    /// Text decided but not released: it may begin a stop string.
    held: String,
    /// Tokens not released yet.
    waiting: Vec<(u32, E)>,
    /// Output tokens so far, resumed ones too.
    token_count: u32,
    ended: bool,
}

impl<E> Output<E> {
    /// Before the first token.
    pub fn new(tokens: Arc<TokenTable>, options: OutputOptions) -> Self {
        let matcher = StopMatcher::new(options.stops.clone());
        Output {
            tokens,
            options,
            detokenizer: Detokenizer::default(),
            matcher,
            held: String::new(),
            waiting: Vec::new(),
            token_count: 0,
            ended: false,
        }
    }

    /// Puts the prompt's text first: prompt ‖ output is one byte string, so an unfinished character at the prompt's
    /// end is completed by the output. Stop strings are not looked for in it. To be called first, if at all.
    pub fn echo(&mut self, prompt: &[u8]) -> Option<Delta<E>> {
        let mut delta = self.empty_delta();
        self.detokenizer.push(prompt, &mut delta.text);
        (!delta.text.is_empty()).then_some(delta)
    }

    /// Takes output tokens of an earlier call, whose text the client has: what they released is not sent again,
    /// what they held back comes with the next tokens. To be called before [`Output::push`].
    pub fn resume(&mut self, ids: &[u32]) {
        for &id in ids {
            self.token_count += 1;
            let mut piece = String::new();
            self.detokenizer.push(self.tokens.text_bytes(id, self.options.special), &mut piece);
            // What was sent cannot be unsent: a match in here can only come of other options, and does not count.
            self.append(&piece, false);
            self.held.drain(..self.held.len() - self.matcher.held_bytes());
        }
    }

    /// Takes the next tokens, each with its entry.
    pub fn push(&mut self, tokens: impl IntoIterator<Item = (u32, E)>) -> Pushed<E> {
        let mut tokens = tokens.into_iter();
        let mut delta = self.empty_delta();
        let mut ending = None;
        while !self.ended {
            let Some((id, entry)) = tokens.next() else { break };
            self.waiting.push((id, entry));
            ending = self.token(id);
            self.release(&mut delta);
        }
        Pushed { delta: delta.unless_empty(), ending, dropped: tokens.count() }
    }

    /// Ends the sequence for a reason of the worker's (length, cancel): an unfinished character becomes U+FFFD, and
    /// all that was held back is released. If that U+FFFD completes a stop string, this is the ending.
    pub fn finish(&mut self) -> Pushed<E> {
        let mut delta = self.empty_delta();
        let mut ending = None;
        if !self.ended {
            ending = self.end(String::new()).map(Ending::StopString);
            self.release(&mut delta);
        }
        Pushed { delta: delta.unless_empty(), ending, dropped: 0 }
    }

    /// Output tokens taken so far, resumed ones and the ending one too: what usage counts.
    pub fn token_count(&self) -> u32 {
        self.token_count
    }

    /// Whether the sequence is over.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Follows one token; says what it ends.
    fn token(&mut self, id: u32) -> Option<Ending> {
        self.token_count += 1;
        let ending = if self.options.eos_ids.contains(&id) {
            Some(Ending::Eos(id))
        } else {
            self.options.stop_ids.contains(&id).then_some(Ending::StopToken(id))
        };
        let mut piece = String::new();
        if ending.is_none() || self.options.include_stop {
            self.detokenizer.push(self.tokens.text_bytes(id, self.options.special), &mut piece);
        }
        if ending.is_some() {
            return self.end(piece).map(Ending::StopString).or(ending);
        }
        let stop = self.append(&piece, self.stops_count())?;
        self.ended = true;
        Some(Ending::StopString(stop))
    }

    /// Takes the last text.
    fn end(&mut self, mut piece: String) -> Option<String> {
        self.detokenizer.finish(&mut piece);
        self.ended = true;
        self.append(&piece, self.stops_count())
    }

    fn stops_count(&self) -> bool {
        self.token_count > self.options.min_tokens
    }

    /// Appends decided text up to a stop string that counts, which is returned.
    fn append(&mut self, piece: &str, count: bool) -> Option<String> {
        let mut rest = piece;
        while let Some(found) = self.matcher.push(rest) {
            self.held.push_str(&rest[..found.end]);
            rest = &rest[found.end..];
            if count {
                let cut = if self.options.include_stop { 0 } else { found.bytes };
                self.held.truncate(self.held.len() - cut);
                return self.options.stops.get(found.index).map(str::to_owned);
            }
        }
        self.held.push_str(rest);
        None
    }

    /// Moves into the delta all text that cannot begin a stop string, and with it the tokens so far: without new
    /// text they wait, unless nothing at all is held back.
    fn release(&mut self, delta: &mut Delta<E>) {
        let held = if self.ended { 0 } else { self.matcher.held_bytes() };
        let ready = self.held.len() - held;
        if ready > 0 || self.ended || (held == 0 && self.detokenizer.is_at_border()) {
            delta.text.extend(self.held.drain(..ready));
            for (id, entry) in self.waiting.drain(..) {
                delta.ids.push(id);
                delta.entries.push(entry);
            }
        }
    }

    fn empty_delta(&self) -> Delta<E> {
        let first_index = self.token_count - self.waiting.len() as u32;
        Delta { text: String::new(), ids: Vec::new(), entries: Vec::new(), first_index }
    }
}

impl<E> Delta<E> {
    fn unless_empty(self) -> Option<Self> {
        if self.text.is_empty() && self.ids.is_empty() { None } else { Some(self) }
    }
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
