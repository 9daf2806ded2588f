//! The registry in this process's memory: for a whole cluster in one process, and for tests, which can cut it off,
//! wipe it, or make it lose a change.
//!
//! It behaves as etcd does towards its callers. Time is tokio's, so a test may stop the clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::registry::{
    Call, Change, Changes, ENTRIES_MAX, Entry, Lease, LeaseId, Listing, Registry, RegistryError,
    RegistryRevision, Swapped, Watch, WatchEnd,
};

/// Changes that a watch may be behind; an older one has to list again.
const LOG_MAX: usize = 1_024;

const ENDPOINT: &str = "memory";

/// One client of a registry in memory. Clones are the same client; [`another_client`](Self::another_client) is
/// another one of the same registry.
#[derive(Clone, Debug)]
pub struct MemoryRegistry {
    store: Arc<Store>,
    /// Whether this client is cut off.
    is_cut: watch::Sender<bool>,
}

#[derive(Debug)]
struct Store {
    state: Mutex<State>,
    /// Wakes the watches.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    revision: i64,
    entries: BTreeMap<String, Entry>,
    leases: BTreeMap<i64, Living>,
    leases_granted: i64,
    /// The last changes, oldest first; all after `compacted` are there.
    log: VecDeque<Change>,
    compacted: i64,
    /// Counts what ends all watches: as if the server had cancelled them, or died.
    cancels: u64,
    restarts: u64,
    /// The next change is kept from the watches.
    loses_next: bool,
    /// All changes are kept from the watches for a while.
    is_behind: bool,
}

#[derive(Clone, Copy, Debug)]
struct Living {
    ttl: Duration,
    until: Instant,
}

impl Default for MemoryRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryRegistry {
    /// An empty registry, and its first client.
    pub fn new() -> Self {
        let state = State { revision: 1, ..State::default() };
        let store = Store { state: Mutex::new(state), changed: watch::Sender::new(()) };
        MemoryRegistry { store: Arc::new(store), is_cut: watch::Sender::new(false) }
    }

    /// Another client, with a connection of its own.
    pub fn another_client(&self) -> Self {
        MemoryRegistry { store: self.store.clone(), is_cut: watch::Sender::new(false) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.store.state()
    }

    /// Does something to the store as a caller would: only where it can be reached, and seen by all watches.
    fn call<'a, T: Send + 'a>(
        &'a self,
        work: impl FnOnce(&mut State) -> Result<T, RegistryError> + Send + 'a,
    ) -> Call<'a, T> {
        Box::pin(async move {
            if *self.is_cut.borrow() {
                return Err(away());
            }
            let answer = work(&mut self.state());
            self.store.changed.send_replace(());
            answer
        })
    }
}

/// Faults, for tests.
impl MemoryRegistry {
    /// Cuts this client off: its calls fail, its watches end.
    pub fn cut(&self) {
        self.is_cut.send_replace(true);
    }

    /// Connects it again.
    pub fn heal(&self) {
        self.is_cut.send_replace(false);
    }

    /// Forgets the past, so that no watch can begin in it.
    pub fn compact(&self) {
        let mut state = self.state();
        state.log.clear();
        state.compacted = state.revision;
    }

    /// Ends all watches as a server does that cancels them.
    pub fn cancel_watches(&self) {
        self.state().cancels += 1;
        self.store.changed.send_replace(());
    }

    /// Ends all leases, as if each had run out.
    pub fn end_leases(&self) {
        let mut state = self.state();
        for lease in std::mem::take(&mut state.leases).into_keys() {
            state.remove_under(lease);
        }
        drop(state);
        self.store.changed.send_replace(());
    }

    /// Restarts it with all its data: watches break, each lease has its whole time again.
    pub fn restart(&self) {
        let mut state = self.state();
        state.restarts += 1;
        for living in state.leases.values_mut() {
            living.until = Instant::now() + living.ttl;
        }
        drop(state);
        self.store.changed.send_replace(());
    }

    /// Restarts it with nothing: no keys, no leases, revisions from the beginning.
    pub fn wipe(&self) {
        let mut state = self.state();
        let (leases_granted, cancels, restarts) = (state.leases_granted, state.cancels, state.restarts + 1);
        *state = State { revision: 1, leases_granted, cancels, restarts, ..State::default() };
        drop(state);
        self.store.changed.send_replace(());
    }

    /// Keeps the next change from all watches: a server's bug.
    pub fn lose_next_change(&self) {
        self.state().loses_next = true;
    }

    /// Lets all watches fall behind, or catch up again.
    pub fn set_behind(&self, is_behind: bool) {
        self.state().is_behind = is_behind;
        self.store.changed.send_replace(());
    }
}

impl Registry for MemoryRegistry {
    fn endpoint(&self) -> &str {
        ENDPOINT
    }

    fn grant(&self, ttl: Duration) -> Call<'_, Lease> {
        self.call(move |state| {
            state.leases_granted += 1;
            state.leases.insert(state.leases_granted, Living { ttl, until: Instant::now() + ttl });
            Ok(Lease { id: LeaseId(state.leases_granted), ttl })
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> Call<'_, ()> {
        self.call(move |state| {
            let living = state.leases.get_mut(&lease.0).ok_or(RegistryError::LeaseLost)?;
            living.until = Instant::now() + living.ttl;
            Ok(())
        })
    }

    fn revoke(&self, lease: LeaseId) -> Call<'_, ()> {
        self.call(move |state| {
            state.leases.remove(&lease.0);
            state.remove_under(lease.0);
            Ok(())
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> Call<'a, Option<Entry>> {
        self.call(move |state| Ok(state.entries.get(key).cloned()))
    }

    fn swap<'a>(
        &'a self,
        key: &'a str,
        expected: RegistryRevision,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Call<'a, Swapped> {
        self.call(move |state| {
            let found = state.entries.get(key);
            if found.map_or(RegistryRevision::default(), |entry| entry.revision) != expected {
                return Ok(Swapped::Found(found.cloned()));
            }
            if lease.is_some_and(|lease| !state.leases.contains_key(&lease.0)) {
                return Err(RegistryError::LeaseLost);
            }
            state.revision += 1;
            let revision = RegistryRevision(state.revision);
            let entry = Entry { key: key.into(), value, revision, lease };
            state.entries.insert(key.into(), entry.clone());
            state.remember(Change::Put(entry));
            Ok(Swapped::Done(revision))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Call<'a, Listing> {
        self.call(move |state| {
            let all = state.entries.range(prefix.to_string()..).map(|(_, entry)| entry);
            let mut entries: Vec<Entry> = all
                .take_while(|entry| entry.key.starts_with(prefix))
                .take(ENTRIES_MAX + 1)
                .cloned()
                .collect();
            let is_cut = entries.len() > ENTRIES_MAX;
            entries.truncate(ENTRIES_MAX);
            Ok(Listing { entries, revision: RegistryRevision(state.revision), is_cut })
        })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: RegistryRevision,
    ) -> BoxFuture<'a, Result<Watch, WatchEnd>> {
        Box::pin(async move {
            if *self.is_cut.borrow() {
                return Err(away().into());
            }
            let state = self.state();
            state.check(after)?;
            let watching = Watching {
                store: self.store.clone(),
                changed: self.store.changed.subscribe(),
                is_cut: self.is_cut.subscribe(),
                prefix: prefix.into(),
                after,
                cancels: state.cancels,
                restarts: state.restarts,
            };
            let watch = stream::unfold(Some(watching), |watching| async move {
                let mut watching = watching?;
                let next = watching.next().await;
                let rest = next.is_ok().then_some(watching);
                Some((next, rest))
            });
            Ok(watch.boxed())
        })
    }
}

/// One watch.
struct Watching {
    store: Arc<Store>,
    changed: watch::Receiver<()>,
    is_cut: watch::Receiver<bool>,
    prefix: String,
    after: RegistryRevision,
    cancels: u64,
    restarts: u64,
}

impl Watching {
    async fn next(&mut self) -> Result<Changes, WatchEnd> {
        loop {
            self.changed.mark_unchanged();
            let next_end = {
                let state = self.store.state();
                if *self.is_cut.borrow_and_update() || state.restarts != self.restarts {
                    return Err(away().into());
                }
                if state.cancels != self.cancels {
                    return Err(WatchEnd::ListAgain("the watch was cancelled".into()));
                }
                state.check(self.after)?;
                let is_ours = |change: &&Change| {
                    let (key, revision) = place(change);
                    revision > self.after && key.starts_with(&self.prefix)
                };
                let list: Vec<Change> = state.log.iter().filter(is_ours).cloned().collect();
                if !list.is_empty() && !state.is_behind {
                    self.after = RegistryRevision(state.revision);
                    return Ok(Changes { list, revision: self.after });
                }
                state.leases.values().map(|living| living.until).min()
            };
            // A lease runs out without anybody calling.
            let end = async {
                match next_end {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = self.changed.changed() => {}
                _ = self.is_cut.changed() => {}
                () = end => {}
            }
        }
    }
}

impl Store {
    /// The state as of now: leases that ran out are gone.
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked; and if something did, each change is whole.
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = Instant::now();
        let over: Vec<i64> =
            state.leases.iter().filter(|(_, living)| living.until <= now).map(|(lease, _)| *lease).collect();
        for lease in over {
            state.leases.remove(&lease);
            state.remove_under(lease);
        }
        state
    }
}

impl State {
    /// Whether a watch may go on after this revision.
    fn check(&self, after: RegistryRevision) -> Result<(), WatchEnd> {
        if after.0 < self.compacted {
            return Err(WatchEnd::ListAgain(format!("compacted up to revision {}", self.compacted)));
        }
        if after.0 > self.revision {
            return Err(WatchEnd::ListAgain(format!("the registry is at revision {} only", self.revision)));
        }
        Ok(())
    }

    fn remove_under(&mut self, lease: i64) {
        let gone: Vec<String> = self
            .entries
            .extract_if(.., |_, entry| entry.lease == Some(LeaseId(lease)))
            .map(|(key, _)| key)
            .collect();
        for key in gone {
            self.revision += 1;
            self.remember(Change::Deleted { key, revision: RegistryRevision(self.revision) });
        }
    }

    fn remember(&mut self, change: Change) {
        if std::mem::take(&mut self.loses_next) {
            return;
        }
        self.log.push_back(change);
        if self.log.len() > LOG_MAX {
            self.compacted = self.log.pop_front().map_or(self.compacted, |change| place(&change).1.0);
        }
    }
}

fn place(change: &Change) -> (&str, RegistryRevision) {
    match change {
        Change::Put(entry) => (&entry.key, entry.revision),
        Change::Deleted { key, revision } => (key, *revision),
    }
}

fn away() -> RegistryError {
    RegistryError::Away { endpoint: ENDPOINT.into(), why: "cut off".into() }
}
