//! This crate knows how to drive steps and stream results. It must never know text or other workers.
//!
//! ```text
//!  router ──Execute──▶ service ──commands──▶ engine thread: scheduler, runner
//!         ◀──Step, Finished── outbox ◀──news of a step──┤
//!         ◀──load, KV events── service::feeds ◀─report, kv feed─┘        worker: register, drain, end
//! ```

// In the order to read them; blank lines keep rustfmt from sorting.
mod settings;

pub mod runner;

pub mod ranks;

pub mod fake;

mod outbox;

mod kv_feed;

mod engine;

mod service;

mod worker;

#[cfg(test)]
mod simulation;

pub use settings::{FeedSettings, LinkSettings, WorkerSettings};
pub use worker::{RegistrationSettings, Worker, WorkerParts};
