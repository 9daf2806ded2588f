//! This crate knows the wire and its checked conversion to core types. It must never decide anything.
//!
//! The manual of every message and field is its comment in `proto/petek/*/v1/*.proto`.

pub mod blocks;
pub mod hello;
pub mod refusal;
pub mod request;
pub mod step;
pub mod submit;

/// `petek.inference.v1`: what clients say to a router.
pub mod inference {
    /// Version 1.
    #[allow(missing_docs, clippy::all, rustdoc::all)]
    pub mod v1 {
        tonic::include_proto!("petek.inference.v1");
    }
}

/// `petek.worker.v1`: what a router says to a worker.
pub mod worker {
    /// Version 1.
    #[allow(missing_docs, clippy::all, rustdoc::all)]
    pub mod v1 {
        tonic::include_proto!("petek.worker.v1");
    }
}

/// `petek.admin.v1`: what an operator asks a router.
pub mod admin {
    /// Version 1.
    #[allow(missing_docs, clippy::all, rustdoc::all)]
    pub mod v1 {
        tonic::include_proto!("petek.admin.v1");
    }
}

/// All packages with their imports and comments, encoded: what server reflection answers from.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

#[cfg(test)]
mod manual;
