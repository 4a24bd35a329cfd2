//! Files that are whole or not there.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Replaces a file by `bytes`, or creates it: a reader, after a crash too, finds the old or the new content.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A fixed name, so that what a crash left behind is used up by the next writing.
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    // The new name is durable once its folder is.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        std::fs::write(folder.path().join("a.json.new"), "left behind by a crash, and longer").unwrap();
        for text in ["first", "second and longer", "third"] {
            replace_file(&path, text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let missing = replace_file(&folder.path().join("none/a.json"), b"x").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
