//! `petek up`: a whole cluster in one process, to try petek with no server to start. Router and workers speak over loopback
//! as they would between machines; only the registry is in memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use petek_cluster::{Cluster, MemoryRegistry, Times, ViewOptions, Wait};
use petek_router::{Listeners, Router};
use petek_service::{
    Config, Exit, Failure, Ops, Readiness, Registry, RouterMetrics, Shutdown, Telemetry, WorkerMetrics,
};
use petek_worker::{RegistrationSettings, Worker};
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;

use super::engine::{self, Share};
use super::process::{address_of, check_reach, listen, random, runtime, write_endpoints};
use super::settings::{Common, EngineFlags, ProcessFlags, UpProcess, configured, or_default};
use crate::generate::Generate;
use crate::ports;

/// All workers' caches together get at most this share of the free memory.
const KV_SHARE: f64 = 0.10;
/// A cache that holds this many whole contexts is enough to try petek.
const CONTEXTS_MAX: usize = 64;
/// More workers in one process only get in each other's way.
const WORKERS_MAX: usize = 64;
const ANYWHERE: &str = "127.0.0.1:0";

/// Starts a router and workers in this process, on a small demo model unless another is given
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  petek up                              and in a second terminal: petek generate \"I have a dream\"
  petek up --once \"I have a dream\"      one answer, then exit
  petek up --model DIR --workers 1      a model of your own")]
pub(crate) struct Up {
    #[command(flatten)]
    flags: Flags,
    /// Continue this text, print it, and exit
    #[arg(long, value_name = "TEXT")]
    once: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Clone, Debug, Serialize)]
struct Flags {
    /// The model: a Hugging Face folder of the Llama family; by default the demo model inside this binary
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Workers to start
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Where it listens for clients
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where it listens for operators' commands
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    #[serde(flatten)]
    process: ProcessFlags,
}

impl Up {
    /// Serves until a signal ends it, or the one answer is there.
    ///
    /// # Errors
    /// What a person can mend, before it serves; what broke, after.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let shutdown = Shutdown::install()?;
        let mut flags = self.flags.clone();
        if self.once.is_some() {
            // Nobody else is to find it: it must not fail because another one runs.
            for address in [&mut flags.listen, &mut flags.admin, &mut flags.process.ops] {
                address.get_or_insert(ANYWHERE.into());
            }
        }
        match configured(&flags, &self.common, &[])? {
            Some(config) => runtime()?.block_on(serve(config, self.once.clone(), shutdown)),
            None => Ok(()),
        }
    }
}

async fn serve(config: Config<UpProcess>, once: Option<String>, shutdown: Shutdown) -> Result<(), Failure> {
    let settings = config.raw.clone();
    let telemetry = Telemetry::start(&settings.log, "petek", "up")?;
    config.log();
    settings.router.check().map_err(|(key, why)| config.refuse(&format!("router.{key}"), why))?;
    settings.worker.check().map_err(|(key, why)| config.refuse(&format!("worker.{key}"), why))?;
    if !(1..=WORKERS_MAX).contains(&settings.workers) {
        return Err(config.refuse("workers", format!("from 1 to {WORKERS_MAX} are needed")).into());
    }

    let metrics = Registry::new();
    let readiness = Readiness::new(shutdown.clone());
    let ops = Ops::bind(&settings.ops).await?;
    let listeners = Listeners {
        public: listen(&settings.listen, "clients").await?,
        admin: listen(&settings.admin, "operators' commands").await?,
    };
    let (public, admin) = (address_of(&listeners.public)?, address_of(&listeners.admin)?);
    check_reach(public, settings.insecure, "")?;
    check_reach(admin, settings.insecure, "")?;
    let ops_address = ops.address();
    tokio::spawn(ops.serve(metrics.clone(), readiness.clone()));

    let registry = Arc::new(MemoryRegistry::new());
    let cluster = Cluster::new("up").expect("a plain name");
    let router_metrics = Arc::new(RouterMetrics::new(&metrics));
    let events_max = settings.router.registry_queue;
    let options = ViewOptions { events_max, ..ViewOptions::new(cluster.clone(), random()?) };
    let (feed, _following) = petek_router::follow(registry.clone(), options, router_metrics.clone());
    let router =
        Router::start(settings.router.clone(), None, feed, listeners, router_metrics, shutdown.clone())?;

    readiness.waits_for("loading the model");
    let workers = start_workers(&settings, registry, cluster, &metrics).await?;
    router.ready().await;
    readiness.ready();
    shutdown.serving();

    // Whoever waits for these may ask at once.
    let addresses: Vec<String> = workers.iter().map(|(worker, _)| worker.address().to_string()).collect();
    let endpoints = BTreeMap::from([
        ("public", json!(public.to_string())),
        ("admin", json!(admin.to_string())),
        ("ops", json!(ops_address.to_string())),
        ("workers", json!(addresses)),
    ]);
    write_endpoints(settings.endpoints_file.as_deref(), endpoints)?;
    if once.is_none() {
        announce(&settings, &public.to_string(), &admin.to_string(), &ops_address.to_string());
    }
    let (running, of_workers): (Vec<Worker>, Vec<Shutdown>) = workers.into_iter().unzip();
    let mut running: JoinSet<_> = running.into_iter().map(Worker::stopped).collect();
    let answered = async {
        match once {
            Some(text) => answer(public.to_string(), text).await,
            None => std::future::pending().await,
        }
    };
    let mut ended = tokio::select! {
        answered = answered => answered,
        () = shutdown.draining() => Ok(()),
        ended = first_failure(&mut running) => ended,
    };
    // The router first: while it finishes what runs, its workers are needed.
    shutdown.drain();
    router.stopped().await;
    of_workers.iter().for_each(Shutdown::drain);
    while let Some(stopped) = running.join_next().await {
        ended = ended.and(stopped.unwrap_or_else(|error| Err(fault(error))));
    }
    telemetry.stop().await;
    ended
}

async fn start_workers(
    settings: &UpProcess,
    registry: Arc<MemoryRegistry>,
    cluster: Cluster,
    metrics: &Registry,
) -> Result<Vec<(Worker, Shutdown)>, Failure> {
    let count = settings.workers;
    let (model, engine) = (settings.model.clone(), settings.engine.clone());
    let load = move || {
        let served = engine::open(model.as_deref(), &engine)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = or_default(engine.threads, (cores / count).max(1));
        let kv_bytes = served.kv_bytes(&engine, KV_SHARE, count)?.max(if engine.kv_memory.is_none() {
            served.context_bytes(&engine)
        } else {
            0
        });
        let share =
            Share { threads, threads_beside: threads * (count - 1), kv_bytes, contexts_max: CONTEXTS_MAX };
        (0..count)
            .map(|number| served.worker(format!("worker-{number}"), &engine, share))
            .collect::<Result<Vec<_>, Failure>>()
    };
    let all = tokio::task::spawn_blocking(load).await.map_err(fault)??;
    let mut workers = Vec::with_capacity(count);
    for parts in all {
        let listener = listen(ANYWHERE, "the router").await?;
        let advertised = vec![address_of(&listener)?.to_string()];
        let worker_metrics = Arc::new(WorkerMetrics::new(metrics, &parts.identity.worker, &parts.name));
        let registration = RegistrationSettings {
            registry: registry.clone(),
            cluster: cluster.clone(),
            times: Times::default(),
            wait: Wait::Forever,
        };
        // What an operator does to one worker must not end the process: each has a shutdown of its own.
        let shutdown = Shutdown::without_signals();
        let started = Worker::start(
            settings.worker.clone(),
            parts,
            None,
            listener,
            advertised,
            registration,
            worker_metrics,
            shutdown.clone(),
        );
        workers.push((started.await?, shutdown));
    }
    for (worker, _) in &workers {
        worker.ready().await;
    }
    Ok(workers)
}

/// Waits for a worker that fails, or for the last one to be drained by an operator.
async fn first_failure(running: &mut JoinSet<Result<(), Failure>>) -> Result<(), Failure> {
    while let Some(ended) = running.join_next().await {
        ended.unwrap_or_else(|error| Err(fault(error)))?;
    }
    Ok(())
}

/// Asks the router that was just started, as `petek generate` would from a second terminal.
async fn answer(endpoint: String, text: String) -> Result<(), Failure> {
    let endpoint = endpoint.parse().map_err(|why: String| Failure::new(Exit::Fault, why, ""))?;
    let ask = move || Generate::of(endpoint, text).run();
    tokio::task::spawn_blocking(ask).await.map_err(fault)?
}

fn announce(settings: &UpProcess, public: &str, admin: &str, ops: &str) {
    let model = match &settings.model {
        Some(dir) => dir.display().to_string(),
        None => "the demo model".to_owned(),
    };
    let workers = match settings.workers {
        1 => "1 worker".to_owned(),
        count => format!("{count} workers"),
    };
    crate::print_line(&format!("petek serves {model} with {workers}. Ctrl-C ends it."));
    crate::print_line(&format!("  gRPC     {public}"));
    crate::print_line(&format!("  admin    {admin}"));
    crate::print_line(&format!("  metrics  http://{ops}/metrics"));
    crate::print_line("Try, in a second terminal:");
    let to = |default: u16, flag: &str, address: &str| {
        if address == format!("127.0.0.1:{default}") { String::new() } else { format!(" {flag} {address}") }
    };
    let (public, admin) = (to(ports::PUBLIC, "--endpoint", public), to(ports::ADMIN, "--admin", admin));
    crate::print_line(&format!("  petek generate{public} \"I have a dream\""));
    crate::print_line(&format!("  petek workers{admin}"));
}

fn fault(error: tokio::task::JoinError) -> Failure {
    Failure::new(Exit::Fault, format!("a part of this process broke: {error}"), "")
}
