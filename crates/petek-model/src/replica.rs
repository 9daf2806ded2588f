//! A model on this machine's CPU: opened and checked once, its packed weights held once, served by any number of replicas of
//! one process. A replica is a group of ranks with a KV cache of its own.

use std::sync::{Arc, Mutex, PoisonError};

use petek_device::collective::{Collective, Threads};
use petek_device::cpu::pool::PoolOptions;
use petek_device::cpu::simd::{SharedWeights, Simd, SimdOptions};
use petek_device::ops::{Format, KvSpec, StepCapacity};

use crate::LoadError;
use crate::decoder::{Decoder, DecoderOptions, Loaded};
use crate::folder::ModelFolder;
use crate::group::{GroupError, RankGroup};
use crate::numerics::Numerics;
use crate::rank::{LogitsHash, Rank, Sampler};
use crate::shard::{Shard, Slices};

/// How a model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// The format that matrices are kept and computed in; none: the one that they are stored in.
    pub format: Option<Format>,
    /// Ranks of each replica.
    pub tp: usize,
    /// Positions served: at most the model's own context.
    pub context: usize,
    /// Ids below this are in the tokeniser; others are never drawn.
    pub vocabulary_drawn: usize,
}

/// What one replica is given.
#[derive(Clone, Debug)]
pub struct ReplicaOptions {
    /// Compute threads of all its ranks together; each rank has at least one.
    pub threads: usize,
    /// Busy threads of the process beside these: other replicas'.
    pub threads_beside: usize,
    /// Tokens of a block: a power of two, 16 to 256.
    pub block_tokens: usize,
    /// Blocks of the KV cache.
    pub blocks: usize,
    /// Sequences that run at once.
    pub slots: usize,
    /// Rows of a step.
    pub step_rows: usize,
    /// Whether logits are hashed into the outcomes, for tests.
    pub logits_hash: LogitsHash,
}

/// A model that replicas can be started of.
pub struct CpuModel {
    folder: ModelFolder,
    shards: Vec<Shard>,
    format: Format,
    options: CpuOptions,
    /// By rank: what the first replica packed, for the others.
    shelf: Vec<Mutex<Option<Packed>>>,
}

#[derive(Clone)]
struct Packed {
    weights: SharedWeights,
    decoder: Loaded,
}

impl CpuModel {
    /// Checks that the folder's model can be served so. Weights are read when the first replica starts.
    ///
    /// *Errors*: a degree of tensor parallelism that does not fit the model.
    pub fn new(folder: ModelFolder, options: CpuOptions) -> Result<Self, LoadError> {
        let options = CpuOptions { context: options.context.min(folder.config.context), ..options };
        let shards = Shard::plan(&folder.config, options.tp)?;
        let format = options.format.unwrap_or_else(|| folder.weights.format());
        let shelf = shards.iter().map(|_| Mutex::default()).collect();
        Ok(Self { folder, shards, format, options, shelf })
    }

    /// The folder it came from.
    pub fn folder(&self) -> &ModelFolder {
        &self.folder
    }

    /// Positions served.
    pub fn context(&self) -> usize {
        self.options.context
    }

    /// The format that matrices are kept and computed in.
    pub fn format(&self) -> Format {
        self.format
    }

    /// What must be equal for two replicas to give equal bits.
    pub fn numerics(&self) -> Numerics {
        Numerics { weights: self.format, slices: Slices::of(&self.folder.config), ranks: self.options.tp }
    }

    /// Bytes that a block of the KV cache takes on all ranks of a replica together.
    pub fn block_bytes(&self, block_tokens: usize) -> usize {
        let config = &self.folder.config;
        let of_rank = |shard: &Shard| {
            let (layers, heads, format) = (config.layers, shard.heads(config), self.format.activation());
            KvSpec { layers, heads, block_tokens, blocks: 1, format }.block_bytes()
        };
        self.shards.iter().map(of_rank).sum()
    }

    /// Starts a replica: loads the weights if none did before, allocates its cache and buffers.
    ///
    /// *Errors*: the first rank's that could not be built: a tensor that is missing or wrong, by name; threads or memory that
    /// are not to be had.
    pub fn start(self: &Arc<Self>, options: ReplicaOptions) -> Result<RankGroup, GroupError> {
        let ranks = self.shards.len();
        let threads = (options.threads / ranks).max(1);
        let model = Arc::clone(self);
        let build = move |rank, collective| model.rank(rank, threads, collective, &options);
        RankGroup::start::<LoadError>(Threads::group(ranks, threads), Arc::new(build))
    }

    fn rank(
        &self,
        rank: usize,
        threads: usize,
        collective: Arc<dyn Collective>,
        options: &ReplicaOptions,
    ) -> Result<Rank, LoadError> {
        let beside = options.threads_beside + (self.shards.len() - 1) * threads;
        let pool = PoolOptions { threads, threads_beside: beside, cores: Vec::new() };
        let decoder = self.decoder(rank, SimdOptions { pool, isa: None }, collective)?;
        let capacity = StepCapacity {
            rows: options.step_rows,
            spans: options.slots,
            picks: options.slots,
            blocks_per_span: self.options.context.div_ceil(options.block_tokens),
        };
        let sampler = if rank == 0 { Sampler::Here } else { Sampler::Elsewhere };
        let ReplicaOptions { slots, block_tokens, blocks, logits_hash, .. } = *options;
        Ok(Rank::new(decoder, slots, block_tokens, blocks, capacity, sampler, logits_hash)?)
    }

    /// A rank's decoder: loaded by the first that asks, who keeps the others of that rank waiting until it is there.
    fn decoder(
        &self,
        rank: usize,
        options: SimdOptions,
        collective: Arc<dyn Collective>,
    ) -> Result<Decoder, LoadError> {
        // A load that panicked left nothing on the shelf: the next one begins anew.
        let mut place = self.shelf[rank].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Packed { weights, decoder }) = place.clone() {
            drop(place);
            return Ok(Decoder::over(decoder, Box::new(Simd::over(weights, options, collective)?)));
        }
        let mut ops = Simd::new(options, self.format, collective)?;
        let CpuOptions { context, vocabulary_drawn, .. } = self.options;
        let decoder_options = DecoderOptions { format: self.format, context, vocabulary_drawn };
        let (folder, shard) = (&self.folder, self.shards[rank].clone());
        let decoder = Loaded::load(&mut ops, &folder.config, shard, &folder.weights, decoder_options)?;
        *place = Some(Packed { weights: ops.weights(), decoder: decoder.clone() });
        Ok(Decoder::over(decoder, Box::new(ops)))
    }
}
