//! What can go wrong between a model folder and a loaded decoder.

use petek_device::DeviceError;

use crate::config::ConfigError;
use crate::shard::ShardError;

/// A model that cannot be loaded: one line that says what, where, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file that cannot be read.
    #[error("read {file}: {source}")]
    Read {
        /// Which.
        file: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file of the folder that breaks a rule.
    #[error("{file}: {problem}")]
    File {
        /// Which.
        file: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A safetensors file that breaks a rule of the format.
    #[error("{file}: {rule}")]
    Safetensors {
        /// Which.
        file: String,
        /// The rule.
        rule: String,
    },
    /// A tensor.
    #[error("tensor {name}: {problem}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor-parallel degree.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The memory budget holds less than is needed.
    #[error("{0}")]
    Budget(String),
}
