//! How does a device come into use, with its models, and how is it lost?

use super::{Engine, clock, lock};
use crate::executor::{DeviceModel, ExecutorError};
use crate::lane::{Lane, Live};
use crate::memory::Limit;
use sparsed_backend::{Backend, Fault};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Why a device is not up.
pub(super) enum NotUp {
    Failed(ExecutorError),
    /// It refuses what the installation asks of it, and would again.
    Refused(ExecutorError),
    /// The engine is to end.
    Ending,
}

impl Engine {
    /// The device in use is lost: everything waits, and the device is let go of.
    pub(super) fn lose(&mut self, error: &ExecutorError) {
        lock(&self.shared.progress).letting_go();
        self.lives_mut().for_each(Live::detach);
        let was_in_use = self.backend.take().is_some();
        let now = self.now();
        let mut progress = lock(&self.shared.progress);
        if was_in_use {
            progress.uploaded(now);
        }
        progress.lost(now);
        drop(progress);
        self.devices.lost(error, now);
    }

    /// Opens the device that is due and gives it the models.
    pub(super) fn bring_up(&mut self) {
        let device = self.devices.current();
        match self.open(device) {
            Ok((backend, models)) => self.go_on(device, backend, models),
            Err(NotUp::Failed(error)) => self.lose(&error),
            Err(NotUp::Refused(error)) => {
                let served = self.lanes.iter_mut().filter(|lane| lane.may_serve());
                served.for_each(|lane| lane.refuse(error.to_string()));
            }
            Err(NotUp::Ending) => {}
        }
    }

    /// Tries to go back to the preferred device, while nobody needs the other one.
    pub(super) fn prefer(&mut self) {
        match self.open(0) {
            Ok((backend, models)) => self.go_on(0, backend, models),
            Err(NotUp::Failed(error) | NotUp::Refused(error)) => self.devices.not_yet(&error, self.now()),
            Err(NotUp::Ending) => {}
        }
        lock(&self.shared.progress).uploaded(self.now());
    }

    pub(super) fn go_on(&mut self, device: usize, backend: Backend, models: Vec<Option<DeviceModel>>) {
        for (lane, model) in self.lanes.iter_mut().zip(models) {
            if let (Some(live), Some(model)) = (&mut lane.live, model) {
                live.attach(model);
            }
        }
        self.backend = Some(backend);
        self.reckon();
        let now = self.now();
        lock(&self.shared.progress).uploaded(now);
        self.devices.up(device, now);
        self.announced = true;
        self.lanes.iter().for_each(Lane::announce);
    }

    /// Opens a device and puts every model on it. A model that the last of the devices does not take is not served if
    /// that shows before any was; otherwise it is the device's failure, since there is another one to try, or there may
    /// be requests that wait.
    pub(super) fn open(&mut self, device: usize) -> Result<(Backend, Vec<Option<DeviceModel>>), NotUp> {
        let clock = clock(&self.shared);
        let began = clock();
        let backend = self.devices.open(device).map_err(|error| match error.fault() {
            // Another device would only hide that.
            Fault::Caller if self.devices.is_untried() && !error.is_quarantine() => NotUp::Refused(error),
            _ => NotUp::Failed(error),
        })?;
        if self.is_ending() {
            return Err(NotUp::Ending);
        }
        let mut models = Vec::with_capacity(self.lanes.len());
        for index in 0..self.lanes.len() {
            if self.is_ending() {
                return Err(NotUp::Ending);
            }
            let is_first = !self.announced && self.devices.is_last(device);
            let loaded = self.load(index, &backend);
            let lane = &mut self.lanes[index];
            match loaded {
                Ok(model) => models.push(model),
                Err(error) if is_first && !concerns_device(&error) => {
                    lane.refuse(error.to_string());
                    models.push(None);
                }
                // Nobody was told yet that it answers.
                Err(error) if lane.may_leave() && !concerns_device(&error) && !lane.slot.is_ready() => {
                    lane.fail(error.to_string(), clock());
                    models.push(None);
                }
                Err(error) => return Err(NotUp::Failed(error)),
            }
        }
        // A device that was lost is believed once it has passed its own test.
        if let Some(model) = models.iter().flatten().next().filter(|_| self.announced) {
            model.examine().map_err(NotUp::Failed)?;
        }
        self.log_up(&backend, clock().saturating_sub(began));
        Ok((backend, models))
    }

    /// Puts a model on a device that serves nobody yet; `None` for one that is not in memory.
    fn load(&self, index: usize, backend: &Backend) -> Result<Option<DeviceModel>, ExecutorError> {
        let (lane, progress) = (&self.lanes[index], &self.shared.progress);
        let Some(upload) = lane.upload(backend) else { return Ok(None) };
        let weights = upload.weights(backend, &mut |done, total| {
            lane.slot.uploaded(done, total);
            lock(progress).uploading(self.now());
        })?;
        lock(progress).compiling(upload.weights_bytes(), self.now());
        let model = upload.place(backend, &weights)?;
        lock(progress).uploading(self.now());
        Ok(Some(model))
    }

    pub(super) fn log_up(&self, backend: &Backend, took: Duration) {
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        for lane in self.lanes.iter().filter(|lane| lane.live.is_some()) {
            log::info!(model:% = lane.slot.name, device:% = backend.info().name, took_ms; "model ready");
        }
    }

    /// Whether a device that is being brought up would have nobody to serve.
    pub(super) fn is_ending(&self) -> bool {
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        is(&self.shared.ending) || (is(&self.shared.stopping) && !self.announced)
    }

    /// Reckons the budget with what weights and workspace take indeed: where less is left than was thought, pools are
    /// bounded. What was made of a file stays here as long as the model, wherever the device reads it; what is mapped
    /// is the system's to drop.
    pub(super) fn reckon(&mut self) {
        let Some(Ok(memory)) = self.backend.as_ref().map(Backend::memory) else { return };
        let made_bytes = self.lives().map(Live::made_bytes).fold(0, u64::saturating_add);
        let mut budget = lock(&self.shared.budget);
        budget.weights_bytes = memory.used_weights.saturating_add(made_bytes);
        budget.workspace_bytes = memory.used_workspace;
        budget.bind(Limit::Device, memory.total);
        let for_kv = budget.for_kv().unwrap_or(u64::MAX);
        drop(budget);
        self.allow(for_kv);
    }

    /// Divides bytes among the models' pools.
    pub(super) fn allow(&mut self, for_kv: u64) {
        self.for_kv = for_kv;
        let n = self.lives().count().max(1) as u64;
        self.lives_mut().for_each(|live| live.scheduler.allow(for_kv / n));
    }
}

/// Whether loading failed for the device's sake and not the model's.
pub(super) fn concerns_device(error: &ExecutorError) -> bool {
    matches!(error.fault(), Fault::Device | Fault::Queue | Fault::Step | Fault::Cancelled)
}
