//! `landmarkdb blocks`: the blocks of one document.

use std::io::{self, Write};

use serde::Serialize;

use landmarkdb::{BlockInfo, BlockMemory, BlockRange, DocumentInfo};

use super::Context;
use super::error::CliError;
use super::open::DocumentName;
use super::output::{Report, count, excerpt, size, table, write_table};
use super::settings::from_one;

/// Blocks asked for in one call, so that a reply stays small for any document.
const PAGE_BLOCKS: u32 = 512;

/// Characters of text that a table row shows.
const EXCERPT_CHARS: usize = 64;

/// List the blocks of a document: tokens, text, bytes on disk.
///
/// The last block may be the tail: tokens that do not fill a block yet and cannot be looked up.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb blocks books/persuasion
  landmarkdb blocks books/persuasion --start 100 --count 5
  landmarkdb blocks books/persuasion --json | jq -r '.blocks[7].text'
")]
pub(super) struct Args {
    /// NAME in the collection given by --collection, or COLLECTION/NAME.
    doc: String,

    /// The first block to list.
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    start: u32,

    /// How many blocks to list [default: all].
    #[arg(long, value_name = "BLOCKS", value_parser = from_one::<u32>())]
    count: Option<u32>,
}

/// Blocks of one document.
#[derive(Debug, Serialize)]
struct Blocks {
    document: u64,
    blocks: Vec<BlockReport>,
}

/// One block.
#[derive(Debug, Serialize)]
struct BlockReport {
    /// Position in the document, counted in blocks.
    index: u32,
    tokens: u32,
    /// Whether it is the document's tail, shorter than a block.
    tail: bool,
    token_ids: Vec<u32>,
    /// Where the block's text begins in the source text.
    text_start_bytes: u64,
    text_bytes: u64,
    /// The source text; characters that a block boundary cuts are replaced by U+FFFD.
    text: String,
    stored_bytes: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let (_, document) = DocumentName::new(&args.doc, &context.config).find(memory.as_ref())?;
    // The tail, where there is one, is the block after the last full one.
    let end = document.blocks + u32::from(document.tail_tokens > 0);
    let end = args.count.map_or(end, |count| end.min(args.start.saturating_add(count)));
    let blocks = read(memory.as_ref(), &document, args.start, end)?;
    context.output.print(&Blocks { document: document.id.0, blocks })
}

fn read(memory: &dyn BlockMemory, document: &DocumentInfo, start: u32, end: u32) -> Result<Vec<BlockReport>, CliError> {
    let mut blocks = Vec::new();
    let mut next = start;
    while next < end {
        let page = next..end.min(next.saturating_add(PAGE_BLOCKS));
        next = page.end;
        let infos = memory.blocks(&BlockRange { document: document.id, blocks: page })?;
        blocks.extend(infos.into_iter().map(|info| BlockReport::new(info, document)));
    }
    Ok(blocks)
}

impl BlockReport {
    fn new(info: BlockInfo, document: &DocumentInfo) -> Self {
        BlockReport {
            index: info.id.index,
            tokens: info.token_ids.len() as u32,
            tail: info.id.index == document.blocks,
            token_ids: info.token_ids,
            text_start_bytes: info.text.start,
            text_bytes: info.text.bytes.len() as u64,
            text: String::from_utf8_lossy(&info.text.bytes).into_owned(),
            stored_bytes: info.stored_bytes,
        }
    }
}

impl Report for Blocks {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows = table(["BLOCK>", "TOKENS>", "ON DISK>", "TEXT"]);
        for block in &self.blocks {
            let tokens = if block.tail { format!("{} (tail)", block.tokens) } else { count(block.tokens) };
            let text = excerpt(block.text.as_bytes(), EXCERPT_CHARS);
            rows.add_row([block.index.to_string(), tokens, size(block.stored_bytes), text]);
        }
        write_table(to, &rows)
    }
}
