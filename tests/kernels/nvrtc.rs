//! Every kernel compiles for the GPUs that it is meant for. Needs NVRTC and no GPU.

use std::ffi::{CString, c_char, c_int, c_void};

use landmarkdb::cuda::{Kernel, SOURCE};
use libloading::Library;

/// The oldest that we mean to support (A100) and the one in front of most of us (H100).
const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90"];

/// The path of an NVRTC library. Whoever sets it wants the test: it then fails where it could not run.
const PATH_VARIABLE: &str = "LANDMARKDB_TEST_NVRTC";

type Program = *mut c_void;
type Get<T> = unsafe extern "C" fn(Program, *mut T) -> c_int;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(library) = library() else {
        let reason = format!("no libnvrtc, CUDA's compiler, was found; {PATH_VARIABLE} may name one");
        return crate::skip("every_kernel_compiles_for_every_architecture", reason);
    };
    for architecture in ARCHITECTURES {
        let code = compile(&library, architecture).unwrap_or_else(|log| panic!("{architecture}: {log}"));
        for kernel in Kernel::ALL {
            let symbol = format!("\0.text.{}\0", kernel.name());
            let found = code.windows(symbol.len()).any(|bytes| bytes == symbol.as_bytes());
            assert!(found, "{architecture}: no machine code of {}", kernel.name());
        }
    }
}

fn library() -> Option<Library> {
    // SAFETY: loads NVIDIA's library, whose initialisers ask nothing of the program.
    let load = |name: &str| unsafe { Library::new(name) };
    match std::env::var(PATH_VARIABLE) {
        Ok(path) => Some(load(&path).unwrap_or_else(|error| panic!("{PATH_VARIABLE}={path}: {error}"))),
        Err(_) => ["libnvrtc.so.12", "libnvrtc.so"].iter().find_map(|name| load(name).ok()),
    }
}

/// Machine code, or the compiler's log.
fn compile(library: &Library, architecture: &str) -> Result<Vec<u8>, String> {
    let source = CString::new(SOURCE).unwrap();
    let options =
        [format!("--gpu-architecture={architecture}"), "--std=c++17".into()].map(|o| CString::new(o).unwrap());
    let options = options.each_ref().map(|option| option.as_ptr());
    // SAFETY: the functions have the types of nvrtc.h; the strings outlive the program, sizes go to locals, and text
    // and code to as many bytes as they were said to have.
    unsafe {
        let get = |name: &str| library.get::<Get<usize>>(name.as_bytes()).unwrap();
        let get_bytes = |name: &str| library.get::<Get<u8>>(name.as_bytes()).unwrap();
        let output = |program, size_of: &str, bytes_of: &str| {
            let mut size = 0;
            assert_eq!(get(size_of)(program, &mut size), 0, "{size_of}");
            let mut bytes = vec![0u8; size];
            assert_eq!(get_bytes(bytes_of)(program, bytes.as_mut_ptr()), 0, "{bytes_of}");
            bytes
        };
        let mut program: Program = std::ptr::null_mut();
        let (none, name) = (std::ptr::null(), c"kernels".as_ptr());
        let create = library.get::<Create>(b"nvrtcCreateProgram").unwrap();
        assert_eq!(create(&mut program, source.as_ptr(), name, 0, none, none), 0, "nvrtcCreateProgram");
        let compile = library.get::<Compile>(b"nvrtcCompileProgram").unwrap();
        let result = match compile(program, options.len() as c_int, options.as_ptr()) {
            0 => Ok(output(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")),
            _ => {
                let log = output(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
                Err(String::from_utf8_lossy(&log).into_owned())
            }
        };
        library.get::<Destroy>(b"nvrtcDestroyProgram").unwrap()(&mut program);
        result
    }
}
