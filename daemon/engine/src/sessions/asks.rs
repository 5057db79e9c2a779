//! What may the sessions thread be asked for, and by whom?

use super::keeper::Keeper;
use super::recorded::{Flow, TurnId};
use crate::api::{Event, Sink};
use crate::durable::Restore;
use sparsed_kv::{FileId, Save};
use sparsed_session::{ImageShape, SessionId};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A verb, carried out on the thread.
type Verb = Box<dyn FnOnce(&mut Keeper) + Send>;

/// What the thread is asked for.
pub(crate) enum Ask {
    /// Carry out a verb of a surface, which waits for it.
    Do(Verb),
    /// A turn's answer has a listener.
    Listen { turn: TurnId, sink: Box<dyn Sink>, flow: Arc<Flow> },
    /// A turn's answer goes on.
    Event { turn: TurnId, event: Event },
    /// Nothing more comes of a turn.
    Gone { turn: TurnId },
    /// A session was opened and no turn was begun.
    Close { owner: u64, id: SessionId },
    /// Write an image for the model `slot`.
    Save { slot: usize, shape: ImageShape, save: Save, image: Vec<u8> },
    /// Read images for the model `slot`; they may have the memory of `spare` ones.
    Restore { slot: usize, shape: ImageShape, restore: Restore, spare: Vec<Vec<u8>> },
    /// A block that was to be read is not there, or not right.
    Missing { file: FileId, block: u32 },
    /// Write what there is and end.
    Stop,
}

/// The way to the thread. Its queue is bounded by what waits for answers from it: a verb for each surface thread, and
/// so many events and images for each turn and model.
#[derive(Clone, Debug)]
pub(crate) struct Asks(Sender<Ask>);

impl Asks {
    /// A way, and its end.
    pub(crate) fn new() -> (Self, Receiver<Ask>) {
        let (sender, receiver) = channel();
        (Self(sender), receiver)
    }

    /// Asks for something. A thread that has ended does nothing any more, and nobody waits for it then.
    pub(crate) fn tell(&self, ask: Ask) {
        let _ended = self.0.send(ask).is_err();
    }
}

/// The files of one model's sessions, for its engine.
#[derive(Debug)]
pub(crate) struct ImagesOf {
    pub(crate) asks: Asks,
    pub(crate) slot: usize,
    pub(crate) shape: ImageShape,
}

impl ImagesOf {
    /// Writes an image.
    pub(crate) fn save(&self, save: Save, image: Vec<u8>) {
        self.asks.tell(Ask::Save { slot: self.slot, shape: self.shape, save, image });
    }

    /// Reads images, into the memory of `spare` ones as far as it goes.
    pub(crate) fn restore(&self, restore: Restore, spare: Vec<Vec<u8>>) {
        self.asks.tell(Ask::Restore { slot: self.slot, shape: self.shape, restore, spare });
    }
}
