//! This crate knows the wire and its checked conversion to core types. It must never decide anything.
