//! What a router knows of its cluster's workers, as plain data: changes and listings go in, events come out.
//!
//! A record that vanishes is not yet a dead worker. Leases end during an outage of the registry too, and an emptied
//! registry has no records at all. So a worker that was serving stays in the view for a grace, in which it can
//! register again; one that said it was draining, or never served, leaves at once. A worker that really died is
//! found by the router's own health checks long before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::record::{Cluster, RecordError, WorkerKey, WorkerRecord, WorkerState};
use crate::registry::{Change, Changes, ENTRIES_MAX, Entry, Listing, RegistryRevision};

/// What a router is told. A [`Snapshot`](ViewEvent::Snapshot) comes first and only then; all else are changes to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewEvent {
    /// All workers, by name and id.
    Snapshot(Vec<Arc<WorkerRecord>>),
    /// A worker that came, or whose record changed, or reads again after it was [`Bad`](ViewEvent::Bad).
    Changed(Arc<WorkerRecord>),
    /// A worker left: it had drained, or its record stayed away.
    Removed(WorkerKey),
    /// A value that is no record, to be counted; each is told once, but those beyond a view's bound with each listing.
    Bad {
        /// Where it stands.
        key: String,
        /// The worker of this view that it belongs to: no new work for it until its record reads again. What it runs
        /// goes on.
        worker: Option<WorkerKey>,
        /// What is wrong with it.
        why: RecordError,
    },
    /// A full list differed from what the watch had told, to be counted. The view is right again: the events beside
    /// this one say how.
    Differed {
        /// In how many keys.
        keys: usize,
    },
    /// The registry is out of reach: the view stays as it is.
    Stale {
        /// What happened.
        why: String,
    },
    /// The registry is back, and what changed meanwhile has been told or follows.
    Fresh,
}

/// The workers of one cluster, as far as the registry has told.
#[derive(Debug)]
pub(crate) struct View {
    cluster: Cluster,
    grace: Duration,
    held: BTreeMap<String, Held>,
    position: RegistryRevision,
    /// A listing that the watch still has time to catch up with.
    expected: Option<Listing>,
}

/// What is known of a key. Nothing of it is older than `revision`.
#[derive(Debug)]
struct Held {
    revision: RegistryRevision,
    /// The last one that read.
    record: Option<Arc<WorkerRecord>>,
    /// Whether what stands there now does not read.
    is_bad: bool,
    /// When the key vanished.
    lapsed: Option<Instant>,
}

impl View {
    /// Nobody is known yet.
    pub(crate) fn new(cluster: Cluster, grace: Duration) -> Self {
        View { cluster, grace, held: BTreeMap::new(), position: RegistryRevision::default(), expected: None }
    }

    /// Up to where the registry's changes are known. Never goes back, but where the registry itself was set back.
    pub(crate) fn position(&self) -> RegistryRevision {
        self.position
    }

    /// The first listing: a snapshot, and what in it is bad.
    pub(crate) fn begin(&mut self, listing: Listing, now: Instant) -> Vec<ViewEvent> {
        let mut events = self.resync(listing, now);
        events.retain(|event| matches!(event, ViewEvent::Bad { .. }));
        let records = self.held.values().filter_map(|held| held.record.clone()).collect();
        events.insert(0, ViewEvent::Snapshot(records));
        events
    }

    /// A listing that holds whatever the watch had said: none is running.
    ///
    /// Where its revision lies before what is known, the registry lost its data or was restored: another history
    /// begins, and revisions of the old one mean nothing any more.
    pub(crate) fn resync(&mut self, listing: Listing, now: Instant) -> Vec<ViewEvent> {
        self.expected = None;
        if listing.revision < self.position {
            self.held.values_mut().for_each(|held| held.revision = RegistryRevision::default());
        }
        self.position = listing.revision;
        self.adopt(listing, now).0
    }

    /// What the watch tells.
    pub(crate) fn apply(&mut self, changes: Changes, now: Instant) -> Vec<ViewEvent> {
        let mut events = Vec::new();
        for change in changes.list {
            match change {
                Change::Put(entry) => {
                    self.put(entry, &mut events);
                }
                Change::Deleted { key, revision } => {
                    if let Some(expected) = &mut self.expected {
                        expected.entries.retain(|entry| entry.key != key || entry.revision > revision);
                    }
                    self.vanish(&key, revision, now, &mut events);
                }
            }
        }
        self.position = self.position.max(changes.revision);
        events
    }

    /// Takes a listing that was made beside the running watch. The watch may be behind it by a little:
    /// [`settle`](Self::settle) compares later.
    pub(crate) fn expect(&mut self, listing: Listing) {
        self.expected = Some(listing);
    }

    /// Holds the listing of [`expect`](Self::expect) against what the watch has told by now, and makes good what it
    /// missed.
    pub(crate) fn settle(&mut self, now: Instant) -> Vec<ViewEvent> {
        let Some(listing) = self.expected.take() else { return Vec::new() };
        let (mut events, keys) = self.adopt(listing, now);
        if keys > 0 {
            events.insert(0, ViewEvent::Differed { keys });
        }
        events
    }

    /// The registry is back after an outage: whoever's record vanished has its whole grace from now.
    pub(crate) fn refreshed(&mut self, now: Instant) {
        self.held.values_mut().filter_map(|held| held.lapsed.as_mut()).for_each(|lapsed| *lapsed = now);
    }

    /// When the next grace ends.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.held.values().filter_map(|held| held.lapsed).min().map(|lapsed| lapsed + self.grace)
    }

    /// Lets those go whose grace is over. Not to be called while the registry is out of reach.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<ViewEvent> {
        let grace = self.grace;
        let over = |_: &String, held: &mut Held| held.lapsed.is_some_and(|lapsed| lapsed + grace <= now);
        self.held.extract_if(.., over).filter_map(|(_, held)| Some(removed(&held.record?))).collect()
    }

    /// Makes the view what the listing says, leaving alone what is known to be newer. Returns the number of keys in
    /// which it differed.
    fn adopt(&mut self, listing: Listing, now: Instant) -> (Vec<ViewEvent>, usize) {
        let mut events = Vec::new();
        // Of keys behind the last one of a listing that was cut, nothing is known.
        let end = listing.entries.last().filter(|_| listing.is_cut).map(|entry| entry.key.clone());
        let listed =
            |key: &str| listing.entries.binary_search_by(|entry| entry.key.as_str().cmp(key)).is_ok();
        let missing: Vec<String> = self
            .held
            .iter()
            .filter(|(key, held)| {
                held.lapsed.is_none()
                    && held.revision <= listing.revision
                    && end.as_ref().is_none_or(|end| *key <= end)
                    && !listed(key)
            })
            .map(|(key, _)| key.clone())
            .collect();
        let mut differing = missing.len();
        for key in missing {
            self.vanish(&key, listing.revision, now, &mut events);
        }
        for entry in listing.entries {
            differing += usize::from(self.put(entry, &mut events));
        }
        (events, differing)
    }

    /// True if this was news.
    fn put(&mut self, entry: Entry, events: &mut Vec<ViewEvent>) -> bool {
        let Entry { key, value, revision, .. } = entry;
        let is_room = self.held.len() < ENTRIES_MAX;
        let held = match self.held.get_mut(&key) {
            Some(held) if held.revision >= revision => return false,
            Some(held) => held,
            None if !is_room => {
                events.push(ViewEvent::Bad { key, worker: None, why: RecordError::TooMany });
                return false;
            }
            None => self.held.entry(key.clone()).or_insert(Held {
                revision,
                record: None,
                is_bad: false,
                lapsed: None,
            }),
        };
        held.revision = revision;
        held.lapsed = None;
        let read = match self.cluster.worker_of(&key) {
            Some(worker) => WorkerRecord::parse(&worker, &value),
            None => Err(RecordError::Key),
        };
        match read {
            Ok(record) => {
                if held.is_bad || held.record.as_deref() != Some(&record) {
                    held.record = Some(Arc::new(record));
                    events.extend(held.record.clone().map(ViewEvent::Changed));
                }
                held.is_bad = false;
            }
            Err(why) => {
                held.is_bad = true;
                let worker = held.record.as_ref().map(|record| record.key());
                events.push(ViewEvent::Bad { key, worker, why });
            }
        }
        true
    }

    fn vanish(&mut self, key: &str, revision: RegistryRevision, now: Instant, events: &mut Vec<ViewEvent>) {
        let Some(held) = self.held.get_mut(key).filter(|held| held.revision < revision) else { return };
        match &held.record {
            Some(record) if matches!(record.state, WorkerState::Serving | WorkerState::Unknown) => {
                held.revision = revision;
                held.lapsed.get_or_insert(now);
            }
            record => {
                events.extend(record.as_ref().map(removed));
                self.held.remove(key);
            }
        }
    }
}

fn removed(record: &Arc<WorkerRecord>) -> ViewEvent {
    ViewEvent::Removed(record.key())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use petek_core::hash::Revision;
    use petek_core::ids::Epoch;
    use proptest::prelude::*;

    use super::*;
    use crate::record::WireVersions;

    pub(crate) fn record(worker: &str, epoch: u64) -> WorkerRecord {
        WorkerRecord {
            worker: worker.into(),
            epoch: Epoch(epoch),
            addresses: vec!["localhost:7070".into()],
            name: "demo".into(),
            revision: Revision([7; 32]),
            text_hash: [8; 32],
            numerics_id: "00ff".repeat(8),
            block_size_tokens: 32,
            hash_scheme: 1,
            context_tokens: 2048,
            blocks_total: 64,
            tp: 1,
            roles: BTreeSet::new(),
            adapters: Vec::new(),
            state: WorkerState::Serving,
            wire: WireVersions { min: 1, max: 1 },
            started_unix_ms: 0,
        }
    }

    const GRACE: Duration = Duration::from_secs(10);

    fn view() -> View {
        View::new(Cluster::new("test").unwrap(), GRACE)
    }

    fn key(worker: &str) -> String {
        Cluster::new("test").unwrap().worker_key(&record(worker, 1).key())
    }

    fn entry(record: &WorkerRecord, revision: i64) -> Entry {
        let value = record.to_value().unwrap();
        Entry { key: key(&record.worker), value, revision: RegistryRevision(revision), lease: None }
    }

    fn listing(entries: Vec<Entry>, revision: i64) -> Listing {
        Listing { entries, revision: RegistryRevision(revision), is_cut: false }
    }

    fn deleted(worker: &str, revision: i64) -> Changes {
        let revision = RegistryRevision(revision);
        Changes { list: vec![Change::Deleted { key: key(worker), revision }], revision }
    }

    fn put(record: &WorkerRecord, revision: i64) -> Changes {
        Changes { list: vec![Change::Put(entry(record, revision))], revision: RegistryRevision(revision) }
    }

    #[test]
    fn only_a_serving_worker_has_a_grace() {
        let now = Instant::now();
        // The last is a word of some newer version.
        for (state, has_grace) in
            [("loading", false), ("serving", true), ("draining", false), ("hibernating", true)]
        {
            let mut view = view();
            let mut known = entry(&record("w", 1), 2);
            known.value = String::from_utf8(known.value).unwrap().replace("serving", state).into_bytes();
            view.begin(listing(vec![known], 2), now);
            let events = view.apply(deleted("w", 3), now);
            let gone = vec![ViewEvent::Removed(record("w", 1).key())];
            assert_eq!(events, if has_grace { vec![] } else { gone.clone() }, "{state}");
            assert_eq!(view.next_expiry(), has_grace.then_some(now + GRACE));
            assert_eq!(view.expire(now + GRACE - Duration::from_millis(1)), []);
            assert_eq!(view.expire(now + GRACE), if has_grace { gone } else { vec![] });
            assert_eq!(view.next_expiry(), None);
        }
    }

    #[test]
    fn old_news_is_no_news() {
        let now = Instant::now();
        let mut view = view();
        view.begin(listing(vec![entry(&record("w", 5), 50)], 60), now);
        assert_eq!(view.apply(put(&record("w", 4), 40), now), []);
        assert_eq!(view.apply(deleted("w", 45), now), []);
        assert_eq!(view.position(), RegistryRevision(60), "revisions never go back");
        assert_eq!(view.next_expiry(), None);
        assert_eq!(view.apply(put(&record("w", 5), 61), now), [], "written again, and nothing changed");
        // It lapses, and a put that is older than that does not bring it back.
        view.apply(deleted("w", 70), now);
        view.apply(put(&record("w", 5), 65), now);
        assert_eq!(view.next_expiry(), Some(now + GRACE));
        view.apply(put(&record("w", 5), 71), now);
        assert_eq!(view.next_expiry(), None);
    }

    #[test]
    fn a_registry_set_back_begins_another_history() {
        let now = Instant::now();
        let mut view = view();
        view.begin(listing(vec![entry(&record("a", 1), 50), entry(&record("b", 1), 51)], 60), now);
        let moved = WorkerRecord { blocks_total: 9, ..record("a", 1) };
        let events = view.resync(listing(vec![entry(&moved, 2)], 3), now);
        assert_eq!(events, [ViewEvent::Changed(Arc::new(moved))]);
        assert_eq!(view.position(), RegistryRevision(3));
        assert_eq!(view.next_expiry(), Some(now + GRACE), "b may come back");
        assert_eq!(view.apply(put(&record("b", 1), 4), now), []);
        assert_eq!(view.next_expiry(), None);
    }

    #[test]
    fn a_listing_beside_the_watch_is_compared_when_the_watch_had_its_time() {
        let now = Instant::now();
        let mut view = view();
        view.begin(listing(vec![entry(&record("a", 1), 2), entry(&record("b", 1), 3)], 3), now);
        // The watch is behind the listing: it tells the same a moment later. And it is ahead of it with c and d.
        let draining = WorkerRecord { state: WorkerState::Draining, ..record("b", 1) };
        view.apply(put(&record("d", 1), 4), now);
        view.expect(listing(vec![entry(&draining, 5), entry(&record("d", 1), 4)], 6));
        view.apply(put(&draining, 5), now);
        view.apply(deleted("a", 6), now);
        view.apply(put(&record("c", 1), 7), now);
        view.apply(put(&WorkerRecord { state: WorkerState::Draining, ..record("d", 1) }, 8), now);
        view.apply(deleted("d", 9), now);
        assert_eq!(view.settle(now), []);
        // And it tells nothing of this.
        view.expect(listing(vec![entry(&record("c", 2), 10)], 11));
        let events = view.settle(now);
        let expected = [
            ViewEvent::Differed { keys: 2 },
            ViewEvent::Removed(draining.key()),
            ViewEvent::Changed(Arc::new(record("c", 2))),
        ];
        assert_eq!(events, expected);
        assert_eq!(view.settle(now), [], "each listing is compared once");
    }

    #[test]
    fn a_view_is_bounded() {
        let now = Instant::now();
        let mut view = view();
        let mut entries: Vec<Entry> =
            (0..=ENTRIES_MAX).map(|n| entry(&record(&format!("w{n:05}"), 1), 2)).collect();
        let last = entries.pop().unwrap();
        let cut = |entries| Listing { is_cut: true, ..listing(entries, 2) };
        let events = view.begin(cut(entries.clone()), now);
        assert!(matches!(&events[..], [ViewEvent::Snapshot(all)] if all.len() == ENTRIES_MAX));
        let why = RecordError::TooMany;
        let too_many = ViewEvent::Bad { key: last.key.clone(), worker: None, why };
        let change = Changes { list: vec![Change::Put(last)], revision: RegistryRevision(3) };
        assert_eq!(view.apply(change, now), [too_many]);
        // What lies behind the end of a listing that was cut may well be there.
        entries.truncate(10);
        view.expect(cut(entries));
        assert_eq!(view.settle(now), []);
    }

    /// What happens in a run: to the registry, to the watch, and to the view.
    #[derive(Clone, Debug)]
    enum Happening {
        Put(u8, u8),
        Scribble(u8),
        Delete(u8),
        LoseNext,
        Deliver,
        List,
        Settle,
        Relist,
        Pass(u8),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            4 => (0..4u8, 0..4u8).prop_map(|(worker, state)| Happening::Put(worker, state)),
            1 => (0..4u8).prop_map(Happening::Scribble),
            2 => (0..4u8).prop_map(Happening::Delete),
            1 => Just(Happening::LoseNext),
            6 => Just(Happening::Deliver),
            2 => Just(Happening::List),
            2 => Just(Happening::Settle),
            1 => Just(Happening::Relist),
            1 => (0..20u8).prop_map(Happening::Pass),
        ]
    }

    proptest! {
        /// However changes are told, late, twice or never: after a full comparison and the grace the router knows
        /// exactly the records that stand, and its events say how it came to that. And as long as no change was lost
        /// no comparison finds a difference.
        #[test]
        fn a_view_becomes_what_stands(happenings in prop::collection::vec(happening(), 0..200)) {
            let mut now = Instant::now();
            let mut store: BTreeMap<String, Entry> = BTreeMap::new();
            let mut revision = 1;
            let mut untold: Vec<Change> = Vec::new();
            let (mut loses_next, mut was_lossy, mut differed) = (false, false, 0);
            // Up to where the watch must have told before a listing may be compared: that is what `settle` waits for.
            let mut due = 0;
            let mut view = view();
            let mut known: BTreeMap<WorkerKey, Arc<WorkerRecord>> = BTreeMap::new();
            let mut take = |events: Vec<ViewEvent>, differed: &mut usize| {
                for event in events {
                    match event {
                        ViewEvent::Changed(record) => drop(known.insert(record.key(), record)),
                        ViewEvent::Removed(key) => assert!(known.remove(&key).is_some(), "{key} was not there"),
                        ViewEvent::Differed { keys } => *differed += keys,
                        _ => {}
                    }
                }
                known.clone()
            };
            take(view.begin(listing(Vec::new(), revision), now), &mut differed);
            let workers = ["a", "b", "c", "d"];
            let listed = |store: &BTreeMap<String, Entry>, revision| listing(store.values().cloned().collect(), revision);
            for happening in happenings {
                let mut tell = |change: Change| {
                    if std::mem::take(&mut loses_next) {
                        was_lossy = true;
                    } else {
                        untold.push(change);
                    }
                };
                match happening {
                    Happening::Put(worker, state) => {
                        revision += 1;
                        let states = [WorkerState::Loading, WorkerState::Serving, WorkerState::Draining];
                        let state = states[usize::from(state % 3)];
                        let written = entry(&WorkerRecord { state, ..record(workers[usize::from(worker)], 1) }, revision);
                        store.insert(written.key.clone(), written.clone());
                        tell(Change::Put(written));
                    }
                    Happening::Scribble(worker) => {
                        revision += 1;
                        let mut written = entry(&record(workers[usize::from(worker)], 1), revision);
                        written.value = b"scribble".to_vec();
                        store.insert(written.key.clone(), written.clone());
                        tell(Change::Put(written));
                    }
                    Happening::Delete(worker) => {
                        let key = key(workers[usize::from(worker)]);
                        if store.remove(&key).is_some() {
                            revision += 1;
                            tell(Change::Deleted { key, revision: RegistryRevision(revision) });
                        }
                    }
                    Happening::LoseNext => loses_next = true,
                    Happening::Deliver if !untold.is_empty() => {
                        let change = untold.remove(0);
                        let told = match &change {
                            Change::Put(entry) => entry.revision,
                            Change::Deleted { revision, .. } => *revision,
                        };
                        take(view.apply(Changes { list: vec![change], revision: told }, now), &mut differed);
                    }
                    Happening::List => {
                        view.expect(listed(&store, revision));
                        due = revision;
                    }
                    Happening::Settle => {
                        let is_told = |change: &Change| match change {
                            Change::Put(entry) => entry.revision.0 > due,
                            Change::Deleted { revision, .. } => revision.0 > due,
                        };
                        if untold.iter().all(is_told) {
                            take(view.settle(now), &mut differed);
                        }
                    }
                    Happening::Relist => {
                        // The watch of before is over; the next one goes on from the listing.
                        untold.clear();
                        take(view.resync(listed(&store, revision), now), &mut differed);
                    }
                    Happening::Pass(seconds) => {
                        now += Duration::from_secs(seconds.into());
                        take(view.expire(now), &mut differed);
                    }
                    Happening::Deliver => {}
                }
                prop_assert!(was_lossy || differed == 0, "{} differences, and nothing was lost", differed);
            }
            view.expect(listed(&store, revision));
            let rest = Changes { list: untold, revision: RegistryRevision(revision) };
            take(view.apply(rest, now), &mut differed);
            take(view.settle(now), &mut differed);
            let known = take(view.expire(now + GRACE), &mut differed);

            let stands = |record: &WorkerRecord| {
                let entry = store.get(&key(&record.worker));
                entry.is_some_and(|entry| {
                    // What does not read leaves its worker as it was.
                    entry.value == b"scribble" || entry.value == record.to_value().unwrap()
                })
            };
            prop_assert!(known.values().all(|record| stands(record)), "{known:#?}");
            let readable = store.values().filter(|entry| entry.value != b"scribble").count();
            prop_assert!(known.len() >= readable, "{known:#?}");
        }
    }
}
