//! Every eligible key is scored, in tiles that rayon's pool shares out, without allocation per key. Step 1 of [`super::fast`].
//!
//! The log-sum-exp of each row is taken while its tile is in the first-level cache. Scores lie as
//! `(Hkv, tile, T * G, blocks of the tile)`, so that each tile of each KV head is one contiguous part that one task writes.

use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{self, Form, Rows};
use super::layout::{CHUNK_KEYS_MAX, PANEL};
use super::reduce::{add_logs, maxima, reduce};
use super::scratch::Scratch;
use super::snapshot::Chunk;
use super::{DocumentKeys, Query};

/// Multiplications below which waking other threads costs more than it saves: about 20 us of one core.
const PARALLEL_WORK_MIN: usize = 1 << 18;

/// Query rows whose scores against a tile are kept at once: 64 x 2048 values stay in a core's own cache. A multiple of
/// the rows that the kernel packs together.
pub(super) const STRIP_ROWS: usize = 16 * kernel::ROWS;

/// Blocks that are compared with the k-th best at once.
pub(super) const STRIDE: usize = 64;

/// Consecutive eligible blocks of one chunk that are scored with the same queries.
pub(super) struct Tile<'a> {
    pub(super) chunk: &'a Chunk,
    /// In the chunk.
    pub(super) blocks: Range<usize>,
    /// Position of the first block among the eligible ones.
    pub(super) start: usize,
    /// Strides of all tiles before.
    pub(super) first_stride: usize,
    /// How many tiles are before.
    pub(super) number: usize,
    /// Which queries: 0 for older blocks, `1 + j` for the j-th recent one.
    pub(super) set: usize,
    /// Which entry of the scope.
    pub(super) entry: usize,
}

/// The queries of one set, times the softmax scale.
struct Set {
    /// `(Hkv, T * G, D)`
    values: Vec<f32>,
    /// `(Hkv, strips)`; none where every tile's keys need a projection of their own.
    strips: Vec<Rows>,
}

/// Everything that the steps share.
pub(super) struct Scan<'a> {
    pub(super) query: &'a Query<'a>,
    pub(super) tiles: &'a [Tile<'a>],
    /// Query tokens, those of the query or some of them.
    pub(super) tokens: Range<usize>,
    /// N
    pub(super) eligible: usize,
    /// Strides of all tiles.
    pub(super) strides: usize,
    /// T * G, query rows of one KV head; row `t * G + g`.
    pub(super) head_rows: usize,
    form: Form,
    sets: Vec<Set>,
    /// By entry of the scope, `(Hkv, strips)`: the queries for older blocks projected onto its keys; none if these have
    /// no quantizers.
    projected: Vec<Vec<Rows>>,
    pub(super) parallel: bool,
}

/// Scores of all eligible blocks for all query rows, with what choosing needs to know about many at once.
pub(super) struct Scores {
    /// `(Hkv, tile, T * G, blocks of the tile)`
    pub(super) values: Scratch,
    /// `(Hkv, tile, T * G, strides of the tile)`: the largest score of each.
    pub(super) peaks: Scratch,
    /// `(Hkv, tile, T * G)`: lengths of the queries times the tile's channels; empty where blocks are not scored again.
    pub(super) norms: Scratch,
    /// `(Hkv, T * G)`: log-sum-exp of each row.
    pub(super) totals: Vec<f32>,
}

/// One tile of one KV head, and where its scores go.
struct TileScores<'a> {
    head: usize,
    tile: &'a Tile<'a>,
    /// `(T * G, blocks of the tile)`
    scores: &'a mut [f32],
    /// `(T * G, strides of the tile)`
    peaks: &'a mut [f32],
    /// `(T * G)`: log-sum-exp over the tile.
    totals: &'a mut [f32],
    /// `(T * G)`, or empty: lengths of the queries times the channels.
    norms: &'a mut [f32],
}

/// Cuts the eligible blocks where the chunk, the queries or the size bound says so.
pub(super) fn tiles<'a>(query: &'a Query<'a>) -> Vec<Tile<'a>> {
    let (eligible, recent) = (query.eligible(), query.recent());
    let older = eligible - recent;
    let tile_blocks = query.layout.chunk_blocks();
    let mut tiles = Vec::new();
    let (mut start, mut first_stride) = (0usize, 0);
    for (entry, scoped) in query.scope.iter().enumerate() {
        for (chunk, part) in scoped.keys.parts(scoped.blocks.clone()) {
            let mut from = part.start;
            while from < part.end {
                let (set, room) = match start.checked_sub(older) {
                    None => (0, tile_blocks.min(older - start)),
                    Some(recent) => (1 + recent, 1),
                };
                let blocks = from..part.end.min(from + room);
                from = blocks.end;
                tiles.push(Tile {
                    chunk,
                    start,
                    first_stride,
                    number: tiles.len(),
                    set,
                    entry,
                    blocks: blocks.clone(),
                });
                start += blocks.len();
                first_stride += blocks.len().div_ceil(STRIDE);
            }
        }
    }
    debug_assert_eq!(start, eligible);
    tiles
}

impl Tile<'_> {
    pub(super) fn strides(&self) -> usize {
        self.blocks.len().div_ceil(STRIDE)
    }
}

impl<'a> Scan<'a> {
    pub(super) fn new(query: &'a Query<'a>, tiles: &'a [Tile<'a>], tokens: Range<usize>) -> Self {
        let eligible = query.eligible();
        let keys = eligible * query.layout.keys_per_block;
        let query_len = tokens.len() * query.query_heads * query.layout.head_dim;
        let head_rows = tokens.len() * query.query_heads / query.layout.kv_heads;
        let mut scan = Scan {
            query,
            tiles,
            eligible,
            strides: tiles.iter().map(Tile::strides).sum(),
            head_rows,
            form: Form::of(query.layout.scanned(), head_rows),
            sets: Vec::new(),
            projected: Vec::new(),
            parallel: query_len * keys >= PARALLEL_WORK_MIN,
            tokens,
        };
        scan.sets = (0..=query.recent()).map(|set| scan.packed(set)).collect();
        scan.projected = query.scope.iter().map(|scoped| scan.project(&scoped.keys)).collect();
        scan
    }

    /// Whether scores come from compressed keys, and blocks that could be among the best are scored again.
    pub(super) fn refines(&self) -> bool {
        self.query.layout.compressed.is_some()
    }

    /// The piece of a chunk that belongs to a KV head.
    pub(super) fn piece(&self, head: usize) -> usize {
        self.query.layer * self.query.layout.kv_heads + head
    }

    /// Queries of one KV head `(T * G, D)` times the softmax scale.
    fn rows(&self, set: usize, head: usize) -> &[f32] {
        let head_len = self.head_rows * self.query.layout.head_dim;
        &self.sets[set].values[head * head_len..][..head_len]
    }

    /// One of them `(D)`.
    pub(super) fn row(&self, set: usize, head: usize, row: usize) -> &[f32] {
        let dim = self.query.layout.head_dim;
        &self.rows(set, head)[row * dim..][..dim]
    }

    /// Runs a task for every item, on all threads if there is enough to do.
    fn for_each<T: Send>(&self, items: Vec<T>, task: impl Fn(T) + Sync + Send) {
        if self.parallel {
            items.into_par_iter().for_each(task);
        } else {
            items.into_iter().for_each(task);
        }
    }

    /// Scores everything.
    pub(super) fn score(&self) -> Scores {
        let (kv_heads, rows) = (self.query.layout.kv_heads, self.head_rows);
        let mut values = Scratch::take(kv_heads * rows * self.eligible);
        let mut peaks = Scratch::take(kv_heads * rows * self.strides);
        let mut tile_totals = Scratch::take(kv_heads * self.tiles.len() * rows);
        let norms_count = if self.refines() { rows } else { 0 };
        let mut norms = Scratch::take(kv_heads * self.tiles.len() * norms_count);
        let mut of_tiles = Vec::with_capacity(kv_heads * self.tiles.len());
        let (mut scores_left, mut peaks_left) = (&mut *values, &mut *peaks);
        let (mut totals_left, mut norms_left) = (&mut *tile_totals, &mut *norms);
        for head in 0..kv_heads {
            for tile in self.tiles {
                let scores = scores_left.split_off_mut(..rows * tile.blocks.len()).unwrap_or_default();
                let peaks = peaks_left.split_off_mut(..rows * tile.strides()).unwrap_or_default();
                let totals = totals_left.split_off_mut(..rows).unwrap_or_default();
                let norms = norms_left.split_off_mut(..norms_count).unwrap_or_default();
                of_tiles.push(TileScores { head, tile, scores, peaks, totals, norms });
            }
        }
        self.for_each(of_tiles, |into| {
            if self.query.until.is_over() {
                return;
            }
            if let Some(strips) = self.strips(into.tile, into.head) {
                return self.score_tile(into, strips);
            }
            let (chunk, queries) = (into.tile.chunk, self.rows(into.tile.set, into.head));
            let queries = chunk.project(self.piece(into.head), queries);
            into.norms.iter_mut().zip(queries.chunks_exact(chunk.width())).for_each(|(norm, row)| *norm = length(row));
            let strips: Vec<Rows> = self.pack(&queries, chunk.width()).collect();
            self.score_tile(into, &strips);
        });
        let mut totals = vec![f32::NEG_INFINITY; kv_heads * rows];
        for (totals, tiles) in totals.chunks_exact_mut(rows).zip(tile_totals.chunks_exact(rows * self.tiles.len())) {
            for tile in tiles.chunks_exact(rows) {
                totals.iter_mut().zip(tile).for_each(|(total, tile)| *total = add_logs(*total, *tile));
            }
        }
        Scores { values, peaks, norms, totals }
    }

    /// The packed queries that score a tile's keys; `None` if no other tile's are scored with the same.
    fn strips(&self, tile: &Tile<'_>, head: usize) -> Option<&[Rows]> {
        let strips = self.head_rows.div_ceil(STRIP_ROWS);
        let packed = match (tile.set, tile.chunk.has_quantizers()) {
            (0, true) => &self.projected[tile.entry],
            (_, true) => return None,
            (set, false) => &self.sets[set].strips,
        };
        packed.get(head * strips..(head + 1) * strips)
    }

    /// Queries `(rows, W)` of one KV head as strips.
    fn pack(&self, queries: &[f32], width: usize) -> impl Iterator<Item = Rows> {
        queries.chunks(STRIP_ROWS * width).map(move |strip| Rows::new(self.form, strip, width))
    }

    /// The queries for older blocks projected onto a document's keys `(Hkv, strips)`; none if these have no quantizers.
    fn project(&self, keys: &DocumentKeys) -> Vec<Rows> {
        let Some(chunk) = keys.chunk_with_quantizers() else { return Vec::new() };
        let projected = (0..self.query.layout.kv_heads).map(|head| chunk.project(self.piece(head), self.rows(0, head)));
        projected.flat_map(|queries| self.pack(&queries, chunk.width()).collect::<Vec<Rows>>()).collect()
    }

    fn packed(&self, set: usize) -> Set {
        let query = self.query;
        let dim = query.layout.head_dim;
        let group = query.query_heads / query.layout.kv_heads;
        let token_len = query.query_heads * dim;
        let queries = &query.query_set(set)[self.tokens.start * token_len..self.tokens.end * token_len];
        let mut values = Vec::with_capacity(queries.len());
        for head in 0..query.layout.kv_heads {
            for token in queries.chunks_exact(token_len) {
                let rows = &token[head * group * dim..][..group * dim];
                values.extend(rows.iter().map(|number| number * query.softmax_scale));
            }
        }
        if self.refines() || query.scope.iter().all(|scoped| scoped.keys.chunk_with_quantizers().is_some()) {
            return Set { values, strips: Vec::new() };
        }
        let heads = values.chunks_exact(self.head_rows * dim);
        let strips = heads.flat_map(|rows| self.pack(rows, dim)).collect();
        Set { values, strips }
    }

    /// Fills in the scores of packed `queries (strips)`.
    fn score_tile(&self, TileScores { head, tile, scores, peaks, totals, .. }: TileScores<'_>, queries: &[Rows]) {
        let (dim, per_block) = (tile.chunk.width(), tile.chunk.keys_per_block());
        let keys = tile.blocks.start * per_block..tile.blocks.end * per_block;
        let first = keys.start / PANEL;
        let panels = tile.chunk.panels(self.piece(head), first..keys.end.div_ceil(PANEL));
        let width = (keys.end.div_ceil(PANEL) - first) * PANEL;
        let wanted = keys.start - first * PANEL..keys.end - first * PANEL;

        debug_assert!(width <= CHUNK_KEYS_MAX.max(per_block) + 2 * PANEL);
        let mut wide = Scratch::take(if self.form == Form::Wide { width * dim } else { 0 });
        if self.form == Form::Wide {
            panels.widen(dim, &mut wide);
        }
        let (blocks, strides) = (tile.blocks.len(), tile.strides());
        // Nothing to reduce, and nothing to leave out.
        let as_scored = per_block == 1 && width == blocks;
        let mut strip = Scratch::take(if as_scored { 0 } else { STRIP_ROWS.min(self.head_rows) * width });
        let rows = scores.chunks_mut(STRIP_ROWS * blocks).zip(peaks.chunks_mut(STRIP_ROWS * strides));
        for (queries, ((scores, peaks), totals)) in queries.iter().zip(rows.zip(totals.chunks_mut(STRIP_ROWS))) {
            if as_scored {
                queries.score(panels, &wide, scores);
            } else {
                let strip = &mut strip[..totals.len() * width];
                queries.score(panels, &wide, strip);
                for (row, scores) in strip.chunks_exact(width).zip(scores.chunks_exact_mut(blocks)) {
                    reduce(self.query.block_score, &row[wanted.clone()], per_block, scores);
                }
            }
            let rows = scores.chunks_exact(blocks).zip(peaks.chunks_exact_mut(strides));
            for ((scores, peaks), total) in rows.zip(totals) {
                maxima(scores, STRIDE, peaks);
                *total = linalg::log_sum_exp_below(scores, linalg::max(peaks));
            }
        }
    }
}

fn length(values: &[f32]) -> f32 {
    linalg::dot(values, values).sqrt()
}
