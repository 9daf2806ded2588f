//! The listeners of clients and operators: their limits, and how long a connection lasts.

use std::time::Duration;

use hyper_util::service::TowerToHyperService;
use petek_core::limits::listener as limit;
use petek_service::{Http2Limits, Lifetime, serve_http2};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

use crate::gateway::random;

/// Serves until `stop`, then until the streams of all connections have ended. Dropped, it closes them all.
pub(super) fn serve(
    listener: TcpListener,
    routes: Routes,
    lifetime: Lifetime,
    stop: watch::Receiver<bool>,
) -> impl Future<Output = ()> {
    let limits = Http2Limits {
        connections_max: limit::CONNECTIONS_MAX,
        handshake_max: Duration::from_secs(limit::HANDSHAKE_S_MAX),
        concurrent_streams_max: limit::CONCURRENT_STREAMS_MAX,
        local_error_reset_streams_max: limit::LOCAL_ERROR_RESET_STREAMS_MAX,
        pending_accept_reset_streams_max: limit::PENDING_ACCEPT_RESET_STREAMS_MAX,
        header_list_bytes: limit::HEADER_LIST_BYTES,
        stream_window_bytes: limit::STREAM_WINDOW_BYTES,
        connection_window_bytes: limit::CONNECTION_WINDOW_BYTES,
        send_buffer_bytes: None,
        keep_alive_interval: Duration::from_secs(limit::KEEPALIVE_INTERVAL_S),
        keep_alive_timeout: Duration::from_secs(limit::KEEPALIVE_TIMEOUT_S),
    };
    let lifetime = move || Lifetime { age: around(lifetime.age), ..lifetime };
    serve_http2(listener, TowerToHyperService::new(routes), limits, lifetime, "clients", stop)
}

/// Give or take a tenth, so that connections made together do not all come back together.
fn around(age: Duration) -> Duration {
    let share = (random() >> 32) as f64 / f64::from(u32::MAX);
    age.mul_f64(0.9 + 0.2 * share)
}
