//! Who may speak to a worker.

use petek_core::refusal::Reason;
use petek_proto::hello::CLUSTER_TOKEN_KEY;
use petek_proto::worker::v1::{
    DrainRequest, ExecuteRequest, GetModelCardRequest, GetStatusRequest, WatchKvEventsRequest,
    WatchLoadRequest,
};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::support::{Shape, TOKEN, client, hello, refusal, soon};

#[tokio::test]
async fn every_call_but_health_needs_the_clusters_token() {
    let house = Shape::default().start().await;
    for token in [None, Some("com"), Some("combs"), Some("COMB")] {
        let mut client = client(house.channel().await, token);
        let check = |answer: Result<(), Status>| {
            let status = answer.expect_err("refused");
            assert_eq!(status.code(), Code::Unauthenticated);
            assert_eq!(refusal(&status).known_reason(), Some(Reason::Unauthenticated));
        };
        let none = futures::stream::iter(Vec::<ExecuteRequest>::new());
        check(soon(client.execute(none)).await.map(drop));
        check(soon(client.get_status(GetStatusRequest {})).await.map(drop));
        let watch = WatchLoadRequest { hello: Some(hello(1)) };
        check(soon(client.watch_load(watch)).await.map(drop));
        let watch = WatchKvEventsRequest { hello: Some(hello(1)), resume: None };
        check(soon(client.watch_kv_events(watch)).await.map(drop));
        let get = GetModelCardRequest { hello: Some(hello(1)) };
        check(soon(client.get_model_card(get)).await.map(drop));
        check(soon(client.drain(DrainRequest::default())).await.map(drop));
        let mut reflection = ServerReflectionClient::new(house.channel().await);
        let mut request = Request::new(futures::stream::iter([list_services()]));
        if let Some(token) = token {
            request.metadata_mut().insert(CLUSTER_TOKEN_KEY, token.parse().unwrap());
        }
        check(soon(reflection.server_reflection_info(request)).await.map(drop));
    }
    let mut health = HealthClient::new(house.channel().await);
    soon(health.check(HealthCheckRequest { service: String::new() })).await.unwrap();
    assert!(!house.shutdown.is_draining(), "nobody without it drains us");
}

fn list_services() -> ServerReflectionRequest {
    let list = MessageRequest::ListServices(String::new());
    ServerReflectionRequest { host: String::new(), message_request: Some(list) }
}

#[tokio::test]
async fn reflection_knows_the_services() {
    let house = Shape::default().start().await;
    let mut reflection = ServerReflectionClient::new(house.channel().await);
    let mut request = Request::new(futures::stream::iter([list_services()]));
    request.metadata_mut().insert(CLUSTER_TOKEN_KEY, TOKEN.parse().unwrap());
    let mut answers = soon(reflection.server_reflection_info(request)).await.unwrap().into_inner();
    let answer = soon(answers.message()).await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let mut names: Vec<_> = list.service.iter().map(|service| &service.name[..]).collect();
    names.sort_unstable();
    let served =
        ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "petek.worker.v1.WorkerService"];
    assert_eq!(names, served);
}

/// A call that greets nobody is refused by name.
#[tokio::test]
async fn calls_beside_the_stream_greet_too() {
    let house = Shape::default().start().await;
    let mut client = house.client().await;
    let check = |answer: Result<(), Status>| {
        let refusal = refusal(&answer.expect_err("refused"));
        assert_eq!(refusal.known_reason(), Some(Reason::Protocol));
        assert!(refusal.message.contains("hello must be set"), "{refusal:?}");
    };
    check(soon(client.watch_load(WatchLoadRequest::default())).await.map(drop));
    check(soon(client.watch_kv_events(WatchKvEventsRequest::default())).await.map(drop));
    check(soon(client.get_model_card(GetModelCardRequest::default())).await.map(drop));
}
