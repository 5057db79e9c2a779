//! `sparsectl generate`: what does a package ship that is made of the command lines? Manual pages and completions.

use super::Arguments;
use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use sparsed_backend::{ABI_MAJOR, ABI_MINOR};
use std::fs;
use std::path::{Path, PathBuf};

/// What the command lines do not say of the daemon: files, signals, exit codes.
const DAEMON_SECTIONS: &str = include_str!("../../../../packaging/man/sparsed.8.in");
const TOOL_SECTIONS: &str = include_str!("../../../../packaging/man/sparsectl.1.in");

/// Write manual pages, shell completions and what pkg-config reads into a folder, for packages.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Generate {
    /// Gets man/, completions/ and pkgconfig/.
    folder: PathBuf,
}

impl Generate {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let [man, completions, devel] = ["man", "completions", "pkgconfig"].map(|name| self.folder.join(name));
        for dir in [&man, &completions, &devel] {
            fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        let daemon = crate::lifecycle::command_line();
        page(&man, "sparsed", "8", &daemon, DAEMON_SECTIONS)?;
        // Pages name those of the verbs below them, and `help` has none.
        let mut tool = Arguments::command().disable_help_subcommand(true);
        tool.build();
        page(&man, "sparsectl", "1", &tool, TOOL_SECTIONS)?;
        pages_below(&man, "sparsectl", &tool)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut Arguments::command(), "sparsectl", &completions)?;
        }
        let path = devel.join("sparsed-plugin.pc");
        fs::write(&path, pkg_config()).with_context(|| path.display().to_string())
    }
}

/// What pkg-config says of the plugin interface. A plugin links nothing of the daemon's.
fn pkg_config() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "prefix=/usr\nincludedir=${{prefix}}/include\nabi_version={ABI_MAJOR}.{ABI_MINOR}\n\n\
         Name: sparsed-plugin\nDescription: C interface between sparsed and its hardware backends\n\
         Version: {version}\nCflags: -I${{includedir}}\n"
    )
}

/// Writes the manual pages of all verbs that are shown below a command, whose page is called `above`.
fn pages_below(dir: &Path, above: &str, command: &Command) -> anyhow::Result<()> {
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let name = format!("{above}-{}", verb.get_name());
        page(dir, &name, "1", verb, "")?;
        pages_below(dir, &name, verb)?;
    }
    Ok(())
}

/// Writes the manual page `name` of a command; `sections` say what its command line does not.
fn page(dir: &Path, name: &str, section: &str, command: &Command, sections: &str) -> anyhow::Result<()> {
    let path = dir.join(format!("{name}.{section}"));
    // No date: the same release is the same bytes.
    let man = Man::new(command.clone()).title(name).section(section).source("sparsed").manual("sparsed");
    let mut text = Vec::new();
    if sections.is_empty() {
        man.render(&mut text)?;
    } else {
        // They describe it.
        man.render_title(&mut text)?;
        man.render_name_section(&mut text)?;
        man.render_synopsis_section(&mut text)?;
        text.extend_from_slice(sections.as_bytes());
        man.render_options_section(&mut text)?;
        if command.get_subcommands().any(|verb| !verb.is_hide_set()) {
            man.render_subcommands_section(&mut text)?;
        }
    }
    fs::write(&path, text).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_that_is_shown_has_a_page_and_a_completion() {
        let dir = tempfile::tempdir().unwrap();
        Generate { folder: dir.path().to_owned() }.run().unwrap();
        let text = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(text("man/sparsed.8").contains("/etc/sparsed/conf.d"));
        assert!(text("man/sparsectl-doctor.1").contains("doctor"));
        assert!(!dir.path().join("man/sparsectl-generate.1").exists());
        assert!(text("man/sparsectl-model-pull.1").contains("sha256"));
        let shells = ["sparsectl.bash", "_sparsectl", "sparsectl.fish"];
        assert!(shells.iter().all(|name| text(&format!("completions/{name}")).contains("doctor")));
    }

    #[test]
    fn a_page_that_a_page_refers_to_is_there() {
        let dir = tempfile::tempdir().unwrap();
        Generate { folder: dir.path().to_owned() }.run().unwrap();
        let man = dir.path().join("man");
        let references = regex::Regex::new(r"(sparse[a-z-]+) ?\(([1-8])\)").unwrap();
        let mut n = 0;
        for page in man.read_dir().unwrap().map(|page| page.unwrap().path()) {
            // A hyphen is escaped.
            let text = fs::read_to_string(&page).unwrap().replace('\\', "");
            for named in references.captures_iter(&text) {
                n += 1;
                let path = man.join(format!("{}.{}", &named[1], &named[2]));
                assert!(path.exists(), "{} names {}", page.display(), path.display());
            }
        }
        assert!(n > 40, "{n} references");
    }
}
