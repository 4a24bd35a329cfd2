//! The learning rate over the steps: a linear rise, then half a cosine down to a floor.

use std::f64::consts::PI;

use super::recipe::Recipe;

/// The learning rate of a step, counted from 0. The first step has already a share of the peak, the step after the
/// warm-up the whole, and the last step very nearly the floor.
pub(super) fn learning_rate(recipe: &Recipe, step: u64) -> f64 {
    let warmup = recipe.warmup.min(recipe.steps);
    if step < warmup {
        return recipe.lr * (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (recipe.steps - warmup).max(1) as f64;
    let fallen = (1.0 + (PI * done.min(1.0)).cos()) / 2.0;
    recipe.lr * (recipe.lr_floor + (1.0 - recipe.lr_floor) * fallen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::recipe::tests::tiny;

    #[test]
    fn it_rises_to_the_peak_and_falls_to_the_floor() {
        let recipe = Recipe { steps: 110, warmup: 10, lr: 2e-3, lr_floor: 0.05, ..tiny() };
        let cases = [(0, 2e-4), (4, 1e-3), (9, 2e-3), (10, 2e-3), (60, 2e-3 * 0.525), (110, 1e-4), (500, 1e-4)];
        for (step, expected) in cases {
            let found = learning_rate(&recipe, step);
            assert!((found - expected).abs() < 1e-12, "step {step}: {found} {expected}");
        }
        let after = (10..110).map(|step| learning_rate(&recipe, step)).collect::<Vec<_>>();
        assert!(after.windows(2).all(|pair| pair[1] < pair[0]));
    }

    #[test]
    fn no_warmup_and_nothing_but_warmup_are_fine() {
        let rate = |warmup, step| learning_rate(&Recipe { steps: 4, warmup, lr: 1.0, ..tiny() }, step);
        assert_eq!(rate(0, 0), 1.0);
        assert_eq!((rate(4, 0), rate(4, 3)), (0.25, 1.0));
        assert_eq!((rate(9, 0), rate(9, 3)), (0.25, 1.0));
    }
}
