//! A worker's listener, with every limit set; the defaults are open. Streams of routers have no age and may be idle.

use std::io::Cursor;
use std::pin::pin;
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use petek_core::limits::listener as limit;
use petek_proto::FILE_DESCRIPTOR_SET;
use petek_proto::worker::v1::worker_service_server::WorkerServiceServer;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::guard::{ClusterToken, Guard};
use super::{Service, ms};
use crate::settings::LinkSettings;

/// What an HTTP/2 connection begins with. *Source*: RFC 9113, section 3.4.
const PREFACE_BYTES: usize = 24;
/// After an `accept` that failed: often there is no file descriptor left, and asking again at once burns a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of one stream that wait in the transport; what is beyond waits in its outbox, where it merges.
const SEND_BUFFER_BYTES: usize = 256 << 10;

/// A worker's services and what they say of their health.
pub(crate) struct Served {
    guard: Guard,
    health: HealthReporter,
}

impl Served {
    /// Not serving yet.
    pub(crate) async fn new(service: Service, token: ClusterToken) -> Self {
        let health = HealthReporter::new();
        let worker = WorkerServiceServer::new(service)
            .max_decoding_message_size(limit::MESSAGE_TRANSPORT_BYTES_MAX)
            .max_encoding_message_size(limit::MESSAGE_OUT_BYTES_MAX);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // What is served here, not all that the descriptors know.
            .with_service_name(WorkerServiceServer::<Service>::NAME)
            .with_service_name("grpc.health.v1.Health")
            .with_service_name("grpc.reflection.v1.ServerReflection")
            .build_v1()
            .expect("the descriptors are those of this build");
        let health_service = tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(health.clone()),
        );
        let routes = Routes::new(health_service).add_service(reflection).add_service(worker);
        let served = Served { guard: Guard::new(routes.prepare(), token), health };
        served.set_health(ServingStatus::NotServing).await;
        served
    }

    /// What `grpc.health.v1` answers, for the service and for the whole server.
    pub(crate) async fn set_health(&self, status: ServingStatus) {
        match status {
            ServingStatus::Serving => self.health.set_serving::<WorkerServiceServer<Service>>().await,
            _ => self.health.set_not_serving::<WorkerServiceServer<Service>>().await,
        }
        self.health.set_service_status("", status).await;
    }

    /// Serves until `stop`, then until the streams of all connections have ended. Dropped, it closes them all.
    pub(crate) fn serve(
        &self,
        listener: TcpListener,
        settings: LinkSettings,
        stop: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + Send + 'static {
        serve(listener, self.guard.clone(), settings, stop)
    }
}

async fn serve(listener: TcpListener, guard: Guard, settings: LinkSettings, stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let mut stopping = stop.clone();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < settings.connections_max => accepted,
            Some(_) = connections.join_next(), if connections.len() >= settings.connections_max => continue,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                drop(connections.spawn(connection(stream, guard.clone(), settings.clone(), stop.clone())))
            }
            Err(error) => {
                tracing::warn!(%error, "accept on the listener for routers");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    stream: TcpStream,
    guard: Guard,
    settings: LinkSettings,
    mut stop: watch::Receiver<bool>,
) {
    // Where the system does not know it, small answers only come later.
    let _ = stream.set_nodelay(true);
    let (mut from, to) = stream.into_split();
    let mut preface = [0; PREFACE_BYTES];
    // A scanner, or a client of another protocol: nobody needs to know.
    let handshake = timeout(ms(settings.handshake_ms_max), from.read_exact(&mut preface));
    let Ok(Ok(_)) = handshake.await else { return };
    let io = tokio::io::join(Cursor::new(preface).chain(from), to);

    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limit::CONCURRENT_STREAMS_MAX)
        .max_local_error_reset_streams(limit::LOCAL_ERROR_RESET_STREAMS_MAX)
        .max_pending_accept_reset_streams(limit::PENDING_ACCEPT_RESET_STREAMS_MAX)
        .max_header_list_size(limit::HEADER_LIST_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .adaptive_window(false)
        .initial_stream_window_size(limit::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limit::CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(ms(settings.ping_interval_ms))
        .keep_alive_timeout(ms(settings.ping_timeout_ms));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(guard)));
    let stopping = async {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = stopping => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a router's connection ended");
    }
}
