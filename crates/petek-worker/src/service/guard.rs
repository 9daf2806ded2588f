//! Who may speak: every call but those for health carries the cluster's token.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures::future::Either;
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use petek_core::refusal::Refusal;
use petek_proto::hello::CLUSTER_TOKEN_KEY;
use petek_proto::refusal::status;
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Routes;
use tower::Service;

/// What is open to everyone.
const OPEN_PREFIX: &str = "/grpc.health.v1.Health/";

/// The cluster's token, or none where the cluster has none. Never shown.
#[derive(Clone)]
pub(crate) struct ClusterToken(Option<(blake3::Hash, MetadataValue<Ascii>)>);

impl ClusterToken {
    /// None where the text cannot stand in a header.
    pub(crate) fn new(token: Option<&str>) -> Option<Self> {
        let Some(token) = token else { return Some(ClusterToken(None)) };
        let mut value: MetadataValue<Ascii> = token.parse().ok().filter(|_| !token.is_empty())?;
        value.set_sensitive(true);
        Some(ClusterToken(Some((blake3::hash(token.as_bytes()), value))))
    }

    /// What our own calls to other workers carry.
    pub(crate) fn value(&self) -> Option<&MetadataValue<Ascii>> {
        self.0.as_ref().map(|(_, value)| value)
    }

    fn allows(&self, headers: &HeaderMap) -> bool {
        let Some((expected, _)) = &self.0 else { return true };
        let mut values = headers.get_all(CLUSTER_TOKEN_KEY).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return false };
        // Equality of these hashes takes constant time, and tells nothing of the length either.
        *expected == blake3::hash(value.as_bytes())
    }
}

/// The services of a worker behind its token.
#[derive(Clone)]
pub(super) struct Guard {
    routes: Routes,
    token: ClusterToken,
}

impl Guard {
    pub(super) fn new(routes: Routes, token: ClusterToken) -> Self {
        Guard { routes, token }
    }
}

impl Service<Request<Incoming>> for Guard {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future =
        Either<<Routes as Service<Request<Incoming>>>::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        <Routes as Service<Request<Incoming>>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if request.uri().path().starts_with(OPEN_PREFIX) || self.token.allows(request.headers()) {
            return Either::Left(self.routes.call(request));
        }
        Either::Right(ready(Ok(status(&Refusal::Unauthenticated).into_http())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_and_exactly_that_one() {
        let token = ClusterToken::new(Some("comb")).unwrap();
        let check = |values: &[&str], expected: bool| {
            let headers = values.iter().map(|v| (CLUSTER_TOKEN_KEY.parse().unwrap(), v.parse().unwrap()));
            assert_eq!(token.allows(&headers.collect()), expected, "{values:?}");
        };
        check(&["comb"], true);
        for wrong in [&["com"][..], &["combs"], &["Comb"], &[""], &[], &["comb", "comb"], &["x", "comb"]] {
            check(wrong, false);
        }
        assert!(ClusterToken::new(None).unwrap().allows(&HeaderMap::new()));
        assert!(ClusterToken::new(Some("a\nb")).is_none() && ClusterToken::new(Some("")).is_none());
    }
}
