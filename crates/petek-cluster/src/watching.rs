//! The task that keeps a router's view: list, watch, list again when the watch cannot go on, and every minute list
//! beside the watch to see whether it told everything.

use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::record::Cluster;
use crate::registry::{ENTRIES_MAX, Listing, Registry, RegistryError, WatchEnd};
use crate::times::{Backoff, Jitter, Outage, Patience, Times, Wait};
use crate::view::{View, ViewEvent};

/// How far a full list's interval is from its mean at most.
const LIST_SHARE: f64 = 0.1;

/// What a view is of, and how it is kept.
#[derive(Clone, Debug)]
pub struct ViewOptions {
    /// Whose workers.
    pub cluster: Cluster,
    /// The waits.
    pub times: Times,
    /// How long to wait for the first listing.
    pub wait: Wait,
    /// Events that may wait for a slow reader; then the watch waits too, and nothing is lost.
    pub events_max: usize,
    /// For pauses alone: any number that differs between routers.
    pub seed: u64,
}

impl ViewOptions {
    /// The defaults for a cluster.
    pub fn new(cluster: Cluster, seed: u64) -> Self {
        ViewOptions { cluster, times: Times::default(), wait: Wait::Forever, events_max: 256, seed }
    }
}

/// The workers of a cluster as a stream of [`ViewEvent`]s. Dropping it ends the watch.
#[derive(Debug)]
pub struct WorkersView {
    events: mpsc::Receiver<ViewEvent>,
    /// Ends the task when it is dropped.
    _task: JoinSet<()>,
}

impl WorkersView {
    /// Waits for the first listing, then watches. The first event, a snapshot, is there when this returns.
    ///
    /// # Errors
    /// [`RegistryError::Away`] where [`ViewOptions::wait`] is over; what trying again cannot mend, at once.
    pub async fn open(registry: Arc<dyn Registry>, options: ViewOptions) -> Result<Self, RegistryError> {
        let ViewOptions { cluster, times, wait, events_max, seed } = options;
        let prefix = cluster.workers_prefix();
        let backoff = Backoff::new(times, seed);
        let mut patience = Patience::new(registry.endpoint(), wait, backoff.clone());
        let listing = loop {
            match registry.list(&prefix).await {
                Ok(listing) => break listing,
                Err(error) => patience.after(error).await?,
            }
        };
        patience.ends();
        warn_if_cut(&listing);
        let mut view = View::new(cluster, times.lapse_grace);
        let first = view.begin(listing, Instant::now());
        let (sender, events) = mpsc::channel(events_max.max(1));
        let watcher = Watcher {
            registry,
            prefix,
            view,
            times,
            backoff,
            jitter: Jitter::new(seed),
            outage: Outage::default(),
            is_stale: false,
            events: sender,
        };
        let mut task = JoinSet::new();
        task.spawn(watcher.run(first));
        Ok(WorkersView { events, _task: task })
    }

    /// The next event. `None` never comes while this is held.
    ///
    /// *Cancel safety*: nothing is lost.
    pub async fn next(&mut self) -> Option<ViewEvent> {
        self.events.recv().await
    }
}

struct Watcher {
    registry: Arc<dyn Registry>,
    prefix: String,
    view: View,
    times: Times,
    backoff: Backoff,
    jitter: Jitter,
    outage: Outage,
    is_stale: bool,
    events: mpsc::Sender<ViewEvent>,
}

/// Why one watch is over.
enum Over {
    /// The registry's side ended.
    Watch(WatchEnd),
    /// Nobody reads the view any more.
    Reader,
}

impl<E: Into<WatchEnd>> From<E> for Over {
    fn from(end: E) -> Self {
        Over::Watch(end.into())
    }
}

impl Watcher {
    async fn run(mut self, first: Vec<ViewEvent>) {
        if self.tell(first).await.is_err() {
            return;
        }
        let mut must_list = false;
        loop {
            let begun = Instant::now();
            let Err(over) = self.follow(must_list).await;
            // A watch that lived is progress; one that is refused again and again must not spin.
            if begun.elapsed() > self.times.backoff_max {
                self.backoff.reset();
            }
            match over {
                Over::Reader => return,
                Over::Watch(WatchEnd::ListAgain(why)) => {
                    tracing::info!(endpoint = self.registry.endpoint(), reason = %why, "registry: list again");
                    must_list = true;
                }
                Over::Watch(WatchEnd::Lost(error)) => {
                    self.outage.begins(self.registry.endpoint(), &error);
                    if !std::mem::replace(&mut self.is_stale, true) {
                        let stale = ViewEvent::Stale { why: error.to_string() };
                        if self.tell(vec![stale]).await.is_err() {
                            return;
                        }
                    }
                }
            }
            sleep(self.backoff.pause()).await;
        }
    }

    /// One watch from its beginning to its end; before it a listing, where there is nothing to go on from.
    async fn follow(&mut self, must_list: bool) -> Result<std::convert::Infallible, Over> {
        if must_list {
            let listing = self.registry.list(&self.prefix).await?;
            warn_if_cut(&listing);
            if listing.revision < self.view.position() {
                tracing::warn!(
                    endpoint = self.registry.endpoint(),
                    known = self.view.position().0,
                    found = listing.revision.0,
                    "registry was emptied or restored: workers have the grace to register again"
                );
            }
            let events = self.view.resync(listing, Instant::now());
            self.tell(events).await?;
        }
        let mut watch = self.registry.watch(&self.prefix, self.view.position()).await?;
        self.outage.ends(self.registry.endpoint());
        if std::mem::replace(&mut self.is_stale, false) {
            self.view.refreshed(Instant::now());
            self.tell(vec![ViewEvent::Fresh]).await?;
        }

        let mut list_at = self.next_list();
        let mut settle_at: Option<Instant> = None;
        loop {
            let wake = [Some(list_at), settle_at, self.view.next_expiry()].into_iter().flatten().min();
            let events = tokio::select! {
                got = watch.next() => match got {
                    Some(changes) => self.view.apply(changes?, Instant::now()),
                    None => return Err(WatchEnd::ListAgain("the watch ended without a word".into()).into()),
                },
                () = sleep_until(wake.unwrap_or(list_at)) => {
                    let now = Instant::now();
                    let mut events = Vec::new();
                    if settle_at.is_some_and(|at| at <= now) {
                        settle_at = None;
                        events = self.view.settle(now);
                    }
                    if list_at <= now {
                        list_at = self.next_list();
                        let listing = self.registry.list(&self.prefix).await?;
                        warn_if_cut(&listing);
                        if listing.revision < self.view.position() {
                            return Err(WatchEnd::ListAgain("its revision went back".into()).into());
                        }
                        self.view.expect(listing);
                        settle_at = Some(Instant::now() + self.times.settle);
                    }
                    events.extend(self.view.expire(now));
                    events
                }
            };
            self.tell(events).await?;
        }
    }

    fn next_list(&mut self) -> Instant {
        Instant::now() + self.jitter.around(self.times.full_list_interval, LIST_SHARE)
    }

    async fn tell(&mut self, events: Vec<ViewEvent>) -> Result<(), Over> {
        for event in events {
            match &event {
                ViewEvent::Bad { key, why, .. } => tracing::warn!(key, error = %why, "bad record ignored"),
                ViewEvent::Differed { keys } => {
                    tracing::warn!(keys, "the watch had missed changes that a full list shows")
                }
                _ => {}
            }
            self.events.send(event).await.map_err(|_| Over::Reader)?;
        }
        Ok(())
    }
}

fn warn_if_cut(listing: &Listing) {
    if listing.is_cut {
        tracing::warn!(entries_max = ENTRIES_MAX, "more records than a view holds: the rest is left out");
    }
}
