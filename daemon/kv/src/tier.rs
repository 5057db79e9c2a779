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
    fast_max: u32,
}

impl Places {
    pub(crate) fn new(n_blocks: usize, fast_max: u32) -> Self {
        Self { of: vec![Place::Fast; n_blocks], n_slow: 0, n_slow_kept: 0, fast_max }
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

    fn set(&mut self, block: BlockId, from: Place, to: Place) {
        let place = &mut self.of[block.0 as usize];
        assert!(*place == from, "block {} is {place:?}, not {from:?}", block.0);
        *place = to;
        self.n_slow += u32::from(to == Place::Slow);
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
    use crate::{KvError, PrefixHasher, Realm};

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
