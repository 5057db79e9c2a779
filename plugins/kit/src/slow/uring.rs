//! Reads by io_uring: many in flight from one thread, one system call for many.

use super::{BUFFER_BYTES, Buffer, Flights, Landed, goes_on};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The ring and as many buffers as it has entries.
pub(super) struct Uring {
    ring: IoUring,
    file: File,
    /// The kernel writes into those of `flights` that are not idle.
    buffers: Vec<Box<Buffer>>,
    /// What each buffer's read is, by slot.
    flights: Vec<Flight>,
    idle: Vec<usize>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Flight {
    index: usize,
    offset: u64,
    length: usize,
    done: usize,
}

impl Uring {
    /// A ring of `depth` entries, tried out: a kernel may lack reads by offset, a filter may allow only half of the
    /// system calls.
    pub(super) fn new(file: File, depth: u32) -> io::Result<Self> {
        let mut ring = IoUring::new(depth)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring has no IORING_OP_READ"));
        }
        let nothing = opcode::Nop::new().build();
        // SAFETY: a NOP has no arguments that would have to live.
        unsafe { ring.submission().push(&nothing) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        ring.completion().next().ok_or_else(|| io::Error::other("a NOP did not complete"))?;
        let n = depth as usize;
        let buffers = (0..n).map(|_| Buffer::new()).collect();
        Ok(Self { ring, file, buffers, flights: vec![Flight::default(); n], idle: (0..n).collect() })
    }

    /// Puts what is left of a slot's read into the submission queue.
    fn push(&mut self, slot: usize) {
        let Flight { offset, length, done, .. } = self.flights[slot];
        let rest = &mut self.buffers[slot].0[done..length];
        let n_bytes = u32::try_from(rest.len()).expect("a buffer has 64 KiB");
        let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), rest.as_mut_ptr(), n_bytes);
        let entry: squeue::Entry = read.offset(offset + done as u64).build().user_data(slot as u64);
        // SAFETY: the file is open and the buffer stays where it is, and untouched, until the completion is taken out:
        // both belong to this struct, `bytes` is asked for slots that have landed, and dropping awaits the others.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has as many entries as there are slots");
    }

    /// The next completion, waiting for it if need be.
    fn completion(&mut self) -> io::Result<cqueue::Entry> {
        loop {
            if let Some(entry) = self.ring.completion().next() {
                return Ok(entry);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                // A signal came, or the kernel wants completions taken out first.
                Err(error) if matches!(error.raw_os_error(), Some(EINTR | EAGAIN | EBUSY)) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

const EINTR: i32 = rustix::io::Errno::INTR.raw_os_error();
const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();
const EBUSY: i32 = rustix::io::Errno::BUSY.raw_os_error();

impl Flights for Uring {
    fn start(&mut self, index: usize, offset: u64, length: usize) -> io::Result<bool> {
        let Some(slot) = self.idle.pop() else { return Ok(false) };
        self.flights[slot] = Flight { index, offset, length, done: 0 };
        self.push(slot);
        Ok(true)
    }

    fn n_in_flight(&self) -> usize {
        self.buffers.len() - self.idle.len()
    }

    fn wait(&mut self) -> io::Result<Landed> {
        loop {
            let entry = self.completion()?;
            let slot = usize::try_from(entry.user_data()).expect("a slot was pushed");
            let found = match usize::try_from(entry.result()) {
                Ok(found) => {
                    let flight = &mut self.flights[slot];
                    flight.done += found;
                    if goes_on(found, flight.done, flight.length) {
                        self.push(slot);
                        continue;
                    }
                    Ok(self.flights[slot].done)
                }
                Err(_) if matches!(-entry.result(), EINTR | EAGAIN) => {
                    self.push(slot);
                    continue;
                }
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            self.idle.push(slot);
            return Ok(Landed { index: self.flights[slot].index, slot, found });
        }
    }

    fn bytes(&mut self, slot: usize) -> &mut [u8; BUFFER_BYTES] {
        &mut self.buffers[slot].0
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.n_in_flight() > 0 {
            if self.wait().is_err() {
                // The kernel may still write into them: they are never freed.
                std::mem::forget(std::mem::take(&mut self.buffers));
                return;
            }
        }
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("depth", &self.buffers.len()).field("in_flight", &self.n_in_flight()).finish()
    }
}
