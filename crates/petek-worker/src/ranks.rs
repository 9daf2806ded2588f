//! The real runner: a group of ranks. Steps are computed as they are submitted; the outcome waits to be collected.

use std::collections::VecDeque;

use petek_core::plan::{StepOutcome, StepPlan};
use petek_model::group::RankGroup;

use crate::runner::{RunnerFault, StepRunner, Ticket};

/// Steps that may be in flight.
const IN_FLIGHT_MAX: usize = 2;

/// A [`StepRunner`] over the ranks of a model.
pub struct RankRunner {
    group: RankGroup,
    done: VecDeque<StepOutcome>,
}

impl RankRunner {
    /// A runner over a group that was started.
    pub fn new(group: RankGroup) -> Self {
        Self { group, done: VecDeque::new() }
    }
}

impl StepRunner for RankRunner {
    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, RunnerFault> {
        if self.done.len() == IN_FLIGHT_MAX {
            return Err(RunnerFault::TooManyInFlight { step: plan.step, in_flight: IN_FLIGHT_MAX });
        }
        let outcome = self
            .group
            .step(plan)
            .map_err(|cause| RunnerFault::Device { step: plan.step, cause: Box::new(cause) })?;
        self.done.push_back(outcome);
        Ok(Ticket(plan.step))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutcome, RunnerFault> {
        match self.done.front() {
            Some(outcome) if outcome.step == ticket.0 => Ok(self.done.pop_front().unwrap_or_default()),
            oldest => {
                Err(RunnerFault::WrongTicket { got: ticket.0, expected: oldest.map(|outcome| outcome.step) })
            }
        }
    }
}
