//! From the registry to a router's list of workers: records become plain values, and a registry out of reach becomes a
//! stale list, never an empty one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use petek_cluster::WorkerState as RecordState;
use petek_cluster::{Registry, RegistryError, ViewEvent, ViewOptions, WorkerKey, WorkerRecord, WorkersView};
use petek_proto::worker::v1::WireRange;
use petek_service::RouterMetrics;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::feed::{Freshness, WorkerEntry, WorkerFeed, WorkerList, WorkerState};

/// Follows the registry's workers from now on, inside a tokio runtime. The list is empty and stale until the registry
/// was reached.
///
/// The task ends with an error where the registry cannot be used at all: it refuses us, or it was away for longer than
/// [`ViewOptions::wait`]. Dropping its handle lets it run on.
pub fn follow(
    registry: Arc<dyn Registry>,
    options: ViewOptions,
    metrics: Arc<RouterMetrics>,
) -> (WorkerFeed, JoinHandle<RegistryError>) {
    let (list, feed) = watch::channel(WorkerList::default());
    let task = tokio::spawn(async move {
        let mut view = match WorkersView::open(registry, options).await {
            Ok(view) => view,
            Err(error) => return error,
        };
        let mut known = Known::default();
        loop {
            // A view that is held never ends.
            let Some(event) = view.next().await else { return std::future::pending().await };
            known.learn(event, &metrics);
            list.send_replace(known.list());
        }
    });
    (feed, task)
}

/// What the events so far add up to.
#[derive(Default)]
struct Known {
    records: BTreeMap<WorkerKey, Arc<WorkerRecord>>,
    /// Those whose record does not read now: they finish what they have.
    bad: BTreeSet<WorkerKey>,
    freshness: Freshness,
}

impl Known {
    fn learn(&mut self, event: ViewEvent, metrics: &RouterMetrics) {
        match event {
            ViewEvent::Snapshot(records) => {
                self.records = records.into_iter().map(|record| (record.key(), record)).collect();
                self.freshness = Freshness::Current;
            }
            ViewEvent::Changed(record) => {
                self.bad.remove(&record.key());
                self.records.insert(record.key(), record);
            }
            ViewEvent::Removed(key) => {
                self.bad.remove(&key);
                self.records.remove(&key);
            }
            ViewEvent::Bad { key, worker, why } => {
                tracing::error!(key = %petek_service::escape(&key), %why, "a record that does not read");
                metrics.records_bad.inc();
                self.bad.extend(worker);
            }
            ViewEvent::Differed { keys } => {
                tracing::warn!(keys, "the registry's watch had not told everything");
                metrics.view_differences.inc();
            }
            ViewEvent::Stale { why } => {
                tracing::debug!(why, "the list of workers is stale");
                self.freshness = Freshness::Stale;
            }
            ViewEvent::Fresh => self.freshness = Freshness::Current,
        }
    }

    /// One entry per id: of two models' workers with one id the first by name counts.
    fn list(&self) -> WorkerList {
        let mut ids = BTreeSet::new();
        let mut workers = Vec::with_capacity(self.records.len());
        for (key, record) in &self.records {
            if ids.insert(&key.worker) {
                workers.push(entry(record, self.bad.contains(key)));
            } else {
                tracing::error!(worker = %key, "another model's worker has the same id: give each its own");
            }
        }
        WorkerList { workers, freshness: self.freshness }
    }
}

fn entry(record: &WorkerRecord, is_bad: bool) -> WorkerEntry {
    WorkerEntry {
        id: record.worker.clone(),
        epoch: record.epoch,
        addresses: record.addresses.clone(),
        name: record.name.clone(),
        revision: record.revision,
        text_hash: record.text_hash,
        numerics_id: record.numerics_id.clone(),
        block_size: record.block_size_tokens,
        hash_scheme: record.hash_scheme,
        context_tokens: record.context_tokens,
        blocks_total: record.blocks_total,
        tp: record.tp,
        roles: record.roles.iter().cloned().collect(),
        state: match record.state {
            RecordState::Loading => WorkerState::Loading,
            RecordState::Serving if !is_bad => WorkerState::Serving,
            RecordState::Serving | RecordState::Draining | RecordState::Unknown => WorkerState::Draining,
        },
        wire: WireRange { min: record.wire.min, max: record.wire.max },
        started_unix_ms: record.started_unix_ms,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use petek_cluster::RecordError;
    use petek_cluster::record::WireVersions;
    use petek_core::hash::Revision;
    use petek_core::ids::Epoch;
    use petek_service::Registry as Metrics;

    use super::*;

    fn record(name: &str, worker: &str, state: RecordState) -> Arc<WorkerRecord> {
        Arc::new(WorkerRecord {
            worker: worker.into(),
            epoch: Epoch(7),
            addresses: vec!["127.0.0.1:1".into()],
            name: name.into(),
            revision: Revision([1; 32]),
            text_hash: [2; 32],
            numerics_id: "n".into(),
            block_size_tokens: 32,
            hash_scheme: 1,
            context_tokens: 64,
            blocks_total: 8,
            tp: 1,
            roles: BTreeSet::from(["generate".into()]),
            adapters: vec![],
            state,
            wire: WireVersions { min: 1, max: 1 },
            started_unix_ms: 5,
        })
    }

    #[test]
    fn events_add_up_to_a_list() {
        let metrics = RouterMetrics::new(&Metrics::new());
        let mut known = Known::default();
        let mut check = |event: ViewEvent, workers: &[(&str, WorkerState)], freshness: Freshness| {
            let what = format!("{event:?}");
            known.learn(event, &metrics);
            let list = known.list();
            let got: Vec<_> = list.workers.iter().map(|entry| (&entry.id[..], entry.state)).collect();
            assert_eq!((&got[..], list.freshness), (workers, freshness), "{what}");
        };
        use Freshness::{Current, Stale};
        use WorkerState::{Draining, Loading, Serving};
        let of = |worker: &str, state| record("m", worker, state);
        let key = |worker: &str| WorkerKey { name: "m".into(), worker: worker.into() };
        let both = vec![of("a", RecordState::Serving), of("b", RecordState::Loading)];
        check(ViewEvent::Snapshot(both), &[("a", Serving), ("b", Loading)], Current);
        let serving = of("b", RecordState::Serving);
        check(ViewEvent::Changed(serving.clone()), &[("a", Serving), ("b", Serving)], Current);
        let why = RecordError::Malformed { why: "no JSON".into() };
        let bad = ViewEvent::Bad { key: "k".into(), worker: Some(key("b")), why };
        check(bad, &[("a", Serving), ("b", Draining)], Current);
        assert_eq!(metrics.records_bad.get(), 1);
        check(ViewEvent::Changed(serving), &[("a", Serving), ("b", Serving)], Current);
        check(ViewEvent::Stale { why: "away".into() }, &[("a", Serving), ("b", Serving)], Stale);
        check(ViewEvent::Changed(of("a", RecordState::Unknown)), &[("a", Draining), ("b", Serving)], Stale);
        check(ViewEvent::Fresh, &[("a", Draining), ("b", Serving)], Current);
        check(ViewEvent::Removed(key("a")), &[("b", Serving)], Current);
        // One id under two models: one of them is left out.
        let other = record("a-model", "b", RecordState::Draining);
        check(ViewEvent::Changed(other), &[("b", Draining)], Current);
    }
}
