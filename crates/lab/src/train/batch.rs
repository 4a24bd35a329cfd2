//! What one step trains on.

use super::error::TrainError;
use super::grouped::GroupDropout;
use landmarkdb_llm::ModelConfig;

/// One step's sequences, all of one length T.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// N
    pub sequences: usize,
    /// T
    pub tokens: usize,
    /// `(N, T)`; for a model with landmarks, every block of B tokens is closed by one.
    pub ids: Vec<u32>,
    /// `(N, T)`: where each token stands, for the rotation.
    pub positions: Vec<u32>,
    /// `(N, T)`: the token that each should predict.
    pub targets: Vec<u32>,
    /// `(N, T)`: the share of each prediction in the loss; 0 where there is nothing to predict.
    pub weights: Vec<f32>,
}

impl Batch {
    /// Whether a model can be trained on this.
    pub(super) fn check(&self, config: &ModelConfig) -> Result<(), TrainError> {
        let tokens = self.sequences * self.tokens;
        if tokens == 0 {
            return Err(invalid("sequences and tokens", "at least 1 each".into(), "an empty batch".into()));
        }
        let lengths = [
            ("ids", self.ids.len()),
            ("positions", self.positions.len()),
            ("targets", self.targets.len()),
            ("weights", self.weights.len()),
        ];
        if let Some((field, found)) = lengths.into_iter().find(|&(_, length)| length != tokens) {
            return Err(invalid(field, format!("{} x {} numbers", self.sequences, self.tokens), found.to_string()));
        }
        let unknown = |id: &u32| *id as usize >= config.vocab;
        if let Some(id) = self.ids.iter().find(|id| unknown(id)) {
            return Err(invalid("ids", format!("tokens below {}", config.vocab), id.to_string()));
        }
        let predicted = self.targets.iter().zip(&self.weights).filter(|(_, weight)| **weight != 0.0);
        if let Some((id, _)) = predicted.into_iter().find(|(id, _)| unknown(id)) {
            return Err(invalid("targets", format!("tokens below {}", config.vocab), id.to_string()));
        }
        if let Some(weight) = self.weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
            return Err(invalid("weights", "finite numbers, none below 0".into(), weight.to_string()));
        }
        if self.weights.iter().all(|&weight| weight == 0.0) {
            return Err(invalid("weights", "at least one above 0".into(), "nothing to predict".into()));
        }
        self.check_landmarks(config)
    }

    /// Attention takes the places of landmarks from the block length: one elsewhere would be trained as something else.
    fn check_landmarks(&self, config: &ModelConfig) -> Result<(), TrainError> {
        let Some(landmark) = config.landmark else { return Ok(()) };
        for (at, &found) in self.ids.iter().enumerate() {
            let (sequence, token) = (at / self.tokens, at % self.tokens);
            let closes_block = token as u32 % landmark.block_tokens == landmark.block_tokens - 1;
            if closes_block != (found == landmark.id) {
                return Err(TrainError::LandmarkPlace {
                    sequence,
                    token,
                    found,
                    landmark: landmark.id,
                    block_tokens: landmark.block_tokens,
                });
            }
        }
        Ok(())
    }
}

impl GroupDropout {
    /// Whether the rate is one.
    pub(super) fn check(self) -> Result<(), TrainError> {
        if (0.0..1.0).contains(&self.rate) {
            return Ok(());
        }
        Err(invalid("group dropout", "a rate from 0 up to but not including 1".into(), self.rate.to_string()))
    }
}

fn invalid(field: &'static str, expected: String, found: String) -> TrainError {
    TrainError::Invalid { field, expected, found }
}
