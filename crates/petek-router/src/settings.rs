//! The settings of a router: numbers as a user types them, each with its unit in its name.

use std::time::Duration;

use petek_core::limits::{call, link, listener};
use serde::{Deserialize, Serialize};

use crate::relay::Patience;

/// All settings that are not addresses or secrets. [`RouterSettings::check`] them once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterSettings {
    /// Requests at once; one more is refused.
    pub requests_max: usize,
    /// Bytes that may wait for a client before it counts as slow.
    pub slow_consumer_bytes: usize,
    /// How long something may wait for a client before it counts as slow.
    pub slow_consumer_ms: u64,
    /// The deadline of a call that names none.
    pub deadline_ms_default: u64,
    /// The longest deadline.
    pub deadline_ms_max: u64,
    /// Threads that tokenise. 0: half the cores.
    pub tokenize_threads: usize,
    /// Texts that wait for such a thread; one more is refused.
    pub tokenize_queue: usize,
    /// After this a public connection is asked to go away; its streams finish.
    pub connection_age_ms: u64,
    /// A public connection without a call is closed after this.
    pub connection_idle_ms: u64,
    /// What the prefix index may take. Beyond it the oldest, least-hit chains are forgotten.
    pub index_bytes_max: usize,
    /// Changes of the registry that wait for the router.
    pub registry_queue: usize,
    /// How long a stopping server waits for clients to read their last bytes.
    pub linger_ms: u64,
    /// The connections to workers.
    pub link: LinkSettings,
}

/// The settings of the connections to workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSettings {
    /// Until a connection stands.
    pub connect_ms_max: u64,
    /// A ping this often, also when idle.
    pub ping_interval_ms: u64,
    /// The worker is lost when a ping is unanswered for this long.
    pub ping_timeout_ms: u64,
    /// We say that we live this often.
    pub heartbeat_interval_ms: u64,
    /// A worker that says nothing at all for this long is lost.
    pub silence_ms_max: u64,
    /// The first pause after a failure; it doubles with each.
    pub retry_ms_min: u64,
    /// The longest pause.
    pub retry_ms_max: u64,
    /// Requests that wait to be written to one worker's stream.
    pub submit_queue: usize,
    /// A worker without a load report for this long gets no new work.
    pub load_silence_ms_max: u64,
    /// The longest pause before a worker's KV events are asked for again.
    pub kv_retry_ms_max: u64,
    /// Snapshots of workers' caches that are read at once.
    pub snapshots_max: usize,
    /// How long after its prefill a prompt is expected to be held without word of it.
    pub prediction_grace_ms: u64,
}

impl Default for RouterSettings {
    fn default() -> Self {
        RouterSettings {
            requests_max: 16_384,
            slow_consumer_bytes: call::SLOW_CONSUMER_BYTES,
            slow_consumer_ms: call::SLOW_CONSUMER_S * 1_000,
            deadline_ms_default: call::DEADLINE_S_DEFAULT * 1_000,
            deadline_ms_max: call::DEADLINE_S_MAX * 1_000,
            tokenize_threads: 0,
            tokenize_queue: 1_024,
            connection_age_ms: listener::AGE_S_MAX * 1_000,
            connection_idle_ms: listener::IDLE_S_MAX * 1_000,
            index_bytes_max: 512 << 20,
            registry_queue: 256,
            linger_ms: 5_000,
            link: LinkSettings::default(),
        }
    }
}

impl Default for LinkSettings {
    fn default() -> Self {
        LinkSettings {
            connect_ms_max: link::CONNECT_MS_MAX,
            ping_interval_ms: link::PING_INTERVAL_MS,
            ping_timeout_ms: link::PING_TIMEOUT_MS,
            heartbeat_interval_ms: link::HEARTBEAT_INTERVAL_MS,
            silence_ms_max: link::WORKER_SILENCE_MS_MAX,
            retry_ms_min: 50,
            retry_ms_max: 5_000,
            submit_queue: 64,
            load_silence_ms_max: link::LOAD_SUSPECT_MS,
            kv_retry_ms_max: 60_000,
            snapshots_max: 2,
            prediction_grace_ms: 1_000,
        }
    }
}

impl RouterSettings {
    /// Says what cannot be: the key, with dots, and why.
    ///
    /// # Errors
    /// The first setting that is wrong.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let link = &self.link;
        let positive = [
            ("requests_max", self.requests_max as u64),
            ("slow_consumer_bytes", self.slow_consumer_bytes as u64),
            ("slow_consumer_ms", self.slow_consumer_ms),
            ("deadline_ms_default", self.deadline_ms_default),
            ("tokenize_queue", self.tokenize_queue as u64),
            ("registry_queue", self.registry_queue as u64),
            ("connection_age_ms", self.connection_age_ms),
            ("connection_idle_ms", self.connection_idle_ms),
            ("link.connect_ms_max", link.connect_ms_max),
            ("link.ping_interval_ms", link.ping_interval_ms),
            ("link.ping_timeout_ms", link.ping_timeout_ms),
            ("link.heartbeat_interval_ms", link.heartbeat_interval_ms),
            ("link.retry_ms_min", link.retry_ms_min),
            ("link.submit_queue", link.submit_queue as u64),
            ("link.load_silence_ms_max", link.load_silence_ms_max),
            ("link.snapshots_max", link.snapshots_max as u64),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err((key, "it must be at least 1"));
        }
        if self.requests_max > REQUESTS_MAX {
            return Err(("requests_max", "it must be at most 1,000,000"));
        }
        if self.registry_queue > REQUESTS_MAX {
            return Err(("registry_queue", "it must be at most 1,000,000"));
        }
        if self.deadline_ms_default > self.deadline_ms_max {
            return Err(("deadline_ms_default", "it must be at most deadline_ms_max"));
        }
        if link.retry_ms_min > link.retry_ms_max {
            return Err(("link.retry_ms_min", "it must be at most link.retry_ms_max"));
        }
        if self.index_bytes_max < INDEX_BYTES_MIN {
            return Err(("index_bytes_max", "it must be at least 1 MiB"));
        }
        if link.snapshots_max > SNAPSHOTS_MAX {
            return Err(("link.snapshots_max", "it must be at most 1,000"));
        }
        if link.retry_ms_min > link.kv_retry_ms_max {
            return Err(("link.retry_ms_min", "it must be at most link.kv_retry_ms_max"));
        }
        if link.silence_ms_max < 2 * link.heartbeat_interval_ms {
            return Err(("link.silence_ms_max", "it must be at least two of link.heartbeat_interval_ms"));
        }
        Ok(())
    }

    pub(crate) fn patience(&self) -> Patience {
        Patience { bytes: self.slow_consumer_bytes, time: Duration::from_millis(self.slow_consumer_ms) }
    }

    /// Where the router itself puts an answer together, the client is not to blame for what waits: there may be more
    /// than a message holds, which is then the reason that is given.
    pub(crate) fn patience_with_itself(&self) -> Patience {
        Patience {
            bytes: 2 * listener::MESSAGE_OUT_BYTES_MAX,
            time: Duration::from_millis(self.deadline_ms_max),
        }
    }
}

impl LinkSettings {
    /// How often the router looks whether it is awake, and at silent workers.
    pub(crate) fn vigil_period(&self) -> Duration {
        Duration::from_millis((self.load_silence_ms_max / 4).max(1))
    }
}

/// Some thousand blocks: less is no index.
const INDEX_BYTES_MIN: usize = 1 << 20;
/// More at once than workers is the same as no limit.
const SNAPSHOTS_MAX: usize = 1_000;
/// Far beyond what one process can relay, and far below what a semaphore counts to.
const REQUESTS_MAX: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_hold_and_what_cannot_be_is_named() {
        assert_eq!(RouterSettings::default().check(), Ok(()));
        let check = |change: fn(&mut RouterSettings), key: &str| {
            let mut settings = RouterSettings::default();
            change(&mut settings);
            assert_eq!(settings.check().map_err(|(key, _)| key), Err(key));
        };
        check(|s| s.requests_max = 0, "requests_max");
        check(|s| s.requests_max = usize::MAX, "requests_max");
        check(|s| s.link.submit_queue = 0, "link.submit_queue");
        check(|s| s.deadline_ms_default = s.deadline_ms_max + 1, "deadline_ms_default");
        check(|s| s.link.retry_ms_min = s.link.retry_ms_max + 1, "link.retry_ms_min");
        check(|s| s.link.silence_ms_max = 1_999, "link.silence_ms_max");
        check(|s| s.index_bytes_max = 1_000, "index_bytes_max");
        check(|s| s.link.snapshots_max = 0, "link.snapshots_max");
        check(|s| s.link.kv_retry_ms_max = 1, "link.retry_ms_min");
    }
}
