//! What comes back of requests.

use petek_core::params::RawParams;
use petek_core::refusal::Reason;
use petek_core::scheduler::SchedulerConfig;
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::{Cancel, ExecuteRequest, FinishReason, RouterHello, Submit, WireRange};
use petek_service::Outcome;
use petek_worker::{FeedSettings, LinkSettings, WorkerSettings};

use super::support::{
    Ask, Client, House, Random, Router, Shape, TOKEN, VOCABULARY, client, hello, refusal, soon,
};

/// A small pool, so that sequences lose their blocks to each other, and a request of any kind.
fn crowded() -> Shape {
    let shape = Shape::default();
    Shape {
        scheduler: SchedulerConfig { blocks: 20, slots: 6, step_rows: 24, ..shape.scheduler.clone() },
        ..shape
    }
}

fn any_ask(random: &mut Random) -> Ask {
    // Few different beginnings, so that the cache has something to say.
    let kind = random.below(3) as u32;
    let shared = random.below(60) as u32;
    let mut prompt: Vec<u32> = (0..shared).map(|i| (kind * 13 + i) % VOCABULARY).collect();
    prompt.extend((0..1 + random.below(20)).map(|_| random.below(VOCABULARY.into()) as u32));
    let resumed = if random.one_in(5) { random.below(6) } else { 0 };
    let raw = RawParams {
        temperature: Some(if random.one_in(2) { 0.0 } else { 1.0 }),
        max_tokens: Some(6 + random.below(40) as i64),
        seed: Some(random.next()),
        n: Some(if resumed == 0 && random.one_in(4) { 1 + random.below(3) as i64 } else { 1 }),
        stop_token_ids: (0..random.below(2)).map(|_| random.below(VOCABULARY.into()) as u32).collect(),
        ignore_eos: Some(random.one_in(2)),
        logprobs: random.one_in(3).then_some(3),
        bypass_prefix_cache: Some(random.one_in(8)),
        cache_salt: vec![b's'; random.below(2) as usize],
        priority: Some(random.below(8) as i64),
        ..RawParams::default()
    };
    Ask {
        prompt,
        raw: RawParams { resumed_ids: (0..resumed).map(|i| i as u32 + 3).collect(), ..raw },
        deadline_ms: None,
    }
}

/// Plays so many requests through each of the routers, and holds all that comes against the model.
async fn play(house: &House, routers: &mut [Router], requests: usize, seed: u64) {
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let mut asks = Vec::new();
    for router in &mut *routers {
        let own: Vec<Ask> = (0..requests).map(|_| any_ask(&mut random)).collect();
        for ask in &own {
            router.submit(&house.shape, ask).await;
        }
        asks.push(own);
    }
    for (router, asks) in routers.iter_mut().zip(&asks) {
        router.finish().await;
        for (at, ask) in asks.iter().enumerate() {
            let dispatch = at as u64 + 1;
            for (index, (ids, reason)) in ask.expected(&house.shape) {
                let heard = &router.heard[&(dispatch, index)];
                assert_eq!(heard.ids, ids, "dispatch {dispatch} of seed {seed}");
                assert_eq!(router.reason(dispatch, index), reason, "dispatch {dispatch} of seed {seed}");
                let finished = heard.finished.as_ref().unwrap();
                let stops = [FinishReason::StopEos, FinishReason::StopToken].contains(&reason);
                let last = ids.last().or(ask.raw.resumed_ids.last()).copied();
                assert_eq!(finished.stop_token_id, if stops { last } else { None });
                assert_eq!(heard.logprobs, if ask.raw.logprobs.is_some() { ids.len() } else { 0 });
                let usage = finished.usage.unwrap();
                assert_eq!(usage.prompt_tokens as usize, ask.prompt.len());
                assert_eq!(usage.cached_tokens, router.admitted[&dispatch]);
            }
        }
    }
}

#[tokio::test]
async fn streams_are_the_models_own_in_any_batch_and_for_any_router() {
    for steps_in_flight in [1, 2] {
        let shape = crowded();
        let settings = WorkerSettings { steps_in_flight, ..shape.settings.clone() };
        let house = Shape { settings, ..shape }.start().await;
        let mut routers = [house.router(1).await, house.router(2).await];
        play(&house, &mut routers, 150, 40 + steps_in_flight as u64).await;
        let status = house.at_rest().await;
        assert!(status.preemptions > 0 && status.cached_tokens > 100, "{status:?}");
        let metrics = &house.metrics;
        assert_eq!(metrics.requests.of(Outcome::Finished).get(), 300);
        assert_eq!(metrics.steps.get(), status.steps);
        assert_eq!(metrics.preemptions.get(), status.preemptions);
        assert_eq!(metrics.output_tokens.get(), status.completion_tokens);
        house.stop().await.unwrap();
    }
}

#[tokio::test]
async fn every_channel_at_capacity_one_changes_nothing() {
    let shape = crowded();
    let settings = WorkerSettings {
        command_queue: 1,
        link: LinkSettings { streams_max: 2, ..shape.settings.link.clone() },
        feed: FeedSettings { watch_queue: 1, kv_ring_batches: 1, ..shape.settings.feed.clone() },
        ..shape.settings.clone()
    };
    let house = Shape { settings, ..shape }.start().await;
    let mut routers = [house.router(1).await, house.router(2).await];
    play(&house, &mut routers, 60, 77).await;
    house.at_rest().await;
}

/// BEHAVIOUR 6.2.
#[tokio::test]
async fn ten_thousand_cancels_at_random_points_leave_no_block_behind() {
    let house = crowded().start().await;
    let seed = 3;
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let mut router = house.router(1).await;
    // Each is cancelled when the stream has said so much more since it was sent.
    let mut open: Vec<(u64, u64)> = Vec::new();
    let mut heard = 0;
    let mut cancels = 0;
    while cancels < 10_000 {
        while open.len() < 24 {
            let n = 1 + random.below(3);
            let mut ask = any_ask(&mut random);
            ask.raw = RawParams { n: Some(n as i64), resumed_ids: Vec::new(), ..ask.raw };
            let dispatch = router.submit(&house.shape, &ask).await;
            open.push((dispatch, heard + random.below(12)));
        }
        let due: Vec<u64> =
            open.iter().filter(|(_, at)| *at <= heard).map(|(dispatch, _)| *dispatch).collect();
        for dispatch in due {
            open.retain(|(other, _)| *other != dispatch);
            if random.one_in(4) {
                router.cancel(dispatch, &[random.below(3) as u32]).await;
            }
            router.cancel(dispatch, &[]).await;
            cancels += 1;
        }
        if !open.is_empty() {
            router.hear().await.unwrap();
            heard += 1;
        }
    }
    for (dispatch, _) in open {
        router.cancel(dispatch, &[]).await;
    }
    // One that has ended, and one that never was, are no error.
    router.cancel(1, &[]).await;
    router.cancel(1 << 40, &[7]).await;
    router.finish().await;
    let ended = router.heard.values().filter_map(|heard| heard.finished.as_ref());
    let cancelled = ended.filter(|finished| finished.reason() == FinishReason::Cancelled).count();
    assert!(cancelled > 9_000, "{cancelled} sequences were cancelled");
    house.at_rest().await;
}

/// A router that says nothing for the time that it has loses its sequences, and hears of it.
#[tokio::test]
async fn a_silent_router_loses_its_sequences() {
    let shape = Shape::default();
    let link =
        LinkSettings { heartbeat_interval_ms: 20, router_silence_ms_max: 200, ..shape.settings.link.clone() };
    let house = Shape { settings: WorkerSettings { link, ..shape.settings.clone() }, ..shape }.start().await;
    let mut silent = house.router(1).await;
    house.gate.allow(3);
    silent.submit(&house.shape, &Ask::new(&[5; 20], 900)).await;
    silent.until(|router| router.heard[&(1, 0)].ids.len() == 3).await;
    let end = silent.end().await.expect("an error");
    house.gate.open();
    assert_eq!(refusal(&end).known_reason(), Some(Reason::WorkerLost), "{end}");
    assert!(end.message().contains("200 ms"), "{end}");
    house.at_rest().await;
    // One that speaks, of whatever it is, keeps them.
    let mut alive = house.router(2).await;
    alive.submit(&house.shape, &Ask::new(&[6; 20], 900)).await;
    while !alive.is_over(1) {
        alive.heartbeat().await;
        alive.hear().await.unwrap();
    }
    assert_eq!(alive.reason(1, 0), FinishReason::Length);
}

#[tokio::test]
async fn a_broken_stream_frees_its_sequences() {
    let house = Shape::default().start().await;
    for _ in 0..20 {
        let mut router = house.router(1).await;
        for at in 0..30 {
            router.submit(&house.shape, &Ask::new(&[at; 20], 900)).await;
        }
        router.until(|router| router.admitted.len() > 3).await;
        drop(router);
        house.at_rest().await;
    }
    house.until(|_| house.metrics.streams_open.get() == 0).await;
    assert!(house.metrics.requests.of(Outcome::Cancelled).get() >= 20 * 4);
}

/// Its tokens pile up to the bound, and it is cut off; the other one hears every token of its own.
#[tokio::test]
async fn a_router_that_never_reads_disturbs_nobody() {
    let shape = Shape::default();
    let link = LinkSettings { outbox_bytes_max: 100_000, ..shape.settings.link.clone() };
    let scheduler = SchedulerConfig { slots: 64, blocks: 4_096, ..shape.scheduler.clone() };
    let settings = WorkerSettings { link, ..shape.settings.clone() };
    let house = Shape { settings, scheduler, ..shape }.start().await;
    let narrow = house
        .channel_with(|endpoint| {
            endpoint.initial_stream_window_size(4_096).initial_connection_window_size(65_535)
        })
        .await;
    let mut deaf = Router::open(client(narrow, Some(TOKEN)), 1).await;
    let mut other = house.router(2).await;
    for at in 0..32 {
        let mut ask = Ask::new(&[at; 20], 2_000);
        ask.raw.logprobs = Some(20);
        deaf.submit(&house.shape, &ask).await;
    }
    let ask = Ask::new(&[5; 20], 500);
    other.submit(&house.shape, &ask).await;
    other.finish().await;
    assert_eq!(other.heard[&(1, 0)].ids, ask.expected(&house.shape)[&0].0);
    house.at_rest().await;
    assert_eq!(house.metrics.streams_cut.get(), 1);
    let end = deaf.end().await.expect("an error");
    assert_eq!(refusal(&end).known_reason(), Some(Reason::SlowConsumer), "{end}");
}

#[tokio::test]
async fn what_the_queue_does_not_hold_is_refused_and_can_be_tried_again() {
    let shape = Shape::default();
    let scheduler = SchedulerConfig { queue: 2, slots: 1, blocks: 8_192, ..shape.scheduler.clone() };
    let house = Shape { scheduler, ..shape }.start().await;
    let mut router = house.router(1).await;
    // It keeps the one slot until it is cancelled.
    router.submit(&house.shape, &Ask::new(&[5; 20], 100_000)).await;
    router.until(|router| router.admitted.len() == 1).await;
    for at in 0..4 {
        router.submit(&house.shape, &Ask::new(&[at; 20], 30)).await;
    }
    router.until(|router| router.refused.len() == 2).await;
    router.cancel(1, &[]).await;
    router.finish().await;
    assert_eq!(router.refused.keys().copied().collect::<Vec<_>>(), [4, 5]);
    let full = &router.refused[&4];
    assert_eq!((full.known_reason(), full.number("waiting")), (Some(Reason::QueueFull), Some(2)));
    assert!(full.retry_ms.is_some_and(|ms| ms > 0), "{full:?}");
    router.submit(&house.shape, &Ask::new(&[9; 20], 3)).await;
    router.finish().await;
    assert_eq!(router.reason(6, 0), FinishReason::Length);
}

#[tokio::test]
async fn a_deadline_is_kept_before_and_in_mid_stream() {
    let shape = Shape::default();
    let scheduler = SchedulerConfig { blocks: 8_192, ..shape.scheduler.clone() };
    let house = Shape { scheduler, ..shape }.start().await;
    let mut router = house.router(1).await;
    // The fake reads its whole context with each token: so many of them take minutes.
    let long = Ask { deadline_ms: Some(200), ..Ask::new(&[5; 20], 100_000) };
    router.submit(&house.shape, &long).await;
    router.submit(&house.shape, &Ask { deadline_ms: Some(0), ..Ask::new(&[6; 20], 5) }).await;
    router.finish().await;
    assert_eq!(router.refused[&2].known_reason(), Some(Reason::DeadlineUnreachable));
    let passed = router.failure(1, 0);
    let output_tokens = router.heard[&(1, 0)].ids.len() as u64;
    assert_eq!(passed.known_reason(), Some(Reason::DeadlineExceeded));
    assert_eq!(passed.number("output_tokens"), Some(output_tokens));
    assert!(output_tokens > 0);
    house.at_rest().await;
}

/// Each is wrong alone: the stream goes on.
#[tokio::test]
async fn a_request_that_is_wrong_is_refused_by_what_is_wrong() {
    let house = Shape::default().start().await;
    let mut router = house.router(1).await;
    let ask = Ask::new(&[5; 20], 5);
    let check = async |router: &mut Router, change: fn(&mut Submit), reason: Reason, says: &str| {
        let mut submit = ask.submit(&house.shape, router.dispatch + 1);
        change(&mut submit);
        let dispatch = router.submit_as(submit).await;
        router.until(|router| router.refused.contains_key(&dispatch)).await;
        let refusal = &router.refused[&dispatch];
        assert_eq!(refusal.known_reason(), Some(reason), "{refusal:?}");
        assert!(refusal.message.contains(says), "{refusal:?}");
    };
    check(&mut router, |s| s.epoch = 5, Reason::StaleEpoch, "names epoch 5").await;
    check(&mut router, |s| s.prompt_ids[3] = VOCABULARY, Reason::InvalidField, "prompt_ids").await;
    check(&mut router, |s| s.prompt_ids.clear(), Reason::InvalidField, "at least one token").await;
    check(&mut router, |s| s.prompt_ids = vec![1; 1_024], Reason::ContextLengthExceeded, "1024").await;
    check(&mut router, |s| s.adapter = "a".into(), Reason::UnsupportedParameter, "adapter").await;
    check(&mut router, |s| s.sequences.clear(), Reason::Protocol, "submit.sequences").await;
    check(&mut router, |s| s.request_id.truncate(3), Reason::Protocol, "submit.request_id").await;
    check(&mut router, |s| s.params.as_mut().unwrap().top_p = Some(f32::NAN), Reason::InvalidField, "top_p")
        .await;
    router.submit(&house.shape, &ask).await;
    router.finish().await;
    assert_eq!(router.reason(9, 0), FinishReason::Length);
}

/// These are the stream's fault: it ends.
#[tokio::test]
async fn a_router_that_breaks_the_protocol_loses_its_stream() {
    let house = Shape::default().start().await;
    let ask = Ask::new(&[5; 20], 900);
    let submit = |dispatch| Up::Submit(ask.submit(&house.shape, dispatch));
    let again = || Up::Hello(hello(1));
    for (messages, says) in [
        (vec![submit(2)], "dispatch 2 came where 1 was due"),
        (vec![submit(0)], "dispatch 0 came where 1 was due"),
        (vec![submit(1), submit(1)], "dispatch 1 came where 2 was due"),
        (vec![submit(1), again()], "greeted twice"),
    ] {
        let mut router = house.router(1).await;
        router.heard.insert((1, 0), Default::default());
        for message in messages {
            router.say(message).await;
        }
        let end = router.end().await.expect("an error");
        assert_eq!(refusal(&end).known_reason(), Some(Reason::Protocol), "{end}");
        assert!(end.message().contains(says), "{end}");
        house.at_rest().await;
    }
    let mut client = house.client().await;
    let check = async |client: &mut Client, first: Up, reason: Reason| {
        let messages = futures::stream::iter([ExecuteRequest { message: Some(first) }]);
        let end = soon(client.execute(messages)).await.expect_err("refused");
        assert_eq!(refusal(&end).known_reason(), Some(reason), "{end}");
    };
    check(&mut client, Up::Cancel(Cancel::default()), Reason::Protocol).await;
    let stranger = RouterHello { wire: Some(WireRange { min: 9, max: 9 }), ..hello(1) };
    check(&mut client, Up::Hello(stranger), Reason::PeerMismatch).await;
    check(&mut client, Up::Hello(RouterHello { stream: 0, ..hello(1) }), Reason::Protocol).await;
}

#[tokio::test]
async fn there_are_only_so_many_streams() {
    let shape = Shape::default();
    let link = LinkSettings { streams_max: 2, ..shape.settings.link.clone() };
    let house = Shape { settings: WorkerSettings { link, ..shape.settings.clone() }, ..shape }.start().await;
    let first = house.router(1).await;
    let _second = house.router(2).await;
    let mut client = house.client().await;
    let greeting = || {
        let hello = Up::Hello(hello(3));
        futures::stream::iter([ExecuteRequest { message: Some(hello) }])
    };
    let full = soon(client.execute(greeting())).await.expect_err("refused");
    assert_eq!(full.code(), tonic::Code::ResourceExhausted, "{full}");
    assert!(refusal(&full).retry_ms.is_some());
    drop(first);
    soon(async { while client.execute(greeting()).await.is_err() {} }).await;
}
