//! Which other programs are measured beside ours.

use landmarkdb_lab::bench::PeerSettings;

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

    /// Approximate time of each peer for building or reading a text, and for measuring.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    pub(super) peer_seconds: f64,
}

impl PeerArgs {
    pub(super) fn settings(&self) -> PeerSettings {
        PeerSettings { peers: self.peers.clone(), python: self.python.clone(), seconds: self.peer_seconds }
    }
}
