//! Processes of petek on ports that the system picks, what they say kept, killed when a test is over.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use petek_proto::admin::v1::admin_service_client::AdminServiceClient;
use petek_proto::admin::v1::{ListWorkersRequest, ListWorkersResponse, Worker};
use petek_proto::inference::v1::ListModelsRequest;
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::worker::v1::worker_service_client::WorkerServiceClient;
use petek_proto::worker::v1::{EngineStatus, GetStatusRequest};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;

/// Far beyond what anything here takes. A test that would wait for ever fails instead.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(10);

/// A port that the system picks.
pub(crate) const FREE: &str = "127.0.0.1:0";

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: &str, coming: impl Future<Output = T>) -> T {
    let came = tokio::time::timeout(PATIENCE, coming).await;
    came.unwrap_or_else(|_| panic!("what is waited for does not come: {what}"))
}

/// Looks again and again until it is so.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !is_so().await {
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
}

/// The demo model, as a folder.
pub(crate) fn demo() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/demo"))
}

/// One cluster: a name of its own in etcd, and a folder for what its processes write.
pub(crate) struct Stage {
    endpoint: String,
    pub(crate) cluster: String,
    pub(crate) dir: TempDir,
}

impl Stage {
    pub(crate) fn new(etcd: String) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let cluster = format!("stage-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Stage { endpoint: etcd, cluster, dir: tempfile::tempdir().expect("make a folder") }
    }

    /// A worker of one thread on the demo model.
    pub(crate) fn worker(&self, id: &str) -> Launch {
        self.worker_of(id, demo())
    }

    pub(crate) fn worker_of(&self, id: &str, model: &Path) -> Launch {
        let launch =
            self.launch("worker", id).words(&format!("--listen {FREE} --name demo --id {id} --model"));
        launch.word(model).set("ENGINE__THREADS", "1").set("ENGINE__KV_MEMORY", "64MiB")
    }

    pub(crate) fn router(&self, name: &str) -> Launch {
        self.launch("router", name).words(&format!("--listen {FREE} --admin {FREE}"))
    }

    fn launch(&self, command: &str, name: &str) -> Launch {
        let (etcd, cluster) = (&self.endpoint, &self.cluster);
        let launch = Launch::new(command, name, self.dir.path());
        launch.words(&format!("--ops {FREE} --etcd {etcd} --cluster {cluster}"))
    }

    /// Starts workers (in order of their names) and routers, and waits until each router reaches all the workers.
    pub(crate) async fn start<const W: usize, const R: usize>(
        &self,
        workers: [&str; W],
        routers: [&str; R],
    ) -> ([Process; W], [Process; R]) {
        let names = workers;
        let workers = workers.map(|id| self.worker(id).start());
        let routers = routers.map(|name| self.router(name).start());
        for router in &routers {
            router.reaches(&names).await;
        }
        (workers, routers)
    }

    /// The workers' records as they stand in etcd, and the leases that hold them, by worker.
    pub(crate) async fn records(&self) -> BTreeMap<String, (Value, i64)> {
        let mut client = self.etcd().await;
        let prefix = format!("/petek/v1/{}/workers/", self.cluster);
        let options = etcd_client::GetOptions::new().with_prefix();
        let list = soon("an answer of etcd", client.get(prefix, Some(options))).await.expect("ask etcd");
        let record = |entry: &etcd_client::KeyValue| {
            let record: Value = serde_json::from_slice(entry.value()).expect("a record is JSON");
            (record["worker"].as_str().expect("it names its worker").to_owned(), (record, entry.lease()))
        };
        list.kvs().iter().map(record).collect()
    }

    pub(crate) async fn etcd(&self) -> etcd_client::Client {
        etcd_client::Client::connect([&self.endpoint], None).await.expect("connect to etcd")
    }
}

/// A process that is about to start.
pub(crate) struct Launch {
    name: String,
    binary: PathBuf,
    dir: PathBuf,
    words: Vec<OsString>,
    settings: Vec<(String, String)>,
    change: fn(&mut Command),
}

impl Launch {
    /// With nothing from the environment.
    pub(crate) fn new(command: &str, name: &str, dir: &Path) -> Self {
        Launch {
            name: name.into(),
            binary: env!("CARGO_BIN_EXE_petek").into(),
            dir: dir.into(),
            words: vec![command.into()],
            settings: Vec::new(),
            change: |_| {},
        }
    }

    /// Flags, parted by spaces.
    pub(crate) fn words(mut self, words: &str) -> Self {
        self.words.extend(words.split_whitespace().map(OsString::from));
        self
    }

    pub(crate) fn word(mut self, word: &Path) -> Self {
        self.words.push(word.into());
        self
    }

    /// A setting by its key, `ROUTER__LINK__SUBMIT_QUEUE`; a flag is stronger.
    pub(crate) fn set(mut self, key: &str, value: &str) -> Self {
        self.settings.push((format!("PETEK_{key}"), value.into()));
        self
    }

    /// The same from a copy of the binary, in a folder of its own.
    pub(crate) fn moved(self, binary: PathBuf, dir: &Path) -> Self {
        Launch { binary, dir: dir.into(), ..self }
    }

    /// With something else about the process changed.
    pub(crate) fn changed(self, change: fn(&mut Command)) -> Self {
        Launch { change, ..self }
    }

    pub(crate) fn start(self) -> Process {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let Launch { name, binary, dir, words, settings, change } = self;
        let endpoints_file = dir.join(format!("{name}-{}.json", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let mut command = Command::new(binary);
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PETEK_") {
                command.env_remove(variable);
            }
        }
        command.args(words).arg("--endpoints-file").arg(&endpoints_file).envs(settings);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let said = Arc::new(Mutex::new(String::new()));
        let (hears, lines) = (said.clone(), BufReader::new(child.stderr.take().expect("it is piped")));
        let listener = std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut said = hears.lock().expect("nobody panics with it in hand");
                said.push_str(&line);
                said.push('\n');
            }
        });
        Process { name, child, said, listener: Some(listener), endpoints_file }
    }
}

/// A process that runs, or ran. Dropped, it is killed.
pub(crate) struct Process {
    pub(crate) name: String,
    child: Child,
    said: Arc<Mutex<String>>,
    listener: Option<std::thread::JoinHandle<()>>,
    endpoints_file: PathBuf,
}

impl Process {
    /// What it has said on standard error so far.
    pub(crate) fn said(&self) -> String {
        self.said.lock().expect("nobody panics with it in hand").clone()
    }

    /// Where it listens: `public`, `admin`, `ops`, `worker`.
    pub(crate) async fn address(&self, of: &str) -> String {
        let mut text = None;
        until(&format!("the addresses of {}", self.name), async || {
            text = std::fs::read(&self.endpoints_file).ok();
            text.is_some()
        })
        .await;
        let endpoints: Value = serde_json::from_slice(&text.expect("it is there")).expect("it is JSON");
        endpoints[of].as_str().unwrap_or_else(|| panic!("{} has no {of}: {endpoints}", self.name)).into()
    }

    /// What its listener for operators answers.
    pub(crate) async fn ops(&self, path: &str) -> String {
        let address = self.address("ops").await;
        let asked = async {
            let mut stream = tokio::net::TcpStream::connect(&address).await?;
            stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        soon(path, asked).await.unwrap_or_else(|error| panic!("ask {} for {path}: {error}", self.name))
    }

    /// Whether it says that it may be given work.
    pub(crate) async fn is_ready(&self) -> bool {
        self.ops("/ready").await.starts_with("HTTP/1.1 200")
    }

    pub(crate) async fn ready(&self) {
        until(&format!("{} is ready", self.name), async || self.is_ready().await).await;
    }

    /// The first sample of a metric whose line begins so.
    pub(crate) async fn metric(&self, line: &str) -> Option<f64> {
        let metrics = self.ops("/metrics").await;
        let found = metrics.lines().find(|found| found.starts_with(line))?;
        found.rsplit(' ').next()?.parse().ok()
    }

    pub(crate) async fn channel(&self, of: &str) -> Channel {
        let endpoint =
            Channel::from_shared(format!("http://{}", self.address(of).await)).expect("an address");
        let connected = soon("a connection", endpoint.connect()).await;
        connected.unwrap_or_else(|error| panic!("connect to {}: {error}", self.name))
    }

    /// What a router knows of its workers.
    pub(crate) async fn list(&self) -> ListWorkersResponse {
        let mut admin = AdminServiceClient::new(self.channel("admin").await);
        let asked = soon("the list of workers", admin.list_workers(ListWorkersRequest::default())).await;
        asked.expect("list the workers").into_inner()
    }

    /// A worker as a router sees it, if it does.
    pub(crate) async fn sees(&self, id: &str) -> Option<Worker> {
        self.list().await.workers.into_iter().find(|worker| worker.id == id)
    }

    /// Waits until a router is ready, knows the model, and may give work to just these workers.
    pub(crate) async fn reaches(&self, workers: &[&str]) {
        self.ready().await;
        until(&format!("{} reaches {workers:?}", self.name), async || {
            let list = self.list().await.workers;
            let takers = list.iter().filter(|worker| takes_work(worker)).map(|worker| &worker.id[..]);
            if !takers.eq(workers.iter().copied()) {
                return false;
            }
            let mut client = InferenceServiceClient::new(self.channel("public").await);
            let models = soon("the list of models", client.list_models(ListModelsRequest {})).await;
            let models = models.expect("list the models").into_inner().models;
            models.iter().any(|model| model.workers_serving as usize == workers.len())
        })
        .await;
    }

    /// What a worker's engine says of itself.
    pub(crate) async fn status(&self) -> EngineStatus {
        let mut worker = WorkerServiceClient::new(self.channel("worker").await);
        let answer = soon("a worker's status", worker.get_status(GetStatusRequest {})).await;
        answer.expect("ask a worker").into_inner().status.expect("it has a status")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process has an id");
        kill_process(id, signal).expect("signal a process that was not waited for");
    }

    /// Kills it, as by `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        self.child.wait().expect("wait for a process");
    }

    /// How it ended: its exit code, and all that it said on standard error.
    pub(crate) async fn ended(&mut self) -> (Option<i32>, String) {
        let mut code = None;
        until(&format!("the end of {}", self.name), async || {
            let status = self.child.try_wait().expect("wait for a process");
            code = status.map(|status| status.code());
            code.is_some()
        })
        .await;
        if let Some(listener) = self.listener.take() {
            listener.join().expect("the listener does not panic");
        }
        let said = self.said();
        assert!(!said.contains("panicked"), "{}: {said}", self.name);
        (code.expect("it ended"), said)
    }
}

/// Whether a router may give a worker new requests, by all that it shows.
pub(crate) fn takes_work(worker: &Worker) -> bool {
    use petek_proto::admin::v1::Link;
    use petek_proto::worker::v1::WorkerState;
    let view = worker.view.clone().unwrap_or_default();
    worker.state() == WorkerState::Serving && view.link() == Link::Connected && view.load.is_some()
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, self.said());
        }
    }
}
