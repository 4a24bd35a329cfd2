//! Landmark keys within a budget: what a process holds while documents are appended and looked up, and what a lookup takes whose
//! keys are at hand, come back after others took their room, or are read in passing.
//!
//! `cargo bench --bench keys -- --documents 200 --tokens 32768 --append-tokens 10000000 --keys-mib 128`; `cargo test` runs it once
//! with tiny parameters. Values are random by seed. The shape is small (2 layers, 1 KV head of 64, int8 token keys: 152 bytes of
//! keys per token), so that ten million tokens fit a small disk; times for other shapes go with the bytes of keys. The last lines
//! read a file of as many bytes, from the page cache: what keys in a derived file would cost at least.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use landmarkdb::limits;
use landmarkdb::{
    AppendRequest, BlockMemory, BlockRange, BlockScore, BlockText, CollectionId, CollectionSpec, DType, DocumentId,
    Granularity, KeyRule, LocalMemory, LookupRequest, ModelShape, NewBlock, Rope, Sha256Digest, Tensor,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LAYERS: u32 = 2;
const HEAD_DIM: u32 = 64;
const QUERY_HEADS: u32 = 4;
const BLOCK_TOKENS: u32 = 64;

/// Blocks whose values differ; the following repeat them.
const DISTINCT_BLOCKS: usize = 64;

/// Lookups of one document whose keys are at hand.
const AT_HAND: usize = 100;

type Error = Box<dyn std::error::Error>;

struct Parameters {
    /// That are looked up.
    documents: usize,
    /// Of each document.
    tokens: u32,
    /// Of all documents, of which those that are looked up are the first.
    append_tokens: u64,
    keys_mib: u64,
    seed: u64,
}

impl Parameters {
    /// `cargo test` says `--test`, or nothing where it runs benches of its own harness; `cargo bench` says `--bench`.
    fn read() -> Result<Parameters, Error> {
        let mut given = std::env::args().skip(1).peekable();
        let is_bench = std::env::args().any(|argument| argument == "--bench" || argument == "--documents");
        let mut parameters = match is_bench {
            true => Parameters { documents: 200, tokens: 32_768, append_tokens: 10_000_000, keys_mib: 128, seed: 1 },
            false => Parameters { documents: 12, tokens: 1024, append_tokens: 20_000, keys_mib: 1, seed: 1 },
        };
        while let Some(name) = given.next() {
            let mut value = || given.next().ok_or(format!("{name} needs a value"));
            match name.as_str() {
                "--documents" => parameters.documents = value()?.parse()?,
                "--tokens" => parameters.tokens = value()?.parse()?,
                "--append-tokens" => parameters.append_tokens = value()?.parse()?,
                "--keys-mib" => parameters.keys_mib = value()?.parse()?,
                "--seed" => parameters.seed = value()?.parse()?,
                _ => {}
            }
        }
        Ok(parameters)
    }
}

fn spec() -> CollectionSpec {
    CollectionSpec {
        name: "keys".into(),
        shape: ModelShape {
            layers: LAYERS,
            query_heads: QUERY_HEADS,
            kv_heads: 1,
            head_dim: HEAD_DIM,
            block_tokens: BLOCK_TOKENS,
            rope: Rope::from_base(10_000.0, HEAD_DIM as usize),
            unrotated_layers: Vec::new(),
            softmax_scale: (HEAD_DIM as f32).powf(-0.5),
        },
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::Int8,
        key_dtype: DType::Int8,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "none".into(),
    }
}

/// MiB of memory that the process has now.
fn rss_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    let kib: f64 = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0.0);
    kib / 1024.0
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// Milliseconds: median and 99 of 100.
fn median(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |share: usize| times.get((times.len() * share / 100).min(times.len().max(1) - 1));
    let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
    format!("p50 {:8.3} ms, p99 {:8.3} ms ({} lookups)", ms(at(50)), ms(at(99)), times.len())
}

/// Appends documents until they have all tokens, and tells the memory that it takes.
fn append_all(memory: &LocalMemory, collection: CollectionId, run: &Parameters) -> Result<Vec<DocumentId>, Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(run.seed);
    let shape = vec![LAYERS, 1, BLOCK_TOKENS, HEAD_DIM];
    let count = shape.iter().product::<u32>() as usize;
    let mut tensor = || {
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor { dtype: DType::F32, shape: shape.clone(), data: Bytes::from(bytemuck::cast_slice(&values).to_vec()) }
    };
    let pool: Vec<(Tensor, Tensor)> = (0..DISTINCT_BLOCKS).map(|_| (tensor(), tensor())).collect();
    let blocks = run.tokens / BLOCK_TOKENS;
    let (mut documents, mut appended, mut told) = (Vec::new(), 0, 0);
    let begin = Instant::now();
    while appended < run.append_tokens || documents.len() < run.documents {
        let document = memory.open_document(collection, &format!("d{:05}", documents.len()))?.id;
        for first in (0..blocks).step_by(256) {
            let block = |index: u32| {
                let (k, v) = pool[(index as usize * 7 + documents.len()) % DISTINCT_BLOCKS].clone();
                let text = BlockText { start: 0, bytes: Vec::new(), offsets: vec![0; BLOCK_TOKENS as usize] };
                NewBlock { index, token_ids: (0..BLOCK_TOKENS).collect(), text, k, v }
            };
            let blocks = (first..blocks.min(first + 256)).map(block).collect();
            memory.append(AppendRequest { document, blocks, expected_tokens: Some((first * BLOCK_TOKENS) as u64) })?;
        }
        documents.push(document);
        appended += run.tokens as u64;
        if appended * 10 / run.append_tokens.max(1) > told {
            told = appended * 10 / run.append_tokens.max(1);
            let seconds = begin.elapsed().as_secs_f64();
            println!(
                "appended {appended:9} tokens in {seconds:6.1} s: RSS {:7.1} MiB, keys held {:.1} MiB",
                rss_mib(),
                held(memory)?
            );
        }
    }
    Ok(documents)
}

/// MiB of keys.
fn held(memory: &LocalMemory) -> Result<f64, Error> {
    Ok(mib(memory.stats()?.index_bytes))
}

/// One lookup of a layer, over whole documents.
fn lookup(
    memory: &LocalMemory,
    collection: CollectionId,
    run: &Parameters,
    documents: &[DocumentId],
    layer: u32,
) -> Result<Duration, Error> {
    let row_len = QUERY_HEADS * HEAD_DIM;
    let blocks = run.tokens / BLOCK_TOKENS;
    let request = LookupRequest {
        collection,
        layer,
        queries: (0..row_len).map(|i| ((i as u64 + run.seed) as f32).sin()).collect(),
        distances: vec![0],
        scope: documents.iter().map(|&document| BlockRange { document, blocks: 0..blocks }).collect(),
        top_k: 4,
        block_score: BlockScore::LogSumExp,
        granularity: Granularity::TokenHead,
    };
    let begin = Instant::now();
    memory.lookup(&request)?;
    Ok(begin.elapsed())
}

/// Looks at each document once, then again and again at one, then once more at each.
fn measure(
    dir: &Path,
    collection: CollectionId,
    run: &Parameters,
    keys_bytes: u64,
    documents: &[DocumentId],
) -> Result<(), Error> {
    let memory = LocalMemory::open(dir)?.with_keys(keys_bytes);
    let before = rss_mib();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let (mut rss, mut most_held) = (before, 0f64);
    for document in documents {
        first.push(lookup(&memory, collection, run, &[*document], 0)?);
        second.push(lookup(&memory, collection, run, &[*document], 1)?);
        rss = rss.max(rss_mib());
        most_held = most_held.max(held(&memory)?);
    }
    println!(
        "budget {:8.1} MiB: RSS {before:.1} MiB before, {rss:.1} MiB at most; keys held {most_held:.1} MiB at most",
        mib(keys_bytes)
    );
    if most_held > mib(keys_bytes) {
        return Err(format!("expected at most {:.1} MiB of keys, found {most_held:.1}", mib(keys_bytes)).into());
    }
    println!("  first lookup of a document   {}", median(first));
    println!("  its next layer               {}", median(second));
    let last = documents.last().ok_or("no documents")?;
    let at_hand = (0..AT_HAND).map(|i| lookup(&memory, collection, run, &[*last], i as u32 % LAYERS));
    println!("  at hand                      {}", median(at_hand.collect::<Result<_, _>>()?));
    let again = documents.iter().map(|document| lookup(&memory, collection, run, &[*document], 0));
    println!("  each document again          {}", median(again.collect::<Result<_, _>>()?));
    let all = &documents[..documents.len().min(limits::SCOPE_DOCUMENTS_MAX)];
    let together = (0..3).map(|i| lookup(&memory, collection, run, all, i % LAYERS));
    println!("  all documents in one lookup  {}", median(together.collect::<Result<_, _>>()?));
    let stats = memory.stats()?;
    println!("  RSS {:.1} MiB; {} loads, {} evictions", rss_mib(), stats.index_loads, stats.index_evictions);
    Ok(())
}

/// Reads a file of as many bytes as one document's keys, from the page cache.
fn derived_file(dir: &Path, bytes: u64) -> Result<(), Error> {
    let path = dir.join("derived");
    fs::write(&path, vec![1u8; bytes as usize])?;
    let mut buffer = vec![0; bytes as usize];
    let read = (0..20).map(|_| {
        let begin = Instant::now();
        std::io::Read::read_exact(&mut fs::File::open(&path)?, &mut buffer)?;
        Ok(begin.elapsed())
    });
    println!("a file of {:.1} MiB, read      {}", mib(bytes), median(read.collect::<Result<_, Error>>()?));
    Ok(())
}

fn main() -> Result<(), Error> {
    let run = Parameters::read()?;
    println!(
        "{} documents of {} tokens looked up, {} tokens appended, {} MiB for keys, seed {}; L {LAYERS}, Hkv 1, D {HEAD_DIM}, B {BLOCK_TOKENS}, int8",
        run.documents, run.tokens, run.append_tokens, run.keys_mib, run.seed
    );
    let dir = tempfile::tempdir()?;
    let (collection, documents) = {
        let memory = LocalMemory::open(dir.path())?.with_keys(run.keys_mib << 20);
        let collection = memory.open_collection(&spec())?.id;
        println!("RSS {:.1} MiB at the start", rss_mib());
        (collection, append_all(&memory, collection, &run)?)
    };
    let documents = &documents[..run.documents];
    let document_bytes = {
        let memory = LocalMemory::open(dir.path())?.with_keys(u64::MAX / 2);
        lookup(&memory, collection, &run, &documents[..1], 0)?;
        memory.stats()?.index_bytes
    };
    println!(
        "keys of one document: {:.1} MiB, of all {:.1} MiB",
        mib(document_bytes),
        mib(document_bytes * run.documents as u64)
    );
    measure(dir.path(), collection, &run, run.keys_mib << 20, documents)?;
    // All keys, then room for less than one document: each layer is read in passing.
    measure(dir.path(), collection, &run, document_bytes * run.documents as u64 * 2, documents)?;
    measure(dir.path(), collection, &run, document_bytes / 2, &documents[..run.documents.min(20)])?;
    derived_file(dir.path(), document_bytes)
}
