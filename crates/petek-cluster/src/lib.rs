//! This crate knows who is alive, where, and what they serve: workers keep a record in the registry, routers watch
//! the records. It must never know requests, tokens or how a worker is spoken to.
//!
//! ```text
//!  worker ── Registration ──┐                         ┌── WorkersView ── router
//!            lease, record, │  Registry (trait)       │   snapshot, changes,
//!            state, loss    ├──▶ EtcdRegistry ◀───────┤   stale or not
//!                           └──▶ MemoryRegistry ◀─────┘
//! ```
//!
//! A record is a hint, never a fence: who acts on one asks the worker itself first.

// In the order to read them; blank lines keep rustfmt from sorting.
pub mod record;

pub mod registry;

pub mod times;

pub mod registration;

pub mod view;

pub mod watching;

pub mod memory;

pub mod etcd;

pub use etcd::{EtcdOptions, EtcdRegistry, EtcdTls, EtcdUser, OptionsError};
pub use memory::MemoryRegistry;
pub use record::{Cluster, RecordError, SettingsRecord, WorkerKey, WorkerRecord, WorkerState};
pub use registration::{
    Probe, Probed, RegisterError, Registration, RegistrationOptions, RegistrationPhase, RegistrationStatus,
};
pub use registry::{Registry, RegistryError};
pub use times::{Times, Wait};
pub use view::ViewEvent;
pub use watching::{ViewOptions, WorkersView};
