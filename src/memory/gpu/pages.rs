//! Which pieces lie in a GPU's memory? Those that were attended to last, bounded in bytes.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use rayon::prelude::*;

use super::failure::Failure;
use crate::cuda::{Page, PageLayout, Piece, Runner};
use crate::lock::IgnorePoison;
use crate::lru::LruCache;
use crate::store::piece::{PieceData, PieceLayout, PieceView};
use crate::store::{Store, StoreError};
use crate::types::{BlockId, DocumentId};

/// One piece of a block that does not change any more: a full one, or the tail of a sealed document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PieceId {
    pub(super) block: BlockId,
    /// Tokens of the block.
    pub(super) tokens: usize,
    /// `layer * Hkv + kv_head`
    pub(super) number: usize,
}

/// Bytes of the pages that should be asked for at once: bounds what is loaded together, beside what is kept.
const ONCE_BYTES_MAX: u64 = 256 << 20;

/// The pages that were read last. A page in use whose turn to go comes is freed after its use.
pub(super) struct Pages<M> {
    bytes_max: u64,
    kept: Mutex<LruCache<PieceId, Arc<Page<M>>>>,
}

impl<M> Pages<M> {
    /// Keeps at most so many bytes.
    pub(super) fn new(bytes_max: u64) -> Self {
        Pages { bytes_max, kept: Mutex::new(LruCache::new(bytes_max)) }
    }

    /// How many pages should be asked for at once: no more than are kept.
    pub(super) fn at_once(&self, layout: PageLayout) -> usize {
        self.bytes_max.min(ONCE_BYTES_MAX) as usize / layout.bytes()
    }

    /// A page for each piece; reads from the store those that are not here, without keeping others waiting.
    pub(super) fn get<R: Runner<Memory = M>>(
        &self,
        runner: &R,
        store: &Store,
        layout: PageLayout,
        pieces: &[PieceId],
    ) -> Result<Vec<Arc<Page<M>>>, Failure> {
        let mut found: Vec<Option<Arc<Page<M>>>> = {
            let mut kept = self.kept();
            pieces.iter().map(|&piece| kept.get(piece)).collect()
        };
        let of_absent = pieces.iter().zip(&found).filter(|(_, found)| found.is_none());
        let absent: Vec<PieceId> = of_absent.map(|(&piece, _)| piece).collect();
        if !absent.is_empty() {
            let loaded = load(runner, store, layout, &absent)?;
            let mut kept = self.kept();
            let places = found.iter_mut().filter(|place| place.is_none());
            for ((place, piece), page) in places.zip(absent).zip(loaded) {
                let page = Arc::new(page);
                kept.put(piece, page.clone(), layout.bytes() as u64);
                *place = Some(page);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Drops what is kept of some documents.
    pub(super) fn forget(&self, documents: &HashSet<DocumentId>) {
        self.kept().retain(|piece| !documents.contains(&piece.block.document));
    }

    fn kept(&self) -> MutexGuard<'_, LruCache<PieceId, Arc<Page<M>>>> {
        self.kept.lock().ignore_poison()
    }
}

/// Reads pieces from the store and copies them to the runner's memory.
fn load<R: Runner>(
    runner: &R,
    store: &Store,
    layout: PageLayout,
    pieces: &[PieceId],
) -> Result<Vec<Page<R::Memory>>, Failure> {
    let of_piece = |tokens| PieceLayout { dtype: layout.dtype, tokens, head_dim: layout.head_dim };
    let read = |&PieceId { block, tokens, number }: &PieceId| {
        let mut bytes = Vec::new();
        store.read_piece(block, number, &mut bytes)?;
        of_piece(tokens).check(block, &bytes).map(|()| bytes)
    };
    let stored = pieces.par_iter().map(read).collect::<Result<Vec<_>, StoreError>>()?;
    let stored = pieces.iter().zip(&stored);
    let views: Vec<PieceView<'_>> = stored.map(|(piece, bytes)| of_piece(piece.tokens).view(bytes)).collect();
    let pieces = views.iter().map(|view| match (&view.k, &view.v) {
        (PieceData::F16(k), PieceData::F16(v)) => Ok(Piece::F16 { k, v }),
        (&PieceData::Int8(k), &PieceData::Int8(v)) => {
            Ok(Piece::Int8 { k, k_scales: &view.k_scales, v, v_scales: &view.v_scales })
        }
        _ => Err(Failure::Gpu(format!("pages are f16 or int8, found {}", layout.dtype))),
    });
    let pieces = pieces.collect::<Result<Vec<Piece<'_>>, Failure>>()?;
    Page::upload(runner, layout, &pieces).map_err(Failure::gpu)
}
