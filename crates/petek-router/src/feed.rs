//! What a router is told of workers: plain values through a channel. Whoever keeps the registry sends them; a router
//! does not care whether that is etcd or a list in memory.

use petek_core::hash::Revision;
use petek_core::ids::Epoch;
use petek_core::limits::engine::{BLOCK_TOKENS_MAX, BLOCK_TOKENS_MIN};
use petek_core::refusal::Refusal;
use petek_proto::worker::v1::WireRange;
use tokio::sync::watch;

/// Where a router learns of workers: always the whole list.
pub type WorkerFeed = watch::Receiver<WorkerList>;

/// All workers at one moment. The default is the empty list of a registry that was not reached yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerList {
    /// In any order; an id stands once.
    pub workers: Vec<WorkerEntry>,
    /// Whether this is how things are now.
    pub freshness: Freshness,
}

/// Whether a list of workers is how things are now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freshness {
    /// It is.
    Current,
    /// The registry is out of reach: it is how things were before, or empty at the start.
    #[default]
    Stale,
}

/// A worker's record. It is a hint: the worker's own first message decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEntry {
    /// Its id, given or host:port.
    pub id: String,
    /// Of its engine's start.
    pub epoch: Epoch,
    /// `host:port`, the best first.
    pub addresses: Vec<String>,
    /// What clients call its model.
    pub name: String,
    /// Of its model's files.
    pub revision: Revision,
    /// Of its model card.
    pub text_hash: [u8; 32],
    /// 32 hex digits.
    pub numerics_id: String,
    /// Tokens per block.
    pub block_size: u32,
    /// How blocks are hashed.
    pub hash_scheme: u32,
    /// What prompt and output of a request may have together there.
    pub context_tokens: u32,
    /// Blocks of its KV cache.
    pub blocks_total: u32,
    /// Its tensor-parallel degree.
    pub tp: u32,
    /// What it does: "generate".
    pub roles: Vec<String>,
    /// What it does with new work.
    pub state: WorkerState,
    /// The wire versions that it speaks.
    pub wire: WireRange,
    /// By its own clock; to be shown.
    pub started_unix_ms: u64,
}

/// What a worker does with new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    /// It takes none yet.
    Loading,
    /// It takes requests.
    Serving,
    /// It finishes what it has.
    Draining,
}

impl WorkerEntry {
    /// Checks what can be checked without the worker.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let bad = |problem: String| Err(Refusal::Protocol { problem });
        if self.id.is_empty() || self.name.is_empty() || self.addresses.is_empty() {
            return bad("a record needs an id, a name and an address".into());
        }
        let sizes = BLOCK_TOKENS_MIN..=BLOCK_TOKENS_MAX;
        if !self.block_size.is_power_of_two() || !sizes.contains(&self.block_size) {
            return bad(format!(
                "block size {} is no power of two from {BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}",
                { self.block_size }
            ));
        }
        if self.context_tokens < 2 {
            return bad(format!("a context of {} tokens holds no prompt and answer", self.context_tokens));
        }
        Ok(())
    }

    /// Whether another connection is needed for `other`, of the same id.
    pub(crate) fn is_elsewhere(&self, other: &WorkerEntry) -> bool {
        let whole = |entry: &WorkerEntry| WorkerEntry { state: WorkerState::Serving, ..entry.clone() };
        whole(self) != whole(other)
    }
}
