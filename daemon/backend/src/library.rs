//! Which bytes will run? Those that were hashed and looked at, in memory that nobody can write.
//!
//! The file is read once, through one descriptor. Its bytes are hashed, their ELF headers checked, and the same bytes
//! are given to the linker in a sealed memfd: what happens to the file afterwards changes nothing, be it a swap between
//! check and load or a `cp` over a library that a running daemon has mapped.
//!
//! What this costs: the mapped part is a copy in memory that can be swapped but not dropped like page cache (bytes that
//! are for debuggers are left out); `$ORIGIN` means nothing, so a run path is refused; profilers and debuggers know the
//! library by its build id only (`perf buildid-cache --add`, `add-symbol-file`). Loading the checked descriptor itself
//! would keep names and save the copy, but then root, or for a library in a home the user, could still change the bytes
//! after the check. ARCHITECTURE.md has the times of both.

use crate::BackendError;
use crate::elf::ElfFacts;
use crate::folder::Folder;
use crate::manifest::LibrarySection;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Largest library in bytes.
const LIBRARY_BYTES_MAX: u64 = 1 << 30;

/// A library that is what its manifest says and is built as a plugin must be.
#[derive(Debug)]
pub(crate) struct Library {
    pub(crate) path: PathBuf,
    bytes: Vec<u8>,
    facts: ElfFacts,
}

/// What the ELF file at `path` says about itself, whoever it belongs to; [`ElfFacts::check`] holds it to the rules.
///
/// # Errors
/// [`BackendError::Io`], or [`BackendError::Elf`] when it is no readable 64-bit little-endian ELF file.
pub fn inspect_library(path: &Path) -> Result<ElfFacts, BackendError> {
    let file = File::open(path).map_err(|source| BackendError::Io { path: path.to_owned(), source })?;
    facts(path, &read(path, file)?)
}

impl Library {
    /// Reads the library that `section` names in a plugin's folder, and checks all that can be checked without running
    /// any of it.
    ///
    /// # Errors
    /// Owner and mode, checksum, or the rule for plugins that it breaks.
    pub(crate) fn open(folder: &Folder, section: &LibrarySection) -> Result<Self, BackendError> {
        let path = folder.path().join(&section.path);
        let bytes = read(&path, folder.file(section.path.as_ref())?)?;
        let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        if found != section.sha256 {
            return Err(BackendError::Checksum { path, expected: section.sha256.clone(), found });
        }
        let facts = facts(&path, &bytes)?;
        facts.check(&path, &section.needs)?;
        Ok(Self { path, bytes, facts })
    }

    /// The bytes that the linker maps, where nothing can change them.
    ///
    /// # Errors
    /// [`BackendError::Io`] when the memory cannot be had.
    pub(crate) fn seal(self) -> Result<OwnedFd, BackendError> {
        let io = |errno: Errno| BackendError::Io { path: self.path.clone(), source: errno.into() };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Mapped as code, but never a program: that is said where the kernel knows the flag (6.3), and must be said
        // where vm.memfd_noexec is 2.
        let fd = match rustix::fs::memfd_create(c"sparsed-plugin", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create(c"sparsed-plugin", flags),
            made => made,
        };
        let mut file = File::from(fd.map_err(io)?);
        // Checked when the facts were read: segments end inside the file.
        let mapped = usize::try_from(self.facts.mapped_bytes).map_or(self.bytes.len(), |n| n.min(self.bytes.len()));
        let written = file.write_all(&self.bytes[..mapped]);
        written.map_err(|source| BackendError::Io { path: self.path.clone(), source })?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(io)?;
        Ok(file.into())
    }
}

fn read(path: &Path, file: File) -> Result<Vec<u8>, BackendError> {
    let mut bytes = Vec::new();
    let read = file.take(LIBRARY_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|source| BackendError::Io { path: path.to_owned(), source })?;
    if bytes.len() as u64 > LIBRARY_BYTES_MAX {
        let reason = format!("is larger than {LIBRARY_BYTES_MAX} bytes");
        return Err(BackendError::Elf { path: path.to_owned(), reason });
    }
    Ok(bytes)
}

fn facts(path: &Path, bytes: &[u8]) -> Result<ElfFacts, BackendError> {
    ElfFacts::parse(bytes).map_err(|reason| BackendError::Elf { path: path.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    /// Offsets in the header of a 64-bit ELF file.
    const E_TYPE: usize = 16;
    const E_MACHINE: usize = 18;
    const E_PHOFF: usize = 32;
    const E_PHNUM: usize = 56;
    /// Size of an entry of the program header table.
    const SEGMENT_BYTES: usize = 56;

    /// Where the program headers of this type are, and their flags 4 bytes after.
    fn segments(bytes: &[u8], kind: u32) -> Vec<usize> {
        let table = usize::try_from(u64::from_le_bytes(bytes[E_PHOFF..E_PHOFF + 8].try_into().unwrap())).unwrap();
        let count = usize::from(u16::from_le_bytes([bytes[E_PHNUM], bytes[E_PHNUM + 1]]));
        let all = (0..count).map(|n| table + n * SEGMENT_BYTES);
        all.filter(|&at| bytes[at..at + 4] == kind.to_le_bytes()).collect()
    }

    fn built_with(arguments: &[&str]) -> String {
        Fixture::build(arguments).refusal()
    }

    fn patched(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let fixture = Fixture::build(&[]);
        fixture.patch(change);
        fixture.refusal()
    }

    #[test]
    fn a_plugin_that_keeps_the_rules_is_verified() {
        let fixture = Fixture::build(&[]);
        fixture.found().verify().unwrap();
        let facts = inspect_library(&fixture.file()).unwrap();
        assert_eq!(
            (facts.exports.as_slice(), facts.machine.as_str()),
            (&["spd_get_api".to_owned()][..], std::env::consts::ARCH)
        );
        assert!(facts.is_shared && facts.binds_now && facts.has_relro && facts.is_never_unloaded);
    }

    #[test]
    fn a_second_exported_symbol_is_refused_and_named() {
        let said = built_with(&["-DSECOND_SYMBOL"]);
        assert!(said.contains("exports 1 symbol(s) besides spd_get_api, such as a_second_symbol"), "{said}");
    }

    #[test]
    fn a_library_without_the_entry_is_refused() {
        assert!(built_with(&["-DNO_ENTRY"]).contains("does not export the symbol spd_get_api"));
    }

    #[test]
    fn an_executable_stack_is_refused() {
        assert!(built_with(&["-Wl,-z,execstack"]).contains("executable stack"));
        let no_word = patched(|bytes| segments(bytes, object::elf::PT_GNU_STACK).iter().for_each(|&at| bytes[at] = 0));
        assert!(no_word.contains("executable stack"), "{no_word}");
    }

    #[test]
    fn text_relocations_are_refused() {
        assert!(built_with(&["-DTEXTREL", "-Wl,-z,notext"]).contains("TEXTREL"));
    }

    #[test]
    fn code_that_is_writable_is_refused() {
        let said = patched(|bytes| {
            let code = |&at: &usize| u32::from(bytes[at + 4]) & object::elf::PF_X != 0;
            let at = segments(bytes, object::elf::PT_LOAD).into_iter().find(code).unwrap();
            bytes[at + 4] |= u8::try_from(object::elf::PF_W).unwrap();
        });
        assert!(said.contains("writable and executable"), "{said}");
    }

    #[test]
    fn another_kind_of_elf_file_is_refused() {
        assert!(patched(|bytes| bytes[E_MACHINE] = 243).contains("is built for machine 243, this is"));
        assert!(patched(|bytes| bytes[E_TYPE] = 1).contains("is not a shared library"));
        assert!(patched(|bytes| bytes[4] = 1).contains("not a 64-bit"));
        assert!(patched(|bytes| bytes[0] = 0).contains("is not an ELF file"));
        assert!(patched(|bytes| bytes.truncate(40)).contains("damaged ELF file"));
        assert!(patched(|bytes| bytes.clear()).contains("is not an ELF file"));
        let cut = patched(|bytes| {
            let end = segments_end(bytes);
            bytes[end..].fill(0xff);
        });
        assert!(cut.contains("damaged") || cut.contains("section table"), "{cut}");
    }

    #[test]
    fn a_run_path_is_refused() {
        assert!(built_with(&["-Wl,-rpath,$ORIGIN/lib"]).contains("looks for libraries in $ORIGIN/lib"));
    }

    #[test]
    fn a_library_that_is_linked_against_must_be_in_the_manifest() {
        let fixture = Fixture::empty("fixture");
        let other = tempfile::tempdir().unwrap();
        let made = std::process::Command::new("cc")
            .args(["-shared", "-nostdlib", "-Wl,-soname,libother.so.1", "-x", "c", "/dev/null", "-o"])
            .arg(other.path().join("libother.so"))
            .status();
        assert!(made.unwrap().success());
        let folder = format!("-L{}", other.path().display());
        fixture.compile(&["-Wl,--no-as-needed", &folder, "-lother", "-lm", "-ldl", "-lpthread"]);
        fixture.write_manifest("1.2.3", "");
        let said = fixture.refusal();
        assert!(said.contains("is linked against libother.so.1, which library.needs"), "{said}");
        fixture.write_manifest("1.2.3", "needs = [\"libother.so.1\"]");
        fixture.found().verify().unwrap();
        // Verified, but this machine does not have it: the linker's words, with the library's own path.
        let said = fixture.load().unwrap_err().to_string();
        assert!(said.starts_with(&fixture.file().display().to_string()) && said.contains("libother.so.1"), "{said}");
    }

    #[test]
    fn other_bytes_than_those_of_the_manifest_are_refused() {
        let fixture = Fixture::build(&[]);
        let mut bytes = std::fs::read(fixture.file()).unwrap();
        bytes.push(0);
        std::fs::write(fixture.file(), bytes).unwrap();
        assert!(fixture.refusal().contains("sha256"));
    }

    #[test]
    fn a_library_that_others_may_write_or_that_is_a_link_is_refused() {
        let fixture = Fixture::build(&[]);
        fixture.set_mode("lib.so", 0o775);
        assert!(fixture.refusal().contains("mode 775 lets others write"));
        fixture.set_mode("lib.so", 0o755);
        std::fs::rename(fixture.file(), fixture.dir().join("real.so")).unwrap();
        std::os::unix::fs::symlink("real.so", fixture.file()).unwrap();
        assert!(fixture.refusal().contains("lib.so: is a symbolic link"));
    }

    #[test]
    fn sealed_bytes_are_those_that_were_checked_and_cannot_be_written() {
        let fixture = Fixture::build(&[]);
        let before = std::fs::read(fixture.file()).unwrap();
        let found = fixture.found();
        let library = found.open_library(found.variant().unwrap()).unwrap();
        std::fs::write(fixture.file(), "swapped after the check").unwrap();
        let mut sealed = File::from(library.seal().unwrap());
        let mut bytes = Vec::new();
        std::io::Seek::rewind(&mut sealed).unwrap();
        sealed.read_to_end(&mut bytes).unwrap();
        assert!(!bytes.is_empty() && bytes == before[..bytes.len()]);
        assert!(sealed.write_all(b"x").is_err());
        assert!(sealed.set_len(0).is_err());
    }

    /// Bytes to the end of the last segment.
    fn segments_end(bytes: &[u8]) -> usize {
        usize::try_from(ElfFacts::parse(bytes).unwrap().mapped_bytes).unwrap()
    }

    #[test]
    fn no_damage_to_a_header_makes_the_parser_panic() {
        let fixture = Fixture::build(&[]);
        let whole = std::fs::read(fixture.file()).unwrap();
        let mut noise = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: usize| {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            usize::try_from(noise % below as u64).unwrap()
        };
        let mut refused = 0;
        for round in 0..4000 {
            let mut bytes = whole.clone();
            for _ in 0..=next(4) {
                // Half of the damage goes into the headers, where numbers rule the rest.
                let at = if round % 2 == 0 { next(64 + 12 * SEGMENT_BYTES) } else { next(bytes.len()) };
                bytes[at] = u8::try_from(next(256)).unwrap();
            }
            bytes.truncate(whole.len() - if round % 5 == 0 { next(whole.len()) } else { 0 });
            refused += usize::from(ElfFacts::parse(&bytes).is_err());
        }
        assert!((500..4000).contains(&refused), "{refused}");
    }
}
