//! What goes into the scheduler and what comes out of it.

use std::sync::Arc;
use std::time::Duration;

use crate::ids::{RequestNumber, TokenId};
use crate::params::Params;
use crate::refusal::Refusal;

/// A request whose parameters were checked.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// At least one token.
    pub prompt: Arc<[TokenId]>,
    /// Sampling, stops, cache. The seed, n and resumed ids in it are not read: `sequences` says them.
    pub params: Params,
    /// The most output tokens per sequence, resumed ones included: [`Params::max_tokens_after`].
    pub max_tokens: u32,
    /// Its continuations, at least one.
    pub sequences: Vec<NewSequence>,
    /// Part of every block hash; empty is none.
    pub tenant: Vec<u8>,
    /// On the clock that is passed to [`super::Scheduler::submit`] and [`super::Scheduler::plan`].
    pub deadline: Option<Duration>,
}

/// One continuation of a request's prompt.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Its number within the request.
    pub index: u32,
    /// Its own seed.
    pub seed: u64,
    /// Output that is known already: computed as prefill, never reported again.
    pub resumed_ids: Arc<[TokenId]>,
}

/// Something that a client must hear of.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request runs. Once per request, before anything else but a refusal or a cancel.
    Admitted {
        /// Which.
        request: RequestNumber,
        /// Tokens of its prompt that need not be computed.
        cached_tokens: u32,
    },
    /// A sequence got a token.
    Token {
        /// Which request.
        request: RequestNumber,
        /// Which of its sequences.
        index: u32,
        /// The token's output position: resumed tokens come before it.
        position: u32,
        /// The token.
        token: Drawn,
    },
    /// A sequence has ended.
    Finished {
        /// Which request.
        request: RequestNumber,
        /// Which of its sequences.
        index: u32,
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// The request, with all its sequences that had not finished, has ended.
    Refused {
        /// Which.
        request: RequestNumber,
        /// Why.
        refusal: Refusal,
        /// Its sequences that had not finished, with what they took; none where it was refused as it came.
        unfinished: Vec<(u32, Usage)>,
    },
}

/// A token as it was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: TokenId,
    /// Its logprob, where the request asked for them.
    pub logprob: f32,
    /// Its rank among the logits, where the request asked for logprobs.
    pub rank: u32,
    /// The largest logits' tokens with their logprobs.
    pub top: Vec<(TokenId, f32)>,
    /// Test hook: see [`crate::plan::SampledToken::logits_hash`].
    pub logits_hash: Option<[u8; 16]>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's end of sequence.
    StopEos,
    /// One of the request's stop ids.
    StopToken(TokenId),
    /// As many tokens as it may have.
    Length,
    /// It was cancelled.
    Cancelled,
}

/// What a sequence took. Prompt and cached tokens are the request's: with n sequences they are counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt; where it ended early, those that were computed or cached until then.
    pub prompt_tokens: u32,
    /// Those of them that need not be computed, at the first admission.
    pub cached_tokens: u32,
    /// Output, resumed tokens included.
    pub output_tokens: u32,
    /// How often its blocks went to an older sequence.
    pub preemptions: u32,
}

/// What a router wants to know of a worker before it sends more.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Known tokens that must be computed before a new request's: of those waiting and of prefills that have begun.
    pub uncached_tokens_waiting: u64,
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that hold blocks.
    pub running: usize,
    /// Blocks that nobody holds.
    pub blocks_free: usize,
    /// Recent time of a step, in seconds, once one was measured.
    pub step_s: Option<f64>,
    /// What a step would take with one more sequence that decodes, in seconds; never less than `step_s`.
    pub step_one_more_s: Option<f64>,
    /// Recent rate of prefill, once one was measured.
    pub prefill_tokens_per_s: Option<f64>,
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps planned.
    pub steps: u64,
    /// Rows planned.
    pub rows: u64,
    /// Positions of prompts planned for the first time: not after a preemption, not again for a further sequence.
    pub prompt_tokens_computed: u64,
    /// Tokens of prompts that a first admission found in the cache.
    pub prompt_tokens_cached: u64,
    /// Tokens reported.
    pub tokens_drawn: u64,
    /// Tokens of an outcome that nobody wanted any more.
    pub tokens_dropped: u64,
    /// Sequences that lost their blocks to an older one.
    pub preemptions: u64,
}
