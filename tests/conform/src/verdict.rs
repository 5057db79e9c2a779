//! What came of trying a rule?

use crate::rig::Fault;
use serde::{Deserialize, Serialize};

/// What is said about one rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "verdict", content = "why")]
pub enum Verdict {
    /// The plugin keeps it.
    Ok,
    /// The plugin breaks it: what is wrong, and where.
    Failed(String),
    /// It says nothing about this plugin: why.
    Skipped(String),
}

/// How a check ends.
pub(crate) type Outcome = Result<(), Wrong>;

/// Why a check did not end well.
#[derive(Clone, Debug)]
pub(crate) enum Wrong {
    Failed(String),
    Skipped(String),
}

impl From<Fault> for Wrong {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault.to_string())
    }
}

impl From<Outcome> for Verdict {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(()) => Self::Ok,
            Err(Wrong::Failed(why)) => Self::Failed(why),
            Err(Wrong::Skipped(why)) => Self::Skipped(why),
        }
    }
}

/// Ends the check as failed, with a formatted sentence, unless the condition holds.
macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        // Not negated: a comparison with a NaN does not hold.
        if $holds {
        } else {
            return Err($crate::verdict::Wrong::Failed(format!($($why)+)));
        }
    };
}
pub(crate) use ensure;

/// The check does not apply, because of `why`.
pub(crate) fn skip<T>(why: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong::Skipped(why.into()))
}
