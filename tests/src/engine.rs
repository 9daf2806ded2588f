//! The engine without its worker: a scheduler drives a runner, step by step, and what came of each sequence is kept with all
//! that must be equal to the bit. Each plan is also looked at: how many rows did it spend on whose prompt?

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use petek_core::ids::{RequestNumber, SlotId, TokenId};
use petek_core::params::{ModelLimits, Params, RawParams};
use petek_core::plan::StepPlan;
use petek_core::scheduler::{Drawn, Event, FinishReason, NewRequest, NewSequence, Scheduler, Usage};
use petek_core::seed::sequence_seed;
use petek_worker::runner::{StepRunner, Ticket};

use crate::mixes::DrawnBits;

/// A scheduler and its runner.
pub struct Engine<R> {
    scheduler: Scheduler,
    runner: R,
    /// Steps that are submitted before the first is collected: 1 is the synchronous mode.
    steps_in_flight: usize,
    in_flight: VecDeque<Ticket>,
    /// What holds each slot, as the plans say: (seed, prompt tokens).
    slots: HashMap<SlotId, (u64, usize)>,
    by_seed: HashMap<u64, (RequestNumber, u32)>,
    continuations: BTreeMap<(RequestNumber, u32), Continuation>,
}

/// What came of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Continuation {
    /// Its tokens.
    pub drawn: Vec<DrawnBits>,
    /// Its end.
    pub end: Option<(FinishReason, Usage)>,
    /// Rows that plans spent on positions of its prompt.
    pub prompt_rows: usize,
}

impl Continuation {
    /// The ids of its tokens.
    pub fn ids(&self) -> Vec<TokenId> {
        self.drawn.iter().map(|token| token.id).collect()
    }
}

impl From<&Drawn> for DrawnBits {
    fn from(token: &Drawn) -> Self {
        DrawnBits {
            id: token.id,
            logprob: token.logprob.to_bits(),
            rank: token.rank,
            top: token.top.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect(),
            logits: token.logits_hash.unwrap_or_default(),
        }
    }
}

/// A request as a worker makes it of checked parameters: n sequences, each with its own seed.
///
/// *Errors*: a refusal of the parameters or the prompt.
pub fn new_request(prompt: &[TokenId], raw: &RawParams, model: &ModelLimits) -> Result<NewRequest> {
    let params: Params = raw.check(model, 0).context("check the parameters")?;
    let max_tokens = params.max_tokens_after(prompt, model).context("check the prompt")?;
    let sequences = (0..params.n).map(|index| NewSequence {
        index,
        seed: sequence_seed(params.seed, index),
        resumed_ids: params.resumed_ids.clone(),
    });
    let (sequences, prompt) = (sequences.collect(), prompt.into());
    Ok(NewRequest { prompt, params, max_tokens, sequences, tenant: Vec::new(), deadline: None })
}

impl<R: StepRunner> Engine<R> {
    /// Neither has been used before.
    pub fn new(scheduler: Scheduler, runner: R, steps_in_flight: usize) -> Self {
        Engine {
            scheduler,
            runner,
            steps_in_flight,
            in_flight: VecDeque::new(),
            slots: HashMap::new(),
            by_seed: HashMap::new(),
            continuations: BTreeMap::new(),
        }
    }

    /// The scheduler, to look at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Takes a request. No two sequences that run at a time may have one seed: plans are told apart by it.
    pub fn submit(&mut self, new: NewRequest) -> RequestNumber {
        let seeds: Vec<(u64, u32)> = new.sequences.iter().map(|s| (s.seed, s.index)).collect();
        let number = self.scheduler.submit(new, Duration::ZERO);
        for (seed, index) in seeds {
            self.by_seed.insert(seed, (number, index));
            self.continuations.insert((number, index), Continuation::default());
        }
        number
    }

    /// Submits what there is to compute and collects the oldest step; false where nothing is left to do.
    ///
    /// *Errors*: a plan that breaks a rule, a runner that fails, a request that is refused, a stall.
    pub fn step(&mut self) -> Result<bool> {
        while self.in_flight.len() < self.steps_in_flight
            && let Some(plan) = self.scheduler.plan(Duration::ZERO)
        {
            self.look_at(&plan)?;
            self.in_flight.push_back(self.runner.submit(&plan)?);
        }
        let Some(ticket) = self.in_flight.pop_front() else {
            ensure!(self.scheduler.is_idle(), "nothing is planned and somebody waits");
            return Ok(false);
        };
        self.scheduler.apply(self.runner.collect(ticket)?)?;
        for event in self.scheduler.drain_events() {
            match event {
                Event::Admitted { .. } => {}
                Event::Token { request, index, position, token } => {
                    let of = self.continuations.get_mut(&(request, index)).context("a request that came")?;
                    ensure!(of.end.is_none(), "request {request}: a token after the end");
                    ensure!(position as usize == of.drawn.len(), "request {request}: token {position} twice");
                    of.drawn.push(DrawnBits::from(&token));
                }
                Event::Finished { request, index, reason, usage } => {
                    let of = self.continuations.get_mut(&(request, index)).context("a request that came")?;
                    ensure!(of.end.replace((reason, usage)).is_none(), "request {request} ended twice");
                }
                Event::Refused { request, refusal, .. } => bail!("request {request}: {refusal}"),
            }
        }
        self.scheduler.drain_kv_events();
        Ok(true)
    }

    /// Steps until nothing is left to do; then every block is free and every sequence has ended.
    ///
    /// *Errors*: as [`Engine::step`], or a block that is not free.
    pub fn run(&mut self) -> Result<()> {
        while self.step()? {}
        let (free, all) = (self.scheduler.load().blocks_free, self.scheduler.pool().blocks());
        ensure!(free == all, "{free} of {all} blocks are free at the end");
        let open = self.continuations.iter().find(|(_, continuation)| continuation.end.is_none());
        ensure!(open.is_none(), "never ended: {open:?}");
        Ok(())
    }

    /// Takes what came of a request, by the number of each sequence.
    pub fn take(&mut self, request: RequestNumber) -> Vec<Continuation> {
        self.continuations
            .extract_if((request, 0)..=(request, u32::MAX), |_, _| true)
            .map(|(_, c)| c)
            .collect()
    }

    fn look_at(&mut self, plan: &StepPlan) -> Result<()> {
        for fill in &plan.fills {
            self.slots.insert(fill.slot, (fill.sampling.seed, fill.prompt_tokens as usize));
        }
        for span in &plan.spans {
            let (seed, prompt) = self.slots.get(&span.slot).context("a span of a slot that is filled")?;
            let of = self.by_seed.get(seed).and_then(|key| self.continuations.get_mut(key));
            let (start, end) = (span.start as usize, (span.start + span.len) as usize);
            of.context("a sequence that came")?.prompt_rows += end.min(*prompt).saturating_sub(start);
        }
        Ok(())
    }
}
