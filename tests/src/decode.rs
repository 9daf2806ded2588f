//! A decoder driven by hand, one sequence at a time: what golden tests need of an engine.

use std::sync::Arc;

use petek_device::DeviceError;
use petek_device::collective::Collective;
use petek_device::cpu::pool::PoolOptions;
use petek_device::cpu::reference::Reference;
use petek_device::cpu::simd::{Simd, SimdOptions};
use petek_device::ops::{Format, Ops, SpanRows, StepCapacity, StepInputs};
use petek_model::LoadError;
use petek_model::decoder::{Decoder, DecoderOptions};
use petek_model::folder::ModelFolder;
use petek_model::shard::Shard;

/// An executor for weights of a format, as a member of a group.
pub type MakeOps<'a> = dyn Fn(Format, Arc<dyn Collective>) -> Result<Box<dyn Ops>, DeviceError> + Sync + 'a;

/// The oracle.
///
/// *Errors*: none; the signature is [`MakeOps`].
pub fn reference(format: Format, collective: Arc<dyn Collective>) -> Result<Box<dyn Ops>, DeviceError> {
    Ok(Box::new(Reference::new(format.activation(), collective)))
}

/// The executor that serves, on `threads` threads for each rank.
///
/// *Errors*: a processor that cannot run it.
pub fn simd(
    threads: usize,
) -> impl Fn(Format, Arc<dyn Collective>) -> Result<Box<dyn Ops>, DeviceError> + Sync {
    move |format, collective| {
        let threads_beside = (collective.ranks() - 1) * threads;
        let pool = PoolOptions { threads, threads_beside, cores: Vec::new() };
        Ok(Box::new(Simd::new(SimdOptions { pool, isa: None }, format, collective)?) as Box<dyn Ops>)
    }
}

/// One rank's decoder with a cache for one sequence.
pub struct Solitary {
    decoder: Decoder,
    table: Vec<u32>,
}

const BLOCK_TOKENS: usize = 32;

impl Solitary {
    /// Loads a rank's shard to compute in `format`, with a cache of `context` tokens.
    ///
    /// *Errors*: the loader's.
    pub fn load(
        folder: &ModelFolder,
        make: &MakeOps<'_>,
        collective: Arc<dyn Collective>,
        format: Format,
        context: usize,
        chunk: usize,
    ) -> Result<Self, LoadError> {
        let shard = Shard::plan(&folder.config, collective.ranks())?.remove(collective.rank());
        let options = DecoderOptions { format, context, vocabulary_drawn: folder.config.vocabulary };
        let ops = make(format, collective)?;
        let mut decoder = Decoder::load(ops, &folder.config, shard, &folder.weights, options)?;
        let blocks = context.div_ceil(BLOCK_TOKENS);
        let capacity = StepCapacity { rows: chunk, spans: 1, picks: chunk, blocks_per_span: blocks };
        decoder.allocate(BLOCK_TOKENS, blocks, capacity)?;
        // Not the order in which blocks lie: a table that is not looked at shows.
        let table = (0..blocks as u32).rev().collect();
        Ok(Self { decoder, table })
    }

    /// Computes `ids` in steps of `chunk` rows, from an empty cache; hands each step's logits over, a row a position.
    ///
    /// *Errors*: the device's, or the first that `take` gives.
    pub fn run<E: From<DeviceError>>(
        &mut self,
        ids: &[u32],
        chunk: usize,
        mut take: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, ids) in ids.chunks(chunk).enumerate() {
            let (start, rows) = ((index * chunk) as u32, ids.len() as u32);
            self.decoder.step(&StepInputs {
                ids,
                positions: &(start..start + rows).collect::<Vec<_>>(),
                spans: &[SpanRows { row0: 0, rows, start, table0: 0 }],
                tables: &self.table,
                zeroes: &[],
                copies: &[],
                picks: &(0..rows).collect::<Vec<_>>(),
                draws: &[],
            })?;
            self.decoder.logits(ids.len()).iter().try_for_each(|row| take(row))?;
        }
        Ok(())
    }
}
