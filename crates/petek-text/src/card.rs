//! A model card: the files that a router needs of a model, as a worker hands them over, and their hash.

use std::time::Duration;

use crate::config::{TokenizerConfig, eos_ids};
use crate::error::FileError;
use crate::generation::GenerationDefaults;
use crate::limits::TEMPLATE_BYTES_MAX;
use crate::template::{ChatTemplate, TemplateSource};
use crate::tokenizer::{Tokenizer, check_file_size};

/// The files of a card, in the order in which they are hashed and sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CardFile {
    /// config.json
    Config,
    /// generation_config.json
    GenerationConfig,
    /// tokenizer.json
    Tokenizer,
    /// tokenizer_config.json
    TokenizerConfig,
    /// chat_template.jinja
    ChatTemplate,
}

impl CardFile {
    /// All of them, in order.
    pub const ALL: [CardFile; 5] = [
        CardFile::Config,
        CardFile::GenerationConfig,
        CardFile::Tokenizer,
        CardFile::TokenizerConfig,
        CardFile::ChatTemplate,
    ];

    /// The file's name inside the model folder.
    pub fn name(self) -> &'static str {
        match self {
            CardFile::Config => "config.json",
            CardFile::GenerationConfig => "generation_config.json",
            CardFile::Tokenizer => "tokenizer.json",
            CardFile::TokenizerConfig => "tokenizer_config.json",
            CardFile::ChatTemplate => "chat_template.jinja",
        }
    }

    /// The file of a name.
    pub fn of(name: &str) -> Option<CardFile> {
        CardFile::ALL.into_iter().find(|file| file.name() == name)
    }
}

/// Those files of a model that it has, each with its BLAKE3.
#[derive(Debug, Clone, Default)]
pub struct ModelCard {
    files: [Option<(Vec<u8>, blake3::Hash)>; 5],
}

impl ModelCard {
    /// Puts a file in, in place of an earlier one.
    pub fn insert(&mut self, file: CardFile, bytes: Vec<u8>) {
        let hash = blake3::hash(&bytes);
        self.files[file as usize] = Some((bytes, hash));
    }

    /// A file's bytes.
    pub fn bytes(&self, file: CardFile) -> Option<&[u8]> {
        self.files[file as usize].as_ref().map(|(bytes, _)| &bytes[..])
    }

    /// The files that there are, in order, with their hashes.
    pub fn files(&self) -> impl Iterator<Item = (CardFile, &[u8], blake3::Hash)> {
        CardFile::ALL.into_iter().filter_map(|file| {
            self.files[file as usize].as_ref().map(|(bytes, hash)| (file, &bytes[..], *hash))
        })
    }

    /// The `text_hash` of a worker's record: BLAKE3 (plain mode) over the files that there are, in the order of
    /// [`CardFile::ALL`], each as
    /// ```text
    /// u32 little-endian: bytes of the name ‖ the name in UTF-8 ‖ the 32 bytes of the file's own BLAKE3
    /// ```
    /// An absent file adds nothing. **Fixed**: routers compare it with what workers computed.
    pub fn text_hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for (file, _, hash) in self.files() {
            hasher.update(&(file.name().len() as u32).to_le_bytes());
            hasher.update(file.name().as_bytes());
            hasher.update(hash.as_bytes());
        }
        hasher.finalize()
    }
}

/// All that turns text into ids and back for one model: what a card says.
pub struct ModelText {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, if the model has one.
    pub template: Option<ChatTemplate>,
    /// The ids that end a sequence, ascending.
    pub eos_ids: Vec<u32>,
    /// What requests get that say nothing.
    pub defaults: GenerationDefaults,
}

impl ModelText {
    /// Loads a card. `clock` is a monotonic clock of any origin: see [`Tokenizer::load`].
    ///
    /// *Errors*: tokenizer.json is missing, or any file is bad.
    pub fn load(card: &ModelCard, clock: &dyn Fn() -> Duration) -> Result<ModelText, FileError> {
        let missing = FileError::Missing { file: CardFile::Tokenizer.name() };
        let tokenizer = Tokenizer::load(card.bytes(CardFile::Tokenizer).ok_or(missing)?, clock)?;
        let config = card
            .bytes(CardFile::TokenizerConfig)
            .map(TokenizerConfig::parse)
            .transpose()?
            .unwrap_or_default();
        let eos_ids = eos_ids(
            card.bytes(CardFile::Config),
            card.bytes(CardFile::GenerationConfig),
            &config,
            &tokenizer,
        )?;
        let defaults = card.bytes(CardFile::GenerationConfig).map(GenerationDefaults::parse).transpose()?;
        // A template file stands in for any inline one, as in transformers.
        let templates = match card.bytes(CardFile::ChatTemplate) {
            None => config.templates,
            Some(bytes) => vec![template_file(bytes)?],
        };
        let template = ChatTemplate::compile(&templates, config.special_tokens)?;
        Ok(ModelText { tokenizer, template, eos_ids, defaults: defaults.unwrap_or_default() })
    }
}

fn template_file(bytes: &[u8]) -> Result<TemplateSource, FileError> {
    let file = CardFile::ChatTemplate.name();
    check_file_size(file, bytes, TEMPLATE_BYTES_MAX)?;
    let source = str::from_utf8(bytes).map_err(|error| {
        FileError::invalid(file, format_args!("byte {}", error.valid_up_to()), "it is not UTF-8")
    })?;
    Ok(TemplateSource { file, name: "default".to_owned(), source: source.to_owned() })
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::template::Chat;
    use crate::testing::golden;

    #[test]
    fn the_text_hash_is_pinned() {
        let mut card = ModelCard::default();
        let hex = |card: &ModelCard| card.text_hash().to_hex().to_string();
        // Of no file: BLAKE3 of nothing.
        assert_eq!(hex(&card), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
        card.insert(CardFile::Tokenizer, b"{}".to_vec());
        card.insert(CardFile::Config, b"{\"vocab_size\": 64}".to_vec());
        // By hand, in the order of the list, not of insertion.
        let mut bytes = Vec::new();
        for (name, file) in [("config.json", &b"{\"vocab_size\": 64}"[..]), ("tokenizer.json", b"{}")] {
            bytes.extend([name.len() as u8, 0, 0, 0]);
            bytes.extend(name.as_bytes());
            bytes.extend(blake3::hash(file).as_bytes());
        }
        assert_eq!(hex(&card), blake3::hash(&bytes).to_hex().to_string());
        assert_eq!(hex(&card), "1b8c8681bc1d9dbe520bc47c9d039d79851cbbfc50281c7c3272d4fe6c4341fb");
        // A file under another name is another text.
        let mut other = ModelCard::default();
        other.insert(CardFile::TokenizerConfig, b"{}".to_vec());
        other.insert(CardFile::Config, b"{\"vocab_size\": 64}".to_vec());
        assert_ne!(other.text_hash(), card.text_hash());
        let names: Vec<_> = card.files().map(|(file, bytes, _)| (file.name(), bytes.len())).collect();
        assert_eq!(names, [("config.json", 18), ("tokenizer.json", 2)]);
        assert!(CardFile::ALL.iter().all(|&file| CardFile::of(file.name()) == Some(file)));
        assert_eq!(CardFile::of("model.safetensors"), None);
    }

    #[test]
    fn a_card_loads_whole_with_its_template_inline_or_apart() {
        let load = |name: &str, with: &[(CardFile, &[u8])]| {
            let mut card = ModelCard::default();
            for file in [CardFile::Tokenizer, CardFile::TokenizerConfig] {
                card.insert(file, golden(&format!("tokenizers/{name}/{}", file.name())));
            }
            with.iter().for_each(|&(file, bytes)| card.insert(file, bytes.to_vec()));
            ModelText::load(&card, &Default::default)
        };
        let hello = |text: &ModelText| {
            let (messages, kwargs) = ([json!({"role": "user", "content": "Hi"})], Map::new());
            let chat = Chat {
                messages: &messages,
                tools: None,
                add_generation_prompt: true,
                kwargs: &kwargs,
                now_unix_s: 0,
            };
            text.template.as_ref().unwrap().render(&text.tokenizer, &chat).unwrap().text()
        };
        let generation = (CardFile::GenerationConfig, &b"{\"eos_token_id\": 0}"[..]);
        let inline = load("bytelevel", &[generation]).unwrap();
        assert_eq!(inline.eos_ids, [0, 2]);
        let file = golden("tokenizers/bytefallback/chat_template.jinja");
        let apart = load("bytefallback", &[(CardFile::ChatTemplate, &file)]).unwrap();
        assert_eq!((hello(&inline), &apart.eos_ids), (hello(&apart), &vec![2]));
        // The file stands in for the inline one.
        let other =
            load("bytelevel", &[(CardFile::ChatTemplate, b"{{ messages[0].content }}{{ eos_token }}")])
                .unwrap();
        assert_eq!(hello(&other), "Hi<|im_end|>");

        let error = |card: Result<ModelText, FileError>| card.err().unwrap().to_string();
        assert_eq!(
            error(ModelText::load(&ModelCard::default(), &Default::default)),
            "tokenizer.json is missing"
        );
        let bad = [(CardFile::ChatTemplate, &b"ab\xFF"[..])];
        assert_eq!(error(load("bytelevel", &bad)), "chat_template.jinja: byte 2: it is not UTF-8");
        let bad = [(CardFile::GenerationConfig, &b"{\"eos_token_id\": -1}"[..])];
        assert!(error(load("bytelevel", &bad)).starts_with("generation_config.json: eos_token_id: "));
    }
}
