//! A directory that nothing is written to: every byte of it stays as it is, whatever state it was left in.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;

/// Bytes, permissions and times of change of everything in a folder, itself included.
pub(super) fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, u32, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut left = vec![folder.to_path_buf()];
    while let Some(path) = left.pop() {
        let about = fs::metadata(&path).unwrap();
        let bytes = if about.is_dir() { Vec::new() } else { fs::read(&path).unwrap() };
        if about.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path, (bytes, about.mode(), about.ctime(), about.ctime_nsec()));
    }
    found
}

/// Takes the permission to write, or gives it back, so that the folder can be removed.
fn protect(folder: &Path, from_writes: bool) {
    let paths: Vec<PathBuf> = snapshot(folder).into_keys().collect();
    for path in paths {
        let mode = if path.is_dir() { 0o700 } else { 0o600 };
        fs::set_permissions(&path, Permissions::from_mode(if from_writes { mode & !0o222 } else { mode })).unwrap();
    }
}

/// What `use_it` finds in a folder that cannot be written and is not.
fn untouched<T>(folder: &Path, use_it: impl FnOnce(&Store) -> T) -> T {
    protect(folder, true);
    let before = snapshot(folder);
    let store = Store::open_read_only(folder).unwrap();
    let found = use_it(&store);
    drop(store);
    assert_eq!(snapshot(folder), before);
    protect(folder, false);
    found
}

fn copy(from: &Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    for path in snapshot(from).into_keys() {
        let copy = to.path().join(path.strip_prefix(from).unwrap());
        if path.is_dir() {
            fs::create_dir_all(copy).unwrap();
        } else {
            fs::copy(path, copy).unwrap();
        }
    }
    to
}

/// A directory with history that a store has open.
fn in_use() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let [gone, kept] = ["gone", "kept"].map(|name| store.create_document(collection, name).unwrap().id);
    store.append(gone, &blocks(0..5, 1)).unwrap();
    store.append(kept, &[block(0, 4, 2), block(1, 3, 2)]).unwrap();
    store.put_state(kept, 7, &parts(&[20, 30], 2)).unwrap();
    store.delete(gone).unwrap();
    (dir, store)
}

fn last_segment(dir: &Path) -> PathBuf {
    fs::read_dir(dir.join("segments")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap()
}

#[test]
fn every_change_is_refused_and_every_read_answered() {
    let (dir, store) = in_use();
    let expected = contents(&store);
    let stats = store.stats();
    drop(store);
    untouched(dir.path(), |store| {
        assert_eq!(contents(store), expected);
        assert_clean(store, "opened to be read only");
        assert_eq!(StoreStats { catalog_bytes: stats.catalog_bytes, ..store.stats() }, stats);
        let health = store.health();
        assert!(matches!(&health, Health::ReadOnly { reason } if reason.contains("read only")), "{health:?}");

        let collection = CollectionId(1);
        let document = store.find_document(collection, "kept").unwrap().unwrap();
        let refused = [
            store.create_collection(&spec("two")).map(drop),
            store.set_engine(collection, Engine::Sq8),
            store.create_document(collection, "new").map(drop),
            store.append(document, &blocks(1..2, 2)).map(drop),
            store.put_state(document, 7, &parts(&[5], 3)).map(drop),
            store.seal(document).map(drop),
            store.replace(document, document).map(drop),
            store.delete(document).map(drop),
            store.compact(),
        ];
        for (call, refused) in refused.into_iter().enumerate() {
            assert!(matches!(refused, Err(StoreError::ReadOnly)), "call {call}: {refused:?}");
        }
        assert!(store.discard_torn().is_err());
        assert_eq!(contents(store), expected);
    });
    assert_eq!(contents(&Store::open(dir.path()).unwrap()), expected);
}

/// A copy that was made under a running service: its catalog is behind, and its last append there in part.
#[test]
fn a_copy_of_a_directory_in_use_is_read_as_far_as_it_was_acknowledged() {
    let (dir, store) = in_use();
    let document = store.find_document(CollectionId(1), "kept").unwrap().unwrap();
    let expected = contents(&store);
    let acknowledged = copy(dir.path());
    store.append(document, &[block(1, 4, 2), block(2, 4, 2)]).unwrap();
    let whole = fs::read(last_segment(dir.path())).unwrap();
    let known = fs::read(last_segment(acknowledged.path())).unwrap().len();
    assert!(whole.len() > known + 300);
    for more in [0, 1, 63, 64, 200, whole.len() - known - 1] {
        let copied = copy(acknowledged.path());
        fs::write(last_segment(copied.path()), &whole[..known + more]).unwrap();
        for catalog in ["as it was", "gone", "no catalog"] {
            let folder = copied.path().join(CATALOG_FOLDER);
            match catalog {
                "gone" => fs::remove_dir_all(&folder).unwrap(),
                "no catalog" => {
                    fs::create_dir(&folder).unwrap();
                    fs::write(folder.join("db"), b"not what sled wrote").unwrap();
                }
                _ => {}
            }
            untouched(copied.path(), |store| {
                let context = format!("{more} bytes more, the catalog {catalog}");
                assert_eq!(contents(store), expected, "{context}");
                assert_clean(store, &context);
                assert_eq!(store.stats().set_aside_bytes, 0, "{context}: nothing is moved");
            });
        }
    }
}

/// A flipped bit in the last group passes for an append that was cut short: `verify` says that it may have been more.
#[test]
fn what_is_passed_over_is_a_fault_if_it_may_have_been_acknowledged() {
    let (dir, store) = in_use();
    // What compaction writes behind an append proves that it was whole: here it does not come to it.
    store.compactor.runs.store(true, std::sync::atomic::Ordering::Relaxed);
    let document = store.find_document(CollectionId(1), "kept").unwrap().unwrap();
    let before = contents(&store);
    store.append(document, &[block(1, 4, 2)]).unwrap();
    let acknowledged = copy(dir.path());
    drop(store);
    fs::remove_dir_all(acknowledged.path().join(CATALOG_FOLDER)).unwrap();
    let segment = last_segment(acknowledged.path());
    let mut bytes = fs::read(&segment).unwrap();
    let text = block(1, 4, 2).meta.text;
    let at = bytes.windows(text.len()).rposition(|window| window == text).unwrap();
    bytes[at] ^= 1;
    fs::write(&segment, bytes).unwrap();
    untouched(acknowledged.path(), |store| {
        assert_eq!(contents(store), before);
        let faults = store.verify(None, &mut |_, _| {}).unwrap().faults;
        assert!(faults.len() == 1 && faults[0].problem.contains("may have been acknowledged"), "{faults:?}");
    });
}

#[test]
fn readers_share_a_directory_and_nobody_writes_meanwhile() {
    let (dir, store) = in_use();
    let locked = |result: Result<Store, StoreError>| matches!(result, Err(StoreError::Locked { .. }));
    assert!(locked(Store::open_read_only(dir.path())), "a writer has it");
    drop(store);
    let readers = [0, 1].map(|_| Store::open_read_only(dir.path()).unwrap());
    assert!(locked(Store::open(dir.path())), "readers have it");
    drop(readers);
    drop(Store::open(dir.path()).unwrap());
    // On a medium without the file nobody can be kept away.
    fs::remove_file(dir.path().join("LOCK")).unwrap();
    untouched(dir.path(), |store| assert_eq!(store.collections().unwrap().len(), 1));
    assert!(!dir.path().join("LOCK").exists());
}

#[test]
fn a_folder_that_is_no_data_directory_is_left_as_it_is() {
    let empty = tempfile::tempdir().unwrap();
    for folder in [empty.path().to_path_buf(), empty.path().join("none")] {
        let refused = Store::open_read_only(&folder).err().expect("no data directory");
        assert!(refused.to_string().contains("no folder segments"), "{refused}");
    }
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0);
}

/// No file of it is open for writing: not even the bytes that are there are written again, as recovery does elsewhere.
#[test]
fn a_file_is_not_written_even_with_what_it_holds() {
    let (dir, store) = in_use();
    drop(store);
    let segment = last_segment(dir.path());
    let mut file = OpenOptions::new().append(true).open(&segment).unwrap();
    file.write_all(b"the begin of an append").unwrap();
    File::sync_all(&file).unwrap();
    drop(file);
    fs::remove_dir_all(dir.path().join(CATALOG_FOLDER)).unwrap();
    let before = fs::metadata(&segment).unwrap();
    untouched(dir.path(), |store| assert_eq!(store.manifests(CollectionId(1)).unwrap().len(), 1));
    let after = fs::metadata(&segment).unwrap();
    assert_eq!((before.mtime(), before.mtime_nsec()), (after.mtime(), after.mtime_nsec()));
}
