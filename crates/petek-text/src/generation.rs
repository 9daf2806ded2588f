//! Defaults that a model brings along in `generation_config.json`.

use serde_json::{Map, Value};

use crate::config::object;
use crate::error::FileError;

const FILE: &str = "generation_config.json";

/// What the file says of the parameters that petek has; `None` is "use petek's own default".
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// From 0 to 2; 0 where `do_sample` is false.
    pub temperature: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// Keys that ask for what petek lacks: they have no effect, and whoever loads the model is told.
    pub lacking: Vec<String>,
}

/// Keys that are read here or with the ids that end a sequence.
const KNOWN: [&str; 6] = ["temperature", "top_k", "top_p", "min_p", "do_sample", "eos_token_id"];
/// Keys that say nothing of how text is made here, and so are passed over in silence.
const WITHOUT_MEANING: [&str; 5] =
    ["_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "use_cache"];
/// Keys that at this value ask for nothing.
const OFF_AT_ONE: [&str; 2] = ["typical_p", "repetition_penalty"];

impl GenerationDefaults {
    /// Reads the file.
    ///
    /// *Errors*: a value of another kind or out of its range, naming the key.
    pub fn parse(file: &[u8]) -> Result<Self, FileError> {
        let map = object(FILE, file)?;
        let number = |key: &str, rule: &str, fits: &dyn Fn(f64) -> bool| match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|number| fits(*number)) {
                Some(number) => Ok(Some(number)),
                None => Err(FileError::invalid(FILE, key, format_args!("{rule} is needed, not {value}"))),
            },
        };
        let mut temperature = number("temperature", "a number from 0 to 2", &|t| (0.0..=2.0).contains(&t))?;
        match map.get("do_sample") {
            None | Some(Value::Null | Value::Bool(true)) => {}
            Some(Value::Bool(false)) => temperature = Some(0.0),
            Some(other) => {
                let why = format_args!("true or false is needed, not {other}");
                return Err(FileError::invalid(FILE, "do_sample", why));
            }
        }
        let top_k = number("top_k", "a whole number from -1", &|k| {
            k >= -1.0 && k.fract() == 0.0 && k <= f64::from(u32::MAX)
        })?;
        let top_p = number("top_p", "a number above 0, at most 1,", &|p| p > 0.0 && p <= 1.0)?;
        let min_p = number("min_p", "a number from 0 to 1", &|p| (0.0..=1.0).contains(&p))?;
        let single = |value: Option<f64>| value.map(|value| value as f32);
        Ok(Self {
            temperature: single(temperature),
            // -1 is off, as 0 is.
            top_k: top_k.map(|k| k.max(0.0) as u32),
            top_p: single(top_p),
            min_p: single(min_p),
            lacking: lacking(&map),
        })
    }

    /// What a person is told of the keys that petek lacks.
    pub fn warning(&self) -> Option<String> {
        let keys = self.lacking.join(", ");
        (!keys.is_empty()).then(|| format!("{FILE}: petek has no {keys}; these keys have no effect"))
    }
}

fn lacking(map: &Map<String, Value>) -> Vec<String> {
    let asks = |key: &str, value: &Value| {
        let is_off = value.is_null() || OFF_AT_ONE.contains(&key) && value.as_f64() == Some(1.0);
        !is_off && !KNOWN.contains(&key) && !WITHOUT_MEANING.contains(&key)
    };
    map.iter().filter(|(key, value)| asks(key, value)).map(|(key, _)| key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(file: Value) -> Result<GenerationDefaults, String> {
        GenerationDefaults::parse(file.to_string().as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_file_says_is_the_default() {
        let said = read(
            json!({"temperature": 0.5, "top_k": 20, "top_p": null, "min_p": 0.25, "eos_token_id": [0, 2]}),
        );
        let all = GenerationDefaults {
            temperature: Some(0.5),
            top_k: Some(20),
            min_p: Some(0.25),
            ..GenerationDefaults::default()
        };
        assert_eq!(said, Ok(all));
        assert_eq!(read(json!({})), Ok(GenerationDefaults::default()));
        assert_eq!(read(json!({"do_sample": false, "temperature": 0.7})).unwrap().temperature, Some(0.0));
        assert_eq!(read(json!({"top_k": -1})).unwrap().top_k, Some(0));
    }

    #[test]
    fn keys_that_are_lacking_are_named_in_one_warning() {
        let silent = json!({"typical_p": 1.0, "repetition_penalty": 1, "num_beams": null, "use_cache": true});
        assert_eq!(read(silent).unwrap().warning(), None);
        let file = json!({"repetition_penalty": 1.1, "num_beams": 4, "typical_p": 0.9, "top_p": 0.5});
        let warning = "generation_config.json: petek has no repetition_penalty, num_beams, typical_p; these keys have no effect";
        assert_eq!(read(file).unwrap().warning().as_deref(), Some(warning));
    }

    #[test]
    fn bad_values_are_refused_by_key() {
        for (file, says) in [
            (json!({"temperature": 2.5}), "temperature: a number from 0 to 2 is needed, not 2.5"),
            (json!({"temperature": "hot"}), "temperature: a number from 0 to 2 is needed, not \"hot\""),
            (json!({"top_p": 0}), "top_p: a number above 0, at most 1, is needed, not 0"),
            (json!({"top_k": 1.5}), "top_k: a whole number from -1 is needed, not 1.5"),
            (json!({"top_k": -2}), "top_k: a whole number from -1 is needed, not -2"),
            (json!({"min_p": -1}), "min_p: a number from 0 to 1 is needed, not -1"),
            (json!({"do_sample": 3}), "do_sample: true or false is needed, not 3"),
            (json!([]), "line 1 column 0: invalid type: sequence, expected a map"),
        ] {
            assert_eq!(read(file), Err(format!("generation_config.json: {says}")));
        }
    }
}
