//! petek's commands as processes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Far beyond what anything here takes.
const PATIENCE: Duration = Duration::from_secs(100);

/// How a command ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a command of petek's to its end.
pub(crate) fn run(words: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_petek"));
    command.args(words).envs(variables.iter().copied()).stdin(Stdio::null());
    let output = command.output().expect("start petek");
    let text = |bytes| String::from_utf8(bytes).expect("a command writes UTF-8");
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// A running `petek up` on ports of the system's choice. Dropped, it is killed.
pub(crate) struct Up {
    process: Child,
    file: PathBuf,
    log: PathBuf,
    pub(crate) public: String,
    pub(crate) admin: String,
    pub(crate) ops: String,
    pub(crate) workers: Vec<String>,
}

impl Up {
    /// Returns once it is ready.
    pub(crate) fn start(more: &[&str]) -> Up {
        static STARTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = STARTED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("up-{}-{number}.json", std::process::id()));
        let log = file.with_extension("log");
        let _ = std::fs::remove_file(&file);
        let errors = std::fs::File::create(&log).expect("a file for the log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_petek"));
        command.arg("up");
        for listener in ["--listen", "--admin", "--ops"] {
            command.args([listener, "127.0.0.1:0"]);
        }
        command.arg("--endpoints-file").arg(&file).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut process = command.spawn().expect("start petek up");
        let end = Instant::now() + PATIENCE;
        // Written whole, or not there.
        let text = loop {
            if let Ok(text) = std::fs::read_to_string(&file) {
                break text;
            }
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(process.try_wait().expect("look at petek").is_none(), "petek up ended: {}", said());
            assert!(Instant::now() < end, "petek up does not become ready: {}", said());
            std::thread::sleep(Duration::from_millis(5));
        };
        let endpoints: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let of = |name: &str| endpoints[name].as_str().expect("an address").to_owned();
        let workers = endpoints["workers"].as_array().expect("addresses").iter();
        Up {
            public: of("public"),
            admin: of("admin"),
            ops: of("ops"),
            workers: workers.map(|worker| worker.as_str().expect("an address").to_owned()).collect(),
            process,
            file,
            log,
        }
    }

    /// What it has said on standard error so far.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).expect("read the log")
    }

    /// What `/metrics` shows.
    pub(crate) fn metrics(&self) -> String {
        let mut stream = TcpStream::connect(&self.ops).expect("the operators' port");
        let ask = format!("GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.ops);
        stream.write_all(ask.as_bytes()).expect("ask for metrics");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("metrics are text");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer
    }

    /// The sum of a metric over its series that have these labels; 0 where there are none.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let text = self.metrics();
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (its_name, its_labels) = series.split_once('{').unwrap_or((series, ""));
            let is_meant = its_name == name && labels.iter().all(|label| its_labels.contains(label));
            is_meant.then(|| value.parse::<f64>().expect("a number"))
        });
        values.sum()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("petek up said:\n{}", self.said());
        }
        let _ = std::fs::remove_file(&self.file);
        let _ = std::fs::remove_file(&self.log);
    }
}
