//! What `landmarkdb bench report` measures, and the commands that measure the same.

use std::fmt::Display;
use std::path::Path;

use super::peers::PeerArgs;
use super::{decode, lookup, payload};
use crate::capture;
use crate::settings::{ModelArgs, SetupArgs, typed};
use landmarkdb::{DType, Engine, KeyRule};
use landmarkdb_lab::bench::Way;

/// One section of the page.
pub(super) struct Section {
    pub(super) title: &'static str,
    /// What is asked, true on any machine and for any size.
    pub(super) about: &'static str,
    pub(super) benchmark: Benchmark,
}

/// A command that measures.
#[derive(Debug)]
pub(super) enum Benchmark {
    Lookup(lookup::Args),
    Payload(payload::Args),
    Decode(decode::Args),
}

/// What sections are made for.
pub(super) struct Subjects<'a> {
    /// Keys and queries of the model.
    pub(super) captured: &'a Path,
    pub(super) model: &'a ModelArgs,
    /// Where the peers are installed.
    pub(super) python: &'a str,
    /// Measure tiny sizes.
    pub(super) quick: bool,
}

impl Subjects<'_> {
    /// All sections, in the order of the page.
    pub(super) fn sections(&self) -> [Section; 7] {
        let sections = [
            Section {
                title: "One lookup, one key per block",
                about: "What one layer of a model with landmarks asks at one decode step. Keys (f16, as in a model's cache) and \
                        queries are random; layers take turns, so that nothing is served from a cache.",
                benchmark: Benchmark::Lookup(lookup::Args {
                    engines: vec![Engine::Flat, Engine::Sq8, Engine::Sq4],
                    ways: vec![Way::Tcp, Way::Unix],
                    others: self.beside(&["faiss-flat"]),
                    lookups: 400,
                    ..typed(&[])
                }),
            },
            Section {
                title: "One lookup, a model's own keys and queries",
                about: "The keys of a novel and the queries of the tokens after it, as the model asked them. Attention's queries are \
                        far from its keys, and neither is random.",
                benchmark: Benchmark::Lookup(lookup::Args {
                    captured: Some(self.captured.into()),
                    ways: vec![Way::Tcp, Way::Unix],
                    others: self.beside(&["faiss-flat", "faiss-ivf", "faiss-hnsw", "usearch"]),
                    ..typed(&[])
                }),
            },
            Section {
                title: "One lookup of many tokens",
                about: "The first case during prefill, with many query tokens at once.",
                benchmark: Benchmark::Lookup(lookup::Args {
                    query_tokens: 256,
                    ways: vec![Way::InProcess],
                    others: self.beside(&["faiss-flat"]),
                    lookups: 20,
                    ..typed(&[])
                }),
            },
            Section {
                title: "Attention over the chosen blocks, in process and through a service",
                about: "The second case, with the attention over the chosen blocks, which the memory computes where the blocks are.",
                benchmark: Benchmark::Lookup(lookup::Args {
                    captured: Some(self.captured.into()),
                    keys: vec![DType::Int8],
                    engines: vec![Engine::Flat],
                    ways: vec![Way::Tcp, Way::Unix],
                    attend: true,
                    lookups: 1000,
                    ..typed(&[])
                }),
            },
            Section {
                title: "Reading stored K and V",
                about: "A piece is K and V of one block, layer and KV head. The store checks every byte that it reads; `pread` reads \
                        the same bytes from the same files, unchecked.",
                benchmark: Benchmark::Payload(payload::Args {
                    batches: 300,
                    others: self.beside(&["redis"]),
                    ..typed(&[])
                }),
            },
            Section {
                title: "Decoding with one key per block",
                about: "The mean of a block's keys costs what a landmark key costs, and any model has it; it finds less.",
                benchmark: Benchmark::Decode(self.decode_with_one_key()),
            },
            Section {
                title: "Decoding, and the first token after a text that was read before",
                about: "The keys that a model asks for by default. A text is read once, and kept: here as a document, which is opened \
                        anew, and by llama.cpp as the state of a context, which is loaded into a new one; then a question is read. \
                        llama.cpp attends to all of the text. Beyond the length that a model was trained on its answers are worth \
                        nothing: those rows are about cost.",
                benchmark: Benchmark::Decode(decode::Args {
                    steps: 64,
                    others: PeerArgs { peer_seconds: 900.0, ..self.beside(&["llama.cpp"]) },
                    setup: self.setup(),
                    ..typed(&[])
                }),
            },
        ];
        let quick = |section: Section| Section { benchmark: section.benchmark.quick(), ..section };
        if self.quick { sections.map(quick) } else { sections }
    }

    fn decode_with_one_key(&self) -> decode::Args {
        let mut setup = self.setup();
        setup.storage.key_rule = Some(KeyRule::Mean);
        setup.storage.payload = Some(DType::Int8);
        decode::Args { steps: 48, tokens: vec![4096, 32_768, 262_144], setup, ..typed(&[]) }
    }

    fn setup(&self) -> SetupArgs {
        SetupArgs { model: self.model.clone(), ..typed(&[]) }
    }

    fn beside(&self, peers: &[&str]) -> PeerArgs {
        let peers = peers.iter().map(|peer| peer.to_string()).collect();
        PeerArgs { peers, python: self.python.into(), ..typed(&[]) }
    }

    /// What writes the captured file.
    pub(super) fn capture(&self) -> capture::Args {
        let mut capture: capture::Args = typed(&[self.captured.as_os_str()]);
        capture.setup = self.setup();
        if self.quick {
            (capture.tokens, capture.queries) = (1024, 8);
        }
        capture
    }

    /// How [`Subjects::capture`] is typed.
    pub(super) fn capture_line(&self) -> String {
        let command = format!("capture {} --model {}", file_name(self.captured), self.model.model);
        line(command, &self.capture(), &typed(&[self.captured.as_os_str()]), |args| {
            vec![flag("tokens", args.tokens), flag("queries", args.queries)]
        })
    }
}

impl Benchmark {
    /// The same with sizes so tiny that the figures mean nothing.
    fn quick(self) -> Self {
        match self {
            Benchmark::Lookup(args) => {
                let random = args.captured.is_none();
                Benchmark::Lookup(lookup::Args {
                    blocks: random.then_some(64),
                    kv_heads: random.then_some(2),
                    query_heads: random.then_some(4),
                    head_dim: random.then_some(16),
                    query_tokens: args.query_tokens.min(8),
                    lookups: 3,
                    others: args.others.quick(1.0),
                    ..args
                })
            }
            Benchmark::Payload(args) => Benchmark::Payload(payload::Args {
                blocks: 4,
                block_tokens: 4,
                head_dim: 8,
                batch: 5,
                batches: 10,
                others: args.others.quick(1.0),
                ..args
            }),
            Benchmark::Decode(args) => Benchmark::Decode(decode::Args {
                tokens: vec![128, 512],
                full_tokens: 256,
                steps: 2,
                prefill_tokens: 128,
                others: args.others.quick(5.0),
                ..args
            }),
        }
    }

    /// Whether it reads the captured file.
    pub(super) fn reads_captured(&self) -> bool {
        matches!(self, Benchmark::Lookup(args) if args.captured.is_some())
    }

    /// How it is typed, in the folder of the captured file and where the peers are installed for `python3`.
    pub(super) fn line(&self) -> String {
        match self {
            Benchmark::Lookup(args) => line(
                match &args.captured {
                    Some(file) => format!("bench lookup --captured {}", file_name(file)),
                    None => format!("bench lookup --shape {}", args.shape),
                },
                args,
                &typed(&[]),
                lookup_flags,
            ),
            Benchmark::Payload(args) => line("bench payload".into(), args, &typed(&[]), payload_flags),
            Benchmark::Decode(args) => {
                line(format!("bench decode --model {}", args.setup.model.model), args, &typed(&[]), decode_flags)
            }
        }
    }
}

impl PeerArgs {
    fn quick(self, peer_seconds: f64) -> Self {
        if self.peers.is_empty() { self } else { PeerArgs { peer_seconds, ..self } }
    }
}

/// A command line: what it begins with, then the flags that say something else than `untyped` does.
fn line<A>(command: String, args: &A, untyped: &A, flags: fn(&A) -> Vec<String>) -> String {
    let said = flags(args).into_iter().zip(flags(untyped)).filter(|(flag, untyped)| flag != untyped);
    let words = ["landmarkdb".into(), command].into_iter().chain(said.map(|(flag, _)| flag));
    words.collect::<Vec<_>>().join(" ")
}

fn lookup_flags(args: &lookup::Args) -> Vec<String> {
    let [peers, peer_seconds] = peer_flags(&args.others);
    vec![
        maybe("blocks", args.blocks),
        maybe("kv-heads", args.kv_heads),
        maybe("query-heads", args.query_heads),
        maybe("head-dim", args.head_dim),
        flag("query-tokens", args.query_tokens),
        list("keys", &args.keys),
        list("engines", &args.engines),
        if args.attend { "--attend".into() } else { String::new() },
        list("ways", &args.ways),
        peers,
        peer_seconds,
        flag("lookups", args.lookups),
    ]
}

fn payload_flags(args: &payload::Args) -> Vec<String> {
    let [peers, peer_seconds] = peer_flags(&args.others);
    vec![
        peers,
        peer_seconds,
        flag("batches", args.batches),
        flag("blocks", args.blocks),
        flag("block-tokens", args.block_tokens),
        flag("head-dim", args.head_dim),
        flag("batch", args.batch),
    ]
}

fn decode_flags(args: &decode::Args) -> Vec<String> {
    let [peers, peer_seconds] = peer_flags(&args.others);
    vec![
        flag("steps", args.steps),
        list("tokens", &args.tokens),
        flag("full-tokens", args.full_tokens),
        flag("prefill-tokens", args.prefill_tokens),
        maybe("key-rule", args.setup.storage.key_rule),
        maybe("payload", args.setup.storage.payload),
        peers,
        peer_seconds,
    ]
}

/// Without `--python`, which names a folder of this machine.
fn peer_flags(others: &PeerArgs) -> [String; 2] {
    [list("peers", &others.peers), flag("peer-seconds", others.peer_seconds)]
}

fn flag(name: &str, value: impl Display) -> String {
    format!("--{name} {value}")
}

/// Empty if there is no value, as for a list without values.
fn maybe(name: &str, value: Option<impl Display>) -> String {
    value.map(|value| flag(name, value)).unwrap_or_default()
}

fn list(name: &str, values: &[impl Display]) -> String {
    let values: Vec<String> = values.iter().map(|value| value.to_string()).collect();
    maybe(name, (!values.is_empty()).then(|| values.join(",")))
}

/// The page says nothing of this machine's folders.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
