//! Other libraries, measured in the same minute on the same data by the scripts in `benches/peers`.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::case::{Case, Truth};
use super::first_token::FirstToken;
use crate::error::CliError;

const PAYLOAD: &str = include_str!("../../benches/peers/payload.py");
const LOOKUP: &str = include_str!("../../benches/peers/lookup.py");
const DECODE: &str = include_str!("../../benches/peers/decode.py");

/// Recall that approximate peers are set to reach.
pub(super) const RECALL: f64 = 0.99;

/// Which others are measured, and how.
#[derive(clap::Args, Debug)]
pub(crate) struct PeerArgs {
    /// Others to measure. For lookups faiss-flat, faiss-ivf, faiss-hnsw and usearch, for decode llama.cpp, all of which come from
    /// PyPI; for payload redis, and pread-warm and pread-cold from Python.
    #[arg(long, value_delimiter = ',', value_name = "PEERS")]
    pub(super) peers: Vec<String>,

    /// Where the peers are installed.
    #[arg(long, default_value = "python3")]
    pub(super) python: String,

    /// About how long each peer may take to build or to read a text, and to be measured.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    pub(super) peer_seconds: f64,
}

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

/// As [`CaseJson`], for a model that reads a text.
#[derive(Serialize)]
pub(super) struct DecodeCase<'a> {
    /// A file in GGUF.
    pub(super) model: PathBuf,
    /// Of the text, whose prefill is timed.
    pub(super) prefill_tokens: usize,
    /// Of the text, that decode steps see.
    pub(super) context_tokens: usize,
    pub(super) steps: usize,
    /// Lengths of the text whose states are saved and loaded.
    pub(super) reopened_tokens: &'a [usize],
    pub(super) seconds: f64,
    pub(super) peers: &'a [String],
}

/// What a script says of one peer in one setting.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Peer<F> {
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
    #[serde(flatten)]
    pub(super) figures: F,
}

/// Of a library that searches, or of a program that reads; the latter has no recall.
pub(super) type PeerResult = Peer<CallFigures>;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CallFigures {
    #[serde(default)]
    pub(super) p50_us: f64,
    #[serde(default)]
    pub(super) p99_us: f64,
    #[serde(default)]
    pub(super) recall: f64,
}

/// Of a program that runs the model.
pub(super) type DecodePeer = Peer<DecodeFigures>;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct DecodeFigures {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) speed: Option<Speed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) first_token: Option<FirstToken>,
}

/// Of full attention.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Speed {
    pub(super) prefill_tokens: u64,
    pub(super) prefill_tokens_per_s: f64,
    /// That a step sees.
    pub(super) step_tokens: u64,
    /// Median.
    pub(super) step_ms: f64,
}

/// Measures nearest-key search on a case.
pub(super) fn lookup(
    case: &Case,
    truth: &[Vec<Truth>],
    (top_k, lookups): (u32, usize),
    args: &PeerArgs,
) -> Result<Vec<PeerResult>, CliError> {
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
        top_k,
        lookups,
        queries: truth.len(),
        truth_width,
        recall: RECALL,
        seconds: args.peer_seconds,
        peers: &args.peers,
    };
    let keys = case.keys.iter().map(|keys| bytemuck::cast_slice(keys)).collect();
    let turned: Vec<f32> = (0..truth.len()).flat_map(|index| case.turned(index, top_k)).collect();
    let row = |truth: &Truth| {
        let blocks = truth.as_good.iter().map(|&block| block as i32).chain(std::iter::repeat(-1));
        blocks.take(truth_width).collect::<Vec<i32>>()
    };
    let rows: Vec<i32> = truth.iter().flatten().flat_map(row).collect();
    let files = [
        ("keys.f32", keys),
        ("queries.f32", vec![bytemuck::cast_slice(&turned)]),
        ("truth.i32", vec![bytemuck::cast_slice(&rows)]),
    ];
    run(&args.python, LOOKUP, &json, &files)
}

/// Measures reads of pieces of payload, given one behind the other, in an order.
pub(super) fn payload(
    case: &PayloadCase<'_>,
    pieces: &[u8],
    order: &[i32],
    python: &str,
) -> Result<Vec<PeerResult>, CliError> {
    run(python, PAYLOAD, case, &[("pieces.bin", vec![pieces]), ("order.i32", vec![bytemuck::cast_slice(order)])])
}

/// Measures the model of a case on a text and on a prompt after it, both as its own token ids.
pub(super) fn decode(
    case: &DecodeCase<'_>,
    text: &[u32],
    prompt: &[u32],
    python: &str,
) -> Result<Vec<DecodePeer>, CliError> {
    let files = [("text.i32", vec![bytemuck::cast_slice(text)]), ("prompt.i32", vec![bytemuck::cast_slice(prompt)])];
    run(python, DECODE, case, &files)
}

/// Writes a case and its files, in parts, into a folder; runs a script there, and takes the JSON objects that it prints, one
/// per line. What it says on standard error is passed on.
fn run<Line: DeserializeOwned>(
    python: &str,
    script: &str,
    case: &impl Serialize,
    files: &[(&str, Vec<&[u8]>)],
) -> Result<Vec<Line>, CliError> {
    let io = |what: &'static str| move |source: io::Error| CliError::Io { what, source };
    let folder = tempfile::Builder::new().prefix("landmarkdb-peers-").tempdir().map_err(io("a temporary directory"))?;
    let path = |name: &str| folder.path().join(name);
    let write = |name: &str, parts: &[&[u8]]| {
        let mut file = File::create(path(name))?;
        parts.iter().try_for_each(|part| file.write_all(part))
    };
    let text = serde_json::to_vec(case).map_err(|error| io("a case for the peers")(error.into()))?;
    write("case.json", &[&text])
        .and_then(|()| write("measure.py", &[script.as_bytes()]))
        .and_then(|()| files.iter().try_for_each(|(name, parts)| write(name, parts)))
        .map_err(io("a case for the peers"))?;

    let failed = io("running the peers (--python names the interpreter)");
    let output = Command::new(python).arg(path("measure.py")).arg(folder.path()).stderr(Stdio::inherit()).output();
    let output = output.map_err(failed)?;
    if !output.status.success() {
        return Err(failed(io::Error::other(format!("{python}: {}", output.status))));
    }
    let lines = output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).map_err(|error| failed(error.into()))).collect()
}
