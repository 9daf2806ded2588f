//! The journal of one request: what its worker has emitted, what its client was told, and its one end.
//!
//! A request is dispatched in *attempts*, counted from 1. Of an older attempt nothing is taken; tokens that are there
//! already are dropped, tokens that leave a gap are a fault. The ids of every sequence are kept, so that an attempt on
//! another worker can begin where this one ended: [`Journal::begin_attempt`] hands them over as resumed ids.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use petek_core::ids::TokenId;
use petek_core::params::{Params, SpecialTokens, StopText};
use petek_core::refusal::{Reason, Refusal};
use petek_core::seed::sequence_seed;
use petek_proto::inference::v1::{
    self as public, Delta, Finished, RouteReason, SequenceFinish, Started, Timings, TokenLogprob, TopLogprob,
    sequence_finish::Matched,
};
use petek_proto::refusal::WireRefusal;
use petek_proto::step::LogprobRow;
use petek_proto::worker::v1::{
    self as worker, Admitted, FinishReason, Finished as WorkerFinished, StepEntry, SubmitSequence,
};
use petek_service::Outcome;
use petek_text::{Ending, Output, OutputOptions, Pushed, SpecialText, StopStrings, TextError, TokenTable};

use super::outbox::{Outbox, Outgoing, Patience};

/// What a journal knows of its request from the beginning.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// petek's own id.
    pub(crate) request_id: String,
    /// The client's, or empty.
    pub(crate) client_request_id: String,
    /// Aliases resolved.
    pub(crate) model: String,
    /// 64 hex digits.
    pub(crate) revision: String,
    pub(crate) prompt_tokens: u32,
    /// What a sequence may have at most, resumed ids included.
    pub(crate) max_tokens: u32,
    pub(crate) params: Params,
    pub(crate) tokens: Arc<TokenTable>,
}

/// Where an attempt went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) worker: String,
    pub(crate) numerics_id: String,
    pub(crate) reason: RouteReason,
    /// Tokens of the prompt that the router believed to be cached there.
    pub(crate) predicted_tokens: u32,
}

/// How far a request is, for whoever drives it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Standing {
    /// On a worker, or on its way there.
    Dispatched,
    /// The worker did not take it; another one might.
    TurnedAway(WireRefusal),
    /// It had its end.
    Over,
}

/// Why a request ends that no worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Its client went away.
    ClientGone,
    /// Its deadline passed.
    Deadline,
    /// A part of the router failed.
    Internal,
}

/// What is to be done after the journal was told something.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Effects {
    /// Sequences that the worker of this attempt should stop.
    pub(crate) cancel: Vec<u32>,
    /// Whether the prompt is computed: the worker's queue is shorter by it.
    pub(crate) prefilled: bool,
    /// Arrival to first token.
    pub(crate) ttft: Option<Duration>,
    /// How many tokens came how long after those before them.
    pub(crate) gaps: Vec<(u32, Duration)>,
    /// Tokens that were sent to nobody.
    pub(crate) dropped_tokens: u32,
    /// Believed and true cached tokens, at admission.
    pub(crate) cached: Option<(u32, u32)>,
    /// What the request came to, at its end; once.
    pub(crate) over: Option<Account>,
    /// What a peer did wrong, for the log.
    pub(crate) fault: Option<String>,
}

/// What a request came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Account {
    pub(crate) outcome: Outcome,
    /// None where it was not admitted.
    pub(crate) prompt_tokens: u32,
    /// New ones: resumed ids were counted by the call that made them.
    pub(crate) output_tokens: u32,
    pub(crate) total: Duration,
}

/// See the head of this file. All times are since the arrival of the request.
#[derive(Debug)]
pub(crate) struct Journal {
    asked: Asked,
    sequences: Vec<Sequence>,
    attempt: u32,
    placement: Option<Placement>,
    standing: Standing,
    /// Of the first admission.
    admitted: Option<Admitted>,
    ttft: Option<Duration>,
    moves: u32,
    outbox: Outbox,
    effects: Effects,
}

/// One continuation.
#[derive(Debug)]
struct Sequence {
    seed: u64,
    output: Output<Option<TokenLogprob>>,
    /// Resumed ‖ new, up to the one that ended it: an id's place is its output position.
    ids: Vec<TokenId>,
    /// How many of `ids` the client has or is about to get.
    released: u32,
    /// How it ended for the client.
    end: Option<End>,
    at_worker: AtWorker,
    usage: worker::Usage,
    first_token: Option<Duration>,
    last_token: Duration,
    numerics_changed: bool,
}

#[derive(Debug)]
struct End {
    reason: public::FinishReason,
    matched: Option<Matched>,
    at: Duration,
}

/// Whether the worker of this attempt still has a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtWorker {
    Open,
    /// It was told to stop, and has still to say that it did.
    Cancelled,
    /// It said the last of it, or never had it.
    Closed,
}

/// When a client may try again that found no worker: about as long as a lost one is away.
pub(crate) const RETRY_MS: NonZeroU64 = NonZeroU64::new(1_000).unwrap();

impl Journal {
    /// Before the first attempt.
    ///
    /// # Errors
    /// Stop strings that are none.
    pub(crate) fn new(asked: Asked, patience: Patience) -> Result<Self, TextError> {
        let params = &asked.params;
        let options = OutputOptions {
            special: match params.special_tokens {
                SpecialTokens::Skipped => SpecialText::Skipped,
                SpecialTokens::Kept => SpecialText::Kept,
            },
            include_stop: params.stop_text == StopText::Included,
            stops: StopStrings::new(&params.stop)?,
            min_tokens: params.min_tokens,
            eos_ids: params.eos_ids.clone(),
            stop_ids: params.stop_ids.clone(),
        };
        let sequence = |index| {
            let mut output = Output::new(asked.tokens.clone(), options.clone());
            output.resume(&params.resumed_ids);
            Sequence {
                seed: sequence_seed(params.seed, index),
                output,
                ids: params.resumed_ids.to_vec(),
                released: params.resumed_ids.len() as u32,
                end: None,
                at_worker: AtWorker::Closed,
                usage: worker::Usage::default(),
                first_token: None,
                last_token: Duration::ZERO,
                numerics_changed: false,
            }
        };
        Ok(Journal {
            sequences: (0..params.n).map(sequence).collect(),
            attempt: 0,
            placement: None,
            standing: Standing::Dispatched,
            admitted: None,
            ttft: None,
            moves: 0,
            outbox: Outbox::new(patience),
            effects: Effects::default(),
            asked,
        })
    }

    /// Begins the next attempt: its number, and what the worker gets of the sequences that have not ended. None where
    /// the request is over.
    pub(crate) fn begin_attempt(&mut self, placement: Placement) -> Option<(u32, Vec<SubmitSequence>)> {
        if self.standing == Standing::Over {
            return None;
        }
        let numerics_changed =
            self.placement.as_ref().is_some_and(|before| before.numerics_id != placement.numerics_id);
        self.attempt += 1;
        self.moves += u32::from(self.admitted.is_some());
        self.placement = Some(placement);
        self.standing = Standing::Dispatched;
        let open = self.sequences.iter_mut().enumerate().filter(|(_, sequence)| sequence.end.is_none());
        let submitted = open.map(|(index, sequence)| {
            sequence.at_worker = AtWorker::Open;
            // Of a sequence without tokens nothing has changed.
            sequence.numerics_changed |= numerics_changed && !sequence.ids.is_empty();
            SubmitSequence { index: index as u32, seed: sequence.seed, resumed_ids: sequence.ids.clone() }
        });
        Some((self.attempt, submitted.collect()))
    }

    /// The worker gave the request its place.
    pub(crate) fn admitted(&mut self, attempt: u32, admitted: Admitted, now: Duration) {
        if self.is_stale(attempt) {
            return;
        }
        if self.admitted.is_some() {
            // Of a later attempt: the first admission counts.
            return;
        }
        let Some(placement) = &self.placement else { return };
        self.effects.cached = Some((placement.predicted_tokens, admitted.cached_tokens));
        let started = Started {
            request_id: self.asked.request_id.clone(),
            client_request_id: self.asked.client_request_id.clone(),
            model: self.asked.model.clone(),
            revision: self.asked.revision.clone(),
            worker: placement.worker.clone(),
            numerics_id: placement.numerics_id.clone(),
            seed: self.asked.params.seed,
            prompt_tokens: self.asked.prompt_tokens,
            cached_tokens: admitted.cached_tokens,
            max_tokens: self.asked.max_tokens,
            route_reason: placement.reason.into(),
        };
        self.outbox.start(started, now);
        self.admitted = Some(admitted);
    }

    /// New tokens of one sequence.
    pub(crate) fn tokens(&mut self, attempt: u32, entry: StepEntry, now: Duration) {
        if self.is_stale(attempt) {
            self.effects.dropped_tokens += entry.ids.len() as u32;
        } else if let Err(fault) = self.take_tokens(entry, now) {
            self.fault(fault, now);
        } else if let Some(slow) = self.outbox.is_slow(now) {
            self.give_up_on_client(&slow, now);
        }
    }

    /// The worker said the last of one sequence.
    pub(crate) fn finished(&mut self, attempt: u32, finished: WorkerFinished, now: Duration) {
        if self.is_stale(attempt) {
            return;
        }
        if let Err(fault) = self.take_finished(finished, now) {
            return self.fault(fault, now);
        }
        self.complete_if_all_ended(now);
    }

    /// The worker did not take the request. Where another one might, its driver is told; else it ends.
    pub(crate) fn refused(&mut self, attempt: u32, refusal: WireRefusal, now: Duration) {
        if self.is_stale(attempt) {
            return;
        }
        self.close_all();
        let elsewhere = matches!(refusal.code, tonic::Code::ResourceExhausted | tonic::Code::Unavailable)
            || refusal.known_reason() == Some(Reason::StaleEpoch);
        if elsewhere && self.admitted.is_none() {
            self.standing = Standing::TurnedAway(refusal);
        } else {
            self.refuse(refusal, now);
        }
    }

    /// The attempt never reached its worker.
    pub(crate) fn not_sent(&mut self, attempt: u32, now: Duration) {
        let model = self.asked.model.clone();
        self.refused(attempt, WireRefusal::from(&Refusal::NoWorker { model, retry_ms: RETRY_MS }), now);
    }

    /// Ends a request that nobody takes.
    pub(crate) fn refuse(&mut self, refusal: WireRefusal, now: Duration) {
        self.end(refusal, Outcome::Refused, now);
    }

    /// The worker of this attempt is gone. What is complete is complete; the rest can be resumed. A request that it had
    /// not begun with goes elsewhere: its client has heard nothing yet.
    pub(crate) fn lost(&mut self, attempt: u32, now: Duration) {
        if self.is_stale(attempt) {
            return;
        }
        if self.admitted.is_none() {
            return self.not_sent(attempt, now);
        }
        self.close_all();
        if self.sequences.iter().all(|sequence| sequence.end.is_some()) {
            return self.complete_if_all_ended(now);
        }
        let output_tokens = self.sequences.iter().map(|sequence| u64::from(sequence.released)).sum();
        self.end(WireRefusal::from(&Refusal::WorkerLost { output_tokens }), Outcome::Failed, now);
    }

    /// Ends the request for a cause outside of any worker.
    pub(crate) fn stop(&mut self, cause: Cause, now: Duration) {
        let (refusal, outcome) = match cause {
            Cause::ClientGone => (Refusal::Cancelled, Outcome::Cancelled),
            Cause::Internal => (Refusal::Internal, Outcome::Failed),
            Cause::Deadline => {
                let output_tokens = self.sequences.iter().map(|sequence| sequence.ids.len() as u64).sum();
                (Refusal::DeadlineExceeded { output_tokens }, Outcome::Failed)
            }
        };
        self.end(WireRefusal::from(&refusal), outcome, now);
    }

    /// Ends the request if its client is slow by now.
    pub(crate) fn judge_client(&mut self, now: Duration) {
        if let Some(slow) = self.outbox.is_slow(now).filter(|_| self.standing != Standing::Over) {
            self.give_up_on_client(&slow, now);
        }
    }

    /// What the client gets next.
    pub(crate) fn take(&mut self, now: Duration) -> Option<Outgoing> {
        self.outbox.take(now)
    }

    /// Whether the client is slow, of a request that is not over.
    pub(crate) fn is_slow(&self, now: Duration) -> bool {
        self.standing != Standing::Over && self.outbox.is_slow(now).is_some()
    }

    /// Whether this attempt is the one that counts.
    pub(crate) fn awaits(&self, attempt: u32) -> bool {
        !self.is_stale(attempt)
    }

    pub(crate) fn standing(&self) -> &Standing {
        &self.standing
    }

    /// What is to be done since the last call.
    pub(crate) fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    fn is_stale(&self, attempt: u32) -> bool {
        self.standing != Standing::Dispatched || attempt != self.attempt
    }

    fn sequence(&mut self, index: u32) -> Result<&mut Sequence, String> {
        let count = self.sequences.len();
        let found = self.sequences.get_mut(index as usize).filter(|s| s.at_worker != AtWorker::Closed);
        found.ok_or_else(|| format!("sequence {index} of {count} was not dispatched, or has ended already"))
    }

    fn take_tokens(&mut self, entry: StepEntry, now: Duration) -> Result<(), String> {
        entry.check().map_err(|refusal| refusal.to_string())?;
        if self.admitted.is_none() {
            return Err("tokens came before the admission".into());
        }
        let StepEntry { dispatch: _, index, first_index, ids, logprobs } = entry;
        let asked_logprobs = self.asked.params.logprobs.is_some();
        let tokens = self.asked.tokens.clone();
        let max_tokens = self.asked.max_tokens as usize;
        let sequence = self.sequence(index)?;
        if sequence.end.is_some() {
            self.effects.dropped_tokens += ids.len() as u32;
            return Ok(());
        }
        let expected = sequence.ids.len();
        if first_index as usize > expected {
            return Err(format!("sequence {index} goes on at {first_index}, {expected} is the next one"));
        }
        let known = (expected - first_index as usize).min(ids.len());
        let fresh = &ids[known..];
        if expected + fresh.len() > max_tokens {
            return Err(format!("sequence {index} got more than its {max_tokens} tokens"));
        }
        let rows: Vec<Option<TokenLogprob>> = match &logprobs {
            Some(logprobs) if asked_logprobs => {
                let rows = logprobs.rows().map_err(|refusal| refusal.to_string())?.skip(known);
                rows.zip(fresh).map(|(row, id)| Some(logprob(&tokens, *id, &row))).collect()
            }
            None if !asked_logprobs => vec![None; fresh.len()],
            _ => {
                return Err(format!(
                    "sequence {index} got logprobs: {}, asked: {asked_logprobs}",
                    !asked_logprobs
                ));
            }
        };
        let Pushed { delta, ending, dropped } = sequence.output.push(fresh.iter().copied().zip(rows));
        let taken = fresh.len() - dropped;
        sequence.ids.extend(&fresh[..taken]);

        let gap = match sequence.first_token {
            _ if taken == 0 => None,
            Some(_) => Some((taken as u32, now.saturating_sub(sequence.last_token))),
            None => (taken > 1).then_some((taken as u32 - 1, Duration::ZERO)),
        };
        if taken > 0 {
            sequence.first_token.get_or_insert(now);
            sequence.last_token = now;
        }
        if let Some(ending) = ending {
            // EOS and stop ids end it at the worker too, by themselves.
            let cancel = matches!(ending, Ending::StopString(_));
            sequence.end = Some(end(ending, now));
            if cancel && sequence.at_worker == AtWorker::Open {
                sequence.at_worker = AtWorker::Cancelled;
                self.effects.cancel.push(index);
            }
        }
        self.effects.dropped_tokens += (known + dropped) as u32;
        self.effects.gaps.extend(gap);
        if taken > 0 && self.ttft.is_none() {
            self.ttft = Some(now);
            self.effects.ttft = Some(now);
            self.effects.prefilled = true;
        }
        self.release(index, delta, now);
        Ok(())
    }

    fn take_finished(&mut self, finished: WorkerFinished, now: Duration) -> Result<(), String> {
        let WorkerFinished { dispatch: _, index, reason, stop_token_id: _, error, usage } = finished;
        let max_tokens = self.asked.max_tokens as usize;
        let sequence = self.sequence(index)?;
        let was = std::mem::replace(&mut sequence.at_worker, AtWorker::Closed);
        sequence.usage = usage.unwrap_or_default();
        let reason = FinishReason::try_from(reason).unwrap_or(FinishReason::Unspecified);
        let failed = |journal: &mut Journal, refusal: WireRefusal| {
            journal.end(refusal, Outcome::Failed, now);
            Ok(())
        };
        if sequence.end.is_some() {
            // The router's own reason wins, whatever the worker came to know in the meantime.
            return Ok(());
        }
        let has = sequence.ids.len();
        match reason {
            FinishReason::Failed => {
                let read = error.as_ref().and_then(WireRefusal::read_rpc);
                return failed(self, read.unwrap_or_else(|| WireRefusal::from(&Refusal::Internal)));
            }
            // A worker frees the sequences of a router that was silent: not our doing, and to be resumed.
            FinishReason::Cancelled if was == AtWorker::Open => {
                let output_tokens = sequence.released.into();
                return failed(self, WireRefusal::from(&Refusal::WorkerLost { output_tokens }));
            }
            FinishReason::Length if has == max_tokens => {}
            FinishReason::Length => {
                return Err(format!("sequence {index} ended by length with {has} of {max_tokens} tokens"));
            }
            other => {
                let other = other.as_str_name();
                return Err(format!(
                    "sequence {index} ended by {other} after {has} tokens that do not say so"
                ));
            }
        }
        let Pushed { delta, ending, .. } = sequence.output.finish();
        let length = End { reason: public::FinishReason::Length, matched: None, at: now };
        sequence.end = Some(ending.map_or(length, |ending| end(ending, now)));
        self.release(index, delta, now);
        Ok(())
    }

    fn release(&mut self, index: u32, delta: Option<petek_text::Delta<Option<TokenLogprob>>>, now: Duration) {
        let Some(petek_text::Delta { text, ids, entries, first_index }) = delta else { return };
        if let Some(sequence) = self.sequences.get_mut(index as usize) {
            sequence.released = first_index + ids.len() as u32;
        }
        let logprobs = entries.into_iter().flatten().collect();
        self.outbox
            .push(Delta { index, text, token_ids: ids, first_index, logprobs, ..Delta::default() }, now);
    }

    fn complete_if_all_ended(&mut self, now: Duration) {
        let all = |s: &Sequence| s.end.is_some() && s.at_worker == AtWorker::Closed;
        if self.standing == Standing::Over || !self.sequences.iter().all(all) {
            return;
        }
        let finished = self.finished_event(now);
        self.outbox.finish(finished);
        self.close(Outcome::Finished, now);
    }

    fn finished_event(&self, now: Duration) -> Finished {
        let admitted = self.admitted.unwrap_or_default();
        let usage = |completion_tokens, of: &worker::Usage| public::Usage {
            prompt_tokens: self.asked.prompt_tokens,
            cached_tokens: admitted.cached_tokens,
            completion_tokens,
            reasoning_tokens: 0,
            drafted_tokens: of.drafted_tokens,
            accepted_tokens: of.accepted_tokens,
        };
        let timings = |prefill_ms, first: Option<Duration>, end: Duration| Timings {
            queue_ms: admitted.queue_ms,
            prefill_ms,
            ttft_ms: first.map(ms),
            total_ms: ms(end),
        };
        let mut total = worker::Usage::default();
        let mut sequences = Vec::with_capacity(self.sequences.len());
        for (index, sequence) in self.sequences.iter().enumerate() {
            let Some(end) = &sequence.end else { continue };
            let used = &sequence.usage;
            total.completion_tokens += sequence.output.token_count();
            total.drafted_tokens += used.drafted_tokens;
            total.accepted_tokens += used.accepted_tokens;
            total.prefill_ms = total.prefill_ms.max(used.prefill_ms);
            sequences.push(SequenceFinish {
                index: index as u32,
                reason: end.reason.into(),
                matched: end.matched.clone(),
                seed: sequence.seed,
                usage: Some(usage(sequence.output.token_count(), used)),
                timings: Some(timings(used.prefill_ms, sequence.first_token, end.at)),
                numerics_changed: sequence.numerics_changed,
            });
        }
        Finished {
            sequences,
            usage: Some(usage(total.completion_tokens, &total)),
            timings: Some(timings(total.prefill_ms, self.ttft, now)),
            moves: self.moves,
        }
    }

    fn give_up_on_client(&mut self, slow: &Refusal, now: Duration) {
        // It has shown that it does not read them.
        self.outbox.discard();
        self.end(WireRefusal::from(slow), Outcome::Failed, now);
    }

    fn fault(&mut self, problem: String, now: Duration) {
        self.effects.fault = Some(problem.clone());
        self.end(WireRefusal::from(&Refusal::Protocol { problem }), Outcome::Failed, now);
    }

    fn end(&mut self, refusal: WireRefusal, outcome: Outcome, now: Duration) {
        if self.standing != Standing::Over {
            self.outbox.fail(refusal);
            self.close(outcome, now);
        }
    }

    /// The one end of the request, whatever it is.
    fn close(&mut self, outcome: Outcome, now: Duration) {
        for (index, sequence) in self.sequences.iter_mut().enumerate() {
            if sequence.at_worker == AtWorker::Open {
                self.effects.cancel.push(index as u32);
            }
            sequence.at_worker = AtWorker::Closed;
        }
        let resumed = self.asked.params.resumed_ids.len();
        let new = self.sequences.iter().map(|sequence| (sequence.ids.len() - resumed) as u32).sum();
        self.effects.over = Some(Account {
            outcome,
            prompt_tokens: self.admitted.map_or(0, |_| self.asked.prompt_tokens),
            output_tokens: new,
            total: now,
        });
        self.standing = Standing::Over;
    }

    fn close_all(&mut self) {
        self.sequences.iter_mut().for_each(|sequence| sequence.at_worker = AtWorker::Closed);
    }
}

fn end(ending: Ending, at: Duration) -> End {
    let (reason, matched) = match ending {
        Ending::StopString(stop) => (public::FinishReason::StopSequence, Matched::StopString(stop)),
        Ending::Eos(id) => (public::FinishReason::StopEos, Matched::StopTokenId(id)),
        Ending::StopToken(id) => (public::FinishReason::StopToken, Matched::StopTokenId(id)),
    };
    End { reason, matched: Some(matched), at }
}

fn logprob(tokens: &TokenTable, id: TokenId, row: &LogprobRow<'_>) -> TokenLogprob {
    let raw = |id| tokens.bytes(id).to_vec().into();
    let top = row.top_ids.iter().zip(row.top_logprobs);
    TokenLogprob {
        token_id: id,
        logprob: Some(row.logprob),
        rank: row.rank,
        raw: raw(id),
        text: tokens.text(id),
        top: top
            .map(|(&id, &logprob)| TopLogprob { token_id: id, logprob, raw: raw(id), text: tokens.text(id) })
            .collect(),
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
