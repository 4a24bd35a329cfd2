//! Why a command failed, and the exit code that tells a script.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use landmarkdb::MemoryError;
use landmarkdb_grpc::server::{ListenError, ServeError};
use landmarkdb_lab::bench::BenchError;
use landmarkdb_lab::eval::{CaptureError, GoldenError};
use landmarkdb_lab::train::TrainError;
use landmarkdb_llm::{Difference, FindError, LoadError, PullError, RememberError};

use super::config::ConfigError;
use super::target::Target;

/// How a command ended. The numbers are part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Exit {
    Ok = 0,
    Failure = 1,
    Usage = 2,
    NotFound = 3,
    Unavailable = 4,
    Damaged = 5,
    FingerprintMismatch = 6,
    Interrupted = 130,
}

/// Every exit code, the word that `--json` errors give for it, and its meaning.
const EXITS: [(Exit, &str, &str); 8] = [
    (Exit::Ok, "ok", "success"),
    (Exit::Failure, "failure", "the command failed: the message says why"),
    (Exit::Usage, "usage", "the command line or the configuration is wrong"),
    (Exit::NotFound, "not_found", "no such data directory, collection, document or model"),
    (
        Exit::Unavailable,
        "unavailable",
        "the service cannot be reached or is busy, or another process holds the directory",
    ),
    (Exit::Damaged, "damaged", "stored data is damaged"),
    (
        Exit::FingerprintMismatch,
        "fingerprint_mismatch",
        "the collection is of another model, block size, key rule or dtype",
    ),
    (Exit::Interrupted, "interrupted", "interrupted by a signal"),
];

impl Exit {
    /// The stable word of this exit in `--json` errors.
    pub(super) fn word(self) -> &'static str {
        EXITS.iter().find(|(exit, ..)| *exit == self).map_or("failure", |(_, word, _)| word)
    }

    /// The section of `--help` that lists all exit codes.
    pub(super) fn help() -> String {
        let lines = EXITS.iter().map(|(exit, _, meaning)| format!("  {:>3}  {meaning}\n", *exit as u8));
        format!("Exit codes:\n{}", lines.collect::<String>())
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Model(#[from] FindError),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Remember(#[from] RememberError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("{}: {source}", .path.display())]
    ReadText { path: PathBuf, source: io::Error },
    #[error("{} is not UTF-8 text: byte {at} begins no character; convert it first", .path.display())]
    NotUtf8 { path: PathBuf, at: usize },
    #[error("{}: expected a text, found nothing but white space: nothing was encoded, and no name is taken", .path.display())]
    EmptyText { path: PathBuf },
    #[error(
        "{document} already holds another text: {difference}; --replace puts this one in its place{}, --name NAME gives this one \
         another name",
        if *difference == Difference::Longer { " (and leaves it open to grow, with --append)" } else { "" }
    )]
    OtherText { document: String, difference: Difference },
    #[error(
        "{document} is damaged ({problem}): `landmarkdb repair` makes whole what it can, --replace encodes the text again"
    )]
    DamagedDocument { document: String, problem: String },
    #[error("{flag}: expected {expected}, found {found}")]
    Flag { flag: &'static str, expected: String, found: String },
    #[error(
        "collection {collection} is of another kind: {field} is {stored} there, here it is {offered}; leave the flag out or use the \
         model it was made with, or give --collection NAME"
    )]
    OtherCollection { collection: String, field: &'static str, stored: String, offered: String },
    #[error(
        "block {block} of {document} is damaged ({problem}): `landmarkdb rm {document}` and encode it again, no repair can bring it \
         back; the other blocks are readable"
    )]
    DamagedBlock { document: String, block: u32, problem: String },
    #[error("an empty question: give the words to ask")]
    EmptyQuestion,
    #[error("there is no conversation to continue: ask a first question with --doc DOC")]
    NoConversation,
    #[error("{}: the last conversation cannot be read: begin another with --doc DOC", .path.display())]
    DamagedConversation { path: PathBuf },
    #[error(
        "the last conversation was about documents of {place}: leave the place out, or begin another with --doc DOC"
    )]
    ConversationElsewhere { place: Target },
    #[error("{document} is another text than in the last conversation: begin another with --doc {document}")]
    DocumentReplaced { document: String },
    #[error("a text from standard input needs a name: give --name NAME")]
    NameNeeded,
    #[error("documents of one collection can be asked together, found {first:?} and {second:?}: ask twice")]
    SeveralCollections { first: String, second: String },
    #[error(
        "at most {limit} documents can be asked together, found {found}: ask about some of them, or put them into fewer documents"
    )]
    TooManyDocuments { limit: usize, found: usize },
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error("stopped after {done} of {steps} steps: the same command goes on from there")]
    TrainingStopped { done: u64, steps: u64 },
    #[error("interrupted: {document} keeps its first {}; the same command goes on from there", landmarkdb_lab::bench::plural(*tokens, "token"))]
    EncodingStopped { document: String, tokens: u64 },
    #[error(
        "interrupted: {document} is as it was, and of this text {} are kept beside it; the same command goes on from there",
        landmarkdb_lab::bench::plural(*tokens, "token")
    )]
    ReplacingStopped { document: String, tokens: u64 },
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("no data directory {path}: `landmarkdb serve` and `landmarkdb encode` create one, --data names another")]
    NoDataDirectory { path: PathBuf },
    #[error(
        "{path} is no data directory: it has no folder segments; an empty folder becomes one when a text is encoded into \
         it, --data names another"
    )]
    NoStore { path: PathBuf },
    #[error(
        "at most {files} files may be open, and a service needs {}: raise `ulimit -n`",
        landmarkdb_grpc::server::OPEN_FILES_MIN
    )]
    TooFewFiles { files: u64 },
    #[error(
        "this command writes, and --read-only (or read_only in the configuration) says to write nothing: leave that out"
    )]
    ReadOnly,
    #[error("a service needs a data directory of its own, found --connect {connect}: give --data DIR")]
    ServeNeedsData { connect: String },
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(
        "{} in stored data: run `landmarkdb repair`; what it still lists, `landmarkdb rm` and encode again",
        landmarkdb_lab::bench::plural(*faults as u64, "fault")
    )]
    Faults { faults: usize },
    #[error("not deleting {document} without being asked on a terminal: give --yes")]
    NeedsYes { document: String },
    #[error(
        "something that was stored is not readable any more: `landmarkdb rm` the documents that are listed above, and encode \
         them again"
    )]
    SomethingLost,
    #[error("a repair needs a data directory that no process has open, found --connect {connect}: give --data DIR")]
    RepairNeedsData { connect: String },
    #[error("{}: {problem}", .path.display())]
    CollectionSpec { path: PathBuf, problem: String },
    #[error("{}: {problem}", .path.display())]
    Questions { path: PathBuf, problem: String },
    #[error("{document} was not deleted")]
    NotConfirmed { document: String },
    #[error(
        "{outputs} outputs differ from what was recorded by more than rounding: this build computes something else"
    )]
    GoldenDiffers { outputs: usize },
    #[error(transparent)]
    Golden(#[from] GoldenError),
    #[error(transparent)]
    Bench(BenchError),
    #[error("{}: the report cannot be written: {source}", .path.display())]
    WriteReport { path: PathBuf, source: io::Error },
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

impl CliError {
    /// Human-readable: the failure, and what to type about it.
    pub(super) fn message(&self) -> String {
        match self.hint() {
            Some(hint) => format!("{self} ({hint})"),
            None => self.to_string(),
        }
    }

    /// What to type, where a library can only say what to do.
    fn hint(&self) -> Option<String> {
        match self {
            CliError::Model(error) | CliError::Pull(PullError::Find(error)) => find_hint(error),
            CliError::Load(error)
            | CliError::Train(TrainError::Load(error))
            | CliError::Golden(GoldenError::Load(error)) => load_hint(error),
            CliError::Pull(PullError::Pip { .. }) => Some("--model PATH".into()),
            CliError::Pull(PullError::License { .. }) => Some("--accept-license".into()),
            CliError::Capture(CaptureError::Content { .. }) => Some("`landmarkdb capture`".into()),
            CliError::Golden(GoldenError::NoCase { .. }) => Some("--no-prompts leaves them out".into()),
            CliError::Bench(BenchError::Peers { .. }) => Some("--python names the interpreter".into()),
            CliError::Listen(ListenError::NotLoopback { .. }) => Some("--allow-remote".into()),
            CliError::Golden(GoldenError::Remember(error)) => error.memory().and_then(memory_hint),
            _ => self.memory().and_then(memory_hint),
        }
    }

    /// The memory's own error, wherever it came up.
    pub(super) fn memory(&self) -> Option<&MemoryError> {
        match self {
            CliError::Memory(error) | CliError::Capture(CaptureError::Memory(error)) => Some(error),
            CliError::Remember(error) | CliError::Capture(CaptureError::Remember(error)) => error.memory(),
            _ => None,
        }
    }

    /// The exit code for this failure.
    pub(super) fn exit(&self) -> Exit {
        if let Some(error) = self.memory() {
            return memory_exit(error);
        }
        match self {
            CliError::Config(_)
            | CliError::ReadOnly
            | CliError::ServeNeedsData { .. }
            | CliError::NameNeeded
            | CliError::Flag { .. }
            | CliError::EmptyQuestion
            | CliError::SeveralCollections { .. }
            | CliError::TooManyDocuments { .. }
            | CliError::ConversationElsewhere { .. }
            | CliError::RepairNeedsData { .. }
            | CliError::CollectionSpec { .. }
            | CliError::Questions { .. }
            | CliError::NeedsYes { .. } => Exit::Usage,
            CliError::Pull(PullError::UnknownSpec { .. }) => Exit::Usage,
            CliError::Model(FindError::NotFound { .. } | FindError::NotPulled { .. }) => Exit::NotFound,
            CliError::NoConversation => Exit::NotFound,
            CliError::Load(LoadError::Base { .. }) | CliError::NoDataDirectory { .. } | CliError::NoStore { .. } => {
                Exit::NotFound
            }
            CliError::Faults { .. }
            | CliError::SomethingLost
            | CliError::DamagedDocument { .. }
            | CliError::DamagedBlock { .. }
            | CliError::Train(TrainError::CheckpointDamaged { .. }) => Exit::Damaged,
            CliError::Train(
                TrainError::Invalid { .. } | TrainError::OtherRecipe { .. } | TrainError::FolderTaken { .. },
            ) => Exit::Usage,
            CliError::Train(TrainError::InUse { .. }) => Exit::Unavailable,
            CliError::OtherCollection { .. } => Exit::FingerprintMismatch,
            CliError::EncodingStopped { .. } | CliError::ReplacingStopped { .. } | CliError::TrainingStopped { .. } => {
                Exit::Interrupted
            }
            CliError::Listen(ListenError::Nowhere | ListenError::NotLoopback { .. }) => Exit::Usage,
            CliError::Listen(_) => Exit::Unavailable,
            CliError::Memory(_)
            | CliError::Remember(_)
            | CliError::Capture(_)
            | CliError::Model(_)
            | CliError::Pull(_)
            | CliError::Load(_)
            | CliError::ReadText { .. }
            | CliError::NotUtf8 { .. }
            | CliError::EmptyText { .. }
            | CliError::OtherText { .. }
            | CliError::DamagedConversation { .. }
            | CliError::DocumentReplaced { .. }
            | CliError::Serve(_)
            | CliError::TooFewFiles { .. }
            | CliError::Train(_)
            | CliError::NotConfirmed { .. }
            | CliError::GoldenDiffers { .. }
            | CliError::Golden(_)
            | CliError::Bench(_)
            | CliError::WriteReport { .. }
            | CliError::Io { .. } => Exit::Failure,
        }
    }

    /// Whether the reader of our output went away, as `| head` does: it has what it wanted.
    pub(super) fn is_broken_pipe(&self) -> bool {
        matches!(self, CliError::Io { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// What ended a benchmark has the exit code that it has elsewhere.
impl From<BenchError> for CliError {
    fn from(error: BenchError) -> Self {
        match error {
            BenchError::Memory(error) => error.into(),
            BenchError::Capture(error) => error.into(),
            BenchError::Remember(error) => error.into(),
            BenchError::Listen(error) => error.into(),
            BenchError::Bandwidth(_) | BenchError::Peers { .. } | BenchError::Io { .. } => CliError::Bench(error),
        }
    }
}

fn memory_hint(error: &MemoryError) -> Option<String> {
    let hint = match error {
        MemoryError::NotFound { .. } => "`landmarkdb ls`",
        MemoryError::DataLoss { .. } => "`landmarkdb verify`, then `landmarkdb repair`",
        MemoryError::Locked { .. } => "--connect TARGET",
        _ => return None,
    };
    Some(hint.into())
}

fn find_hint(error: &FindError) -> Option<String> {
    match error {
        FindError::NotPulled { spec } => Some(format!("`landmarkdb model pull {spec}`")),
        _ => None,
    }
}

fn load_hint(error: &LoadError) -> Option<String> {
    match error {
        LoadError::NotAModel { .. } => Some("`landmarkdb model pull NAME`".into()),
        LoadError::Base { source, .. } => find_hint(source),
        _ => None,
    }
}

fn memory_exit(error: &MemoryError) -> Exit {
    match error {
        MemoryError::NotFound { .. } => Exit::NotFound,
        // The client's name for what `--connect` was given.
        MemoryError::Invalid { field, .. } if field == "target" => Exit::Usage,
        // The store's, of a folder with other things in it.
        MemoryError::Invalid { field, .. } if field == "data directory" => Exit::NotFound,
        MemoryError::Locked { .. }
        | MemoryError::Unavailable { .. }
        | MemoryError::Busy { .. }
        | MemoryError::DeadlineExceeded { .. } => Exit::Unavailable,
        MemoryError::DataLoss { .. } => Exit::Damaged,
        MemoryError::FingerprintMismatch { .. } => Exit::FingerprintMismatch,
        _ => Exit::Failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::{Entity, Fingerprint};

    #[test]
    fn each_failure_a_script_can_react_to_has_its_own_code() {
        let fingerprint = Fingerprint([0; 32]);
        let cases = [
            (MemoryError::Locked { path: "d".into() }, 4, "unavailable"),
            (MemoryError::Unavailable { target: "t".into(), detail: "refused".into() }, 4, "unavailable"),
            (MemoryError::DataLoss { block: None, detail: "checksum".into() }, 5, "damaged"),
            (
                MemoryError::FingerprintMismatch { collection: "c".into(), stored: fingerprint, offered: fingerprint },
                6,
                "fingerprint_mismatch",
            ),
            (MemoryError::Internal { detail: "bug".into() }, 1, "failure"),
        ];
        for (error, code, word) in cases {
            let exit = CliError::from(error.clone()).exit();
            assert_eq!((exit as u8, exit.word()), (code, word), "{error}");
        }
    }

    #[test]
    fn a_message_ends_with_what_to_type() {
        let lost = || MemoryError::DataLoss { block: None, detail: "checksum".into() };
        let not_pulled = || FindError::NotPulled { spec: "hf:a/b".into() };
        let not_a_model = || LoadError::NotAModel { path: "x".into() };
        let base = LoadError::Base { path: "x".into(), source: Box::new(not_pulled()) };
        let remember = RememberError::from;
        let repair = Some("`landmarkdb verify`, then `landmarkdb repair`");
        let pull = Some("`landmarkdb model pull hf:a/b`");
        let cases: [(CliError, Option<&str>); 18] = [
            (MemoryError::NotFound { entity: Entity::Document, id: "emma".into() }.into(), Some("`landmarkdb ls`")),
            (MemoryError::Locked { path: "d".into() }.into(), Some("--connect TARGET")),
            (lost().into(), repair),
            (remember(lost()).into(), repair),
            (CaptureError::Memory(lost()).into(), repair),
            (CaptureError::Remember(remember(lost())).into(), repair),
            (GoldenError::Remember(remember(lost())).into(), repair),
            (not_pulled().into(), pull),
            (base.into(), pull),
            (not_a_model().into(), Some("`landmarkdb model pull NAME`")),
            (TrainError::Load(not_a_model()).into(), Some("`landmarkdb model pull NAME`")),
            (GoldenError::Load(not_a_model()).into(), Some("`landmarkdb model pull NAME`")),
            (PullError::Pip { package: "p".into(), attempts: Vec::new() }.into(), Some("--model PATH")),
            (CaptureError::Content { path: "c".into(), detail: "cut".into() }.into(), Some("`landmarkdb capture`")),
            (GoldenError::NoCase { path: "c".into() }.into(), Some("--no-prompts leaves them out")),
            (
                BenchError::Peers { python: "p".into(), source: io::ErrorKind::NotFound.into() }.into(),
                Some("--python names the interpreter"),
            ),
            (ListenError::NotLoopback { address: ([0, 0, 0, 0], 1).into() }.into(), Some("--allow-remote")),
            (MemoryError::Internal { detail: "bug".into() }.into(), None),
        ];
        for (error, hint) in cases {
            let ending = hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            assert_eq!(error.message(), format!("{error}{ending}"));
        }
    }

    #[test]
    fn help_lists_every_code() {
        let help = Exit::help();
        for code in ["0", "1", "2", "3", "4", "5", "6", "130"] {
            assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{code}  "))), "{code} in {help}");
        }
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let pipe = CliError::Io { what: "standard output", source: io::ErrorKind::BrokenPipe.into() };
        let disk = CliError::Io { what: "standard output", source: io::ErrorKind::StorageFull.into() };
        assert!(pipe.is_broken_pipe() && !disk.is_broken_pipe());
    }
}
