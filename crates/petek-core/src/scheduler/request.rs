//! What the scheduler knows of a request and of each of its sequences.

use std::sync::Arc;
use std::time::Duration;

use super::{FinishReason, NewSequence, Usage};
use crate::hash::{BlockHash, BlockHasher};
use crate::ids::{BlockId, RequestNumber, SlotId, StepNumber, TokenId};
use crate::plan::{SlotSampling, SpanSample};

/// Where a request stands in the scheduler's slab.
pub(super) type RequestKey = usize;

/// Where a sequence stands in the scheduler's slab.
pub(super) type SequenceKey = usize;

#[derive(Debug)]
pub(super) struct Request {
    pub(super) number: RequestNumber,
    pub(super) prompt: Arc<[TokenId]>,
    /// Of the prompt's full blocks; empty where the request bypasses the cache.
    pub(super) prompt_hashes: Vec<BlockHash>,
    /// None: the request bypasses the cache.
    pub(super) hasher: Option<BlockHasher>,
    pub(super) eos_ids: Arc<[TokenId]>,
    pub(super) stop_ids: Arc<[TokenId]>,
    pub(super) max_tokens: u32,
    pub(super) priority: u8,
    pub(super) deadline: Option<Duration>,
    /// The step at which it came: it ages from there, preempted or not.
    pub(super) since: StepNumber,
    /// What the first admission found; none before it.
    pub(super) cached_tokens: Option<u32>,
    /// Positions of the prompt that some plan has covered or found in the cache.
    pub(super) prompt_planned: u32,
    /// Positions of the prompt that were computed, or found in the cache.
    pub(super) prompt_done: u32,
    /// Whether the siblings have got their part of the computed prompt: none sleeps any more.
    pub(super) prompt_shared: bool,
    /// Those that have not ended.
    pub(super) sequences: Vec<SequenceKey>,
}

impl Request {
    /// How a sequence of this request ends at its last token, if it does.
    pub(super) fn ending(&self, last: TokenId, output_tokens: u32) -> Option<FinishReason> {
        if self.eos_ids.binary_search(&last).is_ok() {
            Some(FinishReason::StopEos)
        } else if self.stop_ids.binary_search(&last).is_ok() {
            Some(FinishReason::StopToken(last))
        } else {
            (output_tokens >= self.max_tokens).then_some(FinishReason::Length)
        }
    }
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) request: RequestKey,
    pub(super) index: u32,
    /// Output that it came with.
    pub(super) resumed_ids: Arc<[TokenId]>,
    /// Prompt, then output; empty until it begins, for a sleeping sibling should not cost a prompt.
    pub(super) ids: Vec<TokenId>,
    pub(super) prompt_tokens: u32,
    pub(super) sampling: Arc<SlotSampling>,
    /// Of the full blocks of `ids`, as far as anyone asked.
    pub(super) hashes: Vec<BlockHash>,
    pub(super) state: State,
    /// Held, in the order of positions; with a fork the shared ones.
    pub(super) blocks: Vec<BlockId>,
    /// How many of `blocks`, from the first, the last admission found in the cache.
    pub(super) hit_blocks: usize,
    /// How often it lost its blocks to an older sequence.
    pub(super) preemptions: u32,
}

#[derive(Debug)]
pub(super) enum State {
    /// Waits for a sibling to compute the prompt.
    Dormant,
    /// In the queue; holds nothing.
    Waiting,
    /// Holds its part of a sibling's prompt and waits for a slot.
    Forked(Fork),
    /// In a slot.
    Running(Run),
}

/// What a sibling of a computed prompt begins with.
#[derive(Debug)]
pub(super) struct Fork {
    /// First position that it computes itself.
    pub(super) start: u32,
    /// The block of which it needs a copy, held, where `start` lies within one.
    pub(super) source: Option<BlockId>,
}

/// A sequence's stay in a slot.
#[derive(Debug)]
pub(super) struct Run {
    /// Never used twice.
    pub(super) number: u64,
    pub(super) slot: SlotId,
    /// Positions covered by plans, or found in the cache.
    pub(super) planned: u32,
    /// Positions computed by steps that were collected, or found in the cache.
    pub(super) computed: u32,
    /// Tokens that steps in flight draw.
    pub(super) drawing: u32,
    /// Blocks that the runner's table of this slot has.
    pub(super) blocks_sent: usize,
    /// Blocks offered to the cache, or found there.
    pub(super) published: usize,
}

/// What was planned, until its outcome comes.
#[derive(Debug)]
pub(super) struct StepRecord {
    pub(super) step: StepNumber,
    pub(super) spans: Vec<SpanRecord>,
    pub(super) prefill_rows: u32,
    pub(super) decode_rows: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SpanRecord {
    pub(super) sequence: SequenceKey,
    pub(super) run: u64,
    /// One behind its last position.
    pub(super) end: u32,
    pub(super) sample: SpanSample,
}

impl Sequence {
    /// A dormant sequence.
    pub(super) fn new(
        request: RequestKey,
        prompt: &[TokenId],
        new: &NewSequence,
        sampling: Arc<SlotSampling>,
    ) -> Self {
        Sequence {
            request,
            index: new.index,
            resumed_ids: new.resumed_ids.clone(),
            ids: Vec::new(),
            prompt_tokens: prompt.len() as u32,
            sampling,
            hashes: Vec::new(),
            state: State::Dormant,
            blocks: Vec::new(),
            hit_blocks: 0,
            preemptions: 0,
        }
    }

    /// Gives a dormant sequence its tokens.
    pub(super) fn begin(&mut self, prompt: &[TokenId], prompt_hashes: &[BlockHash]) {
        debug_assert!(self.ids.is_empty());
        self.ids = [prompt, &self.resumed_ids].concat();
        self.hashes = prompt_hashes.to_vec();
    }

    pub(super) fn output_tokens(&self) -> u32 {
        if self.ids.is_empty() {
            self.resumed_ids.len() as u32
        } else {
            self.ids.len() as u32 - self.prompt_tokens
        }
    }

    /// What it took until now.
    pub(super) fn usage(&self, request: &Request) -> Usage {
        Usage {
            prompt_tokens: request.prompt_done,
            cached_tokens: request.cached_tokens.unwrap_or(0),
            output_tokens: self.output_tokens(),
            preemptions: self.preemptions,
        }
    }

    /// How it ends at the token that it has, if it does.
    pub(super) fn ending(&self, request: &Request) -> Option<FinishReason> {
        let last = if self.ids.is_empty() { self.resumed_ids.last() } else { self.ids.last() };
        match self.output_tokens() {
            0 => None,
            output => request.ending(*last?, output),
        }
    }

    pub(super) fn run(&self) -> Option<&Run> {
        match &self.state {
            State::Running(run) => Some(run),
            _ => None,
        }
    }

    pub(super) fn run_mut(&mut self) -> Option<&mut Run> {
        match &mut self.state {
            State::Running(run) => Some(run),
            _ => None,
        }
    }

    /// Known positions, or ones about to be, that no plan has covered.
    pub(super) fn positions_left(&self) -> u32 {
        self.run().map_or(0, |run| self.ids.len() as u32 + run.drawing - run.planned)
    }
}
