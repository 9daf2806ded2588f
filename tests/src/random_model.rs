//! Llama folders of random weights, of any shape and dtype: for comparing bits, and for speed at a real size.
//! No text of theirs means anything; their use is that they hide nothing: logits are spread as a real
//! model's, with a deviation of about 2, so that the tokens drawn at temperature 1.5 depend on the last bits.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use petek_model::folder::ModelFolder;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use crate::chain::byte_level;
use crate::llama::{EosPlaces, FolderText, LazyTensor, LlamaShape, write_weights};
use crate::random::Random;

/// A folder to be written.
#[derive(Clone, Debug)]
pub struct RandomModel {
    /// As in config.json.
    pub shape: LlamaShape,
    /// As stored: float32, bfloat16 or float16.
    pub dtype: Dtype,
    /// Decides every weight, each tensor by its own name.
    pub seed: u64,
}

/// Deviation of the logits.
const LOGIT_DEVIATION: f32 = 2.0;

impl RandomModel {
    /// Writes the folder, one tensor in memory at a time. The tokeniser has a token per byte (ids 0 to 255)
    /// and the end of a sequence (256); the rest of the vocabulary has no text.
    ///
    /// *Errors*: a vocabulary too small for that, or the disk's.
    pub fn write(&self, dir: &Path) -> Result<()> {
        ensure!(
            self.shape.vocab > END as usize,
            "a vocabulary of {} cannot hold 256 bytes and an end",
            self.shape.vocab
        );
        self.text().write(dir)?;
        let tensors = self.shape.tensors().into_iter().map(|(name, dims)| {
            let (seed, shape) = (self.seed, &self.shape);
            let values: Box<dyn Fn() -> Vec<f32>> = Box::new({
                let (name, dims) = (name.clone(), dims.clone());
                move || weights(Random::of_part(seed, &name), &name, &dims, shape)
            });
            (name, LazyTensor { dtype: self.dtype, shape: dims, values })
        });
        write_weights(dir, tensors.collect())
    }

    /// Opens it, written into a folder that is gone by then: its weights stay mapped.
    ///
    /// # Panics
    /// Where [`RandomModel::write`] fails, or the folder is none.
    pub fn open(&self) -> Arc<ModelFolder> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        self.write(dir.path()).expect("written");
        Arc::new(ModelFolder::open(dir.path()).expect("opened"))
    }

    fn text(&self) -> FolderText {
        let vocab: Map<String, Value> = (0..=255u8)
            .map(|byte| (byte_level(&[byte]), Value::from(byte)))
            .chain([(END_TEXT.to_string(), Value::from(END))])
            .collect();
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{
                "id": END, "content": END_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }],
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": false, "vocab": vocab, "merges": [],
            },
        });
        let mut tokenizer_config = Map::new();
        tokenizer_config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        tokenizer_config.insert("model_max_length".into(), self.shape.context.into());
        FolderText {
            config: self.shape.config(self.dtype),
            tokenizer,
            tokenizer_config,
            generation_config: Map::new(),
            eos: EosPlaces {
                config: Some(END),
                generation_config: vec![END],
                tokenizer_config: Some(END_TEXT.into()),
            },
        }
    }
}

const END: u32 = 256;
const END_TEXT: &str = "<|end|>";

/// Values of one tensor. A matrix is uniform with deviation gain / sqrt(columns), so that a normalised input
/// gives outputs of deviation `gain`:
/// - embedding and head: the logits' deviation. In the residual stream this is little (2 / sqrt(width))
///   beside what the layers add, or a tied head would only repeat the last token.
/// - q, k: 1.5, so that attention prefers some positions and lets none vanish;
/// - o, down: large, to make up for the averaging over positions and for the gate.
fn weights(mut random: Random, name: &str, dims: &[usize], shape: &LlamaShape) -> Vec<f32> {
    let part = name.trim_end_matches(".weight").rsplit('.').next().unwrap_or(name);
    let uniform = |gain: f32, columns: usize| 3f32.sqrt() * gain / (columns as f32).sqrt();
    let (middle, half_width) = match part {
        // Norms of their own, so that one left out or mixed up shows.
        "norm" | "input_layernorm" | "post_attention_layernorm" => (1.0, 0.25),
        "embed_tokens" | "lm_head" => (0.0, uniform(LOGIT_DEVIATION, shape.hidden)),
        "q_proj" | "k_proj" => (0.0, uniform(1.5, shape.hidden)),
        "o_proj" => (0.0, uniform(2.0, dims[1])),
        "down_proj" => (0.0, uniform(2.0, dims[1])),
        _ => (0.0, uniform(1.0, shape.hidden)),
    };
    (0..dims.iter().product()).map(|_| middle + half_width * random.signed_unit()).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use tokenizers::Tokenizer;

    use super::*;
    use crate::demo::model::Llama;
    use crate::llama::read_weights;

    fn small(tied: bool) -> LlamaShape {
        LlamaShape {
            layers: 3,
            hidden: 96,
            intermediate: 160,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            vocab: 320,
            tied,
            context: 512,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
        }
    }

    #[test]
    fn a_seed_gives_the_same_bytes_and_another_seed_others() {
        let write = |seed| {
            let dir = tempfile::tempdir().unwrap();
            RandomModel { shape: small(true), dtype: Dtype::BF16, seed }.write(dir.path()).unwrap();
            std::fs::read(dir.path().join("model.safetensors")).unwrap()
        };
        assert!(write(7) == write(7));
        assert!(write(7) != write(8));
    }

    #[test]
    fn logits_are_spread_and_not_peaked() {
        for (tied, dtype) in [(true, Dtype::BF16), (false, Dtype::F32), (true, Dtype::F16)] {
            let dir = tempfile::tempdir().unwrap();
            let shape = small(tied);
            RandomModel { shape: shape.clone(), dtype, seed: 5 }.write(dir.path()).unwrap();
            let model = Llama::from_values(&shape, read_weights(dir.path(), &shape).unwrap()).unwrap();
            let ids: Vec<u32> = (0..64).map(|i| (i * 37) % 320).collect();
            let logits = model.forward(&Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap());
            let rows: Vec<Vec<f32>> = logits.unwrap().to_vec2().unwrap();
            for (position, row) in rows.iter().enumerate() {
                let sum: f32 = row.iter().map(|logit| logit.exp()).sum();
                let greatest = row.iter().map(|logit| logit.exp() / sum).fold(0.0, f32::max);
                let squares = row.iter().map(|logit| logit * logit).sum::<f32>() / row.len() as f32;
                // 320 logits of a deviation near 2: the greatest lies near 3 deviations, e⁶ ≈ 400 of 320 × e²
                // ≈ 2,400.
                assert!(
                    greatest < 0.8,
                    "{tied} {dtype:?}: position {position} gives {greatest} to one token"
                );
                assert!((1.0..3.0).contains(&squares.sqrt()), "{tied} {dtype:?}: {squares} at {position}");
            }
            // A tied head must not just repeat its input.
            let repeats = rows.iter().zip(&ids).filter(|(row, id)| argmax(row) == **id as usize).count();
            assert!(repeats < 16, "{repeats} of 64 positions repeat their own token");
        }
    }

    fn argmax(row: &[f32]) -> usize {
        (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
    }

    #[test]
    fn the_tokeniser_knows_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        RandomModel { shape: small(true), dtype: Dtype::BF16, seed: 1 }.write(dir.path()).unwrap();
        let tokenizer = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        let text = "Aß 🌶\n";
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), ids);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let error =
            RandomModel { shape: LlamaShape { vocab: 256, ..small(true) }, dtype: Dtype::F32, seed: 1 };
        assert!(error.write(dir.path()).unwrap_err().to_string().contains("vocabulary of 256"));
    }
}
