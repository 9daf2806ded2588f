//! How the demo model learns: its tokeniser from a sample of the corpus, then its weights by AdamW.
//! Everything follows from the seed: two fixed halves of each batch run on a thread each, their gradients are
//! added in order, and no library splits a sum over threads of its own.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use half::bf16;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::corpus::{CHAT_TEMPLATE, END_OF_TEXT, MESSAGE_END, MESSAGE_START, document};
use super::model::{Llama, Trainable};
use crate::llama::{EosPlaces, FolderText, LazyTensor, LlamaShape, write_weights};
use crate::random::Random;

/// What is trained, and for how long.
pub struct Training {
    /// Decides the first weights and all texts.
    pub seed: u64,
    /// Steps of [`TOKENS_PER_STEP`] tokens.
    pub steps: usize,
}

/// Tokens that a step learns from.
pub const TOKENS_PER_STEP: usize = 2048;

/// The shape: 8 query heads and 2 KV heads, 2.5 million weights, 5 MB in bfloat16.
pub fn shape() -> LlamaShape {
    LlamaShape {
        layers: 4,
        hidden: 256,
        intermediate: 512,
        heads: 8,
        kv_heads: 2,
        head_dim: 32,
        vocab: 1024,
        tied: true,
        context: 1024,
        rope_theta: 10_000.0,
        rope_scaling: None,
        norm_eps: 1e-5,
    }
}

const LEARNING_RATE: f64 = 3e-3;
const WARMUP_STEPS: usize = 50;
/// Documents that the tokeniser is made from.
const TOKENISER_DOCUMENTS: usize = 4000;
/// Ids of the control tokens: the trainer gives special tokens the first ids.
const END_OF_TEXT_ID: u32 = 0;
const MESSAGE_END_ID: u32 = 2;

impl Training {
    /// Trains, and writes the folder.
    ///
    /// *Errors*: libraries that may use threads of their own (`RAYON_NUM_THREADS` is not 1), or the disk's.
    pub fn run(&self, dir: &Path) -> Result<()> {
        ensure!(
            candle_core::utils::get_num_threads() == 1,
            "set RAYON_NUM_THREADS=1: only then does the result follow from the seed alone"
        );
        let shape = shape();
        let tokenizer = self.tokenizer()?;
        let (model, trainable) = Llama::trainable(&shape, self.seed)?;
        let mut texts = Texts { tokenizer: &tokenizer, random: Random::of_part(self.seed, "texts") };
        let mut optimiser = AdamW::new(&trainable);
        let start = Instant::now();
        let mut recent = 0.0;
        for step in 0..self.steps {
            // Short texts first, which is cheap; then whole contexts, so that far positions mean something.
            let length = if step * 100 < self.steps * 85 { 256 } else { shape.context };
            let batch = TOKENS_PER_STEP / length;
            let halves = [texts.batch(batch / 2, length)?, texts.batch(batch / 2, length)?];
            let (loss, gradients) = gradients(&model, &trainable, &halves)?;
            optimiser.step(&trainable, gradients, self.learning_rate(step))?;
            recent += loss / 50.0;
            if (step + 1) % 50 == 0 {
                let rate = ((step + 1) * TOKENS_PER_STEP) as f64 / start.elapsed().as_secs_f64();
                eprintln!("step {:5}  loss {recent:.3}  {rate:.0} tokens/s", step + 1);
                recent = 0.0;
            }
        }

        let values: HashMap<String, Vec<f32>> = trainable
            .iter()
            .map(|(name, var)| Ok((name.clone(), rounded(var.flatten_all()?.to_vec1()?))))
            .collect::<Result<_>>()?;
        let model = Llama::from_values(&shape, values.clone())?;
        let mut held_out = Texts { tokenizer: &tokenizer, random: Random::of_part(self.seed, "held out") };
        let mut loss = 0.0;
        for _ in 0..16 {
            let [ids, targets] = held_out.batch(1, shape.context)?;
            loss += model.loss(&ids, &targets)?.to_scalar::<f32>()? / 16.0;
        }
        eprintln!("as stored, on texts not learned: loss {loss:.3}");

        folder_text(&shape, &tokenizer)?.write(dir)?;
        let tensors = shape.tensors().into_iter().map(|(name, dims)| {
            let values = &values[&name];
            (name, LazyTensor { dtype: Dtype::BF16, shape: dims, values: Box::new(|| values.clone()) })
        });
        write_weights(dir, tensors.collect())
    }

    /// Warm-up, then half a cosine down to a twentieth.
    fn learning_rate(&self, step: usize) -> f64 {
        let warmup = ((step + 1) as f64 / WARMUP_STEPS as f64).min(1.0);
        let done = step as f64 / self.steps as f64;
        LEARNING_RATE * warmup * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()))
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        let split = ByteLevel::new(false, true, true);
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(split)).with_decoder(Some(split));
        let special = [END_OF_TEXT, MESSAGE_START, MESSAGE_END].map(|token| AddedToken::from(token, true));
        let trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(shape().vocab)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(special.to_vec())
            .build();
        let mut random = Random::of_part(self.seed, "tokeniser");
        // Control tokens are cut out, or the trainer would learn the letters of their names.
        let texts: Vec<String> = (0..TOKENISER_DOCUMENTS)
            .flat_map(|_| {
                let text = document(&mut random);
                text.split("<|")
                    .map(|part| part.rsplit("|>").next().unwrap_or(part).to_string())
                    .collect::<Vec<_>>()
            })
            .collect();
        tokenizer
            .train(&mut TrainerWrapper::from(trainer), texts.iter())
            .map_err(|error| anyhow::anyhow!("train the tokeniser: {error}"))?;
        for (id, token) in [END_OF_TEXT, MESSAGE_START, MESSAGE_END].into_iter().enumerate() {
            ensure!(tokenizer.token_to_id(token) == Some(id as u32), "{token} has another id than {id}");
        }
        Ok(tokenizer)
    }
}

/// As bfloat16 keeps them.
fn rounded(values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
}

/// Endless texts, as ids.
struct Texts<'a> {
    tokenizer: &'a Tokenizer,
    random: Random,
}

impl Texts<'_> {
    /// Ids and targets, `[batch, length]` each. Every row begins with a document's beginning, as prompts do.
    fn batch(&mut self, batch: usize, length: usize) -> Result<[Tensor; 2]> {
        let (mut ids, mut targets) = (Vec::<u32>::new(), Vec::<u32>::new());
        for _ in 0..batch {
            let mut row: Vec<u32> = Vec::new();
            while row.len() <= length {
                let text = document(&mut self.random);
                let encoding = self.tokenizer.encode_fast(text.as_str(), false);
                row.extend(encoding.map_err(|error| anyhow::anyhow!("tokenise: {error}"))?.get_ids());
            }
            ids.extend(&row[..length]);
            targets.extend(&row[1..=length]);
        }
        let tensor = |values| Tensor::from_vec(values, (batch, length), &Device::Cpu);
        Ok([tensor(ids)?, tensor(targets)?])
    }
}

/// Mean loss and gradient over the halves, one value per weight, in the order of `trainable`.
pub(super) fn gradients(
    model: &Llama,
    trainable: &Trainable,
    halves: &[[Tensor; 2]; 2],
) -> Result<(f32, Vec<Vec<f32>>)> {
    let half = |[ids, targets]: &[Tensor; 2]| -> Result<(f32, Vec<Vec<f32>>)> {
        let loss = model.loss(ids, targets)?;
        let gradients = loss.backward()?;
        let of = |(name, var): &(String, candle_core::Var)| -> Result<Vec<f32>> {
            let gradient = gradients.get(var).with_context(|| format!("{name} has no gradient"))?;
            Ok(gradient.flatten_all()?.to_vec1()?)
        };
        Ok((loss.to_scalar()?, trainable.iter().map(of).collect::<Result<_>>()?))
    };
    let [first, second] = std::thread::scope(|scope| {
        let second = scope.spawn(|| half(&halves[1]));
        [half(&halves[0]), second.join().expect("the second half's thread panicked")]
    });
    let ((loss, mut sum), (other_loss, other)) = (first?, second?);
    for (sum, other) in sum.iter_mut().zip(&other) {
        sum.iter_mut().zip(other).for_each(|(a, b)| *a = (*a + b) / 2.0);
    }
    Ok(((loss + other_loss) / 2.0, sum))
}

/// AdamW with its usual betas for language models, gradients clipped to a norm of 1, decay on matrices only.
///
/// *Source*: Loshchilov, Hutter, "Decoupled weight decay regularization" (2019), algorithm 2.
pub(super) struct AdamW {
    steps: i32,
    /// First and second moment per weight.
    moments: Vec<[Vec<f32>; 2]>,
}

impl AdamW {
    const BETAS: [f64; 2] = [0.9, 0.95];
    const DECAY: f64 = 0.1;

    pub(super) fn new(trainable: &Trainable) -> Self {
        let zeros = |var: &candle_core::Var| vec![0.0; var.elem_count()];
        Self { steps: 0, moments: trainable.iter().map(|(_, var)| [zeros(var), zeros(var)]).collect() }
    }

    pub(super) fn step(&mut self, trainable: &Trainable, gradients: Vec<Vec<f32>>, rate: f64) -> Result<()> {
        self.steps += 1;
        let norm = gradients.iter().flatten().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        ensure!(norm.is_finite(), "the gradient at step {} is not finite", self.steps);
        let clip = (1.0 / norm).min(1.0) as f32;
        let [first_beta, second_beta] = Self::BETAS.map(|beta| beta as f32);
        let [first_share, second_share] = Self::BETAS.map(|beta| 1.0 - beta.powi(self.steps));
        let (scale, second_share) = ((rate / first_share) as f32, second_share as f32);
        for (((_, var), gradient), [first, second]) in trainable.iter().zip(gradients).zip(&mut self.moments)
        {
            let keep = if var.rank() > 1 { (1.0 - rate * Self::DECAY) as f32 } else { 1.0 };
            let mut values: Vec<f32> = var.flatten_all()?.to_vec1()?;
            for (((value, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
                let g = g * clip;
                *m = first_beta * *m + (1.0 - first_beta) * g;
                *v = second_beta * *v + (1.0 - second_beta) * g * g;
                *value = keep * *value - scale * *m / ((*v / second_share).sqrt() + 1e-8);
            }
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
        }
        Ok(())
    }
}

fn folder_text(shape: &LlamaShape, tokenizer: &Tokenizer) -> Result<FolderText> {
    let json = tokenizer.to_string(false).map_err(|error| anyhow::anyhow!("write the tokeniser: {error}"))?;
    let mut config = shape.config(Dtype::BF16);
    config.insert("bos_token_id".into(), Value::Null);
    let mut tokenizer_config = Map::new();
    for (key, value) in [
        ("tokenizer_class", json!("PreTrainedTokenizerFast")),
        ("model_max_length", json!(shape.context)),
        ("clean_up_tokenization_spaces", json!(false)),
        ("chat_template", json!(CHAT_TEMPLATE)),
    ] {
        tokenizer_config.insert(key.into(), value);
    }
    Ok(FolderText {
        config,
        tokenizer: serde_json::from_str(&json)?,
        tokenizer_config,
        generation_config: Map::new(),
        // A document ends with one, a message of a chat with the other.
        eos: EosPlaces {
            config: Some(END_OF_TEXT_ID),
            generation_config: vec![END_OF_TEXT_ID, MESSAGE_END_ID],
            tokenizer_config: Some(MESSAGE_END.into()),
        },
    })
}
