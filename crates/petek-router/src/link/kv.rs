//! One worker's KV events, message by message: when the router's view of its cache is whole, and when it has to be
//! asked for again, and from where.
//!
//! ```text
//!           subscribe, no resume                      subscribe after seq
//!   Empty ───────────────────────▶ Paging ──last──▶ Live ◀──────────────── Live, its stream ended or has a gap
//!     ▲     page 0                                   │ │
//!     └──── stray block, digest, epoch, nonsense ────┘ └─ heartbeat agrees: proof, the back-off starts anew
//! ```
//! Nothing here waits or is asked for twice in a row without a longer pause: see [`KvView::failures`].

use std::sync::Mutex;

use petek_core::hash::BlockName;
use petek_core::refusal::Refusal;
use petek_proto::blocks::{read_name, read_names};
use petek_proto::hello::WorkerIdentity;
use petek_proto::worker::v1::watch_kv_events_response::Body;
use petek_proto::worker::v1::{
    KvBatch, KvHeartbeat, KvResume, KvSnapshotPage, WatchKvEventsResponse, WorkerHello, kv_event::Kind,
};
use petek_service::KvRelapse;

use super::check_identity;
use crate::feed::WorkerEntry;
use crate::index::{Index, Stray, WorkerKey};
use crate::lock;

/// Blocks of a page that are taken while the index is locked: requests are placed in between.
const LOCKED_BLOCKS: usize = 1_024;

/// The router's view of one worker's cache, for one epoch of it.
#[derive(Debug)]
pub(crate) struct KvView {
    key: WorkerKey,
    phase: Phase,
    /// The last batch that is in the index.
    seq: u64,
    /// Subscriptions that ended since the last proof that all is well.
    failures: u32,
    /// Where the last gap was: a second one at the same place is not to be mended from the worker's ring.
    gap_after: Option<u64>,
    snapshots: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Subscribed, and not greeted yet. What the view was before.
    Ungreeted(Whole),
    /// A snapshot has to come.
    Empty,
    /// The next page.
    Paging(u32),
    Live,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whole {
    No,
    Yes,
}

/// What one message brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) batches: u64,
    /// Batches that were there already.
    pub(crate) repeated: u64,
    pub(crate) stored: u64,
    pub(crate) removed: u64,
    /// Blocks that were removed without being held.
    pub(crate) unknown: u64,
    /// Snapshots that became whole.
    pub(crate) snapshots: u64,
}

/// Why a subscription has to be made anew.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Relapse {
    /// Batches were lost on the way; the worker may still have them.
    #[error("batch {expected} was due, {got} came")]
    Gap { expected: u64, got: u64 },
    /// An event says what cannot be after those before it.
    #[error("{0}")]
    Stray(#[from] Stray),
    /// The worker holds something else than the index has.
    #[error("the digest differs: {ours} blocks here, {theirs} there")]
    Digest { ours: u64, theirs: u64 },
    /// What was missed is no more in the worker's ring.
    #[error("it cannot go on after batch {0}")]
    Behind(u64),
    /// It has started again.
    #[error("it is of epoch {theirs} now")]
    Epoch { theirs: u64 },
    /// No worker of petek says this, or it is not the worker that it should be.
    #[error("{0}")]
    Protocol(String),
    /// The stream broke or fell silent.
    #[error("{0}")]
    Lost(String),
}

impl Relapse {
    /// For the metrics.
    pub(crate) fn cause(&self) -> KvRelapse {
        match self {
            Relapse::Gap { .. } => KvRelapse::Gap,
            Relapse::Stray(_) => KvRelapse::Stray,
            Relapse::Digest { .. } => KvRelapse::Digest,
            Relapse::Behind(_) => KvRelapse::Behind,
            Relapse::Epoch { .. } => KvRelapse::Epoch,
            Relapse::Protocol(_) => KvRelapse::Protocol,
            Relapse::Lost(_) => KvRelapse::Lost,
        }
    }
}

impl From<Refusal> for Relapse {
    fn from(refusal: Refusal) -> Self {
        Relapse::Protocol(refusal.to_string())
    }
}

impl KvView {
    /// Of a worker that the index knows nothing of yet.
    pub(crate) fn new(key: WorkerKey) -> Self {
        KvView { key, phase: Phase::Empty, seq: 0, failures: 0, gap_after: None, snapshots: 0 }
    }

    /// The last batch that is in the index.
    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    /// Snapshots after the first one.
    pub(crate) fn resyncs(&self) -> u64 {
        self.snapshots.saturating_sub(1)
    }

    /// Subscriptions that ended since a heartbeat last agreed with the index: the pause before the next one doubles
    /// with each, so that nothing is asked for in a loop that leads nowhere.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Begins a subscription: where it goes on. None asks for a snapshot.
    pub(crate) fn subscribe(&mut self, entry: &WorkerEntry) -> Option<KvResume> {
        let is_whole = matches!(self.phase, Phase::Live | Phase::Ungreeted(Whole::Yes));
        let whole = if is_whole { Whole::Yes } else { Whole::No };
        self.phase = Phase::Ungreeted(whole);
        (whole == Whole::Yes).then_some(KvResume { epoch: entry.epoch.0, after_seq: self.seq })
    }

    /// Takes a message into the index.
    ///
    /// # Errors
    /// Why the subscription is to be made anew; [`KvView::relapse`] has to hear of it.
    pub(crate) fn hear(
        &mut self,
        entry: &WorkerEntry,
        index: &Mutex<Index>,
        message: WatchKvEventsResponse,
    ) -> Result<Taken, Relapse> {
        let WatchKvEventsResponse { worker, epoch, seq, body } = message;
        if epoch != entry.epoch.0 {
            return Err(Relapse::Epoch { theirs: epoch });
        }
        if worker != entry.id {
            return Err(Relapse::Protocol("another worker speaks".into()));
        }
        match (self.phase, body) {
            (Phase::Ungreeted(whole), Some(Body::Hello(hello))) => self.greeted(entry, hello, seq, whole),
            (Phase::Ungreeted(_), _) => Err(Relapse::Protocol("the first message must be a hello".into())),
            (_, Some(Body::Hello(_))) => Err(Relapse::Protocol("it greeted twice".into())),
            (Phase::Empty | Phase::Paging(_), Some(Body::Page(page))) => self.page(index, page, seq),
            (Phase::Live, Some(Body::Page(_))) => Err(Relapse::Behind(self.seq)),
            (Phase::Live, Some(Body::Batch(batch))) => self.batch(index, batch, seq),
            (_, Some(Body::Batch(_))) => Err(Relapse::Protocol("a batch came before the snapshot".into())),
            (Phase::Live, Some(Body::Heartbeat(heartbeat))) => self.heartbeat(index, heartbeat, seq),
            (Phase::Empty, Some(Body::Heartbeat(_))) => {
                Err(Relapse::Protocol("a heartbeat came before the snapshot".into()))
            }
            // In the middle of a snapshot there is nothing to compare. A newer worker may say more than is known here.
            (_, Some(Body::Heartbeat(_)) | None) => Ok(Taken::default()),
        }
    }

    /// Says that the subscription ended: decides whether what is known is still good.
    pub(crate) fn relapse(&mut self, index: &Mutex<Index>, why: &Relapse) {
        self.failures = self.failures.saturating_add(1);
        let was_live = matches!(self.phase, Phase::Live | Phase::Ungreeted(Whole::Yes));
        let is_good = was_live
            && match why {
                Relapse::Gap { .. } => self.gap_after.replace(self.seq) != Some(self.seq),
                Relapse::Lost(_) => true,
                _ => false,
            };
        if is_good {
            self.phase = Phase::Live;
        } else {
            self.phase = Phase::Empty;
            lock(index).begin_sync(self.key);
        }
    }

    fn greeted(
        &mut self,
        entry: &WorkerEntry,
        hello: WorkerHello,
        seq: u64,
        whole: Whole,
    ) -> Result<Taken, Relapse> {
        check_identity(entry, &WorkerIdentity::try_from(hello)?)?;
        self.phase = match whole {
            Whole::No => Phase::Empty,
            Whole::Yes if seq >= self.seq => Phase::Live,
            Whole::Yes => {
                let problem = format!("its last batch is {seq}, and it sent {} before", self.seq);
                return Err(Relapse::Protocol(problem));
            }
        };
        Ok(Taken::default())
    }

    fn page(&mut self, index: &Mutex<Index>, page: KvSnapshotPage, seq: u64) -> Result<Taken, Relapse> {
        let due = match self.phase {
            Phase::Paging(next) => next,
            _ => 0,
        };
        if page.page != due || (due > 0 && seq != self.seq) {
            let problem = format!("page {due} of {} was due, page {} of {seq} came", self.seq, page.page);
            return Err(Relapse::Protocol(problem));
        }
        if due == 0 {
            lock(index).begin_sync(self.key);
        }
        self.seq = seq;
        let pairs: Vec<(BlockName, BlockName)> = page.pairs()?.collect();
        for part in pairs.chunks(LOCKED_BLOCKS) {
            lock(index).stored_pairs(self.key, part.iter().copied())?;
        }
        self.phase = if page.last { Phase::Live } else { Phase::Paging(due + 1) };
        if page.last {
            lock(index).synced(self.key);
            self.snapshots += 1;
        }
        Ok(Taken { stored: pairs.len() as u64, snapshots: page.last.into(), ..Taken::default() })
    }

    fn batch(&mut self, index: &Mutex<Index>, batch: KvBatch, seq: u64) -> Result<Taken, Relapse> {
        if seq <= self.seq {
            return Ok(Taken { repeated: 1, ..Taken::default() });
        }
        let expected = self.seq + 1;
        if seq != expected {
            return Err(Relapse::Gap { expected, got: seq });
        }
        batch.check()?;
        let mut taken = Taken { batches: 1, ..Taken::default() };
        let mut index = lock(index);
        for event in batch.events {
            match event.kind {
                Some(Kind::Stored(stored)) => {
                    let parent = read_name("stored.parent", &stored.parent)?;
                    let blocks = read_names("stored.blocks", &stored.blocks)?;
                    taken.stored += blocks.len() as u64;
                    index.stored(self.key, parent, blocks)?;
                }
                Some(Kind::Removed(removed)) => {
                    let blocks = read_names("removed.blocks", &removed.blocks)?;
                    let named = blocks.len() as u64;
                    let unknown = index.removed(self.key, blocks);
                    taken.unknown += unknown;
                    taken.removed += named - unknown;
                }
                Some(Kind::Cleared(_)) => index.cleared(self.key),
                // The check has refused it.
                None => {}
            }
        }
        self.seq = seq;
        Ok(taken)
    }

    fn heartbeat(
        &mut self,
        index: &Mutex<Index>,
        heartbeat: KvHeartbeat,
        seq: u64,
    ) -> Result<Taken, Relapse> {
        if seq > self.seq {
            return Err(Relapse::Gap { expected: self.seq + 1, got: seq + 1 });
        }
        if seq < self.seq {
            return Err(Relapse::Protocol(format!(
                "its last batch is {seq}, and it sent {} before",
                self.seq
            )));
        }
        let digest: BlockName = read_name("heartbeat.digest", &heartbeat.digest)?;
        let held = lock(index).held(self.key);
        // Of what the index forgot it cannot say which blocks they were.
        if held.forgotten == 0 && (held.blocks, held.digest) != (heartbeat.blocks_held, digest) {
            return Err(Relapse::Digest { ours: held.blocks, theirs: heartbeat.blocks_held });
        }
        self.failures = 0;
        self.gap_after = None;
        Ok(Taken::default())
    }
}

#[cfg(test)]
#[path = "kv_tests.rs"]
mod tests;
