//! How does a tool step through sequences that need no scheduler? They have a model's whole KV pool to themselves, and
//! go on together.

use crate::batch::{Batch, Rows};
use crate::executor::{DeviceModel, ExecutorError, Outputs};
use sparsed_abi::{KV_COPY, SpdKvOp};
use sparsed_kv::{BLOCK_TOKENS, BlockId, BlockTable, Pool};
use sparsed_model::{KvShape, LayerRows};

/// Sequences of one length that have a [`DeviceModel`]'s whole KV pool to themselves, for tools that need no scheduler.
#[derive(Debug)]
pub struct Lockstep {
    blocks: Pool,
    tables: Vec<BlockTable>,
    batch: Batch,
    slots: Vec<u64>,
}

impl Lockstep {
    /// Some empty sequences, one or more. Older ones of the same model must not be stepped any more.
    ///
    /// # Panics
    /// Without a sequence.
    pub fn new(device: &DeviceModel, sequences: usize) -> Self {
        assert!(sequences > 0, "one sequence or more");
        let tables = (0..sequences).map(|_| BlockTable::new()).collect();
        Self { blocks: Pool::new(device.n_blocks()), tables, batch: Batch::default(), slots: Vec::new() }
    }

    /// How many sequences there are.
    pub fn n_sequences(&self) -> usize {
        self.tables.len()
    }

    /// Tokens in the cache, of each sequence.
    pub fn n_tokens(&self) -> u32 {
        self.tables[0].n_tokens()
    }

    /// Forgets all tokens of each sequence from `n_tokens` on. Their rows stay until others are written over them.
    ///
    /// # Panics
    /// When the sequences have fewer tokens.
    pub fn truncate(&mut self, n_tokens: u32) {
        for table in &mut self.tables {
            table.truncate(n_tokens, &mut self.blocks, &mut Vec::new());
        }
    }

    /// Appends `tokens`, `[sequence][token]`, and gives out the logits of each sequence's `rows`, one after another.
    ///
    /// # Errors
    /// A step that is too large, a pool that is full, or the device's failure. Only the second leaves the sequences
    /// apart from each other: nothing but cutting them to a common length is of use then.
    ///
    /// # Panics
    /// When there is no token for each sequence, or more for some.
    pub fn step(&mut self, device: &mut DeviceModel, tokens: &[u32], rows: Rows) -> Result<Outputs, ExecutorError> {
        let (max, sequences) = (device.options.max_step_tokens, self.tables.len());
        let count = u32::try_from(tokens.len()).ok().filter(|&n| n <= max);
        let count = count.ok_or(ExecutorError::StepTooLarge { have: tokens.len(), max })? as usize;
        assert!(count > 0 && count.is_multiple_of(sequences), "{count} tokens for {sequences} sequences");
        self.batch.clear();
        for (table, tokens) in self.tables.iter_mut().zip(tokens.chunks_exact(count / sequences)) {
            append(&mut self.blocks, table, tokens.len(), &mut self.slots)?;
            self.batch.push(tokens, &self.slots, table, rows);
        }
        device.run(&self.batch)
    }

    /// Appends `n_tokens` without computing them: their rows are copies of those that are there, from the first on. For
    /// measurements at depths that would take long to read; what is computed from such rows means nothing.
    ///
    /// # Errors
    /// A pool that is full, or the device's failure.
    ///
    /// # Panics
    /// When the sequences are not whole blocks, or empty.
    pub fn repeat(&mut self, device: &mut DeviceModel, n_tokens: u32) -> Result<(), ExecutorError> {
        assert!(self.n_tokens() > 0 && self.n_tokens().is_multiple_of(BLOCK_TOKENS), "whole blocks to copy");
        let mut copies = Vec::new();
        for table in &mut self.tables {
            let sources = table.blocks().to_vec();
            append(&mut self.blocks, table, n_tokens as usize, &mut self.slots)?;
            let pairs = sources.iter().cycle().zip(&table.blocks()[sources.len()..]);
            copies.extend(pairs.map(|(from, to): (&BlockId, &BlockId)| SpdKvOp {
                kind: KV_COPY,
                src_block: from.0,
                dst_block: to.0,
                n_tokens: BLOCK_TOKENS,
                ..SpdKvOp::default()
            }));
        }
        Ok(device.queue.kv(&device.pool, &copies, &mut [])?)
    }

    /// Copies what the cache holds of the first sequence out of the device: as many bytes again as it takes there.
    ///
    /// # Errors
    /// The device's failure.
    pub fn export(&self, device: &mut DeviceModel) -> Result<CachedRows, ExecutorError> {
        let (images, image_bytes) = device.export(self.tables[0].blocks())?;
        Ok(CachedRows { shape: device.program.kv, n_tokens: self.n_tokens() as usize, images, image_bytes })
    }
}

/// Gives `table` the `slots` of `n` tokens more.
fn append(blocks: &mut Pool, table: &mut BlockTable, n: usize, slots: &mut Vec<u64>) -> Result<(), ExecutorError> {
    let n = u32::try_from(n).unwrap_or(u32::MAX);
    // Nothing is sealed here, so nothing can have to go for it.
    let mut reservation = blocks.reserve(table.blocks_needed(n), &mut Vec::new())?;
    slots.clear();
    table.append(n, blocks, &mut reservation, slots);
    blocks.forfeit(reservation);
    Ok(())
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
    /// Blocks as they came, of all layers, with the indexer's keys; of the last one some rows may be nothing's.
    pub fn images(&self) -> impl Iterator<Item = &[u8]> {
        self.images.chunks_exact(self.image_bytes)
    }

    /// The rows of one layer.
    ///
    /// # Errors
    /// A layer that is not there.
    pub fn layer(&self, layer: u32) -> Result<LayerRows, ExecutorError> {
        let (mut rows, block) = (LayerRows::default(), BLOCK_TOKENS as usize);
        for (first, image) in (0..self.n_tokens).step_by(block).zip(self.images()) {
            let n_tokens = block.min(self.n_tokens - first);
            self.shape.decode_image(image, block, layer, n_tokens, &mut rows)?;
        }
        Ok(rows)
    }
}
