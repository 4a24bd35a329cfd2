//! `landmarkdb stats`: totals.

use std::io::{self, Write};

use serde::Serialize;

use landmarkdb::Health;

use super::Context;
use super::error::CliError;
use super::output::{Report, count, plural, size, write_facts};

/// Show totals: documents, bytes on disk and in memory, calls answered.
///
/// live data is what documents refer to, segments are the files that hold it, set aside is what was cut off or repaired away and
/// is kept. Figures of the index and of calls count since the memory was opened: of interest with --connect.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb stats
  landmarkdb stats --connect http://127.0.0.1:7601 --json | jq .index_bytes
")]
pub(super) struct Args {}

/// Totals of one data directory.
#[derive(Debug, Serialize)]
struct Totals {
    collections: u64,
    documents: u64,
    /// Full blocks.
    blocks: u64,
    /// Documents that end with tokens that do not fill a block.
    tails: u64,
    tokens: u64,
    /// Bytes of records that documents refer to.
    live_bytes: u64,
    /// Bytes of all segment files.
    segment_bytes: u64,
    segments: u64,
    /// Bytes of the catalog on disk.
    catalog_bytes: u64,
    /// Bytes in DIR/torn, kept until `landmarkdb repair --discard-torn`.
    set_aside_bytes: u64,
    /// Bytes of landmark keys held in memory now, and their indexes.
    index_bytes: u64,
    /// The bytes that they may take.
    index_bytes_max: u64,
    /// Times that a document's keys, or more of them, were read from disk to be held.
    index_loads: u64,
    /// Documents whose keys made room for others.
    index_evictions: u64,
    lookups: u64,
    attends: u64,
    appended_blocks: u64,
    fetched_blocks: u64,
    /// `serving`, `read-only` or `failed`.
    health: &'static str,
    /// Why it is not serving.
    #[serde(skip_serializing_if = "Option::is_none")]
    health_reason: Option<String>,
}

pub(super) fn run(_: &Args, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let stats = memory.stats()?;
    let mut tails = 0;
    for collection in memory.collections()? {
        tails += memory.documents(collection.id)?.iter().filter(|document| document.tail_tokens > 0).count() as u64;
    }
    let (health, health_reason) = match stats.health {
        Health::Serving => ("serving", None),
        Health::ReadOnly { reason } => ("read-only", Some(reason)),
        Health::Failed { reason } => ("failed", Some(reason)),
        // As a service tells it.
        other => ("failed", Some(format!("{other:?}"))),
    };
    context.output.print(&Totals {
        collections: stats.collections,
        documents: stats.documents,
        blocks: stats.blocks,
        tails,
        tokens: stats.tokens,
        live_bytes: stats.live_bytes,
        segment_bytes: stats.segment_bytes,
        segments: stats.segments,
        catalog_bytes: stats.catalog_bytes,
        set_aside_bytes: stats.set_aside_bytes,
        index_bytes: stats.index_bytes,
        index_bytes_max: stats.index_bytes_max,
        index_loads: stats.index_loads,
        index_evictions: stats.index_evictions,
        lookups: stats.lookups,
        attends: stats.attends,
        appended_blocks: stats.appended_blocks,
        fetched_blocks: stats.fetched_blocks,
        health,
        health_reason,
    })
}

impl Report for Totals {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let health = match &self.health_reason {
            Some(reason) => format!("{}: {reason}", self.health),
            None => self.health.into(),
        };
        let segments = format!("{} in {}", size(self.segment_bytes), plural(self.segments, "file"));
        write_facts(
            to,
            &[
                ("collections", count(self.collections)),
                ("documents", count(self.documents)),
                ("blocks", format!("{} and {}", count(self.blocks), plural(self.tails, "tail"))),
                ("tokens", count(self.tokens)),
                ("live data", size(self.live_bytes)),
                ("segments", segments),
                ("catalog", size(self.catalog_bytes)),
                ("set aside", size(self.set_aside_bytes)),
                ("index in memory", format!("{} of at most {}", size(self.index_bytes), size(self.index_bytes_max))),
                ("index loads", count(self.index_loads)),
                ("index evictions", count(self.index_evictions)),
                ("lookups", count(self.lookups)),
                ("attends", count(self.attends)),
                ("blocks appended", count(self.appended_blocks)),
                ("blocks fetched", count(self.fetched_blocks)),
                ("health", health),
            ],
        )
    }
}
