//! Random test inputs from a seed.

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Up to `chars_max` characters of an alphabet.
    pub(crate) fn word(&mut self, alphabet: &str, chars_max: usize) -> String {
        let alphabet: Vec<char> = alphabet.chars().collect();
        (0..self.below(chars_max + 1)).map(|_| *self.pick(&alphabet)).collect()
    }

    /// Text of several scripts with bytes lost and strewn in: what sampling at a high temperature gives.
    pub(crate) fn textlike_bytes(&mut self, parts_max: usize) -> Vec<u8> {
        let texts = ["a", "b", "ab", "é", "ığş", "求", "€", "👩‍👩‍👧", "🌶", "e\u{301}", "\u{FFFD}", "\n", " "];
        let mut bytes = Vec::new();
        for _ in 0..self.below(parts_max + 1) {
            let text = self.pick(&texts).as_bytes();
            match self.below(8) {
                0 => bytes.push(self.next() as u8),
                1 => bytes.extend(&text[..self.below(text.len() + 1)]),
                _ => bytes.extend(text),
            }
        }
        bytes
    }
}

/// A file of tests/golden.
pub(crate) fn golden(path: &str) -> Vec<u8> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");
    std::fs::read(format!("{root}/{path}")).unwrap_or_else(|error| panic!("tests/golden/{path}: {error}"))
}

/// A JSON file of tests/golden.
pub(crate) fn golden_json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&golden(path)).unwrap_or_else(|error| panic!("tests/golden/{path}: {error}"))
}
