//! The demo model: small, trained by a program in `tests/`, and carried in the binary so that petek runs with nothing beside.

use petek_model::LoadError;
use petek_model::folder::{ModelFolder, Texts};

/// The model, as any folder would be.
///
/// *Errors*: none but for a broken build.
pub(crate) fn folder() -> Result<ModelFolder, LoadError> {
    let texts = Texts {
        config: include_bytes!("../demo/config.json").to_vec(),
        generation: Some(include_bytes!("../demo/generation_config.json").to_vec()),
        tokenizer: Some(include_bytes!("../demo/tokenizer.json").to_vec()),
        tokenizer_config: Some(include_bytes!("../demo/tokenizer_config.json").to_vec()),
        chat_template: None,
    };
    ModelFolder::embedded("the demo model", texts, include_bytes!("../demo/model.safetensors"))
}
