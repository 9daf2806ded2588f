//! The smallest process of this house: all that goes around the work, and a line of input in place of the work.
//! It says on standard output how far it is. `tests/process.rs` plays with it.

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::process::ExitCode;

use petek_service::{
    Config, Failure, Layers, Ops, Readiness, Registry, RouterMetrics, Shutdown, Telemetry, TelemetrySettings,
    limit_core_dumps,
};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    ops_listen: String,
    log: TelemetrySettings,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("process: {failure}");
            failure.exit_code()
        }
    }
}

fn run() -> Result<(), Failure> {
    let shutdown = Shutdown::install()?;
    limit_core_dumps()?;
    let defaults = Settings { ops_listen: "127.0.0.1:0".into(), log: TelemetrySettings::default() };
    let config = Layers::new(&defaults, &[]).env(std::env::vars_os(), &["PETEK_BIN"])?.read()?;

    // As a model loads: on the main thread, deaf to everything.
    println!("loading");
    read_line();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("make a runtime").block_on(serve(config, shutdown))
}

async fn serve(config: Config<Settings>, shutdown: Shutdown) -> Result<(), Failure> {
    let telemetry = Telemetry::start(&config.raw.log, "petek-process", "p1")?;
    config.log();
    let registry = Registry::new();
    let metrics = RouterMetrics::new(&registry);
    let readiness = Readiness::new(shutdown.clone());
    let ops = Ops::bind(&config.raw.ops_listen).await?;
    println!("ops {}", ops.address());
    tokio::spawn(ops.serve(registry, readiness.clone()));

    shutdown.serving();
    readiness.ready();
    println!("serving");
    metrics.streams_open.set(1);
    shutdown.draining().await;

    println!("draining");
    tokio::task::spawn_blocking(read_line).await.expect("the work ends");
    metrics.streams_open.set(0);
    telemetry.stop().await;
    Ok(())
}

/// Blocks until a line, or the end, of standard input.
fn read_line() {
    std::io::stdin().read_line(&mut String::new()).expect("read standard input");
}
