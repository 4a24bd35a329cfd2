//! AdamW (Loshchilov and Hutter 2019), and the clipping of gradients before it.
//!
//! candle-nn has one too, but keeps the moments to itself, and a checkpoint without them cannot be continued exactly.

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use rayon::prelude::*;

use super::error::TrainError;
use super::slices::values;
use super::weights::Parameter;
use linalg::simd;

const BETA1: f64 = 0.9;
const EPSILON: f64 = 1e-8;

/// Values that one task works on: small enough to share out a small model, large enough to pay for a task.
const TASK_LEN: usize = 1 << 14;

/// The gradients of one step, in the order of the parameters.
pub(super) struct Gradients(Vec<Vec<f32>>);

/// The moments of every parameter, in their order.
pub(super) struct AdamW {
    pub(super) beta2: f64,
    pub(super) weight_decay: f64,
    /// Updates made.
    pub(super) steps: u64,
    pub(super) moments: Vec<Moments>,
}

/// Running means of one parameter's gradient and of its square, flat.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Moments {
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
}

/// What an update multiplies with, the same for all values of a parameter.
#[derive(Clone, Copy, Debug)]
struct Factors {
    /// Clips the gradient.
    gradient: f32,
    beta1: f32,
    beta2: f32,
    /// What decay leaves of a weight.
    kept: f32,
    /// Learning rate over the first moment's missing weight.
    rate: f32,
    /// One over the second moment's missing weight.
    second: f32,
    epsilon: f32,
}

impl Gradients {
    /// Takes the gradients out of `store`. A parameter that had no part in the loss has the gradient zero.
    pub(super) fn take(store: &GradStore, parameters: &[Parameter]) -> Result<Self, TrainError> {
        let gradient = |parameter: &Parameter| match store.get(parameter.var.as_tensor()) {
            Some(gradient) => Ok(values(&gradient.contiguous()?)?.to_vec()),
            None => Ok(vec![0.0; parameter.var.elem_count()]),
        };
        parameters.iter().map(gradient).collect::<Result<_, TrainError>>().map(Gradients)
    }

    /// The length of all gradients together.
    pub(super) fn norm(&self) -> f64 {
        // Each task's sum has its own place, so the order of the additions does not depend on the threads.
        let square = |values: &[f32]| values.iter().map(|&x| x as f64 * x as f64).sum::<f64>();
        let sums = |gradient: &Vec<f32>| gradient.par_chunks(TASK_LEN).map(square).collect::<Vec<f64>>();
        self.0.iter().flat_map(sums).sum::<f64>().sqrt()
    }
}

impl AdamW {
    pub(super) fn new(parameters: &[Parameter], beta2: f64, weight_decay: f64) -> Self {
        let zeros = |parameter: &Parameter| vec![0.0; parameter.var.elem_count()];
        let moments = |parameter| Moments { first: zeros(parameter), second: zeros(parameter) };
        AdamW { beta2, weight_decay, steps: 0, moments: parameters.iter().map(moments).collect() }
    }

    /// Moves the parameters against their gradients, those scaled by `gradient_scale` first. Decay shrinks the weights
    /// themselves, where [`Parameter::decay`] says so.
    pub(super) fn step(
        &mut self,
        parameters: &[Parameter],
        gradients: &Gradients,
        gradient_scale: f64,
        learning_rate: f64,
    ) -> Result<(), TrainError> {
        self.steps += 1;
        for ((parameter, gradient), moments) in parameters.iter().zip(&gradients.0).zip(&mut self.moments) {
            let factors = Factors {
                gradient: gradient_scale as f32,
                beta1: BETA1 as f32,
                beta2: self.beta2 as f32,
                kept: (1.0 - if parameter.decay { learning_rate * self.weight_decay } else { 0.0 }) as f32,
                rate: (learning_rate / (1.0 - BETA1.powf(self.steps as f64))) as f32,
                second: (1.0 - self.beta2.powf(self.steps as f64)).recip() as f32,
                epsilon: EPSILON as f32,
            };
            let mut weights = values(&parameter.var)?.to_vec();
            weights
                .par_chunks_mut(TASK_LEN)
                .zip(gradient.par_chunks(TASK_LEN))
                .zip(moments.first.par_chunks_mut(TASK_LEN))
                .zip(moments.second.par_chunks_mut(TASK_LEN))
                .for_each(|(((weights, gradient), first), second)| update(weights, gradient, first, second, factors));
            let shape = parameter.var.shape().clone();
            parameter.var.set(&Tensor::from_vec(weights, shape, parameter.var.device())?)?;
        }
        Ok(())
    }
}

simd! {
    /// One update of equally long slices.
    fn update(weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], by: Factors) {
        for (((weight, gradient), first), second) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
            let gradient = gradient * by.gradient;
            *first = by.beta1 * *first + (1.0 - by.beta1) * gradient;
            *second = by.beta2 * *second + (1.0 - by.beta2) * gradient * gradient;
            let spread = (*second * by.second).sqrt() + by.epsilon;
            *weight = *weight * by.kept - by.rate * *first / spread;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn parameter(values: &[f32], decay: bool) -> Parameter {
        let var = Var::from_slice(values, values.len(), &Device::Cpu).unwrap();
        Parameter { name: format!("p{}", values.len()), var, decay }
    }

    /// The paper's algorithm 2, in double precision.
    fn reference(
        weight: &mut f64,
        moments: &mut [f64; 2],
        gradient: f64,
        step: i32,
        rate: f64,
        decay: f64,
        beta2: f64,
    ) {
        moments[0] = 0.9 * moments[0] + 0.1 * gradient;
        moments[1] = beta2 * moments[1] + (1.0 - beta2) * gradient * gradient;
        let first = moments[0] / (1.0 - 0.9f64.powi(step));
        let second = moments[1] / (1.0 - beta2.powi(step));
        *weight -= rate * (first / (second.sqrt() + 1e-8) + decay * *weight);
    }

    #[test]
    fn steps_agree_with_the_algorithm_in_double_precision() {
        let (beta2, decay) = (0.98, 0.05);
        for sizes in [vec![1, 5], vec![TASK_LEN + 3, 2]] {
            let start = |size: usize| (0..size).map(|i| (i % 7) as f32 / 3.0 - 1.0).collect::<Vec<_>>();
            let parameters = [parameter(&start(sizes[0]), true), parameter(&start(sizes[1]), false)];
            let mut adam = AdamW::new(&parameters, beta2, decay);
            let mut expected: Vec<Vec<(f64, [f64; 2])>> =
                sizes.iter().map(|&size| start(size).iter().map(|&x| (x as f64, [0.0; 2])).collect()).collect();
            for step in 1..=5 {
                let gradient = |i: usize| ((i * 13 + step * 5) % 11) as f32 / 5.0 - 1.0;
                let gradients = Gradients(sizes.iter().map(|&size| (0..size).map(gradient).collect()).collect());
                let (scale, rate) = (0.5, 0.01 * step as f64);
                adam.step(&parameters, &gradients, scale, rate).unwrap();
                for (parameter, expected) in expected.iter_mut().enumerate() {
                    let decay = if parameter == 0 { decay } else { 0.0 };
                    for (i, (weight, moments)) in expected.iter_mut().enumerate() {
                        reference(weight, moments, gradient(i) as f64 * scale, step as i32, rate, decay, beta2);
                    }
                }
            }
            for (parameter, expected) in parameters.iter().zip(&expected) {
                for (found, (expected, _)) in values(&parameter.var).unwrap().iter().zip(expected) {
                    assert!((*found as f64 - expected).abs() < 1e-6, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn the_first_step_is_as_long_as_the_learning_rate() {
        let parameters = [parameter(&[1.0, 1.0, 1.0], false)];
        let mut adam = AdamW::new(&parameters, 0.999, 0.0);
        adam.step(&parameters, &Gradients(vec![vec![1e-3, -50.0, 0.0]]), 1.0, 0.1).unwrap();
        let found = values(&parameters[0].var).unwrap().to_vec();
        assert!((found[0] - 0.9).abs() < 1e-4 && (found[1] - 1.1).abs() < 1e-4 && found[2] == 1.0, "{found:?}");
    }

    #[test]
    fn gradients_are_taken_by_parameter_and_measured_together() {
        let parameters = [parameter(&[1.0, 2.0], true), parameter(&[3.0], true), parameter(&[0.0; 3], true)];
        let loss = (parameters[0].var.sqr().unwrap().sum_all().unwrap() * 2.0).unwrap();
        let loss = (loss + parameters[1].var.sum_all().unwrap()).unwrap();
        let gradients = Gradients::take(&loss.backward().unwrap(), &parameters).unwrap();
        assert_eq!(gradients.0, [vec![4.0, 8.0], vec![1.0], vec![0.0; 3]]);
        assert!((gradients.norm() - 9.0).abs() < 1e-12);
    }
}
