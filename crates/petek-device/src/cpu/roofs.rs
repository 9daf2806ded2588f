//! What this machine can do at most: the rate at which it reads memory and the arithmetic of its registers, measured in the
//! same run and on the same memory as what is compared with them. Stored figures of another day or host are no roofs.
//!
//! On a machine that is shared, wall time tells more of the neighbours than of us: so each rate is given twice, by the wall
//! and by the processor time that our threads got.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::DeviceError;
use crate::cpu::isa::Isa;
use crate::cpu::kernel;
use crate::cpu::kernel_trials::spin_in_registers;
use crate::cpu::lanes::{Lanes, on_isa};
use crate::cpu::pool::{Pool, TaskCounter};
use crate::ops::Format;

/// So many a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// By the clock.
    pub wall: f64,
    /// By the processor time of the process, an equal part of it for each thread that was at work.
    pub busy: f64,
}

impl Rate {
    /// The larger of each.
    pub fn max(self, other: Rate) -> Rate {
        Rate { wall: self.wall.max(other.wall), busy: self.busy.max(other.busy) }
    }

    /// How much of `roof` this is.
    pub fn share_of(self, roof: Rate) -> Rate {
        Rate { wall: self.wall / roof.wall, busy: self.busy / roof.busy }
    }
}

/// The best rate, of `samples`, at which `work` does `count` things, over at least a fifth of a second each: the system
/// counts the time of threads that run elsewhere only every few milliseconds.
///
/// *Errors*: those of `work`.
pub fn best_rate<E>(
    threads: usize,
    samples: usize,
    count: f64,
    mut work: impl FnMut() -> Result<(), E>,
) -> Result<Rate, E> {
    const SAMPLE: Duration = Duration::from_millis(200);
    let mut best = Rate::default();
    for _ in 0..samples {
        let (since, busy_s) = (Instant::now(), process_time_s());
        let mut done = 0.0;
        while since.elapsed() < SAMPLE {
            work()?;
            done += count;
        }
        let busy_s = (process_time_s() - busy_s) / threads as f64;
        best = best.max(Rate { wall: done / since.elapsed().as_secs_f64(), busy: done / busy_s });
    }
    Ok(best)
}

/// Words that a lane takes at once, and those of one step of each stream.
const TASK_WORDS: usize = 128 << 10;
const STEP_WORDS: usize = 64;

/// Bytes per second of reading all of `memories` once, by all lanes: the better of a single stream a lane with prefetches
/// and of four without. Give it far more than the caches hold.
///
/// *Errors*: [`DeviceError::Poisoned`].
pub fn read_rate(pool: &mut Pool, isa: Isa, memories: &[&[u32]]) -> Result<Rate, DeviceError> {
    let bytes: usize = memories.iter().map(|memory| size_of_val(*memory)).sum();
    let tasks: Vec<TaskCounter> = memories.iter().map(|_| TaskCounter::default()).collect();
    let mut of_streams = |streams| {
        best_rate(pool.threads(), 2, bytes as f64, || {
            tasks.iter().for_each(TaskCounter::reset);
            pool.region(|_| {
                for (memory, tasks) in memories.iter().zip(&tasks) {
                    while let Some(words) = tasks.take(memory.len(), TASK_WORDS) {
                        black_box(read(isa, &memory[words], streams));
                    }
                }
            })
        })
    };
    Ok(of_streams(1)?.max(of_streams(4)?))
}

/// Multiplications and additions per second of all lanes in registers alone, for weights of `format`: in bf16, of the
/// faster of dot products and multiply-adds.
///
/// *Errors*: [`DeviceError::Poisoned`].
pub fn flop_rate(pool: &mut Pool, isa: Isa, format: Format) -> Result<Rate, DeviceError> {
    let dots = if format == Format::Bf16 && isa == Isa::Avx512Bf16 {
        Some(instruction_rate(pool, isa, true)?)
    } else {
        None
    };
    let fmas = instruction_rate(pool, isa, false)?;
    Ok(dots.map_or(fmas, |dots| dots.max(fmas)))
}

/// The same of dot products (which must be there) or of multiply-adds alone.
fn instruction_rate(pool: &mut Pool, isa: Isa, dot: bool) -> Result<Rate, DeviceError> {
    const ROUNDS: usize = 1_000_000;
    let flops = spin_in_registers(isa, dot, 1) * ROUNDS * pool.threads();
    best_rate(pool.threads(), 3, flops as f64, || {
        pool.region(|_| {
            black_box(spin_in_registers(isa, dot, ROUNDS));
        })
    })
}

fn read(isa: Isa, words: &[u32], streams: usize) -> u32 {
    let ahead = if streams == 1 { super::isa::prefetch_bytes() } else { 0 };
    on_isa!(isa, read_on(words: &[u32], streams: usize, ahead: usize) -> u32)
}

#[inline(always)]
fn read_on<S: Lanes>(_: S, words: &[u32], streams: usize, ahead: usize) -> u32 {
    match streams {
        1 => read_streams::<1>(words, ahead),
        _ => read_streams::<4>(words, ahead),
    }
}

/// A function of all words, in vectors as wide as the compiler may.
#[inline(always)]
fn read_streams<const STREAMS: usize>(words: &[u32], ahead: usize) -> u32 {
    let part = words.len() / STREAMS;
    let mut all = [[0_u32; STEP_WORDS]; STREAMS];
    for at in (0..part).step_by(STEP_WORDS) {
        for (stream, all) in all.iter_mut().enumerate() {
            let Some(step) = words[stream * part..][..part].get(at..at + STEP_WORDS) else { continue };
            if ahead > 0 {
                for line in step.chunks_exact(16) {
                    kernel::prefetch(line.as_ptr().wrapping_byte_add(ahead));
                }
            }
            all.iter_mut().zip(step).for_each(|(all, word)| *all ^= word);
        }
    }
    all.as_flattened().iter().fold(0, |all, word| all ^ word)
}

/// Processor time of the whole process, in seconds.
fn process_time_s() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the system writes the time to where it is told, which is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pool::PoolOptions;

    #[test]
    fn every_word_is_read_by_every_way_of_reading() {
        let mut words: Vec<u32> =
            (0..4 * STEP_WORDS as u32 * 3).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for streams in [1, 4] {
                let before = read(isa, &words, streams);
                assert_eq!(before, words.iter().fold(0, |all, word| all ^ word), "{isa}, {streams} streams");
                words[streams * 37] ^= 0x10;
                assert_eq!(read(isa, &words, streams), before ^ 0x10, "{isa}, {streams} streams");
            }
        }
    }

    #[test]
    fn roofs_are_rates() {
        let mut pool = Pool::new(PoolOptions { threads: 2, ..PoolOptions::default() }).expect("threads");
        let words = vec![1; 1 << 20];
        let isa = Isa::detect().expect("a processor that can run petek");
        let rates = [
            read_rate(&mut pool, isa, &[&words, &words]).expect("no lane panics"),
            flop_rate(&mut pool, isa, Format::F32).expect("no lane panics"),
            flop_rate(&mut pool, isa, Format::Bf16).expect("no lane panics"),
        ];
        for rate in rates {
            assert!(
                rate.wall > 0.0 && rate.wall.is_finite() && rate.busy > 0.0 && rate.busy.is_finite(),
                "{rate:?}"
            );
            assert_eq!(rate.share_of(rate), Rate { wall: 1.0, busy: 1.0 });
        }
    }
}
