//! SIGTERM under load: announced, then refused, and what runs is finished.

use petek_proto::refusal::WireRefusal;
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::worker_service_client::WorkerServiceClient;
use petek_proto::worker::v1::{
    ExecuteRequest, ExecuteResponse, RouterHello, SamplingParams, Submit, SubmitSequence, WireRange,
    WorkerState,
};
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Streaming};

use crate::client::{Client, Running, ask, client, load, spec};
use crate::server::Etcd;
use crate::stage::{Process, Stage, soon, until};

/// A router of the test's own, which goes on sending whatever it hears.
struct Stubborn {
    up: mpsc::UnboundedSender<ExecuteRequest>,
    down: Streaming<ExecuteResponse>,
    epoch: u64,
    dispatch: u64,
}

impl Stubborn {
    async fn meet(worker: &Process) -> Self {
        let mut service = WorkerServiceClient::new(worker.channel("worker").await);
        let (up, messages) = mpsc::unbounded_channel();
        let hello = RouterHello { router_id: 1, wire: Some(WireRange { min: 1, max: 1 }), stream: 1 };
        up.send(ExecuteRequest { message: Some(Up::Hello(hello)) }).expect("the receiver is here");
        let opened = soon("a worker's stream", service.execute(UnboundedReceiverStream::new(messages))).await;
        let mut down = opened.expect("open a stream").into_inner();
        let first = soon("a worker's hello", down.message()).await.expect("a stream that stands");
        let Some(ExecuteResponse { message: Some(Down::Hello(hello)) }) = first else {
            panic!("no hello: {first:?}")
        };
        Stubborn { up, down, epoch: hello.epoch, dispatch: 0 }
    }

    /// Sends a request of one token. What it came to: nothing, or why it was refused.
    async fn submit(&mut self) -> Option<WireRefusal> {
        self.dispatch += 1;
        let submit = Submit {
            dispatch: self.dispatch,
            request_id: vec![7; 16].into(),
            attempt: 1,
            epoch: self.epoch,
            prompt_ids: vec![5],
            params: Some(SamplingParams { max_tokens: 1, ..SamplingParams::default() }),
            sequences: vec![SubmitSequence::default()],
            ..Submit::default()
        };
        self.up.send(ExecuteRequest { message: Some(Up::Submit(submit)) }).expect("the stream stands");
        loop {
            let message = soon("a worker's word", self.down.message()).await.expect("the stream stands");
            match message.expect("the stream goes on").message {
                Some(Down::Finished(finished)) if finished.dispatch == self.dispatch => return None,
                Some(Down::Refused(refused)) if refused.dispatch == self.dispatch => {
                    let refusal = refused.status.as_ref().and_then(WireRefusal::read_rpc);
                    return Some(refusal.expect("a refusal of petek's"));
                }
                _ => {}
            }
        }
    }
}

fn ask_again(client: &Client, running: &[Running]) -> Vec<Running> {
    running.iter().map(|one| Running::start(client, one.spec.clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_announces_its_drain_refuses_finishes_and_ends_well() {
    let Some(etcd) = Etcd::shared("a_worker_announces_its_drain") else { return };
    let stage = Stage::new(etcd.endpoint());
    let ([mut a, _b], [router]) = stage.start(["a", "b"], ["router"]).await;
    let client = client(&router).await;
    let mut stubborn = Stubborn::meet(&a).await;
    assert_eq!(stubborn.submit().await, None);

    let running = load(&client, &["a", "b"], 2, 600).await;
    a.signal(Signal::TERM);
    assert!(running.iter().map(Running::so_far).any(|it| it.worker() == "a" && it.end.is_none()));
    let refusal = loop {
        // Clients notice nothing, whatever the worker is about to do.
        let beside = Running::start(&client, spec("Meanwhile", 5, 4));
        let refusal = stubborn.submit().await;
        beside.ended().await.bytes();
        if let Some(refusal) = refusal {
            break refusal;
        }
    };
    // The announcement came first, wherever one may look.
    let (record, _) = stage.records().await.remove("a").expect("its record stands while it drains");
    assert_eq!(record["state"], "draining");
    assert!(!a.is_ready().await && a.ops("/health").await.starts_with("HTTP/1.1 200"));
    assert_eq!(router.sees("a").await.map(|worker| worker.state()), Some(WorkerState::Draining));
    assert_eq!((refusal.code, &*refusal.reason), (Code::Unavailable, "DRAINING"));
    assert!(refusal.retry_ms.is_some_and(|ms| ms > 0));

    let again = ask_again(&client, &running);
    for (one, again) in running.into_iter().zip(again) {
        assert!(one.ended().await.bytes() == again.ended().await.bytes(), "a drain changes no byte");
    }
    drop(stubborn);
    let (code, said) = a.ended().await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(stage.records().await.keys().collect::<Vec<_>>(), ["b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_refuses_finishes_and_ends_well_and_a_second_signal_ends_anything_at_once() {
    let Some(etcd) = Etcd::shared("a_router_refuses_finishes_and_ends_well") else { return };
    let stage = Stage::new(etcd.endpoint());
    let ([mut a, mut b], [mut first, mut second]) = stage.start(["a", "b"], ["first", "second"]).await;

    let asking = client(&first).await;
    let running = load(&asking, &["a", "b"], 2, 600).await;
    first.signal(Signal::TERM);
    assert!(running.iter().any(|one| one.so_far().end.is_none()));
    until("the router drains", async || !first.is_ready().await).await;
    let refused = ask(&asking, spec("Too late", 1, 4)).await.refusal();
    assert_eq!((refused.code, &*refused.reason), (Code::Unavailable, "DRAINING"));
    assert!(refused.retry_ms.is_some_and(|ms| ms > 0));
    // The other router is no worse for it.
    let other = client(&second).await;
    let again = ask_again(&other, &running);
    for (one, again) in running.into_iter().zip(again) {
        assert!(one.ended().await.bytes() == again.ended().await.bytes(), "a drain changes no byte");
    }
    let (code, said) = first.ended().await;
    assert_eq!(code, Some(0), "{said}");

    // A worker that is told twice: its streams break, and say so.
    let running = load(&other, &["a", "b"], 2, 600).await;
    a.signal(Signal::TERM);
    until("the worker drains", async || !a.is_ready().await).await;
    a.signal(Signal::TERM);
    assert_eq!(a.ended().await.0, Some(128 + 15));
    let mut lost = 0;
    for one in running {
        let answer = one.ended().await;
        if answer.worker() == "a" && !matches!(answer.end, Some(Ok(_))) {
            assert_eq!(answer.refusal().reason, "WORKER_LOST");
            lost += 1;
        } else {
            answer.bytes();
        }
    }
    assert!(lost >= 1, "no answer was under way when the worker ended");

    // And a router.
    let running = load(&other, &["b"], 2, 600).await;
    second.signal(Signal::INT);
    until("the router drains", async || !second.is_ready().await).await;
    second.signal(Signal::INT);
    assert_eq!(second.ended().await.0, Some(128 + 2));
    for one in running {
        let answer = one.ended().await;
        assert!(matches!(&answer.end, Some(Err(_))), "a router that is gone cannot finish: {answer:?}");
    }
    // Nobody asks any more: the worker is done at once.
    b.signal(Signal::TERM);
    assert_eq!(b.ended().await.0, Some(0));
}
