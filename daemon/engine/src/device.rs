//! Which device computes, and what if it is lost? The devices in order of preference, and what they have been through.

use crate::executor::ExecutorError;
use crate::ladder::{Conduct, DeviceLadder, DeviceRung, Recovery};
use crate::service::{Shared, lock};
use sparsed_backend::{Backend, BackendError, Fault};
use std::sync::Arc;
use std::time::Duration;

/// A device that can be opened, and opened again after it was lost.
pub trait DeviceSource: Send {
    /// What people call it.
    fn name(&self) -> &str;

    /// Why it is the preferred one, where nobody has named it.
    fn chosen(&self) -> Option<&str> {
        None
    }

    /// Opens it. Nothing of an earlier opening is in use any more.
    ///
    /// # Errors
    /// Why it cannot be opened; [`Fault::Caller`] when it would be refused again.
    fn open(&mut self) -> Result<Backend, BackendError>;

    /// Takes note that it was lost, or could not be opened or loaded.
    fn strike(&mut self, reason: &str);
}

/// The device in use, for status pages.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Which.
    pub name: String,
    /// How it is.
    pub state: DeviceState,
    /// Why a device was lost or could not be had, the last time.
    pub last_fault: Option<String>,
    /// How often that happened since the start.
    pub n_faults: u64,
    /// Another device than the preferred one: greedy answers may differ in near ties.
    pub backend_changed: bool,
    /// Why the preferred one is preferred, where nobody has named it.
    pub chosen: Option<String>,
}

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Opened, and given its models, for the first time.
    Loading,
    /// Computes.
    Ready,
    /// Lost; requests wait until it, or another one, computes.
    Recovering,
    /// No model of this box is served; others are, by engines elsewhere.
    Unused,
}

/// The devices, and which of them is in use.
pub(crate) struct Devices {
    sources: Vec<Box<dyn DeviceSource>>,
    ladder: DeviceLadder,
    /// Of the one in use.
    conduct: Conduct,
    /// The device that failed at steps, and how, until it is known whether the next one fails at them too.
    suspect: Option<(usize, String)>,
    /// Nothing has been opened yet, nor has failed to; one in quarantine was not tried.
    is_untried: bool,
    /// When a device is to be opened; `None` while one is in use.
    due: Option<Duration>,
    /// When the preferred one is tried again, while another one is in use.
    prefer_at: Duration,
    shared: Arc<Shared>,
}

impl DeviceStatus {
    pub(crate) fn new(name: &str, chosen: Option<&str>) -> Self {
        let (name, chosen) = (name.to_owned(), chosen.map(str::to_owned));
        Self { name, state: DeviceState::Loading, last_fault: None, n_faults: 0, backend_changed: false, chosen }
    }
}

impl Devices {
    /// The first source is preferred, and due at once.
    ///
    /// # Panics
    /// Without a source.
    pub(crate) fn new(sources: Vec<Box<dyn DeviceSource>>, recovery: &Recovery, shared: Arc<Shared>) -> Self {
        let ladder = DeviceLadder::new(recovery, sources.len());
        let (conduct, prefer_at) = (Conduct::new(recovery), Duration::ZERO);
        let (due, suspect) = (Some(Duration::ZERO), None);
        Self { sources, ladder, conduct, suspect, is_untried: true, due, prefer_at, shared }
    }

    /// How the device in use behaves.
    pub(crate) fn conduct(&mut self) -> &mut Conduct {
        &mut self.conduct
    }

    /// Whether nothing has been opened yet, nor has failed to: what is refused then is wrong with the installation.
    pub(crate) fn is_untried(&self) -> bool {
        self.is_untried
    }

    /// When a device is to be opened; `None` while one is in use.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// When the preferred device is to be tried, while another one is in use.
    pub(crate) fn prefer_at(&self) -> Option<Duration> {
        (self.due.is_none() && self.ladder.current() != 0).then_some(self.prefer_at)
    }

    /// The device in use, or to be opened.
    pub(crate) fn current(&self) -> usize {
        self.ladder.current()
    }

    /// Opens a device.
    pub(crate) fn open(&mut self, device: usize) -> Result<Backend, ExecutorError> {
        Ok(self.sources[device].open()?)
    }

    /// Device `device` is open and its models are loaded.
    pub(crate) fn up(&mut self, device: usize, now: Duration) {
        self.ladder.up(device, now);
        let has_alternative = !self.is_last(device);
        self.conduct.begin(has_alternative);
        self.is_untried = false;
        self.due = None;
        self.prefer_at = now + self.ladder.longest_pause();
        let name = self.sources[device].name();
        let mut status = lock(&self.shared.device);
        name.clone_into(&mut status.name);
        status.state = DeviceState::Ready;
        status.backend_changed = device != 0;
    }

    /// The device in use was lost, or could not be opened or loaded.
    pub(crate) fn lost(&mut self, error: &ExecutorError, now: Duration) {
        let (fault, reason) = (error.fault(), error.to_string());
        let lost = self.ladder.current();
        self.is_untried &= error.is_quarantine();
        let is_unreliable = matches!(error, ExecutorError::Unreliable { .. });
        if !is_unreliable {
            self.strike(lost, fault, &reason);
        } else if !self.is_last(lost) {
            // Taking the last device out of service would help nobody.
            self.suspect = Some((lost, reason.clone()));
        }
        // What was refused would be refused again, and who fails at its steps would again.
        let is_lasting = fault == Fault::Caller || is_unreliable;
        let (device, after) = match self.ladder.lost(is_lasting, now) {
            DeviceRung::Reopen { after } => (lost, after),
            DeviceRung::Failover { device, after } => (device, after),
        };
        self.due = Some(now + after);
        let (from, to) = (self.sources[lost].name(), self.sources[device].name());
        let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        log::error!(device = from, reason:%, next = to, after_ms; "device lost, requests wait");
        let mut status = lock(&self.shared.device);
        to.clone_into(&mut status.name);
        if status.state == DeviceState::Ready {
            status.state = DeviceState::Recovering;
        }
        status.n_faults += 1;
        status.last_fault = Some(reason);
    }

    /// The device in use has done a step, or has failed for all its sequences as the one before did: who was to blame?
    pub(crate) fn judge(&mut self, is_done: bool) {
        let Some((device, reason)) = self.suspect.take() else { return };
        if is_done {
            self.strike(device, Fault::Device, &reason);
        } else {
            log::warn!(device = self.sources[device].name(); "the next device fails at the same step: no strike");
        }
    }

    /// Whether no other device comes after this one.
    pub(crate) fn is_last(&self, device: usize) -> bool {
        device + 1 == self.sources.len()
    }

    /// The preferred device is not back yet.
    pub(crate) fn not_yet(&mut self, error: &ExecutorError, now: Duration) {
        // A quarantine has been told, and takes long.
        let level = if error.is_quarantine() { log::Level::Debug } else { log::Level::Info };
        log::log!(level, device = self.sources[0].name(), reason:% = error; "preferred device is not back yet");
        self.strike(0, error.fault(), &error.to_string());
        self.prefer_at = now + self.ladder.longest_pause();
    }

    fn strike(&mut self, device: usize, fault: Fault, reason: &str) {
        // A refusal is no crash.
        if fault != Fault::Caller {
            self.sources[device].strike(reason);
        }
    }
}
