//! What happened in every step, in two files for programs: `log.csv` for a plotting tool, `log.jsonl` for everything else.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::error::TrainError;
use super::job::StepReport;
use landmarkdb_llm::replace_file;

const CSV: &str = "log.csv";
const JSON: &str = "log.jsonl";
const CSV_HEAD: &str = "step,loss,answer_loss,learning_rate,gradient_norm,tokens_per_s";

/// Both files, open for more lines.
pub(super) struct Log {
    csv: (PathBuf, File),
    json: (PathBuf, File),
}

impl Log {
    /// Opens the files of a folder and drops lines of steps after `done_steps`, which will be done again.
    pub(super) fn open(folder: &Path, done_steps: u64) -> Result<Self, TrainError> {
        let csv_step = |line: &str| line.split(',').next()?.parse().ok();
        let json_step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
        let csv = reopen(folder.join(CSV), Some(CSV_HEAD), done_steps, csv_step)?;
        Ok(Log { csv, json: reopen(folder.join(JSON), None, done_steps, json_step)? })
    }

    /// A line is in the files as soon as its step is done, so that a training can be watched.
    pub(super) fn write(&mut self, report: &StepReport) -> Result<(), TrainError> {
        let StepReport { step, loss, answer_loss, learning_rate, gradient_norm, tokens_per_s } = report;
        let answer_loss = answer_loss.map(|loss| loss.to_string()).unwrap_or_default();
        let csv = format!("{step},{loss},{answer_loss},{learning_rate},{gradient_norm},{tokens_per_s:.0}\n");
        line(&mut self.csv, &csv)?;
        line(&mut self.json, &format!("{}\n", serde_json::json!(report)))
    }
}

fn line((path, file): &mut (PathBuf, File), text: &str) -> Result<(), TrainError> {
    file.write_all(text.as_bytes()).map_err(|source| TrainError::Io { path: path.clone(), source })
}

/// Keeps the lines that stay and goes on behind them.
fn reopen(
    path: PathBuf,
    head: Option<&str>,
    done_steps: u64,
    step: impl Fn(&str) -> Option<u64>,
) -> Result<(PathBuf, File), TrainError> {
    let old = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        read => read.map_err(|source| TrainError::Io { path: path.clone(), source })?,
    };
    // A line that a full disk or a kill cut short may begin like that of another step.
    let whole = old.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let stays = |line: &&str| step(line).is_some_and(|step| step <= done_steps);
    let lines = head.into_iter().chain(whole.filter(stays));
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let opened = replace_file(&path, text.as_bytes()).and_then(|()| File::options().append(true).open(&path));
    let file = opened.map_err(|source| TrainError::Io { path: path.clone(), source })?;
    Ok((path, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: u64, answer_loss: Option<f32>) -> StepReport {
        StepReport { step, loss: 1.5, answer_loss, learning_rate: 1e-3, gradient_norm: 0.25, tokens_per_s: 99.6 }
    }

    #[test]
    fn lines_after_the_checkpoint_are_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let mut log = Log::open(folder.path(), 0).unwrap();
        for step in 1..=3 {
            log.write(&report(step, None)).unwrap();
        }
        assert_eq!(read(CSV).lines().count(), 4);
        // Step 20, cut short by a kill.
        fs::write(folder.path().join(CSV), read(CSV) + "2").unwrap();

        let mut log = Log::open(folder.path(), 2).unwrap();
        log.write(&report(3, Some(0.5))).unwrap();
        let row = "1.5,,0.001,0.25,100";
        assert_eq!(read(CSV), format!("{CSV_HEAD}\n1,{row}\n2,{row}\n3,1.5,0.5,0.001,0.25,100\n"));
        let steps =
            read(JSON).lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>();
        assert_eq!(steps.iter().map(|line| line["step"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2), Some(3)]);
        assert_eq!(steps[2]["answer_loss"], 0.5);

        // A training that begins anew keeps nothing.
        Log::open(folder.path(), 0).unwrap();
        assert_eq!((read(CSV), read(JSON)), (format!("{CSV_HEAD}\n"), String::new()));
    }
}
