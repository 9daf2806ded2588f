//! What the serving commands do alike around their work: listeners, addresses, secrets, the registry, the runtime.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use petek_cluster::{EtcdOptions, EtcdRegistry, EtcdTls, EtcdUser, Registry, Times, Wait};
use petek_service::{Exit, Failure};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use super::settings::{EtcdSettings, or_default};

/// A runtime for a serving process. Computing and tokenising have threads of their own.
pub(crate) fn runtime() -> Result<Runtime, Failure> {
    Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Environment, format!("start the I/O threads: {error}"), ""))
}

/// Binds `host:port` for `whom`.
///
/// # Errors
/// [`Exit::Environment`] where it is in use, not ours, or no address.
pub(crate) async fn listen(address: &str, whom: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let what = format!("listen on {address} for {whom}: {error}");
        Failure::new(Exit::Environment, what, "choose another address, or port 0 for a free port")
    })
}

/// Where a listener really listens.
pub(crate) fn address_of(listener: &TcpListener) -> Result<SocketAddr, Failure> {
    let failed = |error| Failure::new(Exit::Environment, format!("read a listener's address: {error}"), "");
    listener.local_addr().map_err(failed)
}

/// Refuses to be reachable from other machines by accident. `guard` says what would make it right.
pub(crate) fn check_reach(address: SocketAddr, insecure: bool, guard: &str) -> Result<(), Failure> {
    if address.ip().is_loopback() || insecure {
        return Ok(());
    }
    let what = format!("{address} can be reached from other machines and nothing guards it");
    Err(Failure::new(Exit::Configuration, what, format!("{guard}listen on 127.0.0.1, or say --insecure")))
}

/// Writes the addresses for whoever waits for them: whole or not at all.
pub(crate) fn write_endpoints(
    file: Option<&Path>,
    endpoints: BTreeMap<&'static str, Value>,
) -> Result<(), Failure> {
    let Some(file) = file else { return Ok(()) };
    let text = Value::from_iter(endpoints).to_string();
    let partial = file.with_extension("partial");
    std::fs::write(&partial, text + "\n").and_then(|()| std::fs::rename(&partial, file)).map_err(|error| {
        let what = format!("write the addresses to {}: {error}", file.display());
        Failure::new(Exit::Environment, what, "name a file in a folder that can be written to")
    })
}

/// A secret that stands in a setting or in a file; not in both.
pub(crate) fn secret(
    what: &str,
    value: Option<&String>,
    file: Option<&PathBuf>,
) -> Result<Option<String>, Failure> {
    let refuse = |why: String| Err(Failure::new(Exit::Configuration, format!("{what}: {why}"), ""));
    match (value, file) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => refuse("it is given as a value and as a file".into()),
        (Some(value), None) => Ok(Some(value.clone())),
        (None, Some(file)) => match read_small(file) {
            Ok(text) if !text.trim().is_empty() => Ok(Some(text.trim().to_owned())),
            Ok(_) => refuse(format!("{} is empty", file.display())),
            Err(error) => refuse(format!("read {}: {error}", file.display())),
        },
    }
}

/// The registry in etcd, and how long to wait for it.
///
/// # Errors
/// [`Exit::Configuration`] for options that cannot be or files that do not read. Whether etcd is there, the first call shows.
pub(crate) async fn etcd(settings: &EtcdSettings) -> Result<(Arc<dyn Registry>, Times, Wait), Failure> {
    let configuration = |what: String| Failure::new(Exit::Configuration, what, "");
    if settings.endpoints.is_empty() {
        let hint = "name etcd with --etcd host:port; `petek up` needs none";
        return Err(Failure::new(Exit::Configuration, "no registry is given", hint));
    }
    let password = secret("etcd's password", settings.password.as_ref(), settings.password_file.as_ref())?;
    let user = match (&settings.user, password) {
        (Some(name), Some(password)) => Some(EtcdUser { name: name.clone(), password }),
        (None, None) => None,
        (Some(_), None) => return Err(configuration("etcd: a user needs a password".into())),
        (None, Some(_)) => return Err(configuration("etcd: a password needs a user".into())),
    };
    let pem = |file: &PathBuf| {
        read_small(file)
            .map(String::into_bytes)
            .map_err(|error| configuration(format!("etcd: read {}: {error}", file.display())))
    };
    let identity = match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => Some((pem(cert)?, pem(key)?)),
        (None, None) => None,
        _ => return Err(configuration("etcd: a certificate and its key go together".into())),
    };
    let tls = match &settings.ca {
        Some(ca) => Some(EtcdTls { ca: pem(ca)?, identity, domain: settings.domain.clone() }),
        None if identity.is_none() && settings.domain.is_none() => None,
        None => return Err(configuration("etcd: certificates need a CA (--etcd-ca)".into())),
    };
    let options = EtcdOptions { user, tls, ..EtcdOptions::new(settings.endpoints.clone()) };
    let registry = EtcdRegistry::new(options).await.map_err(|error| configuration(error.to_string()))?;
    let lease_ttl = Duration::from_secs(or_default(settings.lease_ttl_s, 10));
    let times = Times { lease_ttl, lapse_grace: lease_ttl, ..Times::default() };
    let wait = settings.wait_s.map_or(Wait::Forever, |s| Wait::AtMost(Duration::from_secs(s)));
    Ok((Arc::new(registry), times, wait))
}

/// 64 random bits.
pub(crate) fn random() -> Result<u64, Failure> {
    getrandom::u64().map_err(|error| Failure::new(Exit::Environment, format!("random numbers: {error}"), ""))
}

/// A file of at most 1 MiB, as text.
fn read_small(file: &Path) -> std::io::Result<String> {
    use std::io::Read;
    const BYTES_MAX: u64 = 1 << 20;
    let mut text = String::new();
    std::fs::File::open(file)?.take(BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}
