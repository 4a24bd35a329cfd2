//! What landmark training changes about a model's use: how it reads a text, and what it keeps and retrieves.

use super::config::{Landmark, ModelConfig};
use landmarkdb::{KeyRule, Layers, Normalisation, Placement, Retrieval, Window};

/// Tokens of a block of a model without landmarks, where nothing else is asked for.
const PLAIN_BLOCK_TOKENS: u32 = 64;

/// Blocks of one chunk of a landmark-trained model, where nothing else is asked for: near the contexts that it was
/// trained with, for any block size.
const CHUNK_BLOCKS: usize = 8;

/// Text tokens as a model reads them: with its landmark after every B - 1 of them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Reading {
    /// The ids of text tokens and landmarks, in order.
    pub ids: Vec<u32>,
    /// For each id, which text token it is; for a landmark, which one follows it: their number after the last.
    pub text_tokens: Vec<usize>,
}

impl ModelConfig {
    /// How the model reads `text` after `position` tokens, landmarks included. A landmark follows the last token of
    /// its block at once, so that no landmark is pending between two calls.
    pub fn reading(&self, position: usize, text: &[u32]) -> Reading {
        let Some(landmark) = self.landmark else {
            return Reading { ids: text.to_vec(), text_tokens: (0..text.len()).collect() };
        };
        let mut reading = Reading::default();
        let mut push = |id, text_token| {
            reading.ids.push(id);
            reading.text_tokens.push(text_token);
            (position + reading.ids.len() + 1).is_multiple_of(landmark.block_tokens as usize)
        };
        let mut block_is_full = (position + 1).is_multiple_of(landmark.block_tokens as usize);
        for (text_token, &id) in text.iter().enumerate() {
            if block_is_full {
                push(landmark.id, text_token);
            }
            block_is_full = push(id, text_token);
        }
        if block_is_full && !text.is_empty() {
            push(landmark.id, text.len());
        }
        reading
    }

    /// Whether a token closes a block instead of being text.
    pub fn is_landmark(&self, id: u32) -> bool {
        self.landmark.is_some_and(|landmark| landmark.id == id)
    }

    /// B: the model's own, or what suits a model without landmarks.
    pub fn block_tokens(&self) -> u32 {
        self.landmark.map_or(PLAIN_BLOCK_TOKENS, |landmark| landmark.block_tokens)
    }

    /// What stands for a block: its landmark, or for want of one all its tokens.
    pub fn key_rule(&self) -> KeyRule {
        if self.landmark.is_some() { KeyRule::Landmark } else { KeyRule::Tokens }
    }

    /// [`Normalisation::Plain`] without a landmark, [`Normalisation::Hidden`] with an adapter's, else
    /// [`Normalisation::Grouped`].
    pub fn normalisation(&self) -> Normalisation {
        match self.landmark {
            None => Normalisation::Plain,
            Some(Landmark { hidden: true, .. }) => Normalisation::Hidden,
            Some(_) => Normalisation::Grouped,
        }
    }

    /// The local window that the model works best with: no longer than what it was trained to look back over.
    pub fn window(&self) -> Window {
        if let Some(landmark) = self.trained_landmark() {
            return Window::landmark(CHUNK_BLOCKS * landmark.block_tokens as usize);
        }
        let window = Window { normalisation: self.normalisation(), ..Window::default() };
        Window { tokens: self.longest_window().map_or(window.tokens, |longest| window.tokens.min(longest)), ..window }
    }

    /// The longest local window of a model that was trained to look back no further; `None` where only its context bounds it.
    pub fn longest_window(&self) -> Option<usize> {
        // The query's own block is seen besides.
        let longest = self.architecture.window_tokens_max.map(|tokens| tokens.saturating_sub(self.block_tokens()));
        longest.map(|tokens| tokens as usize)
    }

    /// What to retrieve for the model. Layer 0 does not retrieve by hidden landmarks: before any layer they are all equal.
    pub fn retrieval(&self) -> Retrieval {
        match self.landmark {
            None => Retrieval::default(),
            Some(Landmark { hidden: true, .. }) => {
                let layers = (0..self.layers).map(|layer| layer > 0).collect();
                Retrieval { layers: Layers::These(layers), ..Retrieval::default() }
            }
            Some(_) => Retrieval::landmark(),
        }
    }

    /// Retrieved blocks where they are in their documents, no farther than the model was trained to look back.
    pub fn original_placement(&self) -> Placement {
        let longest = self.architecture.window_tokens_max.unwrap_or(self.context_tokens);
        Placement::Original { within_tokens: longest.min(self.context_tokens) }
    }

    /// What to retrieve while a text is encoded. A landmark-trained model reads on through its memory, as in the paper;
    /// any other keeps to its window, which costs less and serves it as well.
    pub fn encode_retrieval(&self) -> Option<Retrieval> {
        self.trained_landmark().map(|_| self.retrieval())
    }

    /// The landmark, if attention was trained with it.
    fn trained_landmark(&self) -> Option<Landmark> {
        self.landmark.filter(|landmark| !landmark.hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Architecture, Landmark};
    use landmarkdb::Rope;

    fn config(block_tokens: Option<u32>) -> ModelConfig {
        ModelConfig {
            layers: 1,
            query_heads: 1,
            kv_heads: 1,
            head_dim: 2,
            hidden: 2,
            ffn: 2,
            vocab: 100,
            context_tokens: 8,
            norm_epsilon: 1e-5,
            rope: Rope::from_base(1e4, 2),
            tied_output: true,
            eos_ids: vec![],
            landmark: block_tokens.map(|block_tokens| Landmark { id: 99, block_tokens, hidden: false }),
            architecture: Architecture::default(),
        }
    }

    #[test]
    fn a_landmark_closes_every_block_at_once() {
        let config = config(Some(4));
        let reading = config.reading(0, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(reading.ids, [1, 2, 3, 99, 4, 5, 6, 99, 7]);
        assert_eq!(reading.text_tokens, [0, 1, 2, 3, 3, 4, 5, 6, 6]);
        assert_eq!(config.reading(0, &[1, 2, 3]).ids, [1, 2, 3, 99]);
        assert_eq!(config.reading(0, &[]), Reading::default());
    }

    #[test]
    fn reading_in_pieces_is_reading_at_once() {
        let text: Vec<u32> = (0..50).collect();
        for block_tokens in [2, 3, 17] {
            let config = config(Some(block_tokens));
            let whole = config.reading(0, &text).ids;
            for piece in [1, 2, 7, 50] {
                let mut ids: Vec<u32> = Vec::new();
                for text in text.chunks(piece) {
                    ids.extend(config.reading(ids.len(), text).ids);
                }
                assert_eq!(ids, whole, "B = {block_tokens}, {piece} at a time");
            }
        }
    }

    #[test]
    fn a_block_that_somebody_left_open_is_closed_first() {
        assert_eq!(config(Some(4)).reading(7, &[5]).ids, [99, 5]);
        assert_eq!(config(None).reading(7, &[5, 6]).ids, [5, 6]);
    }

    #[test]
    fn a_window_is_no_longer_than_the_one_that_a_model_was_trained_with() {
        for (trained, expected) in [(None, 512), (Some(4096), 512), (Some(300), 300 - 64), (Some(20), 0)] {
            let architecture = Architecture { window_tokens_max: trained, ..Architecture::default() };
            assert_eq!(ModelConfig { architecture, ..config(None) }.window().tokens, expected, "{trained:?}");
        }
    }

    #[test]
    fn blocks_stand_no_farther_than_the_model_was_trained_to_look_back() {
        for (trained, within_tokens) in [(None, 8), (Some(5), 5), (Some(4096), 8)] {
            let architecture = Architecture { window_tokens_max: trained, ..Architecture::default() };
            let placement = ModelConfig { architecture, ..config(None) }.original_placement();
            assert_eq!(placement, Placement::Original { within_tokens }, "{trained:?}");
        }
    }

    #[test]
    fn a_hidden_landmark_leaves_a_model_its_window() {
        let landmark = Some(Landmark { id: 99, block_tokens: 4, hidden: true });
        let hidden = ModelConfig { layers: 3, landmark, ..config(None) };
        assert_eq!(hidden.window(), Window { normalisation: Normalisation::Hidden, ..Window::default() });
        let layers = Layers::These(vec![false, true, true]);
        assert_eq!(hidden.retrieval(), Retrieval { layers, ..Retrieval::default() });
        assert_eq!((hidden.encode_retrieval(), hidden.key_rule()), (None, KeyRule::Landmark));
        assert_eq!(hidden.reading(0, &[1, 2, 3, 4]).ids, [1, 2, 3, 99, 4]);
    }
}
