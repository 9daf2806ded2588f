//! What a worker tells routers beside their requests: load, cache, model card.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};

use petek_core::hash::BlockName;
use petek_core::limits::link::CARD_CHUNK_BYTES_MAX;
use petek_core::refusal::Reason;
use petek_core::scheduler::SchedulerConfig;
use petek_proto::blocks::{read_name, read_names};
use petek_proto::hello::WorkerIdentity;
use petek_proto::worker::v1::get_model_card_response::Message as Card;
use petek_proto::worker::v1::kv_event::Kind;
use petek_proto::worker::v1::watch_kv_events_response::Body;
use petek_proto::worker::v1::watch_load_response::Message as Load;
use petek_proto::worker::v1::{
    GetModelCardRequest, KvResume, LoadReport, WatchKvEventsRequest, WatchKvEventsResponse, WatchLoadRequest,
    WatchLoadResponse, WorkerState,
};
use petek_text::{CardFile, ModelCard};
use petek_worker::{FeedSettings, WorkerSettings};
use tonic::{Status, Streaming};

use super::support::{Ask, Client, EPOCH, House, REVISION, Shape, TOKEN, client, hello, refusal, soon};

/// A router's view of the cache, as plain as can be.
#[derive(Default)]
struct View {
    held: HashSet<BlockName>,
    seq: u64,
    pages: u32,
    batches: u64,
    snapshots: u64,
    heartbeats: u64,
}

impl View {
    fn digest(&self) -> [u8; 16] {
        self.held.iter().fold([0; 16], |sum, name| std::array::from_fn(|at| sum[at] ^ name.0[at]))
    }

    fn take(&mut self, message: WatchKvEventsResponse) {
        assert_eq!(message.epoch, EPOCH.0);
        match message.body.unwrap() {
            Body::Hello(_) => panic!("it greeted twice"),
            Body::Page(page) => {
                if page.page == 0 {
                    self.held.clear();
                    self.pages = 0;
                    self.seq = message.seq;
                }
                assert_eq!(
                    (page.page, message.seq),
                    (self.pages, self.seq),
                    "pages of one snapshot, in order"
                );
                for (parent, block) in page.pairs().unwrap() {
                    assert!(parent == BlockName::ROOT || self.held.contains(&parent), "a parent is missing");
                    assert!(self.held.insert(block));
                }
                self.pages += 1;
                self.snapshots += u64::from(page.last);
            }
            Body::Batch(batch) => {
                assert_eq!(message.seq, self.seq + 1, "a gap");
                assert!((1..=256).contains(&batch.check().unwrap()));
                self.seq = message.seq;
                self.batches += 1;
                for event in batch.events {
                    match event.kind.unwrap() {
                        Kind::Stored(stored) => {
                            let parent = read_name("parent", &stored.parent).unwrap();
                            assert!(
                                parent == BlockName::ROOT || self.held.contains(&parent),
                                "a parent is missing"
                            );
                            for block in read_names("blocks", &stored.blocks).unwrap() {
                                assert!(self.held.insert(block), "stored twice");
                            }
                        }
                        Kind::Removed(removed) => {
                            for block in read_names("blocks", &removed.blocks).unwrap() {
                                assert!(self.held.remove(&block), "removed what was not there");
                            }
                        }
                        Kind::Cleared(_) => self.held.clear(),
                    }
                }
            }
            Body::Heartbeat(heartbeat) => {
                assert_eq!(message.seq, self.seq, "a heartbeat is of the last batch");
                assert_eq!(heartbeat.blocks_held, self.held.len() as u64);
                assert_eq!(heartbeat.digest[..], self.digest());
                self.heartbeats += 1;
            }
        }
    }

    /// Reads until it has what the worker has, and has heard so.
    async fn catch_up(&mut self, house: &House, stream: &mut Streaming<WatchKvEventsResponse>) {
        let status = house.at_rest().await;
        let before = self.heartbeats;
        while self.seq < status.kv_seq || self.heartbeats == before {
            self.take(soon(stream.message()).await.unwrap().unwrap());
        }
        assert_eq!(self.seq, status.kv_seq);
        // The engine's own pool, not what was made of its events on the way here.
        assert_eq!(
            (self.held.len() as u32, &self.digest()[..]),
            (status.blocks_cached, &status.kv_digest[..])
        );
    }

    fn resume(&self) -> Option<KvResume> {
        Some(KvResume { epoch: EPOCH.0, after_seq: self.seq })
    }
}

async fn watch(client: &mut Client, resume: Option<KvResume>) -> Streaming<WatchKvEventsResponse> {
    let request = WatchKvEventsRequest { hello: Some(hello(1)), resume };
    let mut stream = soon(client.watch_kv_events(request)).await.unwrap().into_inner();
    let first = soon(stream.message()).await.unwrap().unwrap();
    let Some(Body::Hello(hello)) = first.body else { panic!("it greets first, not with {first:?}") };
    assert_eq!(WorkerIdentity::try_from(hello).unwrap().epoch, EPOCH);
    stream
}

/// Requests whose blocks push each other out of a small cache.
async fn traffic(house: &House, requests: u32, from: u32) {
    let mut router = house.router(9).await;
    for at in from..from + requests {
        let prompt: Vec<u32> = (0..20 + (at * 37) % 120).map(|i| (at % 9 + i / 3) % 50).collect();
        let mut ask = Ask::new(&prompt, 1 + at % 30);
        ask.raw.n = Some(1 + i64::from(at % 3));
        router.submit(&house.shape, &ask).await;
    }
    router.finish().await;
}

#[tokio::test]
async fn events_give_what_the_pool_holds_over_gaps_and_resumes() {
    for steps_in_flight in [1, 2] {
        let shape = Shape::default();
        // A batch per step, so that there are many.
        let feed = FeedSettings { kv_batch_ms_max: 0, ..shape.settings.feed.clone() };
        let settings = WorkerSettings { steps_in_flight, feed, ..shape.settings.clone() };
        // Small, so that nearly every plan evicts something.
        let scheduler = SchedulerConfig { blocks: 32, ..shape.scheduler.clone() };
        let house = Shape { settings, scheduler, ..shape }.start().await;
        let mut client = house.client().await;
        let mut view = View::default();
        // From the empty cache on, and in the middle of everything.
        let mut stream = watch(&mut client, None).await;
        traffic(&house, 30, 0).await;
        // Snapshots as long as steps are under way; the last of these views goes on.
        let is_over = Cell::new(false);
        let joining = async {
            loop {
                let (mut view, mut stream) = (View::default(), watch(&mut client, None).await);
                while view.snapshots == 0 {
                    view.take(soon(stream.message()).await.unwrap().unwrap());
                }
                if is_over.get() {
                    return (view, stream);
                }
            }
        };
        let busy = async {
            traffic(&house, 100, 30).await;
            is_over.set(true);
        };
        let ((mut late, mut late_stream), ()) = tokio::join!(joining, busy);
        view.catch_up(&house, &mut stream).await;
        late.catch_up(&house, &mut late_stream).await;
        assert!(view.batches > 20 && late.snapshots == 1, "{} batches", view.batches);
        assert_eq!((view.seq, view.digest(), view.snapshots), (late.seq, late.digest(), 1));

        // Away for a while, and on from where it was.
        drop(stream);
        traffic(&house, 40, 200).await;
        let mut stream = watch(&mut client, view.resume()).await;
        view.catch_up(&house, &mut stream).await;
        assert_eq!(view.snapshots, 1, "what was missed is in the ring");

        // What is not to be had: another epoch, and a batch that never was.
        for resume in
            [KvResume { epoch: 5, after_seq: view.seq }, KvResume { epoch: EPOCH.0, after_seq: view.seq + 1 }]
        {
            let mut other = View::default();
            let mut stream = watch(&mut client, Some(resume)).await;
            other.catch_up(&house, &mut stream).await;
            assert_eq!((other.snapshots, other.digest()), (1, view.digest()));
        }
    }
}

#[tokio::test]
async fn a_ring_that_is_too_short_means_a_snapshot_and_a_slow_subscriber_is_told_to_come_again() {
    let shape = Shape::default();
    // A batch per step, so that there are more than the ring holds.
    let feed = FeedSettings {
        kv_ring_batches: 4,
        watch_queue: 1,
        kv_batch_ms_max: 0,
        ..shape.settings.feed.clone()
    };
    let house = Shape { settings: WorkerSettings { feed, ..shape.settings.clone() }, ..shape }.start().await;
    let mut client_of = house.client().await;
    let mut view = View::default();
    let mut stream = watch(&mut client_of, None).await;
    view.catch_up(&house, &mut stream).await;
    drop(stream);
    traffic(&house, 60, 0).await;
    let mut stream = watch(&mut client_of, view.resume()).await;
    view.catch_up(&house, &mut stream).await;
    assert_eq!(view.snapshots, 2);

    let narrow = house
        .channel_with(|endpoint| {
            endpoint.initial_stream_window_size(1_024).initial_connection_window_size(65_535)
        })
        .await;
    let mut slow = watch(&mut client(narrow, Some(TOKEN)), view.resume()).await;
    let mut from = 1_000;
    let end = loop {
        // It reads nothing while the ring moves on, round by round, until it has missed some.
        traffic(&house, 200, from).await;
        from += 200;
        let read = async {
            loop {
                match soon(slow.message()).await {
                    Ok(Some(WatchKvEventsResponse { body: Some(Body::Heartbeat(_)), .. })) => return None,
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("it ends with a reason"),
                    Err(status) => return Some(status),
                }
            }
        };
        if let Some(end) = read.await {
            break end;
        }
    };
    assert_eq!(refusal(&end).known_reason(), Some(Reason::SlowConsumer), "{end}");
    assert!(end.message().contains("subscribe again"), "{end}");
    let mut stream = watch(&mut client_of, view.resume()).await;
    view.catch_up(&house, &mut stream).await;
    assert_eq!(view.snapshots, 3);
}

/// A snapshot of more blocks than a page names.
#[tokio::test]
async fn a_large_snapshot_comes_in_pages() {
    let shape = Shape::default();
    let scheduler =
        SchedulerConfig { blocks: 70_000, step_rows: 16_384, slots: 16, ..shape.scheduler.clone() };
    let house = Shape { scheduler, ..shape }.start().await;
    let mut router = house.router(1).await;
    for at in 0..50 {
        let prompt: Vec<u32> = (0..1_400 * 16).map(|i| if i == 0 { at } else { i % 50 }).collect();
        router.submit(&house.shape, &Ask::new(&prompt, 1)).await;
    }
    router.finish().await;
    let mut view = View::default();
    let mut stream = watch(&mut house.client().await, None).await;
    view.catch_up(&house, &mut stream).await;
    assert!(view.held.len() > 65_536, "{}", view.held.len());
    assert_eq!((view.pages, view.snapshots, view.batches), (2, 1, 0));
}

async fn report(stream: &mut Streaming<WatchLoadResponse>) -> LoadReport {
    let message = soon(stream.message()).await.unwrap().unwrap().message;
    let Some(Load::Report(report)) = message else { panic!("a report, not {message:?}") };
    report.check().unwrap();
    assert_eq!((&report.worker[..], report.epoch), ("w1", EPOCH.0));
    report
}

async fn watch_load(client: &mut Client) -> Streaming<WatchLoadResponse> {
    let mut stream =
        soon(client.watch_load(WatchLoadRequest { hello: Some(hello(1)) })).await.unwrap().into_inner();
    let first = soon(stream.message()).await.unwrap().unwrap().message;
    assert!(matches!(first, Some(Load::Hello(_))), "{first:?}");
    stream
}

#[tokio::test]
async fn a_report_says_which_dispatches_it_includes() {
    let house = Shape::default().start().await;
    let mut stream = watch_load(&mut house.client().await).await;
    let idle = report(&mut stream).await;
    assert_eq!((idle.state(), idle.blocks_total, idle.blocks_free), (WorkerState::Serving, 64, 64));
    assert!(idle.prefill_tokens_per_s > 0.0 && idle.step_one_more_s > idle.step_s && idle.step_s > 0.0);
    assert!(idle.routers.is_empty());

    // Stopped before its first step: what waits is what was sent, no more and no less.
    house.gate.allow(0);
    let mut first = house.router(11).await;
    first.submit(&house.shape, &Ask::new(&[5; 100], 30)).await;
    let waiting = loop {
        let report = report(&mut stream).await;
        if report.routers.first().is_some_and(|router| router.dispatch == 1) {
            break report;
        }
    };
    assert_eq!((waiting.waiting_tokens, waiting.waiting, waiting.running), (100, 1, 0));
    house.gate.open();

    let mut second = house.router(22).await;
    for at in 0..40 {
        first.submit(&house.shape, &Ask::new(&[at; 30], 30)).await;
        second.submit(&house.shape, &Ask::new(&[at; 50], 30)).await;
    }
    let mut highest = BTreeMap::new();
    loop {
        let report = report(&mut stream).await;
        for router in &report.routers {
            let before = highest.insert((router.router_id, router.stream), router.dispatch).unwrap_or(0);
            assert!(before <= router.dispatch, "a report takes nothing back");
        }
        let seen = |router: u64| highest.get(&(router, 1)).copied().unwrap_or(0);
        if (seen(11), seen(22)) == (41, 40) {
            break;
        }
    }
    first.finish().await;
    second.finish().await;
    // A router that is gone is in no report, and idle is what it was.
    drop((first, second));
    loop {
        let report = report(&mut stream).await;
        if report.routers.is_empty() && report.running == 0 {
            assert_eq!((report.waiting_tokens, report.waiting, report.blocks_free), (0, 0, 64));
            break;
        }
    }
}

#[tokio::test]
async fn there_are_only_so_many_subscriptions() {
    let shape = Shape::default();
    let feed = FeedSettings { watchers_max: 1, ..shape.settings.feed.clone() };
    let house = Shape { settings: WorkerSettings { feed, ..shape.settings.clone() }, ..shape }.start().await;
    let mut client = house.client().await;
    let stream = watch_load(&mut client).await;
    let full: Status =
        soon(client.watch_load(WatchLoadRequest { hello: Some(hello(1)) })).await.expect_err("refused");
    assert_eq!((full.code(), refusal(&full).retry_ms), (tonic::Code::ResourceExhausted, Some(1_000)));
    drop(stream);
    let again =
        async { while client.watch_load(WatchLoadRequest { hello: Some(hello(1)) }).await.is_err() {} };
    soon(again).await;
}

#[tokio::test]
async fn a_card_comes_whole_in_bounded_chunks() {
    let mut card = ModelCard::default();
    card.insert(CardFile::Config, b"{\"vocab_size\": 50}".to_vec());
    card.insert(CardFile::Tokenizer, (0..2_600_000u32).map(|i| (i % 251) as u8).collect());
    card.insert(CardFile::TokenizerConfig, Vec::new());
    let house = Shape { card: card.clone(), ..Shape::default() }.start().await;
    let mut client = house.client().await;
    let request = GetModelCardRequest { hello: Some(hello(1)) };
    let mut stream = soon(client.get_model_card(request)).await.unwrap().into_inner();
    let first = soon(stream.message()).await.unwrap().unwrap().message;
    let Some(Card::Header(header)) = first else { panic!("{first:?}") };
    assert_eq!((&header.name[..], &header.aliases[..]), ("fake", &["alias".to_owned()][..]));
    assert_eq!(
        (&header.revision[..], &header.text_hash[..]),
        (&REVISION.0[..], &card.text_hash().as_bytes()[..])
    );
    let mut files = vec![Vec::new(); header.files.len()];
    let mut chunks = 0;
    while let Some(response) = soon(stream.message()).await.unwrap() {
        let Some(Card::Chunk(chunk)) = response.message else { panic!("a chunk") };
        let file = &mut files[chunk.file as usize];
        assert_eq!(chunk.offset_bytes, file.len() as u64);
        assert!((1..=CARD_CHUNK_BYTES_MAX).contains(&chunk.data.len()));
        file.extend_from_slice(&chunk.data);
        chunks += 1;
    }
    assert_eq!(chunks, 4);
    let mut back = ModelCard::default();
    for (file, bytes) in header.files.iter().zip(files) {
        assert_eq!(file.length_bytes, bytes.len() as u64);
        assert_eq!(file.blake3[..], blake3::hash(&bytes).as_bytes()[..]);
        back.insert(CardFile::of(&file.name).unwrap(), bytes);
    }
    assert_eq!(back.text_hash(), card.text_hash());
}
