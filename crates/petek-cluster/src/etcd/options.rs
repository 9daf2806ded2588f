//! How etcd is reached, as an operator says it, and checked before anything is sent.

use std::fmt;
use std::time::Duration;

/// A server closes healthy connections that are pinged more often (measured: one ping a second, closed every 4 s).
const PING_INTERVAL_MIN: Duration = Duration::from_secs(5);

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// `host:port` or with `http://` or `https://` before it; all of one etcd.
    pub endpoints: Vec<String>,
    /// Who we are.
    pub user: Option<EtcdUser>,
    /// Whom we trust, and who we are by certificate. With it an endpoint without a scheme is https.
    pub tls: Option<EtcdTls>,
    /// How long one call to one endpoint may take.
    pub call_deadline: Duration,
    /// A connection is pinged this often, also when it is idle; at least 5 s.
    pub ping_interval: Duration,
    /// A connection whose ping is unanswered for this long is lost.
    pub ping_timeout: Duration,
}

impl EtcdOptions {
    /// Without user and TLS, times as a cluster wants them.
    pub fn new(endpoints: Vec<String>) -> Self {
        EtcdOptions {
            endpoints,
            user: None,
            tls: None,
            call_deadline: Duration::from_secs(2),
            ping_interval: Duration::from_secs(6),
            ping_timeout: Duration::from_secs(2),
        }
    }

    pub(super) fn check(self) -> Result<Self, OptionsError> {
        if self.endpoints.is_empty() {
            return Err(OptionsError::NoEndpoint);
        }
        if self.ping_interval < PING_INTERVAL_MIN {
            return Err(OptionsError::PingTooOften { interval: self.ping_interval });
        }
        for endpoint in &self.endpoints {
            let (scheme, rest) = endpoint.split_once("://").unwrap_or(("", endpoint));
            let port = rest.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
            let why = match (scheme, port, &self.tls) {
                ("http", _, Some(_)) => "http:// cannot be had with TLS options",
                ("https", _, None) => "https:// needs the TLS option of a CA certificate",
                ("" | "http" | "https", Some((host, 1..)), _) if !host.is_empty() => continue,
                _ => "must be host:port, with http:// or https:// or nothing before it",
            };
            return Err(OptionsError::Endpoint { endpoint: endpoint.clone(), why: why.into() });
        }
        Ok(self)
    }
}

/// A user of etcd.
#[derive(Clone)]
pub struct EtcdUser {
    /// Its name.
    pub name: String,
    /// Never shown.
    pub password: String,
}

impl fmt::Debug for EtcdUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdUser").field("name", &self.name).finish_non_exhaustive()
    }
}

/// TLS to etcd; all in PEM.
#[derive(Clone)]
pub struct EtcdTls {
    /// Certificates that vouch for etcd's.
    pub ca: Vec<u8>,
    /// Our own certificate (for client authentication) and its key, where etcd asks for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// The name that etcd's certificate must have, where it is not the endpoint's host.
    pub domain: Option<String>,
}

impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_identity = self.identity.is_some();
        f.debug_struct("EtcdTls")
            .field("has_identity", &has_identity)
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

/// Options that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Nothing to connect to.
    #[error("etcd: no endpoint is given")]
    NoEndpoint,
    /// An endpoint cannot be.
    #[error("etcd endpoint {endpoint:?}: {why}")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong.
        why: String,
    },
    /// Certificates or key do not read.
    #[error("etcd TLS: {why}")]
    Tls {
        /// What is wrong.
        why: String,
    },
    /// Faster than a server bears.
    #[error(
        "etcd ping interval of {interval:?}: a server closes connections pinged more often than every 5 s"
    )]
    PingTooOften {
        /// As given.
        interval: Duration,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_cannot_be_are_refused() {
        let tls = || EtcdTls { ca: Vec::new(), identity: None, domain: None };
        let check = |endpoint: &str, has_tls: bool| {
            let mut options = EtcdOptions::new(vec![endpoint.into()]);
            options.tls = has_tls.then(tls);
            options.check().map(drop).map_err(|error| error.to_string())
        };
        for (endpoint, has_tls) in [
            ("127.0.0.1:2379", false),
            ("http://etcd:2379", false),
            ("https://etcd:2379", true),
            ("etcd:2379", true),
            ("http://[::1]:2379", false),
        ] {
            assert_eq!(check(endpoint, has_tls), Ok(()), "{endpoint}");
        }
        for (endpoint, has_tls, says) in [
            ("", false, "must be host:port"),
            ("etcd", false, "must be host:port"),
            (":2379", false, "must be host:port"),
            ("etcd:0", false, "must be host:port"),
            ("ftp://etcd:2379", false, "must be host:port"),
            ("https://etcd:2379", false, "CA certificate"),
            ("http://etcd:2379", true, "cannot be had with TLS"),
        ] {
            let error = check(endpoint, has_tls).expect_err(endpoint);
            assert!(error.contains(says) && error.contains(endpoint), "{error}");
        }
        assert_eq!(EtcdOptions::new(Vec::new()).check().map(drop), Err(OptionsError::NoEndpoint));
        let mut hasty = EtcdOptions::new(vec!["etcd:2379".into()]);
        hasty.ping_interval = Duration::from_secs(1);
        assert!(hasty.check().is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let mut options = EtcdOptions::new(vec!["etcd:2379".into()]);
        options.user = Some(EtcdUser { name: "petek".into(), password: "hunter2".into() });
        options.tls = Some(EtcdTls {
            ca: b"CA".to_vec(),
            identity: Some((b"cert".to_vec(), b"-----BEGIN PRIVATE KEY-----".to_vec())),
            domain: None,
        });
        let shown = format!("{options:?}");
        assert!(shown.contains("petek") && !shown.contains("hunter2"), "{shown}");
        let key = format!("{:?}", b"-----BEGIN".to_vec());
        assert!(!shown.contains("PRIVATE") && !shown.contains(&key[1..key.len() - 1]), "{shown}");
    }
}
