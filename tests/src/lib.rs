//! The harness of the tests and the programs that make their models.

pub mod chain;
pub mod decode;
pub mod demo;
pub mod engine;
pub mod gguf;
pub mod golden;
pub mod house;
pub mod llama;
pub mod machine;
pub mod mixes;
pub mod need;
pub mod random;
pub mod random_model;
