//! Where the service can be reached: a TCP address, a Unix socket, or both.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener, UnixSocket};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// Files that the store, the catalog and the program itself may have open.
const STORE_FILES: u64 = 448;

/// With fewer files that may be open a service does not start: the runtime and its first connections take as many.
pub const OPEN_FILES_MIN: u64 = 64;

/// Connections that are let in however few files may be open.
const CONNECTIONS_MIN: usize = 16;

/// What to bind.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Port 0 takes any free one: see [`Listeners::tcp_address`].
    pub tcp: Option<SocketAddr>,
    /// A socket file that only this user may open. One that a killed process left behind is replaced.
    pub unix: Option<PathBuf>,
    /// Allows TCP addresses that other machines can reach. The service has neither passwords nor encryption: a network that
    /// can reach it can read and delete everything.
    pub allow_remote: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        ListenOptions { tcp: Some(SocketAddr::from(([127, 0, 0, 1], 7601))), unix: None, allow_remote: false }
    }
}

/// Why nothing can be served there.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The options name neither a TCP address nor a Unix socket.
    #[error("nowhere to listen: give a TCP address, a Unix socket, or both")]
    Nowhere,
    /// The address can be reached from other machines, and [`ListenOptions::allow_remote`] is false.
    #[error(
        "{address} can be reached from other machines and the service has no passwords: allow it explicitly, or listen on 127.0.0.1"
    )]
    NotLoopback {
        /// The address of the options.
        address: SocketAddr,
    },
    /// The TCP address could not be bound.
    #[error("cannot listen on {address}: {source}")]
    Tcp {
        /// The address of the options.
        address: SocketAddr,
        /// The reason that the system gave.
        source: io::Error,
    },
    /// A process answers on the socket file, or might.
    #[error("a running process answers on {path}: connect to it, stop it, or use another path")]
    SocketInUse {
        /// Path of the socket file.
        path: PathBuf,
    },
    /// A file that is no socket lies where the socket is to be. It is left as it is.
    #[error("{path} exists and is not a socket: use another path")]
    NotASocket {
        /// Path of the file.
        path: PathBuf,
    },
    /// The socket file could not be looked at, replaced or bound.
    #[error("cannot listen on {path}: {source}")]
    Unix {
        /// Path of the socket file.
        path: PathBuf,
        /// The reason that the system gave.
        source: io::Error,
    },
}

/// Bound, and from now on queueing connections for [`serve`](super::serve).
#[derive(Debug)]
pub struct Listeners {
    pub(super) tcp: Option<TcpListener>,
    pub(super) unix: Option<(UnixListener, SocketFile)>,
}

/// A socket file that is removed with its owner.
#[derive(Debug)]
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Gone already or in a read-only folder: the next process replaces it.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listeners {
    /// Binds everything that `options` ask for, or nothing. Runs inside a tokio runtime.
    pub async fn bind(options: &ListenOptions) -> Result<Self, ListenError> {
        if options.tcp.is_none() && options.unix.is_none() {
            return Err(ListenError::Nowhere);
        }
        let tcp = match options.tcp {
            None => None,
            Some(address) if !address.ip().is_loopback() && !options.allow_remote => {
                return Err(ListenError::NotLoopback { address });
            }
            Some(address) => {
                Some(TcpListener::bind(address).await.map_err(|source| ListenError::Tcp { address, source })?)
            }
        };
        let unix = options.unix.as_deref().map(bind_unix).transpose()?;
        Ok(Listeners { tcp, unix })
    }

    /// The TCP address, with the port that was taken.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok())
    }
}

fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let failed = |source| ListenError::Unix { path: path.into(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(ListenError::NotASocket { path: path.into() }),
        Ok(_) => match UnixStream::connect(path) {
            // Nothing listens: its process was killed before it could remove the file.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            // A process listens, or might.
            _ => return Err(ListenError::SocketInUse { path: path.into() }),
        },
    }
    let socket = UnixSocket::new_stream().map_err(failed)?;
    // The file gets the mode that the socket has when it is bound, and is open to others at no time.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|error| failed(error.into()))?;
    socket.bind(path).map_err(failed)?;
    let file = SocketFile(path.into());
    let listener = socket.listen(BACKLOG).map_err(failed)?;
    Ok((listener, file))
}

/// Lets the process open as many files as it may, and says how many those are. For the start of a service.
pub fn raise_open_files() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    // Where that is refused, less was to be had.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current
}

/// Connections that leave the store enough files to open.
pub(super) fn connections_max() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files.saturating_sub(STORE_FILES)).unwrap_or(usize::MAX).max(CONNECTIONS_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> ListenOptions {
        ListenOptions { tcp: None, unix: Some(path.into()), allow_remote: false }
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        // As a killed process leaves it: the standard library does not remove the file.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());

        let live = Listeners::bind(&unix(&path)).await.unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600, "nobody changes it after it was bound");
        let refused = Listeners::bind(&unix(&path)).await;
        assert!(matches!(refused, Err(ListenError::SocketInUse { .. })), "{refused:?}");
        drop(live);
        assert!(!path.exists(), "a socket goes with its listener");

        std::fs::write(&path, "precious").unwrap();
        let refused = Listeners::bind(&unix(&path)).await;
        assert!(matches!(refused, Err(ListenError::NotASocket { .. })), "{refused:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn other_machines_are_let_in_only_explicitly() {
        let everywhere = ListenOptions { tcp: Some(([0, 0, 0, 0], 0).into()), unix: None, allow_remote: false };
        let refused = Listeners::bind(&everywhere).await;
        assert!(matches!(refused, Err(ListenError::NotLoopback { .. })), "{refused:?}");
        assert!(Listeners::bind(&ListenOptions { allow_remote: true, ..everywhere }).await.is_ok());
        let nowhere = ListenOptions { tcp: None, ..ListenOptions::default() };
        assert!(matches!(Listeners::bind(&nowhere).await, Err(ListenError::Nowhere)));
    }
}
