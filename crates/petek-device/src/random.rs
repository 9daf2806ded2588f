//! Random numbers of the sampling contract: Philox4x32-10, counted by token and position, never drawn from a stream.
//!
//! *Source*: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.

/// What a random number is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The draw of an output token.
    Draw = 0,
}

/// Ten rounds of Philox4x32: four random words of a counter under a key.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
    }
    counter
}

/// The four random words of tokens `4 * quad .. 4 * quad + 4` at an output position of a sequence's seed.
pub fn words(seed: u64, quad: u32, position: u32, purpose: Purpose) -> [u32; 4] {
    philox4x32_10([quad, position, purpose as u32, 0], [seed as u32, (seed >> 32) as u32])
}

/// v in (0, 1): `(f32(x >> 1) + 0.5) × 2⁻³¹`. It can round to 1 for the largest x, which `exponential` bears.
pub fn uniform(x: u32) -> f32 {
    ((x >> 1) as f32 + 0.5) * (1.0 / 2_147_483_648.0)
}

/// E, exponentially distributed, from v: `u = 1 − v`; v itself where u rounds to 1, else `−ln(u) × (v ÷ (1 − u))`, which
/// keeps the tail's resolution. `ln` is the one of the numerics.
pub fn exponential(v: f32, ln: impl Fn(f32) -> f32) -> f32 {
    let u = 1.0 - v;
    if u == 1.0 { v } else { -ln(u) * (v / (1.0 - u)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the authors' library Random123 1.14, file kat_vectors, philox4x32 with 10 rounds.
    #[test]
    fn philox_gives_the_published_answers() {
        let ones = u32::MAX;
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn the_largest_word_gives_a_finite_exponential() {
        let v = uniform(u32::MAX);
        let e = exponential(v, f32::ln);
        assert!(v <= 1.0 && e.is_finite() || v == 1.0, "v {v} e {e}");
    }
}
