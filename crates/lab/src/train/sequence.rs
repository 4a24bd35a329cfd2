//! From the tokens of a document to a row of a batch: landmarks go in, targets and positions come out.

use rand::{Rng, RngExt};

use super::batch::Batch;

/// One ordinary token, and what it is worth to predict it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) id: u32,
    pub(super) role: Role,
}

/// What a token is in its document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Text,
    /// A digit of a key that was said a line before.
    Repeated,
    /// A digit of the first answer: the key stands anywhere before it.
    Answer,
}

/// How documents are cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) blocks: usize,
    /// B, the landmark included.
    pub(super) block_tokens: usize,
    /// The landmark token; none for a model without landmarks, whose blocks are ordinary tokens only.
    pub(super) landmark: Option<u32>,
    /// At each landmark positions jump by a random number below this.
    pub(super) pos_jump: u32,
    /// Weight of a digit that can be known, against 1 of any other token.
    pub(super) answer_weight: f32,
}

/// What is trained on in one step.
pub(super) struct Step {
    pub(super) batch: Batch,
    /// `(N, T)`: 1 where a digit of the first answer is predicted.
    pub(super) answers: Vec<f32>,
}

impl Layout {
    /// T
    pub(super) fn tokens(&self) -> usize {
        self.blocks * self.block_tokens
    }

    /// Tokens of the document that fills one row: the last one is only predicted.
    pub(super) fn document_tokens(&self) -> usize {
        self.tokens() - self.landmark.map_or(0, |_| self.blocks) + 1
    }

    /// Rows `(N, T)` of documents of [`Layout::document_tokens`] each. A landmark has no target, and the token before
    /// it predicts the token after it. Positions begin at `first_position` and count landmarks. They jump behind a
    /// landmark, never inside a block: a memory rotates a block's keys by their places in it. `rng` gives the random
    /// numbers of a row.
    pub(super) fn step<R: Rng>(&self, documents: &[Vec<Token>], first_position: u32, rng: impl Fn(usize) -> R) -> Step {
        let (sequences, tokens) = (documents.len(), self.tokens());
        let room = sequences * tokens;
        let mut batch = Batch {
            sequences,
            tokens,
            ids: Vec::with_capacity(room),
            positions: Vec::with_capacity(room),
            targets: Vec::with_capacity(room),
            weights: Vec::with_capacity(room),
        };
        let mut answers = Vec::with_capacity(room);
        for (index, document) in documents.iter().enumerate() {
            debug_assert_eq!(document.len(), self.document_tokens());
            let mut rng = rng(index);
            let mut jumped = 0;
            let mut pairs = document.windows(2);
            for at in 0..tokens {
                let ends_block = (at + 1) % self.block_tokens == 0;
                let landmark = self.landmark.filter(|_| ends_block);
                batch.positions.push(first_position + at as u32 + jumped);
                match (landmark, pairs.len()) {
                    (None, 1..) => {
                        let pair = pairs.next().expect("there was one left");
                        batch.ids.push(pair[0].id);
                        batch.targets.push(pair[1].id);
                        batch.weights.push(if pair[1].role == Role::Text { 1.0 } else { self.answer_weight });
                        answers.push(if pair[1].role == Role::Answer { 1.0 } else { 0.0 });
                    }
                    (landmark, _) => {
                        batch.ids.push(landmark.expect("a document is as long as its row has ordinary tokens"));
                        batch.targets.push(0);
                        batch.weights.push(0.0);
                        answers.push(0.0);
                        jumped += if self.pos_jump > 0 { rng.random_range(0..self.pos_jump) } else { 0 };
                    }
                }
            }
        }
        Step { batch, answers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const LANDMARK: u32 = 99;

    fn layout(landmark: Option<u32>, pos_jump: u32) -> Layout {
        Layout { blocks: 3, block_tokens: 4, landmark, pos_jump, answer_weight: 10.0 }
    }

    fn document(layout: &Layout, first: u32) -> Vec<Token> {
        let role = |index: u32| match index {
            4 => Role::Answer,
            6 => Role::Repeated,
            _ => Role::Text,
        };
        (0..layout.document_tokens() as u32).map(|index| Token { id: first + index, role: role(index) }).collect()
    }

    fn rng(index: usize) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(index as u64)
    }

    #[test]
    fn landmarks_close_blocks_and_are_never_predicted() {
        let layout = layout(Some(LANDMARK), 0);
        assert_eq!((layout.tokens(), layout.document_tokens()), (12, 10));
        let Step { batch, answers } = layout.step(&[document(&layout, 0), document(&layout, 20)], 0, rng);
        assert_eq!((batch.sequences, batch.tokens), (2, 12));
        assert_eq!(batch.ids[..12], [0, 1, 2, 99, 3, 4, 5, 99, 6, 7, 8, 99]);
        assert_eq!(batch.targets[..12], [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0]);
        assert_eq!(batch.weights[..12], [1.0, 1.0, 1.0, 0.0, 10.0, 1.0, 10.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
        assert_eq!(answers[..12], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(batch.ids[12..15], [20, 21, 22]);
        assert_eq!(batch.positions, (0..12).chain(0..12).collect::<Vec<u32>>());
    }

    #[test]
    fn a_plain_model_reads_as_many_tokens_without_landmarks() {
        let layout = layout(None, 0);
        let batch = layout.step(&[document(&layout, 0)], 100, rng).batch;
        assert_eq!(batch.ids, (0..12).collect::<Vec<u32>>());
        assert_eq!(batch.targets, (1..13).collect::<Vec<u32>>());
        assert_eq!(batch.positions, (100..112).collect::<Vec<u32>>());
        assert!(batch.weights.iter().all(|&weight| weight >= 1.0));
    }

    #[test]
    fn positions_jump_behind_landmarks_only() {
        let layout = Layout { blocks: 40, ..layout(Some(LANDMARK), 5) };
        let documents = [document(&layout, 0), document(&layout, 0)];
        let batch = layout.step(&documents, 0, rng).batch;
        let mut jumps = [0; 5];
        for (index, pair) in batch.positions[..160].windows(2).enumerate() {
            let step = pair[1] - pair[0];
            match (index + 1) % 4 {
                0 => jumps[step as usize - 1] += 1,
                _ => assert_eq!(step, 1),
            }
        }
        assert!(jumps.iter().all(|&count| count > 0), "{jumps:?}");
        assert_ne!(batch.positions[..160], batch.positions[160..]);
    }
}
