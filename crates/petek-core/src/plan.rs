//! What one step of the engine is: the plan that the scheduler makes and the outcome that a runner gives back.
//!
//! Decode, chunked prefill and speculation are all *spans*. A runner does, in this order: `releases`, `fills`,
//! `zeroes`, `copies`, then all spans in one pass through the model.
//!
//! ```text
//!  plan     releases [slot]  fills [slot: ids, sampling]  zeroes [block]  copies [from -> to]  spans [slot, positions, blocks, drafts]
//!  outcome  one `SampledToken` per accepted position of each sampling span, in the order of the spans
//! ```

use std::sync::Arc;

use crate::ids::{BlockId, SlotId, StepNumber, TokenId};

/// One step's work, in the order in which the runner does it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Which step this is.
    pub step: StepNumber,
    /// Slots whose sequence has gone; their numbers may be filled again in this same plan.
    pub releases: Vec<SlotId>,
    /// Slots that get a sequence.
    pub fills: Vec<SlotFill>,
    /// Blocks whose bytes are set to zero before anything is copied or computed: they held what came of a NaN.
    pub zeroes: Vec<BlockId>,
    /// Blocks copied whole before any span is computed (a prompt's last, partial block shared by n sequences). None
    /// reads what another of the same plan writes, or what the plan zeroes, so they can be done all at once.
    pub copies: Vec<BlockCopy>,
    /// Each sequence's share of the pass; a slot stands in at most one span.
    pub spans: Vec<Span>,
}

impl StepPlan {
    /// Rows of the step: what every matmul of it counts as M.
    pub fn rows(&self) -> usize {
        self.spans.iter().map(Span::rows).sum()
    }
}

/// Gives a slot its sequence. The block table begins empty.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotFill {
    /// The slot.
    pub slot: SlotId,
    /// Prompt, then the output tokens that are known already (resumed, or computed before a preemption).
    pub ids: Arc<[TokenId]>,
    /// How many of `ids` are prompt: the token at position p has the output position p - prompt_tokens.
    pub prompt_tokens: u32,
    /// How the sequence's tokens are drawn.
    pub sampling: Arc<SlotSampling>,
}

/// How a sequence's tokens are drawn: what the sampler on the device needs to know, checked before.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotSampling {
    /// 0 is greedy; the request's checks turn anything below 1e-5 into 0.
    pub temperature: f32,
    /// At most this many tokens are kept; none is off.
    pub top_k: Option<std::num::NonZeroU32>,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// seed_i: this sequence's own seed (`WIRE.md` 9).
    pub seed: u64,
    /// None: no logprobs. Some(n): the chosen token's and those of the n largest logits.
    pub logprobs: Option<u8>,
    /// `masked_ids` cannot be drawn at output positions below this.
    pub min_tokens: u32,
    /// EOS and stop ids, ascending: what `min_tokens` masks.
    pub masked_ids: Arc<[TokenId]>,
}

/// One whole block's bytes copied to another, all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Read.
    pub from: BlockId,
    /// Written.
    pub to: BlockId,
}

/// One sequence's share of a step: positions `start .. start + len` are computed and written to its blocks, then
/// the drafts' positions after them.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Whose.
    pub slot: SlotId,
    /// First position computed; all before it are in the cache already.
    pub start: u32,
    /// How many positions, at least one. Their tokens are the slot's own ids, but for the last where `input` says so.
    pub len: u32,
    /// Where the last position's token comes from.
    pub input: SpanInput,
    /// Guessed tokens at the positions after the last; each is verified.
    pub drafts: Vec<TokenId>,
    /// Blocks appended to the slot's block table before the span is computed.
    pub new_blocks: Vec<BlockId>,
    /// Whether a token is drawn from the last position (and from each accepted draft's).
    pub sample: SpanSample,
}

impl Span {
    /// Rows of this span.
    pub fn rows(&self) -> usize {
        self.len as usize + self.drafts.len()
    }
}

/// Where the token of a span's last position comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanInput {
    /// From the slot's ids: prompt, resumed or tokens that the runner itself sampled and kept.
    Ids,
    /// The engine says it.
    Known(TokenId),
    /// Whatever the step before sampled for this slot; the engine may not know it yet.
    LastSampled,
}

/// Whether a span draws a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanSample {
    /// A prompt's chunk that is not the last.
    No,
    /// Draw the next token.
    Draw,
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Which step.
    pub step: StepNumber,
    /// In the order of the plan's spans; a span without drafts that samples gives exactly one.
    pub tokens: Vec<SampledToken>,
    /// What the step took, in seconds, as the runner measured it.
    pub seconds: f64,
}

/// One drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Index into the plan's spans.
    pub span: u32,
    /// What was drawn, or why nothing was.
    pub draw: Draw,
    /// Logprob of the drawn token, of the raw logits (0 where the slot asked for none).
    pub logprob: f32,
    /// 1 + larger logits + equal ones of a lower id (0 where the slot asked for no logprobs).
    pub rank: u32,
    /// The largest logits' tokens with their logprobs, largest first, as many as the slot asked for.
    pub top: Vec<(TokenId, f32)>,
    /// Test hook: a hash of the row's logits, bit by bit, where the runner was asked for it.
    pub logits_hash: Option<[u8; 16]>,
}

/// What a draw gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// A token.
    Token(TokenId),
    /// The logits held a NaN or an infinity: the request ends with NUMERICAL_ERROR.
    NotFinite,
    /// Masks left nothing to draw: the request ends with NO_TOKEN_ALLOWED.
    NoneAllowed,
}
