//! The first steps of an engine are nobody's: they bring the weights into memory and measure the rates that routers
//! choose by, so that the first load report is true.
//!
//! They run through the engine's own scheduler, past the cache, and leave the pool as it was; the totals begin after.

use std::sync::Arc;
use std::time::Duration;

use petek_core::ids::TokenId;
use petek_core::params::{ModelLimits, RawParams};
use petek_core::refusal::Refusal;
use petek_core::scheduler::{Event, NewRequest, NewSequence, Scheduler};

use super::EngineFault;
use crate::runner::StepRunner;

/// Tokens that each sequence of a warm-up draws.
const DRAWN: u32 = 4;
/// Sequences that decode at once: the slope of a step's time over them is what one more costs.
const DECODING: [u32; 3] = [1, 2, 4];

/// Runs a few prefills and decodes.
pub(super) fn warm_up(
    scheduler: &mut Scheduler,
    runner: &mut dyn StepRunner,
    limits: &ModelLimits,
) -> Result<(), EngineFault> {
    let drawn = DRAWN.min(limits.context_tokens.saturating_sub(1)).max(1);
    let config = scheduler.config();
    let room = (config.blocks as usize * config.block_size as usize).min(limits.context_tokens as usize);
    let prompt = room.saturating_sub(drawn as usize).clamp(1, config.step_rows as usize);
    // On cold memory, and measured by nobody.
    run(scheduler, runner, limits, prompt, 1, drawn)?;
    scheduler.forget_pace();
    for _ in 0..2 {
        run(scheduler, runner, limits, prompt, 1, 1)?;
    }
    for sequences in DECODING {
        run(scheduler, runner, limits, 1, sequences, drawn)?;
    }
    debug_assert!(scheduler.is_idle() && scheduler.pool().available() == scheduler.pool().blocks());
    scheduler.forget_totals();
    Ok(())
}

/// Runs one request of so many sequences, each to `drawn` tokens.
fn run(
    scheduler: &mut Scheduler,
    runner: &mut dyn StepRunner,
    limits: &ModelLimits,
    prompt_tokens: usize,
    sequences: u32,
    drawn: u32,
) -> Result<(), EngineFault> {
    let raw = RawParams {
        temperature: Some(0.0),
        top_p: Some(1.0),
        top_k: Some(0),
        min_p: Some(0.0),
        ignore_eos: Some(true),
        bypass_prefix_cache: Some(true),
        ..RawParams::default()
    };
    let sequence = |index| NewSequence { index, seed: 0, resumed_ids: Arc::default() };
    let new = NewRequest {
        prompt: (0..prompt_tokens).map(|i| (7 * i % limits.vocabulary as usize) as TokenId).collect(),
        params: raw.check(limits, 0).expect("plain parameters are in range"),
        max_tokens: drawn,
        sequences: (0..sequences).map(sequence).collect(),
        tenant: Vec::new(),
        deadline: None,
    };
    scheduler.submit(new, Duration::ZERO);
    while let Some(plan) = scheduler.plan(Duration::ZERO) {
        let ticket = runner.submit(&plan)?;
        scheduler.apply(runner.collect(ticket)?)?;
    }
    for event in scheduler.drain_events() {
        if let Event::Refused { refusal: refusal @ Refusal::NumericalError { .. }, .. } = event {
            tracing::warn!(%refusal, "warm-up: the model's numbers break on plain prompts");
        }
    }
    Ok(())
}
