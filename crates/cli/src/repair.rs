//! `landmarkdb repair`: makes what is left of a damaged data directory readable again, and says what is gone.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use landmarkdb::store::{CollectionEntry, LostCollection, RepairOptions, RepairReport, Store};
use landmarkdb::{CollectionId, CollectionSpec, MemoryError, ModelShape, Rope, Sha256Digest};

use super::Context;
use super::error::CliError;
use super::faults::{FaultReport, fault_table};
use super::hints::Hints;
use super::output::{Report, plural, size, table, write_table};
use super::target::Target;

/// Rebuild the catalog, salvage damaged documents, and report what is lost.
///
/// Nothing is destroyed: damaged segments move to DIR/torn. No other process may have the directory open. Exits with code 5
/// if something that was stored is still not readable.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb repair --data ./books
  landmarkdb repair --data ./books --collection-spec books.json
  landmarkdb repair --data ./books --discard-torn
")]
pub(super) struct Args {
    /// Remove what DIR/torn held before this repair.
    #[arg(long)]
    discard_torn: bool,

    /// Put back collections whose description is lost, from a file with what `ls --json` or `show --json` once printed of them; may
    /// be repeated.
    #[arg(long, value_name = "FILE")]
    collection_spec: Vec<PathBuf>,
}

/// Documents that the last line names.
const TITLES_MAX: usize = 5;

/// What was done, and what is gone.
#[derive(Debug, Serialize)]
struct Repairs {
    /// Something that was stored is not readable: `gone` and `missing_collections` say what.
    lost: bool,
    /// Records that only the catalog knew and that are in the log again.
    rewritten: u64,
    /// Ids of collections that were put back.
    collections: Vec<u32>,
    missing_collections: Vec<MissingCollection>,
    /// Documents that are readable again.
    salvaged: Vec<Salvaged>,
    /// Damaged segments whose needed records were copied and whose files are in DIR/torn.
    moved_segments: Vec<u32>,
    /// What is not readable.
    gone: Vec<FaultReport>,
    /// Bytes of DIR/torn that were removed.
    discarded_bytes: u64,
    /// Bytes in DIR/torn now.
    set_aside_bytes: u64,
    /// Where they are.
    #[serde(skip)]
    torn: String,
    #[serde(skip)]
    hints: Hints,
}

#[derive(Debug, Serialize)]
struct MissingCollection {
    id: u32,
    documents: u64,
    blocks: u64,
    block_tokens: u32,
    pieces: u32,
    piece_bytes: u32,
    keys_bytes: u32,
}

#[derive(Debug, Serialize)]
struct Salvaged {
    document: u64,
    collection: u32,
    name: String,
    /// COLLECTION/NAME
    #[serde(skip)]
    title: String,
    blocks: u32,
    tail_tokens: u32,
    /// What would say that it was deleted is lost.
    perhaps_deleted: bool,
    /// Human-readable.
    reason: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let dir = match context.config.target()? {
        Target::Data(dir) if !dir.is_dir() => return Err(CliError::NoDataDirectory { path: dir.clone() }),
        Target::Data(dir) => dir,
        Target::Connect(connect) => return Err(CliError::RepairNeedsData { connect: connect.clone() }),
    };
    let mut collections = Vec::new();
    for path in &args.collection_spec {
        let problem = |problem| CliError::CollectionSpec { path: path.clone(), problem };
        collections.extend(read_specs(path).map_err(problem)?);
    }
    let options = RepairOptions { discard_torn: args.discard_torn, collections };
    let report = Store::repair(dir, &options).map_err(MemoryError::from)?;
    let torn = dir.join("torn").display().to_string();
    let report = Repairs { torn, hints: context.hints.clone(), ..Repairs::from(report) };
    context.output.print(&report)?;
    if report.lost { Err(CliError::SomethingLost) } else { Ok(()) }
}

/// One collection as `ls --json` and `show --json` print it.
#[derive(Deserialize)]
struct Spec {
    id: u32,
    name: String,
    model: String,
    fingerprint: String,
    key_rule: String,
    payload_dtype: String,
    key_dtype: String,
    engine: String,
    layers: u32,
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_tokens: u32,
    softmax_scale: f32,
    rope_frequencies: Vec<f32>,
    #[serde(default)]
    unrotated_layers: Vec<u32>,
    model_digest: String,
    tokenizer_digest: String,
}

/// A collection alone, the answer of `show`, or that of `ls`.
fn read_specs(path: &Path) -> Result<Vec<LostCollection>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let mut json: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let specs = match (json["collections"].take(), json["collection"].take()) {
        (serde_json::Value::Array(several), _) => several,
        (_, one @ serde_json::Value::Object(_)) => vec![one],
        _ => vec![json],
    };
    specs.into_iter().map(|spec| serde_json::from_value::<Spec>(spec).map_err(|e| e.to_string())?.read()).collect()
}

impl Spec {
    fn read(self) -> Result<LostCollection, String> {
        let spec = CollectionSpec {
            name: self.name,
            shape: ModelShape {
                layers: self.layers,
                query_heads: self.query_heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                block_tokens: self.block_tokens,
                rope: Rope { frequencies: self.rope_frequencies },
                unrotated_layers: self.unrotated_layers,
                softmax_scale: self.softmax_scale,
            },
            key_rule: self.key_rule.parse()?,
            payload_dtype: self.payload_dtype.parse()?,
            key_dtype: self.key_dtype.parse()?,
            model_digest: digest("model_digest", &self.model_digest)?,
            tokenizer_digest: digest("tokenizer_digest", &self.tokenizer_digest)?,
            model_name: self.model,
        };
        let found = format!("{:#}", spec.fingerprint());
        if found != self.fingerprint {
            let expected = self.fingerprint;
            return Err(format!(
                "expected a collection with fingerprint {expected}, found one with {found}: give it as it was printed"
            ));
        }
        let entry = CollectionEntry { spec, engine: self.engine.parse()? };
        Ok(LostCollection { id: CollectionId(self.id), entry })
    }
}

fn digest(field: &str, digits: &str) -> Result<Sha256Digest, String> {
    let byte = |at: usize| digits.get(2 * at..2 * at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
    let bytes = bytes.filter(|_| digits.len() == 64).and_then(|bytes| bytes.try_into().ok());
    bytes.map(Sha256Digest).ok_or_else(|| format!("{field}: expected 64 hex digits, found {digits:?}"))
}

impl From<RepairReport> for Repairs {
    fn from(report: RepairReport) -> Self {
        let lost = report.is_something_lost();
        let names = report.names;
        let missing = report.missing_collections.into_iter().map(|missing| MissingCollection {
            id: missing.id.0,
            documents: missing.documents,
            blocks: missing.blocks,
            block_tokens: missing.block_tokens,
            pieces: missing.pieces,
            piece_bytes: missing.piece_bytes,
            keys_bytes: missing.keys_bytes,
        });
        let salvaged = report.salvaged.into_iter().map(|salvaged| Salvaged {
            document: salvaged.document.0,
            collection: salvaged.collection.0,
            title: names.get(&salvaged.document).unwrap_or(&salvaged.name).clone(),
            name: salvaged.name,
            blocks: salvaged.blocks,
            tail_tokens: salvaged.tail_tokens,
            perhaps_deleted: salvaged.perhaps_deleted,
            reason: salvaged.reason,
        });
        let leftovers = report.leftovers.into_iter().map(|left| {
            let problem = match left.blocks {
                0 => left.reason,
                blocks => format!("{} are not part of it: {}", plural(blocks, "block"), left.reason),
            };
            FaultReport::new(Some(left.document), None, problem, &names)
        });
        let states = report.lost_states.into_iter().map(|lost| {
            let problem = format!("what it kept for its model to continue it is lost: {}", lost.reason);
            FaultReport::new(Some(lost.document), None, problem, &names)
        });
        let faults = report.faults.into_iter();
        let faults = faults.map(|fault| FaultReport::new(fault.document, fault.block, fault.problem, &names));
        Repairs {
            lost,
            rewritten: report.rewritten,
            collections: report.collections.iter().map(|id| id.0).collect(),
            missing_collections: missing.collect(),
            salvaged: salvaged.collect(),
            moved_segments: report.moved.iter().map(|moved| moved.segment.0).collect(),
            gone: leftovers.chain(states).chain(faults).collect(),
            discarded_bytes: report.discarded.iter().map(|torn| torn.bytes).sum(),
            set_aside_bytes: report.kept.iter().map(|torn| torn.bytes).sum(),
            torn: String::new(),
            hints: Hints::default(),
        }
    }
}

impl Report for Repairs {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        if !self.salvaged.is_empty() {
            let mut rows = table(["DOCUMENT>", "NAME", "BLOCKS>", "TAIL>", "READABLE AGAIN"]);
            for salvaged in &self.salvaged {
                let note = match salvaged.perhaps_deleted {
                    true => format!(
                        " (perhaps it was deleted: {} then)",
                        self.hints.command(format!("rm {}", salvaged.title))
                    ),
                    false => String::new(),
                };
                rows.add_row([
                    salvaged.document.to_string(),
                    salvaged.title.clone(),
                    salvaged.blocks.to_string(),
                    salvaged.tail_tokens.to_string(),
                    format!("{}{note}", salvaged.reason),
                ]);
            }
            write_table(to, &rows)?;
        }
        if !self.gone.is_empty() {
            write_table(to, &fault_table(&self.gone, "NOT READABLE"))?;
        }
        for missing in &self.missing_collections {
            writeln!(
                to,
                "collection {} is missing: {} in {}, of {} in {} of {} bytes, keys of {} bytes; give --collection-spec FILE",
                missing.id,
                plural(missing.blocks, "block"),
                plural(missing.documents, "document"),
                plural(missing.block_tokens.into(), "token"),
                plural(missing.pieces.into(), "piece"),
                missing.piece_bytes,
                missing.keys_bytes,
            )?;
        }
        if !self.collections.is_empty() {
            writeln!(to, "{} put back", plural(self.collections.len() as u64, "collection"))?;
        }
        if self.rewritten > 0 {
            writeln!(to, "{} that only the catalog knew written again", plural(self.rewritten, "record"))?;
        }
        if !self.moved_segments.is_empty() {
            let segments = plural(self.moved_segments.len() as u64, "damaged segment");
            writeln!(to, "{segments} moved to {}", self.torn)?;
        }
        if self.discarded_bytes > 0 {
            writeln!(to, "{} of {} removed", size(self.discarded_bytes), self.torn)?;
        }
        if self.set_aside_bytes > 0 {
            let kept = size(self.set_aside_bytes);
            let removes = self.hints.command("repair --discard-torn");
            writeln!(to, "{kept} kept in {}: {removes} removes it", self.torn)?;
        }
        match self.lost {
            true => writeln!(to, "repaired, but not readable any more: {}", self.losses()),
            false => writeln!(to, "repaired: all is well"),
        }
    }
}

impl Repairs {
    /// `1 block of books/emma, 1 collection`
    fn losses(&self) -> String {
        let mut blocks = BTreeMap::new();
        let mut others = 0;
        for fault in &self.gone {
            match fault.block {
                Some(_) => *blocks.entry(fault.title()).or_insert(0) += 1,
                None => others += 1,
            }
        }
        let named = blocks.len() <= TITLES_MAX;
        let several = || {
            vec![format!("{} of {}", plural(blocks.values().sum(), "block"), plural(blocks.len() as u64, "document"))]
        };
        let each = || blocks.iter().map(|(title, &lost)| format!("{} of {title}", plural(lost, "block"))).collect();
        let mut losses: Vec<String> = if named { each() } else { several() };
        let missing = (self.missing_collections.len() as u64, "collection");
        let rest = [missing, (others, "other record")].into_iter().filter(|&(number, _)| number > 0);
        losses.extend(rest.map(|(number, what)| plural(number, what)));
        losses.join(", ")
    }
}
