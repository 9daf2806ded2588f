//! A rank group in one process: each rank on a named OS thread of its own, all fed the same plans.
//!
//! The caller hands a plan in and gets rank 0's outcome. Whatever fails in any rank aborts the collective, so that no other
//! rank waits for it, and ends the group: every later call gives the first failure again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use petek_core::plan::{StepOutcome, StepPlan};
use petek_device::collective::Collective;

use crate::rank::{Rank, StepError};

/// Ranks as threads of this process.
pub struct RankGroup {
    members: Vec<Member>,
    /// The last step, which the ranks that do not sample learn of with the next one; kept only where there are such.
    before: Option<Arc<Before>>,
    failed: Option<String>,
}

/// A step that is done: what was planned and what the first rank drew.
struct Before {
    plan: Arc<StepPlan>,
    outcome: StepOutcome,
}

struct Member {
    plans: Option<SyncSender<Work>>,
    outcomes: Receiver<Result<StepOutcome, GroupError>>,
    thread: Option<JoinHandle<()>>,
}

/// A plan and, for ranks that do not sample, what the first rank drew in the step before.
struct Work {
    plan: Arc<StepPlan>,
    before: Option<Arc<Before>>,
}

/// A group that could not do a step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// A rank failed; the group has ended.
    #[error("rank {rank} failed: {problem}")]
    Rank {
        /// Which.
        rank: usize,
        /// What happened.
        problem: String,
    },
    /// The group has ended before.
    #[error("the rank group has ended: {0}")]
    Ended(String),
}

/// Makes one rank, on its own thread: loading is done by all ranks side by side.
pub type BuildRank<E> = dyn Fn(usize, Arc<dyn Collective>) -> Result<Rank, E> + Send + Sync;

impl RankGroup {
    /// Starts one thread for each member of `collective` and builds its rank there.
    ///
    /// *Errors*: the first rank's that could not be built, by rank.
    pub fn start<E: std::fmt::Display + 'static>(
        collective: Vec<Arc<dyn Collective>>,
        build: Arc<BuildRank<E>>,
    ) -> Result<Self, GroupError> {
        let members: Vec<Member> = collective
            .into_iter()
            .enumerate()
            .map(|(rank, collective)| {
                let (plans, inbox) = sync_channel(1);
                let (outbox, outcomes) = sync_channel(1);
                let build = build.clone();
                let thread = std::thread::Builder::new()
                    .name(format!("rank-{rank}"))
                    .spawn(move || {
                        serve(rank, &*collective.clone(), move || build(rank, collective), inbox, outbox)
                    })
                    .map_err(|e| GroupError::Rank { rank, problem: format!("start its thread: {e}") })?;
                Ok(Member { plans: Some(plans), outcomes, thread: Some(thread) })
            })
            .collect::<Result<_, GroupError>>()?;
        let mut group = Self { members, before: None, failed: None };
        group.gather()?;
        Ok(group)
    }

    /// Carries out one plan on all ranks.
    ///
    /// *Errors*: the first failure; the group has then ended.
    pub fn step(&mut self, plan: &StepPlan) -> Result<StepOutcome, GroupError> {
        if let Some(failed) = &self.failed {
            return Err(GroupError::Ended(failed.clone()));
        }
        let plan = Arc::new(plan.clone());
        for (rank, member) in self.members.iter().enumerate() {
            let before = if rank == 0 { None } else { self.before.clone() };
            if let Some(plans) = &member.plans {
                // A rank that is gone has said why in its last outcome, which `gather` finds.
                let _ = plans.send(Work { plan: plan.clone(), before });
            }
        }
        let outcome = self.gather()?;
        if self.members.len() > 1 {
            self.before = Some(Arc::new(Before { plan, outcome: outcome.clone() }));
        }
        Ok(outcome)
    }

    /// One answer of every rank: rank 0's, or the failure that was not merely the echo of another's.
    fn gather(&mut self) -> Result<StepOutcome, GroupError> {
        let gone = |rank| GroupError::Rank { rank, problem: "its thread is gone".to_owned() };
        let mut answers: Vec<_> = self
            .members
            .iter()
            .enumerate()
            .map(|(rank, member)| member.outcomes.recv().unwrap_or_else(|_| Err(gone(rank))))
            .collect();
        let is_echo = |error: &GroupError| error.to_string().contains("the rank group was aborted");
        let mut failures: Vec<GroupError> =
            answers.iter().filter_map(|answer| answer.clone().err()).collect();
        failures.sort_by_key(is_echo);
        match failures.into_iter().next() {
            Some(failure) => {
                self.failed = Some(failure.to_string());
                Err(failure)
            }
            None => answers.swap_remove(0),
        }
    }
}

impl Drop for RankGroup {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.plans = None;
        }
        for member in &mut self.members {
            if let Some(thread) = member.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

/// A rank's thread: builds, answers, then one answer for each plan until the group is dropped or something fails.
fn serve<E: std::fmt::Display>(
    rank: usize,
    collective: &dyn Collective,
    build: impl FnOnce() -> Result<Rank, E>,
    inbox: Receiver<Work>,
    outbox: SyncSender<Result<StepOutcome, GroupError>>,
) {
    let failed = |problem: String| {
        collective.abort(&format!("rank {rank}: {problem}"));
        Err(GroupError::Rank { rank, problem })
    };
    let mut built = match catch_unwind(AssertUnwindSafe(build)) {
        Ok(Ok(built)) => built,
        Ok(Err(error)) => {
            let _ = outbox.send(failed(error.to_string()));
            return;
        }
        Err(_) => {
            let _ = outbox.send(failed("it panicked while loading".to_owned()));
            return;
        }
    };
    let mut answer = Ok(StepOutcome::default());
    loop {
        let ends = answer.is_err();
        if outbox.send(answer).is_err() || ends {
            return;
        }
        let Ok(work) = inbox.recv() else { return };
        let stepped = catch_unwind(AssertUnwindSafe(|| -> Result<StepOutcome, StepError> {
            if let Some(before) = &work.before {
                built.learn(&before.plan, &before.outcome);
            }
            built.step(&work.plan)
        }));
        answer = match stepped {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(error)) => failed(error.to_string()),
            Err(_) => failed(format!("it panicked in step {}", work.plan.step)),
        };
    }
}
