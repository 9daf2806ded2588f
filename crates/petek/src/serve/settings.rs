//! The settings of the processes that serve: as typed, with their defaults, and the flags that set the common ones.
//!
//! Every key can be set in a file (`--config`) and in the environment; flags exist for what people change. See
//! [`petek_service::Layers`] for which wins.

use std::path::PathBuf;

use clap::Args;
use petek_core::limits::engine;
use petek_router::RouterSettings;
use petek_service::{Config, Failure, Layers, TelemetrySettings};
use petek_worker::WorkerSettings;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::ports;

/// Variables that begin with `PETEK_` and are no settings of a server: those of the client's commands, and of the tests.
const NOT_SETTINGS: [&str; 6] =
    ["PETEK_ENDPOINT", "PETEK_ADMIN", "PETEK_BIN", "PETEK_ETCD", "PETEK_REAL_MODEL", "PETEK_TRACES"];
const CLUSTER: &str = "default";
/// Groups whose flags do without the group's name.
const SHORT_FLAGS: &[&str] = &["engine"];

/// The settings of `petek worker`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WorkerProcess {
    /// The model's folder.
    pub(crate) model: Option<PathBuf>,
    pub(crate) engine: EngineSettings,
    /// Its id in the cluster; by default the address that it is reached at.
    pub(crate) id: Option<String>,
    pub(crate) listen: String,
    /// Where routers reach it, `host:port`, the best first; by default where it listens.
    pub(crate) advertise: Vec<String>,
    /// Where metrics and health are served.
    pub(crate) ops: String,
    /// Where the real addresses are written, as JSON.
    pub(crate) endpoints_file: Option<PathBuf>,
    /// Whether it may listen beyond this machine without keys, certificates or a cluster token.
    pub(crate) insecure: bool,
    /// The cluster's name in the registry.
    pub(crate) cluster: String,
    /// What routers show to workers.
    pub(crate) cluster_token: Option<String>,
    /// A file that holds it.
    pub(crate) cluster_token_file: Option<PathBuf>,
    pub(crate) etcd: EtcdSettings,
    pub(crate) log: TelemetrySettings,
    pub(crate) worker: WorkerSettings,
}

/// The settings of `petek router`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RouterProcess {
    pub(crate) listen: String,
    pub(crate) admin: String,
    /// Where metrics and health are served.
    pub(crate) ops: String,
    /// Where the real addresses are written, as JSON.
    pub(crate) endpoints_file: Option<PathBuf>,
    /// Whether it may listen beyond this machine without keys, certificates or a cluster token.
    pub(crate) insecure: bool,
    /// The cluster's name in the registry.
    pub(crate) cluster: String,
    /// What routers show to workers.
    pub(crate) cluster_token: Option<String>,
    /// A file that holds it.
    pub(crate) cluster_token_file: Option<PathBuf>,
    pub(crate) etcd: EtcdSettings,
    pub(crate) log: TelemetrySettings,
    pub(crate) router: RouterSettings,
}

/// The settings of `petek up`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct UpProcess {
    /// The model's folder; none: the demo model.
    pub(crate) model: Option<PathBuf>,
    pub(crate) workers: usize,
    pub(crate) engine: EngineSettings,
    pub(crate) listen: String,
    pub(crate) admin: String,
    /// Where metrics and health are served.
    pub(crate) ops: String,
    /// Where the real addresses are written, as JSON.
    pub(crate) endpoints_file: Option<PathBuf>,
    /// Whether it may listen beyond this machine without keys, certificates or a cluster token.
    pub(crate) insecure: bool,
    pub(crate) log: TelemetrySettings,
    pub(crate) router: RouterSettings,
    pub(crate) worker: WorkerSettings,
}

/// What an engine serves and how much of the machine it gets.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EngineSettings {
    /// What clients call the model; by default its folder's name.
    pub(crate) name: Option<String>,
    /// What else they may call it.
    pub(crate) aliases: Vec<String>,
    /// f32, bf16 or f16; by default the one that the weights are stored in.
    pub(crate) dtype: Option<String>,
    /// Tensor-parallel ranks. 0: one.
    pub(crate) tp: usize,
    /// Compute threads of all ranks. 0: one for each core.
    pub(crate) threads: usize,
    /// Tokens that prompt and output may have together. 0: what the model can.
    pub(crate) context: usize,
    /// Tokens per block of the KV cache. 0: 32.
    pub(crate) block_size: u32,
    /// Bytes of the KV cache, such as 8GiB, or a share of the free memory, such as 25%.
    pub(crate) kv_memory: Option<String>,
    /// Sequences that run at once. 0: 256, or fewer where the cache holds fewer blocks.
    pub(crate) slots: u32,
    /// Rows of a step. 0: 512.
    pub(crate) step_rows: u32,
    /// Requests that wait; one more is refused. 0: 1,024.
    pub(crate) queue: usize,
    /// on or off.
    pub(crate) prefix_cache: OnOff,
    /// Whether the model's generation_config.json says what clients get by default.
    pub(crate) generation_config: GenerationConfig,
}

/// A switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnOff {
    #[default]
    On,
    Off,
}

/// See [`EngineSettings::generation_config`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GenerationConfig {
    /// Defaults of sampling are those of generation_config.json, where the model has it.
    #[default]
    Model,
    /// They are petek's own.
    None,
}

/// How etcd is reached.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EtcdSettings {
    /// `host:port`, several of one etcd.
    pub(crate) endpoints: Vec<String>,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) password_file: Option<PathBuf>,
    /// Certificates that vouch for etcd's, and our own with its key: PEM files.
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    /// The name in etcd's certificate, where it is not the host's.
    pub(crate) domain: Option<String>,
    /// How long to wait for etcd at the start; none: for ever.
    pub(crate) wait_s: Option<u64>,
    /// How long a worker's record outlives its last sign of life. 0: 10 s.
    pub(crate) lease_ttl_s: u64,
}

impl Default for WorkerProcess {
    fn default() -> Self {
        WorkerProcess {
            model: None,
            engine: EngineSettings::default(),
            id: None,
            listen: local(ports::WORKER),
            advertise: Vec::new(),
            ops: local(ports::OPS),
            endpoints_file: None,
            insecure: false,
            cluster: CLUSTER.into(),
            cluster_token: None,
            cluster_token_file: None,
            etcd: EtcdSettings::default(),
            log: TelemetrySettings::default(),
            worker: WorkerSettings::default(),
        }
    }
}

impl Default for RouterProcess {
    fn default() -> Self {
        RouterProcess {
            listen: local(ports::PUBLIC),
            admin: local(ports::ADMIN),
            ops: local(ports::OPS),
            endpoints_file: None,
            insecure: false,
            cluster: CLUSTER.into(),
            cluster_token: None,
            cluster_token_file: None,
            etcd: EtcdSettings::default(),
            log: TelemetrySettings::default(),
            router: RouterSettings::default(),
        }
    }
}

impl Default for UpProcess {
    fn default() -> Self {
        UpProcess {
            model: None,
            workers: 2,
            engine: EngineSettings::default(),
            listen: local(ports::PUBLIC),
            admin: local(ports::ADMIN),
            ops: local(ports::OPS),
            endpoints_file: None,
            insecure: false,
            log: TelemetrySettings { filter: "warn".into(), ..TelemetrySettings::default() },
            router: RouterSettings::default(),
            worker: WorkerSettings::default(),
        }
    }
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

impl EngineSettings {
    /// Tokens per block.
    pub(crate) fn block_size(&self) -> u32 {
        or_default(self.block_size, engine::BLOCK_TOKENS_CPU)
    }
}

/// A setting whose 0 means "the default".
pub(crate) fn or_default<T: Default + PartialEq>(value: T, default: T) -> T {
    if value == T::default() { default } else { value }
}

/// Flags of [`EngineSettings`].
#[derive(Args, Clone, Debug, Default, Serialize)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineFlags {
    /// What clients call the model; by default its folder's name
    #[arg(long)]
    name: Option<String>,
    /// What else they may call it
    #[arg(long = "alias", value_name = "NAME")]
    aliases: Option<Vec<String>>,
    /// The format to compute in: f32, bf16 or f16; by default the one that the weights are stored in
    #[arg(long)]
    dtype: Option<String>,
    /// Tensor-parallel ranks, as groups of threads
    #[arg(long, value_name = "N")]
    tp: Option<usize>,
    /// Compute threads of each worker; by default one for each core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tokens that prompt and output may have together; by default what the model can
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Tokens per block of the KV cache: a power of two, 16 to 256
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<u32>,
    /// Memory of the KV cache: bytes (8GiB) or a share of what is free (25%)
    #[arg(long, value_name = "SIZE")]
    kv_memory: Option<String>,
    /// Sequences that run at once
    #[arg(long, value_name = "N")]
    slots: Option<u32>,
    /// Rows of a step: prompt tokens in chunks, and one per running sequence
    #[arg(long, value_name = "N")]
    step_rows: Option<u32>,
    /// Requests that wait; one more is refused
    #[arg(long, value_name = "N")]
    queue: Option<usize>,
    /// Whether prompts share what the KV cache holds of them
    #[arg(long)]
    prefix_cache: Option<OnOff>,
    /// Where defaults of sampling come from: the model's generation_config.json, or none of it
    #[arg(long)]
    generation_config: Option<GenerationConfig>,
}

/// Flags that every serving process has, but for those that are no settings: see [`Common`].
#[derive(Args, Clone, Debug, Default, Serialize)]
#[command(next_help_heading = "Process")]
pub(crate) struct ProcessFlags {
    /// Where metrics and health are served
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) ops: Option<String>,
    /// Write the real addresses there, as JSON, once they are known
    #[arg(long, value_name = "FILE")]
    endpoints_file: Option<PathBuf>,
    /// Listen beyond this machine without keys, certificates or a cluster token
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    insecure: Option<bool>,
    #[command(flatten)]
    log: LogFlags,
}

#[derive(Args, Clone, Debug, Default, Serialize)]
struct LogFlags {
    /// What is logged: a level, or target=level pairs joined by commas
    #[arg(long = "log-filter", alias = "log", value_name = "FILTER")]
    filter: Option<String>,
    /// text or json
    #[arg(long = "log-format", value_name = "FORMAT")]
    format: Option<String>,
    /// Where spans are sent over gRPC
    #[arg(long = "log-otlp-endpoint", alias = "otlp", value_name = "URL")]
    otlp_endpoint: Option<String>,
}

/// Where settings are read from, and whether they are only shown.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Settings")]
pub(crate) struct Common {
    /// A file of settings, TOML or JSON; flags and PETEK_… variables are stronger
    #[arg(long, value_name = "FILE", env = "PETEK_CONFIG")]
    config: Option<PathBuf>,
    /// Print every setting with its value and where it came from, and exit
    #[arg(long)]
    print_config: bool,
}

/// Flags of a process that is one of a cluster.
#[derive(Args, Clone, Debug, Default, Serialize)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct ClusterFlags {
    /// The cluster's name in the registry
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// A file that holds the token which routers show to workers
    #[arg(long, value_name = "FILE")]
    cluster_token_file: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
}

#[derive(Args, Clone, Debug, Default, Serialize)]
struct EtcdFlags {
    /// etcd's addresses, host:port, joined by commas
    #[arg(long = "etcd-endpoints", visible_alias = "etcd", value_name = "HOST:PORT", value_delimiter = ',')]
    endpoints: Option<Vec<String>>,
    /// etcd's user; its password comes from PETEK_ETCD__PASSWORD or a file
    #[arg(long = "etcd-user", value_name = "NAME")]
    user: Option<String>,
    /// A file that holds the password
    #[arg(long = "etcd-password-file", value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Certificates that vouch for etcd's, PEM
    #[arg(long = "etcd-ca", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Our own certificate for etcd, PEM
    #[arg(long = "etcd-cert", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long = "etcd-key", value_name = "FILE")]
    key: Option<PathBuf>,
    /// The name in etcd's certificate, where it is not the host's
    #[arg(long = "etcd-domain", value_name = "NAME")]
    domain: Option<String>,
    /// Seconds to wait for etcd at the start; by default for ever
    #[arg(long = "etcd-wait-s", visible_alias = "etcd-wait", value_name = "SECONDS")]
    wait_s: Option<u64>,
}

/// A process's settings; none where they were only to be shown.
///
/// # Errors
/// As [`read`].
pub(crate) fn configured<T: Default + Serialize + DeserializeOwned>(
    flags: &impl Serialize,
    common: &Common,
    secrets: &[&'static str],
) -> Result<Option<Config<T>>, Failure> {
    let config = read(flags, common, secrets)?;
    if common.print_config {
        crate::print_part(&config.print());
        return Ok(None);
    }
    Ok(Some(config))
}

/// Puts the layers together: defaults, file, environment, flags.
///
/// # Errors
/// A key that nobody knows or a value that does not fit, with where it stands.
fn read<T: Default + Serialize + DeserializeOwned>(
    flags: &impl Serialize,
    common: &Common,
    secrets: &[&'static str],
) -> Result<Config<T>, Failure> {
    let mut layers = Layers::new(&T::default(), secrets).short_flags(SHORT_FLAGS);
    if let Some(path) = &common.config {
        layers = layers.file(path)?;
    }
    let not_settings = [&NOT_SETTINGS[..], &["PETEK_CONFIG"]].concat();
    Ok(layers.env(std::env::vars_os(), &not_settings)?.flags(flags).read()?)
}
