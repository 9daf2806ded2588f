//! Random numbers for what the tests make: models, texts, mixes. Few lines of our own, so that a seed gives
//! the same bytes whatever any library's version does.

/// A stream of numbers that a seed decides: SplitMix64.
///
/// *Source*: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), figure 17.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The stream of a named part of what a seed decides, so that parts can be made in any order.
    pub fn of_part(seed: u64, name: &str) -> Self {
        let mut stream = Self(seed);
        for byte in name.bytes() {
            stream.0 = stream.bits() ^ u64::from(byte);
        }
        stream
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        // The high half of the product: no bias that a test could see at the sizes used here.
        ((u128::from(self.bits()) * end as u128) >> 64) as usize
    }

    /// Uniform in −1…1.
    pub fn signed_unit(&mut self) -> f32 {
        // The top 24 bits, which an f32 holds exactly.
        ((self.bits() >> 40) as f32) * (1.0 / (1 << 23) as f32) - 1.0
    }

    /// Normal with mean 0 and deviation 1, near enough: the sum of twelve uniform numbers.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.signed_unit()).sum::<f32>() * 0.5
    }

    /// True in `percent` of 100 calls.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of a list that is not empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_published_stream() {
        let mut random = Random::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.bits()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn parts_differ_and_ranges_hold() {
        assert_ne!(Random::of_part(1, "a").bits(), Random::of_part(1, "b").bits());
        assert_ne!(Random::of_part(1, "a").bits(), Random::of_part(2, "a").bits());
        let mut random = Random::new(3);
        let mut seen = [0u32; 7];
        for _ in 0..7_000 {
            seen[random.below(7)] += 1;
            assert!((-1.0..=1.0).contains(&random.signed_unit()));
        }
        // 1,000 expected each; seven deviations of a binomial's 29 on either side.
        assert!(seen.iter().all(|&count| (800..1_200).contains(&count)), "{seen:?}");
        let squares: f32 = (0..10_000).map(|_| random.normal().powi(2)).sum::<f32>() / 10_000.0;
        assert!((0.9..1.1).contains(&squares), "variance {squares}");
    }
}
