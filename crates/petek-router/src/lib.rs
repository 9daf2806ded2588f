//! This crate knows how a request finds a worker and how its stream comes back: text in, text out. It must never
//! know tensors: what a worker computes with is the worker's.
//!
//! ```text
//!  service ──▶ gateway ──▶ prepare (text threads) ──▶ workers, route ──▶ link ──▶ worker
//!     ▲          limits, ids, deadline                  which one          one stream each
//!     └──────────────────────── relay: a journal per request ◀──────────────┘
//! ```
//! `relay` and `route` are pure data; the rest are thin tasks around them.

// In the order to read them; blank lines keep rustfmt from sorting.
mod settings;

mod feed;

pub mod index;

pub mod route;

mod relay;

mod link;

mod models;

mod workers;

mod text_pool;

mod prepare;

mod gateway;

mod service;

mod registry;

#[cfg(test)]
mod draw;

#[cfg(test)]
mod simulation;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use feed::{Freshness, WorkerEntry, WorkerFeed, WorkerList, WorkerState};
pub use registry::follow;
pub use service::{Listeners, Router};
pub use settings::{LinkSettings, RouterSettings};

/// Locks, also after a panic elsewhere: no lock of this crate is held over anything half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
