//! Settings in layers. Strongest first: flags, environment (`PETEK_…`), file, the model's own files, defaults.
//!
//! Each process has one struct of raw settings, as typed. [`Layers`] fills it and knows where each value came
//! from; the process then turns it into what was meant, once, and [`Config::refuse`]s what does not fit. A key that
//! nobody knows or a value of the wrong type stops the start and names the key and its source.
//!
//! A key is a path with dots (`log.filter`). The variable of the environment puts `__` for a dot
//! (`PETEK_LOG__FILTER`), the flag a dash for dot and underscore (`--log-filter`). The flags of a group that is named in
//! [`Layers::short_flags`] leave its name out.
//!
//! figment does the merging and remembers sources; it is used in this file only.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Json, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::{Exit, Failure};

/// A larger file is no file of settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

const ENV_PREFIX: &str = "PETEK_";

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Built in.
    Default,
    /// One of the model's own files.
    Model(PathBuf),
    /// The file of settings.
    File(PathBuf),
    /// This variable of the environment.
    Env(String),
    /// This flag.
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::Model(path) => write!(f, "model file {}", path.display()),
            Source::File(path) => write!(f, "file {}", path.display()),
            Source::Env(name) => write!(f, "environment {name}"),
            Source::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why the settings cannot be used. Shown as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read as settings at all.
    #[error("settings: {path}: {why}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Nobody knows the key.
    #[error("settings: unknown key `{key}` ({origin})")]
    Unknown {
        /// The key, with dots.
        key: String,
        /// Where it stands.
        origin: Source,
    },
    /// The key is known, its value does not fit.
    #[error("settings: {key} ({origin}): {why}")]
    Bad {
        /// The key, with dots.
        key: String,
        /// Where the value stands.
        origin: Source,
        /// What is wrong with it.
        why: String,
    },
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let hint = match &error {
            // A Kubernetes service of our name puts such variables into every pod of its namespace.
            ConfigError::Unknown { origin: Source::Env(name), .. }
                if name.contains("_SERVICE_") || name.contains("_PORT") =>
            {
                "unset it (in Kubernetes: enableServiceLinks: false)"
            }
            ConfigError::Unknown { .. } => "--print-config shows all keys",
            ConfigError::File { .. } => "name a TOML or JSON file",
            ConfigError::Bad { .. } => "--print-config shows where each value comes from",
        };
        Failure::new(Exit::Configuration, error.to_string(), hint)
    }
}

/// Layers of settings being put together, for a struct `T` of raw settings. Call in the order of strength: the
/// model's files, the file, the environment, the flags.
///
/// `T` is a struct of scalars, text, lists and structs of those, `#[serde(deny_unknown_fields)]` throughout.
pub struct Layers<T> {
    figment: Figment,
    /// Every key there is, with its default.
    known: Vec<(String, Value)>,
    /// Of each layer of the figment, by the number that its name holds.
    origins: Vec<Origin>,
    secrets: BTreeSet<&'static str>,
    short_flags: &'static [&'static str],
    settings: PhantomData<fn() -> T>,
}

/// What a layer is, before it is known which key is asked for.
#[derive(Clone)]
enum Origin {
    Default,
    Model(PathBuf),
    File(PathBuf),
    Env,
    Flags,
}

impl Origin {
    fn of(&self, key: &str, short_flags: &[&str]) -> Source {
        match self {
            Origin::Default => Source::Default,
            Origin::Model(path) => Source::Model(path.clone()),
            Origin::File(path) => Source::File(path.clone()),
            Origin::Env => Source::Env(format!("{ENV_PREFIX}{}", key.replace('.', "__").to_uppercase())),
            Origin::Flags => {
                let rest = |group: &&str| key.strip_prefix(*group)?.strip_prefix('.');
                let key = short_flags.iter().find_map(rest).unwrap_or(key);
                Source::Flag(format!("--{}", key.replace(['.', '_'], "-")))
            }
        }
    }
}

/// One layer's values under figment's trait.
struct Layer {
    number: usize,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.number.to_string())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

impl<T: Serialize + DeserializeOwned> Layers<T> {
    /// Begins with what is built in. `secrets` are the keys whose values are shown to nobody.
    ///
    /// # Panics
    /// If `T` is no struct, or has no such secret: mistakes of ours.
    pub fn new(defaults: &T, secrets: &[&'static str]) -> Self {
        let values = to_dict(defaults);
        let known = leaves(&values);
        for secret in secrets {
            assert!(known.iter().any(|(key, _)| key == secret), "no setting is called {secret}");
        }
        let figment = Figment::from(Layer { number: 0, values });
        let secrets = secrets.iter().copied().collect();
        Self {
            figment,
            known,
            origins: vec![Origin::Default],
            secrets,
            short_flags: &[],
            settings: PhantomData,
        }
    }

    /// Names the groups of settings whose flags do without the group's name: of `engine.tp` it is `--tp`.
    pub fn short_flags(self, groups: &'static [&'static str]) -> Self {
        Self { short_flags: groups, ..self }
    }

    /// Adds what the model's own file `path` says, as a struct or map of settings; absent values say nothing.
    ///
    /// # Errors
    /// A key that nobody knows.
    pub fn model(self, path: &Path, values: &impl Serialize) -> Result<Self, ConfigError> {
        self.add(Origin::Model(path.to_path_buf()), to_dict(values))
    }

    /// Adds a file of settings: JSON where its name ends so, else TOML.
    ///
    /// # Errors
    /// A file that cannot be read, is larger than 1 MiB or malformed; a key that nobody knows.
    pub fn file(self, path: &Path) -> Result<Self, ConfigError> {
        let fail = |why: String| ConfigError::File { path: path.to_path_buf(), why };
        let file = std::fs::File::open(path).map_err(|error| fail(error.to_string()))?;
        let mut text = String::new();
        file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| fail(error.to_string()))?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(fail(format!("is larger than {FILE_BYTES_MAX} bytes")));
        }
        let is_json = path.extension().is_some_and(|end| end == "json");
        let values: Dict = if is_json {
            Json::from_str(&text).map_err(|error| fail(error.to_string()))?
        } else {
            Toml::from_str(&text).map_err(|error| {
                // Not its Display: that is five lines and quotes the text, secrets and all.
                let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
                fail(format!("line {line}: {}", error.message()))
            })?
        };
        self.add(Origin::File(path.to_path_buf()), values)
    }

    /// Adds the variables (`std::env::vars_os()`) that begin with `PETEK_`, but for those in `not_settings`.
    ///
    /// # Errors
    /// A key that nobody knows, a value that is no text.
    pub fn env(
        self,
        vars: impl IntoIterator<Item = (OsString, OsString)>,
        not_settings: &[&str],
    ) -> Result<Self, ConfigError> {
        let mut values = Dict::new();
        for (name, text) in vars {
            let name = name.to_string_lossy().into_owned();
            let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
            if not_settings.contains(&name.as_str()) {
                continue;
            }
            let path: Vec<String> = rest.to_lowercase().split("__").map(String::from).collect();
            if !self.knows(&path.join(".")) {
                return Err(ConfigError::Unknown { key: path.join("."), origin: Source::Env(name) });
            }
            let Some(text) = text.to_str() else {
                let why = "the value is not UTF-8".into();
                return Err(ConfigError::Bad { key: path.join("."), origin: Source::Env(name), why });
            };
            insert(&mut values, &path, self.typed(&path, text));
        }
        self.add(Origin::Env, values)
    }

    /// Adds what the command line said, as a struct or map of settings; absent values say nothing.
    ///
    /// # Panics
    /// If the command line has a flag that is no setting: a mistake of ours.
    pub fn flags(self, values: &impl Serialize) -> Self {
        self.add(Origin::Flags, to_dict(values)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Reads the settings off the layers.
    ///
    /// # Errors
    /// A value of the wrong type, with its key and source.
    pub fn read(self) -> Result<Config<T>, ConfigError> {
        let raw: T = self.figment.extract().map_err(|error| self.bad(error))?;
        let setting = |(key, default): &(String, Value)| Setting {
            key: key.clone(),
            value: shown(&self.figment.find_value(key).unwrap_or_else(|_| default.clone())),
            source: self.source(key),
            is_secret: self.secrets.contains(key.as_str()),
        };
        Ok(Config { settings: self.known.iter().map(setting).collect(), raw })
    }

    fn add(mut self, origin: Origin, values: Dict) -> Result<Self, ConfigError> {
        let values = without_absent(values);
        if let Some((key, _)) = leaves(&values).into_iter().find(|(key, _)| !self.knows(key)) {
            return Err(ConfigError::Unknown { origin: origin.of(&key, self.short_flags), key });
        }
        self.figment = self.figment.merge(Layer { number: self.origins.len(), values });
        self.origins.push(origin);
        Ok(self)
    }

    /// A key is known if it is a setting, if settings lie below it, or if it lies below a setting whose default is
    /// no struct (serde judges that one).
    fn knows(&self, key: &str) -> bool {
        let is_below = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.starts_with('.'));
        self.known.iter().any(|(known, _)| known == key || is_below(known, key) || is_below(key, known))
    }

    /// A variable is text. It stays text wherever text fits, so that a name of digits is a name; else it is read
    /// as a number, truth value or list.
    fn typed(&self, path: &[String], text: &str) -> Value {
        let mut values = Dict::new();
        insert(&mut values, path, Value::from(text));
        let fits =
            self.figment.clone().merge(Layer { number: self.origins.len(), values }).extract::<T>().is_ok();
        if fits { Value::from(text) } else { text.parse().unwrap_or_else(|never| match never {}) }
    }

    fn source(&self, key: &str) -> Source {
        let number = self.figment.find_metadata(key).and_then(|metadata| metadata.name.parse().ok());
        self.origins.get(number.unwrap_or(0)).unwrap_or(&Origin::Default).of(key, self.short_flags)
    }

    fn bad(&self, error: figment::Error) -> ConfigError {
        let key = error.path.join(".");
        // serde's message quotes the value.
        let is_secret = self.secrets.iter().any(|secret| key.starts_with(secret));
        let why =
            if is_secret { "the value does not fit (it is secret)".into() } else { error.kind.to_string() };
        ConfigError::Bad { origin: self.source(&key), key, why }
    }
}

/// Settings read: raw, and where each came from.
#[derive(Debug, Clone)]
pub struct Config<T> {
    /// The settings, as typed.
    pub raw: T,
    settings: Vec<Setting>,
}

/// One setting as it stands.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Its key, with dots.
    pub key: String,
    /// Where its value came from.
    pub source: Source,
    value: Option<String>,
    is_secret: bool,
}

impl Setting {
    /// The value in TOML; `(secret)` for a secret one. `None`: it has none.
    pub fn value(&self) -> Option<&str> {
        self.value.as_ref().map(|value| if self.is_secret { "(secret)" } else { value.as_str() })
    }
}

impl<T> Config<T> {
    /// All settings, by key.
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// What `--print-config` prints: a TOML file of all settings, each with its source. Secrets are not in it.
    pub fn print(&self) -> String {
        let line = |setting: &Setting| match setting.value() {
            Some(value) if !setting.is_secret => format!("{} = {value}", setting.key),
            value => format!("# {} = {}", setting.key, value.unwrap_or("(none)")),
        };
        let width = self.settings.iter().map(|setting| line(setting).chars().count()).max().unwrap_or(0);
        self.settings.iter().map(|s| format!("{:width$}  # {}\n", line(s), s.source)).collect()
    }

    /// Logs once what differs from the defaults.
    pub fn log(&self) {
        let set = self.settings.iter().filter(|setting| setting.source != Source::Default);
        let set: Vec<String> =
            set.map(|s| format!("{} = {} ({})", s.key, s.value().unwrap_or("none"), s.source)).collect();
        tracing::info!(settings = set.join(", "), "settings");
    }

    /// The error of a value that was read and does not fit what was meant. `why` must not quote a secret.
    ///
    /// # Panics
    /// If there is no such setting: a mistake of ours.
    pub fn refuse(&self, key: &str, why: impl Into<String>) -> ConfigError {
        let setting = self.settings.iter().find(|setting| setting.key == key);
        let setting = setting.unwrap_or_else(|| panic!("no setting is called {key}"));
        ConfigError::Bad { key: key.into(), origin: setting.source.clone(), why: why.into() }
    }
}

fn to_dict(values: &impl Serialize) -> Dict {
    let value = Value::serialize(values).unwrap_or_else(|error| panic!("settings serialise: {error}"));
    value.into_dict().expect("settings are a struct or a map")
}

/// All values that are not structs, with their keys.
fn leaves(values: &Dict) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for (key, value) in values {
        match value {
            Value::Dict(_, inner) if !inner.is_empty() => {
                all.extend(leaves(inner).into_iter().map(|(below, value)| (format!("{key}.{below}"), value)));
            }
            _ => all.push((key.clone(), value.clone())),
        }
    }
    all
}

/// A flag that was not given serialises as nothing, which must not hide a weaker layer's value.
fn without_absent(values: Dict) -> Dict {
    let keep = |(key, value): (String, Value)| match value {
        Value::Empty(..) => None,
        Value::Dict(tag, inner) => Some((key, Value::Dict(tag, without_absent(inner)))),
        value => Some((key, value)),
    };
    values.into_iter().filter_map(keep).collect()
}

fn insert(values: &mut Dict, path: &[String], value: Value) {
    match path {
        [] => {}
        [last] => drop(values.insert(last.clone(), value)),
        [first, rest @ ..] => {
            let below = values.entry(first.clone()).or_insert_with(|| Value::from(Dict::new()));
            if let Value::Dict(_, below) = below {
                insert(below, rest, value);
            }
        }
    }
}

/// A value in TOML. `None` for no value.
fn shown(value: &Value) -> Option<String> {
    match value {
        Value::Empty(..) => None,
        // JSON's scalars and arrays are TOML's.
        other => Some(serde_json::to_string(other).expect("a value of settings is plain data")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use serde::Deserialize;

    use super::*;

    #[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        name: Option<String>,
        queue_max: u32,
        temperature: f64,
        peers: Vec<String>,
        log: Log,
        token: Option<String>,
    }

    #[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Log {
        filter: String,
        format: Format,
    }

    #[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Format {
        Text,
        Json,
    }

    fn defaults() -> Raw {
        let log = Log { filter: "info".into(), format: Format::Text };
        Raw { name: None, queue_max: 64, temperature: 1.0, peers: vec![], log, token: None }
    }

    fn layers() -> Layers<Raw> {
        Layers::new(&defaults(), &["token"])
    }

    fn env(vars: &[(&str, &str)]) -> Result<Layers<Raw>, ConfigError> {
        layers().env(vars.iter().map(|(name, text)| (name.into(), text.into())), &["PETEK_BIN"])
    }

    fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[track_caller]
    fn line<T>(result: Result<T, ConfigError>) -> String {
        result.err().expect("is refused").to_string()
    }

    #[test]
    fn a_group_may_leave_its_name_out_of_its_flags() {
        let source = |layers: Layers<Raw>| {
            let flags = Map::from([("log", Map::from([("filter", "warn")]))]);
            let config = layers.flags(&flags).read().unwrap();
            config.settings().iter().find(|setting| setting.key == "log.filter").unwrap().source.clone()
        };
        assert_eq!(source(layers()), Source::Flag("--log-filter".into()));
        assert_eq!(source(layers().short_flags(&["log"])), Source::Flag("--filter".into()));
        assert_eq!(source(layers().short_flags(&["lo"])), Source::Flag("--log-filter".into()));
    }

    #[test]
    fn the_strongest_layer_wins_and_is_remembered() {
        #[derive(Serialize)]
        struct Flags {
            queue_max: Option<u32>,
            name: Option<String>,
        }
        let (_dir, path) = file("petek.toml", "queue_max = 3\npeers = [\"a\"]\n[log]\nfilter = \"warn\"\n");
        let config = layers()
            .model(Path::new("generation_config.json"), &Map::from([("temperature", 0.7)]))
            .unwrap()
            .file(&path)
            .unwrap()
            .env([("PETEK_QUEUE_MAX".into(), "4".into()), ("HOME".into(), "x".into())], &[])
            .unwrap()
            .flags(&Flags { queue_max: Some(5), name: None })
            .read()
            .unwrap();

        let expected = Raw {
            queue_max: 5,
            temperature: 0.7,
            peers: vec!["a".into()],
            log: Log { filter: "warn".into(), format: Format::Text },
            ..defaults()
        };
        assert_eq!(config.raw, expected);
        let source = |key: &str| config.settings().iter().find(|s| s.key == key).unwrap().source.clone();
        assert_eq!(source("queue_max"), Source::Flag("--queue-max".into()));
        assert_eq!(source("temperature"), Source::Model("generation_config.json".into()));
        assert_eq!(source("log.filter"), Source::File(path.clone()));
        assert_eq!(source("log.format"), Source::Default);
        assert_eq!(source("name"), Source::Default);
        assert_eq!(
            config.refuse("queue_max", "is odd").to_string(),
            "settings: queue_max (flag --queue-max): is odd"
        );
    }

    #[test]
    fn what_is_printed_reads_back_and_keeps_secrets() {
        let config =
            env(&[("PETEK_TOKEN", "hunter2"), ("PETEK_LOG__FILTER", "a \"b\"")]).unwrap().read().unwrap();
        let printed = config.print();
        assert!(!printed.contains("hunter2"), "{printed}");
        let lines: Vec<&str> = printed.lines().map(str::trim_end).collect();
        assert_eq!(
            lines,
            [
                "log.filter = \"a \\\"b\\\"\"  # environment PETEK_LOG__FILTER",
                "log.format = \"text\"     # default",
                "# name = (none)         # default",
                "peers = []              # default",
                "queue_max = 64          # default",
                "temperature = 1.0       # default",
                "# token = (secret)      # environment PETEK_TOKEN",
            ]
        );
        let (_dir, path) = file("petek.toml", &printed);
        let again = layers().file(&path).unwrap().read().unwrap();
        assert_eq!(again.raw, Raw { token: None, ..config.raw });
    }

    #[test]
    fn variables_are_text_where_text_fits() {
        let vars = [
            ("PETEK_NAME", "007"),
            ("PETEK_LOG__FILTER", "true"),
            ("PETEK_TEMPERATURE", "0"),
            ("PETEK_PEERS", "[a, b]"),
            ("PETEK_LOG__FORMAT", "json"),
            ("PETEK_BIN", "not a setting"),
        ];
        let raw = env(&vars).unwrap().read().unwrap().raw;
        assert_eq!((raw.name.as_deref(), raw.log.filter.as_str()), (Some("007"), "true"));
        assert_eq!((raw.temperature, raw.log.format), (0.0, Format::Json));
        assert_eq!(raw.peers, ["a", "b"]);
    }

    #[test]
    fn unknown_keys_are_named_with_their_source() {
        assert_eq!(
            line(env(&[("PETEK_QUEUE", "1")])),
            "settings: unknown key `queue` (environment PETEK_QUEUE)"
        );
        let (_dir, path) = file("petek.json", r#"{"log": {"filtre": "info"}}"#);
        let expected = format!("settings: unknown key `log.filtre` (file {})", path.display());
        assert_eq!(line(layers().file(&path)), expected);

        let link = env(&[("PETEK_SERVICE_HOST", "10.0.0.1")]).err().unwrap();
        assert!(Failure::from(link).to_string().contains("enableServiceLinks"));
    }

    #[test]
    fn bad_values_are_named_with_their_source() {
        let read = |vars: &[(&str, &str)]| line(env(vars).and_then(Layers::read));
        let bad = read(&[("PETEK_QUEUE_MAX", "many")]);
        assert!(bad.starts_with("settings: queue_max (environment PETEK_QUEUE_MAX): "), "{bad}");
        assert!(bad.contains("\"many\"") && bad.contains("u32"), "{bad}");
        assert!(read(&[("PETEK_QUEUE_MAX", "-1")]).contains("queue_max"));
        assert!(read(&[("PETEK_QUEUE_MAX", "4294967296")]).contains("queue_max"));
        assert!(read(&[("PETEK_LOG__FORMAT", "xml")]).contains("log.format (environment PETEK_LOG__FORMAT)"));
        let not_text = OsString::from_vec(vec![0xff]);
        let not_text =
            layers().env([("PETEK_NAME".into(), not_text.clone()), (not_text.clone(), not_text)], &[]);
        assert_eq!(line(not_text), "settings: name (environment PETEK_NAME): the value is not UTF-8");
        assert!(read(&[("PETEK_LOG", "3")]).contains("log (environment PETEK_LOG)"));

        let (_dir, path) = file("petek.toml", "token = 99887766");
        let secret = line(layers().file(&path).and_then(Layers::read));
        assert!(secret.contains("token (file ") && !secret.contains("99887766"), "{secret}");
        assert_eq!(
            Failure::from(layers().file(Path::new("none.toml")).err().unwrap()).exit(),
            Exit::Configuration
        );
    }

    #[test]
    fn files_that_are_no_settings_are_refused() {
        for (name, text) in
            [("a.toml", "queue_max ="), ("a.json", "{"), ("a.json", "[1]"), ("a.toml", "\u{0}")]
        {
            let (_dir, path) = file(name, text);
            assert!(line(layers().file(&path)).starts_with("settings: /"), "{text}");
        }
        let (_dir, path) = file("a.toml", &"#".repeat(FILE_BYTES_MAX as usize + 1));
        assert!(line(layers().file(&path)).contains("larger"));
    }
}
