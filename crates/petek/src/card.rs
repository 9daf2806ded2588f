//! A folder's text files as the card that routers get.

use std::time::Instant;

use petek_model::folder::Texts;
use petek_service::{Exit, Failure};
use petek_text::{CardFile, ModelCard, ModelText};

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

/// Loads a card, and holds it against the model's own vocabulary.
///
/// # Errors
/// [`Exit::Configuration`] with one line that names file and key.
pub(crate) fn text_of(card: &ModelCard, vocabulary: usize) -> Result<ModelText, Failure> {
    let configuration = |what: String| Failure::new(Exit::Configuration, what, "");
    let began = Instant::now();
    let text =
        ModelText::load(card, &|| began.elapsed()).map_err(|error| configuration(error.to_string()))?;
    match text.eos_ids.iter().find(|id| **id as usize >= vocabulary) {
        Some(id) => Err(configuration(format!(
            "eos_token_id {id}, of config.json, generation_config.json or tokenizer_config.json: an id below the \
             vocabulary of {vocabulary} is needed"
        ))),
        None => Ok(text),
    }
}
