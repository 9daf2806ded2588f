//! Requests run through a rank group in a random mix of ways: batched, chunked, on shared prefix blocks, preempted. The
//! smallest engine that can do all of it on demand: nothing here decides well, everything decides by a seed.

use std::sync::Arc;

use anyhow::Result;
use petek_core::ids::{BlockId, SlotId, StepNumber, TokenId};
use petek_core::plan::{Draw, SlotFill, SlotSampling, Span, SpanInput, SpanSample, StepPlan};
use petek_model::group::RankGroup;

use crate::random::Random;

/// A request and how its tokens are drawn.
#[derive(Clone, Debug)]
pub struct MixRequest {
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// Tokens to draw.
    pub tokens: usize,
    /// How.
    pub sampling: Arc<SlotSampling>,
}

/// One drawn token with all that must be equal to the bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrawnBits {
    /// The token.
    pub id: TokenId,
    /// Its logprob's bits.
    pub logprob: u32,
    /// Its rank.
    pub rank: u32,
    /// The largest tokens and their logprobs' bits.
    pub top: Vec<(TokenId, u32)>,
    /// Hash of the whole row of logits.
    pub logits: [u8; 16],
}

/// How a mix treats its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// All requests side by side, or one after the other.
    pub batch: Batch,
    /// Most prompt rows of a span: `usize::MAX` computes a prompt whole.
    pub chunk_max: usize,
    /// Whether full blocks of a common prefix are shared.
    pub prefix: Prefix,
    /// Of 100 steps, how many throw a sequence out, to be computed anew from its ids.
    pub preempt_percent: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
}

/// How many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// One after the other.
    Alone,
    /// All that fit, each step a random part of them.
    Mixed,
}

/// What happens to the blocks of a common prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// Everyone computes their own.
    Cold,
    /// Later requests begin on the blocks of earlier ones.
    Shared,
}

struct Sequence {
    request: usize,
    slot: Option<SlotId>,
    ids: Vec<TokenId>,
    computed: usize,
    blocks: Vec<BlockId>,
    /// Blocks that the runner's table does not know yet.
    unsent: Vec<BlockId>,
    /// Times it was thrown out.
    thrown_out: usize,
}

/// A sequence is thrown out no more often than this, or one computed row by row would never end.
const THROWN_OUT_MAX: usize = 2;

struct Engine<'a> {
    group: &'a mut RankGroup,
    requests: &'a [MixRequest],
    mix: Mix,
    random: Random,
    references: Vec<u32>,
    free_slots: Vec<SlotId>,
    /// Block-aligned prefixes that are computed, with the block that ends each.
    known: Vec<(Vec<TokenId>, BlockId)>,
    step: u64,
    drawn: Vec<Vec<DrawnBits>>,
}

/// Slots that a group for [`run`] needs.
pub const SLOTS: usize = 8;

/// Runs all requests on a group with [`SLOTS`] slots and `blocks` blocks, logits hashed; gives each request's tokens.
///
/// *Errors*: the group's.
pub fn run(
    group: &mut RankGroup,
    blocks: usize,
    requests: &[MixRequest],
    mix: Mix,
) -> Result<Vec<Vec<DrawnBits>>> {
    let mut engine = Engine {
        group,
        requests,
        mix,
        random: Random::new(mix.seed),
        references: vec![0; blocks],
        free_slots: (0..SLOTS as u32).map(SlotId).collect(),
        known: Vec::new(),
        step: 0,
        drawn: vec![Vec::new(); requests.len()],
    };
    let mut order: Vec<usize> = (0..requests.len()).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, engine.random.below(i + 1));
    }
    match mix.batch {
        Batch::Alone => order.iter().try_for_each(|request| engine.serve(&[*request]))?,
        Batch::Mixed => order.chunks(SLOTS).try_for_each(|requests| engine.serve(requests))?,
    }
    Ok(engine.drawn)
}

impl Engine<'_> {
    fn serve(&mut self, requests: &[usize]) -> Result<()> {
        let mut live: Vec<Sequence> = requests
            .iter()
            .map(|&request| Sequence {
                request,
                slot: None,
                ids: self.requests[request].prompt.clone(),
                computed: 0,
                blocks: Vec::new(),
                unsent: Vec::new(),
                thrown_out: 0,
            })
            .collect();
        let mut releases = Vec::new();
        while !live.is_empty() {
            let mut plan = StepPlan {
                step: StepNumber(self.step),
                releases: std::mem::take(&mut releases),
                ..StepPlan::default()
            };
            self.step += 1;
            let mut of_span = Vec::new();
            for (index, sequence) in live.iter_mut().enumerate() {
                let skip = self.mix.batch == Batch::Mixed && self.random.percent(30);
                if skip && !(plan.spans.is_empty() && index + 1 == requests.len()) {
                    continue;
                }
                if sequence.slot.is_none() {
                    plan.fills.push(self.admit(sequence));
                }
                plan.spans.push(self.span(sequence));
                of_span.push(index);
            }
            let outcome = self.group.step(&plan)?;
            for token in &outcome.tokens {
                let sequence = &mut live[of_span[token.span as usize]];
                let Draw::Token(id) = token.draw else { anyhow::bail!("nothing was drawn: {token:?}") };
                sequence.ids.push(id);
                self.drawn[sequence.request].push(DrawnBits {
                    id,
                    logprob: token.logprob.to_bits(),
                    rank: token.rank,
                    top: token.top.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect(),
                    logits: token.logits_hash.unwrap_or_default(),
                });
            }
            if self.mix.prefix == Prefix::Shared {
                of_span.iter().for_each(|index| self.share(&live[*index]));
            }
            let done = |sequence: &Sequence| {
                let request = &self.requests[sequence.request];
                sequence.ids.len() == request.prompt.len() + request.tokens
            };
            let (ended, mut going): (Vec<_>, Vec<_>) = live.into_iter().partition(done);
            for mut sequence in ended {
                releases.extend(self.throw_out(&mut sequence));
            }
            if !going.is_empty() && self.random.percent(self.mix.preempt_percent) {
                let sequence = self.random.below(going.len());
                if going[sequence].thrown_out < THROWN_OUT_MAX {
                    going[sequence].thrown_out += 1;
                    releases.extend(self.throw_out(&mut going[sequence]));
                }
            }
            live = going;
        }
        if !releases.is_empty() {
            let plan = StepPlan { step: StepNumber(self.step), releases, ..StepPlan::default() };
            self.step += 1;
            self.group.step(&plan)?;
        }
        Ok(())
    }

    /// Gives a sequence a slot, and the shared blocks of its prefix.
    fn admit(&mut self, sequence: &mut Sequence) -> SlotFill {
        let slot = self.free_slots.pop().expect("a slot for each sequence of a batch");
        sequence.slot = Some(slot);
        sequence.computed = 0;
        if self.mix.prefix == Prefix::Shared {
            let size = self.mix.block_tokens;
            // A hit on everything still computes the last token.
            while let Some((_, block)) = self.known.iter().find(|(prefix, _)| {
                prefix.len() == sequence.computed + size
                    && prefix.len() < sequence.ids.len()
                    && sequence.ids.starts_with(prefix)
            }) {
                self.references[block.0 as usize] += 1;
                sequence.blocks.push(*block);
                sequence.computed += size;
            }
        }
        sequence.unsent = sequence.blocks.clone();
        let request = &self.requests[sequence.request];
        SlotFill {
            slot,
            ids: sequence.ids.clone().into(),
            prompt_tokens: request.prompt.len() as u32,
            sampling: request.sampling.clone(),
        }
    }

    /// The sequence's next share: as many rows as the mix's chunks allow.
    fn span(&mut self, sequence: &mut Sequence) -> Span {
        let left = sequence.ids.len() - sequence.computed;
        let most = left.min(self.mix.chunk_max);
        let len = if most < left { 1 + self.random.below(most) } else { left };
        let (start, end) = (sequence.computed, sequence.computed + len);
        while sequence.blocks.len() * self.mix.block_tokens < end {
            let held_by_known = |block: u32| self.known.iter().any(|(_, known)| known.0 == block);
            let free = (0..self.references.len() as u32)
                .filter(|block| self.references[*block as usize] == 0)
                .max_by_key(|block| (!held_by_known(*block), (block * 37) % 101));
            let block = BlockId(free.expect("the pool holds all sequences of a batch"));
            self.known.retain(|(_, known)| *known != block);
            self.references[block.0 as usize] = 1;
            sequence.blocks.push(block);
            sequence.unsent.push(block);
        }
        sequence.computed = end;
        // A decode's token is said in any of the three ways: they mean the same.
        let ways = [SpanInput::Ids, SpanInput::Known(sequence.ids[end - 1]), SpanInput::LastSampled];
        let decode = len == 1 && end == sequence.ids.len();
        Span {
            slot: sequence.slot.expect("admitted"),
            start: start as u32,
            len: len as u32,
            input: if decode { *self.random.pick(&ways) } else { SpanInput::Ids },
            drafts: Vec::new(),
            new_blocks: std::mem::take(&mut sequence.unsent),
            sample: if end == sequence.ids.len() { SpanSample::Draw } else { SpanSample::No },
        }
    }

    /// Makes the full blocks of a computed sequence known to later ones.
    fn share(&mut self, sequence: &Sequence) {
        let size = self.mix.block_tokens;
        for full in 1..=sequence.computed / size {
            let prefix = &sequence.ids[..full * size];
            if !self.known.iter().any(|(known, _)| known == prefix) {
                self.known.push((prefix.to_vec(), sequence.blocks[full - 1]));
            }
        }
    }

    /// Takes slot and blocks away.
    fn throw_out(&mut self, sequence: &mut Sequence) -> Option<SlotId> {
        for block in sequence.blocks.drain(..) {
            self.references[block.0 as usize] -= 1;
        }
        sequence.unsent.clear();
        let slot = sequence.slot.take()?;
        self.free_slots.push(slot);
        Some(slot)
    }
}
