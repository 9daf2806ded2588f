//! The demo model: what it is told ([`world`], [`corpus`]), what it is ([`model`]), how it learns
//! ([`train`]). `train_demo` runs it all and writes `crates/petek/demo`, which the binary carries.

pub mod corpus;
pub mod model;
pub mod train;
pub mod world;

#[cfg(test)]
mod tests;
