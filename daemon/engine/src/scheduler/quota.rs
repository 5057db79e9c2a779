//! How much of queue and KV cache may one owner have?
//!
//! Prompts that wait are bounded in tokens, what runs in bytes of KV rows. An owner at the second bound lets others
//! begin before it, and its youngest sequence waits when its others grow; a request that needs more alone is told so.
//! Blocks that two of an owner's sequences share count for each of them.

use super::Scheduler;
use super::relief::Relief;
use crate::api::{Failure, Owner};
use crate::sequence::Sequence;
use crate::telemetry::What;
use sparsed_kv::blocks_for;
use std::time::Duration;

impl Scheduler {
    /// Why a request of an owner is beyond what one may have.
    pub(super) fn beyond_quota(&self, sequence: &Sequence) -> Option<(What, Failure)> {
        let owner = sequence.owner();
        let limit = self.limits.per_user_waiting;
        if self.queue.n_waiting_of(owner) >= limit {
            let retry_after_s = self.retry_after_s(self.queue.n_owners());
            return Some((What::UserQueueFull, Failure::UserQueueFull { limit, retry_after_s }));
        }
        // One that waits alone is always taken: it would be as long the next time.
        let (limit, waiting) = (self.limits.per_user_queued_tokens, self.queue.n_tokens_of(owner));
        if waiting > 0 && waiting + u64::from(sequence.n_pending()) > limit {
            let retry_after_s = self.retry_after_s(self.queue.n_owners());
            return Some((What::UserTokensFull, Failure::UserTokensFull { limit, retry_after_s }));
        }
        let limit_bytes = self.limits.per_user_kv_bytes;
        let is_too_large = blocks_for(sequence.n_pending()) > blocks_per_owner(limit_bytes, &self.relief);
        is_too_large.then_some((What::UserKvFull, Failure::UserKvFull { limit_bytes }))
    }

    /// Has sequences wait whose owners' sequences would hold too much after the next step. The last one of an owner
    /// has nobody to wait for: it is told.
    pub(super) fn hold_to_quota(&mut self, now: Duration) {
        let limit_bytes = self.limits.per_user_kv_bytes;
        let most = blocks_per_owner(limit_bytes, &self.relief);
        if most == u32::MAX {
            return;
        }
        let beyond =
            |running: &[Sequence]| running.iter().map(Sequence::owner).find(|owner| blocks_of(running, *owner) > most);
        while let Some(owner) = beyond(&self.running) {
            let is_theirs = |sequence: &Sequence| sequence.owner() == owner;
            let youngest = self.running.iter().rposition(is_theirs).expect("one of them was just found");
            if self.running.iter().filter(|sequence| is_theirs(sequence)).nth(1).is_some() {
                self.send_to_wait(youngest, What::Preempt, "its user's share of the KV cache is used up", now);
            } else {
                let mut sequence = self.release(youngest);
                sequence.fail(Failure::UserKvFull { limit_bytes });
                self.queue.ended(owner);
                self.leave(sequence, now);
            }
        }
    }
}

/// Blocks that one owner's sequences may hold together.
pub(super) fn blocks_per_owner(limit_bytes: u64, relief: &Relief) -> u32 {
    match relief.block_bytes() {
        0 => u32::MAX,
        _ if limit_bytes == u64::MAX => u32::MAX,
        each => u32::try_from(limit_bytes / each).unwrap_or(u32::MAX),
    }
}

/// Blocks that `owner`'s sequences hold or need for what they have still to compute.
pub(super) fn blocks_of(running: &[Sequence], owner: Owner) -> u32 {
    let theirs = running.iter().filter(|sequence| sequence.owner() == owner);
    theirs.map(|one| super::count(one.table.blocks().len()) + one.table.blocks_needed(one.n_pending())).sum()
}

#[cfg(test)]
mod tests {
    use crate::api::{Event, Failure, Owner};
    use crate::scheduler::{Footprint, Limits};
    use crate::testing::{BLOCK, Bench, Listener, limits, naive, prompt};

    const FOOTPRINT: Footprint = Footprint {
        block_bytes: 1000,
        latent_bytes: 500,
        least_fast: 1,
        pool_bytes: 32_000,
        cache_bytes: 0,
        least_cache_bytes: 0,
    };

    fn bench(limits: Limits) -> Bench {
        let mut bench = Bench::new(32, limits);
        bench.scheduler.weigh(FOOTPRINT);
        bench
    }

    fn listeners(n: usize) -> Vec<Listener> {
        (0..n).map(|_| Listener::with_room(1000)).collect()
    }

    #[test]
    fn tokens_that_wait_are_counted_and_a_long_prompt_alone_is_taken() {
        let mut bench = bench(Limits { max_running: 1, per_user_queued_tokens: 100, ..limits() });
        let listeners = listeners(5);
        let mut submit = |uid, n, at: usize| bench.submit_of(Owner::Uid(uid), None, prompt(1, n), 5, &listeners[at]);
        submit(1, 150, 0);
        submit(1, 1, 1);
        submit(2, 60, 2);
        submit(2, 40, 3);
        submit(2, 1, 4);
        for at in [1, 4] {
            let end = listeners[at].heard().1;
            assert!(matches!(end, Some(Event::Failed(Failure::UserTokensFull { limit: 100, .. }))), "{at}: {end:?}");
        }
        bench.run();
        assert!([0, 2, 3].iter().all(|&at| listeners[at].heard().0.len() == 5));
    }

    #[test]
    fn an_owner_at_its_kv_quota_waits_for_itself_and_not_for_others() {
        let block = BLOCK as u32;
        let mut bench = bench(Limits { per_user_kv_bytes: 5000, ..limits() });
        let listeners = listeners(4);
        // Two of two blocks begin together; when both have three, it is one more than their owner may hold.
        for (at, uid) in [(0, 1), (1, 1), (2, 1), (3, 2)] {
            let tokens = prompt(at as u32, block + 20);
            bench.submit_of(Owner::Uid(uid), None, tokens, 100, &listeners[at]);
        }
        for _ in 0..300 {
            bench.steps(1);
            let held = super::blocks_of(&bench.scheduler.running, Owner::Uid(1));
            assert!(held <= 5 + 1, "{held} blocks");
        }
        bench.run();
        for (at, listener) in listeners.iter().enumerate() {
            assert_eq!(listener.heard().0, naive(prompt(at as u32, block + 20), 100), "{at}");
        }
        assert!(bench.scheduler.tally().preempted > 0, "nobody had to give way");
    }

    #[test]
    fn what_needs_more_than_the_kv_quota_alone_is_told_so_at_once_or_when_it_gets_there() {
        let block = BLOCK as u32;
        let mut bench = bench(Limits { per_user_kv_bytes: 2000, ..limits() });
        let listeners = listeners(2);
        bench.submit_of(Owner::Uid(1), None, prompt(1, 2 * block + 1), 5, &listeners[0]);
        bench.submit_of(Owner::Uid(1), None, prompt(2, block), 2 * block, &listeners[1]);
        bench.run();
        for (listener, n) in listeners.iter().zip([0, block as usize + 1]) {
            let (tokens, end) = listener.heard();
            assert_eq!(end, Some(Event::Failed(Failure::UserKvFull { limit_bytes: 2000 })));
            assert_eq!(tokens.len(), n);
        }
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }
}
