//! petek's commands as processes.

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
    pub(crate) public: String,
    pub(crate) admin: String,
    pub(crate) workers: Vec<String>,
}

impl Up {
    /// Returns once it is ready.
    pub(crate) fn start(more: &[&str]) -> Up {
        static STARTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = STARTED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("up-{}-{number}.json", std::process::id()));
        let _ = std::fs::remove_file(&file);
        let mut command = Command::new(env!("CARGO_BIN_EXE_petek"));
        command.arg("up");
        for listener in ["--listen", "--admin", "--ops"] {
            command.args([listener, "127.0.0.1:0"]);
        }
        command.arg("--endpoints-file").arg(&file).args(more).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = command.spawn().expect("start petek up");
        let end = Instant::now() + PATIENCE;
        // Written whole, or not there.
        let text = loop {
            if let Ok(text) = std::fs::read_to_string(&file) {
                break text;
            }
            assert!(process.try_wait().expect("look at petek").is_none(), "petek up ended");
            assert!(Instant::now() < end, "petek up does not become ready");
            std::thread::sleep(Duration::from_millis(5));
        };
        let endpoints: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let of = |name: &str| endpoints[name].as_str().expect("an address").to_owned();
        let workers = endpoints["workers"].as_array().expect("addresses").iter();
        Up {
            public: of("public"),
            admin: of("admin"),
            workers: workers.map(|worker| worker.as_str().expect("an address").to_owned()).collect(),
            process,
            file,
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}
