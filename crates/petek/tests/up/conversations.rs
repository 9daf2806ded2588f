//! Prefix sharing across a cluster: conversations whose every turn begins with all that was said before.

use std::collections::HashMap;
use std::time::Duration;

use petek_proto::admin::v1::admin_service_client::AdminServiceClient;
use petek_proto::admin::v1::explain_route_request::Request;
use petek_proto::admin::v1::{ExplainRouteRequest, ListWorkersRequest};
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{ChatMessage, ChatRequest, ChatSpec, Generation, SamplingParams};
use petek_proto::worker::v1::GetStatusRequest;
use petek_proto::worker::v1::worker_service_client::WorkerServiceClient;
use tonic::transport::Channel;

use super::process::Up;

const CONVERSATIONS: usize = 20;
const TURNS: usize = 6;
const BLOCK_TOKENS: u32 = 16;

/// Clients of all that a cluster serves.
struct Cluster {
    public: InferenceServiceClient<Channel>,
    admin: AdminServiceClient<Channel>,
    workers: Vec<WorkerServiceClient<Channel>>,
}

impl Cluster {
    async fn connect(up: &Up) -> Self {
        let channel = async |address: &str| {
            let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
            endpoint.connect().await.expect("it listens")
        };
        let mut workers = Vec::new();
        for address in &up.workers {
            workers.push(WorkerServiceClient::new(channel(address).await));
        }
        Cluster {
            public: InferenceServiceClient::new(channel(&up.public).await),
            admin: AdminServiceClient::new(channel(&up.admin).await),
            workers,
        }
    }

    /// Waits until the router has the last batch of every worker's events.
    async fn settled(&mut self) {
        loop {
            let list = self.admin.list_workers(ListWorkersRequest::default()).await.expect("it lists");
            let seqs = list.into_inner().workers.into_iter();
            let router: HashMap<String, u64> =
                seqs.map(|worker| (worker.id, worker.view.map_or(0, |view| view.index_seq))).collect();
            let mut is_settled = true;
            for worker in &mut self.workers {
                let status = worker.get_status(GetStatusRequest {}).await.expect("a status");
                let status = status.into_inner().status.expect("a status");
                is_settled &= status.running == 0 && router.get(&status.worker) == Some(&status.kv_seq);
            }
            if is_settled {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn chat(&mut self, spec: &ChatSpec) -> (Generation, u32) {
        let explain = Request::Chat(spec.clone());
        let explained = self.admin.explain_route(ExplainRouteRequest { request: Some(explain) }).await;
        let decision = explained.expect("it explains").into_inner().decision.expect("a decision");
        let answer = self.public.chat(ChatRequest { spec: Some(spec.clone()) }).await;
        let answer = answer.expect("it answers").into_inner().generation.expect("a generation");
        let worker = &answer.started.as_ref().expect("started").worker;
        let candidate = decision.candidates.iter().find(|candidate| &candidate.worker == worker);
        let predicted = candidate.expect("a worker of the pool").matched_tokens;
        (answer, predicted)
    }
}

/// The router's predicted cached tokens are the actual ones, and what a conversation said stays on its worker.
#[tokio::test]
async fn twenty_conversations_share_their_prefixes_as_the_router_predicts() {
    let block = BLOCK_TOKENS.to_string();
    let up = Up::start(&["--block-size", &block]);
    let mut cluster = Cluster::connect(&up).await;
    let mut conversations: Vec<Vec<ChatMessage>> = vec![Vec::new(); CONVERSATIONS];
    let mut blocks_before = [0; CONVERSATIONS];
    let (mut requests, mut predicted_right, mut later, mut kept) = (0, 0, 0, 0);
    for turn in 0..TURNS {
        for (number, messages) in conversations.iter_mut().enumerate() {
            let message = |role: &str, content: String| ChatMessage {
                role: role.into(),
                content: Some(content),
                ..ChatMessage::default()
            };
            messages.push(message("user", format!("Tell me story {number} again, part {turn}.")));
            cluster.settled().await;
            let spec = ChatSpec {
                messages: messages.clone(),
                params: Some(SamplingParams {
                    seed: Some((number * TURNS + turn) as u64),
                    max_tokens: Some(12),
                    ..SamplingParams::default()
                }),
                ..ChatSpec::default()
            };
            let (answer, predicted) = cluster.chat(&spec).await;
            let usage = answer.finished.expect("finished").usage.expect("usage");
            requests += 1;
            predicted_right += usize::from(u64::from(predicted) == u64::from(usage.cached_tokens));
            if turn > 0 {
                later += 1;
                kept += usize::from(usage.cached_tokens >= blocks_before[number] * BLOCK_TOKENS);
            }
            blocks_before[number] = usage.prompt_tokens / BLOCK_TOKENS;
            messages.push(message("assistant", answer.sequences.into_iter().next().expect("one").text));
        }
    }
    eprintln!("predicted right {predicted_right} of {requests}; kept {kept} of {later}");
    assert!(100 * predicted_right >= 99 * requests, "{predicted_right} of {requests}");
    assert!(100 * kept >= 95 * later, "{kept} of {later}");
    assert!(blocks_before.iter().all(|blocks| *blocks > 3), "prompts too short to say anything");
}
