//! What is true of every public call before its message is looked at: how large it is, by when it must be answered,
//! and what the client calls it.
//!
//! The transport's own limit on a message answers without details, so the length in front of a message is read here
//! first. The whole message is taken in under the call's deadline: a client that sends half of one holds nothing for
//! longer.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use petek_core::limits::listener::MESSAGE_IN_BYTES_MAX;
use petek_core::refusal::{Refusal, quoted};
use petek_proto::refusal::{WireRefusal, status};
use petek_service::{Outcome, RouterMetrics, client_request_id};
use prost::bytes::{Bytes, BytesMut};
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

/// A gRPC frame: one byte of flags, four of length, the message.
const FRAME_HEAD_BYTES: usize = 5;

/// The header under which a client names its request and we answer with our own id.
pub(super) const REQUEST_ID_HEADER: &str = "x-request-id";

/// When a call came, and what its transport says of it. Stands in the extensions of each call.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    pub(super) at: Instant,
    /// Of the transport, or the default; a request may name an earlier one.
    pub(super) deadline: Instant,
    pub(super) client_request_id: Option<String>,
}

/// How long calls may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    pub(super) default: Duration,
    pub(super) max: Duration,
}

/// Which calls that end here are requests that ended.
#[derive(Clone)]
pub(super) enum Counts {
    /// Of calls that would have generated; what for is not known yet.
    Generations(Arc<RouterMetrics>),
    /// None: an operator's calls.
    Nothing,
}

impl Counts {
    /// Of a call that a status ended. What is not ours is the transport's: the client left before it had said all.
    fn ended(&self, path: &str, status: &Status, after: Duration) {
        const GENERATIONS: [&str; 4] = ["Generate", "StreamGenerate", "Chat", "StreamChat"];
        let method = path.rsplit('/').next().unwrap_or_default();
        match self {
            Counts::Generations(metrics) if GENERATIONS.contains(&method) => {
                let is_ours = WireRefusal::read(status).is_some();
                let outcome = if is_ours { Outcome::Refused } else { Outcome::Cancelled };
                metrics.model("").ended_at_the_door(outcome, after);
            }
            Counts::Generations(_) | Counts::Nothing => {}
        }
    }
}

/// A service behind the intake.
#[derive(Clone)]
pub(super) struct Intake<S> {
    inner: S,
    deadlines: Deadlines,
    counts: Counts,
}

impl<S> Intake<S> {
    pub(super) fn new(inner: S, deadlines: Deadlines, counts: Counts) -> Self {
        Intake { inner, deadlines, counts }
    }
}

impl<S: NamedService> NamedService for Intake<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Intake<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that is ready is taken; its clone waits for the next call.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let (deadlines, counts) = (self.deadlines, self.counts.clone());
        Box::pin(async move {
            let (path, began) = (request.uri().path().to_owned(), Instant::now());
            match take_in(request, deadlines).await {
                Ok(request) => inner.call(request).await,
                Err(refused) => {
                    counts.ended(&path, &refused, began.elapsed());
                    Ok(refused.into_http())
                }
            }
        })
    }
}

async fn take_in(request: Request<Body>, deadlines: Deadlines) -> Result<Request<Body>, Status> {
    let (mut head, body) = request.into_parts();
    let arrival = arrival(&head.headers, deadlines).map_err(|refusal| status(&refusal))?;
    let message = timeout_at(arrival.deadline, message(body)).await;
    let message = message.map_err(|_| status(&Refusal::DeadlineExceeded { output_tokens: 0 }))??;
    head.extensions.insert(arrival);
    Ok(Request::from_parts(head, Body::new(Full::new(message))))
}

fn arrival(headers: &HeaderMap, deadlines: Deadlines) -> Result<Arrival, Refusal> {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let asked = match text("grpc-timeout") {
        None => deadlines.default,
        Some(text) => {
            let problem = || format!("must be up to 8 digits and a unit of HMSmun, not {}", quoted(text));
            parse_timeout(text).ok_or_else(|| Refusal::invalid("grpc-timeout", problem()))?
        }
    };
    let client_request_id = match text(REQUEST_ID_HEADER) {
        None => None,
        Some(text) => {
            let problem = || format!("must be 1 to 64 of [A-Za-z0-9._-], not {}", quoted(text));
            let plain =
                client_request_id(text).ok_or_else(|| Refusal::invalid(REQUEST_ID_HEADER, problem()))?;
            Some(plain.to_owned())
        }
    };
    let at = Instant::now();
    // A little earlier than the client's own timer, and the transport's: else nobody would read what we answer.
    let asked = asked.min(deadlines.max);
    let deadline = at + asked.saturating_sub((asked / 32).min(Duration::from_millis(20)));
    Ok(Arrival { at, deadline, client_request_id })
}

/// *Source*: "PROTOCOL-HTTP2" of the gRPC project, Timeout.
fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(count * 3_600),
        'M' => Duration::from_secs(count * 60),
        'S' => Duration::from_secs(count),
        'm' => Duration::from_millis(count),
        'u' => Duration::from_micros(count),
        'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The frame of a call's one message, whole.
async fn message(mut body: Body) -> Result<Bytes, Status> {
    let mut frame = BytesMut::new();
    while let Some(part) = body.frame().await {
        let Ok(data) = part?.into_data() else { continue };
        // Beyond the one message nothing is taken: how much there is more is the codec's to say.
        frame.extend_from_slice(&data);
        let Some(head) = frame.first_chunk::<FRAME_HEAD_BYTES>() else { continue };
        let bytes = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if bytes > MESSAGE_IN_BYTES_MAX {
            let limit_bytes = MESSAGE_IN_BYTES_MAX as u64;
            return Err(status(&Refusal::MessageTooLarge { bytes: bytes as u64, limit_bytes }));
        }
        if frame.len() >= FRAME_HEAD_BYTES + bytes {
            break;
        }
    }
    Ok(frame.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_grpcs() {
        let check =
            |text: &str, expected: Option<Duration>| assert_eq!(parse_timeout(text), expected, "{text}");
        check("1H", Some(Duration::from_secs(3_600)));
        check("99999999M", Some(Duration::from_secs(99_999_999 * 60)));
        check("5S", Some(Duration::from_secs(5)));
        check("007m", Some(Duration::from_millis(7)));
        check("1u", Some(Duration::from_micros(1)));
        check("1n", Some(Duration::from_nanos(1)));
        for bad in ["", "S", "5", "5s", "-1S", "+1S", "1.5S", "123456789S", "1 S", "１S", "5é"] {
            check(bad, None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_is_the_clients_or_the_default_and_never_beyond_the_cap() {
        let deadlines = Deadlines { default: Duration::from_secs(600), max: Duration::from_secs(3_600) };
        let check = |header: Option<&str>, expected_ms: u64| {
            let headers = header.map(|text| ("grpc-timeout".parse().unwrap(), text.parse().unwrap()));
            let arrival = arrival(&headers.into_iter().collect(), deadlines).unwrap();
            assert_eq!((arrival.deadline - arrival.at).as_millis() as u64, expected_ms);
        };
        check(None, 600_000 - 20);
        check(Some("2H"), 3_600_000 - 20);
        check(Some("320m"), 310);
        check(Some("0S"), 0);
    }

    #[test]
    fn headers_that_are_none_are_refused_by_name() {
        let deadlines = Deadlines { default: Duration::ZERO, max: Duration::ZERO };
        for (name, text) in [("grpc-timeout", "soon"), ("x-request-id", "a b"), ("x-request-id", "")] {
            let headers = [(name.parse().unwrap(), text.parse().unwrap())].into_iter().collect();
            assert_eq!(arrival(&headers, deadlines).unwrap_err().field(), Some(name), "{text:?}");
        }
    }
}
