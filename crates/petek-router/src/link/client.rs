//! Connections to workers, with every limit set.

use std::time::Duration;

use petek_core::limits::{link, listener};
use petek_proto::hello::{CLUSTER_TOKEN_KEY, WIRE};
use petek_proto::worker::v1::RouterHello;
use petek_proto::worker::v1::worker_service_client::WorkerServiceClient;
use petek_service::Counter;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::settings::LinkSettings;

/// A worker's service behind the cluster's token.
pub(crate) type Client = WorkerServiceClient<InterceptedService<Channel, ClusterToken>>;

/// Opens connections to workers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Dialler {
    settings: LinkSettings,
    token: ClusterToken,
    router_id: u64,
    records_bad: Counter,
}

/// Puts the cluster's token into every call.
#[derive(Clone)]
pub(crate) struct ClusterToken(Option<MetadataValue<Ascii>>);

impl ClusterToken {
    /// None where the text cannot stand in a header.
    pub(crate) fn new(token: Option<&str>) -> Option<Self> {
        let Some(token) = token else { return Some(ClusterToken(None)) };
        let mut value: MetadataValue<Ascii> = token.parse().ok()?;
        value.set_sensitive(true);
        Some(ClusterToken(Some(value)))
    }
}

impl Interceptor for ClusterToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(CLUSTER_TOKEN_KEY, token.clone());
        }
        Ok(request)
    }
}

impl Dialler {
    pub(crate) fn new(
        settings: LinkSettings,
        token: ClusterToken,
        router_id: u64,
        records_bad: Counter,
    ) -> Self {
        Dialler { settings, token, router_id, records_bad }
    }

    pub(crate) fn settings(&self) -> &LinkSettings {
        &self.settings
    }

    /// This router's random id.
    pub(crate) fn router_id(&self) -> u64 {
        self.router_id
    }

    pub(crate) fn count_bad_record(&self) {
        self.records_bad.inc();
    }

    /// How this router names itself. `stream` counts its Execute streams to one worker.
    pub(crate) fn hello(&self, stream: u32) -> RouterHello {
        RouterHello { router_id: self.router_id, wire: Some(WIRE), stream }
    }

    /// Connects to the first of the addresses that answers.
    ///
    /// # Errors
    /// The last address's failure.
    pub(crate) async fn dial(&self, addresses: &[String]) -> Result<Client, Status> {
        let mut failure = Status::unavailable("the record has no address");
        for address in addresses {
            match self.dial_one(address).await {
                Ok(client) => return Ok(client),
                Err(error) => failure = Status::unavailable(format!("connect to {address}: {error}")),
            }
        }
        Err(failure)
    }

    async fn dial_one(&self, address: &str) -> Result<Client, tonic::transport::Error> {
        let ms = Duration::from_millis;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(ms(self.settings.connect_ms_max))
            .tcp_nodelay(true)
            .http2_adaptive_window(false)
            .initial_stream_window_size(link::STREAM_WINDOW_BYTES)
            .initial_connection_window_size(link::CONNECTION_WINDOW_BYTES)
            .http2_max_header_list_size(listener::HEADER_LIST_BYTES)
            .http2_keep_alive_interval(ms(self.settings.ping_interval_ms))
            .keep_alive_timeout(ms(self.settings.ping_timeout_ms))
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await?;
        let client = WorkerServiceClient::with_interceptor(channel, self.token.clone())
            // A prompt's ids go up, a step's tokens and logprobs come down: both stay below.
            .max_encoding_message_size(listener::MESSAGE_TRANSPORT_BYTES_MAX)
            .max_decoding_message_size(listener::MESSAGE_TRANSPORT_BYTES_MAX);
        Ok(client)
    }
}

#[cfg(test)]
mod tests {
    use petek_service::{Registry, RouterMetrics};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};
    use tokio::time::timeout;

    use super::*;

    /// A frame's kind and payload. *Source*: RFC 9113, section 4.1.
    async fn frame(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        Ok((head[3], payload))
    }

    /// The system itself would try for two minutes.
    #[tokio::test]
    async fn an_address_that_does_not_answer_is_soon_given_up() {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        // Nobody accepts: when its queue is full it answers nobody.
        let mut queue = Vec::new();
        while let Ok(Ok(stream)) = timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
            queue.push(stream);
        }
        let settings = LinkSettings { connect_ms_max: 20, ..LinkSettings::default() };
        let bad = RouterMetrics::new(&Registry::new()).records_bad.clone();
        let dialler = Dialler::new(settings, ClusterToken(None), 1, bad);
        let addresses = [address.to_string()];
        let dialled = timeout(Duration::from_secs(60), dialler.dial(&addresses)).await;
        let failure = dialled.expect("it is given up").expect_err("nobody is there");
        assert!(failure.message().contains(&addresses[0]), "{failure:?}");
    }

    /// A worker that speaks no gRPC: it sees what the router takes, and never answers a ping.
    #[tokio::test]
    async fn a_worker_is_told_the_windows_and_pinged_when_idle_until_it_is_lost() {
        const SETTINGS: u8 = 4;
        const PING: u8 = 6;
        const WINDOW_UPDATE: u8 = 8;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let settings = LinkSettings {
            connect_ms_max: 60_000,
            ping_interval_ms: 10,
            ping_timeout_ms: 10,
            ..LinkSettings::default()
        };
        let bad = RouterMetrics::new(&Registry::new()).records_bad.clone();
        let dialler = Dialler::new(settings, ClusterToken(None), 1, bad);
        let (client, accepted) = tokio::join!(dialler.dial_one(&address), listener.accept());
        // As long as it is held the connection is idle, not closed.
        let (_client, (mut stream, _)) = (client.unwrap(), accepted.unwrap());
        let mut preface = [0; 24];
        stream.read_exact(&mut preface).await.unwrap();
        stream.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await.unwrap();

        let (mut settings, mut window, mut pings) = (Vec::new(), 65_535, 0);
        while let Ok((kind, payload)) = frame(&mut stream).await {
            let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
            match kind {
                SETTINGS => settings.extend(payload.chunks(6).map(|one| (one[1], word(&one[2..])))),
                WINDOW_UPDATE => window += word(&payload),
                PING => pings += 1,
                _ => {}
            }
        }
        assert!(settings.contains(&(4, 64 << 10)), "the window of a stream: {settings:?}");
        assert!(settings.contains(&(6, 16 << 10)), "the header list: {settings:?}");
        assert_eq!((window, pings), ((1 << 31) - 1, 1));
    }
}
