//! The seam between operations and what runs kernels, and the arguments of each kernel.

use std::marker::PhantomData;
use std::ops::RangeInclusive;

use thiserror::Error;

use crate::types::DType;

/// Threads of a thread block where nothing else is said: `THREADS` of the kernels.
pub(super) const THREADS: u32 = 256;

/// Threads of a warp.
const WARP: u32 = 32;

/// Where each array of a [`Work`] begins is a multiple of this: the widest load of a kernel.
const ALIGNMENT: usize = 16;

/// A stream of work on some memory, or what stands in for one. Work is done in the order in which it was asked for; an
/// error is returned only when none goes on. Panics if given the memory of another device.
///
/// # Safety
/// [`Runner::memory`] has at least the bytes that were asked for, which stay where [`Runner::address`] says until it is
/// dropped: kernels are launched over addresses that were computed from that.
pub unsafe trait Runner {
    /// Freed when dropped, once the work that was asked for before is done.
    type Memory: Send + Sync + 'static;
    type Error: std::error::Error + From<ArgumentError>;

    /// Memory with arbitrary content, aligned for any number.
    fn memory(&self, bytes: usize) -> Result<Self::Memory, Self::Error>;

    /// Copies to `memory`, from byte `at` on. Panics if that is too long.
    fn write(&self, memory: &mut Self::Memory, at: usize, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Waits for the work so far and copies from `memory`, from byte `at` on. Panics if it is shorter.
    fn read(&self, memory: &Self::Memory, at: usize, bytes: &mut [u8]) -> Result<(), Self::Error>;

    /// Waits for the work so far.
    fn wait(&self) -> Result<(), Self::Error>;

    /// Where kernels find `memory`.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// Runs a kernel.
    ///
    /// # Safety
    /// `arguments` is the structure that `kernel` takes. Its addresses are those of live memory of this runner that is
    /// as long as the kernel's source says for its other fields and for `launch`, and remains so until the work is
    /// done.
    unsafe fn launch<A: Arguments>(&self, kernel: Kernel, launch: Launch, arguments: &A) -> Result<(), Self::Error>;
}

/// What one kernel takes.
///
/// # Safety
/// The twin of a structure in `kernels/`: `repr(C)`, of the same addresses and 4-byte values in the same order.
pub unsafe trait Arguments: Copy {}

/// Something that the kernels cannot do or must not be asked. Nothing has run.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgumentError {
    #[error("{field}: expected {least} to {most}, found {found}")]
    Range { field: &'static str, least: u64, most: u64, found: u64 },
    #[error("{field}: expected {expected} numbers for the sizes that were given, found {found}")]
    Length { field: &'static str, expected: u64, found: u64 },
    #[error("{field}: expected a multiple of {unit}, found {found}")]
    Multiple { field: &'static str, unit: u64, found: u64 },
    #[error("{field}: expected to count from 0 to less than {count}, found {found}")]
    Index { field: &'static str, count: u64, found: u64 },
    #[error("dtype: expected {expected}, found {found}; convert the numbers first")]
    Dtype { expected: DType, found: DType },
}

/// A kernel of [`super::SOURCE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    ScoreFewF16,
    ScoreFewInt8,
    ScoreManyF16,
    ScoreManyInt8,
    Total,
    Choose,
    Merge,
    AttendF16,
    AttendInt8,
    Combine,
}

/// How many threads run a kernel, and their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Thread blocks, in two dimensions. None is 0.
    pub grid: [u32; 2],
    /// Of each thread block.
    pub threads: u32,
    /// Of each thread block; at most 48 KB, which every GPU gives.
    pub shared_bytes: u32,
}

impl Kernel {
    pub const ALL: [Kernel; 10] = [
        Kernel::ScoreFewF16,
        Kernel::ScoreFewInt8,
        Kernel::ScoreManyF16,
        Kernel::ScoreManyInt8,
        Kernel::Total,
        Kernel::Choose,
        Kernel::Merge,
        Kernel::AttendF16,
        Kernel::AttendInt8,
        Kernel::Combine,
    ];

    /// In the source.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::ScoreFewF16 => "score_few_f16",
            Kernel::ScoreFewInt8 => "score_few_int8",
            Kernel::ScoreManyF16 => "score_many_f16",
            Kernel::ScoreManyInt8 => "score_many_int8",
            Kernel::Total => "total",
            Kernel::Choose => "choose",
            Kernel::Merge => "merge",
            Kernel::AttendF16 => "attend_f16",
            Kernel::AttendInt8 => "attend_int8",
            Kernel::Combine => "combine",
        }
    }
}

impl Launch {
    pub(super) fn new(grid: [u32; 2], shared_bytes: u32) -> Self {
        Launch { grid, threads: THREADS, shared_bytes }
    }

    /// With thread blocks of so many warps.
    pub(super) fn of_warps(self, warps: u32) -> Self {
        Launch { threads: warps * WARP, ..self }
    }

    /// A warp for each of `rows`, with so much memory for each thread block.
    pub(super) fn warps(rows: u32, shared_bytes: u32) -> Self {
        Launch::new([rows.div_ceil(THREADS / WARP), 1], shared_bytes)
    }
}

/// Declares the twin of a structure in `kernels/`: addresses are `u64`, the fields are explained there.
macro_rules! arguments {
    ($name:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type),+ }

        // SAFETY: repr(C), and every field is an address or a 4-byte number. The kernels' tests would see one astray.
        unsafe impl Arguments for $name {}
    };
}

arguments!(ScoreArguments {
    tiles: u64,
    queries: u64,
    scores: u64,
    tile_totals: u64,
    blocks: u32,
    tile_count: u32,
    tile_keys: u32,
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    first_piece: u32,
    head_dim: u32,
    log_sum_exp: u32,
    softmax_scale: f32,
});

arguments!(TotalArguments { tile_totals: u64, totals: u64, rows: u32, tile_count: u32 });

arguments!(ChooseArguments {
    scores: u64,
    totals: u64,
    candidates: u64,
    rows: u32,
    blocks: u32,
    slices: u32,
    kept: u32,
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    token_span: u32,
    head_span: u32,
    add: u32,
});

arguments!(MergeArguments { candidates: u64, positions: u64, scores: u64, count: u32, k: u32 });

arguments!(AttendArguments {
    queries: u64,
    rotations: u64,
    pages: u64,
    rotation_of: u64,
    tokens: u64,
    out: u64,
    lse: u64,
    k: u32,
    parts: u32,
    sharing: u32,
    head_dim: u32,
    block_tokens: u32,
    half: u32,
    normalisation: u32,
    softmax_scale: f32,
});

arguments!(CombineArguments { part_out: u64, part_lse: u64, out: u64, lse: u64, rows: u32, parts: u32, head_dim: u32 });

/// Copies values to new memory; none take one byte, so that there is an address.
pub(super) fn upload<R: Runner, N: bytemuck::NoUninit>(runner: &R, values: &[N]) -> Result<R::Memory, R::Error> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let mut memory = runner.memory(bytes.len().max(1))?;
    runner.write(&mut memory, 0, bytes)?;
    Ok(memory)
}

/// All memory of one operation, planned before any is asked for: a copy to a GPU, a copy from it and memory there cost
/// microseconds each, however small they are.
#[derive(Default)]
pub(super) struct Work {
    /// Of the arrays that go there, which come first.
    inputs: Vec<u8>,
    bytes: usize,
}

/// An array of a [`Work`].
#[derive(Clone, Copy)]
pub(super) struct Place<N> {
    at: usize,
    len: usize,
    of: PhantomData<N>,
}

/// A [`Work`] in a runner's memory.
pub(super) struct Placed<'a, R: Runner> {
    runner: &'a R,
    memory: R::Memory,
}

impl Work {
    /// An array that goes there. Before all that do not.
    pub(super) fn input<N: bytemuck::NoUninit>(&mut self, values: &[N]) -> Place<N> {
        let place = self.room(values.len());
        self.inputs.resize(place.at, 0);
        self.inputs.extend_from_slice(bytemuck::cast_slice(values));
        place
    }

    /// An array that kernels write.
    pub(super) fn room<N>(&mut self, len: usize) -> Place<N> {
        let at = self.bytes.next_multiple_of(ALIGNMENT);
        self.bytes = at + len * size_of::<N>();
        Place { at, len, of: PhantomData }
    }

    /// Asks for the memory and copies what goes there.
    pub(super) fn place<R: Runner>(self, runner: &R) -> Result<Placed<'_, R>, R::Error> {
        let mut memory = runner.memory(self.bytes.max(1))?;
        runner.write(&mut memory, 0, &self.inputs)?;
        Ok(Placed { runner, memory })
    }
}

impl<R: Runner> Placed<'_, R> {
    /// Where kernels find an array.
    pub(super) fn address<N>(&self, place: Place<N>) -> u64 {
        self.runner.address(&self.memory) + place.at as u64
    }

    /// Waits for the kernels and copies two arrays back, of which the second was planned right behind the first.
    pub(super) fn read<M: bytemuck::Pod, N: bytemuck::Pod>(
        &self,
        first: Place<M>,
        second: Place<N>,
    ) -> Result<(Vec<M>, Vec<N>), R::Error> {
        let apart = second.at - first.at;
        let mut bytes = vec![0; apart + second.len * size_of::<N>()];
        self.runner.read(&self.memory, first.at, &mut bytes)?;
        let firsts = &bytes[..first.len * size_of::<M>()];
        Ok((bytemuck::pod_collect_to_vec(firsts), bytemuck::pod_collect_to_vec(&bytes[apart..])))
    }
}

/// Refuses a number outside of `range`.
pub(super) fn within(field: &'static str, range: RangeInclusive<u64>, found: u64) -> Result<(), ArgumentError> {
    if range.contains(&found) {
        return Ok(());
    }
    Err(ArgumentError::Range { field, least: *range.start(), most: *range.end(), found })
}

/// Refuses another length.
pub(super) fn length(field: &'static str, expected: usize, found: usize) -> Result<(), ArgumentError> {
    if found == expected {
        return Ok(());
    }
    Err(ArgumentError::Length { field, expected: expected as u64, found: found as u64 })
}

/// Refuses what is not so many units; of units of 0, all but 0.
pub(super) fn multiple(field: &'static str, unit: u64, found: u64) -> Result<(), ArgumentError> {
    if found.is_multiple_of(unit) {
        return Ok(());
    }
    Err(ArgumentError::Multiple { field, unit, found })
}

/// Refuses an index of something that is not there.
pub(super) fn below(field: &'static str, count: usize, found: u64) -> Result<(), ArgumentError> {
    if found < count as u64 {
        return Ok(());
    }
    Err(ArgumentError::Index { field, count: count as u64, found })
}
