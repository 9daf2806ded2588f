//! One router's stream, read: greeting, then requests, cancels and signs of life, each checked before the engine
//! hears of it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use petek_core::refusal::Refusal;
use petek_core::scheduler::{NewRequest, NewSequence};
use petek_proto::refusal::status;
use petek_proto::submit::{Submission, SubmittedSequence};
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::{Cancel, ExecuteRequest, Heartbeat, RouterHello, Submit};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};
use tonic::{Status, Streaming};
use tracing::Span;
use tracing::field::Empty;
use uuid::Uuid;

use super::{Context, ENGINE_GONE, full, greeted, lost, ms};
use crate::engine::{Command, LinkId};
use crate::outbox::{Answers, Outbox};

/// A timer that fires this much late says that this process was stalled, not the router.
const STALL: Duration = Duration::from_millis(500);

/// Waits for the greeting, and has the rest of the stream read by a task.
pub(super) async fn open(
    context: Arc<Context>,
    mut inbound: Streaming<ExecuteRequest>,
) -> Result<Answers, Status> {
    let link = &context.settings.link;
    let full = |_| full("Execute streams", link.streams_max);
    let permit = context.streams.clone().try_acquire_owned().map_err(full)?;
    let first = timeout(ms(link.router_silence_ms_max), inbound.message()).await;
    let first =
        first.map_err(|_| protocol(format!("no greeting within {} ms", link.router_silence_ms_max)))?;
    let Some(ExecuteRequest { message: Some(Up::Hello(hello)) }) = first? else {
        return Err(protocol("the first message must be a hello".into()));
    };
    let RouterHello { router_id, stream, .. } = greeted(Some(hello))?;

    let id = LinkId(context.links.fetch_add(1, Ordering::Relaxed));
    let outbox = Outbox::new(link.outbox_bytes_max);
    let hello = Down::Hello(context.hello.clone());
    let answers = Answers::new(hello, outbox.clone(), ms(link.heartbeat_interval_ms));
    let attach = Command::Attach { link: id, router_id, stream, outbox: outbox.clone() };
    context.engine.commands.send(attach).await.map_err(|_| lost(ENGINE_GONE))?;
    let reader = Reader { context, id, router_id, outbox, last_dispatch: 0 };
    tokio::spawn(reader.read_to_end(inbound, permit));
    Ok(answers)
}

fn protocol(problem: String) -> Status {
    status(&Refusal::Protocol { problem })
}

/// The way up of one stream.
struct Reader {
    context: Arc<Context>,
    id: LinkId,
    router_id: u64,
    outbox: Arc<Outbox>,
    last_dispatch: u64,
}

impl Reader {
    /// Reads until the stream ends, by whomever; then its sequences are freed.
    async fn read_to_end(mut self, inbound: Streaming<ExecuteRequest>, permit: OwnedSemaphorePermit) {
        let read = AssertUnwindSafe(self.read(inbound)).catch_unwind().await;
        let end = read.unwrap_or_else(|_| Err(status(&Refusal::Internal)));
        let router = format_args!("{:016x}", self.router_id).to_string();
        match &end {
            Ok(()) => tracing::info!(router, "a router's stream ended"),
            Err(why) => tracing::warn!(router, why = why.message(), "a router's stream was ended"),
        }
        // Where the engine is gone, so are the sequences.
        let _ = self.context.engine.commands.send(Command::Detach { link: self.id }).await;
        self.outbox.end(end);
        drop(permit);
    }

    async fn read(&mut self, mut inbound: Streaming<ExecuteRequest>) -> Result<(), Status> {
        let silence_ms = self.context.settings.link.router_silence_ms_max;
        let outbox = self.outbox.clone();
        loop {
            let asked = Instant::now();
            let next = tokio::select! {
                next = timeout(ms(silence_ms), inbound.message()) => next,
                () = outbox.closed() => return Ok(()),
            };
            match next {
                Ok(Ok(Some(ExecuteRequest { message: Some(message) }))) => self.hear(message).await?,
                // A newer router's message that this version does not know.
                Ok(Ok(Some(ExecuteRequest { message: None }))) => {}
                Ok(Ok(None)) => return Ok(()),
                // The connection broke: there is nobody to be told.
                Ok(Err(broken)) => {
                    tracing::debug!(error = broken.message(), "a router's connection broke");
                    return Ok(());
                }
                // This process slept, and what the router said meanwhile is about to be read.
                Err(_) if asked.elapsed() > ms(silence_ms) + STALL => {}
                Err(_) => return Err(lost(format!("the router said nothing for {silence_ms} ms"))),
            }
        }
    }

    async fn hear(&mut self, message: Up) -> Result<(), Status> {
        let command = match message {
            Up::Heartbeat(Heartbeat {}) => return Ok(()),
            Up::Hello(_) => return Err(protocol("the router greeted twice".into())),
            Up::Cancel(Cancel { dispatch, indexes }) => Command::Cancel { link: self.id, dispatch, indexes },
            Up::Submit(submit) => self.submit(submit)?,
        };
        // While the engine is busy this waits, and the router with it: that is how its stream is slowed.
        self.context.engine.commands.send(command).await.map_err(|_| lost(ENGINE_GONE))
    }

    /// Checks a request; what is wrong with it is its own affair, the order of the dispatches is the stream's.
    fn submit(&mut self, submit: Submit) -> Result<Command, Status> {
        let dispatch = submit.dispatch;
        if dispatch != self.last_dispatch + 1 {
            let expected = self.last_dispatch + 1;
            return Err(protocol(format!("dispatch {dispatch} came where {expected} was due")));
        }
        self.last_dispatch = dispatch;
        let came = (self.context.engine.clock)();
        let checked = Submission::check(submit, self.context.epoch, &self.context.limits);
        let span = checked.as_ref().map_or_else(|_| Span::none(), span_of);
        let request = checked.map(|submission| Box::new(new_request(submission, came)));
        Ok(Command::Submit { link: self.id, dispatch, request, came, span })
    }
}

/// One span per request, below the router's.
fn span_of(submission: &Submission) -> Span {
    let span = tracing::info_span!(
        "worker.request",
        request_id = %Uuid::from_bytes(submission.request_id),
        attempt = submission.attempt,
        prompt_tokens = submission.prompt_ids.len(),
        sequences = submission.sequences.len(),
        cached_tokens = Empty,
        refusal = Empty,
    );
    if let Some(traceparent) = &submission.traceparent {
        petek_service::set_parent(&span, traceparent);
    }
    span
}

/// What the scheduler is given. What the router believed of the queue is heard and not acted on: a worker that sends
/// requests elsewhere comes later.
fn new_request(submission: Submission, came: Duration) -> NewRequest {
    let sequence = |sequence: SubmittedSequence| {
        let SubmittedSequence { index, seed, resumed_ids } = sequence;
        NewSequence { index, seed, resumed_ids }
    };
    NewRequest {
        prompt: submission.prompt_ids.into(),
        params: submission.params,
        max_tokens: submission.max_tokens,
        sequences: submission.sequences.into_iter().map(sequence).collect(),
        tenant: submission.tenant.into_bytes(),
        deadline: submission.deadline_ms.map(|left| came.saturating_add(Duration::from_millis(left))),
    }
}
