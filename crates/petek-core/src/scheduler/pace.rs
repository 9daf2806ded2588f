//! How fast this engine has been lately: what a cost in seconds and a hint when to try again are made of.

/// After this many seconds of work a measurement counts half.
const HALF_LIFE_S: f64 = 2.0;

/// Recent rates, from what steps took. It forgets by the time that steps took, so an idle engine keeps its last word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    prefill_rows: f64,
    prefill_s: f64,
    step_s: f64,
    steps: f64,
}

impl Pace {
    /// Takes one step's time and rows. A step counts for the rate of prefill where at least half of it was prefill:
    /// of a few rows beside many decodes the time says nothing.
    pub fn record(&mut self, seconds: f64, prefill_rows: u32, decode_rows: u32) {
        if !(seconds.is_finite() && seconds > 0.0) {
            return;
        }
        let keep = 0.5f64.powf(seconds / HALF_LIFE_S);
        self.step_s = self.step_s * keep + seconds;
        self.steps = self.steps * keep + 1.0;
        if prefill_rows > 0 && prefill_rows >= decode_rows {
            self.prefill_rows = self.prefill_rows * keep + f64::from(prefill_rows);
            self.prefill_s = self.prefill_s * keep + seconds;
        }
    }

    /// Seconds per step.
    pub fn step_s(&self) -> Option<f64> {
        (self.steps > 0.0).then(|| self.step_s / self.steps)
    }

    /// Prompt tokens computed per second.
    pub fn prefill_tokens_per_s(&self) -> Option<f64> {
        (self.prefill_s > 0.0).then(|| self.prefill_rows / self.prefill_s)
    }

    /// Milliseconds that this many tokens of prefill take.
    pub fn prefill_ms(&self, tokens: u64) -> Option<u64> {
        self.prefill_tokens_per_s().map(|rate| (tokens as f64 / rate * 1e3) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_what_steps_take() {
        let mut pace = Pace::default();
        assert_eq!((pace.step_s(), pace.prefill_ms(10)), (None, None));
        pace.record(f64::NAN, 10, 0);
        pace.record(0.0, 10, 0);
        assert_eq!(pace.step_s(), None);
        pace.record(0.5, 0, 4);
        assert_eq!((pace.step_s(), pace.prefill_tokens_per_s()), (Some(0.5), None));
        pace.record(0.5, 100, 100);
        pace.record(0.5, 1, 2);
        assert_eq!((pace.prefill_tokens_per_s(), pace.prefill_ms(1_000)), (Some(200.0), Some(5_000)));
    }

    #[test]
    fn a_worker_that_slows_down_threefold_says_so_within_five_seconds() {
        let mut pace = Pace::default();
        (0..200).for_each(|_| pace.record(0.1, 300, 0));
        assert!((pace.prefill_tokens_per_s().unwrap() - 3_000.0).abs() < 1.0);
        // 5 s of work at a third of the rate: what was before weighs 2^-2.5.
        (0..17).for_each(|_| pace.record(0.3, 300, 0));
        assert!(pace.prefill_tokens_per_s().unwrap() < 1_400.0);
    }
}
