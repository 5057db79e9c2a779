//! Of the blocks that nobody holds, which goes next?
//!
//! The one that was left longest ago of the owner that keeps most, so that one user's many prompts push out his own
//! and leave the few of another one, and who is alone may keep them all. Of owners that keep as many it is the one with
//! the block that was left longest ago. A table gives its blocks back from the last to the first, so the end of a
//! conversation goes before its beginning.
//!
//! Queues are linked through arrays, and who keeps most is a tournament: a change takes the same few steps however many
//! blocks there are, a number that grows with the logarithm of the owners, and no memory but for owners who come first.

use crate::BlockId;
use std::cmp::Reverse;
use std::collections::HashMap;

/// No block, no owner.
const NONE: u32 = u32::MAX;

/// Blocks without a holder, by owner.
#[derive(Debug)]
pub(crate) struct Kept {
    nodes: Vec<Node>,
    owners: Vec<Shelf>,
    /// Where each owner that keeps something is in `owners`.
    places: HashMap<u64, u32>,
    vacant: Vec<u32>,
    /// Who keeps most of [`Which::Any`] and of [`Which::Fast`].
    most: [Tournament; 2],
    n: usize,
    n_pushed: u64,
}

/// Which blocks may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Any,
    /// Those whose latent plane is in fast memory.
    Fast,
}

/// A block in its queue.
#[derive(Clone, Copy, Debug)]
struct Node {
    older: u32,
    newer: u32,
    shelf: u32,
    is_fast: bool,
    /// When it was left, counted in blocks.
    pushed: u64,
}

/// What one owner keeps.
#[derive(Clone, Copy, Debug)]
struct Shelf {
    owner: u64,
    /// In the slow tier and in fast memory.
    queues: [Queue; 2],
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    oldest: u32,
    newest: u32,
    n: u32,
}

impl Queue {
    const EMPTY: Self = Self { oldest: NONE, newest: NONE, n: 0 };
}

/// What an owner is compared by: blocks, and when the oldest of them was left. The greatest loses one.
type Claim = (u32, Reverse<u64>);

impl Kept {
    pub(crate) fn new(n_blocks: usize) -> Self {
        let node = Node { older: NONE, newer: NONE, shelf: NONE, is_fast: true, pushed: 0 };
        Self {
            nodes: vec![node; n_blocks],
            owners: Vec::new(),
            places: HashMap::new(),
            vacant: Vec::new(),
            most: [Tournament::default(), Tournament::default()],
            n: 0,
            n_pushed: 0,
        }
    }

    /// Blocks in all.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// A block has lost its last holder.
    pub(crate) fn push(&mut self, block: BlockId, owner: u64, is_fast: bool) {
        let shelf = self.shelf_of(owner);
        let queue = &mut self.owners[shelf as usize].queues[usize::from(is_fast)];
        let older = std::mem::replace(&mut queue.newest, block.0);
        queue.n += 1;
        if older == NONE {
            queue.oldest = block.0;
        } else {
            self.nodes[older as usize].newer = block.0;
        }
        self.n_pushed += 1;
        self.nodes[block.0 as usize] = Node { older, newer: NONE, shelf, is_fast, pushed: self.n_pushed };
        self.n += 1;
        self.play(shelf);
    }

    /// A block that is here has a holder again, or goes.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let Node { older, newer, shelf, is_fast, .. } = self.nodes[block.0 as usize];
        let owner = &mut self.owners[shelf as usize];
        let queue = &mut owner.queues[usize::from(is_fast)];
        queue.n -= 1;
        match older {
            NONE => queue.oldest = newer,
            _ => self.nodes[older as usize].newer = newer,
        }
        match newer {
            NONE => queue.newest = older,
            _ => self.nodes[newer as usize].older = older,
        }
        if owner.queues.iter().all(|queue| queue.n == 0) {
            self.places.remove(&owner.owner);
            self.vacant.push(shelf);
        }
        self.n -= 1;
        self.play(shelf);
    }

    /// The block that goes next.
    pub(crate) fn next(&self, which: Which) -> Option<BlockId> {
        let shelf = self.most[which as usize].winner()?;
        let (block, ..) = self.oldest(shelf, which)?;
        Some(BlockId(block))
    }

    /// Where what `owner` keeps is.
    fn shelf_of(&mut self, owner: u64) -> u32 {
        let Self { owners, places, vacant, .. } = self;
        *places.entry(owner).or_insert_with(|| {
            let shelf = Shelf { owner, queues: [Queue::EMPTY; 2] };
            if let Some(place) = vacant.pop() {
                owners[place as usize] = shelf;
                return place;
            }
            owners.push(shelf);
            u32::try_from(owners.len() - 1).expect("no more owners than blocks")
        })
    }

    /// The oldest block of those on the shelf that may go, when it was left, and how many there are.
    fn oldest(&self, shelf: u32, which: Which) -> Option<(u32, u64, u32)> {
        let queues = &self.owners[shelf as usize].queues[usize::from(which == Which::Fast)..];
        let oldest = queues.iter().map(|queue| queue.oldest).filter(|&block| block != NONE);
        let oldest = oldest.min_by_key(|&block| self.nodes[block as usize].pushed)?;
        Some((oldest, self.nodes[oldest as usize].pushed, queues.iter().map(|queue| queue.n).sum()))
    }

    /// What is on the shelf has changed.
    fn play(&mut self, shelf: u32) {
        for which in [Which::Any, Which::Fast] {
            let claim = self.oldest(shelf, which).map(|(_, pushed, n)| (n, Reverse(pushed)));
            self.most[which as usize].set(shelf as usize, claim);
        }
    }
}

/// The greatest of some claims: a tree of matches over a row of players, as an array whose first half are the matches.
#[derive(Debug, Default)]
struct Tournament(Vec<Option<(Claim, u32)>>);

impl Tournament {
    fn winner(&self) -> Option<u32> {
        Some(self.0.get(1).copied().flatten()?.1)
    }

    fn set(&mut self, player: usize, claim: Option<Claim>) {
        if player >= self.0.len() / 2 {
            self.grow(player);
        }
        let mut at = self.0.len() / 2 + player;
        let number = u32::try_from(player).expect("no more owners than blocks");
        self.0[at] = claim.map(|claim| (claim, number));
        while at > 1 {
            at /= 2;
            self.0[at] = self.0[2 * at].max(self.0[2 * at + 1]);
        }
    }

    /// Twice the room at least, since it is played anew.
    fn grow(&mut self, player: usize) {
        let before = self.0.split_off(self.0.len() / 2);
        let n_players = (player + 1).next_power_of_two();
        self.0 = vec![None; 2 * n_players];
        for (player, claim) in before.into_iter().enumerate() {
            self.set(player, claim.map(|(claim, _)| claim));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lets everything go; whose it was, in order.
    fn drain(kept: &mut Kept, which: Which) -> Vec<u32> {
        std::iter::from_fn(|| {
            let block = kept.next(which)?;
            kept.remove(block);
            Some(block.0)
        })
        .collect()
    }

    #[test]
    fn who_is_alone_has_all_of_it_and_the_longest_left_goes_first() {
        let mut kept = Kept::new(5);
        for block in [3, 0, 4, 1] {
            kept.push(BlockId(block), 7, true);
        }
        kept.remove(BlockId(4));
        kept.push(BlockId(4), 7, true);
        assert_eq!((kept.n(), drain(&mut kept, Which::Any)), (4, vec![3, 0, 1, 4]));
        assert_eq!((kept.n(), kept.next(Which::Any)), (0, None));
    }

    #[test]
    fn a_flood_pushes_out_its_own_and_leaves_the_few_of_others() {
        let mut kept = Kept::new(100);
        (0..3).for_each(|block| kept.push(BlockId(block), 1, true));
        for block in 3..90 {
            kept.push(BlockId(block), 2, true);
            if block >= 10 {
                assert_eq!(kept.next(Which::Any), Some(BlockId(block - 7)));
                kept.remove(BlockId(block - 7));
            }
        }
        assert_eq!(kept.n(), 10);
        // Down to as many as the other has, then from both the longest left.
        assert_eq!(drain(&mut kept, Which::Any), [83, 84, 85, 86, 0, 87, 1, 88, 2, 89]);
    }

    #[test]
    fn owners_that_keep_as_many_lose_the_longest_left() {
        let mut kept = Kept::new(40);
        (0..40).for_each(|block| kept.push(BlockId(block), u64::from(block % 10) << 40, true));
        assert_eq!(drain(&mut kept, Which::Any), (0..40).collect::<Vec<_>>());
    }

    #[test]
    fn slow_blocks_stay_when_fast_ones_are_wanted() {
        let mut kept = Kept::new(9);
        for (block, owner, is_fast) in [(0, 1, false), (1, 1, true), (2, 1, false), (3, 2, true), (4, 2, true)] {
            kept.push(BlockId(block), owner, is_fast);
        }
        assert_eq!(kept.next(Which::Any), Some(BlockId(0)), "the first keeps three");
        assert_eq!(drain(&mut kept, Which::Fast), [3, 1, 4], "and only one fast block");
        assert_eq!(drain(&mut kept, Which::Any), [0, 2]);
    }

    #[derive(Clone, Debug)]
    enum Verb {
        Push(u64, bool),
        Take(usize),
        Evict(bool),
    }

    fn verb() -> impl Strategy<Value = Verb> {
        prop_oneof![
            4 => (0..9_u64, any::<bool>()).prop_map(|(owner, is_fast)| Verb::Push(owner * owner, is_fast)),
            1 => any::<usize>().prop_map(Verb::Take),
            2 => any::<bool>().prop_map(Verb::Evict),
        ]
    }

    /// What goes next of block, owner, fast or not, the longest left first.
    fn naive(list: &[(u32, u64, bool)], which: Which) -> Option<usize> {
        let may_go = |entry: &(u32, u64, bool)| which == Which::Any || entry.2;
        let n_of = |owner| list.iter().filter(|entry| entry.1 == owner && may_go(entry)).count();
        let most = list.iter().filter(|entry| may_go(entry)).map(|entry| n_of(entry.1)).max()?;
        list.iter().position(|entry| may_go(entry) && n_of(entry.1) == most)
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        #[test]
        fn it_agrees_with_a_plain_list(verbs in prop::collection::vec(verb(), 0..300)) {
            let (mut kept, mut list) = (Kept::new(300), Vec::new());
            let mut free: Vec<u32> = (0..300).collect();
            for verb in verbs {
                match verb {
                    Verb::Push(owner, is_fast) => {
                        let block = free.pop().unwrap();
                        kept.push(BlockId(block), owner, is_fast);
                        list.push((block, owner, is_fast));
                    }
                    Verb::Take(pick) if !list.is_empty() => {
                        let (block, ..) = list.remove(pick % list.len());
                        kept.remove(BlockId(block));
                        free.push(block);
                    }
                    Verb::Take(_) => {}
                    Verb::Evict(fast) => {
                        let which = if fast { Which::Fast } else { Which::Any };
                        let expected = naive(&list, which).map(|at| list.remove(at).0);
                        let found = kept.next(which);
                        prop_assert_eq!(found, expected.map(BlockId));
                        if let Some(block) = found {
                            kept.remove(block);
                            free.push(block.0);
                        }
                    }
                }
                prop_assert_eq!(kept.n(), list.len());
                prop_assert_eq!(kept.next(Which::Any), naive(&list, Which::Any).map(|at| BlockId(list[at].0)));
            }
        }
    }
}
