//! What a listener tells every peer that it takes, and what becomes of one that floods it: HTTP/2 frames by hand, for no
//! client that is well behaved sends them.
//!
//! *Source*: RFC 9113, sections 4.1 and 6; RFC 7541, appendix A for the indexes of header fields.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::api::{Client, greedy, text_spec};
use super::process::Up;

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;
const END_HEADERS: u8 = 4;

struct Frame {
    kind: u8,
    payload: Vec<u8>,
}

/// A connection that has sent its preface.
fn connect(address: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("a preface");
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).expect("settings");
    stream
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The next frame; none where the peer closed the connection.
fn read(stream: &mut impl Read) -> Option<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).ok()?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut payload).ok()?;
    Some(Frame { kind: head[3], payload })
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}

/// tonic's own defaults are open: every limit is ours, on both listeners.
#[test]
fn a_listener_says_its_limits() {
    let up = Up::start(&[]);
    for address in [&up.public, &up.admin] {
        let mut stream = connect(address);
        let (mut settings, mut connection_window) = (Vec::new(), 65_535);
        while settings.is_empty() || connection_window == 65_535 {
            let frame = read(&mut stream).expect("it greets");
            match frame.kind {
                SETTINGS => settings.extend(
                    frame
                        .payload
                        .chunks(6)
                        .map(|setting| (u16::from_be_bytes([setting[0], setting[1]]), word(&setting[2..]))),
                ),
                WINDOW_UPDATE => connection_window += word(&frame.payload),
                _ => {}
            }
        }
        for (what, id, expected) in [
            ("concurrent streams", 3, 256),
            ("window of a stream", 4, 256 << 10),
            ("header list", 6, 16 << 10),
        ] {
            let said = settings.iter().find(|(its, _)| *its == id).map(|(_, value)| *value);
            assert_eq!(said, Some(expected), "{address}: {what}");
        }
        assert_eq!(connection_window, 4 << 20, "{address}");
    }
}

/// A peer that is gone without a word costs a connection for half a minute, on every listener.
#[test]
fn who_answers_no_ping_is_let_go() {
    let up = Up::start(&[]);
    let listeners = [&up.public, &up.admin, &up.workers[0]];
    let silent: Vec<_> = listeners.map(|address| connect(address)).into_iter().collect();
    for (address, mut stream) in listeners.into_iter().zip(silent) {
        let heard: Vec<u8> = std::iter::from_fn(|| read(&mut stream)).map(|frame| frame.kind).collect();
        let pings = heard.iter().filter(|kind| **kind == PING).count();
        // It closes the connection: nothing more would come before the read's own limit, which is an error too.
        let mut rest = [0];
        assert_eq!((pings, stream.read(&mut rest).ok()), (1, Some(0)), "{address}: {heard:?}");
    }
}

/// 20,000 calls that are each taken back at once: the connection is told to go away, and nobody else notices.
#[tokio::test]
async fn a_flood_of_resets_ends_its_connection_alone() {
    let up = Up::start(&[]);
    let client = Client::of(&up).await;
    let mut stream = connect(&up.public);
    let mut fields = vec![0x83, 0x86];
    for (index, value) in [(1, "localhost"), (4, "/petek.inference.v1.InferenceService/StreamGenerate")] {
        fields.extend([index, value.len() as u8]);
        fields.extend(value.as_bytes());
    }
    let mut flood = Vec::new();
    for call in 0..20_000 {
        flood.extend(frame(HEADERS, END_HEADERS, 2 * call + 1, &fields));
        flood.extend(frame(RST_STREAM, 0, 2 * call + 1, &8_u32.to_be_bytes()));
    }
    let mut answers = stream.try_clone().expect("its other half");
    let reader = std::thread::spawn(move || {
        let goaway = std::iter::from_fn(|| read(&mut answers)).find(|frame| frame.kind == GOAWAY);
        goaway.map(|frame| word(&frame.payload[4..8]))
    });
    // It is cut off before all of it is written.
    let _ = stream.write_all(&flood);
    assert_eq!(reader.join().expect("it reads"), Some(ENHANCE_YOUR_CALM));
    assert_eq!(client.both(text_spec("I have a dream", greedy(4))).await.ids().len(), 4);
}
