//! The seam between the engine, which decides what a step is, and whatever computes it.

use petek_core::ids::{BlockId, SlotId, StepNumber};
use petek_core::plan::{StepOutcome, StepPlan};

/// A step that was handed in and not yet collected.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a step that is never collected holds its blocks for ever"]
pub struct Ticket(pub StepNumber);

/// Computes steps. At most two are in flight: the synchronous mode collects before it submits again.
///
/// A span names a *slot*, which a plan fills at admission and releases later; the runner keeps the slot's ids, what
/// it samples included, and its block table, of which plans say only what is new. Steps are computed in the order in
/// which they were submitted.
pub trait StepRunner {
    /// Begins a step.
    ///
    /// # Errors
    /// A third step in flight, a plan that does not fit what came before it, or a device that fails.
    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, RunnerFault>;

    /// Waits for the oldest step in flight.
    ///
    /// # Errors
    /// A ticket that is not the oldest in flight, or a device that failed. After an error of the device the runner is
    /// of no more use.
    fn collect(&mut self, ticket: Ticket) -> Result<StepOutcome, RunnerFault>;
}

/// A runner that cannot go on, or was told what cannot be.
#[derive(Debug, thiserror::Error)]
pub enum RunnerFault {
    /// One more step than may be in flight.
    #[error("step {step} was submitted while {in_flight} are in flight, the most there may be")]
    TooManyInFlight {
        /// The step.
        step: StepNumber,
        /// Steps not collected.
        in_flight: usize,
    },
    /// Not the oldest step in flight.
    #[error("step {got} was collected; the oldest in flight is {expected:?}")]
    WrongTicket {
        /// The ticket's.
        got: StepNumber,
        /// The oldest in flight.
        expected: Option<StepNumber>,
    },
    /// The plan names a slot that is not as the plan supposes.
    #[error("step {step}, slot {slot}: {problem}")]
    Slot {
        /// The step.
        step: StepNumber,
        /// The slot.
        slot: SlotId,
        /// What is wrong.
        problem: String,
    },
    /// The plan names a block that cannot be used so.
    #[error("step {step}, block {block}: {problem}")]
    Block {
        /// The step.
        step: StepNumber,
        /// The block.
        block: BlockId,
        /// What is wrong.
        problem: String,
    },
    /// The device, or the model on it, failed.
    #[error("step {step}: the device failed")]
    Device {
        /// The step.
        step: StepNumber,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}
