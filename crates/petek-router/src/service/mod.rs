//! The servers of a router: every limit is set, every service has health and reflection, and a drain refuses new work
//! in words before the listener goes away.

mod server;

mod intake;

mod inference;

mod admin;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use petek_core::limits::listener as limit;
use petek_proto::FILE_DESCRIPTOR_SET;
use petek_proto::admin::v1::admin_service_server::AdminServiceServer;
use petek_proto::inference::v1::inference_service_server::InferenceServiceServer;
use petek_service::{Exit, Failure, Lifetime, RouterMetrics, Shutdown};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::server::HealthReporter;

use self::admin::Admin;
use self::inference::Inference;
use self::intake::{Counts, Deadlines, Intake};
use crate::feed::WorkerFeed;
use crate::gateway::{Gateway, random};
use crate::link::{ClusterToken, Common, Dialler};
use crate::settings::RouterSettings;
use crate::text_pool::TextPool;
use crate::workers::Workers;

/// Where a router is reached: bound and not yet served.
pub struct Listeners {
    /// The inference service.
    pub public: TcpListener,
    /// The admin service, on loopback.
    pub admin: TcpListener,
}

/// A router that runs. It ends when its [`Shutdown`] drains; dropping this changes nothing.
pub struct Router {
    public: SocketAddr,
    admin: SocketAddr,
    ready: watch::Receiver<bool>,
    stopped: JoinHandle<()>,
}

impl Router {
    /// Starts a router, inside a tokio runtime. It serves at once; until a worker is found, calls are refused with
    /// `NO_WORKER` and health says NOT_SERVING.
    ///
    /// `cluster_token` is what workers expect of it. When `shutdown` drains, new work is refused, what runs is
    /// finished, and then the listeners close.
    ///
    /// # Errors
    /// [`Exit::Configuration`] for settings that cannot be, [`Exit::Environment`] where the system gives no threads
    /// or a listener has no address.
    pub fn start(
        settings: RouterSettings,
        cluster_token: Option<&str>,
        feed: WorkerFeed,
        listeners: Listeners,
        metrics: Arc<RouterMetrics>,
        shutdown: Shutdown,
    ) -> Result<Router, Failure> {
        let configuration = |what: String| Failure::new(Exit::Configuration, what, "");
        settings.check().map_err(|(key, why)| configuration(format!("settings: {key}: {why}")))?;
        let token = ClusterToken::new(cluster_token);
        let token =
            token.ok_or_else(|| configuration("the cluster token must be plain ASCII text".into()))?;
        let environment = |what: &str, error: std::io::Error| {
            Failure::new(Exit::Environment, format!("{what}: {error}"), "")
        };
        let address = |listener: &TcpListener| {
            listener.local_addr().map_err(|error| environment("read a listener's address", error))
        };
        let (public, admin) = (address(&listeners.public)?, address(&listeners.admin)?);

        let threads = match settings.tokenize_threads {
            0 => TextPool::threads_default(),
            threads => threads,
        };
        let text = TextPool::start(threads, settings.tokenize_queue)
            .map_err(|error| environment("start the threads that tokenise", error))?;
        let dialler = Dialler::new(settings.link.clone(), token, random(), metrics.records_bad.clone());
        let gateway = Arc::new(Gateway {
            workers: Workers::follow(feed, Common::new(dialler, settings.index_bytes_max, metrics.clone())),
            text,
            metrics,
            shutdown,
            requests: Arc::new(Semaphore::new(settings.requests_max)),
            settings,
        });
        let (is_ready, ready) = watch::channel(false);
        let stopped = tokio::spawn(serve(gateway, listeners, is_ready));
        Ok(Router { public, admin, ready, stopped })
    }

    /// Where clients reach it.
    pub fn public_address(&self) -> SocketAddr {
        self.public
    }

    /// Where operators reach it.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Waits until a worker takes requests: from then on health says SERVING. Returns, too, when the router stops before.
    ///
    /// *Cancel safety*: may be dropped and called again at any point.
    pub async fn ready(&self) {
        // An error says that it stopped.
        let _ = self.ready.clone().wait_for(|ready| *ready).await;
    }

    /// Waits until all that ran is finished and the listeners are closed.
    pub async fn stopped(self) {
        if let Err(error) = self.stopped.await {
            tracing::error!(%error, "the router's server failed");
        }
    }
}

async fn serve(gateway: Arc<Gateway>, listeners: Listeners, is_ready: watch::Sender<bool>) {
    let settings = &gateway.settings;
    let deadlines = Deadlines {
        default: Duration::from_millis(settings.deadline_ms_default),
        max: Duration::from_millis(settings.deadline_ms_max),
    };
    let linger = Duration::from_millis(settings.linger_ms);
    let lifetime = Lifetime {
        age: Duration::from_millis(settings.connection_age_ms),
        idle: Duration::from_millis(settings.connection_idle_ms),
    };

    let inference = InferenceServiceServer::new(Inference { gateway: gateway.clone() })
        .max_decoding_message_size(limit::MESSAGE_TRANSPORT_BYTES_MAX)
        .max_encoding_message_size(limit::MESSAGE_OUT_BYTES_MAX);
    let admin = AdminServiceServer::new(Admin { gateway: gateway.clone() })
        .max_decoding_message_size(limit::MESSAGE_TRANSPORT_BYTES_MAX)
        .max_encoding_message_size(limit::MESSAGE_OUT_BYTES_MAX);
    let (inference_name, admin_name) = (name_of(&inference), name_of(&admin));
    let (inference_health, admin_health) = (HealthReporter::new(), HealthReporter::new());
    inference_health.set_not_serving::<InferenceServiceServer<Inference>>().await;
    inference_health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    admin_health.set_serving::<AdminServiceServer<Admin>>().await;

    let counts = Counts::Generations(gateway.metrics.clone());
    let public_routes =
        routes(&inference_health, inference_name).add_service(Intake::new(inference, deadlines, counts));
    let admin_routes =
        routes(&admin_health, admin_name).add_service(Intake::new(admin, deadlines, Counts::Nothing));
    let (stop, stopping) = watch::channel(false);
    let public = server::serve(listeners.public, public_routes, lifetime, stopping.clone());
    let admin = server::serve(listeners.admin, admin_routes, lifetime, stopping);

    let conduct = async {
        tokio::select! {
            () = first_model(&gateway) => {
                inference_health.set_serving::<InferenceServiceServer<Inference>>().await;
                inference_health.set_service_status("", tonic_health::ServingStatus::Serving).await;
                is_ready.send_replace(true);
                gateway.shutdown.draining().await;
            }
            () = gateway.shutdown.draining() => {}
        }
        inference_health.set_not_serving::<InferenceServiceServer<Inference>>().await;
        inference_health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        // New work is refused from here on; what runs has deadlines, so this ends.
        let all = gateway.requests.acquire_many(gateway.settings.requests_max as u32).await;
        drop(all);
        stop.send_replace(true);
        // A client that never reads its last bytes, or an operator that watches, holds nobody up.
        tokio::time::sleep(linger).await;
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(public, admin) } => {}
        () = conduct => {}
    }
}

fn name_of<S: NamedService>(_: &S) -> &'static str {
    S::NAME
}

/// Health and reflection, which every listener has: reflection lists these two and the service that stands beside them.
/// What health shows is for whoever holds the reporter to say.
fn routes(health: &HealthReporter, service: &str) -> Routes {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(service)
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection")
        .build_v1()
        .expect("the descriptors are those of this build");
    let health = tonic_health::pb::health_server::HealthServer::new(
        tonic_health::server::HealthService::from_health_reporter(health.clone()),
    );
    Routes::new(health).add_service(reflection)
}

async fn first_model(gateway: &Gateway) {
    let mut changes = gateway.workers.changes();
    // A model is not to be asked before one of its workers has said itself that it serves: its record may say so first,
    // and its first word still be that it loads.
    while !gateway.workers.served().iter().any(|served| served.pool.is_reported_serving()) {
        if changes.changed().await.is_err() {
            return;
        }
    }
}
