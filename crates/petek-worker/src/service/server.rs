//! A worker's listener, with every limit set; the defaults are open. Streams of routers have no age and may be idle.

use hyper_util::service::TowerToHyperService;
use petek_core::limits::listener as limit;
use petek_proto::FILE_DESCRIPTOR_SET;
use petek_proto::worker::v1::worker_service_server::WorkerServiceServer;
use petek_service::{Http2Limits, Lifetime, serve_http2};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::guard::{ClusterToken, Guard};
use super::{Service, ms};
use crate::settings::LinkSettings;

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
        let limits = Http2Limits {
            connections_max: settings.connections_max,
            handshake_max: ms(settings.handshake_ms_max),
            concurrent_streams_max: limit::CONCURRENT_STREAMS_MAX,
            local_error_reset_streams_max: limit::LOCAL_ERROR_RESET_STREAMS_MAX,
            pending_accept_reset_streams_max: limit::PENDING_ACCEPT_RESET_STREAMS_MAX,
            header_list_bytes: limit::HEADER_LIST_BYTES,
            stream_window_bytes: limit::STREAM_WINDOW_BYTES,
            connection_window_bytes: limit::CONNECTION_WINDOW_BYTES,
            send_buffer_bytes: Some(SEND_BUFFER_BYTES),
            keep_alive_interval: ms(settings.ping_interval_ms),
            keep_alive_timeout: ms(settings.ping_timeout_ms),
        };
        let service = TowerToHyperService::new(self.guard.clone());
        serve_http2(listener, service, limits, || Lifetime::UNBOUNDED, "routers", stop)
    }
}
