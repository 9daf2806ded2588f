//! Which instructions the kernels use. A matter of speed only: every form gives the same bits, and each special
//! instruction is held against the portable form before it is trusted.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use crate::DeviceError;
use crate::cpu::kernel_trials;

/// A level of instructions, from the plainest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Scalar fused multiply-adds (x86-64 with FMA; aarch64), in loops that the compiler may widen.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// The same with bf16 dot products and conversions.
    Avx512Bf16,
}

/// What [`Isa::choose`] chose, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaReport {
    /// What everything but the matmuls is to use.
    pub isa: Isa,
    /// What the matmuls are to use: the same, or AVX-512 without bf16 where two multiply-adds are faster than a dot product.
    pub isa_matmul: Isa,
    /// What the processor says it has.
    pub detected: Isa,
    /// Instructions that did not give the portable form's bits: they are not used. A reason to log a warning.
    pub differing: Vec<&'static str>,
}

impl Isa {
    /// All levels, ascending.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The best level that this processor has.
    ///
    /// *Errors*: [`DeviceError::Unsupported`] on a processor without fused multiply-add: other bits would come out.
    pub fn detect() -> Result<Isa, DeviceError> {
        let best = Isa::ALL.into_iter().rev().find(|isa| isa.available());
        best.ok_or_else(|| {
            let what =
                "it has no fused multiply-add (FMA); every x86-64 server since 2013 and every aarch64 has";
            DeviceError::Unsupported(what.to_owned())
        })
    }

    /// Whether this processor has the level.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
            let avx512 = || {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            };
            is_x86_feature_detected!("fma")
                && match self {
                    Isa::Portable => true,
                    Isa::Avx2 => avx2(),
                    Isa::Avx512 => avx512(),
                    Isa::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
                }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            cfg!(target_arch = "aarch64") && self == Isa::Portable
        }
    }

    /// The level to use: `wanted`, or the best there is, judged by a few microseconds of trial where it is not plain; then
    /// lowered where an instruction fails its self-test.
    ///
    /// *Errors*: [`DeviceError::Unsupported`] if the processor lacks what was wanted, or fused multiply-add.
    pub fn choose(wanted: Option<Isa>) -> Result<IsaReport, DeviceError> {
        let detected = Isa::detect()?;
        let mut isa = wanted.unwrap_or(detected);
        if !isa.available() {
            return Err(DeviceError::Unsupported(format!(
                "{isa} was asked for; the best it has is {detected}"
            )));
        }
        let differing = kernel_trials::differing_instructions(isa);
        if differing.contains(&"vdpbf16ps") {
            isa = Isa::Avx512;
        }
        if differing.contains(&"vcvtph2ps") {
            isa = Isa::Portable;
        }
        let dot_is_slow = wanted.is_none() && isa == Isa::Avx512Bf16 && kernel_trials::dot_is_slow();
        let isa_matmul = if dot_is_slow { Isa::Avx512 } else { isa };
        Ok(IsaReport { isa, isa_matmul, detected, differing })
    }

    /// Its name in configs, flags and logs.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Isa, DeviceError> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            let known = Isa::ALL.map(Isa::name).join(", ");
            DeviceError::Unsupported(format!("no instruction level is called {name:?}; there are {known}"))
        })
    }
}

/// How far ahead of a stream of weights a kernel asks for them. Intel's own prefetchers leave gaps between few streams
/// (Emerald Rapids: one row 0.85 → 0.98 of the read rate, eight rows 0.55 → 0.8); AMD's do not, and there a request only
/// costs (Zen 4: 5–15 %).
pub(crate) fn prefetch_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| if is_intel() { 4096 } else { 0 })
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx] == [b"Genu", b"ineI", b"ntel"].map(|part| u32::from_le_bytes(*part))
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse::<Isa>().expect("its own name"), isa);
        }
        let error = "avx1024".parse::<Isa>().expect_err("no such level").to_string();
        assert!(
            error.contains("avx1024") && Isa::ALL.iter().all(|isa| error.contains(isa.name())),
            "{error}"
        );
    }

    #[test]
    fn a_level_is_taken_as_asked_for_or_refused() {
        let detected = Isa::detect().expect("a processor that can run petek");
        for wanted in Isa::ALL {
            match Isa::choose(Some(wanted)) {
                Ok(report) => {
                    assert!(wanted.available(), "{report:?}");
                    assert_eq!((report.isa, report.isa_matmul, report.detected), (wanted, wanted, detected));
                    assert_eq!(report.differing, Vec::<&str>::new());
                }
                Err(error) => {
                    assert!(!wanted.available() && error.to_string().contains(wanted.name()), "{error}")
                }
            }
        }
        let report = Isa::choose(None).expect("a processor that can run petek");
        assert_eq!((report.isa, report.detected), (detected, detected));
        assert!(
            report.isa_matmul <= report.isa && report.isa_matmul >= report.isa.min(Isa::Avx512),
            "{report:?}"
        );
    }
}
