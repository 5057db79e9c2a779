//! Reads by threads that call `pread`, one read each: for kernels and containers without io_uring.

use super::{BUFFER_BYTES, Buffer, Flights, Landed, goes_on};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A read on its way to a thread and back.
#[derive(Debug)]
struct Job {
    index: usize,
    slot: usize,
    offset: u64,
    length: usize,
    buffer: Box<Buffer>,
    found: io::Result<usize>,
}

/// The threads and as many buffers.
#[derive(Debug)]
pub(super) struct Threads {
    /// None while the threads are being stopped.
    jobs: Option<SyncSender<Job>>,
    landed: Receiver<Job>,
    /// Each buffer that is not on its way.
    buffers: Vec<Option<Box<Buffer>>>,
    idle: Vec<usize>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(super) fn new(file: File, n_threads: u32) -> io::Result<Self> {
        let n = n_threads as usize;
        let (file, (jobs, waiting), (done, landed)) = (Arc::new(file), sync_channel(n), sync_channel(n));
        // The lock is held while a thread waits for a job: the others wait for the lock instead.
        let waiting = Arc::new(Mutex::new(waiting));
        let buffers = (0..n).map(|_| Some(Buffer::new())).collect();
        let mut own = Self { jobs: Some(jobs), landed, buffers, idle: (0..n).collect(), threads: Vec::new() };
        for _ in 0..n {
            let (file, waiting, done) = (Arc::clone(&file), Arc::clone(&waiting), done.clone());
            let name = "spd-read".to_owned();
            own.threads.push(std::thread::Builder::new().name(name).spawn(move || work(&file, &waiting, &done))?);
        }
        Ok(own)
    }
}

fn ended() -> io::Error {
    io::Error::other("all reading threads have ended")
}

/// Reads until the other side is dropped.
fn work(file: &File, waiting: &Mutex<Receiver<Job>>, done: &SyncSender<Job>) {
    loop {
        let job = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut job) = job else { return };
        job.found = read_whole(file, job.offset, &mut job.buffer.0[..job.length]);
        if done.send(job).is_err() {
            return;
        }
    }
}

/// Bytes read at `offset`: fewer than `into` has at the end of the file only.
fn read_whole(file: &File, offset: u64, into: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    loop {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(found) => {
                done += found;
                if !goes_on(found, done, into.len()) {
                    return Ok(done);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Flights for Threads {
    fn start(&mut self, index: usize, offset: u64, length: usize) -> io::Result<bool> {
        let Some(slot) = self.idle.pop() else { return Ok(false) };
        let buffer = self.buffers[slot].take().expect("an idle slot has its buffer");
        let job = Job { index, slot, offset, length, buffer, found: Ok(0) };
        // The channel has room for as many jobs as there are buffers: this does not wait.
        if let Some(Err(lost)) = self.jobs.as_ref().map(|jobs| jobs.send(job)) {
            self.buffers[slot] = Some(lost.0.buffer);
            self.idle.push(slot);
            return Err(ended());
        }
        Ok(true)
    }

    fn n_in_flight(&self) -> usize {
        self.buffers.len() - self.idle.len()
    }

    fn wait(&mut self) -> io::Result<Landed> {
        let job = self.landed.recv().map_err(|_| ended())?;
        self.buffers[job.slot] = Some(job.buffer);
        self.idle.push(job.slot);
        Ok(Landed { index: job.index, slot: job.slot, found: job.found })
    }

    fn bytes(&mut self, slot: usize) -> &mut [u8; BUFFER_BYTES] {
        &mut self.buffers[slot].as_mut().expect("the read has landed").0
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has printed why.
            drop(thread.join());
        }
    }
}
