//! What does a JSON object say, field by field: so that a value of the wrong kind is refused by its name, and a file that is
//! whole is not called damaged.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::LoadError;

/// Longest value that an error message shows.
const SHOWN_BYTES_MAX: usize = 80;

/// The fields of one object of one file. `null` is as good as absent.
pub(super) struct Fields<'a> {
    path: &'a Path,
    /// Of the object in the file: empty, or ending in a dot.
    prefix: String,
    map: &'a Map<String, Value>,
    /// Names that were asked for.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    /// The fields of the file's outermost value.
    pub(super) fn new(path: &'a Path, value: &'a Value) -> Result<Self, LoadError> {
        Self::within(path, String::new(), value)
    }

    fn within(path: &'a Path, prefix: String, value: &'a Value) -> Result<Self, LoadError> {
        match value {
            Value::Object(map) => Ok(Fields { path, prefix, map, read: RefCell::default() }),
            other => Err(LoadError::Unsupported {
                path: path.into(),
                key: prefix.trim_end_matches('.').into(),
                expected: "an object".into(),
                found: brief(other),
                way_out: None,
            }),
        }
    }

    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.into());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The fields of an object inside.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>, LoadError> {
        let within = |value| Self::within(self.path, format!("{}{key}.", self.prefix), value);
        self.value(key).map(within).transpose()
    }

    /// Fields that are not `null` and that nobody has asked for.
    pub(super) fn unread(&self) -> Vec<&'a str> {
        let read = self.read.borrow();
        let unread = self.map.iter().filter(|(key, value)| !value.is_null() && !read.contains(*key));
        unread.map(|(key, _)| key.as_str()).collect()
    }

    pub(super) fn count(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        self.read(key, "a whole number of at most 32 bits", number)
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.read(key, "a string", Value::as_str)
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>, LoadError> {
        let numbers = |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect();
        self.read(key, "a list of numbers", numbers)
    }

    pub(super) fn counts(&self, key: &str) -> Result<Option<Vec<u32>>, LoadError> {
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        self.read(key, "a list of whole numbers", |value| value.as_array()?.iter().map(number).collect())
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, LoadError> {
        self.read(key, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// One token or several.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>, LoadError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.read(key, "token ids, which are 0 or more", |value| match value {
            Value::Array(values) => values.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        });
        Ok(ids?.unwrap_or_default())
    }

    pub(super) fn need<T>(&self, key: &str, value: Option<T>) -> Result<T, LoadError> {
        let missing = || LoadError::MissingKey { path: self.path.into(), key: format!("{}{key}", self.prefix) };
        value.ok_or_else(missing)
    }

    pub(super) fn unknown(&self, key: &str) -> LoadError {
        LoadError::UnknownSetting {
            path: self.path.into(),
            key: format!("{}{key}", self.prefix),
            found: self.value(key).map_or("nothing".into(), brief),
        }
    }

    pub(super) fn refuse(&self, key: &str, expected: &str, way_out: Option<&'static str>) -> LoadError {
        LoadError::Unsupported {
            path: self.path.into(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found: self.value(key).map_or("nothing".into(), brief),
            way_out,
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.path.into()
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        take(value).map(Some).ok_or_else(|| self.refuse(key, expected, None))
    }
}

/// A value as it is written; strings without quotation marks.
fn brief(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
    match text.char_indices().nth(SHOWN_BYTES_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
