//! Does this CPU have the instructions that a library needs? Asked before any of its code is mapped.
//!
//! Names are those of Rust's target features. Each list is what can be asked for; another name is an error of the
//! manifest, not an instruction that is absent.

/// An architecture that manifests may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arch {
    X86_64,
    Aarch64,
}

/// The names of an architecture, each with the question to the CPU, which compiles for that architecture only.
macro_rules! features {
    ($names:ident, $detect:ident, $arch:literal, $ask:ident, [$($name:tt),* $(,)?]) => {
        const $names: &[&str] = &[$($name),*];

        #[cfg(target_arch = $arch)]
        fn $detect(name: &str) -> bool {
            match name {
                $($name => std::arch::$ask!($name),)*
                _ => false,
            }
        }

        #[cfg(not(target_arch = $arch))]
        fn $detect(_name: &str) -> bool {
            false
        }
    };
}

features!(
    X86_64,
    has_x86_64,
    "x86_64",
    is_x86_feature_detected,
    [
        "sse4.1",
        "sse4.2",
        "popcnt",
        "aes",
        "pclmulqdq",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "bmi1",
        "bmi2",
        "lzcnt",
        "gfni",
        "vaes",
        "vpclmulqdq",
        "avxvnni",
        "avx512f",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512vl",
        "avx512ifma",
        "avx512vbmi",
        "avx512vbmi2",
        "avx512vnni",
        "avx512bitalg",
        "avx512vpopcntdq",
        "avx512bf16",
        "avx512fp16",
    ]
);

features!(
    AARCH64,
    has_aarch64,
    "aarch64",
    is_aarch64_feature_detected,
    ["neon", "fp16", "fhm", "dotprod", "i8mm", "bf16", "lse", "rcpc", "sve", "sve2"]
);

impl Arch {
    /// By its name in a manifest.
    pub(crate) fn of(name: &str) -> Option<Self> {
        match name {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// This machine's; `None` where no plugin can run.
    pub(crate) fn here() -> Option<Self> {
        Self::of(std::env::consts::ARCH)
    }

    /// Its name in a manifest.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// What a library for it may require.
    pub(crate) fn features(self) -> &'static [&'static str] {
        match self {
            Self::X86_64 => X86_64,
            Self::Aarch64 => AARCH64,
        }
    }
}

/// Whether this CPU and its kernel have the feature.
pub(crate) fn has(name: &str) -> bool {
    has_x86_64(name) || has_aarch64(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_what_the_kernel_lists() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let line = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap();
        let listed: Vec<&str> = line.split_whitespace().collect();
        // Names that the kernel spells alike.
        for name in ["avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "gfni", "i8mm", "bf16", "sve"] {
            let known = Arch::here().unwrap().features().contains(&name);
            assert_eq!(has(name), known && listed.contains(&name), "{name}");
        }
        assert!(!has("avx9000"));
    }

    #[test]
    fn the_manifests_text_lists_every_name() {
        let text = include_str!("../../../abi/MANIFEST.md").split_whitespace().collect::<Vec<_>>().join(" ");
        for (title, arch) in [("x86-64", Arch::X86_64), ("aarch64", Arch::Aarch64)] {
            let line = format!("- {title}: `{}`", arch.features().join(" "));
            assert!(text.contains(&line), "{line}");
        }
    }

    #[test]
    fn an_architecture_is_known_by_its_name() {
        for arch in [Arch::X86_64, Arch::Aarch64] {
            assert_eq!(Arch::of(arch.name()), Some(arch));
        }
        assert_eq!(Arch::of("i686"), None);
    }
}
