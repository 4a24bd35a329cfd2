//! The model card: what lies in the folder, and how it came to be.

use std::path::Path;

use super::checkpoint::Identity;
use super::job::Trained;
use super::validation::Validation;
use landmarkdb_llm::Adapter;

/// `README.md` of a model folder.
pub(super) fn card(folder: &Path, adapter: Option<&Adapter>, identity: &Identity, trained: &Trained) -> String {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.into());
    let name = absolute.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let kind = identity.get("kind").map(String::as_str).unwrap_or_default();
    let parameters = trained.parameters;
    let whole = |attention: &str| {
        format!("A language model of the Llama family with {attention}, {parameters} parameters in f16, trained by")
    };
    let what = match (adapter, kind) {
        (Some(Adapter { base, .. }), _) => format!(
            "An adapter that gives {base} landmark keys (after Mohtashami and Jaggi 2023): the embedding of a token that only \
             the index reads, and low-rank updates of projections for that token alone (LoRA), {parameters} parameters in \
             f16. It needs {base}, whose weights it leaves as they are. Trained by"
        ),
        (None, "landmark") => whole("landmark attention (Mohtashami and Jaggi 2023)"),
        (None, "recurrent") => whole("plain attention and the K and V of the window before (Transformer-XL)"),
        (None, _) => whole("plain attention"),
    };
    let judged = match &trained.validation {
        Some(Validation::Prediction { perplexity, counted_tokens }) => format!(
            "Perplexity on texts that it was not trained on: {perplexity:.2}, over {counted_tokens} tokens in sequences of the \
             last phase's length."
        ),
        Some(Validation::Choice { choices: 0, .. }) => "Its sequences are too short to judge it by.".into(),
        Some(Validation::Choice { shared, by_chance, top_k, choices }) => format!(
            "Of {top_k} blocks that all token keys choose, one landmark key per block chooses {:.1} % as well ({:.1} % would be \
             chance), in texts that it was not trained on ({choices} choices, in sequences of the last phase's length).",
            100.0 * shared,
            100.0 * by_chance
        ),
        None => "It was not judged by texts that it was not trained on.".into(),
    };
    let rows: String = identity.iter().map(|(name, value)| format!("| `{name}` | {value} |\n")).collect();
    format!(
        "# {name}\n\n\
         {what} `landmarkdb train` in {steps} steps.\n\n\
         {judged}\n\n\
         ## Recipe\n\n\
         Names are the flags of `landmarkdb train`, but for `kind` (`--plain`, `--recurrent`, or neither) and the \
         digests (SHA-256). The same recipe on the same texts gives the same weights on the same kind of machine.\n\n\
         | name | value |\n|---|---|\n{rows}\n\
         `log.csv` and `log.jsonl` tell every step, `checkpoint.safetensors` is what a training goes on from; the model \
         does not need them.\n",
        steps = trained.steps,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::Sha256Digest;

    #[test]
    fn a_card_names_the_model_its_recipe_and_its_result() {
        let identity = Identity::from([("kind".into(), "landmark".into()), ("lr".into(), "0.002".into())]);
        let trained = Trained {
            parameters: 512,
            steps: 20,
            resumed_steps: 0,
            tokens: 1,
            train_s: 1.0,
            loss: None,
            answer_loss: None,
            validation: Some(Validation::Prediction { perplexity: 17.456, counted_tokens: 999 }),
            finished: true,
        };
        let text = card(Path::new("models/austen"), None, &identity, &trained);
        for part in ["# austen\n", "landmark attention", "512 parameters", "| `lr` | 0.002 |", "17.46, over 999 tokens"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        let choice = |choices| Validation::Choice { shared: 0.7251, by_chance: 0.2, top_k: 4, choices };
        let adapter = Adapter {
            base: "smollm2".into(),
            base_digest: Sha256Digest([0; 32]),
            rank: 16,
            alpha: 32.0,
            landmark: 7,
            block_tokens: 64,
        };
        let of_adapter = |choices| {
            let trained = Trained { validation: Some(choice(choices)), ..trained.clone() };
            card(Path::new("m"), Some(&adapter), &identity, &trained)
        };
        for part in ["gives smollm2 landmark keys", "Of 4 blocks", "72.5 % as well (20.0 %", "(1234 choices"] {
            assert!(of_adapter(1234).contains(part), "{part} in {}", of_adapter(1234));
        }
        assert!(of_adapter(0).contains("too short to judge"));
        let unjudged = card(Path::new("m"), None, &identity, &Trained { validation: None, ..trained });
        assert!(unjudged.contains("not judged"));
    }
}
