//! A worker as routers meet it: over loopback, on the fake model, whose text knows nothing of blocks and batches; and
//! on a real one.

mod support;

mod streams;

mod faults;

mod drain;

mod feeds;

mod registry;

mod who;

mod ranks;
