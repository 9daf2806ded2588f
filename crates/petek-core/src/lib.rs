//! This crate knows what a request is and what should happen next: values and pure decisions. It must never
//! know I/O, async, clocks or a source of randomness: time and seeds are arguments.

// In the order to read them; blank lines keep rustfmt from sorting.
pub mod limits;

pub mod ids;

pub mod refusal;

pub mod params;

pub mod seed;

pub mod hash;

pub mod plan;

pub mod pool;

pub mod scheduler;

#[cfg(test)]
mod vectors;
