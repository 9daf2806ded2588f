//! What must be equal for two workers to give equal bits, as a text and its hash.

use petek_device::ops::Format;

use crate::shard::Slices;

/// The version of the CPU's numerics: orders of sums, polynomials, roundings.
pub const CPU_NUMERICS: &str = "n1";
/// Absolute positions at which attention cuts its sums.
pub const ATTENTION_SEGMENT: usize = 256;

/// The numerics of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numerics {
    /// Format of the weights as computed with.
    pub weights: Format,
    /// Slices of the row-parallel sums of the whole model.
    pub slices: Slices,
    /// Ranks.
    pub ranks: usize,
}

impl Numerics {
    /// Such as `n1;w=bf16;a=bf16;kv=bf16;seg=256;so=8;sd=8;mode=det`, with `;tp=3` only where the degree does not divide both
    /// slice counts: each rank is then one chain and its degree shows in the bits.
    pub fn text(&self) -> String {
        let activation = self.weights.activation().name();
        let mut text = format!(
            "{CPU_NUMERICS};w={};a={activation};kv={activation};seg={ATTENTION_SEGMENT};so={};sd={};mode=det",
            self.weights.name(),
            self.slices.o,
            self.slices.down
        );
        if !self.slices.keeps_bits(self.ranks) {
            text.push_str(&format!(";tp={}", self.ranks));
        }
        text
    }

    /// Hex of the first 16 bytes of the text's BLAKE3.
    pub fn id(&self) -> String {
        blake3::hash(self.text().as_bytes()).to_hex()[..32].to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn degrees_that_divide_the_slices_are_one_id() {
        let of = |ranks, o, down| Numerics { weights: Format::Bf16, slices: Slices { o, down }, ranks };
        assert_eq!(of(1, 8, 8).text(), "n1;w=bf16;a=bf16;kv=bf16;seg=256;so=8;sd=8;mode=det");
        for ranks in [2, 4, 8] {
            assert_eq!(of(ranks, 8, 8).id(), of(1, 8, 8).id());
        }
        assert_eq!(of(3, 1, 8).text(), "n1;w=bf16;a=bf16;kv=bf16;seg=256;so=1;sd=8;mode=det;tp=3");
        assert_ne!(of(3, 1, 8).id(), of(1, 1, 8).id());
        assert_eq!(of(1, 8, 8).id().len(), 32);
    }
}
