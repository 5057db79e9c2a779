//! Which models are in memory, and for how long? What an operator, a client and the memory say, made one answer.
//!
//! Knows no clock and no model: time is an argument.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// How long a model that could not be loaded is not tried again.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(5);
/// The longest time that a model can be told to stay; more is for ever.
const KEEP_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Where a model's file is. It may have to be looked at before it is used, which takes time.
pub trait ModelSource: std::fmt::Debug + Send + Sync {
    /// The file or folder, as it may be mapped now.
    ///
    /// # Errors
    /// Why it cannot be used, for the operator.
    fn locate(&self) -> Result<PathBuf, String>;
}

impl ModelSource for PathBuf {
    fn locate(&self) -> Result<PathBuf, String> {
        Ok(self.clone())
    }
}

/// When a model is loaded, and when it goes.
#[derive(Clone, Copy, Debug)]
pub struct Residence {
    /// Loaded at the start; otherwise when somebody asks for it.
    pub at_start: bool,
    /// How long it stays when nobody asks for it.
    pub keep_alive: KeepAlive,
    /// How long a request waits for it.
    pub patience: Duration,
}

impl Default for Residence {
    fn default() -> Self {
        Self { at_start: true, keep_alive: KeepAlive::FOREVER, patience: Duration::from_secs(300) }
    }
}

impl Residence {
    /// Whether it ever goes: what the operator has loaded at the start without an end stays.
    pub(crate) fn may_unload(&self) -> bool {
        !self.at_start || self.keep_alive != KeepAlive::FOREVER
    }
}

/// How long a model stays in memory that nobody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive(Option<Duration>);

impl KeepAlive {
    /// As long as there is memory.
    pub const FOREVER: Self = Self(None);

    /// This long.
    pub fn for_time(time: Duration) -> Self {
        Self(Some(time).filter(|time| *time <= KEEP_MAX))
    }

    /// So many seconds; a negative number is for ever, as Ollama has it. `None` for what is no number.
    pub fn seconds(seconds: f64) -> Option<Self> {
        match seconds {
            s if s.is_nan() => None,
            s if s < 0.0 => Some(Self::FOREVER),
            s => Some(Duration::try_from_secs_f64(s).map_or(Self::FOREVER, Self::for_time)),
        }
    }

    /// How long; `None` is for ever.
    pub fn time(self) -> Option<Duration> {
        self.0
    }
}

/// `5m`, `1h30m`, `300`, `-1`: Go's durations without fractions, or seconds.
impl FromStr for KeepAlive {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no time: seconds, or a number with ms, s, m or h; negative for ever");
        if let Ok(seconds) = text.parse::<f64>() {
            return Self::seconds(seconds).ok_or_else(wrong);
        }
        let (sign, mut rest) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
        let mut total = Duration::ZERO;
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let number: u32 = rest[..digits].parse().map_err(|_| wrong())?;
            let unit = &rest[digits..];
            let length = unit.bytes().take_while(u8::is_ascii_alphabetic).count();
            let one = match &unit[..length] {
                "ms" => Duration::from_millis(1),
                "s" => Duration::from_secs(1),
                "m" => Duration::from_secs(60),
                "h" => Duration::from_secs(3600),
                _ => return Err(wrong()),
            };
            total = one.checked_mul(number).and_then(|part| total.checked_add(part)).ok_or_else(wrong)?;
            rest = &unit[length..];
        }
        Ok(if sign < 0 { Self::FOREVER } else { Self::for_time(total) })
    }
}

/// Why a model has left the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nobody has asked for it for as long as it was to stay.
    Idle,
    /// Another one needed the room.
    Room,
    /// Memory is short.
    Pressure,
}

impl Left {
    /// All, in the order in which they are counted.
    pub const ALL: [Self; 3] = [Self::Idle, Self::Room, Self::Pressure];

    /// One word, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Room => "room",
            Self::Pressure => "pressure",
        }
    }
}

/// A loaded model that may leave, as it is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resident {
    /// Since when nobody has asked for it.
    pub(crate) idle_since: Duration,
    /// How long it is to stay then.
    pub(crate) keep: KeepAlive,
}

impl Resident {
    /// When its time is over.
    pub(crate) fn expires(&self) -> Option<Duration> {
        self.idle_since.checked_add(self.keep.time()?)
    }
}

/// Of those that may leave, the one that was used least recently; of two, the first.
pub(crate) fn least_recent(residents: impl Iterator<Item = (usize, Resident)>) -> Option<usize> {
    residents.min_by_key(|(_, resident)| resident.idle_since).map(|(index, _)| index)
}

/// What a model takes of the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Take {
    /// Bytes of weights, as far as they are known before it is loaded.
    pub(crate) weights_bytes: u64,
    /// Bytes of its KV pool.
    pub(crate) pool_bytes: u64,
}

/// Whether a model has room beside what is loaded: `left` bytes beside all weights, of which `pools_bytes` are laid out
/// for KV caches. Half of its own pool is enough: pools are bounded to what is left.
pub(crate) fn has_room(left: Option<u64>, pools_bytes: u64, take: Take) -> bool {
    let needed = pools_bytes.saturating_add(take.weights_bytes).saturating_add(take.pool_bytes / 2);
    left.is_none_or(|left| needed <= left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn times_are_read_as_ollamas_clients_write_them() {
        let read = |text: &str| text.parse::<KeepAlive>().map(KeepAlive::time);
        assert_eq!(read("5m"), Ok(Some(s(300))));
        assert_eq!(read("1h30m5s"), Ok(Some(s(5405))));
        assert_eq!(read("1500ms"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!((read("300"), read("0"), read("0s")), (Ok(Some(s(300))), Ok(Some(s(0))), Ok(Some(s(0)))));
        assert_eq!((read("-1"), read("-1m"), read("1e300")), (Ok(None), Ok(None), Ok(None)));
        for bad in ["", "-", "m", "5 m", "5x", "1.5h", "5m3", "99999999999h", "nan", "ü"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(KeepAlive::seconds(f64::NAN), None);
        assert_eq!(KeepAlive::seconds(0.5).unwrap().time(), Some(Duration::from_millis(500)));
    }

    #[test]
    fn what_the_operator_loads_without_an_end_stays() {
        assert!(!Residence::default().may_unload());
        assert!(Residence { at_start: false, ..Residence::default() }.may_unload());
        let keep_alive = KeepAlive::for_time(s(5));
        assert!(Residence { keep_alive, ..Residence::default() }.may_unload());
    }

    #[test]
    fn the_one_that_was_used_least_recently_goes_first_and_for_ever_is_not_for_room() {
        let resident = |idle, keep| Resident { idle_since: s(idle), keep };
        let all =
            [resident(5, KeepAlive::FOREVER), resident(3, KeepAlive::FOREVER), resident(9, KeepAlive::for_time(s(1)))];
        assert_eq!(least_recent(all.into_iter().enumerate()), Some(1));
        assert_eq!(least_recent(std::iter::empty()), None);
        assert_eq!(all.map(|one| one.expires()), [None, None, Some(s(10))]);
    }

    #[test]
    fn a_model_needs_its_weights_and_half_its_pool() {
        let take = Take { weights_bytes: 100, pool_bytes: 40 };
        assert!(has_room(Some(170), 50, take) && !has_room(Some(169), 50, take));
        assert!(has_room(None, u64::MAX, take) && !has_room(Some(u64::MAX - 1), u64::MAX, take));
    }
}
