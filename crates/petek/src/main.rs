//! The `petek` command: one file per subcommand, arguments checked here, work done elsewhere.

mod serve;

mod complete;

mod card;
mod demo;

mod bench_step;

mod chat;
mod generate;
mod models;
mod routes;
mod workers;

mod answer;
mod client;
mod json;
mod output;
mod ports;
mod request;
mod table;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use petek_device::ops::Format;
use petek_service::{Failure, limit_core_dumps};

/// Serves decoder-only language models on a cluster.
#[derive(Parser, Debug)]
#[command(name = "petek", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Up(Box<serve::up::Up>),
    Worker(Box<serve::worker::Worker>),
    Router(Box<serve::router::Router>),
    Generate(generate::Generate),
    Chat(chat::Chat),
    Models(models::Models),
    Workers(workers::Workers),
    #[command(subcommand)]
    Routes(routes::Routes),
    Complete(complete::Complete),
    /// Measures this machine and a model on it.
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Subcommand, Debug)]
enum Bench {
    Step(bench_step::BenchStep),
}

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even this cannot be written, the exit code is left.
            let _ = writeln!(std::io::stderr(), "petek: {failure}");
            failure.exit_code()
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    limit_core_dumps()?;
    match command {
        Command::Up(up) => up.run(),
        Command::Worker(worker) => worker.run(),
        Command::Router(router) => router.run(),
        Command::Generate(generate) => generate.run(),
        Command::Chat(chat) => chat.run(),
        Command::Models(models) => models.run(),
        Command::Workers(workers) => workers.run(),
        Command::Routes(routes) => routes.run(),
        Command::Complete(complete) => complete.run(),
        Command::Bench(Bench::Step(bench)) => bench.run(),
    }
}

/// The format of a `--dtype`.
fn format_of(text: &str) -> Result<Format, String> {
    [Format::F32, Format::Bf16, Format::F16]
        .into_iter()
        .find(|format| format.name() == text)
        .ok_or_else(|| "f32, bf16 or f16 is needed".to_owned())
}

/// A warning, to standard error.
fn print_warning(text: &str) {
    let _ = writeln!(std::io::stderr(), "petek: warning: {text}");
}

/// Text to standard output as it comes.
fn print_part(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// One line to standard output; a reader that has gone away is no error.
fn print_line(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}
