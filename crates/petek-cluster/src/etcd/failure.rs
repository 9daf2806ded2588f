//! What an error of etcd or its client means. etcd uses one gRPC code for several things (`OutOfRange` for a
//! compacted revision and for a message too large, `InvalidArgument` for a wrong password and for a value too large),
//! so its words count too.

use std::error::Error as _;

use etcd_client::Error;

use crate::registry::RegistryError;

// gRPC's codes by number: the client hands out statuses of tonic, which this crate does not use otherwise.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;
const UNIMPLEMENTED: i32 = 12;
const UNAUTHENTICATED: i32 = 16;

/// What a call to one endpoint failed of.
#[derive(Debug)]
pub(super) enum Failure {
    /// For the caller.
    Final(RegistryError),
    /// Our token is too old, or the server restarted and knows none: log in and do it again.
    TokenOld(String),
    /// The server has authentication turned off, so there is no logging in.
    AuthOff,
}

/// Reads an error of `endpoint`.
pub(super) fn classify(endpoint: &str, error: &Error) -> Failure {
    let why = words(error);
    let endpoint = endpoint.to_string();
    let away = |why| Failure::Final(RegistryError::Away { endpoint: endpoint.clone(), why });
    let denied = |why| Failure::Final(RegistryError::Denied { endpoint: endpoint.clone(), why });
    let unable = |why| Failure::Final(RegistryError::Unable { endpoint: endpoint.clone(), why });
    // A certificate that one side does not take comes as Unknown or Unavailable, depending on which side.
    if is_of_certificates(&why) {
        return denied(why);
    }
    match error {
        Error::GRpcStatus(status) => match status.code() as i32 {
            UNAUTHENTICATED => Failure::TokenOld(why),
            INVALID_ARGUMENT if is_auth_old(&why) => Failure::TokenOld(why),
            INVALID_ARGUMENT if is_login_wrong(&why) => denied(why),
            PERMISSION_DENIED => denied(why),
            FAILED_PRECONDITION if why.contains("authentication is not enabled") => Failure::AuthOff,
            NOT_FOUND if is_lease_gone(&why) => Failure::Final(RegistryError::LeaseLost),
            RESOURCE_EXHAUSTED if why.contains("larger than max") => unable(why),
            INVALID_ARGUMENT | NOT_FOUND | FAILED_PRECONDITION | OUT_OF_RANGE | UNIMPLEMENTED => unable(why),
            _ => away(why),
        },
        Error::LeaseKeepAliveError(_) if is_lease_gone(&why) => Failure::Final(RegistryError::LeaseLost),
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => unable(why),
        _ => away(why),
    }
}

/// Whether a list asked for a revision that is compacted away.
pub(super) fn is_compacted(why: &str) -> bool {
    why.contains("has been compacted")
}

/// Whether an answer was larger than the client takes.
pub(super) fn is_message_too_large(why: &str) -> bool {
    why.contains("message length too large")
}

fn is_auth_old(why: &str) -> bool {
    why.contains("revision of auth store is old")
}

/// Whether words of etcd say that who we are is not enough.
pub(super) fn is_login_wrong(why: &str) -> bool {
    ["authentication failed", "user name is empty", "permission denied"]
        .iter()
        .any(|words| why.contains(words))
}

fn is_lease_gone(why: &str) -> bool {
    why.contains("lease not found")
}

fn is_of_certificates(why: &str) -> bool {
    let alerts = ["BadCertificate", "CertificateRequired", "CertificateUnknown", "UnknownCA", "AccessDenied"];
    why.contains("invalid peer certificate") || alerts.iter().any(|alert| why.contains(alert))
}

/// The error with all its causes, but for "transport error", which says nothing.
pub(super) fn words(error: &Error) -> String {
    let (first, mut cause) = match error {
        Error::GRpcStatus(status) => (status.message().to_string(), status.source()),
        Error::TransportError(error) => (error.to_string(), error.source()),
        error => (error.to_string(), None),
    };
    let mut words = vec![first];
    while let Some(error) = cause {
        words.push(error.to_string());
        cause = error.source();
    }
    words.dedup();
    words.retain(|words| words != "transport error");
    words.join(": ")
}
