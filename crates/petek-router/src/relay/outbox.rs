//! What waits for one client. The worker's stream is always drained into it, so it is bounded twice: deltas of one
//! sequence that wait are merged into one, and past a number of bytes or a time the client counts as slow.

use std::collections::VecDeque;
use std::time::Duration;

use petek_core::refusal::Refusal;
use petek_proto::inference::v1::{Delta, Finished, Started};
use petek_proto::refusal::WireRefusal;
use prost::Message;

/// How much may wait for a client, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Patience {
    /// Bytes of deltas, as they go over the wire.
    pub(crate) bytes: usize,
    /// Without the client taking anything that waits.
    pub(crate) time: Duration,
}

/// What a client gets next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outgoing {
    /// The request was admitted.
    Started(Started),
    /// More of a sequence.
    Delta(Delta),
    /// The last of all.
    Finished(Finished),
    /// The last of all, where it did not go well.
    Failed(WireRefusal),
}

/// Events on their way to one client, and how long the first of them has waited.
#[derive(Debug)]
pub(crate) struct Outbox {
    patience: Patience,
    started: Option<Started>,
    /// At most one per sequence, in the order in which they began to wait, with what was counted for it.
    deltas: VecDeque<(Delta, usize)>,
    /// The sum of what was counted.
    bytes: usize,
    /// Since when something waits of which the client took nothing.
    waits_since: Option<Duration>,
    last: Option<Outgoing>,
}

impl Outbox {
    pub(crate) fn new(patience: Patience) -> Self {
        let deltas = VecDeque::new();
        Outbox { patience, started: None, deltas, bytes: 0, waits_since: None, last: None }
    }

    pub(crate) fn start(&mut self, started: Started, now: Duration) {
        self.started = Some(started);
        self.waits_since.get_or_insert(now);
    }

    /// Puts a delta in, into the one of the same sequence that still waits, if one does.
    pub(crate) fn push(&mut self, delta: Delta, now: Duration) {
        let bytes = delta.encoded_len();
        self.bytes += bytes;
        self.waits_since.get_or_insert(now);
        let same = |(waiting, _): &&mut (Delta, usize)| waiting.index == delta.index;
        let Some((waiting, counted)) = self.deltas.iter_mut().find(same) else {
            return self.deltas.push_back((delta, bytes));
        };
        *counted += bytes;
        waiting.text.push_str(&delta.text);
        waiting.token_ids.extend(delta.token_ids);
        waiting.logprobs.extend(delta.logprobs);
    }

    /// Puts the last event in.
    pub(crate) fn finish(&mut self, finished: Finished) {
        self.last = Some(Outgoing::Finished(finished));
    }

    /// Puts a failure in, after the deltas that wait: they are good, and with them the client may go on.
    pub(crate) fn fail(&mut self, refusal: WireRefusal) {
        self.last = Some(Outgoing::Failed(refusal));
    }

    /// Forgets the deltas that wait.
    pub(crate) fn discard(&mut self) {
        self.deltas.clear();
        self.bytes = 0;
    }

    /// What the client gets next; nothing is not the end.
    pub(crate) fn take(&mut self, now: Duration) -> Option<Outgoing> {
        let next = if let Some(started) = self.started.take() {
            Outgoing::Started(started)
        } else if let Some((delta, counted)) = self.deltas.pop_front() {
            self.bytes -= counted;
            Outgoing::Delta(delta)
        } else {
            self.last.take()?
        };
        self.waits_since = (!self.deltas.is_empty()).then_some(now);
        Some(next)
    }

    /// Why the client counts as slow, if it does.
    pub(crate) fn is_slow(&self, now: Duration) -> Option<Refusal> {
        let waited = now.saturating_sub(self.waits_since?);
        let slow = self.bytes > self.patience.bytes || waited >= self.patience.time;
        slow.then_some(Refusal::SlowConsumer {
            waiting_bytes: self.bytes as u64,
            waited_ms: waited.as_millis() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn outbox() -> Outbox {
        Outbox::new(Patience { bytes: 64, time: 3 * S })
    }

    fn delta(index: u32, first_index: u32, text: &str) -> Delta {
        Delta { index, first_index, text: text.into(), token_ids: vec![first_index], ..Delta::default() }
    }

    #[test]
    fn what_waits_is_merged_by_sequence_and_comes_in_order() {
        let mut outbox = outbox();
        outbox.start(Started::default(), S);
        for (index, first_index, text) in [(1, 0, "a"), (0, 0, "x"), (1, 1, "b"), (1, 2, "c"), (0, 1, "y")] {
            outbox.push(delta(index, first_index, text), S);
        }
        outbox.finish(Finished::default());
        assert_eq!(outbox.take(S), Some(Outgoing::Started(Started::default())));
        let Some(Outgoing::Delta(first)) = outbox.take(S) else { panic!("a delta is due") };
        assert_eq!((first.index, first.first_index, &*first.text), (1, 0, "abc"));
        assert_eq!(first.token_ids, [0, 1, 2]);
        let Some(Outgoing::Delta(second)) = outbox.take(S) else { panic!("a delta is due") };
        assert_eq!((second.index, &*second.text), (0, "xy"));
        assert_eq!(outbox.take(S), Some(Outgoing::Finished(Finished::default())));
        assert_eq!(outbox.take(S), None);
    }

    #[test]
    fn a_client_is_slow_by_time() {
        let mut outbox = outbox();
        outbox.push(delta(0, 0, "x"), S);
        assert_eq!(outbox.is_slow(4 * S - Duration::from_nanos(1)), None);
        let slow = outbox.is_slow(4 * S).expect("three seconds are over");
        assert!(matches!(slow, Refusal::SlowConsumer { waited_ms: 3_000, .. }), "{slow}");
        outbox.take(5 * S);
        assert_eq!(outbox.is_slow(99 * S), None, "nothing waits");
        // Whoever takes something, if late, has its time again.
        outbox.push(delta(0, 1, "x"), 6 * S);
        outbox.push(delta(1, 0, "x"), 6 * S);
        outbox.take(8 * S);
        assert_eq!(outbox.is_slow(10 * S), None);
        assert!(outbox.is_slow(11 * S).is_some());
    }

    #[test]
    fn a_client_is_slow_by_bytes() {
        let mut outbox = outbox();
        outbox.push(delta(0, 0, &"x".repeat(40)), S);
        assert_eq!(outbox.is_slow(S), None);
        outbox.push(delta(0, 1, &"x".repeat(40)), S);
        assert!(matches!(outbox.is_slow(S), Some(Refusal::SlowConsumer { waiting_bytes: 80.., .. })));
        outbox.take(S);
        assert_eq!(outbox.is_slow(S), None);
    }
}
