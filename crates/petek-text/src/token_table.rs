//! The raw bytes of every token, and decoding, which is petek's own: the bytes of the tokens one after another,
//! read as UTF-8 lossily by maximal subparts.
//!
//! `tokenizers` decodes a list of strings instead: one bad byte spoils a whole run of its byte fallback, which no
//! stream can do (the run's beginning was already sent), and it strips the first token's space, as if every list
//! began a text. Wherever it writes no U+FFFD and the list goes on a text, both say the same.

use std::collections::BTreeMap;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::metaspace::Metaspace;
use tokenizers::{Decoder, Model};

use crate::error::FileError;
use crate::limits::VOCABULARY_MAX;
use crate::tokenizer::FILE;

/// Whether special tokens have text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// Left out of the text (`skip_special_tokens`); never out of ids or counts.
    Skipped,
    /// Written as their names.
    Kept,
}

/// What each token id stands for: its raw bytes, and whether it is special. Ids without a token have no bytes.
#[derive(Debug)]
pub struct TokenTable {
    bytes: Vec<u8>,
    /// `ends[id]` is where the bytes of `id` end; they begin where those of `id - 1` end.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Ordinary,
    Special,
}

impl TokenTable {
    /// The size of the tokeniser's vocabulary: one more than its largest id. The model's may be larger.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether the tokeniser has a token of this id.
    pub fn contains(&self, id: u32) -> bool {
        self.kind(id) != Kind::None
    }

    /// Whether this id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.kind(id) == Kind::Special
    }

    /// The raw bytes of a token, often not UTF-8 on their own; empty for an id without a token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = (id as usize).checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// The bytes that a token adds to a text: [`TokenTable::bytes`], or none for a special token that is skipped.
    pub fn text_bytes(&self, id: u32, special: SpecialText) -> &[u8] {
        if special == SpecialText::Skipped && self.is_special(id) { &[] } else { self.bytes(id) }
    }

    /// One token's bytes alone as text, with U+FFFD for what is no UTF-8: the string of a logprob entry.
    pub fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.bytes(id)).into_owned()
    }

    /// The text of a list of ids as a continuation: no leading space is stripped.
    pub fn decode(&self, ids: &[u32], special: SpecialText) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.text_bytes(id, special)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::None)
    }

    /// Reads the vocabulary of a loaded tokenizer.json.
    pub(crate) fn new(tokenizer: &tokenizers::Tokenizer) -> Result<TokenTable, FileError> {
        let decoding = Decoding::new(tokenizer.get_decoder())?;
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let mut strings: BTreeMap<u32, (String, Kind)> = BTreeMap::new();
        let mut put = |id: u32, string: String, kind: Kind| -> Result<Option<String>, FileError> {
            if id as usize >= VOCABULARY_MAX {
                let what = format!("the id of token {string:?}");
                return Err(FileError::TooLarge {
                    file: FILE,
                    what,
                    limit: VOCABULARY_MAX as u64 - 1,
                    actual: id.into(),
                });
            }
            Ok(strings.insert(id, (string, kind)).map(|(other, _)| other))
        };
        let shared = |at: &str, id: u32, a: String, b: String| {
            let (a, b) = if a < b { (a, b) } else { (b, a) };
            Err(FileError::invalid(FILE, at, format!("{a:?} and {b:?} share id {id}")))
        };
        for (string, id) in tokenizer.get_model().get_vocab() {
            if let Some(other) = put(id, string.clone(), Kind::Ordinary)? {
                return shared("model.vocab", id, other, string);
            }
        }
        for (&id, token) in added {
            // The string that decodes is the normalised one: a byte-level normaliser's for instance.
            let string = tokenizer.id_to_token(id).unwrap_or_else(|| token.content.clone());
            let kind = if token.special { Kind::Special } else { Kind::Ordinary };
            if let Some(other) = put(id, string, kind)?.filter(|other| *other != token.content) {
                return shared("added_tokens", id, other, token.content.clone());
            }
        }

        let mut table = TokenTable { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new() };
        for (id, (string, kind)) in strings {
            // Ids between two tokens have none.
            table.ends.resize(id as usize, table.bytes.len() as u32);
            table.kinds.resize(id as usize, Kind::None);
            let content = added.get(&id).map(|token| token.content.as_str());
            table.bytes.extend(decoding.bytes(string, content)?);
            table.ends.push(table.bytes.len() as u32);
            table.kinds.push(kind);
        }
        Ok(table)
    }
}

#[cfg(test)]
impl TokenTable {
    /// A table of these tokens, ids from 0: (bytes, special).
    pub(crate) fn of(tokens: &[(&[u8], bool)]) -> std::sync::Arc<TokenTable> {
        let mut table = TokenTable { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new() };
        for &(bytes, special) in tokens {
            table.bytes.extend(bytes);
            table.ends.push(table.bytes.len() as u32);
            table.kinds.push(if special { Kind::Special } else { Kind::Ordinary });
        }
        std::sync::Arc::new(table)
    }
}

/// How tokenizer.json's `decoder` turns one token's string into bytes. Only decoders whose text is the sum of
/// their tokens' can be streamed; others are refused by name.
struct Decoding<'a> {
    steps: Vec<&'a DecoderWrapper>,
    alphabet: Alphabet,
}

#[derive(Clone, Copy, PartialEq)]
enum Alphabet {
    /// GPT-2's 256 printable characters stand for the bytes.
    ByteLevel,
    /// `<0x0A>` is a byte, all else UTF-8.
    ByteFallback,
    Utf8,
}

impl<'a> Decoding<'a> {
    fn new(decoder: Option<&'a DecoderWrapper>) -> Result<Self, FileError> {
        let refuse = |why: &str| Err(FileError::invalid(FILE, "decoder", why));
        let list = match decoder {
            None => {
                return refuse(
                    "none is given, so tokens have no text; petek needs ByteLevel, ByteFallback or Metaspace",
                );
            }
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
        };
        let mut decoding = Decoding { steps: Vec::new(), alphabet: Alphabet::Utf8 };
        let mut fused = false;
        for step in list {
            match step {
                DecoderWrapper::Fuse(_) => fused = true,
                // What follows Fuse sees the whole text. A space stripped at its beginning is the one step that
                // a continuation leaves out.
                DecoderWrapper::Strip(strip) if fused && strip.content == ' ' && strip.stop == 0 => {}
                _ if fused => return refuse("only Strip of leading spaces may follow Fuse"),
                _ if decoding.alphabet != Alphabet::Utf8 => {
                    return refuse("only Fuse and Strip may follow ByteLevel or ByteFallback");
                }
                DecoderWrapper::ByteLevel(_) => decoding.alphabet = Alphabet::ByteLevel,
                DecoderWrapper::ByteFallback(_) => decoding.alphabet = Alphabet::ByteFallback,
                DecoderWrapper::Replace(_) | DecoderWrapper::Metaspace(_) => decoding.steps.push(step),
                DecoderWrapper::Strip(_) => return refuse("Strip before Fuse is not supported"),
                DecoderWrapper::BPE(_) => {
                    return refuse("BPEDecoder is not supported: its text depends on the next token");
                }
                DecoderWrapper::WordPiece(_) => {
                    return refuse("WordPiece is not supported: its text depends on the next token");
                }
                DecoderWrapper::CTC(_) => return refuse("CTC is not supported: it is for speech"),
                DecoderWrapper::Sequence(_) => {
                    return refuse("a Sequence inside a Sequence is not supported");
                }
            }
        }
        Ok(decoding)
    }

    /// The bytes of a token's string; `content` is an added token's own.
    fn bytes(&self, mut string: String, content: Option<&str>) -> Result<Vec<u8>, FileError> {
        for step in &self.steps {
            string = match step {
                // As a continuation: no token is the first, so none loses its space.
                DecoderWrapper::Metaspace(metaspace) => {
                    string.replace(Metaspace::get_replacement(metaspace), " ")
                }
                step => step
                    .decode_chain(vec![string])
                    .map_err(|error| FileError::invalid(FILE, "decoder", error))?
                    .concat(),
            };
        }
        Ok(match self.alphabet {
            Alphabet::Utf8 => string.into_bytes(),
            Alphabet::ByteFallback => match fallback_byte(&string) {
                Some(byte) => vec![byte],
                None => string.into_bytes(),
            },
            Alphabet::ByteLevel => {
                match (string.chars().map(byte_of).collect::<Option<Vec<u8>>>(), content) {
                    // An added token is written as it is. Of "München" every letter is also in the byte alphabet and
                    // would read as Latin-1, which is no UTF-8: then the content is what was meant.
                    (Some(bytes), Some(content)) if str::from_utf8(&bytes).is_err() => {
                        content.as_bytes().to_vec()
                    }
                    (Some(bytes), _) => bytes,
                    (None, _) => string.into_bytes(),
                }
            }
        })
    }
}

/// The byte of `<0xNN>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 characters stand for themselves,
/// the 68 other bytes in ascending order for U+0100…U+0143. *Source*: openai/gpt-2, `encoder.py`.
fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        own @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(own as u8),
        low @ 0x100..=0x120 => Some((low - 0x100) as u8),
        middle @ 0x121..=0x142 => Some((middle - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_gpt_2s() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        assert!(bytes.iter().enumerate().all(|(i, &byte)| i == byte as usize));
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(alphabet.iter().all(|&c| byte_of(c).is_some()));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn fallback_bytes_have_two_digits() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xff>"), Some(255));
        for text in ["<0xG0>", "<0x123>", "<0x1>", "0x12"] {
            assert_eq!(fallback_byte(text), None, "{text}");
        }
    }
}
