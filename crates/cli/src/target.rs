//! Where a command works.

use std::path::PathBuf;

/// Where a command works.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Target {
    /// A data directory, opened in this process.
    Data(PathBuf),
    /// A running service: `http://host:port` or `unix:/path`.
    Connect(String),
}
