//! The subscriptions to a worker's load and KV events, over a connection of their own, so that a fat step never
//! delays them. The load is the connection's pulse: when it ends, all of it is made anew.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use petek_proto::hello::WorkerIdentity;
use petek_proto::worker::v1::watch_load_response::Message as Load;
use petek_proto::worker::v1::{KvResume, LoadReport, WatchKvEventsRequest, WatchLoadRequest};
use petek_service::{KvBatchFate, KvChange, RouterMetrics};
use tokio::sync::SemaphorePermit;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Response, Status, Streaming};

use super::kv::{Relapse, Taken};
use super::session::STALL;
use super::{Client, Link, check_identity};
use crate::lock;

/// Keeps both subscriptions of a link until it is dismissed.
pub(super) async fn keep_subscribed(link: Arc<Link>) {
    let mut dismissed = link.dismissed.subscribe();
    tokio::select! {
        never = subscribe_again_and_again(&link) => match never {},
        _ = dismissed.wait_for(|dismissed| *dismissed) => {}
    }
}

async fn subscribe_again_and_again(link: &Link) -> Infallible {
    let settings = link.common.dialler.settings();
    let mut failures = 0;
    loop {
        let (reports, why) = subscribe(link).await;
        tracing::debug!(worker = %link.entry.id, reports, why, "load reports ended");
        failures = if reports > 0 { 1 } else { failures + 1 };
        sleep(pause(settings.retry_ms_min, settings.retry_ms_max, failures)).await;
    }
}

/// The first pause, doubled with each failure after the first one.
fn pause(ms_min: u64, ms_max: u64, failures: u32) -> Duration {
    let doubled = ms_min.saturating_mul(1 << failures.saturating_sub(1).min(32));
    Duration::from_millis(doubled.min(ms_max))
}

/// One connection. Returns how many reports came over it, and why no more do.
async fn subscribe(link: &Link) -> (u64, String) {
    let client = match link.dial().await {
        Ok(client) => client,
        Err(status) => return (0, status.message().to_owned()),
    };
    let mut reports = 0;
    let why = tokio::select! {
        why = watch_load(link, client.clone(), &mut reports) => why,
        never = watch_kv(link, client) => match never {},
    };
    (reports, why)
}

async fn watch_load(link: &Link, mut client: Client, reports: &mut u64) -> String {
    let ended = async {
        let silence = silence(link);
        let call = client.watch_load(WatchLoadRequest { hello: Some(link.hello()) });
        let mut stream = opened(call, silence).await?;
        let Some(Load::Hello(hello)) = next(&mut stream, silence).await?.message else {
            return Err("the first message must be a hello".into());
        };
        let identity = WorkerIdentity::try_from(hello);
        let checked = identity.and_then(|identity| check_identity(&link.entry, &identity));
        checked.map_err(|refusal| refusal.to_string())?;
        loop {
            match next(&mut stream, silence).await?.message {
                Some(Load::Report(report)) => take_report(link, report)?,
                Some(Load::Hello(_)) => return Err("it greeted twice".into()),
                // A newer worker's message that this version does not know.
                None => continue,
            }
            *reports += 1;
        }
    };
    let ended: Result<Infallible, String> = ended.await;
    match ended {
        Err(why) => why,
        Ok(never) => match never {},
    }
}

fn take_report(link: &Link, report: LoadReport) -> Result<(), String> {
    let rates = [report.step_s, report.step_one_more_s, report.prefill_tokens_per_s];
    if report.worker != link.entry.id || report.epoch != link.entry.epoch.0 {
        return Err("a report is of another worker or epoch".into());
    }
    if !rates.iter().all(|rate| rate.is_finite() && *rate >= 0.0) {
        return Err(format!("a report has rates that cannot be: {rates:?}"));
    }
    link.reported(report);
    Ok(())
}

/// Follows the worker's KV events, subscribing anew as often as it takes.
async fn watch_kv(link: &Link, client: Client) -> Infallible {
    let common = &link.common;
    let settings = common.dialler.settings();
    loop {
        let resume = lock(&link.kv).subscribe(&link.entry);
        // Whoever needs a snapshot waits in line for it, so that few of them are under way at once.
        let permit = match resume {
            None => common.snapshots.acquire().await.ok(),
            Some(_) => None,
        };
        let why = kv_stream(link, client.clone(), resume, permit).await;
        common.metrics.kv_relapses.of(why.cause()).inc();
        match &why {
            Relapse::Lost(_) | Relapse::Gap { .. } | Relapse::Behind(_) => {
                tracing::debug!(worker = %link.entry.id, %why, "KV events ended");
            }
            why => tracing::warn!(worker = %link.entry.id, %why, "the view of a worker's cache was wrong"),
        }
        let failures = {
            let mut kv = lock(&link.kv);
            kv.relapse(&common.index, &why);
            kv.failures()
        };
        link.change();
        sleep(pause(settings.retry_ms_min, settings.kv_retry_ms_max, failures)).await;
    }
}

/// One stream of KV events, to its end. The permit is held until a snapshot is whole.
async fn kv_stream(
    link: &Link,
    mut client: Client,
    resume: Option<KvResume>,
    permit: Option<SemaphorePermit<'_>>,
) -> Relapse {
    let mut permit = permit;
    let ended = async {
        let silence = silence(link);
        let call = client.watch_kv_events(WatchKvEventsRequest { hello: Some(link.hello()), resume });
        let mut stream = opened(call, silence).await.map_err(Relapse::Lost)?;
        loop {
            let message = next(&mut stream, silence).await.map_err(Relapse::Lost)?;
            let taken = lock(&link.kv).hear(&link.entry, &link.common.index, message)?;
            count(&link.common.metrics, taken);
            if taken.snapshots > 0 {
                permit = None;
                link.change();
            }
            // A worker that always has more to say must not keep others from their turn.
            consume_budget().await;
        }
    };
    let ended: Result<Infallible, Relapse> = ended.await;
    drop(permit);
    match ended {
        Err(why) => why,
        Ok(never) => match never {},
    }
}

fn count(metrics: &RouterMetrics, taken: Taken) {
    let Taken { batches, repeated, stored, removed, unknown, snapshots } = taken;
    metrics.kv_batches.of(KvBatchFate::Applied).inc_by(batches);
    metrics.kv_batches.of(KvBatchFate::Repeated).inc_by(repeated);
    metrics.kv_blocks.of(KvChange::Stored).inc_by(stored);
    metrics.kv_blocks.of(KvChange::Removed).inc_by(removed);
    metrics.kv_blocks.of(KvChange::Unknown).inc_by(unknown);
    metrics.kv_snapshots.inc_by(snapshots);
}

fn silence(link: &Link) -> Duration {
    Duration::from_millis(link.common.dialler.settings().silence_ms_max)
}

async fn opened<T>(
    call: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    silence: Duration,
) -> Result<Streaming<T>, String> {
    let answered = timeout(silence, call).await.map_err(|_| "it does not answer".to_owned())?;
    Ok(answered.map_err(|status| status.message().to_owned())?.into_inner())
}

async fn next<T>(stream: &mut Streaming<T>, silence: Duration) -> Result<T, String> {
    loop {
        let asked = Instant::now();
        return match timeout(silence, stream.message()).await {
            Ok(Ok(Some(message))) => Ok(message),
            Ok(Ok(None)) => Err("it ended the stream".into()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            // This process slept, and what the worker said meanwhile is about to be read.
            Err(_) if asked.elapsed() > silence + STALL => continue,
            Err(_) => Err(format!("it said nothing for {} ms", silence.as_millis())),
        };
    }
}
