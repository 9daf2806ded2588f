//! A connection to etcd that a test can cut or freeze.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Up,
    Cut,
    Frozen,
}

/// Listens on a port of its own and passes everything on.
pub(crate) struct Proxy {
    address: String,
    mode: watch::Sender<Mode>,
    _task: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn to(target: String) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mode = watch::Sender::new(Mode::Up);
        let modes = mode.subscribe();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (modes, mut is_cut, target) = (modes.clone(), modes.clone(), target.clone());
                open.spawn(async move {
                    tokio::select! {
                        () = pass(client, target, modes) => {}
                        _ = is_cut.wait_for(|mode| *mode == Mode::Cut) => {}
                    }
                });
            }
        });
        Proxy { address, mode, _task: task }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Breaks all connections; new ones break at once.
    pub(crate) fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }

    /// Keeps all connections and lets nothing through.
    pub(crate) fn freeze(&self) {
        self.mode.send_replace(Mode::Frozen);
    }

    pub(crate) fn heal(&self) {
        self.mode.send_replace(Mode::Up);
    }
}

async fn pass(client: TcpStream, target: String, modes: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    // Or each small message would wait for the answer to the one before.
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(pump(from_client, to_server, modes.clone()), pump(from_server, to_client, modes));
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut modes: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if modes.wait_for(|mode| *mode != Mode::Frozen).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
    // The other side learns of the end.
    let _ = to.shutdown().await;
}
