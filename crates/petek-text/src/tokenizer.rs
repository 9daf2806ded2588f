//! Text to token ids. `tokenizers` does the work; this file decides what it may match: the whole of a text, all
//! but the control tokens, or, in a rendered chat, the control tokens that the template wrote and no others.

use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer,
};

use crate::error::{FileError, TextError};
use crate::guard::{Guard, Marks, Rendered};
use crate::limits::{TEXT_BYTES_MAX, TOKENIZER_FILE_BYTES_MAX};
use crate::patterns::{self_test, unknown_patterns};
use crate::token_table::{SpecialText, TokenTable};

pub(crate) const FILE: &str = "tokenizer.json";

/// Whether the tokens that tokenizer.json's post-processor adds (BOS mostly) are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddedSpecials {
    /// As a plain completion gets them.
    Added,
    /// None: a chat template writes its own.
    None,
}

/// What a control token's name inside a text is. A *control token* is an added token that is special, or that is
/// neither one character nor white space alone (runs of spaces and line breaks are added tokens of some families).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlText {
    /// The token (`parse_special`).
    Parsed,
    /// Text like any other.
    Plain,
}

/// A loaded tokenizer.json.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens without the control tokens.
    plain: AddedVocabulary,
    guard: Guard,
    /// Whether a control token is matched on normalised text, where other letters may become its name.
    forgeable: bool,
    first_space: FirstSpace,
    tokens: Arc<TokenTable>,
}

/// What becomes of a space before a text's first word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstSpace {
    /// The tokeniser puts one there, so whoever reads a whole text's ids takes it away.
    Added,
    /// It is the text's own.
    Own,
}

impl Tokenizer {
    /// Reads tokenizer.json. Its truncation and padding are dropped.
    ///
    /// `clock` is a monotonic clock of any origin; it bounds the self-test of unknown patterns.
    ///
    /// *Errors*: [`FileError`] naming the key, or line and column.
    pub fn load(file: &[u8], clock: &dyn Fn() -> Duration) -> Result<Tokenizer, FileError> {
        check_file_size(FILE, file, TOKENIZER_FILE_BYTES_MAX)?;
        let raw: RawFile = serde_json::from_slice(file).map_err(|error| FileError::json(FILE, &error))?;
        // The library unwraps in places; what it panics on is a bad file too.
        let loaded = catch_unwind(|| tokenizers::Tokenizer::from_bytes(file))
            .map_err(|_| FileError::invalid(FILE, "its content", "the tokenizers library panics on it"))?;
        let mut inner = loaded.map_err(|error| FileError::invalid(FILE, "its content", error))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| FileError::invalid(FILE, "truncation", error))?;
        check_deterministic(inner.get_model())?;
        let tokens = Arc::new(TokenTable::new(&inner)?);
        for token in &raw.added_tokens {
            let actual = inner.token_to_id(&token.content);
            if actual != Some(token.id) {
                let why = format!(
                    "{:?} says id {}, but the library gives it {}; ids must follow on the vocabulary without a gap",
                    token.content,
                    token.id,
                    actual.map_or("none".to_owned(), |id| id.to_string()),
                );
                return Err(FileError::invalid(FILE, "added_tokens", why));
            }
        }

        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let (control, textual): (Vec<_>, Vec<_>) =
            added.iter().map(|(&id, token)| (id, token.clone())).partition(|(_, token)| is_control(token));
        let forgeable = inner.get_normalizer().is_some() && control.iter().any(|(_, token)| token.normalized);
        let guard = Guard::new(control)?;
        let plain = added_vocabulary(textual, inner.get_normalizer())?;
        let mut tokenizer =
            Tokenizer { inner, plain, guard, forgeable, first_space: FirstSpace::Own, tokens };

        self_test(&unknown_patterns(&[&raw.normalizer, &raw.pre_tokenizer]), clock, |text| {
            tokenizer.split(&tokenizer.plain, text, None).map(drop).map_err(|error| error.to_string())
        })?;
        // Found out by trying, for the rule is spread over three parts of the file.
        let of_a_word = tokenizer.encode("text", "a", AddedSpecials::None, ControlText::Plain);
        let of_a_word = of_a_word.map_err(|error| FileError::invalid(FILE, "its content", error))?;
        if tokenizer.tokens.decode(&of_a_word, SpecialText::Skipped).starts_with(' ') {
            tokenizer.first_space = FirstSpace::Added;
        }
        Ok(tokenizer)
    }

    /// The bytes of every token; decoding.
    pub fn tokens(&self) -> &Arc<TokenTable> {
        &self.tokens
    }

    /// The text that a whole list of ids stands for: a space that tokenising put before the first word is taken away
    /// again. Output, which continues a text, is decoded by [`TokenTable::decode`].
    pub fn decode_whole(&self, ids: &[u32], special: SpecialText) -> String {
        let mut text = self.tokens.decode(ids, special);
        if self.first_space == FirstSpace::Added && text.starts_with(' ') {
            text.remove(0);
        }
        text
    }

    /// The id of a token by its string in the vocabulary or its added content.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Tokenises a text. `field` is what an error calls it.
    ///
    /// *Errors*: [`TextError::TooLarge`] above 4 MiB.
    pub fn encode(
        &self,
        field: &str,
        text: &str,
        specials: AddedSpecials,
        control: ControlText,
    ) -> Result<Vec<u32>, TextError> {
        TextError::check(field, "bytes of text", text.len(), TEXT_BYTES_MAX)?;
        let vocabulary = match control {
            ControlText::Parsed => self.inner.get_added_vocabulary(),
            ControlText::Plain => &self.plain,
        };
        self.ids(vocabulary, text, None, specials).map_err(fault)
    }

    /// Tokenises a rendered chat, without added specials: the template's control tokens become tokens, those in
    /// the client's text stay text.
    ///
    /// *Errors*: [`TextError::TooLarge`] above 4 MiB.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>, TextError> {
        TextError::check("messages", "bytes of rendered text", rendered.marked().len(), TEXT_BYTES_MAX)?;
        let (marks, mut text) = (rendered.marks(), rendered.marked().to_owned());
        // A normaliser may make a control token of letters that only look like it (full-width ones under NFKC).
        // Such a match is not literal: it is marked as client text is, and the text matched again.
        for _ in 0..8 {
            let forged = self.forged_tokens(&text).map_err(fault)?;
            if forged.is_empty() {
                let vocabulary = self.inner.get_added_vocabulary();
                return self.ids(vocabulary, &text, Some(marks), AddedSpecials::None).map_err(fault);
            }
            for start in forged.into_iter().rev() {
                let first = text[start..].chars().next().map_or(0, char::len_utf8);
                text.insert(start + first, marks.breaker());
            }
        }
        Err(TextError::invalid("messages", "they normalise to control tokens of this model"))
    }

    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Where control tokens begin that were matched on normalised text but do not stand in `text` as they are.
    fn forged_tokens(&self, text: &str) -> tokenizers::Result<Vec<usize>> {
        if !self.forgeable {
            return Ok(Vec::new());
        }
        let added = self.inner.get_added_vocabulary();
        let split = added.extract_and_normalize(self.inner.get_normalizer(), text);
        let mut starts = Vec::new();
        for (_, (start, end), tokens) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            let Some(token) = tokens.as_ref().and_then(|tokens| tokens.first()) else { continue };
            let (Some(literal), Some(added)) =
                (text.get(start..end), added.get_added_tokens_decoder().get(&token.id))
            else {
                return Err(format!("token {} was matched outside the text", token.id).into());
            };
            // White space around it belongs to tokens that strip (lstrip, rstrip).
            if is_control(added) && literal.trim() != added.content.trim() {
                starts.push(start + (literal.len() - literal.trim_start().len()));
            }
        }
        Ok(starts)
    }

    fn ids(
        &self,
        vocabulary: &AddedVocabulary,
        text: &str,
        marks: Option<&Marks>,
        specials: AddedSpecials,
    ) -> tokenizers::Result<Vec<u32>> {
        let mut pieces = self.split(vocabulary, text, marks)?;
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get()))?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
        let encoding = self.inner.post_process(encoding, None, specials == AddedSpecials::Added)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// `tokenizers`' own first steps (match added tokens, normalise, pre-tokenise), over any added vocabulary,
    /// and with the marks dropped once they have kept the client's text from matching.
    fn split(
        &self,
        vocabulary: &AddedVocabulary,
        text: &str,
        marks: Option<&Marks>,
    ) -> tokenizers::Result<PreTokenizedString> {
        let mut pieces = vocabulary.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(marks) = marks {
            pieces.split(|_, mut piece| {
                if marks.mark(piece.get()) {
                    piece.filter(|c| c != marks.breaker());
                    piece.map(|c| marks.meant(c));
                }
                Ok([piece])
            })?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        Ok(pieces)
    }
}

/// What is read of tokenizer.json beside the library's own reading. Unknown keys are the library's business.
#[derive(Deserialize)]
struct RawFile {
    #[serde(default)]
    added_tokens: Vec<RawAddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(rename = "model")]
    _model: IgnoredAny,
}

#[derive(Deserialize)]
struct RawAddedToken {
    id: u32,
    content: String,
}

pub(crate) fn check_file_size(file: &'static str, bytes: &[u8], limit: usize) -> Result<(), FileError> {
    if bytes.len() <= limit {
        return Ok(());
    }
    let what = "its size in bytes".to_owned();
    Err(FileError::TooLarge { file, what, limit: limit as u64, actual: bytes.len() as u64 })
}

/// Sampled segmentations would give one text other ids each time, and no block would ever be found again.
fn check_deterministic(model: &ModelWrapper) -> Result<(), FileError> {
    let (key, on) = match model {
        ModelWrapper::BPE(bpe) => ("model.dropout", bpe.dropout.is_some_and(|p| p != 0.0)),
        ModelWrapper::Unigram(unigram) => ("model.alpha", unigram.alpha.is_some_and(|alpha| alpha != 0.0)),
        _ => return Ok(()),
    };
    if on { Err(FileError::invalid(FILE, key, "it makes tokenising random; set it to null")) } else { Ok(()) }
}

fn is_control(token: &AddedToken) -> bool {
    let textual = token.content.chars().all(|c| c.is_whitespace() || c == '▁')
        || token.content.chars().nth(1).is_none();
    token.special || !textual
}

/// An added vocabulary of some of the tokens, under the ids that they have.
fn added_vocabulary(
    tokens: Vec<(u32, AddedToken)>,
    normalizer: Option<&NormalizerWrapper>,
) -> Result<AddedVocabulary, FileError> {
    // The library asks the model for each token's id: a word list of just these answers.
    let fail = |error: tokenizers::Error| FileError::invalid(FILE, "added_tokens", error);
    let ids = tokens.iter().map(|(id, token)| (token.content.clone(), *id)).collect();
    let ids = WordLevel::builder().vocab(ids).unk_token(String::new()).build().map_err(fail)?;
    let mut vocabulary = AddedVocabulary::new();
    vocabulary.add_tokens(tokens.into_iter().map(|(_, token)| token), &ids, normalizer).map_err(fail)?;
    Ok(vocabulary)
}

fn fault(error: tokenizers::Error) -> TextError {
    TextError::Fault { what: "the tokeniser", why: error.to_string() }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
