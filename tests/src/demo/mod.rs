//! The demo model: what it is told ([`world`], [`corpus`]), what it is ([`model`]), how it learns
//! ([`train`]). `train_demo` runs it all and writes `crates/petek/demo`, which the binary carries.

pub mod corpus;
pub mod model;
pub mod train;
pub mod world;

use std::path::PathBuf;

use crate::need;

/// The folder that is committed.
pub fn dir() -> PathBuf {
    need::root().join("crates/petek/demo")
}

#[cfg(test)]
mod tests;
