//! Whole clusters of real processes, found through a real etcd: what breaks, and what a client sees of it.
//!
//! Times are settings of the processes; a test waits for a condition, with a limit far beyond them.

mod stage;

mod client;

mod lost;

mod drain;

mod starts;

mod etcd;

mod whole;

mod slow;

mod apart;

// Shared with packages whose own tests want it public.
#[allow(unreachable_pub)]
#[path = "../../../../tests/etcd/server.rs"]
mod server;

// Shared with packages whose own tests want it public.
#[allow(unreachable_pub)]
#[path = "../../../../tests/otlp/collector.rs"]
mod collector;
