//! The client commands, as processes, against a router that says what a test tells it to.

mod router;

mod answers;
mod cluster;

use std::io::{ErrorKind, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use router::Router;

/// Far beyond what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command of petek's against this router, with nothing from the environment.
fn petek(router: &Router, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_petek"));
    command.args(words).env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    command.env("PETEK_ENDPOINT", &router.address).env("PETEK_ADMIN", &router.address);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// How a command ended: its code and what it wrote.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("a command writes UTF-8");
        let ran = Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }
}

fn run(router: &Router, words: &[&str]) -> Ran {
    ended(petek(router, words).spawn().expect("start petek"))
}

/// The same with these lines on its standard input.
fn run_with(router: &Router, words: &[&str], lines: &str) -> Ran {
    let mut child = petek(router, words).stdin(Stdio::piped()).spawn().expect("start petek");
    let written = child.stdin.take().expect("it is piped").write_all(lines.as_bytes());
    // A command that ended at once reads nothing: the test looks at how it ended.
    assert!(written.is_ok() || written.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe));
    ended(child)
}

fn ended(child: Child) -> Ran {
    soon(|| child.wait_with_output()).expect("wait for petek").into()
}

/// So many bytes of what a command writes, as soon as they are there.
fn read(mut child: Child, bytes: usize) -> (Child, String) {
    soon(move || {
        let mut read = vec![0; bytes];
        child.stdout.as_mut().expect("it is piped").read_exact(&mut read).expect("read what petek writes");
        (child, String::from_utf8(read).expect("a command writes UTF-8"))
    })
}

/// Waits for something that must come. A test that would wait for ever fails instead.
fn soon<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || done.send(what()));
    is_done.recv_timeout(PATIENCE).expect("what is waited for does not come")
}

fn json_lines(out: &str) -> Vec<serde_json::Value> {
    out.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}
