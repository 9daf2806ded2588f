//! The commands that serve: `petek up`, `petek worker`, `petek router`.
//!
//! Each begins with the signals and the settings, then builds its parts and waits for them to end:
//!
//! ```text
//! worker   model folder ─▶ ranks, cache ─▶ petek-worker ─▶ record in etcd
//! router   etcd ─▶ list of workers ─▶ petek-router ─▶ clients
//! up       both, with the registry in memory
//! ```

pub(crate) mod up;

pub(crate) mod router;
pub(crate) mod worker;

mod engine;
mod process;
mod settings;
