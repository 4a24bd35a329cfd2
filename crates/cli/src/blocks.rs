//! `landmarkdb blocks`: the blocks of one document.

use std::io::{self, Write};
use std::ops::Range;

use serde::Serialize;

use landmarkdb::{BlockInfo, BlockMemory, BlockRange, DocumentInfo, MemoryError};

use super::Context;
use super::error::CliError;
use super::numbers::from_one;
use super::open::DocumentName;
use super::output::{Report, count, excerpt, plural, size, table, write_table};

/// Blocks asked for in one call, so that a reply stays small for any document.
const PAGE_BLOCKS: u32 = 512;

/// Characters of text that a table row shows.
const EXCERPT_CHARS: usize = 64;

/// List the blocks of a document: tokens, text, bytes on disk.
///
/// The last block may be the tail: tokens that do not fill a block. Lookups find it once the document is whole.
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
    /// Those of the range that are damaged.
    damaged: Vec<DamagedBlock>,
    /// Said where there is none in the range.
    #[serde(skip)]
    none: String,
}

/// A block that cannot be read.
#[derive(Debug, Serialize)]
struct DamagedBlock {
    index: u32,
    /// Human-readable.
    problem: String,
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
    let all = document.blocks + u32::from(document.tail_tokens > 0);
    let end = args.count.map_or(all, |count| all.min(args.start.saturating_add(count)));
    let mut blocks = Blocks {
        document: document.id.0,
        blocks: Vec::new(),
        damaged: Vec::new(),
        none: format!("{} has {}, none from {} on", args.doc, plural(all.into(), "block"), args.start),
    };
    blocks.read(memory.as_ref(), &document, args.start..end)?;
    context.output.print(&blocks)?;
    match blocks.damaged.len() {
        0 => Ok(()),
        faults => Err(CliError::Faults { faults }),
    }
}

impl Blocks {
    /// Page by page, and one by one where a page has a damaged block.
    fn read(&mut self, memory: &dyn BlockMemory, document: &DocumentInfo, range: Range<u32>) -> Result<(), CliError> {
        for start in range.clone().step_by(PAGE_BLOCKS as usize) {
            let page = start..range.end.min(start.saturating_add(PAGE_BLOCKS));
            let read = |blocks: Range<u32>| memory.blocks(&BlockRange { document: document.id, blocks });
            let infos = match read(page.clone()) {
                Err(MemoryError::DataLoss { .. }) => page.map(|index| (index, read(index..index + 1))).collect(),
                read => vec![(start, read)],
            };
            for (index, read) in infos {
                match read {
                    Ok(infos) => self.blocks.extend(infos.into_iter().map(|info| BlockReport::new(info, document))),
                    Err(MemoryError::DataLoss { detail: problem, .. }) => {
                        self.damaged.push(DamagedBlock { index, problem })
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
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
        let damaged = |block: &DamagedBlock| {
            [block.index.to_string(), "-".into(), "-".into(), format!("damaged: {}", block.problem)]
        };
        let mut lost = self.damaged.iter().peekable();
        for block in &self.blocks {
            while let Some(before) = lost.next_if(|lost| lost.index < block.index) {
                rows.add_row(damaged(before));
            }
            let tokens = if block.tail { format!("{} (tail)", block.tokens) } else { count(block.tokens) };
            let text = excerpt(block.text.as_bytes(), EXCERPT_CHARS);
            rows.add_row([block.index.to_string(), tokens, size(block.stored_bytes), text]);
        }
        for last in lost {
            rows.add_row(damaged(last));
        }
        let is_empty = self.blocks.is_empty() && self.damaged.is_empty();
        if is_empty { writeln!(to, "{}", self.none) } else { write_table(to, &rows) }
    }
}
