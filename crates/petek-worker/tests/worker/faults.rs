//! What breaks: the numbers, and the runner.

use petek_core::plan::Draw;
use petek_core::refusal::Reason;
use petek_core::scheduler::SchedulerConfig;
use petek_proto::worker::v1::FinishReason;
use petek_service::Exit;
use petek_worker::fake::FakeModel;
use petek_worker::fake::NotFinite;

use super::support::{Ask, Shape, VOCABULARY, record, refusal, soon};

/// SAFETY 20: each ends alone, and after the third the worker drains itself.
#[tokio::test]
async fn three_requests_that_break_the_numbers_drain_the_worker() {
    let shape = Shape {
        model: FakeModel { vocabulary: VOCABULARY, not_finite: NotFinite::OneIn(5) },
        ..Shape::default()
    };
    let sampling = Ask::new(&[1], 1).raw.check(&shape.limits(), 0).unwrap().slot_sampling(0);
    let breaks = |id: &u32| shape.model.expected(&[*id; 3], &[], &sampling, 1) == [Draw::NotFinite];
    let broken: Vec<u32> = (0..VOCABULARY).filter(breaks).collect();
    let sound: Vec<u32> = (0..VOCABULARY).filter(|id| !breaks(id)).collect();
    assert!(broken.len() >= 3, "{broken:?}");
    let house = shape.start().await;
    let mut router = house.router(1).await;
    for at in 0..3 {
        router.submit(&house.shape, &Ask::new(&[broken[at]; 3], 5)).await;
        router.submit(&house.shape, &Ask::new(&[sound[at]; 3], 1)).await;
        router.finish().await;
        let failure = router.failure(2 * at as u64 + 1, 0);
        assert_eq!(
            (failure.known_reason(), failure.number("position")),
            (Some(Reason::NumericalError), Some(0))
        );
        assert_eq!(router.reason(2 * at as u64 + 2, 0), FinishReason::Length, "its neighbour");
    }
    assert_eq!(house.metrics.numerical_errors.get(), 3);
    let shape = house.shape.clone();
    assert_eq!(soon(house.worker.stopped()).await, Ok(()));
    assert!(house.shutdown.is_draining());
    assert_eq!(record(&shape).await, None);
    assert_eq!(router.end().await.map(|end| end.to_string()), None, "a clean end");
}

/// SAFETY 19.
#[tokio::test]
async fn a_runner_that_fails_ends_the_worker_and_every_stream_with_a_status() {
    let shape = Shape::default();
    let scheduler = SchedulerConfig { slots: 8, blocks: 8_192, ..shape.scheduler.clone() };
    let house = Shape { scheduler, ..shape }.start().await;
    let mut routers = [house.router(1).await, house.router(2).await];
    // Longer than the test takes. Four of each run, and three of each wait.
    for router in &mut routers {
        for at in 0..4 {
            router.submit(&house.shape, &Ask::new(&[at; 20], 100_000)).await;
        }
        router.until(|router| router.admitted.len() == 4).await;
    }
    for router in &mut routers {
        for at in 0..3 {
            router.submit(&house.shape, &Ask::new(&[at; 30], 100_000)).await;
        }
    }
    house.until(|status| status.waiting == 6).await;
    house.gate.fail();
    for router in &mut routers {
        let end = router.end().await.expect("an error");
        assert_eq!(refusal(&end).known_reason(), Some(Reason::WorkerLost), "{end}");
        for dispatch in 1..=4 {
            let failure = router.failure(dispatch, 0);
            assert_eq!(failure.known_reason(), Some(Reason::WorkerLost));
            let had = router.heard[&(dispatch, 0)].ids.len() as u64;
            assert_eq!(failure.number("output_tokens"), Some(had));
        }
        for dispatch in 5..=7 {
            assert_eq!(router.refused[&dispatch].known_reason(), Some(Reason::WorkerLost));
        }
    }
    let shape = house.shape.clone();
    let failure = soon(house.worker.stopped()).await.expect_err("it failed");
    assert_eq!(failure.exit(), Exit::Fault);
    assert!(failure.to_string().contains("it is on fire"), "{failure}");
    assert_eq!(record(&shape).await, None);
}
