//! One request is one trace, from the client's own span through the router's to the worker's.

use std::time::Duration;

use petek_proto::inference::v1::GenerateRequest;
use tonic::Request;

use super::api::{Client, greedy, text_spec};
use super::collector::collect;
use super::process::Up;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_one_trace_through_router_and_worker() {
    let (endpoint, mut receive) = collect().await;

    let up = Up::start(&["--log-otlp-endpoint", &endpoint]);
    let client = Client::of(&up).await;
    let mut request = Request::new(GenerateRequest { spec: Some(text_spec("I have a dream", greedy(4))) });
    let of_client = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01";
    request.metadata_mut().insert("traceparent", of_client.parse().expect("a header"));
    client.0.clone().generate(request).await.expect("it answers");

    let trace_id = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef].repeat(2);
    let mut spans = Vec::new();
    // Sent in batches; a worker's may come before its router's.
    while spans.len() < 2 {
        let batch = tokio::time::timeout(Duration::from_secs(60), receive.recv()).await;
        let batch = batch.unwrap_or_else(|_| panic!("two spans in a minute: {spans:?}"));
        let batch = batch.expect("the collector serves");
        let scopes = batch.resource_spans.into_iter().flat_map(|of_resource| of_resource.scope_spans);
        spans.extend(scopes.flat_map(|of_scope| of_scope.spans).filter(|span| span.trace_id == trace_id));
    }
    let parent = |id: &[u8]| spans.iter().filter(|span| span.parent_span_id == id).collect::<Vec<_>>();
    let [router] = parent(&trace_id[..8])[..] else { panic!("one span follows the client's: {spans:?}") };
    let [_worker] = parent(&router.span_id)[..] else { panic!("one span follows the router's: {spans:?}") };
    let text = format!("{spans:?}");
    assert!(!text.contains("dream"), "spans hold no prompts: {text}");
}
