//! A service on this machine while something is measured through it.

use std::path::PathBuf;
use std::sync::Arc;

use super::error::BenchError;
use landmarkdb::LocalMemory;
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::{self, ListenOptions, Listeners, ServeOptions};

/// Serves `memory` on a Unix socket, or on a free port of the loopback interface, while `work` uses it.
pub(super) fn over_network<T>(
    memory: Arc<LocalMemory>,
    socket: Option<PathBuf>,
    work: impl FnOnce(&RemoteMemory) -> Result<T, BenchError>,
) -> Result<T, BenchError> {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|source| BenchError::Io { what: "starting the service's threads", source })?;
    let tcp = socket.is_none().then(|| ([127, 0, 0, 1], 0).into());
    let options = ListenOptions { tcp, unix: socket.clone(), ..ListenOptions::default() };
    let listeners = runtime.block_on(Listeners::bind(&options))?;
    let address = match &socket {
        Some(path) => format!("unix:{}", path.display()),
        None => listeners.tcp_address().map(|address| format!("http://{address}")).unwrap_or_default(),
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = runtime.spawn(server::serve(memory, listeners, ServeOptions::default(), async {
        let _ = stopped.await;
    }));
    let result = RemoteMemory::connect(&address, ClientOptions::default())
        .map_err(BenchError::from)
        .and_then(|remote| work(&remote));
    let _ = stop.send(());
    let _ = runtime.block_on(serving);
    result
}
