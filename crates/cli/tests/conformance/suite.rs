//! Which service is judged, and what may be done to it?

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::client::Client;
use crate::process::{Foreign, Own};

/// What a test does to the service besides calling it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Need {
    /// kill -9, and a start.
    Kill,
    /// A stop in good order, and a start.
    Restart,
    /// Discarding all that can be derived from the rest, while the service is stopped.
    Rebuild,
    /// Changing files under the service, while it is stopped.
    Data,
}

/// The service under test and the names that this run uses in it.
pub(crate) struct Suite {
    /// A service that runs elsewhere, if one was named.
    foreign: Option<Foreign>,
    /// Ours, for all tests that only call it.
    shared: OnceLock<Own>,
    /// Held for writing by a test that stops the foreign service.
    in_use: RwLock<()>,
    names: AtomicU64,
    run: u32,
}

/// A service that is only called.
pub(crate) struct Shared {
    endpoint: String,
}

/// A service of one test's own, or the foreign one to itself.
pub(crate) enum Alone<'a> {
    Own(Own),
    Foreign { service: &'a Foreign, _in_use: RwLockWriteGuard<'a, ()> },
}

/// How often tests damage or kill.
pub(crate) fn rounds() -> u64 {
    std::env::var("LANDMARK_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(40)
}

impl Suite {
    pub(crate) fn from_environment() -> Suite {
        Suite {
            foreign: Foreign::from_environment(),
            shared: OnceLock::new(),
            in_use: RwLock::default(),
            names: AtomicU64::new(0),
            run: std::process::id(),
        }
    }

    /// The variable that would have to say how, if nothing says it.
    pub(crate) fn missing(&self, need: Need) -> Option<&'static str> {
        self.foreign.as_ref()?.missing(need)
    }

    /// A name that no other test and no earlier run has used, as long as any, so that files come out the same in every run.
    pub(crate) fn name(&self, what: &str) -> String {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        format!("conformance-{:010}-{number:04}-{what}", self.run)
    }

    /// Held by a test that only calls the service, so that no other test stops it meanwhile.
    pub(crate) fn calling(&self) -> RwLockReadGuard<'_, ()> {
        self.in_use.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For tests that only call the service.
    pub(crate) fn shared(&self) -> Shared {
        let endpoint = match &self.foreign {
            None => self.shared.get_or_init(Own::start_new).endpoint(),
            Some(foreign) => foreign.endpoint(),
        };
        Shared { endpoint: endpoint.into() }
    }

    /// For tests that stop the service or change its files.
    pub(crate) fn alone(&self) -> Alone<'_> {
        match &self.foreign {
            None => Alone::Own(Own::start_new()),
            Some(service) => {
                let _in_use = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
                Alone::Foreign { service, _in_use }
            }
        }
    }
}

impl Shared {
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.endpoint)
    }
}
