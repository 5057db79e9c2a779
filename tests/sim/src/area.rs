//! How can the disk of the slow tier fail?
//!
//! What is in it need not survive anything: the file has no name. So nothing is kept apart here, but writes and reads
//! fail, come short, are lost, or bring other bytes.

use fastrand::Rng;
use sparsed_rowcache::{Read, SlowLayout};
use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Mutex, MutexGuard};

/// The slow tier's file, as the device and the thread that writes share it.
#[derive(Clone, Debug)]
pub(crate) struct Area(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    rng: Rng,
    /// One call in so many fails; 0 is never.
    one_in: u32,
}

impl Area {
    /// An area for `n_blocks` blocks.
    pub(crate) fn new(layout: &SlowLayout, n_blocks: u32, seed: u64) -> Self {
        let bytes = vec![0; layout.block_bytes() * n_blocks as usize];
        Self(Arc::new(Mutex::new(State { bytes, rng: Rng::with_seed(seed), one_in: 0 })))
    }

    pub(crate) fn n_bytes(&self) -> u64 {
        self.state().bytes.len() as u64
    }

    pub(crate) fn set_faults(&self, one_in: u32) {
        self.state().one_in = one_in;
    }

    /// Writes an image. A write that is reported as done may be lost, as a disk may lie.
    pub(crate) fn write(&self, offset: usize, image: &[u8]) -> Result<()> {
        let state = &mut *self.state();
        let (n_bytes, answer) = match state.fault() {
            None => (image.len(), Ok(())),
            Some(0) => (0, Err(Error::from(ErrorKind::StorageFull))),
            Some(1) => (state.rng.usize(..image.len()), Err(Error::from(ErrorKind::Other))),
            Some(2) => (image.len(), Err(Error::from(ErrorKind::Other))),
            Some(_) => (state.rng.usize(..image.len()), Ok(())),
        };
        state.bytes[offset..offset + n_bytes].copy_from_slice(&image[..n_bytes]);
        answer
    }

    /// What a read brings: fewer bytes when it comes short, none when it fails.
    pub(crate) fn read(&self, read: Read, bytes: &mut Vec<u8>) {
        let state = &mut *self.state();
        let offset = usize::try_from(read.offset).expect("an area is in memory");
        bytes.clear();
        bytes.extend_from_slice(&state.bytes[offset..offset + read.len_bytes()]);
        match state.fault() {
            None => {}
            Some(0) => bytes.clear(),
            Some(1) => bytes.truncate(state.rng.usize(..bytes.len())),
            Some(2) => {
                let at = state.rng.usize(..bytes.len());
                bytes[at] ^= 1 << state.rng.u8(..8);
            }
            Some(_) => {
                // For good.
                let at = offset + state.rng.usize(..bytes.len());
                state.bytes[at] ^= 1 << state.rng.u8(..8);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl State {
    /// Which of the four faults of a call comes, if any.
    fn fault(&mut self) -> Option<u32> {
        (self.one_in > 0 && self.rng.u32(..self.one_in) == 0).then(|| self.rng.u32(..4))
    }
}
