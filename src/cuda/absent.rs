//! What stands for a GPU in a build without the feature `cuda`: one that cannot be opened.

use thiserror::Error;

use super::launch::{ArgumentError, Arguments, Kernel, Launch, Runner};

/// Why there is no GPU.
#[derive(Debug, Error)]
pub enum CudaError {
    #[error("this program was built without CUDA: build it with `--features cuda`")]
    NotBuilt,
    #[error(transparent)]
    Argument(#[from] ArgumentError),
}

/// A GPU, of which there is none.
#[derive(Clone)]
pub enum Device {}

/// A stream of work on a GPU, of which there is none.
pub enum Session {}

impl Device {
    /// Says why there is none.
    pub fn open(_ordinal: usize) -> Result<Device, CudaError> {
        Err(CudaError::NotBuilt)
    }

    /// As the driver calls it.
    pub fn name(&self) -> Result<String, CudaError> {
        match *self {}
    }

    /// A session of its own.
    pub fn session(&self) -> Result<Session, CudaError> {
        match *self {}
    }
}

impl Session {
    /// Bytes per second that the GPU's memory gives and takes.
    pub fn bandwidth(&self, _bytes: usize) -> Result<f64, CudaError> {
        match *self {}
    }
}

// SAFETY: there is no session whose memory could be too short.
unsafe impl Runner for Session {
    type Memory = std::convert::Infallible;
    type Error = CudaError;

    fn memory(&self, _bytes: usize) -> Result<Self::Memory, CudaError> {
        match *self {}
    }

    fn write(&self, _memory: &mut Self::Memory, _at: usize, _bytes: &[u8]) -> Result<(), CudaError> {
        match *self {}
    }

    fn read(&self, _memory: &Self::Memory, _at: usize, _bytes: &mut [u8]) -> Result<(), CudaError> {
        match *self {}
    }

    fn wait(&self) -> Result<(), CudaError> {
        match *self {}
    }

    fn address(&self, _memory: &Self::Memory) -> u64 {
        match *self {}
    }

    // SAFETY: there is no session that could be asked.
    unsafe fn launch<A: Arguments>(&self, _kernel: Kernel, _launch: Launch, _arguments: &A) -> Result<(), CudaError> {
        match *self {}
    }
}
