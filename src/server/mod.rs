//! The memory as a network service: who listens, who works, how it stops.
//!
//! ```text
//! listen    TCP and Unix sockets, bound before anything is promised
//! serve     health, reflection, both services on every listener; graceful shutdown
//! data      BlockMemory: append, lookup, attend, fetch
//! pairs     the streams that answer many lookups or attends over one call
//! admin     Admin: what exists, delete, verify
//! work      the one place where calls meet the memory: bounded, off the network threads, within their deadline
//! ```
//!
//! Not here: what any call means (`api`), what bytes mean (`wire`), what code an error has (`wire::to_status`).

mod admin;
mod data;
mod listen;
mod pairs;
mod serve;
mod work;

pub use listen::{ListenError, ListenOptions, Listeners};
pub use serve::{ServeError, ServeOptions, serve};
