//! Sets of holders, each stored once: the blocks of a chain mostly have the same holders, and so do chains that were
//! computed on one worker only.

use hashbrown::HashTable;
use slab::Slab;

/// A worker's place in the sets.
pub(super) type Slot = u32;

/// A set. Equal sets have equal ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SetId(pub(super) u32);

impl SetId {
    /// Nobody.
    pub(super) const EMPTY: SetId = SetId(0);
}

/// See the head of this file.
pub(super) struct Sets {
    sets: Slab<Set>,
    by_members: HashTable<u32>,
    /// The last step from one set to another: neighbours in a chain take the same one.
    last: Option<(SetId, Change, SetId)>,
    members_total: usize,
}

struct Set {
    /// Rising.
    members: Box<[Slot]>,
    /// Blocks with these holders.
    blocks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    With(Slot),
    Without(Slot),
}

impl Sets {
    pub(super) fn new() -> Self {
        let mut sets = Slab::new();
        sets.insert(Set { members: Box::default(), blocks: 0 });
        Sets { sets, by_members: HashTable::new(), last: None, members_total: 0 }
    }

    /// Rising.
    pub(super) fn members(&self, set: SetId) -> &[Slot] {
        &self.sets[set.0 as usize].members
    }

    pub(super) fn contains(&self, set: SetId, slot: Slot) -> bool {
        self.members(set).binary_search(&slot).is_ok()
    }

    /// Moves one block from a set to that set with a holder more.
    pub(super) fn add(&mut self, set: SetId, slot: Slot) -> SetId {
        self.step(set, Change::With(slot))
    }

    /// Moves one block from a set to that set without a holder.
    pub(super) fn remove(&mut self, set: SetId, slot: Slot) -> SetId {
        self.step(set, Change::Without(slot))
    }

    /// Takes one block out of a set.
    pub(super) fn leave(&mut self, set: SetId) {
        if set == SetId::EMPTY {
            return;
        }
        let entry = &mut self.sets[set.0 as usize];
        entry.blocks -= 1;
        if entry.blocks > 0 {
            return;
        }
        let Set { members, .. } = self.sets.remove(set.0 as usize);
        self.members_total -= members.len();
        if let Ok(found) = self.by_members.find_entry(hash(&members), |&id| id == set.0) {
            found.remove();
        }
        if self.last.is_some_and(|(from, _, to)| from == set || to == set) {
            self.last = None;
        }
        if self.by_members.len() < self.by_members.capacity() / 4 {
            let sets = &self.sets;
            self.by_members.shrink_to_fit(|&id| hash(&sets[id as usize].members));
        }
    }

    /// How many sets there are, the empty one not counted.
    pub(super) fn len(&self) -> usize {
        self.sets.len() - 1
    }

    /// What they take in memory.
    pub(super) fn bytes(&self) -> usize {
        self.sets.capacity() * (size_of::<Set>() + size_of::<usize>())
            + self.members_total * size_of::<Slot>()
            + self.by_members.allocation_size()
    }

    /// How many blocks have these holders; of the empty set it is not known.
    #[cfg(test)]
    pub(super) fn blocks(&self, set: SetId) -> u32 {
        self.sets[set.0 as usize].blocks
    }

    fn step(&mut self, from: SetId, change: Change) -> SetId {
        let to = match self.last {
            Some((before, same, after)) if before == from && same == change => after,
            _ => self.find_or_make(from, change),
        };
        if to == from {
            return from;
        }
        if to != SetId::EMPTY {
            self.sets[to.0 as usize].blocks += 1;
        }
        self.last = Some((from, change, to));
        self.leave(from);
        to
    }

    fn find_or_make(&mut self, from: SetId, change: Change) -> SetId {
        let old = self.members(from);
        let members: Box<[Slot]> = match (change, old.binary_search(&change.slot())) {
            (Change::With(_), Ok(_)) | (Change::Without(_), Err(_)) => return from,
            (Change::With(slot), Err(at)) => {
                old[..at].iter().copied().chain([slot]).chain(old[at..].iter().copied()).collect()
            }
            (Change::Without(_), Ok(at)) => old[..at].iter().chain(&old[at + 1..]).copied().collect(),
        };
        if members.is_empty() {
            return SetId::EMPTY;
        }
        let hashed = hash(&members);
        let equal = |&id: &u32| self.sets[id as usize].members == members;
        if let Some(&id) = self.by_members.find(hashed, equal) {
            return SetId(id);
        }
        self.members_total += members.len();
        let id = self.sets.insert(Set { members, blocks: 0 }) as u32;
        let sets = &self.sets;
        self.by_members.insert_unique(hashed, id, |&id| hash(&sets[id as usize].members));
        SetId(id)
    }
}

impl Change {
    fn slot(self) -> Slot {
        match self {
            Change::With(slot) | Change::Without(slot) => slot,
        }
    }
}

/// Slots are small numbers of our own, so a multiplication spreads them enough.
fn hash(members: &[Slot]) -> u64 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    members.iter().fold(ODD, |sum, &slot| (sum.rotate_left(23) ^ u64::from(slot)).wrapping_mul(ODD))
}
