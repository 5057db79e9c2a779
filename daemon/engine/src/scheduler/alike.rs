//! Who waits for rows that another sequence is about to compute? Who begins alike: several answers to one prompt, or
//! requests of one owner with the same long instructions that come together.
//!
//! The oldest of them reads what they have in common, the others take its blocks as they become full, and read the rest
//! by themselves: a block that is not full is nobody else's.

use super::Scheduler;
use crate::sequence::Sequence;
use sparsed_kv::{BLOCK_TOKENS, BlockHash};

impl Scheduler {
    /// Gives those whose prompts are read the blocks that others have computed meanwhile.
    pub(super) fn adopt_alike(&mut self) {
        for sequence in self.running.iter_mut().filter(|sequence| next_hash(sequence).is_some()) {
            sequence.adopt_beginning(&mut self.pool);
        }
    }
}

/// Whether the next block of the prompt at `index` is one that an older sequence is reading.
pub(super) fn waits(running: &[Sequence], index: usize) -> bool {
    let sequence = &running[index];
    let Some(hash) = next_hash(sequence) else { return false };
    // A hash stands for all tokens up to the block's end, and for the owner.
    let at = sequence.sealed_blocks().len();
    running[..index].iter().any(|other| {
        other.n_pending() > 1
            && other.is_ready()
            && other.sealed_blocks().len() <= at
            && other.beginning().get(at) == Some(hash)
    })
}

/// What the next block of the prompt would contain, where one could be taken from somebody else now. Blocks of sessions
/// come from their files.
fn next_hash(sequence: &Sequence) -> Option<&BlockHash> {
    let n_blocks = sequence.sealed_blocks().len();
    let is_at_block_end = sequence.table.n_tokens() as usize == n_blocks * BLOCK_TOKENS as usize;
    if sequence.n_pending() <= 1 || sequence.durable.is_some() || !is_at_block_end {
        return None;
    }
    sequence.beginning().get(n_blocks)
}

#[cfg(test)]
mod tests {
    use crate::api::{CacheSalt, Event, Generate, Owner};
    use crate::scheduler::Limits;
    use crate::testing::{BLOCK, Bench, Listener, limits, naive, prompt, request};

    const N: usize = 4;

    fn answers(owners: [u32; N], prompts: [Vec<u32>; N]) -> (Vec<Listener>, usize) {
        let mut bench = Bench::new(32, Limits { max_running: N as u32, ..limits() });
        let listeners: Vec<Listener> = (0..N).map(|_| Listener::with_room(1000)).collect();
        for ((owner, tokens), listener) in owners.into_iter().zip(&prompts).zip(&listeners) {
            bench.submit_of(Owner::Uid(owner), None, tokens.clone(), 5, listener);
        }
        bench.run();
        for (listener, tokens) in listeners.iter().zip(prompts) {
            assert_eq!(listener.heard().0, naive(tokens, 5));
        }
        assert_eq!(bench.scheduler.load().blocks_used, 0);
        (listeners, bench.executor.computed)
    }

    #[test]
    fn several_answers_to_one_prompt_read_it_once() {
        let n_prompt = 2 * BLOCK + 20;
        let same = || std::array::from_fn(|_| prompt(1, n_prompt as u32));
        let (listeners, computed) = answers([7; N], same());
        assert_eq!(computed, 2 * BLOCK + N * (20 + 4), "full blocks are computed once, the rest by each");
        for (listener, cached) in listeners.iter().zip([0, 2, 2, 2]) {
            let Some(Event::Finished(finished)) = listener.heard().1 else { panic!("{:?}", listener.heard()) };
            assert_eq!(finished.usage.cached_tokens as usize, cached * BLOCK);
        }
        let (_, computed) = answers([1, 2, 3, 4], same());
        assert_eq!(computed, N * (n_prompt + 4), "different owners share nothing");
    }

    #[test]
    fn one_owners_requests_with_different_salts_share_nothing_at_once_or_later() {
        let mut bench = Bench::new(32, limits());
        let n_prompt = 2 * BLOCK + 20;
        let mut cached_tokens = |salts: [Option<&str>; 2]| {
            let listeners = salts.map(|_| Listener::with_room(1000));
            for (salt, listener) in salts.into_iter().zip(&listeners) {
                let cache_salt = salt.map(|text| CacheSalt::checked(text).unwrap());
                let asked = request(Owner::Uid(7), None, prompt(1, n_prompt as u32), 3);
                bench.submit_request(Generate { cache_salt, ..asked }, listener);
            }
            bench.run();
            listeners.map(|listener| match listener.heard().1 {
                Some(Event::Finished(finished)) => finished.usage.cached_tokens as usize,
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(cached_tokens([Some("a"), Some("b")]), [0, 0]);
        assert_eq!(cached_tokens([None, Some("a")]), [0, 2 * BLOCK]);
        assert_eq!(cached_tokens([Some("c"), None]), [0, 2 * BLOCK]);
    }

    #[test]
    fn prompts_that_part_later_share_what_they_have_in_common() {
        let parting = |at: usize| {
            let mut tokens = prompt(1, (3 * BLOCK) as u32 + 10);
            tokens[at] = 96;
            tokens
        };
        let (_, computed) = answers([7; N], [parting(0), parting(BLOCK), parting(BLOCK + 1), parting(2 * BLOCK)]);
        let each = 3 * BLOCK + 10 + 4;
        // The first block of the second is the third's and the fourth's too; no two have the second in common.
        assert_eq!(computed, N * each - 2 * BLOCK);
    }

    #[test]
    fn who_waits_goes_on_when_the_one_that_reads_goes_away() {
        let mut bench = Bench::new(32, limits());
        let [gone, stays] = [(), ()].map(|()| Listener::with_room(1000));
        for listener in [&gone, &stays] {
            bench.submit(prompt(1, 300), 5, listener);
        }
        bench.steps(2);
        gone.set(1000, true);
        bench.run();
        assert_eq!(stays.heard().0, naive(prompt(1, 300), 5));
    }
}
