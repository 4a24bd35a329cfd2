//! A GPU with the kernels on it, and sessions that work on it at the same time.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::{self, CUmemPool_attribute, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc;
use thiserror::Error;

use super::launch::{ArgumentError, Arguments, Kernel, Launch, Runner};

mod compile;

use compile::compile;

/// Bytes of freed memory that the driver keeps for the next allocation. Unless it is told, it keeps none when a stream has been
/// waited for, and every operation would wait for memory anew.
const FREED_BYTES_KEPT: u64 = 256 << 20;

/// Why a GPU did not do what it was asked.
#[derive(Debug, Error)]
pub enum CudaError {
    #[error("no CUDA driver: libcuda was not found; it comes with NVIDIA's driver for the GPU")]
    NoDriver,
    #[error(
        "no CUDA driver: the libcuda that was found is the stub that programs are linked with; take the CUDA toolkit's \
         folder `stubs` out of LD_LIBRARY_PATH"
    )]
    Stub,
    #[error(
        "no CUDA compiler: neither libnvrtc.so nor libnvrtc.so.12 was found where the system looks for libraries; \
         install it, or name its folder in LD_LIBRARY_PATH"
    )]
    NoCompiler,
    #[error("no GPU {ordinal}: expected less than {count}, for the GPUs here are counted from 0")]
    NoDevice { ordinal: usize, count: usize },
    #[error(
        "the kernels do not compile for {architecture}; a GPU newer than the compiler needs a newer libnvrtc: {log}"
    )]
    Compile { architecture: String, log: String },
    /// What to do depends on the code, which NVIDIA documents.
    #[error("the CUDA driver could not {action}: {reason} (CUresult {code})")]
    Driver { action: &'static str, code: u32, reason: String },
    #[error(transparent)]
    Argument(#[from] ArgumentError),
}

/// An open GPU. Cheap to clone.
#[derive(Clone)]
pub struct Device {
    context: Arc<CudaContext>,
    /// In the order of [`Kernel::ALL`].
    kernels: Arc<[CudaFunction]>,
}

/// A stream of work on a device, independent of other sessions.
pub struct Session {
    device: Device,
    stream: Arc<CudaStream>,
}

impl Device {
    /// Opens a GPU and compiles the kernels for it.
    pub fn open(ordinal: usize) -> Result<Device, CudaError> {
        // SAFETY: loads NVIDIA's libraries, whose initialisers ask nothing of the program.
        let (driver_present, compiler_present) = unsafe { (sys::is_culib_present(), nvrtc::sys::is_culib_present()) };
        if !driver_present {
            return Err(CudaError::NoDriver);
        }
        let count = match CudaContext::device_count() {
            Ok(count) => count as usize,
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => return Err(CudaError::Stub),
            Err(error) => return Err(failed("start", error)),
        };
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        if !compiler_present {
            return Err(CudaError::NoCompiler);
        }
        let context = CudaContext::new(ordinal).map_err(|error| failed("open a GPU", error))?;
        // SAFETY: no memory is used by two streams without a wait in between, for the reason at `Runner` for `Session`.
        unsafe { context.disable_event_tracking() };
        keep_freed(&context).map_err(|error| failed("keep freed memory", error))?;
        let (major, minor) = context.compute_capability().map_err(|error| failed("describe a GPU", error))?;
        let code = compile(&format!("sm_{major}{minor}"))?;
        let module =
            context.load_module(nvrtc::Ptx::from_binary(code)).map_err(|error| failed("load the kernels", error))?;
        let kernels = Kernel::ALL
            .iter()
            .map(|kernel| module.load_function(kernel.name()))
            .collect::<Result<_, _>>()
            .map_err(|error| failed("find a kernel", error))?;
        Ok(Device { context, kernels })
    }

    /// As the driver calls it.
    pub fn name(&self) -> Result<String, CudaError> {
        self.context.name().map_err(|error| failed("name a GPU", error))
    }

    /// A session of its own.
    pub fn session(&self) -> Result<Session, CudaError> {
        let stream = self.context.new_stream().map_err(|error| failed("make a stream", error))?;
        Ok(Session { device: self.clone(), stream })
    }
}

/// Tells the driver what to keep of what is freed. Where it has no pool of memory, there is nothing to keep.
fn keep_freed(context: &CudaContext) -> Result<(), DriverError> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device is that of a live context, and the pool goes to a local.
    match unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()) } {
        CUresult::CUDA_ERROR_NOT_SUPPORTED => return Ok(()),
        found => found.result()?,
    }
    let mut bytes = FREED_BYTES_KEPT;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool was given above, and the value of this attribute is 64 bits.
    unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut bytes).cast()) }.result()
}

fn failed(action: &'static str, error: DriverError) -> CudaError {
    let reason = error.error_string().map(|reason| reason.to_string_lossy().into_owned()).unwrap_or_default();
    CudaError::Driver { action, code: error.0 as u32, reason }
}

impl Session {
    /// Bytes per second that the GPU's memory gives and takes, both counted, while `bytes` are copied inside it.
    pub fn bandwidth(&self, bytes: usize) -> Result<f64, CudaError> {
        const COPIES: usize = 8;
        let (from, mut to) = (self.memory(bytes)?, self.memory(bytes)?);
        let mut copy = || self.settle("copy on the GPU", self.stream.memcpy_dtod(&from, &mut to));
        // The first use of memory pays for more than the copy.
        copy()?;
        self.wait()?;
        let begin = Instant::now();
        (0..COPIES).try_for_each(|_| copy())?;
        self.wait()?;
        Ok((2 * bytes * COPIES) as f64 / begin.elapsed().as_secs_f64())
    }

    /// Waits after a failure, so that the caller may free what the work before it reads.
    fn settle<T>(&self, action: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
        result.map_err(|error| {
            // The first failure is the one to report.
            let _ = self.stream.synchronize();
            failed(action, error)
        })
    }
}

/// Memory is freed in the order of the stream that made it. What other sessions use as well (keys, pages) is written by
/// operations that borrow it alone and wait at their end, and read by operations that borrow it and wait at theirs.
// SAFETY: the driver gives as many bytes as it is asked for, or an error, and does not move them.
unsafe impl Runner for Session {
    type Memory = CudaSlice<u8>;
    type Error = CudaError;

    fn memory(&self, bytes: usize) -> Result<CudaSlice<u8>, CudaError> {
        // SAFETY: any bytes are u8.
        self.settle("give memory", unsafe { self.stream.alloc(bytes) })
    }

    fn write(&self, memory: &mut CudaSlice<u8>, at: usize, bytes: &[u8]) -> Result<(), CudaError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut into = memory.slice_mut(at..at + bytes.len());
        self.settle("copy to the GPU", self.stream.memcpy_htod(bytes, &mut into))
    }

    fn read(&self, memory: &CudaSlice<u8>, at: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        if !bytes.is_empty() {
            let from = memory.slice(at..at + bytes.len());
            self.settle("copy from the GPU", self.stream.memcpy_dtoh(&from, bytes))?;
        }
        self.wait()
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().map_err(|error| failed("finish the work", error))
    }

    fn address(&self, memory: &CudaSlice<u8>) -> u64 {
        assert_eq!(memory.context(), self.stream.context(), "memory of another device");
        // Without event tracking there is nothing to record when the guard is dropped.
        memory.device_ptr(&self.stream).0
    }

    // SAFETY: what the caller promises is said at the trait.
    unsafe fn launch<A: Arguments>(&self, kernel: Kernel, launch: Launch, arguments: &A) -> Result<(), CudaError> {
        let function = &self.device.kernels[kernel as usize];
        let [x, y] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (x, y, 1),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        let structure = Structure(*arguments);
        // SAFETY: the caller's promise; the one argument is copied when the launch is asked for.
        let launched = unsafe { self.stream.launch_builder(function).arg(&structure).launch(config) };
        self.settle("run a kernel", launched.map(|_| ()))
    }
}

/// A kernel's only argument, passed by value.
#[repr(transparent)]
struct Structure<A>(A);

// SAFETY: `Arguments` promises numbers only, laid out as in the kernels' sources.
unsafe impl<A: Arguments> DeviceRepr for Structure<A> {}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// The one thing about a device that every machine can say.
    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_what_is_missing() {
        match Device::open(usize::MAX) {
            Err(CudaError::NoDevice { ordinal: usize::MAX, .. } | CudaError::NoDriver) => {}
            Err(CudaError::Driver { action: "start", .. }) => {}
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("a device beyond all"),
        }
    }

    /// The compiler needs no GPU.
    #[test]
    fn kernels_compile_and_what_does_not_comes_with_a_log() {
        // SAFETY: as in `Device::open`.
        if !unsafe { nvrtc::sys::is_culib_present() } {
            // Setting it asks for the test: see tests/kernels/nvrtc.rs.
            assert!(std::env::var_os("LANDMARKDB_TEST_NVRTC").is_none(), "{}", CudaError::NoCompiler);
            // Not `eprintln!`, which is hidden where a test passes.
            std::io::stderr().write_all(format!("skipped: {}\n", CudaError::NoCompiler).as_bytes()).unwrap();
            return;
        }
        assert!(compile("sm_90").unwrap().starts_with(b"\x7fELF"));
        assert!(matches!(compile("sm_1"), Err(CudaError::Compile { log, .. }) if !log.is_empty()));
    }
}
