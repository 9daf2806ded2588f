//! What a test of a registry needs, the same for both: clients with connections that can be cut, records, and a view
//! whose events are read until something is seen.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use petek_cluster::record::{WireVersions, WorkerRecord, WorkerState};
use petek_cluster::registration::{Probe, Probed, Registration, RegistrationOptions};
use petek_cluster::registration::{RegisterError, RegistrationPhase, RegistrationStatus};
use petek_cluster::registry::{Entry, Registry, RegistryRevision, Swapped};
use petek_cluster::watching::ViewOptions;
use petek_cluster::{
    Cluster, EtcdOptions, EtcdRegistry, MemoryRegistry, Times, ViewEvent, Wait, WorkerKey, WorkersView,
};
use petek_core::hash::Revision;
use petek_core::ids::Epoch;

use crate::proxy::Proxy;
use crate::server::Etcd;

/// Longer than anything here takes: who waits this long waits for what never comes.
const NEVER: Duration = Duration::from_secs(60);

/// A registry and a cluster in it that no other test uses.
pub(crate) struct Stage {
    kind: Kind,
    pub(crate) cluster: Cluster,
}

enum Kind {
    Memory(MemoryRegistry),
    Etcd(EtcdKind),
}

enum EtcdKind {
    Shared(&'static Etcd),
    Own(Etcd),
}

impl Stage {
    pub(crate) fn memory() -> Stage {
        Stage { kind: Kind::Memory(MemoryRegistry::new()), cluster: Cluster::new("test").unwrap() }
    }

    /// `None`: this machine has no etcd.
    pub(crate) fn etcd(test: &str) -> Option<Stage> {
        Some(Stage {
            kind: Kind::Etcd(EtcdKind::Shared(Etcd::shared(test)?)),
            cluster: Cluster::new(test).unwrap(),
        })
    }

    /// With an etcd of its own.
    pub(crate) fn etcd_own(test: &str) -> Option<Stage> {
        Some(Stage {
            kind: Kind::Etcd(EtcdKind::Own(Etcd::own(test, &[])?)),
            cluster: Cluster::new(test).unwrap(),
        })
    }

    /// A client with a connection of its own.
    pub(crate) async fn client(&self) -> Client {
        match &self.kind {
            Kind::Memory(registry) => {
                let registry = registry.another_client();
                Client { registry: Arc::new(registry.clone()), line: Line::Memory(registry) }
            }
            Kind::Etcd(etcd) => Client::etcd(etcd.endpoint()).await,
        }
    }

    /// Compacts everything up to now.
    pub(crate) async fn forget_the_past(&self) {
        match &self.kind {
            Kind::Memory(registry) => registry.compact(),
            Kind::Etcd(etcd) => {
                let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await.unwrap();
                let now = client.get("x", None).await.unwrap().header().unwrap().revision();
                client.compact(now, None).await.unwrap();
            }
        }
    }
}

impl EtcdKind {
    fn endpoint(&self) -> String {
        match self {
            EtcdKind::Shared(etcd) => etcd.endpoint(),
            EtcdKind::Own(etcd) => etcd.endpoint(),
        }
    }
}

/// One process's access to the registry.
pub(crate) struct Client {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) line: Line,
}

pub(crate) enum Line {
    Memory(MemoryRegistry),
    Proxy(Proxy),
}

impl Client {
    pub(crate) async fn etcd(endpoint: String) -> Client {
        let proxy = Proxy::to(endpoint).await;
        let registry = EtcdRegistry::new(patient(vec![proxy.address().into()])).await.unwrap();
        Client { registry: Arc::new(registry), line: Line::Proxy(proxy) }
    }

    pub(crate) fn cut(&self) {
        match &self.line {
            Line::Memory(registry) => registry.cut(),
            Line::Proxy(proxy) => proxy.cut(),
        }
    }

    pub(crate) fn heal(&self) {
        match &self.line {
            Line::Memory(registry) => registry.heal(),
            Line::Proxy(proxy) => proxy.heal(),
        }
    }

    pub(crate) async fn list(&self, cluster: &Cluster) -> Vec<Entry> {
        soon("a listing", self.registry.list(&cluster.workers_prefix())).await.unwrap().entries
    }

    /// Writes whatever stands there now.
    pub(crate) async fn write(&self, key: &str, value: impl Into<Vec<u8>>) -> RegistryRevision {
        let value = value.into();
        loop {
            let found = self.registry.get(key).await.unwrap().map(|entry| entry.revision);
            let swap = self.registry.swap(key, found.unwrap_or_default(), value.clone(), None);
            if let Swapped::Done(revision) = swap.await.unwrap() {
                return revision;
            }
        }
    }

    pub(crate) async fn register(
        &self,
        stage: &Stage,
        record: &WorkerRecord,
    ) -> Result<Registration, RegisterError> {
        self.register_probing(stage, record, |_| Probed::Silent).await
    }

    pub(crate) async fn register_probing(
        &self,
        stage: &Stage,
        record: &WorkerRecord,
        answer: impl Fn(&WorkerRecord) -> Probed + Send + Sync + 'static,
    ) -> Result<Registration, RegisterError> {
        let options = RegistrationOptions {
            cluster: stage.cluster.clone(),
            record: record.clone(),
            times: times(),
            wait: Wait::Forever,
        };
        let probe: Probe = Arc::new(move |old| {
            let probed = answer(&old);
            Box::pin(async move { probed })
        });
        soon("a registration", Registration::start(self.registry.clone(), options, probe)).await
    }

    pub(crate) async fn view(&self, stage: &Stage) -> Reader {
        self.view_with(stage, times()).await
    }

    pub(crate) async fn view_with(&self, stage: &Stage, times: Times) -> Reader {
        let options = ViewOptions { times, ..ViewOptions::new(stage.cluster.clone(), 1) };
        Reader::new(soon("a view", WorkersView::open(self.registry.clone(), options)).await.unwrap())
    }
}

/// Options for a test in which calls run into their deadline.
pub(crate) fn hasty(endpoints: Vec<String>) -> EtcdOptions {
    EtcdOptions::new(endpoints)
}

/// Options for a test in which they do not, however busy the machine is.
pub(crate) fn patient(endpoints: Vec<String>) -> EtcdOptions {
    EtcdOptions { call_deadline: Duration::from_secs(20), ..EtcdOptions::new(endpoints) }
}

/// As a cluster's, but shorter; the lease is the shortest that etcd gives.
pub(crate) fn times() -> Times {
    Times {
        lease_ttl: Duration::from_secs(2),
        full_list_interval: Duration::from_secs(1),
        settle: Duration::from_millis(300),
        lapse_grace: Duration::from_secs(20),
        probe_max: Duration::from_secs(1),
        backoff_min: Duration::from_millis(20),
        backoff_max: Duration::from_millis(200),
    }
}

pub(crate) fn record(worker: &str, epoch: u64) -> WorkerRecord {
    WorkerRecord {
        worker: worker.into(),
        epoch: Epoch(epoch),
        addresses: vec![format!("{worker}:7070")],
        name: "org/demo".into(),
        revision: Revision([7; 32]),
        text_hash: [8; 32],
        numerics_id: "00ff".repeat(8),
        block_size_tokens: 32,
        hash_scheme: 1,
        context_tokens: 2048,
        blocks_total: 64,
        tp: 1,
        roles: BTreeSet::from(["generate".to_string()]),
        adapters: Vec::new(),
        state: WorkerState::Serving,
        wire: WireVersions { min: 1, max: 1 },
        started_unix_ms: 1_700_000_000_000,
    }
}

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(NEVER, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what} does not come"),
    }
}

/// Waits until the registration stands as `is_it` says.
pub(crate) async fn phase(
    registration: &mut Registration,
    what: &str,
    is_it: impl Fn(&RegistrationPhase) -> bool,
) -> RegistrationPhase {
    soon(what, async {
        loop {
            let status = registration.status();
            if is_it(&status.phase) {
                return status.phase;
            }
            registration.changed().await;
        }
    })
    .await
}

/// Waits until the lease was lost `losses` times and the record stands again.
pub(crate) async fn regained(registration: &mut Registration, losses: u64) {
    soon("a lease regained", async {
        while registration.status() != (RegistrationStatus { phase: RegistrationPhase::Standing, losses }) {
            registration.changed().await;
        }
    })
    .await;
}

/// Reads a view, and keeps what a router would know from it.
pub(crate) struct Reader {
    view: WorkersView,
    pub(crate) seen: Vec<ViewEvent>,
    pub(crate) workers: BTreeMap<WorkerKey, Arc<WorkerRecord>>,
}

impl Reader {
    pub(crate) fn new(view: WorkersView) -> Reader {
        Reader { view, seen: Vec::new(), workers: BTreeMap::new() }
    }

    /// Reads up to the first event of which `is_it` holds.
    pub(crate) async fn until(&mut self, what: &str, is_it: impl Fn(&ViewEvent) -> bool) -> ViewEvent {
        loop {
            let seen = &self.seen;
            let next = tokio::time::timeout(NEVER, self.view.next()).await;
            let Ok(next) = next else { panic!("{what} does not come; seen: {seen:#?}") };
            let event = next.expect("a view does not end");
            self.take(&event);
            if is_it(&event) {
                return event;
            }
        }
    }

    fn take(&mut self, event: &ViewEvent) {
        let is_first = self.seen.is_empty();
        assert_eq!(
            matches!(event, ViewEvent::Snapshot(_)),
            is_first,
            "one snapshot, first: {:#?}",
            self.seen
        );
        match event {
            ViewEvent::Snapshot(records) => {
                self.workers = records.iter().map(|record| (record.key(), record.clone())).collect();
            }
            ViewEvent::Changed(record) => {
                self.workers.insert(record.key(), record.clone());
            }
            ViewEvent::Removed(key) => {
                assert!(self.workers.remove(key).is_some(), "{key} left and was not there: {:#?}", self.seen);
            }
            _ => {}
        }
        self.seen.push(event.clone());
    }

    pub(crate) async fn snapshot(&mut self) {
        self.until("a snapshot", |event| matches!(event, ViewEvent::Snapshot(_))).await;
    }

    pub(crate) async fn stale(&mut self) {
        self.until("staleness", |event| matches!(event, ViewEvent::Stale { .. })).await;
    }

    pub(crate) async fn fresh(&mut self) {
        self.until("freshness", |event| *event == ViewEvent::Fresh).await;
    }

    pub(crate) async fn changed(&mut self, worker: &str) -> Arc<WorkerRecord> {
        let what = format!("a change of {worker}");
        let is_it =
            |event: &ViewEvent| matches!(event, ViewEvent::Changed(record) if record.worker == worker);
        self.until(&what, is_it).await;
        self.worker(worker).expect("it just changed")
    }

    pub(crate) async fn removed(&mut self, worker: &str) {
        let what = format!("the removal of {worker}");
        self.until(&what, |event| matches!(event, ViewEvent::Removed(key) if key.worker == worker)).await;
    }

    pub(crate) fn worker(&self, worker: &str) -> Option<Arc<WorkerRecord>> {
        self.workers.values().find(|record| record.worker == worker).cloned()
    }

    /// Whether any worker left so far.
    pub(crate) fn lost_anybody(&mut self) -> bool {
        while let Some(Some(event)) = self.view.next().now_or_never() {
            self.take(&event);
        }
        self.seen.iter().any(|event| matches!(event, ViewEvent::Removed(_)))
    }
}
