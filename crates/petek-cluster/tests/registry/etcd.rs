//! etcd as its client sees it when something fails: a test for each finding, on a real server.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{ConnectOptions, LeaseTimeToLiveOptions, Permission, PermissionType, WatchOptions};
use futures::StreamExt;
use petek_cluster::etcd::OptionsError;
use petek_cluster::record::WorkerState;
use petek_cluster::registration::{
    Probed, RegisterError, Registration, RegistrationOptions, RegistrationPhase,
};
use petek_cluster::registry::{Change, Registry, RegistryError, RegistryRevision, Swapped, WatchEnd};
use petek_cluster::watching::ViewOptions;
use petek_cluster::{
    Cluster, EtcdOptions, EtcdRegistry, EtcdTls, Times, ViewEvent, Wait, WorkersView, etcd::EtcdUser,
};
use petek_core::ids::Epoch;

use crate::proxy::Proxy;
use crate::server::Etcd;
use crate::stage::{Reader, hasty, patient, phase, record, regained, soon, times};

const NOTHING: RegistryRevision = RegistryRevision(0);

fn cluster() -> Cluster {
    Cluster::new("rows").unwrap()
}

async fn registry(endpoint: String) -> Arc<dyn Registry> {
    Arc::new(EtcdRegistry::new(patient(vec![endpoint])).await.unwrap())
}

async fn hasty_registry(endpoint: String) -> Arc<dyn Registry> {
    Arc::new(EtcdRegistry::new(hasty(vec![endpoint])).await.unwrap())
}

async fn raw(endpoint: String) -> etcd_client::Client {
    etcd_client::Client::connect([endpoint], None).await.unwrap()
}

async fn open(registry: &Arc<dyn Registry>, wait: Wait) -> Result<WorkersView, RegistryError> {
    let options = ViewOptions { times: times(), wait, ..ViewOptions::new(cluster(), 1) };
    soon("a view", WorkersView::open(registry.clone(), options)).await
}

async fn view(registry: &Arc<dyn Registry>) -> Reader {
    let mut reader = Reader::new(open(registry, Wait::Forever).await.unwrap());
    reader.snapshot().await;
    reader
}

async fn register(registry: &Arc<dyn Registry>, epoch: u64) -> Result<Registration, RegisterError> {
    let options = RegistrationOptions {
        cluster: cluster(),
        record: record("w", epoch),
        times: times(),
        wait: Wait::Forever,
    };
    let probe = Arc::new(|_| futures::FutureExt::boxed(async { Probed::Silent }));
    soon("a registration", Registration::start(registry.clone(), options, probe)).await
}

async fn put(registry: &Arc<dyn Registry>, key: &str, value: &str) -> RegistryRevision {
    match registry.swap(key, NOTHING, value.into(), None).await.unwrap() {
        Swapped::Done(revision) => revision,
        Swapped::Found(found) => panic!("{key} holds {found:?}"),
    }
}

/// Looks again and again until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !is_so().await {
            tokio::time::sleep(times().backoff_min).await;
        }
    })
    .await;
}

/// Waits until a lease of `seconds` that nobody keeps has run out, over a connection of its own.
async fn hourglass(client: &mut etcd_client::Client, seconds: i64) {
    let lease = client.lease_grant(seconds, None).await.unwrap().id();
    until("the end of a lease", async || client.lease_time_to_live(lease, None).await.unwrap().ttl() < 0)
        .await;
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_writer(move || log.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn lines(&self, with: &[&str]) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| with.iter().all(|word| line.contains(word))).map(String::from).collect()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_start_waits_for_etcd_and_says_so_once() {
    let Some(mut etcd) = Etcd::own("a_start_waits_for_etcd_and_says_so_once", &[]) else { return };
    etcd.kill();
    let log = Log::default();
    let _listening = log.listen();
    // Nothing is sent yet, so nothing fails, with a user or without.
    let mut with_user = hasty(vec![etcd.endpoint()]);
    with_user.user = Some(EtcdUser { name: "petek".into(), password: "secret".into() });
    let with_user: Arc<dyn Registry> = Arc::new(EtcdRegistry::new(with_user).await.unwrap());
    let registry = registry(etcd.endpoint()).await;
    for registry in [&registry, &with_user] {
        let error = open(registry, Wait::AtMost(Duration::ZERO)).await.unwrap_err();
        assert!(
            matches!(&error, RegistryError::Away { endpoint, .. } if *endpoint == etcd.endpoint()),
            "{error}"
        );
        assert!(error.to_string().contains("refused"), "the reason, not only that there is one: {error}");
    }
    assert_eq!(log.lines(&["WARN"]), [""; 0], "a single try is the caller's to report");

    let (opened, ()) = tokio::join!(open(&registry, Wait::Forever), async {
        until("a few tries", async || log.lines(&["DEBUG", "still cannot be used"]).len() >= 3).await;
        etcd.restart();
    });
    Reader::new(opened.unwrap()).snapshot().await;
    let endpoint = etcd.endpoint();
    assert_eq!(log.lines(&["WARN", &endpoint]).len(), 1, "{:#?}", log.lines(&[]));
    assert_eq!(log.lines(&["INFO", "registry back", &endpoint]).len(), 1);
}

#[tokio::test]
async fn a_killed_etcd_costs_nothing_once_it_is_back() {
    let Some(mut etcd) = Etcd::own("a_killed_etcd_costs_nothing_once_it_is_back", &[]) else { return };
    let registry = registry(etcd.endpoint()).await;
    let mut worker = register(&registry, 5).await.unwrap();
    let mut view = view(&registry).await;
    let prefix = cluster().workers_prefix();
    let before = registry.list(&prefix).await.unwrap().entries;

    etcd.kill();
    view.stale().await;
    let error = registry.list(&prefix).await.unwrap_err();
    assert!(matches!(error, RegistryError::Away { .. }), "{error}");
    phase(&mut worker, "the loss", |phase| matches!(phase, RegistrationPhase::Lost { .. })).await;
    etcd.restart();
    view.fresh().await;
    regained(&mut worker, 1).await;
    // Leases survive a restart, and so does what stands under them: the first keep-alive finds all as it was.
    assert_eq!(registry.list(&prefix).await.unwrap().entries, before);
    worker.set_state(WorkerState::Draining).await.unwrap();
    assert_eq!(view.changed("w").await.state, WorkerState::Draining);
    assert!(!view.lost_anybody());
}

#[tokio::test]
async fn after_a_restart_a_dead_worker_s_record_lives_its_whole_lease_again() {
    let test = "after_a_restart_a_dead_worker_s_record_lives_its_whole_lease_again";
    let Some(mut etcd) = Etcd::own(test, &[]) else { return };
    let registry = registry(etcd.endpoint()).await;
    let lease = registry.grant(Duration::from_secs(6)).await.unwrap();
    let key = cluster().worker_key(&record("w", 1).key());
    registry.swap(&key, NOTHING, record("w", 1).to_value().unwrap(), Some(lease.id)).await.unwrap();
    let mut client = raw(etcd.endpoint()).await;
    let left = async |client: &mut etcd_client::Client| {
        client.lease_time_to_live(lease.id.0, None::<LeaseTimeToLiveOptions>).await.unwrap().ttl()
    };
    until("most of the lease to be over", async || left(&mut client).await <= 2).await;
    etcd.kill();
    etcd.restart();
    let mut client = raw(etcd.endpoint()).await;
    assert!(left(&mut client).await >= 3, "so a view alone does not say who lives: routers check themselves");
    assert!(view(&registry).await.worker("w").is_some());
}

#[tokio::test]
async fn an_emptied_etcd_fills_again_and_costs_no_worker() {
    let Some(mut etcd) = Etcd::own("an_emptied_etcd_fills_again_and_costs_no_worker", &[]) else { return };
    let registry = registry(etcd.endpoint()).await;
    // So far that the new history stays behind it.
    for n in 0..50 {
        put(&registry, &format!("/elsewhere/{n}"), "x").await;
    }
    let mut worker = register(&registry, 5).await.unwrap();
    let mut view = view(&registry).await;
    let known = registry.list("/").await.unwrap().revision;
    etcd.kill();
    view.stale().await;
    etcd.wipe();
    etcd.restart();
    view.fresh().await;
    regained(&mut worker, 1).await;
    worker.set_state(WorkerState::Draining).await.unwrap();
    assert_eq!(view.changed("w").await.state, WorkerState::Draining);
    assert_eq!(view.worker("w").unwrap().epoch, Epoch(5));
    assert!(!view.lost_anybody(), "{:#?}", view.seen);
    let all = registry.list("/petek/").await.unwrap();
    assert!(all.revision < known, "{:?} is another history", all.revision);
    assert_eq!(all.entries.len(), 2, "the record, and the settings published again");
}

/// The case that broke others: a short outage restarted everything, a put under a dead lease made a key for ever.
#[tokio::test]
async fn an_etcd_frozen_for_longer_than_a_lease_costs_nothing() {
    let Some(etcd) = Etcd::own("an_etcd_frozen_for_longer_than_a_lease_costs_nothing", &[]) else { return };
    let registry = hasty_registry(etcd.endpoint()).await;
    let mut worker = register(&registry, 5).await.unwrap();
    let mut view = view(&registry).await;
    let prefix = cluster().workers_prefix();
    let before = registry.list(&prefix).await.unwrap().entries;
    etcd.freeze();
    view.stale().await;
    let error = soon("an answer", registry.list(&prefix)).await.unwrap_err();
    assert!(error.to_string().contains("no answer within 2s"), "{error}");
    phase(&mut worker, "the loss", |phase| matches!(phase, RegistrationPhase::Lost { .. })).await;
    assert_eq!(view.workers.len(), 1);

    etcd.thaw();
    view.fresh().await;
    regained(&mut worker, 1).await;
    // It may be the old lease, if etcd saw the keep-alive that waited for it first. Both are right.
    until("the record", async || registry.list(&prefix).await.unwrap().entries.len() == 1).await;
    let after = registry.list(&prefix).await.unwrap().entries;
    assert_eq!((&after[0].key, &after[0].value), (&before[0].key, &before[0].value), "same epoch, one key");
    assert!(after[0].lease.is_some_and(|lease| lease.0 != 0), "never without a lease");
    worker.set_state(WorkerState::Draining).await.unwrap();
    view.changed("w").await;
    assert!(!view.lost_anybody(), "{:#?}", view.seen);
}

#[tokio::test]
async fn a_silent_connection_ends_a_watch() {
    let Some(etcd) = Etcd::shared("a_silent_connection_ends_a_watch") else { return };
    let proxy = Proxy::to(etcd.endpoint()).await;
    let registry = hasty_registry(proxy.address().into()).await;
    let now = registry.list("/silent/").await.unwrap().revision;
    let mut watch = registry.watch("/silent/", now).await.unwrap();
    proxy.freeze();
    let error = registry.get("/silent/x").await.unwrap_err();
    assert!(matches!(error, RegistryError::Away { .. }), "{error}");
    // Nothing but an unanswered ping can tell.
    let end = soon("the end of the watch", watch.next()).await.unwrap().unwrap_err();
    assert!(matches!(end, WatchEnd::Lost(RegistryError::Away { .. })), "{end:?}");
    proxy.heal();
    until("the same client to work again", async || registry.get("/silent/x").await.is_ok()).await;
}

#[tokio::test]
async fn a_healthy_connection_is_not_pinged_to_death() {
    let Some(etcd) = Etcd::shared("a_healthy_connection_is_not_pinged_to_death") else { return };
    let mut often = EtcdOptions::new(vec![etcd.endpoint()]);
    often.ping_interval = Duration::from_secs(1);
    let refused = EtcdRegistry::new(often).await.err();
    assert!(matches!(refused, Some(OptionsError::PingTooOften { .. })), "{refused:?}");

    let mut least = EtcdOptions::new(vec![etcd.endpoint()]);
    least.ping_interval = Duration::from_secs(5);
    let ours = EtcdRegistry::new(least).await.unwrap();
    let now = ours.list("/idle/").await.unwrap().revision;
    let mut ours = ours.watch("/idle/", now).await.unwrap();
    // What we refuse, done all the same: the server ends the connection of whoever pings each second.
    let theirs = async {
        for _ in 0..2 {
            let hasty = ConnectOptions::new().with_keep_alive(Duration::from_secs(1), Duration::from_secs(2));
            let mut client = etcd_client::Client::connect([etcd.endpoint()], Some(hasty)).await.unwrap();
            let mut watch = client.watch("/idle/", Some(WatchOptions::new().with_prefix())).await.unwrap();
            while let Ok(Some(_)) = watch.message().await {}
        }
    };
    tokio::select! {
        () = soon("the end of those who ping too often", theirs) => {}
        end = ours.next() => panic!("an idle, healthy watch ended: {end:?}"),
    }
}

#[tokio::test]
async fn a_watch_outlives_the_deadline_of_calls() {
    let Some(etcd) = Etcd::shared("a_watch_outlives_the_deadline_of_calls") else { return };
    let options = hasty(vec![etcd.endpoint()]);
    let registry = EtcdRegistry::new(options.clone()).await.unwrap();
    let lease = registry.grant(Duration::from_secs(5)).await.unwrap();
    assert!(lease.ttl > options.call_deadline * 2);
    let put = registry.swap("/deadline/x", NOTHING, "1".into(), Some(lease.id)).await.unwrap();
    let Swapped::Done(written) = put else { panic!("{put:?}") };
    let mut watch = registry.watch("/deadline/", written).await.unwrap();
    let changes = soon("the end of the lease", watch.next()).await.unwrap().unwrap();
    assert!(
        matches!(&changes.list[..], [Change::Deleted { key, .. }] if key == "/deadline/x"),
        "{changes:?}"
    );
}

#[tokio::test]
async fn a_dead_endpoint_beside_a_living_one_fails_no_call() {
    let Some(etcd) = Etcd::shared("a_dead_endpoint_beside_a_living_one_fails_no_call") else { return };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = {
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        port.local_addr().unwrap().to_string()
    };
    let silent = silent.local_addr().unwrap().to_string();
    for dead in [&refused, &silent] {
        for endpoints in [[dead.clone(), etcd.endpoint()], [etcd.endpoint(), dead.clone()]] {
            let registry = EtcdRegistry::new(hasty(endpoints.to_vec())).await.unwrap();
            // Ten deadlines for 40 calls: who asks the dead one first each time needs 40.
            let calls = async {
                for n in 0..40 {
                    registry.get("/dead/x").await.unwrap_or_else(|error| panic!("call {n}: {error}"));
                }
            };
            let bound = hasty(Vec::new()).call_deadline * 10;
            tokio::time::timeout(bound, calls).await.expect("the dead endpoint is asked again and again");
            let now = registry.list("/dead/").await.unwrap().revision;
            assert!(registry.watch("/dead/", now).await.is_ok());
        }
    }
    let both = EtcdRegistry::new(hasty(vec![refused.clone(), silent.clone()])).await.unwrap();
    let error = both.get("/dead/x").await.unwrap_err().to_string();
    assert!(error.contains(&refused) && error.contains(&silent), "{error}");
    assert!(error.contains("refused") && error.contains("no answer within"), "{error}");
}

#[tokio::test]
async fn a_short_lease_is_as_long_as_etcd_says() {
    let Some(etcd) = Etcd::own("a_short_lease_is_as_long_as_etcd_says", &[]) else { return };
    let registry = registry(etcd.endpoint()).await;
    let lease = registry.grant(Duration::from_millis(300)).await.unwrap();
    assert!(lease.ttl >= Duration::from_secs(2), "{:?}", lease.ttl);
    let options = RegistrationOptions {
        cluster: cluster(),
        record: record("w", 1),
        times: Times { lease_ttl: Duration::from_millis(300), ..times() },
        wait: Wait::Forever,
    };
    let probe = Arc::new(|_| futures::FutureExt::boxed(async { Probed::Silent }));
    let worker = Registration::start(registry.clone(), options, probe).await.unwrap();
    let before = registry.list(&cluster().workers_prefix()).await.unwrap().entries;
    hourglass(&mut raw(etcd.endpoint()).await, 3).await;
    assert_eq!(registry.list(&cluster().workers_prefix()).await.unwrap().entries, before);
    assert_eq!(worker.status().losses, 0);
}

#[tokio::test]
async fn a_value_too_large_is_not_taken_for_a_wrong_password() {
    let Some(etcd) = Etcd::shared("a_value_too_large_is_not_taken_for_a_wrong_password") else { return };
    let registry = registry(etcd.endpoint()).await;
    // Too large for etcd, and for its transport: two codes, two sentences.
    for (bytes, says) in [(1_800_000, "request is too large"), (3_000_000, "larger than max")] {
        let refused = registry.swap("/large/x", NOTHING, vec![b'x'; bytes], None).await.unwrap_err();
        assert!(matches!(&refused, RegistryError::Unable { why, .. } if why.contains(says)), "{refused}");
        assert!(!refused.is_passing());
    }
}

/// An etcd with authentication on, and roles as the manual gives them: a worker reads and writes its cluster's keys, a
/// router reads the records; root may all, a stranger nothing.
async fn guarded(test: &str) -> Option<(Etcd, etcd_client::Client)> {
    let etcd = Etcd::own(test, &["--bcrypt-cost", "4", "--auth-token-ttl", "1"])?;
    let mut client = raw(etcd.endpoint()).await;
    for (user, access) in [
        ("root", None),
        ("worker", Some((PermissionType::Readwrite, "/petek/v1/rows/"))),
        ("router", Some((PermissionType::Read, ROUTER_READS))),
        ("stranger", None),
    ] {
        client.user_add(user, "secret", None).await.unwrap();
        client.role_add(user).await.unwrap();
        client.user_grant_role(user, user).await.unwrap();
        if let Some((access, prefix)) = access {
            client.role_grant_permission(user, Permission::new(access, prefix).with_prefix()).await.unwrap();
        }
    }
    client.auth_enable().await.unwrap();
    let root = ConnectOptions::new().with_user("root", "secret").with_auto_token_refresh(true);
    let client = etcd_client::Client::connect([etcd.endpoint()], Some(root)).await.unwrap();
    Some((etcd, client))
}

const ROUTER_READS: &str = "/petek/v1/rows/workers/";

async fn user(etcd: &Etcd, name: &str, password: &str) -> Arc<dyn Registry> {
    let mut options = patient(vec![etcd.endpoint()]);
    options.user = Some(EtcdUser { name: name.into(), password: password.into() });
    Arc::new(EtcdRegistry::new(options).await.unwrap())
}

#[tokio::test]
async fn whom_etcd_does_not_know_is_told_so_at_once() {
    let Some((etcd, _root)) = guarded("whom_etcd_does_not_know_is_told_so_at_once").await else { return };
    let denied = |error: &RegistryError, says: &str| {
        assert!(matches!(error, RegistryError::Denied { .. }) && !error.is_passing(), "{error}");
        assert!(error.to_string().contains(says) && error.to_string().contains(&etcd.endpoint()), "{error}");
    };
    // Though both would wait for an etcd that is away for ever.
    let check = async |registry: Arc<dyn Registry>, says: &str| {
        denied(&open(&registry, Wait::Forever).await.unwrap_err(), says);
        match register(&registry, 1).await.unwrap_err() {
            RegisterError::Registry(error) => denied(&error, says),
            error => panic!("{error}"),
        }
    };
    check(registry(etcd.endpoint()).await, "user name is empty").await;
    check(user(&etcd, "worker", "wrong").await, "authentication failed").await;
    check(user(&etcd, "nobody", "secret").await, "authentication failed").await;
    check(user(&etcd, "stranger", "secret").await, "permission denied").await;

    // etcd's answer to such a watch is one message, then silence on an open stream.
    let stranger = user(&etcd, "stranger", "secret").await;
    let end = soon("an answer", stranger.watch(&cluster().workers_prefix(), NOTHING)).await.err();
    match end {
        Some(WatchEnd::Lost(error)) => denied(&error, "permission denied"),
        end => panic!("{end:?}"),
    }

    // A router only reads.
    let router = user(&etcd, "router", "secret").await;
    let mut view = view(&router).await;
    let worker = register(&user(&etcd, "worker", "secret").await, 1).await.unwrap();
    view.changed("w").await;
    match register(&router, 2).await.unwrap_err() {
        RegisterError::Registry(error) => denied(&error, "permission denied"),
        error => panic!("{error}"),
    }
    assert_eq!(worker.status().losses, 0);
}

#[tokio::test]
async fn a_token_that_is_over_is_renewed_for_calls_and_watches() {
    let Some((mut etcd, mut root)) = guarded("a_token_that_is_over_is_renewed_for_calls_and_watches").await
    else {
        return;
    };
    let worker = user(&etcd, "worker", "secret").await;
    let router = user(&etcd, "router", "secret").await;
    let prefix = cluster().workers_prefix();
    let written = put(&worker, &format!("{prefix}a"), "1").await;
    drop(router.watch(&prefix, written).await.unwrap());
    let lease = worker.grant(Duration::from_secs(60)).await.unwrap();

    // Idle for longer than a token lives.
    hourglass(&mut root, 3).await;
    worker.keep_alive(lease.id).await.unwrap();
    let mut watch = router.watch(&prefix, written).await.unwrap();
    put(&worker, &format!("{prefix}b"), "1").await;
    let changes = soon("the change", watch.next()).await.unwrap().unwrap();
    assert!(matches!(&changes.list[..], [Change::Put(entry)] if entry.key.ends_with('b')), "{changes:?}");

    // A restarted etcd knows none of the tokens it gave.
    let mut view = view(&router).await;
    etcd.kill();
    view.stale().await;
    etcd.restart();
    view.fresh().await;
    let _worker = register(&worker, 1).await.unwrap();
    view.changed("w").await;
}

#[tokio::test]
async fn a_user_for_an_etcd_without_users_is_a_warning() {
    let Some(etcd) = Etcd::shared("a_user_for_an_etcd_without_users_is_a_warning") else { return };
    let log = Log::default();
    let _listening = log.listen();
    let registry = user(etcd, "petek", "secret").await;
    for _ in 0..3 {
        registry.get("/users/x").await.unwrap();
    }
    assert_eq!(log.lines(&["WARN", "authentication turned off"]).len(), 1, "{:#?}", log.lines(&[]));
    assert_eq!(log.lines(&["secret"]), [""; 0]);
}

/// An authority, and certificates from it.
struct Authority {
    pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Certificate and key.
    fn issue(&self, usage: rcgen::ExtendedKeyUsagePurpose) -> (String, String) {
        let names = ["localhost", "127.0.0.1", "etcd.internal"].map(String::from);
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![usage];
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

#[tokio::test]
async fn mutual_tls_by_address_and_by_name() {
    use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (certificate, key) = ours.issue(ServerAuth);
    let (certificate, key, ca) =
        (file("cert.pem", &certificate), file("key.pem", &key), file("ca.pem", &ours.pem));
    let more =
        ["--cert-file", &certificate, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"];
    let Some(etcd) = Etcd::own("mutual_tls_by_address_and_by_name", &more) else { return };
    let port = etcd.endpoint().rsplit_once(':').unwrap().1.to_string();
    let by_name = format!("localhost:{port}");

    let identity = |authority: &Authority| {
        let (certificate, key) = authority.issue(ClientAuth);
        Some((certificate.into_bytes(), key.into_bytes()))
    };
    let get = async |endpoint: &str, ca: &str, identity: Option<(Vec<u8>, Vec<u8>)>, domain: Option<&str>| {
        let mut options = patient(vec![endpoint.into()]);
        options.tls = Some(EtcdTls { ca: ca.into(), identity, domain: domain.map(String::from) });
        let registry = EtcdRegistry::new(options).await.unwrap();
        // A server that refuses a certificate may close the connection before its reason has come through.
        soon("a yes or a no", async {
            loop {
                match registry.get("/tls/x").await {
                    Err(RegistryError::Away { .. }) => {}
                    answer => return answer,
                }
            }
        })
        .await
    };
    let check = |got: Result<_, RegistryError>, says: &str| {
        let error = got.expect_err(says);
        assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    };
    assert_eq!(get(&etcd.endpoint(), &ours.pem, identity(&ours), None).await, Ok(None));
    assert_eq!(get(&by_name, &ours.pem, identity(&ours), None).await, Ok(None));
    assert_eq!(get(&format!("https://{by_name}"), &ours.pem, identity(&ours), None).await, Ok(None));
    assert_eq!(get(&by_name, &ours.pem, identity(&ours), Some("etcd.internal")).await, Ok(None));
    check(get(&by_name, &ours.pem, identity(&ours), Some("another.internal")).await, "not valid for name");
    check(get(&by_name, &theirs.pem, identity(&ours), None).await, "UnknownIssuer");
    // Which alert it is depends on the server's version.
    check(get(&by_name, &ours.pem, None, None).await, "received fatal alert");
    check(get(&by_name, &ours.pem, identity(&theirs), None).await, "received fatal alert");
    let plain = EtcdRegistry::new(hasty(vec![by_name.clone()])).await.unwrap().get("/tls/x").await;
    assert!(matches!(plain, Err(RegistryError::Away { .. })), "{plain:?}");

    let mut broken = hasty(vec![by_name]);
    broken.tls = Some(EtcdTls {
        ca: ours.pem.clone().into(),
        identity: Some((b"no certificate".to_vec(), b"no key".to_vec())),
        domain: None,
    });
    let refused = EtcdRegistry::new(broken).await.err();
    assert!(matches!(refused, Some(OptionsError::Tls { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_view_that_is_denied_later_stays_and_says_so() {
    let Some((etcd, mut root)) = guarded("a_view_that_is_denied_later_stays_and_says_so").await else {
        return;
    };
    let worker = register(&user(&etcd, "worker", "secret").await, 1).await.unwrap();
    let mut view = view(&user(&etcd, "router", "secret").await).await;
    root.role_revoke_permission(
        "router",
        ROUTER_READS,
        Some(etcd_client::RoleRevokePermissionOptions::new().with_prefix()),
    )
    .await
    .unwrap();
    let is_stale = |event: &ViewEvent| matches!(event, ViewEvent::Stale { .. });
    let stale = view.until("staleness", is_stale).await;
    assert!(matches!(&stale, ViewEvent::Stale { why } if why.contains("permission denied")), "{stale:?}");
    assert!(view.worker("w").is_some());
    let permission = Permission::new(PermissionType::Read, ROUTER_READS).with_prefix();
    root.role_grant_permission("router", permission).await.unwrap();
    view.fresh().await;
    worker.set_state(WorkerState::Draining).await.unwrap();
    view.changed("w").await;
}
