//! The tasks of this house: `cargo xtask TASK`. Standard library only, so that it starts in two seconds on a
//! clean machine. One file per task; a task is a function from its arguments to a result.

mod lint;
mod real_model;
mod test;
mod tools;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What a task gives back: `Err` is one line that says what failed and what to do.
pub(crate) type TaskResult = Result<(), String>;

struct Task {
    name: &'static str,
    help: &'static str,
    run: fn(&[String]) -> TaskResult,
}

const TASKS: &[Task] = &[
    Task { name: "test", help: test::HELP, run: test::run },
    Task { name: "lint", help: lint::HELP, run: lint::run },
    Task { name: "real-model", help: real_model::HELP, run: real_model::run },
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(task) = TASKS.iter().find(|task| args.first().is_some_and(|name| name == task.name)) else {
        eprintln!("usage: cargo xtask TASK");
        for task in TASKS {
            eprintln!("  {:<12} {}", task.name, task.help);
        }
        return ExitCode::from(2);
    };
    match (task.run)(&args[1..]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("xtask {}: {line}", task.name);
            ExitCode::FAILURE
        }
    }
}

/// The repository's root: this crate lies two folders below it.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two folders below").to_path_buf()
}

/// Where cargo builds: `target/`, or where the user's `CARGO_TARGET_DIR` points.
pub(crate) fn target_dir() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// True on a CI machine, where a skipped check is a failure.
pub(crate) fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}

/// A cargo command in the repository's root. What `cargo run` adds to the environment of this very process is
/// taken away again: some build scripts (ring's) watch those variables, and would build everything twice.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_BIN_", "CARGO_CRATE_"].iter().any(|p| text.starts_with(p))
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command, its output going where ours goes.
pub(crate) fn call(mut command: Command) -> TaskResult {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{}` ended with {status}", shown(&command))),
        Err(error) => Err(format!("start `{}`: {error}", shown(&command))),
    }
}

/// A command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
