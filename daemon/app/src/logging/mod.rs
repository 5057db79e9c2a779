//! Where do log lines go? To the journal under systemd, to standard error otherwise.

mod events;
mod journal;

use journal::Journal;
use log::{LevelFilter, Metadata};
use std::io::Write;
use std::str::FromStr;

/// The variable that sets the level: `error`, `warn`, `info`, `debug`, `trace` or `off`.
pub const LEVEL_VARIABLE: &str = "SPARSED_LOG";

/// Starts logging to standard error for the daemon to read: `<priority>message`, as services write it.
pub fn start_for_daemon(level: LevelFilter) {
    let mut logger = env_logger::Builder::new();
    logger.filter_level(level).format(|to, record| {
        let priority = match record.level() {
            log::Level::Error => 3,
            log::Level::Warn => 4,
            log::Level::Info => 6,
            log::Level::Debug | log::Level::Trace => 7,
        };
        writeln!(to, "<{priority}>{}", record.args())
    });
    // A logger that is installed already (a test's) stays.
    let _installed = logger.try_init().is_ok();
}

/// What the target of every line of ours begins with; lines of others may show what clients say.
const OURS: &str = "sparsed";

/// Starts logging; `default` is the level when the variable says nothing.
pub fn start(default: LevelFilter) {
    if systemd_journal_logger::connected_to_journal() {
        let journal = systemd_journal_logger::JournalLog::new();
        if journal.is_ok_and(|journal| log::set_boxed_logger(Box::new(Journal(journal))).is_ok()) {
            set_level(default);
            return;
        }
    }
    let mut logger = env_logger::Builder::new();
    logger.filter_level(LevelFilter::Info).filter_module(OURS, LevelFilter::Trace).format_timestamp_millis();
    // A logger that is installed already (a test's) stays.
    if logger.try_init().is_ok() {
        set_level(default);
    }
}

/// Whether a line is for the operator: of other crates only what is at least an information.
fn is_wanted(metadata: &Metadata<'_>) -> bool {
    metadata.level() <= log::Level::Info || metadata.target().starts_with(OURS)
}

/// Logs what is as important as `level`, or as the variable wants it.
pub fn set_level(level: LevelFilter) {
    let wanted = std::env::var(LEVEL_VARIABLE).ok().and_then(|text| LevelFilter::from_str(&text).ok());
    log::set_max_level(wanted.unwrap_or(level));
}
