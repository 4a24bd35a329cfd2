//! Rows of a table by token id. Backward: each token's gradient is added to its row.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::train::slices::{gradient, input, values};
use linalg::add_scaled;

struct Embedding {
    /// `(N, T)`
    ids: Arc<[u32]>,
    sequences: usize,
}

/// `table (vocab, hidden)`, `ids (N, T)` below `vocab` -> `(N, T, hidden)`.
pub(in crate::train) fn embed(table: &Tensor, ids: Arc<[u32]>, sequences: usize) -> Result<Tensor> {
    table.apply_op1(Embedding { ids, sequences })
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = layout.shape().dims2()?;
        let table = input(table, layout)?;
        let mut x = Vec::with_capacity(self.ids.len() * hidden);
        for &id in self.ids.iter() {
            match table.get(id as usize * hidden..(id as usize + 1) * hidden) {
                Some(row) => x.extend_from_slice(row),
                None => bail!("token {id} is not in the table {:?}", layout.shape()),
            }
        }
        let tokens = self.ids.len() / self.sequences.max(1);
        Ok((CpuStorage::F32(x), Shape::from((self.sequences, tokens, hidden))))
    }

    fn bwd(&self, table: &Tensor, _x: &Tensor, x_gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, hidden) = table.dims2()?;
        let mut of_table = vec![0.0; table.elem_count()];
        for (&id, row) in self.ids.iter().zip(values(x_gradient)?.chunks_exact(hidden)) {
            add_scaled(&mut of_table[id as usize * hidden..][..hidden], 1.0, row);
        }
        Ok(Some(gradient(of_table, table)?))
    }
}
