//! What text needs of a model's small files: special tokens and templates of tokenizer_config.json, and the EOS
//! ids of three files.

use serde_json::{Map, Value};

use crate::error::FileError;
use crate::limits::{CONFIG_FILE_BYTES_MAX, TEMPLATES_MAX};
use crate::template::TemplateSource;
use crate::tokenizer::{Tokenizer, check_file_size};

const FILE: &str = "tokenizer_config.json";

/// The parts of tokenizer_config.json that are read. `model_max_length` is not one of them.
#[derive(Debug, Clone, Default)]
pub struct TokenizerConfig {
    /// bos_token, eos_token, … with their contents: the variables of a chat template.
    pub special_tokens: Map<String, Value>,
    /// Inline chat templates.
    pub templates: Vec<TemplateSource>,
}

impl TokenizerConfig {
    /// Reads tokenizer_config.json.
    ///
    /// *Errors*: [`FileError`] naming the key, or line and column.
    pub fn parse(file: &[u8]) -> Result<TokenizerConfig, FileError> {
        let config = object(FILE, file)?;
        let mut special_tokens = Map::new();
        for (key, value) in &config {
            let value = match value {
                Value::Null => continue,
                _ if key == "additional_special_tokens" => {
                    let list =
                        value.as_array().ok_or_else(|| FileError::invalid(FILE, key, "it must be a list"))?;
                    let tokens = list.iter().map(|token| token_content(key, token));
                    Value::Array(tokens.collect::<Result<_, _>>()?)
                }
                _ if SPECIAL_TOKENS.contains(&key.as_str()) => token_content(key, value)?,
                _ => continue,
            };
            special_tokens.insert(key.clone(), value);
        }
        let templates = match config.get("chat_template") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(source)) => vec![template("default", source)],
            Some(Value::Array(list)) if list.len() <= TEMPLATES_MAX => {
                let named = |entry: &Value| {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str);
                    text("name").zip(text("template")).map(|(name, source)| template(name, source))
                };
                list.iter().map(named).collect::<Option<_>>().ok_or_else(|| {
                    FileError::invalid(FILE, "chat_template", "each entry needs a name and a template")
                })?
            }
            Some(_) => {
                let why =
                    format!("it must be a string, or a list of at most {TEMPLATES_MAX} named templates");
                return Err(FileError::invalid(FILE, "chat_template", why));
            }
        };
        Ok(TokenizerConfig { special_tokens, templates })
    }
}

/// The named special tokens of transformers.
const SPECIAL_TOKENS: &[&str] =
    &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

fn template(name: &str, source: &str) -> TemplateSource {
    TemplateSource { file: FILE, name: name.to_owned(), source: source.to_owned() }
}

/// A token is its content or an object that has one.
fn token_content(key: &str, token: &Value) -> Result<Value, FileError> {
    match token.get("content").unwrap_or(token) {
        Value::String(content) => Ok(Value::String(content.clone())),
        _ => Err(FileError::invalid(FILE, key, "it must be a string or an object with a content")),
    }
}

/// The ids that end a sequence: the union of `eos_token_id` in config.json and generation_config.json and of
/// tokenizer_config.json's `eos_token`, ascending. Each file may be absent.
///
/// *Errors*: ids that are none, or an `eos_token` that is not in the vocabulary.
pub fn eos_ids(
    config: Option<&[u8]>,
    generation_config: Option<&[u8]>,
    tokenizer_config: &TokenizerConfig,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, FileError> {
    let mut ids = Vec::new();
    for (file, bytes) in [("config.json", config), ("generation_config.json", generation_config)] {
        let Some(bytes) = bytes else { continue };
        let fields = object(file, bytes)?;
        let listed = match fields.get("eos_token_id") {
            None | Some(Value::Null) => &[],
            Some(Value::Array(list)) => &list[..],
            Some(one) => std::slice::from_ref(one),
        };
        for id in listed {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let why = "it must be a token id, a list of token ids, or null";
            ids.push(id.ok_or_else(|| FileError::invalid(file, "eos_token_id", why))?);
        }
    }
    if let Some(token) = tokenizer_config.special_tokens.get("eos_token").and_then(Value::as_str) {
        let id = tokenizer.token_id(token);
        let why = || FileError::invalid(FILE, "eos_token", format!("tokenizer.json has no token {token:?}"));
        ids.push(id.ok_or_else(why)?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

pub(crate) fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, FileError> {
    check_file_size(file, bytes, CONFIG_FILE_BYTES_MAX)?;
    serde_json::from_slice(bytes).map_err(|error| FileError::json(file, &error))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::golden;

    fn parse(config: Value) -> Result<TokenizerConfig, FileError> {
        TokenizerConfig::parse(config.to_string().as_bytes())
    }

    #[test]
    fn special_tokens_and_templates_are_read_in_every_spelling() {
        let config = parse(json!({
            "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
            "additional_special_tokens": ["<a>", {"content": "<b>"}], "model_max_length": 8,
            "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
        }))
        .unwrap();
        let want =
            json!({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<a>", "<b>"]});
        assert_eq!(Value::Object(config.special_tokens), want);
        assert_eq!(config.templates, [template("default", "d"), template("tool_use", "t")]);
        assert_eq!(parse(json!({"chat_template": "x"})).unwrap().templates, [template("default", "x")]);
        assert!(parse(json!({})).unwrap().templates.is_empty());
    }

    #[test]
    fn bad_values_are_refused_by_key() {
        let check = |config: Value, want: &str| assert_eq!(parse(config).unwrap_err().to_string(), want);
        check(
            json!({"eos_token": 2}),
            "tokenizer_config.json: eos_token: it must be a string or an object with a content",
        );
        check(
            json!({"additional_special_tokens": "a"}),
            "tokenizer_config.json: additional_special_tokens: it must be a list",
        );
        check(
            json!({"chat_template": [{"name": "a"}]}),
            "tokenizer_config.json: chat_template: each entry needs a name and a template",
        );
        let many = vec![json!({"name": "a", "template": ""}); 17];
        check(
            json!({"chat_template": many}),
            "tokenizer_config.json: chat_template: it must be a string, or a list of at most 16 named templates",
        );
        check(json!([1]), "tokenizer_config.json: line 1 column 0: invalid type: sequence, expected a map");
        let large = vec![b' '; CONFIG_FILE_BYTES_MAX + 1];
        assert!(
            TokenizerConfig::parse(&large).unwrap_err().to_string().contains("4194305; the limit is 4194304")
        );
    }

    #[test]
    fn eos_is_the_union_of_three_files() {
        let tokenizer =
            Tokenizer::load(&golden("tokenizers/bytelevel/tokenizer.json"), &Default::default).unwrap();
        let check = |config: Option<&str>, generation: Option<&str>, token: Value| {
            let tokenizer_config = parse(json!({"eos_token": token})).unwrap();
            let (config, generation) = (config.map(str::as_bytes), generation.map(str::as_bytes));
            eos_ids(config, generation, &tokenizer_config, &tokenizer).map_err(|error| error.to_string())
        };
        // The token of id 2 is "<|im_end|>".
        assert_eq!(check(Some("{}"), Some(r#"{"eos_token_id": [0]}"#), json!("<|im_end|>")), Ok(vec![0, 2]));
        assert_eq!(
            check(Some(r#"{"eos_token_id": 7}"#), Some(r#"{"eos_token_id": [7, 3]}"#), Value::Null),
            Ok(vec![3, 7])
        );
        assert_eq!(check(None, None, Value::Null), Ok(vec![]));
        assert_eq!(check(Some(r#"{"eos_token_id": null}"#), None, json!("<|im_end|>")), Ok(vec![2]));
        for bad in ["-1", "1.5", "\"a\"", "[null]", "4294967296"] {
            let config = format!("{{\"eos_token_id\": {bad}}}");
            let error = check(Some(&config), None, Value::Null).unwrap_err();
            assert!(error.starts_with("config.json: eos_token_id: it must be a token id"), "{bad}: {error}");
        }
        let error = check(None, None, json!("</nope>")).unwrap_err();
        assert_eq!(error, "tokenizer_config.json: eos_token: tokenizer.json has no token \"</nope>\"");
    }
}
