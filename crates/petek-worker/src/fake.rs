//! A model without numbers. It stores token ids in the blocks of its KV cache, and what it draws is a hash of all that
//! it reads back there through the block table. So nearly every mistake in paging, sharing, preemption or failover
//! gives another text than [`FakeModel::expected`], which knows nothing of blocks: no GPU, no tolerance.
//!
//! Beyond the text it watches what no text would show: a block written while another sequence's step that may touch
//! it is in flight, a copy or zeroing out of turn, positions skipped or computed twice.

use std::collections::VecDeque;

use petek_core::ids::{BlockId, SlotId, StepNumber, TokenId};
use petek_core::limits::engine::STEPS_IN_FLIGHT_MAX;
use petek_core::plan::{Draw, SampledToken, SlotFill, SlotSampling, Span, SpanInput, SpanSample};
use petek_core::plan::{StepOutcome, StepPlan};

use crate::runner::{RunnerFault, StepRunner, Ticket};

/// What the fake draws from which context: the whole of its mathematics.
#[derive(Clone, Copy, Debug)]
pub struct FakeModel {
    /// Token ids are below it.
    pub vocabulary: u32,
    /// Contexts whose logits are not finite.
    pub not_finite: NotFinite,
}

/// Which contexts break the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotFinite {
    /// None.
    Never,
    /// About one of so many, always the same.
    OneIn(u64),
}

impl FakeModel {
    /// What follows a context with these "logits", at this output position.
    fn draw(&self, logits: u64, output: u32, s: &SlotSampling) -> Draw {
        if let NotFinite::OneIn(many) = self.not_finite
            && mix(logits ^ 1).is_multiple_of(many)
        {
            return Draw::NotFinite;
        }
        // Greedy depends on the context alone; a sampled token on the seed and the output position besides.
        let random = if s.temperature == 0.0 { 0 } else { mix(s.seed ^ mix(u64::from(output))) };
        let first = (mix(logits ^ random) % u64::from(self.vocabulary)) as TokenId;
        let masked = |id: &TokenId| output < s.min_tokens && s.masked_ids.binary_search(id).is_ok();
        let mut ids = (0..self.vocabulary).map(|i| (first + i) % self.vocabulary);
        ids.find(|id| !masked(id)).map_or(Draw::NoneAllowed, Draw::Token)
    }

    /// The draws that follow `prompt` and the output `resumed`, as many as `more`, computed without blocks, batches or
    /// steps; a draw without a token is the last.
    pub fn expected(
        &self,
        prompt: &[TokenId],
        resumed: &[TokenId],
        s: &SlotSampling,
        more: usize,
    ) -> Vec<Draw> {
        let mut logits = prompt.iter().chain(resumed).fold(NO_CONTEXT, |logits, id| read(logits, *id));
        let mut draws = Vec::with_capacity(more);
        for output in (resumed.len() as u32..).take(more) {
            let draw = self.draw(logits, output, s);
            draws.push(draw);
            match draw {
                Draw::Token(id) => logits = read(logits, id),
                Draw::NotFinite | Draw::NoneAllowed => break,
            }
        }
        draws
    }
}

/// Runs the fake model over a real block table.
#[derive(Debug)]
pub struct FakeRunner {
    model: FakeModel,
    block_size: usize,
    /// Token ids: `[block][position]`.
    cache: Vec<Cell>,
    slots: Vec<Option<Slot>>,
    in_flight: VecDeque<(StepOutcome, Vec<Touch>)>,
    /// Per block the fillings of slots for which steps in flight may touch it.
    touched_by: Vec<Vec<u64>>,
    fills: u64,
    copies: u64,
    step: StepNumber,
    /// What a step says that it took, and besides for each row.
    step_s: f64,
    row_s: f64,
}

/// What a position of the cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Zero,
    Token(TokenId),
}

#[derive(Debug)]
struct Slot {
    /// Which filling of any slot this is.
    fill: u64,
    ids: Vec<TokenId>,
    prompt_tokens: u32,
    sampling: std::sync::Arc<SlotSampling>,
    blocks: Vec<BlockId>,
    /// Positions computed in this slot so far; the first span says where they begin.
    end: Option<u32>,
    last: TokenId,
}

/// A block that a step may read or write for a filling of a slot.
#[derive(Clone, Copy, Debug)]
struct Touch {
    block: BlockId,
    fill: u64,
}

impl FakeRunner {
    /// A cache of `blocks` blocks and as many slots as said.
    pub fn new(model: FakeModel, blocks: u32, block_size: u32, slots: u32) -> Self {
        FakeRunner {
            model,
            block_size: block_size as usize,
            cache: vec![Cell::Zero; blocks as usize * block_size as usize],
            slots: (0..slots).map(|_| None).collect(),
            in_flight: VecDeque::new(),
            touched_by: vec![Vec::new(); blocks as usize],
            fills: 0,
            copies: 0,
            step: StepNumber(0),
            step_s: 0.0,
            row_s: 0.0,
        }
    }

    /// The same, whose steps say that they took so many seconds, and besides for each row: it computes no slower.
    pub fn saying(self, step_s: f64, row_s: f64) -> Self {
        FakeRunner { step_s, row_s, ..self }
    }

    /// Blocks copied so far.
    pub fn copies(&self) -> u64 {
        self.copies
    }

    fn slot_fault(&self, slot: SlotId, problem: impl Into<String>) -> RunnerFault {
        RunnerFault::Slot { step: self.step, slot, problem: problem.into() }
    }

    fn block_fault(&self, block: BlockId, problem: impl Into<String>) -> RunnerFault {
        RunnerFault::Block { step: self.step, block, problem: problem.into() }
    }

    fn fill(&mut self, fill: &SlotFill) -> Result<(), RunnerFault> {
        match self.slots.get(fill.slot.0 as usize) {
            None => return Err(self.slot_fault(fill.slot, "there is no such slot")),
            Some(Some(_)) => return Err(self.slot_fault(fill.slot, "it is filled and was not released")),
            Some(None) => {}
        }
        let Some(&last) = fill.ids.last() else {
            return Err(self.slot_fault(fill.slot, "filled with nothing"));
        };
        self.fills += 1;
        self.slots[fill.slot.0 as usize] = Some(Slot {
            fill: self.fills,
            ids: fill.ids.to_vec(),
            prompt_tokens: fill.prompt_tokens,
            sampling: fill.sampling.clone(),
            blocks: Vec::new(),
            end: None,
            last,
        });
        Ok(())
    }

    /// The cells of a block that `fill` is about to write: no step in flight may touch it for anyone else.
    fn writable(&mut self, block: BlockId, fill: u64) -> Result<&mut [Cell], RunnerFault> {
        match self.touched_by.get(block.0 as usize) {
            None => Err(self.block_fault(block, "there is no such block")),
            Some(fills) if fills.iter().any(|other| *other != fill) => {
                Err(self
                    .block_fault(block, "written while a step in flight may touch it for another sequence"))
            }
            Some(_) => Ok(&mut self.cache[block.0 as usize * self.block_size..][..self.block_size]),
        }
    }

    /// A plan's copies may be done all at once: nothing that they read is written before or by them.
    fn not_copied(&self, block: BlockId, plan: &StepPlan) -> Result<(), RunnerFault> {
        if plan.copies.iter().any(|copy| copy.from == block) {
            return Err(
                self.block_fault(block, "the plan copies it and writes it, by another copy or zeroing")
            );
        }
        Ok(())
    }

    /// Appends the plan's new blocks to their tables, and notes which blocks the step may touch.
    fn extend_tables(&mut self, plan: &StepPlan) -> Result<Vec<Touch>, RunnerFault> {
        let mut touches = Vec::new();
        for span in &plan.spans {
            let Some(Some(slot)) = self.slots.get_mut(span.slot.0 as usize) else {
                return Err(self.slot_fault(span.slot, "no sequence is in it"));
            };
            slot.blocks.extend(&span.new_blocks);
            for &block in &slot.blocks {
                let Some(fills) = self.touched_by.get_mut(block.0 as usize) else {
                    return Err(self.block_fault(block, "there is no such block"));
                };
                fills.push(slot.fill);
                touches.push(Touch { block, fill: slot.fill });
            }
        }
        Ok(touches)
    }

    /// Writes a span's tokens and draws from all that the slot's blocks hold then.
    fn compute(&mut self, span: &Span) -> Result<Option<(Draw, u64)>, RunnerFault> {
        let slot = self.slots.get_mut(span.slot.0 as usize).and_then(Option::take);
        let Some(mut slot) = slot else { return Err(self.slot_fault(span.slot, "no sequence is in it")) };
        let result = self.compute_in(&mut slot, span);
        self.slots[span.slot.0 as usize] = Some(slot);
        result
    }

    fn compute_in(&mut self, slot: &mut Slot, span: &Span) -> Result<Option<(Draw, u64)>, RunnerFault> {
        let fault = |problem: String| RunnerFault::Slot { step: self.step, slot: span.slot, problem };
        let end = span.start + span.len;
        if span.len == 0 || !span.drafts.is_empty() {
            return Err(fault("a span computes at least one position and, here, no drafts".into()));
        }
        if slot.end.is_some_and(|computed| computed != span.start) {
            return Err(fault(format!(
                "{:?} positions are computed, the span begins at {}",
                slot.end, span.start
            )));
        }
        if end as usize > slot.blocks.len() * self.block_size {
            return Err(fault(format!("{} blocks do not hold position {}", slot.blocks.len(), end - 1)));
        }
        if end as usize > slot.ids.len() {
            return Err(fault(format!("position {} has no token", end - 1)));
        }
        let whole = end as usize == slot.ids.len();
        let fits = match span.input {
            SpanInput::Ids => true,
            SpanInput::Known(id) => whole && id == slot.last,
            SpanInput::LastSampled => whole && end > slot.prompt_tokens,
        };
        if !fits || (span.sample == SpanSample::Draw && !whole) {
            return Err(fault(format!(
                "{:?} and {:?} do not fit position {}",
                span.input,
                span.sample,
                end - 1
            )));
        }
        slot.end = Some(end);
        let (size, fill) = (self.block_size, slot.fill);
        let mut position = span.start as usize;
        while position < end as usize {
            let block_end = (position / size + 1) * size;
            let ids = &slot.ids[position..block_end.min(end as usize)];
            let cells = &mut self.writable(slot.blocks[position / size], fill)?[position % size..];
            cells.iter_mut().zip(ids).for_each(|(cell, id)| *cell = Cell::Token(*id));
            position = block_end;
        }
        if span.sample == SpanSample::No {
            return Ok(None);
        }
        let blocks = slot.blocks.iter().map(|block| &self.cache[block.0 as usize * size..][..size]);
        let cells = blocks.flatten().take(end as usize);
        let logits = cells.fold(NO_CONTEXT, |logits, cell| match cell {
            Cell::Token(id) => read(logits, *id),
            Cell::Zero => read(logits, TokenId::MAX),
        });
        let draw = self.model.draw(logits, end - slot.prompt_tokens, &slot.sampling);
        // A device writes something in any case, and a step that is in flight already goes on from there.
        slot.last = if let Draw::Token(id) = draw { id } else { 0 };
        slot.ids.push(slot.last);
        Ok(Some((draw, logits)))
    }

    fn sampled(&self, span: u32, draw: Draw, logits: u64, wanted: Option<u8>) -> SampledToken {
        let logprob = |i: u64| -((mix(logits ^ i) % 4_096) as f32) / 256.0;
        let top = (0..u64::from(wanted.unwrap_or(0)))
            .map(|i| ((mix(logits) + i) as TokenId % self.model.vocabulary, logprob(i)))
            .collect();
        SampledToken {
            span,
            draw,
            logprob: if wanted.is_some() { logprob(99) } else { 0.0 },
            rank: u32::from(wanted.is_some()),
            top,
            logits_hash: Some(u128::from(logits).to_le_bytes()),
        }
    }
}

impl StepRunner for FakeRunner {
    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, RunnerFault> {
        if self.in_flight.len() >= STEPS_IN_FLIGHT_MAX {
            return Err(RunnerFault::TooManyInFlight { step: plan.step, in_flight: self.in_flight.len() });
        }
        self.step = plan.step;
        for &slot in &plan.releases {
            if self.slots.get_mut(slot.0 as usize).and_then(Option::take).is_none() {
                return Err(self.slot_fault(slot, "it was released and is empty"));
            }
        }
        plan.fills.iter().try_for_each(|fill| self.fill(fill))?;
        for &block in &plan.zeroes {
            self.not_copied(block, plan)?;
            self.writable(block, 0)?.fill(Cell::Zero);
        }
        for copy in &plan.copies {
            let from = copy.from.0 as usize * self.block_size;
            let Some(cells) = self.cache.get(from..from + self.block_size).map(<[Cell]>::to_vec) else {
                return Err(self.block_fault(copy.from, "there is no such block"));
            };
            self.not_copied(copy.to, plan)?;
            self.writable(copy.to, 0)?.copy_from_slice(&cells);
            self.copies += 1;
        }
        let touches = self.extend_tables(plan)?;
        let mut tokens = Vec::new();
        for (at, span) in plan.spans.iter().enumerate() {
            if plan.spans[..at].iter().any(|other| other.slot == span.slot) {
                return Err(self.slot_fault(span.slot, "it stands in two spans"));
            }
            if let Some((draw, logits)) = self.compute(span)? {
                let slot = self.slots[span.slot.0 as usize].as_ref();
                let wanted = slot.and_then(|slot| slot.sampling.logprobs);
                tokens.push(self.sampled(at as u32, draw, logits, wanted));
            }
        }
        let seconds = self.step_s + self.row_s * plan.rows() as f64;
        self.in_flight.push_back((StepOutcome { step: plan.step, tokens, seconds }, touches));
        Ok(Ticket(plan.step))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutcome, RunnerFault> {
        match self.in_flight.front() {
            Some((outcome, _)) if outcome.step == ticket.0 => {}
            other => {
                let expected = other.map(|(outcome, _)| outcome.step);
                return Err(RunnerFault::WrongTicket { got: ticket.0, expected });
            }
        }
        let (outcome, touches) = self.in_flight.pop_front().expect("just seen");
        for touch in touches {
            let fills = &mut self.touched_by[touch.block.0 as usize];
            if let Some(at) = fills.iter().position(|fill| *fill == touch.fill) {
                fills.swap_remove(at);
            }
        }
        Ok(outcome)
    }
}

/// The "logits" before any token.
const NO_CONTEXT: u64 = 0;

/// The "logits" after one token more.
fn read(logits: u64, id: TokenId) -> u64 {
    mix(logits ^ u64::from(id))
}

/// One round of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use petek_core::plan::BlockCopy;

    use super::*;

    const MODEL: FakeModel = FakeModel { vocabulary: 1_000, not_finite: NotFinite::Never };

    fn sampling(temperature: f32, seed: u64) -> SlotSampling {
        SlotSampling {
            temperature,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            seed,
            logprobs: None,
            min_tokens: 0,
            masked_ids: [].into(),
        }
    }

    fn fill(slot: u32, ids: &[TokenId]) -> SlotFill {
        let sampling = Arc::new(sampling(0.0, 0));
        SlotFill { slot: SlotId(slot), ids: ids.into(), prompt_tokens: ids.len() as u32, sampling }
    }

    fn span(slot: u32, start: u32, len: u32, blocks: &[u32]) -> Span {
        Span {
            slot: SlotId(slot),
            start,
            len,
            input: SpanInput::Ids,
            drafts: Vec::new(),
            new_blocks: blocks.iter().copied().map(BlockId).collect(),
            sample: SpanSample::Draw,
        }
    }

    fn plan(step: u64, fills: Vec<SlotFill>, spans: Vec<Span>) -> StepPlan {
        StepPlan { step: StepNumber(step), fills, spans, ..StepPlan::default() }
    }

    fn runner() -> FakeRunner {
        FakeRunner::new(MODEL, 8, 4, 2)
    }

    fn run(runner: &mut FakeRunner, plan: &StepPlan) -> Draw {
        let ticket = runner.submit(plan).unwrap();
        runner.collect(ticket).unwrap().tokens[0].draw
    }

    #[test]
    fn its_text_is_the_oracles_and_depends_on_every_block() {
        let expected = MODEL.expected(&[5, 6, 7, 8, 9], &[], &sampling(0.0, 0), 2);
        let ids = [5, 6, 7, 8, 9];
        let mut right = runner();
        assert_eq!(run(&mut right, &plan(1, vec![fill(0, &ids)], vec![span(0, 0, 5, &[3, 1])])), expected[0]);
        assert_eq!(run(&mut right, &plan(2, vec![], vec![span(0, 5, 1, &[])])), expected[1]);
        // The same sequence again on the blocks that hold its beginning, and on ones that hold another's.
        let again = |runner: &mut FakeRunner, blocks: &[u32]| {
            run(runner, &plan(3, vec![fill(1, &ids)], vec![span(1, 4, 1, blocks)]))
        };
        assert_eq!(again(&mut right, &[3, 2]), expected[0]);
        let mut wrong = runner();
        run(&mut wrong, &plan(1, vec![fill(0, &[5, 6, 7, 1])], vec![span(0, 0, 4, &[3])]));
        assert_ne!(again(&mut wrong, &[3, 2]), expected[0]);
        assert_ne!(again(&mut runner(), &[3, 2]), expected[0]);
    }

    #[test]
    fn greedy_is_of_the_context_alone_and_sampling_of_the_seed_too() {
        let text = |temperature, seed| MODEL.expected(&[1, 2, 3], &[], &sampling(temperature, seed), 20);
        assert_eq!(text(0.0, 1), text(0.0, 2));
        assert_eq!(text(1.0, 1), text(1.0, 1));
        assert_ne!(text(1.0, 1), text(1.0, 2));
        let ids: Vec<TokenId> =
            text(1.0, 1).iter().map(|d| if let Draw::Token(id) = d { *id } else { 0 }).collect();
        assert_eq!(MODEL.expected(&[1, 2, 3], &ids[..9], &sampling(1.0, 1), 11), text(1.0, 1)[9..]);
    }

    #[test]
    fn masks_hold_below_min_tokens() {
        let model = FakeModel { vocabulary: 3, ..MODEL };
        let masking =
            |ids: &[TokenId]| SlotSampling { min_tokens: 8, masked_ids: ids.into(), ..sampling(1.0, 4) };
        let draws = model.expected(&[0], &[], &masking(&[0, 2]), 40);
        assert!(draws[..8].iter().all(|draw| *draw == Draw::Token(1)));
        assert!(draws[8..].contains(&Draw::Token(0)));
        assert_eq!(model.expected(&[0], &[], &masking(&[0, 1, 2]), 40), [Draw::NoneAllowed]);
    }

    #[test]
    fn plans_that_cannot_be_are_faults() {
        let check = |before: &[StepPlan], bad: StepPlan, says: &str| {
            let mut runner = runner();
            for plan in before {
                let _in_flight = runner.submit(plan).unwrap();
            }
            let fault = runner.submit(&bad).expect_err(says);
            assert!(fault.to_string().contains(says), "{fault}");
        };
        let first = || plan(1, vec![fill(0, &[5, 6])], vec![span(0, 0, 2, &[3])]);
        let second = |spans| plan(2, vec![], spans);
        check(&[first(), second(vec![span(0, 2, 1, &[])])], plan(3, vec![], vec![]), "while 2 are in flight");
        check(&[first()], plan(2, vec![fill(0, &[1])], vec![]), "it is filled");
        check(&[first()], plan(2, vec![fill(1, &[])], vec![]), "filled with nothing");
        check(&[first()], plan(2, vec![fill(2, &[1])], vec![]), "no such slot");
        check(&[first()], second(vec![span(1, 0, 1, &[])]), "no sequence is in it");
        check(&[first()], second(vec![span(0, 1, 1, &[])]), "the span begins at 1");
        check(&[first()], second(vec![span(0, 2, 2, &[])]), "position 3 has no token");
        check(&[first()], second(vec![span(0, 2, 1, &[9])]), "no such block");
        check(&[first()], second(vec![span(0, 2, 1, &[]), span(0, 3, 1, &[])]), "two spans");
        check(
            &[],
            plan(1, vec![fill(0, &[5; 5])], vec![span(0, 0, 5, &[3])]),
            "1 blocks do not hold position 4",
        );
        let known = Span { input: SpanInput::Known(7_000), ..span(0, 2, 1, &[]) };
        check(&[first()], second(vec![known]), "do not fit position 2");
        let other = plan(2, vec![fill(1, &[1])], vec![span(1, 0, 1, &[3])]);
        check(&[first()], other, "block 3: written while a step in flight may touch it");
        let (from, to) = (BlockId(3), BlockId(4));
        let copies = vec![BlockCopy { from, to }, BlockCopy { from: to, to: BlockId(5) }];
        check(&[first()], StepPlan { copies, ..second(vec![]) }, "the plan copies it and writes it");
        check(&[], StepPlan { releases: vec![SlotId(0)], ..second(vec![]) }, "released and is empty");
    }

    #[test]
    fn steps_are_collected_in_order() {
        let mut runner = runner();
        let first = runner.submit(&plan(1, vec![fill(0, &[5, 6])], vec![span(0, 0, 2, &[3])])).unwrap();
        let second = runner.submit(&plan(2, vec![], vec![span(0, 2, 1, &[])])).unwrap();
        assert!(matches!(runner.collect(second), Err(RunnerFault::WrongTicket { .. })));
        assert_eq!(runner.collect(first).unwrap().step, StepNumber(1));
    }
}
