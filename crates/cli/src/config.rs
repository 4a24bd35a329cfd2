//! What the command line means: the configuration file, then the environment, then flags; the later one wins.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Environment, File, FileFormat};
use serde::Deserialize;

use landmarkdb::{GPU_CACHE_BYTES, keys_bytes};

use super::global::Global;
use super::limits::ServiceLimits;
use super::target::Target;

const FILE_NAME: &str = "landmarkdb.toml";
const FOLDER_NAME: &str = "landmarkdb";
const ENVIRONMENT_PREFIX: &str = "LANDMARKDB";
const ENVIRONMENT_SEPARATOR: &str = "__";

/// What all sources together say.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    /// Where `--data` or `--connect` point; absent where neither is set and the platform has no data folder.
    target: Option<Target>,
    /// Whether any source named the target, and it is not merely the default.
    pub(super) target_typed: bool,
    /// Whether it was the file that was found in the working directory.
    pub(super) target_found_here: bool,
    /// Whether nothing may be written to it.
    pub(super) read_only: bool,
    /// The collection of documents that are named without one.
    pub(super) collection: String,
    /// Whether `--collection` was typed, and not merely a default.
    pub(super) collection_typed: bool,
    /// How long one call to a service may take; the client's own default where absent.
    pub(super) deadline: Option<Duration>,
    /// Bytes of landmark keys that are held in memory.
    pub(super) keys_bytes: u64,
    /// Bytes of blocks that are kept in a GPU's memory.
    pub(super) gpu_cache_bytes: u64,
    /// Address that `serve` listens on.
    pub(super) listen: Option<SocketAddr>,
    /// Socket path that `serve` listens on.
    pub(super) unix: Option<PathBuf>,
    /// Whether `serve` may listen where other machines reach it.
    pub(super) allow_remote: bool,
    /// How much `serve` holds, and how patient it is.
    pub(super) limits: ServiceLimits,
}

/// Why the settings make no sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    #[error("the configuration file {path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{origin}: {detail}; docs/cli.md lists the settings")]
    Invalid { origin: String, detail: String },
    #[error("{origin}: a data directory ({data}) and a service ({connect}) are both named: keep one", data = .data.display())]
    TwoTargets { origin: String, data: PathBuf, connect: String },
    #[error("RUST_LOG: expected a log filter such as info or landmarkdb=debug, found {found:?}: {detail}")]
    LogFilter { found: String, detail: String },
    #[error(
        "{FILE_NAME} of the working directory sets {key}, which a file that is merely found may not: \
         where texts go to and who reaches them is said by flags, by the environment, by the file in your configuration folder, or with \
         --config {FILE_NAME}"
    )]
    NotFromHere { key: &'static str },
    #[error("this platform names no data folder for the user: give --data DIR or --connect TARGET")]
    NoDataFolder,
}

/// What one source says: the keys of the configuration file are these field names.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct Layer {
    /// Data directory; in the file, relative to the file's folder.
    data: Option<PathBuf>,
    /// `http://host:port` or `unix:/path`.
    connect: Option<String>,
    /// Whether nothing may be written there.
    read_only: Option<bool>,
    collection: Option<String>,
    client: ClientLayer,
    memory: MemoryLayer,
    gpu: GpuLayer,
    server: ServerLayer,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct ClientLayer {
    /// How long one call to a service may take.
    deadline_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct MemoryLayer {
    /// Most MiB of landmark keys that are held in memory.
    keys_mib: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct GpuLayer {
    /// Most MiB of blocks that are kept in a GPU's memory.
    cache_mib: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct ServerLayer {
    /// `ip:port`; port 0 takes a free one.
    listen: Option<SocketAddr>,
    /// Path of a Unix socket; in the file, relative to the file's folder.
    unix: Option<PathBuf>,
    /// Allows an address that other machines can reach.
    allow_remote: Option<bool>,
    limits: ServiceLimits,
}

impl Config {
    /// Reads the file and the environment and puts the flags on top.
    pub(super) fn load(global: &Global) -> Result<Config, ConfigError> {
        let found = Found::look(global.config.as_deref());
        let file = match &found {
            Found::Nowhere => Layer::default(),
            Found::Here => Layer::from_file(Path::new(FILE_NAME))?.of_the_working_directory()?,
            Found::At(path) => Layer::from_file(path)?,
        };
        let above = Layer::from_flags(global)?.over(Layer::from_environment(None)?);
        let here = matches!(found, Found::Here) && file.names_target() && !above.names_target();
        let config = above.over(file).settle(global.collection.is_some(), dirs::data_dir());
        Ok(Config { target_found_here: here, ..config })
    }

    /// Where the command works.
    pub(super) fn target(&self) -> Result<&Target, ConfigError> {
        self.target.as_ref().ok_or(ConfigError::NoDataFolder)
    }

    /// The same settings for another place, and documents named with their collections.
    pub(super) fn at(&self, target: Target) -> Config {
        Config { target: Some(target), collection_typed: false, ..self.clone() }
    }
}

impl Layer {
    fn from_file(path: &Path) -> Result<Layer, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_path_buf(), source })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        Layer::from_toml(&text, &path.display().to_string(), folder)
    }

    /// Paths in the file are relative to `folder`, so that a file means the same from everywhere.
    fn from_toml(text: &str, origin: &str, folder: &Path) -> Result<Layer, ConfigError> {
        let mut layer = Layer::read(File::from_str(text, FileFormat::Toml), origin)?;
        for path in [&mut layer.data, &mut layer.server.unix].into_iter().flatten() {
            *path = folder.join(&path);
        }
        Ok(layer)
    }

    /// A file that lies where somebody works may come with what they unpacked: it may not send their texts elsewhere, nor open
    /// their memory to others.
    fn of_the_working_directory(self) -> Result<Layer, ConfigError> {
        let ServerLayer { listen, unix, allow_remote, .. } = &self.server;
        let set = [
            ("connect", self.connect.is_some()),
            ("server.listen", listen.is_some()),
            ("server.unix", unix.is_some()),
            ("server.allow_remote", allow_remote.is_some()),
        ];
        match set.into_iter().find(|(_, is_set)| *is_set) {
            Some((key, _)) => Err(ConfigError::NotFromHere { key }),
            None => Ok(self),
        }
    }

    fn names_target(&self) -> bool {
        self.data.is_some() || self.connect.is_some()
    }

    /// `variables` stands in for the process environment in tests.
    fn from_environment(variables: Option<HashMap<String, String>>) -> Result<Layer, ConfigError> {
        let source = Environment::with_prefix(ENVIRONMENT_PREFIX)
            .prefix_separator(ENVIRONMENT_SEPARATOR)
            .separator(ENVIRONMENT_SEPARATOR)
            .ignore_empty(true)
            .source(variables.map(|variables| variables.into_iter().collect()));
        Layer::read(source, "LANDMARKDB__ environment variables")
    }

    fn from_flags(global: &Global) -> Result<Layer, ConfigError> {
        let Global { data, connect, read_only, collection, key_memory, gpu_cache, .. } = global.clone();
        let read_only = read_only.then_some(true);
        let memory = MemoryLayer { keys_mib: key_memory };
        let gpu = GpuLayer { cache_mib: gpu_cache };
        Layer { data, connect, read_only, collection, memory, gpu, ..Layer::default() }.checked("the command line")
    }

    fn read(source: impl config::Source + Send + Sync + 'static, origin: &str) -> Result<Layer, ConfigError> {
        let invalid =
            |error: config::ConfigError| ConfigError::Invalid { origin: origin.into(), detail: error.to_string() };
        let settings = config::Config::builder().add_source(source).build().map_err(invalid)?;
        let mut layer = settings.try_deserialize::<Layer>().map_err(invalid)?;
        // A shell would have done it.
        for path in [&mut layer.data, &mut layer.server.unix].into_iter().flatten() {
            if let (Ok(rest), Some(home)) = (path.strip_prefix("~"), dirs::home_dir()) {
                *path = home.join(rest);
            }
        }
        layer.checked(origin)
    }

    fn checked(self, origin: &str) -> Result<Layer, ConfigError> {
        if let Some((name, expected, found)) = self.server.limits.out_of_range() {
            let detail = format!("server.limits.{name}: expected {expected}, found {found}");
            return Err(ConfigError::Invalid { origin: origin.into(), detail });
        }
        match (self.data, self.connect) {
            (Some(data), None) if data.as_os_str().is_empty() => {
                let detail = "data: expected a folder, found an empty name".into();
                Err(ConfigError::Invalid { origin: origin.into(), detail })
            }
            (Some(data), Some(connect)) => Err(ConfigError::TwoTargets { origin: origin.into(), data, connect }),
            (data, connect) => Ok(Layer { data, connect, ..self }),
        }
    }

    /// This layer's settings, and `below`'s where it has none. `data` and `connect` are one setting: where to work.
    fn over(self, below: Layer) -> Layer {
        let (data, connect) = match (self.data, self.connect) {
            (None, None) => (below.data, below.connect),
            own => own,
        };
        Layer {
            data,
            connect,
            read_only: self.read_only.or(below.read_only),
            collection: self.collection.or(below.collection),
            client: ClientLayer { deadline_ms: self.client.deadline_ms.or(below.client.deadline_ms) },
            memory: MemoryLayer { keys_mib: self.memory.keys_mib.or(below.memory.keys_mib) },
            gpu: GpuLayer { cache_mib: self.gpu.cache_mib.or(below.gpu.cache_mib) },
            server: ServerLayer {
                listen: self.server.listen.or(below.server.listen),
                unix: self.server.unix.or(below.server.unix),
                allow_remote: self.server.allow_remote.or(below.server.allow_remote),
                limits: self.server.limits.over(below.server.limits),
            },
        }
    }

    fn settle(self, collection_typed: bool, data_folder: Option<PathBuf>) -> Config {
        let target_typed = self.connect.is_some() || self.data.is_some();
        let target = match (self.connect, self.data) {
            (Some(connect), _) => Some(Target::Connect(connect)),
            (None, Some(data)) => Some(Target::Data(data)),
            (None, None) => data_folder.map(|folder| Target::Data(folder.join(FOLDER_NAME))),
        };
        Config {
            target,
            target_typed,
            target_found_here: false,
            read_only: self.read_only.unwrap_or(false),
            collection: self.collection.unwrap_or_else(|| "default".into()),
            collection_typed,
            deadline: self.client.deadline_ms.map(Duration::from_millis),
            keys_bytes: self.memory.keys_mib.map_or_else(keys_bytes, |mib| mib.saturating_mul(1 << 20)),
            gpu_cache_bytes: self.gpu.cache_mib.map_or(GPU_CACHE_BYTES, |mib| mib.saturating_mul(1 << 20)),
            listen: self.server.listen,
            unix: self.server.unix,
            allow_remote: self.server.allow_remote.unwrap_or(false),
            limits: self.server.limits,
        }
    }
}

/// Which configuration file counts.
enum Found {
    Nowhere,
    /// In the working directory, where nobody asked for it.
    Here,
    /// The one that was asked for, which must exist, or the user's own.
    At(PathBuf),
}

impl Found {
    fn look(asked: Option<&Path>) -> Self {
        if let Some(path) = asked {
            return Found::At(path.to_path_buf());
        }
        let own =
            dirs::config_dir().map(|folder| folder.join(FOLDER_NAME).join(FILE_NAME)).filter(|path| path.is_file());
        let here = Path::new(FILE_NAME);
        let is_own = || own.as_deref().is_some_and(|own| own.canonicalize().ok() == here.canonicalize().ok());
        if here.is_file() && !is_own() {
            return Found::Here;
        }
        own.map_or(Found::Nowhere, Found::At)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<Layer, ConfigError> {
        Layer::from_toml(text, "landmarkdb.toml", Path::new("/etc/landmarkdb"))
    }

    fn environment(variables: &[(&str, &str)]) -> Result<Layer, ConfigError> {
        Layer::from_environment(Some(variables.iter().map(|&(key, value)| (key.into(), value.into())).collect()))
    }

    fn settle(layer: Layer) -> Config {
        layer.settle(false, Some("/user-data".into()))
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = file(
            "data = 'a'\nread_only = false\ncollection = 'a'\n[client]\ndeadline_ms = 1\n[memory]\nkeys_mib = 1\n[gpu]\ncache_mib = 1\n[server]\nlisten = '127.0.0.1:1'\n[server.limits]\nworkers = 1\nwork_mib = 1",
        );
        let environment = environment(&[
            ("LANDMARKDB__READ_ONLY", "true"),
            ("LANDMARKDB__COLLECTION", "2"),
            ("LANDMARKDB__CLIENT__DEADLINE_MS", "2"),
            ("LANDMARKDB__MEMORY__KEYS_MIB", "2"),
            ("LANDMARKDB__GPU__CACHE_MIB", "2"),
            ("LANDMARKDB__SERVER__LIMITS__WORKERS", "2"),
            ("LANDMARKDB__SERVER__LIMITS__GRACE_MS", "2"),
            ("LANDMARKDB_CACHE", "not ours: one underscore"),
        ]);
        let typed = Global { collection: Some("c".into()), gpu_cache: Some(3), ..Global::default() };
        let flags = Layer::from_flags(&typed);
        let config = settle(flags.unwrap().over(environment.unwrap()).over(file.unwrap()));
        assert_eq!(config.collection, "c");
        assert!(config.read_only && !settle(Layer::default()).read_only);
        assert_eq!(config.deadline, Some(Duration::from_millis(2)));
        assert_eq!((config.keys_bytes, config.gpu_cache_bytes), (2 << 20, 3 << 20));
        assert_eq!(settle(Layer::default()).keys_bytes, keys_bytes());
        let options = config.limits.options();
        assert_eq!((options.workers, options.grace), (2, Duration::from_millis(2)));
        assert_eq!(config.limits.work_bytes(), 1 << 20);
        assert_eq!(settle(Layer::default()).gpu_cache_bytes, GPU_CACHE_BYTES);
        assert_eq!(config.listen, Some("127.0.0.1:1".parse().unwrap()));
        assert_eq!(config.target().unwrap(), &Target::Data("/etc/landmarkdb/a".into()));
    }

    #[test]
    fn the_target_of_a_higher_layer_replaces_either_kind_below() {
        let connect = Layer { connect: Some("unix:/s".into()), ..Layer::default() };
        let data = Layer { data: Some("d".into()), ..Layer::default() };
        let target = |layer: Layer| settle(layer).target().unwrap().clone();
        assert_eq!(target(connect.clone().over(data.clone())), Target::Connect("unix:/s".into()));
        assert_eq!(target(data.over(connect)), Target::Data("d".into()));
        assert_eq!(target(Layer::default()), Target::Data("/user-data/landmarkdb".into()));
        assert!(matches!(Layer::default().settle(false, None).target(), Err(ConfigError::NoDataFolder)));
    }

    /// A cloned repository could bring a file that sends whatever is encoded beside it to a service of its choice.
    #[test]
    fn a_file_that_is_merely_found_says_neither_where_texts_go_nor_who_reads_them() {
        for (text, key) in [
            ("connect = 'unix:evil.sock'", "connect"),
            ("[server]\nlisten = '127.0.0.1:1'", "server.listen"),
            ("[server]\nunix = 's'", "server.unix"),
            ("[server]\nallow_remote = false", "server.allow_remote"),
        ] {
            let refused = file(text).unwrap().of_the_working_directory().unwrap_err();
            assert!(matches!(refused, ConfigError::NotFromHere { key: found } if found == key), "{refused}");
        }
        file("data = 'a'\ncollection = 'c'\n[client]\ndeadline_ms = 1").unwrap().of_the_working_directory().unwrap();
    }

    #[test]
    fn an_empty_variable_is_unset_and_an_empty_folder_refused() {
        assert_eq!(environment(&[("LANDMARKDB__DATA", ""), ("LANDMARKDB__COLLECTION", "")]).unwrap(), Layer::default());
        assert!(file("data = ''").unwrap_err().to_string().contains("an empty name"));
        let typed = Global { data: Some("".into()), ..Global::default() };
        assert!(Layer::from_flags(&typed).unwrap_err().to_string().contains("the command line"));
    }

    #[test]
    fn a_tilde_is_the_users_folder() {
        let home = dirs::home_dir().unwrap();
        assert_eq!(file("data = '~/books'").unwrap().data, Some(home.join("books")));
        assert_eq!(file("data = 'a~'").unwrap().data, Some("/etc/landmarkdb/a~".into()));
    }

    #[test]
    fn a_wrong_setting_is_refused_by_its_name_and_place() {
        let cases = [
            (file("colection = 'a'"), ["landmarkdb.toml", "colection"]),
            (file("[server]\nport = 1"), ["landmarkdb.toml", "port"]),
            (file("[server]\nlisten = 'here'"), ["landmarkdb.toml", "server.listen"]),
            (file("[server.limits]\nworker = 1"), ["landmarkdb.toml", "worker"]),
            (file("[server.limits]\nwork_mib = 0"), ["landmarkdb.toml", "server.limits.work_mib"]),
            (file("[server.limits]\nworkers = 500"), ["server.limits.workers", "1 to 128"]),
            (environment(&[("LANDMARKDB__SERVER__LIMITS__STREAMS", "0")]), ["LANDMARKDB__", "server.limits.streams"]),
            (file("[client]\ndeadline_ms = 'soon'"), ["landmarkdb.toml", "client.deadline_ms"]),
            (file("data = 'a'\nconnect = 'b'"), ["landmarkdb.toml", "keep one"]),
            (file("data = "), ["landmarkdb.toml", "1"]),
            (environment(&[("LANDMARKDB__SERVER__PORT", "1")]), ["LANDMARKDB__", "port"]),
        ];
        for (layer, words) in cases {
            let message = layer.unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{words:?} in {message}");
        }
    }
}
