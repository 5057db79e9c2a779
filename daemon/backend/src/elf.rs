//! Is this library built as a plugin must be? Read from the file, before the dynamic linker sees it.
//!
//! Headers and dynamic section are read with the crate `object`. What the section table says of the dynamic symbols is
//! taken only where the dynamic section says the same, since the linker goes by that one.

use crate::BackendError;
use crate::isa::Arch;
use object::elf::{
    DF_1_NODELETE, DF_1_NOW, DF_BIND_NOW, DF_TEXTREL, DT_BIND_NOW, DT_FLAGS, DT_FLAGS_1, DT_INIT_ARRAYSZ, DT_NEEDED,
    DT_RPATH, DT_RUNPATH, DT_STRTAB, DT_SYMTAB, DT_TEXTREL, EM_AARCH64, EM_X86_64, ET_DYN, PF_W, PF_X, PT_GNU_RELRO,
    PT_GNU_STACK, PT_LOAD, SHN_UNDEF, STB_LOCAL, STV_HIDDEN, STV_INTERNAL,
};
use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader, SectionHeader, Sym};
use object::{LittleEndian, Object};
use std::path::Path;

/// The one symbol that a plugin exports.
const ENTRY: &str = "spd_get_api";

/// Libraries of the C and C++ runtime, which every plugin may be linked against.
const RUNTIME: &[&str] = &[
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
];

/// What a 64-bit little-endian ELF file says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfFacts {
    /// `x86_64`, `aarch64`, or the number that ELF has for another machine.
    pub machine: String,
    /// A shared object, not a program or an object file.
    pub is_shared: bool,
    /// Names that others can link against, sorted.
    pub exports: Vec<String>,
    /// Libraries that it is linked against.
    pub needed: Vec<String>,
    /// Where it wants those to be looked for (`DT_RPATH`, `DT_RUNPATH`).
    pub run_paths: Vec<String>,
    /// The linker would have to write into its code.
    pub has_text_relocations: bool,
    /// It asks for executable stacks, or does not say that it needs none.
    pub needs_executable_stack: bool,
    /// A segment is writable and executable at once.
    pub has_writable_code: bool,
    /// All functions are resolved when it is loaded (`-z now`).
    pub binds_now: bool,
    /// What is resolved becomes read-only (`-z relro`).
    pub has_relro: bool,
    /// It cannot be unloaded (`-z nodelete`).
    pub is_never_unloaded: bool,
    /// Functions that run when it is loaded; compilers add one of their own.
    pub initialiser_count: u64,
    /// The linker's build id in hexadecimal.
    pub build_id: Option<String>,
    /// Bytes from the start of the file that segments and their table reach; what follows is for debuggers.
    pub(crate) mapped_bytes: u64,
}

/// The entries of the dynamic section that are looked at.
#[derive(Default)]
struct Dynamic {
    needed: Vec<u32>,
    run_paths: Vec<u32>,
    symbols: Option<u64>,
    strings: Option<u64>,
    text_relocations: bool,
    binds_now: bool,
    never_unloaded: bool,
    initialisers: u64,
}

type File<'a> = ElfFile64<'a, LittleEndian>;
const LE: LittleEndian = LittleEndian;

impl ElfFacts {
    /// Reads the facts from a whole file.
    ///
    /// # Errors
    /// What makes the file unreadable.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        match bytes.get(..6) {
            Some([0x7f, b'E', b'L', b'F', 2, 1]) => {}
            Some([0x7f, b'E', b'L', b'F', ..]) => return Err("is not a 64-bit little-endian ELF file".to_owned()),
            _ => return Err("is not an ELF file".to_owned()),
        }
        let file = File::parse(bytes).map_err(|error| format!("is a damaged ELF file: {error}"))?;
        let header = file.elf_header();
        let mut facts = Self {
            machine: match header.e_machine(LE) {
                EM_X86_64 => Arch::X86_64.name().to_owned(),
                EM_AARCH64 => Arch::Aarch64.name().to_owned(),
                other => other.to_string(),
            },
            is_shared: header.e_type(LE) == ET_DYN,
            build_id: file.build_id().ok().flatten().map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect()),
            ..Self::default()
        };
        facts.read_segments(&file, bytes.len() as u64)?;
        if facts.is_shared {
            facts.read_dynamic(&file, &Dynamic::read(&file)?)?;
        }
        Ok(facts)
    }

    fn read_segments(&mut self, file: &File<'_>, file_bytes: u64) -> Result<(), String> {
        let header = file.elf_header();
        let table = u64::from(header.e_phentsize(LE)).checked_mul(file.elf_program_headers().len() as u64);
        let mut end = table.and_then(|bytes| header.e_phoff(LE).checked_add(bytes));
        let mut stack = None;
        for segment in file.elf_program_headers() {
            let flags = segment.p_flags(LE);
            match segment.p_type(LE) {
                PT_LOAD => self.has_writable_code |= flags & PF_W != 0 && flags & PF_X != 0,
                PT_GNU_STACK => stack = Some(flags),
                PT_GNU_RELRO => self.has_relro = true,
                _ => {}
            }
            let last = segment.p_offset(LE).checked_add(segment.p_filesz(LE));
            end = end.and_then(|end| last.map(|last| end.max(last)));
        }
        // Without the header, the linker makes stacks executable.
        self.needs_executable_stack = stack.is_none_or(|flags| flags & PF_X != 0);
        let inside = end.filter(|end| *end <= file_bytes);
        self.mapped_bytes = inside.ok_or("is cut off: its segments reach beyond the end of the file")?;
        Ok(())
    }

    fn read_dynamic(&mut self, file: &File<'_>, dynamic: &Dynamic) -> Result<(), String> {
        let symbols = file.elf_dynamic_symbol_table();
        let address = |index| Some(file.elf_section_table().section(index).ok()?.sh_addr(LE));
        let (found, strings_found) = (address(symbols.section()), address(symbols.string_section()));
        if dynamic.symbols.is_none() || dynamic.symbols != found || dynamic.strings != strings_found {
            return Err("has no section table that fits its dynamic section; do not strip section headers".to_owned());
        }
        let strings = symbols.strings();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let string = |at: &u32| strings.get(*at).map(text).map_err(|()| "names a string that is not there".to_owned());
        self.needed = dynamic.needed.iter().map(string).collect::<Result<_, _>>()?;
        self.run_paths = dynamic.run_paths.iter().map(string).collect::<Result<_, _>>()?;
        for symbol in symbols.iter() {
            let hidden = matches!(symbol.st_visibility(), STV_HIDDEN | STV_INTERNAL);
            if symbol.st_shndx(LE) != SHN_UNDEF && symbol.st_bind() != STB_LOCAL && !hidden {
                self.exports.push(string(&symbol.st_name(LE))?);
            }
        }
        self.exports.sort();
        self.exports.dedup();
        self.has_text_relocations = dynamic.text_relocations;
        self.binds_now = dynamic.binds_now;
        self.is_never_unloaded = dynamic.never_unloaded;
        self.initialiser_count = dynamic.initialisers;
        Ok(())
    }

    /// Holds the facts to the rules for a plugin on this machine that may be linked against `needs` besides the
    /// runtime.
    ///
    /// # Errors
    /// [`BackendError::MissingSymbol`], or [`BackendError::Elf`] with the first rule that is broken.
    pub fn check(&self, path: &Path, needs: &[String]) -> Result<(), BackendError> {
        if self.is_shared && !self.exports.iter().any(|name| name == ENTRY) {
            return Err(BackendError::MissingSymbol { path: path.to_owned() });
        }
        let wrong = self.wrong(needs);
        wrong.map_or(Ok(()), |reason| Err(BackendError::Elf { path: path.to_owned(), reason }))
    }

    fn wrong(&self, needs: &[String]) -> Option<String> {
        let allowed = |name: &&String| RUNTIME.contains(&name.as_str()) || needs.contains(name);
        if self.machine != std::env::consts::ARCH {
            return Some(format!("is built for machine {}, this is {}", self.machine, std::env::consts::ARCH));
        }
        if !self.is_shared {
            return Some("is not a shared library (ET_DYN)".to_owned());
        }
        if let Some(other) = self.exports.iter().find(|name| *name != ENTRY) {
            let others = self.exports.len() - 1;
            let hint = "link with a version script or -fvisibility=hidden";
            return Some(format!("exports {others} symbol(s) besides {ENTRY}, such as {other}; {hint}"));
        }
        if self.has_text_relocations {
            return Some("has text relocations (TEXTREL); compile all of it with -fPIC".to_owned());
        }
        if self.needs_executable_stack {
            return Some("asks for an executable stack (GNU_STACK); link with -z noexecstack".to_owned());
        }
        if self.has_writable_code {
            return Some("has a segment that is writable and executable".to_owned());
        }
        if let Some(path) = self.run_paths.first() {
            return Some(format!("looks for libraries in {path} (RPATH or RUNPATH), which nobody has checked"));
        }
        let name = self.needed.iter().find(|name| !allowed(name))?;
        Some(format!("is linked against {name}, which library.needs in its plugin.toml does not name"))
    }
}

impl Dynamic {
    /// The dynamic section as the linker finds it, through the program headers.
    fn read(file: &File<'_>) -> Result<Self, String> {
        let damaged = |error: object::Error| format!("has a damaged dynamic section: {error}");
        let mut dynamic = Self::default();
        for segment in file.elf_program_headers() {
            let Some(entries) = segment.dynamic(LE, file.data()).map_err(damaged)? else { continue };
            for entry in entries {
                dynamic.take(entry.tag(LE), entry.val(LE));
            }
        }
        Ok(dynamic)
    }

    fn take(&mut self, tag: i64, value: u64) {
        // An offset beyond 32 bits is in no string table: it stays one that is not found.
        let offset = u32::try_from(value).unwrap_or(u32::MAX);
        let has = |flag: u32| value & u64::from(flag) != 0;
        match tag {
            DT_NEEDED => self.needed.push(offset),
            DT_RPATH | DT_RUNPATH => self.run_paths.push(offset),
            DT_SYMTAB => self.symbols = Some(value),
            DT_STRTAB => self.strings = Some(value),
            DT_TEXTREL => self.text_relocations = true,
            DT_BIND_NOW => self.binds_now = true,
            DT_INIT_ARRAYSZ => self.initialisers = value / size_of::<u64>() as u64,
            DT_FLAGS => {
                self.text_relocations |= has(DF_TEXTREL);
                self.binds_now |= has(DF_BIND_NOW);
            }
            DT_FLAGS_1 => {
                self.binds_now |= has(DF_1_NOW);
                self.never_unloaded |= has(DF_1_NODELETE);
            }
            _ => {}
        }
    }
}
