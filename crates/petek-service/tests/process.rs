//! A whole process, from its first signal to its exit code (`examples/process.rs`, which `cargo test` builds
//! beside this), and spans on their way to a collector.

// Shared with packages whose own tests want it public.
#[allow(unreachable_pub)]
#[path = "../../../tests/otlp/collector.rs"]
mod collector;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use http::HeaderMap;
use petek_service::{Telemetry, TelemetrySettings, extract, inject, set_parent, traceparent};
use rustix::process::{Pid, Signal, kill_process};

/// Above any delay of a loaded machine. Only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Dropped with this; a process that outlives our patience is killed, so that a failure is no hang.
    _over: std_mpsc::Sender<()>,
}

impl Process {
    fn start(env: &[(&str, &str)]) -> Self {
        // target/<profile>/deps/process-<hash> → target/<profile>/examples/process
        let exe = std::env::current_exe().expect("a test knows its file");
        let dir = exe.parent().and_then(|deps| deps.parent()).expect("tests lie in target/<profile>/deps");
        let file = dir.join("examples").join(format!("process{}", std::env::consts::EXE_SUFFIX));
        let mut command = Command::new(&file);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PETEK_")) {
            command.env_remove(name);
        }
        command.envs(env.iter().copied()).env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {}: {error}", file.display()));
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (over, is_over) = std_mpsc::channel();
        let id = pid(&child);
        std::thread::spawn(move || {
            if is_over.recv_timeout(PATIENCE) == Err(std_mpsc::RecvTimeoutError::Timeout) {
                kill_process(id, Signal::KILL).expect("kill a process that hangs");
            }
        });
        Self { child, input, output, _over: over }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read the process's output");
        line.trim_end().to_string()
    }

    fn enter(&mut self) {
        self.input.write_all(b"\n").expect("the process reads");
    }

    fn signal(&self, signal: Signal) {
        kill_process(pid(&self.child), signal).expect("signal the process");
    }

    /// Its exit code and what it said on standard error.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child.stderr.take().expect("piped").read_to_string(&mut said).expect("read standard error");
        let code = self.child.wait().expect("wait for the process").code();
        (code, said)
    }
}

fn pid(child: &Child) -> Pid {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process has an id")
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connect to the operators' listener");
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("receive");
    answer
}

/// Brings a process to where it serves; returns its operators' address.
fn serving(process: &mut Process) -> String {
    assert_eq!(process.line(), "loading");
    process.enter();
    let ops = process.line();
    let address = ops.strip_prefix("ops ").unwrap_or_else(|| panic!("an address, not `{ops}`"));
    assert_eq!(process.line(), "serving");
    address.to_string()
}

#[test]
fn a_signal_while_it_loads_ends_it_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut process = Process::start(&[]);
        assert_eq!(process.line(), "loading");
        process.signal(signal);
        // Its input stays open: it would wait for ever.
        assert_eq!(process.line(), "", "its output ends");
        assert_eq!(process.end(), (Some(0), String::new()));
    }
}

#[test]
fn the_first_signal_drains() {
    let mut process = Process::start(&[("PETEK_LOG__FORMAT", "json")]);
    let address = serving(&mut process);
    assert!(get(&address, "/ready").starts_with("HTTP/1.1 200"));

    process.signal(Signal::TERM);
    assert_eq!(process.line(), "draining");
    assert!(get(&address, "/ready").contains("503"));
    assert!(get(&address, "/health").starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/metrics").contains("\npetek_router_streams_open 1\n"));

    process.enter();
    let (code, said) = process.end();
    assert_eq!(code, Some(0));
    assert_eq!(said.lines().count(), 2, "settings, signal: {said}");
    assert!(said.lines().all(|line| line.starts_with('{') && line.ends_with('}')), "{said}");
    assert!(said.contains("log.format = \\\"json\\\" (environment PETEK_LOG__FORMAT)"), "{said}");
}

#[test]
fn the_second_signal_ends_it_at_once() {
    let mut process = Process::start(&[]);
    serving(&mut process);
    process.signal(Signal::INT);
    assert_eq!(process.line(), "draining");
    process.signal(Signal::TERM);
    assert_eq!(process.end().0, Some(128 + 15));
}

#[test]
fn mistakes_are_one_line_and_a_code() {
    let (code, said) = Process::start(&[("PETEK_OPS_LISTENN", "x")]).end();
    assert_eq!(code, Some(3));
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("ops_listenn") && said.contains("PETEK_OPS_LISTENN"), "{said}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut process = Process::start(&[("PETEK_OPS_LISTEN", &address), ("PETEK_LOG__FILTER", "warn")]);
    process.enter();
    let (code, said) = process.end();
    assert_eq!((code, said.lines().count()), (Some(4), 1), "{said}");
    assert!(said.contains(&address), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn spans_of_one_request_are_one_trace() {
    let (endpoint, mut receive) = collector::collect().await;

    let settings = TelemetrySettings { otlp_endpoint: Some(endpoint), ..TelemetrySettings::default() };
    let telemetry = Telemetry::start(&settings, "petek-router", "r1").unwrap();

    // As a router gets a call, and hands it to a worker, twice over: by headers and by a field.
    let client = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01";
    let router = tracing::info_span!(target: "petek_router", "generate", request = "q1");
    set_parent(&router, client);
    let mut headers = HeaderMap::new();
    inject(&router, &mut headers);
    let by_headers = tracing::info_span!(target: "petek_router", "execute", by = "headers");
    extract(&headers, &by_headers);
    let by_field = tracing::info_span!(target: "petek_router", "execute", by = "field");
    set_parent(&by_field, &traceparent(&router).unwrap());
    let alone = tracing::info_span!(target: "petek_router", "alone");
    set_parent(&alone, "no\ntraceparent");
    set_parent(&alone, "00-zz-0123456789abcdef-01");
    drop(tracing::debug_span!(target: "petek_router", "too fine to be sent"));
    drop(tracing::info_span!(target: "h2", "not ours"));
    drop((by_headers, by_field, alone, router));
    tokio::time::timeout(PATIENCE, telemetry.stop()).await.expect("the sender stops");

    let mut spans = Vec::new();
    while let Ok(request) = receive.try_recv() {
        for of_resource in request.resource_spans {
            let resource = format!("{:?}", of_resource.resource);
            assert!(resource.contains("petek-router") && resource.contains("r1"), "{resource}");
            spans.extend(of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans));
        }
    }
    spans.sort_by_key(|span| span.name.clone());
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["alone", "execute", "execute", "generate"]);
    let [alone, first, second, router] = &spans[..] else { unreachable!() };

    let of_client: Vec<u8> =
        (0..16).map(|n| [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef][n % 8]).collect();
    assert_eq!((&router.trace_id, &router.parent_span_id[..]), (&of_client, &of_client[..8]));
    for worker in [first, second] {
        assert_eq!((&worker.trace_id, &worker.parent_span_id), (&of_client, &router.span_id));
    }
    assert!(alone.trace_id != of_client && alone.parent_span_id.is_empty());
}

#[test]
fn a_span_that_is_off_writes_nothing() {
    let span = tracing::Span::none();
    let mut headers = HeaderMap::new();
    inject(&span, &mut headers);
    assert!(headers.is_empty(), "{headers:?}");
    assert_eq!(traceparent(&span), None);
}
