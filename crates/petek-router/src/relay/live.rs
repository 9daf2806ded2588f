//! A journal between the tasks that share it: the worker's stream writes, the client's stream reads, the driver
//! waits for its turns. Nobody holds the lock across a wait, so a slow client stops nobody.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use petek_proto::worker::v1::SubmitSequence;
use petek_service::RouterSeries;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::journal::{Cause, Effects, Journal, Placement, Standing};
use super::outbox::Outgoing;
use crate::link::{InFlight, Session};
use crate::lock;

/// One request, from its arrival to its end.
pub(crate) struct Live {
    arrived: Instant,
    deadline: Instant,
    slow_check: Duration,
    series: Arc<RouterSeries>,
    shared: Mutex<Shared>,
    /// The driver's: the standing changed.
    turned: Notify,
    /// The client's: something waits.
    readable: Notify,
}

struct Shared {
    journal: Journal,
    /// Where the attempt is, once it was sent.
    place: Option<Place>,
    /// What the request weighs on its worker; gone with its attempt.
    in_flight: Option<InFlight>,
    /// Its place among the requests of this router; gone with its end.
    _permit: Option<OwnedSemaphorePermit>,
}

#[derive(Clone)]
struct Place {
    session: Arc<Session>,
    dispatch: u64,
}

impl Live {
    /// `slow_client_ms`: how long something may wait for the client, which is looked at eight times as often.
    pub(crate) fn new(
        journal: Journal,
        arrived: Instant,
        deadline: Instant,
        slow_client: Duration,
        series: Arc<RouterSeries>,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Live {
            arrived,
            deadline,
            slow_check: (slow_client / 8).max(Duration::from_millis(1)),
            series,
            shared: Mutex::new(Shared { journal, place: None, in_flight: None, _permit: Some(permit) }),
            turned: Notify::new(),
            readable: Notify::new(),
        }
    }

    /// Tells the journal something and does what follows from it. A panic in there ends this request alone.
    pub(crate) fn tell(&self, what: impl FnOnce(&mut Journal, Duration)) {
        let now = self.arrived.elapsed();
        let mut shared = self.lock();
        if catch_unwind(AssertUnwindSafe(|| what(&mut shared.journal, now))).is_err() {
            tracing::error!("a request's journal failed");
            shared.journal.stop(Cause::Internal, now);
        }
        let effects = shared.journal.take_effects();
        if let Some(in_flight) = shared.in_flight.as_mut() {
            if let Some((_, cached_tokens)) = effects.cached {
                in_flight.admitted(cached_tokens);
            }
            if effects.prefilled {
                in_flight.prefilled();
            }
        }
        let standing = shared.journal.standing();
        let (turned, over) = (*standing != Standing::Dispatched, *standing == Standing::Over);
        let place = shared.place.clone();
        if turned {
            shared.in_flight = None;
            shared.place = None;
        }
        if over {
            shared._permit = None;
        }
        drop(shared);

        if let Some(place) = place.filter(|_| !effects.cancel.is_empty()) {
            place.session.cancel(place.dispatch, &effects.cancel);
        }
        self.count(&effects);
        if turned {
            self.turned.notify_one();
        }
        self.readable.notify_one();
    }

    /// Begins the next attempt. None where the request is over.
    pub(crate) fn begin_attempt(
        &self,
        placement: Placement,
        in_flight: InFlight,
    ) -> Option<(u32, Vec<SubmitSequence>)> {
        let mut shared = self.lock();
        let begun = shared.journal.begin_attempt(placement)?;
        shared.in_flight = Some(in_flight);
        Some(begun)
    }

    /// Says that an attempt is about to be sent under this number; false if nobody wants it any more. From now on
    /// cancelling goes through the session.
    pub(crate) fn sent(&self, attempt: u32, session: &Arc<Session>, dispatch: u64) -> bool {
        let mut shared = self.lock();
        let wanted = shared.journal.awaits(attempt);
        if wanted {
            if let Some(in_flight) = &mut shared.in_flight {
                in_flight.sent(session.stream, dispatch);
            }
            shared.place = Some(Place { session: session.clone(), dispatch });
        }
        wanted
    }

    /// Says that the job of an attempt is gone; unless it was sent, nobody will hear of it again.
    pub(crate) fn dropped(&self, attempt: u32) {
        if self.lock().place.is_none() {
            self.tell(|journal, now| journal.not_sent(attempt, now));
        }
    }

    /// Waits until the attempt has come to something, and ends the request where its time is over before.
    ///
    /// *Cancel safety*: may be dropped and called again at any point.
    pub(crate) async fn settled(&self) -> Standing {
        let mut slow_check = interval(self.slow_check);
        slow_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let turned = self.turned.notified();
            let standing = self.lock().journal.standing().clone();
            if standing != Standing::Dispatched {
                return standing;
            }
            tokio::select! {
                () = turned => {}
                () = sleep_until(self.deadline) => self.tell(|journal, now| journal.stop(Cause::Deadline, now)),
                _ = slow_check.tick() => {
                    if self.lock().journal.is_slow(self.arrived.elapsed()) {
                        self.tell(Journal::judge_client);
                    }
                }
            }
        }
    }

    /// The client's next event. After the last one it waits for ever.
    ///
    /// *Cancel safety*: nothing is lost when it is dropped.
    pub(crate) async fn next(&self) -> Outgoing {
        loop {
            let readable = self.readable.notified();
            if let Some(next) = self.lock().journal.take(self.arrived.elapsed()) {
                return next;
            }
            readable.await;
        }
    }

    /// What is left of the deadline.
    pub(crate) fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn count(&self, effects: &Effects) {
        let series = &self.series;
        if let Some(ttft) = effects.ttft {
            series.ttft_seconds.observe(ttft.as_secs_f64());
        }
        for &(tokens, gap) in &effects.gaps {
            let each = gap.as_secs_f64() / f64::from(tokens);
            (0..tokens).for_each(|_| series.itl_seconds.observe(each));
        }
        series.dropped_tokens.inc_by(effects.dropped_tokens.into());
        if let Some((predicted, actual)) = effects.cached {
            series.count_cached(predicted.into(), actual.into());
        }
        if let Some(problem) = &effects.fault {
            tracing::error!(problem, "a worker broke the protocol");
        }
        if let Some(account) = &effects.over {
            series.requests.of(account.outcome).inc();
            series.request_seconds.observe(account.total.as_secs_f64());
            series.prompt_tokens.inc_by(account.prompt_tokens.into());
            series.output_tokens.inc_by(account.output_tokens.into());
            tracing::debug!(
                outcome = ?account.outcome,
                prompt_tokens = account.prompt_tokens,
                output_tokens = account.output_tokens,
                "request ended"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }
}
