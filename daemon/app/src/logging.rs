//! Where do log lines go? To the journal under systemd, to standard error otherwise.

use log::LevelFilter;
use std::str::FromStr;

/// The variable that sets the level: `error`, `warn`, `info`, `debug`, `trace` or `off`.
pub const LEVEL_VARIABLE: &str = "SPARSED_LOG";

/// Starts logging; `default` is the level when the variable says nothing.
pub fn start(default: LevelFilter) {
    let level =
        std::env::var(LEVEL_VARIABLE).ok().and_then(|text| LevelFilter::from_str(&text).ok()).unwrap_or(default);
    if systemd_journal_logger::connected_to_journal() {
        let journal = systemd_journal_logger::JournalLog::new();
        if journal.is_ok_and(|journal| journal.install().is_ok()) {
            log::set_max_level(level);
            return;
        }
    }
    // A logger that is installed already (a test's) stays.
    let _installed = env_logger::Builder::new().filter_level(level).format_timestamp_millis().try_init().is_ok();
}
