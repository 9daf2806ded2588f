//! This crate knows how to drive steps and stream results. It must never know text or other workers.

pub mod runner;

pub mod ranks;

pub mod fake;

#[cfg(test)]
mod simulation;
