//! What routers subscribe to: the load, and the changes of the prefix cache. A task per subscriber reads at its own
//! pace what the engine leaves behind; a slow one sees less of the load and, in the end, has to resume the events.

use std::sync::Arc;

use petek_core::refusal::Refusal;
use petek_proto::blocks::{SNAPSHOT_PAGE_BLOCKS_MAX, write_names};
use petek_proto::refusal::WireRefusal;
use petek_proto::worker::v1::watch_kv_events_response::Body;
use petek_proto::worker::v1::watch_load_response::Message as LoadMessage;
use petek_proto::worker::v1::{
    KvHeartbeat, KvResume, KvSnapshotPage, WatchKvEventsResponse, WatchLoadResponse,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tonic::Status;

use super::{Context, ENGINE_GONE, Stop, lost, ms};
use crate::engine::Command;
use crate::kv_feed::{KvNext, KvSnapshot};

type Out<T> = mpsc::Sender<Result<T, Status>>;

/// Sends; a reader that is gone is noticed by whoever runs this.
async fn send<T>(out: &Out<T>, message: T) {
    let _ = out.send(Ok(message)).await;
}

/// On change, but no more often than the one interval, and without change as often as the other.
pub(super) async fn load(context: Arc<Context>, out: Out<WatchLoadResponse>) -> Result<(), Stop> {
    let say = |message| WatchLoadResponse { message: Some(message) };
    send(&out, say(LoadMessage::Hello(context.hello.clone()))).await;
    let settings = &context.settings.feed;
    let (mut report, mut phase) = (context.engine.report.clone(), context.phase.subscribe());
    loop {
        let state = phase.borrow_and_update().state();
        let now = (context.engine.clock)();
        let load = report.borrow_and_update().load_report(&context.hello.worker, context.epoch, state, now);
        send(&out, say(LoadMessage::Report(load))).await;
        let sent = Instant::now();
        sleep_until(sent + ms(settings.load_interval_ms_min)).await;
        tokio::select! {
            changed = report.changed() => changed.map_err(|_| lost(ENGINE_GONE))?,
            _ = phase.changed() => {}
            () = sleep_until(sent + ms(settings.load_interval_ms_max)) => {}
        }
    }
}

/// What changed since a batch that the router has, or all that is held and what changes then.
pub(super) async fn kv_events(
    context: Arc<Context>,
    resume: Option<KvResume>,
    out: Out<WatchKvEventsResponse>,
) -> Result<(), Stop> {
    let say = |seq, body| WatchKvEventsResponse {
        worker: context.hello.worker.clone(),
        epoch: context.epoch.0,
        seq,
        body: Some(body),
    };
    let kv = &context.engine.kv;
    let mut last_seq = kv.last_seq();
    send(&out, say(kv.held().seq, Body::Hello(context.hello.clone()))).await;

    let resumed = resume.filter(|resume| resume.epoch == context.epoch.0).map(|resume| resume.after_seq);
    let mut sent = match resumed.filter(|after| kv.next(*after) != KvNext::Gone) {
        Some(after) => after,
        None => {
            let KvSnapshot { seq, blocks } = snapshot(&context).await?;
            let pages = blocks.chunks(SNAPSHOT_PAGE_BLOCKS_MAX);
            // Nothing held is one empty page.
            let count = pages.len().max(1);
            for page in 0..count {
                let blocks = pages.clone().nth(page).unwrap_or_default();
                let page = KvSnapshotPage {
                    page: page as u32,
                    last: page + 1 == count,
                    parents: write_names(blocks.iter().map(|(parent, _)| *parent)),
                    blocks: write_names(blocks.iter().map(|(_, block)| *block)),
                };
                send(&out, say(seq, Body::Page(page))).await;
            }
            seq
        }
    };

    let beat = ms(context.settings.feed.kv_heartbeat_interval_ms);
    let mut beat = interval_at(Instant::now() + beat, beat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        last_seq.mark_unchanged();
        match kv.next(sent) {
            KvNext::Batch(seq, batch) => {
                send(&out, say(seq, Body::Batch(batch))).await;
                sent = seq;
            }
            KvNext::Gone => return Err(too_slow().into()),
            KvNext::CaughtUp(held) => tokio::select! {
                changed = last_seq.changed() => changed.map_err(|_| lost(ENGINE_GONE))?,
                _ = beat.tick() => {
                    // Of the batch that this router has, whatever came since.
                    let body = KvHeartbeat {
                        blocks_held: held.blocks,
                        digest: held.digest.to_vec().into(),
                    };
                    send(&out, say(held.seq, Body::Heartbeat(body))).await;
                }
            },
        }
    }
}

async fn snapshot(context: &Context) -> Result<KvSnapshot, Status> {
    let (asks, answer) = oneshot::channel();
    context.engine.commands.send(Command::Snapshot(asks)).await.map_err(|_| lost(ENGINE_GONE))?;
    answer.await.map_err(|_| lost(ENGINE_GONE))
}

/// The ring has moved past what the subscriber has read: it subscribes again and gets a snapshot.
fn too_slow() -> Status {
    let refusal = WireRefusal::from(&Refusal::SlowConsumer { waiting_bytes: 0, waited_ms: 0 });
    let message = "the events after the last one read are not kept any more; subscribe again".into();
    WireRefusal { message, metadata: Default::default(), ..refusal }.into()
}
