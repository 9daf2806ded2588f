//! The identity of a model's files.

use petek_core::hash::Revision;

use crate::folder::Texts;
use crate::weights::Weights;

/// Bytes taken at each of a tensor's places.
const SAMPLE: usize = 1024;

/// The revision of a folder's files.
///
/// ```text
///  for each of config.json, generation_config.json, tokenizer.json, tokenizer_config.json that is there:
///      u32 length of the name, name, u64 length of the file, the file
///  for each tensor, ascending by name:
///      u32 length of the name, name, u32 length of the dtype, dtype, u32 dimensions, each u64, u64 n bytes,
///      the bytes: whole if n ≤ 4 KiB, else 1 KiB at 0, ⌊n/3⌋, ⌊2n/3⌋ and n − 1024
/// ```
///
/// Integers are little-endian. A full hash of large weights would cost the start-up goal.
pub fn revision(texts: &Texts, weights: &Weights) -> Revision {
    let mut hasher = blake3::Hasher::new();
    let files = [
        ("config.json", Some(&texts.config)),
        ("generation_config.json", texts.generation.as_ref()),
        ("tokenizer.json", texts.tokenizer.as_ref()),
        ("tokenizer_config.json", texts.tokenizer_config.as_ref()),
    ];
    for (name, bytes) in files {
        let Some(bytes) = bytes else { continue };
        named(&mut hasher, name);
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
    for (name, entry, bytes) in weights.iter() {
        named(&mut hasher, name);
        named(&mut hasher, entry.dtype.name());
        hasher.update(&(entry.shape.len() as u32).to_le_bytes());
        for dimension in &entry.shape {
            hasher.update(&(*dimension as u64).to_le_bytes());
        }
        let n = bytes.len();
        hasher.update(&(n as u64).to_le_bytes());
        if n <= 4 * SAMPLE {
            hasher.update(bytes);
        } else {
            for start in [0, n / 3, 2 * n / 3, n - SAMPLE] {
                hasher.update(&bytes[start..start + SAMPLE]);
            }
        }
    }
    Revision(*hasher.finalize().as_bytes())
}

fn named(hasher: &mut blake3::Hasher, name: &str) {
    hasher.update(&(name.len() as u32).to_le_bytes()).update(name.as_bytes());
}
