//! Which blocks does this query want? Sizes, memory and launches for `kernels/score.cu`.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::HEAD_DIM_MAX;
use super::launch::{
    ArgumentError, ChooseArguments, Kernel, Launch, MergeArguments, Runner, ScoreArguments, THREADS, TotalArguments,
    Work, below, length, multiple, upload, within,
};
use crate::limits;
use crate::types::{BlockScore, DType, Granularity};

/// Keys of a panel: `PANEL` of the kernels, and of the index.
pub const PANEL: usize = 64;

/// Query rows that pass over the keys together: `FEW_ROWS` and `MANY_ROWS` of the kernels.
const FEW_ROWS: u32 = 4;
const MANY_ROWS: u32 = 8;

/// Blocks of a slice: `SLICE` of the kernels.
const SLICE: u32 = 128;

/// Warps of a thread block that scores: `SCORE_WARPS` of the kernels.
const SCORE_WARPS: usize = 4;

/// Keys of a tile that has more than one block: a panel for each warp.
const TILE_KEYS: usize = SCORE_WARPS * PANEL;

/// Warps of a thread block that merges: `MERGE_WARPS` of the kernels.
const MERGE_WARPS: u32 = 32;

/// Warps of the other thread blocks.
const WARPS: u32 = THREADS / 32;

/// Blocks of a lookup: no grid has more thread blocks than this, for none has more than there are scores.
const BLOCKS_MAX: u64 = i32::MAX as u64;
const _: () = assert!(limits::LOOKUP_SCORES_MAX <= BLOCKS_MAX);

/// Keys that stand for consecutive blocks, for all layers and KV heads, where kernels find them. They never change.
pub struct Keys<M> {
    values: M,
    /// Of bytes only.
    scales: Option<M>,
    head_dim: usize,
    /// L * Hkv
    pieces: usize,
    piece_panels: usize,
}

/// Keys in host memory, in panels of [`PANEL`], those of each layer and KV head together, the last panel of each filled up
/// with anything.
#[derive(Clone, Copy, Debug)]
pub enum HostKeys<'a> {
    /// `(L * Hkv, panels, D, PANEL)`
    F16(&'a [f16]),
    /// Values `(L * Hkv, panels, D, PANEL)`, scales `(L * Hkv, panels, PANEL)`.
    Int8 { values: &'a [i8], scales: &'a [f32] },
}

/// Consecutive blocks that lie together and are scored with the same queries.
pub struct Span<'a, M> {
    pub keys: &'a Keys<M>,
    /// m, or fewer of a block that is shorter.
    pub keys_per_block: u32,
    /// Within those of `keys`.
    pub blocks: Range<u32>,
    /// Which queries.
    pub set: u32,
}

/// One lookup.
pub struct Choice<'a, M> {
    pub layer: u32,
    /// T
    pub tokens: u32,
    /// Hq, a multiple of Hkv.
    pub query_heads: u32,
    /// Hkv
    pub kv_heads: u32,
    /// D of all keys.
    pub head_dim: usize,
    /// Of all keys: f16 or int8.
    pub dtype: DType,
    /// `(sets, T, Hq, D)`
    pub queries: &'a [f32],
    /// The blocks that may be chosen, in order. A block's position is its place among them.
    pub spans: &'a [Span<'a, M>],
    /// Blocks to choose per row.
    pub top_k: u32,
    pub block_score: BlockScore,
    pub granularity: Granularity,
    /// What `q . key` is multiplied with.
    pub softmax_scale: f32,
}

/// The chosen blocks of every row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen {
    pub rows: usize,
    /// Blocks per row: as many as were asked for, or all.
    pub k: usize,
    /// `(rows, k)`, ascending in each row.
    pub positions: Vec<u32>,
    /// `(rows, k)`: log of the block's share in the softmax over all blocks, after aggregation.
    pub scores: Vec<f32>,
}

/// `Tile` of the kernels.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct KernelTile {
    values: u64,
    scales: u64,
    piece_panels: u32,
    key: u32,
    blocks: u32,
    position: u32,
    set: u32,
    keys_per_block: u32,
}

impl<M> Keys<M> {
    /// Copies keys of so many pieces (L * Hkv) to the runner's memory.
    pub fn upload<R: Runner<Memory = M>>(
        runner: &R,
        panels: HostKeys<'_>,
        head_dim: usize,
        pieces: usize,
    ) -> Result<Self, R::Error> {
        within("head_dim", 1..=HEAD_DIM_MAX as u64, head_dim as u64)?;
        within("pieces", 1..=u32::MAX.into(), pieces as u64)?;
        let count = match panels {
            HostKeys::F16(values) => values.len(),
            HostKeys::Int8 { values, .. } => values.len(),
        };
        let panel_len = head_dim * PANEL;
        multiple("values", (pieces * panel_len) as u64, count as u64)?;
        let panel_count = count / panel_len;
        within("panels", 0..=u32::MAX.into(), panel_count as u64)?;
        let (values, scales) = match panels {
            HostKeys::F16(values) => (upload(runner, values)?, None),
            HostKeys::Int8 { values, scales } => {
                length("scales", panel_count * PANEL, scales.len())?;
                (upload(runner, values)?, Some(upload(runner, scales)?))
            }
        };
        // Other runners of the same device may use them from now on.
        runner.wait()?;
        Ok(Keys { values, scales, head_dim, pieces, piece_panels: panel_count / pieces })
    }

    fn dtype(&self) -> DType {
        if self.scales.is_some() { DType::Int8 } else { DType::F16 }
    }
}

/// Chooses the blocks of every row.
pub fn choose<R: Runner>(runner: &R, choice: &Choice<'_, R::Memory>) -> Result<Chosen, R::Error> {
    let tiles = choice.tiles(runner)?;
    let blocks: u32 = tiles.iter().map(|tile| tile.blocks).sum();
    let k = choice.top_k.min(blocks);
    let (query_heads, kv_heads) = (choice.query_heads as usize, choice.kv_heads as usize);
    let rows = choice.granularity.rows(choice.tokens as usize, query_heads, kv_heads) as u32;
    if k == 0 || choice.tokens == 0 {
        return Ok(Chosen { rows: rows as usize, ..Chosen::default() });
    }
    let query_rows = choice.tokens * choice.query_heads;
    let tile_count = tiles.len() as u32;
    let tile_keys = tiles.iter().map(|tile| tile.blocks * tile.keys_per_block).max().unwrap_or(0);
    let (slices, kept) = (blocks.div_ceil(SLICE), k.min(SLICE));
    let mut work = Work::default();
    let (tiles, queries) = (work.input(&tiles), work.input(choice.queries));
    let positions = work.room::<u32>(rows as usize * k as usize);
    let shares = work.room::<f32>(rows as usize * k as usize);
    let scores = work.room::<f32>(query_rows as usize * blocks as usize);
    let tile_totals = work.room::<f32>(query_rows as usize * tile_count as usize);
    let totals = work.room::<f32>(query_rows as usize);
    let candidates = work.room::<[u32; 2]>(rows as usize * slices as usize * kept as usize);
    let work = work.place(runner)?;

    let score = ScoreArguments {
        tiles: work.address(tiles),
        queries: work.address(queries),
        scores: work.address(scores),
        tile_totals: work.address(tile_totals),
        blocks,
        tile_count,
        tile_keys,
        tokens: choice.tokens,
        query_heads: choice.query_heads,
        kv_heads: choice.kv_heads,
        first_piece: choice.layer * choice.kv_heads,
        head_dim: choice.head_dim as u32,
        log_sum_exp: (choice.block_score == BlockScore::LogSumExp).into(),
        softmax_scale: choice.softmax_scale,
    };
    let head_rows = query_rows / choice.kv_heads;
    let few = head_rows <= FEW_ROWS;
    let strip_rows = if few { FEW_ROWS } else { MANY_ROWS };
    let score_grid = [tile_count * head_rows.div_ceil(strip_rows), choice.kv_heads];
    let score_launch =
        Launch::new(score_grid, 4 * strip_rows * (score.head_dim + tile_keys)).of_warps(SCORE_WARPS as u32);
    let score_kernel = match (choice.dtype, few) {
        (DType::Int8, true) => Kernel::ScoreFewInt8,
        (DType::Int8, false) => Kernel::ScoreManyInt8,
        (_, true) => Kernel::ScoreFewF16,
        (_, false) => Kernel::ScoreManyF16,
    };
    let total = TotalArguments {
        tile_totals: work.address(tile_totals),
        totals: work.address(totals),
        rows: query_rows,
        tile_count,
    };
    let (token_span, head_span) = choice.spans_of_row();
    let choose = ChooseArguments {
        scores: work.address(scores),
        totals: work.address(totals),
        candidates: work.address(candidates),
        rows,
        blocks,
        slices,
        kept,
        tokens: choice.tokens,
        query_heads: choice.query_heads,
        kv_heads: choice.kv_heads,
        token_span,
        head_span,
        add: (choice.granularity == Granularity::KvGroup).into(),
    };
    let merge = MergeArguments {
        candidates: work.address(candidates),
        positions: work.address(positions),
        scores: work.address(shares),
        count: slices * kept,
        k,
    };
    // SAFETY: each kernel gets its own structure. `tiles` has compared every tile with its keys and the queries, so
    // that what `score` reads is there, and every size with its limit, so that no product above wraps; all other memory
    // was planned above in the shapes that the kernels' sources give for these very fields. It lives until `read` below
    // has waited, or a launch has failed, which leaves nothing running, and the keys are borrowed until then.
    unsafe {
        runner.launch(score_kernel, score_launch, &score)?;
        runner.launch(Kernel::Total, Launch::warps(query_rows, 0), &total)?;
        runner.launch(Kernel::Choose, Launch::warps(rows * slices, 4 * SLICE * WARPS), &choose)?;
        runner.launch(Kernel::Merge, Launch::new([rows, 1], 2 * 4 * MERGE_WARPS).of_warps(MERGE_WARPS), &merge)?;
    }
    let (positions, scores) = work.read(positions, shares)?;
    Ok(Chosen { rows: rows as usize, k: k as usize, positions, scores })
}

impl<M> Choice<'_, M> {
    /// Query tokens and heads that share a row of choices; rows are in the order of [`Granularity::row`].
    fn spans_of_row(&self) -> (u32, u32) {
        let group = self.query_heads / self.kv_heads;
        match self.granularity {
            Granularity::TokenHead => (1, 1),
            Granularity::Head => (self.tokens, 1),
            Granularity::Token => (1, self.query_heads),
            Granularity::KvGroup => (1, group),
            Granularity::Shared => (self.tokens, self.query_heads),
        }
    }

    /// Compares every field with its limit and with the keys, and cuts the spans into tiles.
    fn tiles<R: Runner<Memory = M>>(&self, runner: &R) -> Result<Vec<KernelTile>, ArgumentError> {
        let heads = self.query_heads;
        within("layer", 0..=limits::LAYERS_MAX.into(), self.layer.into())?;
        within("tokens", 0..=limits::QUERY_TOKENS_MAX.into(), self.tokens.into())?;
        within("query_heads", 1..=limits::HEADS_MAX.into(), heads.into())?;
        within("kv_heads", 1..=heads.into(), self.kv_heads.into())?;
        multiple("query_heads", self.kv_heads.into(), heads.into())?;
        within("top_k", 0..=limits::TOP_K_MAX.into(), self.top_k.into())?;
        within("head_dim", 1..=HEAD_DIM_MAX as u64, self.head_dim as u64)?;
        let set_len = self.tokens as usize * heads as usize * self.head_dim;
        multiple("queries", set_len as u64, self.queries.len() as u64)?;
        let sets = self.queries.len().checked_div(set_len);
        let rows = self.tokens as u64 * heads as u64;

        let mut tiles = Vec::new();
        let mut position = 0;
        for span in self.spans.iter().filter(|span| !span.blocks.is_empty()) {
            self.check_keys(span)?;
            // Without tokens there are no queries, and none are read.
            if let Some(sets) = sets {
                below("set of a span", sets, span.set.into())?;
            }
            let blocks = position + span.blocks.len() as u64;
            within("blocks", 0..=BLOCKS_MAX, blocks)?;
            within("scores", 0..=limits::LOOKUP_SCORES_MAX, rows * blocks)?;
            position = self.cut(runner, span, position, &mut tiles);
        }
        Ok(tiles)
    }

    /// Refuses keys of another form, and blocks that they do not have.
    fn check_keys(&self, Span { keys, keys_per_block, blocks, .. }: &Span<'_, M>) -> Result<(), ArgumentError> {
        within("keys_per_block of a span", 1..=limits::BLOCK_TOKENS_MAX.into(), (*keys_per_block).into())?;
        if keys.dtype() != self.dtype {
            return Err(ArgumentError::Dtype { expected: self.dtype, found: keys.dtype() });
        }
        length("head_dim of keys", self.head_dim, keys.head_dim)?;
        let pieces = (self.layer as u64 + 1) * self.kv_heads as u64;
        within("pieces up to the layer", 0..=keys.pieces as u64, pieces)?;
        // The kernels count keys in 32 bits.
        let room = (keys.piece_panels as u64 * PANEL as u64).min(u32::MAX.into());
        within("end of a span's keys", 0..=room, blocks.end as u64 * *keys_per_block as u64)
    }

    /// Appends the tiles of a span whose first block is at `position`; returns the position behind its last.
    fn cut<R: Runner<Memory = M>>(
        &self,
        runner: &R,
        span: &Span<'_, M>,
        mut position: u64,
        tiles: &mut Vec<KernelTile>,
    ) -> u64 {
        let tile_blocks = (TILE_KEYS / span.keys_per_block as usize).max(1);
        let values = runner.address(&span.keys.values);
        let scales = span.keys.scales.as_ref().map_or(0, |scales| runner.address(scales));
        for first in span.blocks.clone().step_by(tile_blocks) {
            let blocks = (span.blocks.end - first).min(tile_blocks as u32);
            tiles.push(KernelTile {
                values,
                scales,
                piece_panels: span.keys.piece_panels as u32,
                key: first * span.keys_per_block,
                blocks,
                position: position as u32,
                set: span.set,
                keys_per_block: span.keys_per_block,
            });
            position += blocks as u64;
        }
        position
    }
}
