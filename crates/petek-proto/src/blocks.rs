//! Lists of block names: 16 bytes each in one `bytes` field, so that a router reads millions per second in
//! place.

use petek_core::hash::BlockName;
use petek_core::limits::link::KV_BATCH_BLOCKS_MAX;
use petek_core::refusal::Refusal;
use prost::bytes::{BufMut, Bytes, BytesMut};

use crate::hello::{fixed, protocol};
use crate::worker::v1::{KvBatch, KvSnapshotPage, kv_event::Kind};

const NAME_BYTES: usize = size_of::<BlockName>();

/// Blocks that one page of a snapshot names: 2 MiB of names and parents, half of a message.
pub const SNAPSHOT_PAGE_BLOCKS_MAX: usize = 65_536;

const _: () =
    assert!(2 * NAME_BYTES * SNAPSHOT_PAGE_BLOCKS_MAX < petek_core::limits::listener::MESSAGE_OUT_BYTES_MAX);

/// Writes names.
pub fn write_names(names: impl ExactSizeIterator<Item = BlockName>) -> Bytes {
    let mut bytes = BytesMut::with_capacity(names.len() * NAME_BYTES);
    names.for_each(|name| bytes.put_slice(&name.0));
    bytes.freeze()
}

/// Reads names.
///
/// # Errors
/// `Protocol` that names `field` where the bytes are not whole names.
pub fn read_names<'a>(
    field: &str,
    bytes: &'a [u8],
) -> Result<impl ExactSizeIterator<Item = BlockName> + Clone + use<'a>, Refusal> {
    let (names, rest) = bytes.as_chunks::<NAME_BYTES>();
    if !rest.is_empty() {
        let problem = format!("{field} must be whole names of {NAME_BYTES} bytes, not {} bytes", bytes.len());
        return Err(protocol(problem));
    }
    Ok(names.iter().map(|name| BlockName(*name)))
}

/// Reads one name.
///
/// # Errors
/// `Protocol` that names `field` where it is not one.
pub fn read_name(field: &str, bytes: &[u8]) -> Result<BlockName, Refusal> {
    fixed(field, bytes).map(BlockName)
}

impl KvBatch {
    /// Checks that every event can be read and that together they name no more blocks than a batch may.
    /// Returns how many they name.
    ///
    /// # Errors
    /// `Protocol` that says what is wrong.
    pub fn check(&self) -> Result<usize, Refusal> {
        let mut blocks = 0;
        for event in &self.events {
            blocks += match &event.kind {
                None => return Err(protocol("an event is of a kind that is not known here".into())),
                Some(Kind::Stored(stored)) => {
                    read_name("stored.parent", &stored.parent)?;
                    read_names("stored.blocks", &stored.blocks)?.len()
                }
                Some(Kind::Removed(removed)) => read_names("removed.blocks", &removed.blocks)?.len(),
                Some(Kind::Cleared(_)) => 0,
            };
        }
        if blocks > KV_BATCH_BLOCKS_MAX {
            return Err(protocol(format!(
                "batch names {blocks} blocks, at most {KV_BATCH_BLOCKS_MAX} are allowed"
            )));
        }
        Ok(blocks)
    }
}

impl KvSnapshotPage {
    /// The page's blocks as (parent, block), parents first.
    ///
    /// # Errors
    /// `Protocol` where the two lists do not pair up or are longer than a page may be.
    pub fn pairs(
        &self,
    ) -> Result<impl ExactSizeIterator<Item = (BlockName, BlockName)> + Clone + '_, Refusal> {
        let parents = read_names("page.parents", &self.parents)?;
        let blocks = read_names("page.blocks", &self.blocks)?;
        if parents.len() != blocks.len() || blocks.len() > SNAPSHOT_PAGE_BLOCKS_MAX {
            return Err(protocol(format!(
                "page has {} parents and {} blocks; as many of each are due, at most {SNAPSHOT_PAGE_BLOCKS_MAX}",
                parents.len(),
                blocks.len()
            )));
        }
        Ok(parents.zip(blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::v1::{KvCleared, KvEvent, KvRemoved, KvStored};

    fn names(count: u8) -> impl ExactSizeIterator<Item = BlockName> + Clone {
        (0..count).map(|i| BlockName([i + 1; 16]))
    }

    fn stored(parent: BlockName, count: u8) -> KvEvent {
        let parent = Bytes::copy_from_slice(&parent.0);
        KvEvent { kind: Some(Kind::Stored(KvStored { parent, blocks: write_names(names(count)) })) }
    }

    #[test]
    fn names_come_back_in_order() {
        let bytes = write_names(names(3));
        assert_eq!(bytes.len(), 48);
        assert_eq!(read_names("x", &bytes).unwrap().collect::<Vec<_>>(), names(3).collect::<Vec<_>>());
        assert_eq!(read_names("x", &[]).unwrap().len(), 0);
        let refusal = read_names("x", &bytes[..47]).err().unwrap();
        assert_eq!(refusal.to_string(), "protocol: x must be whole names of 16 bytes, not 47 bytes");
    }

    #[test]
    fn a_batch_is_checked_whole() {
        let removed = KvEvent { kind: Some(Kind::Removed(KvRemoved { blocks: write_names(names(2)) })) };
        let cleared = KvEvent { kind: Some(Kind::Cleared(KvCleared {})) };
        let good = KvBatch { events: vec![stored(BlockName::ROOT, 3), removed.clone(), cleared] };
        assert_eq!(good.check(), Ok(5));

        let check = |events: Vec<KvEvent>, says: &str| {
            let said = KvBatch { events }.check().expect_err(says).to_string();
            assert!(said.contains(says), "{said}");
        };
        check(vec![removed.clone(), KvEvent { kind: None }], "of a kind");
        let parentless = Kind::Stored(KvStored { parent: Bytes::new(), blocks: write_names(names(1)) });
        check(vec![KvEvent { kind: Some(parentless) }], "stored.parent must have 16 bytes, not 0");
        let torn = Kind::Removed(KvRemoved { blocks: Bytes::from_static(&[0; 17]) });
        check(vec![KvEvent { kind: Some(torn) }], "removed.blocks must be whole names");
        assert_eq!(KvBatch { events: vec![removed.clone(); 128] }.check(), Ok(256));
        check(vec![removed; 129], "258 blocks, at most 256");
    }

    #[test]
    fn a_page_pairs_each_block_with_its_parent() {
        let page = |parents: Bytes, blocks: Bytes| KvSnapshotPage { page: 0, last: true, parents, blocks };
        let parents = || [BlockName::ROOT].into_iter().chain(names(2)).collect::<Vec<_>>();
        let good = page(write_names(parents().into_iter()), write_names(names(3)));
        let pairs: Vec<_> = good.pairs().unwrap().collect();
        assert_eq!(pairs, parents().into_iter().zip(names(3)).collect::<Vec<_>>());
        assert!(page(write_names(names(2)), write_names(names(3))).pairs().is_err());
        let long = Bytes::from(vec![1; 16 * (SNAPSHOT_PAGE_BLOCKS_MAX + 1)]);
        assert!(page(long.clone(), long.clone()).pairs().is_err());
        assert!(page(long.slice(16..), long.slice(16..)).pairs().is_ok());
    }
}
