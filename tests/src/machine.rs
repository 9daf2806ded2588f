//! Ranks over a model folder on the executor that serves, of any degree, threads and instructions: what may differ
//! between two workers of one numerics id.

use std::sync::Arc;

use petek_device::collective::{Collective, Threads};
use petek_device::cpu::isa::Isa;
use petek_device::cpu::pool::PoolOptions;
use petek_device::cpu::simd::{Simd, SimdOptions};
use petek_device::ops::StepCapacity;
use petek_model::LoadError;
use petek_model::decoder::{Decoder, DecoderOptions};
use petek_model::folder::ModelFolder;
use petek_model::group::{GroupError, RankGroup};
use petek_model::rank::{LogitsHash, Rank, Sampler};
use petek_model::shard::Shard;

/// How a group computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The tensor-parallel degree.
    pub ranks: usize,
    /// Compute threads of each rank.
    pub threads: usize,
    /// Instructions.
    pub isa: Isa,
}

/// What a group has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Positions of a sequence.
    pub context: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Blocks.
    pub blocks: usize,
    /// Sequences at once.
    pub slots: usize,
    /// Rows of a step.
    pub rows: usize,
    /// Ids that may be drawn; the model's others are not in the tokeniser.
    pub vocabulary_drawn: usize,
}

impl Machine {
    /// One rank with one thread, on the best instructions there are.
    ///
    /// *Panics*: on a processor that petek does not run on.
    pub fn plain() -> Self {
        Machine { ranks: 1, threads: 1, isa: Isa::detect().expect("a processor that petek runs on") }
    }

    /// One rank of a group, in the format of the folder's weights, logits hashed.
    ///
    /// *Errors*: the loader's.
    pub fn rank(
        self,
        folder: &ModelFolder,
        room: Room,
        collective: Arc<dyn Collective>,
    ) -> Result<Rank, LoadError> {
        let (format, rank) = (folder.weights.format(), collective.rank());
        let shard = Shard::plan(&folder.config, self.ranks)?.remove(rank);
        let threads_beside = (self.ranks - 1) * self.threads;
        let pool = PoolOptions { threads: self.threads, threads_beside, cores: Vec::new() };
        let ops = Simd::new(SimdOptions { pool, isa: Some(self.isa) }, format, collective)?;
        let Room { context, block_tokens, blocks, slots, rows, vocabulary_drawn } = room;
        let options = DecoderOptions { format, context, vocabulary_drawn };
        let decoder = Decoder::load(Box::new(ops), &folder.config, shard, &folder.weights, options)?;
        let blocks_per_span = context.div_ceil(block_tokens);
        let capacity = StepCapacity { rows, spans: slots, picks: slots, blocks_per_span };
        let sampler = if rank == 0 { Sampler::Here } else { Sampler::Elsewhere };
        Ok(Rank::new(decoder, slots, block_tokens, blocks, capacity, sampler, LogitsHash::On)?)
    }

    /// The whole group.
    ///
    /// *Errors*: the first rank's that could not be built.
    pub fn group(self, folder: &Arc<ModelFolder>, room: Room) -> Result<RankGroup, GroupError> {
        let folder = folder.clone();
        let build = move |_, collective| self.rank(&folder, room, collective);
        RankGroup::start::<LoadError>(Threads::group(self.ranks, self.threads), Arc::new(build))
    }
}
