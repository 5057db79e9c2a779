//! Who reads the images of a window? The sessions thread, and one more that helps it: what a hot file costs is copying
//! and decryption, which two processors do in half the time.
//!
//! Whoever is free takes the next image, and the sessions thread never waits for one that nobody has begun: where the
//! other processors are busy, it reads all of them itself. There are as many images as the window has.

use crate::service::lock;
use sparsed_session::{FoundBlock, Loaded};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

/// An image to be read into a buffer.
struct Job {
    at: usize,
    block: FoundBlock,
    buffer: Vec<u8>,
}

impl Job {
    fn run(mut self) -> Read {
        let loaded = self.block.read(&mut self.buffer);
        Read { at: self.at, image: (loaded == Loaded::Image).then_some(self.buffer) }
    }
}

/// What became of one.
struct Read {
    at: usize,
    image: Option<Vec<u8>>,
}

type Jobs = Arc<Mutex<VecDeque<Job>>>;

/// Those who read.
#[derive(Default)]
pub(super) struct Readers {
    jobs: Jobs,
    help: Option<Help>,
}

/// The other thread.
struct Help {
    wake: SyncSender<()>,
    done: Receiver<Read>,
}

impl Readers {
    /// The thread that asks, and another one, which ends with this.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn two() -> std::io::Result<Self> {
        let jobs = Jobs::default();
        let ((wake, woken), (tell, done)) = (sync_channel(1), sync_channel(1));
        let theirs = Arc::clone(&jobs);
        let run = move || {
            for () in woken {
                while let Some(job) = next(&theirs) {
                    // Nobody listens any more: the daemon ends.
                    if tell.send(job.run()).is_err() {
                        return;
                    }
                }
            }
        };
        std::thread::Builder::new().name("images".to_owned()).spawn(run)?;
        Ok(Self { jobs, help: Some(Help { wake, done }) })
    }

    /// Reads `blocks`, each into its buffer; answers the images before the first that is not there, or not right.
    pub(super) fn read(&self, blocks: Vec<(FoundBlock, Vec<u8>)>) -> Vec<Vec<u8>> {
        let mut images: Vec<Option<Vec<u8>>> = blocks.iter().map(|_| None).collect();
        let mut n_left = images.len();
        lock(&self.jobs).extend(blocks.into_iter().enumerate().map(|(at, (block, buffer))| Job { at, block, buffer }));
        if let Some(help) = self.help.as_ref().filter(|_| n_left > 1) {
            // It was woken before and has not come yet, or it is gone: then nobody takes an image away.
            let _not_needed = help.wake.try_send(()).is_err();
        }
        while n_left > 0 {
            let theirs = || self.help.as_ref()?.done.recv().ok();
            // A thread that has panicked has said so, and what it took is computed again.
            let Some(Read { at, image }) = next(&self.jobs).map(Job::run).or_else(theirs) else { break };
            n_left -= 1;
            if image.is_none() {
                // Nobody needs what comes behind it.
                n_left -= lock(&self.jobs).drain(..).len();
            }
            images[at] = image;
        }
        images.into_iter().map_while(|image| image).collect()
    }
}

fn next(jobs: &Jobs) -> Option<Job> {
    lock(jobs).pop_front()
}
