//! One row's draw, by the contract of the sampling parameters: masks, temperature, top_k, top_p, min_p, then the largest of
//! score = z − ln E, where z is the logit over the temperature and E an exponential random number of (seed, position, id).
//!
//! The draw is an argmax, not a walk along an ordered sum: it does not depend on how the row was sorted or summed.
//!
//! *Source*: Gumbel-max, as in Maddison, Tarlow, Minka, "A* sampling" (NeurIPS 2014), section 2.

use crate::cpu::isa::Isa;
use crate::cpu::lanes::{LANES, Lanes, on_isa};
use crate::cpu::math;
use crate::ops::{DrawResult, DrawSpec};
use crate::random::Purpose;

/// Below this a temperature counts as 0: greedy.
const TEMPERATURE_MIN: f32 = 1e-5;
/// ln of the smallest E there is, about 2^-32, rounded outwards: no score exceeds its z by more.
const SCORE_GAIN_MAX: f32 = 22.2;
/// Tokens drawn at once: 16 quads of random words.
const DRAWN_AT_ONCE: usize = 4 * LANES;
/// The largest tokens sorted first for top_p, and how much more each further try takes.
const SORTED_FIRST: usize = 512;
const SORTED_GROWTH: usize = 8;
/// Numbers of which one maximum is taken, to bound the n-th largest.
const MAXIMUM_OF: usize = 64;

/// Room for draws: grows to the vocabulary and stays.
#[derive(Debug, Default)]
pub struct Sampler {
    /// What is kept so far, in id order: ids, and logits over the temperature.
    ids: Vec<u32>,
    z: Vec<f32>,
    masked: Vec<u32>,
    weights: Vec<f32>,
    largest: Largest,
}

impl Sampler {
    /// Draws a token from a row of logits; ids from `vocabulary_drawn` on are never drawn.
    ///
    /// *Shapes*: `logits`: the model's whole vocabulary; logprobs and rank are over all of it.
    pub fn draw(&mut self, isa: Isa, logits: &[f32], spec: &DrawSpec, vocabulary_drawn: usize) -> DrawResult {
        if !all_finite(isa, logits) {
            return DrawResult::NotFinite;
        }
        let drawn = &logits[..vocabulary_drawn.min(logits.len())];
        let greedy = spec.temperature < TEMPERATURE_MIN;
        let id = if greedy && spec.masked.is_empty() {
            first_largest(isa, drawn).map(|index| index as u32)
        } else {
            self.keep_allowed(drawn, &spec.masked);
            if greedy {
                first_largest(isa, &self.z).map(|index| self.ids[index])
            } else {
                self.sample(isa, spec)
            }
        };
        let Some(id) = id else { return DrawResult::NoneAllowed };
        match spec.logprobs {
            None => DrawResult::Token { id, logprob: 0.0, rank: 0, top: Vec::new() },
            Some(top) => self.with_logprobs(isa, logits, id, usize::from(top)),
        }
    }

    fn keep_allowed(&mut self, logits: &[f32], masked: &[u32]) {
        self.ids.clear();
        self.z.clear();
        self.masked.clear();
        self.masked.extend_from_slice(masked);
        self.masked.sort_unstable();
        // Whole runs between masked ids, and the one behind the last.
        let mut first = 0;
        for end in
            self.masked.iter().map(|id| *id as usize).filter(|id| *id < logits.len()).chain([logits.len()])
        {
            if first < end {
                self.z.extend_from_slice(&logits[first..end]);
                self.ids.extend(first as u32..end as u32);
            }
            first = end + 1;
        }
    }

    fn sample(&mut self, isa: Isa, spec: &DrawSpec) -> Option<u32> {
        divide(isa, &mut self.z, spec.temperature);
        let top_k = spec.top_k as usize;
        if top_k > 0 && top_k < self.z.len() {
            self.largest.find(isa, &self.z, top_k);
            self.keep_found(top_k);
        }
        if self.z.is_empty() {
            return None;
        }
        if spec.top_p < 1.0 || spec.min_p > 0.0 {
            let largest = math::max(isa, &self.z);
            if spec.top_p < 1.0 {
                let enough = spec.top_p * math::sum_exp(isa, &self.z, largest);
                let kept = self.kept_by_top_p(isa, largest, enough);
                self.keep_found(kept);
            }
            if spec.min_p > 0.0 {
                self.keep_weights(isa, largest, spec.min_p);
            }
        }
        Some(gumbel_max(isa, &self.ids, &self.z, spec.seed, spec.position))
    }

    /// Keeps the first `count` of what was found.
    fn keep_found(&mut self, count: usize) {
        if count == self.z.len() {
            return;
        }
        for (to, from) in self.largest.indices_ascending(count).enumerate() {
            (self.ids[to], self.z[to]) = (self.ids[from], self.z[from]);
        }
        self.ids.truncate(count);
        self.z.truncate(count);
    }

    /// How many of the largest top_p keeps: a token is kept while the sum before it is below `enough`. Only as many are
    /// sorted as that takes.
    fn kept_by_top_p(&mut self, isa: Isa, largest: f32, enough: f32) -> usize {
        let mut count = SORTED_FIRST;
        loop {
            count = count.min(self.z.len());
            self.largest.find(isa, &self.z, count);
            self.weights.clear();
            self.weights.extend(self.largest.values());
            exp_minus(isa, &mut self.weights, largest);
            let mut sum = 0.0_f32;
            for (index, weight) in self.weights.iter().enumerate() {
                sum += weight;
                // A sum that is not a number (a logit over the temperature was infinite) keeps all.
                if sum >= enough {
                    return index + 1;
                }
            }
            if count == self.z.len() {
                return count;
            }
            count *= SORTED_GROWTH;
        }
    }

    /// min_p: keeps weights that are not below it.
    fn keep_weights(&mut self, isa: Isa, largest: f32, min_p: f32) {
        self.weights.clear();
        self.weights.extend_from_slice(&self.z);
        exp_minus(isa, &mut self.weights, largest);
        let mut kept = 0;
        for index in 0..self.z.len() {
            let below = self.weights[index] < min_p;
            if !below {
                (self.ids[kept], self.z[kept]) = (self.ids[index], self.z[index]);
                kept += 1;
            }
        }
        self.ids.truncate(kept);
        self.z.truncate(kept);
    }

    /// The model's own distribution: raw logits over the whole vocabulary.
    fn with_logprobs(&mut self, isa: Isa, logits: &[f32], id: u32, count: usize) -> DrawResult {
        let largest = math::max(isa, logits);
        let log_sum = ln(isa, math::sum_exp(isa, logits, largest));
        let logprob = |z: f32| (z - largest) - log_sum;
        let chosen = logits[id as usize];
        let rank = 1 + count_larger(isa, logits, chosen) + count_equal(isa, &logits[..id as usize], chosen);
        self.largest.find(isa, logits, count.min(logits.len()));
        let top = self.largest.indices().map(|index| (index as u32, logprob(logits[index]))).collect();
        DrawResult::Token { id, logprob: logprob(chosen), rank, top }
    }
}

// ---- the n largest ----------------------------------------------------------------------------------------------

/// Finds the n largest of a row, by (larger first, lower index first), without sorting the row: the n-th largest of many
/// maxima is a bound below which none of them is.
#[derive(Debug, Default)]
struct Largest {
    maxima: Vec<f32>,
    /// What was found, in order: the number's bits, so turned that larger ones come first, above its index.
    keys: Vec<u64>,
    ascending: Vec<u32>,
}

impl Largest {
    /// Finds the `count` largest of `x`, which holds at least as many and no NaN.
    fn find(&mut self, isa: Isa, x: &[f32], count: usize) {
        self.keys.clear();
        if count == 0 {
            return;
        }
        self.maxima.clear();
        if count < x.len() / MAXIMUM_OF {
            maxima(isa, x, &mut self.maxima);
        }
        let bound = if count <= self.maxima.len() {
            *self.maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        };
        collect(isa, x, bound, &mut self.keys);
        if count < self.keys.len() {
            self.keys.select_nth_unstable(count - 1);
            self.keys.truncate(count);
        }
        self.keys.sort_unstable();
    }

    fn indices(&self) -> impl Iterator<Item = usize> {
        self.keys.iter().map(|key| *key as u32 as usize)
    }

    fn values(&self) -> impl Iterator<Item = f32> {
        self.keys.iter().map(|key| value_of(*key))
    }

    /// Indices of the first `count` found, ascending.
    fn indices_ascending(&mut self, count: usize) -> impl Iterator<Item = usize> {
        self.ascending.clear();
        self.ascending.extend(self.keys[..count].iter().map(|key| *key as u32));
        self.ascending.sort_unstable();
        self.ascending.iter().map(|index| *index as usize)
    }
}

const SIGN: u32 = 0x8000_0000;

/// Ascending keys are descending numbers, then ascending indices. −0 equals 0.
fn key_of(value: f32, index: u32) -> u64 {
    let bits = (value + 0.0).to_bits();
    let descending = if bits & SIGN == 0 { !(bits | SIGN) } else { bits };
    u64::from(descending) << 32 | u64::from(index)
}

fn value_of(key: u64) -> f32 {
    let descending = (key >> 32) as u32;
    f32::from_bits(if descending & SIGN == 0 { !descending & !SIGN } else { descending })
}

/// Appends the maxima of groups of 64 numbers, or fewer at the end: 16 groups side by side, a lane each.
fn maxima(isa: Isa, x: &[f32], maxima: &mut Vec<f32>) {
    on_isa!(isa, maxima_on(x: &[f32], maxima: &mut Vec<f32>));
}

#[inline(always)]
fn maxima_on<S: Lanes>(s: S, x: &[f32], maxima: &mut Vec<f32>) {
    for groups in x.chunks(MAXIMUM_OF * LANES) {
        let mut largest = s.splat(f32::NEG_INFINITY);
        let (vectors, rest) = groups.as_chunks::<LANES>();
        for vector in vectors {
            largest = s.max(s.load(vector), largest);
        }
        if !rest.is_empty() {
            largest = s.max(s.load_part(rest, f32::NEG_INFINITY), largest);
        }
        maxima.extend_from_slice(&s.lanes(largest)[..LANES.min(groups.len())]);
    }
}

/// Appends the keys of all numbers that are not below the bound.
fn collect(isa: Isa, x: &[f32], bound: f32, keys: &mut Vec<u64>) {
    on_isa!(isa, collect_on(x: &[f32], bound: f32, keys: &mut Vec<u64>));
}

#[inline(always)]
fn collect_on<S: Lanes>(s: S, x: &[f32], bound: f32, keys: &mut Vec<u64>) {
    for (index, some) in x.chunks(LANES).enumerate() {
        let mut mask = s.mask_ge(load(s, some, f32::NAN), s.splat(bound));
        while mask != 0 {
            let lane = mask.trailing_zeros();
            keys.push(key_of(some[lane as usize], (index * LANES) as u32 + lane));
            mask &= mask - 1;
        }
    }
}

#[inline(always)]
fn load<S: Lanes>(s: S, some: &[f32], fill: f32) -> S::F {
    match some.as_array() {
        Some(whole) => s.load(whole),
        None => s.load_part(some, fill),
    }
}

// ---- the draw ---------------------------------------------------------------------------------------------------

/// The id of the largest score, the lowest among equals. `ids` ascend and are not empty.
fn gumbel_max(isa: Isa, ids: &[u32], z: &[f32], seed: u64, position: u32) -> u32 {
    on_isa!(isa, gumbel_max_on(ids: &[u32], z: &[f32], seed: u64, position: u32) -> u32)
}

#[inline(always)]
fn gumbel_max_on<S: Lanes>(s: S, ids: &[u32], z: &[f32], seed: u64, position: u32) -> u32 {
    let (mut best, mut id_of_best) = (f32::NEG_INFINITY, ids[0]);
    for (ids, z) in ids.chunks(DRAWN_AT_ONCE).zip(z.chunks(DRAWN_AT_ONCE)) {
        let mut hope = 0;
        for z in z.chunks(LANES) {
            // So far below the best score that no random number could lift it over: not looked at.
            let within = s.add(load(s, z, f32::NEG_INFINITY), s.splat(SCORE_GAIN_MAX));
            hope |= s.mask_ge(within, s.splat(best));
        }
        if hope == 0 {
            continue;
        }
        let words = words_of(ids, seed, position);
        for ((ids, z), words) in ids.chunks(LANES).zip(z.chunks(LANES)).zip(words.as_chunks::<LANES>().0) {
            let scores =
                s.sub(load(s, z, f32::NEG_INFINITY), math::ln(s, exponential(s, s.load_words(words))));
            if s.mask_ge(scores, s.splat(best)) == 0 {
                continue;
            }
            for (id, score) in ids.iter().zip(s.lanes(scores)) {
                if score > best {
                    (best, id_of_best) = (score, *id);
                }
            }
        }
    }
    id_of_best
}

/// As [`exponential`](crate::random::exponential) of [`uniform`](crate::random::uniform).
#[inline(always)]
fn exponential<S: Lanes>(s: S, words: S::W) -> S::F {
    let one = s.splat(1.0);
    let v = s.mul(s.add(s.halves_as_f32(words), s.splat(0.5)), s.splat(1.0 / 2_147_483_648.0));
    let u = s.sub(one, v);
    let e = s.mul(s.sub(s.splat(0.0), math::ln(s, u)), s.div(v, s.sub(one, u)));
    s.select_lt(u, one, e, v)
}

/// The random words of up to 64 tokens, as [`words`](crate::random::words) gives them.
#[inline(always)]
fn words_of(ids: &[u32], seed: u64, position: u32) -> [u32; DRAWN_AT_ONCE] {
    let mut words = [0; DRAWN_AT_ONCE];
    if ids.len() == DRAWN_AT_ONCE && ids[0].is_multiple_of(4) && ids[DRAWN_AT_ONCE - 1] - ids[0] == 63 {
        // All ids of 16 quads.
        let mut quads = [ids[0] / 4; LANES];
        for (i, quad) in (0..).zip(&mut quads) {
            *quad += i;
        }
        let drawn = philox_by_16(seed, quads, position);
        for (i, word) in words.iter_mut().enumerate() {
            *word = drawn[i % 4][i / 4];
        }
        return words;
    }
    for (ids, words) in ids.chunks(LANES).zip(words.chunks_mut(LANES)) {
        let mut quads = [0; LANES];
        for (quad, id) in quads.iter_mut().zip(ids) {
            *quad = id / 4;
        }
        let drawn = philox_by_16(seed, quads, position);
        for (i, (id, word)) in ids.iter().zip(words).enumerate() {
            *word = drawn[*id as usize % 4][i];
        }
    }
    words
}

/// [`philox4x32_10`](crate::random::philox4x32_10) of 16 quads side by side, in loops that become wide multiplications.
#[inline(always)]
fn philox_by_16(seed: u64, quads: [u32; LANES], position: u32) -> [[u32; LANES]; 4] {
    const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut counter = [quads, [position; LANES], [Purpose::Draw as u32; LANES], [0; LANES]];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let mut next = [[0; LANES]; 4];
        for i in 0..LANES {
            let a = u64::from(MULTIPLIER[0]) * u64::from(counter[0][i]);
            let b = u64::from(MULTIPLIER[1]) * u64::from(counter[2][i]);
            next[0][i] = (b >> 32) as u32 ^ counter[1][i] ^ key[0];
            next[1][i] = b as u32;
            next[2][i] = (a >> 32) as u32 ^ counter[3][i] ^ key[1];
            next[3][i] = a as u32;
        }
        counter = next;
    }
    counter
}

// ---- rows -------------------------------------------------------------------------------------------------------

fn all_finite(isa: Isa, x: &[f32]) -> bool {
    on_isa!(isa, all_finite_on(x: &[f32]) -> bool)
}

#[inline(always)]
fn all_finite_on<S: Lanes>(_: S, x: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let mut found = false;
    for x in x {
        // No short cut: a loop of wide compares.
        found |= x.to_bits() & EXPONENT == EXPONENT;
    }
    !found
}

/// Where the largest stands first; none of none.
fn first_largest(isa: Isa, x: &[f32]) -> Option<usize> {
    let largest = math::max(isa, x);
    on_isa!(isa, first_not_below_on(x: &[f32], largest: f32) -> Option<usize>)
}

#[inline(always)]
fn first_not_below_on<S: Lanes>(s: S, x: &[f32], bound: f32) -> Option<usize> {
    for (index, some) in x.chunks(LANES).enumerate() {
        let mask = s.mask_ge(load(s, some, f32::NAN), s.splat(bound));
        if mask != 0 {
            return Some(index * LANES + mask.trailing_zeros() as usize);
        }
    }
    None
}

fn count_larger(isa: Isa, x: &[f32], than: f32) -> u32 {
    on_isa!(isa, count_larger_on(x: &[f32], than: f32) -> u32)
}

#[inline(always)]
fn count_larger_on<S: Lanes>(_: S, x: &[f32], than: f32) -> u32 {
    let mut count = 0;
    for x in x {
        count += u32::from(*x > than);
    }
    count
}

fn count_equal(isa: Isa, x: &[f32], to: f32) -> u32 {
    on_isa!(isa, count_equal_on(x: &[f32], to: f32) -> u32)
}

#[inline(always)]
fn count_equal_on<S: Lanes>(_: S, x: &[f32], to: f32) -> u32 {
    let mut count = 0;
    for x in x {
        count += u32::from(*x == to);
    }
    count
}

/// `x /= by`.
fn divide(isa: Isa, x: &mut [f32], by: f32) {
    on_isa!(isa, divide_on(x: &mut [f32], by: f32));
}

#[inline(always)]
fn divide_on<S: Lanes>(_: S, x: &mut [f32], by: f32) {
    for x in x {
        *x /= by;
    }
}

/// `x = e^(x − shift)`.
fn exp_minus(isa: Isa, x: &mut [f32], shift: f32) {
    on_isa!(isa, exp_minus_on(x: &mut [f32], shift: f32));
}

#[inline(always)]
fn exp_minus_on<S: Lanes>(s: S, x: &mut [f32], shift: f32) {
    for some in x.chunks_mut(LANES) {
        let powers = math::exp(s, s.sub(load(s, some, shift), s.splat(shift)));
        s.store_part(powers, some);
    }
}

fn ln(isa: Isa, x: f32) -> f32 {
    on_isa!(isa, ln_on(x: f32) -> f32)
}

#[inline(always)]
fn ln_on<S: Lanes>(s: S, x: f32) -> f32 {
    s.lanes(math::ln(s, s.splat(x)))[0]
}

#[cfg(test)]
#[path = "draw_vectors.rs"]
mod draw_vectors;
#[cfg(test)]
#[path = "sample_tests.rs"]
mod tests;
