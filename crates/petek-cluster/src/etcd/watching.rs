//! A watch that never just falls silent. etcd says that a watch is over in many ways, and then keeps its stream open
//! for ever: each way is read here and becomes a [`WatchEnd`].

use etcd_client::{Client, Error, EventType, WatchOptions, WatchResponse, WatchStream};
use futures::stream::{self, StreamExt};

use super::failure::{Failure, classify, is_login_wrong};
use super::links::{Links, Login};
use super::{entry, prefix_end};
use crate::registry::{Change, Changes, RegistryError, RegistryRevision, Watch, WatchEnd};

/// Watches all keys of `prefix` from the revision after `after`.
pub(super) async fn watch(links: &Links, prefix: &str, after: RegistryRevision) -> Result<Watch, WatchEnd> {
    let options = WatchOptions::new()
        .with_range(prefix_end(prefix))
        .with_start_revision(after.0 + 1)
        // A message now and then although nothing happens, so that the last known revision does not grow old.
        .with_progress_notify()
        // A long absence may be more than one message can hold.
        .with_fragment();
    let (stream, created) =
        links.call(Login::Again, |client| created(client, prefix, options.clone())).await?;
    let endpoint = links.endpoints().to_string();
    if let Some(end) = end_of(&endpoint, &created) {
        return Err(end);
    }
    let revision = created.header().map_or(0, |header| header.revision());
    if revision < after.0 {
        // Such a watch never says a word: the server is waiting for a future that was the past.
        let why =
            format!("etcd is at revision {revision}, we know {}: it lost data or was restored", after.0);
        return Err(WatchEnd::ListAgain(why));
    }
    let watch = stream::unfold(Some((stream, after, endpoint)), |watching| async move {
        let (mut stream, mut told, endpoint) = watching?;
        let next = next(&mut stream, &mut told, &endpoint).await;
        let rest = next.is_ok().then_some((stream, told, endpoint));
        Some((next, rest))
    });
    Ok(watch.boxed())
}

/// Opens the stream and waits for the server's word on it.
async fn created(
    mut client: Client,
    prefix: &str,
    options: WatchOptions,
) -> Result<(WatchStream, WatchResponse), Error> {
    let mut stream = client.watch(prefix, Some(options)).await?;
    match stream.message().await? {
        Some(first) => Ok((stream, first)),
        None => Err(Error::WatchError("the stream ended before the watch stood".into())),
    }
}

async fn next(
    stream: &mut WatchStream,
    told: &mut RegistryRevision,
    endpoint: &str,
) -> Result<Changes, WatchEnd> {
    let away = |why| RegistryError::Away { endpoint: endpoint.into(), why };
    let message = match stream.message().await {
        Ok(Some(message)) => message,
        Ok(None) => return Err(away("the watch's stream ended".into()).into()),
        // Whatever broke a stream, opening the next one shows what it means.
        Err(error) => {
            return Err(match classify(endpoint, &error) {
                Failure::Final(RegistryError::Unable { why, .. }) => WatchEnd::ListAgain(why),
                Failure::Final(error) => error.into(),
                Failure::TokenOld(why) => away(why).into(),
                Failure::AuthOff => away("authentication is not enabled".into()).into(),
            });
        }
    };
    if let Some(end) = end_of(endpoint, &message) {
        return Err(end);
    }
    let mut list = Vec::new();
    for event in message.events() {
        let Some(change) = event.kv().and_then(entry) else { continue };
        list.push(match event.event_type() {
            EventType::Put => Change::Put(change),
            EventType::Delete => Change::Deleted { key: change.key, revision: change.revision },
        });
    }
    // A fragment's header is ahead of its events. Without events the header is the server's word that all is told.
    let revision = match list.last() {
        Some(Change::Put(entry)) => entry.revision,
        Some(Change::Deleted { revision, .. }) => *revision,
        None => RegistryRevision(message.header().map_or(0, |header| header.revision())),
    };
    *told = revision.max(*told);
    Ok(Changes { list, revision: *told })
}

/// Whether this message says that the watch is over.
fn end_of(endpoint: &str, message: &WatchResponse) -> Option<WatchEnd> {
    let why = message.cancel_reason();
    if message.compact_revision() > 0 {
        return Some(WatchEnd::ListAgain(format!("compacted up to revision {}", message.compact_revision())));
    }
    if !message.canceled() {
        return None;
    }
    if is_login_wrong(why) {
        return Some(RegistryError::Denied { endpoint: endpoint.into(), why: why.into() }.into());
    }
    let why = if why.is_empty() { "no reason given" } else { why };
    Some(WatchEnd::ListAgain(format!("etcd cancelled the watch: {why}")))
}
