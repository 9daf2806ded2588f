//! How long a client's connection lasts.

use std::time::{Duration, Instant};

use petek_proto::inference::v1::StreamGenerateRequest;
use petek_proto::refusal::WireRefusal;
use petek_proto::worker::v1 as worker;
use petek_router::RouterSettings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::params;
use crate::support::{Cluster, EOS, Read, Script, Worker, X, settings, soon, spec};

/// [0xMiden/node#2273] The age of a connection never cuts what runs on it.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_finishes_its_streams() {
    let mut workers = [Worker::start("w0", Script::Silent)];
    let young = Duration::from_millis(10);
    let settings = RouterSettings { connection_age_ms: young.as_millis() as u64, ..settings() };
    let cluster = Cluster::start(settings, &workers).await;
    let mut client = cluster.client().await;
    let asked = StreamGenerateRequest { spec: Some(spec(&[8], params())) };
    let mut events = client.stream_generate(asked).await.unwrap().into_inner();
    let (submit, reply) = workers[0].submit().await;
    reply.admit(submit.dispatch);
    let mut read = Read::default();
    read.take(events.message().await.unwrap().unwrap().event.unwrap());
    let (begun, mut at) = (Instant::now(), 0);
    while begun.elapsed() < 10 * young {
        reply.tokens(submit.dispatch, 0, at, &[X]);
        read.take(soon(events.message()).await.unwrap().unwrap().event.unwrap());
        at += 1;
        // Paced: an unhurried stream of far fewer tokens than the context has.
        tokio::time::sleep(young / 10).await;
    }
    reply.tokens(submit.dispatch, 0, at, &[EOS]);
    reply.finish(submit.dispatch, 0, worker::FinishReason::StopEos);
    while let Some(response) = soon(events.message()).await.unwrap() {
        read.take(response.event.unwrap());
    }
    assert_eq!(read.ids().len() as u32, at + 1);
    // Another call goes over another connection, to the same worker over the same stream. Connections are so young
    // here that one may go away just as a call is put on it: then the client's transport says so, and it is asked
    // again, as clients do.
    let other = soon(async {
        loop {
            let asked = StreamGenerateRequest { spec: Some(spec(&[9], params())) };
            match client.stream_generate(asked).await {
                Ok(response) => break response,
                Err(status) => {
                    assert!(WireRefusal::read(&status).is_none(), "the router refused it: {status:?}")
                }
            }
        }
    });
    let _other = other.await;
    assert_eq!(workers[0].submit().await.0.dispatch, submit.dispatch + 1);
}

/// One without a call is asked to go away, and closed. Spoken to in frames, for a client's library would hide it.
/// *Source*: RFC 9113, sections 4.1, 6.7 and 6.8.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed() {
    const PING: u8 = 6;
    const GO_AWAY: u8 = 7;
    const ACK: u8 = 1;
    let settings = RouterSettings { connection_idle_ms: 50, ..settings() };
    let cluster = Cluster::start_unready(settings, vec![]).await;
    let mut connection = TcpStream::connect(cluster.router.public_address()).await.unwrap();
    let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    connection
        .write_all(&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &empty_settings].concat())
        .await
        .unwrap();
    let mut went_away = false;
    soon(async {
        let mut head = [0; 9];
        while connection.read_exact(&mut head).await.is_ok() {
            let [a, b, c, kind, flags, ..] = head;
            let mut body = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            connection.read_exact(&mut body).await.unwrap();
            went_away |= kind == GO_AWAY;
            if kind == PING && flags & ACK == 0 {
                let answer = [&[0, 0, 8, PING, ACK, 0, 0, 0, 0][..], &body].concat();
                connection.write_all(&answer).await.unwrap();
            }
        }
    })
    .await;
    assert!(went_away, "it is told before");
}
