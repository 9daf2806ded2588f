//! This crate knows tensor operations, collectives, file mapping and thread pinning, by shape. It must never
//! know what a request, a token's text or a model family is. It is the only crate with `unsafe`.
//!
//! Read [`ops`] first: the seam. [`cpu::reference`] is plainly right and serves nobody; [`cpu::simd`] serves.
#![allow(unsafe_code)]

pub mod ops;

pub mod collective;
pub mod cpu;
pub mod error;
pub mod file;
pub mod random;

pub use error::DeviceError;
