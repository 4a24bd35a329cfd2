//! Runs both services on every listener until told to stop.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::admin::AdminService;
use super::data::DataService;
use super::listen::Listeners;
use super::work::Work;
use crate::api::BlockMemory;
use crate::limits;
use crate::wire::v1;
use crate::wire::v1::admin_server::AdminServer;
use crate::wire::v1::block_memory_server::BlockMemoryServer;

/// One attend reply of a long prefill chunk fits a stream's window, so that it is sent without waiting for the
/// reader; a connection holds a few of them.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// A block of megabytes in frames of the default 16 KiB is hundreds of headers.
const FRAME_BYTES: u32 = 1 << 20;

/// Admin requests carry a name and a shape; nothing larger has to be buffered for them.
const ADMIN_MESSAGE_BYTES_MAX: usize = 1 << 20;

/// How the service uses its machine.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Calls that work on the memory at once; others wait in line, within their deadline.
    pub workers: usize,
    /// Largest message that is accepted, refused before it is read; at most `limits::MESSAGE_BYTES_MAX`.
    pub message_bytes_max: usize,
    /// How long calls in flight may go on after the shutdown signal.
    pub grace: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        // Lookups are bound by the processor, appends and fetches by the disk: twice the cores keeps both busy.
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        ServeOptions {
            workers: (2 * cores).max(4),
            message_bytes_max: limits::MESSAGE_BYTES_MAX,
            grace: Duration::from_secs(30),
        }
    }
}

/// Why the service stopped before it was told to, or could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the transport failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("the descriptors cannot be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("a listener panicked: {0}")]
    Listener(#[from] tokio::task::JoinError),
}

/// Serves `memory` on `listeners` until `shutdown` completes. Then takes no more calls, finishes those in flight within
/// `options.grace`, ends long streams after the message they are at, and returns.
pub async fn serve(
    memory: Arc<dyn BlockMemory>,
    listeners: Listeners,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (stop, stopped) = watch::channel(false);
    let work = Work::new(memory, options.workers, stopped.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<BlockMemoryServer<DataService>>().await;
    health.set_serving::<AdminServer<AdminService>>().await;

    let message_bytes_max = options.message_bytes_max.min(limits::MESSAGE_BYTES_MAX);
    let data = BlockMemoryServer::new(DataService::new(work.clone()))
        .max_decoding_message_size(message_bytes_max)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
    let admin = AdminServer::new(AdminService::new(work.clone()))
        .max_decoding_message_size(ADMIN_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let routes = Routes::new(data).add_service(admin).add_service(health_service).add_service(reflection);

    let mut servers = spawn(listeners, &routes, &stopped);
    tokio::select! {
        () = shutdown => {}
        // Listeners end only when stopped, so this one failed.
        Some(ended) = servers.join_next() => ended??,
    }
    health.set_not_serving::<BlockMemoryServer<DataService>>().await;
    health.set_not_serving::<AdminServer<AdminService>>().await;
    stop.send_replace(true);
    let drained = tokio::time::timeout(options.grace, async {
        while let Some(ended) = servers.join_next().await {
            ended??;
        }
        // Work whose caller gave up has no connection any more, and is finished all the same.
        work.finished().await;
        Ok(())
    });
    drained.await.unwrap_or_else(|_| {
        tracing::warn!(grace_ms = options.grace.as_millis() as u64, "stopped with calls still in flight");
        Ok(())
    })
}

/// One server per listener; all share the services.
fn spawn(
    listeners: Listeners,
    routes: &Routes,
    stopped: &watch::Receiver<bool>,
) -> JoinSet<Result<(), tonic::transport::Error>> {
    let server = || {
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .add_routes(routes.clone())
    };
    let signal = || {
        let mut stopped = stopped.clone();
        async move {
            // An error means that the sender is gone, which is a reason to stop too.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    };
    let mut servers = JoinSet::new();
    if let Some(tcp) = listeners.tcp {
        if let Ok(address) = tcp.local_addr() {
            tracing::info!(%address, "listening");
        }
        let incoming = TcpIncoming::from(tcp).with_nodelay(Some(true));
        servers.spawn(server().serve_with_incoming_shutdown(incoming, signal()));
    }
    if let Some((unix, file)) = listeners.unix {
        tracing::info!(?file, "listening");
        let server = server().serve_with_incoming_shutdown(UnixListenerStream::new(unix), signal());
        servers.spawn(async move {
            let _removed_at_the_end = file;
            server.await
        });
    }
    servers
}
