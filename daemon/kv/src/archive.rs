//! Which blocks are still to be written into their session's file?
//!
//! A full block of a session is written once. Until its image is out of the device the archive holds the block, so its
//! place cannot be taken; then the block goes its own way. Somebody else copies and writes: [`Archive::next_save`] is
//! the order, [`Archive::copied`] and [`Archive::written`] are what became of it. So that images in memory stay few,
//! only some are under way at a time.
//!
//! Saving is a courtesy: where the pool runs short, blocks that still wait are let go of unsaved, and their rows are
//! computed again from the tokens should they be needed.

use crate::{BlockId, Pool, Released};
use std::collections::VecDeque;

/// A session's file, numbered by whoever keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub u64);

/// The order to write a block's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the block is held until it is copied"]
pub struct Save {
    /// Where to.
    pub file: FileId,
    /// Counts the blocks of the session from 0.
    pub index: u32,
    /// The block of the pool.
    pub block: BlockId,
}

/// Blocks that wait to be saved, the oldest order first.
#[derive(Debug)]
pub struct Archive {
    waiting: VecDeque<Save>,
    /// Images that were handed out and are not written yet.
    n_under_way: u32,
    under_way_max: u32,
}

impl Archive {
    /// An archive that hands out at most `under_way_max` images before the first is written.
    pub fn new(under_way_max: u32) -> Self {
        Self { waiting: VecDeque::new(), n_under_way: 0, under_way_max }
    }

    /// Orders blocks `first ..` of a session to be saved. Each must be sealed, and held by the caller.
    pub fn save(&mut self, file: FileId, first: u32, blocks: &[BlockId], pool: &mut Pool) {
        for (index, &block) in (first..).zip(blocks) {
            pool.retain(block);
            self.waiting.push_back(Save { file, index, block });
        }
    }

    /// Whether [`next_save`](Self::next_save) has an order.
    pub fn is_ready(&self) -> bool {
        !self.waiting.is_empty() && self.n_under_way < self.under_way_max
    }

    /// Blocks that wait, each held once for it.
    pub fn waiting(&self) -> impl Iterator<Item = BlockId> {
        self.waiting.iter().map(|save| save.block)
    }

    /// Whether anything waits or is under way.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.n_under_way == 0
    }

    /// The next block to copy; to be followed by [`copied`](Self::copied).
    pub fn next_save(&mut self) -> Option<Save> {
        if !self.is_ready() {
            return None;
        }
        self.n_under_way += 1;
        self.waiting.pop_front()
    }

    /// The block's image is out of the device, or could not be had.
    pub fn copied(&mut self, save: Save, pool: &mut Pool, freed: &mut Vec<BlockId>) {
        let_go(save, pool, freed);
    }

    /// An image that was handed out is written, or cannot be.
    ///
    /// # Panics
    /// When none is under way.
    pub fn written(&mut self) {
        assert!(self.n_under_way > 0, "an image was written that nobody handed out");
        self.n_under_way -= 1;
    }

    /// Lets go of all blocks that still wait, unsaved. Answers whether there were any.
    pub fn give_up(&mut self, pool: &mut Pool, freed: &mut Vec<BlockId>) -> bool {
        let any = !self.waiting.is_empty();
        for save in self.waiting.drain(..) {
            let_go(save, pool, freed);
        }
        any
    }

    /// The pool's content is lost: nothing waits any more. Images that are under way stay so.
    pub fn forget(&mut self) {
        self.waiting.clear();
    }
}

fn let_go(save: Save, pool: &mut Pool, freed: &mut Vec<BlockId>) {
    if pool.release(save.block) == Released::Freed {
        freed.push(save.block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockTable, PrefixHasher, Realm};

    /// A pool and a table with `n` full, sealed blocks.
    fn session(n: u32) -> (Pool, BlockTable) {
        let (mut pool, mut table, mut hashes) = (Pool::new(n), BlockTable::new(), Vec::new());
        let tokens: Vec<u32> = (0..n * 64).collect();
        let mut reservation = pool.reserve(n, &mut Vec::new()).unwrap();
        table.append(n * 64, &mut pool, &mut reservation, &mut Vec::new());
        pool.forfeit(reservation);
        PrefixHasher::new([1; 32]).extend(Realm::new(1, None), &tokens, &mut hashes);
        table.seal(0, &hashes, 1, &mut pool);
        (pool, table)
    }

    #[test]
    fn a_block_that_waits_to_be_saved_keeps_its_place() {
        let (mut pool, mut table) = session(3);
        let (mut archive, mut freed) = (Archive::new(8), Vec::new());
        archive.save(FileId(7), 1, &table.blocks()[1..], &mut pool);
        table.truncate(0, &mut pool, &mut freed);
        assert_eq!((pool.n_used(), pool.n_kept()), (2, 1));
        let save = archive.next_save().unwrap();
        assert_eq!((save.file, save.index), (FileId(7), 1));
        archive.copied(save, &mut pool, &mut freed);
        assert_eq!((pool.n_used(), pool.n_kept()), (1, 2));
        assert!(archive.give_up(&mut pool, &mut freed) && !archive.give_up(&mut pool, &mut freed));
        assert_eq!((pool.n_used(), pool.n_kept(), freed.len()), (0, 3, 0));
    }

    #[test]
    fn few_images_are_under_way_at_a_time() {
        let (mut pool, table) = session(3);
        let mut archive = Archive::new(2);
        archive.save(FileId(1), 0, table.blocks(), &mut pool);
        for _ in 0..2 {
            let save = archive.next_save().unwrap();
            archive.copied(save, &mut pool, &mut Vec::new());
        }
        assert!(archive.next_save().is_none() && !archive.is_ready());
        archive.written();
        assert!(archive.is_ready());
        let save = archive.next_save().unwrap();
        archive.copied(save, &mut pool, &mut Vec::new());
        (0..2).for_each(|_| archive.written());
        assert!(archive.is_idle());
    }

    #[test]
    #[should_panic(expected = "nobody handed out")]
    fn an_image_too_many_is_caught() {
        Archive::new(1).written();
    }
}
