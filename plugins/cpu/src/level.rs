//! Which instructions may the kernels use?

use sparsed_plugin_kit::PluginError;

/// An instruction level. A value above `Scalar` exists only where the CPU has what it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Portable Rust; the definition that the others are tested against.
    Scalar,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// What every aarch64 has.
    Neon,
    /// NEON and the dot products of signed bytes (Armv8.2; Cortex-A55, A76 and later).
    Dotprod,
    /// Dotprod and the products of byte matrices (Armv8.6; Cortex-A510, A710, Neoverse V1 and later).
    I8mm,
}

impl Level {
    /// The better come later, of an architecture.
    const ALL: [Self; 6] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Neon, Self::Dotprod, Self::I8mm];

    /// Every level of this machine.
    pub(crate) fn all() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| level.is_here())
    }

    /// The best level of this machine.
    pub(crate) fn detect() -> Self {
        Self::all().next_back().unwrap_or(Self::Scalar)
    }

    /// The level that the setting `level` names.
    pub(crate) fn forced(name: &str) -> Result<Self, PluginError> {
        let Some(level) = Self::ALL.into_iter().find(|level| level.name() == name) else {
            let names = Self::ALL.map(Self::name).join(", ");
            return Err(PluginError::invalid(format!("level '{name}': one of {names}")));
        };
        if level.is_here() {
            return Ok(level);
        }
        Err(PluginError::unsupported(format!("level '{name}': this CPU does not have it")))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
            Self::Dotprod => "dotprod",
            Self::I8mm => "i8mm",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_here(self) -> bool {
        let avx2 =
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        match self {
            Self::Scalar => true,
            Self::Avx2 => avx2(),
            Self::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Self::Neon | Self::Dotprod | Self::I8mm => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn is_here(self) -> bool {
        use std::arch::is_aarch64_feature_detected;
        match self {
            Self::Scalar | Self::Neon => true,
            Self::Dotprod => is_aarch64_feature_detected!("dotprod"),
            Self::I8mm => is_aarch64_feature_detected!("dotprod") && is_aarch64_feature_detected!("i8mm"),
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_here(self) -> bool {
        self == Self::Scalar
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_everywhere_and_nonsense_is_refused() {
        assert_eq!(Level::forced("scalar").expect("always there"), Level::Scalar);
        let refusal = Level::forced("mmx").expect_err("not a level").message;
        assert!(refusal.contains("mmx") && refusal.contains("avx2, avx512, neon, dotprod, i8mm"), "{refusal}");
    }

    #[test]
    fn a_level_of_another_architecture_is_refused_by_name() {
        let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
        assert!(Level::forced(foreign).expect_err("not here").message.contains("this CPU does not have it"));
        assert!(Level::all().all(|level| Level::forced(level.name()).is_ok_and(|found| found == level)));
    }

    /// Runs under emulators of several CPUs: `make aarch64` says what each must have.
    #[test]
    fn the_best_level_is_the_one_that_the_environment_expects() {
        if let Ok(expected) = std::env::var("SPARSED_TEST_LEVEL") {
            assert_eq!(Level::detect().name(), expected);
        }
    }
}
