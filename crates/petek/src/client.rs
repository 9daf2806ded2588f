//! The way to a router: where it is, one connection, one call at a time, and what its errors are to a person.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use petek_core::limits::listener::{KEEPALIVE_INTERVAL_S, KEEPALIVE_TIMEOUT_S, MESSAGE_OUT_BYTES_MAX};
use petek_core::refusal::Reason;
use petek_proto::admin::v1::admin_service_client::AdminServiceClient;
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::refusal::WireRefusal;
use petek_service::{Exit, Failure};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Uri};
use tonic::{Code, Response, Status};

use crate::ports;
use crate::request::flag_of_field;

/// Where a router's public services are.
#[derive(Args, Clone, Debug)]
pub(crate) struct PublicEndpoint {
    /// The router to ask
    #[arg(long, value_name = "URL", env = "PETEK_ENDPOINT", default_value_t = Endpoint::local(ports::PUBLIC))]
    pub(crate) endpoint: Endpoint,
}

/// Where a router's admin services are.
#[derive(Args, Clone, Debug)]
pub(crate) struct AdminEndpoint {
    /// The router's admin address
    #[arg(long, value_name = "URL", env = "PETEK_ADMIN", default_value_t = Endpoint::local(ports::ADMIN))]
    pub(crate) admin: Endpoint,
}

/// A checked address: `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint(Uri);

impl Endpoint {
    fn local(port: u16) -> Self {
        Self(format!("http://127.0.0.1:{port}").parse().expect("an address of this form"))
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = if text.contains("://") { text } else { &format!("http://{text}") };
        let uri = text.parse::<Uri>().map_err(|error| format!("{error}: http://host:port is needed"))?;
        match (uri.scheme_str(), uri.port(), uri.path(), uri.query()) {
            (Some("http"), Some(_), "/", None) => Ok(Self(uri)),
            (Some("https"), ..) => Err("this version of petek speaks http:// only".to_owned()),
            _ => Err("http://host:port is needed".to_owned()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

/// A connection to a router, for a command that does one thing after the other.
pub(crate) struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// Connects, and takes Ctrl-C over: it ends the process with code 130 at once, whatever is being read or
    /// written, and with the connection goes every request on it.
    ///
    /// # Errors
    /// [`Exit::Environment`] where nobody answers.
    pub(crate) fn connect(endpoint: &Endpoint) -> Result<Self, Failure> {
        let environment = |what: String, hint: &str| Failure::new(Exit::Environment, what, hint);
        // The calling thread waits for the router, for standard input and for whoever reads our output; the one
        // worker keeps the connection alive meanwhile and hears Ctrl-C.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| environment(format!("start a thread: {error}"), ""))?;
        runtime.spawn(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        });
        let to = Channel::builder(endpoint.0.clone())
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(KEEPALIVE_INTERVAL_S))
            .keep_alive_timeout(Duration::from_secs(KEEPALIVE_TIMEOUT_S));
        let channel = runtime.block_on(to.connect()).map_err(|error| {
            let hint = "start one with `petek up`, or say where one is with --endpoint or --admin";
            environment(format!("no router answers at {endpoint}: {}", root_cause(&error)), hint)
        })?;
        Ok(Self { runtime, channel })
    }

    /// The public services.
    pub(crate) fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_OUT_BYTES_MAX)
    }

    /// The admin services.
    pub(crate) fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_OUT_BYTES_MAX)
    }

    /// Waits for `work`.
    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Waits for the answer to a call.
    pub(crate) fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        self.wait(call).map(Response::into_inner).map_err(|status| Refused::from(status).failure(None))
    }
}

/// Why a call ended without (further) answer.
#[derive(Debug)]
pub(crate) struct Refused {
    /// gRPC's code.
    pub(crate) code: Code,
    /// petek's own words; none where the connection broke or a stranger answered.
    pub(crate) refusal: Option<WireRefusal>,
    message: String,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        let refusal = WireRefusal::read(&status);
        // Of a broken connection the last cause says most.
        let message = match status.source() {
            Some(source) => format!("{}: {}", status.message(), root_cause(source)),
            None => status.message().to_owned(),
        };
        Self { code: status.code(), refusal, message }
    }
}

impl Refused {
    /// A stream that simply stopped.
    pub(crate) fn cut() -> Self {
        let message = "the stream ended in the middle of the answer".to_owned();
        Self { code: Code::Unavailable, refusal: None, message }
    }

    /// What was wrong.
    pub(crate) fn message(&self) -> &str {
        self.refusal.as_ref().map_or(&self.message, |refusal| &refusal.message)
    }

    /// gRPC's code as its manual spells it.
    pub(crate) fn code_name(&self) -> String {
        let mut name = String::new();
        for char in format!("{:?}", self.code).chars() {
            if char.is_ascii_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(char.to_ascii_uppercase());
        }
        name
    }

    /// What a person reads: what, why (by name), the field, and what to do; `hint` beats the hints from here.
    pub(crate) fn failure(&self, hint: Option<String>) -> Failure {
        let (why, own_hint) = match &self.refusal {
            None => (self.code_name(), String::new()),
            Some(refusal) => {
                let field = refusal.field.as_ref().map(|field| format!(", {}", field.path));
                (refusal.reason.clone() + &field.unwrap_or_default(), hint_of(refusal))
            }
        };
        Failure::new(Exit::Remote, format!("{} ({why})", self.message()), hint.unwrap_or(own_hint))
    }
}

fn hint_of(refusal: &WireRefusal) -> String {
    let flag = || flag_of_field(&refusal.field.as_ref()?.path);
    match (refusal.known_reason(), refusal.retry_ms) {
        (Some(Reason::UnknownModel), _) => "`petek models` lists the models".to_owned(),
        (Some(Reason::DeadlineUnreachable | Reason::DeadlineExceeded), _) => {
            "allow more with --deadline-ms".to_owned()
        }
        (_, Some(0)) => "the same again may work at once".to_owned(),
        (_, Some(ms)) => format!("the same again may work in {ms} ms"),
        (_, None) => flag().map(|flag| format!("see {flag}")).unwrap_or_default(),
    }
}

fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for good in ["http://127.0.0.1:7411", "127.0.0.1:7411", "http://router.example:80/", "[::1]:7411"] {
            let endpoint: Endpoint = good.parse().unwrap();
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint), "{good}");
        }
        assert_eq!(Endpoint::local(7411).to_string(), "http://127.0.0.1:7411");
        for bad in ["", "localhost", "http://", "http://host", "ftp://host:1", "http://host:1/path", "a b:1"]
        {
            assert!(bad.parse::<Endpoint>().unwrap_err().contains("http://host:port is needed"), "{bad}");
        }
        assert!("https://host:443".parse::<Endpoint>().unwrap_err().contains("http:// only"));
    }

    #[test]
    fn codes_are_spelt_as_in_grpc() {
        let name = |code| Refused { code, refusal: None, message: String::new() }.code_name();
        assert_eq!(name(Code::Unavailable), "UNAVAILABLE");
        assert_eq!(name(Code::DeadlineExceeded), "DEADLINE_EXCEEDED");
    }
}
