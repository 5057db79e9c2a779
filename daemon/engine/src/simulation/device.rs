//! What stands in for a plugin? Somebody who answers calls as a plugin would, with statuses that the engine knows.

use crate::attempt::Executor;
use crate::batch::Batch;
use crate::executor::{ExecutorError, Outputs};
use crate::ladder::{Blame, Conduct};
use crate::warm::WriteJob;
use sparsed_abi::{E_DATA, E_DEVICE_LOST, E_NOMEM_DEVICE, E_QUEUE_LOST, E_STEP};
use sparsed_backend::BackendError;
use sparsed_kv::BlockId;
use std::time::Duration;

/// How a call of a device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFault {
    /// This step, and nothing else.
    Step,
    /// A page of this block cannot be read, or is not what was written.
    Page(u32),
    /// No memory now.
    NoMemory,
    /// The queue is of no more use.
    Queue,
    /// The device is.
    Device,
}

/// What a step carries, as `spd_step` has it.
#[derive(Clone, Copy, Debug)]
pub struct StepView<'a> {
    /// `[tokens]`
    pub tokens: &'a [u32],
    /// `[tokens]`
    pub positions: &'a [u32],
    /// `[tokens]`, where each token's rows go.
    pub slots: &'a [u64],
    /// `[sequences + 1]`, into `tokens`.
    pub seq_offsets: &'a [u32],
    /// `[sequences + 1]`, into `block_ids`.
    pub block_offsets: &'a [u32],
    /// All block tables, one after another.
    pub block_ids: &'a [u32],
    /// Tokens that give logits.
    pub rows: &'a [u32],
}

/// A device that is none.
pub trait Device {
    /// `[rows, vocab]`
    ///
    /// # Errors
    /// As a plugin's calls.
    fn run(&mut self, step: &StepView<'_>) -> Result<Vec<f32>, DeviceFault>;
    /// Zeroes blocks.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn discard(&mut self, blocks: &[BlockId]) -> Result<(), DeviceFault>;
    /// A new queue.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn renew_queue(&mut self) -> Result<(), DeviceFault>;
    /// A block's host image.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn export(&mut self, block: BlockId) -> Result<Vec<u8>, DeviceFault>;
    /// Fills a block.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn import(&mut self, block: BlockId, image: &[u8]) -> Result<(), DeviceFault>;
    /// Copies a block for the slow tier.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<WriteJob, DeviceFault>;
    /// Reads the block in the slow tier from now on.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn relocate(&mut self, block: BlockId, tag: u64) -> Result<(), DeviceFault>;
    /// The cache of rows in the slow tier takes so many bytes at most.
    ///
    /// # Errors
    /// As a plugin's calls.
    fn limit_cache(&mut self, bytes: u64) -> Result<(), DeviceFault>;
    /// Whether it passes its test.
    fn is_well(&mut self) -> bool;
}

/// A simulated device as the engine drives a real one.
pub(super) struct Watched<'a> {
    pub(super) device: &'a mut dyn Device,
    pub(super) conduct: &'a mut Conduct,
    pub(super) now: Duration,
}

impl Executor for Watched<'_> {
    fn run(&mut self, batch: &Batch) -> Result<Outputs, ExecutorError> {
        let step = StepView {
            tokens: &batch.tokens,
            positions: &batch.positions,
            slots: &batch.slots,
            seq_offsets: &batch.seq_offsets,
            block_offsets: &batch.block_offsets,
            block_ids: &batch.block_ids,
            rows: &batch.rows,
        };
        let logits = self.device.run(&step).map_err(|fault| failed("queue_run", fault))?;
        self.conduct.well();
        Ok(Outputs { logits, ..Outputs::default() })
    }

    fn discard(&mut self, blocks: &[BlockId]) -> Result<(), ExecutorError> {
        self.device.discard(blocks).map_err(|fault| failed("queue_kv", fault))
    }

    fn renew_queue(&mut self) -> Result<(), ExecutorError> {
        self.device.renew_queue().map_err(|fault| failed("queue_create", fault))
    }

    fn export(&mut self, block: BlockId) -> Result<Vec<u8>, ExecutorError> {
        self.device.export(block).map_err(|fault| failed("queue_kv", fault))
    }

    fn import(&mut self, blocks: &[BlockId], images: &mut [Vec<u8>]) -> Result<(), ExecutorError> {
        let mut pairs = blocks.iter().zip(images);
        pairs
            .try_for_each(|(block, image)| self.device.import(*block, image))
            .map_err(|fault| failed("queue_kv", fault))
    }

    fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<WriteJob, ExecutorError> {
        self.device.slow_copy(block, tag).map_err(|fault| failed("queue_kv", fault))
    }

    fn relocate(&mut self, block: BlockId, tag: u64) -> Result<(), ExecutorError> {
        self.device.relocate(block, tag).map_err(|fault| failed("queue_kv", fault))
    }

    fn limit_cache(&mut self, bytes: u64) -> Result<(), ExecutorError> {
        self.device.limit_cache(bytes).map_err(|fault| failed("queue_kv", fault))
    }

    fn examine(&mut self, is_call: bool) -> Result<bool, ExecutorError> {
        if !self.device.is_well() {
            return Err(ExecutorError::Unfit { reason: "it fails its test".to_owned() });
        }
        match self.conduct.failed(is_call, self.now) {
            Blame::Device(failures) => Err(ExecutorError::Unreliable { failures }),
            blame => Ok(blame == Blame::Open),
        }
    }
}

fn failed(call: &'static str, fault: DeviceFault) -> ExecutorError {
    let (status, block) = match fault {
        DeviceFault::Step => (E_STEP, None),
        DeviceFault::Page(block) => (E_DATA, Some(block)),
        DeviceFault::NoMemory => (E_NOMEM_DEVICE, None),
        DeviceFault::Queue => (E_QUEUE_LOST, None),
        DeviceFault::Device => (E_DEVICE_LOST, None),
    };
    let message = "simulated".to_owned();
    BackendError::Call { call, status, message, op_index: None, block, vendor_code: 0 }.into()
}
