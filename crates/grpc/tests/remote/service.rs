//! A running service on a free port, a socket, or both, in threads of its own.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use landmarkdb::BlockMemory;
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::{ListenOptions, Listeners, ServeError, ServeOptions, serve};
use landmarkdb_grpc::wire::v1::block_memory_client::BlockMemoryClient;
use tokio::sync::oneshot;
use tonic::transport::Channel;

pub(crate) struct Service {
    /// `http://127.0.0.1:port`
    pub(crate) target: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Service {
    pub(crate) fn start(memory: &Arc<impl BlockMemory + 'static>) -> Self {
        Service::start_with(memory, None, ServeOptions::default())
    }

    /// Listens on a free TCP port and, if given, on a socket.
    pub(crate) fn start_with(
        memory: &Arc<impl BlockMemory + 'static>,
        unix: Option<&Path>,
        options: ServeOptions,
    ) -> Self {
        let memory = memory.clone();
        let listen =
            ListenOptions { tcp: Some(([127, 0, 0, 1], 0).into()), unix: unix.map(Into::into), allow_remote: false };
        let (stop, stopped) = oneshot::channel();
        let (bound, address) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let served = runtime.block_on(async move {
                let listeners = Listeners::bind(&listen).await.unwrap();
                bound.send(listeners.tcp_address().unwrap()).unwrap();
                serve(memory, listeners, options, async {
                    let _ = stopped.await;
                })
                .await
            });
            runtime.shutdown_timeout(Duration::from_secs(1));
            served
        });
        Service { target: format!("http://{}", address.recv().unwrap()), stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn connect(&self) -> RemoteMemory {
        RemoteMemory::connect(&self.target, ClientOptions::default()).unwrap()
    }

    pub(crate) fn connect_with(&self, options: ClientOptions) -> RemoteMemory {
        RemoteMemory::connect(&self.target, options).unwrap()
    }

    /// The generated client, which sends whatever it is given.
    pub(crate) async fn raw(&self) -> BlockMemoryClient<Channel> {
        BlockMemoryClient::connect(self.target.clone()).await.unwrap().max_encoding_message_size(usize::MAX)
    }

    /// Asks the service to stop, and returns at once.
    pub(crate) fn ask_to_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Asks the service to stop, and waits for it.
    pub(crate) fn stop(&mut self) {
        self.ask_to_stop();
        self.join();
    }

    /// Waits for the end after `ask_to_stop`.
    pub(crate) fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().unwrap().unwrap();
        }
    }
}

/// Options under which nothing takes long.
pub(crate) fn hasty() -> ClientOptions {
    ClientOptions { attempts: 3, backoff: Duration::from_millis(5), ..ClientOptions::default() }
}
