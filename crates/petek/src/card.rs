//! A folder's text files as the card that routers get.

use petek_model::folder::Texts;
use petek_text::{CardFile, ModelCard};

/// The folder's text files as a model card.
pub(crate) fn card_of(texts: &Texts) -> ModelCard {
    let mut card = ModelCard::default();
    card.insert(CardFile::Config, texts.config.clone());
    for (file, bytes) in [
        (CardFile::GenerationConfig, &texts.generation),
        (CardFile::Tokenizer, &texts.tokenizer),
        (CardFile::TokenizerConfig, &texts.tokenizer_config),
        (CardFile::ChatTemplate, &texts.chat_template),
    ] {
        if let Some(bytes) = bytes {
            card.insert(file, bytes.clone());
        }
    }
    card
}
