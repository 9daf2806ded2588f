//! Seeds: how a client may write one, and what each sequence of a request makes of it. Changing a byte here breaks
//! every recorded seed.

use crate::refusal::Refusal;

const DOMAIN: &[u8] = b"petek/seed/1";

/// The seed of sequence `index` of a request: the request's own for the first, a hash of both for the others, so
/// that asking for one sequence with the seed that was reported gives the same bytes.
pub fn sequence_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(DOMAIN).update(&seed.to_le_bytes()).update(&u64::from(index).to_le_bytes());
    let hash = hasher.finalize();
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes"))
}

/// Reads a seed as clients write it in JSON and on the command line: a decimal number from -2^63 to 2^64 - 1, a
/// negative one in two's complement.
///
/// # Errors
/// A refusal of `field` where the text is anything else.
pub fn parse_seed(field: &str, text: &str) -> Result<u64, Refusal> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let value = if plain { text.parse::<i128>().ok() } else { None };
    match value {
        Some(v) if v >= i128::from(i64::MIN) && v < 0 => Ok(v as i64 as u64),
        Some(v) if (0..=i128::from(u64::MAX)).contains(&v) => Ok(v as u64),
        _ => Err(Refusal::invalid(
            field,
            format!(
                "must be a decimal number from {} to {}, not {}",
                i64::MIN,
                u64::MAX,
                crate::refusal::quoted(text)
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by tests/vectors.py with Python's blake3.
    #[test]
    fn seeds_of_sequences_stand() {
        for (seed, index, expected) in crate::vectors::SEEDS {
            assert_eq!(sequence_seed(*seed, *index), *expected, "seed {seed}, sequence {index}");
        }
    }

    #[test]
    fn seeds_are_read_over_their_whole_range() {
        let check = |text, expected| assert_eq!(parse_seed("seed", text).ok(), expected, "{text}");
        check("0", Some(0));
        check("18446744073709551615", Some(u64::MAX));
        check("18446744073709551616", None);
        check("-1", Some(u64::MAX));
        check("-9223372036854775808", Some(1 << 63));
        check("-9223372036854775809", None);
        check("-0", Some(0));
        check("007", Some(7));
        for bad in ["", "-", "+1", "1.0", "1e3", "0x10", " 1", "--1", "٣", &"9".repeat(400)] {
            check(bad, None);
        }
        let refusal = parse_seed("seed", &"z".repeat(500)).unwrap_err();
        assert!(refusal.to_string().len() < 200, "a refusal quotes little: {refusal}");
    }
}
