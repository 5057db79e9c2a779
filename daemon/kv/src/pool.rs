//! Which blocks are free, and who holds the others?
//!
//! Life of a block: `reserve` promises that it will be there, `acquire` hands it out with a `ref_count` of 1, `forfeit`
//! gives unused promises back, `retain` and `release` count the holders. What was promised cannot run out, so a step
//! that reserved everything first never fails half-way. A block that was sealed is kept when its last holder is gone,
//! until `share` finds it a new one or `reserve` needs its place.
//!
//! Blocks are reused last in, first out: memory that was touched is touched again, and a pool that was never full has
//! never touched its end.

use crate::kept::Which;
use crate::prefix::Prefixes;
use crate::tier::{Place, Places};
use crate::{BlockHash, BlockId, KvError};

/// The blocks of one device pool.
#[derive(Debug)]
pub struct Pool {
    free: Vec<BlockId>, // a stack; the top is handed out next
    ref_counts: Vec<u32>,
    n_reserved: u32,
    prefixes: Prefixes,
    places: Places,
    bounds: Bounds,
}

/// How much of a pool may be in use while memory is short. Held blocks beyond that stay: what is held is never taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Blocks with content at most, held, kept and promised together.
    pub blocks: u32,
    /// Of them, kept blocks at most.
    pub kept: u32,
    /// Latent planes in fast memory at most.
    pub fast: u32,
}

/// A promise of blocks, to be spent with [`Pool::acquire`] and ended with [`Pool::forfeit`].
///
/// # Panics
/// When dropped while it still promises something: those blocks would be lost.
#[derive(Debug)]
#[must_use = "reserved blocks are lost unless acquired or forfeited"]
pub struct Reservation {
    n_blocks: u32,
}

/// What became of a block that was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the content of a freed block has to be discarded on the device"]
pub enum Released {
    /// Nobody holds it now: discard its content before the next step runs.
    Freed,
    /// Nobody holds it now, but its content is known and stays until its place is needed.
    Kept,
    /// Somebody else still holds it.
    Shared,
}

impl Pool {
    /// A pool of `n_blocks` free blocks, the lowest handed out first.
    pub fn new(n_blocks: u32) -> Self {
        Self::with_slow_tier(n_blocks, n_blocks)
    }

    /// As [`new`](Self::new), with at most `fast_max` latent planes in fast memory; the others are in the slow tier.
    pub fn with_slow_tier(n_blocks: u32, fast_max: u32) -> Self {
        Self {
            free: (0..n_blocks).rev().map(BlockId).collect(),
            ref_counts: vec![0; n_blocks as usize],
            n_reserved: 0,
            prefixes: Prefixes::new(n_blocks as usize),
            places: Places::new(n_blocks as usize, fast_max),
            bounds: Bounds { blocks: n_blocks, kept: n_blocks, fast: fast_max },
        }
    }

    /// A pool as this one was when it was new.
    #[must_use]
    pub fn renewed(&self) -> Self {
        Self::with_slow_tier(self.n_blocks(), self.places.fast_max())
    }

    /// Bounds the pool from now on, at most to what it has. Kept blocks beyond go to `freed` with the next
    /// [`trim`](Self::trim) or reservation.
    pub fn bound(&mut self, bounds: Bounds) {
        let (all, fast_max) = (self.n_blocks(), self.places.fast_max());
        self.bounds = Bounds {
            blocks: bounds.blocks.min(all),
            kept: bounds.kept.min(all),
            // A pool without a slow tier has nowhere to move anything.
            fast: if fast_max < all { bounds.fast.min(fast_max) } else { all },
        };
    }

    /// How much may be in use.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Lets go of kept blocks beyond the bounds, to be discarded.
    pub fn trim(&mut self, freed: &mut Vec<BlockId>) {
        while self.n_kept() > self.kept_max() {
            self.evict(Which::Any, freed);
        }
        while self.n_fast() + self.n_reserved > self.bounds.fast && self.has_kept_fast() {
            self.evict(Which::Fast, freed);
        }
    }

    /// Kept blocks that the bounds leave room for.
    fn kept_max(&self) -> u32 {
        self.bounds.blocks.saturating_sub(self.n_used() + self.n_reserved).min(self.bounds.kept)
    }

    fn has_kept_fast(&self) -> bool {
        self.n_kept() > self.places.n_slow_kept()
    }

    /// Held blocks whose latent plane is in fast memory beyond the bounds.
    pub fn n_fast_beyond(&self) -> u32 {
        (self.n_held_fast() + self.n_reserved).saturating_sub(self.bounds.fast)
    }

    fn n_held_fast(&self) -> u32 {
        self.n_used() - (self.places.n_slow() - self.places.n_slow_kept())
    }

    /// All latent planes that fit into fast memory.
    pub fn fast_max(&self) -> u32 {
        self.places.fast_max()
    }

    /// All blocks of the pool.
    pub fn n_blocks(&self) -> u32 {
        count(self.ref_counts.len())
    }

    /// Blocks that somebody holds.
    pub fn n_used(&self) -> u32 {
        self.n_blocks() - count(self.free.len()) - self.n_kept()
    }

    /// Blocks that nobody holds and that are kept for what they contain.
    pub fn n_kept(&self) -> u32 {
        count(self.prefixes.n_kept())
    }

    /// Blocks that are free or kept, not promised to anyone, and within the bounds.
    pub fn n_available(&self) -> u32 {
        let room = self.bounds.blocks.saturating_sub(self.n_used() + self.n_reserved);
        (count(self.free.len()) + self.n_kept() - self.n_reserved).min(room)
    }

    /// How many hold `block`; 0 when it is free.
    ///
    /// # Panics
    /// When the pool has no such block.
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.ref_counts[block.0 as usize]
    }

    /// Promises `n_blocks` blocks. Kept blocks whose place that takes go to `freed`, to be discarded.
    ///
    /// # Errors
    /// [`KvError::OutOfBlocks`] when fewer are available, [`KvError::OutOfFast`] when held blocks would have to move to
    /// the slow tier first; nothing has changed then.
    pub fn reserve(&mut self, n_blocks: u32, freed: &mut Vec<BlockId>) -> Result<Reservation, KvError> {
        let available = self.n_available();
        if n_blocks > available {
            return Err(KvError::OutOfBlocks { wanted: n_blocks, available, total: self.n_blocks() });
        }
        let fast_max = self.bounds.fast;
        let short = (self.n_held_fast() + self.n_reserved + n_blocks).saturating_sub(fast_max);
        // Who wants nothing is not held up by bounds that have come down on what is held.
        if n_blocks > 0 && short > 0 {
            return Err(KvError::OutOfFast { short, fast_max });
        }
        self.n_reserved += n_blocks;
        while self.free.len() < self.n_reserved as usize {
            self.evict(Which::Any, freed);
        }
        self.trim(freed);
        self.assert_counts();
        Ok(Reservation { n_blocks })
    }

    /// Blocks with content whose latent plane is in fast memory.
    fn n_fast(&self) -> u32 {
        self.n_blocks() - count(self.free.len()) - self.places.n_slow()
    }

    /// Lets go of a kept block: of the owner that keeps most the one that was left longest ago.
    fn evict(&mut self, which: Which, freed: &mut Vec<BlockId>) {
        let block = self.prefixes.evict(which).expect("kept blocks were counted before");
        self.places.taken(block);
        self.places.freed(block);
        self.free.push(block);
        freed.push(block);
    }

    /// Notes that a held block is full, what it contains and whose it is, once its rows are computed. Nobody may write
    /// into it any more.
    ///
    /// # Panics
    /// When nobody holds the block, or it was sealed with another hash.
    pub fn seal(&mut self, block: BlockId, hash: BlockHash, owner: u64) {
        assert!(self.ref_counts[block.0 as usize] > 0, "block {} is free and cannot be sealed", block.0);
        self.prefixes.seal(block, hash, owner);
    }

    /// Whether the block's content is known.
    pub fn is_sealed(&self, block: BlockId) -> bool {
        self.prefixes.is_sealed(block)
    }

    /// How many blocks, from the first hash on, are there to be shared, and how many of them nobody holds.
    pub fn shareable(&self, hashes: &[BlockHash]) -> (u32, u32) {
        let found = hashes.iter().map_while(|&hash| self.prefixes.find(hash));
        found.fold((0, 0), |(all, idle), block| (all + 1, idle + u32::from(self.ref_count(block) == 0)))
    }

    /// A block with this content, with one holder more.
    pub fn share(&mut self, hash: BlockHash) -> Option<BlockId> {
        let block = self.prefixes.find(hash)?;
        let holders = &mut self.ref_counts[block.0 as usize];
        if *holders == 0 {
            self.prefixes.take(block);
            self.places.taken(block);
        }
        *holders = holders.checked_add(1).expect("far fewer than 2^32 holders");
        self.assert_counts();
        Some(block)
    }

    /// Takes one promised block, whose only holder is now the caller.
    ///
    /// # Panics
    /// When the reservation is used up, or was made by another pool and this one has none.
    pub fn acquire(&mut self, reservation: &mut Reservation) -> BlockId {
        assert!(reservation.n_blocks > 0, "the reservation is used up");
        assert!(self.n_reserved > 0, "the reservation is not of this pool");
        reservation.n_blocks -= 1;
        self.n_reserved -= 1;
        let block = self.free.pop().expect("reserved <= free");
        let holders = &mut self.ref_counts[block.0 as usize];
        assert!(*holders == 0, "block {} is on the free list with {holders} holders", block.0);
        *holders = 1;
        self.assert_counts();
        block
    }

    /// Gives back what is left of a promise.
    ///
    /// # Panics
    /// When the reservation is not of this pool, as far as that shows.
    pub fn forfeit(&mut self, mut reservation: Reservation) {
        assert!(reservation.n_blocks <= self.n_reserved, "the reservation is not of this pool");
        self.n_reserved -= reservation.n_blocks;
        reservation.n_blocks = 0;
        self.assert_counts();
    }

    /// Counts one more holder of a held block.
    ///
    /// # Panics
    /// When nobody holds the block.
    pub fn retain(&mut self, block: BlockId) {
        let holders = &mut self.ref_counts[block.0 as usize];
        assert!(*holders > 0, "block {} is free and cannot be shared", block.0);
        *holders = holders.checked_add(1).expect("far fewer than 2^32 holders");
    }

    /// Counts one holder less.
    ///
    /// # Panics
    /// When nobody holds the block.
    pub fn release(&mut self, block: BlockId) -> Released {
        let holders = &mut self.ref_counts[block.0 as usize];
        assert!(*holders > 0, "block {} is released twice", block.0);
        *holders -= 1;
        if *holders > 0 {
            return Released::Shared;
        }
        if self.prefixes.keep(block, self.places.of(block) == Place::Fast) {
            self.places.kept(block);
            return Released::Kept;
        }
        self.places.freed(block);
        self.free.push(block);
        self.assert_counts();
        Released::Freed
    }

    /// Forgets what a held block contains: its rows are not what was written, and nobody is to find it any more.
    ///
    /// # Panics
    /// When nobody holds it.
    pub fn spoil(&mut self, block: BlockId) {
        assert!(self.ref_counts[block.0 as usize] > 0, "block {} is free and cannot be spoilt", block.0);
        self.prefixes.forget(block);
    }

    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    pub(crate) fn places_mut(&mut self) -> &mut Places {
        &mut self.places
    }

    fn assert_counts(&self) {
        assert!(self.free.len() <= self.ref_counts.len(), "more free blocks than blocks");
        assert!(
            self.n_reserved as usize <= self.free.len() + self.prefixes.n_kept(),
            "more blocks promised than there are"
        );
    }
}

impl Reservation {
    /// Blocks still promised.
    pub fn n_blocks(&self) -> u32 {
        self.n_blocks
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // A second panic while unwinding would abort the daemon.
        assert!(self.n_blocks == 0 || std::thread::panicking(), "{} reserved blocks were lost", self.n_blocks);
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("a pool has at most 2^32 - 1 blocks")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PrefixHasher, Realm};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn what_is_reserved_is_not_available_to_others() {
        let mut pool = Pool::new(3);
        let first = pool.reserve(2, &mut Vec::new()).unwrap();
        assert_eq!(
            pool.reserve(2, &mut Vec::new()).unwrap_err(),
            KvError::OutOfBlocks { wanted: 2, available: 1, total: 3 }
        );
        pool.forfeit(first);
        let second = pool.reserve(3, &mut Vec::new()).unwrap();
        assert_eq!((pool.n_available(), pool.n_used()), (0, 0));
        pool.forfeit(second);
    }

    #[test]
    fn a_shared_block_is_freed_by_its_last_holder() {
        let mut pool = Pool::new(1);
        let mut reservation = pool.reserve(1, &mut Vec::new()).unwrap();
        let block = pool.acquire(&mut reservation);
        pool.forfeit(reservation);
        pool.retain(block);
        assert_eq!(pool.release(block), Released::Shared);
        assert_eq!(pool.release(block), Released::Freed);
        assert_eq!(pool.n_available(), 1);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_caught() {
        let mut pool = Pool::new(1);
        let mut reservation = pool.reserve(1, &mut Vec::new()).unwrap();
        let block = pool.acquire(&mut reservation);
        pool.forfeit(reservation);
        assert_eq!(pool.release(block), Released::Freed);
        assert_eq!(pool.release(block), Released::Freed);
    }

    #[test]
    #[should_panic(expected = "2 reserved blocks were lost")]
    fn a_lost_reservation_is_caught() {
        let mut pool = Pool::new(2);
        drop(pool.reserve(2, &mut Vec::new()));
    }

    #[test]
    #[should_panic(expected = "used up")]
    fn a_reservation_gives_no_more_than_it_promised() {
        let mut pool = Pool::new(2);
        let mut reservation = pool.reserve(1, &mut Vec::new()).unwrap();
        pool.acquire(&mut reservation);
        pool.acquire(&mut reservation);
    }

    /// A pool of 8 blocks of which `n_held` are held and `n_kept` are kept, the longest first.
    fn filled(n_held: u32, n_kept: u32) -> (Pool, Vec<BlockId>, Vec<BlockId>) {
        let mut pool = Pool::new(8);
        let mut reservation = pool.reserve(n_held + n_kept, &mut Vec::new()).unwrap();
        let held = (0..n_held).map(|_| pool.acquire(&mut reservation)).collect();
        let kept: Vec<BlockId> = (0..n_kept).map(|_| pool.acquire(&mut reservation)).collect();
        pool.forfeit(reservation);
        let mut hashes = Vec::new();
        PrefixHasher::new([1; 32]).extend(Realm::new(1, None), &(0..64 * n_kept).collect::<Vec<_>>(), &mut hashes);
        for (&block, hash) in kept.iter().zip(hashes) {
            pool.seal(block, hash, 1);
            assert_eq!(pool.release(block), Released::Kept);
        }
        (pool, held, kept)
    }

    #[test]
    fn kept_blocks_beyond_the_bounds_go_the_longest_left_first() {
        let (mut pool, _, kept) = filled(2, 4);
        let (mut freed, all) = (Vec::new(), pool.bounds());
        pool.bound(Bounds { kept: 3, ..all });
        pool.trim(&mut freed);
        assert_eq!(freed, kept[..1]);
        pool.bound(Bounds { blocks: 4, ..all });
        pool.trim(&mut freed);
        assert_eq!((freed.as_slice(), pool.n_kept(), pool.n_available()), (&kept[..2], 2, 2));
        let reservation = pool.reserve(2, &mut freed).unwrap();
        assert_eq!(freed, kept, "what is promised counts");
        pool.forfeit(reservation);
    }

    #[test]
    fn what_is_held_stays_beyond_the_bounds_and_nothing_comes_to_it() {
        let (mut pool, held, _) = filled(5, 0);
        let all = pool.bounds();
        pool.bound(Bounds { blocks: 3, ..all });
        pool.trim(&mut Vec::new());
        assert_eq!((pool.n_used(), pool.n_available()), (5, 0));
        assert!(pool.reserve(1, &mut Vec::new()).is_err());
        assert_eq!(pool.release(held[0]), Released::Freed);
        assert_eq!(pool.n_available(), 0);
        pool.bound(Bounds { blocks: 100, kept: 100, fast: 100 });
        assert_eq!((pool.bounds(), pool.n_available()), (all, 4));
    }

    #[test]
    fn one_owners_many_prompts_leave_what_another_ones_conversation_finds_again() {
        let mut pool = Pool::new(16);
        let hasher = PrefixHasher::new([1; 32]);
        // A conversation of `n` blocks that ends, its last block given back first.
        let say = |pool: &mut Pool, owner: u64, first: u32, n: u32| {
            let mut hashes = Vec::new();
            hasher.extend(Realm::new(owner, None), &(first..first + 64 * n).collect::<Vec<_>>(), &mut hashes);
            let (mut freed, mut slots, mut table) = (Vec::new(), Vec::new(), crate::BlockTable::new());
            table.adopt(&hashes, pool);
            let found = table.blocks().len();
            let mut reservation = pool.reserve(n - count(found), &mut freed).unwrap();
            table.append((n - count(found)) * 64, pool, &mut reservation, &mut slots);
            pool.forfeit(reservation);
            table.seal(0, &hashes, owner, pool);
            table.truncate(0, pool, &mut freed);
            found
        };
        assert_eq!(say(&mut pool, 1, 0, 3), 0);
        (0..9).for_each(|i| assert_eq!(say(&mut pool, 2, 10_000 * i, 5), 0));
        assert_eq!(say(&mut pool, 1, 0, 3), 3);
        // What the other one has said last is there as well, and the beginning of what was before.
        assert_eq!([80_000, 70_000, 60_000].map(|first| say(&mut pool, 2, first, 5)), [5, 5, 3]);
        // Alone again, one has it all.
        let mut pool = pool.renewed();
        (0..3).for_each(|i| assert_eq!(say(&mut pool, 2, 10_000 * i, 5), 0));
        (0..3).for_each(|i| assert_eq!(say(&mut pool, 2, 10_000 * i, 5), 5));
    }

    #[derive(Clone, Debug)]
    enum Verb {
        Reserve(u32),
        Acquire(usize),
        Forfeit(usize),
        Retain(usize),
        Release(usize),
        Seal(usize, u8),
        Share(u8),
        Bound(u32, u32),
    }

    fn verb() -> impl Strategy<Value = Verb> {
        prop_oneof![
            2 => (0..6_u32).prop_map(Verb::Reserve),
            4 => any::<usize>().prop_map(Verb::Acquire),
            1 => any::<usize>().prop_map(Verb::Forfeit),
            1 => any::<usize>().prop_map(Verb::Retain),
            3 => any::<usize>().prop_map(Verb::Release),
            2 => (any::<usize>(), 0..8_u8).prop_map(|(pick, content)| Verb::Seal(pick, content)),
            2 => (0..8_u8).prop_map(Verb::Share),
            1 => (0..14_u32, 0..14_u32).prop_map(|(blocks, kept)| Verb::Bound(blocks, kept)),
        ]
    }

    /// The pool as plain sets: what is free, what is kept (the longest first), who is held how often and contains what.
    struct Model {
        free: BTreeSet<BlockId>,
        kept: Vec<BlockId>,
        held: BTreeMap<BlockId, u32>,
        contents: BTreeMap<BlockId, u8>,
        promised: u32,
        /// Blocks in use at most, and kept blocks.
        bounds: (usize, usize),
    }

    impl Model {
        fn new(n_blocks: u32) -> Self {
            let free = (0..n_blocks).map(BlockId).collect();
            let (held, contents) = (BTreeMap::new(), BTreeMap::new());
            Self { free, kept: Vec::new(), held, contents, promised: 0, bounds: (usize::MAX, usize::MAX) }
        }

        /// Blocks that may come into use beside those that are held or promised.
        fn room(&self) -> usize {
            self.bounds.0.saturating_sub(self.held.len() + self.promised as usize)
        }

        fn available(&self) -> usize {
            (self.free.len() + self.kept.len() - self.promised as usize).min(self.room())
        }

        /// Lets go of kept blocks for what is promised, and of those beyond the bounds.
        fn evict(&mut self) -> Vec<BlockId> {
            let short = (self.promised as usize).saturating_sub(self.free.len());
            let beyond = self.kept.len().saturating_sub(self.room().min(self.bounds.1));
            let evicted: Vec<BlockId> = self.kept.drain(..short.max(beyond)).collect();
            for block in &evicted {
                self.contents.remove(block);
                self.free.insert(*block);
            }
            evicted
        }

        fn block_with(&self, content: u8) -> Option<BlockId> {
            self.contents.iter().find(|&(_, &c)| c == content).map(|(&block, _)| block)
        }

        fn agrees_with(&self, pool: &Pool) {
            assert_eq!(pool.n_blocks() as usize, self.free.len() + self.kept.len() + self.held.len());
            assert_eq!((pool.n_used() as usize, pool.n_kept() as usize), (self.held.len(), self.kept.len()));
            assert_eq!(pool.n_available() as usize, self.available());
            assert!((0..pool.n_blocks()).map(BlockId).all(|b| pool.is_sealed(b) == self.contents.contains_key(&b)));
            assert!(self.free.iter().chain(&self.kept).all(|&block| pool.ref_count(block) == 0));
            assert!(self.held.iter().all(|(&block, &holders)| pool.ref_count(block) == holders));
        }
    }

    fn held_block(model: &Model, pick: usize) -> Option<BlockId> {
        model.held.keys().nth(pick.checked_rem(model.held.len())?).copied()
    }

    fn release(pick: usize, pool: &mut Pool, model: &mut Model) {
        if let Some(block) = held_block(model, pick) {
            let holders = model.held.get_mut(&block).unwrap();
            *holders -= 1;
            let expected = match (*holders, model.contents.contains_key(&block)) {
                (0, false) => Released::Freed,
                (0, true) => Released::Kept,
                _ => Released::Shared,
            };
            match expected {
                Released::Freed => drop(model.free.insert(block)),
                Released::Kept => model.kept.push(block),
                Released::Shared => {}
            }
            if expected != Released::Shared {
                model.held.remove(&block);
            }
            assert_eq!(pool.release(block), expected);
        }
    }

    fn apply(verb: &Verb, pool: &mut Pool, model: &mut Model, open: &mut Vec<Reservation>) {
        match *verb {
            Verb::Reserve(n) => {
                let fits = n as usize <= model.available();
                let mut freed = Vec::new();
                let reserved = pool.reserve(n, &mut freed);
                assert_eq!(reserved.is_ok(), fits);
                if let Ok(reservation) = reserved {
                    model.promised += n;
                    assert_eq!(freed, model.evict(), "kept the longest, gone the first");
                    open.push(reservation);
                }
            }
            Verb::Acquire(pick) => {
                let n_open = open.len().max(1);
                if let Some(reservation) = open.get_mut(pick % n_open).filter(|r| r.n_blocks() > 0) {
                    let block = pool.acquire(reservation);
                    assert!(model.free.remove(&block), "a block was handed out twice");
                    model.held.insert(block, 1);
                    model.promised -= 1;
                }
            }
            Verb::Forfeit(pick) if !open.is_empty() => {
                let reservation = open.swap_remove(pick % open.len());
                model.promised -= reservation.n_blocks();
                pool.forfeit(reservation);
            }
            Verb::Forfeit(_) => {}
            Verb::Retain(pick) => {
                if let Some(block) = held_block(model, pick) {
                    pool.retain(block);
                    *model.held.get_mut(&block).unwrap() += 1;
                }
            }
            Verb::Release(pick) => release(pick, pool, model),
            Verb::Seal(pick, content) => {
                let unsealed = held_block(model, pick).filter(|block| !model.contents.contains_key(block));
                if let Some(block) = unsealed {
                    pool.seal(block, BlockHash([content; 32]), 1);
                    if model.block_with(content).is_none() {
                        model.contents.insert(block, content);
                    }
                }
            }
            Verb::Bound(blocks, kept) => {
                let mut freed = Vec::new();
                pool.bound(Bounds { blocks, kept, fast: u32::MAX });
                pool.trim(&mut freed);
                model.bounds = (blocks as usize, kept as usize);
                assert_eq!(freed, model.evict());
            }
            Verb::Share(content) => {
                let hash = BlockHash([content; 32]);
                let known = model.block_with(content);
                let idle = known.is_some_and(|block| model.kept.contains(&block));
                assert_eq!(pool.shareable(&[hash]), (u32::from(known.is_some()), u32::from(idle)));
                assert_eq!(pool.share(hash), known);
                if let Some(block) = known {
                    model.kept.retain(|&kept| kept != block);
                    *model.held.entry(block).or_default() += 1;
                }
            }
        }
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        #[test]
        fn the_pool_agrees_with_plain_sets(n_blocks in 0..12_u32, verbs in prop::collection::vec(verb(), 0..200)) {
            let (mut pool, mut model, mut open) = (Pool::new(n_blocks), Model::new(n_blocks), Vec::new());
            for verb in &verbs {
                apply(verb, &mut pool, &mut model, &mut open);
                model.agrees_with(&pool);
            }
            for reservation in open {
                pool.forfeit(reservation);
            }
            pool.bound(Bounds { blocks: n_blocks, kept: n_blocks, fast: n_blocks });
            for (block, holders) in model.held {
                for left in (0..holders).rev() {
                    prop_assert_eq!(pool.release(block) == Released::Shared, left > 0);
                }
            }
            prop_assert_eq!(pool.n_available(), n_blocks);
        }
    }
}
