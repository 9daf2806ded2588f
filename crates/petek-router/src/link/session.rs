//! One Execute stream: greetings, then requests up and tokens down. What comes down is always read, at once, into
//! the journals; what goes up is written by one task, so that a Cancel never overtakes its Submit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use petek_core::refusal::Refusal;
use petek_proto::hello::WorkerIdentity;
use petek_proto::refusal::WireRefusal;
use petek_proto::worker::v1::execute_request::Message as Up;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::{Cancel, ExecuteRequest, ExecuteResponse, Heartbeat, Submit};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{Client, Link, check_identity};
use crate::lock;
use crate::relay::{Journal, Live};

/// Messages of the stream that wait for the transport: more would only hide that it stalls.
const OUT_MESSAGES_MAX: usize = 1;
/// A timer that fires this much late says that this process was stalled, not the worker.
pub(super) const STALL: Duration = Duration::from_millis(500);

/// One stream that stands. Requests hold it to cancel through it.
pub(crate) struct Session {
    /// Who is at the other end.
    pub(crate) identity: WorkerIdentity,
    /// Which of this router's streams to the worker.
    pub(crate) stream: u32,
    jobs: mpsc::Sender<Job>,
    dispatches: Mutex<Dispatches>,
    /// Some dispatch has sequences to cancel.
    cancels: Notify,
}

/// One request on its way to a worker. Dropped unsent, it turns its request away, so that it goes elsewhere.
pub(crate) struct Job {
    pub(crate) live: Arc<Live>,
    pub(crate) attempt: u32,
    /// All but the dispatch number and what is left of the deadline.
    pub(crate) submit: Submit,
}

/// What was sent and has not come to its end, by dispatch number.
#[derive(Default)]
struct Dispatches {
    last: u64,
    open: HashMap<u64, Dispatch>,
    /// Those with sequences to cancel, each once.
    to_cancel: Vec<u64>,
}

struct Dispatch {
    live: Arc<Live>,
    attempt: u32,
    /// Sequences without their Finished, a bit each.
    open: u64,
    /// Sequences that are to be cancelled and of which the worker has not been told.
    cancel: u64,
}

// A bit per sequence.
const _: () = assert!(petek_core::limits::request::SEQUENCES_MAX <= u64::BITS);

/// Why a stream ended, or did not begin.
pub(super) enum Ended {
    /// It broke, or the worker was silent.
    Lost(String),
    /// The worker is not what its record says, or breaks the protocol.
    Refused(Refusal),
    /// The record is gone, and nothing runs any more.
    Dismissed,
}

/// A stream after its greetings.
pub(super) struct Open {
    pub(super) session: Arc<Session>,
    link: Arc<Link>,
    jobs: mpsc::Receiver<Job>,
    out: mpsc::Sender<ExecuteRequest>,
    inbound: Streaming<ExecuteResponse>,
    /// Keeps the connection.
    _client: Client,
}

/// Connects, and exchanges greetings.
pub(super) async fn open(link: &Arc<Link>, stream: u32) -> Result<Open, Ended> {
    let settings = link.common.dialler.settings();
    let silence = Duration::from_millis(settings.silence_ms_max);
    let mut client = link.dial().await.map_err(lost)?;
    let (out, messages) = mpsc::channel(OUT_MESSAGES_MAX);
    let hello = Up::Hello(link.common.dialler.hello(stream));
    out.try_send(ExecuteRequest { message: Some(hello) })
        .map_err(|_| Ended::Lost("no room to greet".into()))?;
    let greeted = async {
        let mut inbound = client.execute(ReceiverStream::new(messages)).await?.into_inner();
        let first = inbound.message().await?;
        Ok::<_, Status>((inbound, first))
    };
    let greeted = timeout(silence, greeted).await.map_err(|_| Ended::Lost("it does not greet".into()))?;
    let (inbound, first) = greeted.map_err(lost)?;
    let Some(ExecuteResponse { message: Some(Down::Hello(hello)) }) = first else {
        return Err(Ended::Refused(Refusal::Protocol {
            problem: "the first message must be a hello".into(),
        }));
    };
    let identity = WorkerIdentity::try_from(hello).map_err(Ended::Refused)?;
    check_identity(&link.entry, &identity).map_err(Ended::Refused)?;

    let (jobs_in, jobs) = mpsc::channel(settings.submit_queue);
    let dispatches = Mutex::default();
    let session = Arc::new(Session { identity, stream, jobs: jobs_in, dispatches, cancels: Notify::new() });
    Ok(Open { session, link: link.clone(), jobs, out, inbound, _client: client })
}

fn lost(status: Status) -> Ended {
    // What the worker says of itself is refused; all else is the transport's.
    match WireRefusal::read(&status) {
        Some(refusal) if refusal.code != Code::Unavailable => {
            Ended::Refused(Refusal::Protocol { problem: refusal.message })
        }
        _ => Ended::Lost(status.message().to_owned()),
    }
}

impl Session {
    /// Hands a request over; waits while the stream is full.
    ///
    /// *Cancel safety*: the job is dropped, which turns its request away if nothing else ended it.
    pub(crate) async fn submit(&self, job: Job) {
        // What comes back from a stream that has ended is dropped here, with the same effect.
        let _ = self.jobs.send(job).await;
    }

    /// Cancels sequences of a dispatch; of one that has ended nothing happens.
    pub(crate) fn cancel(&self, dispatch: u64, indexes: &[u32]) {
        let mut dispatches = self.lock();
        let Some(entry) = dispatches.open.get_mut(&dispatch) else { return };
        let fresh = entry.cancel == 0;
        entry.cancel |= indexes.iter().fold(0, |bits, index| bits | 1u64 << index);
        if fresh {
            dispatches.to_cancel.push(dispatch);
            self.cancels.notify_one();
        }
    }

    /// Gives an attempt its number, if it is still wanted.
    fn begin(self: &Arc<Self>, job: &Job) -> Option<u64> {
        let mut dispatches = self.lock();
        let dispatch = dispatches.last + 1;
        let open = job.submit.sequences.iter().fold(0, |bits, sequence| bits | 1u64 << sequence.index);
        let entry = Dispatch { live: job.live.clone(), attempt: job.attempt, open, cancel: 0 };
        dispatches.open.insert(dispatch, entry);
        dispatches.last = dispatch;
        drop(dispatches);
        // In the table first: what cancels it from now on finds it there.
        if job.live.sent(job.attempt, self, dispatch) {
            return Some(dispatch);
        }
        // Workers hold the numbers to be without a gap: the next attempt gets the one that was not sent.
        let mut dispatches = self.lock();
        dispatches.open.remove(&dispatch);
        dispatches.last = dispatch - 1;
        None
    }

    fn take_cancels(&self) -> Vec<Cancel> {
        let mut dispatches = self.lock();
        let Dispatches { open, to_cancel, .. } = &mut *dispatches;
        let cancels = to_cancel.drain(..).filter_map(|dispatch| {
            // None of them would mean all of them.
            let bits =
                Some(std::mem::take(&mut open.get_mut(&dispatch)?.cancel)).filter(|bits| *bits != 0)?;
            let indexes = (0..u64::BITS).filter(|index| bits & 1 << index != 0).collect();
            Some(Cancel { dispatch, indexes })
        });
        cancels.collect()
    }

    /// Tells the journal of a dispatch something; of one that has ended there is nobody to tell.
    ///
    /// # Errors
    /// A number that was never given.
    fn tell(&self, dispatch: u64, what: impl FnOnce(&mut Journal, u32, Duration)) -> Result<(), Refusal> {
        let dispatches = self.lock();
        let entry = dispatches.open.get(&dispatch).map(|entry| (entry.live.clone(), entry.attempt));
        let known = (1..=dispatches.last).contains(&dispatch);
        drop(dispatches);
        if !known {
            return Err(Refusal::Protocol { problem: format!("dispatch {dispatch} was never sent") });
        }
        if let Some((live, attempt)) = entry {
            live.tell(|journal, now| what(journal, attempt, now));
        }
        Ok(())
    }

    /// Forgets one sequence of a dispatch, or all of it.
    fn close(&self, dispatch: u64, index: Option<u32>) {
        let mut dispatches = self.lock();
        let Some(entry) = dispatches.open.get_mut(&dispatch) else { return };
        match index.and_then(|index| 1u64.checked_shl(index)) {
            Some(bit) => entry.open &= !bit,
            None => entry.open = 0,
        }
        if entry.open == 0 {
            dispatches.open.remove(&dispatch);
        }
    }

    fn is_idle(&self) -> bool {
        self.lock().open.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Dispatches> {
        lock(&self.dispatches)
    }
}

impl Open {
    /// Runs the stream to its end. Whatever that is, every request on it hears of it.
    pub(super) async fn run(self, dismissed: watch::Receiver<bool>) -> Ended {
        let Open { session, link, mut jobs, out, mut inbound, _client } = self;
        let settings = link.common.dialler.settings();
        let _lost = Lost(session.clone());
        let heartbeat = Duration::from_millis(settings.heartbeat_interval_ms);
        let silence = Duration::from_millis(settings.silence_ms_max);
        let ended = tokio::select! {
            ended = write(&session, &mut jobs, &out, heartbeat, &dismissed) => ended,
            ended = read(&session, &mut inbound, silence) => ended,
        };
        // With the receiver go the jobs that were never sent, and all that are submitted from now on.
        drop(jobs);
        ended
    }
}

/// Tells the requests of a stream that it is gone: when it ends, and also when its task panics.
struct Lost(Arc<Session>);

impl Drop for Lost {
    fn drop(&mut self) {
        let lost = std::mem::take(&mut self.0.lock().open);
        for Dispatch { live, attempt, .. } in lost.into_values() {
            live.tell(|journal, now| journal.lost(attempt, now));
        }
    }
}

async fn write(
    session: &Arc<Session>,
    jobs: &mut mpsc::Receiver<Job>,
    out: &mpsc::Sender<ExecuteRequest>,
    heartbeat: Duration,
    dismissed: &watch::Receiver<bool>,
) -> Ended {
    let mut beat = interval(heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let gone = || Ended::Lost("the stream was closed".into());
    loop {
        let messages: Vec<Up> = tokio::select! {
            () = session.cancels.notified() => session.take_cancels().into_iter().map(Up::Cancel).collect(),
            job = jobs.recv() => {
                let Some(mut job) = job else { return gone() };
                let Some(dispatch) = session.begin(&job) else { continue };
                let deadline_ms = job.live.time_left().as_millis() as u64;
                let submit = std::mem::take(&mut job.submit);
                vec![Up::Submit(Submit { dispatch, deadline_ms: Some(deadline_ms), ..submit })]
            }
            _ = beat.tick() => {
                if *dismissed.borrow() && session.is_idle() {
                    return Ended::Dismissed;
                }
                vec![Up::Heartbeat(Heartbeat {})]
            }
        };
        for message in messages {
            if out.send(ExecuteRequest { message: Some(message) }).await.is_err() {
                return gone();
            }
        }
    }
}

async fn read(session: &Session, inbound: &mut Streaming<ExecuteResponse>, silence: Duration) -> Ended {
    loop {
        let asked = Instant::now();
        let message = match timeout(silence, inbound.message()).await {
            Ok(Ok(Some(ExecuteResponse { message: Some(message) }))) => message,
            // A newer worker's message that this version does not know.
            Ok(Ok(Some(ExecuteResponse { message: None }))) => continue,
            Ok(Ok(None)) => return Ended::Lost("it ended the stream".into()),
            Ok(Err(status)) => return lost(status),
            // This process slept, and what the worker said meanwhile is about to be read.
            Err(_) if asked.elapsed() > silence + STALL => continue,
            Err(_) => return Ended::Lost(format!("it said nothing for {} ms", silence.as_millis())),
        };
        if let Err(refusal) = hear(session, message) {
            return Ended::Refused(refusal);
        }
        // A worker that always has more to say must not keep the writer from its turn.
        consume_budget().await;
    }
}

/// Does what one message says.
///
/// # Errors
/// What breaks the protocol of the stream, not only of one request.
fn hear(session: &Session, message: Down) -> Result<(), Refusal> {
    match message {
        Down::Heartbeat(Heartbeat {}) => {}
        Down::Hello(_) => return Err(Refusal::Protocol { problem: "it greeted twice".into() }),
        Down::Admitted(admitted) => {
            session
                .tell(admitted.dispatch, |journal, attempt, now| journal.admitted(attempt, admitted, now))?;
        }
        Down::Step(step) => {
            if !step.prompts.is_empty() {
                return Err(Refusal::Protocol { problem: "logprobs of prompts were not asked for".into() });
            }
            for entry in step.entries {
                session.tell(entry.dispatch, |journal, attempt, now| journal.tokens(attempt, entry, now))?;
            }
        }
        Down::Finished(finished) => {
            let (dispatch, index) = (finished.dispatch, finished.index);
            session.tell(dispatch, |journal, attempt, now| journal.finished(attempt, finished, now))?;
            session.close(dispatch, Some(index));
        }
        Down::Refused(refused) => {
            let refusal = refused.status.as_ref().and_then(WireRefusal::read_rpc);
            let refusal = refusal.unwrap_or_else(|| WireRefusal::from(&Refusal::Internal));
            session.tell(refused.dispatch, |journal, attempt, now| journal.refused(attempt, refusal, now))?;
            session.close(refused.dispatch, None);
        }
        Down::Moved(moved) => {
            let load = moved.load.unwrap_or_default();
            let retry_ms = std::num::NonZeroU64::MIN;
            let refusal = WireRefusal::from(&Refusal::QueueFull { waiting: load.waiting.into(), retry_ms });
            session.tell(moved.dispatch, |journal, attempt, now| journal.refused(attempt, refusal, now))?;
            session.close(moved.dispatch, None);
        }
    }
    Ok(())
}

impl Drop for Job {
    fn drop(&mut self) {
        self.live.dropped(self.attempt);
    }
}
