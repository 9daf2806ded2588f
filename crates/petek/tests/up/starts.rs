//! From a command to a cluster that serves: where its settings come from, and a start that is broken off.

use std::fs::OpenOptions;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use petek_tests::chain::Chain;
use rustix::process::{Pid, Signal, kill_process};

use super::process::run;

/// The strongest layer wins, and each value says which that was.
#[test]
fn settings_say_where_they_come_from() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("petek.toml");
    std::fs::write(&file, "workers = 3\nlisten = \"127.0.0.1:1\"\n[log]\nfilter = \"info\"\n")
        .expect("written");
    let words = ["up", "--print-config", "--workers", "4", "--config", file.to_str().expect("a plain path")];
    let ran = run(&words, &[("PETEK_LISTEN", "127.0.0.1:2"), ("PETEK_WORKERS", "5")]);
    assert_eq!((ran.code, &*ran.err), (Some(0), ""));
    for (key, value, source) in [
        ("workers", "4", "flag --workers"),
        ("listen", "\"127.0.0.1:2\"", "environment PETEK_LISTEN"),
        ("log.filter", "\"info\"", "petek.toml"),
        ("admin", "\"127.0.0.1:7412\"", "default"),
    ] {
        let said = ran.out.lines().find_map(|line| line.strip_prefix(&format!("{key} = {value} ")));
        let said = said.unwrap_or_else(|| panic!("{key} is not {value}:\n{}", ran.out));
        assert!(said.trim_start().starts_with('#') && said.contains(source), "{key}: {said}");
    }
}

/// [sglang#39016] Handlers stand before loading begins.
#[test]
fn a_signal_while_it_loads_ends_it_well() {
    let dir = tempfile::tempdir().expect("a folder");
    Chain::bytes(&["a"]).write(dir.path()).expect("write the model");
    // A pipe that nobody writes into: loading never ends.
    let pipe = dir.path().join("tokenizer.json");
    std::fs::remove_file(&pipe).expect("removed");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("start mkfifo").success());
    for signal in [Signal::TERM, Signal::INT] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_petek"));
        command.args(["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
        command
            .arg("--model")
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let process = command.spawn().expect("start petek");
        // It opens for whoever writes when somebody reads.
        let (say, opened) = mpsc::channel();
        let write = pipe.clone();
        std::thread::spawn(move || say.send(OpenOptions::new().write(true).open(write)));
        let _held = opened.recv_timeout(Duration::from_secs(60)).expect("it loads").expect("the pipe");
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw).expect("a process has an id");
        kill_process(pid, signal).expect("signal it");
        let output = process.wait_with_output().expect("wait for it");
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    }
}
