//! Who reads the images of a window? Two threads that do nothing else: a cold file is waited for, and what a hot one
//! costs is copying and decryption, which two processors do in half the time. The sessions thread has answers to
//! journal meanwhile.
//!
//! Whoever is free takes the next image, and whoever brings the last one of a window tells the engine of all. Without
//! threads, where a seed is to be a run, the one that asks reads.

use super::asks::{Ask, Asks};
use crate::durable::{Restore, Restored};
use crate::service::{Command, lock};
use sparsed_session::{FoundBlock, Loaded};
use std::sync::mpsc::{Sender, SyncSender, channel};
use std::sync::{Arc, Mutex};

/// What was found of a block that is to be restored.
pub(super) enum Found {
    /// Its image: it was not written yet.
    Image(Vec<u8>),
    /// Where it may be, and memory for it.
    Block(FoundBlock, Vec<u8>),
}

/// Who hears of images.
#[derive(Clone)]
pub(super) struct Hearers {
    pub(super) asks: Asks,
    pub(super) engine: SyncSender<Command>,
}

/// An order to read, while it is carried out.
struct Window {
    slot: usize,
    restore: Restore,
    hearers: Hearers,
    parts: Mutex<Parts>,
}

struct Parts {
    images: Vec<Option<Vec<u8>>>,
    /// Images of which nobody knows yet.
    n_left: usize,
    /// Images before the first that is not there, or not right, as far as is known: nobody needs those behind it.
    n_whole: usize,
}

impl Window {
    /// What became of one image.
    fn part(&self, at: usize, image: Option<Vec<u8>>) {
        let parts = &mut *lock(&self.parts);
        if image.is_none() {
            parts.n_whole = parts.n_whole.min(at);
        }
        parts.images[at] = image;
        parts.n_left -= 1;
        if parts.n_left == 0 {
            self.tell(std::mem::take(&mut parts.images));
        }
    }

    fn tell(&self, images: Vec<Option<Vec<u8>>>) {
        let n = images.len();
        let images: Vec<Vec<u8>> = images.into_iter().map_while(|image| image).collect();
        if images.len() < n {
            let block = u32::try_from(images.len()).map_or(u32::MAX, |n| self.restore.first.saturating_add(n));
            self.hearers.asks.tell(Ask::Missing { file: self.restore.file, block });
        }
        let restored = Restored { restore: self.restore, images };
        // An engine that has ended needs nothing any more.
        let _ended = self.hearers.engine.send(Command::Restored { slot: self.slot, restored }).is_err();
    }
}

/// An image to be read. Where it is dropped before, it is computed again.
struct Job {
    window: Arc<Window>,
    at: usize,
    block: FoundBlock,
    buffer: Vec<u8>,
    image: Option<Vec<u8>>,
}

impl Job {
    fn run(mut self) {
        let n_whole = lock(&self.window.parts).n_whole;
        if self.at < n_whole && self.block.read(&mut self.buffer) == Loaded::Image {
            self.image = Some(std::mem::take(&mut self.buffer));
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.window.part(self.at, self.image.take());
    }
}

/// Those who read.
#[derive(Default)]
pub(super) struct Readers(Option<Sender<Job>>);

impl Readers {
    /// Two threads, which end with this.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn two() -> std::io::Result<Self> {
        let (sender, jobs) = channel::<Job>();
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..2 {
            let jobs = Arc::clone(&jobs);
            let next = move || lock(&jobs).recv();
            let run = move || {
                while let Ok(job) = next() {
                    job.run();
                }
            };
            std::thread::Builder::new().name("images".to_owned()).spawn(run)?;
        }
        Ok(Self(Some(sender)))
    }

    /// Has the images of a window read that were found; `hearers` hear of those before the first that is not right.
    pub(super) fn read(&self, slot: usize, restore: Restore, found: Vec<Found>, hearers: Hearers) {
        let n_left = found.iter().filter(|found| matches!(found, Found::Block(..))).count();
        let parts = Parts { images: found.iter().map(|_| None).collect(), n_left, n_whole: found.len() };
        let window = Arc::new(Window { slot, restore, hearers, parts: Mutex::new(parts) });
        let mut jobs = Vec::with_capacity(n_left);
        for (at, found) in found.into_iter().enumerate() {
            match found {
                Found::Image(image) => lock(&window.parts).images[at] = Some(image),
                Found::Block(block, buffer) => {
                    jobs.push(Job { window: Arc::clone(&window), at, block, buffer, image: None });
                }
            }
        }
        if jobs.is_empty() {
            let images = std::mem::take(&mut lock(&window.parts).images);
            window.tell(images);
        }
        for job in jobs {
            match &self.0 {
                // Threads that have panicked have said so: what comes back is dropped.
                Some(threads) => drop(threads.send(job)),
                None => job.run(),
            }
        }
    }
}
