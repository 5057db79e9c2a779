//! Whose request begins next? Fair shares among owners, the order of each owner's requests within.
//!
//! Start-time fair queueing: an owner is served by the tokens that are computed for it, the owner that was served least
//! is next. Who comes newly begins with what the least served one has, so nobody saves up while away, and nobody pays
//! for having been alone. Within an owner those go first that have begun before, then by priority, then the oldest: no
//! priority puts a user before another one.
//!
//! Knows no time but as an argument, and no pool.

use super::quota::blocks_of;
use crate::api::Owner;
use crate::sequence::{Sequence, SequenceId};
use sparsed_kv::blocks_for;
use std::collections::BTreeMap;
use std::time::Duration;

/// The order of an owner's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    is_new: bool,
    priority: i32,
    id: SequenceId,
}

/// An owner with requests that wait or run.
#[derive(Debug)]
struct Line {
    owner: Owner,
    /// Tokens computed, counted from where the least served one was when this owner came.
    served: u64,
    n_running: u32,
    waiting: BTreeMap<Place, Sequence>,
}

/// Counts of an owner for status pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerLoad {
    /// Who.
    pub owner: Owner,
    /// Requests that wait.
    pub waiting: u32,
    /// Requests that run.
    pub running: u32,
    /// Tokens computed, as fair shares count them.
    pub served: u64,
}

/// Which requests may begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Admits<'a> {
    /// Most requests of an owner that run.
    pub(super) running_max: u32,
    /// Only such that have begun before.
    pub(super) only_begun: bool,
    /// What runs, of which an owner's sequences hold at most so many blocks.
    pub(super) running: &'a [Sequence],
    /// Most blocks of an owner.
    pub(super) blocks_max: u32,
}

impl Admits<'_> {
    /// Whether its owner may hold what the request needs; one who holds nothing may try.
    fn has_room_for(&self, sequence: &Sequence) -> bool {
        let held = if self.blocks_max == u32::MAX { 0 } else { blocks_of(self.running, sequence.owner()) };
        // One more block, so that it does not have to wait again at once.
        held == 0 || held + blocks_for(sequence.n_pending()) < self.blocks_max
    }
}

/// Requests that wait, and who is served how much.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// A line for each owner with a request: few.
    lines: Vec<Line>,
    n_waiting: u32,
}

impl Queue {
    pub(super) fn n_waiting(&self) -> u32 {
        self.n_waiting
    }

    pub(super) fn n_owners(&self) -> u32 {
        super::count(self.lines.len())
    }

    /// Owners of which something runs.
    pub(super) fn n_running_owners(&self) -> usize {
        self.lines.iter().filter(|line| line.n_running > 0).count()
    }

    /// Requests of `owner` that wait.
    pub(super) fn n_waiting_of(&self, owner: Owner) -> u32 {
        self.line(owner).map_or(0, |line| super::count(line.waiting.len()))
    }

    /// Tokens of the prompts of `owner` that wait.
    pub(super) fn n_tokens_of(&self, owner: Owner) -> u64 {
        let waiting = self.line(owner).into_iter().flat_map(|line| line.waiting.values());
        waiting.map(|sequence| u64::from(sequence.n_pending())).sum()
    }

    pub(super) fn owners(&self) -> impl Iterator<Item = OwnerLoad> + '_ {
        self.lines.iter().map(|line| OwnerLoad {
            owner: line.owner,
            waiting: super::count(line.waiting.len()),
            running: line.n_running,
            served: line.served,
        })
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        self.lines.iter().flat_map(|line| line.waiting.values())
    }

    /// Requests that begin before `sequence`, were it to come now: shares are equal, so of each other owner as many
    /// as the own ones before it.
    pub(super) fn ahead_of(&self, sequence: &Sequence) -> u32 {
        let (owner, place) = (sequence.owner(), place_of(sequence));
        let own = self.line(owner).map_or(0, |line| line.waiting.range(..place).count());
        let served = self.line(owner).map_or_else(|| self.least_served(), |line| line.served);
        let others = self.lines.iter().filter(|line| line.owner != owner);
        let before = others.map(|line| line.waiting.len().min(own + usize::from(line.served <= served)));
        super::count(own + before.sum::<usize>())
    }

    pub(super) fn push(&mut self, sequence: Sequence) {
        let owner = sequence.owner();
        let served = self.least_served();
        let at = self.lines.iter().position(|line| line.owner == owner).unwrap_or_else(|| {
            self.lines.push(Line { owner, served, n_running: 0, waiting: BTreeMap::new() });
            self.lines.len() - 1
        });
        self.lines[at].waiting.insert(place_of(&sequence), sequence);
        self.n_waiting += 1;
    }

    /// The request that begins next of those that may.
    pub(super) fn next(&self, admits: Admits<'_>) -> Option<&Sequence> {
        let at = self.next_line(admits)?;
        self.lines[at].waiting.first_key_value().map(|(_, sequence)| sequence)
    }

    /// Takes the request that [`next`](Self::next) shows; it runs from now on.
    pub(super) fn take_next(&mut self, admits: Admits<'_>) -> Option<Sequence> {
        let at = self.next_line(admits)?;
        let (_, sequence) = self.lines[at].waiting.pop_first()?;
        self.lines[at].n_running += 1;
        self.n_waiting -= 1;
        Some(sequence)
    }

    fn next_line(&self, admits: Admits<'_>) -> Option<usize> {
        let may =
            |place: &Place, sequence: &Sequence| !(admits.only_begun && place.is_new) && admits.has_room_for(sequence);
        let first = |line: &Line| {
            let first = line.waiting.first_key_value();
            first.filter(|(place, sequence)| may(place, sequence)).map(|(place, _)| place.id)
        };
        let lines = self.lines.iter().enumerate().filter(|(_, line)| line.n_running < admits.running_max);
        let keyed = lines.filter_map(|(at, line)| Some(((line.served, first(line)?), at)));
        keyed.min().map(|(_, at)| at)
    }

    /// A request of `owner` that ran does so no more. One that comes back is to be pushed before: an owner without
    /// requests is forgotten.
    pub(super) fn ended(&mut self, owner: Owner) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.owner == owner) {
            line.n_running -= 1;
        }
        self.forget_idle();
    }

    /// `n_tokens` were computed for `owner`.
    pub(super) fn charge(&mut self, owner: Owner, n_tokens: u32) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.owner == owner) {
            line.served += u64::from(n_tokens);
        }
    }

    /// How much `owner` was served.
    pub(super) fn served(&self, owner: Owner) -> u64 {
        self.line(owner).map_or(0, |line| line.served)
    }

    /// Delivers what sequences that were sent back have still to say, and drops those that nobody waits for.
    pub(super) fn tend(&mut self, now: Duration) {
        let before = self.n_waiting;
        for line in &mut self.lines {
            line.waiting.retain(|_, sequence| {
                sequence.deliver(now);
                !sequence.is_abandoned()
            });
        }
        self.n_waiting = self.lines.iter().map(|line| super::count(line.waiting.len())).sum();
        if self.n_waiting < before {
            self.forget_idle();
        }
    }

    /// Takes out those for whom `is_over` holds.
    pub(super) fn take_if(&mut self, is_over: impl Fn(&Sequence) -> bool) -> Vec<Sequence> {
        let mut taken = Vec::new();
        for line in &mut self.lines {
            taken.extend(line.waiting.extract_if(.., |_, sequence| is_over(sequence)).map(|(_, sequence)| sequence));
        }
        if !taken.is_empty() {
            self.n_waiting -= super::count(taken.len());
            self.forget_idle();
        }
        taken
    }

    fn forget_idle(&mut self) {
        self.lines.retain(|line| line.n_running > 0 || !line.waiting.is_empty());
    }

    fn line(&self, owner: Owner) -> Option<&Line> {
        self.lines.iter().find(|line| line.owner == owner)
    }

    fn least_served(&self) -> u64 {
        self.lines.iter().map(|line| line.served).min().unwrap_or(0)
    }
}

fn place_of(sequence: &Sequence) -> Place {
    Place { is_new: !sequence.has_begun(), priority: sequence.urgency().priority, id: sequence.id }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Generate, Urgency};
    use crate::testing::{Listener, request};

    const ALL: Admits<'_> = Admits { running_max: u32::MAX, only_begun: false, running: &[], blocks_max: u32::MAX };
    const ONE: Admits<'_> = Admits { running_max: 1, ..ALL };

    fn sequence(id: u64, uid: u32, priority: i32) -> Sequence {
        let urgency = Urgency { priority, deadline_ms: None };
        let request = Generate { urgency, ..request(Owner::Uid(uid), None, vec![1, 2], 3) };
        Sequence::new(SequenceId(id), request, Box::new(Listener::with_room(9)), Duration::ZERO)
    }

    fn order(queue: &mut Queue, cost: u32) -> Vec<u64> {
        let mut order = Vec::new();
        while let Some(sequence) = queue.take_next(ALL) {
            queue.charge(sequence.owner(), cost);
            order.push(sequence.id.0);
        }
        order
    }

    #[test]
    fn owners_take_turns_however_many_requests_they_have() {
        let mut queue = Queue::default();
        (0..4).for_each(|id| queue.push(sequence(id, 1, 0)));
        queue.push(sequence(4, 2, 0));
        queue.push(sequence(5, 2, 0));
        queue.push(sequence(6, 3, 0));
        let ahead: Vec<u32> =
            [(9, 1), (9, 2), (9, 4)].iter().map(|&(id, uid)| queue.ahead_of(&sequence(id, uid, 0))).collect();
        assert_eq!(ahead, [4 + 2 + 1, 2 + 3 + 1, 3]);
        assert_eq!(order(&mut queue, 10), [0, 4, 6, 1, 5, 2, 3]);
    }

    #[test]
    fn a_priority_counts_among_ones_own_requests_only() {
        let mut queue = Queue::default();
        for (id, uid, priority) in [(0, 1, 5), (1, 1, -5), (2, 2, 100), (3, 1, -5)] {
            queue.push(sequence(id, uid, priority));
        }
        assert_eq!(order(&mut queue, 10), [1, 2, 3, 0]);
    }

    #[test]
    fn who_comes_late_has_neither_saved_up_nor_lost_anything() {
        let mut queue = Queue::default();
        queue.push(sequence(0, 1, 0));
        queue.push(sequence(1, 1, 0));
        let first = queue.take_next(ALL).unwrap();
        queue.charge(first.owner(), 1_000_000);
        queue.push(sequence(2, 2, 0));
        assert_eq!((queue.served(Owner::Uid(2)), order(&mut queue, 1)), (1_000_000, vec![1, 2]));
        queue.ended(Owner::Uid(1));
        queue.ended(Owner::Uid(1));
        queue.ended(Owner::Uid(2));
        assert_eq!((queue.n_owners(), queue.n_waiting()), (0, 0));
    }

    #[test]
    fn an_owner_at_its_limit_lets_others_pass() {
        let mut queue = Queue::default();
        queue.push(sequence(0, 1, 0));
        queue.push(sequence(1, 1, 0));
        queue.push(sequence(2, 2, 0));
        assert_eq!(queue.take_next(ONE).unwrap().id.0, 0);
        assert_eq!(queue.take_next(ONE).unwrap().id.0, 2);
        assert!(queue.take_next(ONE).is_none());
        queue.ended(Owner::Uid(1));
        assert_eq!(queue.next(ONE).unwrap().id.0, 1);
    }
}
