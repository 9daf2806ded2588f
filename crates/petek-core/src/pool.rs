//! The block pool: which block of the KV cache is free, who holds the others, and which can be found again by the
//! hash of what they hold.
//!
//! ```text
//!             allocate                    release, the last one
//!   Free ───────────────▶ Held ───────────────────────────────▶ Limbo   steps that may touch it are in flight
//!    ▲  ▲                  ▲  ▲                                   │
//!    │  └── no hash ───────│──│──────────────── all collected ────┤
//!    │                     │  └─── hold (a hit) ─────────────┐    │
//!    │                     └────── hold (a hit) ─────────┐   │    │
//!    └── allocate evicts the least recently released ── Cached ◀──┘   has a hash
//! ```
//!
//! **Leaves before parents.** Whoever holds a block holds a copy of its parent, and releases children first. So in
//! the order of release a parent always stands behind its children, and plain LRU evicts leaves first: no tree is
//! kept. **Copies.** Two sequences that compute the same block at the same time give two copies of one hash; the
//! cache is a *set of hashes*, so one is announced with the first copy and withdrawn with the last. At most one copy
//! of a hash is not held.
//!
//! All operations but [`Pool::expel`], [`Pool::snapshot`] and [`Pool::check`] take constant time and, once the index
//! has grown, allocate nothing.

use std::collections::HashMap;

use crate::hash::{BlockHash, BlockName};
use crate::ids::{BlockId, StepNumber, TokenId};

/// No block: the end of a list.
const NIL: u32 = u32::MAX;

/// A change of the set of hashes that a pool holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// A block can be found now.
    Stored {
        /// The block before it, which can be found too; [`BlockName::ROOT`] before the first.
        parent: BlockName,
        /// The block.
        block: BlockName,
    },
    /// No copy of a block can be found any more.
    Removed {
        /// The block.
        block: BlockName,
    },
}

/// A fixed number of blocks and what is known of each.
#[derive(Debug)]
pub struct Pool {
    block_size: usize,
    blocks: Vec<Block>,
    /// The tokens of each block that has a key: `[block][position]`.
    tokens: Vec<TokenId>,
    free: Vec<u32>,
    limbo: List,
    cached: List,
    /// The first copy of each hash.
    index: HashMap<BlockHash, u32>,
    /// XOR of the names in `index`.
    digest: [u8; 16],
    events: Vec<KvEvent>,
    submitted: StepNumber,
    collected: StepNumber,
}

#[derive(Clone, Debug)]
struct Block {
    place: Place,
    holders: u32,
    /// In limbo: the step after whose collection nothing touches it.
    free_after: StepNumber,
    /// Neighbours in the list of `place`.
    prev: u32,
    next: u32,
    key: Option<Key>,
    /// Neighbours among the copies of one hash.
    copy_prev: u32,
    copy_next: u32,
    bytes: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Held,
    Limbo,
    Cached,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    /// Whatever they are, they will be overwritten before they are read.
    Harmless,
    /// They came of a NaN and may be read by a kernel that multiplies them by zero.
    Poisoned,
}

/// What a block holds, of one that can be found.
#[derive(Clone, Copy, Debug)]
struct Key {
    hash: BlockHash,
    parent: BlockHash,
    /// Blocks before it in its chain.
    depth: u32,
}

/// A doubly linked list through the blocks' own links.
#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
    len: usize,
}

impl Pool {
    /// A pool of `blocks` free blocks of `block_size` tokens.
    ///
    /// # Panics
    /// If either is 0 or there are 2^32 - 1 blocks or more: both come from a checked configuration.
    pub fn new(blocks: u32, block_size: u32) -> Self {
        assert!(blocks > 0 && blocks < NIL && block_size > 0, "{blocks} blocks of {block_size} tokens");
        let block = Block {
            place: Place::Free,
            holders: 0,
            free_after: StepNumber(0),
            prev: NIL,
            next: NIL,
            key: None,
            copy_prev: NIL,
            copy_next: NIL,
            bytes: Bytes::Harmless,
        };
        Pool {
            block_size: block_size as usize,
            blocks: vec![block; blocks as usize],
            tokens: vec![0; blocks as usize * block_size as usize],
            free: (0..blocks).rev().collect(),
            limbo: List::EMPTY,
            cached: List::EMPTY,
            index: HashMap::with_capacity(blocks as usize),
            digest: [0; 16],
            events: Vec::new(),
            submitted: StepNumber(0),
            collected: StepNumber(0),
        }
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`Pool::allocate`] can give now, of which some may hold what can still be found.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len
    }

    /// Of those available, the ones that hold what can still be found.
    pub fn evictable(&self) -> usize {
        self.cached.len
    }

    /// Blocks that nobody holds, but steps in flight may touch.
    pub fn in_limbo(&self) -> usize {
        self.limbo.len
    }

    /// Whether nobody holds the block: a hit on it takes it from those available.
    pub fn is_available(&self, block: BlockId) -> bool {
        matches!(self.blocks[block.0 as usize].place, Place::Free | Place::Cached)
    }

    /// Whether the block has one holder and cannot be found: whoever holds it may write anywhere in it.
    pub fn is_private(&self, block: BlockId) -> bool {
        let block = &self.blocks[block.0 as usize];
        block.holders == 1 && block.key.is_none()
    }

    /// A block for the caller to hold and write: a free one, or the least recently released of those that can be
    /// found, which then no longer can. `zeroes` gets it too if its bytes must be set to zero first.
    pub fn allocate(&mut self, zeroes: &mut Vec<BlockId>) -> Option<BlockId> {
        let at = match self.free.pop() {
            Some(at) => at,
            None if self.cached.first != NIL => {
                let at = self.cached.first;
                self.cached.unlink(&mut self.blocks, at);
                self.forget(at);
                at
            }
            None => return None,
        };
        let block = &mut self.blocks[at as usize];
        block.place = Place::Held;
        block.holders = 1;
        if block.bytes == Bytes::Poisoned {
            block.bytes = Bytes::Harmless;
            zeroes.push(BlockId(at));
        }
        Some(BlockId(at))
    }

    /// A block with this hash whose tokens are these. The caller has found its parent before, so a hit means that
    /// every token up to here is equal, whatever the hash is worth.
    pub fn find(&self, hash: &BlockHash, tokens: &[TokenId]) -> Option<BlockId> {
        let at = *self.index.get(hash)?;
        (self.tokens_of(at) == tokens).then_some(BlockId(at))
    }

    /// One more holder of a block that was found or that another sequence holds.
    ///
    /// # Panics
    /// If the block is free: its content is nobody's.
    pub fn hold(&mut self, block: BlockId) {
        let at = block.0;
        match self.blocks[at as usize].place {
            Place::Free => panic!("block {block} is free and cannot be shared"),
            Place::Held => {}
            Place::Limbo => self.limbo.unlink(&mut self.blocks, at),
            Place::Cached => self.cached.unlink(&mut self.blocks, at),
        }
        self.blocks[at as usize].place = Place::Held;
        self.blocks[at as usize].holders += 1;
    }

    /// One holder less. A sequence releases its last block first.
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn release(&mut self, block: BlockId) {
        let at = block.0;
        let meta = &mut self.blocks[at as usize];
        assert!(meta.holders > 0, "block {block} has no holder to release it");
        meta.holders -= 1;
        if meta.holders > 0 {
            return;
        }
        let other = if meta.copy_prev != NIL { meta.copy_prev } else { meta.copy_next };
        if other != NIL {
            // One copy is enough. A held one will be released later than this one; of two that are not held the
            // one released last keeps the order of release true.
            if self.blocks[other as usize].place == Place::Held {
                self.forget(at);
            } else {
                self.forget_unheld(other);
            }
        }
        if self.submitted > self.collected {
            self.blocks[at as usize].place = Place::Limbo;
            self.blocks[at as usize].free_after = self.submitted;
            self.limbo.push_last(&mut self.blocks, at);
        } else {
            self.settle(at);
        }
    }

    /// Makes a held, full block of confirmed tokens findable, unless its parent is not (a chain without its
    /// beginning is of no use to anyone).
    ///
    /// # Panics
    /// If the block is not held or `tokens` are not a block.
    pub fn publish(
        &mut self,
        block: BlockId,
        depth: u32,
        parent: BlockHash,
        hash: BlockHash,
        tokens: &[TokenId],
    ) {
        let at = block.0;
        assert_eq!(self.blocks[at as usize].place, Place::Held, "block {block} is not held");
        assert_eq!(tokens.len(), self.block_size, "only full blocks can be found");
        let orphan = parent != BlockHash::ROOT && !self.index.contains_key(&parent);
        if orphan || self.blocks[at as usize].key.is_some() {
            return;
        }
        self.blocks[at as usize].key = Some(Key { hash, parent, depth });
        let from = at as usize * self.block_size;
        self.tokens[from..from + self.block_size].copy_from_slice(tokens);
        match self.index.get(&hash) {
            None => {
                self.index.insert(hash, at);
                self.toggle_digest(hash.name());
                self.events.push(KvEvent::Stored { parent: parent.name(), block: hash.name() });
            }
            Some(&first) => {
                let second = std::mem::replace(&mut self.blocks[first as usize].copy_next, at);
                self.blocks[at as usize].copy_prev = first;
                self.blocks[at as usize].copy_next = second;
                if second != NIL {
                    self.blocks[second as usize].copy_prev = at;
                }
            }
        }
    }

    /// Takes blocks that came of a NaN out of the cache, with everything that can be found only behind them, and has
    /// their bytes zeroed before they are used again. Their holders, if any, keep them. Linear in the pool where
    /// something behind them may be cached: it happens to a request that ends in an error.
    pub fn expel(&mut self, blocks: &[BlockId]) {
        let mut lost = Vec::new();
        for &BlockId(at) in blocks {
            self.blocks[at as usize].bytes = Bytes::Poisoned;
            self.expel_one(at, &mut lost);
        }
        if lost.is_empty() {
            return;
        }
        let mut children: HashMap<BlockHash, Vec<u32>> = HashMap::new();
        for (at, block) in self.blocks.iter().enumerate() {
            if let Some(key) = &block.key {
                children.entry(key.parent).or_default().push(at as u32);
            }
        }
        while let Some(parent) = lost.pop() {
            for at in children.remove(&parent).unwrap_or_default() {
                self.expel_one(at, &mut lost);
            }
        }
    }

    /// Says that a step was handed to the runner: blocks released from now on wait for it.
    pub fn step_submitted(&mut self, step: StepNumber) {
        debug_assert!(step > self.submitted);
        self.submitted = step;
    }

    /// Says that a step, and with it all before it, has been collected: what only waited for them can be used.
    pub fn step_collected(&mut self, step: StepNumber) {
        debug_assert!(step > self.collected && step <= self.submitted);
        self.collected = step;
        while self.limbo.first != NIL && self.blocks[self.limbo.first as usize].free_after <= step {
            let at = self.limbo.first;
            self.limbo.unlink(&mut self.blocks, at);
            self.settle(at);
        }
    }

    /// Moves the changes since the last call to the end of `to`, in the order in which they happened.
    pub fn move_events(&mut self, to: &mut Vec<KvEvent>) {
        to.append(&mut self.events);
    }

    /// How many hashes can be found, and the XOR of their names: what a router compares its own view with.
    pub fn digest(&self) -> (usize, BlockName) {
        (self.index.len(), BlockName(self.digest))
    }

    /// All blocks that can be found, as (parent, block), parents first.
    pub fn snapshot(&self) -> Vec<(BlockName, BlockName)> {
        let mut keys: Vec<&Key> =
            self.index.values().filter_map(|at| self.blocks[*at as usize].key.as_ref()).collect();
        keys.sort_unstable_by_key(|key| (key.depth, key.hash));
        keys.iter().map(|key| (key.parent.name(), key.hash.name())).collect()
    }

    /// Checks that every block is in exactly one place and everything else that this module promises. Linear in the
    /// pool: for tests.
    ///
    /// # Errors
    /// The first promise that is broken.
    pub fn check(&self) -> Result<(), String> {
        let count = |place| self.blocks.iter().filter(|b| b.place == place).count();
        let all = count(Place::Free) + count(Place::Held) + count(Place::Limbo) + count(Place::Cached);
        ensure(all == self.blocks.len(), || format!("{all} blocks of {} have a place", self.blocks.len()))?;
        ensure(count(Place::Free) == self.free.len(), || "the free list is not the free blocks".into())?;
        ensure(self.free.iter().all(|at| self.blocks[*at as usize].place == Place::Free), || {
            "a block of the free list is not free".into()
        })?;
        let limbo = self.limbo.walk(&self.blocks);
        let cached = self.cached.walk(&self.blocks);
        for (list, place) in [(&limbo, Place::Limbo), (&cached, Place::Cached)] {
            let right =
                list.len() == count(place) && list.iter().all(|at| self.blocks[*at as usize].place == place);
            ensure(right, || format!("the list of {place:?} is not its blocks"))?;
        }
        let mut rank = vec![usize::MAX; self.blocks.len()];
        for (i, at) in cached.iter().chain(&limbo).enumerate() {
            rank[*at as usize] = i;
        }
        let mut unheld: HashMap<BlockHash, usize> = HashMap::new();
        let mut keyed = 0;
        for (at, block) in self.blocks.iter().enumerate() {
            ensure((block.holders > 0) == (block.place == Place::Held), || format!("holders of block {at}"))?;
            let Some(key) = &block.key else {
                ensure(block.place != Place::Cached, || format!("block {at} is cached without a hash"))?;
                continue;
            };
            keyed += 1;
            ensure(block.place != Place::Free, || format!("free block {at} has a hash"))?;
            let copies = self.copies(key.hash);
            ensure(copies.contains(&(at as u32)), || format!("block {at} cannot be found"))?;
            if block.holders == 0 {
                let seen = unheld.entry(key.hash).or_default();
                *seen += 1;
                ensure(*seen == 1, || format!("two copies of {} are not held", key.hash))?;
            }
            if key.parent != BlockHash::ROOT {
                let parents = self.copies(key.parent);
                ensure(!parents.is_empty(), || format!("block {at} is cached without its parent"))?;
                let behind = |p: &u32| rank[*p as usize] > rank[at] || self.blocks[*p as usize].holders > 0;
                ensure(block.holders > 0 || parents.iter().any(behind), || {
                    format!("block {at} would be evicted after its parent")
                })?;
            }
        }
        let linked: usize = self.index.keys().map(|hash| self.copies(*hash).len()).sum();
        ensure(linked == keyed, || format!("{linked} copies are linked, {keyed} have a hash"))?;
        let mut digest = [0; 16];
        self.index.keys().for_each(|hash| xor(&mut digest, hash.name()));
        ensure(digest == self.digest, || "the digest is not that of the names".into())
    }

    /// Puts a block that nobody holds and no step touches where it belongs.
    fn settle(&mut self, at: u32) {
        if self.blocks[at as usize].key.is_some() {
            self.blocks[at as usize].place = Place::Cached;
            self.cached.push_last(&mut self.blocks, at);
        } else {
            self.blocks[at as usize].place = Place::Free;
            self.free.push(at);
        }
    }

    /// A block can no longer be found; says whether its hash can't either.
    fn forget(&mut self, at: u32) -> Option<BlockHash> {
        let block = &mut self.blocks[at as usize];
        let key = block.key.take()?;
        let prev = std::mem::replace(&mut block.copy_prev, NIL);
        let next = std::mem::replace(&mut block.copy_next, NIL);
        if next != NIL {
            self.blocks[next as usize].copy_prev = prev;
        }
        if prev != NIL {
            self.blocks[prev as usize].copy_next = next;
            return None;
        }
        if next != NIL {
            self.index.insert(key.hash, next);
            return None;
        }
        self.index.remove(&key.hash);
        self.toggle_digest(key.hash.name());
        self.events.push(KvEvent::Removed { block: key.hash.name() });
        Some(key.hash)
    }

    /// As [`Pool::forget`], of a block in limbo or cached: it becomes free as soon as it may.
    fn forget_unheld(&mut self, at: u32) -> Option<BlockHash> {
        let lost = self.forget(at);
        if self.blocks[at as usize].place == Place::Cached {
            self.cached.unlink(&mut self.blocks, at);
            self.settle(at);
        }
        lost
    }

    fn expel_one(&mut self, at: u32, lost: &mut Vec<BlockHash>) {
        lost.extend(self.forget_unheld(at));
    }

    fn tokens_of(&self, at: u32) -> &[TokenId] {
        &self.tokens[at as usize * self.block_size..][..self.block_size]
    }

    fn toggle_digest(&mut self, name: BlockName) {
        xor(&mut self.digest, name);
    }

    fn copies(&self, hash: BlockHash) -> Vec<u32> {
        let first = self.index.get(&hash).copied();
        std::iter::successors(first, |at| match self.blocks[*at as usize].copy_next {
            NIL => None,
            next => Some(next),
        })
        .collect()
    }
}

impl List {
    const EMPTY: List = List { first: NIL, last: NIL, len: 0 };

    fn push_last(&mut self, blocks: &mut [Block], at: u32) {
        blocks[at as usize].prev = self.last;
        blocks[at as usize].next = NIL;
        match self.last {
            NIL => self.first = at,
            last => blocks[last as usize].next = at,
        }
        self.last = at;
        self.len += 1;
    }

    fn unlink(&mut self, blocks: &mut [Block], at: u32) {
        let Block { prev, next, .. } = blocks[at as usize];
        match prev {
            NIL => self.first = next,
            prev => blocks[prev as usize].next = next,
        }
        match next {
            NIL => self.last = prev,
            next => blocks[next as usize].prev = prev,
        }
        self.len -= 1;
    }

    fn walk(&self, blocks: &[Block]) -> Vec<u32> {
        let first = (self.first != NIL).then_some(self.first);
        std::iter::successors(first, |at| match blocks[*at as usize].next {
            NIL => None,
            next => Some(next),
        })
        .take(blocks.len() + 1)
        .collect()
    }
}

fn xor(digest: &mut [u8; 16], name: BlockName) {
    digest.iter_mut().zip(name.0).for_each(|(a, b)| *a ^= b);
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4;

    /// A pool whose blocks are named by a letter: its hash is the letter, its tokens too.
    struct Lettered(Pool);

    impl Lettered {
        fn new(blocks: u32) -> Self {
            Lettered(Pool::new(blocks, SIZE as u32))
        }

        /// Holds and publishes a chain of new blocks, one per letter.
        fn chain(&mut self, letters: &str) -> Vec<BlockId> {
            let mut parent = BlockHash::ROOT;
            let mut blocks = Vec::new();
            for (depth, letter) in letters.bytes().enumerate() {
                let block = self.0.allocate(&mut Vec::new()).expect("a free block");
                self.0.publish(block, depth as u32, parent, hash(letter), &tokens(letter));
                parent = hash(letter);
                blocks.push(block);
            }
            self.0.check().unwrap();
            blocks
        }

        fn release(&mut self, blocks: &[BlockId]) {
            blocks.iter().rev().for_each(|block| self.0.release(*block));
            self.0.check().unwrap();
        }

        /// Letters that can be found, among all that may be.
        fn found(&self) -> String {
            (b'a'..=b'z').filter(|l| self.0.find(&hash(*l), &tokens(*l)).is_some()).map(char::from).collect()
        }

        /// Events as text: +b(a) is b stored under a, -b is b removed.
        fn events(&mut self) -> String {
            let letter = |name: BlockName| if name == BlockName::ROOT { '/' } else { char::from(name.0[0]) };
            let mut events = Vec::new();
            self.0.move_events(&mut events);
            let text = events.iter().map(|event| match event {
                KvEvent::Stored { parent, block } => format!("+{}({})", letter(*block), letter(*parent)),
                KvEvent::Removed { block } => format!("-{}", letter(*block)),
            });
            text.collect::<Vec<_>>().join(" ")
        }

        fn allocate(&mut self, count: usize) -> Vec<BlockId> {
            let blocks = (0..count).map_while(|_| self.0.allocate(&mut Vec::new())).collect();
            self.0.check().unwrap();
            blocks
        }
    }

    fn hash(letter: u8) -> BlockHash {
        BlockHash([letter; 32])
    }

    fn tokens(letter: u8) -> [TokenId; SIZE] {
        [letter.into(); SIZE]
    }

    #[test]
    fn a_hash_alone_serves_nobody_other_tokens() {
        let mut pool = Lettered::new(2);
        pool.chain("a");
        assert!(pool.0.find(&hash(b'a'), &tokens(b'a')).is_some());
        assert!(pool.0.find(&hash(b'a'), &[97, 97, 97, 98]).is_none());
    }

    #[test]
    fn the_least_recently_released_goes_first_and_leaves_before_parents() {
        let mut pool = Lettered::new(5);
        let abc = pool.chain("abc");
        pool.release(&abc);
        let x = pool.chain("x");
        pool.release(&x);
        // A hit on a, released last of all now.
        let a = pool.0.find(&hash(b'a'), &tokens(b'a')).unwrap();
        pool.0.hold(a);
        pool.release(&[a]);
        assert_eq!((pool.0.available(), pool.found()), (5, "abcx".into()));
        for left in ["abcx", "abx", "ax", "a", ""] {
            assert_eq!(pool.allocate(1).len(), 1);
            assert_eq!(pool.found(), left);
        }
        assert!(pool.allocate(1).is_empty());
        assert_eq!(pool.events(), "+a(/) +b(a) +c(b) +x(/) -c -b -x -a");
    }

    #[test]
    fn two_copies_are_stored_once_and_removed_with_the_last() {
        let mut pool = Lettered::new(6);
        let (first, second, third) = (pool.chain("ab"), pool.chain("ab"), pool.chain("ac"));
        assert_eq!(pool.events(), "+a(/) +b(a) +c(a)");
        pool.release(&first);
        // The other copies are held: these are of no use.
        assert_eq!((pool.0.free.len(), pool.events()), (2, String::new()));
        pool.release(&second);
        assert_eq!((pool.0.free.len(), pool.0.cached.len), (3, 1));
        pool.release(&third);
        // a, b and c are kept once, a released last: b goes first although c was held longer.
        assert_eq!((pool.0.free.len(), pool.found()), (3, "abc".into()));
        pool.allocate(6);
        assert_eq!(pool.events(), "-b -c -a");
        assert_eq!(pool.0.digest(), (0, BlockName([0; 16])));
    }

    #[test]
    fn a_block_waits_for_every_step_that_may_touch_it() {
        let mut pool = Lettered::new(3);
        let blocks = pool.chain("ab");
        let plain = pool.allocate(1);
        pool.0.step_submitted(StepNumber(1));
        pool.release(&blocks);
        pool.0.step_submitted(StepNumber(2));
        pool.release(&plain);
        assert_eq!((pool.0.available(), pool.0.in_limbo()), (0, 3));
        assert!(pool.allocate(1).is_empty());
        // It can be found meanwhile, and waits again when it is released again.
        pool.0.hold(blocks[0]);
        pool.release(&blocks[..1]);
        pool.0.step_collected(StepNumber(1));
        pool.0.check().unwrap();
        assert_eq!((pool.0.available(), pool.0.in_limbo()), (1, 2));
        pool.0.step_collected(StepNumber(2));
        pool.0.check().unwrap();
        assert_eq!((pool.0.available(), pool.0.in_limbo(), pool.found()), (3, 0, "ab".into()));
        assert_eq!(pool.0.free.len(), 1);
    }

    #[test]
    fn what_came_of_a_nan_leaves_with_all_behind_it_and_is_zeroed() {
        let mut pool = Lettered::new(8);
        let abc = pool.chain("abc");
        let xy = pool.chain("xy");
        pool.release(&xy);
        pool.release(&abc);
        let held: Vec<_> = abc.iter().take(2).copied().collect();
        held.iter().for_each(|block| pool.0.hold(*block));
        pool.events();
        pool.0.expel(&held[1..]);
        pool.0.check().unwrap();
        assert_eq!((pool.found(), pool.events()), ("axy".into(), "-b -c".into()));
        // Held still, it is not published again under the name that it had, nor is anything behind it.
        let next = pool.allocate(1)[0];
        pool.0.publish(next, 2, hash(b'b'), hash(b'd'), &tokens(b'd'));
        assert_eq!(pool.found(), "axy");
        pool.release(&held);
        let mut zeroes = Vec::new();
        while pool.0.allocate(&mut zeroes).is_some() {}
        assert_eq!(zeroes, [held[1]]);
        pool.0.release(held[1]);
        zeroes.clear();
        assert_eq!(pool.0.allocate(&mut zeroes), Some(held[1]));
        assert!(zeroes.is_empty(), "once is enough");
    }

    #[test]
    fn a_snapshot_says_parents_first_and_the_digest_is_that_of_its_names() {
        let mut pool = Lettered::new(6);
        let (abc, xy) = (pool.chain("abc"), pool.chain("xy"));
        pool.release(&abc[2..]);
        pool.release(&xy);
        let names: Vec<_> = pool.0.snapshot().iter().map(|(p, b)| (p.0[0], char::from(b.0[0]))).collect();
        assert_eq!(names, [(0, 'a'), (0, 'x'), (b'a', 'b'), (b'x', 'y'), (b'b', 'c')]);
        let expected = b"abcxy".iter().fold(0, |xor, letter| xor ^ letter);
        assert_eq!(pool.0.digest(), (5, BlockName([expected; 16])));
    }
}
