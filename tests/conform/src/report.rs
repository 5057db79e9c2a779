//! How is the outcome of a run written down? As TAP for people and harnesses, as JSON for a manifest.

use crate::rule::Rule;
use crate::verdict::Verdict;
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// What a device says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its stable id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: String,
    /// `SPD_FEAT_*`
    pub features: u64,
}

/// One rule and what came of it.
#[derive(Clone, Debug)]
pub struct Line {
    /// The rule.
    pub rule: &'static Rule,
    /// What came of it.
    pub verdict: Verdict,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The plugin's id, or the folder's name where the manifest cannot be read.
    pub plugin: String,
    /// The plugin's version.
    pub version: Option<String>,
    /// Of the library that was tried, as the manifest has it.
    pub sha256: Option<String>,
    /// The device that was tried.
    pub device: Option<Device>,
    /// Random numbers of the run came from this.
    pub seed: u64,
    /// In the order of the rules.
    pub lines: Vec<Line>,
}

impl Report {
    /// True when no rule was broken.
    pub fn passed(&self) -> bool {
        self.lines.iter().all(|line| !matches!(line.verdict, Verdict::Failed(_)))
    }

    /// The ids of the broken rules.
    pub fn failed(&self) -> Vec<&'static str> {
        let broken = self.lines.iter().filter(|line| matches!(line.verdict, Verdict::Failed(_)));
        broken.map(|line| line.rule.id).collect()
    }

    /// Line `number`, counted from 1, in TAP's form.
    pub fn tap_line(number: usize, line: &Line) -> String {
        let Rule { id, says, place, .. } = line.rule;
        match &line.verdict {
            Verdict::Ok => format!("ok {number} - {id}: {says}"),
            Verdict::Skipped(why) => format!("ok {number} - {id} # SKIP {}", one_line(why)),
            Verdict::Failed(why) => format!("not ok {number} - {id}: {} [{place}: {says}]", one_line(why)),
        }
    }

    /// The last line for people, a comment in TAP.
    pub fn summary(&self) -> String {
        let count = |wanted: fn(&Verdict) -> bool| self.lines.iter().filter(|line| wanted(&line.verdict)).count();
        let mut text = format!(
            "# {} {}: {} kept, {} broken, {} skipped; seed {}",
            self.plugin,
            self.version.as_deref().unwrap_or("-"),
            count(|verdict| *verdict == Verdict::Ok),
            count(|verdict| matches!(verdict, Verdict::Failed(_))),
            count(|verdict| matches!(verdict, Verdict::Skipped(_))),
            self.seed,
        );
        if let Some(device) = &self.device {
            write!(text, "; device {} ({}, {})", device.id, device.name, device.driver).expect("a string takes all");
        }
        text
    }

    /// The run as one JSON value.
    pub fn to_json(&self) -> serde_json::Value {
        let results = self.lines.iter().map(|line| {
            let mut result = serde_json::json!({ "rule": line.rule.id, "level": line.rule.level.to_string() });
            let verdict = serde_json::to_value(&line.verdict).unwrap_or_default();
            if let (Some(to), serde_json::Value::Object(from)) = (result.as_object_mut(), verdict) {
                to.extend(from);
            }
            result
        });
        serde_json::json!({
            "plugin": self.plugin,
            "version": self.version,
            "sha256": self.sha256,
            "abi": format!("{}.{}", sparsed_abi::ABI_MAJOR, sparsed_abi::ABI_MINOR),
            "device": self.device,
            "seed": self.seed,
            "passed": self.passed(),
            "results": results.collect::<Vec<_>>(),
        })
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
