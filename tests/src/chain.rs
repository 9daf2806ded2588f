//! The chain model: a Llama folder that emits any token sequence, or any logits, without training. Exact text
//! for end-to-end tests: stop strings across token borders, characters cut in two, filters of the sampler.
//!
//! ```text
//! embedding    identity: token t becomes the unit vector e(t)
//! layer        o_proj and down_proj are zero: the residual stream stays e(t)
//! final norm   e(t) × 1 / sqrt(1/64 + 1e-5) = e(t) × 7.99744
//! head         column t, divided by 7.99744: the logits after t, of any choice
//! ```
//! So the last token alone decides what comes next. A token that must be followed by two different ones in
//! the same text needs two ids, that is, two different byte strings.
//!
//! ```
//! # use petek_tests::chain::Chain;
//! let dir = tempfile::tempdir().unwrap();
//! // Greedy, from the prompt [1]: "b", "c", then the end of the sequence.
//! Chain::bytes(&["a", "b", "c"]).then(&[1, 2, 3, Chain::END]).write(dir.path()).unwrap();
//! ```
//! Prompts are given as ids: without merges, text that is encoded falls into single bytes, most of which the
//! vocabulary does not hold.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use crate::llama::{EosPlaces, FolderText, LazyTensor, LlamaShape, write_weights};

/// Rows of the vocabulary, and the model's width.
pub const VOCAB: usize = 64;

/// What a token does to the residual stream is multiplied by this before the head: 1 / sqrt(1/64 + 1e-5).
const NORM_GAIN: f64 = 7.997_441_228;

/// The logit of the next token in a chain; all others have 0. Greedy takes it; at temperature 1 its
/// probability is only 0.979 (63 others with e⁻⁸ each).
pub const CHAIN_LOGIT: f32 = 8.0;

/// A folder in the making. Ids: 0 is the end of a sequence, then come the given strings from 1, then fillers
/// that no test means (their text, «17» for id 17, shows up where one is drawn by mistake).
#[derive(Clone, Debug)]
pub struct Chain {
    pieces: Pieces,
    special: BTreeSet<u32>,
    adds_bos: Option<u32>,
    eos: EosPlaces,
    /// `logits[t][v]`: the logit of v after t.
    logits: Vec<[f32; VOCAB]>,
    next: [Option<u32>; VOCAB],
}

#[derive(Clone, Debug)]
enum Pieces {
    /// Any bytes; the text is their UTF-8.
    Bytes(Vec<Vec<u8>>),
    /// SentencePiece's way: "▁" is a space, "<0xE2>" a byte.
    SentencePiece(Vec<String>),
}

impl Chain {
    /// The id that ends a sequence, unless [`Chain::eos`] says otherwise.
    pub const END: u32 = 0;

    /// A byte-level vocabulary without merges, of these byte strings: ids 1, 2, …
    pub fn bytes<B: AsRef<[u8]>>(strings: &[B]) -> Self {
        Self::new(Pieces::Bytes(strings.iter().map(|bytes| bytes.as_ref().to_vec()).collect()))
    }

    /// A vocabulary in SentencePiece's manner, of these pieces: ids 1, 2, … "▁in" is " in"; "<0xE2>" is one
    /// byte.
    pub fn sentence_piece(pieces: &[&str]) -> Self {
        Self::new(Pieces::SentencePiece(pieces.iter().map(|piece| piece.to_string()).collect()))
    }

    fn new(pieces: Pieces) -> Self {
        let end = END_TEXT.to_string();
        Self {
            pieces,
            special: BTreeSet::from([Self::END]),
            adds_bos: None,
            eos: EosPlaces {
                config: Some(Self::END),
                generation_config: vec![Self::END],
                tokenizer_config: Some(end),
            },
            logits: vec![[0.0; VOCAB]; VOCAB],
            next: [None; VOCAB],
        }
    }

    /// Each id of the sequence is followed by the next one. Several sequences may join, but never fork.
    ///
    /// # Panics
    /// Where an id is no row, or already has another successor.
    pub fn then(mut self, sequence: &[u32]) -> Self {
        for pair in sequence.windows(2) {
            let [from, to] = [pair[0], pair[1]];
            assert!(
                (from.max(to) as usize) < VOCAB,
                "the chain has ids 0 to {}, not {from}, {to}",
                VOCAB - 1
            );
            let old = self.next[from as usize].replace(to);
            assert!(
                old.is_none_or(|old| old == to),
                "after token {from} comes {old:?}, not also {to}: give one of them an id of its own"
            );
            self.logits[from as usize][to as usize] = CHAIN_LOGIT;
        }
        self
    }

    /// After `from`, these ids have these logits and all others `rest`.
    pub fn logits_after(mut self, from: u32, chosen: &[(u32, f32)], rest: f32) -> Self {
        let column = &mut self.logits[from as usize];
        column.fill(rest);
        for &(id, logit) in chosen {
            column[id as usize] = logit;
        }
        self
    }

    /// After every id, these ids have these logits and all others `rest`: each token of a text is one draw.
    pub fn logits_always(mut self, chosen: &[(u32, f32)], rest: f32) -> Self {
        for from in 0..VOCAB as u32 {
            self = self.logits_after(from, chosen, rest);
        }
        self
    }

    /// These ids are control tokens, beside [`Chain::END`].
    pub fn special(mut self, ids: &[u32]) -> Self {
        self.special.extend(ids);
        self
    }

    /// The ids that end a sequence, by the file that says so; [`Chain::text_of`] gives the text of one.
    pub fn eos(mut self, eos: EosPlaces) -> Self {
        self.eos = eos;
        self
    }

    /// The tokeniser puts this id before a plain prompt.
    pub fn adds_bos(mut self, id: u32) -> Self {
        self.special.insert(id);
        self.adds_bos = Some(id);
        self
    }

    /// The token as tokenizer.json writes it.
    pub fn text_of(&self, id: u32) -> String {
        let given = match (id, &self.pieces) {
            (Self::END, _) => Some(END_TEXT.to_string()),
            (_, Pieces::Bytes(strings)) => strings.get(id as usize - 1).map(|bytes| byte_level(bytes)),
            (_, Pieces::SentencePiece(pieces)) => pieces.get(id as usize - 1).cloned(),
        };
        given.unwrap_or_else(|| match &self.pieces {
            Pieces::Bytes(_) => byte_level(format!("«{id}»").as_bytes()),
            Pieces::SentencePiece(_) => format!("«{id}»"),
        })
    }

    /// The model's shape.
    pub fn shape() -> LlamaShape {
        LlamaShape {
            layers: 1,
            hidden: VOCAB,
            intermediate: 64,
            heads: 2,
            kv_heads: 2,
            head_dim: 32,
            vocab: VOCAB,
            tied: false,
            context: 4096,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
        }
    }

    /// Writes the folder, in float32.
    ///
    /// *Errors*: more strings than fit, two that are equal or empty, an EOS that is no token, or the disk's.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let given = match &self.pieces {
            Pieces::Bytes(strings) => strings.len(),
            Pieces::SentencePiece(pieces) => pieces.len(),
        };
        ensure!(given < VOCAB, "{given} strings; {} fit beside the end of a sequence", VOCAB - 1);
        let mut vocab = Map::new();
        for id in 0..VOCAB as u32 {
            let text = self.text_of(id);
            ensure!(!text.is_empty(), "token {id} has no bytes");
            ensure!(vocab.insert(text.clone(), id.into()).is_none(), "two tokens are {text:?}");
        }
        let eos = &self.eos;
        for id in eos.config.iter().chain(&eos.generation_config) {
            ensure!((*id as usize) < VOCAB, "the sequence ends with id {id}, which is no token");
        }
        if let Some(text) = &eos.tokenizer_config {
            ensure!(vocab.contains_key(text), "the sequence ends with {text:?}, which is no token");
        }

        let shape = Self::shape();
        let mut tokenizer_config = Map::new();
        tokenizer_config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        tokenizer_config.insert("model_max_length".into(), shape.context.into());
        tokenizer_config.insert("chat_template".into(), CHAT_TEMPLATE.into());
        FolderText {
            config: shape.config(Dtype::F32),
            tokenizer: self.tokenizer(vocab),
            tokenizer_config,
            generation_config: Map::new(),
            eos: eos.clone(),
        }
        .write(dir)?;
        let tensors = shape.tensors().into_iter().map(|(name, dims)| {
            let count = dims.iter().product();
            let values: Box<dyn Fn() -> Vec<f32>> = match name.as_str() {
                "model.embed_tokens.weight" => Box::new(identity),
                "lm_head.weight" => Box::new(|| self.head()),
                name if name.contains("norm") => Box::new(move || vec![1.0; count]),
                // q, k, v, gate and up may be anything, since o and down are zero: none of it reaches the
                // head.
                _ => Box::new(move || vec![0.0; count]),
            };
            (name, LazyTensor { dtype: Dtype::F32, shape: dims, values })
        });
        write_weights(dir, tensors.collect())
    }

    /// `[VOCAB, VOCAB]`: row v holds the logit of v after each t, before the norm's gain.
    fn head(&self) -> Vec<f32> {
        let scaled = |v: usize, t: usize| (f64::from(self.logits[t][v]) / NORM_GAIN) as f32;
        (0..VOCAB * VOCAB).map(|i| scaled(i / VOCAB, i % VOCAB)).collect()
    }

    fn tokenizer(&self, vocab: Map<String, Value>) -> Value {
        let added: Vec<Value> = (self.special.iter())
            .map(|&id| {
                json!({
                    "id": id, "content": self.text_of(id), "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true,
                })
            })
            .collect();
        let post_processor = self.adds_bos.map(|id| {
            let text = self.text_of(id);
            json!({
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {&text: {"id": text, "ids": [id], "tokens": [text]}},
            })
        });
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let (normalizer, pre_tokenizer, decoder, byte_fallback) = match self.pieces {
            Pieces::Bytes(_) => (Value::Null, byte_level.clone(), byte_level, false),
            Pieces::SentencePiece(_) => (
                json!({"type": "Sequence", "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ]}),
                Value::Null,
                json!({"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ]}),
                true,
            ),
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": decoder,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": byte_fallback,
                "ignore_merges": false, "vocab": vocab, "merges": [],
            },
        })
    }
}

const END_TEXT: &str = "<|end|>";

/// The least that a chat needs: what was said, one message a line.
const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";

fn identity() -> Vec<f32> {
    (0..VOCAB * VOCAB).map(|i| if i / VOCAB == i % VOCAB { 1.0 } else { 0.0 }).collect()
}

/// Bytes in GPT-2's alphabet: printable Latin-1 stands for itself, the 68 others for U+0100 and on.
///
/// *Source*: openai/gpt-2, `bytes_to_unicode` of `src/encoder.py`.
pub fn byte_level(bytes: &[u8]) -> String {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let character = |byte: u8| match is_printable(byte) {
        true => char::from(byte),
        false => {
            let others_before = (0..byte).filter(|&other| !is_printable(other)).count();
            char::from_u32(0x100 + others_before as u32).expect("U+0100 to U+0143 are characters")
        }
    };
    bytes.iter().map(|&byte| character(byte)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokenizers::Tokenizer;

    use super::*;
    use crate::llama::read_weights;

    /// The logits after each token, from the files: with o and down at zero the model is embedding, norm,
    /// head.
    fn logits_of(dir: &Path) -> Vec<Vec<f64>> {
        let weights = read_weights(dir, &Chain::shape()).unwrap();
        for name in ["self_attn.o_proj", "mlp.down_proj"] {
            assert!(weights[&format!("model.layers.0.{name}.weight")].iter().all(|&value| value == 0.0));
        }
        let (embedding, head) = (&weights["model.embed_tokens.weight"], &weights["lm_head.weight"]);
        let norm = &weights["model.norm.weight"];
        embedding
            .chunks(VOCAB)
            .map(|row| {
                let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / VOCAB as f64;
                let scale = 1.0 / (mean + 1e-5).sqrt();
                let dot = |head: &[f32]| {
                    (0..VOCAB).map(|i| f64::from(head[i] * row[i] * norm[i]) * scale).sum::<f64>()
                };
                head.chunks(VOCAB).map(dot).collect()
            })
            .collect()
    }

    #[test]
    fn a_chain_is_followed_and_any_logits_come_out() {
        let dir = tempfile::tempdir().unwrap();
        let chosen = [(0, 2.0), (1, 1.0), (2, 0.0), (3, -1.0)];
        let chain = Chain::bytes(&["a", "b", "c"]).then(&[1, 2, 3, Chain::END]);
        chain.logits_after(40, &chosen, -30.0).write(dir.path()).unwrap();
        let logits = logits_of(dir.path());
        // One rounding of the stored weight to f32: half a unit in the last of 24 bits, relative.
        let check = |from: usize, id: usize, expected: f64| {
            let got = logits[from][id];
            assert!((got - expected).abs() <= expected.abs() * 2f64.powi(-24) * 1.01, "{from} {id}: {got}");
        };
        for (from, to) in [(1, 2), (2, 3), (3, 0)] {
            (0..VOCAB).for_each(|id| check(from, id, if id == to { 8.0 } else { 0.0 }));
        }
        for (id, logit) in chosen {
            check(40, id as usize, f64::from(logit));
        }
        (4..VOCAB).for_each(|id| check(40, id, -30.0));
        (0..VOCAB).for_each(|id| check(5, id, 0.0));
    }

    #[test]
    fn any_bytes_are_decoded() {
        let dir = tempfile::tempdir().unwrap();
        let strings: [&[u8]; 5] = ["求".as_bytes(), b"Z", &[0xf0, 0x9f], &[0x8c, 0xb6], b" ok?\n"];
        Chain::bytes(&strings).write(dir.path()).unwrap();
        let tokenizer = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), VOCAB);
        assert_eq!(tokenizer.decode(&[1, 2, 1, 3, 4, 5], false).unwrap(), "求Z求🌶 ok?\n");
        assert_eq!(tokenizer.decode(&[2, 0, 17], false).unwrap(), "Z<|end|>«17»");
        assert_eq!(tokenizer.decode(&[2, 0], true).unwrap(), "Z");
    }

    #[test]
    fn sentence_piece_has_spaces_and_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let chain = Chain::sentence_piece(&["▁in", "▁the", "▁sea", "<0xE2>", "<0x82>", "<0xAC>", "<s>"]);
        chain.adds_bos(7).write(dir.path()).unwrap();
        let tokenizer = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        // tokenizers strips the first space; petek, which decodes a continuation, does not.
        assert_eq!(tokenizer.decode(&[1, 2, 3, 4, 5, 6], false).unwrap(), "in the sea€");
        assert_eq!(tokenizer.encode("", true).unwrap().get_ids(), [7]);
    }

    #[test]
    fn the_end_may_stand_in_any_file() {
        let dir = tempfile::tempdir().unwrap();
        let chain = Chain::bytes(&["ok", "2", "no"]).then(&[1, 2, 3, 0]).special(&[2]);
        let eos =
            EosPlaces { config: None, generation_config: vec![0], tokenizer_config: Some(chain.text_of(2)) };
        chain.eos(eos).write(dir.path()).unwrap();
        let read = |name: &str| -> Value {
            serde_json::from_str(&fs::read_to_string(dir.path().join(name)).unwrap()).unwrap()
        };
        assert_eq!(read("config.json").get("eos_token_id"), None);
        assert_eq!(read("generation_config.json")["eos_token_id"], 0);
        assert_eq!(read("tokenizer_config.json")["eos_token"], "2");
    }

    #[test]
    #[should_panic(expected = "after token 1 comes Some(2), not also 3")]
    fn a_fork_is_refused() {
        let _ = Chain::bytes(&["a", "b", "c"]).then(&[1, 2, 1, 3]);
    }

    #[test]
    fn bad_vocabularies_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let check = |chain: Chain, expected: &str| {
            let error = chain.write(dir.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(Chain::bytes(&["a", "a"]), "two tokens are \"a\"");
        check(Chain::bytes(&["a", ""]), "token 2 has no bytes");
        check(Chain::bytes(&["x"; 64]), "64 strings; 63 fit");
        let eos = EosPlaces { config: Some(64), ..EosPlaces::default() };
        check(Chain::bytes(&["a"]).eos(eos), "ends with id 64");
    }
}
