//! Is a folder a data directory, and which one? A marker file says so. It is written when the directory is created, and
//! into directories of formats 1 to 3, which had none, when they are first opened; a folder that holds anything else is
//! refused, so nothing in it is ever removed.
//!
//! Keys, values and text are the documents themselves, so only the owner may enter the folder.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::error::StoreError;
use super::record::{FORMAT, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::segment::{DirectoryId, create_private, private};

/// Held by the process that has the directory open.
pub(super) const LOCK_FILE: &str = "LOCK";
const MARKER: &str = "LANDMARKDB";
/// The marker before it has its name.
const MARKER_NEW: &str = "LANDMARKDB.new";
const MAGIC: &str = "landmarkdb data directory";

/// What a data directory of formats 1 to 3 holds, and one whose creation was cut short.
const KNOWN: &[&str] = &[MARKER, MARKER_NEW, LOCK_FILE, "segments", "catalog", "indexes", "torn", "reserve"];

/// Whether a folder is a data directory. Changes nothing.
pub fn is_data_directory(dir: &Path) -> bool {
    dir.join(MARKER).is_file() || dir.join("segments").is_dir()
}

/// Makes sure that `dir` is a data directory, creating it if absent, and gives its id.
///
/// `NotADataDirectory` if it holds files that are not ours.
pub(super) fn open(dir: &Path) -> Result<DirectoryId, StoreError> {
    let io = StoreError::io("create the data directory");
    if !dir.exists() {
        create_private(dir).and_then(|()| sync_parent(dir)).map_err(io)?;
    }
    match read_marker(&dir.join(MARKER)).map_err(StoreError::io("read the data directory's marker"))? {
        Some(id) => Ok(id),
        None => adopt(dir),
    }
}

/// The id of a data directory that exists; changes nothing. One of formats 1 to 3 has none: what is drawn for it holds for as long
/// as it is open.
pub(super) fn identify(dir: &Path) -> Result<DirectoryId, StoreError> {
    let step = "read the data directory";
    if !is_data_directory(dir) {
        let problem = format!("{} is none, it has no folder segments", dir.display());
        return Err(StoreError::Io { step, source: io::Error::new(io::ErrorKind::NotFound, problem) });
    }
    let marked = read_marker(&dir.join(MARKER)).map_err(StoreError::io("read the data directory's marker"))?;
    let found = marked.map_or_else(|| id_in_segments(&dir.join("segments")), |id| Ok(Some(id)));
    Ok(found.map_err(StoreError::io(step))?.unwrap_or_else(DirectoryId::draw))
}

/// Marks a folder that is empty, or was written by a build that knew no marker, or has lost it.
fn adopt(dir: &Path) -> Result<DirectoryId, StoreError> {
    let step = "mark the data directory";
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = entries.map_err(StoreError::io(step))?;
    let known = |name: &OsStr| KNOWN.iter().any(|known| name == OsStr::new(known));
    let foreign = entries.iter().find(|entry| !known(&entry.file_name()));
    let segments = dir.join("segments");
    // Or as its creation left it when that was cut short.
    let begun = |name: &OsStr| [MARKER_NEW, LOCK_FILE].iter().any(|known| name == OsStr::new(known));
    let is_ours = segments.is_dir() || entries.iter().all(|entry| begun(&entry.file_name()));
    if foreign.is_some() || !is_ours {
        let found = foreign.map_or_else(String::new, |entry| entry.file_name().to_string_lossy().into_owned());
        return Err(StoreError::NotADataDirectory { path: dir.to_owned(), found });
    }
    let id = id_in_segments(&segments).map_err(StoreError::io(step))?.unwrap_or_else(DirectoryId::draw);
    write_marker(dir, id).map_err(StoreError::io(step))?;
    Ok(id)
}

fn write_marker(dir: &Path, id: DirectoryId) -> io::Result<()> {
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    let new = dir.join(MARKER_NEW);
    let mut file = private().create(true).truncate(true).open(&new)?;
    write!(file, "{MAGIC}\nformat {FORMAT}\nid {id}\n")?;
    file.sync_all()?;
    fs::rename(&new, dir.join(MARKER))?;
    File::open(dir)?.sync_all()
}

/// `None` if there is none, or if it says nothing that we wrote.
fn read_marker(path: &Path) -> io::Result<Option<DirectoryId>> {
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text)) {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut lines = text.lines();
    if lines.next() != Some(MAGIC) {
        return Ok(None);
    }
    Ok(lines.find_map(|line| line.strip_prefix("id ")).and_then(parse_id))
}

fn parse_id(digits: &str) -> Option<DirectoryId> {
    let number = u128::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 32)?;
    Some(DirectoryId(number.to_be_bytes()))
}

/// What the segments say whose they are, if any does.
fn id_in_segments(folder: &Path) -> io::Result<Option<DirectoryId>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let mut bytes = Vec::new();
        File::open(entry?.path())?.take(SEGMENT_HEADER_BYTES as u64).read_to_end(&mut bytes)?;
        if let Some(id) = SegmentHeader::check(&bytes).and_then(|header| header.directory) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// A name in a folder is durable only once the folder is.
fn sync_parent(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}
