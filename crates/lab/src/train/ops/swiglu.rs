//! SwiGLU (Shazeer 2020): `y = silu(gate) up` with `silu(z) = z s`, `s = 1 / (1 + e^-z)`.
//!
//! Backward: `dup = dy z s` and `dgate = dy up s (1 + z (1 - s))`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::train::slices::{gradient, input, values};
use linalg::{exp, simd};

/// Values of one task.
const TASK_LEN: usize = 16 * 1024;

struct SwiGlu;

/// `gate (.., ffn)`, `up (.., ffn)` -> `(.., ffn)`.
pub(in crate::train) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if gate_layout.shape() != up_layout.shape() {
            bail!("gate {:?} does not fit up {:?}", gate_layout.shape(), up_layout.shape());
        }
        let (gate, up) = (input(gate, gate_layout)?, input(up, up_layout)?);
        let mut y = vec![0.0; gate.len()];
        let tasks = y.par_chunks_mut(TASK_LEN).zip(gate.par_chunks(TASK_LEN));
        tasks.zip(up.par_chunks(TASK_LEN)).for_each(|((y, gate), up)| silu_times(gate, up, y));
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        y_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gate_values, up_values, y_gradient) = (values(gate)?, values(up)?, values(y_gradient)?);
        let (mut of_gate, mut of_up) = (vec![0.0; gate_values.len()], vec![0.0; up_values.len()]);
        let outs = of_gate.par_chunks_mut(TASK_LEN).zip(of_up.par_chunks_mut(TASK_LEN));
        let ins = gate_values.par_chunks(TASK_LEN).zip(up_values.par_chunks(TASK_LEN));
        outs.zip(ins)
            .zip(y_gradient.par_chunks(TASK_LEN))
            .for_each(|(((of_gate, of_up), (gate, up)), of_y)| pull_back(gate, up, of_y, of_gate, of_up));
        Ok((Some(gradient(of_gate, gate)?), Some(gradient(of_up, up)?)))
    }
}

simd! {
    /// `y = silu(gate) up`. Slices of equal length.
    fn silu_times(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp::<FMA>(-*gate)) * up;
        }
    }
}

simd! {
    /// Slices of equal length.
    fn pull_back(gate: &[f32], up: &[f32], of_y: &[f32], of_gate: &mut [f32], of_up: &mut [f32]) {
        let outs = of_gate.iter_mut().zip(of_up.iter_mut());
        for (((of_gate, of_up), of_y), (gate, up)) in outs.zip(of_y).zip(gate.iter().zip(up)) {
            let share = 1.0 / (1.0 + exp::<FMA>(-*gate));
            *of_up = of_y * gate * share;
            *of_gate = of_y * up * share * (1.0 + gate * (1.0 - share));
        }
    }
}
