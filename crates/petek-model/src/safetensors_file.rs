//! A safetensors header, checked before anything is allocated by it.
//!
//! The `safetensors` crate checks most rules of the format; a name that stands twice it does not see (the later one wins), so
//! that is looked for here.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use petek_device::ops::Format;
use safetensors::SafeTensors;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// How numbers stand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// F32.
    F32,
    /// BF16.
    Bf16,
    /// F16.
    F16,
    /// Something that no weight may be in.
    Other,
}

impl Dtype {
    /// The format to read numbers in ([`Dtype::Other`] never reaches this: the weights' check refuses it).
    pub fn format(self) -> Format {
        match self {
            Dtype::F32 | Dtype::Other => Format::F32,
            Dtype::Bf16 => Format::Bf16,
            Dtype::F16 => Format::F16,
        }
    }

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::Other => "other",
        }
    }
}

/// One tensor as the header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub bytes: Range<usize>,
}

/// The tensors of a file by name.
///
/// *Errors*: the rule that the file breaks, in words, with the tensor's name where there is one.
pub fn parse_header(file: &[u8]) -> Result<BTreeMap<String, Entry>, String> {
    let (header_len, metadata) =
        SafeTensors::read_metadata(file).map_err(|e| format!("safetensors header: {e}"))?;
    let data0 = 8 + header_len;
    names_stand_once(&file[8..data0])?;
    let tensors = metadata.tensors();
    Ok(tensors
        .into_iter()
        .map(|(name, info)| {
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::BF16 => Dtype::Bf16,
                safetensors::Dtype::F16 => Dtype::F16,
                _ => Dtype::Other,
            };
            let bytes = data0 + info.data_offsets.0..data0 + info.data_offsets.1;
            (name, Entry { dtype, shape: info.shape.clone(), bytes })
        })
        .collect())
}

fn names_stand_once(header: &[u8]) -> Result<(), String> {
    struct Once;
    impl<'de> Visitor<'de> for Once {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                if let Some(twice) = seen.replace(name) {
                    return Err(A::Error::custom(format!("tensor {twice} stands twice")));
                }
            }
            Ok(())
        }
    }
    serde_json::Deserializer::from_slice(header)
        .deserialize_map(Once)
        .map_err(|e| format!("safetensors header: {e}"))
}
