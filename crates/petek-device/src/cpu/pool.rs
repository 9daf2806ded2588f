//! The threads of an executor. A step is one *region*: all lanes run the same closure, each takes its share of the work
//! and meets the others at barriers. The caller is lane 0, so a pool of one has no thread of its own.
//!
//! ```text
//! caller   ──region──┐ lane 0 ──barrier── lane 0 ──┐──▶ goes on
//! worker 1  (waits)  ├ lane 1 ──barrier── lane 1 ──┤ spins 200 µs for the next region, then parks: idle costs no CPU
//! ```
//! A general pool's fork and join cost 12–20 µs; a barrier here 0.3 µs, and a decode step of 16 layers has 80.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::DeviceError;
use crate::collective::{self, LOST, NAP};

/// How long a waiting worker stays awake after a region: longer than the gap between two steps.
const AWAKE: Duration = Duration::from_micros(200);
/// How long a lane spins before it lends its core to others, where every thread has a core.
const SPIN: Duration = Duration::from_micros(50);
/// The same where threads outnumber cores: whoever is waited for probably needs this core.
const SPIN_CROWDED: Duration = Duration::from_micros(1);

/// What a pool is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolOptions {
    /// Lanes, the caller's included; 0 is taken as 1.
    pub threads: usize,
    /// Busy threads of the process beside this pool's: other ranks, other workers. With more threads than cores in all,
    /// lanes yield after 1 µs of waiting.
    pub threads_beside: usize,
    /// Cores to pin lanes to, in lane order; empty: the system places them.
    pub cores: Vec<usize>,
}

/// Threads that run regions.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    options: PoolOptions,
    regions: u64,
}

/// One thread's part in a region.
#[derive(Debug)]
pub struct Lane<'a> {
    thread: usize,
    shared: &'a Shared,
    /// A lane is its thread's: barriers count on it.
    stays: PhantomData<*const ()>,
}

/// Numbers tasks, so that lanes that finish early take more.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct TaskCounter(AtomicUsize);

type Job = *const (dyn Fn(&Lane<'_>) + Sync);

#[derive(Debug)]
struct Shared {
    threads: usize,
    spin: Duration,
    /// Regions begun. What follows is read by workers only after they saw it change.
    begun: Padded<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    /// Workers still inside the region.
    running: Padded<AtomicUsize>,
    /// Lanes at the barrier, and barriers passed.
    arrived: Padded<AtomicUsize>,
    passed: Padded<AtomicUsize>,
    /// By worker: it sleeps, or is about to.
    parked: Vec<Padded<AtomicBool>>,
    poisoned: AtomicBool,
    ended: AtomicBool,
}

/// Alone on its cache lines: waiting lanes must not slow down the one that counts.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

/// What a lane unwinds with when another one panicked.
struct Abandoned;

// SAFETY: `job` is the only part that is not an atomic or constant. The caller writes it while no worker is inside a region
// (`running` is 0), before it publishes by `begun`; workers read it after they saw `begun` change. The closure it points at
// is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Pool {
    /// Starts the threads.
    ///
    /// *Errors*: the system's, if it starts no thread or does not let one be pinned, with what was tried in front.
    pub fn new(options: PoolOptions) -> io::Result<Pool> {
        let threads = options.threads.max(1);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let crowded = threads + options.threads_beside > cores;
        let shared = Arc::new(Shared {
            threads,
            spin: if crowded { SPIN_CROWDED } else { SPIN },
            begun: Padded::default(),
            job: UnsafeCell::new(None),
            running: Padded::default(),
            arrived: Padded::default(),
            passed: Padded::default(),
            parked: (1..threads).map(|_| Padded::default()).collect(),
            poisoned: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new(), handles: Vec::new(), options, regions: 0 };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let core = pool.options.cores.get(thread).copied();
            let (started, pinned) = std::sync::mpsc::sync_channel(1);
            let worker = thread::Builder::new().name(format!("petek-lane-{thread}")).spawn(move || {
                let pinned = core.map_or(Ok(()), pin);
                let failed = pinned.is_err();
                // The pool waits for this word; if it does not, it is gone and so is the worker's work.
                if started.send(pinned).is_err() || failed {
                    return;
                }
                shared.work(thread);
            });
            let worker = worker
                .map_err(|e| io::Error::new(e.kind(), format!("start compute thread {thread}: {e}")))?;
            pool.handles.push(worker.thread().clone());
            pool.workers.push(worker);
            pinned.recv().unwrap_or_else(|_| Err(io::Error::other("a compute thread ended at its start")))?;
        }
        Ok(pool)
    }

    /// Lanes, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Pins the calling thread to lane 0's core, if cores were given. For the thread that will call [`Pool::region`].
    pub fn pin_caller(&self) -> io::Result<()> {
        self.options.cores.first().map_or(Ok(()), |core| pin(*core))
    }

    /// Runs `work` on every lane and returns when all are through.
    ///
    /// *Errors*: [`DeviceError::Poisoned`], naming the region by its number from 1, if a lane panicked now or before: the
    /// others are freed from their barriers, and the pool runs nothing more.
    pub fn region(&mut self, work: impl Fn(&Lane<'_>) + Sync) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        if shared.poisoned.load(Ordering::Acquire) {
            return Err(DeviceError::Poisoned(self.regions));
        }
        self.regions += 1;
        let job: &(dyn Fn(&Lane<'_>) + Sync) = &work;
        // SAFETY: only the lifetime is widened. This function does not return before `running` is 0, that is before every
        // worker has left the closure, and it cannot unwind before: lane 0's panic is caught.
        let job: Job = unsafe { std::mem::transmute::<*const (dyn Fn(&Lane<'_>) + Sync + '_), Job>(job) };
        // SAFETY: no worker is inside a region, so none reads the slot: see `Shared`.
        unsafe { *shared.job.get() = Some(job) };
        shared.running.0.store(shared.threads - 1, Ordering::Relaxed);
        // SeqCst here and in `Shared::wait_for_region`: either the worker sees the region, or we see that it parked.
        shared.begun.0.fetch_add(1, Ordering::SeqCst);
        for (parked, handle) in shared.parked.iter().zip(&self.handles) {
            if parked.0.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        shared.run(0, &work);
        shared.wait(|| shared.running.0.load(Ordering::Acquire) == 0);
        if shared.poisoned.load(Ordering::Acquire) {
            Err(DeviceError::Poisoned(self.regions))
        } else {
            Ok(())
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.begun.0.fetch_add(1, Ordering::SeqCst);
        for handle in &self.handles {
            handle.unpark();
        }
        for worker in self.workers.drain(..) {
            // A lane's panic was caught and reported by `region`; a worker itself does not panic.
            let _ = worker.join();
        }
    }
}

impl Lane<'_> {
    /// Which, from 0.
    pub fn thread(&self) -> usize {
        self.thread
    }

    /// Of how many.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Waits until every lane has come here. What they wrote before is then visible to all.
    ///
    /// *Panics*: (unwinds quietly) if another lane panicked, since it will never come.
    pub fn barrier(&self) {
        let shared = self.shared;
        let passed = shared.passed.0.load(Ordering::Relaxed);
        if shared.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == shared.threads {
            shared.arrived.0.store(0, Ordering::Relaxed);
            shared.passed.0.store(passed.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut poisoned = false;
        shared.wait(|| {
            poisoned = shared.poisoned.load(Ordering::Relaxed);
            poisoned || shared.passed.0.load(Ordering::Acquire) != passed
        });
        if poisoned {
            resume_unwind(Box::new(Abandoned));
        }
    }

    /// This lane's equal share of `0..items`, contiguous.
    pub fn share(&self, items: usize) -> Range<usize> {
        let (thread, threads) = (self.thread, self.shared.threads);
        items * thread / threads..items * (thread + 1) / threads
    }
}

impl From<&Lane<'_>> for collective::Lane {
    fn from(lane: &Lane<'_>) -> collective::Lane {
        collective::Lane { thread: lane.thread(), threads: lane.threads() }
    }
}

impl TaskCounter {
    /// The next `chunk` of `0..items` that nobody took, or fewer at the end; None when all are taken.
    pub fn take(&self, items: usize, chunk: usize) -> Option<Range<usize>> {
        let chunk = chunk.max(1);
        let first = self.0.fetch_add(chunk, Ordering::Relaxed);
        (first < items).then(|| first..items.min(first + chunk))
    }

    /// Begins anew. Not while lanes take tasks.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_region(thread, seen);
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: `begun` changed and was acquired, so the caller's write of the slot is visible; the closure lives until
            // `running` has gone to 0, below.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above.
                self.run(thread, unsafe { &*job });
            }
            self.running.0.fetch_sub(1, Ordering::Release);
        }
    }

    fn wait_for_region(&self, thread: usize, seen: usize) -> usize {
        let since = Instant::now();
        let mut awake = true;
        self.wait(|| {
            awake = since.elapsed() < AWAKE;
            !awake || self.begun.0.load(Ordering::Acquire) != seen
        });
        let parked = &self.parked[thread - 1].0;
        if !awake {
            parked.store(true, Ordering::SeqCst);
            while self.begun.0.load(Ordering::SeqCst) == seen {
                thread::park();
            }
            parked.store(false, Ordering::Relaxed);
        }
        self.begun.0.load(Ordering::Acquire)
    }

    fn run(&self, thread: usize, job: &(dyn Fn(&Lane<'_>) + Sync)) {
        let lane = Lane { thread, shared: self, stays: PhantomData };
        let outcome: Result<(), Box<dyn Any + Send>> = catch_unwind(AssertUnwindSafe(|| job(&lane)));
        if outcome.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
    }

    /// Spins until `done`; lends the core to others when that takes long, and sleeps when it takes so long that another
    /// lane must have lost its own core.
    fn wait(&self, mut done: impl FnMut() -> bool) {
        let mut since = None;
        loop {
            for _ in 0..32 {
                if done() {
                    return;
                }
                std::hint::spin_loop();
            }
            let waited = since.get_or_insert_with(Instant::now).elapsed();
            if waited >= LOST {
                thread::sleep(NAP);
            } else if waited >= self.spin {
                thread::yield_now();
            }
        }
    }
}

#[cfg(target_os = "linux")]
fn pin(core: usize) -> io::Result<()> {
    let failed = |e: io::Error| io::Error::new(e.kind(), format!("pin a compute thread to core {core}: {e}"));
    if core >= libc::CPU_SETSIZE as usize {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    // SAFETY: a zeroed `cpu_set_t` is the empty set; `core` is below its size; the system reads it and keeps nothing.
    let status = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if status == 0 { Ok(()) } else { Err(failed(io::Error::last_os_error())) }
}

#[cfg(not(target_os = "linux"))]
fn pin(core: usize) -> io::Result<()> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!("pin a compute thread to core {core}: only on Linux"),
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(PoolOptions { threads, ..PoolOptions::default() }).expect("threads")
    }

    /// More lanes than any machine here has cores, too: there a lane that waits must let others run.
    #[test]
    fn what_lanes_wrote_before_a_barrier_all_see_after_it() {
        for threads in [1, 2, 3, 5] {
            let mut pool = pool(threads);
            for _ in 0..5 {
                let written: Vec<AtomicU64> = (0..threads).map(|_| AtomicU64::new(0)).collect();
                let region = pool.region(|lane| {
                    for round in 1..=20 {
                        written[lane.thread()].store(round, Ordering::Relaxed);
                        lane.barrier();
                        assert!(written.iter().all(|written| written.load(Ordering::Relaxed) == round));
                        lane.barrier();
                    }
                });
                region.expect("no lane panics");
            }
        }
    }

    #[test]
    fn every_task_is_taken_once_and_every_item_is_shared_out() {
        let mut pool = pool(3);
        let tasks = TaskCounter::default();
        for (items, chunk) in [(0, 1), (1, 1), (1000, 7), (1000, 0), (5, 100)] {
            let (taken, shared): (Vec<AtomicU64>, Vec<AtomicU64>) =
                (0..items).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).unzip();
            tasks.reset();
            let region = pool.region(|lane| {
                while let Some(range) = tasks.take(items, chunk) {
                    range.for_each(|item| _ = taken[item].fetch_add(1, Ordering::Relaxed));
                }
                lane.share(items).for_each(|item| _ = shared[item].fetch_add(1, Ordering::Relaxed));
            });
            region.expect("no lane panics");
            let once = |counts: &[AtomicU64]| counts.iter().all(|count| count.load(Ordering::Relaxed) == 1);
            assert!(once(&taken) && once(&shared), "{items} in chunks of {chunk}");
        }
    }

    #[test]
    fn a_panic_in_any_lane_frees_the_others_and_poisons_the_pool() {
        for culprit in 0..3 {
            let mut pool = pool(3);
            pool.region(|_| {}).expect("no lane panics");
            let region = pool.region(|lane| {
                assert!(lane.thread() != culprit, "a panic that a test asks for");
                lane.barrier();
                unreachable!("a barrier that one lane never reaches");
            });
            assert!(matches!(region, Err(DeviceError::Poisoned(2))), "{region:?}");
            let after = pool.region(|_| unreachable!("a poisoned pool runs nothing"));
            assert!(matches!(after, Err(DeviceError::Poisoned(2))), "{after:?}");
        }
    }

    #[test]
    fn parked_workers_wake_for_the_next_region_and_for_the_end() {
        let mut pool = pool(3);
        for _ in 0..3 {
            let ran = AtomicU64::new(0);
            pool.region(|_| _ = ran.fetch_add(1, Ordering::Relaxed)).expect("no lane panics");
            assert_eq!(ran.into_inner(), 3);
            // Idle workers park: this would wait for ever if one did not.
            while !pool.shared.parked.iter().all(|parked| parked.0.load(Ordering::SeqCst)) {
                thread::yield_now();
            }
        }
        let shared = Arc::clone(&pool.shared);
        drop(pool);
        assert_eq!(Arc::strong_count(&shared), 1, "the workers have ended");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn lanes_run_on_the_cores_that_they_are_pinned_to() {
        // SAFETY: asks the system for the number of the core that this thread runs on.
        let core = || unsafe { libc::sched_getcpu() } as usize;
        let allowed = core();
        let mut pool =
            Pool::new(PoolOptions { threads: 2, cores: vec![allowed; 2], ..PoolOptions::default() })
                .expect("pinned");
        let seen = AtomicUsize::new(usize::MAX);
        let region = pool.region(|lane| {
            if lane.thread() == 1 {
                seen.store(core(), Ordering::Relaxed);
            }
        });
        region.expect("no lane panics");
        assert_eq!(seen.into_inner(), allowed);

        for absent in [1 << 20, libc::CPU_SETSIZE as usize - 1] {
            let options = PoolOptions { threads: 2, cores: vec![allowed, absent], ..PoolOptions::default() };
            let error = Pool::new(options).map(|_| ()).expect_err("no machine has this core");
            assert!(error.to_string().contains(&format!("core {absent}")), "{error}");
        }
    }
}
