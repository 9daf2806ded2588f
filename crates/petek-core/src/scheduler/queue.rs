//! Who waits, and whose turn it is: first come within a priority, where waiting raises the priority.

use std::collections::BTreeMap;

use super::request::SequenceKey;
use crate::ids::{RequestNumber, StepNumber};
use crate::limits::engine::{AGEING_STEPS, PRIORITY_MAX};

/// Requests by their number, which is the order in which they came, then sequences by their index.
pub(super) type Turn = (RequestNumber, u32);

#[derive(Debug, Default)]
pub(super) struct Queue {
    levels: [BTreeMap<Turn, Entry>; PRIORITY_MAX as usize + 1],
    uncached_tokens: u64,
    len: usize,
}

#[derive(Debug)]
struct Entry {
    sequence: SequenceKey,
    /// When its request came.
    since: StepNumber,
    uncached_tokens: u64,
}

impl Queue {
    pub(super) fn insert(
        &mut self,
        priority: u8,
        turn: Turn,
        sequence: SequenceKey,
        since: StepNumber,
        uncached_tokens: u64,
    ) {
        let entry = Entry { sequence, since, uncached_tokens };
        let before = self.levels[usize::from(priority)].insert(turn, entry);
        debug_assert!(before.is_none(), "a sequence waits once");
        self.uncached_tokens += uncached_tokens;
        self.len += 1;
    }

    pub(super) fn remove(&mut self, priority: u8, turn: Turn) {
        if let Some(entry) = self.levels[usize::from(priority)].remove(&turn) {
            self.uncached_tokens -= entry.uncached_tokens;
            self.len -= 1;
        }
    }

    /// Whose turn it is at step `now`. A level's first came before its others, so it has aged the most of them.
    pub(super) fn head(&self, now: StepNumber) -> Option<SequenceKey> {
        let firsts = self.levels.iter().enumerate().filter_map(|(level, waiting)| {
            let (turn, entry) = waiting.first_key_value()?;
            let raised_by = (now.0 - entry.since.0) / AGEING_STEPS;
            Some(((level as u64).saturating_sub(raised_by), turn, entry.sequence))
        });
        firsts.min().map(|(_, _, sequence)| sequence)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Known tokens of those that wait, without what the cache held when they came.
    pub(super) fn uncached_tokens(&self) -> u64 {
        self.uncached_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(queue: &mut Queue, priority: u8, number: u64, since: u64) {
        queue.insert(priority, (RequestNumber(number), 0), number as usize, StepNumber(since), 10);
    }

    /// Empties the queue at step `now`.
    fn check(mut queue: Queue, now: u64, expected: &[usize], priority_of: impl Fn(usize) -> u8) {
        let mut order = Vec::new();
        while let Some(head) = queue.head(StepNumber(now)) {
            order.push(head);
            queue.remove(priority_of(head), (RequestNumber(head as u64), 0));
        }
        assert_eq!(order, expected);
        assert_eq!((queue.len(), queue.uncached_tokens()), (0, 0));
    }

    #[test]
    fn first_come_first_served_within_a_priority_and_waiting_raises_it() {
        let priority = |number| [2, 0, 1, 0, 2][number];
        let fill = || {
            let mut queue = Queue::default();
            // In another order than their turns: a preempted sequence comes back to where it stood.
            [3, 1, 4, 0, 2].iter().for_each(|n| wait(&mut queue, priority(*n as usize), *n, 100));
            queue
        };
        check(fill(), 100, &[1, 3, 2, 0, 4], priority);
        // One level up: 2 now counts as much as 1 and 3 and came between them.
        check(fill(), 100 + AGEING_STEPS, &[1, 2, 3, 0, 4], priority);
        check(fill(), 100 + 2 * AGEING_STEPS, &[0, 1, 2, 3, 4], priority);
    }
}
