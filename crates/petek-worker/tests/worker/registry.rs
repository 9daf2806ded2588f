//! How a worker comes into the registry, and what keeps it out.

use std::time::Duration;

use petek_cluster::{Cluster, Registry as _, Wait, WorkerState};
use petek_core::ids::Epoch;
use petek_core::scheduler::SchedulerConfig;
use petek_service::Exit;
use petek_text::CardFile;

use super::support::{House, Shape, record, soon};

/// How a worker that never gets ready ends.
async fn failure(house: House) -> (Exit, String) {
    soon(house.worker.ready()).await;
    let failure = soon(house.worker.stopped()).await.expect_err("it fails");
    (failure.exit(), failure.to_string())
}

#[tokio::test]
async fn a_record_says_what_the_worker_is() {
    let house = Shape::default().start().await;
    let record = house.record().await.unwrap();
    assert_eq!(record.addresses, [house.worker.address().to_string()]);
    assert_eq!((record.epoch, record.state), (house.shape.epoch, WorkerState::Serving));
    assert_eq!((record.blocks_total, record.block_size_tokens, record.context_tokens), (64, 16, 1_024));
    assert!(house.shape.registry.another_client().get("/petek/v1/test/nothing").await.unwrap().is_none());
    let shape = house.shape.clone();
    assert_eq!(house.stop().await, Ok(()));
    assert_eq!(super::support::record(&shape).await, None);
}

#[tokio::test]
async fn an_id_is_taken_while_its_worker_answers_and_free_when_it_does_not() {
    let first = Shape::default().start().await;
    let second = Shape { epoch: Epoch(2), ..first.shape.clone() };
    let (exit, says) = failure(second.clone().try_start().await.unwrap()).await;
    assert_eq!(exit, Exit::Environment);
    assert!(says.contains("worker id w1 is taken"), "{says}");
    // The first one dies without a word: its record stands, and nobody answers.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let third = Shape { id: "w3", ..first.shape.clone() };
    let died = runtime.spawn(async move { third.start().await.shape }).await.unwrap();
    runtime.shutdown_background();
    assert!(record(&died).await.is_some());
    let heir = Shape { epoch: Epoch(3), ..died.clone() }.start().await;
    assert_eq!(heir.record().await.unwrap().epoch, Epoch(3));
}

#[tokio::test]
async fn a_worker_whose_place_was_taken_drains_and_says_so() {
    let shape = Shape::default();
    let mut registration = shape.registration();
    registration.times.lease_ttl = Duration::from_millis(60);
    let house = shape.clone().start_with(registration).await;
    let mut router = house.router(1).await;
    let ask = super::support::Ask::new(&[5; 20], 300);
    router.submit(&house.shape, &ask).await;
    // Its record is overwritten by an engine of another epoch, as if it had been silent for long.
    let key = Cluster::new("test").unwrap().worker_key(&house.record().await.unwrap().key());
    let registry = shape.registry.another_client();
    let other = petek_cluster::WorkerRecord { epoch: Epoch(99), ..house.record().await.unwrap() };
    soon(async {
        loop {
            let revision = registry.get(&key).await.unwrap().map(|entry| entry.revision).unwrap_or_default();
            let swapped = registry.swap(&key, revision, other.to_value().unwrap(), None).await.unwrap();
            if matches!(swapped, petek_cluster::registry::Swapped::Done(_)) {
                break;
            }
        }
    })
    .await;
    router.finish().await;
    let failure = soon(house.worker.stopped()).await.expect_err("it was replaced");
    assert_eq!(failure.exit(), Exit::Environment);
    assert!(failure.to_string().contains("belongs to epoch 99"), "{failure}");
    assert_eq!(record(&shape).await.unwrap().epoch, Epoch(99), "the other's record is left alone");
}

#[tokio::test]
async fn settings_that_differ_from_the_clusters_are_a_matter_of_configuration() {
    let first = Shape::default().start().await;
    let mut other = Shape { id: "w2", ..first.shape.clone() };
    other.scheduler = SchedulerConfig { block_size: 32, ..other.scheduler };
    let (exit, says) = failure(other.try_start().await.unwrap()).await;
    assert_eq!(exit, Exit::Configuration);
    assert!(says.contains("block size is 16 there and 32 here"), "{says}");
    let mut other = Shape { id: "w3", ..first.shape.clone() };
    other.card.insert(CardFile::Tokenizer, b"{}".to_vec());
    let (exit, says) = failure(other.try_start().await.unwrap()).await;
    assert_eq!(exit, Exit::Configuration);
    assert!(says.contains("text hash"), "{says}");
    let (exit, says) = failure(Shape { id: "a/b", ..first.shape.clone() }.try_start().await.unwrap()).await;
    assert_eq!(exit, Exit::Configuration);
    assert!(says.contains("worker: must be"), "{says}");
}

#[tokio::test]
async fn a_registry_that_is_away_is_waited_for_or_not_as_asked() {
    let shape = Shape { wait: Wait::AtMost(Duration::ZERO), ..Shape::default() };
    shape.registry.cut();
    let (exit, says) = failure(shape.clone().try_start().await.unwrap()).await;
    assert_eq!(exit, Exit::Environment);
    assert!(says.contains("out of reach"), "{says}");

    let house = Shape { wait: Wait::Forever, ..shape.clone() }.try_start().await.unwrap();
    assert!(futures::poll!(std::pin::pin!(house.worker.ready())).is_pending());
    assert_eq!(house.status().await.state(), petek_proto::worker::v1::WorkerState::Loading);
    house.shape.registry.heal();
    soon(house.worker.ready()).await;
    assert_eq!(house.status().await.state(), petek_proto::worker::v1::WorkerState::Serving);
    assert_eq!(house.stop().await, Ok(()));

    // One that waits can be told to go.
    shape.registry.cut();
    let house = Shape { wait: Wait::Forever, ..shape }.try_start().await.unwrap();
    assert_eq!(house.stop().await, Ok(()));
}

#[tokio::test]
async fn parts_that_contradict_each_other_are_no_worker() {
    let start = async |change: fn(&mut Shape)| {
        let mut shape = Shape::default();
        change(&mut shape);
        shape.try_start().await.err().expect("it does not start")
    };
    let failure = start(|shape| shape.settings.command_queue = 0).await;
    assert_eq!(failure.exit(), Exit::Configuration);
    assert!(failure.to_string().contains("command_queue"), "{failure}");
    let failure = start(|shape| shape.scheduler.block_size = 48).await;
    assert!(failure.to_string().contains("power of two"), "{failure}");
    let failure = start(|shape| shape.scheduler.revision = petek_core::hash::Revision([1; 32])).await;
    assert!(failure.to_string().contains("more than one revision"), "{failure}");
}
