//! The landmark's row of an embedding that is frozen otherwise. In the frozen table the row is zero; here what it
//! would have done is added, with a gradient for the row alone.
//!
//! ```text
//! embed:   x[t] += row where t is a landmark        drow = sum of dx[t] over landmarks
//! project: y[t, id] = row x[t] beside y = x table^T     drow = sum of dy[t, id] x[t], dx = dy table + dy[.., id] row
//! ```

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, Var, bail};

use super::linear::product;
use crate::numeric::{Matrix, add_scaled, dot};
use crate::train::numbers::{argument, gradient, numbers, wanted, width, with_width};

/// The row `(hidden)` of the landmark `id`.
pub(in crate::train) struct LandmarkRow {
    pub(in crate::train) id: u32,
    pub(in crate::train) row: Var,
}

impl LandmarkRow {
    /// Adds the row to the landmarks among `ids (N, T)` in `x (N, T, hidden)`.
    pub(in crate::train) fn embed(&self, x: &Tensor, ids: &[u32]) -> Result<Tensor> {
        let places = ids.iter().enumerate().filter(|(_, id)| **id == self.id).map(|(place, _)| place);
        x.apply_op2(&self.row, Embed { places: places.collect() })
    }

    /// `x (.., hidden)`, `table (vocab, hidden)` whose row of the landmark is zero -> `(.., vocab)`.
    pub(in crate::train) fn project(&self, x: &Tensor, table: &Tensor) -> Result<Tensor> {
        x.apply_op2(&self.row, Project { id: self.id as usize, table: table.clone() })
    }
}

struct Embed {
    /// Of landmarks among all tokens.
    places: Arc<[usize]>,
}

impl CustomOp2 for Embed {
    fn name(&self) -> &'static str {
        "embed-landmark"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        row: &CpuStorage,
        row_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut x, row) = (argument(x, x_layout)?.to_vec(), argument(row, row_layout)?);
        let hidden = row.len();
        if width(x_layout) != hidden || self.places.iter().any(|place| (place + 1) * hidden > x.len()) {
            bail!("x {:?} does not fit the row {:?} at {:?}", x_layout.shape(), row_layout.shape(), self.places);
        }
        self.places.iter().for_each(|place| add_scaled(&mut x[place * hidden..][..hidden], 1.0, row));
        Ok((CpuStorage::F32(x), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        row: &Tensor,
        _sum: &Tensor,
        sum_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (hidden, of_sum) = (row.elem_count(), numbers(sum_gradient)?);
        let mut of_row = vec![0.0; hidden];
        self.places.iter().for_each(|place| add_scaled(&mut of_row, 1.0, &of_sum[place * hidden..][..hidden]));
        Ok((wanted(x, || of_sum.to_vec())?, Some(gradient(of_row, row)?)))
    }
}

struct Project {
    id: usize,
    /// `(vocab, hidden)`
    table: Tensor,
}

impl CustomOp2 for Project {
    fn name(&self) -> &'static str {
        "project-landmark"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        row: &CpuStorage,
        row_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (vocab, hidden) = self.table.dims2()?;
        let (x, row) = (argument(x, x_layout)?, argument(row, row_layout)?);
        if width(x_layout) != hidden || row.len() != hidden || self.id >= vocab {
            let (x, row) = (x_layout.shape(), row_layout.shape());
            bail!("x {x:?} and row {} {row:?} do not fit the table {:?}", self.id, self.table.shape());
        }
        let mut y = product(x, hidden, Matrix::new(&numbers(&self.table)?, vocab, hidden).transposed(), vocab);
        y.chunks_exact_mut(vocab).zip(x.chunks_exact(hidden)).for_each(|(y, x)| y[self.id] = dot(row, x));
        Ok((CpuStorage::F32(y), with_width(x_layout, vocab)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        row: &Tensor,
        _y: &Tensor,
        y_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (vocab, hidden) = self.table.dims2()?;
        let (x_numbers, row_numbers, of_y) = (numbers(x)?, numbers(row)?, numbers(y_gradient)?);
        let of_landmark = || of_y.iter().skip(self.id).step_by(vocab);
        let mut of_x = product(&of_y, vocab, Matrix::new(&numbers(&self.table)?, vocab, hidden), hidden);
        of_x.chunks_exact_mut(hidden).zip(of_landmark()).for_each(|(of_x, of_y)| add_scaled(of_x, *of_y, &row_numbers));
        let mut of_row = vec![0.0; hidden];
        x_numbers.chunks_exact(hidden).zip(of_landmark()).for_each(|(x, of_y)| add_scaled(&mut of_row, *of_y, x));
        Ok((Some(gradient(of_x, x)?), Some(gradient(of_row, row)?)))
    }
}
