//! Every wait of this crate. All of it is a setting, so that a test need not wait as long as a cluster does.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::registry::RegistryError;

/// The waits. [`Default`] is what a cluster runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// How long a worker's record outlives its last sign of life.
    pub lease_ttl: Duration,
    /// A full list is held against the watched view this often, give or take a tenth.
    pub full_list_interval: Duration,
    /// A difference between list and watch counts if the watch has not settled it within this.
    pub settle: Duration,
    /// A serving worker whose record vanishes stays in the view for this long: the outage of a registry ends leases
    /// too, and its worker gets the time to register again.
    pub lapse_grace: Duration,
    /// How long the call to an old record's worker may take; then that worker counts as gone.
    pub probe_max: Duration,
    /// First pause between two tries.
    pub backoff_min: Duration,
    /// Longest pause between two tries.
    pub backoff_max: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Times {
            lease_ttl: Duration::from_secs(10),
            full_list_interval: Duration::from_secs(60),
            settle: Duration::from_secs(2),
            lapse_grace: Duration::from_secs(10),
            probe_max: Duration::from_secs(2),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(2),
        }
    }
}

/// How long a start waits for a registry that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until it is there.
    Forever,
    /// This long; zero: one try.
    AtMost(Duration),
}

/// Random numbers for pauses alone (splitmix64): so that a thousand workers do not come back in the same instant.
#[derive(Clone, Debug)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Jitter(seed)
    }

    /// About `mean`: at most `share` of it more or less.
    pub(crate) fn around(&mut self, mean: Duration, share: f64) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        let unit = (x >> 11) as f64 / (1u64 << 53) as f64;
        mean.mul_f64(1.0 + share * (2.0 * unit - 1.0))
    }
}

/// Pauses between tries: doubling, jittered by a quarter.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    times: Times,
    jitter: Jitter,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(times: Times, seed: u64) -> Self {
        Backoff { times, jitter: Jitter::new(seed), next: times.backoff_min }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.times.backoff_min;
    }

    pub(crate) fn pause(&mut self) -> Duration {
        let mean = self.next;
        self.next = (mean * 2).min(self.times.backoff_max);
        self.jitter.around(mean, 0.25)
    }
}

/// One WARN when the registry goes out of reach, one line when it is back, nothing in between.
#[derive(Default)]
pub(crate) struct Outage {
    since: Option<Instant>,
}

impl Outage {
    pub(crate) fn begins(&mut self, endpoint: &str, why: &dyn std::fmt::Display) {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            tracing::warn!(endpoint, error = %why, "registry cannot be used: trying again until it can");
        } else {
            tracing::debug!(endpoint, error = %why, "registry still cannot be used");
        }
    }

    pub(crate) fn ends(&mut self, endpoint: &str) {
        if let Some(since) = self.since.take() {
            tracing::info!(endpoint, away_s = since.elapsed().as_secs_f64(), "registry back");
        }
    }
}

/// Waits between the tries of a call that is made until it works or cannot, as long as `wait` allows.
pub(crate) struct Patience<'a> {
    endpoint: &'a str,
    wait: Wait,
    backoff: Backoff,
    begun: Instant,
    outage: Outage,
}

impl<'a> Patience<'a> {
    pub(crate) fn new(endpoint: &'a str, wait: Wait, backoff: Backoff) -> Self {
        Patience { endpoint, wait, backoff, begun: Instant::now(), outage: Outage::default() }
    }

    /// To be asked after each try that failed: returns when the next one is due.
    ///
    /// # Errors
    /// The try's own, where trying again does not help or the time is over.
    pub(crate) async fn after(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        let left = match self.wait {
            Wait::Forever => Duration::MAX,
            Wait::AtMost(limit) => limit.saturating_sub(self.begun.elapsed()),
        };
        if !error.is_passing() || left.is_zero() {
            return Err(error);
        }
        self.outage.begins(self.endpoint, &error);
        sleep(self.backoff.pause().min(left)).await;
        Ok(())
    }

    /// The call worked.
    pub(crate) fn ends(mut self) {
        self.outage.ends(self.endpoint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_differ_between_seeds() {
        let times = Times::default();
        let of = |seed| {
            let mut backoff = Backoff::new(times, seed);
            (0..8).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        for (n, pause) in of(1).into_iter().enumerate() {
            let mean = (times.backoff_min * 2u32.pow(n as u32)).min(times.backoff_max);
            assert!(pause >= mean.mul_f64(0.75) && pause <= mean.mul_f64(1.25), "pause {n}: {pause:?}");
        }
        assert_ne!(of(1), of(2));
        assert_eq!(of(3), of(3));
        let mut backoff = Backoff::new(times, 1);
        let first = backoff.pause();
        backoff.pause();
        backoff.reset();
        assert!(backoff.pause() < first * 2);
    }

    #[test]
    fn jitter_fills_its_share_and_no_more() {
        let mut jitter = Jitter::new(7);
        let all: Vec<f64> =
            (0..1_000).map(|_| jitter.around(Duration::from_secs(60), 0.1).as_secs_f64()).collect();
        assert!(all.iter().all(|s| (54.0..=66.0).contains(s)));
        assert!(all.iter().any(|s| *s < 55.0) && all.iter().any(|s| *s > 65.0));
    }
}
