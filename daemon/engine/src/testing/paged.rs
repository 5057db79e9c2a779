//! A "model" that reads its whole history back through the block tables, on a device and a disk that fail as planted.

use super::{BLOCK, VOCAB};
use crate::attempt::Executor;
use crate::batch::Batch;
use crate::executor::{ExecutorError, Outputs};
use crate::warm::{ReclaimJob, WriteJob};
use sparsed_abi::{E_DATA, E_QUEUE_LOST, E_STEP, SpdStatus};
use sparsed_backend::BackendError;
use sparsed_kv::BlockId;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

/// A "model" whose next token is a function of the whole history, which it reads back through the block tables:
/// a block that is lost, shared by mistake or not rewritten shows in the answer.
#[derive(Default)]
pub(crate) struct Paged {
    /// Token and position of each slot.
    pub(crate) rows: HashMap<u64, (u32, u32)>,
    /// Statuses of the next runs, the last one first; 0 is none.
    pub(crate) failures: Vec<SpdStatus>,
    /// A token that no step with it survives.
    pub(crate) poison: Option<u32>,
    /// A token after which the logits are no numbers, how often.
    pub(crate) not_a_number: Option<(u32, usize)>,
    /// Since a queue was lost, until there is a new one.
    pub(crate) poisoned: bool,
    /// Answers when it is examined, the last one first; with none left it proves to be of no use.
    pub(crate) patience: Vec<bool>,
    pub(crate) examined: usize,
    pub(crate) runs: usize,
    pub(crate) computed: usize,
    pub(crate) exported: usize,
    /// Blocks that are read in the slow tier, with their tags.
    pub(crate) slow: HashMap<u32, u64>,
    /// Discarded blocks that the slow tier has still.
    pub(crate) left: Vec<BlockId>,
    pub(crate) disk: Disk,
    /// What the cache of slow rows was to take.
    pub(crate) cache_limits: Vec<u64>,
    /// Statuses of the next imports, the last one first.
    pub(crate) import_failures: Vec<SpdStatus>,
    /// Statuses of the next exports, the last one first.
    pub(crate) export_failures: Vec<SpdStatus>,
}

/// The slow tier, by block.
#[derive(Clone, Default)]
pub(crate) struct Disk(pub(crate) Arc<Mutex<HashMap<u32, SlowBlock>>>);

/// Tag and rows (token and position) of a block.
pub(crate) type SlowBlock = (u64, Vec<(u32, u32)>);

impl Paged {
    /// Token and position of a slot, wherever its block is.
    fn row(&self, slot: u64) -> Result<(u32, u32), ExecutorError> {
        let block = u32::try_from(slot / BLOCK as u64).unwrap();
        let Some(tag) = self.slow.get(&block) else { return Ok(self.rows[&slot]) };
        let disk = self.disk.0.lock().unwrap();
        let Some((_, rows)) = disk.get(&block).filter(|(found, _)| found == tag) else {
            let (call, message) = ("queue_run", "a bad page".to_owned());
            let (status, op_index, block, vendor_code) = (E_DATA, None, Some(block), 0);
            return Err(BackendError::Call { call, status, message, op_index, block, vendor_code }.into());
        };
        Ok(rows[usize::try_from(slot).unwrap() % BLOCK])
    }

    /// Blocks that take room in the slow tier.
    pub(crate) fn blocks_on_disk(&self) -> BTreeSet<u32> {
        self.disk.0.lock().unwrap().keys().copied().collect()
    }

    fn block_rows(&self, block: BlockId) -> Result<Vec<(u32, u32)>, ExecutorError> {
        (0..64).map(|offset| self.row(block.slot(offset))).collect()
    }
}

fn failed(call: &'static str, status: SpdStatus) -> ExecutorError {
    ExecutorError::Backend(BackendError::refused(call, status, "planted".to_owned()))
}

pub(crate) fn next_token(history: impl Iterator<Item = u32>) -> u32 {
    history.fold(7u32, |hash, token| (hash.wrapping_mul(31) ^ token) % 1_000_003) % VOCAB as u32
}

impl Executor for Paged {
    fn run(&mut self, batch: &Batch) -> Result<Outputs, ExecutorError> {
        self.runs += 1;
        self.computed += batch.n_tokens();
        let planted = self.failures.pop().filter(|&status| status != 0);
        let poison = self.poison.is_some_and(|token| batch.tokens.contains(&token)).then_some(E_STEP);
        let poisoned = self.poisoned.then_some(E_QUEUE_LOST);
        if let Some(status) = poisoned.or(planted).or(poison) {
            self.poisoned |= status == E_QUEUE_LOST;
            return Err(failed("queue_run", status));
        }
        for ((&slot, &token), &position) in batch.slots.iter().zip(&batch.tokens).zip(&batch.positions) {
            self.rows.insert(slot, (token, position));
        }
        let mut logits = vec![0.0; batch.rows.len() * VOCAB];
        for (row, logits) in batch.rows.iter().zip(logits.chunks_exact_mut(VOCAB)) {
            let sequence = batch.seq_offsets.iter().rposition(|&start| start <= *row).unwrap();
            let blocks = batch.block_offsets[sequence] as usize..batch.block_offsets[sequence + 1] as usize;
            let blocks = &batch.block_ids[blocks];
            let mut history = Vec::new();
            for position in 0..=batch.positions[*row as usize] {
                let slot = u64::from(blocks[position as usize / BLOCK]) * BLOCK as u64 + u64::from(position) % 64;
                let (token, written_at) = self.row(slot)?;
                assert_eq!(written_at, position, "the slot holds another position");
                history.push(token);
            }
            logits[next_token(history.into_iter()) as usize] = 1.0;
            if let Some((token, times)) = &mut self.not_a_number
                && *times > 0
                && batch.tokens[*row as usize] == *token
            {
                *times -= 1;
                logits[0] = f32::NAN;
            }
        }
        Ok(Outputs { logits, ..Outputs::default() })
    }

    fn discard(&mut self, blocks: &[BlockId]) -> Result<(), ExecutorError> {
        self.rows.retain(|slot, _| !blocks.iter().any(|block| u64::from(block.0) == slot / BLOCK as u64));
        self.slow.retain(|slow, _| !blocks.contains(&BlockId(*slow)));
        let disk = self.disk.0.lock().unwrap();
        self.left.extend(blocks.iter().filter(|block| disk.contains_key(&block.0)));
        Ok(())
    }

    fn renew_queue(&mut self) -> Result<(), ExecutorError> {
        self.poisoned = false;
        Ok(())
    }

    fn examine(&mut self, _is_call: bool) -> Result<bool, ExecutorError> {
        self.examined += 1;
        match self.patience.pop() {
            Some(left) => Ok(left),
            None => Err(ExecutorError::Unfit { reason: "planted".to_owned() }),
        }
    }

    fn export(&mut self, block: BlockId) -> Result<Vec<u8>, ExecutorError> {
        if let Some(status) = self.export_failures.pop() {
            return Err(failed("queue_kv", status));
        }
        self.exported += 1;
        let rows = self.block_rows(block)?.into_iter();
        Ok(rows.flat_map(|(token, position)| [token.to_le_bytes(), position.to_le_bytes()].concat()).collect())
    }

    fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<WriteJob, ExecutorError> {
        let (disk, rows) = (self.disk.clone(), self.block_rows(block)?);
        Ok(Box::new(move || {
            disk.0.lock().unwrap().insert(block.0, (tag, rows));
            Ok(())
        }))
    }

    /// As the contract has it: pages are looked at when rows are read, not before.
    fn relocate(&mut self, block: BlockId, tag: u64) -> Result<(), ExecutorError> {
        self.rows.retain(|slot, _| u64::from(block.0) != slot / BLOCK as u64);
        self.slow.insert(block.0, tag);
        Ok(())
    }

    fn limit_cache(&mut self, bytes: u64) -> Result<(), ExecutorError> {
        self.cache_limits.push(bytes);
        Ok(())
    }

    fn reclaim(&mut self) -> Option<ReclaimJob> {
        if self.left.is_empty() {
            return None;
        }
        let (disk, left) = (self.disk.clone(), std::mem::take(&mut self.left));
        Some(Box::new(move || {
            left.iter().for_each(|block| drop(disk.0.lock().unwrap().remove(&block.0)));
            Ok(())
        }))
    }

    fn import(&mut self, blocks: &[BlockId], images: &mut [Vec<u8>]) -> Result<(), ExecutorError> {
        if let Some(status) = self.import_failures.pop() {
            return Err(failed("queue_kv", status));
        }
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        for (block, image) in blocks.iter().zip(images) {
            for (offset, row) in (0..).zip(image.chunks_exact(8)) {
                assert!(!self.rows.contains_key(&block.slot(offset)), "a block was filled before it was discarded");
                self.rows.insert(block.slot(offset), (number(&row[..4]), number(&row[4..])));
            }
        }
        Ok(())
    }
}
