//! `petek router`: text in, text out, for the workers that etcd knows.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::Args;
use petek_cluster::{Cluster, RegistryError, ViewOptions};
use petek_router::{Listeners, Router as Service};
use petek_service::{Config, Exit, Failure, Ops, Readiness, Registry, RouterMetrics, Shutdown, Telemetry};
use serde::Serialize;
use serde_json::json;

use super::process::{address_of, check_reach, etcd, listen, random, runtime, secret, write_endpoints};
use super::settings::{ClusterFlags, Common, ProcessFlags, RouterProcess, configured};

/// Takes requests of clients and spreads them over the workers of a cluster
#[derive(Args, Debug)]
pub(crate) struct Router {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug, Serialize)]
struct Flags {
    /// Where it listens for clients
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where it listens for operators' commands
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    cluster: ClusterFlags,
    #[command(flatten)]
    #[serde(flatten)]
    process: ProcessFlags,
}

impl Router {
    /// Serves until a signal ends it, or the registry refuses us.
    ///
    /// # Errors
    /// What a person can mend.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let shutdown = Shutdown::install()?;
        match configured(&self.flags, &self.common, &["cluster_token", "etcd.password"])? {
            Some(config) => runtime()?.block_on(serve(config, shutdown)),
            None => Ok(()),
        }
    }
}

async fn serve(config: Config<RouterProcess>, shutdown: Shutdown) -> Result<(), Failure> {
    let settings = config.raw.clone();
    let telemetry = Telemetry::start(&settings.log, "petek-router", &settings.listen)?;
    config.log();
    settings.router.check().map_err(|(key, why)| config.refuse(&format!("router.{key}"), why))?;
    let cluster =
        Cluster::new(&settings.cluster).map_err(|error| config.refuse("cluster", error.to_string()))?;
    let token =
        secret("cluster_token", settings.cluster_token.as_ref(), settings.cluster_token_file.as_ref())?;
    let (registry, times, wait) = etcd(&settings.etcd).await?;

    let metrics = Registry::new();
    let readiness = Readiness::new(shutdown.clone());
    let ops = Ops::bind(&settings.ops).await?;
    let listeners = Listeners {
        public: listen(&settings.listen, "clients").await?,
        admin: listen(&settings.admin, "operators' commands").await?,
    };
    check_reach(address_of(&listeners.public)?, settings.insecure, "")?;
    check_reach(address_of(&listeners.admin)?, settings.insecure, "")?;
    let endpoints = BTreeMap::from([
        ("public", json!(address_of(&listeners.public)?.to_string())),
        ("admin", json!(address_of(&listeners.admin)?.to_string())),
        ("ops", json!(ops.address().to_string())),
    ]);
    write_endpoints(settings.endpoints_file.as_deref(), endpoints)?;
    tokio::spawn(ops.serve(metrics.clone(), readiness.clone()));
    readiness.waits_for("a worker");

    let router_metrics = Arc::new(RouterMetrics::new(&metrics));
    let events_max = settings.router.registry_queue;
    let options = ViewOptions { times, wait, events_max, ..ViewOptions::new(cluster, random()?) };
    let (feed, following) = petek_router::follow(registry, options, router_metrics.clone());
    let router =
        Service::start(settings.router, token.as_deref(), feed, listeners, router_metrics, shutdown.clone())?;
    shutdown.serving();
    tracing::info!(public = %router.public_address(), admin = %router.admin_address(), "listening");
    let ready = async {
        router.ready().await;
        readiness.ready();
        std::future::pending::<()>().await;
    };
    let failed = tokio::select! {
        () = ready => None,
        () = shutdown.draining() => None,
        error = following => Some(error),
    };
    let ended = match failed {
        None => {
            router.stopped().await;
            Ok(())
        }
        Some(Ok(error)) => Err(registry_failure(&error)),
        Some(Err(error)) => Err(Failure::new(Exit::Fault, format!("follow the registry: {error}"), "")),
    };
    telemetry.stop().await;
    ended
}

fn registry_failure(error: &RegistryError) -> Failure {
    let hint = match error {
        RegistryError::Denied { .. } => "check user, password and certificates",
        _ => "check --etcd, or wait longer with --etcd-wait",
    };
    Failure::new(Exit::Environment, error.to_string(), hint)
}
