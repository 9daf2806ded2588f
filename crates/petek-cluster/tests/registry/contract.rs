//! What a registry owes to workers and routers. Each test runs on both kinds: in memory with the clock stopped, and
//! on a real etcd.

use std::time::Duration;

use futures::StreamExt;
use petek_cluster::record::WorkerState;
use petek_cluster::registration::{
    Probed, RegisterError, Registration, RegistrationOptions, RegistrationPhase,
};
use petek_cluster::registry::{Change, LeaseId, RegistryError, RegistryRevision, Swapped, Watch, WatchEnd};
use petek_cluster::watching::ViewOptions;
use petek_cluster::{Times, ViewEvent, Wait, WorkerRecord, WorkersView};
use petek_core::ids::Epoch;

use crate::stage::{Client, Reader, Stage, phase, record, regained, soon, times};

macro_rules! contract {
    (shared: $($shared:ident)*; own: $($own:ident)*;) => {
        mod on_memory {
            use super::Stage;
            $(#[tokio::test(start_paused = true)]
            async fn $shared() {
                super::$shared(Stage::memory()).await;
            })*
            $(#[tokio::test(start_paused = true)]
            async fn $own() {
                super::$own(Stage::memory()).await;
            })*
        }
        mod on_etcd {
            use super::Stage;
            $(#[tokio::test]
            async fn $shared() {
                if let Some(stage) = Stage::etcd(stringify!($shared)) {
                    super::$shared(stage).await;
                }
            })*
            $(#[tokio::test]
            async fn $own() {
                if let Some(stage) = Stage::etcd_own(stringify!($own)) {
                    super::$own(stage).await;
                }
            })*
        }
    };
}

contract! {
    shared:
        a_write_compares_first
        a_lease_that_nobody_keeps_takes_its_keys_along
        a_lease_that_is_revoked_takes_its_keys_along
        a_watch_tells_every_change_once_in_order
        a_watch_from_the_future_says_list_again
        a_client_that_is_cut_off_hears_of_it
        a_list_may_be_larger_than_a_message
        a_view_is_a_snapshot_and_then_changes
        a_view_outlives_a_partition_and_says_that_it_is_stale
        a_slow_reader_loses_nothing
        a_bad_value_is_told_and_ignored
        a_view_waits_for_a_registry_that_is_away
        a_worker_waits_for_a_registry_that_is_away
        a_record_stands_as_long_as_its_worker
        a_record_that_someone_removed_comes_back
        a_lost_lease_is_regained_with_the_same_epoch
        a_dead_worker_leaves_after_its_lease_and_the_grace
        a_living_worker_s_id_is_taken
        a_dead_worker_s_id_is_free_and_a_replaced_worker_ends
        workers_of_a_revision_share_their_settings;
    own:
        a_watch_from_the_forgotten_past_says_list_again
        a_view_survives_compaction;
}

const NOTHING: RegistryRevision = RegistryRevision(0);

fn key(stage: &Stage, worker: &str) -> String {
    stage.cluster.worker_key(&record(worker, 1).key())
}

async fn put(client: &Client, key: &str, value: &str, lease: Option<LeaseId>) -> RegistryRevision {
    match client.registry.swap(key, NOTHING, value.into(), lease).await.unwrap() {
        Swapped::Done(revision) => revision,
        Swapped::Found(found) => panic!("{key} holds {found:?}"),
    }
}

async fn watch(client: &Client, stage: &Stage, after: RegistryRevision) -> Result<Watch, WatchEnd> {
    let prefix = stage.cluster.workers_prefix();
    soon("a watch", client.registry.watch(&prefix, after)).await
}

/// The next changes, up to the one at `key`.
async fn told_up_to(watch: &mut Watch, key: &str) -> Vec<(String, RegistryRevision, bool)> {
    let mut all = Vec::new();
    loop {
        let changes = soon("a change", watch.next()).await.expect("a watch says why it ends").unwrap();
        all.extend(changes.list.into_iter().map(|change| match change {
            Change::Put(entry) => (entry.key, entry.revision, true),
            Change::Deleted { key, revision } => (key, revision, false),
        }));
        assert!(all.iter().all(|(_, revision, _)| *revision <= changes.revision));
        if all.iter().any(|(told, ..)| told == key) {
            return all;
        }
    }
}

async fn a_write_compares_first(stage: Stage) {
    let client = stage.client().await;
    let key = key(&stage, "w");
    let first = put(&client, &key, "1", None).await;
    let again = client.registry.swap(&key, NOTHING, "2".into(), None).await.unwrap();
    let Swapped::Found(Some(found)) = again else { panic!("{again:?}") };
    assert_eq!(
        (found.key.as_str(), &found.value[..], found.revision, found.lease),
        (&*key, &b"1"[..], first, None)
    );

    let second = client.registry.swap(&key, first, "2".into(), None).await.unwrap();
    let Swapped::Done(second) = second else { panic!("{second:?}") };
    assert!(second > first);
    let late = client.registry.swap(&key, first, "3".into(), None).await.unwrap();
    assert!(matches!(late, Swapped::Found(Some(entry)) if entry.value == b"2" && entry.revision == second));
    let elsewhere = client.registry.swap(&(key.clone() + "x"), first, "3".into(), None).await.unwrap();
    assert_eq!(elsewhere, Swapped::Found(None));
    assert_eq!(client.registry.get(&key).await.unwrap().unwrap().value, b"2");
    assert_eq!(client.registry.get("nowhere").await.unwrap(), None);
}

async fn a_lease_that_nobody_keeps_takes_its_keys_along(stage: Stage) {
    let client = stage.client().await;
    let key = key(&stage, "w");
    let lease = client.registry.grant(times().lease_ttl).await.unwrap();
    assert!(lease.id.0 != 0 && lease.ttl >= times().lease_ttl);
    let written = put(&client, &key, "1", Some(lease.id)).await;
    assert_eq!(client.registry.get(&key).await.unwrap().unwrap().lease, Some(lease.id));
    client.registry.keep_alive(lease.id).await.unwrap();

    let mut watch = watch(&client, &stage, written).await.unwrap();
    let told = told_up_to(&mut watch, &key).await;
    assert!(
        matches!(&told[..], [(told, revision, false)] if *told == key && *revision > written),
        "{told:?}"
    );
    assert_eq!(client.registry.get(&key).await.unwrap(), None);
    assert_eq!(client.registry.keep_alive(lease.id).await, Err(RegistryError::LeaseLost));
    let put = client.registry.swap(&key, NOTHING, "2".into(), Some(lease.id)).await;
    assert_eq!(put, Err(RegistryError::LeaseLost));
    assert_eq!(client.registry.get(&key).await.unwrap(), None, "a dead lease writes nothing");
}

async fn a_lease_that_is_revoked_takes_its_keys_along(stage: Stage) {
    let client = stage.client().await;
    let key = key(&stage, "w");
    let lease = client.registry.grant(Duration::from_secs(60)).await.unwrap();
    put(&client, &key, "1", Some(lease.id)).await;
    client.registry.revoke(lease.id).await.unwrap();
    assert_eq!(client.registry.get(&key).await.unwrap(), None);
    client.registry.revoke(lease.id).await.unwrap();
    assert_eq!(client.registry.keep_alive(lease.id).await, Err(RegistryError::LeaseLost));
}

async fn a_watch_tells_every_change_once_in_order(stage: Stage) {
    let client = stage.client().await;
    let before = put(&client, &key(&stage, "before"), "1", None).await;
    let mut early = watch(&client, &stage, before).await.unwrap();
    let mut written = Vec::new();
    for n in 0..20 {
        put(&client, &format!("/petek/v1/another-{n}/{before:?}"), "not ours", None).await;
        let key = key(&stage, &format!("w{n:02}"));
        written.push((key.clone(), put(&client, &key, "1", None).await, true));
    }
    let last = written.last().unwrap().0.clone();
    assert_eq!(told_up_to(&mut early, &last).await, written);
    let mut late = watch(&client, &stage, written[9].1).await.unwrap();
    assert_eq!(told_up_to(&mut late, &last).await, written[10..], "a watch resumes from its revision");
}

async fn a_watch_from_the_future_says_list_again(stage: Stage) {
    let client = stage.client().await;
    let now = client.registry.list(&stage.cluster.workers_prefix()).await.unwrap().revision;
    assert!(watch(&client, &stage, now).await.is_ok());
    let future = watch(&client, &stage, RegistryRevision(now.0 + 1_000_000)).await;
    assert!(matches!(future, Err(WatchEnd::ListAgain(_))), "{:?}", future.err());
}

async fn a_watch_from_the_forgotten_past_says_list_again(stage: Stage) {
    let client = stage.client().await;
    let past = put(&client, &key(&stage, "a"), "1", None).await;
    put(&client, &key(&stage, "b"), "1", None).await;
    put(&client, &key(&stage, "c"), "1", None).await;
    stage.forget_the_past().await;
    // It may be said at once, or as the watch's first word.
    let end = match watch(&client, &stage, past).await {
        Ok(mut watch) => soon("the end of the watch", watch.next()).await.unwrap().unwrap_err(),
        Err(end) => end,
    };
    assert!(matches!(&end, WatchEnd::ListAgain(why) if why.contains("compacted")), "{end:?}");
}

async fn a_client_that_is_cut_off_hears_of_it(stage: Stage) {
    let client = stage.client().await;
    let prefix = stage.cluster.workers_prefix();
    let now = client.registry.list(&prefix).await.unwrap().revision;
    let mut watch = watch(&client, &stage, now).await.unwrap();
    client.cut();
    let end = soon("the end of the watch", watch.next()).await.unwrap().unwrap_err();
    assert!(matches!(end, WatchEnd::Lost(RegistryError::Away { .. })), "{end:?}");
    assert!(soon("nothing after it", watch.next()).await.is_none());
    let listed = soon("an answer", client.registry.list(&prefix)).await;
    assert!(matches!(&listed, Err(RegistryError::Away { .. })), "{listed:?}");

    client.heal();
    // The same client works again by itself; when, is for whoever tries again.
    soon("the registry", async {
        while client.registry.list(&prefix).await.is_err() {
            tokio::time::sleep(times().backoff_min).await;
        }
    })
    .await;
}

async fn a_list_may_be_larger_than_a_message(stage: Stage) {
    let client = stage.client().await;
    let value = "x".repeat(15_000);
    let begin = client.registry.list(&stage.cluster.workers_prefix()).await.unwrap().revision;
    let mut keys: Vec<String> = (0..300).map(|n| key(&stage, &format!("w{n:03}"))).collect();
    for key in &keys {
        put(&client, key, &value, None).await;
    }
    // Values that no record may have, of which a single page of 128 is larger than any message.
    for n in 0..6 {
        let key = key(&stage, &format!("huge{n}"));
        put(&client, &key, &"y".repeat(1_200_000), None).await;
        keys.push(key);
    }
    // A watch that was away for as long has just as much to tell.
    let mut watch = watch(&client, &stage, begin).await.unwrap();
    let told = told_up_to(&mut watch, keys.last().unwrap()).await;
    assert_eq!(told.into_iter().map(|(key, ..)| key).collect::<Vec<_>>(), keys);
    keys.sort();
    let listing = client.registry.list(&stage.cluster.workers_prefix()).await.unwrap();
    assert_eq!(listing.entries.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>(), keys);
    assert!(listing.entries.iter().all(|entry| entry.value.len() >= value.len()) && !listing.is_cut);
    assert!(listing.entries.iter().all(|entry| entry.revision <= listing.revision));
}

async fn a_view_is_a_snapshot_and_then_changes(stage: Stage) {
    let (worker, router) = (stage.client().await, stage.client().await);
    let early = worker.register(&stage, &record("early", 1)).await.unwrap();
    let mut view = router.view(&stage).await;
    view.snapshot().await;
    assert_eq!(view.workers.values().map(|r| (**r).clone()).collect::<Vec<_>>(), [record("early", 1)]);

    let loading = WorkerRecord { state: WorkerState::Loading, ..record("late", 2) };
    let late = worker.register(&stage, &loading).await.unwrap();
    assert_eq!(*view.changed("late").await, loading);
    late.set_state(WorkerState::Serving).await.unwrap();
    assert_eq!(*view.changed("late").await, record("late", 2));
    late.set_state(WorkerState::Draining).await.unwrap();
    assert_eq!(view.changed("late").await.state, WorkerState::Draining);
    late.leave().await.unwrap();
    view.removed("late").await;
    assert!(view.worker("early").is_some());
    drop(early);
}

async fn a_view_outlives_a_partition_and_says_that_it_is_stale(stage: Stage) {
    let (worker, router) = (stage.client().await, stage.client().await);
    let here = worker.register(&stage, &record("here", 1)).await.unwrap();
    let leaver = worker.register(&stage, &record("leaver", 2)).await.unwrap();
    let mut view = router.view(&stage).await;
    view.snapshot().await;
    router.cut();
    view.stale().await;
    assert_eq!(view.workers.len(), 2, "the last view stays");

    leaver.set_state(WorkerState::Draining).await.unwrap();
    leaver.leave().await.unwrap();
    let comer = worker.register(&stage, &record("comer", 3)).await.unwrap();
    router.heal();
    view.fresh().await;
    view.changed("comer").await;
    assert!(view.worker("here").is_some());
    assert!(view.worker("leaver").is_none(), "it had drained: {:#?}", view.seen);
    assert!(!view.seen.iter().any(|event| matches!(event, ViewEvent::Differed { .. })), "{:#?}", view.seen);
    drop((here, comer));
}

async fn a_slow_reader_loses_nothing(stage: Stage) {
    let client = stage.client().await;
    let options = ViewOptions { times: times(), events_max: 1, ..ViewOptions::new(stage.cluster.clone(), 1) };
    let mut view = Reader::new(WorkersView::open(client.registry.clone(), options).await.unwrap());
    for n in 0..100 {
        let record = record(&format!("w{n:02}"), n);
        client.write(&stage.cluster.worker_key(&record.key()), record.to_value().unwrap()).await;
    }
    view.changed("w99").await;
    assert_eq!(view.workers.len(), 100);
    let stages = view.seen.iter().filter(|event| matches!(event, ViewEvent::Changed(_))).count();
    assert_eq!(stages, 100, "each told once");
}

async fn a_bad_value_is_told_and_ignored(stage: Stage) {
    let client = stage.client().await;
    let stray = format!("{}no-worker", stage.cluster.workers_prefix());
    client.write(&stray, "early").await;
    let known = record("known", 1);
    let known_key = stage.cluster.worker_key(&known.key());
    client.write(&known_key, known.to_value().unwrap()).await;
    let mut view = client.view(&stage).await;
    let bad = view.until("the stray key", |event| matches!(event, ViewEvent::Bad { .. })).await;
    assert!(matches!(&bad, ViewEvent::Bad { key, worker: None, .. } if *key == stray), "{bad:?}");
    assert_eq!(view.workers.len(), 1);

    let check = async |view: &mut Reader, key: &str, value: Vec<u8>, is_known: bool, says: &str| {
        client.write(key, value).await;
        let bad = view.until(says, |event| matches!(event, ViewEvent::Bad { .. })).await;
        let ViewEvent::Bad { key: told, worker, why } = bad else { unreachable!() };
        assert_eq!((told.as_str(), worker.is_some()), (key, is_known));
        assert!(why.to_string().contains(says), "{why}");
    };
    let unknown_key = key(&stage, "unknown");
    check(&mut view, &unknown_key, b"{}".to_vec(), false, "missing field").await;
    check(&mut view, &unknown_key, known.to_value().unwrap(), false, "stands at the key of org/demo/unknown")
        .await;
    check(&mut view, &known_key, vec![b'{'; 20_000], true, "20000 bytes").await;
    check(&mut view, &known_key, b"\xff".to_vec(), true, "does not read").await;
    assert!(view.worker("known").is_some(), "what it runs goes on");
    client.write(&known_key, known.to_value().unwrap()).await;
    view.changed("known").await;

    // Another worker comes and goes while several full lists see the same bad values: each was told once.
    for n in 0..3 {
        let comer = client.register(&stage, &record("comer", 5 + n)).await.unwrap();
        view.changed("comer").await;
        comer.set_state(WorkerState::Draining).await.unwrap();
        tokio::time::timeout(times().full_list_interval * 2, std::future::pending::<()>()).await.unwrap_err();
        comer.leave().await.unwrap();
        view.removed("comer").await;
    }
    let count = view.seen.iter().filter(|event| matches!(event, ViewEvent::Bad { .. })).count();
    assert_eq!(count, 5, "{:#?}", view.seen);
}

async fn a_view_waits_for_a_registry_that_is_away(stage: Stage) {
    let client = stage.client().await;
    client.cut();
    let open = |wait| {
        let options = ViewOptions { times: times(), wait, ..ViewOptions::new(stage.cluster.clone(), 1) };
        WorkersView::open(client.registry.clone(), options)
    };
    let refused = soon("an answer", open(Wait::AtMost(Duration::ZERO))).await.unwrap_err();
    assert!(matches!(refused, RegistryError::Away { .. }) && refused.is_passing(), "{refused}");
    assert!(refused.to_string().contains(client.registry.endpoint()), "{refused}");
    let (view, ()) = tokio::join!(open(Wait::Forever), async { client.heal() });
    Reader::new(view.unwrap()).snapshot().await;
}

async fn a_worker_waits_for_a_registry_that_is_away(stage: Stage) {
    let client = stage.client().await;
    client.cut();
    let start = |wait| {
        let (cluster, record) = (stage.cluster.clone(), record("w", 1));
        let options = RegistrationOptions { cluster, record, times: times(), wait };
        let probe = std::sync::Arc::new(|_| futures::FutureExt::boxed(async { Probed::Silent }));
        Registration::start(client.registry.clone(), options, probe)
    };
    let refused = soon("an answer", start(Wait::AtMost(Duration::ZERO))).await.unwrap_err();
    assert!(matches!(refused, RegisterError::Registry(RegistryError::Away { .. })), "{refused}");
    let (registration, ()) = tokio::join!(start(Wait::Forever), async { client.heal() });
    assert_eq!(registration.unwrap().status().phase, RegistrationPhase::Standing);
    assert_eq!(client.list(&stage.cluster).await.len(), 1);
}

/// Waits until a lease as long as a worker's has run out.
async fn a_lease_s_time(client: &Client, stage: &Stage) {
    let lease = client.registry.grant(times().lease_ttl).await.unwrap();
    let key = key(stage, "hourglass");
    let written = put(client, &key, "not a record", Some(lease.id)).await;
    let mut watch = watch(client, stage, written).await.unwrap();
    told_up_to(&mut watch, &key).await;
}

async fn a_record_stands_as_long_as_its_worker(stage: Stage) {
    let (worker, other) = (stage.client().await, stage.client().await);
    let registration = worker.register(&stage, &record("w", 1)).await.unwrap();
    let first = other.list(&stage.cluster).await;
    for _ in 0..2 {
        a_lease_s_time(&other, &stage).await;
    }
    assert_eq!(other.list(&stage.cluster).await, first, "written once, and kept");
    assert_eq!(first.len(), 1);
    assert!(first[0].lease.is_some_and(|lease| lease.0 != 0), "never without a lease");
    assert_eq!(first[0].value, record("w", 1).to_value().unwrap());
    assert_eq!(registration.status().losses, 0);
    registration.leave().await.unwrap();
    assert_eq!(other.list(&stage.cluster).await, [], "who leaves leaves nothing");
}

async fn a_record_that_someone_removed_comes_back(stage: Stage) {
    let (worker, other) = (stage.client().await, stage.client().await);
    let registration = worker.register(&stage, &record("w", 1)).await.unwrap();
    let mut view = other.view(&stage).await;
    view.snapshot().await;
    let entry = other.list(&stage.cluster).await.remove(0);
    // A registry here has no way to remove a key but by its lease: take the key over, and end that lease.
    let lease = other.registry.grant(Duration::from_secs(60)).await.unwrap();
    let taken = other.registry.swap(&entry.key, entry.revision, entry.value.clone(), Some(lease.id)).await;
    assert!(matches!(taken, Ok(Swapped::Done(_))));
    other.registry.revoke(lease.id).await.unwrap();
    soon("the record", async {
        while other.list(&stage.cluster).await.is_empty() {
            tokio::time::sleep(times().backoff_min).await;
        }
    })
    .await;
    let back = other.list(&stage.cluster).await.remove(0);
    assert_eq!((back.value, back.lease), (entry.value, entry.lease), "under the lease that still lives");
    assert_eq!(registration.status().losses, 0);
    assert!(!view.lost_anybody());
}

async fn a_lost_lease_is_regained_with_the_same_epoch(stage: Stage) {
    let (worker, router) = (stage.client().await, stage.client().await);
    let mut registration = worker.register(&stage, &record("w", 77)).await.unwrap();
    let mut view = router.view(&stage).await;
    view.snapshot().await;
    let first = router.list(&stage.cluster).await;

    worker.cut();
    phase(&mut registration, "the loss", |phase| matches!(phase, RegistrationPhase::Lost { .. })).await;
    soon("the end of the lease", async {
        while !router.list(&stage.cluster).await.is_empty() {
            tokio::time::sleep(times().backoff_min).await;
        }
    })
    .await;
    // What is announced meanwhile is not lost.
    let announced = registration.set_state(WorkerState::Draining).await;
    assert!(announced.is_err(), "there is nothing to announce it under");

    worker.heal();
    regained(&mut registration, 1).await;
    assert_eq!(view.changed("w").await.state, WorkerState::Draining);
    let entries = router.list(&stage.cluster).await;
    assert_eq!(entries.len(), 1, "one key per worker");
    assert_eq!(entries[0].key, first[0].key);
    assert!(entries[0].lease.is_some() && entries[0].lease != first[0].lease, "a new lease");
    assert_eq!(view.worker("w").unwrap().epoch, Epoch(77), "the engine is the same");
    assert!(!view.lost_anybody(), "a lapsed lease of a serving worker has a grace: {:#?}", view.seen);
}

async fn a_dead_worker_leaves_after_its_lease_and_the_grace(stage: Stage) {
    let (worker, router) = (stage.client().await, stage.client().await);
    let registration = worker.register(&stage, &record("w", 1)).await.unwrap();
    let times = Times { lapse_grace: Duration::from_millis(300), ..times() };
    let mut view = router.view_with(&stage, times).await;
    view.snapshot().await;
    // A process that dies says nothing.
    drop(registration);
    view.removed("w").await;
    assert_eq!(router.list(&stage.cluster).await, []);
    worker.register(&stage, &record("w", 2)).await.unwrap();
    assert_eq!(view.changed("w").await.epoch, Epoch(2));
}

async fn a_living_worker_s_id_is_taken(stage: Stage) {
    let client = stage.client().await;
    let mut first = client.register(&stage, &record("w", 1)).await.unwrap();
    let second = client.register_probing(&stage, &record("w", 2), |old| Probed::Answers(old.epoch)).await;
    let Err(RegisterError::IdTaken { worker, address }) = &second else { panic!("{second:?}") };
    assert_eq!((worker.as_str(), address.as_str()), ("w", "w:7070"));
    a_lease_s_time(&client, &stage).await;
    assert_eq!(first.status().losses, 0);
    first.set_state(WorkerState::Draining).await.unwrap();
    phase(&mut first, "peace", |phase| *phase == RegistrationPhase::Standing).await;
}

async fn a_dead_worker_s_id_is_free_and_a_replaced_worker_ends(stage: Stage) {
    let client = stage.client().await;
    let mut view = client.view(&stage).await;
    let mut first = client.register(&stage, &record("w", 1)).await.unwrap();
    assert_eq!(view.changed("w").await.epoch, Epoch(1));
    // Its address answers, but with another epoch: the port has a new owner.
    let mut second =
        client.register_probing(&stage, &record("w", 2), |_| Probed::Answers(Epoch(9))).await.unwrap();
    assert_eq!(view.changed("w").await.epoch, Epoch(2));
    let is_over = |phase: &RegistrationPhase| matches!(phase, RegistrationPhase::Ended(_));
    let end = phase(&mut first, "the end of the first", is_over).await;
    let RegistrationPhase::Ended(RegisterError::Replaced { worker, epoch, address }) = &end else {
        panic!("{end:?}")
    };
    assert_eq!((worker.as_str(), *epoch, address.as_str()), ("w", Epoch(2), "w:7070"));
    let late = first.set_state(WorkerState::Draining).await;
    assert!(matches!(late, Err(RegisterError::Replaced { .. })), "{late:?}");

    // And one that learns of it by announcing something.
    let _third = client.register(&stage, &record("w", 3)).await.unwrap();
    let late = second.set_state(WorkerState::Draining).await;
    assert!(matches!(late, Err(RegisterError::Replaced { epoch: Epoch(3), .. })), "{late:?}");
    phase(&mut second, "the end of the second", is_over).await;
    assert_eq!(view.changed("w").await.epoch, Epoch(3));
    assert_eq!(view.worker("w").unwrap().state, WorkerState::Serving);
    assert_eq!(client.list(&stage.cluster).await.len(), 1);

    // A record that does not read names nobody who could be asked.
    client.write(&key(&stage, "x"), "scribble").await;
    client.register_probing(&stage, &record("x", 4), |_| unreachable!()).await.unwrap();
    assert_eq!(view.changed("x").await.epoch, Epoch(4));
}

async fn workers_of_a_revision_share_their_settings(stage: Stage) {
    let client = stage.client().await;
    let _first = client.register(&stage, &record("a", 1)).await.unwrap();
    let settings_key = stage.cluster.settings_key("org/demo", &record("a", 1).revision);
    let settings = client.registry.get(&settings_key).await.unwrap().unwrap();
    assert_eq!(settings.lease, None, "they outlive every worker");
    let _same = client.register(&stage, &record("b", 2)).await.unwrap();

    let other = WorkerRecord { block_size_tokens: 64, ..record("c", 3) };
    let refused = client.register(&stage, &other).await.unwrap_err();
    assert!(matches!(&refused, RegisterError::SettingsDiffer { .. }), "{refused}");
    let says = refused.to_string();
    assert!(says.contains("block size is 32 there and 64 here") && says.contains(&settings_key), "{says}");
    assert_eq!(client.list(&stage.cluster).await.len(), 2);
    assert_eq!(client.registry.get(&settings_key).await.unwrap().unwrap(), settings, "never overwritten");

    let mut elsewhere = WorkerRecord { block_size_tokens: 64, ..record("c", 3) };
    elsewhere.revision.0[0] = 9;
    let _elsewhere = client.register(&stage, &elsewhere).await.unwrap();
    client.write(&settings_key, "scribble").await;
    let refused = client.register(&stage, &record("d", 4)).await.unwrap_err();
    assert!(matches!(&refused, RegisterError::SettingsBad { .. }), "{refused}");

    let bad = WorkerRecord { tp: 0, ..record("e", 5) };
    let refused = client.register(&stage, &bad).await.unwrap_err();
    assert!(matches!(&refused, RegisterError::Record(_)), "{refused}");
}

async fn a_view_survives_compaction(stage: Stage) {
    let (worker, router) = (stage.client().await, stage.client().await);
    let _old = worker.register(&stage, &record("old", 1)).await.unwrap();
    let leaver = worker.register(&stage, &record("leaver", 2)).await.unwrap();
    let mut view = router.view(&stage).await;
    view.snapshot().await;
    router.cut();
    view.stale().await;
    leaver.set_state(WorkerState::Draining).await.unwrap();
    leaver.leave().await.unwrap();
    let _new = worker.register(&stage, &record("new", 3)).await.unwrap();
    stage.forget_the_past().await;
    router.heal();
    view.changed("new").await;
    assert!(view.worker("old").is_some());
    // Nobody told that it drained: to this view it vanished while serving, so it has its grace.
    assert!(view.worker("leaver").is_some());
    let _last = worker.register(&stage, &record("last", 4)).await.unwrap();
    view.changed("last").await;
    assert!(view.seen.contains(&ViewEvent::Fresh));
    assert!(!view.seen.iter().any(|event| matches!(event, ViewEvent::Differed { .. })), "{:#?}", view.seen);
}
