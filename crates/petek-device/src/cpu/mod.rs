//! Executors on the CPU: the [`mod@reference`], plainly right, and [`simd`], which serves.
//!
//! `simd` stands on, from the top: [`matmul`], [`attention`] and [`sample`]; the weights they read ([`pack`]) and the cache
//! ([`kv`]); the expressions and sums of the numerics ([`math`]); threads ([`pool`]), instructions ([`isa`]), [`memory`].
//! What the machine could do at most, to compare with: [`roofs`].

pub mod reference;

pub mod simd;

pub mod attention;
pub mod matmul;
pub mod sample;

pub mod kv;
pub mod pack;

mod kernel;
mod kernel_plain;
mod kernel_trials;
#[cfg(target_arch = "x86_64")]
mod kernel_x86;
pub(crate) mod lanes;
pub mod math;

pub mod isa;
pub mod memory;
pub mod pool;
pub mod roofs;
