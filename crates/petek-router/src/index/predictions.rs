//! What workers will hold soon: the blocks of prompts that were sent to them, until their events say so, or time does.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use super::WorkerKey;
use super::blocks::NodeId;

/// One prompt's prediction on one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PredictionId(u64);

/// See the head of this file.
pub(super) struct Predictions {
    last: u64,
    open: HashMap<PredictionId, Prediction>,
    by_node: HashMap<NodeId, Vec<(PredictionId, WorkerKey)>>,
    due: BTreeSet<(Duration, PredictionId)>,
    /// The sum of the lists of `by_node`.
    entries: usize,
}

struct Prediction {
    /// Where it was put; some of them may have been confirmed since, or have gone.
    nodes: Box<[NodeId]>,
    until: Duration,
}

/// What one block of one prediction takes: its place in both lists and its share of the tables.
pub(super) const ENTRY_BYTES: usize = 96;

impl Predictions {
    pub(super) fn new() -> Self {
        Predictions {
            last: 0,
            open: HashMap::new(),
            by_node: HashMap::new(),
            due: BTreeSet::new(),
            entries: 0,
        }
    }

    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    pub(super) fn bytes(&self) -> usize {
        self.entries * ENTRY_BYTES
    }

    pub(super) fn insert(
        &mut self,
        worker: WorkerKey,
        nodes: Box<[NodeId]>,
        until: Duration,
    ) -> PredictionId {
        self.last += 1;
        let id = PredictionId(self.last);
        for node in &nodes {
            self.by_node.entry(*node).or_default().push((id, worker));
        }
        self.entries += nodes.len();
        self.due.insert((until, id));
        self.open.insert(id, Prediction { nodes, until });
        id
    }

    /// Gives a prediction another end; of one that is over nothing happens.
    pub(super) fn retime(&mut self, id: PredictionId, until: Duration) {
        if let Some(prediction) = self.open.get_mut(&id) {
            self.due.remove(&(prediction.until, id));
            prediction.until = until;
            self.due.insert((until, id));
        }
    }

    /// Whether a worker is predicted to hold a block now.
    pub(super) fn holds(&self, node: NodeId, worker: WorkerKey, now: Duration) -> bool {
        let of_node = self.by_node.get(&node).map_or(&[][..], Vec::as_slice);
        of_node.iter().any(|(id, of)| *of == worker && self.open.get(id).is_some_and(|p| p.until > now))
    }

    /// The oldest prediction whose time is over.
    pub(super) fn overdue(&self, now: Duration) -> Option<PredictionId> {
        self.due.first().filter(|(until, _)| *until <= now).map(|(_, id)| *id)
    }

    /// Ends a prediction, and gives the blocks of which nothing is predicted any more.
    pub(super) fn withdraw(&mut self, id: PredictionId) -> Vec<NodeId> {
        let Some(Prediction { nodes, until }) = self.open.remove(&id) else { return Vec::new() };
        self.due.remove(&(until, id));
        let mut bare = Vec::new();
        for node in nodes {
            // It may be another block by now; then this prediction is not in its list.
            if self.retain(node, |(of, _)| *of != id) {
                bare.push(node);
            }
        }
        bare
    }

    /// Ends all that is predicted of one block on one worker: its events have spoken. Says whether nothing is
    /// predicted of it any more.
    pub(super) fn settle(&mut self, node: NodeId, worker: WorkerKey) -> bool {
        self.retain(node, |(_, of)| *of != worker)
    }

    /// Whether the block's list is empty now and was not before.
    fn retain(&mut self, node: NodeId, keep: impl Fn(&(PredictionId, WorkerKey)) -> bool) -> bool {
        let Some(of_node) = self.by_node.get_mut(&node) else { return false };
        let before = of_node.len();
        of_node.retain(keep);
        self.entries -= before - of_node.len();
        let empty = of_node.is_empty();
        if empty {
            self.by_node.remove(&node);
        }
        empty
    }
}
