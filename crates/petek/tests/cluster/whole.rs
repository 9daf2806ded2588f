//! Two routers on the same workers: the same bytes whoever computes them, the same picture of the caches, and every
//! service answers.

use petek_proto::inference::v1::{GenerationSpec, RequestOptions, StreamGenerateRequest};
use rustix::process::Signal;
use tonic::Request;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::client::{Bytes, Client, Running, ask, client, load, read, spec};
use crate::collector::collect;
use crate::server::Etcd;
use crate::stage::{Process, Stage, soon, until};

/// Prompts of several blocks, some of which begin alike.
fn conversations(count: u64, max_tokens: u32) -> Vec<GenerationSpec> {
    let tale = "The king had a garden. In the garden there was a tree. ".repeat(4);
    let prompt = |n| match n % 3 {
        0 => format!("Number {n}. {tale}"),
        _ => format!("{tale}Number {n}. {tale}"),
    };
    (0..count).map(|n| spec(&prompt(n), 400 + n, max_tokens)).collect()
}

/// All at once, in order.
async fn together(client: &Client, asked: &[GenerationSpec]) -> Vec<Bytes> {
    let running: Vec<Running> = asked.iter().map(|spec| Running::start(client, spec.clone())).collect();
    let mut answers = Vec::new();
    for one in running {
        answers.push(one.ended().await.bytes());
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_gives_the_same_bytes_wherever_it_is_computed() {
    let Some(etcd) = Etcd::shared("the_same_request_gives_the_same_bytes") else { return };
    let stage = Stage::new(etcd.endpoint());
    let routers = ["first", "second"].map(|name| stage.router(name).start());
    let asked = conversations(4, 24);
    let without_cache = asked.iter().map(|spec| {
        let options = RequestOptions { bypass_prefix_cache: true, ..RequestOptions::default() };
        GenerationSpec { options: Some(options), ..spec.clone() }
    });
    let without_cache: Vec<GenerationSpec> = without_cache.collect();
    let mut expected = None;
    // One worker after the other, each the only one, so that it is known who computes.
    let shapes = [("one", "--threads 1"), ("wide", "--threads 2"), ("split", "--tp 2 --threads 2")];
    for (id, shape) in shapes {
        let mut worker = stage.worker(id).words(shape).start();
        for router in &routers {
            router.reaches(&[id]).await;
        }
        for (number, router) in routers.iter().enumerate() {
            let client = client(router).await;
            let cold = together(&client, &asked).await;
            let expected = expected.get_or_insert_with(|| cold.clone());
            assert!(cold == *expected, "{id} through router {number}, first");
            assert!(together(&client, &asked).await == *expected, "{id} through router {number}, again");
            let bypassed = together(&client, &without_cache).await;
            assert!(bypassed == *expected, "{id} through router {number}, without a cache");
            let alone = ask(&client, asked[0].clone()).await;
            assert_eq!(alone.worker(), id);
            let cached = alone.started.as_ref().map_or(0, |started| started.cached_tokens);
            assert!(cached > 0, "the cache is warm");
            assert!(alone.bytes() == expected[0], "{id} through router {number}, alone");
        }
        worker.signal(Signal::TERM);
        assert_eq!(worker.ended().await.0, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_router_knows_exactly_what_every_worker_holds() {
    let Some(etcd) = Etcd::shared("every_router_knows_exactly_what_every_worker_holds") else { return };
    let stage = Stage::new(etcd.endpoint());
    // Small caches, so that blocks are thrown out all the time.
    let small = "--kv-memory 1MiB --context 512 --block-size 16";
    let workers = ["a", "b"].map(|id| stage.worker(id).words(small).start());
    let routers = ["first", "second"].map(|name| stage.router(name).start());
    let mut expected = Vec::new();
    for router in &routers {
        router.reaches(&["a", "b"]).await;
        let client = client(router).await;
        for burst in conversations(60, 30).chunks(12) {
            expected.extend(together(&client, burst).await);
        }
    }
    assert!(expected[..60] == expected[60..], "full caches change no byte");
    for worker in &workers {
        for router in &routers {
            until("the router's picture of a worker is the worker's own", async || {
                let view = router.sees(&worker.name).await.and_then(|seen| seen.view).unwrap_or_default();
                let status = worker.status().await;
                (view.index_digest, view.index_blocks, view.index_seq)
                    == (status.kv_digest, status.blocks_cached.into(), status.kv_seq)
            })
            .await;
            // By events alone, many of which took blocks away: nothing was lost on the way.
            let view = router.sees(&worker.name).await.and_then(|seen| seen.view).unwrap_or_default();
            assert_eq!(view.index_resyncs, 0, "{}", router.said());
            let removed = router.metric(r#"petek_router_kv_blocks_total{change="removed"}"#).await;
            assert!(view.index_blocks > 0 && removed > Some(100.0), "{view:?} {removed:?}");
        }
    }
}

/// What the listener serves, by its own word.
async fn services(process: &Process, of: &str) -> Vec<String> {
    let list = MessageRequest::ListServices(String::new());
    let ask = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut reflection = ServerReflectionClient::new(process.channel(of).await);
    let asked = reflection.server_reflection_info(futures::stream::iter([ask]));
    let mut answers = soon("reflection", asked).await.expect("ask what is served").into_inner();
    let answer = answers.message().await.expect("an answer").and_then(|answer| answer.message_response);
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let mut names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    names.sort();
    names
}

async fn check_served(process: &Process, of: &str, service: &str) {
    let served = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", service];
    assert_eq!(services(process, of).await, served, "{} {of}", process.name);
    let mut health = HealthClient::new(process.channel(of).await);
    for name in ["", service] {
        let request = HealthCheckRequest { service: name.into() };
        let answer = soon("health", health.check(request)).await;
        let answer = answer.unwrap_or_else(|error| panic!("{} {of} {name:?}: {error}", process.name));
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving, "{} {of} {name:?}", process.name);
    }
}

/// Metrics that dashboards are built on.
const ROUTER_METRICS: [&str; 11] = [
    "petek_router_workers 2",
    "petek_router_streams_open ",
    "petek_router_requests_total{model=\"demo\",outcome=\"finished\"}",
    "petek_router_prompt_tokens_total{model=\"demo\"}",
    "petek_router_output_tokens_total{model=\"demo\"}",
    "petek_router_cached_tokens_total{model=\"demo\"}",
    "petek_router_predicted_cached_tokens_total{model=\"demo\"}",
    "petek_router_predictions_total{model=\"demo\",prediction=\"exact\"}",
    "petek_router_time_to_first_token_seconds_count{model=\"demo\"}",
    "petek_router_inter_token_seconds_count{model=\"demo\"}",
    "petek_router_decisions_total{model=\"demo\",reason=",
];
const WORKER_METRICS: [&str; 8] = [
    "petek_worker_requests_total{",
    "petek_worker_prompt_tokens_total{",
    "petek_worker_output_tokens_total{",
    "petek_worker_cached_tokens_total{",
    "petek_worker_queue_seconds_count{",
    "petek_worker_sequences{model=\"demo\",state=\"running\",",
    "petek_worker_sequences{model=\"demo\",state=\"waiting\",",
    "petek_worker_blocks{model=\"demo\",state=\"free\",",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_service_answers_in_mid_load_and_a_trace_goes_all_the_way() {
    let Some(etcd) = Etcd::shared("every_service_answers_in_mid_load") else { return };
    let (collector, mut exported) = collect().await;

    let stage = Stage::new(etcd.endpoint());
    let otlp = format!("--otlp {collector}");
    let mut workers = ["a", "b"].map(|id| stage.worker(id).words(&otlp).start());
    let mut routers = ["first", "second"].map(|name| stage.router(name).words(&otlp).start());
    let mut running = Vec::new();
    for router in &routers {
        router.reaches(&["a", "b"]).await;
        // Both routers use both workers.
        running.extend(load(&client(router).await, &["a", "b"], 1, 400).await);
    }
    for router in &routers {
        check_served(router, "public", "petek.inference.v1.InferenceService").await;
        check_served(router, "admin", "petek.admin.v1.AdminService").await;
        let metrics = router.ops("/metrics").await;
        for name in ROUTER_METRICS {
            assert!(metrics.lines().any(|line| line.starts_with(name)), "{name} is not in\n{metrics}");
        }
        assert!(router.ops("/health").await.starts_with("HTTP/1.1 200"));
    }
    for worker in &workers {
        check_served(worker, "worker", "petek.worker.v1.WorkerService").await;
        let metrics = worker.ops("/metrics").await;
        for name in WORKER_METRICS {
            assert!(metrics.lines().any(|line| line.starts_with(name)), "{name} is not in\n{metrics}");
        }
    }
    let count = running.len() as f64;
    for one in running {
        one.ended().await.bytes();
    }
    let finished = ROUTER_METRICS[2];
    let both = [routers[0].metric(finished).await, routers[1].metric(finished).await];
    assert_eq!(both.iter().flatten().sum::<f64>(), count, "{both:?}");

    // A client's trace goes through the router to the worker.
    let trace = "0123456789abcdef0123456789abcdef";
    let mut request = Request::new(StreamGenerateRequest { spec: Some(spec("Follow me", 1, 4)) });
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    request.metadata_mut().insert("traceparent", parent.parse().expect("it is a header"));
    let mut asking = client(&routers[0]).await;
    let mut stream = asking.stream_generate(request).await.expect("it begins").into_inner();
    read(&mut stream).await.bytes();
    // Spans that still wait go out when their process ends.
    for process in routers.iter_mut().chain(&mut workers) {
        process.signal(Signal::TERM);
        let (code, said) = process.ended().await;
        assert_eq!(code, Some(0), "{said}");
    }
    let mut spans = Vec::new();
    while let Ok(request) = exported.try_recv() {
        for of_resource in request.resource_spans {
            let process = format!("{:?}", of_resource.resource);
            let found = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            spans.extend(found.map(|span| (process.clone(), span)));
        }
    }
    let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let of_trace = spans.iter().filter(|(_, span)| hex(&span.trace_id) == trace);
    let (of_router, of_worker): (Vec<_>, Vec<_>) =
        of_trace.partition(|(process, _)| process.contains("petek-router"));
    let [(_, router)] = of_router[..] else { panic!("{of_router:?}") };
    assert_eq!(hex(&router.parent_span_id), "00f067aa0ba902b7");
    let [(process, worker)] = &of_worker[..] else {
        let seen = spans.iter().map(|(process, span)| (process, &span.name, hex(&span.trace_id)));
        panic!("{of_worker:?} of {:#?}", seen.collect::<Vec<_>>())
    };
    assert!(process.contains("petek-worker"), "{process}");
    assert_eq!(worker.parent_span_id, router.span_id);
}
