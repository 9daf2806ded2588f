//! One rank at work: the slot table, and the way from a plan to the device and back to an outcome.
//!
//! ```text
//!  StepPlan ─▶ releases, fills ─▶ zeroes, copies, rows: ids, positions, spans, tables, picks, draws ─▶ Decoder::step ─▶ StepOutcome
//! ```

use std::sync::Arc;
use std::time::Instant;

use petek_core::ids::{BlockId, SlotId, TokenId};
use petek_core::plan::{
    Draw, SampledToken, SlotFill, SlotSampling, Span, SpanInput, SpanSample, StepOutcome, StepPlan,
};
use petek_device::DeviceError;
use petek_device::ops::{DrawResult, DrawSpec, SpanRows, StepCapacity, StepInputs};

use crate::decoder::Decoder;

/// Whether each drawn row's logits are hashed into the outcome: a test hook that costs time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsHash {
    /// No.
    Off,
    /// Yes.
    On,
}

/// Whether this rank draws tokens. In a group the first one does; the others learn of them from the plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampler {
    /// It does.
    Here,
    /// Another rank does.
    Elsewhere,
}

/// A plan that cannot be carried out, or a device that failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The plan contradicts the slots: a bug of the engine.
    #[error("step {step}, slot {slot}: {problem}")]
    Plan {
        /// Which step.
        step: u64,
        /// Which slot.
        slot: SlotId,
        /// What is wrong.
        problem: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// One rank's decoder with its slots.
pub struct Rank {
    decoder: Decoder,
    block_tokens: usize,
    capacity: StepCapacity,
    sampler: Sampler,
    logits_hash: LogitsHash,
    slots: Vec<Option<Slot>>,
    rows: Rows,
}

/// A sequence: parameters, ids so far, block table.
struct Slot {
    ids: Vec<TokenId>,
    prompt_tokens: u32,
    sampling: Arc<SlotSampling>,
    blocks: Vec<BlockId>,
}

/// The step's inputs as they are gathered; kept between steps so that nothing is allocated in the steady state.
#[derive(Default)]
struct Rows {
    ids: Vec<u32>,
    positions: Vec<u32>,
    spans: Vec<SpanRows>,
    tables: Vec<u32>,
    zeroes: Vec<u32>,
    copies: Vec<(u32, u32)>,
    picks: Vec<u32>,
    draws: Vec<DrawSpec>,
}

impl Rank {
    /// A rank of `slots` slots over a decoder; allocates the KV cache and all buffers.
    ///
    /// *Errors*: memory that is not to be had.
    pub fn new(
        mut decoder: Decoder,
        slots: usize,
        block_tokens: usize,
        blocks: usize,
        capacity: StepCapacity,
        sampler: Sampler,
        logits_hash: LogitsHash,
    ) -> Result<Self, DeviceError> {
        decoder.allocate(block_tokens, blocks, capacity)?;
        let slots = (0..slots).map(|_| None).collect();
        Ok(Self { decoder, block_tokens, capacity, sampler, logits_hash, slots, rows: Rows::default() })
    }

    /// Carries out one plan.
    ///
    /// *Errors*: [`StepError::Plan`] before anything is computed, naming the slot; a failed device.
    pub fn step(&mut self, plan: &StepPlan) -> Result<StepOutcome, StepError> {
        let began = Instant::now();
        for slot in &plan.releases {
            *self.slot_mut(plan, *slot)? = None;
        }
        for fill in &plan.fills {
            self.fill(plan, fill)?;
        }
        self.rows.clear();
        self.rows.zeroes.extend(plan.zeroes.iter().map(|block| block.0));
        self.rows.copies.extend(plan.copies.iter().map(|copy| (copy.from.0, copy.to.0)));
        for span in &plan.spans {
            self.gather(plan, span)?;
        }
        let rows = &self.rows;
        let draws: &[DrawSpec] = if self.sampler == Sampler::Here { &rows.draws } else { &[] };
        self.decoder.step(&StepInputs {
            ids: &rows.ids,
            positions: &rows.positions,
            spans: &rows.spans,
            tables: &rows.tables,
            zeroes: &rows.zeroes,
            copies: &rows.copies,
            picks: &rows.picks,
            draws,
        })?;
        let tokens = if self.sampler == Sampler::Here { self.outcome(plan)? } else { Vec::new() };
        Ok(StepOutcome { step: plan.step, tokens, seconds: began.elapsed().as_secs_f64() })
    }

    /// Takes over what another rank drew in the step before: for ranks that do not sample themselves.
    pub fn learn(&mut self, plan: &StepPlan, outcome: &StepOutcome) {
        let mut of_span = outcome.tokens.iter().peekable();
        for (index, span) in plan.spans.iter().enumerate().filter(|(_, span)| span.sample == SpanSample::Draw)
        {
            let Some(slot) = self.slots.get_mut(span.slot.0 as usize).and_then(Option::as_mut) else {
                continue;
            };
            slot.ids.truncate((span.start + span.len) as usize);
            while let Some(token) = of_span.next_if(|token| token.span as usize == index) {
                if let Draw::Token(id) = token.draw {
                    slot.ids.push(id);
                }
            }
        }
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The most a step may hold.
    pub fn capacity(&self) -> StepCapacity {
        self.capacity
    }

    fn slot_mut(&mut self, plan: &StepPlan, slot: SlotId) -> Result<&mut Option<Slot>, StepError> {
        let slots = self.slots.len();
        self.slots
            .get_mut(slot.0 as usize)
            .ok_or_else(|| plan_error(plan, slot, format!("there are {slots} slots")))
    }

    fn fill(&mut self, plan: &StepPlan, fill: &SlotFill) -> Result<(), StepError> {
        let (context, vocabulary) = (self.decoder.context(), self.decoder.vocabulary());
        let place = self.slot_mut(plan, fill.slot)?;
        if place.is_some() {
            return Err(plan_error(plan, fill.slot, "it is filled and was not released".to_owned()));
        }
        if fill.ids.len() > context || fill.prompt_tokens as usize > fill.ids.len() {
            let problem = format!(
                "{} ids of which {} are prompt do not fit a context of {context}",
                fill.ids.len(),
                fill.prompt_tokens
            );
            return Err(plan_error(plan, fill.slot, problem));
        }
        if let Some(id) = fill.ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(plan_error(
                plan,
                fill.slot,
                format!("token {id} is outside the vocabulary of {vocabulary}"),
            ));
        }
        *place = Some(Slot {
            ids: fill.ids.to_vec(),
            prompt_tokens: fill.prompt_tokens,
            sampling: fill.sampling.clone(),
            blocks: Vec::new(),
        });
        Ok(())
    }

    /// Puts one span's rows into the step.
    fn gather(&mut self, plan: &StepPlan, span: &Span) -> Result<(), StepError> {
        let (context, block_tokens, vocabulary) =
            (self.decoder.context(), self.block_tokens, self.decoder.vocabulary());
        let wrong = |problem: String| plan_error(plan, span.slot, problem);
        let Some(slot) = self.slots.get_mut(span.slot.0 as usize).and_then(Option::as_mut) else {
            return Err(wrong("a span of a slot that is not filled".to_owned()));
        };
        slot.blocks.extend_from_slice(&span.new_blocks);
        let (start, last) = (span.start as usize, (span.start + span.len.max(1) - 1) as usize);
        let end = start + span.rows();
        if span.len == 0 || end > context {
            return Err(wrong(format!("positions {start}..{end} in a context of {context}")));
        }
        if end > slot.blocks.len() * block_tokens {
            let problem =
                format!("positions {start}..{end} in {} blocks of {block_tokens}", slot.blocks.len());
            return Err(wrong(problem));
        }
        match span.input {
            SpanInput::Known(id) => {
                slot.ids.truncate(last);
                slot.ids.push(id);
            }
            // The slot keeps what was drawn for it, so the last sampled token is its last id.
            SpanInput::LastSampled if slot.ids.len() == last + 1 => {}
            SpanInput::LastSampled => {
                return Err(wrong(format!(
                    "{} ids, so the last sampled is not at position {last}",
                    slot.ids.len()
                )));
            }
            SpanInput::Ids => {}
        }
        if slot.ids.len() <= last {
            return Err(wrong(format!("positions up to {last}, but {} ids", slot.ids.len())));
        }
        let new = slot.ids[start..=last].iter().chain(&span.drafts);
        if let Some(id) = new.clone().find(|id| **id as usize >= vocabulary) {
            return Err(wrong(format!("token {id} is outside the vocabulary of {vocabulary}")));
        }
        let rows = &mut self.rows;
        let (row0, table0) = (rows.ids.len() as u32, rows.tables.len() as u32);
        rows.ids.extend(new);
        rows.positions.extend(start as u32..end as u32);
        rows.tables.extend(slot.blocks[..end.div_ceil(block_tokens)].iter().map(|block| block.0));
        rows.spans.push(SpanRows { row0, rows: span.rows() as u32, start: span.start, table0 });
        if span.sample == SpanSample::Draw {
            // The last position draws, and each draft's position after it.
            for position in last..end {
                rows.picks.push(row0 + (position - start) as u32);
                rows.draws.push(slot.draw_at(position + 1));
            }
        }
        Ok(())
    }

    /// Reads the draws back: of a span with drafts, as many as were accepted and the one after.
    fn outcome(&mut self, plan: &StepPlan) -> Result<Vec<SampledToken>, StepError> {
        let results = self.decoder.ops().draws();
        let hashes: Vec<Option<[u8; 16]>> = match self.logits_hash {
            LogitsHash::Off => vec![None; results.len()],
            LogitsHash::On => {
                self.decoder.logits(results.len()).iter().map(|row| Some(hash_of(row))).collect()
            }
        };
        let mut next = results.iter().zip(hashes);
        let mut tokens = Vec::with_capacity(results.len());
        for (index, span) in plan.spans.iter().enumerate().filter(|(_, span)| span.sample == SpanSample::Draw)
        {
            let drawn: Vec<_> = next.by_ref().take(span.drafts.len() + 1).collect();
            let last = (span.start + span.len) as usize;
            let Some(slot) = self.slots[span.slot.0 as usize].as_mut() else { continue };
            slot.ids.truncate(last);
            for (position, (result, logits_hash)) in drawn.into_iter().enumerate() {
                let (draw, logprob, rank, top) = match result {
                    DrawResult::Token { id, logprob, rank, top } => {
                        (Draw::Token(*id), *logprob, *rank, top.clone())
                    }
                    DrawResult::NotFinite => (Draw::NotFinite, 0.0, 0, Vec::new()),
                    DrawResult::NoneAllowed => (Draw::NoneAllowed, 0.0, 0, Vec::new()),
                };
                tokens.push(SampledToken { span: index as u32, draw, logprob, rank, top, logits_hash });
                let Draw::Token(id) = draw else { break };
                slot.ids.push(id);
                // A draft is accepted if and only if it is the token that was drawn in its place.
                if span.drafts.get(position) != Some(&id) {
                    break;
                }
            }
        }
        Ok(tokens)
    }
}

impl Slot {
    /// How the token at `position` of the sequence is drawn.
    fn draw_at(&self, position: usize) -> DrawSpec {
        let output = (position as u32).saturating_sub(self.prompt_tokens);
        let sampling = &*self.sampling;
        DrawSpec {
            temperature: sampling.temperature,
            top_k: sampling.top_k.map_or(0, std::num::NonZeroU32::get),
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            position: output,
            masked: if output < sampling.min_tokens { sampling.masked_ids.clone() } else { Arc::default() },
            logprobs: sampling.logprobs,
        }
    }
}

impl Rows {
    fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.spans.clear();
        self.tables.clear();
        self.zeroes.clear();
        self.copies.clear();
        self.picks.clear();
        self.draws.clear();
    }
}

fn plan_error(plan: &StepPlan, slot: SlotId, problem: String) -> StepError {
    StepError::Plan { step: plan.step.0, slot, problem }
}

/// First 16 bytes of BLAKE3 over a row's f32, little-endian.
pub fn hash_of(row: &[f32]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for value in row {
        hasher.update(&value.to_le_bytes());
    }
    let mut first = [0; 16];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    first
}
