//! Which worker holds which blocks, exactly: what its numbered events said, block by block, and beside it what this
//! router expects of the prompts that it has just sent.
//!
//! ```text
//!   name ──▶ node {parent, holders ──▶ a set of slots, stored once}       holders ⊆ slots of synced workers: matched
//!   worker ──▶ slot ──▶ (swept when its worker leaves)                    + predictions: matched for a while
//! ```
//! A worker that leaves, restarts or lost its way gives up its *slot*, which is one store: whatever still names the
//! slot counts for nobody, and a sweep takes it out. Names are hashes of a block and of all before it, so a block's
//! place in its chain needs no keys of its own, and following a prompt costs its blocks, whatever else is held.
//!
//! Over its byte budget the index forgets chains from their ends, the oldest and least hit first, and says so. What a
//! worker holds and was forgotten still counts in its digest, so that forgetting is not taken for a loss.

mod holders;

mod blocks;

mod predictions;

use std::time::Duration;

use petek_core::hash::BlockName;

pub use self::predictions::PredictionId;

use self::blocks::{BLOCK_BYTES, Blocks, HITS_MAX, NodeId};
use self::holders::{SetId, Sets, Slot};
use self::predictions::{ENTRY_BYTES, Predictions};

/// Predictions may take one part in this many of the byte budget.
const PREDICTED_SHARE: usize = 8;

/// See the head of this file. Times are since any fixed moment.
pub struct Index {
    bytes_max: usize,
    blocks: Blocks,
    sets: Sets,
    workers: Vec<Worker>,
    vacant: Vec<u32>,
    /// The worker of each slot; none of a dead or a free one.
    slots: Vec<Option<u32>>,
    slots_free: Vec<Slot>,
    /// Slots whose worker left and that no sweep has begun to take out.
    dead: Vec<Slot>,
    sweep: Sweep,
    predictions: Predictions,
    /// The next node to look at for something to forget.
    hand: u32,
    forgotten_total: u64,
    unpredicted_total: u64,
}

/// A worker of the index, for as long as it stays: its number is given again, its generation is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkerKey {
    number: u32,
    generation: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Worker {
    generation: u32,
    slot: Slot,
    state: View,
    /// Blocks that its events said it holds, forgotten ones included.
    held: u64,
    /// XOR of their names.
    digest: u128,
    /// Of `held`: those that the index forgot.
    forgotten: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum View {
    #[default]
    Absent,
    /// Not whole: it matches nothing.
    Syncing,
    Synced,
}

/// Slots on their way out, and the next node to take them from.
#[derive(Default)]
struct Sweep {
    slots: Vec<Slot>,
    next: u32,
}

/// Why blocks cannot have been stored as it is said: something before was lost, or the sender is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stray {
    /// The worker does not hold the block before them.
    #[error("blocks are stored after one that the worker does not hold")]
    UnknownParent,
    /// A block has another parent already, or has the root's name.
    #[error("a block is stored in two places")]
    Misplaced,
}

/// What a worker holds of a prompt: leading blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Blocks, predicted ones included.
    pub blocks: u32,
    /// Of which: predicted only.
    pub predicted: u32,
}

/// What each worker holds of one prompt.
#[derive(Clone, Debug)]
pub struct Matches(Vec<(u32, Match)>);

/// What a worker holds as its events have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// How many blocks.
    pub blocks: u64,
    /// XOR of their names.
    pub digest: BlockName,
    /// How many of them the index forgot for want of room.
    pub forgotten: u64,
}

/// The size of an index, and what it had to leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Blocks that somebody holds or is predicted to hold, each once.
    pub blocks: u64,
    /// Pairs of a block and a worker that holds it.
    pub holder_blocks: u64,
    /// Sets of holders.
    pub sets: u64,
    /// Memory.
    pub bytes: u64,
    /// Pairs of a block and a worker that were forgotten for want of room; only grows.
    pub forgotten_total: u64,
    /// Prompts that were not predicted for want of room; only grows.
    pub unpredicted_total: u64,
}

impl Matches {
    /// Nothing, of nobody.
    pub fn none() -> Self {
        Matches(Vec::new())
    }

    /// What one worker holds.
    pub fn of(&self, worker: WorkerKey) -> Match {
        let of =
            self.0.get(worker.number as usize).filter(|(generation, _)| *generation == worker.generation);
        of.map_or(Match::default(), |(_, found)| *found)
    }
}

impl Index {
    /// An empty one. `bytes_max`: what all it knows may take.
    pub fn new(bytes_max: usize) -> Self {
        Index {
            bytes_max,
            blocks: Blocks::new(),
            sets: Sets::new(),
            workers: Vec::new(),
            vacant: Vec::new(),
            slots: Vec::new(),
            slots_free: Vec::new(),
            dead: Vec::new(),
            sweep: Sweep::default(),
            predictions: Predictions::new(),
            hand: 0,
            forgotten_total: 0,
            unpredicted_total: 0,
        }
    }

    /// A worker of which nothing is known yet.
    pub fn add_worker(&mut self) -> WorkerKey {
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.workers.push(Worker::default());
            self.workers.len() as u32 - 1
        });
        let slot = self.new_slot(number);
        let generation = self.workers[number as usize].generation + 1;
        self.workers[number as usize] =
            Worker { generation, slot, state: View::Syncing, ..Worker::default() };
        WorkerKey { number, generation }
    }

    /// Forgets a worker at once. All that still comes under its key is dropped; [`Index::sweep`] gives the memory back.
    pub fn remove_worker(&mut self, key: WorkerKey) {
        let Some(worker) = self.worker_mut(key) else { return };
        worker.state = View::Absent;
        let slot = worker.slot;
        self.kill(slot);
        self.vacant.push(key.number);
    }

    /// Forgets what a worker holds, at once, until it is said anew: until [`Index::synced`] it matches what is
    /// predicted of it and nothing else.
    pub fn begin_sync(&mut self, key: WorkerKey) {
        self.renew(key, View::Syncing);
    }

    /// Says that a worker's view is whole.
    pub fn synced(&mut self, key: WorkerKey) {
        if let Some(worker) = self.worker_mut(key) {
            worker.state = View::Synced;
        }
    }

    /// Whether a worker's view is whole.
    pub fn is_synced(&self, key: WorkerKey) -> bool {
        self.worker(key).is_some_and(|worker| worker.state == View::Synced)
    }

    /// A chain of blocks that a worker now holds, the first one after `parent`. What it holds already stays as it is.
    ///
    /// # Errors
    /// What cannot be; the blocks before it are taken.
    pub fn stored(
        &mut self,
        key: WorkerKey,
        parent: BlockName,
        names: impl Iterator<Item = BlockName>,
    ) -> Result<(), Stray> {
        let mut parent = parent;
        let pairs = names.map(|name| (std::mem::replace(&mut parent, name), name));
        self.stored_pairs(key, pairs)
    }

    /// Blocks that a worker now holds, each after its parent: as [`Index::stored`].
    ///
    /// # Errors
    /// What cannot be; the blocks before it are taken.
    pub fn stored_pairs(
        &mut self,
        key: WorkerKey,
        pairs: impl Iterator<Item = (BlockName, BlockName)>,
    ) -> Result<(), Stray> {
        let stored = self.store(key, pairs);
        if self.is_over_budget() {
            self.forget();
        }
        stored
    }

    /// Blocks that a worker holds no more. Returns how many of them it did not hold: they are skipped.
    pub fn removed(&mut self, key: WorkerKey, names: impl Iterator<Item = BlockName>) -> u64 {
        let Some(&Worker { slot, .. }) = self.worker(key) else { return 0 };
        let mut unknown = 0;
        for name in names {
            let found = self.blocks.find(name);
            if let Some(node) = found {
                self.settle(node, key);
            }
            let held = found.filter(|&node| self.sets.contains(self.blocks[node].holders, slot));
            let worker = &mut self.workers[key.number as usize];
            match held {
                Some(_) => {}
                // As good as certain: one that it held and that was forgotten here.
                None if worker.forgotten > 0 => worker.forgotten -= 1,
                None => {
                    unknown += 1;
                    if let Some(node) = found {
                        drop_if_bare(&mut self.blocks, node);
                    }
                    continue;
                }
            }
            worker.held -= 1;
            worker.digest ^= bits(name);
            if let Some(node) = held {
                let set = self.sets.remove(self.blocks[node].holders, slot);
                self.blocks[node].holders = set;
            }
            if let Some(node) = found {
                drop_if_bare(&mut self.blocks, node);
            }
        }
        unknown
    }

    /// A worker holds nothing any more.
    pub fn cleared(&mut self, key: WorkerKey) {
        if let Some(&Worker { state, .. }) = self.worker(key) {
            self.renew(key, state);
        }
    }

    /// What a worker holds, to be held against its own word.
    pub fn held(&self, key: WorkerKey) -> Held {
        let worker = self.worker(key).copied().unwrap_or_default();
        let digest = BlockName(worker.digest.to_le_bytes());
        Held { blocks: worker.held, digest, forgotten: worker.forgotten }
    }

    /// How many leading blocks of a prompt each worker holds, or is predicted to hold by now.
    pub fn matches(&mut self, names: &[BlockName], now: Duration) -> Matches {
        let mut found: Vec<(u32, Match)> =
            self.workers.iter().map(|worker| (worker.generation, Match::default())).collect();
        // Those that hold everything so far, by slot, as the members of sets are.
        let mut active: Vec<(Slot, u32)> =
            (0..).zip(&self.slots).filter_map(|(slot, w)| Some((slot, (*w)?))).collect();
        // The holders of the block before, where all that are active were among them.
        let mut same: Option<SetId> = None;
        let mut end: Option<NodeId> = None;
        let mut depth = 0;
        for &name in names {
            let Some(node) = self.blocks.child(end, name) else { break };
            let (holders, predicted) = (self.blocks[node].holders, self.blocks[node].predicted());
            if predicted || same != Some(holders) {
                let mut members = self.sets.members(holders).iter().copied().peekable();
                let mut all_hold = true;
                active.retain(|&(slot, number)| {
                    while members.next_if(|member| *member < slot).is_some() {}
                    let worker = &self.workers[number as usize];
                    if members.peek() == Some(&slot) && worker.state == View::Synced {
                        return true;
                    }
                    all_hold = false;
                    let key = WorkerKey { number, generation: worker.generation };
                    let expected = predicted && self.predictions.holds(node, key, now);
                    let (_, found) = &mut found[number as usize];
                    if expected {
                        found.predicted += 1;
                    } else {
                        found.blocks = depth;
                    }
                    expected
                });
                if active.is_empty() {
                    break;
                }
                same = all_hold.then_some(holders);
            }
            (end, depth) = (Some(node), depth + 1);
        }
        for (_, number) in active {
            found[number as usize].1.blocks = depth;
        }
        if let Some(end) = end {
            let node = &mut self.blocks[end];
            node.set_hits(node.hits() + 1);
        }
        Matches(found)
    }

    /// Expects a worker to hold the leading blocks of a prompt until `until`. None where there is no room for it.
    pub fn predict(
        &mut self,
        key: WorkerKey,
        names: &[BlockName],
        now: Duration,
        until: Duration,
    ) -> Option<PredictionId> {
        self.expire(now);
        let Worker { slot, state, .. } = *self.worker(key)?;
        let room = (self.bytes_max / PREDICTED_SHARE) / (ENTRY_BYTES + BLOCK_BYTES);
        if self.predictions.entries() + names.len() > room {
            self.unpredicted_total += 1;
            return None;
        }
        let mut parent = None;
        let mut nodes = Vec::new();
        for &name in names {
            let node = match self.blocks.child(parent, name) {
                Some(node) => node,
                None => self.blocks.insert(name, parent),
            };
            parent = Some(node);
            if state != View::Synced || !self.sets.contains(self.blocks[node].holders, slot) {
                self.blocks[node].set_predicted(true);
                nodes.push(node);
            }
        }
        let id = self.predictions.insert(key, nodes.into(), until);
        if self.is_over_budget() {
            self.forget();
        }
        Some(id)
    }

    /// Gives a prediction another end; of one that is over nothing happens.
    pub fn retime(&mut self, prediction: PredictionId, until: Duration) {
        self.predictions.retime(prediction, until);
    }

    /// Ends a prediction.
    pub fn withdraw(&mut self, prediction: PredictionId) {
        for node in self.predictions.withdraw(prediction) {
            self.unpredict(node);
        }
    }

    /// Ends the predictions whose time is over.
    pub fn expire(&mut self, now: Duration) {
        while let Some(overdue) = self.predictions.overdue(now) {
            self.withdraw(overdue);
        }
    }

    /// Takes workers that left out of the next so many nodes. Returns whether there is more to do.
    pub fn sweep(&mut self, nodes: u32) -> bool {
        if self.sweep.slots.is_empty() {
            self.sweep = Sweep { slots: std::mem::take(&mut self.dead), next: 0 };
            self.sweep.slots.sort_unstable();
        }
        if self.sweep.slots.is_empty() {
            return false;
        }
        let end = self.sweep.next.saturating_add(nodes).min(self.blocks.id_end());
        let is_gone = |slot: &&Slot| self.sweep.slots.binary_search(slot).is_ok();
        // The set before, where nobody in it is gone.
        let mut whole = SetId::EMPTY;
        for id in (self.sweep.next..end).map(NodeId) {
            let Some(holders) = self.blocks.live(id.0).map(|node| node.holders) else { continue };
            if holders == whole {
                continue;
            }
            let gone: Vec<Slot> = self.sets.members(holders).iter().filter(is_gone).copied().collect();
            whole = gone.iter().fold(holders, |set, &slot| self.sets.remove(set, slot));
            if !gone.is_empty() {
                self.blocks[id].holders = whole;
                drop_if_bare(&mut self.blocks, id);
            }
        }
        self.sweep.next = end;
        if end == self.blocks.id_end() {
            self.slots_free.append(&mut self.sweep.slots);
        }
        !self.sweep.slots.is_empty() || !self.dead.is_empty()
    }

    /// How large it is.
    pub fn figures(&self) -> Figures {
        let present = self.workers.iter().filter(|worker| worker.state != View::Absent);
        Figures {
            blocks: self.blocks.len() as u64,
            holder_blocks: present.map(|worker| worker.held - worker.forgotten).sum(),
            sets: self.sets.len() as u64,
            bytes: (self.blocks.bytes() + self.sets.bytes() + self.predictions.bytes()) as u64,
            forgotten_total: self.forgotten_total,
            unpredicted_total: self.unpredicted_total,
        }
    }

    fn worker(&self, key: WorkerKey) -> Option<&Worker> {
        let worker = self.workers.get(key.number as usize)?;
        (worker.generation == key.generation && worker.state != View::Absent).then_some(worker)
    }

    fn worker_mut(&mut self, key: WorkerKey) -> Option<&mut Worker> {
        let worker = self.workers.get_mut(key.number as usize)?;
        (worker.generation == key.generation && worker.state != View::Absent).then_some(worker)
    }

    fn new_slot(&mut self, number: u32) -> Slot {
        let slot = self.slots_free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as Slot - 1
        });
        self.slots[slot as usize] = Some(number);
        slot
    }

    fn kill(&mut self, slot: Slot) {
        self.slots[slot as usize] = None;
        self.dead.push(slot);
    }

    /// Another slot for a worker: what it held before is nobody's now.
    fn renew(&mut self, key: WorkerKey, state: View) {
        let Some(&Worker { slot, held, forgotten, .. }) = self.worker(key) else { return };
        let slot = if held == forgotten {
            slot
        } else {
            self.kill(slot);
            self.new_slot(key.number)
        };
        self.workers[key.number as usize] =
            Worker { generation: key.generation, slot, state, ..Worker::default() };
    }

    fn store(
        &mut self,
        key: WorkerKey,
        pairs: impl Iterator<Item = (BlockName, BlockName)>,
    ) -> Result<(), Stray> {
        let Some(&Worker { slot, .. }) = self.worker(key) else { return Ok(()) };
        // The block before, which most often is the next one's parent.
        let mut last: Option<(BlockName, NodeId)> = None;
        for (parent_name, name) in pairs {
            if name == BlockName::ROOT {
                return Err(Stray::Misplaced);
            }
            let parent = match last {
                Some((before, node)) if before == parent_name => Some(node),
                _ if parent_name == BlockName::ROOT => None,
                _ => {
                    let held = |&node: &NodeId| self.sets.contains(self.blocks[node].holders, slot);
                    let Some(node) = self.blocks.find(parent_name).filter(held) else {
                        if self.workers[key.number as usize].forgotten == 0 {
                            return Err(Stray::UnknownParent);
                        }
                        // Its parent was forgotten, so there is no place for it either.
                        self.forgotten_total += 1;
                        let worker = &mut self.workers[key.number as usize];
                        worker.forgotten += 1;
                        worker.held += 1;
                        worker.digest ^= bits(name);
                        last = None;
                        continue;
                    };
                    Some(node)
                }
            };
            let node = match self.blocks.child(parent, name) {
                Some(node) if self.blocks[node].parent() != parent => return Err(Stray::Misplaced),
                Some(node) => node,
                None => self.blocks.insert(name, parent),
            };
            last = Some((name, node));
            if self.blocks[node].predicted() {
                self.settle(node, key);
            }
            let before = self.blocks[node].holders;
            let after = self.sets.add(before, slot);
            if after != before {
                self.blocks[node].holders = after;
                let worker = &mut self.workers[key.number as usize];
                worker.held += 1;
                worker.digest ^= bits(name);
            }
        }
        Ok(())
    }

    /// A worker's events speak of a block: what was predicted of it there is over.
    fn settle(&mut self, node: NodeId, key: WorkerKey) {
        if self.blocks[node].predicted() && self.predictions.settle(node, key) {
            self.blocks[node].set_predicted(false);
        }
    }

    fn unpredict(&mut self, node: NodeId) {
        self.blocks[node].set_predicted(false);
        drop_if_bare(&mut self.blocks, node);
    }

    fn is_over_budget(&self) -> bool {
        self.blocks.len() * BLOCK_BYTES + self.sets.bytes() + self.predictions.bytes() > self.bytes_max
    }

    /// Forgets chains from their ends until there is room: a hand goes round over all blocks, takes one hit from
    /// each end of a chain that has some, and takes out those that have none.
    fn forget(&mut self) {
        // Once round per hit, and once more, has visited every end without one.
        let visits = (HITS_MAX + 2) * self.blocks.id_end();
        for _ in 0..visits {
            if !self.is_over_budget() {
                return;
            }
            self.hand = if self.hand + 1 < self.blocks.id_end() { self.hand + 1 } else { 0 };
            let Some(node) = self.blocks.live(self.hand) else { continue };
            let (hits, is_end) = (node.hits(), node.children() == 0 && !node.predicted());
            let id = NodeId(self.hand);
            match (is_end, hits) {
                (false, _) => {}
                (true, 0) => self.forget_chain(id),
                (true, hits) => self.blocks[id].set_hits(hits - 1),
            }
        }
    }

    /// Forgets a block without hits, and those before it for as long as they are ends without hits then.
    fn forget_chain(&mut self, end: NodeId) {
        let mut next = Some(end);
        while let Some(id) = next {
            let node = &self.blocks[id];
            if node.children() > 0 || node.predicted() || node.hits() > 0 || !self.is_over_budget() {
                return;
            }
            let holders = node.holders;
            for &slot in self.sets.members(holders) {
                // A dead slot's count went with it.
                if let Some(number) = self.slots[slot as usize] {
                    self.workers[number as usize].forgotten += 1;
                    self.forgotten_total += 1;
                }
            }
            self.sets.leave(holders);
            self.blocks[id].holders = SetId::EMPTY;
            next = self.blocks.remove(id);
        }
    }
}

/// Takes a block out of which nothing is known, and those before it that only stood there for it.
fn drop_if_bare(blocks: &mut Blocks, node: NodeId) {
    let mut next = Some(node);
    while let Some(node) = next
        && blocks[node].is_bare()
        && blocks[node].children() == 0
    {
        next = blocks.remove(node);
    }
}

fn bits(name: BlockName) -> u128 {
    u128::from_le_bytes(name.0)
}

#[cfg(test)]
mod tests;
