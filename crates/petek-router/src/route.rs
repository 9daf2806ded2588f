//! Which worker a request goes to. A cost is a time, in seconds:
//!
//! ```text
//! wait    = uncached tokens that wait there / prefill rate      mean = its average over the eligible workers
//! prefill = (1 + 4 per second * mean) * the request's uncached tokens / prefill rate
//! decode  = (step with one more running - step now) * min(max_tokens, 256)
//! ```
//! A request pays for its own prefill and for the wait that it imposes on those behind it, which grows with how many
//! are waiting: saved work is priced above queued work. Predicted time to the first token alone (a weight of 0) loses.
//! Costs close to the least are drawn from uniformly, so that idle workers share.

use std::time::Duration;

use petek_proto::admin::v1::CandidateState;
use petek_proto::inference::v1::RouteReason;

/// How much a second of mean wait raises the price of computing. Units: per second. *Source*: a simulation over a
/// conversation trace near saturation; 0 and very large weights lose to it by far.
pub const WAIT_WEIGHT_PER_S: f64 = 4.0;
/// Costs within this share of the least are near-ties.
pub const TIE_SHARE: f64 = 0.05;
/// Tokens of output that a cost counts at most: beyond, nobody knows how long an answer will be.
pub const DECODE_TOKENS_MAX: u32 = 256;

/// What a request asks of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Its length.
    pub prompt_tokens: u32,
    /// What it may answer.
    pub max_tokens: u32,
    /// Tokens per block.
    pub block_size: u32,
}

impl Ask {
    /// Tokens of output that its cost counts.
    pub fn decode_tokens(&self) -> u32 {
        self.max_tokens.min(DECODE_TOKENS_MAX)
    }

    /// Blocks of the prompt that need not be computed where they are held: the last token always is, and with it its
    /// block.
    pub fn reusable_blocks(&self) -> u32 {
        self.prompt_tokens.saturating_sub(1) / self.block_size
    }
}

/// What is known of a worker when a request is placed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WorkerView {
    /// Whether it may be given work.
    pub state: CandidateState,
    /// Uncached tokens that wait there, this router's own included.
    pub waiting_uncached_tokens: u64,
    /// Of which: this router's own that its last report does not hold yet.
    pub own_waiting_tokens: u64,
    /// Sequences that run there.
    pub running: u32,
    /// Blocks of this prompt that it holds.
    pub matched_blocks: u32,
    /// Of which: predicted only.
    pub predicted_blocks: u32,
    /// How fast it is.
    pub rates: Rates,
    /// How old its last load report is; none where there was none.
    pub load_age: Option<Duration>,
}

/// How fast a worker is, as it measures itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Tokens of prompts that it computes.
    pub prefill_tokens_per_s: f64,
    /// What a step takes.
    pub step_s: f64,
    /// With one more sequence running.
    pub step_one_more_s: f64,
}

impl Rates {
    /// Of a worker that has not reported yet: equal for all such, so that only what waits tells them apart.
    pub const NOMINAL: Rates = Rates { prefill_tokens_per_s: 1_000.0, step_s: 0.02, step_one_more_s: 0.02 };
}

/// One worker's numbers in a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// For what waits there already.
    pub wait_s: f64,
    /// Its own prefill, and the wait that it imposes on others.
    pub prefill_s: f64,
    /// Of which: its own prefill.
    pub compute_s: f64,
    /// Slowing the steps of what runs there.
    pub decode_s: f64,
    /// Tokens of the prompt that it holds.
    pub matched_tokens: u32,
    /// Tokens of the prompt that it would have to compute.
    pub uncached_tokens: u32,
}

impl Cost {
    /// What is compared.
    pub fn total_s(&self) -> f64 {
        self.wait_s + self.prefill_s + self.decode_s
    }

    /// Until the request's own prompt is computed, as far as can be known.
    pub fn time_to_compute_s(&self) -> f64 {
        self.wait_s + self.compute_s
    }
}

/// Where a request goes, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Index of the worker; none, where none is eligible.
    pub chosen: Option<usize>,
    /// Why that one.
    pub reason: RouteReason,
    /// The average wait over the eligible workers.
    pub mean_wait_s: f64,
    /// One per worker; of those that are not eligible only the tokens are set.
    pub costs: Vec<Cost>,
}

/// Whom a router does not believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// Nobody.
    Nobody,
    /// So many workers, which get no new work.
    Workers(usize),
    /// Itself: so many fell silent at once that it must be its own doing. Nobody is dropped.
    Itself,
}

/// Judges silence. A worker whose last report is older than `silence_max` is suspect, but nothing can be silent for
/// longer than this router was awake; and if more than half of a pool is, the router suspects itself. One that never
/// reported has no rates, and waits for them unless all do.
pub fn judge(workers: &mut [WorkerView], silence_max: Duration, awake: Duration) -> Suspicion {
    let able = |view: &&mut WorkerView| view.state == CandidateState::Eligible;
    let silent = |age: Duration| age.min(awake) > silence_max;
    let ages: Vec<Duration> = workers.iter_mut().filter(able).filter_map(|view| view.load_age).collect();
    let suspects = ages.iter().filter(|age| silent(**age)).count();
    let suspects_itself = 2 * suspects > ages.len();
    for view in workers.iter_mut().filter(able) {
        match view.load_age {
            None if !ages.is_empty() => view.state = CandidateState::NoLoad,
            Some(age) if silent(age) && !suspects_itself => view.state = CandidateState::Suspect,
            _ => {}
        }
    }
    match suspects {
        0 => Suspicion::Nobody,
        _ if suspects_itself => Suspicion::Itself,
        suspects => Suspicion::Workers(suspects),
    }
}

/// Decides. `random` is any 64 bits.
pub fn decide(ask: &Ask, workers: &[WorkerView], random: u64) -> Decision {
    let eligible = |view: &WorkerView| view.state == CandidateState::Eligible;
    let count = workers.iter().filter(|view| eligible(view)).count();
    let waits = workers.iter().filter(|view| eligible(view)).map(wait_s);
    let mean_wait_s = if count == 0 { 0.0 } else { waits.sum::<f64>() / count as f64 };
    let costs: Vec<Cost> = workers.iter().map(|view| cost(ask, view, mean_wait_s)).collect();

    let candidates = || (0..workers.len()).filter(|&i| eligible(&workers[i]));
    let least = candidates().map(|i| costs[i].total_s()).fold(f64::INFINITY, f64::min);
    let near: Vec<usize> =
        candidates().filter(|&i| costs[i].total_s() <= least * (1.0 + TIE_SHARE)).collect();
    // The high bits of a product: uniform to within a part in 2^64 divided by the number of ties.
    let drawn = ((u128::from(random) * near.len() as u128) >> 64) as usize;
    let chosen = near.get(drawn).copied();
    let most = candidates().map(|i| costs[i].matched_tokens).max().unwrap_or(0);
    let reason = match chosen {
        None => RouteReason::Unspecified,
        Some(_) if count == 1 => RouteReason::OnlyWorker,
        Some(_) if near.len() > 1 => RouteReason::NearTie,
        Some(i) if most > 0 && costs[i].matched_tokens == most => RouteReason::Cache,
        Some(_) => RouteReason::Load,
    };
    Decision { chosen, reason, mean_wait_s, costs }
}

fn wait_s(view: &WorkerView) -> f64 {
    view.waiting_uncached_tokens as f64 / prefill_rate(view)
}

/// A rate of 0 would make a worker infinitely dear, or NaN of an empty queue: it is the slowest instead.
fn prefill_rate(view: &WorkerView) -> f64 {
    view.rates.prefill_tokens_per_s.max(1.0)
}

fn cost(ask: &Ask, view: &WorkerView, mean_wait_s: f64) -> Cost {
    let matched_tokens = view.matched_blocks.min(ask.reusable_blocks()) * ask.block_size;
    let uncached_tokens = ask.prompt_tokens - matched_tokens;
    if view.state != CandidateState::Eligible {
        return Cost { matched_tokens, uncached_tokens, ..Cost::default() };
    }
    let slower_s = (view.rates.step_one_more_s - view.rates.step_s).max(0.0);
    let compute_s = f64::from(uncached_tokens) / prefill_rate(view);
    Cost {
        wait_s: wait_s(view),
        prefill_s: (1.0 + WAIT_WEIGHT_PER_S * mean_wait_s) * compute_s,
        compute_s,
        decode_s: slower_s * f64::from(ask.decode_tokens()),
        matched_tokens,
        uncached_tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK: Ask = Ask { prompt_tokens: 512, max_tokens: 100, block_size: 16 };

    fn idle() -> WorkerView {
        WorkerView {
            state: CandidateState::Eligible,
            waiting_uncached_tokens: 0,
            own_waiting_tokens: 0,
            running: 0,
            matched_blocks: 0,
            predicted_blocks: 0,
            rates: Rates { prefill_tokens_per_s: 1_000.0, step_s: 0.010, step_one_more_s: 0.011 },
            load_age: Some(Duration::ZERO),
        }
    }

    fn with(change: impl FnOnce(&mut WorkerView)) -> WorkerView {
        let mut view = idle();
        change(&mut view);
        view
    }

    #[track_caller]
    fn check(workers: &[WorkerView], chosen: Option<usize>, reason: RouteReason) {
        for random in [0, 1 << 63, u64::MAX] {
            let decision = decide(&ASK, workers, random);
            assert_eq!((decision.chosen, decision.reason), (chosen, reason), "{decision:?}");
        }
    }

    #[test]
    fn a_cost_is_the_sum_of_its_three_times() {
        let busy = with(|view| {
            view.waiting_uncached_tokens = 3_000;
            view.matched_blocks = 12;
        });
        let decision = decide(&ASK, &[busy, idle()], 0);
        // Waits of 3 s and 0 s; 320 of 512 tokens are not held; 100 tokens at 1 ms more.
        assert_eq!(decision.mean_wait_s, 1.5);
        let cost = decision.costs[0];
        assert_eq!((cost.matched_tokens, cost.uncached_tokens), (192, 320));
        assert!((cost.wait_s - 3.0).abs() < 1e-12 && (cost.prefill_s - 7.0 * 0.32).abs() < 1e-12, "{cost:?}");
        assert!((cost.decode_s - 0.1).abs() < 1e-12, "{cost:?}");
        assert!((decision.costs[1].total_s() - (7.0 * 0.512 + 0.1)).abs() < 1e-12);
    }

    #[test]
    fn saved_work_counts_more_the_more_waits() {
        // 256 tokens saved against 1,000 waiting: with nothing else waiting the queue is dearer.
        let holds = |waiting| {
            with(|view| {
                view.matched_blocks = 16;
                view.waiting_uncached_tokens = waiting;
            })
        };
        check(&[holds(1_000), idle()], Some(1), RouteReason::Load);
        // The same difference of queues with 2 s of mean wait: saved work is worth nine times as much.
        let waits = with(|view| view.waiting_uncached_tokens = 1_500);
        check(&[holds(2_500), waits], Some(0), RouteReason::Cache);
    }

    #[test]
    fn reasons() {
        let holds = with(|view| view.matched_blocks = 8);
        check(&[], None, RouteReason::Unspecified);
        check(&[with(|view| view.state = CandidateState::Draining)], None, RouteReason::Unspecified);
        check(&[with(|view| view.state = CandidateState::Suspect), idle()], Some(1), RouteReason::OnlyWorker);
        check(&[idle(), holds], Some(1), RouteReason::Cache);
        check(&[with(|view| view.running = 3), with(|view| view.waiting_uncached_tokens = 900)], Some(0), {
            RouteReason::Load
        });
        check(&[idle(), with(|view| view.rates.prefill_tokens_per_s = 0.0)], Some(0), RouteReason::Load);
    }

    #[test]
    fn near_ties_are_drawn_uniformly() {
        let near = with(|view| view.waiting_uncached_tokens = 20);
        let far = with(|view| view.waiting_uncached_tokens = 200);
        let workers = [idle(), far, near, idle()];
        let mut seen = [0; 4];
        for i in 0..3_000u64 {
            // Every 3,000th of the 64 bits, once.
            let decision = decide(&ASK, &workers, i * (u64::MAX / 3_000));
            assert_eq!(decision.reason, RouteReason::NearTie);
            seen[decision.chosen.expect("one is eligible")] += 1;
        }
        assert_eq!((seen[1], seen[0] + seen[2] + seen[3]), (0, 3_000));
        assert!([0, 2, 3].iter().all(|&i| (999..=1_001).contains(&seen[i])), "{seen:?}");
    }

    #[test]
    fn of_a_prompt_that_is_held_whole_the_last_block_is_computed() {
        let holds = |blocks| with(|view| view.matched_blocks = blocks);
        let uncached = |tokens, blocks| {
            let ask = Ask { prompt_tokens: tokens, ..ASK };
            decide(&ask, &[holds(blocks)], 0).costs[0].uncached_tokens
        };
        assert_eq!([uncached(64, 4), uncached(63, 3), uncached(65, 4), uncached(1, 99)], [16, 15, 1, 1]);
    }

    #[test]
    fn silence_is_a_workers_or_our_own() {
        use CandidateState::{Draining, Eligible, NoLoad, Suspect};
        let ms = Duration::from_millis;
        let check = |ages: &[Option<u64>], awake_ms, expected: &[CandidateState], suspicion| {
            let view = |age: &Option<u64>| with(|view| view.load_age = age.map(ms));
            let mut views: Vec<WorkerView> = ages.iter().map(view).collect();
            assert_eq!(judge(&mut views, ms(300), ms(awake_ms)), suspicion);
            assert_eq!(views.iter().map(|view| view.state).collect::<Vec<_>>(), expected);
        };
        let awake = 9_000;
        check(&[Some(300), Some(20)], awake, &[Eligible; 2], Suspicion::Nobody);
        check(&[Some(301), Some(20)], awake, &[Suspect, Eligible], Suspicion::Workers(1));
        check(&[Some(301), Some(400), Some(20)], awake, &[Eligible; 3], Suspicion::Itself);
        check(&[Some(301)], awake, &[Eligible], Suspicion::Itself);
        check(&[Some(800), Some(20)], 300, &[Eligible; 2], Suspicion::Nobody);
        check(&[None, Some(20)], awake, &[NoLoad, Eligible], Suspicion::Nobody);
        check(&[None, None], awake, &[Eligible; 2], Suspicion::Nobody);
        check(&[], awake, &[], Suspicion::Nobody);
        // One that takes no work anyway is not asked.
        let mut views = [with(|view| (view.state, view.load_age) = (Draining, Some(ms(999)))), idle()];
        assert_eq!(judge(&mut views, ms(300), ms(awake)), Suspicion::Nobody);
        assert_eq!(views[0].state, Draining);
    }
}
