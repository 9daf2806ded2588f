//! `petek worker`: one replica of a model, registered in etcd.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use petek_cluster::Cluster;
use petek_service::{Config, Exit, Failure, Ops, Readiness, Registry, Shutdown, Telemetry, WorkerMetrics};
use petek_worker::{RegistrationSettings, Worker as Service};
use serde::Serialize;
use serde_json::json;

use super::engine::{self, Share};
use super::process::{address_of, check_reach, etcd, listen, runtime, secret, write_endpoints};
use super::settings::{
    ClusterFlags, Common, EngineFlags, ProcessFlags, WorkerProcess, configured, or_default,
};

/// The share of the free memory that the KV cache gets where nothing is said.
const KV_SHARE_DEFAULT: f64 = 0.25;

/// Serves one replica of a model to the routers of a cluster
#[derive(Args, Debug)]
pub(crate) struct Worker {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug, Serialize)]
struct Flags {
    /// The model: a Hugging Face folder of the Llama family
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Where it listens for routers
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where routers reach it, if that is elsewhere than where it listens; the best first
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    advertise: Option<Vec<String>>,
    /// Its id in the cluster; by default the address that it is reached at
    #[arg(long)]
    id: Option<String>,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    #[serde(flatten)]
    cluster: ClusterFlags,
    #[command(flatten)]
    #[serde(flatten)]
    process: ProcessFlags,
}

impl Worker {
    /// Serves until a signal, an operator or a fault ends it.
    ///
    /// # Errors
    /// What a person can mend, before it serves; what broke, after.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let shutdown = Shutdown::install()?;
        match configured(&self.flags, &self.common, &["cluster_token", "etcd.password"])? {
            Some(config) => runtime()?.block_on(serve(config, shutdown)),
            None => Ok(()),
        }
    }
}

async fn serve(config: Config<WorkerProcess>, shutdown: Shutdown) -> Result<(), Failure> {
    let settings = config.raw.clone();
    let telemetry = Telemetry::start(&settings.log, "petek-worker", settings.id.as_deref().unwrap_or(""))?;
    config.log();
    let Some(dir) = settings.model.clone() else {
        let hint = "give --model a Hugging Face folder; `petek up` has a demo model of its own";
        return Err(Failure::new(Exit::Configuration, "no model is given", hint));
    };
    settings.worker.check().map_err(|(key, why)| config.refuse(&format!("worker.{key}"), why))?;
    let cluster =
        Cluster::new(&settings.cluster).map_err(|error| config.refuse("cluster", error.to_string()))?;
    let token =
        secret("cluster_token", settings.cluster_token.as_ref(), settings.cluster_token_file.as_ref())?;
    let (registry, times, wait) = etcd(&settings.etcd).await?;

    let metrics = Registry::new();
    let readiness = Readiness::new(shutdown.clone());
    let ops = Ops::bind(&settings.ops).await?;
    let listener = listen(&settings.listen, "routers").await?;
    let (address, ops_address) = (address_of(&listener)?, ops.address());
    let guard = "give the cluster a token (--cluster-token-file), ";
    check_reach(address, settings.insecure || token.is_some(), guard)?;
    let advertised = advertised(&settings.advertise, address)?;
    let id = settings.id.clone().unwrap_or_else(|| advertised[0].clone());
    let endpoints = BTreeMap::from([
        ("worker", json!(address.to_string())),
        ("ops", json!(ops_address.to_string())),
        ("id", json!(id)),
    ]);
    write_endpoints(settings.endpoints_file.as_deref(), endpoints)?;
    tokio::spawn(ops.serve(metrics.clone(), readiness.clone()));

    readiness.waits_for("loading the model");
    let engine = settings.engine.clone();
    let for_load = id.clone();
    let load = move || {
        let served = engine::open(Some(&dir), &engine)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let share = Share {
            threads: or_default(engine.threads, cores),
            threads_beside: 0,
            kv_bytes: served.kv_bytes(&engine, KV_SHARE_DEFAULT, 1)?,
            contexts_max: usize::MAX,
        };
        served.worker(for_load, &engine, share)
    };
    let parts = tokio::task::spawn_blocking(load).await.map_err(fault)??;

    readiness.waits_for("etcd");
    let worker_metrics = Arc::new(WorkerMetrics::new(&metrics, &id, &parts.name));
    let registration = RegistrationSettings { registry, cluster, times, wait };
    let worker = Service::start(
        settings.worker,
        parts,
        token.as_deref(),
        listener,
        advertised,
        registration,
        worker_metrics,
        shutdown,
    )
    .await?;
    worker.ready().await;
    readiness.ready();
    tracing::info!(worker = id, %address, "serving");
    let ended = worker.stopped().await;
    telemetry.stop().await;
    ended
}

/// Where routers are told to come.
fn advertised(given: &[String], address: SocketAddr) -> Result<Vec<String>, Failure> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    if address.ip().is_unspecified() {
        let what = format!("it listens on {address}, which says not where routers reach it");
        return Err(Failure::new(Exit::Configuration, what, "say --advertise host:port"));
    }
    Ok(vec![address.to_string()])
}

fn fault(error: tokio::task::JoinError) -> Failure {
    Failure::new(Exit::Fault, format!("load the model: {error}"), "")
}
