//! This crate knows one decoder step on one rank: configuration, weights, sharding, decoder, sampling. It must
//! never know of text, sockets or other workers.
//!
//! Read down: a [`folder`] is opened into a checked [`config`] and [`weights`]; a [`shard`] says what a rank holds; the
//! [`decoder`] computes a step; a [`rank`] keeps the slots and turns plans into steps; a [`group`] runs ranks together; a
//! [`replica`] is such a group on this machine's CPU, from the folder up.

pub mod folder;

pub mod config;
pub mod error;
pub mod numerics;
pub mod revision;
pub mod rotary;
pub mod safetensors_file;
pub mod shard;
pub mod weights;

pub mod decoder;
pub mod group;
pub mod rank;
pub mod replica;

pub use error::LoadError;
