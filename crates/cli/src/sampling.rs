//! How an answer's tokens are chosen, as it is typed.

use landmarkdb_llm::Sampling;

/// How the answer's tokens are chosen. The names say `sample` where the model's own choice of blocks has a name like it.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Draw the answer by chance, with this temperature; 0 takes the likeliest token each time.
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    temperature: f32,

    /// Draw from this many of the likeliest tokens; 0 from all.
    #[arg(long, value_name = "COUNT", default_value_t = 40)]
    sample_top_k: usize,

    /// Draw from the likeliest tokens that together have this probability: above 0, at most 1.
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = top_p)]
    sample_top_p: f32,

    /// Draw from tokens at least this share as likely as the likeliest: 0 to 1.
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = min_p)]
    min_p: f32,

    /// Make tokens among the answer's last 64 less likely, also at temperature 0: above 0; 1 changes nothing.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = repeat_penalty)]
    repeat_penalty: f32,

    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.sample_top_k,
            top_p: self.sample_top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
        }
    }
}

fn temperature(typed: &str) -> Result<f32, String> {
    checked(typed, |temperature| Sampling { temperature, ..Sampling::default() })
}

fn top_p(typed: &str) -> Result<f32, String> {
    checked(typed, |top_p| Sampling { top_p, ..Sampling::default() })
}

fn min_p(typed: &str) -> Result<f32, String> {
    checked(typed, |min_p| Sampling { min_p, ..Sampling::default() })
}

fn repeat_penalty(typed: &str) -> Result<f32, String> {
    checked(typed, |repeat_penalty| Sampling { repeat_penalty, ..Sampling::default() })
}

fn checked(typed: &str, sampling: fn(f32) -> Sampling) -> Result<f32, String> {
    let number: f32 = typed.parse().map_err(|_| format!("expected a number, found {typed:?}"))?;
    sampling(number).check().map_err(|error| error.to_string())?;
    Ok(number)
}
