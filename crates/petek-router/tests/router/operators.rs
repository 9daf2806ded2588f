//! What operators see and do: workers, decisions, health.

use petek_proto::admin::v1::{
    CandidateState, DrainWorkerRequest, ExplainRouteRequest, Link, ListWorkersRequest, RouterView,
    explain_route_request,
};
use petek_proto::inference::v1::{RouteReason, SamplingParams, StreamGenerateRequest};
use petek_proto::worker::v1 as worker;
use petek_proto::worker::v1::WorkerState;
use petek_router::LinkSettings;
use tonic::transport::{Channel, Endpoint};

use crate::support::{Cluster, EOS, Read, Script, Worker, refusal, settings, soon, spec, stream, until};
use crate::{params, plays};

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_workers_and_reasons() {
    let mut workers = [Worker::start("w0", Script::Silent), Worker::start("w1", Script::Silent)];
    let cluster = Cluster::start(settings(), &workers).await;
    let mut admin = cluster.admin().await;
    let _running = cluster
        .client()
        .await
        .stream_generate(StreamGenerateRequest { spec: Some(spec(&[7; 40], params())) })
        .await
        .unwrap();
    let explain = ExplainRouteRequest {
        request: Some(explain_route_request::Request::Generation(spec(
            &[8; 40],
            SamplingParams { max_tokens: Some(300), ..params() },
        ))),
    };
    let decision = admin.explain_route(explain.clone()).await.unwrap().into_inner().decision.unwrap();
    assert_eq!((decision.prompt_tokens, decision.prompt_blocks, decision.decode_tokens), (40, 2, 256));
    assert_eq!(
        (decision.wait_weight_per_s, decision.tie_share, decision.reason()),
        (4.0, 0.05, RouteReason::Load)
    );
    let [best, busy] = &decision.candidates[..] else { panic!("two candidates: {decision:?}") };
    assert_eq!(
        (&best.worker, best.waiting_tokens, busy.waiting_tokens, busy.running),
        (&decision.worker, 0, 40, 1)
    );
    for candidate in [best, busy] {
        let wait = candidate.waiting_tokens as f64 / candidate.prefill_tokens_per_s;
        let prefill = (1.0 + 4.0 * decision.mean_wait_s) * 40.0 / candidate.prefill_tokens_per_s;
        assert!(
            (candidate.wait_s - wait).abs() < 1e-9 && (candidate.prefill_s - prefill).abs() < 1e-9,
            "{candidate:?}"
        );
        assert!((candidate.cost_s - wait - prefill - candidate.decode_s).abs() < 1e-9, "{candidate:?}");
    }

    let drained = admin
        .drain_worker(DrainWorkerRequest { worker: best.worker.clone(), ..DrainWorkerRequest::default() })
        .await;
    assert_eq!(drained.unwrap().into_inner().worker.unwrap().state(), WorkerState::Draining);
    let decision = admin.explain_route(explain).await.unwrap().into_inner().decision.unwrap();
    assert_eq!((&decision.worker, decision.reason()), (&busy.worker, RouteReason::OnlyWorker));
    assert_eq!(decision.candidates[1].state(), CandidateState::Draining);
    let stale = DrainWorkerRequest { worker: "w0".into(), epoch: Some(1), ..DrainWorkerRequest::default() };
    assert_eq!(refusal(&admin.drain_worker(stale).await.unwrap_err()).reason, "STALE_EPOCH");

    // A record that goes away takes its worker with it; what it runs is finished.
    let busy_at = usize::from(busy.worker != "w0");
    let (submit, reply) = workers[busy_at].submit().await;
    cluster.list.send_modify(|list| list.workers.clear());
    until(async || {
        let workers = admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
        workers.is_empty()
    })
    .await;
    reply.admit(submit.dispatch);
    reply.tokens(submit.dispatch, 0, 0, &[EOS]);
    reply.finish(submit.dispatch, 0, worker::FinishReason::StopEos);
    let mut events = _running.into_inner();
    let mut read = Read::default();
    while let Some(response) = soon(events.message()).await.unwrap() {
        read.take(response.event.unwrap());
    }
    assert_eq!(read.ids(), [EOS]);
    assert_eq!(stream(&mut cluster.client().await, spec(&[8], params())).await.reason(), "NO_WORKER");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_not_what_its_record_says_gets_no_work() {
    type Change = fn(&mut worker::WorkerHello);
    let lies: [(Change, &str); 7] = [
        (|hello| hello.worker = "w1".into(), "worker id"),
        (|hello| hello.epoch += 1, "epoch"),
        (|hello| hello.revision = vec![8; 32].into(), "revision"),
        (|hello| hello.text_hash = vec![8; 32].into(), "text hash"),
        (|hello| hello.block_size_tokens = 32, "block size"),
        (|hello| hello.numerics_id.clear(), "numerics id"),
        (|hello| hello.wire = None, "wire version"),
    ];
    for (change, what) in lies {
        let liar = Worker::start_as("w0", Script::Silent, change);
        let cluster = Cluster::start_unready(settings(), vec![liar.entry.clone()]).await;
        let mut admin = cluster.admin().await;
        let mut view = RouterView::default();
        until(async || {
            let workers =
                admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
            view = workers.into_iter().next().and_then(|worker| worker.view).unwrap_or_default();
            view.link() == Link::Refused
        })
        .await;
        assert!(view.link_error.contains(what), "{what}: {}", view.link_error);
        assert_eq!(stream(&mut cluster.client().await, spec(&[8], params())).await.reason(), "NO_WORKER");
        assert!(!cluster.has_metric("petek_router_records_bad_total 0"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_unlike_its_pool_is_refused() {
    let good = Worker::start("a", plays(&[EOS]));
    let mut unlike = Worker::start("b", plays(&[EOS])).entry.clone();
    unlike.block_size = 2 * crate::support::BLOCK;
    let cluster = Cluster::start_unready(settings(), vec![good.entry.clone(), unlike]).await;
    cluster.connected(1).await;
    let workers =
        cluster.admin().await.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
    let view = workers[1].view.as_ref().unwrap();
    assert_eq!((view.link(), &*view.link_error), (Link::Refused, "block size: ours is 16, the peer's 32"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_comes_back_after_its_restart() {
    let mut first = Worker::start("w0", Script::Silent);
    let mut quick = settings();
    quick.link = LinkSettings { retry_ms_max: 1, ..quick.link };
    let cluster = Cluster::start(quick, std::slice::from_ref(&first)).await;
    first.kill();
    let mut admin = cluster.admin().await;
    let mut link = async || {
        let workers = admin.list_workers(ListWorkersRequest::default()).await.unwrap().into_inner().workers;
        workers[0].view.as_ref().unwrap().link()
    };
    until(async || link().await != Link::Connected).await;
    let second = Worker::start("w0", plays(&[1, EOS]));
    cluster.list.send_modify(|list| list.workers = vec![second.entry.clone()]);
    until(async || link().await == Link::Connected).await;
    assert_eq!(stream(&mut cluster.client().await, spec(&[8], params())).await.text(), "ab");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_speak_for_every_service() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let worker = Worker::start("w0", Script::Silent);
    let cluster = Cluster::start_unready(settings(), vec![]).await;
    let at = |address: std::net::SocketAddr| Endpoint::from_shared(format!("http://{address}")).unwrap();
    let public = at(cluster.router.public_address()).connect().await.unwrap();
    let admin = at(cluster.router.admin_address()).connect().await.unwrap();
    let check = async |channel: &Channel, service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status()
    };
    let inference = "petek.inference.v1.InferenceService";
    assert_eq!(check(&public, inference).await, ServingStatus::NotServing, "there is no worker yet");
    assert_eq!(check(&admin, "petek.admin.v1.AdminService").await, ServingStatus::Serving);
    cluster.list.send_modify(|list| list.workers = vec![worker.entry.clone()]);
    cluster.connected(1).await;
    assert_eq!(check(&public, inference).await, ServingStatus::Serving);
    assert_eq!(check(&public, "").await, ServingStatus::Serving);

    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileContainingSymbol(inference.into())),
    };
    let mut answers = ServerReflectionClient::new(public)
        .server_reflection_info(futures::stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    assert!(matches!(answer, Some(MessageResponse::FileDescriptorResponse(_))), "{answer:?}");
}
