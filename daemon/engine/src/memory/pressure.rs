//! What is done when memory is short, in which order? A ladder of responses that is climbed while the pressure lasts
//! and left again slowly.
//!
//! Each rung is climbed after the one before has had time to help: a window of the kernel's pressure events. Critical
//! pressure, which comes shortly before somebody is killed, begins high. Coming down takes several times as long, so
//! that two states do not take turns. Nothing on the ladder ends an answer that has begun.

use std::time::Duration;

/// Time that a rung has to help: a window of pressure events.
const CLIMB_AFTER: Duration = Duration::from_secs(2);
/// Time without pressure before a rung is left.
const DESCEND_AFTER: Duration = Duration::from_secs(10);

/// How short memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// It is not.
    #[default]
    None,
    /// Somebody has waited for memory, or less is left than is to be.
    Some,
    /// Everybody has waited for memory, or next to none is left.
    Critical,
}

/// What a look at the memory has given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// Counts the looks.
    pub number: u64,
    /// How short it is.
    pub pressure: Pressure,
    /// Bytes that the process may take beside what it has; negative: bytes that it is to give back.
    pub headroom_bytes: i64,
}

/// What is done, each with all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing.
    #[default]
    Calm,
    /// The prefix cache does not grow any more.
    KeepNoMore,
    /// Cached blocks that nobody holds go.
    DropCache,
    /// Latent planes of running sequences move to the slow tier, whose cache of rows becomes as small as it can be.
    Demote,
    /// Blocks that only wait to be saved go, and sequences beyond the budget or with a listener that does not read
    /// give theirs back and wait.
    Spill,
    /// Prompts are read in smaller pieces.
    SmallChunks,
    /// No new request begins beside another one.
    Hold,
    /// No new request is taken.
    Refuse,
}

impl Stage {
    const ALL: [Self; 8] = [
        Self::Calm,
        Self::KeepNoMore,
        Self::DropCache,
        Self::Demote,
        Self::Spill,
        Self::SmallChunks,
        Self::Hold,
        Self::Refuse,
    ];

    /// One word, for status pages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::KeepNoMore => "keep_no_more",
            Self::DropCache => "drop_cache",
            Self::Demote => "demote",
            Self::Spill => "spill",
            Self::SmallChunks => "small_chunks",
            Self::Hold => "hold",
            Self::Refuse => "refuse",
        }
    }

    /// Its place on the ladder, from 0.
    pub fn number(self) -> u8 {
        self as u8
    }

    fn by(self, steps: i8) -> Self {
        let at = usize::from(self.number()).saturating_add_signed(steps.into());
        Self::ALL[at.min(Self::ALL.len() - 1)]
    }
}

impl Pressure {
    /// One word, for status pages.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Some => "some",
            Self::Critical => "critical",
        }
    }

    /// The rungs that it leads to: at once, and in the end.
    fn rungs(self) -> (Stage, Stage) {
        match self {
            Self::None => (Stage::Calm, Stage::Calm),
            Self::Some => (Stage::KeepNoMore, Stage::Hold),
            Self::Critical => (Stage::Spill, Stage::Refuse),
        }
    }
}

/// A change of the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: Stage,
    pub(crate) to: Stage,
}

/// Where on the ladder a scheduler is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ladder {
    stage: Stage,
    /// When the last rung was climbed or left, or there was pressure the last time.
    since: Duration,
}

impl Ladder {
    pub(crate) fn stage(self) -> Stage {
        self.stage
    }

    /// Looks at the pressure as of `now`. Looks may be far apart: what was due between them is done at once.
    pub(crate) fn look(&mut self, pressure: Pressure, now: Duration) -> Option<Move> {
        let from = self.stage;
        let (least, most) = pressure.rungs();
        if self.stage < least {
            (self.stage, self.since) = (least, now);
        } else if self.stage < most && now.saturating_sub(self.since) >= CLIMB_AFTER {
            (self.stage, self.since) = (self.stage.by(1), now);
        }
        // What a worse pressure has led to is left when that is over, down to where this one leads.
        while self.stage > most && now.saturating_sub(self.since) >= DESCEND_AFTER {
            self.stage = self.stage.by(-1);
            self.since += DESCEND_AFTER;
        }
        if self.stage == most {
            // The time without this pressure begins when it ends.
            self.since = now;
        }
        (self.stage != from).then_some(Move { from, to: self.stage })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn pressure_that_lasts_climbs_rung_by_rung_and_some_pressure_refuses_nobody() {
        let mut ladder = Ladder::default();
        let stages: Vec<Stage> = (0..9)
            .map(|i| {
                ladder.look(Pressure::Some, s(2 * i));
                ladder.stage()
            })
            .collect();
        assert_eq!(stages[..6], Stage::ALL[1..7]);
        assert!(stages[6..].iter().all(|&stage| stage == Stage::Hold));
    }

    #[test]
    fn a_rung_has_time_to_help_before_the_next_is_climbed() {
        let mut ladder = Ladder::default();
        for i in 0..20 {
            ladder.look(Pressure::Some, Duration::from_millis(100 * i));
        }
        assert_eq!(ladder.stage(), Stage::KeepNoMore);
    }

    #[test]
    fn critical_pressure_begins_high_and_ends_with_a_refusal() {
        let mut ladder = Ladder::default();
        let first = ladder.look(Pressure::Critical, s(5));
        assert_eq!(first, Some(Move { from: Stage::Calm, to: Stage::Spill }));
        for i in 3..9 {
            ladder.look(Pressure::Critical, s(2 * i));
        }
        assert_eq!(ladder.stage(), Stage::Refuse);
    }

    #[test]
    fn pressure_that_is_not_critical_any_more_refuses_nobody_in_the_end() {
        let mut ladder = Ladder::default();
        for i in 0..9 {
            ladder.look(Pressure::Critical, s(2 * i));
        }
        assert_eq!((ladder.stage(), ladder.look(Pressure::Some, s(25))), (Stage::Refuse, None));
        assert_eq!(ladder.look(Pressure::Some, s(26)), Some(Move { from: Stage::Refuse, to: Stage::Hold }));
        assert_eq!(ladder.look(Pressure::Some, s(1000)), None, "no further while it lasts");
        assert_eq!(ladder.look(Pressure::None, s(1009)), None);
        assert_eq!(ladder.look(Pressure::None, s(1010)), Some(Move { from: Stage::Hold, to: Stage::SmallChunks }));
    }

    #[test]
    fn coming_down_takes_longer_than_climbing_and_needs_no_looks_between() {
        let mut ladder = Ladder::default();
        ladder.look(Pressure::Critical, s(0));
        assert_eq!(ladder.look(Pressure::None, s(9)), None);
        assert_eq!(ladder.look(Pressure::None, s(10)), Some(Move { from: Stage::Spill, to: Stage::Demote }));
        assert_eq!(ladder.look(Pressure::None, s(1000)), Some(Move { from: Stage::Demote, to: Stage::Calm }));
    }

    #[test]
    fn pressure_that_comes_and_goes_within_the_hold_time_does_not_swing() {
        let mut ladder = Ladder::default();
        let mut moves = 0;
        for second in 0..120 {
            let pressure = if second % 6 < 3 { Pressure::Some } else { Pressure::None };
            moves += usize::from(ladder.look(pressure, s(second)).is_some());
        }
        assert!(moves <= 6 && ladder.stage() == Stage::Hold, "{moves} moves, {:?}", ladder.stage());
    }
}
