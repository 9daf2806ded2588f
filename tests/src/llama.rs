//! A Llama model as a Hugging Face folder: its shape, the names and shapes of its tensors, and the writer of
//! its files. All models that the tests make go through here, one tensor in memory at a time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::{Map, Value, json};

/// What `config.json` says of a model of the Llama family.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaShape {
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head; need not be `hidden / heads`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// The output head is the embedding.
    pub tied: bool,
    /// Most positions.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// `rope_scaling` of the config, where there is one.
    pub rope_scaling: Option<Value>,
    /// Epsilon of the norms.
    pub norm_eps: f64,
}

impl LlamaShape {
    /// A small one of 8 query and 2 key and value heads: 8 slices of `o` and of `down`, so that 1, 2, 4 and 8 ranks are one
    /// numerics id.
    pub fn eight_slices(context: usize) -> Self {
        Self {
            layers: 2,
            hidden: 64,
            intermediate: 256,
            heads: 8,
            kv_heads: 2,
            head_dim: 16,
            vocab: 304,
            tied: false,
            context,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
        }
    }

    /// The shape of Llama-3.2-1B.
    pub fn llama_1b() -> Self {
        Self {
            layers: 16,
            hidden: 2048,
            intermediate: 8192,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            vocab: 128_256,
            tied: true,
            context: 131_072,
            rope_theta: 500_000.0,
            rope_scaling: Some(json!({
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            })),
            norm_eps: 1e-5,
        }
    }

    /// Names and shapes of all tensors, rows first, as the family's folders call them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".into(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            for (part, shape) in [
                ("input_layernorm", vec![self.hidden]),
                ("self_attn.q_proj", vec![q, self.hidden]),
                ("self_attn.k_proj", vec![kv, self.hidden]),
                ("self_attn.v_proj", vec![kv, self.hidden]),
                ("self_attn.o_proj", vec![self.hidden, q]),
                ("post_attention_layernorm", vec![self.hidden]),
                ("mlp.gate_proj", vec![self.intermediate, self.hidden]),
                ("mlp.up_proj", vec![self.intermediate, self.hidden]),
                ("mlp.down_proj", vec![self.hidden, self.intermediate]),
            ] {
                tensors.push((format!("model.layers.{layer}.{part}.weight"), shape));
            }
        }
        tensors.push(("model.norm.weight".into(), vec![self.hidden]));
        if !self.tied {
            tensors.push(("lm_head.weight".into(), vec![self.vocab, self.hidden]));
        }
        tensors
    }

    /// All of `config.json` that the shape decides; ids of control tokens are the caller's to add.
    pub fn config(&self, dtype: Dtype) -> Map<String, Value> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "attention_bias": false,
            "mlp_bias": false,
            "torch_dtype": dtype_name(dtype),
        });
        let Value::Object(map) = config else { unreachable!("json! of braces is an object") };
        map
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        other => panic!("a model of the tests is in float32, bfloat16 or float16, not {other:?}"),
    }
}

/// Where the ids that end a sequence stand: three files may name them, and each may lack.
#[derive(Clone, Debug, Default)]
pub struct EosPlaces {
    /// `eos_token_id` of config.json.
    pub config: Option<u32>,
    /// `eos_token_id` of generation_config.json.
    pub generation_config: Vec<u32>,
    /// `eos_token` of tokenizer_config.json, by its text.
    pub tokenizer_config: Option<String>,
}

/// Everything of a folder but the weights.
pub struct FolderText {
    /// config.json without the ids that end a sequence.
    pub config: Map<String, Value>,
    /// tokenizer.json.
    pub tokenizer: Value,
    /// tokenizer_config.json, likewise.
    pub tokenizer_config: Map<String, Value>,
    /// generation_config.json, likewise.
    pub generation_config: Map<String, Value>,
    /// The ids that end a sequence.
    pub eos: EosPlaces,
}

impl FolderText {
    /// Writes config.json, generation_config.json, tokenizer.json and tokenizer_config.json.
    pub fn write(mut self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        if let Some(id) = self.eos.config {
            self.config.insert("eos_token_id".into(), id.into());
        }
        match self.eos.generation_config[..] {
            [] => None,
            [id] => self.generation_config.insert("eos_token_id".into(), id.into()),
            _ => self.generation_config.insert("eos_token_id".into(), self.eos.generation_config.into()),
        };
        if let Some(token) = self.eos.tokenizer_config {
            self.tokenizer_config.insert("eos_token".into(), token.into());
        }
        write_json(dir, "config.json", &Value::Object(self.config))?;
        write_json(dir, "generation_config.json", &Value::Object(self.generation_config))?;
        write_json(dir, "tokenizer.json", &self.tokenizer)?;
        write_json(dir, "tokenizer_config.json", &Value::Object(self.tokenizer_config))
    }
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(dir.join(name), text).with_context(|| format!("write {} into {}", name, dir.display()))
}

/// A tensor whose values are made only when they are written, so that one is in memory at a time.
pub struct LazyTensor<'a> {
    /// As stored.
    pub dtype: Dtype,
    /// Rows first.
    pub shape: Vec<usize>,
    /// Makes all values, row-major.
    pub values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

impl View for LazyTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let values = (self.values)();
        assert_eq!(values.len(), self.shape.iter().product::<usize>(), "values of a tensor {:?}", self.shape);
        Cow::Owned(encode(&values, self.dtype))
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Little-endian bytes of values, rounded to nearest even where the type is narrower.
pub fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        other => panic!("a model of the tests is in float32, bfloat16 or float16, not {other:?}"),
    }
}

/// Values of little-endian bytes: what [`encode`] wrote.
pub fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let pair = |b: &[u8]| [b[0], b[1]];
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(pair(b)).to_f32()).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(pair(b)).to_f32()).collect(),
        other => panic!("a model of the tests is in float32, bfloat16 or float16, not {other:?}"),
    }
}

/// Writes model.safetensors: each tensor's values are made, written and dropped before the next one's.
pub fn write_weights(dir: &Path, tensors: Vec<(String, LazyTensor)>) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join("model.safetensors");
    let context = || format!("write {}", path.display());
    // transformers reads no file that does not say so.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    // The library writes a private temporary file: give it what any other new file would have.
    let permissions =
        fs::File::create(&path).and_then(|file| file.metadata()).with_context(context)?.permissions();
    serialize_to_file(tensors, Some(metadata), &path).with_context(context)?;
    fs::set_permissions(&path, permissions).with_context(context)
}

/// Checks that the weights of a folder are just the shape's, all in one dtype, and gives their values by
/// name.
pub fn read_weights(dir: &Path, shape: &LlamaShape) -> Result<HashMap<String, Vec<f32>>> {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let mut values = HashMap::new();
    for (name, dims) in shape.tensors() {
        let tensor = file.tensor(&name).with_context(|| format!("find {name} in {}", path.display()))?;
        anyhow::ensure!(tensor.shape() == dims, "{name} is {:?}, the config says {dims:?}", tensor.shape());
        values.insert(name, decode(tensor.data(), tensor.dtype()));
    }
    for name in file.names() {
        anyhow::ensure!(values.contains_key(name), "{name} of {} is no part of the model", path.display());
    }
    Ok(values)
}
