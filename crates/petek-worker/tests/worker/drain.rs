//! How a worker goes.

use petek_cluster::WorkerState as RecordState;
use petek_core::refusal::Reason;
use petek_core::scheduler::SchedulerConfig;
use petek_proto::worker::v1::watch_load_response::Message as Load;
use petek_proto::worker::v1::{DrainRequest, FinishReason, WatchLoadRequest, WorkerState};
use petek_worker::WorkerSettings;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::support::{Ask, EPOCH, House, Shape, hello, record, refusal, soon};

async fn health(house: &House) -> ServingStatus {
    let mut client = HealthClient::new(house.channel().await);
    let of = |service: &str| HealthCheckRequest { service: service.into() };
    let whole = soon(client.check(of(""))).await.unwrap().into_inner().status();
    let service =
        soon(client.check(of("petek.worker.v1.WorkerService"))).await.unwrap().into_inner().status();
    assert_eq!(whole, service);
    whole
}

/// BEHAVIOUR 9: announced first, in the record, the load and health; then refused; what runs is finished.
#[tokio::test]
async fn a_drain_is_announced_before_anything_is_refused() {
    for by_call in [true, false] {
        let shape = Shape::default();
        let scheduler = SchedulerConfig { blocks: 8_192, ..shape.scheduler.clone() };
        let house = Shape { scheduler, ..shape }.start().await;
        assert_eq!(health(&house).await, ServingStatus::Serving);
        assert_eq!(house.record().await.unwrap().state, RecordState::Serving);
        let mut load = house.client().await;
        let watch = load.watch_load(WatchLoadRequest { hello: Some(hello(1)) });
        let mut load = soon(watch).await.unwrap().into_inner();
        let mut router = house.router(1).await;
        // The first runs until it is cancelled, the second to its end.
        router.submit(&house.shape, &Ask::new(&[5; 20], 100_000)).await;
        router.submit(&house.shape, &Ask::new(&[6; 20], 1_000)).await;
        router.until(|router| !router.heard[&(2, 0)].ids.is_empty()).await;

        if by_call {
            let mut client = house.client().await;
            let stale =
                client.drain(DrainRequest { epoch: 5, deadline_ms: None }).await.expect_err("refused");
            assert_eq!(refusal(&stale).known_reason(), Some(Reason::StaleEpoch));
            assert!(!house.shutdown.is_draining());
            let answer =
                soon(client.drain(DrainRequest { epoch: EPOCH.0, deadline_ms: None })).await.unwrap();
            assert_eq!(answer.into_inner().status.unwrap().state(), WorkerState::Draining);
            assert!(house.shutdown.is_draining(), "the process drains with it");
        } else {
            house.shutdown.drain();
        }
        // Some may still be taken; the first one that is not comes after all announcements.
        loop {
            let dispatch = router.submit(&house.shape, &Ask::new(&[7; 20], 1)).await;
            router.until(|router| router.is_over(dispatch)).await;
            let Some(refused) = router.refused.get(&dispatch) else { continue };
            assert_eq!(refused.known_reason(), Some(Reason::Draining));
            assert!(refused.retry_ms.is_some());
            break;
        }
        assert_eq!(house.record().await.unwrap().state, RecordState::Draining);
        assert_eq!(health(&house).await, ServingStatus::NotServing);
        soon(async {
            loop {
                match load.message().await.unwrap().unwrap().message.unwrap() {
                    Load::Report(report) if report.state() == WorkerState::Draining => break,
                    _ => {}
                }
            }
        })
        .await;

        router.until(|router| router.is_over(2)).await;
        assert_eq!(router.reason(2, 0), FinishReason::Length, "it ran to its end");
        assert_eq!(router.heard[&(2, 0)].ids.len(), 1_000);
        router.cancel(1, &[]).await;
        assert!(router.end().await.is_none(), "a clean end");
        assert_eq!(router.reason(1, 0), FinishReason::Cancelled);
        let shape = house.shape.clone();
        assert_eq!(soon(house.worker.stopped()).await, Ok(()));
        assert_eq!(record(&shape).await, None, "the record is gone");
        assert!(soon(load.message()).await.unwrap_or(None).is_none_or(|last| last.message.is_some()));
    }
}

#[tokio::test]
async fn what_runs_past_the_drains_deadline_ends_with_a_reason() {
    let shape = Shape::default();
    let scheduler = SchedulerConfig { blocks: 8_192, slots: 1, ..shape.scheduler.clone() };
    let house = Shape { scheduler, ..shape }.start().await;
    let mut router = house.router(1).await;
    // Longer than anyone waits.
    router.submit(&house.shape, &Ask::new(&[5; 20], 100_000)).await;
    router.submit(&house.shape, &Ask::new(&[6; 20], 5)).await;
    router.until(|router| !router.heard[&(1, 0)].ids.is_empty()).await;
    let mut client = house.client().await;
    soon(client.drain(DrainRequest { epoch: 0, deadline_ms: None })).await.unwrap();
    soon(client.drain(DrainRequest { epoch: 0, deadline_ms: Some(50) })).await.unwrap();
    router.finish().await;
    assert_eq!(router.failure(1, 0).known_reason(), Some(Reason::Draining));
    assert_eq!(router.refused[&2].known_reason(), Some(Reason::Draining), "it waited");
    assert!(router.end().await.is_none());
    assert_eq!(soon(house.worker.stopped()).await, Ok(()));
}

/// A router that never reads its last bytes holds nobody up.
#[tokio::test]
async fn a_worker_does_not_linger_for_ever() {
    let shape = Shape::default();
    let house = Shape { settings: WorkerSettings { linger_ms: 100, ..shape.settings.clone() }, ..shape }
        .start()
        .await;
    let mut health = HealthClient::new(house.channel().await);
    let watched = health.watch(HealthCheckRequest { service: String::new() });
    let _never_ends = soon(watched).await.unwrap();
    let _never_reads = house.router(1).await;
    assert_eq!(house.stop().await, Ok(()));
}
