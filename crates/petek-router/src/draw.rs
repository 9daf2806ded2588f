//! Draws for tests: a stream of numbers that a seed gives again, printed so that a failure can be, and forests of
//! blocks.

use petek_core::hash::BlockName;

/// SplitMix64. *Source*: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
#[derive(Clone)]
pub(crate) struct Draw(u64);

impl Draw {
    /// From `PETEK_SEED`, else from `seed`; says which.
    #[expect(clippy::print_stdout, reason = "a test that fails shows its seed and what it drew")]
    pub(crate) fn announced(test: &str, seed: u64) -> Self {
        let given =
            std::env::var("PETEK_SEED").ok().map(|text| text.parse().expect("PETEK_SEED is a number"));
        let seed = given.unwrap_or(seed);
        println!("{test}: PETEK_SEED={seed}");
        Draw(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// Uniform below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.bits()) * end as u128) >> 64) as usize
    }

    /// True once in so many.
    pub(crate) fn one_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }

    /// Uniform above 0 and at most 1.
    pub(crate) fn open_unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// The exponential of something normal.
    pub(crate) fn log_normal(&mut self, median: f64, deviation: f64) -> f64 {
        let (radius, turn) = ((-2.0 * self.open_unit().ln()).sqrt(), self.open_unit());
        median * (deviation * radius * (std::f64::consts::TAU * turn).cos()).exp()
    }

    /// One of them.
    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Blocks by number, each with its parent: mostly chains, which fork now and then.
pub(crate) struct Forest(pub(crate) Vec<Option<usize>>);

impl Forest {
    pub(crate) fn drawn(draw: &mut Draw, blocks: usize) -> Self {
        let parent = |at: usize| match draw.below(20) {
            0 => None,
            1..4 if at > 0 => Some(draw.below(at)),
            _ => at.checked_sub(1),
        };
        Forest((0..blocks).map(parent).collect())
    }

    /// The last so many blocks of the chain that ends with `at`, first ones first.
    pub(crate) fn path(&self, at: usize, blocks_max: usize) -> Vec<usize> {
        let mut path: Vec<usize> =
            std::iter::successors(Some(at), |at| self.0[*at]).take(blocks_max).collect();
        path.reverse();
        path
    }
}

/// A name for a number, spread as a hash is: the index takes its first bytes for one.
pub(crate) fn block_name(number: usize) -> BlockName {
    let spread = (number as u128 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    BlockName((spread ^ spread >> 61).to_le_bytes())
}
