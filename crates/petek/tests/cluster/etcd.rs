//! etcd restarts, forgets, stands still and goes away, under load: no request fails, and the workers are there again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tokio::task::JoinSet;

use crate::client::{Client, ask, client, spec};
use crate::server::Etcd;
use crate::stage::{Process, Stage, takes_work, until};

/// The least that etcd grants.
const LEASE_TTL_S: u64 = 2;
/// Fifteen leases long.
const AWAY: Duration = Duration::from_secs(15 * LEASE_TTL_S);
/// As many pings of etcd's clients go unanswered as it takes to lose a connection, and several leases end.
const SILENT: Duration = Duration::from_secs(12);

/// Clients that ask one thing after the other; whatever is no whole answer fails the test.
struct Load {
    is_over: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    clients: JoinSet<()>,
}

impl Load {
    fn start(client: &Client) -> Self {
        let (is_over, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for number in 0..4 {
            let (client, is_over, answers) = (client.clone(), is_over.clone(), answers.clone());
            clients.spawn(async move {
                let mut seed = number;
                while !is_over.load(Ordering::Relaxed) {
                    seed += 4;
                    ask(&client, spec("All the while", seed, 200)).await.bytes();
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Load { is_over, answers, clients }
    }

    /// Waits until so many more answers came.
    async fn goes_on(&self, more: u64) {
        let enough = self.answers.load(Ordering::Relaxed) + more;
        until("answers go on", async || {
            self.answers.load(Ordering::Relaxed) >= enough || self.clients.is_empty()
        })
        .await;
    }

    async fn ends(mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("every answer was whole");
        }
    }
}

/// A cluster of two workers under load.
struct Scene {
    etcd: Etcd,
    stage: Stage,
    workers: [Process; 2],
    router: Process,
    epochs: Vec<String>,
    load: Load,
}

impl Scene {
    async fn set(test: &str) -> Option<Scene> {
        let etcd = Etcd::own(test, &[])?;
        let stage = Stage::new(etcd.endpoint());
        let ttl = LEASE_TTL_S.to_string();
        let workers = ["a", "b"].map(|id| stage.worker(id).set("ETCD__LEASE_TTL_S", &ttl).start());
        let router = stage.router("router").set("ETCD__LEASE_TTL_S", &ttl).start();
        router.reaches(&["a", "b"]).await;
        let load = Load::start(&client(&router).await);
        let mut scene = Scene { etcd, stage, workers, router, epochs: Vec::new(), load };
        scene.epochs = scene.registered().await;
        Some(scene)
    }

    /// Waits until the router knows that it knows nothing new.
    async fn is_cut_off(&self) {
        until("the router's view is stale", async || self.router.list().await.registry_stale).await;
        self.load.goes_on(20).await;
    }

    /// Waits until all is as it should be: both workers' records stand under leases, and the router's view is fresh.
    async fn registered(&self) -> Vec<String> {
        let mut epochs = Vec::new();
        until("both workers are registered", async || {
            let records = self.stage.records().await;
            epochs = records.values().map(|(record, _)| record["epoch"].to_string()).collect();
            let all = records.keys().eq(["a", "b"]) && records.values().all(|(_, lease)| *lease != 0);
            let list = self.router.list().await;
            all && !list.registry_stale
                && list.workers.iter().filter(|worker| takes_work(worker)).count() == 2
        })
        .await;
        self.load.goes_on(20).await;
        epochs
    }

    /// The same workers as at the start, and a router that sees what is new.
    async fn is_whole(&mut self) {
        assert_eq!(self.registered().await, self.epochs, "the same engines");
        let mut third = self.stage.worker("c").start();
        until("a new worker is seen", async || self.router.sees("c").await.as_ref().is_some_and(takes_work))
            .await;
        third.signal(Signal::TERM);
        assert_eq!(third.ended().await.0, Some(0));
        until("a worker that left is forgotten", async || self.router.sees("c").await.is_none()).await;
    }

    /// Nobody lost a request, or their life.
    async fn ends(mut self) {
        self.load.ends().await;
        for process in self.workers.iter_mut().chain([&mut self.router]) {
            process.signal(Signal::TERM);
            let (code, said) = process.ended().await;
            assert_eq!(code, Some(0), "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_restarts_forgets_or_compacts_costs_nothing() {
    let Some(mut scene) = Scene::set("an_etcd_that_restarts_forgets_or_compacts").await else { return };
    // With its data.
    scene.etcd.kill();
    scene.is_cut_off().await;
    scene.etcd.restart();
    scene.is_whole().await;

    // Without. Its revisions begin anew, far below what the router has seen.
    scene.etcd.kill();
    scene.is_cut_off().await;
    scene.etcd.wipe();
    scene.etcd.restart();
    scene.is_whole().await;

    // Its history is gone, up to a revision that the router has not seen when it comes back.
    scene.etcd.kill();
    scene.is_cut_off().await;
    scene.etcd.restart();
    let mut client = scene.stage.etcd().await;
    let mut revision = 0;
    for n in 0..20 {
        let put = client.put("/elsewhere", n.to_string(), None).await.expect("put a key");
        revision = put.header().map_or(0, |header| header.revision());
    }
    client.compact(revision, None).await.expect("compact");
    scene.is_whole().await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_away_or_silent_for_many_leases_costs_nothing() {
    let Some(mut scene) = Scene::set("an_etcd_that_is_away_or_silent").await else { return };
    scene.etcd.kill();
    scene.is_cut_off().await;
    tokio::time::sleep(AWAY).await;
    scene.load.goes_on(20).await;
    scene.etcd.restart();
    scene.is_whole().await;

    scene.etcd.freeze();
    scene.is_cut_off().await;
    tokio::time::sleep(SILENT).await;
    scene.load.goes_on(20).await;
    scene.etcd.thaw();
    scene.is_whole().await;
    scene.ends().await;
}
