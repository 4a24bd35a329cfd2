//! What do the chosen blocks say? Sizes, memory and launches for `kernels/attend.cu`.

use bytemuck::NoUninit;
use half::f16;

use super::HEAD_DIM_MAX;
use super::launch::{
    ArgumentError, AttendArguments, CombineArguments, Kernel, Launch, Runner, THREADS, Work, below, length, multiple,
    upload, within,
};
use crate::limits;
use crate::types::{DType, Normalisation};

/// Thread blocks that keep a large GPU busy. A row's blocks are shared out among several only where there are fewer
/// rows.
const THREAD_BLOCKS_WANTED: u32 = 512;

/// Warps of a thread block.
const WARPS: u32 = THREADS / 32;

/// Dimensions of a lane, to whose multiple kernels find every token's filled up.
const LANE_DIMS: usize = 8;

/// What all pages of an attention have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// f16 or int8.
    pub dtype: DType,
    /// B, a landmark and at least one other token.
    pub block_tokens: usize,
    /// D
    pub head_dim: usize,
}

/// K and V of one block, layer and KV head, where kernels find them. Never changes.
pub struct Page<M> {
    /// As kernels/attend.cu says: f16 `(2, B, 8 C)`; or f32 `(D + B)` and int8 `(2, B, 8 C)`.
    memory: M,
    layout: PageLayout,
    /// T: B, or fewer of a block that is shorter, which has no landmark.
    tokens: u32,
}

/// What a page is made of, in the dtype that is stored.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Each `(T, D)`, T from 1 to B.
    F16 { k: &'a [f16], v: &'a [f16] },
    /// Values each `(T, D)`; a scale for each of K's channels `(D)` and for each of V's tokens `(T)`.
    Int8 { k: &'a [i8], k_scales: &'a [f32], v: &'a [i8], v_scales: &'a [f32] },
}

/// Which rows read which pages, and how.
pub struct PagedAttention<'a, M> {
    /// T
    pub tokens: u32,
    /// Hq
    pub query_heads: u32,
    /// `(T, Hq, D)`, not rotated.
    pub queries: &'a [f32],
    /// Blocks per row.
    pub k: u32,
    /// Neighbouring query heads that share an entry of `page_of` and `rotation_of`: 1, or up to G that choose together.
    pub sharing: u32,
    /// Of every page.
    pub layout: PageLayout,
    /// The pages that are read.
    pub pages: &'a [&'a Page<M>],
    /// `(T, Hq / sharing, k)`: the entry of `pages`, of the heads' own KV head, in document order.
    pub page_of: &'a [u32],
    /// `(T, Hq / sharing, k)`: the entry of `rotations` that rotates the query for that block's slot.
    pub rotation_of: &'a [u32],
    /// `(rotations, 2, half)`, cosines then sines.
    pub rotations: &'a [f32],
    /// Half of the dimensions that are rotated.
    pub half: u32,
    pub normalisation: Normalisation,
    /// What `q . key` is multiplied with.
    pub softmax_scale: f32,
}

/// Part of an attention: what some blocks contribute.
#[derive(Clone, Debug, PartialEq)]
pub struct PartialAttention {
    /// `(T, Hq, D)`
    pub out: Vec<f32>,
    /// `(T, Hq)`: log-sum-exp of what competes; minus infinity where nothing does.
    pub lse: Vec<f32>,
}

impl PageLayout {
    /// Whether the kernels attend to such pages.
    pub fn is_supported(&self) -> bool {
        matches!(self.dtype, DType::F16 | DType::Int8) && self.check().is_ok()
    }

    /// Bytes of one page.
    pub fn bytes(&self) -> usize {
        2 * self.block_tokens * self.padded() * self.dtype.size_bytes() + self.scales() * size_of::<f32>()
    }

    /// Of a token's K or V, with what fills them up.
    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(LANE_DIMS)
    }

    /// Scales, with what fills them up.
    fn scales(&self) -> usize {
        if self.dtype == DType::Int8 { (self.head_dim + self.block_tokens).next_multiple_of(4) } else { 0 }
    }

    /// K or V `(T, D)`, every token's filled up with zeros, and tokens to B of them.
    fn extend_padded<N: NoUninit>(&self, bytes: &mut Vec<u8>, values: &[N]) {
        let end = bytes.len() + self.block_tokens * self.padded() * size_of::<N>();
        if self.padded() == self.head_dim {
            bytes.extend_from_slice(bytemuck::cast_slice(values));
        } else {
            for token in values.chunks_exact(self.head_dim) {
                let end = bytes.len() + self.padded() * size_of::<N>();
                bytes.extend_from_slice(bytemuck::cast_slice(token));
                bytes.resize(end, 0);
            }
        }
        bytes.resize(end, 0);
    }

    fn check(&self) -> Result<(), ArgumentError> {
        within("head_dim", 1..=HEAD_DIM_MAX as u64, self.head_dim as u64)?;
        within("block_tokens", 2..=limits::BLOCK_TOKENS_MAX.into(), self.block_tokens as u64)
    }
}

impl Piece<'_> {
    fn dtype(&self) -> DType {
        match self {
            Piece::F16 { .. } => DType::F16,
            Piece::Int8 { .. } => DType::Int8,
        }
    }

    /// Values of K.
    fn len(&self) -> usize {
        match self {
            Piece::F16 { k, .. } => k.len(),
            Piece::Int8 { k, .. } => k.len(),
        }
    }
}

impl<M> Page<M> {
    /// Copies pieces to the runner's memory, a page each.
    pub fn upload<R: Runner<Memory = M>>(
        runner: &R,
        layout: PageLayout,
        pieces: &[Piece<'_>],
    ) -> Result<Vec<Self>, R::Error> {
        layout.check()?;
        let dim = layout.head_dim;
        let mut bytes = Vec::with_capacity(layout.bytes());
        let mut pages = Vec::with_capacity(pieces.len());
        for piece in pieces {
            if piece.dtype() != layout.dtype {
                return Err(ArgumentError::Dtype { expected: layout.dtype, found: piece.dtype() }.into());
            }
            let len = piece.len();
            multiple("k", dim as u64, len as u64)?;
            let tokens = len / dim;
            within("tokens of a piece", 1..=layout.block_tokens as u64, tokens as u64)?;
            bytes.clear();
            match *piece {
                Piece::F16 { k, v } => {
                    length("v", len, v.len())?;
                    layout.extend_padded(&mut bytes, k);
                    layout.extend_padded(&mut bytes, v);
                }
                Piece::Int8 { k, k_scales, v, v_scales } => {
                    length("k_scales", dim, k_scales.len())?;
                    length("v", len, v.len())?;
                    length("v_scales", tokens, v_scales.len())?;
                    bytes.extend_from_slice(bytemuck::cast_slice(k_scales));
                    bytes.extend_from_slice(bytemuck::cast_slice(v_scales));
                    bytes.resize(layout.scales() * size_of::<f32>(), 0);
                    layout.extend_padded(&mut bytes, k);
                    layout.extend_padded(&mut bytes, v);
                }
            }
            pages.push(Page { memory: upload(runner, &bytes)?, layout, tokens: tokens as u32 });
        }
        // Other runners of the same device may use them from now on.
        runner.wait()?;
        Ok(pages)
    }
}

/// Attention of every query row over its blocks.
pub fn attend<R: Runner>(runner: &R, attention: &PagedAttention<'_, R::Memory>) -> Result<PartialAttention, R::Error> {
    attention.check()?;
    let (rows, dim) = (attention.tokens * attention.query_heads, attention.layout.head_dim as u32);
    let (out_len, row_count) = (attention.queries.len(), rows as usize);
    if row_count == 0 || attention.k == 0 {
        return Ok(PartialAttention { out: vec![0.0; out_len], lse: vec![f32::NEG_INFINITY; row_count] });
    }
    let parts = THREAD_BLOCKS_WANTED.div_ceil(rows).min(attention.k);
    let address = |&page: &u32| runner.address(&attention.pages[page as usize].memory);
    let addresses: Vec<u64> = attention.page_of.iter().map(address).collect();
    let tokens = |&page: &u32| attention.pages[page as usize].tokens;
    let tokens: Vec<u32> = attention.page_of.iter().map(tokens).collect();
    let mut work = Work::default();
    let (queries, rotations) = (work.input(attention.queries), work.input(attention.rotations));
    let (pages, rotation_of) = (work.input(&addresses), work.input(attention.rotation_of));
    let tokens = work.input(&tokens);
    let (part_out, part_lse) = (work.room(parts as usize * out_len), work.room(parts as usize * row_count));
    // One part is all there is to say.
    let (out, lse) = if parts > 1 { (work.room(out_len), work.room(row_count)) } else { (part_out, part_lse) };
    let work = work.place(runner)?;

    let attend = AttendArguments {
        queries: work.address(queries),
        rotations: work.address(rotations),
        pages: work.address(pages),
        rotation_of: work.address(rotation_of),
        tokens: work.address(tokens),
        out: work.address(part_out),
        lse: work.address(part_lse),
        k: attention.k,
        parts,
        sharing: attention.sharing,
        head_dim: dim,
        block_tokens: attention.layout.block_tokens as u32,
        half: attention.half,
        normalisation: match attention.normalisation {
            Normalisation::Plain => 0,
            Normalisation::Grouped => 1,
            Normalisation::Hidden => 2,
        },
        softmax_scale: attention.softmax_scale,
    };
    let combine = CombineArguments {
        part_out: work.address(part_out),
        part_lse: work.address(part_lse),
        out: work.address(out),
        lse: work.address(lse),
        rows,
        parts,
        head_dim: dim,
    };
    let attend_kernel = if attention.layout.dtype == DType::Int8 { Kernel::AttendInt8 } else { Kernel::AttendF16 };
    let padded = attention.layout.padded() as u32;
    let shared_bytes = 4 * (2 * padded + attend.block_tokens + WARPS * padded);
    // SAFETY: each kernel gets its own structure. `check` has compared the tables with the pages, the rotations and the
    // number of rows, the pages with the layout, as long as which they were made, and every size with its limit, so
    // that no product above wraps; all other memory was planned above in the shapes that the kernels' sources give for
    // these very fields. It lives until `read` below has waited, or a launch has failed, which leaves nothing running,
    // and the pages are borrowed until then.
    unsafe {
        runner.launch(attend_kernel, Launch::new([rows, parts], shared_bytes), &attend)?;
        if parts > 1 {
            runner.launch(Kernel::Combine, Launch::new([rows, 1], 0), &combine)?;
        }
    }
    let (out, lse) = work.read(out, lse)?;
    Ok(PartialAttention { out, lse })
}

impl<M> PagedAttention<'_, M> {
    /// Compares every field with its limit and with the pages.
    fn check(&self) -> Result<(), ArgumentError> {
        let (heads, sharing, head_dim) = (self.query_heads, self.sharing, self.layout.head_dim);
        self.layout.check()?;
        within("tokens", 0..=limits::QUERY_TOKENS_MAX.into(), self.tokens.into())?;
        within("query_heads", 1..=limits::HEADS_MAX.into(), heads.into())?;
        within("k", 0..=limits::TOP_K_MAX.into(), self.k.into())?;
        within("half", 0..=head_dim as u64 / 2, self.half.into())?;
        within("sharing", 1..=heads.into(), sharing.into())?;
        multiple("query_heads", sharing.into(), heads.into())?;
        let rows = self.tokens as usize * heads as usize;
        length("queries", rows * head_dim, self.queries.len())?;
        let entries = rows / sharing as usize * self.k as usize;
        length("page_of", entries, self.page_of.len())?;
        length("rotation_of", entries, self.rotation_of.len())?;
        self.page_of.iter().try_for_each(|&page| below("page_of", self.pages.len(), page.into()))?;
        for Page { layout: found, .. } in self.pages {
            if found.dtype != self.layout.dtype {
                return Err(ArgumentError::Dtype { expected: self.layout.dtype, found: found.dtype });
            }
            length("block_tokens of a page", self.layout.block_tokens, found.block_tokens)?;
            length("head_dim of a page", head_dim, found.head_dim)?;
        }
        let rotation_len = 2 * self.half as usize;
        multiple("rotations", rotation_len as u64, self.rotations.len() as u64)?;
        // Where nothing is rotated, no entry of `rotations` is read.
        if let Some(rotations) = self.rotations.len().checked_div(rotation_len) {
            self.rotation_of.iter().try_for_each(|&rotation| below("rotation_of", rotations, rotation.into()))?;
        }
        Ok(())
    }
}
