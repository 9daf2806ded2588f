//! Who is at the other end: versions of the wire, and a worker's first message read with care.

use petek_core::hash::{HASH_SCHEME, Revision};
use petek_core::ids::Epoch;
use petek_core::limits::engine::{BLOCK_TOKENS_MAX, BLOCK_TOKENS_MIN};
use petek_core::refusal::Refusal;

use crate::worker::v1::{RouterHello, WireRange, WorkerHello};

/// The versions of the wire that this build speaks, both included. A version is raised when an old reader
/// would misread what a new writer sends; new fields that it may skip raise nothing.
pub const WIRE: WireRange = WireRange { min: 1, max: 1 };

/// The metadata key under which every call between router and worker carries the cluster's token.
pub const CLUSTER_TOKEN_KEY: &str = "petek-cluster-token";

impl WireRange {
    /// The newest version that both ranges hold.
    ///
    /// # Errors
    /// `PeerMismatch` with both ranges where they do not meet.
    pub fn meet(&self, theirs: &WireRange) -> Result<u32, Refusal> {
        let newest = self.max.min(theirs.max);
        if newest >= self.min.max(theirs.min) {
            return Ok(newest);
        }
        let said = |range: &WireRange| format!("{} to {}", range.min, range.max);
        Err(Refusal::PeerMismatch { what: "wire version", ours: said(self), theirs: said(theirs) })
    }
}

/// What a worker's first message says, checked by itself. Whether it is what the worker's record says is for
/// the router to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerIdentity {
    /// Its id.
    pub worker: String,
    /// Of its engine's start.
    pub epoch: Epoch,
    /// Of its model's files.
    pub revision: Revision,
    /// Of its model card.
    pub text_hash: [u8; 32],
    /// Tokens per block.
    pub block_size: u32,
    /// Workers of equal ones give equal bits.
    pub numerics_id: String,
    /// The version of the wire to speak with it.
    pub wire: u32,
}

impl TryFrom<WorkerHello> for WorkerIdentity {
    type Error = Refusal;

    /// # Errors
    /// `PeerMismatch` for another wire or hash scheme, `Protocol` for what cannot be.
    fn try_from(hello: WorkerHello) -> Result<Self, Refusal> {
        let wire = WIRE.meet(&hello.wire.unwrap_or_default())?;
        if hello.hash_scheme != HASH_SCHEME {
            return Err(Refusal::PeerMismatch {
                what: "hash scheme",
                ours: HASH_SCHEME.to_string(),
                theirs: hello.hash_scheme.to_string(),
            });
        }
        let block_size = hello.block_size_tokens;
        if !block_size.is_power_of_two() || !(BLOCK_TOKENS_MIN..=BLOCK_TOKENS_MAX).contains(&block_size) {
            return Err(protocol(format!(
                "hello.block_size_tokens must be a power of two from {BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}, \
                 not {block_size}"
            )));
        }
        if hello.worker.is_empty() {
            return Err(protocol("hello.worker must not be empty".into()));
        }
        Ok(WorkerIdentity {
            worker: hello.worker,
            epoch: Epoch(hello.epoch),
            revision: Revision(fixed("hello.revision", &hello.revision)?),
            text_hash: fixed("hello.text_hash", &hello.text_hash)?,
            block_size,
            numerics_id: hello.numerics_id,
            wire,
        })
    }
}

impl From<WorkerIdentity> for WorkerHello {
    /// Says the whole range of this build, whatever version was agreed on elsewhere.
    fn from(identity: WorkerIdentity) -> Self {
        WorkerHello {
            worker: identity.worker,
            epoch: identity.epoch.0,
            revision: identity.revision.0.to_vec().into(),
            text_hash: identity.text_hash.to_vec().into(),
            block_size_tokens: identity.block_size,
            hash_scheme: HASH_SCHEME,
            wire: Some(WIRE),
            numerics_id: identity.numerics_id,
        }
    }
}

impl RouterHello {
    /// The version of the wire to speak with this router.
    ///
    /// # Errors
    /// `PeerMismatch` for another wire, `Protocol` where the router does not number its stream.
    pub fn check(&self) -> Result<u32, Refusal> {
        if self.stream == 0 {
            return Err(protocol("hello.stream counts from 1".into()));
        }
        WIRE.meet(&self.wire.unwrap_or_default())
    }
}

/// Exactly `N` bytes.
///
/// # Errors
/// `Protocol` that names `field` and its length.
pub(crate) fn fixed<const N: usize>(field: &str, bytes: &[u8]) -> Result<[u8; N], Refusal> {
    bytes.try_into().map_err(|_| protocol(format!("{field} must have {N} bytes, not {}", bytes.len())))
}

pub(crate) fn protocol(problem: String) -> Refusal {
    Refusal::Protocol { problem }
}

#[cfg(test)]
mod tests {
    use petek_core::refusal::Reason;
    use prost::Message;

    use super::*;

    fn identity() -> WorkerIdentity {
        WorkerIdentity {
            worker: "10.0.0.7:7070".into(),
            epoch: Epoch(u64::MAX - 1),
            revision: Revision([7; 32]),
            text_hash: [8; 32],
            block_size: 32,
            numerics_id: "00ff".repeat(8),
            wire: 1,
        }
    }

    #[test]
    fn a_hello_comes_back_as_it_was() {
        let bytes = WorkerHello::from(identity()).encode_to_vec();
        let read = WorkerHello::decode(&bytes[..]).unwrap();
        assert_eq!(WorkerIdentity::try_from(read), Ok(identity()));
    }

    #[test]
    fn a_hello_that_cannot_be_is_refused_by_what_is_wrong() {
        let check = |change: fn(&mut WorkerHello), reason: Reason, says: &str| {
            let mut hello = WorkerHello::from(identity());
            change(&mut hello);
            let refusal = WorkerIdentity::try_from(hello).expect_err(says);
            assert_eq!(refusal.reason(), reason);
            assert!(refusal.to_string().contains(says), "{refusal}");
        };
        check(|h| h.wire = None, Reason::PeerMismatch, "wire version: ours is 1 to 1, the peer's 0 to 0");
        check(|h| h.wire = Some(WireRange { min: 2, max: 3 }), Reason::PeerMismatch, "the peer's 2 to 3");
        check(|h| h.hash_scheme = 2, Reason::PeerMismatch, "hash scheme: ours is 1, the peer's 2");
        check(|h| h.block_size_tokens = 48, Reason::Protocol, "a power of two from 16 to 256, not 48");
        check(|h| h.block_size_tokens = 8, Reason::Protocol, "a power of two from 16 to 256, not 8");
        check(|h| h.block_size_tokens = 512, Reason::Protocol, "a power of two from 16 to 256, not 512");
        check(|h| h.revision.truncate(31), Reason::Protocol, "hello.revision must have 32 bytes, not 31");
        check(|h| h.text_hash.clear(), Reason::Protocol, "hello.text_hash must have 32 bytes, not 0");
        check(|h| h.worker.clear(), Reason::Protocol, "hello.worker");
    }

    #[test]
    fn ranges_meet_at_the_newest_version_of_both() {
        let range = |min, max| WireRange { min, max };
        assert_eq!(range(1, 3).meet(&range(2, 5)), Ok(3));
        assert_eq!(range(2, 5).meet(&range(1, 2)), Ok(2));
        assert!(range(1, 2).meet(&range(3, 4)).is_err());
        assert!(range(3, 4).meet(&range(1, 2)).is_err());
        let hello = RouterHello { router_id: 5, wire: Some(WIRE), stream: 1 };
        assert_eq!(hello.check(), Ok(1));
        assert!(RouterHello { stream: 0, ..hello }.check().is_err());
        assert!(RouterHello { wire: None, ..hello }.check().is_err());
    }
}
