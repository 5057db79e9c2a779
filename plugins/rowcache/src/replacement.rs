//! Which slot is given up for a new row?
//!
//! Knows slots, not rows, so that the same code decides in the cache and in a simulation of hit rates. The choice is
//! [`Policy::Clock`], by the hit rates in `daemon/kv/WORKLOAD.md`; the others are there to be compared with it.
//! Every layer of a step takes its turn before a row is needed again. So a cache that is smaller than one step's
//! selections hits nothing under any of them.

/// How a victim is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// One bit per slot, set by a hit, taken by the hand that looks for a victim (Corbato's CLOCK).
    Clock,
    /// As CLOCK, with a count of hits up to [`HITS_MAX`] that the hand lowers by one (generalised CLOCK).
    Frequency,
    /// The slot that was used longest ago.
    Lru,
}

/// Hits that [`Policy::Frequency`] remembers of a slot.
pub const HITS_MAX: u8 = 7;

/// Which slots were used when, or how often.
#[derive(Debug)]
pub struct Replacement(Kind);

#[derive(Debug)]
enum Kind {
    Clock { hits: Vec<u8>, hits_max: u8, hand: usize },
    Lru(Recency),
}

impl Replacement {
    /// For `n_slots` slots, none of them used yet.
    ///
    /// # Panics
    /// When there are 2^32 slots or more.
    pub fn new(policy: Policy, n_slots: usize) -> Self {
        let clock = |hits_max| Kind::Clock { hits: vec![0; n_slots], hits_max, hand: 0 };
        Self(match policy {
            Policy::Clock => clock(1),
            Policy::Frequency => clock(HITS_MAX),
            Policy::Lru => Kind::Lru(Recency::new(n_slots)),
        })
    }

    /// There are `n_slots` slots from now on: the first ones, and new ones that were never used. LRU forgets who was
    /// used when.
    pub fn resize(&mut self, n_slots: usize) {
        match &mut self.0 {
            Kind::Clock { hits, hand, .. } => {
                hits.resize(n_slots, 0);
                *hand = if *hand < n_slots { *hand } else { 0 };
            }
            Kind::Lru(recency) => *recency = Recency::new(n_slots),
        }
    }

    /// The slot has a new row. A row that is never asked for again goes before those that were.
    pub fn filled(&mut self, slot: usize) {
        match &mut self.0 {
            Kind::Clock { hits, .. } => hits[slot] = 0,
            Kind::Lru(recency) => recency.move_to_front(slot),
        }
    }

    /// The slot's row was asked for again.
    #[inline]
    pub fn hit(&mut self, slot: usize) {
        match &mut self.0 {
            Kind::Clock { hits, hits_max, .. } => hits[slot] = (hits[slot] + 1).min(*hits_max),
            Kind::Lru(recency) => recency.move_to_front(slot),
        }
    }

    /// The slot to give up, of those that `may_go` allows; none when it allows none.
    pub fn victim(&mut self, may_go: impl Fn(usize) -> bool) -> Option<usize> {
        match &mut self.0 {
            Kind::Clock { hits, hits_max, hand } => {
                // After so many steps every slot that may go has lost its hits and was looked at once more.
                for _ in 0..(usize::from(*hits_max) + 1) * hits.len() {
                    let slot = *hand;
                    *hand = if slot + 1 == hits.len() { 0 } else { slot + 1 };
                    if may_go(slot) {
                        match hits[slot] {
                            0 => return Some(slot),
                            _ => hits[slot] -= 1,
                        }
                    }
                }
                None
            }
            Kind::Lru(recency) => recency.oldest_first().find(|&slot| may_go(slot)),
        }
    }
}

/// Slots in order of their last use: a ring of links through an entry that is no slot.
#[derive(Debug)]
struct Recency {
    /// Of each slot the one used next after it and the one used last before it.
    links: Vec<(u32, u32)>,
}

impl Recency {
    fn new(n_slots: usize) -> Self {
        let end = u32::try_from(n_slots).expect("fewer than 2^32 slots");
        // Slot i was used before slot i + 1; the entry at `end` closes the ring.
        let links =
            (0..=end).map(|slot| (if slot == end { 0 } else { slot + 1 }, if slot == 0 { end } else { slot - 1 }));
        Self { links: links.collect() }
    }

    fn end(&self) -> u32 {
        u32::try_from(self.links.len() - 1).expect("fewer than 2^32 slots")
    }

    fn move_to_front(&mut self, slot: usize) {
        let (newer, older) = self.links[slot];
        self.links[newer as usize].1 = older;
        self.links[older as usize].0 = newer;
        let end = self.end();
        let newest = self.links[end as usize].1;
        let slot_id = u32::try_from(slot).expect("fewer than 2^32 slots");
        self.links[slot] = (end, newest);
        self.links[newest as usize].0 = slot_id;
        self.links[end as usize].1 = slot_id;
    }

    fn oldest_first(&self) -> impl Iterator<Item = usize> {
        let end = self.end();
        let newer = move |&slot: &u32| Some(self.links[slot as usize].0).filter(|&next| next != end);
        let oldest = Some(self.links[end as usize].0).filter(|&first| first != end);
        std::iter::successors(oldest, newer).map(|slot| slot as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: fn(usize) -> bool = |_| true;

    /// Fills slots 0 to 3 in order and hits the slots named, in order.
    fn used(policy: Policy, hits: &[usize]) -> Replacement {
        let mut replacement = Replacement::new(policy, 4);
        (0..4).for_each(|slot| replacement.filled(slot));
        hits.iter().for_each(|&slot| replacement.hit(slot));
        replacement
    }

    /// The next `n` victims, each filled anew.
    fn victims(replacement: &mut Replacement, n: usize) -> Vec<usize> {
        let next = |_| {
            let slot = replacement.victim(ALL).unwrap();
            replacement.filled(slot);
            slot
        };
        (0..n).map(next).collect()
    }

    #[test]
    fn clock_gives_a_slot_that_was_hit_a_second_round() {
        assert_eq!(victims(&mut used(Policy::Clock, &[0, 2, 2]), 5), [1, 3, 0, 1, 2]);
    }

    #[test]
    fn frequency_keeps_what_was_hit_most() {
        assert_eq!(victims(&mut used(Policy::Frequency, &[0, 2, 2]), 8), [1, 3, 0, 1, 3, 0, 1, 2]);
        let mut hot = used(Policy::Frequency, &[0; 300]);
        assert!(victims(&mut hot, 21).iter().all(|&slot| slot != 0), "seven rounds of three");
        assert!(victims(&mut hot, 4).contains(&0), "old hits are forgotten");
    }

    #[test]
    fn lru_gives_up_the_slot_used_longest_ago() {
        assert_eq!(victims(&mut used(Policy::Lru, &[0, 2, 2]), 5), [1, 3, 0, 2, 1]);
    }

    #[test]
    fn a_slot_that_may_not_go_stays_under_every_policy() {
        for policy in [Policy::Clock, Policy::Frequency, Policy::Lru] {
            let mut replacement = used(policy, &[3, 1]);
            for _ in 0..9 {
                assert_eq!(replacement.victim(|slot| slot == 3), Some(3));
                replacement.filled(3);
            }
            assert_eq!(replacement.victim(|_| false), None);
            assert_eq!(Replacement::new(policy, 0).victim(ALL), None);
        }
    }

    #[test]
    fn lru_agrees_with_a_list_under_random_use() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut list: Vec<usize> = (0..40).collect();
        let mut replacement = Replacement::new(Policy::Lru, 40);
        for _ in 0..20_000 {
            let slot = random.usize(..40);
            replacement.hit(slot);
            list.retain(|&other| other != slot);
            list.push(slot);
            let pinned = random.usize(..40);
            let expected = list.iter().copied().find(|&slot| slot % 40 >= pinned);
            assert_eq!(replacement.victim(|slot| slot >= pinned), expected);
        }
    }
}
