//! How an engine stands after a round: one value, so that its parts are of the same moment.

use std::time::Duration;

use petek_core::ids::Epoch;
use petek_core::scheduler::{Counters, HALF_LIFE_S, Load};
use petek_proto::worker::v1::{EngineStatus, LoadReport, RouterProgress, WorkerState};

/// Whether new requests are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Intake {
    /// They are.
    #[default]
    Open,
    /// All are refused: the worker drains.
    Closed,
}

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct EngineReport {
    pub(crate) intake: Intake,
    /// Requests that have not ended.
    pub(crate) requests: usize,
    /// Requests that have not been admitted.
    pub(crate) waiting: u32,
    pub(crate) load: Load,
    /// Since when there is nothing to compute, on the engine's clock.
    pub(crate) idle_since: Option<Duration>,
    pub(crate) counters: Counters,
    pub(crate) blocks_total: u32,
    /// Blocks that can be found by hash.
    pub(crate) blocks_cached: u32,
    pub(crate) kv_seq: u64,
    /// XOR of the names of the blocks that can be found.
    pub(crate) kv_digest: [u8; 16],
    pub(crate) routers: Vec<RouterProgress>,
}

impl EngineReport {
    /// As routers hear it at `now`. What was not measured yet is 0.
    ///
    /// An idle engine measures nothing, and soon it is no more believed in what one more sequence costs: a worker that
    /// seemed dear because of noise would else never get the work that shows it to be cheap.
    pub(crate) fn load_report(
        &self,
        worker: &str,
        epoch: Epoch,
        state: WorkerState,
        now: Duration,
    ) -> LoadReport {
        let idle = self.idle_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        let step_s = self.load.step_s.unwrap_or(0.0);
        let slower_s = self.load.step_one_more_s.unwrap_or(0.0) - step_s;
        let believed = 0.5f64.powf(idle.as_secs_f64() / HALF_LIFE_S);
        LoadReport {
            worker: worker.to_owned(),
            epoch: epoch.0,
            state: state.into(),
            waiting_tokens: self.load.uncached_tokens_waiting,
            running: self.load.running as u32,
            waiting: self.waiting,
            blocks_free: self.load.blocks_free as u32,
            blocks_total: self.blocks_total,
            step_s,
            step_one_more_s: step_s + slower_s * believed,
            prefill_tokens_per_s: self.load.prefill_tokens_per_s.unwrap_or(0.0),
            routers: self.routers.clone(),
        }
    }

    /// As people and tests see it.
    pub(crate) fn status(
        &self,
        worker: &str,
        epoch: Epoch,
        state: WorkerState,
        uptime_ms: u64,
    ) -> EngineStatus {
        EngineStatus {
            worker: worker.to_owned(),
            epoch: epoch.0,
            state: state.into(),
            uptime_ms,
            steps: self.counters.steps,
            blocks_total: self.blocks_total,
            blocks_free: self.load.blocks_free as u32,
            blocks_cached: self.blocks_cached,
            running: self.load.running as u32,
            waiting: self.waiting,
            waiting_tokens: self.load.uncached_tokens_waiting,
            preemptions: self.counters.preemptions,
            prompt_tokens: self.counters.prompt_tokens_computed,
            cached_tokens: self.counters.prompt_tokens_cached,
            completion_tokens: self.counters.tokens_drawn,
            // Runners do not say it yet.
            weight_bytes_read: 0,
            kv_seq: self.kv_seq,
            kv_digest: self.kv_digest.to_vec().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_engine_forgets_what_one_more_sequence_costs() {
        let load = Load { step_s: Some(0.010), step_one_more_s: Some(0.014), ..Load::default() };
        let slower = |idle_since: Option<f64>, now: f64| {
            let report = EngineReport {
                load,
                idle_since: idle_since.map(Duration::from_secs_f64),
                ..EngineReport::default()
            };
            let said = report.load_report("w", Epoch(1), WorkerState::Serving, Duration::from_secs_f64(now));
            assert_eq!(said.step_s, 0.010);
            said.step_one_more_s - said.step_s
        };
        for (idle_since, now, expected) in
            [(None, 99.0, 0.004), (Some(7.0), 7.0, 0.004), (Some(7.0), 9.0, 0.002), (Some(7.0), 11.0, 0.001)]
        {
            assert!((slower(idle_since, now) - expected).abs() < 1e-12, "{idle_since:?} at {now}");
        }
    }
}
