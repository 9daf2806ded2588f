//! A real etcd for tests: found, started, killed, stopped and started again. Standard library and tempfile only; test
//! binaries take it in by its path.
//!
//! A shell stands between a test and its etcd and waits for its own standard input to end. So however a test process
//! ends, its etcd ends with it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use tempfile::TempDir;

/// `$1` is a folder to remove at the end, or nothing; the rest is etcd's command line.
const KEEPER: &str = r#"
remove=$1; shift
"$@" >/dev/null & pid=$!
exec 2>/dev/null
echo $pid
cat >/dev/null
kill -9 $pid; wait $pid
[ -z "$remove" ] || rm -rf "$remove"
"#;

/// Far longer than a start takes on a busy machine.
const START_MAX: Duration = Duration::from_secs(60);
/// Free ports may be taken by another process before etcd takes them.
const STARTS_MAX: usize = 5;

/// One etcd of one member. It is killed, and its data removed, when this is dropped.
pub struct Etcd {
    binary: PathBuf,
    data: Data,
    ports: [u16; 2],
    more: Vec<OsString>,
    process: Option<(Child, u32)>,
}

enum Data {
    Ours(TempDir),
    /// Removed by the keeper: nothing in a `static` is ever dropped.
    Keeper(PathBuf),
}

impl Etcd {
    /// The etcd that all tests of this process share, each under keys of its own. `None`: this machine has none, and
    /// the test named `test` was said to be skipped.
    pub fn shared(test: &str) -> Option<&'static Etcd> {
        static SHARED: OnceLock<Etcd> = OnceLock::new();
        let binary = binary(test)?;
        Some(SHARED.get_or_init(|| {
            let dir = tempfile::tempdir().expect("make a folder for etcd").keep();
            Etcd::start_in(binary, Data::Keeper(dir), &[])
        }))
    }

    /// An etcd of its own, for a test that kills, stops or configures it (`more`: further arguments).
    pub fn own(test: &str, more: &[&str]) -> Option<Etcd> {
        let dir = tempfile::tempdir().expect("make a folder for etcd");
        Some(Etcd::start_in(binary(test)?, Data::Ours(dir), more))
    }

    fn start_in(binary: PathBuf, data: Data, more: &[&str]) -> Etcd {
        let more = more.iter().map(OsString::from).collect();
        let mut etcd = Etcd { binary, data, ports: [0; 2], more, process: None };
        for _ in 0..STARTS_MAX {
            // Both are held at the same time, so they differ.
            let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("find a free port"));
            etcd.ports = free.map(|port| port.local_addr().expect("a port has an address").port());
            if etcd.start() {
                return etcd;
            }
        }
        panic!("{} does not start: run it by hand to see why", etcd.binary.display());
    }

    /// Where it listens, `127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    /// Starts it again after [`kill`](Self::kill), on the same port and with the same data.
    pub fn restart(&mut self) {
        assert!(self.process.is_none(), "etcd runs");
        assert!(self.start(), "etcd did not start again");
    }

    /// Removes all its data; to be called after [`kill`](Self::kill).
    pub fn wipe(&mut self) {
        assert!(self.process.is_none(), "etcd runs");
        std::fs::remove_dir_all(self.dir().join("data")).expect("remove etcd's data");
    }

    /// Kills it, as by `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some((mut keeper, _)) = self.process.take() {
            drop(keeper.stdin.take());
            keeper.wait().expect("wait for etcd's keeper");
        }
    }

    /// Stops it: it keeps its connections and says nothing any more.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.process.as_ref().expect("etcd runs").1.to_string();
        let status = Command::new("kill").args([signal, &pid]).status().expect("start kill");
        assert!(status.success(), "kill {signal} {pid}: {status}");
    }

    fn dir(&self) -> &Path {
        match &self.data {
            Data::Ours(dir) => dir.path(),
            Data::Keeper(dir) => dir,
        }
    }

    /// True once it says that it serves; false if it ended before.
    fn start(&mut self) -> bool {
        let remove = match &self.data {
            Data::Ours(_) => Path::new(""),
            Data::Keeper(dir) => dir,
        };
        let is_tls = self.more.iter().any(|arg| arg == "--cert-file");
        let client = format!("{}://{}", if is_tls { "https" } else { "http" }, self.endpoint());
        let peer = format!("http://127.0.0.1:{}", self.ports[1]);
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "keeper"]).arg(remove).arg(&self.binary);
        keeper.args(["--name", "test", "--logger", "zap", "--log-level", "info", "--unsafe-no-fsync"]);
        keeper.arg("--data-dir").arg(self.dir().join("data"));
        keeper.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        keeper.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        keeper.args(["--initial-cluster", &format!("test={peer}")]).args(&self.more);
        keeper.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut keeper = keeper.spawn().expect("start a shell");

        let mut pid = String::new();
        BufReader::new(keeper.stdout.take().expect("it is piped"))
            .read_line(&mut pid)
            .expect("read etcd's id");
        let pid = pid.trim().parse().expect("a process id is a number");
        let log = BufReader::new(keeper.stderr.take().expect("it is piped"));
        let (says, said) = mpsc::channel();
        // Read to its end: etcd would stand still once the pipe is full.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if line.contains("serving client traffic") {
                    // Nobody may be waiting any more.
                    let _ = says.send(true);
                }
            }
            let _ = says.send(false);
        });
        let serves = said.recv_timeout(START_MAX).unwrap_or(false);
        self.process = Some((keeper, pid));
        if !serves {
            self.kill();
        }
        serves
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `PETEK_ETCD`, else `target/tools/etcd` which `cargo xtask test` builds, else etcd on the `PATH`. `None` where there
/// is none and there need not be: that is said in a line that begins with `SKIPPED:`.
///
/// # Panics
/// Where there is none and `CI` is set.
fn binary(test: &str) -> Option<PathBuf> {
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|dir| dir.join("Cargo.lock").is_file())?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let named = std::env::var_os("PETEK_ETCD").map(|path| root.join(path));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = match named {
        // A path that was given and is wrong must not be passed over.
        Some(named) => return Some(named),
        None => std::iter::once(root.join(target).join("tools")).chain(std::env::split_paths(&path)),
    };
    let found = candidates.map(|dir| dir.join("etcd")).find(|file| file.is_file());
    if found.is_none() {
        let is_ci = std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
        let line = format!("SKIPPED: {test}, for want of etcd (`cargo xtask test` gets it)");
        assert!(!is_ci, "{line}: on CI nothing may be skipped");
        eprintln!("{line}");
    }
    found
}
