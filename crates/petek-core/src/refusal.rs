//! Why a request got no (further) answer: one typed enum, and one table that says what each reason is to a gRPC
//! client, an HTTP client and a program that reads reasons.
//!
//! A [`Refusal`] is an end that the client can act on, or at least tell apart. Workers make most of them; they cross
//! the wire as `google.rpc.Status` with an ErrorInfo, and a router that gets one from a worker knows it again by its
//! [`Reason`].

use std::fmt;
use std::num::NonZeroU64;

use crate::limits;

/// The `domain` of every ErrorInfo.
pub const DOMAIN: &str = "petek";

/// A request's end without (further) answer, with the numbers that explain it. Its text is what the client reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A field's value cannot be.
    #[error("{field}: {problem}")]
    InvalidField {
        /// Path, as in `stop[3]`.
        field: String,
        /// What it must be and what it is.
        problem: String,
    },
    /// A known parameter that this version does not have.
    #[error("{field}: not supported by this version of petek; leave it out")]
    UnsupportedParameter {
        /// Path.
        field: String,
    },
    /// Prompt and output do not fit the model's context.
    #[error(
        "the prompt has {prompt_tokens} tokens and the context holds {context_tokens}: at most {} leave room for an \
         answer", context_tokens.saturating_sub(1)
    )]
    ContextLengthExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// What the model is served with.
        context_tokens: u64,
    },
    /// A sequence that would not fit the whole pool.
    #[error(
        "one sequence needs {needed_blocks} blocks of the KV cache and the worker has {pool_blocks}: ask for fewer \
         tokens"
    )]
    PoolExceeded {
        /// Blocks of prompt and max_tokens.
        needed_blocks: u64,
        /// Blocks of the pool.
        pool_blocks: u64,
    },
    /// The message is larger than the limit.
    #[error("the message has {bytes} bytes; the limit is {limit_bytes}")]
    MessageTooLarge {
        /// Its size, as announced.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Nobody serves this name.
    #[error("no model is called {}; served here: {served}", quoted(model))]
    UnknownModel {
        /// As asked.
        model: String,
        /// Names, comma separated.
        served: String,
    },
    /// As many requests wait as may.
    #[error("{waiting} requests wait, as many as the queue holds; try again")]
    QueueFull {
        /// Requests that wait.
        waiting: u64,
        /// When trying again has a chance.
        retry_ms: NonZeroU64,
    },
    /// Too little memory is left to buffer another request.
    #[error("{used_bytes} of {limit_bytes} bytes of memory are in use; try again")]
    MemoryLimit {
        /// In use.
        used_bytes: u64,
        /// The process's limit.
        limit_bytes: u64,
        /// When trying again has a chance.
        retry_ms: NonZeroU64,
    },
    /// The deadline would pass before the first token.
    #[error("the answer would begin after about {estimate_ms} ms and the deadline is in {deadline_ms} ms")]
    DeadlineUnreachable {
        /// What is left.
        deadline_ms: u64,
        /// Expected wait until the first token.
        estimate_ms: u64,
    },
    /// The deadline passed.
    #[error("the deadline passed after {output_tokens} tokens")]
    DeadlineExceeded {
        /// Computed until then.
        output_tokens: u64,
    },
    /// The client left.
    #[error("cancelled by the client")]
    Cancelled,
    /// The client read too slowly.
    #[error("{waiting_bytes} bytes waited {waited_ms} ms for the client to read them")]
    SlowConsumer {
        /// Unread.
        waiting_bytes: u64,
        /// For how long.
        waited_ms: u64,
    },
    /// Masks left nothing to draw.
    #[error("at output position {position} every token is excluded by the request's own masks")]
    NoTokenAllowed {
        /// Output position.
        position: u64,
    },
    /// The grammar could not be followed within its limits.
    #[error("the grammar passed its limit: {limit}")]
    GrammarLimit {
        /// Which.
        limit: String,
    },
    /// The logits were not finite.
    #[error("the model's logits at output position {position} hold a NaN or an infinity")]
    NumericalError {
        /// Output position.
        position: u64,
    },
    /// The request brought down the workers that held it.
    #[error("the request was stopped after {strikes} workers died of it")]
    PoisonRequest {
        /// Workers.
        strikes: u64,
    },
    /// The worker died and nobody took over.
    #[error(
        "the worker was lost after {output_tokens} tokens; send the request again with them as resumed_ids"
    )]
    WorkerLost {
        /// Tokens that the client has, and may send as `resumed_ids`.
        output_tokens: u64,
    },
    /// The process goes away.
    #[error("the server is draining; try again, another one takes over")]
    Draining {
        /// When trying again has a chance.
        retry_ms: NonZeroU64,
    },
    /// The model is known, but no worker serves it now.
    #[error("no worker serves {} now; try again", quoted(model))]
    NoWorker {
        /// As asked.
        model: String,
        /// When trying again has a chance.
        retry_ms: NonZeroU64,
    },
    /// Sent to an engine that has been restarted since.
    #[error("the message names epoch {named} and the engine's is {current}")]
    StaleEpoch {
        /// By the message.
        named: u64,
        /// The engine's.
        current: u64,
    },
    /// Two processes of versions too far apart, or of another model's files.
    #[error("{what}: ours is {ours}, the peer's {theirs}")]
    PeerMismatch {
        /// Which property.
        what: &'static str,
        /// Ours.
        ours: String,
        /// Theirs.
        theirs: String,
    },
    /// A peer broke the protocol.
    #[error("protocol: {problem}")]
    Protocol {
        /// How.
        problem: String,
    },
    /// No credentials, or wrong ones.
    #[error("valid credentials are required")]
    Unauthenticated,
    /// Valid credentials without this right.
    #[error("these credentials do not allow this call")]
    PermissionDenied,
    /// A fault of ours. Details are in the log beside the request's id, not here.
    #[error("internal error; the server's log has the details under the request's id")]
    Internal,
}

impl Refusal {
    /// A value that cannot be.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Refusal::InvalidField { field: field.into(), problem: problem.into() }
    }

    /// A parameter that this version does not have.
    pub fn unsupported(field: impl Into<String>) -> Self {
        Refusal::UnsupportedParameter { field: field.into() }
    }

    /// The same refusal with its field's path below `parent`: the checks do not know where in a message they are.
    pub fn within(mut self, parent: &str) -> Self {
        if let Refusal::InvalidField { field, .. } | Refusal::UnsupportedParameter { field } = &mut self {
            *field = format!("{parent}.{field}");
        }
        self
    }

    /// Which row of the table.
    pub fn reason(&self) -> Reason {
        match self {
            Refusal::InvalidField { .. } => Reason::InvalidField,
            Refusal::UnsupportedParameter { .. } => Reason::UnsupportedParameter,
            Refusal::ContextLengthExceeded { .. } => Reason::ContextLengthExceeded,
            Refusal::PoolExceeded { .. } => Reason::PoolExceeded,
            Refusal::MessageTooLarge { .. } => Reason::MessageTooLarge,
            Refusal::UnknownModel { .. } => Reason::UnknownModel,
            Refusal::QueueFull { .. } => Reason::QueueFull,
            Refusal::MemoryLimit { .. } => Reason::MemoryLimit,
            Refusal::DeadlineUnreachable { .. } => Reason::DeadlineUnreachable,
            Refusal::DeadlineExceeded { .. } => Reason::DeadlineExceeded,
            Refusal::Cancelled => Reason::Cancelled,
            Refusal::SlowConsumer { .. } => Reason::SlowConsumer,
            Refusal::NoTokenAllowed { .. } => Reason::NoTokenAllowed,
            Refusal::GrammarLimit { .. } => Reason::GrammarLimit,
            Refusal::NumericalError { .. } => Reason::NumericalError,
            Refusal::PoisonRequest { .. } => Reason::PoisonRequest,
            Refusal::WorkerLost { .. } => Reason::WorkerLost,
            Refusal::Draining { .. } => Reason::Draining,
            Refusal::NoWorker { .. } => Reason::NoWorker,
            Refusal::StaleEpoch { .. } => Reason::StaleEpoch,
            Refusal::PeerMismatch { .. } => Reason::PeerMismatch,
            Refusal::Protocol { .. } => Reason::Protocol,
            Refusal::Unauthenticated => Reason::Unauthenticated,
            Refusal::PermissionDenied => Reason::PermissionDenied,
            Refusal::Internal => Reason::Internal,
        }
    }

    /// The path of the field that is wrong, for a BadRequest.
    pub fn field(&self) -> Option<&str> {
        match self {
            Refusal::InvalidField { field, .. } | Refusal::UnsupportedParameter { field } => Some(field),
            Refusal::ContextLengthExceeded { .. } => Some("prompt"),
            Refusal::PoolExceeded { .. } => Some("max_tokens"),
            Refusal::UnknownModel { .. } => Some("model"),
            _ => None,
        }
    }

    /// When trying the same again has a chance, for a RetryInfo: 0 is at once, none is never.
    pub fn retry_ms(&self) -> Option<u64> {
        match self {
            Refusal::QueueFull { retry_ms, .. }
            | Refusal::MemoryLimit { retry_ms, .. }
            | Refusal::Draining { retry_ms }
            | Refusal::NoWorker { retry_ms, .. } => Some(retry_ms.get()),
            Refusal::WorkerLost { .. } => Some(0),
            _ => None,
        }
    }

    /// The numbers and names, for an ErrorInfo's metadata.
    pub fn metadata(&self) -> Vec<(&'static str, String)> {
        fn numbers<const N: usize>(list: [(&'static str, u64); N]) -> Vec<(&'static str, String)> {
            list.map(|(key, value)| (key, value.to_string())).into()
        }
        match self {
            Refusal::InvalidField { field, .. } | Refusal::UnsupportedParameter { field } => {
                vec![("field", quoted(field))]
            }
            &Refusal::ContextLengthExceeded { prompt_tokens, context_tokens } => {
                numbers([("prompt_tokens", prompt_tokens), ("context_tokens", context_tokens)])
            }
            &Refusal::PoolExceeded { needed_blocks, pool_blocks } => {
                numbers([("needed_blocks", needed_blocks), ("pool_blocks", pool_blocks)])
            }
            &Refusal::MessageTooLarge { bytes, limit_bytes } => {
                numbers([("bytes", bytes), ("limit_bytes", limit_bytes)])
            }
            Refusal::UnknownModel { model, .. } | Refusal::NoWorker { model, .. } => {
                vec![("model", quoted(model))]
            }
            &Refusal::QueueFull { waiting, .. } => numbers([("waiting", waiting)]),
            &Refusal::MemoryLimit { used_bytes, limit_bytes, .. } => {
                numbers([("used_bytes", used_bytes), ("limit_bytes", limit_bytes)])
            }
            &Refusal::DeadlineUnreachable { deadline_ms, estimate_ms } => {
                numbers([("deadline_ms", deadline_ms), ("estimate_ms", estimate_ms)])
            }
            &Refusal::DeadlineExceeded { output_tokens } | &Refusal::WorkerLost { output_tokens } => {
                numbers([("output_tokens", output_tokens)])
            }
            &Refusal::SlowConsumer { waiting_bytes, waited_ms } => {
                numbers([("waiting_bytes", waiting_bytes), ("waited_ms", waited_ms)])
            }
            &Refusal::NoTokenAllowed { position } | &Refusal::NumericalError { position } => {
                numbers([("position", position)])
            }
            Refusal::GrammarLimit { limit } => vec![("limit", limit.clone())],
            &Refusal::PoisonRequest { strikes } => numbers([("strikes", strikes)]),
            &Refusal::StaleEpoch { named, current } => numbers([("named", named), ("current", current)]),
            Refusal::PeerMismatch { what, ours, theirs } => {
                vec![("what", (*what).to_owned()), ("ours", ours.clone()), ("theirs", theirs.clone())]
            }
            Refusal::Protocol { .. }
            | Refusal::Draining { .. }
            | Refusal::Cancelled
            | Refusal::Unauthenticated
            | Refusal::PermissionDenied
            | Refusal::Internal => Vec::new(),
        }
    }
}

/// gRPC's status codes, those that we use, by their numbers on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // gRPC's own words.
pub enum Code {
    Cancelled = 1,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

macro_rules! table {
    ($($reason:ident $text:literal $code:ident $http:literal)*) => {
        /// Names a kind of refusal, for programs: the `reason` of an ErrorInfo and the `code` of OpenAI's errors.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)] // Each is the Refusal of the same name.
        pub enum Reason {
            $($reason),*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &[Reason] = &[$(Reason::$reason),*];

            /// As it stands on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$reason => $text),* }
            }

            /// What a gRPC client gets.
            pub fn code(self) -> Code {
                match self { $(Reason::$reason => Code::$code),* }
            }

            /// What an HTTP client gets.
            pub fn http_status(self) -> u16 {
                match self { $(Reason::$reason => $http),* }
            }
        }
    };
}

table! {
    InvalidField          "INVALID_FIELD"           InvalidArgument    400
    UnsupportedParameter  "UNSUPPORTED_PARAMETER"   InvalidArgument    400
    ContextLengthExceeded "CONTEXT_LENGTH_EXCEEDED" InvalidArgument    400
    PoolExceeded          "POOL_EXCEEDED"           InvalidArgument    400
    MessageTooLarge       "MESSAGE_TOO_LARGE"       ResourceExhausted  413
    UnknownModel          "UNKNOWN_MODEL"           NotFound           404
    QueueFull             "QUEUE_FULL"              ResourceExhausted  429
    MemoryLimit           "MEMORY_LIMIT"            ResourceExhausted  429
    DeadlineUnreachable   "DEADLINE_UNREACHABLE"    DeadlineExceeded   504
    DeadlineExceeded      "DEADLINE_EXCEEDED"       DeadlineExceeded   504
    Cancelled             "CANCELLED"               Cancelled          499
    SlowConsumer          "SLOW_CONSUMER"           ResourceExhausted  408
    NoTokenAllowed        "NO_TOKEN_ALLOWED"        InvalidArgument    400
    GrammarLimit          "GRAMMAR_LIMIT"           InvalidArgument    400
    NumericalError        "NUMERICAL_ERROR"         Internal           500
    PoisonRequest         "POISON_REQUEST"          FailedPrecondition 422
    WorkerLost            "WORKER_LOST"             Unavailable        503
    Draining              "DRAINING"                Unavailable        503
    NoWorker              "NO_WORKER"               Unavailable        503
    StaleEpoch            "STALE_EPOCH"             FailedPrecondition 503
    PeerMismatch          "PEER_MISMATCH"           FailedPrecondition 503
    Protocol              "PROTOCOL"                FailedPrecondition 500
    Unauthenticated       "UNAUTHENTICATED"         Unauthenticated    401
    PermissionDenied      "PERMISSION_DENIED"       PermissionDenied   403
    Internal              "INTERNAL"                Internal           500
}

impl Reason {
    /// The reason that stands on the wire as `text`; none where a newer peer knows more reasons than we do.
    pub fn parse(text: &str) -> Option<Reason> {
        Reason::ALL.iter().copied().find(|reason| reason.as_str() == text)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The client's own text for a message: in quotes, escaped, and no longer than a refusal may quote.
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(limits::call::QUOTE_CHARS_MAX) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<Refusal> {
        let retry_ms = NonZeroU64::new(250).unwrap();
        let text = || "x".repeat(1_000);
        vec![
            Refusal::invalid("stop[3]", "must not be empty"),
            Refusal::unsupported("logit_bias"),
            Refusal::ContextLengthExceeded { prompt_tokens: 9_000, context_tokens: 8_192 },
            Refusal::PoolExceeded { needed_blocks: 40, pool_blocks: 32 },
            Refusal::MessageTooLarge { bytes: 10_000_000, limit_bytes: 8 << 20 },
            Refusal::UnknownModel { model: text(), served: "demo".into() },
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
            Refusal::NoWorker { model: text(), retry_ms },
            Refusal::StaleEpoch { named: 1, current: 2 },
            Refusal::PeerMismatch { what: "block size", ours: "32".into(), theirs: "16".into() },
            Refusal::Protocol { problem: "dispatch 4 twice".into() },
            Refusal::Unauthenticated,
            Refusal::PermissionDenied,
            Refusal::Internal,
        ]
    }

    #[test]
    fn every_refusal_has_its_row_and_its_numbers_in_the_metadata() {
        let all = one_of_each();
        assert_eq!(all.iter().map(Refusal::reason).collect::<Vec<_>>(), Reason::ALL);
        for refusal in all {
            let message = refusal.to_string();
            assert!(message.len() < 320, "{message}");
            for (key, value) in refusal.metadata() {
                assert!(!value.is_empty() && value.len() < 200, "{key} of {refusal:?}");
                let said = message.contains(&value) || key == "field" || key == "model";
                assert!(said, "{key} = {value} does not stand in: {message}");
            }
        }
    }

    #[test]
    fn reasons_are_read_back_and_never_shared() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
            assert!(reason.as_str().bytes().all(|b| b.is_ascii_uppercase() || b == b'_'));
        }
        assert_eq!(Reason::parse("SOMETHING_NEWER"), None);
    }

    #[test]
    fn retry_is_hinted_where_it_can_help() {
        for refusal in one_of_each() {
            let can_help = matches!(refusal.reason().code(), Code::Unavailable)
                || matches!(refusal.reason(), Reason::QueueFull | Reason::MemoryLimit);
            assert_eq!(refusal.retry_ms().is_some(), can_help, "{refusal:?}");
        }
    }

    #[test]
    fn a_path_moves_below_its_parent_and_quotes_are_short() {
        assert_eq!(Refusal::invalid("stop[3]", "x").within("spec").field(), Some("spec.stop[3]"));
        assert_eq!(
            Refusal::unsupported("echo").within("spec").to_string().split(':').next(),
            Some("spec.echo")
        );
        assert_eq!(Refusal::Cancelled.within("spec"), Refusal::Cancelled);
        assert_eq!(quoted("a\"\n\u{1b}"), r#""a\"\n\u{1b}""#);
        assert_eq!(quoted(&"é".repeat(65)), format!("\"{}\"...", "é".repeat(64)));
    }
}
