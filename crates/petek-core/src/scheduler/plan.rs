//! Making a plan: rows for what runs, and preemption where blocks run out.

use std::time::Duration;

use super::Scheduler;
use super::request::{SequenceKey, SpanRecord, State, StepRecord};
use crate::ids::{BlockId, StepNumber};
use crate::limits::engine::STEPS_IN_FLIGHT_MAX;
use crate::plan::{Span, SpanInput, SpanSample, StepPlan};
use crate::refusal::Refusal;

/// A plan in the making.
pub(super) struct Draft {
    pub(super) plan: StepPlan,
    pub(super) record: StepRecord,
    /// What is left of the step's budget.
    pub(super) rows: u32,
    /// Blocks that this plan copies from and nobody needs afterwards.
    pub(super) copied: Vec<BlockId>,
}

/// Whether a sequence has the block that its next position needs.
enum Room {
    Found,
    /// Blocks will come back when the step in flight is collected.
    Later,
    /// It was the youngest and gave up its own.
    Preempted,
}

impl Scheduler {
    /// The next step, or none where there is nothing to do now: all is idle or waits for the outcome of a step in
    /// flight, or two are. Requests whose deadline has passed end here.
    pub fn plan(&mut self, now: Duration) -> Option<StepPlan> {
        self.end_overdue(now);
        if self.in_flight.len() >= STEPS_IN_FLIGHT_MAX {
            return None;
        }
        let step = StepNumber(self.step.0 + 1);
        let mut draft = Draft {
            plan: StepPlan { step, ..StepPlan::default() },
            record: StepRecord { step, spans: Vec::new(), prefill_rows: 0, decode_rows: 0 },
            rows: self.config.step_rows,
            copied: Vec::new(),
        };
        draft.plan.spans.reserve(self.running.len() + 4);
        draft.record.spans.reserve(self.running.len() + 4);
        self.plan_decodes(&mut draft);
        self.plan_prefills(&mut draft);
        self.start_forks(&mut draft);
        self.admit(&mut draft);
        if draft.plan.spans.is_empty() {
            debug_assert!(draft.plan.fills.is_empty() && draft.plan.copies.is_empty());
            return None;
        }
        self.step = step;
        self.pool.step_submitted(step);
        // Only now: these wait for this step to be collected.
        draft.copied.into_iter().for_each(|block| self.pool.release(block));
        draft.plan.releases = std::mem::take(&mut self.releases);
        self.counters.steps += 1;
        self.counters.rows += u64::from(self.config.step_rows - draft.rows);
        self.in_flight.push_back(draft.record);
        Some(draft.plan)
    }

    fn end_overdue(&mut self, now: Duration) {
        while let Some(&(deadline, key)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            let output =
                self.requests[key].sequences.iter().map(|s| u64::from(self.sequences[*s].output_tokens()));
            let output_tokens = output.sum();
            self.refuse(key, Refusal::DeadlineExceeded { output_tokens });
        }
    }

    /// One row for each sequence with one position left, oldest first.
    fn plan_decodes(&mut self, draft: &mut Draft) {
        let mut at = 0;
        while let Some(&key) = self.running.get(at) {
            if self.decodes(key) {
                match self.make_room(key, draft) {
                    Room::Found => self.push_span(key, draft),
                    Room::Later => {}
                    Room::Preempted => break,
                }
            }
            at += 1;
        }
    }

    /// What is left of the budget for prompts, oldest first.
    fn plan_prefills(&mut self, draft: &mut Draft) {
        for at in 0..self.running.len() {
            let key = self.running[at];
            if draft.rows == 0 {
                break;
            }
            if self.sequences[key].positions_left() > 1 {
                self.push_span(key, draft);
            }
        }
    }

    /// Whether a sequence has exactly one position left to compute, and may have a token after it.
    fn decodes(&self, key: SequenceKey) -> bool {
        let sequence = &self.sequences[key];
        let drawing = sequence.run().map_or(0, |run| run.drawing);
        let max_tokens = self.requests[sequence.request].max_tokens;
        sequence.positions_left() == 1 && sequence.output_tokens() + drawing < max_tokens
    }

    /// Sees to it that the next position of a decoding sequence has a block, at the cost of the youngest.
    fn make_room(&mut self, key: SequenceKey, draft: &mut Draft) -> Room {
        let sequence = &self.sequences[key];
        let next = sequence.run().map_or(0, |run| run.planned) / self.config.block_size;
        if sequence.blocks.len() > next as usize {
            return Room::Found;
        }
        loop {
            if let Some(block) = self.pool.allocate(&mut draft.plan.zeroes) {
                self.sequences[key].blocks.push(block);
                return Room::Found;
            }
            if self.pool.in_limbo() > 0 {
                return Room::Later;
            }
            if let Some(&fork) = self.forks.back() {
                self.preempt(fork);
                continue;
            }
            let youngest = *self.running.last().expect("the one that asks is running");
            self.preempt(youngest);
            if youngest == key {
                return Room::Preempted;
            }
        }
    }

    /// Takes everything from a sequence but its tokens, and has it wait where it stood before.
    pub(super) fn preempt(&mut self, key: SequenceKey) {
        if matches!(self.sequences[key].state, State::Running(_)) {
            self.counters.preemptions += 1;
            self.sequences[key].preemptions += 1;
        }
        self.vacate(key);
        self.sequences[key].hit_blocks = 0;
        self.enqueue(key);
    }

    /// As many of a running sequence's positions as the budget has rows for.
    pub(super) fn push_span(&mut self, key: SequenceKey, draft: &mut Draft) {
        let sequence = &mut self.sequences[key];
        let left = sequence.positions_left();
        let known = sequence.ids.len() as u32;
        let State::Running(run) = &mut sequence.state else { return };
        let (start, len) = (run.planned, left.min(draft.rows));
        let input = if run.drawing > 0 { SpanInput::LastSampled } else { SpanInput::Ids };
        let sample = if len == left { SpanSample::Draw } else { SpanSample::No };
        draft.plan.spans.push(Span {
            slot: run.slot,
            start,
            len,
            input,
            drafts: Vec::new(),
            new_blocks: sequence.blocks[run.blocks_sent..].to_vec(),
            sample,
        });
        run.blocks_sent = sequence.blocks.len();
        run.planned += len;
        run.drawing += u32::from(sample == SpanSample::Draw);
        draft.rows -= len;
        draft.record.spans.push(SpanRecord { sequence: key, run: run.number, end: run.planned, sample });
        let end = run.planned;
        debug_assert!(end <= known + 1 && sequence.blocks.len() as u32 * self.config.block_size >= end);

        let decode = len == 1 && start >= sequence.prompt_tokens;
        draft.record.decode_rows += u32::from(decode);
        draft.record.prefill_rows += if decode { 0 } else { len };
        let request = &mut self.requests[sequence.request];
        let end_in_prompt = end.min(sequence.prompt_tokens);
        self.counters.prompt_tokens_computed +=
            u64::from(end_in_prompt.saturating_sub(start.max(request.prompt_planned)));
        request.prompt_planned = request.prompt_planned.max(end_in_prompt);
    }
}
