//! What does a plugin say about itself before any of its code runs? `plugin.toml`, manifest version 1.

use crate::BackendError;
use serde::Deserialize;
use std::path::Path;

/// Largest manifest in bytes.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 10;
/// Most entries of `devices`.
const DEVICES_MAX: usize = 32;

/// A parsed `plugin.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always 1.
    pub manifest_version: u32,
    /// The id, equal to the folder's name and to the library's own.
    pub id: String,
    /// The plugin's version, equal to the library's own.
    pub version: String,
    /// An SPDX expression.
    pub license: String,
    /// Device nodes that a plugin in a process of its own may open: `/dev/name`, or `/dev/prefix*`.
    #[serde(default)]
    pub devices: Vec<String>,
    /// The ABI it speaks.
    pub abi: AbiSection,
    /// Libraries, best first.
    #[serde(rename = "library")]
    pub libraries: Vec<LibrarySection>,
}

/// `[abi]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbiSection {
    /// Majors that `spd_get_api` answers.
    pub major: Vec<u32>,
    /// `x86_64` or `aarch64`.
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
}

impl Manifest {
    /// Reads a manifest found in the folder `folder_name`.
    ///
    /// # Errors
    /// [`BackendError::Manifest`] with the key that is wrong.
    pub fn parse(path: &Path, text: &str, folder_name: &str) -> Result<Self, BackendError> {
        let refuse = |reason: String| BackendError::Manifest { path: path.to_owned(), reason };
        let manifest: Self = toml::from_str(text).map_err(|e| refuse(e.to_string().trim_end().to_owned()))?;
        if manifest.manifest_version != 1 {
            return Err(refuse(format!("manifest_version is {}, only 1 is known", manifest.manifest_version)));
        }
        if manifest.id != folder_name {
            return Err(refuse(format!("id is '{}', but the folder is '{folder_name}'", manifest.id)));
        }
        if manifest.libraries.is_empty() || manifest.libraries.len() > 16 {
            return Err(refuse(format!("{} [[library]] entries, 1 to 16 are allowed", manifest.libraries.len())));
        }
        let is_device = |path: &String| path.starts_with("/dev/") && !path.contains("..") && !path.ends_with("/*");
        if manifest.devices.len() > DEVICES_MAX || !manifest.devices.iter().all(is_device) {
            let shape = "at most 32 of the form /dev/name or /dev/prefix*";
            return Err(refuse(format!("devices {:?}: {shape}", manifest.devices)));
        }
        for library in &manifest.libraries {
            let plain = !library.path.is_empty() && !library.path.contains('/') && !library.path.starts_with('.');
            if !plain {
                return Err(refuse(format!("library.path '{}' is not the name of a file beside it", library.path)));
            }
            if library.sha256.len() != 64 || !library.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(refuse(format!("library.sha256 '{}' is not 64 lower-case hex digits", library.sha256)));
            }
        }
        Ok(manifest)
    }

    /// The library to load on this machine: the one with the highest score.
    ///
    /// # Errors
    /// [`BackendError::AbiVersion`] or [`BackendError::Manifest`] when none fits.
    pub(crate) fn choose(&self, path: &Path) -> Result<&LibrarySection, BackendError> {
        if !self.abi.major.contains(&sparsed_abi::ABI_MAJOR) {
            let found = format!("major {:?} by its plugin.toml", self.abi.major);
            return Err(BackendError::AbiVersion { path: path.to_owned(), found });
        }
        if self.abi.arch != std::env::consts::ARCH {
            let reason = format!("abi.arch is {}, this machine is {}", self.abi.arch, std::env::consts::ARCH);
            return Err(BackendError::Manifest { path: path.to_owned(), reason });
        }
        let best = self.libraries.iter().max_by_key(|library| library.score);
        Ok(best.expect("parse refuses a manifest without a library"))
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

    fn refusal(text: &str) -> String {
        Manifest::parse(Path::new("plugin.toml"), text, "cpu").expect_err("must be refused").to_string()
    }

    #[test]
    fn a_good_manifest_is_read() {
        let manifest = Manifest::parse(Path::new("plugin.toml"), GOOD, "cpu").expect("good");
        assert_eq!(manifest.libraries[0].path, "lib.so");
    }

    #[test]
    fn refusals_name_the_key() {
        assert!(
            refusal(&GOOD.replace("manifest_version = 1", "manifest_version = 2")).contains("manifest_version is 2")
        );
        assert!(refusal(&GOOD.replace("\"cpu\"", "\"gpu\"")).contains("id is 'gpu'"));
        assert!(refusal(&GOOD.replace("lib.so", "../lib.so")).contains("library.path"));
        assert!(refusal(&GOOD.replace("cdef\"", "CDEF\"")).contains("library.sha256"));
        assert!(refusal(&GOOD.replace("license", "licence")).contains("licence"));
        for devices in ["/etc/passwd", "/dev/../etc", "/dev/*"] {
            let with = format!("devices = [\"/dev/null\", \"{devices}\"]\n{GOOD}");
            assert!(refusal(&with).contains(devices), "{devices}");
        }
    }

    #[test]
    fn another_abi_major_is_refused() {
        let manifest = Manifest::parse(Path::new("p"), &GOOD.replace("[0]", "[7]"), "cpu").expect("well-formed");
        let error = manifest.choose(Path::new("p")).expect_err("major 7 is not ours").to_string();
        assert!(error.contains('7'), "{error}");
    }
}
