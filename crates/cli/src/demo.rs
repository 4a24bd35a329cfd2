//! `landmarkdb demo`: the whole story in one command, through the real service.

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use landmarkdb::{BlockMemory, Retrieval};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_lab::eval::BOOK;
use landmarkdb_llm::{self as model, Asked, Encoding, Frame, GenerateOptions, LoadedModel, Question};

use super::Context;
use super::ask::{Answered, text_end};
use super::encode::token_bar;
use super::error::CliError;
use super::numbers::{integer, number, top_k};
use super::output::{Report, count, plural, size};
use super::settings::{ModelArgs, StorageArgs};

const SENTENCE: &str = "The pass key of the old lighthouse is 48213. Remember it. 48213 is the pass key.";
const QUESTION: &str = "What is the pass key of the old lighthouse? The pass key is";
const DOCUMENT: &str = "persuasion";
const COLLECTION: &str = "demo";

/// A shorter text is at hand as a whole, and nothing is retrieved from it.
const TOKENS_MIN: u32 = 1024;

/// Watch a model answer from a text far longer than its window.
///
/// Hides a sentence in a novel, encodes the novel into a service, kills the service, starts it again, and asks: the
/// answer is read from disk, nothing is encoded again. Fetches the model first if it is not here.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb demo
  landmarkdb demo --sentence 'The code of the red safe is 7351.' --question 'The code of the red safe is'
  landmarkdb demo --tokens 65536 --json
")]
pub(super) struct Args {
    /// The sentence to hide.
    #[arg(long, default_value = SENTENCE)]
    sentence: String,

    /// The question: words that the model continues, or a question that ends in a question mark.
    #[arg(long, default_value = QUESTION)]
    question: String,

    /// Length of the text, in tokens, 1,024 to 1,048,576.
    #[arg(long, default_value_t = 24_576, value_parser = integer::<usize>(TOKENS_MIN..=1 << 20))]
    tokens: usize,

    /// Where the sentence is hidden, as a share of the text, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.4, value_parser = number(0.0..=1.0))]
    depth: f64,

    /// Blocks retrieved per choice (k), 1 to 1024.
    #[arg(long = "blocks", value_name = "K", default_value_t = 4, value_parser = top_k())]
    top_k: u32,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    storage: StorageArgs,
}

/// What happened.
#[derive(Debug, Serialize)]
struct Demo {
    model: String,
    /// Tokens that the model was trained to read at once.
    model_context_tokens: u64,
    text_tokens: u64,
    sentence: String,
    /// The block that the sentence begins in.
    sentence_block: u32,
    encode_s: f64,
    encode_tokens_per_s: f64,
    stored_bytes: u64,
    /// From starting the second service to its first answer, the document's description.
    reopen_s: f64,
    answer: Answered,
    /// Encoding time over the time to the first token of the answer.
    speedup: f64,
    total_s: f64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let begin = Instant::now();
    let model = load(args, context)?;
    let (text, sentence_at) = hide(args, &model)?;
    context.output.say(&format!(
        "text     {} of a novel; {} can read {} at once. Hidden at {:.0} %: {:?}",
        plural(args.tokens as u64, "token"),
        model.name,
        count(model.config().context_tokens as u64),
        100.0 * sentence_at as f64 / text.len() as f64,
        args.sentence
    ));

    let directory = tempfile::Builder::new().prefix("landmarkdb-demo-").tempdir();
    let directory = directory.map_err(|source| CliError::Io { what: "a temporary directory", source })?;
    let service = Service::start(directory.path())?;
    context.output.say(&format!("encode   into the service at {}", service.address));
    let memory = service.connect()?;
    let collection = args.storage.open(COLLECTION, &model, &memory)?;
    let bar = token_bar(context, "        ");
    let encode_begin = Instant::now();
    let (window, retrieval) = (model.config().window(), model.config().encode_retrieval());
    let encoding = Encoding { name: DOCUMENT, text: &text, window, retrieval, stays_open: false };
    let document = model::encode(&model, &memory, &collection, &encoding, &mut |step| bar.show(step))?;
    bar.finish();
    let encode_s = encode_begin.elapsed().as_secs_f64();
    let encode_tokens_per_s = document.tokens as f64 / encode_s;
    context.output.say(&format!(
        "         {} in {encode_s:.1} s ({encode_tokens_per_s:.0} tokens/s), {} on disk",
        plural(document.tokens, "token"),
        size(document.stored_bytes)
    ));
    drop(memory);
    drop(service);

    let reopening = Instant::now();
    let service = Service::start(directory.path())?;
    let memory = service.connect()?;
    let document = memory.document(document.id)?;
    let reopen_s = reopening.elapsed().as_secs_f64();
    context.output.say(&format!("restart  service killed and started again, {reopen_s:.2} s"));

    context.output.say(&format!("ask      {}", args.question));
    let raw = !args.question.trim_end().ends_with('?');
    let documents = [document];
    let Frame { ids, stop } = if raw {
        let encoded = model.tokenizer.encode(&format!("\n{}", args.question)).map_err(model::RememberError::from)?;
        Frame { ids: encoded.ids, stop: vec!["\n".into()] }
    } else {
        let asked = Asked { question: &args.question, ..Asked::default() };
        model::frame_question(&model, &asked, &text_end(memory.as_ref(), &documents)?)?
    };
    let question = Question {
        documents: &documents,
        prompt: &ids,
        window,
        retrieval: Retrieval { top_k: args.top_k, ..model.config().retrieval() },
        options: GenerateOptions { max_tokens: 48, stop, ..GenerateOptions::default() },
    };
    context.output.stream("answer   ");
    let answer = model::ask(&model, &memory, &collection, &question, &mut |piece| context.output.stream(piece))?;
    context.output.stream_end();
    let lift = model::lift(&model, &ids, &answer.generated)?;
    let answer = Answered::new(&args.question, &answer, lift, memory.as_ref(), &collection, &documents, 6)?;
    context.output.print(&Demo {
        model: model.name.clone(),
        model_context_tokens: model.config().context_tokens as u64,
        text_tokens: documents[0].tokens,
        sentence: args.sentence.clone(),
        sentence_block: block_at(memory.as_ref(), &documents[0], sentence_at)?,
        encode_s,
        encode_tokens_per_s,
        stored_bytes: documents[0].stored_bytes,
        reopen_s,
        speedup: encode_s / answer.first_token_s,
        answer,
        total_s: begin.elapsed().as_secs_f64(),
    })
}

/// Loads the model, fetching it first if it can be fetched.
fn load(args: &Args, context: &Context) -> Result<LoadedModel, CliError> {
    if model::resolve(&args.model.model).is_err() {
        context.output.say(&format!("model    fetching {}", args.model.model));
        super::model::fetch(&args.model.model, false, context)?;
    }
    args.model.load(context)
}

/// The beginning of the novel, repeated if it is too short, with the sentence on a line of its own; and where that is.
fn hide(args: &Args, model: &LoadedModel) -> Result<(String, usize), CliError> {
    let encode = |text: &str| model.tokenizer.encode(text).map_err(model::RememberError::from);
    let repeats = (args.tokens * 6).div_ceil(BOOK.len());
    let book = BOOK.repeat(repeats.max(1));
    let encoded = encode(&book)?;
    let tokens = args.tokens.saturating_sub(encode(&args.sentence)?.ids.len() + 2).min(encoded.offsets.len() - 1);
    let novel = String::from_utf8_lossy(&book.as_bytes()[..encoded.offsets[tokens]]).into_owned();
    let near = (novel.len() as f64 * args.depth) as usize;
    let at = novel.match_indices("\n\n").map(|(at, _)| at).find(|&at| at >= near).unwrap_or(novel.len());
    Ok((format!("{}\n\n{}{}", &novel[..at], args.sentence, &novel[at..]), at + 2))
}

/// The block whose text holds byte `at` of the source text.
fn block_at(memory: &dyn BlockMemory, document: &landmarkdb::DocumentInfo, at: usize) -> Result<u32, CliError> {
    let range = landmarkdb::BlockRange { document: document.id, blocks: 0..document.blocks };
    let blocks = memory.blocks(&range)?;
    let after = blocks.partition_point(|block| block.text.start <= at as u64);
    Ok(after.saturating_sub(1) as u32)
}

/// A `landmarkdb serve` in a process of its own; killed when dropped.
struct Service {
    process: Child,
    address: String,
}

/// The line that `serve --json` prints when it is ready.
#[derive(Deserialize)]
struct Ready {
    listening: Vec<String>,
}

impl Service {
    fn start(data: &Path) -> Result<Self, CliError> {
        let io = |source| CliError::Io { what: "starting `landmarkdb serve`", source };
        let mut process = Command::new(std::env::current_exe().map_err(io)?)
            .args(["serve", "--json", "--quiet", "--listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .map_err(io)?;
        let mut line = String::new();
        let read = match process.stdout.take() {
            Some(stdout) => BufReader::new(stdout).read_line(&mut line),
            None => Ok(0),
        };
        let ready = read.map_err(io).and_then(|_| {
            serde_json::from_str::<Ready>(&line).map_err(|error| io(io::Error::other(format!("{error}: {line:?}"))))
        });
        match ready {
            Ok(Ready { listening }) => {
                Ok(Service { process, address: listening.into_iter().next().unwrap_or_default() })
            }
            Err(error) => {
                drop(Service { process, address: String::new() });
                Err(error)
            }
        }
    }

    fn connect(&self) -> Result<Arc<dyn BlockMemory>, CliError> {
        let options = ClientOptions { deadline: Duration::from_secs(600), ..ClientOptions::default() };
        Ok(Arc::new(RemoteMemory::connect(&self.address, options)?))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended by itself: then there is nothing to kill.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Report for Demo {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        self.answer.human(to)?;
        writeln!(
            to,
            "The sentence is in block {}. Encoding took {:.1} s, the first token of the answer {:.2} s: {:.0} times less.",
            self.sentence_block, self.encode_s, self.answer.first_token_s, self.speedup
        )?;
        writeln!(to, "All in all {:.0} s.", self.total_s)
    }
}
