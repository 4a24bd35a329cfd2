//! What do the chosen blocks say? Sizes, memory and launches for `kernels/attend.cu`.

use half::f16;

use super::HEAD_DIM_MAX;
use super::launch::{
    ArgumentError, AttendArguments, CombineArguments, Kernel, Launch, Runner, THREADS, below, download, length,
    multiple, room, upload, within,
};
use crate::limits;
use crate::types::{DType, Normalisation};

/// Thread blocks that keep a large GPU busy. A row's blocks are shared out among several only where there are fewer
/// rows.
const THREAD_BLOCKS_WANTED: u32 = 512;

/// Warps of a thread block.
const WARPS: u32 = THREADS / 32;

/// A cache of pieces (K and V of one block, layer and KV head), one a page, where kernels find them.
pub struct Pages<M> {
    /// `(pages, 2, B, D)`
    numbers: M,
    /// `(pages, D + B)`, of bytes only.
    scales: Option<M>,
    block_tokens: usize,
    head_dim: usize,
    /// `(pages)`: whether something was written, for what is in new memory is nobody's answer.
    written: Vec<bool>,
}

/// What a page holds, in the numbers that are stored.
#[derive(Clone, Copy, Debug)]
pub enum Page<'a> {
    /// Each `(B, D)`.
    F16 { k: &'a [f16], v: &'a [f16] },
    /// Numbers as above; a scale for each of K's channels `(D)` and for each of V's tokens `(B)`.
    Int8 { k: &'a [i8], k_scales: &'a [f32], v: &'a [i8], v_scales: &'a [f32] },
}

/// Which rows read which pages, and how.
#[derive(Clone, Debug)]
pub struct Attention<'a> {
    /// T
    pub tokens: u32,
    /// Hq
    pub query_heads: u32,
    /// `(T, Hq, D)`, not turned.
    pub queries: &'a [f32],
    /// Blocks per row.
    pub k: u32,
    /// Neighbouring query heads that share an entry of `pages` and `turn_of`: 1, or up to G where they choose together.
    pub sharing: u32,
    /// `(T, Hq / sharing, k)`: pages of the heads' own KV head, in document order.
    pub pages: &'a [u32],
    /// `(T, Hq / sharing, k)`: the entry of `turns` that turns the query for that block's slot.
    pub turn_of: &'a [u32],
    /// `(turns, 2, half)`, cosines then sines.
    pub turns: &'a [f32],
    /// Half of the dimensions that are turned.
    pub half: u32,
    pub normalisation: Normalisation,
    /// What `q . key` is multiplied with.
    pub softmax_scale: f32,
}

/// Part of an attention: what some blocks contribute.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// `(T, Hq, D)`
    pub out: Vec<f32>,
    /// `(T, Hq)`: log-sum-exp of what competes; minus infinity where nothing does.
    pub lse: Vec<f32>,
}

impl<M> Pages<M> {
    /// Room for so many pages of f16 or int8. A page has to be written before it is read.
    pub fn new<R: Runner<Memory = M>>(
        runner: &R,
        dtype: DType,
        [pages, block_tokens, head_dim]: [usize; 3],
    ) -> Result<Self, R::Error> {
        within("head_dim", 1..=HEAD_DIM_MAX as u64, head_dim as u64)?;
        // A landmark, and at least one other token.
        within("block_tokens", 2..=limits::BLOCK_TOKENS_MAX.into(), block_tokens as u64)?;
        within("pages", 0..=u32::MAX.into(), pages as u64)?;
        let numbers = pages * 2 * block_tokens * head_dim;
        let scales = pages * (head_dim + block_tokens);
        let (numbers, scales) = match dtype {
            DType::F16 => (room::<R, f16>(runner, numbers)?, None),
            DType::Int8 => (room::<R, i8>(runner, numbers)?, Some(room::<R, f32>(runner, scales)?)),
            found => return Err(ArgumentError::Dtype { expected: "f16 or int8", found }.into()),
        };
        // Other runners of the same device may use it from now on.
        runner.wait()?;
        Ok(Pages { numbers, scales, block_tokens, head_dim, written: vec![false; pages] })
    }

    /// Fills a page.
    pub fn write<R: Runner<Memory = M>>(&mut self, runner: &R, index: usize, page: Page<'_>) -> Result<(), R::Error> {
        let (tokens, dim) = (self.block_tokens, self.head_dim);
        let numbers = tokens * dim;
        below("page", self.written.len(), index as u64)?;
        match (page, &mut self.scales) {
            (Page::F16 { k, v }, None) => {
                length("k", numbers, k.len())?;
                length("v", numbers, v.len())?;
                self.written[index] = false;
                runner.write(&mut self.numbers, index * 4 * numbers, bytemuck::cast_slice(k))?;
                runner.write(&mut self.numbers, (index * 4 + 2) * numbers, bytemuck::cast_slice(v))?;
            }
            (Page::Int8 { k, k_scales, v, v_scales }, Some(scales)) => {
                length("k", numbers, k.len())?;
                length("k_scales", dim, k_scales.len())?;
                length("v", numbers, v.len())?;
                length("v_scales", tokens, v_scales.len())?;
                self.written[index] = false;
                runner.write(&mut self.numbers, index * 2 * numbers, bytemuck::cast_slice(k))?;
                runner.write(&mut self.numbers, (index * 2 + 1) * numbers, bytemuck::cast_slice(v))?;
                let at = index * 4 * (dim + tokens);
                runner.write(scales, at, bytemuck::cast_slice(k_scales))?;
                runner.write(scales, at + 4 * dim, bytemuck::cast_slice(v_scales))?;
            }
            (Page::F16 { .. }, Some(_)) => {
                return Err(ArgumentError::Dtype { expected: "int8", found: DType::F16 }.into());
            }
            (Page::Int8 { .. }, None) => {
                return Err(ArgumentError::Dtype { expected: "f16", found: DType::Int8 }.into());
            }
        }
        // Other runners of the same device may use it from now on.
        runner.wait()?;
        self.written[index] = true;
        Ok(())
    }
}

/// Attention of every query row over its blocks.
pub fn attend<R: Runner>(runner: &R, pages: &Pages<R::Memory>, attention: &Attention<'_>) -> Result<Part, R::Error> {
    attention.check(pages.head_dim, &pages.written)?;
    let (rows, dim) = (attention.tokens * attention.query_heads, pages.head_dim as u32);
    let (numbers, row_count) = (attention.queries.len(), rows as usize);
    if row_count == 0 || attention.k == 0 {
        return Ok(Part { out: vec![0.0; numbers], lse: vec![f32::NEG_INFINITY; row_count] });
    }
    let parts = THREAD_BLOCKS_WANTED.div_ceil(rows).min(attention.k);
    let (queries, turns) = (upload(runner, attention.queries)?, upload(runner, attention.turns)?);
    let (table, turn_of) = (upload(runner, attention.pages)?, upload(runner, attention.turn_of)?);
    let part_out = room::<R, f32>(runner, parts as usize * numbers)?;
    let part_lse = room::<R, f32>(runner, parts as usize * row_count)?;
    let (out, lse) = (room::<R, f32>(runner, numbers)?, room::<R, f32>(runner, row_count)?);
    let at = |memory| runner.address(memory);

    let attend = AttendArguments {
        numbers: at(&pages.numbers),
        scales: pages.scales.as_ref().map_or(0, at),
        queries: at(&queries),
        turns: at(&turns),
        pages: at(&table),
        turn_of: at(&turn_of),
        out: at(&part_out),
        lse: at(&part_lse),
        k: attention.k,
        parts,
        sharing: attention.sharing,
        head_dim: dim,
        block_tokens: pages.block_tokens as u32,
        half: attention.half,
        normalisation: match attention.normalisation {
            Normalisation::Plain => 0,
            Normalisation::Grouped => 1,
            Normalisation::Hidden => 2,
        },
        softmax_scale: attention.softmax_scale,
    };
    let combine = CombineArguments {
        part_out: at(&part_out),
        part_lse: at(&part_lse),
        out: at(&out),
        lse: at(&lse),
        rows,
        parts,
        head_dim: dim,
    };
    let attend_kernel = if pages.scales.is_some() { Kernel::AttendInt8 } else { Kernel::AttendF16 };
    let shared_bytes = 4 * (2 * dim + attend.block_tokens + WARPS * dim);
    // SAFETY: each kernel gets its own structure. `check` has compared the tables with the pages, the turns and the
    // number of rows, and every size with its limit, so that no product above wraps; all other memory was made above in
    // the shapes that the kernels' sources give for these very fields. It lives until the downloads below have waited,
    // or a launch has failed, which leaves nothing running.
    unsafe {
        runner.launch(attend_kernel, Launch::new([rows, parts], shared_bytes), &attend)?;
        if parts > 1 {
            runner.launch(Kernel::Combine, Launch::new([rows, 1], 0), &combine)?;
        }
    }
    let (out, lse) = if parts > 1 { (out, lse) } else { (part_out, part_lse) };
    Ok(Part { out: download(runner, &out, numbers)?, lse: download(runner, &lse, row_count)? })
}

impl Attention<'_> {
    /// Compares every field with its limit and with the pages.
    fn check(&self, head_dim: usize, written: &[bool]) -> Result<(), ArgumentError> {
        let (heads, sharing) = (self.query_heads, self.sharing);
        within("tokens", 0..=limits::QUERY_TOKENS_MAX.into(), self.tokens.into())?;
        within("query_heads", 1..=limits::HEADS_MAX.into(), heads.into())?;
        within("k", 0..=limits::TOP_K_MAX.into(), self.k.into())?;
        within("half", 0..=head_dim as u64 / 2, self.half.into())?;
        within("sharing", 1..=heads.into(), sharing.into())?;
        multiple("query_heads", sharing.into(), heads.into())?;
        let rows = self.tokens as usize * heads as usize;
        length("queries", rows * head_dim, self.queries.len())?;
        let entries = rows / sharing as usize * self.k as usize;
        length("pages", entries, self.pages.len())?;
        length("turn_of", entries, self.turn_of.len())?;
        for &page in self.pages {
            below("pages", written.len(), page.into())?;
            if !written[page as usize] {
                return Err(ArgumentError::Unwritten { page: page.into() });
            }
        }
        let turn_numbers = 2 * self.half as usize;
        multiple("turns", turn_numbers as u64, self.turns.len() as u64)?;
        // Where nothing is turned, no entry of `turns` is read.
        if let Some(turns) = self.turns.len().checked_div(turn_numbers) {
            self.turn_of.iter().try_for_each(|&turn| below("turn_of", turns, turn.into()))?;
        }
        Ok(())
    }
}
