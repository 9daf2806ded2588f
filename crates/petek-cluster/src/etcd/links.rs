//! One connection per endpoint. A call goes to the endpoint that answered last, and once to each other one before it
//! counts as failed: the client's own balancing sends a share of all calls to an endpoint that is down.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tokio::time::timeout;

use super::failure::{Failure, classify, words};
use super::options::{EtcdOptions, EtcdUser, OptionsError};
use crate::registry::RegistryError;

/// All connections to one etcd.
pub(super) struct Links {
    links: Vec<Link>,
    /// The one that answered last.
    preferred: AtomicUsize,
    user: Option<EtcdUser>,
    deadline: Duration,
    endpoints: String,
}

struct Link {
    endpoint: String,
    client: Client,
    is_logged_in: AtomicBool,
}

impl Links {
    /// Prepares a connection per endpoint; none is opened before the first call.
    pub(super) async fn new(options: EtcdOptions) -> Result<Self, OptionsError> {
        let mut connect = ConnectOptions::new()
            .with_keep_alive(options.ping_interval, options.ping_timeout)
            .with_keep_alive_while_idle(true)
            .with_connect_timeout(options.call_deadline)
            // A member that lost its leader says so instead of falling silent.
            .with_require_leader(true);
        if let Some(tls) = options.tls {
            let mut config = TlsOptions::new().ca_certificate(Certificate::from_pem(tls.ca));
            if let Some((certificate, key)) = tls.identity {
                config = config.identity(Identity::from_pem(certificate, key));
            }
            if let Some(domain) = tls.domain {
                config = config.domain_name(domain);
            }
            connect = connect.with_tls(config);
        }
        let mut links = Vec::new();
        for endpoint in options.endpoints {
            // Without the user: the client would log in right here, and fail where nobody is there yet.
            let client =
                Client::connect([&endpoint], Some(connect.clone())).await.map_err(|error| match error {
                    Error::TransportError(_) => OptionsError::Tls { why: words(&error) },
                    error => OptionsError::Endpoint { endpoint: endpoint.clone(), why: words(&error) },
                })?;
            links.push(Link { endpoint, client, is_logged_in: AtomicBool::new(false) });
        }
        Ok(Links {
            endpoints: links.iter().map(|link| link.endpoint.as_str()).collect::<Vec<_>>().join(", "),
            links,
            preferred: AtomicUsize::new(0),
            user: options.user,
            deadline: options.call_deadline,
        })
    }

    /// All of them, for people.
    pub(super) fn endpoints(&self) -> &str {
        &self.endpoints
    }

    /// Makes a call, on one endpoint after the other until one answers.
    ///
    /// # Errors
    /// `Denied` if any endpoint refused us, else `Away`; what else a caller must know of, as soon as one says it.
    pub(super) async fn call<T, F>(
        &self,
        login: Login,
        call: impl Fn(Client) -> F + Send + Sync,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for n in 0..self.links.len() {
            let index = (first + n) % self.links.len();
            match self.call_on(&self.links[index], login, &call).await {
                Err(error @ (RegistryError::Away { .. } | RegistryError::Denied { .. })) => {
                    failures.push(error)
                }
                answer => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return answer;
                }
            }
        }
        // Else the next call would begin with the same one and wait for its deadline again.
        self.preferred.store((first + 1) % self.links.len(), Ordering::Relaxed);
        Err(joined(failures))
    }

    async fn call_on<T, F>(
        &self,
        link: &Link,
        login: Login,
        call: &(impl Fn(Client) -> F + Send + Sync),
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        if login == Login::Again || !link.is_logged_in.load(Ordering::Relaxed) {
            self.log_in(link).await?;
        }
        match self.bounded(link, call(link.client.clone())).await {
            Err(Failure::TokenOld(_)) => {
                self.log_in(link).await?;
                self.bounded(link, call(link.client.clone()))
                    .await
                    .map_err(|failure| failure.into_error(link))
            }
            result => result.map_err(|failure| failure.into_error(link)),
        }
    }

    async fn log_in(&self, link: &Link) -> Result<(), RegistryError> {
        if let Some(EtcdUser { name, password }) = self.user.clone() {
            let mut client = link.client.clone();
            match self.bounded(link, client.update_user(Some((name, password)))).await {
                Err(Failure::AuthOff) => tracing::warn!(
                    endpoint = link.endpoint,
                    "etcd has authentication turned off: anybody may write its records; our user is not used"
                ),
                result => result.map_err(|failure| failure.into_error(link))?,
            }
        }
        link.is_logged_in.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// One call to one endpoint under the deadline. The client's own would bound the headers of a stream only, and a
    /// keep-alive is one.
    async fn bounded<T>(
        &self,
        link: &Link,
        call: impl Future<Output = Result<T, Error>> + Send,
    ) -> Result<T, Failure> {
        match timeout(self.deadline, call).await {
            Ok(result) => result.map_err(|error| classify(&link.endpoint, &error)),
            Err(_) => Err(Failure::Final(RegistryError::Away {
                endpoint: link.endpoint.clone(),
                why: format!("no answer within {:?}", self.deadline),
            })),
        }
    }
}

/// Whether to log in before a call. A user that is not configured never does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Login {
    /// Where that was not done yet; a token that went bad is noticed by the call.
    Once,
    /// In any case: a watch does not say that its token is bad, it just never speaks.
    Again,
}

impl Failure {
    /// As seen where logging in does not help, or helped nothing.
    fn into_error(self, link: &Link) -> RegistryError {
        let endpoint = link.endpoint.clone();
        match self {
            Failure::Final(error) => error,
            Failure::TokenOld(why) => RegistryError::Denied { endpoint, why },
            Failure::AuthOff => {
                RegistryError::Unable { endpoint, why: "authentication is not enabled".into() }
            }
        }
    }
}

fn joined(failures: Vec<RegistryError>) -> RegistryError {
    let is_denied = failures.iter().any(|error| matches!(error, RegistryError::Denied { .. }));
    let mut failures = failures.into_iter().filter_map(|error| match error {
        RegistryError::Away { endpoint, why } if !is_denied => Some((endpoint, why)),
        RegistryError::Denied { endpoint, why } => Some((endpoint, why)),
        _ => None,
    });
    let (endpoint, why) = failures.next().unwrap_or_default();
    let (endpoint, why) = failures.fold((endpoint, why), |(endpoints, whys), (endpoint, why)| {
        // Most often all of them say the same.
        let whys = if whys.contains(&why) { whys } else { format!("{whys}; {endpoint}: {why}") };
        (format!("{endpoints}, {endpoint}"), whys)
    });
    if is_denied { RegistryError::Denied { endpoint, why } } else { RegistryError::Away { endpoint, why } }
}
