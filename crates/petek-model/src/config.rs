//! A decoder described by data: the checked form of a Hugging Face `config.json`.
//!
//! [`DecoderConfig::parse`] reads the file as families write it (raw, both spellings) and gives what is meant (checked), or
//! says which key is wrong, what it holds and what would be right.

use serde::Deserialize;
use serde_json::Value;

use petek_core::ids::TokenId;
use petek_device::ops::{Format, Heads};

/// A decoder-only transformer, checked: every number is within bounds and fits the others.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// The architecture's name in the file.
    pub architecture: String,
    /// Layers, 1 to 512.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads, key and value heads, and their width.
    pub heads: Heads,
    /// Rows of the embedding and of the head; may exceed the tokeniser's.
    pub vocabulary: usize,
    /// The most positions that the model was made for.
    pub context: usize,
    /// The norm before attention, before the MLP and at the end.
    pub norm: NormKind,
    /// How positions enter.
    pub position: Position,
    /// Biases of the attention's projections.
    pub attention_bias: AttentionBias,
    /// The feed-forward part.
    pub mlp: Mlp,
    /// Where the head's weights come from, by the file's flag (a head in the weights' file beats it).
    pub head: HeadWeights,
    /// The format that the weights were saved in, if the file says so.
    pub format: Option<Format>,
    /// End-of-sequence ids of this file.
    pub eos: Vec<TokenId>,
    /// Beginning-of-sequence id.
    pub bos: Option<TokenId>,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// x / sqrt(mean(x²) + eps) × weight.
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
}

/// How positions enter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Position {
    /// Rotary embedding over the whole head, halves paired (i, i + dim / 2).
    Rotary {
        /// Base of the frequencies.
        theta: f64,
        /// How the frequencies are stretched.
        scaling: RotaryScaling,
    },
}

/// How rotary frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// All divided by the factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3's: long waves divided by the factor, short ones kept, those between blended.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Waves longer than the original context ÷ this are divided.
        low_freq_factor: f64,
        /// Waves shorter than the original context ÷ this are kept.
        high_freq_factor: f64,
        /// The context before stretching.
        original_context: f64,
    },
}

/// Which of the attention's projections have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// None.
    None,
    /// q, k, v and o.
    All,
}

/// The feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// down(silu(gate(x)) × up(x)).
    SwiGlu {
        /// Outputs of gate and of up.
        width: usize,
        /// Whether its three projections have a bias.
        bias: bool,
    },
}

/// Where the head's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadWeights {
    /// The embedding's.
    Tied,
    /// Its own.
    Own,
}

/// `config.json` is not one that petek can serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a value of another kind than the key takes.
    #[error("config.json: {0}")]
    Json(String),
    /// A key that must be there is not.
    #[error("config.json: {key} is missing: {hint}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A value out of its range, or at odds with another.
    #[error("config.json: {key} is {value}: {rule}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What holds of a right one.
        rule: String,
    },
    /// Something that petek does not serve.
    #[error("config.json: {key} {value:?} is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is.
        supported: &'static str,
    },
}

/// The file as written: what families agree on, both spellings.
#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    num_hidden_layers: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    quantization_config: Option<Value>,
    pretraining_tp: Option<u64>,
    eos_token_id: Option<OneOrMany>,
    bos_token_id: Option<u64>,
}

#[derive(Clone, Default, Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u64),
    Many(Vec<u64>),
}

/// Bounds of `config.json`: what a file may ask for before anything is allocated.
mod bounds {
    pub(super) const LAYERS_MAX: usize = 512;
    pub(super) const HEADS_MAX: usize = 1024;
    pub(super) const HIDDEN_MAX: usize = 65_536;
    pub(super) const HEAD_DIM_MAX: usize = 1024;
    pub(super) const MLP_WIDTH_MAX: usize = 1 << 20;
    pub(super) const VOCABULARY_MAX: usize = 4_000_000;
    pub(super) const CONTEXT_MAX: usize = 1 << 24;
}

const ARCHITECTURES: &str = "LlamaForCausalLM, MistralForCausalLM (without sliding window)";

impl DecoderConfig {
    /// Reads and checks a `config.json`.
    ///
    /// *Errors*: [`ConfigError`], one line, naming the key and the numbers.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let raw: Raw = serde_json::from_slice(json).map_err(|e| ConfigError::Json(e.to_string()))?;
        let architecture = raw.architecture()?;
        raw.refuse_unsupported()?;
        let layers = number("num_hidden_layers", raw.num_hidden_layers, bounds::LAYERS_MAX)?;
        let hidden = number("hidden_size", raw.hidden_size, bounds::HIDDEN_MAX)?;
        let vocabulary = number("vocab_size", raw.vocab_size, bounds::VOCABULARY_MAX)?;
        let context = number("max_position_embeddings", raw.max_position_embeddings, bounds::CONTEXT_MAX)?;
        let width = number("intermediate_size", raw.intermediate_size, bounds::MLP_WIDTH_MAX)?;
        let eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(eps.is_finite() && (0.0..1.0).contains(&eps)) {
            return Err(out_of_range("rms_norm_eps", eps, "a finite number from 0 to below 1 is needed"));
        }
        Ok(Self {
            architecture,
            layers,
            hidden,
            heads: raw.heads(hidden)?,
            vocabulary,
            context,
            norm: NormKind::Rms { eps: eps as f32 },
            position: raw.position(context)?,
            attention_bias: match raw.attention_bias {
                Some(true) => AttentionBias::All,
                _ => AttentionBias::None,
            },
            mlp: Mlp::SwiGlu { width, bias: raw.mlp_bias.unwrap_or(false) },
            head: if raw.tie_word_embeddings.unwrap_or(false) { HeadWeights::Tied } else { HeadWeights::Own },
            format: raw.format()?,
            eos: raw.eos(vocabulary)?,
            bos: raw.bos_token_id.map(|id| token("bos_token_id", id, vocabulary)).transpose()?,
        })
    }
}

impl Raw {
    fn architecture(&self) -> Result<String, ConfigError> {
        let named = self.architectures.as_deref().unwrap_or_default();
        let [name] = named else {
            return Err(ConfigError::Missing {
                key: "architectures",
                hint: "a list of exactly one name says which decoder this is",
            });
        };
        match name.as_str() {
            "LlamaForCausalLM" | "MistralForCausalLM" => Ok(name.clone()),
            other => Err(unsupported("architectures", other, ARCHITECTURES)),
        }
    }

    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        if self.quantization_config.as_ref().is_some_and(|v| !v.is_null()) {
            return Err(unsupported(
                "quantization_config",
                "present",
                "unquantised float32, bfloat16, float16 weights",
            ));
        }
        if let (Some(window), true) = (self.sliding_window, self.use_sliding_window.unwrap_or(true)) {
            return Err(unsupported(
                "sliding_window",
                &window.to_string(),
                "null: attention over the whole context",
            ));
        }
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(unsupported("hidden_act", other, "silu")),
        }
        match self.pretraining_tp {
            None | Some(0 | 1) => Ok(()),
            Some(tp) => Err(unsupported("pretraining_tp", &tp.to_string(), "1")),
        }
    }

    fn heads(&self, hidden: usize) -> Result<Heads, ConfigError> {
        let query = number("num_attention_heads", self.num_attention_heads, bounds::HEADS_MAX)?;
        let kv = match self.num_key_value_heads {
            Some(_) => number("num_key_value_heads", self.num_key_value_heads, bounds::HEADS_MAX)?,
            None => query,
        };
        if !query.is_multiple_of(kv) {
            return Err(out_of_range(
                "num_key_value_heads",
                kv,
                format!("it must divide num_attention_heads {query}"),
            ));
        }
        let dim = match self.head_dim {
            Some(_) => number("head_dim", self.head_dim, bounds::HEAD_DIM_MAX)?,
            None if hidden.is_multiple_of(query) => hidden / query,
            None => {
                let rule = format!(
                    "it must be a multiple of num_attention_heads {query} where head_dim is not given"
                );
                return Err(out_of_range("hidden_size", hidden, rule));
            }
        };
        if !dim.is_multiple_of(2) {
            let key = if self.head_dim.is_some() { "head_dim" } else { "hidden_size / num_attention_heads" };
            return Err(out_of_range(
                key,
                dim,
                "rotary embedding pairs its halves: an even number is needed",
            ));
        }
        Ok(Heads { query, kv, dim })
    }

    /// `rope_parameters` beats the older keys.
    fn position(&self, context: usize) -> Result<Position, ConfigError> {
        let rope = self.rope_parameters.clone().or_else(|| self.rope_scaling.clone()).unwrap_or_default();
        let theta = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta).or(self.rope_theta);
        let theta = positive("rope_theta", theta.unwrap_or(10_000.0))?;
        if rope.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
            return Err(unsupported("partial_rotary_factor", "below 1", "1: rotary over the whole head"));
        }
        let factor = |key: &'static str, value: Option<f64>| match value {
            Some(value) => positive(key, value),
            None => Err(ConfigError::Missing { key, hint: "this rope_type needs it" }),
        };
        let scaling = match rope.rope_type.as_deref() {
            None | Some("default") => RotaryScaling::None,
            Some("linear") => RotaryScaling::Linear { factor: factor("factor", rope.factor)? },
            Some("llama3") => {
                let low = factor("low_freq_factor", rope.low_freq_factor)?;
                let high = factor("high_freq_factor", rope.high_freq_factor)?;
                if high <= low {
                    return Err(out_of_range(
                        "high_freq_factor",
                        high,
                        format!("above low_freq_factor {low} is needed"),
                    ));
                }
                RotaryScaling::Llama3 {
                    factor: factor("factor", rope.factor)?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: positive(
                        "original_max_position_embeddings",
                        rope.original_max_position_embeddings.unwrap_or(context as f64),
                    )?,
                }
            }
            Some(other) => return Err(unsupported("rope_type", other, "default, linear, llama3")),
        };
        Ok(Position::Rotary { theta, scaling })
    }

    fn format(&self) -> Result<Option<Format>, ConfigError> {
        match self.dtype.as_deref().or(self.torch_dtype.as_deref()) {
            None => Ok(None),
            Some("float32") => Ok(Some(Format::F32)),
            Some("bfloat16") => Ok(Some(Format::Bf16)),
            Some("float16") => Ok(Some(Format::F16)),
            Some(other) => Err(unsupported("dtype", other, "float32, bfloat16, float16")),
        }
    }

    fn eos(&self, vocabulary: usize) -> Result<Vec<TokenId>, ConfigError> {
        let ids: &[u64] = match &self.eos_token_id {
            None => &[],
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
        };
        ids.iter().map(|&id| token("eos_token_id", id, vocabulary)).collect()
    }
}

/// A whole number from 1 to `most`.
fn number(key: &'static str, value: Option<u64>, most: usize) -> Result<usize, ConfigError> {
    let value = value.ok_or(ConfigError::Missing { key, hint: "the file must say it" })?;
    match usize::try_from(value) {
        Ok(n) if (1..=most).contains(&n) => Ok(n),
        _ => Err(out_of_range(key, value, format!("a whole number from 1 to {most} is needed"))),
    }
}

fn positive(key: &'static str, value: f64) -> Result<f64, ConfigError> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(out_of_range(key, value, "a finite number above 0 is needed"))
}

fn token(key: &'static str, id: u64, vocabulary: usize) -> Result<TokenId, ConfigError> {
    match TokenId::try_from(id) {
        Ok(id) if (id as usize) < vocabulary => Ok(id),
        _ => Err(out_of_range(key, id, format!("it must lie in the vocabulary of {vocabulary}"))),
    }
}

fn out_of_range(key: &'static str, value: impl ToString, rule: impl Into<String>) -> ConfigError {
    ConfigError::Value { key, value: value.to_string(), rule: rule.into() }
}

fn unsupported(key: &'static str, value: &str, supported: &'static str) -> ConfigError {
    ConfigError::Unsupported { key, value: value.chars().take(64).collect(), supported }
}
