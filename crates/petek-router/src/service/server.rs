//! A listener for clients, with every limit set; the defaults are open.
//!
//! hyper is driven here and not through tonic's own server, which answers a call at its grpc-timeout by itself, with
//! CANCELLED and no details.

use std::io::Cursor;
use std::pin::pin;
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use petek_core::limits::listener as limit;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::service::Routes;

use crate::gateway::random;

/// What an HTTP/2 connection begins with. *Source*: RFC 9113, section 3.4.
const PREFACE_BYTES: usize = 24;
/// After an `accept` that failed: often there is no file descriptor left, and asking again at once burns a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop`, then until the streams of all connections have ended. Dropped, it closes them all.
///
/// A connection is asked to go away at the age of `age`, give or take a tenth; its streams finish.
pub(super) async fn serve(listener: TcpListener, routes: Routes, age: Duration, stop: watch::Receiver<bool>) {
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
                drop(connections.spawn(connection(stream, routes.clone(), around(age), stop.clone())))
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

async fn connection(stream: TcpStream, routes: Routes, age: Duration, mut stop: watch::Receiver<bool>) {
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
    let service = TowerToHyperService::new(routes);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(io), service));
    let go_away = async {
        tokio::select! {
            () = sleep(age) => {}
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

/// Give or take a tenth, so that connections made together do not all come back together.
fn around(age: Duration) -> Duration {
    let share = (random() >> 32) as f64 / f64::from(u32::MAX);
    age.mul_f64(0.9 + 0.2 * share)
}
