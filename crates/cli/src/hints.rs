//! Commands that messages tell to type work where the user works: they repeat `--data`, `--connect` and `--config`.

use std::borrow::Cow;
use std::fmt;

use super::global::Global;
use super::target::Target;

/// What may follow `landmarkdb` in a hint and works on a data directory or a service.
const WITH_TARGET: [&str; 9] = ["ask", "blocks", "encode", "index", "ls", "rm", "show", "stats", "verify"];

/// The same, on a data directory only.
const WITH_DATA: [&str; 2] = ["repair", "serve"];

/// The flags that were typed, for a shell.
#[derive(Clone, Debug, Default)]
pub(super) struct Hints {
    target: String,
    data: String,
}

impl Hints {
    pub(super) fn new(global: &Global) -> Self {
        let flag = |name: &str, value: &Option<String>| {
            value.as_ref().map(|value| format!(" --{name} {}", quoted(value))).unwrap_or_default()
        };
        let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let config = flag("config", &path(&global.config));
        let data = flag("data", &path(&global.data));
        let connect = flag("connect", &global.connect);
        // A service's own data directory is not known here.
        let own = if global.connect.is_some() { " --data DIR".into() } else { data.clone() };
        Hints { target: format!("{data}{connect}{config}"), data: format!("{own}{config}") }
    }

    /// For commands at this place, wherever the user is.
    pub(super) fn at(place: &Target) -> Self {
        match place {
            Target::Data(folder) => {
                let data = format!(" --data {}", quoted(&folder.display().to_string()));
                Hints { target: data.clone(), data }
            }
            Target::Connect(service) => {
                Hints { target: format!(" --connect {}", quoted(service)), data: " --data DIR".into() }
            }
        }
    }

    /// One command in backticks.
    pub(super) fn command(&self, words: impl fmt::Display) -> String {
        self.complete(&format!("`landmarkdb {words}`"))
    }

    /// The commands in backticks of a message, completed.
    pub(super) fn complete(&self, message: &str) -> String {
        let parts = message.split('`').enumerate().map(|(at, part)| match part.strip_prefix("landmarkdb ") {
            Some(words) if at % 2 == 1 => {
                let command = words.split(' ').next().unwrap_or_default();
                let flags = match command {
                    _ if WITH_TARGET.contains(&command) => &self.target,
                    _ if WITH_DATA.contains(&command) => &self.data,
                    _ => "",
                };
                Cow::Owned(format!("{part}{flags}"))
            }
            _ => Cow::Borrowed(part),
        });
        parts.collect::<Vec<_>>().join("`")
    }
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_alphanumeric() || "_-./:~=@%+,".contains(letter);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_repeats_where_the_user_works() {
        let message = "no document a/b: `landmarkdb ls`, then `landmarkdb repair`, or `landmarkdb model pull x`";
        let hints = |global: Global| Hints::new(&global).complete(message);
        assert_eq!(hints(Global::default()), message);
        let data = Global { data: Some("my books".into()), config: Some("c.toml".into()), ..Global::default() };
        assert_eq!(
            hints(data),
            "no document a/b: `landmarkdb ls --data 'my books' --config c.toml`, then `landmarkdb repair --data 'my books' \
             --config c.toml`, or `landmarkdb model pull x`"
        );
        let connect = Global { connect: Some("unix:/s".into()), ..Global::default() };
        assert_eq!(
            hints(connect),
            "no document a/b: `landmarkdb ls --connect unix:/s`, then `landmarkdb repair --data DIR`, or `landmarkdb model pull x`"
        );
    }
}
