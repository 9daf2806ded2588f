//! The listener for operators: `/metrics`, `/health`, `/ready`. No prompts, no secrets, nothing to change.
//!
//! One request per connection, everything about it bounded: a scraper opens a connection each time, and there is no
//! idle one to look after.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::failure::{Exit, Failure};
use crate::metrics::Registry;
use crate::shutdown::Shutdown;

/// Connections at once; more wait in the system's backlog.
const CONNECTIONS_MAX: usize = 64;
/// For a request's head to arrive.
const HEAD_SECONDS_MAX: u64 = 10;
/// For a whole connection; above the head's time.
const CONNECTION_SECONDS_MAX: u64 = 30;
const HEAD_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;
/// After an `accept` that failed: often there is no file descriptor left, and asking again at once burns a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Whether the process may be given work. Clones are the same.
#[derive(Clone, Debug)]
pub struct Readiness {
    shutdown: Shutdown,
    /// What it still waits for.
    waits_for: watch::Sender<Option<&'static str>>,
}

impl Readiness {
    /// Of a process that is starting.
    pub fn new(shutdown: Shutdown) -> Self {
        Self { shutdown, waits_for: watch::Sender::new(Some("starting")) }
    }

    /// Says that it may be given work, until it drains.
    pub fn ready(&self) {
        self.waits_for.send_replace(None);
    }

    /// Says what it waits for ("loading the model", "etcd").
    pub fn waits_for(&self, what: &'static str) {
        self.waits_for.send_replace(Some(what));
    }

    /// `Err` says why not.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.shutdown.is_draining() {
            Err("draining")
        } else {
            self.waits_for.borrow().map_or(Ok(()), Err)
        }
    }
}

/// The listener, bound and not yet served.
#[derive(Debug)]
pub struct Ops {
    listener: TcpListener,
    address: SocketAddr,
}

impl Ops {
    /// Binds `host:port`; port 0 takes a free one.
    ///
    /// # Errors
    /// [`Exit::Environment`] where the address is in use, not ours, or no address.
    pub async fn bind(address: &str) -> Result<Self, Failure> {
        let bound = async {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address })
        };
        bound.await.map_err(|error: std::io::Error| {
            let what = format!("listen on {address} for operators: {error}");
            Failure::new(Exit::Environment, what, "choose another address, or port 0 for a free port")
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until it is dropped, its connections with it. A draining process is still served: that is when its
    /// metrics matter.
    pub async fn serve(self, registry: Registry, readiness: Readiness) -> Infallible {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let place = places.clone().acquire_owned().await.expect("nobody closes the semaphore");
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let (registry, readiness) = (registry.clone(), readiness.clone());
                    connections.spawn(async move {
                        serve_connection(stream, &registry, &readiness).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept on the operators' listener");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// One request on one connection. How it ends is the peer's affair: a broken connection is no event of ours.
async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    registry: &Registry,
    readiness: &Readiness,
) {
    let service = service_fn(|request: Request<Incoming>| {
        std::future::ready(Ok::<_, Infallible>(respond(
            request.method(),
            request.uri().path(),
            registry,
            readiness,
        )))
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(HEAD_SECONDS_MAX))
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let limit = Duration::from_secs(CONNECTION_SECONDS_MAX);
    match tokio::time::timeout(limit, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "operators' connection"),
        Err(_) => tracing::debug!("operators' connection was too slow"),
    }
}

fn respond(method: &Method, path: &str, registry: &Registry, readiness: &Readiness) -> Response<Full<Bytes>> {
    const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
    const METRICS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

    let (status, kind, body) = match path {
        "/metrics" | "/health" | "/ready" if !matches!(*method, Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET only\n".into())
        }
        "/metrics" => (StatusCode::OK, METRICS, registry.text()),
        // Whoever can answer this is alive; whether it should get work is another question.
        "/health" => (StatusCode::OK, TEXT, "ok\n".into()),
        "/ready" => match readiness.check() {
            Ok(()) => (StatusCode::OK, TEXT, "ready\n".into()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
        },
        _ => (StatusCode::NOT_FOUND, TEXT, "try /metrics, /health or /ready\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::TcpStream;
    use tokio::time::Instant;

    use super::*;
    use crate::metrics::list::RouterMetrics;

    fn parts() -> (Registry, Readiness, Shutdown) {
        let registry = Registry::new();
        RouterMetrics::new(&registry);
        let shutdown = Shutdown::without_signals();
        (registry, Readiness::new(shutdown.clone()), shutdown)
    }

    /// Sends bytes over a real connection and returns all that comes back.
    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        ask(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await
    }

    #[tokio::test]
    async fn operators_are_answered() {
        let (registry, readiness, shutdown) = parts();
        let ops = Ops::bind("127.0.0.1:0").await.unwrap();
        let address = ops.address();
        let serving = tokio::spawn(ops.serve(registry, readiness.clone()));

        assert!(get(address, "/health").await.starts_with("HTTP/1.1 200"));
        let ready = async || get(address, "/ready").await;
        assert!(ready().await.starts_with("HTTP/1.1 503") && ready().await.ends_with("\r\nstarting\n"));
        readiness.waits_for("etcd");
        assert!(ready().await.ends_with("\r\netcd\n"));
        readiness.ready();
        assert!(ready().await.starts_with("HTTP/1.1 200"));
        shutdown.drain();
        assert!(ready().await.starts_with("HTTP/1.1 503") && ready().await.ends_with("\r\ndraining\n"));

        let metrics = get(address, "/metrics").await;
        assert!(metrics.contains("content-type: text/plain; version=0.0.4"), "{metrics}");
        assert!(metrics.contains("\npetek_router_workers 0\n"), "{metrics}");

        let post = ask(address, "POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx").await;
        assert!(post.starts_with("HTTP/1.1 405") && post.contains("allow: GET, HEAD"), "{post}");
        let head = ask(address, "HEAD /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, "no http at all\r\n\r\n").await.starts_with("HTTP/1.1 400"));

        serving.abort();
    }

    #[tokio::test]
    async fn a_port_in_use_is_the_environments_fault() {
        let ops = Ops::bind("127.0.0.1:0").await.unwrap();
        let failure = Ops::bind(&ops.address().to_string()).await.unwrap_err();
        assert_eq!(failure.exit(), Exit::Environment);
        assert!(failure.to_string().contains(&ops.address().to_string()), "{failure}");
        assert_eq!(Ops::bind("nonsense").await.unwrap_err().exit(), Exit::Environment);
    }

    /// Serves one connection to a peer that sends `request` and then only reads; time is virtual.
    async fn answer_to(request: String) -> (String, Duration) {
        let (registry, readiness, _) = parts();
        let (ours, mut theirs) = duplex(1 << 20);
        let start = Instant::now();
        theirs.write_all(request.as_bytes()).await.unwrap();
        serve_connection(ours, &registry, &readiness).await;
        let mut answer = String::new();
        theirs.read_to_string(&mut answer).await.unwrap();
        (answer, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_never_ends_is_cut() {
        let (_, waited) = answer_to("GET /health HTTP/1.1\r\nhost:".into()).await;
        assert_eq!(waited.as_secs(), HEAD_SECONDS_MAX);
        let (_, waited) = answer_to(String::new()).await;
        assert_eq!(waited.as_secs(), HEAD_SECONDS_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_head_is_refused() {
        let headers = |count: usize, size: usize| {
            let header = |n: usize| format!("h{n}: {}\r\n", "x".repeat(size));
            format!("GET /health HTTP/1.1\r\n{}\r\n", (0..count).map(header).collect::<String>())
        };
        assert!(answer_to(headers(HEADERS_MAX, 1)).await.0.starts_with("HTTP/1.1 200"));
        assert!(answer_to(headers(HEADERS_MAX + 1, 1)).await.0.starts_with("HTTP/1.1 431"));
        assert!(answer_to(headers(2, HEAD_BYTES_MAX)).await.0.starts_with("HTTP/1.1 431"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_reads_is_cut() {
        let (registry, readiness, _) = parts();
        assert!(registry.text().len() > 4096, "the answer fills the pipe");
        let (ours, mut theirs) = duplex(64);
        let start = Instant::now();
        let request = async { theirs.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await };
        let (_, sent) = tokio::join!(serve_connection(ours, &registry, &readiness), request);
        sent.unwrap();
        assert_eq!(start.elapsed().as_secs(), CONNECTION_SECONDS_MAX);
    }
}
