//! The cache over a disk that fails, shortens, flips bits and keeps old pages, against a map of what was written.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use fastrand::Rng;
use sparsed_rowcache::{
    Cipher, Lookup, PAGE_BYTES, PageFault, Policy, Read, RowCache, RowCacheError, RowKey, SLOT_OVERHEAD_BYTES, Seal,
    SlowKey, SlowLayout,
};
use std::collections::{BTreeMap, BTreeSet};

const N_BLOCKS: u32 = 6;
const N_PLACES: usize = 8;
const STEPS: usize = 400;

/// Blocks that lie in the slow tier, as the daemon knows them.
#[derive(Debug)]
struct Block {
    place: usize,
    plane: Vec<u8>,
}

#[derive(Debug)]
struct Simulation {
    random: Rng,
    layout: SlowLayout,
    seal: Seal,
    cache: RowCache,
    /// `N_PLACES` images.
    disk: Vec<u8>,
    blocks: BTreeMap<u32, Block>,
    /// Pages of the disk that are not what was written last: place, page.
    spoilt: BTreeSet<(usize, u32)>,
    next_tag: u64,
    /// Everything that was answered, for comparing two runs.
    log: u64,
    seen: Seen,
}

/// What has occurred, so that a simulation that tries nothing is noticed.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    complete: u64,
    faults: u64,
    bad_pages: u64,
    too_small: u64,
}

/// In a file with either cipher, or in memory.
fn any_seal(random: &mut Rng) -> Seal {
    let key: [u8; 32] = std::array::from_fn(|_| random.u8(..));
    Seal::new(Cipher::numbered(random.u32(..3)).map(|cipher| SlowKey::new(cipher, key)).as_ref())
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let policy = [Policy::Clock, Policy::Frequency, Policy::Lru][random.usize(..3)];
        let layout = SlowLayout::new(random.usize(100..2000), random.u32(1..20), random.u32(1..4)).unwrap();
        let seal = any_seal(&mut random);
        let n_slots = random.usize(1..60);
        let limit_bytes = n_slots * (layout.row_bytes() + SLOT_OVERHEAD_BYTES);
        let disk = vec![0; N_PLACES * layout.block_bytes()];
        let form = (layout, seal.clone());
        let cache = RowCache::new(form, policy, N_BLOCKS, disk.len() as u64, limit_bytes).unwrap();
        assert_eq!(cache.n_slots(), n_slots);
        let (blocks, spoilt) = (BTreeMap::new(), BTreeSet::new());
        Self { random, layout, seal, cache, disk, blocks, spoilt, next_tag: 1, log: 0, seen: Seen::default() }
    }

    fn run(mut self) -> (u64, Seen) {
        for _ in 0..STEPS {
            match self.random.u32(..10) {
                0 => self.attach(),
                1 if self.random.bool() => self.detach(),
                2 if self.random.u32(..8) == 0 => self.spoil(),
                _ => self.step(),
            }
            self.check_all();
        }
        (self.log, self.seen)
    }

    fn note(&mut self, value: u64) {
        self.log = (self.log ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(17);
    }

    /// A block moves to the slow tier, or to another place of it; its image is written, or the write is lost.
    fn attach(&mut self) {
        let block = self.random.u32(..N_BLOCKS);
        let taken: Vec<usize> = self.blocks.values().map(|block| block.place).collect();
        let empty: Vec<usize> = (0..N_PLACES).filter(|place| !taken.contains(place)).collect();
        let place = *self.random.choice(&empty).unwrap();
        let plane: Vec<u8> = (0..self.layout.plane_bytes()).map(|_| self.random.u8(..)).collect();
        let (size, tag) = (self.layout.block_bytes(), self.next_tag);
        self.next_tag += 1;
        let pages = 0..self.layout.block_pages();
        if self.random.u32(..8) == 0 {
            self.spoilt.extend(pages.map(|page| (place, page)));
        } else {
            self.layout.encode_block(&self.seal, &plane, tag, &mut self.disk[place * size..][..size]).unwrap();
            self.spoilt.retain(|&(other, _)| other != place);
        }
        self.cache.attach(block, (place * size) as u64, tag).unwrap();
        self.blocks.insert(block, Block { place, plane });
    }

    fn detach(&mut self) {
        let block = self.random.u32(..N_BLOCKS);
        match self.blocks.remove(&block) {
            Some(_) => self.cache.detach(block).unwrap(),
            None => assert_eq!(self.cache.detach(block), Err(RowCacheError::NotAttached { block })),
        }
    }

    /// A bit of the disk flips for good.
    fn spoil(&mut self) {
        let at = self.random.usize(..self.disk.len());
        let (place, page) = (at / self.layout.block_bytes(), at % self.layout.block_bytes() / PAGE_BYTES);
        let page = u32::try_from(page).unwrap();
        // A second flip could undo the first.
        if self.spoilt.insert((place, page)) {
            self.disk[at] ^= 1 << self.random.u32(..8);
        }
    }

    fn selection(&mut self) -> Vec<RowKey> {
        let n = self.random.usize(..self.cache.n_slots() + 3);
        let blocks: Vec<u32> = self.blocks.keys().copied().collect();
        let (tokens, layer) = (self.tokens(), self.random.u32(..self.layers()));
        let key = |random: &mut Rng| {
            let block = *random.choice(&blocks)?;
            Some(RowKey { block, layer, token: random.u32(..tokens) })
        };
        (0..n).filter_map(|_| key(&mut self.random)).collect()
    }

    /// One operator: one or two portions of rows, all in use until its end; repeated until no passing fault is left.
    fn step(&mut self) {
        let portions: Vec<Vec<RowKey>> = (0..self.random.usize(1..3)).map(|_| self.selection()).collect();
        let mut faults = self.random.bool();
        while !self.attempt(&portions, faults) {
            self.seen.faults += 1;
            self.cache.release();
            faults = false;
        }
        self.cache.release();
    }

    /// False when a passing fault cut it short.
    fn attempt(&mut self, portions: &[Vec<RowKey>], faults: bool) -> bool {
        let mut done: Vec<(&[RowKey], Lookup)> = Vec::new();
        for keys in portions {
            let mut lookup = Lookup::with_capacity(keys.len());
            let distinct: BTreeSet<_> =
                portions.iter().flatten().map(|key| (key.block, key.layer, key.token)).collect();
            match self.cache.lookup(keys, &mut lookup) {
                Ok(()) => {}
                Err(RowCacheError::TooSmall { needed, slots }) => {
                    assert!(needed > slots && distinct.len() > slots, "what fits is not refused");
                    self.seen.too_small += 1;
                    return true;
                }
                Err(error) => panic!("{error}"),
            }
            self.note(lookup.reads().len() as u64);
            let mut order: Vec<usize> = (0..lookup.reads().len()).collect();
            self.random.shuffle(&mut order);
            for read in order {
                let wanted = lookup.reads()[read];
                if faults && self.random.u32(..6) == 0 {
                    self.refuse_faulty(&mut lookup, read, wanted);
                    return false;
                }
                let mut bytes = self.disk[usize::try_from(wanted.offset).unwrap()..][..wanted.len_bytes()].to_vec();
                let before = self.cache.n_rows();
                match self.cache.admit(&mut lookup, read, &mut bytes) {
                    Ok(()) => assert!(!self.is_spoilt(wanted), "a spoilt page was taken"),
                    Err(error @ RowCacheError::BadPage { block, page, .. }) => {
                        assert!(self.spoilt.contains(&(self.blocks[&block].place, page)), "{error}");
                        assert_eq!(self.cache.n_rows(), before);
                        self.seen.bad_pages += 1;
                        return true;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            done.push((keys, lookup));
            // Also those of the first portion, after the second has come.
            done.iter().for_each(|(keys, lookup)| self.check_rows(keys, lookup));
        }
        self.seen.complete += 1;
        true
    }

    /// A read fails, comes short, or has a flipped bit: it is refused and changes nothing.
    fn refuse_faulty(&mut self, lookup: &mut Lookup, read: usize, wanted: Read) {
        let mut bytes = self.disk[usize::try_from(wanted.offset).unwrap()..][..wanted.len_bytes()].to_vec();
        let (rows, counters) = (self.cache.n_rows(), self.cache.counters());
        match self.random.u32(..3) {
            0 => return,
            1 => {
                bytes.truncate(self.random.usize(..bytes.len()));
                let short = self.cache.admit(lookup, read, &mut bytes);
                assert!(matches!(short, Err(RowCacheError::Length { .. })), "{short:?}");
            }
            _ => {
                let at = self.random.usize(..bytes.len());
                bytes[at] ^= 1 << self.random.u32(..8);
                // A flip on top of a spoilt page may mend it, or make another fault of it.
                if !self.is_spoilt(wanted) {
                    let bad = self.cache.admit(lookup, read, &mut bytes);
                    let other = |fault: &PageFault| matches!(fault, PageFault::Seal | PageFault::Crc { .. });
                    assert!(matches!(&bad, Err(RowCacheError::BadPage { fault, .. }) if other(fault)), "{bad:?}");
                }
            }
        }
        assert_eq!((self.cache.n_rows(), self.cache.counters().evictions), (rows, counters.evictions));
    }

    fn is_spoilt(&self, read: Read) -> bool {
        let size = self.layout.block_bytes() as u64;
        let pages = (0..u64::from(read.n_pages)).map(|page| read.offset + page * PAGE_BYTES as u64);
        let mut places = pages.map(|at| ((at / size) as usize, u32::try_from(at % size / PAGE_BYTES as u64).unwrap()));
        places.any(|place| self.spoilt.contains(&place))
    }

    /// What was asked for is there.
    fn check_rows(&self, keys: &[RowKey], lookup: &Lookup) {
        assert!(lookup.is_complete());
        keys.iter().for_each(|&key| assert!(self.cache.row(key).is_some(), "{key:?}"));
        self.check_all();
    }

    /// What is there is right, and no more than there is room for.
    fn check_all(&self) {
        let (width, mut present) = (self.layout.row_bytes(), 0);
        for block in 0..N_BLOCKS {
            for (layer, token) in (0..self.layers()).flat_map(|layer| (0..self.tokens()).map(move |t| (layer, t))) {
                let key = RowKey { block, layer, token };
                let Some(row) = self.cache.row(key) else { continue };
                let at = (layer * self.tokens() + token) as usize * width;
                assert!(row == &self.blocks[&block].plane[at..at + width], "{key:?}");
                present += 1;
            }
        }
        assert_eq!(present, self.cache.n_rows());
        assert!(present <= self.cache.n_slots());
    }

    fn tokens(&self) -> u32 {
        (0..).find(|&token| self.layout.row_index(0, token).is_err()).unwrap()
    }

    fn layers(&self) -> u32 {
        (0..).find(|&layer| self.layout.row_index(layer, 0).is_err()).unwrap()
    }
}

#[test]
fn no_wrong_row_is_ever_given_out_and_every_fault_is_named() {
    let mut all = Seen::default();
    for seed in 0..300 {
        let run = std::panic::catch_unwind(|| Simulation::new(seed).run());
        let (_, seen) = run.unwrap_or_else(|_| panic!("seed {seed}"));
        all.complete += seen.complete;
        all.faults += seen.faults;
        all.bad_pages += seen.bad_pages;
        all.too_small += seen.too_small;
    }
    let each = [all.complete, all.faults, all.bad_pages, all.too_small];
    assert!(each.iter().all(|&n| n > 1000), "hardly tried: {all:?}");
}

#[test]
fn one_seed_gives_one_run() {
    assert_eq!(Simulation::new(7).run().0, Simulation::new(7).run().0);
    assert_ne!(Simulation::new(7).run().0, Simulation::new(8).run().0);
}

#[test]
fn a_read_with_any_wrong_byte_is_refused_whole() {
    for key in [None, Some(SlowKey::new(Cipher::Aes256Gcm, [1; 32]))] {
        refuse_every_wrong_byte(&Seal::new(key.as_ref()));
    }
}

fn refuse_every_wrong_byte(seal: &Seal) {
    let layout = SlowLayout::new(656, 64, 1).unwrap();
    let form = (layout, seal.clone());
    let mut cache = RowCache::new(form, Policy::Clock, 1, layout.block_bytes() as u64, 1 << 20).unwrap();
    let mut random = Rng::with_seed(2);
    let plane: Vec<u8> = (0..layout.plane_bytes()).map(|_| random.u8(..)).collect();
    let mut image = vec![0; layout.block_bytes()];
    layout.encode_block(seal, &plane, 5, &mut image).unwrap();
    cache.attach(0, 0, 5).unwrap();
    let keys: Vec<RowKey> = (0..64).map(|token| RowKey { block: 0, layer: 0, token }).collect();
    let mut lookup = Lookup::with_capacity(64);
    cache.lookup(&keys, &mut lookup).unwrap();
    assert_eq!(lookup.reads(), [Read { block: 0, offset: 0, n_pages: 11 }]);
    for at in 0..image.len() {
        let mut read = image.clone();
        read[at] ^= random.u8(1..);
        let page = u32::try_from(at / PAGE_BYTES).unwrap();
        match cache.admit(&mut lookup, 0, &mut read) {
            Err(RowCacheError::BadPage { page: found, .. }) => assert_eq!(found, page, "byte {at}"),
            other => panic!("byte {at}: {other:?}"),
        }
        assert_eq!(cache.n_rows(), 0, "byte {at}");
    }
    cache.admit(&mut lookup, 0, &mut image).unwrap();
    assert_eq!(cache.n_rows(), 64);
}
