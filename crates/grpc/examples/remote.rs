//! A memory behind a service: `cargo run --example remote`.
//!
//! Serves a memory on a free port of this machine, connects to it, and makes the calls of `examples/embedded.rs`.

use std::sync::Arc;

use landmarkdb::LocalMemory;
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::{ListenOptions, Listeners, ServeOptions, serve};

#[allow(dead_code, reason = "its own main")]
#[path = "../../../examples/embedded.rs"]
mod embedded;

fn main() -> embedded::Result<()> {
    let folder = tempfile::tempdir()?;
    let memory = Arc::new(LocalMemory::open(folder.path())?);

    // The service runs on the threads of this runtime until `stop` is dropped.
    let runtime = tokio::runtime::Runtime::new()?;
    let any_port = ListenOptions { tcp: Some(([127, 0, 0, 1], 0).into()), ..ListenOptions::default() };
    let listeners = runtime.block_on(Listeners::bind(&any_port))?;
    let address = listeners.tcp_address().ok_or("no TCP address")?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = runtime.spawn(serve(memory, listeners, ServeOptions::default(), async {
        let _ = stopped.await;
    }));

    // Calls of the client block: make them on threads of your own, outside of any runtime.
    let remote = RemoteMemory::connect(&format!("http://{address}"), ClientOptions::default())?;
    println!("connected  to {}", remote.target());
    embedded::tour(&remote)?;

    drop((remote, stop));
    runtime.block_on(serving)??;
    Ok(())
}

#[test]
fn runs() -> embedded::Result<()> {
    main()
}
