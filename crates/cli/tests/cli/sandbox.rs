//! A home folder for the binary, and what it answered.

#[path = "../service/mod.rs"]
#[allow(dead_code, reason = "shared with tests, which use the rest")]
mod service;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use landmarkdb::{
    AppendRequest, BlockMemory, BlockText, CollectionSpec, DType, KeyRule, LocalMemory, ModelShape, NewBlock, Rope,
    Sha256Digest, Tensor,
};

pub(crate) use service::Service;

/// The text of every document that tests write: one byte a token, 4 tokens a block, a tail of 1.
pub(crate) const TEXT: &str = "abcdefghi";

const BLOCK_TOKENS: usize = 4;
const HEAD_DIM: usize = 8;

/// Folders that no other test and no user shares.
pub(crate) struct Sandbox {
    home: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

/// What one run answered.
pub(crate) struct Answer {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    code: Option<i32>,
    typed: String,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        Sandbox { home: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    pub(crate) fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub(crate) fn make_folder(&self, name: &str) {
        std::fs::create_dir(self.path(name)).unwrap();
    }

    pub(crate) fn write_file(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_landmarkdb"));
        let home = self.home.path();
        command.args(args).current_dir(home).env_clear().stdin(Stdio::null());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", home);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Answer {
        let output = self.command(args).output().unwrap();
        Answer {
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            code: output.status.code(),
            typed: args.join(" "),
        }
    }

    /// Runs a `serve --json` until it is ready.
    #[track_caller]
    pub(crate) fn serve(&self, args: &[&str]) -> Service {
        match Service::start(self.command(args).stderr(Stdio::piped())) {
            Ok(service) => service,
            Err(said) => panic!("landmarkdb {}: {said}", args.join(" ")),
        }
    }

    /// Runs with a standard output whose reader has left already; gives the exit code.
    pub(crate) fn run_with_closed_stdout(&self, args: &[&str]) -> Option<i32> {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        self.command(args).stdout(writer).status().unwrap().code()
    }

    /// Writes a document of [`TEXT`] into a data directory and gives its id.
    pub(crate) fn write_document(&self, data: &str, collection: &str, name: &str) -> u64 {
        let memory = LocalMemory::open(&self.path(data)).unwrap();
        let collection = memory.open_collection(&spec(collection)).unwrap();
        let document = memory.open_document(collection.id, name).unwrap();
        let blocks = TEXT.as_bytes().chunks(BLOCK_TOKENS).enumerate().map(|(index, text)| block(index, text));
        memory
            .append(AppendRequest { document: document.id, blocks: blocks.collect(), expected_tokens: None })
            .unwrap();
        document.id.0
    }

    /// Flips one bit of the first block's text in the segment file.
    pub(crate) fn damage_text(&self, data: &str) {
        self.damage(data, &TEXT.as_bytes()[..BLOCK_TOKENS]);
    }

    /// Flips one bit where the segment file first holds `part`.
    pub(crate) fn damage(&self, data: &str, part: &[u8]) {
        let folder = self.path(data).join("segments");
        let path = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(part.len()).position(|window| window == part).expect("the segment holds it");
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
}

impl Answer {
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        let Answer { stdout, stderr, typed, .. } = &self;
        assert_eq!(self.code, Some(code), "landmarkdb {typed}\n--- stdout\n{stdout}\n--- stderr\n{stderr}");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {:?}", self.stdout))
    }

    /// The kind of a `--json` error.
    #[track_caller]
    pub(crate) fn error_kind(&self) -> String {
        let error: serde_json::Value =
            serde_json::from_str(&self.stderr).unwrap_or_else(|error| panic!("{error}: {:?}", self.stderr));
        error["error"]["kind"].as_str().unwrap().to_string()
    }
}

fn spec(name: &str) -> CollectionSpec {
    CollectionSpec {
        name: name.into(),
        shape: ModelShape {
            layers: 1,
            query_heads: 2,
            kv_heads: 1,
            head_dim: HEAD_DIM as u32,
            block_tokens: BLOCK_TOKENS as u32,
            rope: Rope::from_base(10_000.0, HEAD_DIM),
            unrotated_layers: Vec::new(),
            softmax_scale: 0.5,
        },
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "test model".into(),
    }
}

fn block(index: usize, text: &[u8]) -> NewBlock {
    // (L, Hkv, tokens, D)
    let shape = vec![1, 1, text.len() as u32, HEAD_DIM as u32];
    let values = vec![1.0; text.len() * HEAD_DIM];
    NewBlock {
        index: index as u32,
        token_ids: text.iter().map(|&byte| byte.into()).collect(),
        text: BlockText {
            start: (index * BLOCK_TOKENS) as u64,
            bytes: text.to_vec(),
            offsets: (0..text.len() as u32).collect(),
        },
        k: Tensor::from_f32(shape.clone(), &values),
        v: Tensor::from_f32(shape, &values),
    }
}
