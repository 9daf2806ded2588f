//! A worker's side: a record under a lease, kept alive by one short call per beat, written again whenever it is gone.
//!
//! ```text
//!  start ──▶ settings agree? ──▶ old record? probe it ──▶ Standing ◀──────────────┐
//!                 │ no               │ it answers           │ lease over          │ record written
//!                 ▼                  ▼                      ▼                     │
//!              refused            id is taken             Lost ── back-off ──▶ new lease
//!                                                           │ another epoch stands there
//!                                                           ▼
//!                                                         Ended: the process is to exit
//! ```
//!
//! A worker that lost its lease serves on: routers have their own health checks. It registers again with the same
//! epoch, for its engine is the same.

use std::sync::Arc;

use futures::future::BoxFuture;
use petek_core::ids::Epoch;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::record::{Cluster, RecordError, SettingsRecord, WorkerRecord, WorkerState};
use crate::registry::{Entry, Lease, LeaseId, Registry, RegistryError, RegistryRevision, Swapped};
use crate::times::{Backoff, Outage, Patience, Times, Wait};

/// Rounds of read, compare and write before a key counts as contended.
const ROUNDS_MAX: usize = 4;

/// What a worker says of itself, and how it is kept said.
#[derive(Clone, Debug)]
pub struct RegistrationOptions {
    /// Where.
    pub cluster: Cluster,
    /// What. The numbers must be known: a worker registers once its pool is sized.
    pub record: WorkerRecord,
    /// The waits.
    pub times: Times,
    /// How long to wait for a registry that is away.
    pub wait: Wait,
}

/// What an old record's addresses answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probed {
    /// Nothing: the call fails.
    Silent,
    /// A worker of this epoch.
    Answers(Epoch),
}

/// Calls the worker of an old record and says what it found. Given by the worker, which knows how to speak to one.
pub type Probe = Arc<dyn Fn(WorkerRecord) -> BoxFuture<'static, Probed> + Send + Sync>;

/// Why a registration did not come about, or is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The registry does not do it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Our own record cannot be written: a setting of this worker is wrong.
    #[error("our own record: {0}")]
    Record(#[from] RecordError),
    /// The other workers of this revision run with other settings.
    #[error(
        "the workers of this revision share settings that differ from ours: {differences} (they stand at {key}; \
         start this worker with the same ones)"
    )]
    SettingsDiffer {
        /// Where they stand.
        key: String,
        /// Each difference with both values.
        differences: String,
    },
    /// The shared settings do not read.
    #[error("the settings at {key} do not read: {why}; if no worker of this revision runs, remove the key")]
    SettingsBad {
        /// Where they stand.
        key: String,
        /// What is wrong.
        why: RecordError,
    },
    /// A worker of this id lives.
    #[error("worker id {worker} is taken: {address} answers with the epoch of its record; choose another id")]
    IdTaken {
        /// The id.
        worker: String,
        /// Where it answers.
        address: String,
    },
    /// Another worker took this one's place.
    #[error("replaced: worker id {worker} belongs to epoch {epoch} at {address} now")]
    Replaced {
        /// The id.
        worker: String,
        /// The other's epoch.
        epoch: Epoch,
        /// Where it is reached.
        address: String,
    },
}

/// How a registration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrationStatus {
    /// Now.
    pub phase: RegistrationPhase,
    /// How often the lease was lost so far, however short: one that is regained at once counts too.
    pub losses: u64,
}

/// See [`RegistrationStatus`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistrationPhase {
    /// The record stands under a live lease.
    Standing,
    /// The lease is over: serve on, it is being registered again.
    Lost {
        /// What happened.
        why: String,
    },
    /// Over for good, another worker has this one's place: the process exits with code 4.
    Ended(RegisterError),
    /// It [left](Registration::leave).
    Left,
}

/// A worker's place in the registry. Dropping it is like dying: the record goes when its lease ends.
#[derive(Debug)]
pub struct Registration {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<RegistrationStatus>,
    /// Ends the task when it is dropped.
    _task: JoinSet<()>,
}

impl Registration {
    /// Agrees on the settings of the revision, takes the place of a dead predecessor, and writes the record.
    ///
    /// # Errors
    /// All of [`RegisterError`] but `Replaced`. Of these only [`RecordError`] is a matter of this worker's own
    /// configuration.
    pub async fn start(
        registry: Arc<dyn Registry>,
        options: RegistrationOptions,
        probe: Probe,
    ) -> Result<Self, RegisterError> {
        let RegistrationOptions { cluster, record, times, wait } = options;
        record.to_value()?;
        let (status, status_seen) =
            watch::channel(RegistrationStatus { phase: RegistrationPhase::Standing, losses: 0 });
        let backoff = Backoff::new(times, record.epoch.0);
        let mut keeper = Keeper {
            key: cluster.worker_key(&record.key()),
            settings_key: cluster.settings_key(&record.name, &record.revision),
            registry: registry.clone(),
            record,
            times,
            held: None,
            backoff: backoff.clone(),
            outage: Outage::default(),
            status,
        };
        let mut patience = Patience::new(registry.endpoint(), wait, backoff);
        loop {
            match keeper.establish(Some(&probe)).await {
                Ok(()) => break,
                Err(RegisterError::Registry(error)) => patience.after(error).await?,
                Err(error) => return Err(error),
            }
        }
        patience.ends();
        let (commands, inbox) = mpsc::channel(1);
        let mut task = JoinSet::new();
        task.spawn(keeper.run(inbox));
        Ok(Registration { commands, status: status_seen, _task: task })
    }

    /// How it stands now.
    pub fn status(&self) -> RegistrationStatus {
        self.status.borrow().clone()
    }

    /// Waits until it stands otherwise than when this was last called.
    ///
    /// *Cancel safety*: no change is lost, but of several only the last is seen; `losses` counts them all.
    pub async fn changed(&mut self) -> RegistrationStatus {
        if self.status.changed().await.is_err() {
            // It ended or left, and that was seen: nothing changes any more.
            std::future::pending::<()>().await;
        }
        self.status.borrow_and_update().clone()
    }

    /// Announces what the worker does with new work. When this returns Ok, the registry has it; else it is written
    /// as soon as that is possible.
    ///
    /// # Errors
    /// Why it is not written yet, or [`RegisterError::Replaced`].
    pub async fn set_state(&self, state: WorkerState) -> Result<(), RegisterError> {
        self.command(|done| Command::SetState(state, done)).await
    }

    /// Takes the record away at once, lease and all. Announce [`WorkerState::Draining`] first.
    ///
    /// # Errors
    /// Where the registry is away: the record goes when its lease ends.
    pub async fn leave(self) -> Result<(), RegisterError> {
        self.command(Command::Leave).await
    }

    async fn command(&self, make: impl FnOnce(Done) -> Command) -> Result<(), RegisterError> {
        let (done, is_done) = oneshot::channel();
        if self.commands.send(make(done)).await.is_ok()
            && let Ok(result) = is_done.await
        {
            return result;
        }
        match self.status().phase {
            RegistrationPhase::Ended(error) => Err(error),
            _ => Err(RegistryError::LeaseLost.into()),
        }
    }
}

type Done = oneshot::Sender<Result<(), RegisterError>>;

#[derive(Debug)]
enum Command {
    SetState(WorkerState, Done),
    Leave(Done),
}

/// The task behind a [`Registration`].
struct Keeper {
    registry: Arc<dyn Registry>,
    key: String,
    settings_key: String,
    record: WorkerRecord,
    times: Times,
    held: Option<Held>,
    backoff: Backoff,
    outage: Outage,
    status: watch::Sender<RegistrationStatus>,
}

/// A lease, and until when it surely lives, by our own clock from before the call that renewed it.
#[derive(Clone, Copy)]
struct Held {
    lease: Lease,
    until: Instant,
}

/// What to do about what stands at our key.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It is our record as it should be, under our lease.
    Keep,
    /// Write, if this is still what stands there.
    Write(RegistryRevision),
    /// Another engine's record.
    Other(Box<WorkerRecord>, RegistryRevision),
}

fn decide(found: Option<&Entry>, ours: &WorkerRecord, value: &[u8], lease: LeaseId) -> Step {
    let Some(entry) = found else { return Step::Write(RegistryRevision::default()) };
    match WorkerRecord::parse(&ours.key(), &entry.value) {
        Ok(other) if other.epoch != ours.epoch => Step::Other(Box::new(other), entry.revision),
        Ok(_) if entry.value == value && entry.lease == Some(lease) => Step::Keep,
        // Our own of an earlier lease or state. Or no record at all: nobody can be reached by it.
        _ => Step::Write(entry.revision),
    }
}

impl Keeper {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut next = self.after(&Ok(()));
        loop {
            let (result, done) = tokio::select! {
                command = inbox.recv() => match command {
                    None => return,
                    Some(Command::Leave(done)) => {
                        let result = self.revoke().await;
                        self.set_phase(RegistrationPhase::Left);
                        // Whoever asked may have stopped waiting.
                        let _ = done.send(result.map_err(RegisterError::from));
                        return;
                    }
                    Some(Command::SetState(state, done)) => {
                        self.record.state = state;
                        let written = match self.write(None).await {
                            Err(RegisterError::Registry(RegistryError::LeaseLost)) => self.beat().await,
                            written => written,
                        };
                        (written, Some(done))
                    }
                },
                () = sleep_until(next) => (self.beat().await, None),
            };
            next = self.after(&result);
            let end = match &result {
                Err(error @ (RegisterError::Replaced { .. } | RegisterError::SettingsDiffer { .. })) => {
                    Some(error.clone())
                }
                _ => None,
            };
            if let Some(error) = &end {
                tracing::error!(worker = self.record.worker, error = %error, "registration over");
                // The lease holds nothing of ours any more; it would end by itself.
                let _ = self.revoke().await;
                self.set_phase(RegistrationPhase::Ended(error.clone()));
            }
            if let Some(done) = done {
                let _ = done.send(result);
            }
            if end.is_some() {
                return;
            }
        }
    }

    /// Keeps the lease alive and looks whether our record still stands; registers again without a lease.
    async fn beat(&mut self) -> Result<(), RegisterError> {
        if let Some(held) = self.held {
            let sent = Instant::now();
            match self.registry.keep_alive(held.lease.id).await {
                Ok(()) => self.held = Some(Held { until: sent + held.lease.ttl, ..held }),
                Err(RegistryError::LeaseLost) => self.lost(&RegistryError::LeaseLost),
                Err(error) => return Err(error.into()),
            }
        }
        if self.held.is_some() { self.write(None).await } else { self.establish(None).await }
    }

    /// From nothing to a record under a lease. With `probe` the record of another engine is replaced if that engine
    /// is gone; without, it has replaced us.
    async fn establish(&mut self, probe: Option<&Probe>) -> Result<(), RegisterError> {
        self.agree().await?;
        let mut replacing = None;
        if let Some(probe) = probe
            && let Some(entry) = self.registry.get(&self.key).await?
            && let Step::Other(old, revision) = decide(Some(&entry), &self.record, &[], LeaseId(0))
        {
            self.probe(probe, *old).await?;
            replacing = Some(revision);
        }
        let asked = Instant::now();
        let lease = self.registry.grant(self.times.lease_ttl).await?;
        self.held = Some(Held { lease, until: asked + lease.ttl });
        self.write(replacing).await
    }

    /// Makes our record stand under our lease, by compare. Of other engines' records only that of revision
    /// `replacing` gives way.
    async fn write(&mut self, replacing: Option<RegistryRevision>) -> Result<(), RegisterError> {
        let value = self.record.to_value()?;
        for _ in 0..ROUNDS_MAX {
            let Some(held) = self.held else { return Err(RegistryError::LeaseLost.into()) };
            let found = self.registry.get(&self.key).await?;
            let expected = match decide(found.as_ref(), &self.record, &value, held.lease.id) {
                Step::Keep => return Ok(()),
                Step::Write(expected) => expected,
                Step::Other(_, revision) if Some(revision) == replacing => revision,
                Step::Other(other, _) => {
                    return Err(RegisterError::Replaced {
                        address: other.addresses.first().cloned().unwrap_or_default(),
                        worker: other.worker,
                        epoch: other.epoch,
                    });
                }
            };
            if held.until <= Instant::now() {
                return Err(RegistryError::LeaseLost.into());
            }
            match self.registry.swap(&self.key, expected, value.clone(), Some(held.lease.id)).await {
                Ok(Swapped::Done(_)) => return Ok(()),
                Ok(Swapped::Found(_)) => {}
                Err(RegistryError::LeaseLost) => {
                    self.lost(&RegistryError::LeaseLost);
                    return Err(RegistryError::LeaseLost.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        let why = format!("{} was written by others {ROUNDS_MAX} times while we tried", self.key);
        Err(RegistryError::Away { endpoint: self.registry.endpoint().into(), why }.into())
    }

    /// Publishes the settings of our revision, or holds ours against those that stand.
    async fn agree(&self) -> Result<(), RegisterError> {
        let ours = self.record.settings();
        let swap =
            self.registry.swap(&self.settings_key, RegistryRevision::default(), ours.to_value()?, None);
        let Swapped::Found(Some(entry)) = swap.await? else { return Ok(()) };
        let key = self.settings_key.clone();
        match SettingsRecord::parse(&entry.value) {
            Err(why) => Err(RegisterError::SettingsBad { key, why }),
            Ok(theirs) if theirs == ours => Ok(()),
            Ok(theirs) => Err(RegisterError::SettingsDiffer { key, differences: ours.differences(&theirs) }),
        }
    }

    async fn probe(&self, probe: &Probe, old: WorkerRecord) -> Result<(), RegisterError> {
        let (epoch, worker) = (old.epoch, old.worker.clone());
        let address = old.addresses.first().cloned().unwrap_or_default();
        let probed = timeout(self.times.probe_max, probe(old)).await.unwrap_or(Probed::Silent);
        if probed == Probed::Answers(epoch) {
            return Err(RegisterError::IdTaken { worker, address });
        }
        tracing::info!(
            worker,
            old_epoch = epoch.0,
            old_address = address,
            "replacing the record of a dead worker"
        );
        Ok(())
    }

    async fn revoke(&mut self) -> Result<(), RegistryError> {
        match self.held.take() {
            Some(held) => self.registry.revoke(held.lease.id).await,
            None => Ok(()),
        }
    }

    /// When to try next, and what the world is told of how it went.
    fn after(&mut self, result: &Result<(), RegisterError>) -> Instant {
        let now = Instant::now();
        match (result, self.held) {
            (Ok(()), Some(held)) => {
                self.outage.ends(self.registry.endpoint());
                self.backoff.reset();
                self.set_phase(RegistrationPhase::Standing);
                now + held.lease.ttl / 3
            }
            (Err(error), Some(held)) if held.until > now => {
                self.trouble(error);
                let left = held.until - now;
                now + (left / 2).max(self.times.backoff_min).min(left)
            }
            (result, _) => {
                if let Err(error) = result {
                    self.trouble(error);
                    self.set_phase(RegistrationPhase::Lost { why: error.to_string() });
                }
                now + self.backoff.pause()
            }
        }
    }

    fn trouble(&mut self, error: &RegisterError) {
        // A lost lease has its own line.
        if *error != RegisterError::Registry(RegistryError::LeaseLost) {
            self.outage.begins(self.registry.endpoint(), error);
        }
    }

    fn lost(&mut self, why: &RegistryError) {
        self.held = None;
        tracing::warn!(worker = self.record.worker, "lease lost: serving on and registering again");
        self.set_phase(RegistrationPhase::Lost { why: why.to_string() });
    }

    fn set_phase(&self, phase: RegistrationPhase) {
        self.status.send_if_modified(|status| {
            let is_news = match (&status.phase, &phase) {
                (RegistrationPhase::Lost { .. }, RegistrationPhase::Lost { .. }) => false,
                (old, new) => old != new,
            };
            if is_news {
                status.losses += u64::from(matches!(phase, RegistrationPhase::Lost { .. }));
                status.phase = phase;
            }
            is_news
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_there_decides() {
        let ours = crate::view::tests::record("w", 5);
        let value = ours.to_value().unwrap();
        let lease = LeaseId(7);
        let at =
            |value: Vec<u8>, lease| Entry { key: "k".into(), value, revision: RegistryRevision(3), lease };
        let check = |found: Option<Entry>, expected: Step| {
            assert_eq!(decide(found.as_ref(), &ours, &value, lease), expected, "{found:?}");
        };
        let write_over = || Step::Write(RegistryRevision(3));
        check(None, Step::Write(RegistryRevision(0)));
        check(Some(at(value.clone(), Some(lease))), Step::Keep);
        check(Some(at(value.clone(), Some(LeaseId(6)))), write_over());
        check(Some(at(value.clone(), None)), write_over());
        let draining = WorkerRecord { state: WorkerState::Draining, ..ours.clone() };
        check(Some(at(draining.to_value().unwrap(), Some(lease))), write_over());
        check(Some(at(b"scribble".to_vec(), Some(lease))), write_over());
        let other = WorkerRecord { epoch: Epoch(6), ..ours.clone() };
        let found = at(other.to_value().unwrap(), Some(lease));
        check(Some(found), Step::Other(Box::new(other), RegistryRevision(3)));
    }
}
