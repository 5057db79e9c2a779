//! Whose latent plane is in fast memory, and whose in the slow tier?
//!
//! The index plane of a block is always in fast memory. Its latent plane may move to the slow tier once the block is
//! full: attention then reads the rows that it selects from there. Moving takes a while, in which the block is read
//! where it was; it counts as fast until it has moved.

use crate::{BlockId, Pool, Released};

/// Where a block's latent plane is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// In fast memory.
    #[default]
    Fast,
    /// Still there, and being written into the slow tier.
    Leaving,
    /// In the slow tier.
    Slow,
}

/// Counts of a pool whose blocks may be slow.
#[derive(Debug)]
pub(crate) struct Places {
    of: Vec<Place>,
    n_slow: u32,
    /// Of them, those that nobody holds.
    n_slow_kept: u32,
    /// How many tables hold each block that are to stay in fast memory.
    n_stayers: Vec<u32>,
    /// Blocks in fast memory with such a holder.
    n_staying: u32,
    fast_max: u32,
}

impl Places {
    pub(crate) fn new(n_blocks: usize, fast_max: u32) -> Self {
        let (of, n_stayers) = (vec![Place::Fast; n_blocks], vec![0; n_blocks]);
        Self { of, n_slow: 0, n_slow_kept: 0, n_stayers, n_staying: 0, fast_max }
    }

    pub(crate) fn of(&self, block: BlockId) -> Place {
        self.of[block.0 as usize]
    }

    pub(crate) fn fast_max(&self) -> u32 {
        self.fast_max
    }

    pub(crate) fn n_slow(&self) -> u32 {
        self.n_slow
    }

    pub(crate) fn n_slow_kept(&self) -> u32 {
        self.n_slow_kept
    }

    /// A block's content is gone.
    pub(crate) fn freed(&mut self, block: BlockId) {
        if std::mem::take(&mut self.of[block.0 as usize]) == Place::Slow {
            self.n_slow -= 1;
        }
    }

    /// A block's last holder is gone, and it is kept.
    pub(crate) fn kept(&mut self, block: BlockId) {
        self.n_slow_kept += u32::from(self.of(block) == Place::Slow);
    }

    /// A kept block is kept no more: it is held again, or goes.
    pub(crate) fn taken(&mut self, block: BlockId) {
        self.n_slow_kept -= u32::from(self.of(block) == Place::Slow);
    }

    /// A table that is to stay in fast memory holds the block.
    pub(crate) fn stay(&mut self, block: BlockId) {
        let n = &mut self.n_stayers[block.0 as usize];
        *n += 1;
        let is_first = *n == 1;
        self.n_staying += u32::from(is_first && self.of(block) != Place::Slow);
    }

    /// One of them does not hold it any more.
    ///
    /// # Panics
    /// When none did.
    pub(crate) fn go(&mut self, block: BlockId) {
        let n = &mut self.n_stayers[block.0 as usize];
        assert!(*n > 0, "block {} had not to stay for anybody", block.0);
        *n -= 1;
        let was_last = *n == 0;
        self.n_staying -= u32::from(was_last && self.of(block) != Place::Slow);
    }

    fn set(&mut self, block: BlockId, from: Place, to: Place) {
        let place = &mut self.of[block.0 as usize];
        assert!(*place == from, "block {} is {place:?}, not {from:?}", block.0);
        *place = to;
        if to == Place::Slow {
            self.n_slow += 1;
            self.n_staying -= u32::from(self.n_stayers[block.0 as usize] > 0);
        }
    }
}

impl Pool {
    /// Where the block's latent plane is.
    pub fn place(&self, block: BlockId) -> Place {
        self.places().of(block)
    }

    /// Blocks whose latent plane is in the slow tier.
    pub fn n_slow(&self) -> u32 {
        self.places().n_slow()
    }

    /// Blocks whose latent plane is in fast memory, and that a table holds which
    /// [stays there](crate::BlockTable::stay_fast); each counts once, however many do.
    pub fn n_staying(&self) -> u32 {
        self.places().n_staying
    }

    /// Begins to move a held block's latent plane to the slow tier. The block is held until [`Pool::moved`] or
    /// [`Pool::stayed`].
    ///
    /// # Panics
    /// When nobody holds it, or it is not in fast memory.
    pub fn leave(&mut self, block: BlockId) {
        self.retain(block);
        self.places_mut().set(block, Place::Fast, Place::Leaving);
    }

    /// The latent plane is in the slow tier now.
    ///
    /// # Panics
    /// When it was not leaving.
    pub fn moved(&mut self, block: BlockId) -> Released {
        self.places_mut().set(block, Place::Leaving, Place::Slow);
        self.release(block)
    }

    /// The latent plane could not be moved, and is where it was.
    ///
    /// # Panics
    /// When it was not leaving.
    pub fn stayed(&mut self, block: BlockId) -> Released {
        self.places_mut().set(block, Place::Leaving, Place::Fast);
        self.release(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockTable, KvError, PrefixHasher, Realm};

    /// A pool of 8 blocks of which 4 may be fast, and `n` held ones.
    fn pool(n: u32) -> (Pool, Vec<BlockId>) {
        let mut pool = Pool::with_slow_tier(8, 4);
        let mut reservation = pool.reserve(n, &mut Vec::new()).unwrap();
        let blocks = (0..n).map(|_| pool.acquire(&mut reservation)).collect();
        pool.forfeit(reservation);
        (pool, blocks)
    }

    #[test]
    fn more_blocks_than_fast_ones_need_some_to_move() {
        let (mut pool, blocks) = pool(4);
        assert_eq!(pool.reserve(2, &mut Vec::new()).unwrap_err(), KvError::OutOfFast { short: 2, fast_max: 4 });
        for &block in &blocks[..2] {
            pool.leave(block);
        }
        assert!(pool.reserve(2, &mut Vec::new()).is_err(), "they have not moved yet");
        assert_eq!((pool.moved(blocks[0]), pool.stayed(blocks[1])), (Released::Shared, Released::Shared));
        assert_eq!((pool.place(blocks[0]), pool.place(blocks[1])), (Place::Slow, Place::Fast));
        let reservation = pool.reserve(1, &mut Vec::new()).unwrap();
        pool.forfeit(reservation);
        assert_eq!((pool.n_slow(), pool.n_used()), (1, 4));
        assert_eq!(pool.release(blocks[0]), Released::Freed);
        assert_eq!((pool.n_slow(), pool.place(blocks[0])), (0, Place::Fast));
    }

    #[test]
    fn a_block_that_is_let_go_of_while_it_leaves_stays_until_it_has() {
        let (mut pool, blocks) = pool(1);
        pool.leave(blocks[0]);
        assert_eq!(pool.release(blocks[0]), Released::Shared);
        assert_eq!(pool.moved(blocks[0]), Released::Freed);
        assert_eq!((pool.n_slow(), pool.n_available()), (0, 8));
    }

    #[test]
    fn bounds_that_come_down_on_held_blocks_let_planes_move_and_hold_up_nobody_else() {
        let (mut pool, blocks) = pool(4);
        pool.bound(crate::Bounds { fast: 2, ..pool.bounds() });
        assert_eq!(pool.n_fast_beyond(), 2);
        let nothing = pool.reserve(0, &mut Vec::new()).unwrap();
        pool.forfeit(nothing);
        assert_eq!(pool.reserve(1, &mut Vec::new()).unwrap_err(), KvError::OutOfFast { short: 3, fast_max: 2 });
        for &block in &blocks[..3] {
            pool.leave(block);
            assert_eq!(pool.moved(block), Released::Shared);
        }
        let reservation = pool.reserve(1, &mut Vec::new()).unwrap();
        assert_eq!(pool.n_fast_beyond(), 0);
        pool.forfeit(reservation);
    }

    #[test]
    fn a_block_that_several_tables_hold_stays_once_and_not_once_it_is_slow() {
        let (mut pool, mut hashes, mut freed) = (Pool::with_slow_tier(8, 4), Vec::new(), Vec::new());
        PrefixHasher::new([1; 32]).extend(Realm::new(1, None), &(0..128).collect::<Vec<_>>(), &mut hashes);
        let mut tables = [true, true, false].map(|stays| {
            let mut table = BlockTable::new();
            if stays {
                table.stay_fast();
            }
            table
        });
        let mut reservation = pool.reserve(3, &mut freed).unwrap();
        tables[0].append(2 * 64 + 1, &mut pool, &mut reservation, &mut Vec::new());
        pool.forfeit(reservation);
        tables[0].seal(0, &hashes, 1, &mut pool);
        assert_eq!(pool.n_staying(), 3);
        tables[1..].iter_mut().for_each(|table| assert_eq!(table.adopt(&hashes, &mut pool), 128));
        assert_eq!(pool.n_staying(), 3, "two of them by two tables");
        let [first, second] = [0, 1].map(|at| tables[0].blocks()[at]);
        pool.leave(first);
        assert_eq!((pool.n_staying(), pool.moved(first)), (3, Released::Shared));
        assert_eq!((pool.n_staying(), pool.place(second)), (2, Place::Fast));
        tables[0].truncate(0, &mut pool, &mut freed);
        assert_eq!((pool.n_staying(), pool.n_used()), (1, 2));
        tables[1].truncate(0, &mut pool, &mut freed);
        assert_eq!((pool.n_staying(), pool.n_used()), (0, 2), "the last table may be slow");
        tables[2].truncate(0, &mut pool, &mut freed);
        // Kept, and slow as before.
        assert_eq!(tables[0].adopt(&hashes, &mut pool), 128);
        assert_eq!(pool.n_staying(), 1);
        tables[0].truncate(0, &mut pool, &mut freed);
        assert_eq!(pool.n_staying(), 0);
    }

    #[test]
    fn kept_blocks_in_fast_memory_go_before_anybody_has_to_move() {
        let (mut pool, blocks) = pool(4);
        let mut hashes = Vec::new();
        PrefixHasher::new([1; 32]).extend(Realm::new(1, None), &(0..256).collect::<Vec<_>>(), &mut hashes);
        for (&block, &hash) in blocks.iter().zip(&hashes) {
            pool.seal(block, hash, 1);
        }
        pool.leave(blocks[0]);
        assert_eq!(pool.moved(blocks[0]), Released::Shared);
        blocks.iter().for_each(|&block| assert_eq!(pool.release(block), Released::Kept));
        let mut freed = Vec::new();
        let reservation = pool.reserve(3, &mut freed).unwrap();
        assert_eq!(freed, blocks[1..3], "the slow one takes no fast place");
        pool.forfeit(reservation);
        let reservation = pool.reserve(4, &mut freed).unwrap();
        assert_eq!(freed, blocks[1..4]);
        pool.forfeit(reservation);
        assert_eq!(pool.share(hashes[0]), Some(blocks[0]));
        assert_eq!((pool.n_slow(), pool.n_kept()), (1, 0));
    }
}
