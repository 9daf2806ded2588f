//! A listener for clients, with every limit set; the defaults are open.
//!
//! hyper is driven here and not through tonic's own server, which answers a call at its grpc-timeout by itself, with
//! CANCELLED and no details.

use std::io::Cursor;
use std::pin::pin;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::server::conn::http2::Builder;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use petek_core::limits::listener as limit;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::body::Body;
use tonic::service::Routes;

use crate::gateway::random;

/// What an HTTP/2 connection begins with. *Source*: RFC 9113, section 3.4.
const PREFACE_BYTES: usize = 24;
/// After an `accept` that failed: often there is no file descriptor left, and asking again at once burns a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection lasts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetime {
    /// At this age, give or take a tenth, it is asked to go away; its streams finish.
    pub(super) age: Duration,
    /// Without a call for so long, too.
    pub(super) idle: Duration,
}

/// Serves until `stop`, then until the streams of all connections have ended. Dropped, it closes them all.
pub(super) async fn serve(
    listener: TcpListener,
    routes: Routes,
    lifetime: Lifetime,
    stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut stopping = stop.clone();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < limit::CONNECTIONS_MAX => accepted,
            Some(_) = connections.join_next(), if connections.len() >= limit::CONNECTIONS_MAX => continue,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let lifetime = Lifetime { age: around(lifetime.age), ..lifetime };
                drop(connections.spawn(connection(stream, routes.clone(), lifetime, stop.clone())))
            }
            Err(error) => {
                tracing::warn!(%error, "accept on a listener for clients");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(stream: TcpStream, routes: Routes, lifetime: Lifetime, mut stop: watch::Receiver<bool>) {
    // Where the system does not know it, small answers only come later.
    let _ = stream.set_nodelay(true);
    let (mut from, to) = stream.into_split();
    let mut preface = [0; PREFACE_BYTES];
    let handshake = Duration::from_secs(limit::HANDSHAKE_S_MAX);
    // A scanner, or a client of another protocol: nobody needs to know.
    let Ok(Ok(_)) = timeout(handshake, from.read_exact(&mut preface)).await else { return };
    let io = tokio::io::join(Cursor::new(preface).chain(from), to);

    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limit::CONCURRENT_STREAMS_MAX)
        .max_local_error_reset_streams(limit::LOCAL_ERROR_RESET_STREAMS_MAX)
        .max_pending_accept_reset_streams(limit::PENDING_ACCEPT_RESET_STREAMS_MAX)
        .max_header_list_size(limit::HEADER_LIST_BYTES)
        .adaptive_window(false)
        .initial_stream_window_size(limit::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limit::CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(Duration::from_secs(limit::KEEPALIVE_INTERVAL_S))
        .keep_alive_timeout(Duration::from_secs(limit::KEEPALIVE_TIMEOUT_S));
    let calls = Calls::default();
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(|request| {
        let (call, response) = (calls.begin(), routes.call(request));
        // The call lasts until the last of its answer is written, or given up.
        let until_the_end = |body: Body| {
            Body::new(body.map_frame(move |frame| {
                let _lasts = &call;
                frame
            }))
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
        tracing::debug!(%error, "a client's connection ended");
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

/// Give or take a tenth, so that connections made together do not all come back together.
fn around(age: Duration) -> Duration {
    let share = (random() >> 32) as f64 / f64::from(u32::MAX);
    age.mul_f64(0.9 + 0.2 * share)
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
