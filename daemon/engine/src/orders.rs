//! Who carries out the orders of a model's scheduler? The sessions thread, and one that writes into the slow tier.

use crate::durable::{Files, Restore};
use crate::service::Command;
use crate::sessions::{Asks, ImagesOf};
use crate::warm::{Demoted, ReclaimJob, WriteJob};
use sparsed_kv::Save;
use sparsed_session::ImageShape;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

/// The way to the thread that writes into the slow tier. Its queue is bounded by what schedulers have under way.
#[derive(Clone, Debug)]
pub(crate) struct SlowWriter(Sender<SlowWrite>);

/// What is to be done with the slow tier's file.
pub(crate) enum SlowWrite {
    /// Write a block of the model `slot`.
    Block { slot: usize, tag: u64, job: WriteJob },
    /// Give back what nobody needs.
    Reclaim(ReclaimJob),
}

impl SlowWrite {
    /// Does it, which may wait for the disk; answers what the engine is to hear.
    pub(crate) fn carry_out(self) -> Option<Command> {
        match self {
            Self::Block { slot, tag, job } => {
                let written = job();
                if let Err(error) = &written {
                    log::warn!(reason:% = error; "block could not be written into the slow tier");
                }
                Some(Command::Demoted { slot, demoted: Demoted { tag, is_written: written.is_ok() } })
            }
            Self::Reclaim(job) => {
                // Not every file system can: the room is used again by the next block there.
                if let Err(error) = job() {
                    log::debug!(reason:% = error; "room in the slow tier could not be given back");
                }
                None
            }
        }
    }
}

impl SlowWriter {
    /// A way, and its end.
    pub(crate) fn new() -> (Self, Receiver<SlowWrite>) {
        let (sender, writes) = channel();
        (Self(sender), writes)
    }

    /// Starts the thread; it tells `engine` of each block, and ends with the last writer.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn spawn(engine: SyncSender<Command>) -> std::io::Result<Self> {
        let (writer, writes) = Self::new();
        let run = move || {
            for write in writes {
                // An engine that has ended needs nothing any more.
                let _ended = write.carry_out().is_some_and(|command| engine.send(command).is_err());
            }
        };
        std::thread::Builder::new().name("slow-tier".to_owned()).spawn(run)?;
        Ok(writer)
    }
}

/// Whom the orders of all models go to.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    /// The sessions thread; `None` where no sessions are kept.
    pub(crate) asks: Option<Asks>,
    pub(crate) writer: SlowWriter,
}

impl Links {
    /// The orders of the model `slot`, whose images have this shape.
    pub(crate) fn orders(&self, slot: usize, shape: ImageShape) -> Orders {
        let images = self.asks.clone().map(|asks| ImagesOf { asks, slot, shape });
        Orders { slot, images, spare: Vec::new(), writer: self.writer.clone() }
    }
}

/// Where one model's orders go.
#[derive(Debug)]
pub(crate) struct Orders {
    slot: usize,
    /// `None` where no sessions are kept: no sequence has one then.
    images: Option<ImagesOf>,
    /// Of the last window that was imported: memory for the next but one.
    spare: Vec<Vec<u8>>,
    writer: SlowWriter,
}

impl Files for Orders {
    fn save(&mut self, save: Save, image: Vec<u8>) {
        self.images.as_ref().expect("a block of a session").save(save, image);
    }

    fn restore(&mut self, restore: Restore) {
        let spare = std::mem::take(&mut self.spare);
        self.images.as_ref().expect("a block of a session").restore(restore, spare);
    }

    fn recycle(&mut self, images: Vec<Vec<u8>>) {
        self.spare = images;
    }

    fn write(&mut self, tag: u64, job: WriteJob) {
        // A thread that is gone has panicked, and said so: the block stays where it is.
        let _ended = self.writer.0.send(SlowWrite::Block { slot: self.slot, tag, job }).is_err();
    }

    fn reclaim(&mut self, job: ReclaimJob) {
        let _ended = self.writer.0.send(SlowWrite::Reclaim(job)).is_err();
    }
}
