//! `cargo xtask lint`: everything that reads the code without running it, warnings denied.

use std::process::Command;

use crate::{TaskResult, call, cargo, is_ci, root, tools};

pub(crate) const HELP: &str = "rustfmt, clippy, the docs and buf, warnings denied";

/// The checks, cheapest first. All build in the profile of the tests: one set of dependencies for everything.
/// Without buf its check is left out: [`tools::ensure`] has said so.
pub(crate) fn checks() -> Vec<(&'static str, Command)> {
    let clippy = ["clippy", "--release", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    let mut doc = cargo(&["doc", "--release", "--workspace", "--no-deps", "--quiet"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    let mut checks =
        vec![("fmt", cargo(&["fmt", "--all", "--check"])), ("clippy", cargo(&clippy)), ("doc", doc)];
    if root().join("proto/buf.yaml").is_file() && tools::has("buf") {
        checks.push(("buf", tools::command(&["buf", "lint", "proto"])));
    }
    checks
}

pub(crate) fn run(args: &[String]) -> TaskResult {
    if let Some(unknown) = args.first() {
        return Err(format!("{unknown}: lint takes no arguments"));
    }
    let skipped = tools::ensure();
    for line in &skipped {
        eprintln!("{line}");
    }
    let mut failed = Vec::new();
    for (name, check) in checks() {
        if let Err(why) = call(check) {
            eprintln!("{name}: {why}");
            failed.push(name);
        }
    }
    match (failed.is_empty(), skipped.is_empty() || !is_ci()) {
        (true, true) => Ok(()),
        (true, false) => Err("on CI nothing may be skipped".into()),
        (false, _) => Err(format!("failed: {}", failed.join(", "))),
    }
}
