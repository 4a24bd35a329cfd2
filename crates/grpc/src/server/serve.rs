//! Runs both services on every listener until told to stop.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::admin::AdminService;
use super::connection::Shared;
use super::data::DataService;
use super::listen::{self, Listeners};
use super::options::ServeOptions;
use super::phase::Phase;
use super::work::Work;
use crate::wire::v1;
use crate::wire::v1::admin_server::AdminServer;
use crate::wire::v1::block_memory_server::BlockMemoryServer;
use landmarkdb::budget::Budget;
use landmarkdb::limits;
use landmarkdb::{BlockMemory, Health};

/// How long accepting rests after it failed: where descriptors have run out, it fails at once and again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often the memory is asked how it is.
const HEALTH_PERIOD: Duration = Duration::from_millis(500);

/// How long cancelled work may take to notice.
const LAST_STEP: Duration = Duration::from_secs(2);

/// The name in health checks for what writes; reads are the services'.
const WRITES: &str = "landmark.v1.BlockMemory.Append";

/// Why the service stopped before it was told to, or could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The descriptors of the services cannot be decoded, so that reflection has nothing to offer.
    #[error("the descriptors cannot be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A task that accepts connections or follows the memory's health panicked.
    #[error("a listener panicked: {0}")]
    Listener(#[from] tokio::task::JoinError),
}

/// Serves `memory` on `listeners` until `shutdown` completes. Then takes no more calls, finishes those in flight within
/// `options.grace`, ends long streams after the message they are at, tells work that is left to end, and returns.
pub async fn serve(
    memory: Arc<dyn BlockMemory>,
    listeners: Listeners,
    mut options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    options.connections = options.connections.min(listen::connections_max());
    let grace = options.grace;
    let (phase, phases) = watch::channel(Phase::Serving);
    let messages = Budget::new(options.message_bytes);
    let work = Work::new(memory.clone(), options.workers, messages.clone(), phases.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    // A memory that is open to be read only is no news.
    let begins = memory.health();
    announce(&health, Some(&begins)).await;
    let following = tokio::spawn(follow(memory, begins, health.clone(), phases.clone()));

    let data = BlockMemoryServer::new(DataService::new(work.clone()))
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
    let admin = AdminServer::new(AdminService::new(work.clone()))
        .max_decoding_message_size(limits::TUNE_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let routes = Routes::new(data).add_service(admin).add_service(health_service).add_service(reflection).prepare();

    let shared = Shared::new(routes, messages, options, phases);
    let (alive, mut all_gone) = mpsc::channel(1);
    let mut accepting = accept_all(listeners, &shared, alive);
    tokio::select! {
        () = shutdown => {}
        // Listeners end only when stopped, so this one failed.
        Some(ended) = accepting.join_next() => ended?,
    }
    phase.send_replace(Phase::Draining);
    following.await?;
    announce(&health, None).await;
    let drained = tokio::time::timeout(grace, async {
        accepting.join_all().await;
        // Ends with the last connection, none of which sends anything here.
        let _ = all_gone.recv().await;
        // Work whose caller gave up has no connection any more, and ends all the same.
        work.finished().await;
    });
    if drained.await.is_err() {
        tracing::warn!(grace_ms = grace.as_millis() as u64, "stopped with calls still in flight");
    }
    phase.send_replace(Phase::Over);
    work.give_up();
    // What does not notice in time ends with the process.
    let _ = tokio::time::timeout(LAST_STEP, work.finished()).await;
    Ok(())
}

/// Tells in health checks how the memory is; `told` is what they say already.
async fn follow(
    memory: Arc<dyn BlockMemory>,
    mut told: Health,
    health: HealthReporter,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        let memory = memory.clone();
        // A panic in there is the memory's, and its calls tell of it.
        let now = tokio::task::spawn_blocking(move || memory.health()).await.unwrap_or_default();
        if told != now {
            match &now {
                Health::Serving => tracing::info!("the memory serves again"),
                Health::ReadOnly { reason } => tracing::error!(%reason, "the memory refuses writes"),
                Health::Failed { reason } => tracing::error!(%reason, "the memory has failed"),
                other => tracing::error!(health = ?other, "the memory is in a state that counts as failed"),
            }
            announce(&health, Some(&now)).await;
            told = now;
        }
        tokio::select! {
            _ = phase.changed() => return,
            () = tokio::time::sleep(HEALTH_PERIOD) => {}
        }
    }
}

/// `None`: it stops.
async fn announce(health: &HealthReporter, memory: Option<&Health>) {
    let of = |serves| if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
    let reads = of(matches!(memory, Some(Health::Serving | Health::ReadOnly { .. })));
    for name in ["", BlockMemoryServer::<DataService>::NAME, AdminServer::<AdminService>::NAME] {
        health.set_service_status(name, reads).await;
    }
    health.set_service_status(WRITES, of(matches!(memory, Some(Health::Serving)))).await;
}

/// One task per listener, each holding `alive`, as their connections do.
fn accept_all(listeners: Listeners, shared: &Arc<Shared>, alive: mpsc::Sender<()>) -> JoinSet<()> {
    let mut accepting = JoinSet::new();
    if let Some(tcp) = listeners.tcp {
        if let Ok(address) = tcp.local_addr() {
            tracing::info!(%address, "listening");
        }
        let incoming = TcpIncoming::from(tcp).with_nodelay(Some(true)).with_keepalive(Some(shared.options.keepalive));
        accepting.spawn(accept(incoming, shared.clone(), alive.clone()));
    }
    if let Some((unix, file)) = listeners.unix {
        tracing::info!(?file, "listening");
        let accept = accept(UnixListenerStream::new(unix), shared.clone(), alive);
        accepting.spawn(async move {
            let _removed_at_the_end = file;
            accept.await;
        });
    }
    accepting
}

async fn accept<S>(incoming: impl Stream<Item = io::Result<S>>, shared: Arc<Shared>, alive: mpsc::Sender<()>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut incoming = pin!(incoming);
    let mut phase = shared.phase.clone();
    let mut fails = false;
    loop {
        let next = tokio::select! {
            biased;
            _ = phase.changed() => return,
            next = incoming.next() => next,
        };
        match next {
            Some(Ok(socket)) => {
                fails = false;
                shared.admit(socket, alive.clone());
            }
            Some(Err(error)) => {
                // Once is enough to act on.
                if !std::mem::replace(&mut fails, true) {
                    tracing::warn!(%error, "no connection can be accepted now");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None => return,
        }
    }
}
