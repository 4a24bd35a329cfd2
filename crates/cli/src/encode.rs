//! `landmarkdb encode`: texts into documents.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use indicatif::ProgressStyle;
use serde::Serialize;

use landmarkdb::{DocumentId, InvalidShape, MemoryError, check_name};
use landmarkdb_llm::{self as model, Difference, EncodeProgress, Encoding, RememberError};

use super::Context;
use super::error::CliError;
use super::open::DocumentName;
use super::output::{Report, plural, shown_line, size};
use super::report::DocumentReport;
use super::settings::{EncodeArgs, ModelArgs, RetrievalArgs, StorageArgs, WindowArgs};
use super::signals::Listening;

/// U+FEFF in UTF-8: no part of the text, and as a sink it would be read with every token.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Encode a text into a document: the model reads it once, its blocks are kept.
///
/// An interrupted encoding is resumed where it stopped when the same command is run again.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb encode texts/persuasion.txt
  landmarkdb encode texts/persuasion.txt --name austen --payload int8
  landmarkdb encode texts/persuasion.txt --name austen --replace
  landmarkdb encode diary.txt --append
  curl -s https://example.org/book.txt | landmarkdb encode - --name book
")]
pub(super) struct Args {
    /// A UTF-8 text file; - reads standard input.
    file: PathBuf,

    /// The document: NAME, or COLLECTION/NAME [default: the file's name without its extension].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Put this text in the place of another that has the name: that one stays until this one is whole.
    #[arg(long)]
    replace: bool,

    /// Leave the document open: run again when the file has grown, this appends what is new.
    #[arg(long)]
    append: bool,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    window: WindowArgs,

    #[command(flatten)]
    encode: EncodeArgs,

    #[command(flatten)]
    retrieval: RetrievalArgs,

    #[command(flatten)]
    storage: StorageArgs,
}

/// What was encoded.
#[derive(Debug, Serialize)]
pub(super) struct Encoded {
    pub(super) document: DocumentReport,
    /// Tokens that were there before: the encoding was resumed, or already whole.
    pub(super) resumed_tokens: u64,
    /// Whether another text gave way to this one.
    pub(super) replaced: bool,
    pub(super) encode_s: f64,
    /// Of the tokens encoded now.
    pub(super) tokens_per_s: f64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let text = read(&args.file)?;
    let document = match &args.name {
        Some(name) => DocumentName::new(name, &context.config),
        None if args.file == Path::new("-") => return Err(CliError::NameNeeded),
        None => DocumentName {
            collection: context.config.collection.clone(),
            name: args.file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        },
    };
    if text.trim().is_empty() {
        return Err(CliError::EmptyText { path: args.file.clone() });
    }
    if DocumentId::of_replacement_name(&document.name).is_some() {
        let expected = "a name that no replacement in the making has".into();
        return Err(CliError::Flag { flag: "--name", expected, found: document.name });
    }
    // Before the collection is made for it.
    let of_collection = if context.config.collection_typed { "--collection" } else { "--name" };
    for (flag, part) in [(of_collection, &document.collection), ("--name", &document.name)] {
        let wrong = |error: InvalidShape| CliError::Flag { flag, expected: error.expected, found: error.found };
        check_name("name", part).map_err(wrong)?;
    }
    let model = args.model.load(context)?;
    let memory = context.memory_or_new()?;
    let collection = args.storage.open(&document.collection, &model, &memory)?;
    let bar = token_bar(context, &document.to_string());
    let kept = Arc::new(Kept::default());
    let _listening = Listening::begin(stop(context, &document, &bar, &kept))?;
    let begin = Instant::now();
    let mut resumed_tokens = 0;
    let config = model.config();
    let encoding = Encoding {
        name: &document.name,
        text: &text,
        window: args.window.window(config)?,
        retrieval: args.encode.retrieval(config, &args.retrieval.retrieval(config, 1)?),
        stays_open: args.append,
    };
    let mut progress = |step: EncodeProgress| {
        resumed_tokens = step.resumed_tokens;
        kept.replaces.store(step.replaces, Ordering::Relaxed);
        kept.tokens.store(step.kept_tokens, Ordering::Relaxed);
        bar.show(step);
    };
    let encode = if args.replace { model::encode_replacing } else { model::encode };
    let encoded = encode(&model, &memory, &collection, &encoding, &mut progress);
    bar.finish();
    let encoded = encoded.map_err(|error| name_the_taken(error, &document))?;
    let encode_s = begin.elapsed().as_secs_f64();
    context.output.print(&Encoded {
        resumed_tokens,
        replaced: kept.replaces.load(Ordering::Relaxed),
        tokens_per_s: (encoded.tokens - resumed_tokens) as f64 / encode_s,
        encode_s,
        document: DocumentReport::new(&collection, &encoded),
    })
}

/// What an encoding that is stopped leaves.
#[derive(Default)]
struct Kept {
    tokens: AtomicU64,
    /// Beside the document that has the name.
    replaces: AtomicBool,
}

/// What a signal does: all that is acknowledged is durable, so that nothing needs to be finished.
fn stop(context: &Context, document: &DocumentName, bar: &TokenBar, kept: &Arc<Kept>) -> impl FnOnce() + Send + use<> {
    let (output, bar, kept, document) = (context.output, bar.0.clone(), kept.clone(), document.to_string());
    move || {
        bar.finish_and_clear();
        let tokens = kept.tokens.load(Ordering::Relaxed);
        let error = match kept.replaces.load(Ordering::Relaxed) {
            true => CliError::ReplacingStopped { document, tokens },
            false => CliError::EncodingStopped { document, tokens },
        };
        output.error(&error.message(), error.exit());
        std::process::exit(error.exit() as i32);
    }
}

/// Says under which name another text is, or a damaged one, and what frees it: the memory knows its id only.
fn name_the_taken(error: RememberError, document: &DocumentName) -> CliError {
    let difference = match (&error, error.memory()) {
        (RememberError::Damaged { problem, .. }, _) => {
            return CliError::DamagedDocument { document: document.to_string(), problem: problem.clone() };
        }
        (_, Some(MemoryError::DataLoss { block: Some(_), detail })) => {
            return CliError::DamagedDocument { document: document.to_string(), problem: detail.clone() };
        }
        (RememberError::OtherText { difference, .. }, _) => *difference,
        (_, Some(MemoryError::Conflict { index, .. })) => Difference::Block(*index),
        _ => return error.into(),
    };
    CliError::OtherText { document: document.to_string(), difference }
}

/// A UTF-8 text, without the mark that some editors put before it; - is standard input.
pub(super) fn read(file: &Path) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    let read = match file == Path::new("-") {
        true => io::stdin().read_to_end(&mut bytes).map(|_| ()),
        false => std::fs::read(file).map(|read| bytes = read),
    };
    read.map_err(|source| CliError::ReadText { path: file.into(), source })?;
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    let text = String::from_utf8(bytes);
    text.map_err(|error| CliError::NotUtf8 { path: file.into(), at: error.utf8_error().valid_up_to() })
}

/// A bar that counts tokens.
pub(super) struct TokenBar(indicatif::ProgressBar);

/// See [`TokenBar`].
pub(super) fn token_bar(context: &Context, what: &str) -> TokenBar {
    let template = "{msg} {wide_bar} {human_pos} of {human_len} tokens, {per_sec} {eta:>4}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let style = style.with_key("per_sec", |state: &indicatif::ProgressState, to: &mut dyn std::fmt::Write| {
        let _ = write!(to, "{:.0}/s", state.per_sec());
    });
    TokenBar(context.output.bar(what, style))
}

impl TokenBar {
    pub(super) fn show(&self, step: EncodeProgress) {
        if step.done_tokens == step.resumed_tokens {
            // What was there before does not count towards the speed.
            self.0.set_length(step.total_tokens);
            self.0.set_position(step.resumed_tokens);
            self.0.reset_eta();
        } else {
            self.0.set_position(step.done_tokens);
        }
    }

    /// What the bar counts from now on.
    pub(super) fn label(&self, what: &str) {
        self.0.set_message(shown_line(what));
    }

    pub(super) fn finish(self) {
        self.0.finish_and_clear();
    }
}

impl Report for Encoded {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let document = &self.document;
        let title = format!("{}/{}", document.collection, document.name);
        let tokens = plural(document.tokens, "token");
        let stored = size(document.stored_bytes);
        let per_token = size(document.stored_bytes / document.tokens.max(1));
        if self.resumed_tokens == document.tokens && !self.replaced {
            return writeln!(to, "{title} is already encoded: {tokens}, {stored} on disk");
        }
        if self.resumed_tokens > 0 {
            writeln!(to, "resumed after {}", plural(self.resumed_tokens, "token"))?;
        }
        let did = if self.replaced { "replaced" } else { "encoded" };
        writeln!(
            to,
            "{did} {title}: {tokens} in {:.1} s ({:.0} tokens/s), {stored} on disk ({per_token} a token)",
            self.encode_s, self.tokens_per_s
        )
    }
}
