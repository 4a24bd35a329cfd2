//! `landmarkdb ask`: questions about documents.

use std::collections::{BTreeSet, HashSet};
use std::io::{self, Write};

use serde::Serialize;

use landmarkdb::{BlockMemory, BlockRange, CollectionInfo, DocumentInfo, Window, limits};
use landmarkdb_llm::{
    self as model, Answer, Asked, Citation, Finish, Frame, GenerateOptions, Lift, LoadedModel, Question, ReadFrom,
    RememberError,
};

use super::Context;
use super::conversation::{self, Conversation};
use super::error::CliError;
use super::faults::named;
use super::hints::Hints;
use super::numbers::{from_one, top_k};
use super::open::DocumentName;
use super::output::{Report, excerpt, plural, table, write_table};
use super::sampling::SamplingArgs;
use super::settings::{ModelArgs, RetrievalArgs, WindowArgs};

/// Characters of a block's text that a table row shows.
const EXCERPT_CHARS: usize = 72;

/// Rows of blocks at hand that the table shows, of which consecutive ones share a row.
const AT_HAND_ROWS_MAX: usize = 16;

/// The word for an answer that the model would have gone on with.
const MAX_TOKENS: &str = "max_tokens";

/// Ask a question about documents, answered from their blocks.
///
/// The documents are not read again: at every layer the model looks up the stored blocks that suit the question (--blocks) and
/// attends to them, beside the end of the last document. The question stands in the turns of the model's own chat template if it
/// has one. The answer is followed by the blocks that were read: retrieved ones, those that stood out first, then those that are
/// always at hand (the first block of the first document, and the window). The end of an earlier document, too short for a block, is
/// retrieved like one if the document is whole, and at hand else.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb ask 'Who is Anne Elliot?' --doc persuasion
  landmarkdb ask 'What is the pass key? The pass key is' --doc notes --doc letters --raw
  landmarkdb ask 'Who is Anne Elliot?' --doc persuasion --system 'Answer in one sentence.' --temperature 0.7
  landmarkdb ask 'Whom does she marry?' --continue
  landmarkdb ask 'Who is Anne Elliot?' --doc persuasion --json | jq '.blocks[0]'
")]
pub(super) struct Args {
    /// The question.
    question: String,

    /// A document: NAME, or COLLECTION/NAME; repeat for several, up to 1024. All must be of one collection.
    #[arg(long = "doc", value_name = "DOC", required_unless_present = "follow_up")]
    docs: Vec<String>,

    /// Ask about the documents of the last question, which is kept with its answer, and those before it.
    #[arg(long = "continue", conflicts_with_all = ["docs", "raw", "system", "model"])]
    follow_up: bool,

    /// Give the model the question's words alone, to continue, without a chat template.
    #[arg(long)]
    raw: bool,

    /// How to answer, for the model to heed: said in front of the question.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    system: Option<String>,

    /// Blocks retrieved per choice (k), 1 to 1024.
    #[arg(long = "blocks", value_name = "K", default_value_t = 4, value_parser = top_k())]
    top_k: u32,

    /// Maximum length of the answer in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = from_one::<usize>())]
    max_tokens: usize,

    /// End the answer before this text; repeat for several.
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,

    /// Retrieved blocks to show.
    #[arg(long, value_name = "BLOCKS", default_value_t = 8)]
    show: usize,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    window: WindowArgs,

    #[command(flatten)]
    retrieval: RetrievalArgs,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// An answer and the blocks it was read from.
#[derive(Debug, Serialize)]
pub(super) struct Answered {
    question: String,
    answer: String,
    /// That were asked.
    documents: Vec<String>,
    /// Questions of the same conversation that the model was told of.
    earlier_questions: usize,
    prompt_tokens: usize,
    answer_tokens: usize,
    /// Why the answer ends where it does: end_of_text, stop (a --stop text, or a question of the model's own) or max_tokens.
    finish: &'static str,
    /// Documents that are open: their encoding was interrupted, or goes on, or they are left to grow.
    incomplete: Vec<Incomplete>,
    /// How much likelier the documents made the answer, in nats: of its tokens' `ln p` with them, less that without, the mean of the
    /// three largest. Null where there is no answer, and where question and answer are longer than the model's context.
    lift: Option<f32>,
    /// Whether the answer seems to come from the documents, by its lift.
    from_documents: Option<bool>,
    /// From the question to the first piece of the answer, with the model loaded.
    pub(super) first_token_s: f64,
    total_s: f64,
    /// Share of all attention that went to question and answer themselves; the blocks have the rest.
    own_share: f64,
    /// What was read: retrieved blocks, those that stood out first, then those at hand: tails, the sink, the window.
    blocks: Vec<BlockRead>,
    /// How many of them the table shows.
    #[serde(skip)]
    shown: usize,
    /// Layers times KV heads of the model.
    #[serde(skip)]
    heads_count: usize,
    #[serde(skip)]
    hints: Hints,
}

/// One block that was read.
#[derive(Debug, Serialize)]
struct BlockRead {
    document: String,
    block: u32,
    /// retrieved; or at hand for every layer and head: sink (the first block of the first document), tail (an earlier
    /// document's tokens after its last full block, which cannot be retrieved) or window (the end of the last document).
    from: String,
    /// Share of all attention of question and answer; of retrieved blocks an estimate.
    share: f64,
    /// Which layers and KV heads chose the block, and for how many query tokens times query heads; none for blocks at hand.
    heads: Vec<HeadRead>,
    text_start_bytes: u64,
    text: String,
}

/// A document that is open.
#[derive(Debug, Serialize)]
struct Incomplete {
    document: String,
    /// That were there to be asked.
    tokens: u64,
}

#[derive(Debug, Serialize)]
struct HeadRead {
    layer: u32,
    kv_head: u32,
    choices: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    if args.question.trim().is_empty() {
        return Err(CliError::EmptyQuestion);
    }
    if !args.follow_up {
        return answer(args, context, None);
    }
    let last = Conversation::last()?;
    let there =
        Context { config: last.config(&context.config)?, output: context.output, hints: Hints::at(&last.place) };
    answer(args, &there, Some(last))
}

/// Answers a question of its own, or one that follows a conversation, and keeps it as the last one.
fn answer(args: &Args, context: &Context, last: Option<Conversation>) -> Result<(), CliError> {
    let memory = context.memory()?;
    let docs = last.as_ref().map_or_else(|| args.docs.clone(), Conversation::names);
    let (collection, documents) = find(&docs, context, memory.as_ref())?;
    let chosen = match &last {
        Some(last) => &ModelArgs { model: last.model.clone() },
        None => &args.model,
    };
    if let Some(last) = &last {
        last.check(&documents)?;
        let questions = plural(last.turns.len() as u64, "question");
        context.output.progress(&format!("continues {questions} about {}", docs.join(", ")));
    }
    let model = chosen.load(context)?;
    model::check_model(&model, &collection)?;

    let window = args.window.window(model.config())?;
    let place = context.config.target()?;
    let begun = || conversation::begin(place, &chosen.model, &collection, args.system.as_deref());
    let mut conversation = last.unwrap_or_else(begun);
    let Frame { ids, stop } = if args.raw {
        let encoded = model.tokenizer.encode(&args.question).map_err(RememberError::from)?;
        Frame { ids: encoded.ids, stop: Vec::new() }
    } else {
        let text_end = text_end(memory.as_ref(), &documents)?;
        framed(&model, &mut conversation, &args.question, &text_end, window)?
    };
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        stop: [&stop[..], &args.stop].concat(),
        may_be_empty: false,
        sampling: args.sampling.sampling(),
        ..GenerateOptions::default()
    };
    let question = Question {
        documents: &documents,
        prompt: &ids,
        window,
        retrieval: args.retrieval.retrieval(model.config(), args.top_k)?,
        options,
    };
    let answer = model::ask(&model, &memory, &collection, &question, &mut |piece| context.output.stream(piece));
    let answer = answer.map_err(|error| named(error.into(), memory.as_ref()))?;
    context.output.stream_end();
    // The answer is there to be read by now.
    let lift = model::lift(&model, &ids, &answer.generated)?;
    let answered = Answered::new(&args.question, &answer, lift, memory.as_ref(), &collection, &documents, args.show);
    let answered = answered.map_err(|error| named(error, memory.as_ref()))?;
    let (hints, earlier_questions) = (context.hints.clone(), conversation.turns.len());
    let answered = Answered { hints, earlier_questions, ..answered };
    if !args.raw && !answered.answer.is_empty() {
        conversation.add(&args.question, &answered.answer, &documents);
        if let Err(error) = conversation.keep() {
            context.output.progress(&format!("--continue will not know of this question: {error}"));
        }
    }
    context.output.print(&answered)
}

/// The documents that are named, each once, and their collection. More than one lookup takes are refused before anything is read.
fn find(
    docs: &[String],
    context: &Context,
    memory: &dyn BlockMemory,
) -> Result<(CollectionInfo, Vec<DocumentInfo>), CliError> {
    // Named twice, it would be read as two texts.
    let mut names: Vec<DocumentName> = Vec::new();
    let mut named = HashSet::new();
    for name in docs.iter().map(|doc| DocumentName::new(doc, &context.config)) {
        if named.insert(name.to_string()) {
            names.push(name);
        }
    }
    if names.len() > limits::SCOPE_DOCUMENTS_MAX {
        return Err(CliError::TooManyDocuments { limit: limits::SCOPE_DOCUMENTS_MAX, found: names.len() });
    }
    let found = DocumentName::find_all(&names, memory)?;
    let Some((collection, _)) = found.first().cloned() else { return Err(CliError::NoConversation) };
    if let Some((other, _)) = found.iter().find(|(other, _)| other.id != collection.id) {
        let (first, second) = (collection.spec.name, other.spec.name.clone());
        return Err(CliError::SeveralCollections { first, second });
    }
    Ok((collection, found.into_iter().map(|(_, document)| document).collect()))
}

/// The question behind the turns before it. What does not fit the window is forgotten, the oldest first: behind it the end of the text
/// would not be seen.
fn framed(
    model: &LoadedModel,
    conversation: &mut Conversation,
    question: &str,
    text_end: &str,
    window: Window,
) -> Result<Frame, CliError> {
    loop {
        let Conversation { system, turns, .. } = &*conversation;
        let asked = Asked { question, system: system.as_deref(), earlier: turns };
        let frame = model::frame_question(model, &asked, text_end)?;
        if turns.is_empty() || frame.ids.len() <= window.tokens.max(window.chunk_tokens) / 2 {
            return Ok(frame);
        }
        conversation.turns.remove(0);
    }
}

/// How the text ends that a prompt follows: the last block of the last document.
pub(super) fn text_end(memory: &dyn BlockMemory, documents: &[DocumentInfo]) -> Result<String, CliError> {
    let Some(last) = documents.last() else { return Ok(String::new()) };
    let end = last.blocks + u32::from(last.tail_tokens > 0);
    let blocks = memory.blocks(&BlockRange { document: last.id, blocks: end.saturating_sub(1)..end })?;
    let text = blocks.last().map(|block| String::from_utf8_lossy(&block.text.bytes).into_owned());
    Ok(text.unwrap_or_default())
}

impl Answered {
    /// Asks the memory for the text of every block that was read.
    pub(super) fn new(
        question: &str,
        answer: &Answer,
        lift: Option<Lift>,
        memory: &dyn BlockMemory,
        collection: &CollectionInfo,
        documents: &[DocumentInfo],
        shown: usize,
    ) -> Result<Self, CliError> {
        let shape = &collection.spec.shape;
        let citations = model::citations(answer, memory, documents)?;
        let read: f64 = citations.iter().map(|citation| citation.share).sum();
        let incomplete = documents.iter().filter(|document| !document.sealed);
        Ok(Answered {
            question: question.into(),
            answer: answer.generated.text.trim().into(),
            documents: documents.iter().map(|document| format!("{}/{}", collection.spec.name, document.name)).collect(),
            earlier_questions: 0,
            prompt_tokens: answer.prompt_tokens,
            answer_tokens: answer.generated.ids.len(),
            finish: match answer.generated.finish {
                Finish::EndOfText => "end_of_text",
                Finish::Stop => "stop",
                Finish::MaxTokens => MAX_TOKENS,
            },
            incomplete: incomplete
                .map(|document| Incomplete {
                    document: format!("{}/{}", collection.spec.name, document.name),
                    tokens: document.tokens,
                })
                .collect(),
            lift: lift.as_ref().map(Lift::peak),
            from_documents: lift.as_ref().map(Lift::is_from_documents),
            first_token_s: answer.first_token.as_secs_f64(),
            total_s: answer.total.as_secs_f64(),
            own_share: (1.0 - read).max(0.0),
            blocks: citations.into_iter().map(BlockRead::from).collect(),
            shown,
            heads_count: shape.pieces(),
            hints: Hints::default(),
        })
    }
}

impl From<Citation> for BlockRead {
    fn from(citation: Citation) -> Self {
        let heads = citation.heads.into_iter();
        let heads = heads.map(|head| HeadRead { layer: head.layer, kv_head: head.kv_head, choices: head.choices });
        BlockRead {
            document: citation.document,
            block: citation.block.index,
            from: citation.from.to_string(),
            share: citation.share,
            heads: heads.collect(),
            text_start_bytes: citation.text_start_bytes,
            text: citation.text,
        }
    }
}

impl BlockRead {
    fn is_retrieved(&self) -> bool {
        self.from == ReadFrom::Retrieved.to_string()
    }

    /// `12 of 90 heads, layers 3-29`
    fn choosers(&self, heads_count: usize) -> String {
        if !self.is_retrieved() {
            return format!("all ({})", self.from);
        }
        let layers: BTreeSet<u32> = self.heads.iter().map(|head| head.layer).collect();
        let span = match (layers.first(), layers.last()) {
            (Some(first), Some(last)) if first < last => format!("layers {first}-{last}"),
            (Some(only), _) => format!("layer {only}"),
            _ => "no layer".into(),
        };
        format!("{} of {heads_count} heads, {span}", self.heads.len())
    }
}

impl Report for Answered {
    /// The answer itself was streamed.
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        if self.answer.is_empty() {
            writeln!(to, "no answer: {}", self.why_empty())?;
        } else if self.finish == MAX_TOKENS {
            writeln!(to, "the answer is cut after {} tokens: --max-tokens gives it more room", self.answer_tokens)?;
        }
        if self.from_documents == Some(false) {
            let before = if self.earlier_questions > 0 { ", after what was said before," } else { "" };
            writeln!(
                to,
                "the answer does not seem to come from the documents: without them{before} the model finds its words \
                 about as likely"
            )?;
        }
        writeln!(to)?;
        let (retrieved, at_hand): (Vec<_>, Vec<_>) = self.blocks.iter().partition(|block| block.is_retrieved());
        if retrieved.is_empty() {
            writeln!(to, "nothing was retrieved: the documents are at hand as a whole")?;
        }
        let mut rows = table(["DOCUMENT", "BLOCK>", "SHARE>", "CHOSEN BY", "TEXT"]);
        let retrieved_rows = retrieved.chunks(1).take(self.shown);
        let follows = |one: &&BlockRead, next: &&BlockRead| {
            one.from == next.from && one.document == next.document && one.block + 1 == next.block
        };
        for run in retrieved_rows.chain(at_hand.chunk_by(follows).take(AT_HAND_ROWS_MAX)) {
            let block = run[0];
            rows.add_row([
                block.document.clone(),
                if run.len() == 1 {
                    block.block.to_string()
                } else {
                    format!("{}-{}", block.block, run[run.len() - 1].block)
                },
                percent(run.iter().map(|block| block.share).sum()),
                block.choosers(self.heads_count),
                excerpt(block.text.as_bytes(), EXCERPT_CHARS),
            ]);
        }
        write_table(to, &rows)?;
        let rest = retrieved.len().saturating_sub(self.shown);
        if rest > 0 {
            writeln!(to, "and {} that weighed less", plural(rest as u64, "block"))?;
        }
        let rest = at_hand.chunk_by(follows).skip(AT_HAND_ROWS_MAX).map(|run| run.len() as u64).sum();
        if rest > 0 {
            writeln!(to, "and {} at hand", plural(rest, "block"))?;
        }
        writeln!(to)?;
        let sum = |blocks: &[&BlockRead]| percent(blocks.iter().map(|block| block.share).sum());
        writeln!(
            to,
            "of all attention {} went to retrieved blocks, {} to blocks at hand, {} to question and answer",
            sum(&retrieved),
            sum(&at_hand),
            percent(self.own_share)
        )?;
        for Incomplete { document, tokens } in &self.incomplete {
            let tokens = plural(*tokens, "token");
            let encode = self.hints.command("encode");
            writeln!(
                to,
                "{document} is open: only the {tokens} that it has so far were read; its {encode}, run again, goes on"
            )?;
        }
        writeln!(
            to,
            "first token after {:.2} s, {} in {:.2} s ({})",
            self.first_token_s,
            plural(self.answer_tokens as u64, "token"),
            self.total_s,
            self.finish
        )
    }
}

fn percent(share: f64) -> String {
    // The sum of nothing is -0.
    format!("{:.1} %", 100.0 * share.max(0.0))
}

impl Answered {
    fn why_empty(&self) -> &'static str {
        match self.finish {
            MAX_TOKENS => "the model wrote nothing but white space; --max-tokens gives it more room",
            "stop" => "the text that stops it came first; another wording, or --raw, may do better",
            _ => "the model ended its text at once; another wording, or --raw, may do better",
        }
    }
}
