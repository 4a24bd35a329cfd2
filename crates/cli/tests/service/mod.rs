//! `landmarkdb serve` as a child process.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// A service that says nothing for so long is stuck.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A running service, killed when dropped.
pub(crate) struct Service {
    pub(crate) child: Child,
    /// What `--connect` takes.
    pub(crate) listening: Vec<String>,
}

/// `serve` on a free port, to be started with [`Service::start`].
pub(crate) fn serve(program: &Path, data: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["serve", "--json", "--listen", "127.0.0.1:0", "--data"]).arg(data).stdin(Stdio::null());
    command
}

impl Service {
    /// Runs a `serve --json` until it prints that it is ready. Fails with its first line and, where standard error is a pipe,
    /// with what it said there.
    pub(crate) fn start(command: &mut Command) -> Result<Service, String> {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the program runs");
        let stdout = child.stdout.take().expect("a pipe");
        let mut service = Service { child, listening: Vec::new() };
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).expect("a line of text");
            // Nobody waits any more if it came too late.
            let _ = send.send(line);
        });
        let line = receive.recv_timeout(READY_WITHIN).unwrap_or_else(|_| format!("no line within {READY_WITHIN:?}"));
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        let targets = ready["listening"].as_array().into_iter().flatten();
        service.listening = targets.filter_map(|target| target.as_str()).map(String::from).collect();
        if service.listening.is_empty() {
            let _ = service.child.kill();
            let mut said = String::new();
            if let Some(mut stderr) = service.child.stderr.take() {
                stderr.read_to_string(&mut said).expect("what it said");
            }
            return Err(format!("{line:?}\n{said}"));
        }
        Ok(service)
    }

    pub(crate) fn target(&self) -> &str {
        &self.listening[0]
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        assert!(Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        self.child.wait().expect("the service ends")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Already gone where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
