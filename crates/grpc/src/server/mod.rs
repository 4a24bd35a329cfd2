//! The memory as a network service: who listens, who works, how it stops.
//!
//! ```text
//! listen    TCP and Unix sockets, bound before anything is promised
//! options   how it uses its machine, and how patient it is
//! phase     where it is between its start and its end
//! serve     health, reflection, both services on every listener; graceful shutdown
//! connection the requests of one connection, and which connections make room for others
//! peer      who is at the other end: what it may leave undone, and for how long
//! arriving  messages on their way in: counted before they are decoded
//! leaving   replies on their way out: in parts, as they are read
//! call      who waits for an answer, and what do they hold
//! data      BlockMemory: append, lookup, attend, fetch
//! multiplex streams that answer many lookups or attends over one call
//! admin     Admin: what exists, delete, verify
//! replies   streams of replies that end with their error
//! work      the one place where calls meet the memory: bounded, off the network threads, within their deadline
//! ```
//!
//! Not here: what any call means (`api`), what bytes mean (`wire`), what code an error has (`wire::to_status`).

mod admin;
mod arriving;
mod call;
mod connection;
mod data;
mod leaving;
mod listen;
mod multiplex;
mod options;
mod peer;
mod phase;
mod replies;
mod serve;
mod work;

pub use listen::{ListenError, ListenOptions, Listeners, OPEN_FILES_MIN, raise_open_files};
pub use options::ServeOptions;
pub use serve::{ServeError, serve};
pub use work::WORKERS_MAX;
