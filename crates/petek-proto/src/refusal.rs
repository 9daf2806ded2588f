//! Refusals on the wire: a gRPC status with google.rpc details.
//!
//! ```text
//!  Refusal ──▶ WireRefusal ──▶ tonic::Status          ends a call
//!                   ▲     └──▶ google.rpc.Status      inside a worker's Refused and Finished
//!                   └────────  either, read back
//! ```
//!
//! A router reads a worker's refusal as a [`WireRefusal`] and hands it on whole, also where a newer worker
//! states a reason that this version does not know.

use std::collections::BTreeMap;
use std::time::Duration;

use petek_core::limits::call::{ERROR_BYTES_MAX, QUOTE_CHARS_MAX};
use petek_core::refusal::{DOMAIN, Reason, Refusal};
use prost::Message;
use prost_types::Any;
use tonic::{Code, Status};
use tonic_types::{BadRequest, ErrorInfo, RetryInfo, RpcStatusExt, pb};

/// A refusal as it crosses the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireRefusal {
    /// gRPC's code.
    pub code: Code,
    /// What a person reads.
    pub message: String,
    /// What a program reads; one of [`Reason`], or of a newer version's.
    pub reason: String,
    /// The numbers and names that explain it.
    pub metadata: BTreeMap<String, String>,
    /// The field at fault, if one is.
    pub field: Option<WireField>,
    /// When trying the same again has a chance; 0 is at once, none is never.
    pub retry_ms: Option<u64>,
}

/// A field at fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireField {
    /// Its path, from the request message down.
    pub path: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Bytes of a message and of a field's problem: room for a sentence around a quotation.
const TEXT_BYTES_MAX: usize = QUOTE_CHARS_MAX * 4 + 512;
/// Bytes of a path.
const PATH_BYTES_MAX: usize = 256;
/// Bytes of one value of the metadata: a quotation, escaped.
const VALUE_BYTES_MAX: usize = QUOTE_CHARS_MAX * 4;
/// Entries of the metadata.
const VALUES_MAX: usize = 4;

// Keys of the metadata are ours and short; type URLs and tags take less than 64 bytes per entry and 256 in
// all.
const _: () = assert!(
    2 * TEXT_BYTES_MAX + PATH_BYTES_MAX + VALUES_MAX * (VALUE_BYTES_MAX + 64) + 256 <= ERROR_BYTES_MAX
);

impl WireRefusal {
    /// The reason, where this version knows it.
    pub fn known_reason(&self) -> Option<Reason> {
        Reason::parse(&self.reason)
    }

    /// One of the metadata's numbers.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.metadata.get(key)?.parse().ok()
    }

    /// Reads what a peer's call ended with. None: not a refusal of petek's, but the transport's or a
    /// stranger's.
    pub fn read(status: &Status) -> Option<WireRefusal> {
        if status.details().len() > ERROR_BYTES_MAX {
            return None;
        }
        // The details hold the whole google.rpc.Status once more.
        Self::read_rpc(&pb::Status::decode(status.details()).ok()?)
    }

    /// Reads what stands in a worker's message. None: not a refusal of petek's.
    pub fn read_rpc(status: &pb::Status) -> Option<WireRefusal> {
        if status.encoded_len() > ERROR_BYTES_MAX {
            return None;
        }
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
        let field = status.get_details_bad_request().and_then(|bad| bad.field_violations.into_iter().next());
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        Some(WireRefusal {
            code: Code::from_i32(status.code),
            message: status.message.clone(),
            reason: info.reason,
            metadata: info.metadata.into_iter().collect(),
            field: field.map(|field| WireField { path: field.field, problem: field.description }),
            retry_ms: retry.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
        })
    }
}

impl From<&Refusal> for WireRefusal {
    fn from(refusal: &Refusal) -> Self {
        let message = clipped(refusal.to_string(), TEXT_BYTES_MAX);
        let field = refusal.field().map(|path| WireField {
            path: clipped(path.to_owned(), PATH_BYTES_MAX),
            problem: match refusal {
                Refusal::InvalidField { problem, .. } => clipped(problem.clone(), TEXT_BYTES_MAX),
                _ => message.clone(),
            },
        });
        let metadata = (refusal.metadata().into_iter().take(VALUES_MAX))
            .map(|(key, value)| (key.to_owned(), clipped(value, VALUE_BYTES_MAX)))
            .collect();
        WireRefusal {
            // The core's codes carry gRPC's own numbers.
            code: Code::from_i32(refusal.reason().code() as i32),
            message,
            reason: refusal.reason().as_str().to_owned(),
            metadata,
            field,
            retry_ms: refusal.retry_ms(),
        }
    }
}

impl From<WireRefusal> for pb::Status {
    fn from(refusal: WireRefusal) -> Self {
        let info = pb::ErrorInfo {
            reason: refusal.reason,
            domain: DOMAIN.to_owned(),
            metadata: refusal.metadata.into_iter().collect(),
        };
        let mut details = vec![any(ErrorInfo::TYPE_URL, &info)];
        if let Some(WireField { path: field, problem: description }) = refusal.field {
            let violation = pb::bad_request::FieldViolation { field, description, ..Default::default() };
            details.push(any(BadRequest::TYPE_URL, &pb::BadRequest { field_violations: vec![violation] }));
        }
        if let Some(retry_ms) = refusal.retry_ms {
            // Years beyond what the message can say are said as its most.
            let delay = Duration::from_millis(retry_ms).min(RetryInfo::MAX_RETRY_DELAY);
            let retry_delay = prost_types::Duration::try_from(delay).ok();
            details.push(any(RetryInfo::TYPE_URL, &pb::RetryInfo { retry_delay }));
        }
        pb::Status { code: refusal.code as i32, message: refusal.message, details }
    }
}

impl From<WireRefusal> for Status {
    fn from(refusal: WireRefusal) -> Self {
        let code = refusal.code;
        let status = pb::Status::from(refusal);
        let details = status.encode_to_vec().into();
        Status::with_details(code, status.message, details)
    }
}

/// What a call ends with that was refused.
pub fn status(refusal: &Refusal) -> Status {
    WireRefusal::from(refusal).into()
}

/// The same inside a message.
pub fn rpc_status(refusal: &Refusal) -> pb::Status {
    WireRefusal::from(refusal).into()
}

fn any(type_url: &str, message: &impl Message) -> Any {
    Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

/// At most `bytes` of `text`, whole characters, with a sign of what was cut.
fn clipped(mut text: String, bytes: usize) -> String {
    const CUT: &str = "...";
    if text.len() > bytes {
        text.truncate(text.floor_char_boundary(bytes - CUT.len()));
        text.push_str(CUT);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use tonic_types::StatusExt;

    use super::*;

    fn one_of_each() -> Vec<Refusal> {
        let retry_ms = NonZeroU64::new(250).unwrap();
        vec![
            Refusal::invalid("spec.params.stop[3]", "must not be empty"),
            Refusal::unsupported("spec.params.logit_bias"),
            Refusal::ContextLengthExceeded { prompt_tokens: 9_000, context_tokens: 8_192 },
            Refusal::PoolExceeded { needed_blocks: 40, pool_blocks: 32 },
            Refusal::MessageTooLarge { bytes: 10_000_000, limit_bytes: 8 << 20 },
            Refusal::UnknownModel { model: "lama".into(), served: "demo".into() },
            Refusal::QueueFull { waiting: 1_024, retry_ms },
            Refusal::MemoryLimit { used_bytes: 9, limit_bytes: 10, retry_ms },
            Refusal::DeadlineUnreachable { deadline_ms: 10, estimate_ms: 900 },
            Refusal::DeadlineExceeded { output_tokens: 7 },
            Refusal::Cancelled,
            Refusal::SlowConsumer { waiting_bytes: 262_144, waited_ms: 30_000 },
            Refusal::NoTokenAllowed { position: 3 },
            Refusal::GrammarLimit { limit: "depth 64".into() },
            Refusal::NumericalError { position: 3 },
            Refusal::PoisonRequest { strikes: 2 },
            Refusal::WorkerLost { output_tokens: 12 },
            Refusal::Draining { retry_ms },
            Refusal::NoWorker { model: "demo".into(), retry_ms },
            Refusal::StaleEpoch { named: 1, current: 2 },
            Refusal::PeerMismatch { what: "block size", ours: "32".into(), theirs: "16".into() },
            Refusal::Protocol { problem: "dispatch 4 twice".into() },
            Refusal::Unauthenticated,
            Refusal::PermissionDenied,
            Refusal::Internal,
        ]
    }

    /// What a client written with any gRPC library sees: the standard details, by tonic-types' own reader.
    #[test]
    fn every_refusal_has_the_standard_details() {
        let all = one_of_each();
        assert_eq!(all.iter().map(Refusal::reason).collect::<Vec<_>>(), Reason::ALL);
        for refusal in &all {
            let status = status(refusal);
            assert_eq!(status.code() as i32, refusal.reason().code() as i32);
            assert_eq!(status.message(), refusal.to_string());
            let info = status.get_details_error_info().expect("always there");
            assert_eq!((&info.reason[..], &info.domain[..]), (refusal.reason().as_str(), "petek"));
            let expected: Vec<_> = refusal.metadata();
            assert_eq!(info.metadata.len(), expected.len());
            assert!(expected.iter().all(|(key, value)| info.metadata.get(*key) == Some(value)));
            let fields: Vec<_> = (status.get_details_bad_request().into_iter())
                .flat_map(|bad| bad.field_violations)
                .map(|violation| violation.field)
                .collect();
            assert_eq!(fields, Vec::from_iter(refusal.field()));
            let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
            assert_eq!(retry, refusal.retry_ms().map(Duration::from_millis));
        }
    }

    #[test]
    fn a_router_reads_a_workers_refusal_and_hands_it_on_whole() {
        for refusal in one_of_each() {
            let said = WireRefusal::from(&refusal);
            let read = WireRefusal::read(&status(&refusal)).expect("ours");
            assert_eq!(read, said);
            assert_eq!(WireRefusal::read_rpc(&rpc_status(&refusal)).as_ref(), Some(&said));
            assert_eq!(WireRefusal::read(&Status::from(read)).as_ref(), Some(&said));
            assert_eq!(said.known_reason(), Some(refusal.reason()));
        }
        let full = WireRefusal::from(&one_of_each()[6]);
        assert_eq!(
            (full.number("waiting"), full.number("model"), full.retry_ms),
            (Some(1_024), None, Some(250))
        );
    }

    #[test]
    fn a_newer_reason_passes_and_a_strangers_status_is_none() {
        let newer = WireRefusal { reason: "ADAPTER_EVICTED".into(), ..WireRefusal::from(&Refusal::Internal) };
        let read = WireRefusal::read(&newer.clone().into()).expect("ours");
        assert_eq!((read.known_reason(), &read), (None, &newer));

        assert_eq!(WireRefusal::read(&Status::unavailable("connection reset")), None);
        let garbage = Status::with_details(Code::Internal, "x", vec![0xff; 20].into());
        assert_eq!(WireRefusal::read(&garbage), None);
        let mut foreign = rpc_status(&Refusal::Internal);
        let info =
            pb::ErrorInfo { reason: "INTERNAL".into(), domain: "elsewhere".into(), ..Default::default() };
        foreign.details = vec![any(ErrorInfo::TYPE_URL, &info)];
        assert_eq!(WireRefusal::read_rpc(&foreign), None);
    }

    #[test]
    fn details_have_a_bound_in_both_directions() {
        let long = || "é".repeat(10_000);
        for refusal in [
            Refusal::invalid(long(), long()),
            Refusal::PeerMismatch { what: "revision", ours: long(), theirs: long() },
            Refusal::GrammarLimit { limit: long() },
            Refusal::Protocol { problem: long() },
        ] {
            let status = status(&refusal);
            assert!(status.details().len() <= ERROR_BYTES_MAX, "{}", status.details().len());
            let read = WireRefusal::read(&status).expect("within the bound");
            assert!(read.message.ends_with("é..."), "{}", read.message);
        }
        let mut huge = rpc_status(&Refusal::Internal);
        huge.message = "x".repeat(ERROR_BYTES_MAX);
        assert_eq!(WireRefusal::read_rpc(&huge), None);
        let huge = Status::with_details(Code::Internal, "x", huge.encode_to_vec().into());
        assert_eq!(WireRefusal::read(&huge), None);
    }
}
