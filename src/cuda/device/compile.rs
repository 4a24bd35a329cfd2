//! Compiles the kernels for one architecture. The result is machine code, not PTX: PTX of a compiler that is newer than
//! the driver would be refused.

use std::ffi::{CStr, CString};

use cudarc::nvrtc::{result, sys};

use super::CudaError;
use crate::cuda::SOURCE;

/// The machine code of [`SOURCE`] for an architecture such as `sm_90`. NVRTC must be present.
pub(super) fn compile(architecture: &str) -> Result<Vec<u8>, CudaError> {
    let failed = |log: String| CudaError::Compile { architecture: architecture.into(), log };
    let broken = |error: result::NvrtcError| failed(format!("{error:?}"));
    let source = CString::new(SOURCE).map_err(|error| failed(error.to_string()))?;
    let program = Program(result::create_program(&source, Some(c"kernels")).map_err(broken)?);
    let options = [format!("--gpu-architecture={architecture}"), "--std=c++17".into()];
    // SAFETY: the program was created above and is destroyed when it is dropped.
    let compiled = unsafe { result::compile_program(program.0, &options) };
    if let Err(error) = compiled {
        // SAFETY: as above.
        let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|&byte| byte as u8).collect();
        let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy();
        return Err(failed(format!("{error:?}\n{text}")));
    }
    let mut code_bytes = 0;
    // SAFETY: as above, and the size goes to a local.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut code_bytes) }.result().map_err(broken)?;
    let mut code = vec![0u8; code_bytes];
    // SAFETY: as above, and the code goes to as many bytes as it was said to have.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }.result().map_err(broken)?;
    Ok(code)
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: only this destroys it. A failure leaks memory and nothing else.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}
