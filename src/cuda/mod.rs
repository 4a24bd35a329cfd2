//! How does a GPU run the kernels of `kernels/`? Nothing here knows models, documents or bytes on disk: keys, pages and
//! queries come in as values, choices and attention go out.
//!
//! Two operations, [`choose()`](fn@choose) and [`attend()`](fn@attend), say which kernels run over which memory, and
//! check every size and index first. They do so through a narrow seam, [`Runner`]: memory, copies, launches. With the
//! feature `cuda` that is a `Session` of a `Device`, a stream of its own; tests put the host in its place, so that all
//! but the seam is tested without a GPU.
//!
//! The kernels are compiled for the device at hand when it is opened, by NVRTC. Neither CUDA nor a GPU is needed to
//! build, and both are looked for only when a device is opened; a build without the feature has a `Device` that says so
//! when it is opened.

mod attend;
mod choose;
#[cfg(feature = "cuda")]
mod device;
#[cfg(not(feature = "cuda"))]
#[path = "absent.rs"]
mod device;
mod launch;

pub use attend::{Page, PageLayout, PagedAttention, PartialAttention, Piece, attend};
pub use choose::{Choice, Chosen, HostKeys, Keys, PANEL, Span, choose};
pub use device::{CudaError, Device, Session};
pub use launch::{ArgumentError, Arguments, Kernel, Launch, Runner};

/// Longest head dim that the kernels take: what a warp's registers hold.
pub const HEAD_DIM_MAX: usize = 256;

/// The program that all kernels are part of. Lines of compilers' messages are those of the files.
pub const SOURCE: &str = concat!(
    "#line 1 \"kernels/common.cuh\"\n",
    include_str!("../../kernels/common.cuh"),
    "#line 1 \"kernels/score.cu\"\n",
    include_str!("../../kernels/score.cu"),
    "#line 1 \"kernels/attend.cu\"\n",
    include_str!("../../kernels/attend.cu"),
);
