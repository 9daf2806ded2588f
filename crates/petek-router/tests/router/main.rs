//! A router with scripted workers, through its public API over loopback.

#[path = "../support/mod.rs"]
mod support;

mod answers;

mod ends;

mod connections;

mod refusals;

mod burst;

mod operators;

mod cache;

mod loads;

use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{GenerateRequest, GenerationSpec, SamplingParams};
use support::{AfterLast, Read, Script, refusal, soon, stream};
use tonic::transport::Channel;

pub(crate) fn plays(list: &[u32]) -> Script {
    Script::Play(vec![list.into()], AfterLast::Waits)
}

pub(crate) fn params() -> SamplingParams {
    SamplingParams { seed: Some(5), ..SamplingParams::default() }
}

pub(crate) async fn unary(client: &mut InferenceServiceClient<Channel>, spec: GenerationSpec) -> Read {
    let mut read = Read::default();
    match soon(client.generate(GenerateRequest { spec: Some(spec) })).await {
        Err(status) => read.error = Some(refusal(&status)),
        Ok(response) => {
            assert!(response.metadata().contains_key("x-request-id"));
            let generation = response.into_inner().generation.unwrap();
            read.started = generation.started;
            let joined = |d: petek_proto::inference::v1::Delta| (d.text, d.token_ids, d.logprobs.len());
            read.sequences = generation.sequences.into_iter().map(joined).collect();
            read.finished = generation.finished;
        }
    }
    read
}

/// Asks both ways, expects the same, and returns it.
pub(crate) async fn both(client: &mut InferenceServiceClient<Channel>, spec: GenerationSpec) -> Read {
    let streamed = stream(client, spec.clone()).await;
    let joined = unary(client, spec).await;
    assert_eq!(streamed.sequences, joined.sequences);
    let reasons = |read: &Read| {
        read.finished
            .as_ref()
            .map(|f| f.sequences.iter().map(|s| (s.reason(), s.matched.clone())).collect::<Vec<_>>())
    };
    assert_eq!(reasons(&streamed), reasons(&joined));
    streamed
}
