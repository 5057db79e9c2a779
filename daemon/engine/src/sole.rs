//! How does a tool step through one sequence that needs no scheduler? It has a model's whole KV pool to itself.

use crate::batch::{Batch, Rows};
use crate::executor::{DeviceModel, ExecutorError, Outputs};
use sparsed_abi::{KV_COPY, SpdKvOp};
use sparsed_kv::{BLOCK_TOKENS, BlockId, BlockTable, Pool};
use sparsed_model::{KvShape, LayerRows};

/// One sequence that has a [`DeviceModel`]'s whole KV pool to itself, for tools that need no scheduler.
#[derive(Debug)]
pub struct SoleSequence {
    blocks: Pool,
    table: BlockTable,
    batch: Batch,
    slots: Vec<u64>,
}

impl SoleSequence {
    /// A new, empty sequence. An older one of the same model must not be stepped any more.
    pub fn new(device: &DeviceModel) -> Self {
        let blocks = Pool::new(device.n_blocks());
        Self { blocks, table: BlockTable::new(), batch: Batch::default(), slots: Vec::new() }
    }

    /// Tokens in the cache.
    pub fn n_tokens(&self) -> u32 {
        self.table.n_tokens()
    }

    /// Forgets all tokens from `n_tokens` on. Their rows stay until others are written over them.
    ///
    /// # Panics
    /// When the sequence has fewer tokens.
    pub fn truncate(&mut self, n_tokens: u32) {
        self.table.truncate(n_tokens, &mut self.blocks, &mut Vec::new());
    }

    /// Appends `tokens` and gives out the logits of `rows`.
    ///
    /// # Errors
    /// A step that is too large, a pool that is full, or the device's failure.
    pub fn step(&mut self, device: &mut DeviceModel, tokens: &[u32], rows: Rows) -> Result<Outputs, ExecutorError> {
        let max = device.options.max_step_tokens;
        let count = u32::try_from(tokens.len()).ok().filter(|&n| n <= max);
        let count = count.ok_or(ExecutorError::StepTooLarge { have: tokens.len(), max })?;
        // Nothing is sealed here, so nothing can have to go for it.
        let mut reservation = self.blocks.reserve(self.table.blocks_needed(count), &mut Vec::new())?;
        self.slots.clear();
        self.table.append(count, &mut self.blocks, &mut reservation, &mut self.slots);
        self.blocks.forfeit(reservation);
        self.batch.clear();
        self.batch.push(tokens, &self.slots, &self.table, rows);
        device.run(&self.batch)
    }

    /// Appends `n_tokens` without computing them: their rows are copies of those that are there, from the first on. For
    /// measurements at depths that would take long to read; what is computed from such rows means nothing.
    ///
    /// # Errors
    /// A pool that is full, or the device's failure.
    ///
    /// # Panics
    /// When the sequence is not whole blocks, or empty.
    pub fn repeat(&mut self, device: &mut DeviceModel, n_tokens: u32) -> Result<(), ExecutorError> {
        assert!(self.n_tokens() > 0 && self.n_tokens().is_multiple_of(BLOCK_TOKENS), "whole blocks to copy");
        let mut reservation = self.blocks.reserve(self.table.blocks_needed(n_tokens), &mut Vec::new())?;
        let sources = self.table.blocks().to_vec();
        self.slots.clear();
        self.table.append(n_tokens, &mut self.blocks, &mut reservation, &mut self.slots);
        self.blocks.forfeit(reservation);
        let copies = sources.iter().cycle().zip(&self.table.blocks()[sources.len()..]);
        let copy = |(from, to): (&BlockId, &BlockId)| SpdKvOp {
            kind: KV_COPY,
            src_block: from.0,
            dst_block: to.0,
            n_tokens: BLOCK_TOKENS,
            ..SpdKvOp::default()
        };
        Ok(device.queue.kv(&device.pool, &copies.map(copy).collect::<Vec<_>>(), &mut [])?)
    }

    /// Copies what the cache holds of the sequence out of the device: as many bytes again as it takes there.
    ///
    /// # Errors
    /// The device's failure.
    pub fn export(&self, device: &mut DeviceModel) -> Result<CachedRows, ExecutorError> {
        let (images, image_bytes) = device.export(self.table.blocks())?;
        Ok(CachedRows { shape: device.program.kv, n_tokens: self.table.n_tokens() as usize, images, image_bytes })
    }
}

/// The rows of a sequence, copied out of its device.
#[derive(Debug)]
pub struct CachedRows {
    shape: KvShape,
    n_tokens: usize,
    /// Of each block, the first tokens' first.
    images: Vec<u8>,
    image_bytes: usize,
}

impl CachedRows {
    /// The rows of one layer.
    ///
    /// # Errors
    /// A layer that is not there.
    pub fn layer(&self, layer: u32) -> Result<LayerRows, ExecutorError> {
        let (mut rows, block) = (LayerRows::default(), BLOCK_TOKENS as usize);
        for (first, image) in (0..self.n_tokens).step_by(block).zip(self.images.chunks_exact(self.image_bytes)) {
            let n_tokens = block.min(self.n_tokens - first);
            self.shape.decode_image(image, block, layer, n_tokens, &mut rows)?;
        }
        Ok(rows)
    }
}
