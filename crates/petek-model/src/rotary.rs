//! The rotary tables: cos and sin of every position and frequency, made in f64 at load and rounded once.
//!
//! `libm` (pure Rust) and not the system's: the same tables on every machine.
//!
//! *Source*: Su et al., "RoFormer" (2021), section 3.2.2; Llama 3's scaling as in transformers' `modeling_rope_utils`.

use std::f64::consts::PI;

use crate::config::RotaryScaling;

/// cos and sin, each `[positions, dim / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryTables {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl RotaryTables {
    /// The tables for heads of width `dim` over `positions` positions.
    pub fn new(dim: usize, positions: usize, theta: f64, scaling: RotaryScaling) -> Self {
        let frequencies: Vec<f64> = (0..dim / 2)
            .map(|i| stretched(1.0 / libm::pow(theta, (2 * i) as f64 / dim as f64), scaling))
            .collect();
        let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        Self {
            cos: angles().map(|a| libm::cos(a) as f32).collect(),
            sin: angles().map(|a| libm::sin(a) as f32).collect(),
        }
    }
}

fn stretched(frequency: f64, scaling: RotaryScaling) -> f64 {
    match scaling {
        RotaryScaling::None => frequency,
        RotaryScaling::Linear { factor } => frequency / factor,
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wave = 2.0 * PI / frequency;
            if wave > original_context / low_freq_factor {
                frequency / factor
            } else if wave < original_context / high_freq_factor {
                frequency
            } else {
                let smooth =
                    (original_context / wave - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_the_angles() {
        let tables = RotaryTables::new(4, 3, 10_000.0, RotaryScaling::None);
        assert_eq!(tables.cos[..2], [1.0, 1.0]);
        assert_eq!(tables.sin[2..4], [(1.0_f64).sin() as f32, (0.01_f64).sin() as f32]);
        assert_eq!(tables.cos[4..], [(2.0_f64).cos() as f32, (0.02_f64).cos() as f32]);
    }

    /// Long waves are divided, short ones kept, and the blend lies between.
    #[test]
    fn llama3_divides_long_waves_only() {
        let scaling = RotaryScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let wave = |length: f64| stretched(2.0 * PI / length, scaling) / (2.0 * PI / length);
        assert_eq!(wave(2047.0), 1.0);
        assert_eq!(wave(8193.0), 1.0 / 8.0);
        let middle = wave(4096.0);
        // smooth = (2 - 1) / 3, so 2/3 of the divided and 1/3 of the kept.
        assert!((middle - (2.0 / 3.0 / 8.0 + 1.0 / 3.0)).abs() < 1e-12, "{middle}");
        assert_eq!(stretched(0.5, RotaryScaling::Linear { factor: 4.0 }), 0.125);
    }
}
