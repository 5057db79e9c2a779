//! Which block already holds what a prompt begins with?
//!
//! A sealed block is known by a hash over its tokens and those of all blocks before it, so equal hashes mean equal
//! rows. The hash is keyed (BLAKE3) with a secret of this process and salted with the owner, and with what an owner who
//! serves several people says of each: nobody can find out by timing what somebody else has said, and no collision can
//! be made on purpose.
//!
//! Blocks that nobody holds any more are kept until their place is needed (`kept.rs`).

use crate::kept::{Kept, Which};
use crate::{BLOCK_TOKENS, BlockId};

/// What a block and all before it contain, for one owner and model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub(crate) [u8; 32]);

/// Whose blocks they are: two realms share none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Realm {
    owner: u64,
    salt: [u8; 32],
}

impl std::fmt::Debug for Realm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Realm of {}", self.owner) // the salt may be a secret
    }
}

impl Realm {
    /// What the owner with this number shares with itself; a salt divides that, none is one too.
    pub fn new(owner: u64, salt: Option<[u8; 32]>) -> Self {
        Self { owner, salt: salt.unwrap_or_default() }
    }
}

/// Makes the hashes of one model's blocks.
#[derive(Clone)]
pub struct PrefixHasher {
    key: [u8; 32],
}

impl std::fmt::Debug for PrefixHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrefixHasher") // the key is a secret
    }
}

impl PrefixHasher {
    /// Hashes with this secret, which should be random and as old as the pool.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// Extends `hashes`, one for each full block of `tokens` in order, by those that are missing. Realms do not share.
    ///
    /// # Panics
    /// When there are more hashes than full blocks.
    pub fn extend(&self, realm: Realm, tokens: &[u32], hashes: &mut Vec<BlockHash>) {
        let mut blocks = tokens.chunks_exact(BLOCK_TOKENS as usize);
        assert!(hashes.len() <= blocks.len(), "{} hashes of {} full blocks", hashes.len(), blocks.len());
        let mut before = hashes.last().copied();
        if let Some(done) = hashes.len().checked_sub(1) {
            blocks.nth(done);
        }
        // In one piece: many small ones take longer than the hash.
        let mut said = [0; 72 + 4 * BLOCK_TOKENS as usize];
        said[..8].copy_from_slice(&realm.owner.to_le_bytes());
        said[8..40].copy_from_slice(&realm.salt);
        for block in blocks {
            said[40..72].copy_from_slice(&before.map_or([0; 32], |BlockHash(bytes)| bytes));
            for (bytes, token) in said[72..].chunks_exact_mut(4).zip(block) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            let next = BlockHash(*blake3::keyed_hash(&self.key, &said).as_bytes());
            hashes.push(next);
            before = Some(next);
        }
    }
}

/// Blocks with known content, and those of them without a holder.
///
/// They are found by chains through arrays that are made once: a table that grows, or is tidied up, does so in the
/// middle of a step.
#[derive(Debug)]
pub(crate) struct Prefixes {
    /// The first block of each chain, which has those whose hashes begin alike; as many chains as blocks at least.
    chains: Vec<u32>,
    known: Vec<Option<Known>>,
    kept: Kept,
}

/// What is known of a block.
#[derive(Clone, Copy, Debug)]
struct Known {
    hash: BlockHash,
    /// Whose it is.
    owner: u64,
    /// The next block of its chain.
    next: u32,
}

/// The end of a chain.
const NONE: u32 = u32::MAX;

impl Prefixes {
    pub(crate) fn new(n_blocks: usize) -> Self {
        let chains = vec![NONE; n_blocks.next_power_of_two()];
        Self { chains, known: vec![None; n_blocks], kept: Kept::new(n_blocks) }
    }

    /// Blocks without a holder.
    pub(crate) fn n_kept(&self) -> usize {
        self.kept.n()
    }

    pub(crate) fn is_sealed(&self, block: BlockId) -> bool {
        self.known[block.0 as usize].is_some()
    }

    pub(crate) fn find(&self, hash: BlockHash) -> Option<BlockId> {
        self.links(hash).find(|(_, known)| known.hash == hash).map(|(block, _)| BlockId(block))
    }

    /// Notes what a block of this owner contains. Of two blocks with the same content the first stays known.
    pub(crate) fn seal(&mut self, block: BlockId, hash: BlockHash, owner: u64) {
        let known = self.known[block.0 as usize];
        assert!(known.is_none_or(|known| known.hash == hash), "block {} is sealed already", block.0);
        if self.find(hash).is_none() {
            let chain = self.chain(hash);
            let next = std::mem::replace(&mut self.chains[chain], block.0);
            self.known[block.0 as usize] = Some(Known { hash, owner, next });
        }
    }

    /// The blocks of the chain that has `hash`, if any has.
    fn links(&self, hash: BlockHash) -> impl Iterator<Item = (u32, Known)> {
        let known = |block: u32| Some((block, *self.known.get(block as usize)?.as_ref()?));
        std::iter::successors(known(self.chains[self.chain(hash)]), move |(_, before)| known(before.next))
    }

    /// A hash is as good as random, and nobody can choose it.
    fn chain(&self, BlockHash(bytes): BlockHash) -> usize {
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize & (self.chains.len() - 1)
    }

    /// Keeps a block whose last holder is gone, if its content is known. `is_fast` says where its latent plane is.
    pub(crate) fn keep(&mut self, block: BlockId, is_fast: bool) -> bool {
        let known = self.known[block.0 as usize];
        if let Some(known) = known {
            self.kept.push(block, known.owner, is_fast);
        }
        known.is_some()
    }

    /// A kept block has a holder again.
    pub(crate) fn take(&mut self, block: BlockId) {
        self.kept.remove(block);
    }

    /// Forgets the next one of the kept blocks that may go.
    pub(crate) fn evict(&mut self, which: Which) -> Option<BlockId> {
        let block = self.kept.next(which)?;
        self.kept.remove(block);
        self.forget(block);
        Some(block)
    }

    /// Forgets what a block contains.
    pub(crate) fn forget(&mut self, block: BlockId) {
        let Some(gone) = self.known[block.0 as usize] else { return };
        let chain = self.chain(gone.hash);
        let before = self.links(gone.hash).find(|(_, known)| known.next == block.0);
        match before.and_then(|(before, _)| self.known[before as usize].as_mut()) {
            Some(before) => before.next = gone.next,
            None => self.chains[chain] = gone.next,
        }
        self.known[block.0 as usize] = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(key: u8, owner: u64, tokens: &[u32]) -> Vec<BlockHash> {
        hashes_in(key, Realm::new(owner, None), tokens)
    }

    fn hashes_in(key: u8, realm: Realm, tokens: &[u32]) -> Vec<BlockHash> {
        let mut hashes = Vec::new();
        PrefixHasher::new([key; 32]).extend(realm, tokens, &mut hashes);
        hashes
    }

    #[test]
    fn a_hash_covers_all_tokens_before_it() {
        let tokens: Vec<u32> = (0..200).collect();
        let mut other = tokens.clone();
        other[3] = 77;
        let (a, b) = (hashes(1, 5, &tokens), hashes(1, 5, &other));
        assert_eq!(a.len(), 3);
        assert!(a.iter().zip(&b).all(|(a, b)| a != b), "a change in the first block shows in every hash");
        other[3] = 3;
        other[150] = 77;
        let b = hashes(1, 5, &other);
        assert_eq!(a[..2], b[..2]);
        assert_ne!(a[2], b[2]);
    }

    #[test]
    fn owners_and_processes_do_not_share() {
        let tokens: Vec<u32> = (0..64).collect();
        let all = [hashes(1, 5, &tokens), hashes(1, 6, &tokens), hashes(2, 5, &tokens)].concat();
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
    }

    #[test]
    fn one_owners_salts_do_not_share_any_block() {
        let tokens: Vec<u32> = (0..200).collect();
        let of = |salt| hashes_in(1, Realm::new(5, salt), &tokens);
        let all = [of(None), of(Some([1; 32])), of(Some([2; 32]))].concat();
        for (at, hash) in all.iter().enumerate() {
            assert!(!all[..at].contains(hash), "block {at}");
        }
        assert_eq!(of(Some([1; 32])), all[3..6]);
    }

    #[test]
    fn hashes_made_bit_by_bit_are_those_made_at_once() {
        let tokens: Vec<u32> = (0..400).collect();
        let mut grown = Vec::new();
        let hasher = PrefixHasher::new([9; 32]);
        for n in [0, 63, 64, 65, 191, 192, 400] {
            hasher.extend(Realm::new(1, None), &tokens[..n], &mut grown);
        }
        assert_eq!(grown, hashes(9, 1, &tokens));
    }

    /// Twice as many contents as blocks come and go; all chains are those of a plain map.
    #[test]
    fn blocks_are_found_by_what_they_contain_however_many_came_and_went() {
        const N: usize = 100;
        let mut prefixes = Prefixes::new(N);
        let mut map = std::collections::BTreeMap::new();
        let hashes = hashes(1, 5, &(0..64 * 2 * N as u32).collect::<Vec<_>>());
        let mut random = 7_usize;
        for _ in 0..5000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (block, content) = ((random >> 33) % N, (random >> 45) % (2 * N));
            if prefixes.is_sealed(BlockId(block as u32)) {
                prefixes.forget(BlockId(block as u32));
                map.retain(|_, of| *of != block);
            } else {
                prefixes.seal(BlockId(block as u32), hashes[content], 5);
                map.entry(content).or_insert(block);
            }
            for (content, &hash) in hashes.iter().enumerate() {
                let found = prefixes.find(hash).map(|block| block.0 as usize);
                assert_eq!(found, map.get(&content).copied(), "content {content}");
            }
        }
    }
}
