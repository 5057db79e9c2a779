//! Does everybody who holds a block still know of it? For simulations, which ask after every step.

use super::Scheduler;
use sparsed_kv::{BlockId, Place};
use std::collections::HashSet;

impl Scheduler {
    /// Counts the holders of every block anew: sequences that run, the archive, and what moves to the slow tier.
    ///
    /// # Errors
    /// The first block that is held by more or by fewer than the pool counts: it is leaked, or used twice. Or that
    /// others are to stay in fast memory than the pool counts.
    pub(crate) fn audit(&self) -> Result<(), String> {
        let mut holders = vec![0; self.pool.n_blocks() as usize];
        let tables = self.running.iter().flat_map(|sequence| sequence.table.blocks()).copied();
        for block in tables.chain(self.archive.waiting()).chain(self.demotions.blocks()) {
            holders[block.0 as usize] += 1;
        }
        for (block, &known) in (0..).map(BlockId).zip(&holders) {
            let counted = self.pool.ref_count(block);
            if counted != known {
                return Err(format!("block {} has {counted} holders, {known} are known", block.0));
            }
        }
        let stays = |block: &BlockId| self.pool.place(*block) != Place::Slow;
        let stayers = self.running.iter().filter(|sequence| !self.may_be_slow(sequence));
        let staying: HashSet<BlockId> = stayers.flat_map(|one| one.table.blocks()).copied().filter(stays).collect();
        if self.pool.n_staying() as usize != staying.len() {
            return Err(format!("{} blocks are to stay fast, {} are known", self.pool.n_staying(), staying.len()));
        }
        let mut outside = self.queue.waiting().chain(&self.leaving);
        match outside.find(|sequence| !sequence.table.blocks().is_empty()) {
            Some(sequence) => Err(format!("{sequence:?} does not run and has blocks")),
            None => Ok(()),
        }
    }
}
