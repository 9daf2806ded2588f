//! The decoder: one step of one rank, written once over [`Ops`] for every device.
//!
//! A step is one pass whatever its rows: there is no loop over sequences here, so each weight is read once.

use petek_device::DeviceError;
use petek_device::ops::{
    Buffer, Extent, Format, KvSpec, Matrix, MatrixSpec, Norm, Ops, Parts, StepCapacity, StepInputs, Tensor,
    Vector, Vocabulary,
};

use crate::LoadError;
use crate::config::{AttentionBias, DecoderConfig, Mlp, NormKind, Position};
use crate::rotary::RotaryTables;
use crate::shard::Shard;
use crate::weights::{LayerTensor, Weights};

/// One rank's decoder.
pub struct Decoder {
    ops: Box<dyn Ops>,
    loaded: Loaded,
    buffers: Option<Buffers>,
}

/// A decoder's configuration and the handles of what it loaded: the same in all executors that share one copy of the weights.
#[derive(Clone)]
pub struct Loaded {
    config: DecoderConfig,
    shard: Shard,
    /// Positions that the rotary tables cover: the served context.
    context: usize,
    embedding: Matrix,
    head: Matrix,
    norm: Norm,
    layers: Vec<Layer>,
    vocabulary: Vocabulary,
}

#[derive(Clone)]
struct Layer {
    attention_norm: Norm,
    qkv: Matrix,
    qkv_bias: Option<Vector>,
    o: Matrix,
    o_bias: Option<Vector>,
    mlp_norm: Norm,
    gate_up: Matrix,
    gate_up_bias: Option<Vector>,
    down: Matrix,
    down_bias: Option<Vector>,
}

/// All buffers of a step; their names are what they hold.
#[derive(Clone, Copy)]
struct Buffers {
    x: Buffer,
    normed: Buffer,
    qkv: Buffer,
    q: Buffer,
    attention: Buffer,
    gate_up: Buffer,
    hidden: Buffer,
    partial: Buffer,
    picked: Buffer,
    picked_normed: Buffer,
    logits_part: Buffer,
    logits: Buffer,
}

/// What a decoder is loaded for.
#[derive(Clone, Copy, Debug)]
pub struct DecoderOptions {
    /// The format that matrices are kept and computed in.
    pub format: Format,
    /// Positions served: at most the model's context. Rotary tables are as long.
    pub context: usize,
    /// Ids below this are in the tokeniser; others are never drawn.
    pub vocabulary_drawn: usize,
}

impl Loaded {
    /// Loads a rank's shard of the weights into an executor.
    ///
    /// *Errors*: a tensor that is missing, of another shape or left over, by name; memory that is not to be had.
    pub fn load(
        ops: &mut dyn Ops,
        config: &DecoderConfig,
        shard: Shard,
        weights: &Weights,
        options: DecoderOptions,
    ) -> Result<Self, LoadError> {
        let Position::Rotary { theta, scaling } = config.position;
        let tables = RotaryTables::new(config.heads.dim, options.context, theta, scaling);
        ops.load_rotary(&tables.cos, &tables.sin)?;
        let loader = Loader { config, shard: &shard, weights, format: options.format };
        let embedding = loader.vocabulary(ops, weights.embedding()?)?;
        let head = match weights.head()? {
            Some(head) => loader.vocabulary(ops, head)?,
            None => embedding,
        };
        let layers = (0..config.layers)
            .map(|layer| loader.layer(ops, layer))
            .collect::<Result<Vec<_>, LoadError>>()?;
        let NormKind::Rms { eps } = config.norm;
        let norm = Norm { weight: ops.load_vector(&weights.final_norm()?)?, eps };
        let drawn = options.vocabulary_drawn.min(config.vocabulary);
        let vocabulary = Vocabulary { size: config.vocabulary, drawn };
        let (config, context) = (config.clone(), options.context);
        Ok(Self { config, shard, context, embedding, head, norm, layers, vocabulary })
    }
}

impl Decoder {
    /// Loads this rank's shard of the weights.
    ///
    /// *Errors*: as [`Loaded::load`].
    pub fn load(
        mut ops: Box<dyn Ops>,
        config: &DecoderConfig,
        shard: Shard,
        weights: &Weights,
        options: DecoderOptions,
    ) -> Result<Self, LoadError> {
        let loaded = Loaded::load(&mut *ops, config, shard, weights, options)?;
        Ok(Self::over(loaded, ops))
    }

    /// A decoder over an executor that shares the weights of the one that `loaded` was loaded into.
    pub fn over(loaded: Loaded, ops: Box<dyn Ops>) -> Self {
        Self { ops, loaded, buffers: None }
    }

    /// Allocates the KV cache and the step's buffers: everything that serving needs, once.
    ///
    /// *Errors*: memory that is not to be had.
    pub fn allocate(
        &mut self,
        block_tokens: usize,
        blocks: usize,
        capacity: StepCapacity,
    ) -> Result<(), DeviceError> {
        let kv = self.kv_spec(block_tokens, blocks);
        let Loaded { config, shard, .. } = &self.loaded;
        let Mlp::SwiGlu { .. } = config.mlp;
        let (heads, mlp) = (kv.heads, shard.mlp.len());
        self.ops.allocate_kv(kv, capacity)?;
        let mut rows = |width| self.ops.buffer(Extent::Rows, width);
        let (x, normed, partial) = (rows(config.hidden)?, rows(config.hidden)?, rows(config.hidden)?);
        let (qkv, q) = (rows(heads.qkv_width())?, rows(heads.query_width())?);
        let (attention, gate_up, hidden) = (rows(heads.query_width())?, rows(2 * mlp)?, rows(mlp)?);
        let mut picks = |width| self.ops.buffer(Extent::Picks, width);
        let (picked, picked_normed) = (picks(config.hidden)?, picks(config.hidden)?);
        let logits_part = picks(shard.vocabulary_width)?;
        let logits =
            if shard.ranks == 1 { logits_part } else { picks(shard.vocabulary_width * shard.ranks)? };
        self.buffers = Some(Buffers {
            x,
            normed,
            qkv,
            q,
            attention,
            gate_up,
            hidden,
            partial,
            picked,
            picked_normed,
            logits_part,
            logits,
        });
        Ok(())
    }

    /// The KV cache of this rank for so many blocks.
    pub fn kv_spec(&self, block_tokens: usize, blocks: usize) -> KvSpec {
        let Loaded { config, shard, .. } = &self.loaded;
        let format = self.ops.activation();
        KvSpec { layers: config.layers, heads: shard.heads(config), block_tokens, blocks, format }
    }

    /// Computes one step to its end.
    ///
    /// *Errors*: inputs beyond what was allocated; a failed group of ranks; a panic in a compute thread.
    ///
    /// *Panics*: before [`Decoder::allocate`].
    pub fn step(&mut self, inputs: &StepInputs<'_>) -> Result<(), DeviceError> {
        let b = self.buffers.expect("a decoder allocates before it steps");
        let Loaded { config, shard, layers, .. } = &self.loaded;
        let scale = 1.0 / (config.heads.dim as f32).sqrt();
        let ops = &mut *self.ops;
        ops.begin(inputs)?;
        ops.embed(self.loaded.embedding, shard.vocabulary.start as u32, b.x);
        ops.all_reduce(b.x);
        for (index, layer) in layers.iter().enumerate() {
            ops.norm_qkv(b.x, layer.attention_norm, layer.qkv, layer.qkv_bias, b.normed, b.qkv);
            ops.rope_kv_attention(b.qkv, index, scale, b.q, b.attention);
            ops.o_residual(b.attention, layer.o, layer.o_bias, b.partial, b.x);
            let Mlp::SwiGlu { .. } = config.mlp;
            ops.norm_gate_up_swiglu(
                b.x,
                layer.mlp_norm,
                layer.gate_up,
                layer.gate_up_bias,
                b.normed,
                b.gate_up,
                b.hidden,
            );
            ops.down_residual(b.hidden, layer.down, layer.down_bias, b.partial, b.x);
        }
        if !inputs.picks.is_empty() {
            ops.pick(b.x, b.picked);
            ops.norm_logits(b.picked, self.loaded.norm, self.loaded.head, b.picked_normed, b.logits_part);
            if shard.ranks > 1 {
                ops.all_gather(b.logits_part, b.logits);
            }
            if !inputs.draws.is_empty() {
                ops.sample(b.logits, self.loaded.vocabulary);
            }
        }
        ops.submit()
    }

    /// The logits of the last step's picked rows, whole vocabulary each.
    pub fn logits(&self, picks: usize) -> Vec<Vec<f32>> {
        let b = self.buffers.expect("a decoder allocates before it steps");
        let width = self.loaded.shard.vocabulary_width * self.loaded.shard.ranks;
        let rows = self.ops.read(b.logits, picks);
        rows.chunks_exact(width).map(|row| row[..self.loaded.vocabulary.size].to_vec()).collect()
    }

    /// The executor.
    pub fn ops(&self) -> &dyn Ops {
        &*self.ops
    }

    /// Positions that it serves.
    pub fn context(&self) -> usize {
        self.loaded.context
    }

    /// Ids below this can be computed with.
    pub fn vocabulary(&self) -> usize {
        self.loaded.vocabulary.size
    }
}

/// Takes the tensors of the table to the executor, each in this rank's share.
struct Loader<'a> {
    config: &'a DecoderConfig,
    shard: &'a Shard,
    weights: &'a Weights,
    format: Format,
}

impl Loader<'_> {
    /// The rank's rows of an embedding or a head.
    fn vocabulary(&self, ops: &mut dyn Ops, tensor: Tensor<'_>) -> Result<Matrix, LoadError> {
        let rows = &self.shard.vocabulary;
        let tensor = Tensor { row0: rows.start, rows: rows.len(), ..tensor };
        Ok(ops.load_matrix(MatrixSpec { parts: Parts::Stack(&[tensor]), format: self.format, slices: 1 })?)
    }

    fn layer(&self, ops: &mut dyn Ops, layer: usize) -> Result<Layer, LoadError> {
        use LayerTensor::*;
        let (shard, dim) = (self.shard, self.config.heads.dim);
        let query = shard.query_heads.start * dim..shard.query_heads.end * dim;
        let kv = shard.kv_heads.start * dim..shard.kv_heads.end * dim;
        let mlp = shard.mlp.clone();
        let NormKind::Rms { eps } = self.config.norm;
        let Mlp::SwiGlu { bias: mlp_bias, .. } = self.config.mlp;
        let attention_bias = self.config.attention_bias == AttentionBias::All;

        let outputs = |tensor, rows: &std::ops::Range<usize>| self.weights.outputs(layer, tensor, rows);
        let inputs = |tensor, cols: &std::ops::Range<usize>| self.weights.inputs(layer, tensor, cols);
        let vector = |tensor| self.weights.vector(layer, tensor);
        let norm = |ops: &mut dyn Ops, tensor| -> Result<Norm, LoadError> {
            Ok(Norm { weight: ops.load_vector(&vector(tensor)?)?, eps })
        };
        // Biases of column-parallel parts are cut as their outputs are; those after a full sum are whole.
        let bias = |ops: &mut dyn Ops, there: bool, parts: &[(LayerTensor, &std::ops::Range<usize>)]| {
            if !there {
                return Ok(None);
            }
            let mut values = Vec::new();
            for (tensor, range) in parts {
                values.extend_from_slice(&vector(*tensor)?[(*range).clone()]);
            }
            Ok::<_, LoadError>(Some(ops.load_vector(&values)?))
        };
        let matrix = |ops: &mut dyn Ops, parts: Parts<'_>, slices| {
            ops.load_matrix(MatrixSpec { parts, format: self.format, slices })
        };
        let hidden = 0..self.config.hidden;
        Ok(Layer {
            attention_norm: norm(ops, InputNorm)?,
            qkv: matrix(ops, Parts::Stack(&[outputs(Q, &query)?, outputs(K, &kv)?, outputs(V, &kv)?]), 1)?,
            qkv_bias: bias(ops, attention_bias, &[(QBias, &query), (KBias, &kv), (VBias, &kv)])?,
            o: matrix(ops, Parts::Stack(&[inputs(O, &query)?]), shard.slices.o)?,
            o_bias: bias(ops, attention_bias, &[(OBias, &hidden)])?,
            mlp_norm: norm(ops, PostAttentionNorm)?,
            gate_up: matrix(ops, Parts::GateUp([outputs(Gate, &mlp)?, outputs(Up, &mlp)?]), 1)?,
            gate_up_bias: bias(ops, mlp_bias, &[(GateBias, &mlp), (UpBias, &mlp)])?,
            down: matrix(ops, Parts::Stack(&[inputs(Down, &mlp)?]), shard.slices.down)?,
            down_bias: bias(ops, mlp_bias, &[(DownBias, &hidden)])?,
        })
    }
}
