//! How fast this engine has been lately: what a cost in seconds and a hint when to try again are made of.

/// After this many seconds of work a measurement counts half.
pub const HALF_LIFE_S: f64 = 2.0;

/// A step with fewer rows of prefill says nothing of its rate.
const PREFILL_ROWS_MIN: u32 = 16;

/// Recent rates, from what steps took. It forgets by the time that steps took, so an idle engine keeps its last word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    prefill_rows: f64,
    prefill_s: f64,
    step_s: f64,
    steps: f64,
    decodes: Line,
}

/// A line of least squares through (rows, seconds) of the steps that only decoded, where recent ones weigh more.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
    /// Seconds per row, from the last time that the rows differed enough to tell.
    slope: f64,
}

impl Pace {
    /// Takes one step's time and rows. A step counts for the rate of prefill where at least half of it was prefill,
    /// and not only a few rows: those cost what any step costs, whatever the rate is.
    pub fn record(&mut self, seconds: f64, prefill_rows: u32, decode_rows: u32) {
        if !(seconds.is_finite() && seconds > 0.0) {
            return;
        }
        let keep = 0.5f64.powf(seconds / HALF_LIFE_S);
        self.step_s = self.step_s * keep + seconds;
        self.steps = self.steps * keep + 1.0;
        if prefill_rows >= decode_rows.max(PREFILL_ROWS_MIN) {
            self.prefill_rows = self.prefill_rows * keep + f64::from(prefill_rows);
            self.prefill_s = self.prefill_s * keep + seconds;
        }
        if prefill_rows == 0 {
            self.decodes.record(seconds, decode_rows.into(), keep);
        }
    }

    /// Seconds per step.
    pub fn step_s(&self) -> Option<f64> {
        (self.steps > 0.0).then(|| self.step_s / self.steps)
    }

    /// Seconds that a step would take with one more sequence that decodes; never less than [`Pace::step_s`].
    pub fn step_one_more_s(&self) -> Option<f64> {
        self.step_s().map(|step_s| step_s + self.decodes.slope)
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

/// Rows must have varied by about one for a slope to mean more than noise.
const ROWS_VARIANCE_MIN: f64 = 0.25;

impl Line {
    fn record(&mut self, seconds: f64, rows: f64, keep: f64) {
        self.weight = self.weight * keep + 1.0;
        self.rows = self.rows * keep + rows;
        self.seconds = self.seconds * keep + seconds;
        self.rows_rows = self.rows_rows * keep + rows * rows;
        self.rows_seconds = self.rows_seconds * keep + rows * seconds;
        let mean = self.rows / self.weight;
        let variance = self.rows_rows / self.weight - mean * mean;
        // Under a load that stays as it is the differences of earlier fade away; what they taught stays.
        if variance >= ROWS_VARIANCE_MIN {
            let covariance = self.rows_seconds / self.weight - mean * (self.seconds / self.weight);
            self.slope = (covariance / variance).max(0.0);
        }
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
        pace.record(0.5, 15, 0);
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

    #[test]
    fn one_more_sequence_costs_what_rows_have_cost_lately() {
        let mut pace = Pace::default();
        assert_eq!(pace.step_one_more_s(), None);
        // Nothing to compare with yet, and a prefill says nothing of decoding.
        pace.record(0.010, 0, 4);
        pace.record(0.500, 100, 0);
        assert_eq!(pace.step_one_more_s(), pace.step_s());
        let slope = |pace: &Pace| pace.step_one_more_s().unwrap() - pace.step_s().unwrap();
        let steps = |pace: &mut Pace, rows: std::ops::Range<u32>, a: f64, b: f64| {
            rows.for_each(|rows| pace.record(a + b * f64::from(rows), 0, rows));
        };
        steps(&mut pace, 1..9, 0.008, 0.0005);
        assert!((slope(&pace) - 0.0005).abs() < 1e-9, "{}", slope(&pace));
        // A long time at one size, up to noise: the slope stays.
        (0..2_000).for_each(|i| pace.record(0.010 + 1e-5 * f64::from(i % 3), 0, 4));
        assert!((slope(&pace) - 0.0005).abs() < 5e-6, "{}", slope(&pace));
        // Three times slower: within 24 s of steps what was before weighs 2^-12.
        (0..100).for_each(|_| steps(&mut pace, 1..9, 0.024, 0.0015));
        assert!((slope(&pace) - 0.0015).abs() < 1e-4, "{}", slope(&pace));
        // More rows in less time is noise, never a gain.
        (0..300).for_each(|_| steps(&mut pace, 1..9, 0.024, -0.001));
        assert_eq!(slope(&pace), 0.0);
    }
}
