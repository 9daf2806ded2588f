//! What a test needs and may not find: one rule. Where `CI` is set its want is a failure; elsewhere the test
//! says aloud that it was skipped, in a line that begins with `SKIPPED:`, and passes.

use std::path::{Path, PathBuf};

use crate::gguf::MANIFEST;
use crate::house;

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the repository").to_path_buf()
}

/// The folder that `cargo xtask real-model` makes: `target/real-model`, or where `PETEK_REAL_MODEL` points.
/// `None` where it is missing and may be: the test named `test` returns then.
///
/// # Panics
/// Where it is missing and `CI` is set.
pub fn real_model(test: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("PETEK_REAL_MODEL")
        .map_or_else(|| root().join("target/real-model"), |dir| root().join(dir));
    // The maker checks every byte and renames the folder into place at the very end: its files are there or
    // not.
    if MANIFEST.iter().all(|file| dir.join(file.name).is_file()) {
        return Some(dir);
    }
    house::skip(test, "the real model (`cargo xtask real-model` makes it)");
    None
}
