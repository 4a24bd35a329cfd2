//! Why a measurement failed.

use std::io;

use crate::eval::CaptureError;
use landmarkdb::MemoryError;
use landmarkdb::cuda::CudaError;
use landmarkdb_grpc::server::ListenError;
use landmarkdb_llm::RememberError;

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Of the memory or the store that is measured.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The captured keys cannot be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Of the model, or of a memory that it uses.
    #[error(transparent)]
    Remember(#[from] RememberError),
    /// The service that lookups go through cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The GPU was opened, and failed when its memory was measured.
    #[error("the GPU's bandwidth cannot be measured: {0}")]
    Bandwidth(#[from] CudaError),
    /// The interpreter is missing, the script failed, or a line of its output is not a result.
    #[error("running the peers with {python}: {source}")]
    Peers {
        /// The interpreter, as the settings name it.
        python: String,
        /// Why it did not start, its exit status, or why a line cannot be read.
        source: io::Error,
    },
    /// A step of the measurement itself.
    #[error("{what}: {source}")]
    Io {
        /// The step, such as `a plain read`.
        what: &'static str,
        /// The reason that the system gave.
        source: io::Error,
    },
}
