//! The tools beside cargo that the tests need: one table of what each is for, how to see whether it is there,
//! and how to get it on a clean machine.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{TaskResult, call, target_dir};

struct Tool {
    name: &'static str,
    /// A command that succeeds where the tool works.
    check: &'static [&'static str],
    /// The ways to it, best first.
    get: &'static [Get],
    /// What is skipped without it.
    needed_by: &'static str,
}

enum Get {
    /// Debian packages; only root can.
    Apt(&'static [&'static str]),
    /// A package of npm, put into `target/tools`.
    Npm(&'static str),
    /// A program in Go of this folder of the repository, built into `target/tools`.
    Go(&'static str),
    /// Python packages of this list, all that they need among them, put into `target/tools/python`.
    Pip(&'static str),
}

/// In the order to get them: npm before what comes through it.
const TOOLS: &[Tool] = &[
    Tool {
        name: "cc",
        check: &["cc", "--version"],
        get: &[Get::Apt(&["gcc", "libc6-dev"])],
        needed_by: "every build: crates with C and assembler parts, and linking",
    },
    Tool {
        name: "git",
        check: &["git", "--version"],
        get: &[Get::Apt(&["git"])],
        needed_by: "the checks of the house over all files of the repository",
    },
    Tool {
        name: "pip",
        check: &["python3", "-m", "pip", "--version"],
        get: &[Get::Apt(&["python3", "python3-pip"])],
        needed_by: "`cargo xtask real-model`, and the Python client",
    },
    Tool {
        name: "grpcio",
        check: &["python3", "-c", "import grpc_tools.protoc, google.rpc.error_details_pb2"],
        get: &[Get::Pip("tests/python/requirements.txt")],
        needed_by: "the test that drives the API from Python",
    },
    Tool {
        name: "npm",
        check: &["npm", "--version"],
        get: &[Get::Apt(&["nodejs", "npm"])],
        needed_by: "getting buf",
    },
    Tool {
        name: "buf",
        check: &["buf", "--version"],
        get: &[Get::Npm("@bufbuild/buf@1.75.0")],
        needed_by: "`buf lint proto`",
    },
    Tool {
        name: "etcd",
        check: &["etcd", "--version"],
        // Debian's is older, and speaks the same.
        get: &[Get::Go("tests/etcd"), Get::Apt(&["etcd-server"])],
        needed_by: "the tests of membership",
    },
];

/// Gets what is missing. Returns a `SKIPPED:` line for each tool that could not be had.
pub(crate) fn ensure() -> Vec<String> {
    let mut skipped = Vec::new();
    for tool in TOOLS.iter().filter(|tool| !works(tool)) {
        eprintln!("xtask: getting {} (needed by {})", tool.name, tool.needed_by);
        let mut failed = Vec::new();
        for way in tool.get {
            match get(way) {
                Ok(()) if works(tool) => break,
                Ok(()) => failed.push(format!("`{}` still fails", tool.check.join(" "))),
                Err(why) => failed.push(why),
            }
        }
        if failed.len() == tool.get.len() {
            let why = failed.join("; ");
            skipped.push(format!("SKIPPED: {}, for want of {}: {why}", tool.needed_by, tool.name));
        }
    }
    skipped
}

/// `PATH` with our own tools before the system's.
pub(crate) fn path() -> OsString {
    let system = std::env::var_os("PATH").unwrap_or_default();
    let ours = [tools_dir(), tools_dir().join("node_modules/.bin")];
    std::env::join_paths(ours.into_iter().chain(std::env::split_paths(&system)))
        .expect("a PATH that was split joins again")
}

/// A command found along [`path`].
pub(crate) fn command(words: &[&str]) -> Command {
    let path = path();
    let file = std::env::split_paths(&path).map(|dir| dir.join(words[0])).find(|file| file.is_file());
    let mut command = Command::new(file.unwrap_or_else(|| words[0].into()));
    command.args(&words[1..]).env("PATH", path).current_dir(crate::root());
    command.env("PYTHONPATH", tools_dir().join("python"));
    command
}

/// Whether the tool of this name is there and works.
pub(crate) fn has(name: &str) -> bool {
    TOOLS.iter().any(|tool| tool.name == name && works(tool))
}

fn works(tool: &Tool) -> bool {
    let mut check = command(tool.check);
    check.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    check.status().is_ok_and(|status| status.success())
}

fn tools_dir() -> PathBuf {
    target_dir().join("tools")
}

fn get(get: &Get) -> TaskResult {
    let dir = tools_dir();
    std::fs::create_dir_all(&dir).map_err(|error| format!("make {}: {error}", dir.display()))?;
    match get {
        Get::Apt(packages) => {
            // The lists may be missing or old; an install from them must not hang on a question.
            call(command(&["apt-get", "update", "--quiet=2"]))?;
            let words = ["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends"];
            let mut install = command(&[&words[..], packages].concat());
            install.env("DEBIAN_FRONTEND", "noninteractive");
            call(install)
        }
        Get::Npm(package) => {
            let mut install = command(&["npm", "install", "--no-audit", "--no-fund", "--silent", package]);
            install.arg("--prefix").arg(dir);
            call(install)
        }
        Get::Go(folder) => {
            // The Go that is there: a newer one would be a download from elsewhere. The folder names the program.
            let mut build = command(&["go", "build", "-o"]);
            build.arg(dir).arg(".").current_dir(crate::root().join(folder));
            build.env("GOTOOLCHAIN", "local").env("CGO_ENABLED", "0");
            call(build)
        }
        Get::Pip(list) => {
            let mut install = command(&["python3", "-m", "pip", "install", "--quiet", "--no-deps"]);
            install.args(["--upgrade", "--requirement", list, "--target"]).arg(dir.join("python"));
            call(install)
        }
    }
}
