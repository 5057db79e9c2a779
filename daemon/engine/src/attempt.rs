//! How is a batch computed although steps fail? By the rungs of the ladder that keep the device.

use crate::batch::Batch;
use crate::executor::{DeviceModel, ExecutorError, Outputs};
use crate::ladder::{Blame, Conduct, StepLadder, StepRung};
use crate::warm::{ReclaimJob, WriteJob};
use sparsed_backend::Fault;
use sparsed_kv::BlockId;
use std::time::Duration;

/// What runs a batch: a model on a device, or a test's stand-in.
pub(crate) trait Executor {
    /// Computes the batch.
    fn run(&mut self, batch: &Batch) -> Result<Outputs, ExecutorError>;
    /// Zeroes blocks that nobody holds any more.
    fn discard(&mut self, blocks: &[BlockId]) -> Result<(), ExecutorError>;
    /// Takes a new queue in place of a poisoned one.
    fn renew_queue(&mut self) -> Result<(), ExecutorError>;
    /// Copies a block's rows out of the device.
    fn export(&mut self, block: BlockId) -> Result<Vec<u8>, ExecutorError>;
    /// Fills blocks from images, one for each.
    fn import(&mut self, blocks: &[BlockId], images: &mut [Vec<u8>]) -> Result<(), ExecutorError>;
    /// Copies a block's rows for the slow tier; the job writes them there.
    fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<WriteJob, ExecutorError>;
    /// Reads a block's latent plane in the slow tier from now on.
    fn relocate(&mut self, block: BlockId, tag: u64) -> Result<(), ExecutorError>;
    /// Has the cache of rows in the slow tier take so many bytes at most, where the device can do that.
    fn limit_cache(&mut self, bytes: u64) -> Result<(), ExecutorError>;
    /// What gives the room of discarded blocks in the slow tier back, where there is some.
    fn reclaim(&mut self) -> Option<ReclaimJob> {
        None
    }
    /// A step has failed for all its sequences; `is_call`: the calls have, not what they computed. An error when the
    /// device is to blame; true when that is open.
    fn examine(&mut self, is_call: bool) -> Result<bool, ExecutorError>;
}

/// A model on a device whose conduct is watched.
pub(crate) struct Watched<'a> {
    pub(crate) device: &'a mut DeviceModel,
    pub(crate) conduct: &'a mut Conduct,
    pub(crate) clock: &'a dyn Fn() -> Duration,
}

impl Executor for Watched<'_> {
    fn run(&mut self, batch: &Batch) -> Result<Outputs, ExecutorError> {
        let outputs = self.device.run(batch)?;
        self.conduct.well();
        Ok(outputs)
    }

    fn discard(&mut self, blocks: &[BlockId]) -> Result<(), ExecutorError> {
        self.device.discard(blocks)
    }

    fn renew_queue(&mut self) -> Result<(), ExecutorError> {
        self.device.renew_queue()
    }

    fn examine(&mut self, is_call: bool) -> Result<bool, ExecutorError> {
        // One that is not free for a question is not free to be opened again for a single step either.
        let is_free = self.device.examine()?;
        match self.conduct.failed(is_call && is_free, (self.clock)()) {
            Blame::Device(failures) => Err(ExecutorError::Unreliable { failures }),
            blame => Ok(blame == Blame::Open),
        }
    }

    fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<WriteJob, ExecutorError> {
        self.device.slow_copy(block, tag)
    }

    fn relocate(&mut self, block: BlockId, tag: u64) -> Result<(), ExecutorError> {
        self.device.relocate(block, tag)
    }

    fn limit_cache(&mut self, bytes: u64) -> Result<(), ExecutorError> {
        self.device.limit_cache(bytes)
    }

    fn reclaim(&mut self) -> Option<ReclaimJob> {
        self.device.reclaim()
    }

    fn export(&mut self, block: BlockId) -> Result<Vec<u8>, ExecutorError> {
        Ok(self.device.export(&[block])?.0)
    }

    fn import(&mut self, blocks: &[BlockId], images: &mut [Vec<u8>]) -> Result<(), ExecutorError> {
        self.device.import(blocks, images)
    }
}

/// How a call ended that the device has survived.
#[derive(Debug)]
pub(crate) enum Outcome<T> {
    Done(T),
    Failed(ExecutorError),
}

/// What a batch gave.
#[derive(Debug, Default)]
pub(crate) struct Computed {
    /// `[rows of the sequences that did not fail, vocab]`
    pub(crate) logits: Vec<f32>,
    /// Sequences that failed alone, by their place in the batch, and why. Their rows in the pool are not to be trusted.
    pub(crate) failed: Vec<(usize, ExecutorError)>,
}

impl Computed {
    /// Takes out the rows that are no numbers: their sequences fail.
    fn of(outputs: Outputs, batch: &Batch) -> Self {
        if !has_nan(&outputs.logits) {
            return Self { logits: outputs.logits, failed: Vec::new() };
        }
        let mut computed = Self::default();
        let vocab = outputs.logits.len() / batch.n_rows();
        for (place, logits) in batch.row_sequences().zip(outputs.logits.chunks_exact(vocab)) {
            if has_nan(logits) {
                computed.failed.push((place, ExecutorError::NotANumber));
            } else {
                computed.logits.extend_from_slice(logits);
            }
        }
        computed
    }
}

/// Why an attempt gave nothing.
enum Failed {
    /// The device is sound: something in the step is not.
    Step(ExecutorError),
    /// The device is of no more use as it is.
    Lost(ExecutorError),
}

/// Computes a batch. Whom it fails for alone is in the answer; the others are computed.
///
/// # Errors
/// Only when the device is of no more use as it is; nothing of the batch is done then.
pub(crate) fn compute(executor: &mut dyn Executor, batch: &Batch) -> Result<Computed, ExecutorError> {
    loop {
        let computed = attempt(executor, batch)?;
        // With nobody whom it computes for, nothing says that the sequences are to blame.
        let is_call = computed.failed.iter().all(|(_, error)| error.fault() == Fault::Step && !error.is_not_a_number());
        let is_page = |(_, error): &(usize, ExecutorError)| error.bad_block().is_some();
        let nobody = computed.failed.len() == batch.n_sequences() && !computed.failed.iter().any(is_page);
        if !nobody || !executor.examine(is_call)? {
            return Ok(computed);
        }
        // Of sequences that fail together one says what all would.
        let reason = computed.failed.first().map(|(_, error)| error.to_string()).unwrap_or_default();
        log::warn!(reason:%; "step failed for all its sequences, which may be the device's fault: trying again");
    }
}

fn attempt(executor: &mut dyn Executor, batch: &Batch) -> Result<Computed, ExecutorError> {
    let alone = batch.n_sequences() == 1;
    match run(executor, batch, alone) {
        Ok(outputs) => Ok(Computed::of(outputs, batch)),
        Err(Failed::Step(error)) if alone => Ok(Computed { logits: Vec::new(), failed: vec![(0, error)] }),
        Err(Failed::Step(error)) => {
            log::warn!(reason:% = error, sequences = batch.n_sequences(); "step failed again, each sequence runs alone");
            each_alone(executor, batch)
        }
        Err(Failed::Lost(error)) => Err(error),
    }
}

/// Zeroes blocks that nobody holds any more.
///
/// # Errors
/// When the device is of no more use as it is: rows of somebody who is gone must not stay.
pub(crate) fn discard(executor: &mut dyn Executor, blocks: &[BlockId]) -> Result<(), ExecutorError> {
    climb(executor, true, |executor| executor.discard(blocks)).map_err(|failed| match failed {
        Failed::Step(error) | Failed::Lost(error) => error,
    })
}

/// Calls by the rungs of the ladder that keep the device: what the device has survived is in the answer.
///
/// # Errors
/// Only when the device is of no more use as it is.
pub(crate) fn outlive<T>(
    executor: &mut dyn Executor,
    call: impl FnMut(&mut dyn Executor) -> Result<T, ExecutorError>,
) -> Result<Outcome<T>, ExecutorError> {
    match climb(executor, true, call) {
        Ok(done) => Ok(Outcome::Done(done)),
        Err(Failed::Step(error)) => Ok(Outcome::Failed(error)),
        Err(Failed::Lost(error)) => Err(error),
    }
}

fn each_alone(executor: &mut dyn Executor, batch: &Batch) -> Result<Computed, ExecutorError> {
    let (mut computed, mut one) = (Computed::default(), Batch::default());
    for index in 0..batch.n_sequences() {
        batch.isolate(index, &mut one);
        match run(executor, &one, true) {
            Ok(outputs) => {
                let own = Computed::of(outputs, &one);
                computed.logits.extend(own.logits);
                computed.failed.extend(own.failed.into_iter().map(|(_, error)| (index, error)));
            }
            Err(Failed::Step(error)) => computed.failed.push((index, error)),
            Err(Failed::Lost(error)) => return Err(error),
        }
    }
    Ok(computed)
}

/// Runs a batch. Logits that are no numbers are computed once more: what comes out then stays, since each row has its
/// own sequence, which fails alone.
fn run(executor: &mut dyn Executor, batch: &Batch, alone: bool) -> Result<Outputs, Failed> {
    let mut is_last = false;
    climb(executor, alone, |executor| {
        let outputs = executor.run(batch)?;
        if has_nan(&outputs.logits) && !std::mem::replace(&mut is_last, true) {
            return Err(ExecutorError::NotANumber);
        }
        Ok(outputs)
    })
}

fn has_nan(logits: &[f32]) -> bool {
    logits.iter().any(|logit| logit.is_nan())
}

/// Calls until it works, or until the ladder has no rung left that keeps the device.
fn climb<T>(
    executor: &mut dyn Executor,
    alone: bool,
    mut call: impl FnMut(&mut dyn Executor) -> Result<T, ExecutorError>,
) -> Result<T, Failed> {
    let mut ladder = StepLadder::default();
    loop {
        let error = match call(executor) {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match ladder.next(error.fault(), alone) {
            StepRung::Again => log::warn!(reason:% = error; "step failed, trying again"),
            StepRung::NewQueue => {
                log::warn!(reason:% = error; "queue lost, trying again on a new one");
                executor.renew_queue().map_err(Failed::Lost)?;
            }
            StepRung::Isolate | StepRung::GiveUp => return Err(Failed::Step(error)),
            StepRung::Lost => return Err(Failed::Lost(error)),
        }
    }
}
