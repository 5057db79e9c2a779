//! Which slot does each token of a sequence have?
//!
//! A table holds a sequence's blocks, the first block first, all full but the last. It never takes a block by itself:
//! who appends has reserved the blocks before.

use crate::{BLOCK_TOKENS, BlockHash, BlockId, Pool, Released, Reservation, blocks_for};

/// The blocks of one sequence in order.
///
/// The blocks belong to the pool they came from: give them back with [`BlockTable::truncate`] before dropping the
/// table, or they stay held.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    n_tokens: u32,
    stays_fast: bool,
}

impl BlockTable {
    /// A table without tokens.
    pub const fn new() -> Self {
        Self { blocks: Vec::new(), n_tokens: 0, stays_fast: false }
    }

    /// Notes that its owner may not be slow: its blocks are to stay in fast memory, as far as they are there.
    ///
    /// # Panics
    /// When the table has blocks.
    pub fn stay_fast(&mut self) {
        assert!(self.blocks.is_empty(), "whether a table stays fast is known before it has blocks");
        self.stays_fast = true;
    }

    /// The blocks, the first tokens' first.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens that have a slot.
    pub fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Makes the list as long as `n_tokens` tokens will need it.
    pub fn expect(&mut self, n_tokens: u32) {
        self.blocks.reserve_exact((blocks_for(n_tokens) as usize).saturating_sub(self.blocks.len()));
    }

    /// New blocks that `n_tokens` more tokens need.
    ///
    /// # Panics
    /// When the sequence would pass 2^32 tokens.
    pub fn blocks_needed(&self, n_tokens: u32) -> u32 {
        blocks_for(self.after(n_tokens)) - self.n_blocks()
    }

    /// Gives `n_tokens` more tokens their slots, in order, pushed onto `slots`; new blocks come from `reservation`.
    ///
    /// # Panics
    /// When the reservation is too small, or the last block is shared or sealed (a writer must own it alone).
    pub fn append(&mut self, n_tokens: u32, pool: &mut Pool, reservation: &mut Reservation, slots: &mut Vec<u64>) {
        let end = self.after(n_tokens);
        if let Some(&last) = self.blocks.last()
            && !self.n_tokens.is_multiple_of(BLOCK_TOKENS)
            && n_tokens > 0
        {
            assert!(pool.ref_count(last) == 1, "block {} is shared and cannot be written", last.0);
            assert!(!pool.is_sealed(last), "block {} is sealed and cannot be written", last.0);
        }
        for token in self.n_tokens..end {
            let offset = token % BLOCK_TOKENS;
            if offset == 0 {
                let block = pool.acquire(reservation);
                self.blocks.push(block);
                if self.stays_fast {
                    pool.places_mut().stay(block);
                }
            }
            let block = self.blocks.last().expect("a token past the start has a block");
            slots.push(block.slot(offset));
        }
        self.n_tokens = end;
        self.assert_shape();
    }

    /// Takes the longest known beginning of a sequence from the pool: for a table whose blocks are all full, what comes
    /// behind them. Answers its tokens.
    ///
    /// # Panics
    /// When the table's last block is not full.
    pub fn adopt(&mut self, hashes: &[BlockHash], pool: &mut Pool) -> u32 {
        assert!(self.n_tokens.is_multiple_of(BLOCK_TOKENS), "a beginning is adopted in whole blocks");
        let n_before = self.blocks.len();
        self.blocks.extend(hashes.iter().skip(n_before).map_while(|&hash| pool.share(hash)));
        if self.stays_fast {
            self.blocks[n_before..].iter().for_each(|&block| pool.places_mut().stay(block));
        }
        self.n_tokens = self.n_blocks() * BLOCK_TOKENS;
        self.assert_shape();
        self.n_tokens
    }

    /// Tells the pool what the blocks from `first` on contain that have one of the table's `hashes`, and whose they
    /// are; their rows are computed.
    ///
    /// # Panics
    /// When there are fewer hashes than `first`, or more than full blocks.
    pub fn seal(&self, first: usize, hashes: &[BlockHash], owner: u64, pool: &mut Pool) {
        let n_full = (self.n_tokens / BLOCK_TOKENS) as usize;
        assert!(hashes.len() <= n_full, "{} hashes of {n_full} full blocks", hashes.len());
        for (&block, &hash) in self.blocks[first..].iter().zip(&hashes[first..]) {
            pool.seal(block, hash, owner);
        }
    }

    /// Forgets all tokens from `n_tokens` on; blocks that nobody else holds go to `freed`, to be discarded.
    ///
    /// # Panics
    /// When the table has fewer tokens.
    pub fn truncate(&mut self, n_tokens: u32, pool: &mut Pool, freed: &mut Vec<BlockId>) {
        assert!(n_tokens <= self.n_tokens, "{} tokens cannot be cut to {n_tokens}", self.n_tokens);
        // The last first: of what is kept, the end of a sequence goes before its beginning.
        for block in self.blocks.drain(blocks_for(n_tokens) as usize..).rev() {
            if self.stays_fast {
                pool.places_mut().go(block);
            }
            if pool.release(block) == Released::Freed {
                freed.push(block);
            }
        }
        self.n_tokens = n_tokens;
        self.assert_shape();
    }

    fn after(&self, n_tokens: u32) -> u32 {
        self.n_tokens.checked_add(n_tokens).expect("a sequence has fewer than 2^32 tokens")
    }

    fn n_blocks(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("fewer blocks than tokens")
    }

    fn assert_shape(&self) {
        assert!(self.blocks.len() == blocks_for(self.n_tokens) as usize, "the table's blocks do not fit its tokens");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn append(table: &mut BlockTable, n_tokens: u32, pool: &mut Pool) -> Vec<u64> {
        let mut slots = Vec::new();
        let mut reservation = pool.reserve(table.blocks_needed(n_tokens), &mut Vec::new()).unwrap();
        table.append(n_tokens, pool, &mut reservation, &mut slots);
        assert_eq!(reservation.n_blocks(), 0, "blocks_needed asks for too much");
        pool.forfeit(reservation);
        slots
    }

    #[test]
    fn slots_run_on_across_blocks() {
        let mut pool = Pool::new(2);
        let mut table = BlockTable::new();
        assert_eq!(append(&mut table, 63, &mut pool), (0..63).collect::<Vec<_>>());
        assert_eq!(append(&mut table, 2, &mut pool), [63, 64]);
        assert_eq!(table.blocks(), [BlockId(0), BlockId(1)]);
    }

    #[test]
    fn a_cut_frees_whole_blocks_only() {
        let (mut pool, mut freed) = (Pool::new(3), Vec::new());
        let mut table = BlockTable::new();
        append(&mut table, 130, &mut pool);
        table.truncate(65, &mut pool, &mut freed);
        assert_eq!((freed.as_slice(), pool.n_used()), (&[BlockId(2)][..], 2));
        table.truncate(0, &mut pool, &mut freed);
        assert_eq!(pool.n_used(), 0);
    }

    #[test]
    fn a_shared_block_is_kept_by_its_other_holder() {
        let (mut pool, mut freed) = (Pool::new(1), Vec::new());
        let mut table = BlockTable::new();
        append(&mut table, 64, &mut pool);
        pool.retain(BlockId(0));
        table.truncate(0, &mut pool, &mut freed);
        assert!(freed.is_empty());
        assert_eq!(pool.n_used(), 1);
    }

    #[test]
    #[should_panic(expected = "is shared and cannot be written")]
    fn nobody_writes_into_a_shared_block() {
        let mut pool = Pool::new(1);
        let mut table = BlockTable::new();
        append(&mut table, 10, &mut pool);
        pool.retain(BlockId(0));
        append(&mut table, 1, &mut pool);
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        /// The model of a table is the list of its slots.
        #[test]
        fn tables_agree_with_plain_lists_of_slots(
            verbs in prop::collection::vec((0..4_usize, any::<bool>(), 0..200_u32), 0..100),
        ) {
            let mut pool = Pool::new(16);
            let mut tables: [BlockTable; 4] = std::array::from_fn(|_| BlockTable::new());
            let mut lists: [Vec<u64>; 4] = Default::default();
            let mut freed = Vec::new();
            for (which, grow, n) in verbs {
                let (table, list) = (&mut tables[which], &mut lists[which]);
                if grow && table.blocks_needed(n) <= pool.n_available() {
                    list.extend(append(table, n, &mut pool));
                } else if !grow {
                    list.truncate(n as usize);
                    table.truncate(n.min(table.n_tokens()), &mut pool, &mut freed);
                }
                prop_assert_eq!(table.n_tokens() as usize, list.len());
                for (position, &slot) in list.iter().enumerate() {
                    let block = table.blocks()[position / BLOCK_TOKENS as usize];
                    prop_assert_eq!(block.slot(u32::try_from(position).unwrap() % BLOCK_TOKENS), slot);
                }
                let slots: BTreeSet<_> = lists.iter().flatten().collect();
                prop_assert_eq!(slots.len(), lists.iter().map(Vec::len).sum::<usize>(), "a slot has two tokens");
                prop_assert_eq!(pool.n_used() as usize, tables.iter().map(|t| t.blocks().len()).sum::<usize>());
            }
            for table in &mut tables {
                table.truncate(0, &mut pool, &mut freed);
            }
            prop_assert_eq!(pool.n_available(), 16);
        }
    }
}
