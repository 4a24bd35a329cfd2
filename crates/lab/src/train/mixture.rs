//! What is read in which step. A step's batch follows from the recipe, the texts and the step's number alone, so a
//! resumed training reads what an uninterrupted one would have read.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::documents::Documents;
use super::error::TrainError;
use super::recipe::{Kind, Phase, Recipe};
use super::sequence::{Layout, Role, Step, Token};
use super::texts::Texts;
use landmarkdb_llm::{ModelConfig, Tokenizer};

/// What random numbers are drawn for: each use has a stream of its own.
#[derive(Clone, Copy)]
enum Draw {
    Document = 0,
    Positions = 1,
    Stream = 2,
}

/// Steps of passkey documents and prose, or of prose in its order for a recurrent model.
pub(super) struct Mixture<'a> {
    recipe: &'a Recipe,
    landmark: Option<u32>,
    texts: &'a Texts,
    documents: Documents<'a>,
}

impl<'a> Mixture<'a> {
    /// # Errors
    /// When the texts or the recipe's sequences are too short for what is to be cut from them.
    pub(super) fn new(
        recipe: &'a Recipe,
        model: &ModelConfig,
        texts: &'a Texts,
        tokenizer: &'a Tokenizer,
    ) -> Result<Self, TrainError> {
        let landmark = model.landmark.map(|landmark| landmark.id);
        let layouts: Vec<Layout> = recipe.phases.iter().map(|phase| layout(recipe, phase, landmark)).collect();
        let lengths = || layouts.iter().map(Layout::document_tokens);
        let longest = lengths().max().unwrap_or(0);
        texts.check_window(longest)?;
        let documents = Documents::new(tokenizer, texts, model.eos_ids.first().copied(), longest)?;
        let (shortest, needed) = (lengths().min().unwrap_or(0), documents.shortest_tokens()?);
        if recipe.passkey_share > 0.0 && shortest < needed {
            return Err(TrainError::SequenceTooShort { expected_tokens: needed, found_tokens: shortest });
        }
        Ok(Mixture { recipe, landmark, texts, documents })
    }

    /// What step `step` reads, counted from 0.
    pub(super) fn step(&self, step: u64) -> Result<Step, TrainError> {
        let (phase, first_step) = self.recipe.phase(step);
        let layout = layout(self.recipe, &phase, self.landmark);
        let documents = (0..phase.sequences)
            .into_par_iter()
            .map(|sequence| match self.recipe.kind {
                Kind::Recurrent => Ok(self.next_window(&layout, sequence, first_step, step)),
                Kind::Landmark | Kind::Plain => self.document(layout.document_tokens(), step, sequence),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let first_position = match self.recipe.kind {
            Kind::Recurrent => (step - first_step) * layout.tokens() as u64,
            Kind::Landmark | Kind::Plain => 0,
        };
        Ok(layout.step(&documents, first_position as u32, |sequence| self.rng(Draw::Positions, step, sequence)))
    }

    fn document(&self, tokens: usize, step: u64, sequence: usize) -> Result<Vec<Token>, TrainError> {
        let mut rng = self.rng(Draw::Document, step, sequence);
        if rng.random_bool(self.recipe.passkey_share) {
            self.documents.write(tokens, &mut rng)
        } else {
            Ok(plain_text(self.texts.window(tokens, &mut rng)))
        }
    }

    /// Each stream begins anywhere and goes on from where its last window ended.
    fn next_window(&self, layout: &Layout, stream: usize, first_step: u64, step: u64) -> Vec<Token> {
        let begin = self.rng(Draw::Stream, first_step, stream).random_range(0..self.texts.tokens() as u64);
        let done = (step - first_step) * layout.tokens() as u64;
        plain_text(&self.texts.read(begin + done, layout.document_tokens()))
    }

    /// Random numbers for one use in one sequence of one step.
    fn rng(&self, draw: Draw, step: u64, sequence: usize) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.recipe.seed);
        // 2^20 sequences of a step (see `Phase`), 2^42 steps.
        rng.set_stream((step << 22) | ((sequence as u64) << 2) | draw as u64);
        rng
    }
}

/// How a phase cuts documents, for a model with this landmark or with none.
pub(super) fn layout(recipe: &Recipe, phase: &Phase, landmark: Option<u32>) -> Layout {
    Layout {
        blocks: phase.blocks,
        block_tokens: recipe.block_tokens as usize,
        landmark,
        pos_jump: recipe.pos_jump,
        answer_weight: recipe.answer_weight,
    }
}

/// Tokens of no special role.
pub(super) fn plain_text(ids: &[u32]) -> Vec<Token> {
    ids.iter().map(|&id| Token { id, role: Role::Text }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passkey::QUESTION;
    use crate::train::recipe::tests::tiny;
    use crate::train::vocabulary::tests::{prose, tokenizer};
    use landmarkdb::Rope;
    use landmarkdb_llm::{Architecture, Landmark};

    const LANDMARK: u32 = 299;

    struct Parts {
        tokenizer: Tokenizer,
        texts: Texts,
        model: ModelConfig,
    }

    fn parts(landmark: bool) -> Parts {
        let tokenizer = tokenizer(300);
        let texts = Texts::new(&[prose(50_000)], &tokenizer).unwrap();
        let model = ModelConfig {
            layers: 1,
            query_heads: 1,
            kv_heads: 1,
            head_dim: 8,
            hidden: 8,
            ffn: 8,
            vocab: 300,
            context_tokens: 300,
            norm_epsilon: 1e-5,
            rope: Rope::from_base(10_000.0, 8),
            tied_output: true,
            eos_ids: vec![0],
            landmark: landmark.then_some(Landmark { id: LANDMARK, block_tokens: 9, hidden: false }),
            architecture: Architecture::default(),
        };
        Parts { tokenizer, texts, model }
    }

    fn mixture<'a>(recipe: &'a Recipe, parts: &'a Parts) -> Mixture<'a> {
        Mixture::new(recipe, &parts.model, &parts.texts, &parts.tokenizer).unwrap()
    }

    #[test]
    fn a_step_follows_from_its_number_and_the_seed() {
        let parts = parts(true);
        let recipe = Recipe { pos_jump: 3, ..tiny() };
        let other_seed = Recipe { seed: 2, ..recipe.clone() };
        let step = |recipe, step| mixture(recipe, &parts).step(step).unwrap().batch;
        let in_order: Vec<_> = (0..4).map(|number| step(&recipe, number)).collect();
        assert!(step(&recipe, 3) == in_order[3]);
        assert!(in_order[0].ids != in_order[1].ids && in_order[0].positions != in_order[1].positions);
        assert!(step(&other_seed, 0).ids != in_order[0].ids);
        assert_eq!((in_order[0].tokens, step(&recipe, 10).tokens), (180, 216), "the second phase is longer");
    }

    #[test]
    fn landmarks_close_every_block_and_the_share_of_documents_holds() {
        let parts = parts(true);
        let recipe = Recipe { phases: vec!["20:200:1".parse().unwrap()], passkey_share: 0.3, ..tiny() };
        let Step { batch, answers } = mixture(&recipe, &parts).step(0).unwrap();
        let mut asked = 0;
        for ((ids, weights), answers) in batch.ids.chunks(180).zip(batch.weights.chunks(180)).zip(answers.chunks(180)) {
            for (at, &id) in ids.iter().enumerate() {
                assert_eq!(id == LANDMARK, at % 9 == 8);
                assert_eq!(weights[at] == 0.0, at % 9 == 8);
            }
            let text: Vec<u32> = ids.iter().copied().filter(|&id| id != LANDMARK).collect();
            let has_answer = answers.contains(&1.0);
            assert_eq!(parts.tokenizer.decode(&text).contains(QUESTION), has_answer);
            assert_eq!(weights.contains(&recipe.answer_weight), has_answer);
            asked += has_answer as usize;
        }
        assert!((40..80).contains(&asked), "{asked}");
        assert!(!batch.targets.contains(&LANDMARK), "a landmark is never predicted");
    }

    #[test]
    fn streams_go_on_where_they_ended() {
        let parts = parts(false);
        let recipe = Recipe { kind: Kind::Recurrent, passkey_share: 0.0, ..tiny() };
        let mixture = mixture(&recipe, &parts);
        let steps: Vec<_> = (0..12).map(|step| mixture.step(step).unwrap().batch).collect();
        for pair in steps[..10].windows(2).chain(steps[10..].windows(2)) {
            let tokens = pair[0].tokens;
            for stream in 0..pair[0].sequences {
                let last = (stream + 1) * tokens - 1;
                assert_eq!(pair[0].targets[last], pair[1].ids[stream * tokens]);
                assert_eq!(pair[0].positions[last] + 1, pair[1].positions[stream * tokens]);
            }
        }
        assert_eq!(steps[10].positions[0], 0, "a phase begins anew");
    }

    #[test]
    fn what_is_too_short_is_refused() {
        let parts = parts(true);
        let refused = |phase: &str, share| {
            let recipe = Recipe { phases: vec![phase.parse().unwrap()], passkey_share: share, ..tiny() };
            Mixture::new(&recipe, &parts.model, &parts.texts, &parts.tokenizer).err()
        };
        let short = refused("4:1:1", 0.5);
        assert!(matches!(short, Some(TrainError::SequenceTooShort { found_tokens: 33, .. })));
        assert!(refused("4:1:1", 0.0).is_none());
        assert!(matches!(refused("9000:1:1", 0.5), Some(TrainError::TextTooShort { expected_tokens: 72_001, .. })));
    }
}
