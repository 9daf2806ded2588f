use std::collections::{HashMap, VecDeque};

use petek_core::hash::Revision;
use petek_core::ids::Epoch;
use petek_proto::blocks::write_names;
use petek_proto::hello::WIRE;
use petek_proto::worker::v1::{KvCleared, KvEvent, KvRemoved, KvStored};

use super::*;
use crate::draw::{Draw, Forest, block_name};
use crate::feed::WorkerState;

/// A worker's cache and the batches that it still has, as blocks by number.
struct Pool {
    entry: WorkerEntry,
    forest: Forest,
    /// In the order in which they were stored.
    held: Vec<usize>,
    children: HashMap<usize, usize>,
    /// What no batch has yet, each with the number of blocks that it names.
    events: VecDeque<(usize, KvEvent)>,
    seq: u64,
    ring: VecDeque<(u64, KvBatch)>,
    ring_max: usize,
    page_blocks: usize,
}

impl Pool {
    fn new(forest: Forest, epoch: u64) -> Self {
        let entry = WorkerEntry {
            id: "w".into(),
            epoch: Epoch(epoch),
            addresses: vec!["127.0.0.1:1".into()],
            name: "m".into(),
            revision: Revision([1; 32]),
            text_hash: [2; 32],
            numerics_id: "n".into(),
            block_size: 16,
            hash_scheme: 1,
            context_tokens: 64,
            blocks_total: 8,
            tp: 1,
            roles: vec![],
            state: WorkerState::Serving,
            wire: WIRE,
            started_unix_ms: 0,
        };
        Pool {
            entry,
            forest,
            held: Vec::new(),
            children: HashMap::new(),
            events: VecDeque::new(),
            seq: 0,
            ring: VecDeque::new(),
            ring_max: 12,
            page_blocks: 100,
        }
    }

    /// Stores the chain that ends with a block: what of it is not held. Returns how many that were.
    fn store(&mut self, at: usize) -> usize {
        let chain = self.forest.path(at, usize::MAX);
        let fresh: Vec<usize> = chain.iter().copied().filter(|at| !self.held.contains(at)).collect();
        for part in fresh.chunks(100) {
            let parent = self.forest.0[part[0]].map_or(BlockName::ROOT, block_name);
            let blocks = write_names(part.iter().map(|at| block_name(*at)));
            let stored = KvStored { parent: parent.0.to_vec().into(), blocks };
            self.events.push_back((part.len(), KvEvent { kind: Some(Kind::Stored(stored)) }));
        }
        for &block in &fresh {
            if let Some(parent) = self.forest.0[block] {
                *self.children.entry(parent).or_default() += 1;
            }
        }
        self.held.extend(&fresh);
        fresh.len()
    }

    /// Evicts blocks without children. Returns how many.
    fn evict(&mut self, most: usize) -> usize {
        let mut evicted = Vec::new();
        while evicted.len() < most
            && let Some(place) =
                self.held.iter().position(|at| self.children.get(at).is_none_or(|children| *children == 0))
        {
            let block = self.held.remove(place);
            if let Some(parent) = self.forest.0[block] {
                *self.children.entry(parent).or_default() -= 1;
            }
            evicted.push(block);
        }
        let blocks = write_names(evicted.iter().map(|at| block_name(*at)));
        let removed = Kind::Removed(KvRemoved { blocks });
        self.events.push_back((evicted.len(), KvEvent { kind: Some(removed) }));
        evicted.len()
    }

    fn clear(&mut self) {
        self.held.clear();
        self.children.clear();
        self.events.push_back((0, KvEvent { kind: Some(Kind::Cleared(KvCleared {})) }));
    }

    fn message(&self, seq: u64, body: Body) -> WatchKvEventsResponse {
        let (worker, epoch) = (self.entry.id.clone(), self.entry.epoch.0);
        WatchKvEventsResponse { worker, epoch, seq, body: Some(body) }
    }

    /// The next batch: what happened since the last one, as much of it as one may hold.
    fn batch(&mut self) -> WatchKvEventsResponse {
        let (mut batch, mut named) = (KvBatch::default(), 0);
        while let Some((blocks, event)) = self.events.pop_front_if(|(blocks, _)| named + *blocks <= 256) {
            named += blocks;
            batch.events.push(event);
        }
        self.seq += 1;
        self.ring.push_back((self.seq, batch.clone()));
        if self.ring.len() > self.ring_max {
            self.ring.pop_front();
        }
        self.message(self.seq, Body::Batch(batch))
    }

    fn digest(&self) -> BlockName {
        let sum = self.held.iter().fold(0, |sum, at| sum ^ u128::from_le_bytes(block_name(*at).0));
        BlockName(sum.to_le_bytes())
    }

    fn heartbeat(&self) -> WatchKvEventsResponse {
        let digest = self.digest().0.to_vec().into();
        self.message(self.seq, Body::Heartbeat(KvHeartbeat { blocks_held: self.held.len() as u64, digest }))
    }

    /// What a subscription begins with.
    fn answer(&self, resume: Option<KvResume>) -> VecDeque<WatchKvEventsResponse> {
        let hello = WorkerHello::from(WorkerIdentity {
            worker: self.entry.id.clone(),
            epoch: self.entry.epoch,
            revision: self.entry.revision,
            text_hash: self.entry.text_hash,
            block_size: self.entry.block_size,
            numerics_id: self.entry.numerics_id.clone(),
            wire: 1,
        });
        let mut messages = VecDeque::from([self.message(self.seq, Body::Hello(hello))]);
        let oldest = self.ring.front().map_or(self.seq + 1, |(seq, _)| *seq);
        if let Some(KvResume { epoch, after_seq }) = resume
            && epoch == self.entry.epoch.0
            && after_seq + 1 >= oldest
        {
            let missed = self.ring.iter().filter(|(seq, _)| *seq > after_seq);
            messages.extend(missed.map(|(seq, batch)| self.message(*seq, Body::Batch(batch.clone()))));
            return messages;
        }
        let parent = |at: &usize| self.forest.0[*at].map_or(BlockName::ROOT, block_name);
        let mut pages: Vec<&[usize]> = self.held.chunks(self.page_blocks).collect();
        if pages.is_empty() {
            pages.push(&[]);
        }
        for (page, blocks) in pages.iter().enumerate() {
            let page = KvSnapshotPage {
                page: page as u32,
                last: page + 1 == pages.len(),
                parents: write_names(blocks.iter().map(parent)),
                blocks: write_names(blocks.iter().map(|at| block_name(*at))),
            };
            messages.push_back(self.message(self.seq, Body::Page(page)));
        }
        messages
    }
}

/// One worker and the router's view of it.
struct Pair<'a> {
    index: &'a Mutex<Index>,
    pool: Pool,
    view: KvView,
    /// On their way.
    wire: VecDeque<WatchKvEventsResponse>,
    relapses: Vec<KvRelapse>,
}

impl<'a> Pair<'a> {
    fn new(index: &'a Mutex<Index>, pool: Pool) -> Self {
        let view = KvView::new(lock(index).add_worker());
        let mut pair = Pair { index, pool, view, wire: VecDeque::new(), relapses: Vec::new() };
        pair.subscribe();
        pair
    }

    fn subscribe(&mut self) {
        let resume = self.view.subscribe(&self.pool.entry);
        self.wire = self.pool.answer(resume);
    }

    /// Takes the next message in, and subscribes anew where that is called for.
    fn hear_one(&mut self) {
        let Some(message) = self.wire.pop_front() else { return };
        if let Err(why) = self.view.hear(&self.pool.entry, self.index, message) {
            self.relapse(why);
        }
    }

    fn relapse(&mut self, why: Relapse) {
        self.relapses.push(why.cause());
        self.view.relapse(self.index, &why);
        self.subscribe();
    }

    fn hear_all(&mut self) {
        let before = self.relapses.len();
        while !self.wire.is_empty() {
            self.hear_one();
            assert!(self.relapses.len() < before + 10, "it leads nowhere: {:?}", self.relapses);
        }
    }

    /// Sends what has happened: a batch at least.
    fn say(&mut self) {
        loop {
            let batch = self.pool.batch();
            self.wire.push_back(batch);
            if self.pool.events.is_empty() {
                return;
            }
        }
    }

    /// The worker starts again, and its record is new.
    fn restart(&mut self) {
        lock(self.index).remove_worker(self.view.key);
        let (forest, epoch) = (Forest(self.pool.forest.0.clone()), self.pool.entry.epoch.0 + 1);
        let mut unread = std::mem::take(&mut self.wire);
        let entry = self.pool.entry.clone();
        // What was still unread is heard under the key that is void.
        while let Some(message) = unread.pop_front() {
            if let Err(why) = self.view.hear(&entry, self.index, message) {
                self.view.relapse(self.index, &why);
                break;
            }
        }
        self.pool = Pool::new(forest, epoch);
        self.view = KvView::new(lock(self.index).add_worker());
        self.subscribe();
    }

    /// Without faults from now on, a few heartbeats make it whole.
    fn settle(&mut self) {
        self.say();
        for _ in 0..4 {
            self.hear_all();
            self.wire.push_back(self.pool.heartbeat());
        }
        self.hear_all();
        assert_eq!(self.view.failures(), 0, "{:?}", self.relapses);
    }

    /// The index has what the worker holds, block by block.
    fn check(&self) {
        let mut index = lock(self.index);
        let (key, held) = (self.view.key, index.held(self.view.key));
        assert!(index.is_synced(key));
        assert_eq!((held.blocks, held.digest), (self.pool.held.len() as u64, self.pool.digest()));
        for at in 0..self.pool.forest.0.len() {
            let chain = self.pool.forest.path(at, usize::MAX);
            let names: Vec<BlockName> = chain.iter().map(|at| block_name(*at)).collect();
            let leading = chain.iter().take_while(|at| self.pool.held.contains(at)).count();
            assert_eq!(index.matches(&names, std::time::Duration::ZERO).of(key).blocks as usize, leading);
        }
    }
}

fn chain(blocks: usize) -> Forest {
    Forest((0..blocks).map(|at| at.checked_sub(1)).collect())
}

fn index() -> Mutex<Index> {
    Mutex::new(Index::new(64 << 20))
}

#[test]
fn a_lost_batch_is_fetched_from_the_ring() {
    let index = index();
    let mut pair = Pair::new(&index, Pool::new(chain(100), 1));
    pair.hear_all();
    for at in [10, 20, 30] {
        pair.pool.store(at);
        pair.say();
    }
    pair.wire.remove(1);
    pair.settle();
    pair.check();
    assert_eq!((&pair.relapses[..], pair.view.resyncs()), (&[KvRelapse::Gap][..], 0));
    // Twice is once.
    let again = pair.pool.answer(Some(KvResume { epoch: 1, after_seq: 1 })).split_off(1);
    for message in again {
        assert_eq!(
            pair.view.hear(&pair.pool.entry, &index, message).unwrap(),
            Taken { repeated: 1, ..Taken::default() }
        );
    }
    pair.check();
}

#[test]
fn a_gap_that_only_a_heartbeat_shows_is_one() {
    let index = index();
    let mut pair = Pair::new(&index, Pool::new(chain(100), 1));
    pair.hear_all();
    pair.pool.store(50);
    pair.say();
    pair.wire.clear();
    pair.settle();
    pair.check();
    assert_eq!(pair.relapses, [KvRelapse::Gap]);
}

#[test]
fn what_the_ring_no_longer_has_comes_as_a_snapshot() {
    let index = index();
    let mut pair = Pair::new(&index, Pool::new(chain(500), 1));
    pair.hear_all();
    for at in 0..30 {
        pair.pool.store(10 * at);
        pair.say();
    }
    pair.wire.drain(..20);
    pair.settle();
    pair.check();
    assert_eq!((&pair.relapses[..], pair.view.resyncs()), (&[KvRelapse::Gap, KvRelapse::Behind][..], 1));
}

#[test]
fn a_digest_that_differs_asks_for_a_snapshot() {
    let index = index();
    let mut pair = Pair::new(&index, Pool::new(chain(500), 1));
    pair.pool.store(300);
    pair.say();
    pair.hear_all();
    // As if an event had been applied wrongly.
    lock(&index).removed(pair.view.key, [block_name(300)].into_iter());
    pair.settle();
    pair.check();
    assert_eq!((&pair.relapses[..], pair.view.resyncs()), (&[KvRelapse::Digest][..], 1));
}

#[test]
fn a_worker_that_never_agrees_is_asked_less_and_less() {
    let index = index();
    let mut pair = Pair::new(&index, Pool::new(chain(50), 1));
    pair.pool.store(40);
    pair.say();
    for failures in 1..20 {
        pair.hear_all();
        let liar = pair.pool.message(pair.pool.seq, Body::Heartbeat(KvHeartbeat::default()));
        let wrong = pair.pool.message(
            pair.pool.seq,
            Body::Heartbeat(KvHeartbeat { blocks_held: 3, digest: vec![0; 16].into() }),
        );
        pair.wire.push_back(if failures % 2 == 0 { liar } else { wrong });
        while pair.view.failures() < failures {
            pair.hear_one();
        }
        assert_eq!(pair.view.failures(), failures);
    }
    pair.settle();
    pair.check();
}

#[test]
fn a_gap_at_the_same_place_twice_is_not_mended_from_the_ring() {
    let index = index();
    let mut pair = Pair::new(&index, Pool::new(chain(100), 1));
    pair.hear_all();
    pair.pool.store(10);
    pair.say();
    pair.hear_all();
    for _ in 0..2 {
        pair.pool.store(20);
        pair.pool.batch();
        pair.pool.store(30);
        pair.say();
        // The ring's answer loses the same batch.
        if pair.relapses.len() == 1 {
            pair.wire.remove(1);
        }
        while pair.wire.len() > 1 {
            pair.hear_one();
        }
        pair.hear_one();
        if pair.relapses.len() == 1 {
            pair.wire.remove(1);
        }
    }
    pair.settle();
    pair.check();
    assert_eq!(pair.relapses[..2], [KvRelapse::Gap; 2]);
    assert_eq!(pair.view.resyncs(), 1);
}

#[test]
fn what_no_worker_says_is_refused_and_the_view_dropped() {
    let index = index();
    let check = |change: &dyn Fn(&mut Pair<'_>), cause: KvRelapse| {
        let mut pair = Pair::new(&index, Pool::new(chain(500), 7));
        pair.pool.store(300);
        pair.pool.batch();
        pair.subscribe();
        change(&mut pair);
        while pair.relapses.is_empty() && !pair.wire.is_empty() {
            pair.hear_one();
        }
        assert_eq!(pair.relapses, [cause]);
        assert!(!lock(&index).is_synced(pair.view.key));
        pair.settle();
        pair.check();
    };
    use KvRelapse::{Epoch, Protocol, Stray};
    check(&|pair| drop(pair.wire.pop_front()), Protocol);
    check(&|pair| pair.wire[0].epoch = 8, Epoch);
    check(&|pair| pair.wire[0].worker = "v".into(), Protocol);
    check(&|pair| drop(pair.wire.remove(1)), Protocol);
    check(&|pair| drop(pair.wire.remove(2)), Protocol);
    check(&|pair| pair.wire[2].seq += 1, Protocol);
    check(&|pair| pair.wire.swap(1, 2), Protocol);
    let beats = |pair: &mut Pair<'_>| {
        pair.wire.truncate(1);
        pair.wire.push_back(pair.pool.heartbeat());
    };
    check(&beats, Protocol);
    // A page whose first block's parent is on no page before.
    let stray = |pair: &mut Pair<'_>| {
        let Some(Body::Page(page)) = &mut pair.wire[1].body else { panic!("a page is due") };
        page.parents = page.parents.slice(16..);
        page.blocks = page.blocks.slice(16..);
    };
    check(&stray, Stray);
}

/// A million events over wires that lose, repeat and swap batches, break, and lead to workers that restart: whatever
/// happens, when it is quiet the index has what each worker holds.
#[test]
#[expect(clippy::print_stdout, reason = "a test that fails shows its seed and what it drew")]
fn a_million_events_over_bad_wires_end_in_the_truth() {
    const EVENTS: usize = 1_000_000;
    const WORKERS: usize = 5;
    const NAMES: usize = 400;
    let mut draw = Draw::announced("a_million_events_over_bad_wires_end_in_the_truth", 5);
    let index = index();
    let forest = Forest::drawn(&mut draw, NAMES);
    let pool = |number: usize| Pool::new(Forest(forest.0.clone()), 1_000 * number as u64);
    let mut pairs: Vec<Pair<'_>> = (0..WORKERS).map(|number| Pair::new(&index, pool(number))).collect();
    let (mut events, mut settled) = (0, 0);
    let mut causes: HashMap<&'static str, usize> = HashMap::new();
    while events < EVENTS {
        let pair = draw.below(WORKERS);
        let pair = &mut pairs[pair];
        for _ in 0..1 + draw.below(3) {
            events += if draw.one_in(2) {
                pair.pool.store(draw.below(NAMES))
            } else {
                pair.pool.evict(1 + draw.below(60))
            };
        }
        if draw.one_in(500) {
            pair.pool.clear();
        }
        pair.say();
        if draw.one_in(20) {
            pair.wire.push_back(pair.pool.heartbeat());
        }
        let waiting = pair.wire.len();
        match draw.below(150) {
            0 => pair.restart(),
            1 => pair.relapse(Relapse::Lost("cut".into())),
            2..5 => drop(pair.wire.remove(draw.below(waiting))),
            5..8 => {
                let at = draw.below(waiting);
                let again = pair.wire[at].clone();
                pair.wire.insert(at, again);
            }
            8..11 => {
                let at = draw.below(waiting);
                pair.wire.swap(at, waiting - 1);
            }
            11 => {
                // Late by more than the ring.
                for _ in 0..20 {
                    events += pair.pool.store(draw.below(NAMES));
                    pair.say();
                }
                pair.wire.clear();
            }
            _ => {}
        }
        for _ in 0..draw.below(4) {
            pair.hear_one();
        }
        if draw.one_in(400) {
            pairs.iter_mut().for_each(Pair::settle);
            pairs.iter().for_each(Pair::check);
            lock(&index).sweep(10_000);
            settled += 1;
            for cause in pairs.iter_mut().flat_map(|pair| pair.relapses.drain(..)) {
                *causes.entry(petek_service::Label::text(cause)).or_default() += 1;
            }
        }
    }
    println!("{events} events, quiet {settled} times, relapses {causes:?}");
    assert!(["gap", "behind", "protocol", "lost"].iter().all(|cause| causes[cause] > 10), "{causes:?}");
}
