//! This crate knows what a request is and what should happen next: values and pure decisions. It must never
//! know I/O, async, clocks or a source of randomness: time and seeds are arguments.
