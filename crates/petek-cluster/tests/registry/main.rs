//! Both registries under one contract, and etcd under everything that was measured of it.

mod contract;

mod memory;

mod etcd;

mod stage;

mod proxy;

// Shared with packages whose own tests want it public.
#[allow(unreachable_pub)]
#[path = "../../../../tests/etcd/server.rs"]
mod server;
