//! Defaults that a model brings along in `generation_config.json`.

use petek_core::ids::TokenId;
use serde_json::{Map, Value};

use crate::LoadError;
use crate::weights::Warning;

const FILE: &str = "generation_config.json";

/// What the file says of the parameters that petek knows; `None` is "use petek's own default".
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// 0 where `do_sample` is false.
    pub temperature: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// In (0, 1].
    pub typical_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// End-of-sequence ids of this file.
    pub eos: Vec<TokenId>,
}

/// Keys that say nothing of how text is made here, and so are passed over in silence.
const WITHOUT_MEANING: [&str; 6] =
    ["_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "use_cache", "do_sample"];

impl GenerationDefaults {
    /// Reads the file; without one, everything is petek's own default.
    ///
    /// *Errors*: a value of another kind or out of its range, naming the key. Keys that petek lacks are named in one warning.
    pub fn parse(json: Option<&[u8]>, vocabulary: usize) -> Result<(Self, Vec<Warning>), LoadError> {
        let Some(json) = json else { return Ok((Self::default(), Vec::new())) };
        let problem = |problem: String| LoadError::File { file: FILE.to_owned(), problem };
        let map: Map<String, Value> = serde_json::from_slice(json).map_err(|e| problem(e.to_string()))?;
        let number = |key: &'static str, rule: &str, fits: &dyn Fn(f64) -> bool| match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if fits(number) => Ok(Some(number as f32)),
                _ => Err(problem(format!("{key} is {value}: {rule}"))),
            },
        };
        let probability = "a number above 0, at most 1, is needed";
        let in_probability = |p: f64| p > 0.0 && p <= 1.0;
        let mut defaults = Self {
            temperature: number("temperature", "a number from 0 to 2 is needed", &|t| {
                (0.0..=2.0).contains(&t)
            })?,
            top_k: number("top_k", "a whole number from 0 is needed", &|k| {
                k >= 0.0 && k.fract() == 0.0 && k <= f64::from(u32::MAX)
            })?
            .map(|k| k as u32),
            top_p: number("top_p", probability, &in_probability)?,
            min_p: number("min_p", "a number from 0 to 1 is needed", &|p| (0.0..=1.0).contains(&p))?,
            typical_p: number("typical_p", probability, &in_probability)?,
            repetition_penalty: number("repetition_penalty", "a number above 0 is needed", &|p| p > 0.0)?,
            eos: Vec::new(),
        };
        match map.get("do_sample") {
            None | Some(Value::Null | Value::Bool(true)) => {}
            Some(Value::Bool(false)) => defaults.temperature = Some(0.0),
            Some(other) => return Err(problem(format!("do_sample is {other}: true or false is needed"))),
        }
        let ids = match map.get("eos_token_id") {
            None | Some(Value::Null) => &[][..],
            Some(Value::Array(ids)) => ids,
            Some(id) => std::slice::from_ref(id),
        };
        for id in ids {
            match id.as_u64().and_then(|id| TokenId::try_from(id).ok()) {
                Some(id) if (id as usize) < vocabulary => defaults.eos.push(id),
                _ => {
                    return Err(problem(format!(
                        "eos_token_id {id}: an id below the vocabulary of {vocabulary} is needed"
                    )));
                }
            }
        }
        let known =
            ["temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "eos_token_id"];
        let lacking: Vec<&str> = map
            .iter()
            .filter(|(key, value)| !value.is_null() && !known.contains(&key.as_str()))
            .map(|(key, _)| key.as_str())
            .filter(|key| !WITHOUT_MEANING.contains(key))
            .collect();
        let warnings = if lacking.is_empty() {
            Vec::new()
        } else {
            vec![Warning(format!("{FILE}: petek has no {}; these keys have no effect", lacking.join(", ")))]
        };
        Ok((defaults, warnings))
    }
}
