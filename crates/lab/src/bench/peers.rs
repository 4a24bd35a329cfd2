//! Other libraries, measured in the same minute on the same data by the scripts in `benches/peers`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::case::{Case, Truth};
use super::error::BenchError;
use super::first_token::FirstToken;
use super::readable::plural;

const PAYLOAD: &str = include_str!("../../benches/peers/payload.py");
const LOOKUP: &str = include_str!("../../benches/peers/lookup.py");
const DECODE: &str = include_str!("../../benches/peers/decode.py");

/// Recall that approximate peers are set to reach.
pub(super) const RECALL: f64 = 0.99;

/// Which others are measured, and how.
#[derive(Clone, Debug)]
pub struct PeerSettings {
    /// For lookups faiss-flat, faiss-ivf, faiss-hnsw and usearch; for decode llama.cpp; for payload redis, pread-warm and
    /// pread-cold. None: no peer is measured.
    pub peers: Vec<String>,
    /// The interpreter of the Python in which they are installed.
    pub python: String,
    /// About how long each peer may take to build or to read a text, and to be measured.
    pub seconds: f64,
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
    pub(super) model: &'a Path,
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
pub struct Peer<F> {
    /// Its name.
    pub peer: String,
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Of the library or program.
    #[serde(default)]
    pub version: String,
    /// In words.
    #[serde(default)]
    pub setting: String,
    /// That it was given.
    #[serde(default)]
    pub threads: u32,
    /// What was measured; defaults where it was skipped.
    #[serde(flatten)]
    pub figures: F,
}

/// Of a library that searches, or of a program that reads; the latter has no recall.
pub type PeerResult = Peer<CallFigures>;

/// Of one call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CallFigures {
    /// In microseconds.
    #[serde(default)]
    pub p50_us: f64,
    /// In microseconds.
    #[serde(default)]
    pub p99_us: f64,
    /// Of the right blocks, 0 to 1.
    #[serde(default)]
    pub recall: f64,
}

/// Of a program that runs the model.
pub type DecodePeer = Peer<DecodeFigures>;

/// Either may be missing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DecodeFigures {
    /// Of prefill and decode steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// After its saved state was loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token: Option<FirstToken>,
}

/// Of full attention.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Speed {
    /// Of the text.
    pub prefill_tokens: u64,
    /// Tokens read per second.
    pub prefill_tokens_per_s: f64,
    /// That a step sees.
    pub step_tokens: u64,
    /// Median.
    pub step_ms: f64,
}

impl DecodePeer {
    /// `llama.cpp, Q4_1, flash attention, 2 threads`
    pub fn label(&self) -> String {
        format!("{}, {}, {}", self.peer, self.setting, plural(self.threads.into(), "thread"))
    }
}

/// Measures nearest-key search on a case.
pub(super) fn lookup(
    case: &Case,
    truth: &[Vec<Truth>],
    (top_k, lookups): (u32, usize),
    settings: &PeerSettings,
) -> Result<Vec<PeerResult>, BenchError> {
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
        seconds: settings.seconds,
        peers: &settings.peers,
    };
    let keys = case.keys.iter().map(|keys| bytemuck::cast_slice(keys)).collect();
    let rotated: Vec<f32> = (0..truth.len()).flat_map(|index| case.rotated(index, top_k)).collect();
    let row = |truth: &Truth| {
        let blocks = truth.as_good.iter().map(|&block| block as i32).chain(std::iter::repeat(-1));
        blocks.take(truth_width).collect::<Vec<i32>>()
    };
    let rows: Vec<i32> = truth.iter().flatten().flat_map(row).collect();
    let files = [
        ("keys.f32", keys),
        ("queries.f32", vec![bytemuck::cast_slice(&rotated)]),
        ("truth.i32", vec![bytemuck::cast_slice(&rows)]),
    ];
    run(&settings.python, LOOKUP, &json, &files)
}

/// Measures reads of pieces of payload, given one behind the other, in an order.
pub(super) fn payload(
    case: &PayloadCase<'_>,
    pieces: &[u8],
    order: &[i32],
    python: &str,
) -> Result<Vec<PeerResult>, BenchError> {
    run(python, PAYLOAD, case, &[("pieces.bin", vec![pieces]), ("order.i32", vec![bytemuck::cast_slice(order)])])
}

/// Measures the model of a case on a text and on a prompt after it, both as its own token ids.
pub(super) fn decode(
    case: &DecodeCase<'_>,
    text: &[u32],
    prompt: &[u32],
    python: &str,
) -> Result<Vec<DecodePeer>, BenchError> {
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
) -> Result<Vec<Line>, BenchError> {
    let io = |what: &'static str| move |source: io::Error| BenchError::Io { what, source };
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

    let failed = |source| BenchError::Peers { python: python.into(), source };
    let output = Command::new(python).arg(path("measure.py")).arg(folder.path()).stderr(Stdio::inherit()).output();
    let output = output.map_err(failed)?;
    if !output.status.success() {
        return Err(failed(io::Error::other(output.status.to_string())));
    }
    let lines = output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).map_err(|error| failed(error.into()))).collect()
}
