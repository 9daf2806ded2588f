//! Whether this router was awake: one that slept for a second would else find all workers silent, and start a storm.

use std::time::Duration;

/// Watches a timer of our own. Times are since any fixed moment.
#[derive(Debug)]
pub(crate) struct Vigil {
    period: Duration,
    last_tick: Duration,
    /// Since when it has been on time.
    awake_since: Duration,
}

impl Vigil {
    /// `period`: between two ticks. One that is late by a whole period, or by this and more, was slept through.
    pub(crate) fn new(period: Duration, now: Duration) -> Self {
        Vigil { period, last_tick: now, awake_since: now }
    }

    /// The timer fired. Says whether it was late.
    pub(crate) fn tick(&mut self, now: Duration) -> bool {
        let late = self.is_late(now);
        if late {
            self.awake_since = now;
        }
        self.last_tick = now;
        late
    }

    /// How long this router has been awake: a silence can be heard for no longer.
    pub(crate) fn awake(&self, now: Duration) -> Duration {
        if self.is_late(now) { Duration::ZERO } else { now.saturating_sub(self.awake_since) }
    }

    fn is_late(&self, now: Duration) -> bool {
        now.saturating_sub(self.last_tick) >= 2 * self.period
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_timer_is_our_own_sleep() {
        let ms = Duration::from_millis;
        let mut vigil = Vigil::new(ms(75), ms(1_000));
        assert!(!vigil.tick(ms(1_075)) && !vigil.tick(ms(1_224)));
        assert_eq!(vigil.awake(ms(1_300)), ms(300));
        // Before the timer is heard of again, and after.
        assert_eq!(vigil.awake(ms(1_374)), ms(0));
        assert!(vigil.tick(ms(2_000)));
        assert_eq!(vigil.awake(ms(2_010)), ms(10));
        assert!(!vigil.tick(ms(2_075)));
        assert_eq!(vigil.awake(ms(2_100)), ms(100));
    }
}
