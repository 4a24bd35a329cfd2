//! Other libraries, measured in the same minute on the same data by the scripts in `benches/peers`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::case::{Case, Truth};
use crate::cli::error::CliError;

const PAYLOAD: &str = include_str!("../../../benches/peers/payload.py");
const LOOKUP: &str = include_str!("../../../benches/peers/lookup.py");

/// Recall that approximate peers are set to reach.
const RECALL: f64 = 0.99;

/// What `case.json` says; `benches/peers/README.md` explains it.
#[derive(Serialize)]
struct CaseJson<'a> {
    layers: usize,
    kv_heads: u32,
    query_heads: u32,
    head_dim: u32,
    blocks: usize,
    keys_per_block: usize,
    query_tokens: usize,
    top_k: u32,
    lookups: usize,
    queries: usize,
    truth_width: usize,
    recall: f64,
    seconds: f64,
    peers: &'a [String],
}

/// As [`CaseJson`], for pieces of payload.
#[derive(Serialize)]
pub(super) struct PayloadCase<'a> {
    pub(super) piece_bytes: usize,
    pub(super) pieces: usize,
    pub(super) batch: usize,
    pub(super) batches: usize,
    pub(super) seconds: f64,
    pub(super) peers: &'a [String],
}

/// What a script says of one peer in one setting.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PeerResult {
    pub(super) peer: String,
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) skipped: Option<String>,
    #[serde(default)]
    pub(super) version: String,
    #[serde(default)]
    pub(super) setting: String,
    #[serde(default)]
    pub(super) threads: u32,
    #[serde(default)]
    pub(super) p50_us: f64,
    #[serde(default)]
    pub(super) p99_us: f64,
    #[serde(default)]
    pub(super) recall: f64,
}

/// How long and what is measured.
pub(super) struct Effort<'a> {
    pub(super) python: &'a str,
    pub(super) peers: &'a [String],
    pub(super) top_k: u32,
    pub(super) lookups: usize,
    pub(super) seconds: f64,
}

/// Writes the case for the script, runs it, and takes what it prints.
pub(super) fn lookup(case: &Case, truth: &[Vec<Truth>], effort: &Effort<'_>) -> Result<Vec<PeerResult>, CliError> {
    let io = |what| move |source| CliError::Io { what, source };
    let folder = tempfile::Builder::new().prefix("landmarkdb-peers-").tempdir().map_err(io("a temporary directory"))?;
    let shape = &case.shape;
    let truth_width = truth.iter().flatten().map(|truth| truth.as_good.len()).max().unwrap_or(0);
    let json = CaseJson {
        layers: case.keys.len(),
        kv_heads: shape.kv_heads,
        query_heads: shape.query_heads,
        head_dim: shape.head_dim,
        blocks: case.blocks,
        keys_per_block: case.keys_per_block(),
        query_tokens: case.asked[0].distances.len(),
        top_k: effort.top_k,
        lookups: effort.lookups,
        queries: truth.len(),
        truth_width,
        recall: RECALL,
        seconds: effort.seconds,
        peers: effort.peers,
    };
    let text = serde_json::to_vec(&json).map_err(|error| io("a case for the peers")(error.into()))?;
    let path = |name: &str| folder.path().join(name);
    let written = std::fs::write(path("case.json"), text)
        .and_then(|()| std::fs::write(path("lookup.py"), LOOKUP))
        .and_then(|()| write(&path("keys.f32"), case.keys.iter().map(|keys| bytemuck::cast_slice(keys))))
        .and_then(|()| {
            let turned: Vec<Vec<f32>> = (0..truth.len()).map(|index| case.turned(index, effort.top_k)).collect();
            write(&path("queries.f32"), turned.iter().map(|queries| bytemuck::cast_slice(queries)))
        })
        .and_then(|()| {
            let row = |truth: &Truth| {
                let blocks = truth.as_good.iter().map(|&block| block as i32).chain(std::iter::repeat(-1));
                blocks.take(truth_width).collect::<Vec<i32>>()
            };
            let rows: Vec<i32> = truth.iter().flatten().flat_map(row).collect();
            write(&path("truth.i32"), std::iter::once(bytemuck::cast_slice(&rows)))
        });
    written.map_err(io("a case for the peers"))?;
    run(effort.python, &path("lookup.py"), folder.path())
}

/// The same for pieces of payload, given one behind the other, and the order in which batches read them.
pub(super) fn payload(
    case: &PayloadCase<'_>,
    pieces: &[u8],
    order: &[i32],
    python: &str,
) -> Result<Vec<PeerResult>, CliError> {
    let io = |what| move |source| CliError::Io { what, source };
    let folder = tempfile::Builder::new().prefix("landmarkdb-peers-").tempdir().map_err(io("a temporary directory"))?;
    let text = serde_json::to_vec(case).map_err(|error| io("a case for the peers")(error.into()))?;
    let path = |name: &str| folder.path().join(name);
    let written = std::fs::write(path("case.json"), text)
        .and_then(|()| std::fs::write(path("payload.py"), PAYLOAD))
        .and_then(|()| std::fs::write(path("pieces.bin"), pieces))
        .and_then(|()| write(&path("order.i32"), order.iter().map(std::slice::from_ref).map(bytemuck::cast_slice)));
    written.map_err(io("a case for the peers"))?;
    run(python, &path("payload.py"), folder.path())
}

fn write<'a>(path: &Path, parts: impl Iterator<Item = &'a [u8]>) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for part in parts {
        file.write_all(part)?;
    }
    file.flush()
}

/// Runs a script, which prints one JSON object per line. What it says on standard error is passed on.
fn run(python: &str, script: &Path, folder: &Path) -> Result<Vec<PeerResult>, CliError> {
    let io = |source| CliError::Io { what: "running the peers (--python names the interpreter)", source };
    let output = Command::new(python).arg(script).arg(folder).stderr(Stdio::inherit()).output().map_err(io)?;
    if !output.status.success() {
        return Err(io(std::io::Error::other(format!("{python}: {}", output.status))));
    }
    let lines = output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).map_err(|error| io(error.into()))).collect()
}
