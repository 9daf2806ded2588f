//! The Llama decoder on candle's tensors, for training and for a look at what came out. It shares no code
//! with the decoder that serves, so each can be held against the other.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Shape, Tensor, Var, bail};

use crate::llama::LlamaShape;
use crate::random::Random;

/// Weights by name, and how to run them.
pub struct Llama {
    shape: LlamaShape,
    weights: HashMap<String, Tensor>,
}

/// Weights that can be trained, in the order of [`LlamaShape::tensors`].
pub type Trainable = Vec<(String, Var)>;

impl Llama {
    /// A model of these values.
    ///
    /// *Errors*: a tensor of the shape is missing or has another number of values.
    pub fn from_values(shape: &LlamaShape, mut values: HashMap<String, Vec<f32>>) -> Result<Self> {
        let mut weights = HashMap::new();
        for (name, dims) in shape.tensors() {
            let values = values.remove(&name).with_context(|| format!("{name} is missing"))?;
            weights.insert(name, Tensor::from_vec(values, dims, &Device::Cpu)?);
        }
        Ok(Self { shape: shape.clone(), weights })
    }

    /// A model to be trained: norms 1, matrices normal with deviation 0.02, those that write to the residual
    /// stream less by sqrt(2 × layers).
    pub fn trainable(shape: &LlamaShape, seed: u64) -> Result<(Self, Trainable)> {
        let mut trainable = Vec::new();
        for (name, dims) in shape.tensors() {
            let mut random = Random::of_part(seed, &name);
            let deviation = match name.contains("o_proj") || name.contains("down_proj") {
                true => 0.02 / (2.0 * shape.layers as f32).sqrt(),
                false => 0.02,
            };
            let count = dims.iter().product();
            let values: Vec<f32> = match dims.len() {
                1 => vec![1.0; count],
                _ => (0..count).map(|_| deviation * random.normal()).collect(),
            };
            trainable.push((name, Var::from_vec(values, dims, &Device::Cpu)?));
        }
        Ok(Self::of_vars(shape, trainable))
    }

    /// A model that reads these weights, whatever they become.
    pub fn of_vars(shape: &LlamaShape, trainable: Trainable) -> (Self, Trainable) {
        let weights = trainable.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        (Self { shape: shape.clone(), weights }, trainable)
    }

    /// Logits `[batch × length, vocabulary]` of ids `[batch, length]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let rotary = self.rotary(length)?;
        let embedding = self.weight("model.embed_tokens")?;
        let mut stream = embedding.index_select(&ids.flatten_all()?, 0)?;
        for layer in 0..self.shape.layers {
            let normed = self.norm(&stream, &format!("model.layers.{layer}.input_layernorm"))?;
            stream = (&stream + self.attention(&normed, layer, [batch, length], &rotary)?)?;
            let normed = self.norm(&stream, &format!("model.layers.{layer}.post_attention_layernorm"))?;
            stream = (&stream + self.mlp(&normed, layer)?)?;
        }
        let normed = self.norm(&stream, "model.norm")?;
        let head = if self.shape.tied { embedding } else { self.weight("lm_head")? };
        Ok(normed.matmul(&head.t()?)?)
    }

    /// Mean negative log-likelihood of `targets` `[batch, length]` after `ids` `[batch, length]`.
    pub fn loss(&self, ids: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let logits = self.forward(ids)?;
        let greatest = logits.max_keepdim(1)?.detach();
        let shifted = logits.broadcast_sub(&greatest)?;
        let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?;
        let chosen = shifted.gather(&targets.flatten_all()?.unsqueeze(1)?, 1)?;
        Ok((log_sum - chosen)?.mean_all()?)
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights.get(&format!("{name}.weight")).with_context(|| format!("{name} is no part of the model"))
    }

    fn linear(&self, x: &Tensor, layer: usize, part: &str) -> Result<Tensor> {
        Ok(x.matmul(&self.weight(&format!("model.layers.{layer}.{part}"))?.t()?)?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean = (x.sqr()?.sum_keepdim(1)? / self.shape.hidden as f64)?;
        let normed = x.broadcast_div(&(mean + self.shape.norm_eps)?.sqrt()?)?;
        Ok(normed.broadcast_mul(self.weight(name)?)?)
    }

    fn mlp(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let gate = self.linear(x, layer, "mlp.gate_proj")?.silu()?;
        let up = self.linear(x, layer, "mlp.up_proj")?;
        self.linear(&(gate * up)?, layer, "mlp.down_proj")
    }

    fn attention(
        &self,
        x: &Tensor,
        layer: usize,
        [batch, length]: [usize; 2],
        rotary: &[Tensor; 2],
    ) -> Result<Tensor> {
        let LlamaShape { heads, kv_heads, head_dim, .. } = self.shape;
        let split = |part, heads| -> Result<Tensor> {
            let heads_last = self.linear(x, layer, part)?.reshape((batch, length, heads, head_dim))?;
            Ok(heads_last.transpose(1, 2)?.contiguous()?)
        };
        let q = rotate(&split("self_attn.q_proj", heads)?, rotary)?;
        let k = rotate(&split("self_attn.k_proj", kv_heads)?, rotary)?;
        let v = split("self_attn.v_proj", kv_heads)?;

        // The query heads of one group stand one after another, so a group is one tall matrix.
        let group = heads / kv_heads;
        let q =
            (q * (1.0 / (head_dim as f64).sqrt()))?.reshape((batch * kv_heads, group * length, head_dim))?;
        let k = k.reshape((batch * kv_heads, length, head_dim))?;
        let v = v.reshape((batch * kv_heads, length, head_dim))?;
        let scores = q.matmul(&k.t()?)?;
        let mixed = scores.apply_op1(CausalSoftmax { length })?.matmul(&v)?;
        let mixed = mixed.reshape((batch, heads, length, head_dim))?.transpose(1, 2)?;
        self.linear(&mixed.reshape((batch * length, heads * head_dim))?, layer, "self_attn.o_proj")
    }

    /// Cosines and sines, `[length, head_dim]`, each half the same.
    fn rotary(&self, length: usize) -> Result<[Tensor; 2]> {
        let half = self.shape.head_dim / 2;
        let angle = |i: usize| {
            let (position, pair) = (i / self.shape.head_dim, i % self.shape.head_dim % half);
            position as f64 * self.shape.rope_theta.powf(-(pair as f64) / half as f64)
        };
        let table = |f: fn(f64) -> f64| {
            let values = (0..length * self.shape.head_dim).map(|i| f(angle(i)) as f32).collect();
            Tensor::from_vec(values, (length, self.shape.head_dim), &Device::Cpu)
        };
        Ok([table(f64::cos)?, table(f64::sin)?])
    }
}

/// `x: [batch, heads, length, head_dim]`; dimension i turns together with i + head_dim / 2.
fn rotate(x: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor> {
    let half = x.dim(3)? / 2;
    let turned = Tensor::cat(&[x.narrow(3, half, half)?.neg()?, x.narrow(3, 0, half)?], 3)?;
    Ok((x.broadcast_mul(cos)? + turned.broadcast_mul(sin)?)?)
}

/// Softmax of scores `[_, rows, length]` over the last dimension, where row r stands at position r mod length
/// and sees no later one. In one pass, where candle's parts would take six.
struct CausalSoftmax {
    length: usize,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let scores = contiguous(storage, layout)?;
        let mut out = vec![0f32; scores.len()];
        for (row, (scores, out)) in scores.chunks(self.length).zip(out.chunks_mut(self.length)).enumerate() {
            let seen = row % self.length + 1;
            let greatest = scores[..seen].iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let mut sum = 0.0;
            for (out, score) in out[..seen].iter_mut().zip(scores) {
                *out = (score - greatest).exp();
                sum += *out;
            }
            out[..seen].iter_mut().for_each(|out| *out /= sum);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let op = SoftmaxGradient { length: self.length };
        result.contiguous()?.apply_op2_no_bwd(&gradient.contiguous()?, &op).map(Some)
    }
}

/// p × (g − Σ p g), row by row.
struct SoftmaxGradient {
    length: usize,
}

impl CustomOp2 for SoftmaxGradient {
    fn name(&self) -> &'static str {
        "causal-softmax-gradient"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        p_layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (p, g) = (contiguous(p, p_layout)?, contiguous(g, g_layout)?);
        let mut out = vec![0f32; p.len()];
        let rows = p.chunks(self.length).zip(g.chunks(self.length)).zip(out.chunks_mut(self.length));
        for (row, ((p, g), out)) in rows.enumerate() {
            let seen = row % self.length + 1;
            let dot: f32 = p[..seen].iter().zip(g).map(|(p, g)| p * g).sum();
            for ((out, p), g) in out[..seen].iter_mut().zip(p).zip(g) {
                *out = p * (g - dot);
            }
        }
        Ok((CpuStorage::F32(out), p_layout.shape().clone()))
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("a {:?} of {:?} must be contiguous here", DType::F32, layout.shape()),
    }
}
