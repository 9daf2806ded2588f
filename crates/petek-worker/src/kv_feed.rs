//! The changes of the prefix cache on their way to routers: numbered batches, the last of them kept for whoever
//! missed some.
//!
//! ```text
//!  engine ──events of a step──▶ Batcher ──≤ 5 ms, ≤ 256 blocks──▶ KvFeed: ring of batches ──▶ one task per router
//! ```
//! The digest is made of the batches themselves: what it says at batch S is true of whoever applied all up to S.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use petek_core::hash::BlockName;
use petek_core::limits::link::KV_BATCH_BLOCKS_MAX;
use petek_core::pool::KvEvent;
use petek_proto::blocks::write_names;
use petek_proto::worker::v1::kv_event::Kind;
use petek_proto::worker::v1::{KvBatch, KvEvent as WireEvent, KvRemoved, KvStored};
use prost::bytes::Bytes;
use tokio::sync::watch;

/// All blocks that can be found, as of one batch.
#[derive(Clone, Debug)]
pub(crate) struct KvSnapshot {
    /// The last batch that it includes.
    pub(crate) seq: u64,
    /// (parent, block), parents first.
    pub(crate) blocks: Arc<[(BlockName, BlockName)]>,
}

/// What is held as of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvHeld {
    pub(crate) seq: u64,
    pub(crate) blocks: u64,
    /// XOR of their names.
    pub(crate) digest: [u8; 16],
}

/// What comes after a batch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KvNext {
    /// The batch of this number.
    Batch(u64, KvBatch),
    /// Nothing yet.
    CaughtUp(KvHeld),
    /// It is not kept any more, or never was: a snapshot is due.
    Gone,
}

/// The ring of batches. The engine writes it; each router's task reads at its own pace.
#[derive(Debug)]
pub(crate) struct KvFeed {
    ring: Mutex<Ring>,
    last_seq: watch::Sender<u64>,
}

#[derive(Debug)]
struct Ring {
    /// The numbers up to `held.seq`, without a gap.
    batches: VecDeque<KvBatch>,
    batches_max: usize,
    held: KvHeld,
}

impl KvFeed {
    /// Nothing is held, and batch 0 is the last one.
    pub(crate) fn new(batches_max: usize) -> Arc<Self> {
        let held = KvHeld { seq: 0, blocks: 0, digest: [0; 16] };
        let ring = Ring { batches: VecDeque::new(), batches_max, held };
        Arc::new(KvFeed { ring: Mutex::new(ring), last_seq: watch::Sender::new(0) })
    }

    /// What comes after batch `after`.
    pub(crate) fn next(&self, after: u64) -> KvNext {
        let ring = self.lock();
        let last = ring.held.seq;
        let Some(behind) = last.checked_sub(after) else { return KvNext::Gone };
        if behind == 0 {
            return KvNext::CaughtUp(ring.held);
        }
        let kept = ring.batches.len() as u64;
        match kept.checked_sub(behind).and_then(|at| ring.batches.get(at as usize)) {
            Some(batch) => KvNext::Batch(after + 1, batch.clone()),
            None => KvNext::Gone,
        }
    }

    /// What is held now.
    pub(crate) fn held(&self) -> KvHeld {
        self.lock().held
    }

    /// The number of the last batch, as it grows.
    pub(crate) fn last_seq(&self) -> watch::Receiver<u64> {
        self.last_seq.subscribe()
    }

    fn append(&self, events: &[KvEvent]) {
        let batch = encode(events);
        let mut ring = self.lock();
        for event in events {
            let (KvEvent::Stored { block, .. } | KvEvent::Removed { block }) = event;
            ring.held.digest.iter_mut().zip(block.0).for_each(|(sum, byte)| *sum ^= byte);
            match event {
                KvEvent::Stored { .. } => ring.held.blocks += 1,
                KvEvent::Removed { .. } => ring.held.blocks -= 1,
            }
        }
        ring.held.seq += 1;
        if ring.batches.len() == ring.batches_max {
            ring.batches.pop_front();
        }
        ring.batches.push_back(batch);
        let seq = ring.held.seq;
        drop(ring);
        self.last_seq.send_replace(seq);
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's end of a feed: gathers events into batches.
#[derive(Debug)]
pub(crate) struct KvBatcher {
    feed: Arc<KvFeed>,
    window: Duration,
    open: Vec<KvEvent>,
    /// When the first of `open` came.
    since: Duration,
}

impl KvBatcher {
    /// Events within `window` go into one batch.
    pub(crate) fn new(feed: Arc<KvFeed>, window: Duration) -> Self {
        KvBatcher { feed, window, open: Vec::with_capacity(KV_BATCH_BLOCKS_MAX), since: Duration::ZERO }
    }

    /// Takes one event in.
    pub(crate) fn push(&mut self, event: KvEvent, now: Duration) {
        self.flush_by(now);
        if self.open.is_empty() {
            self.since = now;
        }
        self.open.push(event);
        if self.open.len() == KV_BATCH_BLOCKS_MAX {
            self.flush();
        }
    }

    /// Sends off what would be older than a batch may be at `then`, when the next events may come.
    pub(crate) fn flush_by(&mut self, then: Duration) {
        if then >= self.since + self.window {
            self.flush();
        }
    }

    /// What the batches sent off so far say is held.
    pub(crate) fn held(&self) -> KvHeld {
        self.feed.held()
    }

    /// Sends off what there is.
    pub(crate) fn flush(&mut self) {
        if !self.open.is_empty() {
            self.feed.append(&self.open);
            self.open.clear();
        }
    }
}

/// Events as they travel: runs of one kind are one event, a chain is named by its parent once.
fn encode(events: &[KvEvent]) -> KvBatch {
    let follows = |a: &KvEvent, b: &KvEvent| match (a, b) {
        (KvEvent::Stored { block, .. }, KvEvent::Stored { parent, .. }) => block == parent,
        (KvEvent::Removed { .. }, KvEvent::Removed { .. }) => true,
        _ => false,
    };
    let run = |run: &[KvEvent]| {
        let name = |event: &KvEvent| match event {
            KvEvent::Stored { block, .. } | KvEvent::Removed { block } => *block,
        };
        let blocks = write_names(run.iter().map(name));
        let kind = match run[0] {
            KvEvent::Stored { parent, .. } => {
                Kind::Stored(KvStored { parent: Bytes::copy_from_slice(&parent.0), blocks })
            }
            KvEvent::Removed { .. } => Kind::Removed(KvRemoved { blocks }),
        };
        WireEvent { kind: Some(kind) }
    };
    KvBatch { events: events.chunk_by(follows).map(run).collect() }
}

#[cfg(test)]
mod tests {
    use petek_proto::blocks::read_names;

    use super::*;

    fn name(i: u64) -> BlockName {
        BlockName(std::array::from_fn(|at| (i >> (8 * (at % 8))) as u8))
    }

    fn stored(parent: u64, block: u64) -> KvEvent {
        let parent = if parent == 0 { BlockName::ROOT } else { name(parent) };
        KvEvent::Stored { parent, block: name(block) }
    }

    fn removed(block: u64) -> KvEvent {
        KvEvent::Removed { block: name(block) }
    }

    fn batcher(batches_max: usize) -> (KvBatcher, Arc<KvFeed>) {
        let feed = KvFeed::new(batches_max);
        (KvBatcher::new(feed.clone(), Duration::from_millis(5)), feed)
    }

    #[test]
    fn runs_of_one_kind_are_one_event_and_say_the_same() {
        let events =
            [stored(0, 1), stored(1, 2), stored(2, 3), stored(2, 4), removed(3), removed(9), stored(0, 5)];
        let batch = encode(&events);
        assert_eq!((batch.events.len(), batch.check()), (4, Ok(events.len())));
        let mut back = Vec::new();
        for event in &batch.events {
            match event.kind.as_ref().unwrap() {
                Kind::Stored(KvStored { parent, blocks }) => {
                    let mut parent = petek_proto::blocks::read_name("parent", parent).unwrap();
                    for block in read_names("blocks", blocks).unwrap() {
                        back.push(KvEvent::Stored { parent, block });
                        parent = block;
                    }
                }
                Kind::Removed(KvRemoved { blocks }) => {
                    back.extend(
                        read_names("blocks", blocks).unwrap().map(|block| KvEvent::Removed { block }),
                    );
                }
                Kind::Cleared(_) => panic!("nothing was cleared"),
            }
        }
        assert_eq!(back, events);
    }

    #[test]
    fn a_batch_is_of_five_milliseconds_or_256_blocks() {
        let (mut batcher, feed) = batcher(8);
        let ms = Duration::from_millis;
        batcher.push(stored(0, 1), ms(10));
        batcher.flush_by(ms(14));
        batcher.push(stored(1, 2), ms(14));
        assert_eq!(feed.held().seq, 0, "still open");
        batcher.push(stored(2, 3), ms(15));
        assert_eq!((feed.held().seq, feed.held().blocks), (1, 2));
        batcher.flush_by(ms(20));
        assert_eq!((feed.held().seq, feed.held().blocks), (2, 3));
        batcher.flush();
        assert_eq!(feed.held().seq, 2, "an empty batch is none");
        (0..600).for_each(|i| batcher.push(stored(0, 100 + i), ms(30)));
        assert_eq!((feed.held().seq, feed.held().blocks), (4, 3 + 512));
    }

    #[test]
    fn the_ring_gives_what_it_has_and_says_what_it_has_not() {
        let (mut batcher, feed) = batcher(3);
        let mut at = |seq: u64| {
            batcher.push(stored(0, seq), Duration::ZERO);
            batcher.flush();
        };
        assert!(matches!(feed.next(0), KvNext::CaughtUp(KvHeld { seq: 0, blocks: 0, .. })));
        (1..=5).for_each(&mut at);
        let gives = |after: u64| match feed.next(after) {
            KvNext::Batch(seq, batch) => {
                assert_eq!(batch, encode(&[stored(0, seq)]));
                Some(seq)
            }
            KvNext::CaughtUp(held) => {
                assert_eq!(held.digest, name((1..=5).fold(0, |sum, i| sum ^ i)).0);
                None
            }
            KvNext::Gone => Some(0),
        };
        let all: Vec<_> = (0..=6).map(gives).collect();
        assert_eq!(all, [Some(0), Some(0), Some(3), Some(4), Some(5), None, Some(0)]);
    }
}
