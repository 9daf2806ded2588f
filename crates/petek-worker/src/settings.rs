//! The settings of a worker: numbers as a user types them, each with its unit in its name.

use petek_core::limits::engine::STEPS_IN_FLIGHT_MAX;
use petek_core::limits::{call, link, listener};
use serde::{Deserialize, Serialize};

/// All settings that are not addresses, secrets or the model's. [`WorkerSettings::check`] them once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerSettings {
    /// Steps handed to the runner before one is collected: 1, or 2 where host work hides behind the device's.
    pub steps_in_flight: usize,
    /// Requests and cancels that wait for the engine's next step; the streams of routers wait beyond it.
    pub command_queue: usize,
    /// Requests that break the numbers within `numerical_error_window_ms` before the worker drains itself.
    pub numerical_errors_max: usize,
    /// See `numerical_errors_max`.
    pub numerical_error_window_ms: u64,
    /// Between the announcement of a drain and the first refusal: routers hear of it and send elsewhere.
    pub drain_notice_ms: u64,
    /// How long a stopping worker waits for routers to read their last bytes, and for the registry.
    pub linger_ms: u64,
    /// The streams of routers.
    pub link: LinkSettings,
    /// What routers are told of load and cache.
    pub feed: FeedSettings,
}

/// The settings of the connections and streams of routers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSettings {
    /// Connections at once; more wait in the system's backlog.
    pub connections_max: usize,
    /// Until a connection has said its preface.
    pub handshake_ms_max: u64,
    /// A ping after this long without traffic.
    pub ping_interval_ms: u64,
    /// A connection is closed when its ping is unanswered for this long.
    pub ping_timeout_ms: u64,
    /// Execute streams at once; one more is refused.
    pub streams_max: usize,
    /// Bytes of answers that one Execute stream may hold unread, tokens and logprobs counted as they travel; past it
    /// the stream ends with SLOW_CONSUMER and its sequences with it.
    pub outbox_bytes_max: usize,
    /// We say that we live this often.
    pub heartbeat_interval_ms: u64,
    /// A router that says nothing at all for this long loses its sequences.
    pub router_silence_ms_max: u64,
    /// The whole of a model card must be read within this.
    pub card_ms_max: u64,
}

/// The settings of what routers are told of load and cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FeedSettings {
    /// Subscriptions at once, to load and to events; one more is refused.
    pub watchers_max: usize,
    /// Messages that wait for one subscriber's transport.
    pub watch_queue: usize,
    /// Load is pushed on change, but no more often.
    pub load_interval_ms_min: u64,
    /// Load is pushed without change this often.
    pub load_interval_ms_max: u64,
    /// KV events of this long go into one batch.
    pub kv_batch_ms_max: u64,
    /// Batches that are kept for a router that missed some.
    pub kv_ring_batches: usize,
    /// The digest of the cache is told this often.
    pub kv_heartbeat_interval_ms: u64,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        WorkerSettings {
            steps_in_flight: 1,
            command_queue: 1_024,
            numerical_errors_max: petek_core::limits::engine::NUMERICAL_ERRORS_MAX as usize,
            numerical_error_window_ms: 60_000,
            drain_notice_ms: link::LOAD_INTERVAL_MS_MAX,
            linger_ms: 5_000,
            link: LinkSettings::default(),
            feed: FeedSettings::default(),
        }
    }
}

impl Default for LinkSettings {
    fn default() -> Self {
        LinkSettings {
            connections_max: 1_024,
            handshake_ms_max: listener::HANDSHAKE_S_MAX * 1_000,
            ping_interval_ms: listener::KEEPALIVE_INTERVAL_S * 1_000,
            ping_timeout_ms: listener::KEEPALIVE_TIMEOUT_S * 1_000,
            streams_max: 256,
            outbox_bytes_max: 64 << 20,
            heartbeat_interval_ms: link::HEARTBEAT_INTERVAL_MS,
            router_silence_ms_max: link::ROUTER_SILENCE_MS_MAX,
            card_ms_max: call::DEADLINE_S_DEFAULT * 1_000,
        }
    }
}

impl Default for FeedSettings {
    fn default() -> Self {
        FeedSettings {
            watchers_max: 1_024,
            watch_queue: 4,
            load_interval_ms_min: link::LOAD_INTERVAL_MS_MIN,
            load_interval_ms_max: link::LOAD_INTERVAL_MS_MAX,
            kv_batch_ms_max: link::KV_BATCH_MS_MAX,
            kv_ring_batches: link::KV_RING_BATCHES,
            kv_heartbeat_interval_ms: link::HEARTBEAT_INTERVAL_MS,
        }
    }
}

impl WorkerSettings {
    /// Says what cannot be: the key, with dots, and why.
    ///
    /// # Errors
    /// The first setting that is wrong.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let (link, feed) = (&self.link, &self.feed);
        let positive = [
            ("steps_in_flight", self.steps_in_flight as u64),
            ("command_queue", self.command_queue as u64),
            ("numerical_errors_max", self.numerical_errors_max as u64),
            ("numerical_error_window_ms", self.numerical_error_window_ms),
            ("link.connections_max", link.connections_max as u64),
            ("link.handshake_ms_max", link.handshake_ms_max),
            ("link.ping_interval_ms", link.ping_interval_ms),
            ("link.ping_timeout_ms", link.ping_timeout_ms),
            ("link.streams_max", link.streams_max as u64),
            ("link.outbox_bytes_max", link.outbox_bytes_max as u64),
            ("link.heartbeat_interval_ms", link.heartbeat_interval_ms),
            ("link.card_ms_max", link.card_ms_max),
            ("feed.watchers_max", feed.watchers_max as u64),
            ("feed.watch_queue", feed.watch_queue as u64),
            ("feed.load_interval_ms_min", feed.load_interval_ms_min),
            ("feed.kv_ring_batches", feed.kv_ring_batches as u64),
            ("feed.kv_heartbeat_interval_ms", feed.kv_heartbeat_interval_ms),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err((key, "it must be at least 1"));
        }
        let counts = [
            ("command_queue", self.command_queue),
            ("numerical_errors_max", self.numerical_errors_max),
            ("link.connections_max", link.connections_max),
            ("link.streams_max", link.streams_max),
            ("feed.watchers_max", feed.watchers_max),
            ("feed.watch_queue", feed.watch_queue),
            ("feed.kv_ring_batches", feed.kv_ring_batches),
        ];
        if let Some((key, _)) = counts.into_iter().find(|(_, count)| *count > COUNT_MAX) {
            return Err((key, "it must be at most 1,000,000"));
        }
        if self.steps_in_flight > STEPS_IN_FLIGHT_MAX {
            return Err(("steps_in_flight", "it must be 1 or 2"));
        }
        if link.router_silence_ms_max < 2 * link.heartbeat_interval_ms {
            return Err((
                "link.router_silence_ms_max",
                "it must be at least two of link.heartbeat_interval_ms",
            ));
        }
        if feed.load_interval_ms_min > feed.load_interval_ms_max {
            return Err(("feed.load_interval_ms_min", "it must be at most feed.load_interval_ms_max"));
        }
        Ok(())
    }
}

/// Far beyond what one process can serve, and far below what a semaphore counts to.
const COUNT_MAX: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_hold_and_what_cannot_be_is_named() {
        assert_eq!(WorkerSettings::default().check(), Ok(()));
        let check = |change: fn(&mut WorkerSettings), key: &str| {
            let mut settings = WorkerSettings::default();
            change(&mut settings);
            assert_eq!(settings.check().map_err(|(key, _)| key), Err(key));
        };
        check(|s| s.steps_in_flight = 0, "steps_in_flight");
        check(|s| s.steps_in_flight = 3, "steps_in_flight");
        check(|s| s.command_queue = 0, "command_queue");
        check(|s| s.link.streams_max = usize::MAX, "link.streams_max");
        check(|s| s.link.router_silence_ms_max = 1_999, "link.router_silence_ms_max");
        check(|s| s.feed.load_interval_ms_min = 101, "feed.load_interval_ms_min");
        check(|s| s.feed.kv_ring_batches = 0, "feed.kv_ring_batches");
    }
}
