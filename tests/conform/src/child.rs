//! How is one rule tried beside the plugin's code? This is the inside of the child process.
//!
//! The child says one line on standard output, [`MARK`] and JSON; whatever else comes there is the plugin's.

use crate::kit::find;
use crate::report::Device;
use crate::rig;
use crate::rule::{self, Check};
use crate::verdict::{Outcome, Verdict, Wrong};
use serde::{Deserialize, Serialize};
use sparsed_abi::SpdGetApiFn;
use sparsed_backend::{Found, entry_point};
use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::Path;

/// What the child's line begins with.
pub(crate) const MARK: &str = "sparsed-conform-verdict ";

/// What the child says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Said {
    pub(crate) verdict: Verdict,
    /// From the rule `device.info`.
    pub(crate) device: Option<Device>,
}

/// What of a plugin is tried, and how it is set.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// Which of its devices.
    pub device: u32,
    /// The operator's settings for it.
    pub settings: Vec<(String, String)>,
}

/// What a check works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) found: Found,
    /// The library's one symbol.
    pub(crate) entry: SpdGetApiFn,
    /// Which device is tried.
    pub(crate) index: u32,
    seed: u64,
    rule: &'static str,
    device: RefCell<Option<Device>>,
}

impl Context {
    /// Random numbers of this rule: the same for the same seed.
    pub(crate) fn random(&self) -> fastrand::Rng {
        // Keys of the default hasher are constant, unlike those of a map.
        let mut hasher = DefaultHasher::new();
        (self.seed, self.rule).hash(&mut hasher);
        fastrand::Rng::with_seed(hasher.finish())
    }

    /// Puts the device into the report.
    pub(crate) fn note_device(&self, device: Device) {
        *self.device.borrow_mut() = Some(device);
    }

    /// The plugin's device, open, with a queue.
    pub(crate) fn session(&self) -> Result<rig::Session, Wrong> {
        self.session_with(rig::OpenOptions::default())
    }

    /// As [`Self::session`], opened in this way.
    pub(crate) fn session_with(&self, options: rig::OpenOptions) -> Result<rig::Session, Wrong> {
        let api = rig::table(self.entry)?;
        Ok(rig::Session::open(api, self.index, options)?)
    }
}

/// Tries the rule `id` on the plugin in `folder` in this process, and says what came of it on standard output.
///
/// # Errors
/// When standard output is closed.
pub fn child(folder: &Path, id: &str, seed: u64, subject: &Subject) -> std::io::Result<()> {
    rig::set(&subject.settings);
    let mut device = None;
    let outcome = attempt(folder, id, seed, subject.device, &mut device);
    let said = Said { verdict: outcome.into(), device };
    let line = serde_json::to_string(&said).map_err(std::io::Error::other)?;
    let mut out = std::io::stdout().lock();
    // The plugin may have left a line open.
    writeln!(out, "\n{MARK}{line}")?;
    out.flush()
}

fn attempt(folder: &Path, id: &str, seed: u64, index: u32, device: &mut Option<Device>) -> Outcome {
    let fail = |why: String| Wrong::Failed(why);
    let rule = rule::all().find(|rule| rule.id == id).ok_or_else(|| fail(format!("there is no rule '{id}'")))?;
    let found = find(folder).map_err(fail)?;
    match rule.check {
        Check::Files(check) => check(&found),
        Check::Code(check) => {
            let entry = entry_point(&found).map_err(|error| fail(error.to_string()))?;
            let context = Context { found, entry, index, seed, rule: rule.id, device: RefCell::default() };
            let outcome = check(&context);
            *device = context.device.into_inner();
            outcome
        }
    }
}
