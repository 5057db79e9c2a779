//! Which models come into memory, and which leave it?
//!
//! A model that somebody asks for is opened on a thread of its own, since its file may have to be read as a whole. Then
//! it takes its place: models that nobody needs leave for it, the one first that was used least recently. Between two
//! of its weights those that are loaded have a step each, so that nobody's answer stands still for a whole upload. What
//! the device makes of the weights then comes of calls that may take as long, on a thread of their own: the engine goes
//! on beside them, and calls nothing itself that would have to wait for their end, but where a queue or device is lost.

use super::bring_up::concerns_device;
use super::{Engine, PARKED_PAUSE, lock, seconds};
use crate::executor::{DeviceModel, ExecutorError};
use crate::lane::{Lane, Opened, Unopened, Upload};
use crate::memory::Pressure;
use crate::residence::{Left, Take, has_room, least_recent};
use sparsed_backend::{Backend, Weight};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

/// What is on its way into memory; one model at a time.
#[derive(Debug, Default)]
pub(super) enum Coming {
    #[default]
    Nothing,
    /// A thread reads the file of a model.
    Opening,
    /// A model is open, and there is no room yet.
    Waits {
        index: usize,
        opened: Box<Opened>,
        /// When it is given up.
        until: Duration,
    },
}

impl Engine {
    /// Has models leave whose time is over, and loads what is wanted.
    pub(super) fn reside(&mut self) {
        let now = self.now();
        self.lanes.iter_mut().for_each(|lane| lane.tend(now));
        for index in 0..self.lanes.len() {
            let expires = self.lanes[index].resident().and_then(|resident| resident.expires());
            if expires.is_some_and(|at| now >= at) {
                self.let_go(index, Left::Idle);
            }
        }
        self.make_way_for_others();
        // Without a first device nobody knows what models take, and whoever is stopping loads no more.
        if self.announced && !self.draining {
            self.admit(now);
            self.open_next();
        }
    }

    /// When something is to be done about models though nothing happens.
    pub(super) fn reside_at(&self) -> Option<Duration> {
        // The last of its blocks may have come to the disk, of which nobody is told.
        if self.lanes.iter().any(Lane::is_unnoticed) {
            return Some(Duration::ZERO);
        }
        let expires = self.lanes.iter().filter_map(|lane| lane.resident()?.expires());
        let retries = self.lanes.iter().filter_map(|lane| lane.failed_at?.checked_add(crate::residence::RETRY_AFTER));
        let given_up = match &self.coming {
            Coming::Waits { until, .. } => Some(*until),
            Coming::Nothing | Coming::Opening => None,
        };
        expires.chain(retries).chain(given_up).min()
    }

    /// Where memory is critically short, one model that nobody needs leaves at each look.
    fn make_way_for_others(&mut self) {
        let outlook = *lock(&self.shared.outlook);
        if outlook.pressure == Pressure::Critical && self.relieved_at != outlook.number {
            self.relieved_at = outlook.number;
            if let Some(index) = self.least_recent() {
                self.let_go(index, Left::Pressure);
            }
        }
    }

    fn least_recent(&self) -> Option<usize> {
        let residents = self.lanes.iter().enumerate();
        least_recent(residents.filter_map(|(index, lane)| Some((index, lane.resident()?))))
    }

    fn let_go(&mut self, index: usize, why: Left) {
        if self.lanes[index].leave(why) {
            self.reckon();
        }
    }

    /// Begins to open the next model that somebody wants.
    fn open_next(&mut self) {
        if !matches!(self.coming, Coming::Nothing) {
            return;
        }
        let Some(index) = self.lanes.iter().position(|lane| lane.slot.is_wanted()) else { return };
        let lane = &self.lanes[index];
        lane.slot.taken_up();
        log::info!(model:% = lane.slot.name; "model is being loaded");
        let (name, options) = (lane.slot.name.clone(), lane.options.clone());
        let (limits, engine) = (self.limits, self.sender.clone());
        let open = move || {
            let opened = catch_unwind(AssertUnwindSafe(|| Opened::open(&name, &options, limits, seconds())));
            let opened = match opened {
                Ok(Ok(opened)) => Ok(Box::new(opened)),
                Ok(Err(Unopened::NoFile(reason) | Unopened::Unfit(reason))) => Err(reason),
                Err(_) => Err("reading it failed; the lines above say how".to_owned()),
            };
            // An engine that has ended needs nothing any more.
            let _ended = engine.send(super::Command::Opened { slot: index, opened }).is_err();
        };
        match std::thread::Builder::new().name("open-model".to_owned()).spawn(open) {
            Ok(_) => self.coming = Coming::Opening,
            Err(error) => self.fail(index, format!("no thread to read it: {error}")),
        }
    }

    /// A model's file is open, or cannot be opened.
    pub(super) fn opened(&mut self, index: usize, opened: Result<Box<Opened>, String>) {
        self.coming = Coming::Nothing;
        match opened {
            Ok(opened) => {
                let until = self.now().saturating_add(self.lanes[index].slot.residence.patience);
                self.coming = Coming::Waits { index, opened, until };
            }
            Err(reason) => self.fail(index, reason),
        }
    }

    fn fail(&mut self, index: usize, reason: String) {
        let now = self.now();
        self.lanes[index].fail(reason, now);
    }

    /// Gives the model that is open its place, once there is room.
    fn admit(&mut self, now: Duration) {
        let (index, opened, until) = match std::mem::take(&mut self.coming) {
            Coming::Waits { index, opened, until } => (index, opened, until),
            other => return self.coming = other,
        };
        let take = opened.take();
        while !self.has_room(take) {
            match self.least_recent() {
                Some(other) => self.let_go(other, Left::Room),
                // Who may leave is in use now, or keeps something that is on its way to a disk.
                None if now < until && self.lanes.iter().any(|lane| lane.live.is_some() && lane.may_leave()) => {
                    self.coming = Coming::Waits { index, opened, until };
                    return;
                }
                None => return self.fail(index, self.too_large(take)),
            }
        }
        let orders = self.links.orders(index, opened.images());
        match self.lanes[index].come(*opened, self.limits, orders) {
            Ok(()) => self.put_on_device(index),
            Err(reason) => self.fail(index, reason),
        }
    }

    fn has_room(&self, take: Take) -> bool {
        let pools_bytes = self.lives().map(|live| live.take().pool_bytes).sum();
        has_room(lock(&self.shared.budget).left(), pools_bytes, take)
    }

    fn too_large(&self, take: Take) -> String {
        let loaded: Vec<&str> =
            self.lanes.iter().filter(|lane| lane.live.is_some()).map(|lane| lane.slot.name.as_str()).collect();
        let needed = take.weights_bytes.saturating_add(take.pool_bytes / 2) >> 20;
        let left = lock(&self.shared.budget).left().unwrap_or(0) >> 20;
        let beside = if loaded.is_empty() { String::new() } else { format!(" beside {}", loaded.join(", ")) };
        format!("it needs {needed} MiB, and {left} MiB are left for it and KV caches{beside}; see memory.total")
    }

    /// Puts a model on the device in use, while the others go on. Without one it comes with the others onto the next.
    fn put_on_device(&mut self, index: usize) {
        let Some(backend) = self.backend.clone() else { return };
        let Some(upload) = self.lanes[index].upload(&backend) else { return };
        let (began, slot) = (self.now(), Arc::clone(&self.lanes[index].slot));
        let weights = upload.weights(&backend, &mut |done, total| {
            slot.uploaded(done, total);
            lock(&self.shared.progress).uploading(self.now());
            self.meanwhile();
        });
        let loaded = match weights {
            // On a device that was lost meanwhile the rest would be made in vain.
            Ok(_) if self.backend.is_none() => return lock(&self.shared.progress).uploaded(self.now()),
            weights => weights.and_then(|weights| self.place(upload, &backend, &weights)),
        };
        lock(&self.shared.progress).uploaded(self.now());
        match loaded {
            // The device was lost meanwhile: the next one takes this model with the others.
            _ if self.backend.is_none() => {}
            Ok(model) => {
                if let Some(live) = &mut self.lanes[index].live {
                    live.attach(model);
                }
                self.reckon();
                self.lanes[index].announce();
                let took_ms = u64::try_from(self.now().saturating_sub(began).as_millis()).unwrap_or(u64::MAX);
                log::info!(model:% = slot.name, device:% = backend.info().name, took_ms; "model ready");
            }
            Err(error) if concerns_device(&error) => self.lose(&error),
            Err(error) => self.fail(index, error.to_string()),
        }
    }

    /// Has the device make the rest of a model, on a thread that has ended when this answers, whatever becomes of the
    /// device or the engine meanwhile. Those that are loaded go on beside it. Their steps and blocks are calls that a
    /// device takes at any time; models come, leave and are weighed later, and a device whose steps fail is not asked
    /// whether it is well but judged by its conduct. Only a queue or device that is lost has the engine wait for the
    /// thread, as what was made there is given back one call at a time.
    fn place(&mut self, upload: Upload, backend: &Backend, weights: &[Weight]) -> Result<DeviceModel, ExecutorError> {
        lock(&self.shared.progress).compiling(upload.weights_bytes(), self.now());
        std::thread::scope(|scope| {
            let compile = std::thread::Builder::new().name("compile".to_owned());
            let thread = compile.spawn_scoped(scope, move || upload.place(backend, weights));
            let thread = thread.map_err(|error| ExecutorError::NoThread { reason: error.to_string() })?;
            while !thread.is_finished() {
                self.beside();
            }
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// One turn of the others while the device compiles, or a look at the inbox if they have nothing to do.
    fn beside(&mut self) {
        let has_device = self.devices.due().is_none();
        let is_busy = has_device && self.lives().any(|live| live.scheduler.has_work());
        if !is_busy || self.is_ending() {
            if has_device {
                lock(&self.shared.progress).idle(self.now());
            }
            if let Ok(command) = self.inbox.recv_timeout(PARKED_PAUSE) {
                self.heed(command);
            }
        }
        if !self.is_ending() {
            self.meanwhile();
        }
    }

    /// What is done for the others while a model is put on the device.
    fn meanwhile(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            self.heed(command);
        }
        self.look(self.now());
        if self.devices.due().is_none() {
            self.turn();
        }
        self.show();
    }
}
