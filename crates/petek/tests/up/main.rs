//! `petek up` as a person runs it: one process, asked from outside.

mod process;

mod api;

mod starts;

mod texts;

mod sampling;

mod limits;

mod metrics;

mod mistakes;

mod floods;

mod traces;

mod conversations;

// Shared with packages whose own tests want it public.
#[allow(unreachable_pub)]
#[path = "../../../../tests/otlp/collector.rs"]
mod collector;

use std::path::Path;
use std::process::Command;

use petek_tests::house;
use process::{Up, run};

#[test]
fn one_command_starts_a_cluster_answers_and_exits() {
    let ran = run(&["up", "--once", "I have a dream"], &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.out.starts_with(" of"), "the demo model was trained to go on so: {}", ran.out);
    assert!(ran.err.contains("TTFT") && ran.err.contains("tokens/s"), "{}", ran.err);
    assert_eq!(ran.err.lines().count(), 1, "a footer and no more: {}", ran.err);
}

#[test]
fn a_second_terminal_is_answered_the_same_each_time() {
    let up = Up::start(&[]);
    let ask = || {
        let words = ["generate", "--json", "--seed", "7", "--max-tokens", "60", "I have a dream"];
        let ran = run(&words, &[("PETEK_ENDPOINT", &up.public)]);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        let events: Vec<serde_json::Value> =
            ran.out.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
        let ids: Vec<u64> = events
            .iter()
            .filter_map(|event| event["delta"]["token_ids"].as_array())
            .flatten()
            .map(|id| id.as_u64().expect("an id"))
            .collect();
        assert!(events[0]["started"]["worker"].is_string(), "{}", events[0]);
        assert!(events.last().expect("events")["finished"]["usage"].is_object());
        ids
    };
    let first = ask();
    assert!(!first.is_empty());
    // On either worker, cold and warm.
    for _ in 0..5 {
        assert_eq!(ask(), first);
    }
    let shown = run(&["workers"], &[("PETEK_ADMIN", &up.admin)]);
    let serving = shown.out.lines().filter(|line| line.contains("serving")).count();
    assert_eq!((shown.code, serving), (Some(0), 2), "{}{}", shown.out, shown.err);
    let models = run(&["models"], &[("PETEK_ENDPOINT", &up.public)]);
    assert_eq!(models.code, Some(0), "{}", models.err);
    let explained = run(&["routes", "explain", "I have a dream"], &[("PETEK_ADMIN", &up.admin)]);
    assert!(explained.code == Some(0) && explained.out.contains("worker-"), "{}", explained.out);
    let chat = ["generate", "--temperature", "-1", "x"];
    let refused = run(&chat, &[("PETEK_ENDPOINT", &up.public)]);
    assert!(refused.code != Some(0) && refused.err.contains("temperature"), "{}", refused.err);
}

/// Stubs generated for another language, and nothing of ours besides.
#[test]
fn python_drives_the_api() {
    let packages =
        Path::new(env!("CARGO_BIN_EXE_petek")).ancestors().nth(2).expect("target").join("tools/python");
    let python = || {
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", &packages);
        python
    };
    let imports = "import grpc_tools.protoc, google.rpc.error_details_pb2";
    if !python().args(["-c", imports]).output().is_ok_and(|output| output.status.success()) {
        return house::skip("python_drives_the_api", "grpcio (`cargo xtask test` gets it)");
    }
    let up = Up::start(&[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/python/drive.py");
    let ran = python().arg(script).arg(&up.public).output().expect("start python3");
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.contains(" 0 failed"), "{out}{err}");
}
