//! What is demanded of a plugin? The list of rules, in the order in which a plugin is brought up.

use crate::checks;
use crate::child::Context;
use crate::verdict::Outcome;
use sparsed_backend::Found;
use std::fmt;
use std::str::FromStr;

/// How deep a run looks; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The files, before any code runs.
    L0,
    /// Layout, negotiation, objects and their errors.
    L1,
    /// Every operator against the oracle.
    L2,
    /// Properties that hold whatever the numbers are.
    L3,
    /// Garbage, repetition, concurrency.
    L4,
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let levels = [Self::L0, Self::L1, Self::L2, Self::L3, Self::L4];
        let named = levels.into_iter().find(|level| level.to_string().eq_ignore_ascii_case(text));
        named.ok_or_else(|| format!("'{text}' is not a level: L0, L1, L2, L3 or L4"))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One demand on a plugin.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Stable: reports and manifests refer to it.
    pub id: &'static str,
    /// Where it belongs.
    pub level: Level,
    /// The demand as a sentence, without the full stop.
    pub says: &'static str,
    /// Where the contract says so.
    pub place: &'static str,
    /// Rules that must hold for this one to mean anything.
    pub needs: &'static [&'static str],
    pub(crate) check: Check,
}

/// How a rule is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Check {
    /// By looking at the files; no code of the plugin runs.
    Files(fn(&Found) -> Outcome),
    /// In a child process that has loaded the library.
    Code(fn(&Context) -> Outcome),
}

/// A rule that is tried by running the plugin.
pub(crate) const fn rule(
    level: Level,
    id: &'static str,
    says: &'static str,
    place: &'static str,
    needs: &'static [&'static str],
    check: fn(&Context) -> Outcome,
) -> Rule {
    Rule { id, level, says, place, needs, check: Check::Code(check) }
}

/// Every rule, grouped by the files of `checks`.
pub const RULES: &[&[Rule]] = &[
    checks::files::RULES,
    checks::negotiation::RULES,
    checks::structs::RULES,
    checks::devices::RULES,
    checks::objects::RULES,
    checks::plans::RULES,
    checks::rowwise::RULES,
    checks::products::RULES,
    checks::pool_rows::RULES,
    checks::attention::RULES,
    checks::selection::RULES,
    checks::experts::RULES,
    checks::blocks::RULES,
    checks::long::RULES,
    checks::sequences::RULES,
    checks::queues::RULES,
    checks::slow::RULES,
    checks::features::RULES,
    checks::memory::RULES,
    checks::garbage::RULES,
    checks::repetition::RULES,
    checks::confined::RULES,
];

/// The rules one after another.
pub(crate) fn all() -> impl Iterator<Item = &'static Rule> {
    RULES.iter().flat_map(|group| group.iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_needs_only_rules_before_it_and_has_an_id_of_its_own() {
        let mut seen = Vec::new();
        for rule in all() {
            assert!(!seen.contains(&rule.id), "{} twice", rule.id);
            for need in rule.needs {
                assert!(seen.contains(need), "{} needs {need}, which is not before it", rule.id);
            }
            seen.push(rule.id);
        }
        assert!(seen.len() > 50);
    }

    #[test]
    fn a_level_is_read_in_either_case() {
        assert_eq!("l3".parse(), Ok(Level::L3));
        assert!("L5".parse::<Level>().is_err());
    }
}
