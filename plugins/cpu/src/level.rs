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
}

impl Level {
    /// The best level of this machine.
    pub(crate) fn detect() -> Self {
        [Self::Avx512, Self::Avx2].into_iter().find(|level| level.is_here()).unwrap_or(Self::Scalar)
    }

    /// Every level of this machine.
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        [Self::Scalar, Self::Avx2, Self::Avx512].into_iter().filter(|level| level.is_here())
    }

    /// The level that the setting `level` names.
    pub(crate) fn forced(name: &str) -> Result<Self, PluginError> {
        let level = match name {
            "scalar" => Self::Scalar,
            "avx2" => Self::Avx2,
            "avx512" => Self::Avx512,
            _ => return Err(PluginError::invalid(format!("level '{name}': scalar, avx2 or avx512"))),
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
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
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
        assert!(Level::forced("mmx").expect_err("not a level").message.contains("mmx"));
    }
}
