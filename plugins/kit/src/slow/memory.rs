//! Reads from host memory: copies, one at a time, since nothing is gained by waiting for several.

use super::{BUFFER_BYTES, Buffer, Flights, Landed};
use std::io;
use std::ptr::NonNull;

/// Memory of the daemon's in which a slow area lies.
///
/// It is written by the daemon while it is read here, but never where a block is that is being read: so it is reached
/// by its address, and there is no reference to it.
#[derive(Debug)]
pub struct SlowMemory {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory is the daemon's, which gives it to all threads of the plugin.
unsafe impl Send for SlowMemory {}

impl SlowMemory {
    /// # Safety
    /// `length` bytes from `base` on can be read until this and the reader made of it are dropped, and no other thread
    /// writes a page while it is read.
    pub unsafe fn new(base: NonNull<u8>, length: usize) -> Self {
        Self { base, length }
    }

    /// Where it begins: for a device that pins it.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes in all.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Copies what there is from byte `offset` on into `to`; answers how much that is.
    fn copy(&self, offset: u64, to: &mut [u8]) -> usize {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(self.length);
        let found = to.len().min(self.length - offset);
        // SAFETY: inside the memory, see `new`; `to` is our own.
        unsafe { self.base.as_ptr().add(offset).copy_to_nonoverlapping(to.as_mut_ptr(), found) };
        found
    }
}

/// One buffer, filled by a start and emptied by a wait.
#[derive(Debug)]
pub(super) struct Copies {
    memory: SlowMemory,
    buffer: Box<Buffer>,
    landed: Option<Landed>,
}

impl Copies {
    pub(super) fn new(memory: SlowMemory) -> Self {
        Self { memory, buffer: Buffer::new(), landed: None }
    }
}

impl Flights for Copies {
    fn start(&mut self, index: usize, offset: u64, length: usize) -> io::Result<bool> {
        if self.landed.is_some() {
            return Ok(false);
        }
        let found = self.memory.copy(offset, &mut self.buffer.0[..length]);
        self.landed = Some(Landed { index, slot: 0, found: Ok(found) });
        Ok(true)
    }

    fn n_in_flight(&self) -> usize {
        usize::from(self.landed.is_some())
    }

    fn wait(&mut self) -> io::Result<Landed> {
        self.landed.take().ok_or_else(|| io::Error::other("no read was started"))
    }

    fn bytes(&mut self, _slot: usize) -> &mut [u8; BUFFER_BYTES] {
        &mut self.buffer.0
    }
}
