//! How does a model run on a device? Weights uploaded, program compiled, batches stepped through.

mod error;
mod load;

pub use error::ExecutorError;
pub(crate) use load::upload;

use crate::batch::Batch;
use crate::warm::{ReclaimJob, WriteJob};
use sparsed_abi::{E_ABI, KV_DISCARD, KV_EXPORT, KV_IMPORT, KV_LIMIT_CACHE, KV_TO_SLOW, SpdKvOp};
use sparsed_backend::{Arena, Backend, BackendError, KvPool, Plan, Queue, SlowArea};
use sparsed_kv::{BLOCK_TOKENS, BlockId};
use sparsed_model::{Model, Program, ProgramOptions};
use std::sync::Arc;

/// How a model is put on a device.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// What its steps compute.
    pub program: ProgramOptions,
    /// Most tokens of a sequence.
    pub max_context: u32,
    /// Most tokens of a step.
    pub max_step_tokens: u32,
    /// Most sequences of a step.
    pub max_seqs: u32,
    /// Most rows of a step that give logits.
    pub max_logits: u32,
    /// Blocks of the KV pool.
    pub n_blocks: u32,
    /// Blocks whose latent planes are in fast memory at most; as many as `n_blocks` without a slow tier.
    pub n_fast: u32,
    /// Memory for rows that were read from the slow tier.
    pub slow_cache_bytes: u64,
}

/// A model on a device.
#[derive(Debug)]
pub struct DeviceModel {
    backend: Backend,
    pub(crate) program: Arc<Program>,
    plan: Plan,
    pub(crate) queue: Queue,
    pub(crate) pool: KvPool,
    /// Where latent planes lie that are not in fast memory.
    slow: Option<Arc<SlowArea>>,
    /// Whether blocks have left the slow tier whose room was not given back.
    has_left: bool,
    pub(crate) options: LoadOptions,
    step_id: u64,
    input: Arena,
    output: Arena,
}

/// What a step gives out.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// `[rows, vocab]`
    pub logits: Vec<f32>,
    /// Per index layer `[tokens, k]`, ascending, -1 padded; empty unless the program gives selections out.
    pub selections: Vec<Vec<i32>>,
    /// What attention asks, per layer; empty unless the program gives queries out.
    pub queries: Vec<Queries>,
}

/// Queries of one layer in the letters of `abi/OPS.md`: genuine MLA's are absorbed, all are rotated.
#[derive(Clone, Debug, Default)]
pub struct Queries {
    /// `[tokens, H, Rk/G]`; empty in the group form.
    pub latent: Vec<f32>,
    /// `[tokens, H, P/G]`
    pub rope: Vec<f32>,
}

impl DeviceModel {
    /// Uploads and compiles. `progress` hears (bytes uploaded, bytes in all).
    ///
    /// # Errors
    /// What the model lacks or the device refuses.
    pub fn load(
        backend: &Backend,
        model: &Model,
        options: LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ExecutorError> {
        let program = model.program(&options.program)?;
        let program = Arc::new(program);
        let weights = upload(backend, &program, progress)?;
        Self::place(backend, program, &weights, options, None)
    }

    /// Tokens that attention selects, `None` when it reads all.
    pub fn top_k(&self) -> Option<u32> {
        self.program.top_k()
    }

    /// Blocks of the KV pool.
    pub fn n_blocks(&self) -> u32 {
        self.pool.desc().n_blocks
    }

    /// Bytes of device memory for intermediate tensors.
    pub fn workspace_bytes(&self) -> u64 {
        self.plan.info().workspace_bytes
    }

    /// Bytes that one token holds in the KV pool.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn kv_bytes_per_token(&self) -> Result<u64, ExecutorError> {
        Ok(self.program.kv.bytes_per_token()?)
    }

    /// Runs one step. The same batch may be run again after a failure.
    ///
    /// # Errors
    /// A step that is too large, or the device's failure.
    pub fn run(&mut self, batch: &Batch) -> Result<Outputs, ExecutorError> {
        let (have, max) = (batch.n_tokens(), self.options.max_step_tokens);
        if have > max as usize {
            return Err(ExecutorError::StepTooLarge { have, max });
        }
        self.step_id += 1;
        let length = self.program.out_bytes(batch.n_tokens(), batch.n_rows());
        grow(&mut self.input, &self.backend, self.program.in_bytes(batch.n_tokens()));
        grow(&mut self.output, &self.backend, length);
        self.program.fill_inputs(batch.positions(), self.input.as_bytes_mut());
        let out = &mut self.output.as_bytes_mut()[..length];
        self.queue.run(&self.plan, &batch.encode(self.step_id), self.input.as_bytes(), out)?;
        let (tokens, rows) = (batch.n_tokens(), batch.n_rows());
        let queries = self.program.queries(out, tokens, rows).into_iter();
        Ok(Outputs {
            logits: floats(self.program.logits(out, tokens, rows)),
            selections: self.program.selections(out, tokens, rows).into_iter().map(integers).collect(),
            queries: queries
                .map(|layer| Queries { latent: layer.latent.map_or_else(Vec::new, floats), rope: floats(layer.rope) })
                .collect(),
        })
    }

    /// Takes a new queue in place of one that is lost. Rows in the pool stay.
    ///
    /// # Errors
    /// The device's failure.
    pub fn renew_queue(&mut self) -> Result<(), ExecutorError> {
        self.queue = self.backend.queue()?;
        Ok(())
    }

    /// Asks the device whether it is well, after a step that it may be to blame for. Answers whether it was asked:
    /// not while it compiles another model, as everybody would wait for that.
    ///
    /// # Errors
    /// [`ExecutorError::Unfit`] with its own word.
    pub fn examine(&self) -> Result<bool, ExecutorError> {
        let word = self.backend.examine();
        let was_asked = word.is_some();
        word.unwrap_or(Ok(())).map(|()| was_asked).map_err(|reason| ExecutorError::Unfit { reason })
    }

    /// Zeroes blocks that nobody holds any more and gives their memory back.
    ///
    /// # Errors
    /// The device's failure.
    pub fn discard(&mut self, blocks: &[BlockId]) -> Result<(), ExecutorError> {
        let discard = |block: &BlockId| SpdKvOp { kind: KV_DISCARD, dst_block: block.0, ..SpdKvOp::default() };
        let ops: Vec<SpdKvOp> = blocks.iter().map(discard).collect();
        self.queue.kv(&self.pool, &ops, &mut [])?;
        if let Some(area) = &self.slow {
            blocks.iter().for_each(|block| self.has_left |= area.leave(block.0));
        }
        Ok(())
    }

    /// What gives the room of discarded blocks in the slow tier back, where there is some.
    pub(crate) fn reclaim(&mut self) -> Option<ReclaimJob> {
        let area = Arc::clone(self.slow.as_ref().filter(|_| std::mem::take(&mut self.has_left))?);
        Some(Box::new(move || area.reclaim()))
    }

    /// Host images of `blocks`, one after another, and the bytes of one.
    pub(crate) fn export(&mut self, blocks: &[BlockId]) -> Result<(Vec<u8>, usize), ExecutorError> {
        let image_bytes = self.image_bytes()?;
        let have = image_bytes as u64;
        let ops = blocks.iter().zip(0..).map(|(block, i)| SpdKvOp {
            kind: KV_EXPORT,
            src_block: block.0,
            host_offset: have * i,
            ..SpdKvOp::default()
        });
        let mut images = vec![0; image_bytes * blocks.len()];
        self.queue.kv(&self.pool, &ops.collect::<Vec<_>>(), &mut images)?;
        Ok((images, image_bytes))
    }

    /// Fills `blocks` from host images, one for each.
    ///
    /// # Errors
    /// An image of another size, or the device's failure.
    pub(crate) fn import(&mut self, blocks: &[BlockId], images: &mut [Vec<u8>]) -> Result<(), ExecutorError> {
        let expected = self.image_bytes()? as u64;
        for (block, image) in blocks.iter().zip(images) {
            let have = image.len() as u64;
            if have != expected {
                return Err(ExecutorError::Image { have, expected });
            }
            let op = SpdKvOp { kind: KV_IMPORT, dst_block: block.0, ..SpdKvOp::default() };
            self.queue.kv(&self.pool, &[op], image)?;
        }
        Ok(())
    }

    /// Copies a block's latent plane for the slow tier; the job writes it there.
    ///
    /// # Errors
    /// The device's failure, or that there is no slow tier.
    pub(crate) fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<WriteJob, ExecutorError> {
        let area = Arc::clone(self.area()?);
        let latent = usize::try_from(self.pool.info().image_latent_offset).unwrap_or(usize::MAX);
        let (image, _) = self.export(&[block])?;
        Ok(Box::new(move || area.write(block.0, tag, image.get(latent..).unwrap_or_default())))
    }

    /// Reads a block's latent plane in the slow tier from now on, and gives its memory back.
    ///
    /// # Errors
    /// The device's failure, or that there is no slow tier.
    pub(crate) fn relocate(&mut self, block: BlockId, tag: u64) -> Result<(), ExecutorError> {
        let slow_offset = self.area()?.offset_of(block.0);
        let op = SpdKvOp { kind: KV_TO_SLOW, dst_block: block.0, slow_offset, tag, ..SpdKvOp::default() };
        Ok(self.queue.kv(&self.pool, &[op], &mut [])?)
    }

    /// Has the cache of rows in the slow tier take so many bytes at most. A plugin that cannot do that keeps its size.
    ///
    /// # Errors
    /// The device's failure.
    pub(crate) fn limit_cache(&mut self, bytes: u64) -> Result<(), ExecutorError> {
        let op = SpdKvOp { kind: KV_LIMIT_CACHE, cache_bytes: bytes, ..SpdKvOp::default() };
        match self.queue.kv(&self.pool, &[op], &mut []) {
            // One of an older minor does not know the field.
            Err(error) if error.is_unsupported() || error.status() == Some(E_ABI) => {
                log::debug!(reason:% = error; "the cache of slow rows keeps its size");
                Ok(())
            }
            done => Ok(done?),
        }
    }

    fn area(&self) -> Result<&Arc<SlowArea>, ExecutorError> {
        let none = || BackendError::Slow { reason: "the pool was made without one".to_owned() };
        Ok(self.slow.as_ref().ok_or_else(none)?)
    }

    /// Bytes of a block's host image.
    fn image_bytes(&self) -> Result<usize, ExecutorError> {
        let have = self.pool.info().image_bytes;
        let expected = self.program.kv.bytes_per_token()? * u64::from(BLOCK_TOKENS);
        usize::try_from(have).ok().filter(|_| have == expected).ok_or(ExecutorError::Image { have, expected })
    }
}

/// Makes room for `length` bytes, whose content does not stay.
fn grow(arena: &mut Arena, backend: &Backend, length: usize) {
    if arena.as_bytes().len() < length {
        *arena = backend.arena(length);
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}

fn integers(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().map(|chunk| i32::from_le_bytes(*chunk)).collect()
}
