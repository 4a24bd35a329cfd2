//! How is a service started, stopped, killed and rebuilt? Ours as a child process, another one by commands from the environment.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::service::{self, Service};
use crate::suite::{Alone, Need};

const ENDPOINT: &str = "LANDMARK_ENDPOINT";
const START: &str = "LANDMARK_START";
const STOP: &str = "LANDMARK_STOP";
const KILL: &str = "LANDMARK_KILL";
const REBUILD: &str = "LANDMARK_REBUILD";
const DATA: &str = "LANDMARK_DATA";

/// Another build of our program, for the mutations.
const PROGRAM: &str = "LANDMARK_PROGRAM";

/// A foreign service that does not answer within it did not start.
const START_TIME: Duration = Duration::from_secs(30);

/// Our program as a child process over a folder of its own.
pub(crate) struct Own {
    service: Option<Service>,
    endpoint: String,
    home: tempfile::TempDir,
}

/// A service that was running before us.
pub(crate) struct Foreign {
    endpoint: String,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl Own {
    pub(crate) fn start_new() -> Own {
        let home = tempfile::tempdir().expect("a temporary folder");
        let mut own = Own { service: None, endpoint: String::new(), home };
        own.start().expect("a service over a new folder starts");
        own
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// Fails with what the program said if it does not come up.
    fn start(&mut self) -> Result<(), String> {
        let home = self.home.path();
        let log = home.join("log");
        let errors = std::fs::File::create(&log).expect("a log file");
        let program = variable(PROGRAM).unwrap_or_else(|| env!("CARGO_BIN_EXE_landmarkdb").into());
        let mut command = service::serve(program.as_ref(), &self.data());
        command.current_dir(home).env_clear().env("HOME", home).env("PATH", variable("PATH").unwrap_or_default());
        let service =
            Service::start(command.stderr(errors)).map_err(|_| std::fs::read_to_string(log).unwrap_or_default())?;
        self.endpoint = service.target().into();
        self.service = Some(service);
        Ok(())
    }

    fn kill(&mut self) {
        self.service = None;
    }

    fn stop(&mut self) {
        let Some(service) = self.service.take() else { return };
        let status = service.stop();
        assert!(status.success(), "a service that is asked to stop ends with {status}");
    }
}

impl Foreign {
    pub(crate) fn from_environment() -> Option<Foreign> {
        Some(Foreign { endpoint: variable(ENDPOINT)? })
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn missing(&self, need: Need) -> Option<&'static str> {
        let variables: &[&str] = match need {
            Need::Kill => &[KILL, START],
            Need::Restart => &[STOP, START],
            Need::Rebuild => &[STOP, START, REBUILD],
            Need::Data => &[STOP, START, DATA],
        };
        variables.iter().find(|name| variable(name).is_none()).copied()
    }

    fn start(&self) -> Result<(), String> {
        run(&variable(START).unwrap_or_default())?;
        let end = Instant::now() + START_TIME;
        while Instant::now() < end {
            if Client::try_connect(&self.endpoint).is_some_and(|client| client.stats().is_ok()) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(format!("{} does not answer", self.endpoint))
    }
}

/// Runs a line of shell to its end.
fn run(line: &str) -> Result<(), String> {
    let status =
        Command::new("sh").args(["-c", line]).stdin(Stdio::null()).status().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` ended with {status}")) }
}

fn run_variable(name: &str) {
    run(&variable(name).unwrap_or_default()).unwrap_or_else(|problem| panic!("{name}: {problem}"));
}

impl Alone<'_> {
    pub(crate) fn client(&self) -> Client {
        match self {
            Alone::Own(own) => Client::connect(&own.endpoint),
            Alone::Foreign { service, .. } => Client::connect(&service.endpoint),
        }
    }

    /// Starts it again. Fails if it refuses to.
    pub(crate) fn try_start(&mut self) -> Result<(), String> {
        match self {
            Alone::Own(own) => own.start(),
            Alone::Foreign { service, .. } => service.start(),
        }
    }

    #[track_caller]
    pub(crate) fn start(&mut self) {
        self.try_start().unwrap_or_else(|problem| panic!("the service does not start again: {problem}"));
    }

    pub(crate) fn stop(&mut self) {
        match self {
            Alone::Own(own) => own.stop(),
            Alone::Foreign { .. } => run_variable(STOP),
        }
    }

    pub(crate) fn kill(&mut self) {
        match self {
            Alone::Own(own) => own.kill(),
            Alone::Foreign { .. } => run_variable(KILL),
        }
    }

    /// Ends it, however it takes that.
    pub(crate) fn kill_or_stop(&mut self) {
        match self {
            Alone::Own(own) => own.kill(),
            // It may not have started.
            Alone::Foreign { .. } => drop(run(&variable(STOP).unwrap_or_default())),
        }
    }

    /// Discards what can be derived from the rest. The service is stopped.
    pub(crate) fn discard_derived(&mut self) {
        match self {
            // Absent where it was discarded before.
            Alone::Own(own) => drop(std::fs::remove_dir_all(own.data().join("catalog"))),
            Alone::Foreign { .. } => run_variable(REBUILD),
        }
    }

    /// Where it keeps its files.
    pub(crate) fn data(&self) -> PathBuf {
        match self {
            Alone::Own(own) => own.data(),
            Alone::Foreign { .. } => variable(DATA).unwrap_or_default().into(),
        }
    }
}
