//! What became of a step: tokens, ends, and blocks that can be found from now on.

use super::request::{RequestKey, SequenceKey, SpanRecord, State};
use super::{Drawn, Event, OutcomeFault, Scheduler};
use crate::hash::BlockHash;
use crate::ids::BlockId;
use crate::plan::{Draw, SampledToken, SpanSample, StepOutcome};
use crate::refusal::Refusal;

impl Scheduler {
    /// Takes the outcome of the oldest step in flight.
    ///
    /// # Errors
    /// Where it is not what that step was to give: nothing of it has been applied then, and the runner that made it
    /// cannot be trusted with more.
    pub fn apply(&mut self, outcome: StepOutcome) -> Result<(), OutcomeFault> {
        self.check_outcome(&outcome)?;
        let Some(record) = self.in_flight.pop_front() else { return Ok(()) };
        self.pace.record(outcome.seconds, record.prefill_rows, record.decode_rows);
        self.pool.step_collected(record.step);
        let mut tokens = outcome.tokens.into_iter();
        for span in &record.spans {
            let token = if span.sample == SpanSample::Draw { tokens.next() } else { None };
            // It may have ended, or been preempted, since; its slot may even be another's.
            let stays = |s: &super::Sequence| s.run().is_some_and(|run| run.number == span.run);
            if self.sequences.get(span.sequence).is_some_and(stays) {
                self.advance(span);
                if let Some(token) = token {
                    self.draw(span.sequence, token);
                }
            } else {
                self.counters.tokens_dropped += u64::from(token.is_some());
            }
        }
        self.pool.move_events(&mut self.kv_events);
        Ok(())
    }

    fn check_outcome(&self, outcome: &StepOutcome) -> Result<(), OutcomeFault> {
        let record = self.in_flight.front().filter(|record| record.step == outcome.step);
        let Some(record) = record else {
            let expected = self.in_flight.front().map(|record| record.step);
            return Err(OutcomeFault::WrongStep { got: outcome.step, expected });
        };
        let sampling = record.spans.iter().enumerate().filter(|(_, span)| span.sample == SpanSample::Draw);
        let mut expected = sampling.map(|(at, _)| at as u32);
        let mut got = outcome.tokens.iter().map(|token| token.span);
        loop {
            match (expected.next(), got.next()) {
                (None, None) => return Ok(()),
                (span, got) if span == got => {}
                (span, got) => return Err(OutcomeFault::WrongToken { step: outcome.step, span, got }),
            }
        }
    }

    /// Positions of a sequence have been computed.
    fn advance(&mut self, span: &SpanRecord) {
        let sequence = &mut self.sequences[span.sequence];
        let request = &mut self.requests[sequence.request];
        let State::Running(run) = &mut sequence.state else { return };
        run.computed = span.end;
        request.prompt_done = request.prompt_done.max(span.end.min(sequence.prompt_tokens));
        if let Some(hasher) = &mut request.hasher {
            let size = hasher.block_size();
            let full = span.end as usize / size;
            if full > run.published {
                hasher.extend_chain(&mut sequence.hashes, &sequence.ids);
            }
            for at in run.published..full {
                let parent = if at == 0 { BlockHash::ROOT } else { sequence.hashes[at - 1] };
                let tokens = &sequence.ids[at * size..][..size];
                self.pool.publish(sequence.blocks[at], at as u32, parent, sequence.hashes[at], tokens);
            }
            run.published = run.published.max(full);
        }
        if span.end >= sequence.prompt_tokens {
            self.fork_siblings(span.sequence);
        }
    }

    /// A token was drawn for a sequence, or could not be.
    fn draw(&mut self, key: SequenceKey, token: SampledToken) {
        let sequence = &mut self.sequences[key];
        let position = sequence.output_tokens();
        let request_key = sequence.request;
        if let Some(run) = sequence.run_mut() {
            run.drawing -= 1;
        }
        let id = match token.draw {
            Draw::Token(id) => id,
            Draw::NotFinite => {
                self.expel(request_key);
                return self.refuse(request_key, Refusal::NumericalError { position: position.into() });
            }
            Draw::NoneAllowed => {
                return self.refuse(request_key, Refusal::NoTokenAllowed { position: position.into() });
            }
        };
        sequence.ids.push(id);
        let request = &self.requests[request_key];
        self.counters.tokens_drawn += 1;
        self.events.push(Event::Token {
            request: request.number,
            index: sequence.index,
            position,
            token: Drawn {
                id,
                logprob: token.logprob,
                rank: token.rank,
                top: token.top,
                logits_hash: token.logits_hash,
            },
        });
        if let Some(reason) = request.ending(id, position + 1) {
            self.finish(key, reason);
        }
    }

    /// Takes what a request has computed out of the cache: it came of a NaN, or may have. What it found there was
    /// computed for others and stays.
    fn expel(&mut self, key: RequestKey) {
        let request = &self.requests[key];
        // After a preemption a sequence finds what it computed itself.
        let found_first = (request.cached_tokens.unwrap_or(0) / self.config.block_size) as usize;
        let mut own: Vec<BlockId> = Vec::new();
        for sequence in &request.sequences {
            let sequence = &self.sequences[*sequence];
            own.extend(sequence.blocks.iter().skip(sequence.hit_blocks.min(found_first)));
            if let State::Forked(fork) = &sequence.state {
                own.extend(fork.source);
            }
        }
        self.pool.expel(&own);
    }
}
