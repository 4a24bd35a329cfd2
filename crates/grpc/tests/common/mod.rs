//! What several integration tests share.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;

use landmarkdb::{BlockAttention, BlockMemory, NewTokens, SequenceAttention};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::{self, ListenOptions, Listeners, ServeOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "../../../../tests/common/mod.rs"]
mod specs;

#[allow(unused_imports, reason = "each test binary uses its own part")]
pub use specs::{shape, spec};

/// Random q, k, v of a text for all layers of [`shape`].
pub struct Activations {
    pub tokens: usize,
    layers: Vec<[Vec<f32>; 3]>,
}

impl Activations {
    pub fn random(tokens: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |width: usize| (0..tokens * width).map(|_| rng.random_range(-2.0..2.0)).collect();
        Activations { tokens, layers: (0..2).map(|_| [values(32), values(16), values(16)]).collect() }
    }

    /// One layer's query `(Hq, D)` of a token.
    pub fn query(&self, layer: usize, token: usize) -> &[f32] {
        &self.layers[layer][0][token * 32..(token + 1) * 32]
    }

    /// One layer's key and value `(Hkv, D)` of a token.
    pub fn key_and_value(&self, layer: usize, token: usize) -> [&[f32]; 2] {
        let row = token * 16..(token + 1) * 16;
        [&self.layers[layer][1][row.clone()], &self.layers[layer][2][row]]
    }

    /// Feeds tokens `from..to` to a session in groups of `group` and commits each: the outputs `(L, T, Hq, D)`.
    pub fn feed(&self, session: &mut BlockAttention, from: usize, to: usize, group: usize) -> Vec<Vec<f32>> {
        let mut outs = vec![Vec::new(); 2];
        let mut begin = from;
        while begin < to {
            let end = (begin + group).min(to);
            for (layer, [q, k, v]) in self.layers.iter().enumerate() {
                let part = |x: &[f32], width: usize| x[begin * width..end * width].to_vec();
                let out = session.attend(layer, end - begin, &part(q, 32), &part(k, 16), &part(v, 16));
                outs[layer].extend(out.unwrap());
            }
            let ids: Vec<u32> = (begin as u32..end as u32).collect();
            let text: Vec<u8> = ids.iter().map(|id| b'a' + (id % 26) as u8).collect();
            let offsets: Vec<u32> = (0..ids.len() as u32).collect();
            session.commit(NewTokens { ids: &ids, text: &text, offsets: &offsets }).unwrap();
            begin = end;
        }
        outs
    }
}

/// A service on a free loopback port, stopped when dropped, and a client of it.
pub struct Served {
    pub remote: Arc<dyn BlockMemory>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    runtime: tokio::runtime::Runtime,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl Served {
    pub fn new(memory: Arc<dyn BlockMemory>) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let any_port = ListenOptions { tcp: Some(([127, 0, 0, 1], 0).into()), ..ListenOptions::default() };
        let listeners = runtime.block_on(Listeners::bind(&any_port)).unwrap();
        let address = format!("http://{}", listeners.tcp_address().unwrap());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = runtime.spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            server::serve(memory, listeners, ServeOptions::default(), shutdown).await.unwrap();
        });
        let remote = Arc::new(RemoteMemory::connect(&address, ClientOptions::default()).unwrap());
        Served { remote, stop: Some(stop), runtime, serving: Some(serving) }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        if let Some(serving) = self.serving.take() {
            let _ = self.runtime.block_on(serving);
        }
    }
}

/// The largest difference between two outputs.
pub fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let (a, b) = (a.concat(), b.concat());
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
