//! Ranks that compute one model together: all-reduce, all-gather, abort.
//!
//! All ranks make the same calls in the same order. Sums are taken in rank order as one balanced tree, so that the
//! bits are those of one rank that sums its slices. One failure poisons the group: every later call fails at once.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The group failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank gave up, or was told to.
    #[error("the rank group was aborted: {0}")]
    Aborted(String),
    /// Two ranks came to one meeting with different calls or sizes.
    #[error("rank {rank} called {call} while the group was in {expected}")]
    Mismatch {
        /// Who.
        rank: usize,
        /// What it called.
        call: String,
        /// What the others called.
        expected: String,
    },
}

/// One thread of a rank's own threads; all of them make each call together, each for its share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// Which, from 0.
    pub thread: usize,
    /// Of how many.
    pub threads: usize,
}

/// A rank's memory in a call.
#[derive(Clone, Copy, Debug)]
pub struct HostMemory {
    /// f32 values.
    pub data: *mut f32,
    /// How many.
    pub len: usize,
}

// SAFETY: a `HostMemory` is an address and a length, no more; whoever makes one promises in `Collective`'s contract that
// the memory lives and is not otherwise touched until every thread of every rank has left the call.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

/// A group of ranks, as one of its members sees it.
pub trait Collective: Send + Sync {
    /// This member's number.
    fn rank(&self) -> usize;

    /// Members.
    fn ranks(&self) -> usize;

    /// Sums `memory` over the ranks in place, on every rank, as the balanced tree over ranks 0..n
    /// (`((0+1)+(2+3))+…`; for a count that is no power of two: ascending from rank 0). Called by all threads of a rank.
    ///
    /// # Safety
    /// `memory` is valid for reads and writes of `len` f32 until all threads of all ranks have returned, and nothing else
    /// touches it meanwhile.
    unsafe fn all_reduce(&self, lane: Lane, memory: HostMemory) -> Result<(), CollectiveError>;

    /// `rows` rows of `part` (each `part.len / rows` wide) of every rank are put side by side in `whole`, in rank order, on
    /// every rank. All parts are equally wide. Called by all threads of a rank.
    ///
    /// # Safety
    /// As [`Collective::all_reduce`], for both memories.
    unsafe fn all_gather(
        &self,
        lane: Lane,
        rows: usize,
        part: HostMemory,
        whole: HostMemory,
    ) -> Result<(), CollectiveError>;

    /// Poisons the group: every rank's current and later calls end with [`CollectiveError::Aborted`].
    fn abort(&self, why: &str);
}

/// The group of one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Solo {
    /// A group of one, as executors want it.
    pub fn new_group() -> Arc<dyn Collective> {
        Arc::new(Solo)
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    unsafe fn all_reduce(&self, _: Lane, _: HostMemory) -> Result<(), CollectiveError> {
        Ok(())
    }

    unsafe fn all_gather(
        &self,
        lane: Lane,
        rows: usize,
        part: HostMemory,
        whole: HostMemory,
    ) -> Result<(), CollectiveError> {
        assert!(
            part.len == whole.len && part.len.is_multiple_of(rows.max(1)),
            "a group of one gathers what it has"
        );
        if lane.thread == 0 {
            // SAFETY: both memories are valid for `len` by the caller's contract; two buffers never overlap, and this
            // thread alone copies.
            unsafe { std::ptr::copy_nonoverlapping(part.data, whole.data, part.len) };
        }
        Ok(())
    }

    fn abort(&self, _: &str) {}
}

/// Ranks as thread groups of one process.
///
/// ```text
///  call   publish memory ─▶ meet ─▶ [check · work on own share] ─▶ meet ─▶ return
/// ```
///
/// In a sum each element belongs to one thread of the whole group, which reads it from every rank's memory and writes
/// the result back to every rank's: nobody else touches that element between the two meetings, so in place is safe.
pub struct Threads {
    rank: usize,
    group: Arc<Group>,
}

struct Group {
    members: Vec<Member>,
    threads_per_rank: usize,
    meeting: Meeting,
    /// Threads between the two meetings of a call, who may be touching other ranks' memory.
    working: AtomicUsize,
    poisoned: AtomicBool,
    reason: Mutex<Option<CollectiveError>>,
}

/// What a rank brought to the current call.
#[derive(Default)]
struct Member {
    call: AtomicU64,
    data: AtomicPtr<f32>,
    len: AtomicUsize,
}

#[derive(Default)]
struct Meeting {
    arrived: AtomicUsize,
    round: AtomicUsize,
}

const ALL_REDUCE: u64 = 1 << 56;
const ALL_GATHER: u64 = 2 << 56;
/// Elements of a cache line: shares are cut at these, so that no two threads write one line.
const LINE: usize = 16;

impl Threads {
    /// A group of `ranks` members, each with `threads_per_rank` threads; the vector is in rank order.
    pub fn group(ranks: usize, threads_per_rank: usize) -> Vec<Arc<dyn Collective>> {
        assert!(ranks > 0 && threads_per_rank > 0, "a group has ranks and each rank has a thread");
        let group = Arc::new(Group {
            members: (0..ranks).map(|_| Member::default()).collect(),
            threads_per_rank,
            meeting: Meeting::default(),
            working: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
            reason: Mutex::new(None),
        });
        (0..ranks)
            .map(|rank| Arc::new(Threads { rank, group: group.clone() }) as Arc<dyn Collective>)
            .collect()
    }

    /// One call: brings `memory`, meets, runs `work` if all brought the same call, meets again.
    fn call(
        &self,
        lane: Lane,
        call: u64,
        memory: HostMemory,
        work: impl FnOnce(&Group),
    ) -> Result<(), CollectiveError> {
        let group = &*self.group;
        assert_eq!(
            lane.threads, group.threads_per_rank,
            "a rank calls with the threads that its group was made for"
        );
        let mine = &group.members[self.rank];
        if lane.thread == 0 {
            mine.call.store(call, Ordering::Relaxed);
            mine.data.store(memory.data, Ordering::Relaxed);
            mine.len.store(memory.len, Ordering::Relaxed);
        }
        group.meet()?;
        for other in &group.members {
            let (theirs, len) = (other.call.load(Ordering::Relaxed), other.len.load(Ordering::Relaxed));
            if (theirs, len) != (call, memory.len) {
                let say = |call: u64, len| {
                    let rows = call & (ALL_REDUCE - 1);
                    if call >= ALL_GATHER {
                        format!("all_gather({rows} rows, {len})")
                    } else {
                        format!("all_reduce({len})")
                    }
                };
                group.poison(CollectiveError::Mismatch {
                    rank: self.rank,
                    call: say(call, memory.len),
                    expected: say(theirs, len),
                });
            }
        }
        // Counted in before the poison is looked at: whoever poisons and then sees nobody working knows that nobody will
        // begin. Both in SeqCst, for the two orders must be one.
        group.working.fetch_add(1, Ordering::SeqCst);
        let poisoned = group.poisoned.load(Ordering::SeqCst);
        if !poisoned {
            work(group);
        }
        group.working.fetch_sub(1, Ordering::SeqCst);
        group.meet()
    }
}

impl Group {
    /// Waits for all threads of all ranks, or for poison; after poison, until nobody touches anyone's memory.
    fn meet(&self) -> Result<(), CollectiveError> {
        let round = self.meeting.round.load(Ordering::Acquire);
        let everyone = self.members.len() * self.threads_per_rank;
        if self.meeting.arrived.fetch_add(1, Ordering::AcqRel) + 1 == everyone {
            self.meeting.arrived.store(0, Ordering::Relaxed);
            self.meeting.round.store(round.wrapping_add(1), Ordering::Release);
        }
        let mut waiting = Waiting::default();
        while self.meeting.round.load(Ordering::Acquire) == round && !self.poisoned.load(Ordering::SeqCst) {
            waiting.go_on();
        }
        if self.poisoned.load(Ordering::SeqCst) {
            while self.working.load(Ordering::SeqCst) > 0 {
                waiting.go_on();
            }
            let reason = self.reason.lock().unwrap_or_else(|held| held.into_inner());
            return Err(reason
                .clone()
                .unwrap_or_else(|| CollectiveError::Aborted("no reason was given".into())));
        }
        Ok(())
    }

    /// The first reason stays.
    fn poison(&self, why: CollectiveError) {
        let mut reason = self.reason.lock().unwrap_or_else(|held| held.into_inner());
        reason.get_or_insert(why);
        self.poisoned.store(true, Ordering::SeqCst);
    }
}

/// A lane that waits for this long waits for one whose core somebody else has. Whoever only yields then takes part in
/// the contest for it, and every barrier takes as many time slices as there are rivals.
pub(crate) const LOST: Duration = Duration::from_millis(1);
/// How long it sleeps between two looks.
pub(crate) const NAP: Duration = Duration::from_micros(50);

/// Who waits, and since when.
#[derive(Default)]
struct Waiting {
    spins: u32,
    since: Option<Instant>,
}

impl Waiting {
    /// Spins a little, then gives the core away, for ranks × threads may be more than the cores; then sleeps, as lanes of
    /// a pool do.
    fn go_on(&mut self) {
        self.spins = self.spins.saturating_add(1);
        if self.spins < 200 {
            std::hint::spin_loop();
        } else if self.since.get_or_insert_with(Instant::now).elapsed() < LOST {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

/// The sum over the ranks in the fixed order.
///
/// *Panics*: on an empty slice.
fn tree_sum(values: &mut [f32]) -> f32 {
    let n = values.len();
    if !n.is_power_of_two() {
        return values.iter().copied().reduce(|sum, value| sum + value).unwrap_or(0.0);
    }
    let mut width = n;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            values[i] = values[2 * i] + values[2 * i + 1];
        }
    }
    values[0]
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.group.members.len()
    }

    unsafe fn all_reduce(&self, lane: Lane, memory: HostMemory) -> Result<(), CollectiveError> {
        self.call(lane, ALL_REDUCE, memory, |group| {
            let ranks = group.members.len();
            let workers = ranks * lane.threads;
            let worker = self.rank * lane.threads + lane.thread;
            let lines = memory.len.div_ceil(LINE);
            let share = |w: usize| (lines * w / workers * LINE).min(memory.len);
            let data: Vec<*mut f32> =
                group.members.iter().map(|member| member.data.load(Ordering::Relaxed)).collect();
            let mut values = vec![0.0_f32; ranks];
            for i in share(worker)..share(worker + 1) {
                for (value, data) in values.iter_mut().zip(&data) {
                    // SAFETY: every rank published memory of `memory.len` (checked above) that its caller keeps valid until
                    // all have returned; element i lies in this worker's share alone, so nobody else reads or writes it.
                    *value = unsafe { data.add(i).read() };
                }
                let sum = tree_sum(&mut values);
                for data in &data {
                    // SAFETY: as above.
                    unsafe { data.add(i).write(sum) };
                }
            }
        })
    }

    unsafe fn all_gather(
        &self,
        lane: Lane,
        rows: usize,
        part: HostMemory,
        whole: HostMemory,
    ) -> Result<(), CollectiveError> {
        let ranks = self.ranks();
        assert!(
            whole.len == part.len * ranks && part.len.is_multiple_of(rows.max(1)),
            "the whole holds every rank's part"
        );
        let width = part.len / rows.max(1);
        self.call(lane, ALL_GATHER | rows as u64, part, |group| {
            for piece in (lane.thread..rows * ranks).step_by(lane.threads) {
                let (row, rank) = (piece / ranks, piece % ranks);
                let theirs = group.members[rank].data.load(Ordering::Relaxed);
                // SAFETY: every rank published a part of `part.len` (checked) that stays valid and unwritten until all have
                // left; `whole` is this rank's own, and this piece of it this thread's own.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        theirs.add(row * width),
                        whole.data.add((row * ranks + rank) * width),
                        width,
                    );
                }
            }
        })
    }

    fn abort(&self, why: &str) {
        self.group.poison(CollectiveError::Aborted(why.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work(rank, thread)` on all threads of a new group and returns what they gave, by rank and thread.
    fn run<T: Send>(
        ranks: usize,
        threads: usize,
        work: impl Fn(&dyn Collective, Lane) -> T + Sync,
    ) -> Vec<Vec<T>> {
        let group = Threads::group(ranks, threads);
        let work = &work;
        std::thread::scope(|scope| {
            let handles: Vec<Vec<_>> = group
                .iter()
                .map(|member| {
                    (0..threads)
                        .map(|thread| scope.spawn(move || work(&**member, Lane { thread, threads })))
                        .collect()
                })
                .collect();
            handles
                .into_iter()
                .map(|rank| rank.into_iter().map(|h| h.join().expect("no panic")).collect())
                .collect()
        })
    }

    fn value(rank: usize, round: usize, i: usize) -> f32 {
        let x = (rank * 7919 + round * 104_729 + i * 1_299_709) as u32;
        (x.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-4 - 300.0
    }

    #[test]
    fn sums_are_the_tree_in_rank_order() {
        for (ranks, threads) in [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (8, 1), (8, 3)] {
            for len in [1, 15, 16, 17, 333] {
                let memories: Vec<Mutex<Vec<f32>>> = (0..ranks).map(|_| Mutex::new(vec![0.0; len])).collect();
                let pointers: Vec<HostMemory> = memories
                    .iter()
                    .map(|m| HostMemory { data: m.lock().expect("mine").as_mut_ptr(), len })
                    .collect();
                let rounds = 20;
                let ok = run(ranks, threads, |c, lane| {
                    for round in 0..rounds {
                        let memory = pointers[c.rank()];
                        if lane.thread == 0 {
                            for i in 0..len {
                                // SAFETY: thread 0 alone writes its rank's vector, between two calls that all its
                                // rank's threads make together.
                                unsafe { memory.data.add(i).write(value(c.rank(), round, i)) };
                            }
                        }
                        // SAFETY: the vectors live until the scope ends.
                        unsafe { c.all_reduce(lane, memory) }.expect("reduced");
                        for i in 0..len {
                            let mut parts: Vec<f32> = (0..ranks).map(|r| value(r, round, i)).collect();
                            let expected = if ranks == 8 {
                                let p = &parts;
                                ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
                            } else {
                                tree_sum(&mut parts)
                            };
                            // SAFETY: nobody writes until all threads of this rank begin the next call below.
                            let sum = unsafe { memory.data.add(i).read() };
                            assert_eq!(
                                sum.to_bits(),
                                expected.to_bits(),
                                "{ranks} ranks, round {round}, {i}"
                            );
                        }
                        // A meeting, so that thread 0 does not refill what a neighbour still compares.
                        let mut empty = [0.0_f32; 0];
                        // SAFETY: no elements are touched.
                        unsafe { c.all_reduce(lane, HostMemory { data: empty.as_mut_ptr(), len: 0 }) }
                            .expect("met");
                    }
                });
                assert_eq!(ok.len(), ranks);
            }
        }
    }

    #[test]
    fn three_ranks_are_added_ascending_and_four_as_a_tree() {
        // Values for which the two orders differ.
        assert_eq!(tree_sum(&mut [1e8, 1.0, -1e8]), 0.0);
        assert_eq!(tree_sum(&mut [1e8, 1.0, -1e8, 3.0]), 0.0);
        assert_eq!(
            tree_sum(&mut [1.0, 1e8, 3.0, -1e8]).to_bits(),
            ((1.0_f32 + 1e8) + (3.0_f32 - 1e8)).to_bits()
        );
    }

    #[test]
    fn gathers_rows_side_by_side() {
        let (ranks, rows, width) = (3, 5, 7);
        let gathered = run(ranks, 2, |c, lane| {
            let mut part: Vec<f32> = (0..rows * width).map(|i| value(c.rank(), 0, i)).collect();
            // Each thread passes its own copies: only thread 0's part is published, and a thread fills its pieces.
            let mut whole = vec![f32::NAN; rows * width * ranks];
            // SAFETY: both vectors live beyond the call; the last meeting of the call is after all reads.
            let result = unsafe {
                c.all_gather(
                    lane,
                    rows,
                    HostMemory { data: part.as_mut_ptr(), len: part.len() },
                    HostMemory { data: whole.as_mut_ptr(), len: whole.len() },
                )
            };
            result.expect("gathered");
            whole
        });
        for rank in gathered {
            for i in 0..rows * width * ranks {
                let (row, from, column) = (i / (width * ranks), i / width % ranks, i % width);
                let expected = value(from, 0, row * width + column);
                let got: Vec<f32> = rank.iter().map(|thread| thread[i]).filter(|v| !v.is_nan()).collect();
                assert_eq!(got, vec![expected], "element {i}");
            }
        }
    }

    #[test]
    fn an_abort_wakes_all_who_wait_and_stays() {
        let results = run(4, 1, |c, lane| {
            let mut data = [1.0_f32; 40];
            let memory = HostMemory { data: data.as_mut_ptr(), len: data.len() };
            if c.rank() == 2 {
                c.abort("rank 2 lost its device");
            }
            // SAFETY: `data` lives until this closure returns, after both calls.
            unsafe { (c.all_reduce(lane, memory), c.all_reduce(lane, memory)) }
        });
        for rank in results {
            let expected = Err(CollectiveError::Aborted("rank 2 lost its device".into()));
            assert_eq!(rank[0].1, expected);
        }
    }

    #[test]
    fn different_calls_at_one_meeting_poison_the_group() {
        let results = run(2, 1, |c, lane| {
            let mut data = [1.0_f32; 40];
            let memory = HostMemory { data: data.as_mut_ptr(), len: 40 - c.rank() };
            // SAFETY: `data` lives until this closure returns.
            unsafe { c.all_reduce(lane, memory) }
        });
        for rank in results {
            assert!(matches!(&rank[0], Err(CollectiveError::Mismatch { .. })), "{rank:?}");
        }
    }
}
