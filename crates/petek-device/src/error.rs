//! What can fail on a device, with what and where.

use crate::collective::CollectiveError;

/// A part of the device layer failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A shape, a length or a handle does not fit.
    #[error("{what}: expected {expected}, got {actual}")]
    Shape {
        /// The tensor, buffer or operation.
        what: String,
        /// What was needed.
        expected: String,
        /// What was there.
        actual: String,
    },
    /// The machine would not give the memory.
    #[error("allocate {bytes} bytes for {what}: {source}")]
    Memory {
        /// What it was for.
        what: String,
        /// How much.
        bytes: usize,
        /// The system's word.
        source: std::io::Error,
    },
    /// Compute threads that cannot be started or pinned.
    #[error("compute threads: {0}")]
    Threads(std::io::Error),
    /// The processor lacks what the kernels need.
    #[error("this processor cannot run petek: {0}")]
    Unsupported(String),
    /// A format that this executor does not compute in.
    #[error("{what} in {format} is not supported by the {executor} executor")]
    Format {
        /// The tensor or part.
        what: String,
        /// The format.
        format: String,
        /// Which executor.
        executor: &'static str,
    },
    /// The group of ranks failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A compute thread panicked; the executor is unusable.
    #[error("a compute thread panicked in step {0}; the executor is poisoned")]
    Poisoned(u64),
    /// The reference executor's library failed.
    #[error("reference executor: {0}")]
    Reference(String),
}

impl DeviceError {
    /// A [`DeviceError::Shape`] in one line.
    pub fn shape(what: impl Into<String>, expected: impl Into<String>, actual: impl Into<String>) -> Self {
        Self::Shape { what: what.into(), expected: expected.into(), actual: actual.into() }
    }
}
