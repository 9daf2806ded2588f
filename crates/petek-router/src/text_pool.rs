//! Threads that tokenise: templates and tokenisers take milliseconds per request, which no I/O thread has.

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};

use petek_core::refusal::Refusal;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::lock;

/// When trying again has a chance: some jobs later.
const RETRY_MS: NonZeroU64 = NonZeroU64::new(200).unwrap();

/// A bounded queue before a fixed number of threads, which end when it is dropped.
pub(crate) struct TextPool {
    jobs: SyncSender<Job>,
    waiting: Arc<AtomicU64>,
}

type Job = Box<dyn FnOnce() + Send>;

impl TextPool {
    /// *Errors*: the system gives no thread.
    pub(crate) fn start(threads: usize, queue: usize) -> std::io::Result<Self> {
        let (jobs, waiting_jobs) = sync_channel::<Job>(queue);
        let waiting_jobs = Arc::new(Mutex::new(waiting_jobs));
        let waiting = Arc::new(AtomicU64::new(0));
        for number in 0..threads {
            let (jobs, waiting) = (waiting_jobs.clone(), waiting.clone());
            std::thread::Builder::new()
                .name(format!("text-{number}"))
                .spawn(move || work(&jobs, &waiting))?;
        }
        Ok(TextPool { jobs, waiting })
    }

    /// Half the cores of this machine, at least one.
    pub(crate) fn threads_default() -> usize {
        (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1)
    }

    /// Runs `compute` on one of the threads.
    ///
    /// *Cancel safety*: when this is dropped, a job that waits is not begun.
    ///
    /// # Errors
    /// `QueueFull`; `DeadlineExceeded` where the deadline passes before it began; `Internal` where it panicked;
    /// else its own.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        compute: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (answer, answered) = oneshot::channel();
        let job = move || {
            if answer.is_closed() {
                return;
            }
            let result = if Instant::now() >= deadline {
                Err(Refusal::DeadlineExceeded { output_tokens: 0 })
            } else {
                catch_unwind(AssertUnwindSafe(compute)).unwrap_or_else(|_| {
                    tracing::error!("a request's text failed");
                    Err(Refusal::Internal)
                })
            };
            // Whoever asked may have left by now.
            let _ = answer.send(result);
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        match self.jobs.try_send(Box::new(job)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                let waiting = self.waiting.fetch_sub(1, Ordering::Relaxed) - 1;
                return Err(Refusal::QueueFull { waiting, retry_ms: RETRY_MS });
            }
            Err(TrySendError::Disconnected(_)) => return Err(Refusal::Internal),
        }
        answered.await.unwrap_or(Err(Refusal::Internal))
    }
}

fn work(jobs: &Mutex<Receiver<Job>>, waiting: &AtomicU64) {
    loop {
        // One thread waits for the channel, the others for the lock: a job goes to one of them either way.
        let next = lock(jobs).recv();
        let Ok(job) = next else { return };
        waiting.fetch_sub(1, Ordering::Relaxed);
        job();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    #[tokio::test]
    async fn a_full_queue_refuses_and_a_panic_ends_one_job() {
        let pool = Arc::new(TextPool::start(1, 1).unwrap());
        let (hold, held) = mpsc::channel::<()>();
        let (began, begun) = oneshot::channel();
        let busy = pool.clone();
        let busy = tokio::spawn(async move {
            let wait = move || {
                let _ = (began.send(()), held.recv());
                Ok(1)
            };
            busy.run(later(), wait).await
        });
        begun.await.unwrap();
        // The thread is busy, the queue's one place is taken, the next one is refused.
        let mut second = Box::pin(pool.run(later(), || -> Result<(), Refusal> { panic!("as asked") }));
        assert!(futures::poll!(&mut second).is_pending());
        let refused = pool.run(later(), || Ok(3)).await;
        assert_eq!(refused, Err(Refusal::QueueFull { waiting: 1, retry_ms: RETRY_MS }));
        hold.send(()).unwrap();
        assert_eq!(busy.await.unwrap(), Ok(1));
        assert_eq!(second.await, Err(Refusal::Internal));
        assert_eq!(pool.run(later(), || Ok(4)).await, Ok(4));
    }

    #[tokio::test]
    async fn what_is_too_late_is_not_begun() {
        let pool = TextPool::start(1, 1).unwrap();
        let late = pool.run(Instant::now(), || -> Result<(), Refusal> { panic!("it must not begin") }).await;
        assert_eq!(late, Err(Refusal::DeadlineExceeded { output_tokens: 0 }));
    }
}
