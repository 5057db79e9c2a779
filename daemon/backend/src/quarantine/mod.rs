//! Which libraries have failed too often, and until when are they left alone?
//!
//! A failure of a plugin that the daemon had to recover from is a *strike*, counted by the sha256 of its library: a new
//! build begins without any. Strikes that come close together quarantine the library, for twice as long each time. Good
//! conduct for as long as the longest quarantine is forgotten history.
//!
//! Knows no clock and no file ([`QuarantineStore`] does): times are arguments, in milliseconds since 1970, since they
//! must outlive the machine's next start.

mod store;

pub use store::QuarantineStore;

use crate::BackendError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Most libraries that are remembered.
const RECORDS_MAX: usize = 64;
/// Most strikes that quarantine a library, and so most that are remembered of one.
pub const STRIKES_MAX: u32 = 16;
/// Longest plugin id in bytes, as in a manifest.
const ID_BYTES_MAX: usize = 64;
/// Longest reason in bytes; the rest is cut off.
const REASON_BYTES_MAX: usize = 200;
/// Shortest beginning of a sha256 that names a library.
const PREFIX_MIN: usize = 8;

/// When strikes become a quarantine, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuarantinePolicy {
    /// Strikes that quarantine a library, 1 to [`STRIKES_MAX`].
    pub strikes: u32,
    /// How long a strike counts, in milliseconds.
    pub window_ms: u64,
    /// The first quarantine in milliseconds; each further one is twice as long.
    pub first_ms: u64,
    /// The longest, in milliseconds.
    pub max_ms: u64,
}

impl Default for QuarantinePolicy {
    fn default() -> Self {
        Self { strikes: 3, window_ms: 600_000, first_ms: 3_600_000, max_ms: 86_400_000 }
    }
}

/// What came of a strike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The library may go on.
    Struck {
        /// Strikes that count now.
        strikes: u32,
        /// Strikes that quarantine it.
        limit: u32,
    },
    /// It may not.
    Quarantined(Quarantined),
}

/// A quarantine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// The plugin's id.
    pub plugin: String,
    /// The library, in lower-case hexadecimal.
    pub sha256: String,
    /// The last strike's reason.
    pub reason: String,
    /// How often it has been quarantined, this time included.
    pub times: u32,
    /// When it ends, in milliseconds since 1970.
    pub until_ms: u64,
}

/// All that is remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quarantine {
    /// By sha256.
    records: BTreeMap<String, Record>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    plugin: String,
    /// Times of strikes that may still count, oldest first.
    strikes_ms: Vec<u64>,
    /// Of the last strike.
    reason: String,
    /// How often it was quarantined.
    times: u32,
    /// The last quarantine; both 0 before the first.
    since_ms: u64,
    until_ms: u64,
}

impl Quarantine {
    /// Notes a failure of the library `sha256` of `plugin`. A library in quarantine stays there as it is.
    ///
    /// # Panics
    /// When `plugin` and `sha256` are not as a manifest has them.
    pub fn strike(
        &mut self,
        policy: &QuarantinePolicy,
        plugin: &str,
        sha256: &str,
        reason: &str,
        now_ms: u64,
    ) -> Outcome {
        assert!(plugin.len() <= ID_BYTES_MAX && is_sha256(sha256), "not from a manifest: '{plugin}' '{sha256}'");
        self.settle(policy, now_ms);
        if let Some(quarantined) = self.check(sha256, now_ms) {
            return Outcome::Quarantined(quarantined);
        }
        self.make_room(sha256);
        let record = self.records.entry(sha256.to_owned()).or_insert_with(|| Record::new(plugin));
        plugin.clone_into(&mut record.plugin);
        record.reason = shortened(reason);
        record.strikes_ms.push(now_ms);
        let (strikes, limit) = (record.strikes(), policy.strikes.clamp(1, STRIKES_MAX));
        if strikes < limit {
            return Outcome::Struck { strikes, limit };
        }
        let doubled = 1u64.checked_shl(record.times).map_or(u64::MAX, |factor| policy.first_ms.saturating_mul(factor));
        record.times = record.times.saturating_add(1);
        record.strikes_ms.clear();
        (record.since_ms, record.until_ms) = (now_ms, now_ms.saturating_add(doubled.min(policy.max_ms)));
        Outcome::Quarantined(record.quarantined(sha256))
    }

    /// The quarantine that the library is in at this time.
    pub fn check(&self, sha256: &str, now_ms: u64) -> Option<Quarantined> {
        let record = self.records.get(sha256)?;
        (now_ms < record.until_ms).then(|| record.quarantined(sha256))
    }

    /// Every library in quarantine at this time.
    pub fn quarantined(&self, now_ms: u64) -> Vec<Quarantined> {
        self.records.keys().filter_map(|sha256| self.check(sha256, now_ms)).collect()
    }

    /// Forgets all of the libraries that `name` means: a plugin's id, a sha256, or its first 8 digits or more. Answers
    /// with the libraries that were in quarantine or had strikes.
    pub fn clear(&mut self, name: &str) -> Vec<String> {
        let by_prefix = |sha256: &str| name.len() >= PREFIX_MIN && sha256.starts_with(name);
        let meant = |(sha256, record): &(&String, &Record)| record.plugin == name || by_prefix(sha256);
        let cleared: Vec<String> = self.records.iter().filter(meant).map(|(sha256, _)| sha256.clone()).collect();
        cleared.iter().for_each(|sha256| drop(self.records.remove(sha256)));
        cleared
    }

    /// Forgets what is over at this time, and takes a clock that was set back into account: what lies in the future is
    /// counted from now on.
    fn settle(&mut self, policy: &QuarantinePolicy, now_ms: u64) {
        for record in self.records.values_mut() {
            if record.since_ms > now_ms {
                let length_ms = record.until_ms.saturating_sub(record.since_ms);
                (record.since_ms, record.until_ms) = (now_ms, now_ms.saturating_add(length_ms));
            }
            record.strikes_ms.iter_mut().for_each(|at| *at = now_ms.min(*at));
            record.strikes_ms.retain(|at| now_ms - at < policy.window_ms);
        }
        let remembered_ms = |record: &Record| record.until_ms.saturating_add(policy.max_ms);
        self.records
            .retain(|_, record| !record.strikes_ms.is_empty() || (record.times > 0 && now_ms < remembered_ms(record)));
    }

    /// Forgets the library that has been quiet for longest when there is no room for another.
    fn make_room(&mut self, sha256: &str) {
        if self.records.len() < RECORDS_MAX || self.records.contains_key(sha256) {
            return;
        }
        let last_ms = |record: &Record| record.strikes_ms.last().copied().unwrap_or(0).max(record.until_ms);
        let quietest = self.records.iter().min_by_key(|(_, record)| last_ms(record)).map(|(sha256, _)| sha256.clone());
        self.records.remove(&quietest.expect("there are RECORDS_MAX of them"));
    }
}

impl Record {
    fn new(plugin: &str) -> Self {
        let plugin = plugin.to_owned();
        Self { plugin, strikes_ms: Vec::new(), reason: String::new(), times: 0, since_ms: 0, until_ms: 0 }
    }

    fn strikes(&self) -> u32 {
        u32::try_from(self.strikes_ms.len()).unwrap_or(u32::MAX)
    }

    fn quarantined(&self, sha256: &str) -> Quarantined {
        Quarantined {
            plugin: self.plugin.clone(),
            sha256: sha256.to_owned(),
            reason: self.reason.clone(),
            times: self.times,
            until_ms: self.until_ms,
        }
    }
}

impl Quarantined {
    /// The refusal to load the library at this time.
    pub fn refusal(self, now_ms: u64) -> BackendError {
        BackendError::Quarantined { left: Left(self.until_ms.saturating_sub(now_ms)), library: self }
    }
}

/// A time that is left, in milliseconds; for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left(pub u64);

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.div_ceil(1000);
        match seconds {
            0..120 => write!(f, "{seconds} s"),
            120..7200 => write!(f, "{} min", seconds.div_ceil(60)),
            _ => write!(f, "{} h", seconds.div_ceil(3600)),
        }
    }
}

/// 64 lower-case hexadecimal digits.
fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// At most [`REASON_BYTES_MAX`] bytes of text on one line.
fn shortened(reason: &str) -> String {
    let mut text: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.truncate(text.floor_char_boundary(REASON_BYTES_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: QuarantinePolicy = QuarantinePolicy { strikes: 3, window_ms: 100, first_ms: 1000, max_ms: 4000 };

    fn sha(n: usize) -> String {
        format!("{n:064x}")
    }

    /// Strikes the library 1 of `acme` at these times; the last outcome.
    fn strikes(quarantine: &mut Quarantine, times: &[u64]) -> Outcome {
        times.iter().map(|&now| quarantine.strike(&POLICY, "acme", &sha(1), "it hung", now)).last().unwrap()
    }

    fn until(outcome: &Outcome) -> u64 {
        match outcome {
            Outcome::Quarantined(quarantined) => quarantined.until_ms,
            Outcome::Struck { strikes, .. } => panic!("only {strikes} strikes"),
        }
    }

    #[test]
    fn three_strikes_in_the_window_quarantine_a_library_until_it_is_over() {
        let mut quarantine = Quarantine::default();
        assert_eq!(strikes(&mut quarantine, &[10, 50]), Outcome::Struck { strikes: 2, limit: 3 });
        assert_eq!(quarantine.check(&sha(1), 50), None);
        assert_eq!(until(&strikes(&mut quarantine, &[109])), 1109);
        let quarantined = quarantine.check(&sha(1), 1108).unwrap();
        assert_eq!(
            (quarantined.plugin.as_str(), quarantined.reason.as_str(), quarantined.times),
            ("acme", "it hung", 1)
        );
        assert_eq!(quarantine.check(&sha(1), 1109), None);
        assert_eq!(quarantine.check(&sha(2), 1000), None);
    }

    #[test]
    fn strikes_that_are_far_apart_never_quarantine() {
        let mut quarantine = Quarantine::default();
        let times: Vec<u64> = (0..100).map(|n| n * 50).collect();
        assert_eq!(strikes(&mut quarantine, &times), Outcome::Struck { strikes: 2, limit: 3 });
    }

    #[test]
    fn each_quarantine_is_twice_as_long_up_to_the_longest() {
        let (mut quarantine, mut now, mut lengths) = (Quarantine::default(), 0, Vec::new());
        for _ in 0..5 {
            let end = until(&strikes(&mut quarantine, &[now, now, now]));
            lengths.push(end - now);
            now = end;
        }
        assert_eq!(lengths, [1000, 2000, 4000, 4000, 4000]);
        // Good conduct for as long as the longest is forgotten history.
        now += POLICY.max_ms;
        assert_eq!(until(&strikes(&mut quarantine, &[now, now, now])) - now, 1000);
    }

    #[test]
    fn a_strike_in_quarantine_does_not_prolong_it() {
        let mut quarantine = Quarantine::default();
        let end = until(&strikes(&mut quarantine, &[0, 0, 0]));
        assert_eq!(until(&strikes(&mut quarantine, &[500, 500, 500])), end);
        assert_eq!(strikes(&mut quarantine, &[end]), Outcome::Struck { strikes: 1, limit: 3 });
    }

    #[test]
    fn a_library_is_cleared_by_its_plugin_its_sha256_or_the_beginning_of_it() {
        for name in ["acme", &sha(1), &sha(1)[..8]] {
            let mut quarantine = Quarantine::default();
            strikes(&mut quarantine, &[0, 0, 0]);
            assert_eq!(quarantine.clear("acm"), Vec::<String>::new());
            assert_eq!(quarantine.clear(&sha(1)[..7]), Vec::<String>::new());
            assert_eq!(quarantine.clear(name), [sha(1)]);
            assert_eq!(quarantine, Quarantine::default());
        }
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_make_a_quarantine_longer() {
        let mut quarantine = Quarantine::default();
        let year_ms = 31_536_000_000;
        strikes(&mut quarantine, &[year_ms, year_ms, year_ms]);
        quarantine.strike(&POLICY, "other", &sha(2), "", year_ms);
        quarantine.settle(&POLICY, 7);
        assert_eq!(quarantine.check(&sha(1), 7).unwrap().until_ms, 1007);
        quarantine.settle(&POLICY, 107);
        assert!(!quarantine.records.contains_key(&sha(2)), "the strike counts from the clock's new time on");
    }

    #[test]
    fn no_time_or_policy_overflows() {
        let policy = QuarantinePolicy { strikes: 0, window_ms: u64::MAX, first_ms: u64::MAX, max_ms: u64::MAX };
        let mut quarantine = Quarantine::default();
        for now in [0, u64::MAX - 1, u64::MAX, 0] {
            for _ in 0..70 {
                quarantine.strike(&policy, "acme", &sha(1), "", now);
                if let Some(record) = quarantine.records.get_mut(&sha(1)) {
                    record.until_ms = 0;
                }
            }
        }
        assert!(quarantine.records[&sha(1)].times > 64);
    }

    #[test]
    fn the_quietest_library_is_forgotten_when_there_are_too_many() {
        let policy = QuarantinePolicy { window_ms: u64::MAX, ..POLICY };
        let mut quarantine = Quarantine::default();
        for n in 0..=RECORDS_MAX {
            quarantine.strike(&policy, "acme", &sha(n), "", n as u64 + 1);
        }
        assert_eq!(quarantine.records.len(), RECORDS_MAX);
        assert!(!quarantine.records.contains_key(&sha(0)) && quarantine.records.contains_key(&sha(1)));
    }

    #[test]
    fn a_reason_is_one_short_line() {
        let mut quarantine = Quarantine::default();
        let reason = format!("signal 11\n{}", "ä".repeat(300));
        quarantine.strike(&POLICY, "acme", &sha(1), &reason, 0);
        let kept = &quarantine.records[&sha(1)].reason;
        assert!(kept.starts_with("signal 11 ä") && (198..=200).contains(&kept.len()), "{kept}");
    }

    #[test]
    fn what_is_left_is_told_in_round_units() {
        let told = |ms| Left(ms).to_string();
        assert_eq!([told(1), told(119_000), told(3_600_000), told(86_400_000)], ["1 s", "119 s", "60 min", "24 h"]);
    }
}
