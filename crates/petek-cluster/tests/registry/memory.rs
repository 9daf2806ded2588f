//! What only a registry in memory can be made to do: to lose a change, to cancel its watches, to be wiped in an
//! instant. The clock stands still.

use std::sync::Arc;
use std::time::Duration;

use petek_cluster::record::WorkerState;
use petek_cluster::registration::Registration;
use petek_cluster::registry::{Registry, RegistryRevision};
use petek_cluster::{MemoryRegistry, Times, ViewEvent};

use crate::stage::{Client, Line, Reader, Stage, record, regained, times};

/// A registry with one worker and one view.
struct House {
    stage: Stage,
    registry: MemoryRegistry,
    client: Client,
    worker: Registration,
    view: Reader,
}

impl House {
    async fn new() -> House {
        let stage = Stage::memory();
        let client = stage.client().await;
        let Line::Memory(registry) = &client.line else { unreachable!("the stage is in memory") };
        let registry = registry.clone();
        let worker = client.register(&stage, &record("w", 1)).await.unwrap();
        let mut view = client.view(&stage).await;
        view.snapshot().await;
        House { stage, registry, client, worker, view }
    }

    fn differed(view: &Reader) -> usize {
        let keys = view.seen.iter().filter_map(|event| match event {
            ViewEvent::Differed { keys } => Some(*keys),
            _ => None,
        });
        keys.sum()
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_list_finds_what_the_watch_lost() {
    let mut house = House::new().await;
    house.registry.lose_next_change();
    house.worker.set_state(WorkerState::Draining).await.unwrap();
    assert_eq!(house.view.changed("w").await.state, WorkerState::Draining);
    assert_eq!(House::differed(&house.view), 1);

    house.registry.lose_next_change();
    let other = house.client.register(&house.stage, &record("x", 2)).await.unwrap();
    house.view.changed("x").await;
    assert_eq!(House::differed(&house.view), 2);

    house.registry.lose_next_change();
    house.worker.leave().await.unwrap();
    house.view.removed("w").await;
    assert_eq!(House::differed(&house.view), 3);

    drop(other);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_a_little_behind_a_full_list_lost_nothing() {
    let mut house = House::new().await;
    // The first list falls between 0.9 s and 1.1 s, and is compared 0.3 s later.
    tokio::time::sleep(Duration::from_millis(850)).await;
    house.registry.set_behind(true);
    house.worker.set_state(WorkerState::Draining).await.unwrap();
    let other = house.client.register(&house.stage, &record("x", 2)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    house.registry.set_behind(false);
    house.view.changed("w").await;
    house.view.changed("x").await;
    tokio::time::sleep(times().settle).await;
    other.set_state(WorkerState::Draining).await.unwrap();
    house.view.changed("x").await;
    assert_eq!(House::differed(&house.view), 0, "{:#?}", house.view.seen);

    // One that is behind for longer counts as lossy, and the view is right without it.
    house.registry.set_behind(true);
    house.worker.set_state(WorkerState::Serving).await.unwrap();
    assert_eq!(house.view.changed("w").await.state, WorkerState::Serving);
    assert_eq!(House::differed(&house.view), 1);
    house.registry.set_behind(false);
    house.worker.set_state(WorkerState::Draining).await.unwrap();
    assert_eq!(house.view.changed("w").await.state, WorkerState::Draining);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_watch_is_listed_again_and_nobody_is_stale() {
    let mut house = House::new().await;
    for state in [WorkerState::Draining, WorkerState::Serving] {
        house.registry.cancel_watches();
        house.worker.set_state(state).await.unwrap();
        assert_eq!(house.view.changed("w").await.state, state);
    }
    assert!(!house.view.seen.iter().any(|event| matches!(event, ViewEvent::Stale { .. })));
}

#[tokio::test(start_paused = true)]
async fn leases_that_all_end_cost_no_worker() {
    let mut house = House::new().await;
    house.registry.end_leases();
    regained(&mut house.worker, 1).await;
    house.worker.set_state(WorkerState::Draining).await.unwrap();
    house.view.changed("w").await;
    assert!(!house.view.lost_anybody(), "{:#?}", house.view.seen);
}

#[tokio::test(start_paused = true)]
async fn a_wiped_registry_fills_again_and_costs_no_worker() {
    let mut house = House::new().await;
    // Far ahead of what the new history will reach.
    for n in 0..100 {
        let x = record("x", n);
        house.client.write(&house.stage.cluster.worker_key(&x.key()), x.to_value().unwrap()).await;
    }
    while house.view.changed("x").await.epoch.0 < 99 {}
    house.registry.wipe();
    house.view.stale().await;
    house.view.fresh().await;
    regained(&mut house.worker, 1).await;
    house.worker.set_state(WorkerState::Draining).await.unwrap();
    assert_eq!(house.view.changed("w").await.state, WorkerState::Draining);
    assert!(!house.view.lost_anybody(), "{:#?}", house.view.seen);
    let settings = house.stage.cluster.settings_key("org/demo", &record("w", 1).revision);
    assert!(house.registry.get(&settings).await.unwrap().is_some(), "the settings are published again");
    let now = house.registry.list("/").await.unwrap().revision;
    assert!(now < RegistryRevision(100), "{now:?}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_died_with_the_old_data_leaves_after_the_grace() {
    let mut house = House::new().await;
    drop(house.worker);
    house.registry.wipe();
    house.view.stale().await;
    house.view.removed("w").await;
    let grace = times().lapse_grace;
    assert!(grace > times().lease_ttl, "a living one would have come back");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_dropped_while_the_registry_is_away() {
    let stage = Stage::memory();
    let (worker, router) = (stage.client().await, stage.client().await);
    let Line::Memory(line) = &router.line else { unreachable!("the stage is in memory") };
    let registration = worker.register(&stage, &record("w", 1)).await.unwrap();
    let times = Times { lapse_grace: Duration::from_secs(5), ..times() };
    let mut view = router.view_with(&stage, times).await;
    view.snapshot().await;
    worker.cut();
    // The record is gone, the grace runs: then the router is cut off, for ten graces.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(router.list(&stage.cluster).await, []);
    line.cut();
    view.stale().await;
    tokio::time::sleep(times.lapse_grace * 10).await;
    assert!(!view.lost_anybody());
    // Once both are back the worker has its whole grace to come back, though not one moment of it is left.
    line.heal();
    view.fresh().await;
    tokio::time::sleep(times.lapse_grace / 2).await;
    worker.heal();
    registration.set_state(WorkerState::Serving).await.ok();
    drop(registration);
    assert!(!view.lost_anybody());
    view.removed("w").await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_with_all_data_costs_nothing() {
    let mut house = House::new().await;
    house.registry.restart();
    house.view.stale().await;
    house.view.fresh().await;
    house.worker.set_state(WorkerState::Draining).await.unwrap();
    house.view.changed("w").await;
    assert_eq!(house.worker.status().losses, 0);
    assert!(!house.view.lost_anybody());
}

#[tokio::test(start_paused = true)]
async fn a_failing_keep_alive_is_tried_ever_sooner_within_the_lease() {
    let house = House::new().await;
    let registry: Arc<dyn Registry> = house.client.registry.clone();
    // Cut off for less than the lease lives, at each moment of it.
    let ttl = times().lease_ttl;
    for n in 1..20 {
        tokio::time::sleep(ttl / 3).await;
        house.client.cut();
        tokio::time::sleep(ttl * 6 / 10 + Duration::from_millis(n)).await;
        house.client.heal();
        tokio::time::sleep(ttl / 2).await;
        assert_eq!(house.worker.status().losses, 0, "round {n}");
    }
    assert_eq!(registry.list(&house.stage.cluster.workers_prefix()).await.unwrap().entries.len(), 1);
}
