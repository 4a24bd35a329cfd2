//! The kernels compiled for the host, as a runner.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use landmarkdb::cuda::{ArgumentError, Arguments, Kernel, Launch, PANEL, Runner, SOURCE};
use libloading::Library;

/// Memory behind what was asked for, which nobody may write.
const GUARD_WORDS: usize = 4;

/// No number that means anything: floats and halves of these bytes are NaN.
const UNWRITTEN: u128 = u128::MAX;

type Body = unsafe extern "C" fn(*const c_void, *const c_void);
type ShimLaunch = unsafe extern "C" fn(Body, *const c_void, *const c_void, u32, u32, u32, u32);

/// Cheap to copy: all are one.
#[derive(Clone, Copy)]
pub struct Host(&'static Compiled);

struct Compiled {
    library: Library,
    /// The shim's threads are global.
    running: Mutex<()>,
}

pub struct Memory {
    words: Box<[UnsafeCell<u128>]>,
    bytes: usize,
}

/// The host, compiled once for all tests.
pub fn host() -> Host {
    static COMPILED: OnceLock<Compiled> = OnceLock::new();
    Host(COMPILED.get_or_init(|| Compiled { library: compile(), running: Mutex::new(()) }))
}

fn compile() -> Library {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    let panel = format!("static_assert(PANEL == {PANEL}, \"cuda::PANEL\");\n");
    std::fs::write(&source, format!("#include \"shim.hpp\"\n{SOURCE}{panel}")).unwrap();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    // Where a distribution checks jumps between stacks by default, the shim's fibers would be taken for a mistake.
    let flags = "-std=c++17 -O1 -shared -fPIC -U_FORTIFY_SOURCE -Wall -Werror -Wno-unknown-pragmas".split(' ');
    let mut command = Command::new(&compiler);
    command.args(flags).arg("-I").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels"));
    let output = command.arg(&source).arg("-o").arg(&library).output();
    let output = output.unwrap_or_else(|error| panic!("this test needs a C++ compiler, c++ or $CXX: {error}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: the library is the kernels and the shim; its initialisers make empty vectors.
    unsafe { Library::new(&library) }.unwrap()
}

/// What one thread does: the kernel, with its structure by value.
///
/// # Safety
/// `kernel` is one that takes an `A`, and `arguments` points to one that the kernel may run with.
unsafe extern "C" fn body<A: Arguments>(kernel: *const c_void, arguments: *const c_void) {
    // SAFETY: the caller's promise, which `Host::launch` keeps.
    unsafe {
        let kernel = std::mem::transmute::<*const c_void, unsafe extern "C" fn(A)>(kernel);
        kernel(*arguments.cast::<A>());
    }
}

// SAFETY: it is written through `&mut`, or by a kernel to memory that no other thread knows of.
unsafe impl Sync for Memory {}

impl Memory {
    fn start(&self) -> *mut u8 {
        self.words.as_ptr().cast_mut().cast()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let behind = self.bytes..self.words.len() * size_of::<u128>();
        // SAFETY: inside the words, and no kernel runs while this is borrowed.
        let intact = behind.into_iter().all(|at| unsafe { *self.start().add(at) } == u8::MAX);
        assert!(intact || std::thread::panicking(), "a kernel wrote behind {} bytes of memory", self.bytes);
    }
}

// SAFETY: as many whole words as the bytes need, boxed, so that they do not move.
unsafe impl Runner for Host {
    type Memory = Memory;
    type Error = ArgumentError;

    fn memory(&self, bytes: usize) -> Result<Memory, ArgumentError> {
        let words = bytes.div_ceil(size_of::<u128>()) + GUARD_WORDS;
        Ok(Memory { words: (0..words).map(|_| UnsafeCell::new(UNWRITTEN)).collect(), bytes })
    }

    fn write(&self, memory: &mut Memory, at: usize, bytes: &[u8]) -> Result<(), ArgumentError> {
        assert!(at + bytes.len() <= memory.bytes);
        // SAFETY: inside the memory, which is borrowed for writing; `bytes` is other memory.
        unsafe { memory.start().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, memory: &Memory, at: usize, bytes: &mut [u8]) -> Result<(), ArgumentError> {
        assert!(at + bytes.len() <= memory.bytes);
        // SAFETY: inside the memory, which no kernel writes after its launch; `bytes` is other memory.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(memory.start().add(at), bytes.len()) };
        Ok(())
    }

    fn wait(&self) -> Result<(), ArgumentError> {
        Ok(())
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.start() as u64
    }

    // SAFETY: what the caller promises is said at the trait.
    unsafe fn launch<A: Arguments>(&self, kernel: Kernel, launch: Launch, arguments: &A) -> Result<(), ArgumentError> {
        assert!(launch.grid.iter().all(|&blocks| blocks > 0), "a GPU refuses {launch:?}");
        let _running = self.0.running.lock().unwrap();
        // SAFETY: the symbols are those of the shim and the kernels, `body` calls the kernel with what it takes, and
        // the caller promises that the arguments fit the kernel.
        unsafe {
            let shim_launch = self.0.library.get::<ShimLaunch>(b"shim_launch").unwrap();
            let kernel = self.0.library.get::<*const c_void>(kernel.name().as_bytes()).unwrap();
            let arguments = (&raw const *arguments).cast();
            let [x, y] = launch.grid;
            shim_launch(body::<A>, *kernel, arguments, x, y, launch.threads, launch.shared_bytes);
        }
        Ok(())
    }
}
