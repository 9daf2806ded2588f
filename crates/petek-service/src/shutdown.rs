//! From the first signal to the end of a process.
//!
//! ```text
//! loading ──serving()──▶ serving ──SIGTERM, SIGINT, drain()──▶ draining ──the work ends──▶ exit 0
//!    └─ first signal: exit 0 at once        second signal: exit 128 + its number, at once ─▶
//! ```

use std::sync::mpsc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::failure::{Exit, Failure};

/// How far a process is. Every part of it holds a clone; all clones speak of the same process.
#[derive(Clone, Debug)]
pub struct Shutdown {
    phase: watch::Sender<Phase>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Loading,
    Serving,
    Draining,
}

impl Shutdown {
    /// Takes SIGTERM and SIGINT over, on a thread of its own, so that a busy runtime or a long load delays
    /// nothing. To be called first in `main`, once per process, before any runtime: when it returns, both signals
    /// are handled.
    ///
    /// # Errors
    /// [`Exit::Environment`] where the system gives no handler or thread.
    pub fn install() -> Result<Self, Failure> {
        let shutdown = Self::without_signals();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let of_thread = shutdown.clone();
        let fail = |error: &dyn std::fmt::Display| {
            Failure::new(Exit::Environment, format!("take over SIGTERM and SIGINT: {error}"), "")
        };
        let listen = move || {
            let installed =
                tokio::runtime::Builder::new_current_thread().enable_io().build().and_then(|runtime| {
                    let _inside = runtime.enter();
                    let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
                    Ok((runtime, signals))
                });
            match installed {
                Ok((runtime, signals)) => {
                    let _ = ready.send(Ok(()));
                    runtime.block_on(of_thread.listen(signals));
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(|error| fail(&error))?;
        is_ready.recv().map_err(|error| fail(&error))?.map_err(|error| fail(&error))?;
        Ok(shutdown)
    }

    /// One that no signal reaches: for tests, and for a part that lives inside another process.
    pub fn without_signals() -> Self {
        Self { phase: watch::Sender::new(Phase::Loading) }
    }

    /// Says that loading is over: from now on the first signal begins to drain. Does nothing once it drains.
    pub fn serving(&self) {
        self.phase.send_if_modified(|phase| {
            let is_loading = *phase == Phase::Loading;
            if is_loading {
                *phase = Phase::Serving;
            }
            is_loading
        });
    }

    /// Begins to drain without a signal: an operator asked, or the worker was replaced.
    pub fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    /// True once it drains.
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() == Phase::Draining
    }

    /// Waits until it drains; returns at once if it does.
    ///
    /// *Cancel safety*: may be dropped and called again at any point.
    pub async fn draining(&self) {
        // The sender cannot be gone: it is ours.
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Draining).await;
    }

    async fn listen(self, (mut terminate, mut interrupt): (Signal, Signal)) {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => SignalKind::terminate(),
                _ = interrupt.recv() => SignalKind::interrupt(),
            }
        };
        let first = next().await;
        // Under the channel's lock: `serving` comes wholly before or wholly after.
        let before = self.phase.send_replace(Phase::Draining);
        tracing::info!(signal = first.as_raw_value(), loading = before == Phase::Loading, "signal: draining");
        if before == Phase::Loading {
            std::process::exit(0);
        }
        let second = next().await;
        tracing::warn!(signal = second.as_raw_value(), "second signal: ending at once");
        std::process::exit(128 + second.as_raw_value());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everyone_sees_the_drain() {
        let shutdown = Shutdown::without_signals();
        shutdown.serving();
        assert!(!shutdown.is_draining());
        let other = shutdown.clone();
        let waiting = tokio::spawn(async move { other.draining().await });
        shutdown.drain();
        waiting.await.unwrap();
        shutdown.draining().await;
        shutdown.serving();
        assert!(shutdown.is_draining(), "there is no way back");
    }
}
