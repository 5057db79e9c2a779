//! What does a plugin say about itself before any of its code runs? `plugin.toml`, manifest version 1.
//!
//! `abi/MANIFEST.md` is the format's text. Unknown keys are refused.

use crate::BackendError;
use crate::isa::{self, Arch};
use serde::Deserialize;
use std::path::Path;

/// Largest manifest in bytes.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 10;
/// Most libraries of a plugin.
const LIBRARIES_MAX: usize = 16;
/// Most entries of `requires` and of `needs`.
const LIST_MAX: usize = 64;
/// Longest id in bytes.
const ID_BYTES_MAX: usize = 64;
/// Most entries of `devices`, and of `reads`.
const PLACES_MAX: usize = 32;
/// Where `reads` may lead; `/usr` may be read by all.
const READ_ROOTS: &[&str] = &["/etc/", "/opt/", "/run/", "/srv/", "/var/"];

/// A parsed `plugin.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always 1.
    pub manifest_version: u32,
    /// The id, equal to the folder's name and to the library's own: lower-case letters, digits, `.`, `_` and `-`.
    pub id: String,
    /// The plugin's version, equal to the library's own.
    pub version: String,
    /// An SPDX expression.
    pub license: String,
    /// Who made it, for people.
    pub vendor: Option<String>,
    /// What it is, for people.
    pub description: Option<String>,
    /// Kept for signed manifests; nothing checks it yet.
    pub signature: Option<String>,
    /// Raised by the maker where the numbers that the plugin computes get other bits: KV rows that were made before are
    /// made anew.
    #[serde(default)]
    pub arithmetic: u32,
    /// Device nodes that a plugin in a process of its own may open: `/dev/name`, or `/dev/prefix*`.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Files and folders below `/etc`, `/opt`, `/run`, `/srv` or `/var` that a plugin in a process of its own may read.
    #[serde(default)]
    pub reads: Vec<String>,
    /// The ABI it speaks.
    pub abi: AbiSection,
    /// Variants; the one with the highest score of those that run here is loaded.
    #[serde(rename = "library")]
    pub libraries: Vec<LibrarySection>,
}

/// `[abi]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbiSection {
    /// Majors that `spd_get_api` answers.
    pub major: Vec<u32>,
    /// `x86_64` or `aarch64`, for libraries that do not say.
    pub arch: String,
}

/// `[[library]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LibrarySection {
    /// File name beside the manifest.
    pub path: String,
    /// Higher is tried first.
    pub score: u32,
    /// Of the file, lower-case hexadecimal.
    pub sha256: String,
    /// Its architecture, where it is not `abi.arch`.
    pub arch: Option<String>,
    /// Instruction set extensions without which it must not be loaded.
    #[serde(default)]
    pub requires: Vec<String>,
    /// Libraries that it is linked against, beside those of the C and C++ runtime.
    #[serde(default)]
    pub needs: Vec<String>,
}

impl Manifest {
    /// Reads a manifest found in the folder `folder_name`.
    ///
    /// # Errors
    /// [`BackendError::Manifest`] with the key that is wrong.
    pub fn parse(path: &Path, text: &str, folder_name: &str) -> Result<Self, BackendError> {
        let refuse = |reason: String| BackendError::Manifest { path: path.to_owned(), reason };
        let manifest: Self = toml::from_str(text).map_err(|e| refuse(e.to_string().trim_end().to_owned()))?;
        manifest.wrong(folder_name).map_or(Ok(manifest), |reason| Err(refuse(reason)))
    }

    /// The library to load on this machine: the one with the highest score of those that can run here.
    ///
    /// # Errors
    /// [`BackendError::AbiVersion`], or [`BackendError::NoVariant`] with what each library lacks.
    pub fn choose(&self, path: &Path) -> Result<&LibrarySection, BackendError> {
        if !self.abi.major.contains(&sparsed_abi::ABI_MAJOR) {
            let found = format!("major {:?} by its plugin.toml", self.abi.major);
            return Err(BackendError::AbiVersion { path: path.to_owned(), found });
        }
        self.choose_for(Arch::here(), &isa::has)
            .map_err(|lacks| BackendError::NoVariant { path: path.to_owned(), lacks: lacks.join("; ") })
    }

    /// As [`Manifest::choose`], for any machine; the error says of each library what it lacks.
    fn choose_for(&self, arch: Option<Arch>, has: &dyn Fn(&str) -> bool) -> Result<&LibrarySection, Vec<String>> {
        let mut lacks = Vec::new();
        let mut best: Option<&LibrarySection> = None;
        for library in &self.libraries {
            let of = library.arch(&self.abi);
            let missing: Vec<&str> = library.requires.iter().map(String::as_str).filter(|name| !has(name)).collect();
            if of.is_none() || of != arch {
                lacks.push(format!("{} is for {}", library.path, of.map_or("no architecture", Arch::name)));
            } else if !missing.is_empty() {
                lacks.push(format!("{} needs {}", library.path, missing.join(", ")));
            } else if best.is_none_or(|best| library.score > best.score) {
                best = Some(library);
            }
        }
        best.ok_or(lacks)
    }

    fn wrong(&self, folder_name: &str) -> Option<String> {
        let id_byte = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        let id = &self.id;
        if self.manifest_version != 1 {
            return Some(format!("manifest_version is {}, only 1 is known", self.manifest_version));
        }
        if id.is_empty() || id.len() > ID_BYTES_MAX || !id.bytes().all(id_byte) || id.starts_with('.') {
            return Some(format!("id '{id}' must be 1 to {ID_BYTES_MAX} of a-z, 0-9, '.', '_' and '-'"));
        }
        if id != folder_name {
            return Some(format!("id is '{id}', but the folder is '{folder_name}'"));
        }
        if Arch::of(&self.abi.arch).is_none() {
            return Some(format!("abi.arch '{}' is neither x86_64 nor aarch64", self.abi.arch));
        }
        if self.libraries.is_empty() || self.libraries.len() > LIBRARIES_MAX {
            return Some(format!("{} [[library]] entries, 1 to {LIBRARIES_MAX} are allowed", self.libraries.len()));
        }
        let is_device = |path: &String| path.starts_with("/dev/") && !path.contains("..") && !path.ends_with("/*");
        if self.devices.len() > PLACES_MAX || !self.devices.iter().all(is_device) {
            let shape = format!("at most {PLACES_MAX} of the form /dev/name or /dev/prefix*");
            return Some(format!("devices {:?}: {shape}", self.devices));
        }
        if self.reads.len() > PLACES_MAX || !self.reads.iter().all(|path| may_be_read(path)) {
            let shape = format!("at most {PLACES_MAX} plain paths below {}", READ_ROOTS.join(", "));
            return Some(format!("reads {:?}: {shape}", self.reads));
        }
        self.libraries.iter().find_map(|library| library.wrong(&self.abi))
    }
}

/// Whether `path` names something below one of [`READ_ROOTS`], without a detour.
fn may_be_read(path: &str) -> bool {
    let below = READ_ROOTS.iter().find_map(|root| path.strip_prefix(root));
    below.is_some_and(|rest| rest.split('/').all(|name| !name.is_empty() && !name.starts_with("..") && name != "."))
}

impl LibrarySection {
    fn arch(&self, abi: &AbiSection) -> Option<Arch> {
        Arch::of(self.arch.as_ref().unwrap_or(&abi.arch))
    }

    fn wrong(&self, abi: &AbiSection) -> Option<String> {
        let plain = |name: &str| !name.is_empty() && !name.contains(['/', '\0']) && !name.starts_with('.');
        if !plain(&self.path) {
            return Some(format!("library.path '{}' is not the name of a file beside it", self.path));
        }
        if self.sha256.len() != 64 || !self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Some(format!("library.sha256 '{}' is not 64 lower-case hex digits", self.sha256));
        }
        let Some(arch) = self.arch(abi) else {
            let arch = self.arch.as_deref().unwrap_or_default();
            return Some(format!("library.arch '{arch}' is neither x86_64 nor aarch64"));
        };
        if self.requires.len() > LIST_MAX || self.needs.len() > LIST_MAX {
            return Some(format!("library.requires and library.needs may have {LIST_MAX} entries"));
        }
        if let Some(name) = self.requires.iter().find(|name| !arch.features().contains(&name.as_str())) {
            let (arch, known) = (arch.name(), arch.features().join(", "));
            return Some(format!("library.requires '{name}' is not known for {arch}; known are {known}"));
        }
        let name = self.needs.iter().find(|name| !plain(name))?;
        Some(format!("library.needs '{name}' is not a library's name, such as libcuda.so.1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        manifest_version = 1
        id = "cpu"
        version = "0.1.0"
        license = "MIT"
        [abi]
        major = [0]
        arch = "x86_64"
        [[library]]
        path = "lib.so"
        score = 1
        sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    "#;

    fn parse(text: &str) -> Result<Manifest, BackendError> {
        Manifest::parse(Path::new("plugin.toml"), text, "cpu")
    }

    fn refusal(text: &str) -> String {
        parse(text).expect_err("must be refused").to_string()
    }

    /// `GOOD` and a second, better library with these lines.
    fn with_variant(lines: &str) -> String {
        let sha256 = "0".repeat(64);
        format!("{GOOD}\n[[library]]\npath = \"best.so\"\nscore = 9\nsha256 = \"{sha256}\"\n{lines}\n")
    }

    #[test]
    fn a_good_manifest_is_read() {
        let manifest = parse(GOOD).unwrap();
        assert_eq!(manifest.libraries[0].path, "lib.so");
        assert!(manifest.libraries[0].needs.is_empty() && manifest.signature.is_none());
    }

    #[test]
    fn optional_keys_are_kept() {
        let people = "license = \"MIT\"\nvendor = \"Acme\"\ndescription = \"x\"\nsignature = \"RWQ\"";
        let text = with_variant("needs = [\"libcuda.so.1\"]").replace("license = \"MIT\"", people);
        let manifest = parse(&text).unwrap();
        assert_eq!(manifest.signature.as_deref(), Some("RWQ"));
        assert_eq!((manifest.vendor.as_deref(), manifest.description.as_deref()), (Some("Acme"), Some("x")));
        assert_eq!(manifest.libraries[1].needs, ["libcuda.so.1"]);
    }

    #[test]
    fn refusals_name_the_key() {
        let changed = |from: &str, to: &str| refusal(&GOOD.replace(from, to));
        assert!(changed("manifest_version = 1", "manifest_version = 2").contains("manifest_version is 2"));
        assert!(changed("\"cpu\"", "\"gpu\"").contains("id is 'gpu'"));
        assert!(changed("\"cpu\"", "\"../cpu\"").contains("id '../cpu' must be"));
        assert!(changed("x86_64", "x86").contains("abi.arch 'x86'"));
        assert!(changed("lib.so", "../lib.so").contains("library.path"));
        assert!(changed("cdef\"", "CDEF\"").contains("library.sha256"));
        assert!(changed("license", "licence").contains("licence"));
        assert!(refusal(&with_variant("arch = \"riscv64\"")).contains("library.arch 'riscv64'"));
        assert!(refusal(&with_variant("needs = [\"/usr/lib/libcuda.so\"]")).contains("library.needs '/usr"));
        let many = vec!["\"avx2\""; LIST_MAX + 1].join(", ");
        assert!(refusal(&with_variant(&format!("requires = [{many}]"))).contains("64 entries"));
    }

    #[test]
    fn an_unknown_or_foreign_extension_is_refused_with_the_known_ones() {
        let said = refusal(&with_variant("requires = [\"avx2\", \"avx-512\"]"));
        assert!(said.contains("'avx-512' is not known for x86_64") && said.contains("avx512f"), "{said}");
        assert!(refusal(&with_variant("requires = [\"dotprod\"]")).contains("'dotprod' is not known for x86_64"));
        assert!(parse(&with_variant("arch = \"aarch64\"\nrequires = [\"dotprod\"]")).is_ok());
    }

    #[test]
    fn the_best_library_is_chosen_of_those_that_run_on_this_cpu() {
        let manifest = parse(&with_variant("requires = [\"avx2\", \"avx512vnni\"]")).unwrap();
        let chosen = |has: &[&str]| {
            let has: Vec<String> = has.iter().map(|&name| name.to_owned()).collect();
            manifest.choose_for(Some(Arch::X86_64), &|name| has.iter().any(|h| h == name)).unwrap().path.clone()
        };
        assert_eq!(chosen(&["avx2", "avx512vnni"]), "best.so");
        assert_eq!(chosen(&["avx2"]), "lib.so");
    }

    #[test]
    fn a_plugin_of_two_architectures_gives_each_its_library() {
        let manifest = parse(&with_variant("arch = \"aarch64\"")).unwrap();
        let chosen = |arch| manifest.choose_for(Some(arch), &|_| true).unwrap().path.as_str();
        assert_eq!((chosen(Arch::X86_64), chosen(Arch::Aarch64)), ("lib.so", "best.so"));
    }

    #[test]
    fn a_machine_that_fits_no_library_hears_what_each_lacks() {
        let text = with_variant("arch = \"aarch64\"").replace("score = 1\n", "score = 1\nrequires = [\"avx512f\"]\n");
        let lacks = parse(&text).unwrap().choose_for(Some(Arch::X86_64), &|_| false).unwrap_err();
        assert_eq!(lacks, ["lib.so needs avx512f", "best.so is for aarch64"]);
        for devices in ["/etc/passwd", "/dev/../etc", "/dev/*"] {
            let with = format!("devices = [\"/dev/null\", \"{devices}\"]\n{GOOD}");
            assert!(refusal(&with).contains(devices), "{devices}");
        }
        for reads in ["/etc/", "/etc", "/root/.ssh", "/etc/../root", "/etc//acme", "etc/acme", "/var/./x"] {
            let with = format!("reads = [\"/etc/acme/driver.conf\", \"{reads}\"]\n{GOOD}");
            assert!(refusal(&with).contains(reads), "{reads}");
        }
        assert_eq!(parse(&format!("reads = [\"/etc/acme\"]\n{GOOD}")).unwrap().reads, ["/etc/acme"]);
    }

    #[test]
    fn another_abi_major_is_refused() {
        let error = parse(&GOOD.replace("[0]", "[7]")).unwrap().choose(Path::new("p")).unwrap_err().to_string();
        assert!(error.contains('7'), "{error}");
    }
}
