//! The parts of `cargo xtask real-model` that need more than the standard library.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use petek_tests::gguf::{self, MANIFEST, PACKAGE, Pinned};

const USAGE: &str = "usage: real_model check DIR     is the folder whole, byte by byte?
       real_model package DIR   is the downloaded package in DIR the one that is meant?
       real_model convert GGUF DIR   make the folder and check it";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("real_model: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<()> {
    match args {
        ["check", dir] => gguf::check_pinned(Path::new(dir), MANIFEST),
        ["package", dir] => {
            const FILES: &[Pinned] = &[PACKAGE];
            gguf::check_pinned(Path::new(dir), FILES)
        }
        ["convert", file, dir] => convert(Path::new(file), Path::new(dir)),
        _ => bail!("{USAGE}"),
    }
}

/// Makes the folder beside its place and renames it at the end: it is there whole or not at all.
fn convert(file: &Path, dir: &Path) -> Result<()> {
    let partial = dir.with_extension("partial");
    for old in [&partial, dir] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("remove {}", old.display()))?;
        }
    }
    gguf::convert(file, &partial)?;
    gguf::check_pinned(&partial, MANIFEST)?;
    fs::rename(&partial, dir).with_context(|| format!("rename {} to {}", partial.display(), dir.display()))
}
