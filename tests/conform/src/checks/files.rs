//! L0: what do the files say, before any code runs? Read by the daemon's own reader.

use crate::rule::{Check, Level, Rule};
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::ENTRY_SYMBOL;
use sparsed_backend::{ElfFacts, Found, inspect_library};

const ELF: &str = "VENDOR.md, packaging";

pub(crate) const RULES: &[Rule] = &[
    file_rule(
        "manifest.valid",
        "plugin.toml is read, names its folder, and nobody else may write to the files",
        "plugin.toml",
        &[],
        // The kit has found the plugin in the daemon's own way; what was wrong with it is said in place of this check.
        |_| Ok(()),
    ),
    file_rule("manifest.variant", "one library is for this machine, and can be read", "plugin.toml", &[], |found| {
        elf(found).map(drop)
    }),
    file_rule("elf.exports", "spd_get_api is the only exported symbol", ELF, &["manifest.variant"], exports),
    file_rule("elf.text_relocations", "code is position-independent", ELF, &["manifest.variant"], |found| {
        ensure!(!elf(found)?.has_text_relocations, "text relocations (TEXTREL); compile all of it with -fPIC");
        Ok(())
    }),
    file_rule(
        "elf.executable_memory",
        "neither stack nor data is executable",
        ELF,
        &["manifest.variant"],
        executable_memory,
    ),
    file_rule(
        "elf.run_path",
        "no run path leads to libraries that nobody has checked",
        ELF,
        &["manifest.variant"],
        |found| {
            let paths = elf(found)?.run_paths;
            ensure!(paths.is_empty(), "RPATH or RUNPATH {}", paths.join(":"));
            Ok(())
        },
    ),
    file_rule(
        "manifest.accepted",
        "the daemon would load the library: its sha256, its machine, what it is linked against",
        "plugin.toml",
        &["elf.exports", "elf.text_relocations", "elf.executable_memory", "elf.run_path"],
        |found| found.verify().map_err(|error| Wrong::Failed(error.to_string())),
    ),
];

const fn file_rule(
    id: &'static str,
    says: &'static str,
    place: &'static str,
    needs: &'static [&'static str],
    check: fn(&Found) -> Outcome,
) -> Rule {
    Rule { id, level: Level::L0, says, place, needs, check: Check::Files(check) }
}

/// What the library for this machine says about itself.
fn elf(found: &Found) -> Result<ElfFacts, Wrong> {
    let section = found.variant().map_err(|error| Wrong::Failed(error.to_string()))?;
    inspect_library(&found.dir.join(&section.path)).map_err(|error| Wrong::Failed(error.to_string()))
}

fn exports(found: &Found) -> Outcome {
    let exports = elf(found)?.exports;
    let entry = ENTRY_SYMBOL.to_string_lossy();
    ensure!(exports.iter().any(|name| *name == entry), "{entry} is not exported");
    let others: Vec<&str> = exports.iter().map(String::as_str).filter(|name| *name != entry).collect();
    ensure!(others.is_empty(), "exported besides it: {}; link with a version script", others.join(", "));
    Ok(())
}

fn executable_memory(found: &Found) -> Outcome {
    let facts = elf(found)?;
    ensure!(!facts.needs_executable_stack, "the stack is executable (GNU_STACK); link with -z noexecstack");
    ensure!(!facts.has_writable_code, "a segment is writable and executable");
    Ok(())
}
