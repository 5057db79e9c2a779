//! How does a step get onto a stream, and who waits for it?
//!
//! All of a step is enqueued at once: its arguments in, its kernels, its outputs out, an event. Nothing is allocated: a
//! plan has frames for a fixed number of steps, and who needs one more waits for the oldest. CUDA has no wait with a
//! time limit, so waiting is asking the event again and again.

use crate::device::CudaDevice;
use crate::driver::{Context, Function, Launch, Stream};
use crate::frame::Frame;
use crate::ledger::{Entry, Ledger, Object};
use crate::plan::Plan;
use crate::pool::Pool;
use sparsed_abi::{E_BUSY, E_CANCELLED, E_TIMEOUT, LOG_ERROR, STEP_NAN_GUARD, SpdKvOp, StepArrays};
use sparsed_plugin_kit::{PluginError, Queue, Result, Run};
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long a step waits for a frame before it is refused. A device that has ended nothing for so long hangs.
const FRAME_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long the end of a queue waits for work that the host has not drained.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Threads of a block.
const THREADS: u32 = 128;
/// Most parameters of a kernel.
const WORDS_MAX: usize = 16;

/// A queue: a stream and its timeline.
#[derive(Debug)]
pub(crate) struct CudaQueue {
    device: Arc<CudaDevice>,
    stream: Stream,
    ledger: Arc<Ledger>,
}

/// The pauses of somebody who asks again and again: none at first, since a step may be over in microseconds.
struct Pause(u32);

impl Pause {
    fn rest(&mut self) {
        self.0 += 1;
        if self.0 < 200 {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(Duration::from_micros(u64::from(self.0).min(500) / 5));
        }
    }
}

impl CudaQueue {
    pub(crate) fn new(device: &Arc<CudaDevice>, context: &Arc<Context>, priority: u32) -> Result<Self> {
        let (stream, ledger) = (Stream::new(context, priority)?, Arc::new(Ledger::new(context)));
        Ok(Self { device: Arc::clone(device), stream, ledger })
    }

    /// One of these frames for us, once one is free.
    fn take_frame(&self, frames: &[Arc<Frame>]) -> Result<Arc<Frame>> {
        let (begun, mut pause) = (Instant::now(), Pause(0));
        loop {
            if let Some(frame) = frames.iter().find(|frame| frame.take(&self.ledger)) {
                return Ok(Arc::clone(frame));
            }
            // Steps of other queues too: their owners may not look for long.
            frames.iter().filter_map(|frame| frame.owner()).for_each(|owner| {
                owner.advance();
            });
            self.stream.context().enter()?;
            if begun.elapsed() > FRAME_WAIT_MAX {
                let message = format!("{} pieces of work are in flight, and none ends", frames.len());
                return Err(PluginError::new(E_BUSY, message));
            }
            pause.rest();
        }
    }

    /// Puts a staged step on the stream.
    ///
    /// # Safety
    /// The frame is taken by this step, and stays so until its event is over.
    unsafe fn enqueue(&self, plan: &Plan, frame: &Frame, step: &StepArrays<'_>, bytes: (u64, u64)) -> Result<()> {
        let (stream, (bytes_in, bytes_out)) = (&self.stream, bytes);
        // SAFETY: the frame's memory is the layout's length on both sides, and staged before.
        unsafe { stream.copy_in(frame.address(0), frame.host(0), bytes_in as usize)? };
        let scratch = frame.scratch();
        for (index, lowered) in plan.launches.iter().enumerate() {
            let Some(grid) = lowered.grid.blocks(|dim| step.dim(dim)) else { continue };
            let mut words = [0; WORDS_MAX];
            for (word, &parameter) in words.iter_mut().zip(&lowered.parameters) {
                *word = plan.word(parameter, frame, step, &scratch);
            }
            let function: Function = self.device.function(lowered.kernel);
            let words = &words[..lowered.parameters.len()];
            // SAFETY: lowered from a checked operator, in the order of kernels/sparsed.kernels; frame, workspace and
            // weights live as long as the step.
            unsafe { stream.launch(Launch { function, grid, threads: THREADS, words }) }
                .map_err(|error| error.at(index))?;
        }
        if bytes_out == 0 {
            return Ok(());
        }
        let at = plan.layout.output;
        // SAFETY: as above; the host looks at the outputs once the event is over.
        unsafe { stream.copy_out(frame.host(at), frame.address(at), bytes_out as usize) }
    }

    /// Puts checked operations on the stream, as many at a time as a frame takes; answers the last part's value.
    fn enqueue_parts(&self, pool: &Arc<Pool>, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64> {
        let (mut rest, mut first_failure) = (ops, None);
        loop {
            let (part, later) = rest.split_at(pool.part(rest).min(rest.len()));
            let frame = self.take_frame(&pool.frames)?;
            // SAFETY: taken; the entry keeps it until its event is over.
            let failure = unsafe { pool.enqueue(&self.stream, &frame, part, host) }.err();
            frame.event.record(&self.stream)?;
            first_failure = first_failure.or(failure);
            let (out, _object) = (NonNull::from(&mut *host).cast(), Object::Pool(Arc::clone(pool)));
            let failure = first_failure.clone();
            let value =
                self.ledger.push(Entry { frame, _object, out, guards_nan: false, is_cancelled: false, failure });
            if later.is_empty() {
                return Ok(value);
            }
            rest = later;
        }
    }
}

impl Queue<CudaDevice> for CudaQueue {
    fn run(&self, plan: &Arc<Plan>, run: Run<'_>) -> Result<u64> {
        self.stream.context().enter()?;
        plan.check_step(&run)?;
        if run.is_cancelled() {
            return Err(PluginError::new(E_CANCELLED, "cancelled before it began"));
        }
        let frame = self.take_frame(&plan.frames)?;
        let bytes = plan.stage(&frame, &run).inspect_err(|_| frame.release())?;
        let mut turn = plan.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, before)) = &*turn
            && last.as_ptr() != Arc::as_ptr(&self.ledger)
        {
            self.stream.wait(&before.event).inspect_err(|_| frame.release())?;
        }
        // SAFETY: taken above; the entry keeps it until its event is over.
        let failure = unsafe { self.enqueue(plan, &frame, &run.step, bytes) }.err();
        // A failure in the middle leaves work on the stream, so it is the answer of the value and not of this call.
        // Should the event fail too, the frame stays taken: nobody would know when it is free.
        frame.event.record(&self.stream)?;
        *turn = Some((Arc::downgrade(&self.ledger), Arc::clone(&frame)));
        let out = NonNull::from(run.output).cast();
        let guards_nan = run.step.flags & STEP_NAN_GUARD != 0;
        let _object = Object::Plan(Arc::clone(plan));
        Ok(self.ledger.push(Entry { frame, _object, out, guards_nan, is_cancelled: false, failure }))
    }

    /// A list with more images than a frame takes has several values, of which the last is the answer.
    fn kv(&self, pool: &Arc<Pool>, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64> {
        self.stream.context().enter()?;
        pool.check(ops, host.len())?;
        let before = self.ledger.given();
        // Who is refused has the buffer back at once, so the parts that are in flight write nothing any more.
        self.enqueue_parts(pool, ops, host).inspect_err(|error| self.ledger.void(before + 1, error))
    }

    fn wait_queue(&self, other: &Self, timeline: u64) -> Result<()> {
        self.stream.context().enter()?;
        if let Some(Err(error)) = other.ledger.outcome(timeline).filter(|_| timeline > other.ledger.given()) {
            return Err(error);
        }
        match other.ledger.frame(timeline) {
            Some(frame) => self.stream.wait(&frame.event),
            None => Ok(()), // it has completed
        }
    }

    fn completed(&self) -> u64 {
        self.stream.context().enter_to_free();
        self.ledger.advance()
    }

    fn wait(&self, timeline: u64, timeout: Duration) -> Result<()> {
        let (begun, mut pause) = (Instant::now(), Pause(0));
        loop {
            self.stream.context().enter()?;
            self.ledger.advance();
            if let Some(outcome) = self.ledger.outcome(timeline) {
                return outcome;
            }
            if begun.elapsed() >= timeout {
                return Err(PluginError::new(E_TIMEOUT, format!("timeline {timeline} has not completed")));
            }
            pause.rest();
        }
    }

    fn cancel(&self, from: u64) -> Result<()> {
        self.stream.context().enter()?;
        self.ledger.advance();
        self.ledger.cancel(from);
        Ok(())
    }
}

impl Drop for CudaQueue {
    fn drop(&mut self) {
        self.ledger.context().enter_to_free();
        let (begun, mut pause, last) = (Instant::now(), Pause(0), self.ledger.given());
        self.ledger.cancel(0);
        while self.ledger.advance() < last && begun.elapsed() < DRAIN_MAX {
            pause.rest();
        }
        let n = self.ledger.abandon();
        if n > 0 {
            self.device.log(LOG_ERROR, &format!("a queue ends with {n} steps that hang; their memory is not freed"));
        }
    }
}
