//! `--read-only`: what reads works, what writes refuses, and no byte of the data directory changes.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::sandbox::Sandbox;
use crate::with_text;

const TEXT: &str = "The ferry leaves at nine, and the bell rings twice. The keeper is Harald, and his dog is old.";

/// Bytes and times of change of everything in a folder, itself included.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut left = vec![folder.to_path_buf()];
    while let Some(path) = left.pop() {
        let about = fs::metadata(&path).unwrap();
        let bytes = if about.is_dir() { Vec::new() } else { fs::read(&path).unwrap() };
        if about.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path, (bytes, about.ctime(), about.ctime_nsec()));
    }
    found
}

/// A folder that nobody may write in, until it is dropped.
struct Protected(Vec<PathBuf>);

impl Protected {
    fn new(folder: &Path) -> Self {
        let paths: Vec<PathBuf> = snapshot(folder).into_keys().collect();
        paths.iter().for_each(|path| change_mode(path, |mode| mode & !0o222));
        Protected(paths)
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| change_mode(path, |mode| mode | 0o200));
    }
}

fn change_mode(path: &Path, change: impl Fn(u32) -> u32) {
    let mode = fs::metadata(path).unwrap().mode();
    fs::set_permissions(path, Permissions::from_mode(change(mode))).unwrap();
}

#[test]
fn what_reads_works_what_writes_refuses_and_nothing_changes() {
    let (sandbox, run) = with_text(TEXT);
    run(&sandbox, 0, &["encode", "text.txt"]);
    let answers = |more: &[&str]| -> Vec<String> {
        let ask = ["ask", "The ferry", "--raw", "--doc", "text", "--max-tokens", "3", "--json"];
        let reads = [&["ls"][..], &["show", "text"], &["blocks", "text"], &["verify"], &["verify", "--rebuild"]];
        let said = reads.iter().map(|typed| sandbox.run(&[typed, more].concat()).exits(0).stdout);
        let asked = run(&sandbox, 0, &[&ask[..], &more[2..]].concat()).json();
        said.chain([asked["answer"].to_string(), asked["blocks"].to_string()]).collect()
    };
    let expected = answers(&["--data", "d"]);
    let data = sandbox.path("d");
    let protected = Protected::new(&data);
    let before = snapshot(&data);
    let at = ["--data", "d", "--read-only"];
    assert_eq!(answers(&at), expected);
    let stats = sandbox.run(&[&["stats"][..], &at].concat()).exits(0).stdout;
    assert!(stats.contains("read-only: the data directory is open to be read only"), "{stats}");

    for typed in [
        &["encode", "text.txt", "--name", "other"][..],
        &["encode", "text.txt"],
        &["rm", "text", "--yes"],
        &["index", "set", "sq8"],
        &["index", "tune"],
        &["repair"],
        &["eval", "passkey"],
        &["capture", "c.safetensors"],
    ] {
        let error = sandbox.run(&[typed, &at].concat()).exits(2).stderr;
        assert!(error.contains("this command writes") && error.contains("--read-only"), "{typed:?}: {error}");
    }
    // The same from the file and from the environment.
    sandbox.write_file("landmarkdb.toml", "read_only = true\ndata = 'd'");
    sandbox.run(&["rm", "text", "--yes"]).exits(2);
    sandbox.run(&["ls"]).exits(0);
    fs::remove_file(sandbox.path("landmarkdb.toml")).unwrap();
    let sandbox = sandbox.with_variable("LANDMARKDB__READ_ONLY", "true");
    sandbox.run(&["rm", "text", "--yes", "--data", "d"]).exits(2);
    assert_eq!(snapshot(&data), before);
    drop(protected);
}

#[test]
fn a_service_to_be_read_only_refuses_writes_and_shares_the_directory() {
    let (sandbox, run) = with_text(TEXT);
    run(&sandbox, 0, &["encode", "text.txt"]);
    let listed = sandbox.run(&["ls", "--data", "d"]).exits(0).stdout;
    let data = sandbox.path("d");
    let protected = Protected::new(&data);
    let before = snapshot(&data);
    let service = sandbox.serve(&["serve", "--json", "--data", "d", "--read-only", "--listen", "127.0.0.1:0"]);
    let at = ["--connect", service.target()];
    assert_eq!(sandbox.run(&[&["ls"][..], &at].concat()).exits(0).stdout, listed);
    assert_eq!(sandbox.run(&[&["verify", "--rebuild"][..], &at].concat()).exits(0).stderr, "");
    let health = sandbox.run(&[&["stats", "--json"][..], &at].concat()).exits(0).json()["health"].clone();
    assert_eq!(health, "read-only");
    for typed in [&["rm", "text", "--yes"][..], &["index", "set", "sq8"]] {
        let error = sandbox.run(&[typed, &at].concat()).exits(1).stderr;
        assert!(error.contains("open to be read only"), "{typed:?}: {error}");
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    let error = sandbox.run(&["encode", "text.txt", "--name", "other", "--model", model, at[0], at[1]]).exits(1).stderr;
    assert!(error.contains("open to be read only"), "{error}");

    assert_eq!(sandbox.run(&["ls", "--data", "d", "--read-only"]).exits(0).stdout, listed, "others read beside");
    assert_eq!(snapshot(&data), before);
    drop(protected);
    assert_eq!(sandbox.run(&["rm", "text", "--yes", "--data", "d", "--json"]).exits(4).error_kind(), "unavailable");
    assert_eq!(service.stop().code(), Some(0));
    sandbox.run(&["rm", "text", "--yes", "--data", "d"]).exits(0);
}

#[test]
fn a_directory_that_is_not_there_is_not_made() {
    let sandbox = Sandbox::new();
    for typed in [&["ls"][..], &["serve", "--listen", "127.0.0.1:0"]] {
        let typed = [typed, &["--data", "none", "--read-only", "--json"]].concat();
        assert_eq!(sandbox.run(&typed).exits(3).error_kind(), "not_found", "{typed:?}");
    }
    assert!(!sandbox.path("none").exists());
}

/// The system itself refuses what is written.
#[test]
fn a_directory_on_a_read_only_mount_is_read() {
    let (sandbox, run) = with_text(TEXT);
    run(&sandbox, 0, &["encode", "text.txt"]);
    let data = sandbox.path("d");
    let mounted = |rest: &str| {
        let script = format!("mount --bind '{0}' '{0}' && mount -o remount,bind,ro '{0}' && {rest}", data.display());
        let unshare = ["--mount", "--map-root-user", "sh", "-c", &script];
        Command::new("unshare").args(unshare).current_dir(sandbox.path("")).env("HOME", sandbox.path("")).output()
    };
    if !mounted("true").is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this system lets nobody mount");
        return;
    }
    let program = env!("CARGO_BIN_EXE_landmarkdb");
    let written = mounted(&format!("{program} verify --data d")).unwrap();
    assert!(!written.status.success(), "it can be written");
    let read = mounted(&format!("{program} verify --rebuild --data d --read-only")).unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
}
