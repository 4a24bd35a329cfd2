//! `landmarkdb bench payload`: pieces of stored K and V, read beside plain reads of the same file and Redis.

use std::io::{self, Write};

use super::peers::PeerArgs;
use crate::Context;
use crate::error::CliError;
use crate::numbers::from_one;
use crate::output::{Report, count, plain_table, size, write_table};
use landmarkdb_lab::bench::{self, PayloadReport, PayloadSettings};

/// Measure how fast pieces (K and V of one block, layer and KV head) come from the store, checked.
///
/// Beside it stand positioned reads of the same bytes from the same files, unchecked, and with --peers Redis. Warm reads come
/// from the page cache; before cold ones it is emptied of the files.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench payload
  landmarkdb bench payload --blocks 2048 --head-dim 64 --peers redis --json
")]
pub(crate) struct Args {
    /// Blocks to store.
    #[arg(long, default_value_t = 512, value_parser = from_one::<usize>())]
    pub(super) blocks: usize,

    /// Tokens per block.
    #[arg(long, default_value_t = 64, value_parser = from_one::<usize>())]
    pub(super) block_tokens: usize,

    /// Dimensions of a head.
    #[arg(long, default_value_t = 128, value_parser = from_one::<usize>())]
    pub(super) head_dim: usize,

    /// Pieces read in one batch: k blocks for each of some heads.
    #[arg(long, default_value_t = 32, value_parser = from_one::<usize>())]
    pub(super) batch: usize,

    /// Batches that are timed.
    #[arg(long, default_value_t = 200, value_parser = from_one::<usize>())]
    pub(super) batches: usize,

    #[command(flatten)]
    pub(super) others: PeerArgs,

    /// Seed of the random values and of the order of reads.
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&measure(args, context)?)
}

pub(super) fn measure(args: &Args, context: &Context) -> Result<PayloadReport, CliError> {
    let settings = PayloadSettings {
        blocks: args.blocks,
        block_tokens: args.block_tokens,
        head_dim: args.head_dim,
        batch: args.batch,
        batches: args.batches,
        seed: args.seed,
        others: args.others.settings(),
    };
    Ok(bench::payload(&settings, &mut |line| context.output.say(line))?)
}

impl Report for PayloadReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let pieces = count(self.pieces as u64);
        writeln!(
            to,
            "batches of {} of {pieces} pieces of {}; seed {}\n",
            self.batch,
            size(self.piece_bytes as u64),
            self.seed
        )?;
        let mut rows = plain_table(["", "PAGES", "THREADS>", "P50>", "P99>", "READ/S>"]);
        for result in &self.results {
            rows.add_row([
                result.what.to_string(),
                result.pages.to_string(),
                result.threads.to_string(),
                format!("{:.0} us", result.p50_us),
                format!("{:.0} us", result.p99_us),
                format!("{}/s", size(result.bytes_per_s as u64)),
            ]);
        }
        for peer in &self.peers {
            match &peer.skipped {
                Some(why) => rows.add_row([format!("{}: {why}", peer.peer)]),
                None => rows.add_row([
                    format!("{} {}", peer.peer, peer.version),
                    peer.setting.clone(),
                    peer.threads.to_string(),
                    format!("{:.0} us", peer.figures.p50_us),
                    format!("{:.0} us", peer.figures.p99_us),
                    format!(
                        "{}/s",
                        size((self.batch * self.piece_bytes) as u64 * 1_000_000 / peer.figures.p50_us as u64)
                    ),
                ]),
            };
        }
        write_table(to, &rows)
    }
}
