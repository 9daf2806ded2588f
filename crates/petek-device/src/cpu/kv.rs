//! The paged KV cache's memory, in the order in which attention reads it.
//!
//! ```text
//!  [layer][block] { K: [kv head][panel of tokens][step][token of the panel]
//!                   V: [kv head][panel of 64 dims][step][dim of the panel] }
//! ```
//! One number here is a word of 32 bits: a pair of bf16, or an f32. A *step* is what one fused multiply-add (or dot product
//! of pairs) takes: for K the pair of dims (2j, 2j + 1) in bf16, the dim j in f32; for V the tokens (2j, 2j + 1), or the
//! token j. So K's lanes are tokens and V's are dims, and no sum ever crosses lanes. A panel of K is 32 tokens, or the whole
//! block of 16; V's dims are rounded up to 16, with zeroes.
//!
//! What a block holds behind a sequence's last token is stale: a former user's numbers, NaN perhaps. Attention never lets it
//! into a sum (it cuts the pair of an odd last token in two); so a token is written without touching its neighbour, and rows
//! may be written by several threads at once.

use crate::DeviceError;
use crate::cpu::lanes::LANES;
use crate::cpu::matmul::bf16_bits;
use crate::cpu::memory::HugeBuffer;
use crate::ops::{Format, KvSpec};

/// Tokens of a K panel, at most.
const PANEL_TOKENS_MAX: usize = 32;
/// Dims of a V panel, at most: four registers of AVX-512 for each row.
pub(crate) const PANEL_DIMS_MAX: usize = 64;

/// The cache of one rank: zeroed at the start.
#[derive(Debug)]
pub struct KvCache {
    spec: KvSpec,
    layout: KvLayout,
    words: HugeBuffer<u32>,
}

/// Where numbers stand in a layer's share of a block, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvLayout {
    /// Numbers of a word: 2 in bf16, 1 in f32.
    pub(crate) per_word: usize,
    /// Tokens of a K panel.
    pub(crate) panel_tokens: usize,
    /// Words of a token's key.
    pub(crate) key_steps: usize,
    /// Words of one head's keys.
    pub(crate) key_words: usize,
    /// Dims of V, padding included.
    pub(crate) value_dims: usize,
    /// Steps of one head's values.
    pub(crate) value_steps: usize,
    /// Words of one head's values.
    pub(crate) value_words: usize,
    /// KV heads.
    heads: usize,
}

impl KvLayout {
    fn new(spec: &KvSpec) -> Self {
        let per_word = if spec.format == Format::Bf16 { 2 } else { 1 };
        let key_steps = spec.heads.dim / per_word;
        let value_dims = spec.heads.dim.next_multiple_of(LANES);
        let value_steps = spec.block_tokens / per_word;
        Self {
            per_word,
            panel_tokens: spec.block_tokens.min(PANEL_TOKENS_MAX),
            key_steps,
            key_words: spec.block_tokens * key_steps,
            value_dims,
            value_steps,
            value_words: value_steps * value_dims,
            heads: spec.heads.kv,
        }
    }

    /// Words of a layer's share of a block.
    fn block_words(&self) -> usize {
        self.heads * (self.key_words + self.value_words)
    }

    /// Where a head's keys begin.
    pub(crate) fn keys(&self, head: usize) -> usize {
        head * self.key_words
    }

    /// Where a head's values begin.
    pub(crate) fn values(&self, head: usize) -> usize {
        self.heads * self.key_words + head * self.value_words
    }

    fn key(&self, head: usize, slot: usize, step: usize) -> usize {
        let (panel, lane) = (slot / self.panel_tokens, slot % self.panel_tokens);
        self.keys(head) + (panel * self.key_steps + step) * self.panel_tokens + lane
    }

    fn value(&self, head: usize, slot: usize, dim: usize) -> usize {
        let (panel, lane) = (dim / PANEL_DIMS_MAX, dim % PANEL_DIMS_MAX);
        let first = panel * PANEL_DIMS_MAX;
        let width = PANEL_DIMS_MAX.min(self.value_dims - first);
        self.values(head) + first * self.value_steps + slot / self.per_word * width + lane
    }
}

impl KvCache {
    /// Allocates the cache.
    ///
    /// *Errors*: [`DeviceError::Shape`] for a block that is not a power of two from 16 to 256 tokens, or heads that are none,
    /// odd or do not divide; [`DeviceError::Format`] for f16; [`DeviceError::Memory`].
    pub fn new(spec: KvSpec) -> Result<Self, DeviceError> {
        let heads = spec.heads;
        if !spec.block_tokens.is_power_of_two() || !(16..=256).contains(&spec.block_tokens) {
            let expected = "a power of two from 16 to 256 tokens";
            return Err(DeviceError::shape("the KV cache's block", expected, spec.block_tokens.to_string()));
        }
        if heads.dim == 0
            || !heads.dim.is_multiple_of(2)
            || heads.kv == 0
            || heads.query == 0
            || !heads.query.is_multiple_of(heads.kv)
        {
            let expected = "an even head width, and query heads a multiple of the KV heads";
            return Err(DeviceError::shape("the KV cache's heads", expected, format!("{heads:?}")));
        }
        if spec.format == Format::F16 {
            let (what, format) = ("the KV cache".to_owned(), spec.format.name().to_owned());
            return Err(DeviceError::Format { what, format, executor: "CPU" });
        }
        let layout = KvLayout::new(&spec);
        let words =
            layout.block_words().checked_mul(spec.layers).and_then(|words| words.checked_mul(spec.blocks));
        Ok(Self { spec, layout, words: HugeBuffer::zeroed("the KV cache", words.unwrap_or(usize::MAX))? })
    }

    /// What it was made for.
    pub fn spec(&self) -> &KvSpec {
        &self.spec
    }

    /// All of it, as it lies, for measuring how fast it can be read.
    pub fn words(&mut self) -> &[u32] {
        self.words.as_slice()
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Writes one token's keys (rotated) and values, all heads, rounding to the cache's format.
    ///
    /// *Shapes*: `k`, `v`: `[kv heads, head dim]`. `slot` is the token's place in the block.
    ///
    /// *Panics*: if the place or a length is out of range.
    ///
    /// # Safety
    /// Until this returns nobody else reads the block's layer or writes the same token of it.
    pub unsafe fn write(&self, layer: usize, block: u32, slot: usize, k: &[f32], v: &[f32]) {
        let (layout, dim) = (&self.layout, self.spec.heads.dim);
        assert!(slot < self.spec.block_tokens, "slot {slot} of a block of {}", self.spec.block_tokens);
        assert!(k.len() == layout.heads * dim && v.len() == k.len(), "keys and values of all heads");
        // SAFETY: the share lies inside the buffer, and every index below lies inside the share, for `head`, `slot` and `dim`
        // in range. A word of K belongs to one token; of V, this token's half: nobody else touches them, says the caller.
        unsafe {
            let words = self.words.as_ptr().add(self.share(layer, block));
            for (head, (k, v)) in k.chunks_exact(dim).zip(v.chunks_exact(dim)).enumerate() {
                if layout.per_word == 1 {
                    for (d, (k, v)) in k.iter().zip(v).enumerate() {
                        words.add(layout.key(head, slot, d)).write(k.to_bits());
                        words.add(layout.value(head, slot, d)).write(v.to_bits());
                    }
                } else {
                    for (step, pair) in k.as_chunks::<2>().0.iter().enumerate() {
                        let word = u32::from(bf16_bits(pair[0])) | u32::from(bf16_bits(pair[1])) << 16;
                        words.add(layout.key(head, slot, step)).write(word);
                    }
                    // Little-endian, as every processor that passes `Isa::detect`: the even token is the first half.
                    let halves = words.cast::<u16>().add(slot % 2);
                    for (d, v) in v.iter().enumerate() {
                        halves.add(2 * layout.value(head, slot, d)).write(bf16_bits(*v));
                    }
                }
            }
        }
    }

    /// Copies a block, all layers.
    ///
    /// *Panics*: if a block is out of range.
    ///
    /// # Safety
    /// Until this returns nobody else touches block `to` or writes block `from`.
    pub unsafe fn copy_block(&self, from: u32, to: u32) {
        if from == to {
            return;
        }
        for layer in 0..self.spec.layers {
            let (from, to) = (self.share(layer, from), self.share(layer, to));
            // SAFETY: two different shares inside the buffer; alone by the caller.
            unsafe {
                let words = self.words.as_ptr();
                std::ptr::copy_nonoverlapping(words.add(from), words.add(to), self.layout.block_words());
            }
        }
    }

    /// Sets a block to zero, all layers.
    ///
    /// *Panics*: if the block is out of range.
    ///
    /// # Safety
    /// Until this returns nobody else touches the block.
    pub unsafe fn zero_block(&self, block: u32) {
        for layer in 0..self.spec.layers {
            // SAFETY: the share lies inside the buffer; alone by the caller.
            unsafe {
                self.words.as_ptr().add(self.share(layer, block)).write_bytes(0, self.layout.block_words())
            };
        }
    }

    /// A layer's share of a block.
    ///
    /// # Safety
    /// While the slice lives, nobody writes there.
    pub(crate) unsafe fn block(&self, layer: usize, block: u32) -> &[u32] {
        // SAFETY: the share lies inside the buffer; unwritten by the caller.
        unsafe {
            let first = self.words.as_ptr().add(self.share(layer, block));
            std::slice::from_raw_parts(first, self.layout.block_words())
        }
    }

    /// Where a layer's share of a block begins.
    fn share(&self, layer: usize, block: u32) -> usize {
        let block = block as usize;
        assert!(layer < self.spec.layers && block < self.spec.blocks, "layer {layer}, block {block}");
        (layer * self.spec.blocks + block) * self.layout.block_words()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Heads;

    fn spec(format: Format, block_tokens: usize, dim: usize) -> KvSpec {
        KvSpec { layers: 2, heads: Heads { query: 6, kv: 3, dim }, block_tokens, blocks: 3, format }
    }

    /// A number that names its place; exact in bf16.
    fn mark(layer: usize, block: usize, slot: usize, head: usize, dim: usize) -> f32 {
        let place = (((layer * 3 + block) * 256 + slot) * 3 + head) * 128 + dim;
        let spread = (place as u32).wrapping_mul(2_654_435_761);
        f32::from_bits((spread & 0x8fff_0000) | 0x3000_0000)
    }

    fn get(kv: &KvCache, layer: usize, block: u32, slot: usize, head: usize, dim: usize) -> (f32, f32) {
        // SAFETY: the test has one thread.
        let words = unsafe { kv.block(layer, block) };
        let layout = kv.layout();
        let half = |word: u32, odd: bool| f32::from_bits(if odd { word & 0xffff_0000 } else { word << 16 });
        match layout.per_word {
            1 => (
                f32::from_bits(words[layout.key(head, slot, dim)]),
                f32::from_bits(words[layout.value(head, slot, dim)]),
            ),
            _ => (
                half(words[layout.key(head, slot, dim / 2)], dim % 2 == 1),
                half(words[layout.value(head, slot, dim)], slot % 2 == 1),
            ),
        }
    }

    #[test]
    fn every_token_has_its_own_place_and_a_copy_copies_all() {
        for format in [Format::F32, Format::Bf16] {
            for (block_tokens, dim) in
                [(16, 64), (32, 96), (64, 80), (256, 6), (16, 128), (128, 16), (32, 30)]
            {
                let kv = KvCache::new(spec(format, block_tokens, dim)).expect("memory");
                let row = |layer, block, slot, add: f32| -> Vec<f32> {
                    (0..3 * dim).map(|i| mark(layer, block, slot, i / dim, i % dim) * add).collect()
                };
                for layer in 0..2 {
                    for slot in (0..block_tokens).rev().chain(0..block_tokens) {
                        for block in 0..2 {
                            let (k, v) = (row(layer, block, slot, 1.0), row(layer, block, slot, -2.0));
                            // SAFETY: the test has one thread.
                            unsafe { kv.write(layer, block as u32, slot, &k, &v) };
                        }
                    }
                }
                // SAFETY: the test has one thread.
                unsafe { kv.copy_block(1, 2) };
                for (layer, slot, head, dim) in (0..2 * block_tokens * 3 * dim).map(|i| {
                    (i / (block_tokens * 3 * dim), i / (3 * dim) % block_tokens, i / dim % 3, i % dim)
                }) {
                    for (block, source) in [(0, 0), (1, 1), (2, 1)] {
                        let expected = mark(layer, source, slot, head, dim);
                        let actual = get(&kv, layer, block, slot, head, dim);
                        assert_eq!(actual, (expected, -2.0 * expected), "{format:?} {block_tokens} {dim}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_spec_counts_the_bytes_that_are_allocated() {
        for format in [Format::F32, Format::Bf16] {
            for (block_tokens, dim) in [(16, 64), (32, 96), (64, 80), (256, 6), (16, 30)] {
                let kv = KvCache::new(spec(format, block_tokens, dim)).expect("memory");
                assert_eq!(kv.words.len() * 4, kv.spec().bytes(), "{format:?} {block_tokens} {dim}");
            }
        }
    }

    #[test]
    fn shapes_that_cannot_be_are_refused_by_name() {
        let bad = |change: fn(&mut KvSpec)| {
            let mut spec = spec(Format::Bf16, 32, 64);
            change(&mut spec);
            KvCache::new(spec).expect_err("refused").to_string()
        };
        assert!(bad(|spec| spec.block_tokens = 8).contains("16 to 256"));
        assert!(bad(|spec| spec.block_tokens = 48).contains("48"));
        assert!(bad(|spec| spec.heads.dim = 33).contains("even head width"));
        assert!(bad(|spec| spec.heads.query = 7).contains("multiple of the KV heads"));
        assert!(bad(|spec| spec.format = Format::F16).contains("f16"));
        assert!(bad(|spec| spec.blocks = usize::MAX / 8).contains("the KV cache"));
    }
}
