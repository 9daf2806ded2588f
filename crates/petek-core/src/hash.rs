//! Block hashes, scheme 1: what a full block of tokens is called, on every worker and router alike.
//!
//! ```text
//!  hash = BLAKE3 derive_key "petek/block/1" over
//!         parent (32 bytes, zero at the root) | fields | token ids (u32 each)
//!  field = tag (u8) | length (u32) | bytes, ascending by tag, absent ones left out; all integers little-endian
//!          1 revision   2 adapter   3 its load generation   4 salt   5 block size   6 tenant
//! ```
//!
//! The fields stand in every block, not only in the root's, so that a block can be checked without its chain.

use std::fmt;

use crate::ids::TokenId;

/// The number of this scheme, in a worker's record and greeting.
pub const HASH_SCHEME: u32 = 1;

const CONTEXT: &str = "petek/block/1";

/// The whole hash of a block: what the pool keys on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// The parent of a sequence's first block.
    pub const ROOT: BlockHash = BlockHash([0; 32]);

    /// What the wire and the router's index call it: a collision there costs a wrong guess, never wrong bytes.
    pub fn name(&self) -> BlockName {
        BlockName(*self.0.first_chunk().expect("32 bytes hold 16"))
    }
}

/// The first 16 bytes of a block's hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockName(pub [u8; 16]);

impl BlockName {
    /// The name of [`BlockHash::ROOT`].
    pub const ROOT: BlockName = BlockName([0; 16]);
}

/// Identity of a model's files.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub [u8; 32]);

macro_rules! hex {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )*};
}
hex!(BlockHash, BlockName, Revision);

/// Whose blocks these are: two requests share blocks only where all of this is equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashFields {
    /// The model's files.
    pub revision: Revision,
    /// The adapter and its load generation, if one is used.
    pub adapter: Option<(String, u64)>,
    /// The client's own separation; empty is absent.
    pub salt: Vec<u8>,
    /// Tokens per block.
    pub block_size: u32,
    /// The tenant; empty is absent.
    pub tenant: Vec<u8>,
}

impl HashFields {
    /// Fields of plain requests: no adapter, salt or tenant.
    pub fn new(revision: Revision, block_size: u32) -> Self {
        HashFields { revision, adapter: None, salt: Vec::new(), block_size, tenant: Vec::new() }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.salt.len() + self.tenant.len());
        let mut field = |tag: u8, bytes: &[u8]| {
            out.push(tag);
            out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        field(1, &self.revision.0);
        if let Some((name, generation)) = &self.adapter {
            field(2, name.as_bytes());
            field(3, &generation.to_le_bytes());
        }
        if !self.salt.is_empty() {
            field(4, &self.salt);
        }
        field(5, &self.block_size.to_le_bytes());
        if !self.tenant.is_empty() {
            field(6, &self.tenant);
        }
        out
    }
}

/// Hashes the blocks of requests with the same [`HashFields`].
#[derive(Clone)]
pub struct BlockHasher {
    /// In derive_key mode; kept, for deriving the key costs as much as a block.
    keyed: blake3::Hasher,
    fields: Box<[u8]>,
    block_size: usize,
}

impl BlockHasher {
    /// # Panics
    /// If the block size is 0: it comes from a checked configuration.
    pub fn new(fields: &HashFields) -> Self {
        assert!(fields.block_size > 0, "a block holds at least one token");
        BlockHasher {
            keyed: blake3::Hasher::new_derive_key(CONTEXT),
            fields: fields.encode().into(),
            block_size: fields.block_size as usize,
        }
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The hash of one full block after `parent`.
    ///
    /// # Panics
    /// If `tokens` are not exactly a block.
    pub fn block(&mut self, parent: BlockHash, tokens: &[TokenId]) -> BlockHash {
        assert_eq!(tokens.len(), self.block_size, "only full blocks have a hash");
        self.keyed.reset();
        self.keyed.update(&parent.0).update(&self.fields);
        // In runs, for a call per token costs more than the hashing; 64 tokens fill a few of BLAKE3's blocks.
        let mut bytes = [0; 256];
        for run in tokens.chunks(64) {
            for (four, token) in bytes.chunks_exact_mut(4).zip(run) {
                four.copy_from_slice(&token.to_le_bytes());
            }
            self.keyed.update(&bytes[..4 * run.len()]);
        }
        BlockHash(*self.keyed.finalize().as_bytes())
    }

    /// The hashes of all full blocks of `tokens`, from the root on; a last, partial block has none.
    pub fn chain(&mut self, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut hashes = Vec::with_capacity(tokens.len() / self.block_size);
        self.extend_chain(&mut hashes, tokens);
        hashes
    }

    /// Appends the hashes of the full blocks of `tokens` that `hashes` does not hold yet.
    pub fn extend_chain(&mut self, hashes: &mut Vec<BlockHash>, tokens: &[TokenId]) {
        let done = hashes.len() * self.block_size;
        let mut parent = hashes.last().copied().unwrap_or(BlockHash::ROOT);
        for block in tokens.get(done..).unwrap_or_default().chunks_exact(self.block_size) {
            parent = self.block(parent, block);
            hashes.push(parent);
        }
    }
}

impl fmt::Debug for BlockHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockHasher").field("block_size", &self.block_size).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> HashFields {
        HashFields::new(Revision(std::array::from_fn(|i| i as u8)), 16)
    }

    fn check(fields: &HashFields, tokens: u32, expected: &[&str]) {
        let ids: Vec<TokenId> = (0..tokens).map(|i| i * i + 7).collect();
        let hashes = BlockHasher::new(fields).chain(&ids);
        assert_eq!(hashes.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }

    /// Made by tests/vectors.py with Python's blake3, from the page alone.
    #[test]
    fn scheme_1_stands() {
        let v = &crate::vectors::CHAINS;
        check(&fields(), 40, v[0]);
        check(&HashFields { salt: b"pepper".to_vec(), ..fields() }, 40, v[1]);
        check(&HashFields { tenant: b"acme".to_vec(), ..fields() }, 16, v[2]);
        check(&HashFields { adapter: Some(("sql".into(), 3)), block_size: 256, ..fields() }, 512, v[3]);
        let all = HashFields {
            adapter: Some(("sql".into(), 3)),
            salt: b"pepper".to_vec(),
            tenant: b"acme".to_vec(),
            block_size: 32,
            ..fields()
        };
        check(&all, 64, v[4]);
    }

    #[test]
    fn an_empty_salt_is_none_and_the_fields_never_run_into_each_other() {
        let hash = |f: &HashFields| BlockHasher::new(f).block(BlockHash::ROOT, &[1; 16]);
        let with = |salt: &str, tenant: &str| {
            hash(&HashFields { salt: salt.into(), tenant: tenant.into(), ..fields() })
        };
        assert_eq!(with("", ""), hash(&fields()));
        let different = [with("", ""), with("ab", ""), with("", "ab"), with("a", "b"), with("ab", "ab")];
        for (i, a) in different.iter().enumerate() {
            assert!(different[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn a_chain_grows_as_if_made_at_once() {
        let ids: Vec<TokenId> = (0..100).collect();
        let mut hasher = BlockHasher::new(&fields());
        let whole = hasher.chain(&ids);
        assert_eq!(whole.len(), 6);
        let mut grown = Vec::new();
        for len in [0, 5, 16, 17, 48, 95, 100] {
            hasher.extend_chain(&mut grown, &ids[..len]);
            assert_eq!(grown, whole[..len / 16]);
        }
        assert_eq!(whole[0].name().to_string(), whole[0].to_string()[..32]);
    }
}
