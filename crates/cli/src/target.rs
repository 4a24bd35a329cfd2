//! Where a command works.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where a command works.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    /// A data directory, opened in this process.
    Data(PathBuf),
    /// A running service: `http://host:port` or `unix:/path`.
    Connect(String),
}

impl Target {
    /// The same wherever a command is typed.
    pub(super) fn absolute(&self) -> Target {
        match self {
            Target::Data(path) => Target::Data(path.canonicalize().unwrap_or_else(|_| path.clone())),
            Target::Connect(target) => Target::Connect(target.clone()),
        }
    }
}

impl std::fmt::Display for Target {
    /// As it is typed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Data(path) => write!(f, "--data {}", path.display()),
            Target::Connect(target) => write!(f, "--connect {target}"),
        }
    }
}
