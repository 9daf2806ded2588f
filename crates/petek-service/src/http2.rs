//! A listener that speaks HTTP/2, with every limit set; the defaults are open.
//!
//! hyper is driven here and not through tonic's own server, which answers a call at its grpc-timeout by itself, with
//! CANCELLED and no details.

use std::error::Error;
use std::io::Cursor;
use std::pin::pin;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http2::Builder;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What an HTTP/2 connection begins with. *Source*: RFC 9113, section 3.4.
const PREFACE_BYTES: usize = 24;
/// After an `accept` that failed: often there is no file descriptor left, and asking again at once burns a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a listener and its connections may take.
#[derive(Clone, Debug)]
pub struct Http2Limits {
    /// Connections at once; more wait in the system's backlog.
    pub connections_max: usize,
    /// Until a connection has said its preface.
    pub handshake_max: Duration,
    /// Streams that one connection may hold at once.
    pub concurrent_streams_max: u32,
    /// Streams that we reset on one connection before it is told to go away.
    pub local_error_reset_streams_max: usize,
    /// Streams that a peer may reset before they were accepted.
    pub pending_accept_reset_streams_max: usize,
    /// All headers of one call together.
    pub header_list_bytes: u32,
    /// Unread bytes of one stream.
    pub stream_window_bytes: u32,
    /// Unread bytes of one connection.
    pub connection_window_bytes: u32,
    /// Bytes of one stream that wait in the transport; none: as many as the transport likes.
    pub send_buffer_bytes: Option<usize>,
    /// A ping after this long without traffic.
    pub keep_alive_interval: Duration,
    /// A connection is closed when its ping is unanswered for this long.
    pub keep_alive_timeout: Duration,
}

/// How long a connection lasts.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// At this age it is asked to go away; its streams finish.
    pub age: Duration,
    /// Without a call for so long, too.
    pub idle: Duration,
}

impl Lifetime {
    /// As long as both sides like.
    pub const UNBOUNDED: Lifetime = Lifetime { age: Duration::MAX, idle: Duration::MAX };
}

/// Serves `whom` until `stop`, then until the streams of all connections have ended. Dropped, it closes them all.
/// `lifetime` is asked for each connection.
pub async fn serve_http2<S, B>(
    listener: TcpListener,
    service: S,
    limits: Http2Limits,
    lifetime: impl Fn() -> Lifetime,
    whom: &'static str,
    stop: watch::Receiver<bool>,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let mut connections = JoinSet::new();
    let mut stopping = stop.clone();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < limits.connections_max => accepted,
            Some(_) = connections.join_next(), if connections.len() >= limits.connections_max => continue,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let (service, limits) = (service.clone(), limits.clone());
                drop(connections.spawn(connection(stream, service, limits, lifetime(), whom, stop.clone())));
            }
            Err(error) => {
                tracing::warn!(%error, whom, "accept on a listener");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection<S, B>(
    stream: TcpStream,
    service: S,
    limits: Http2Limits,
    lifetime: Lifetime,
    whom: &'static str,
    mut stop: watch::Receiver<bool>,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + Sync + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    // Where the system does not know it, small answers only come later.
    let _ = stream.set_nodelay(true);
    let (mut from, to) = stream.into_split();
    let mut preface = [0; PREFACE_BYTES];
    // A scanner, or a client of another protocol: nobody needs to know.
    let Ok(Ok(_)) = timeout(limits.handshake_max, from.read_exact(&mut preface)).await else { return };
    let io = tokio::io::join(Cursor::new(preface).chain(from), to);

    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.concurrent_streams_max)
        .max_local_error_reset_streams(limits.local_error_reset_streams_max)
        .max_pending_accept_reset_streams(limits.pending_accept_reset_streams_max)
        .max_header_list_size(limits.header_list_bytes)
        .adaptive_window(false)
        .initial_stream_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.connection_window_bytes)
        .keep_alive_interval(limits.keep_alive_interval)
        .keep_alive_timeout(limits.keep_alive_timeout);
    if let Some(bytes) = limits.send_buffer_bytes {
        builder.max_send_buf_size(bytes);
    }
    let calls = Calls::default();
    let service = service_fn(|request| {
        let (call, response) = (calls.begin(), service.call(request));
        // The call lasts until the last of its answer is written, or given up.
        let until_the_end = |body: B| {
            body.map_frame(move |frame| {
                let _lasts = &call;
                frame
            })
        };
        async move { response.await.map(|answer| answer.map(until_the_end)) }
    });
    let mut serving = pin!(builder.serve_connection(TokioIo::new(io), service));
    let go_away = async {
        tokio::select! {
            () = sleep(lifetime.age) => {}
            () = calls.idle_for(lifetime.idle) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    };
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = go_away => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, whom, "a connection ended");
    }
}

/// Counts the calls under way on a connection.
#[derive(Default)]
struct Calls(watch::Sender<usize>);

/// A call under way.
struct Call(watch::Sender<usize>);

impl Calls {
    fn begin(&self) -> Call {
        self.0.send_modify(|calls| *calls += 1);
        Call(self.0.clone())
    }

    /// Waits until there was no call for so long.
    async fn idle_for(&self, time: Duration) {
        let mut calls = self.0.subscribe();
        loop {
            let changed = if *calls.borrow_and_update() > 0 {
                Ok(calls.changed().await)
            } else {
                timeout(time, calls.changed()).await
            };
            // The sender is ours and lasts.
            if changed.is_err() {
                return;
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.send_modify(|calls| *calls -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_when_its_last_call_is_long_over() {
        const IDLE: Duration = Duration::from_secs(900);
        let calls = Calls::default();
        let begun = tokio::time::Instant::now();
        let (first, second) = (calls.begin(), calls.begin());
        let conduct = async {
            sleep(2 * IDLE).await;
            drop(first);
            sleep(2 * IDLE).await;
            drop(second);
            sleep(IDLE / 2).await;
            // A short one begins it anew.
            drop(calls.begin());
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = calls.idle_for(IDLE) => {}
            () = conduct => {}
        }
        assert_eq!(begun.elapsed().as_secs(), (2 * IDLE + 2 * IDLE + IDLE / 2 + IDLE).as_secs());
    }
}
