//! What does a device answer whose next token depends on every row that it should have kept?
//!
//! A row holds its token and position. What is sampled from is a function of the whole history, which is read back
//! through the block tables: fast rows from an array, slow ones through the plugins' row cache from a disk that fails.
//! A row that is lost, stale, shared by mistake or read from the wrong place shows in the answer, if not before.

use crate::area::Area;
use crate::outline::Mistake;
use fastrand::Rng;
use sparsed_engine::simulation::{Device, DeviceFault, StepView};
use sparsed_kv::{BLOCK_TOKENS, BlockId};
use sparsed_rowcache::{
    Cipher, Lookup, Policy, RowCache, RowCacheError, RowKey, SLOT_OVERHEAD_BYTES, Seal, SlowKey, SlowLayout,
};

/// Tokens of the vocabulary.
pub(crate) const VOCAB: u32 = 97;
/// Bytes of a row in a host image.
const ROW_BYTES: usize = 8;
/// Bytes of a row in the slow tier: a block takes four pages.
const SLOW_ROW_BYTES: usize = 200;
const BLOCK: usize = BLOCK_TOKENS as usize;
/// Bytes of a block's host image.
pub(crate) const IMAGE_BYTES: u32 = BLOCK_TOKENS * ROW_BYTES as u32;

type Row = (u32, u32);
type Result<T> = std::result::Result<T, DeviceFault>;

/// A device in memory.
#[derive(Debug)]
pub(crate) struct FakeDevice {
    rng: Rng,
    /// Token and position of each slot in fast memory.
    rows: Vec<Option<Row>>,
    /// The tag of each block that is read in the slow tier.
    slow: Vec<Option<u64>>,
    layout: SlowLayout,
    seal: Seal,
    cache: RowCache,
    lookup: Lookup,
    pub(crate) area: Area,
    /// One call in so many fails; 0 is never.
    pub(crate) one_in: u32,
    pub(crate) mistake: Mistake,
    /// The image that was imported last.
    last_image: Vec<u8>,
    is_queue_lost: bool,
    is_lost: bool,
    /// The first thing that must not be.
    pub(crate) violation: Option<String>,
    buffer: Vec<u8>,
    /// Rows that were read through the cache.
    pub(crate) n_slow_rows: u64,
    /// Images that were imported.
    pub(crate) n_images: u64,
}

/// What a row takes in the cache of slow rows, and how many it holds at most.
pub(crate) const CACHE_ROW_BYTES: usize = SLOW_ROW_BYTES + SLOT_OVERHEAD_BYTES;
pub(crate) const CACHE_ROWS_MAX: usize = 200;

impl FakeDevice {
    pub(crate) fn new(n_blocks: u32, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let layout = SlowLayout::new(SLOW_ROW_BYTES, BLOCK_TOKENS, 1).expect("a row fits into a page");
        let area = Area::new(&layout, n_blocks, rng.u64(..));
        let policy = [Policy::Clock, Policy::Frequency, Policy::Lru][rng.usize(..3)];
        let limit_bytes = rng.usize(8..CACHE_ROWS_MAX) * CACHE_ROW_BYTES;
        let key = SlowKey::new(Cipher::ChaCha20Poly1305, std::array::from_fn(|_| rng.u8(..)));
        let seal = Seal::new(Some(&key));
        let form = (layout, seal.clone());
        let cache = RowCache::new(form, policy, n_blocks, area.n_bytes(), limit_bytes).expect("a row fits");
        Self {
            rng,
            rows: vec![None; n_blocks as usize * BLOCK],
            slow: vec![None; n_blocks as usize],
            layout,
            seal,
            cache,
            lookup: Lookup::default(),
            area,
            one_in: 0,
            mistake: Mistake::Nothing,
            last_image: vec![0; IMAGE_BYTES as usize],
            is_queue_lost: false,
            is_lost: false,
            violation: None,
            buffer: Vec::new(),
            n_slow_rows: 0,
            n_images: 0,
        }
    }

    /// Whether a call fails before it has done anything.
    fn call(&mut self) -> Result<()> {
        if !self.is_lost && !self.is_queue_lost && self.one_in > 0 && self.rng.u32(..self.one_in) == 0 {
            match self.rng.u32(..12) {
                0 => self.is_lost = true,
                1..4 => self.is_queue_lost = true,
                4..6 => return Err(DeviceFault::NoMemory),
                _ => return Err(DeviceFault::Step),
            }
        }
        match (self.is_lost, self.is_queue_lost) {
            (true, _) => Err(DeviceFault::Device),
            (_, true) => Err(DeviceFault::Queue),
            _ => Ok(()),
        }
    }

    fn wrong(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    fn write(&mut self, slot: u64, row: Row) {
        let at = usize::try_from(slot).expect("a pool is in memory");
        if self.slow[at / BLOCK].is_some() {
            self.wrong(format!("slot {slot} is written and its block is in the slow tier"));
        }
        // A step that failed may have written it before.
        if let Some(other) = self.rows[at].replace(row)
            && other != row
        {
            self.wrong(format!("slot {slot} has {other:?} and {row:?} is written over it"));
        }
    }

    /// The first `n` rows of blocks that follow each other.
    fn read(&mut self, blocks: &[u32], n: usize) -> Result<Vec<Row>> {
        let mut rows = Vec::with_capacity(n);
        for (block, first) in blocks.iter().zip((0..n).step_by(BLOCK)) {
            let n_rows = BLOCK.min(n - first);
            if self.slow[*block as usize].is_some() {
                self.read_slow(*block, n_rows, &mut rows)?;
                continue;
            }
            let start = *block as usize * BLOCK;
            let found: Option<Vec<Row>> = self.rows[start..start + n_rows].iter().copied().collect();
            match found {
                Some(found) => rows.extend(found),
                None => {
                    self.wrong(format!("block {block} is read and not all of it was written"));
                    return Err(DeviceFault::Step);
                }
            }
        }
        Ok(rows)
    }

    /// As the plugins do: in portions that fit into the cache.
    fn read_slow(&mut self, block: u32, n_rows: usize, rows: &mut Vec<Row>) -> Result<()> {
        self.n_slow_rows += n_rows as u64;
        let keys: Vec<RowKey> = (0..).map(|token| RowKey { block, layer: 0, token }).take(n_rows).collect();
        for portion in keys.chunks(self.cache.n_slots()) {
            let read = self.read_portion(portion, rows);
            self.cache.release();
            read.map_err(|_| DeviceFault::Page(block))?;
        }
        Ok(())
    }

    fn read_portion(&mut self, keys: &[RowKey], rows: &mut Vec<Row>) -> std::result::Result<(), RowCacheError> {
        self.cache.lookup(keys, &mut self.lookup)?;
        // As a disk that does several things at a time ends them: in any order.
        let mut order: Vec<usize> = (0..self.lookup.reads().len()).collect();
        self.rng.shuffle(&mut order);
        for at in order {
            self.area.read(self.lookup.reads()[at], &mut self.buffer);
            self.cache.admit(&mut self.lookup, at, &mut self.buffer)?;
        }
        rows.extend(keys.iter().map(|&key| row_of(self.cache.row(key).expect("its lookup is complete"))));
        Ok(())
    }
}

impl Device for FakeDevice {
    fn run(&mut self, step: &StepView<'_>) -> Result<Vec<f32>> {
        let called = self.call();
        // One that fails has written some of it.
        let n_written = if called.is_ok() { step.slots.len() } else { self.rng.usize(..=step.slots.len()) };
        if !self.is_lost {
            let written = step.slots.iter().zip(step.tokens).zip(step.positions).take(n_written);
            written.for_each(|((&slot, &token), &position)| self.write(slot, (token, position)));
        }
        called?;
        let mut logits = Vec::with_capacity(step.rows.len() * VOCAB as usize);
        for &row in step.rows {
            let sequence = step.seq_offsets.iter().rposition(|&start| start <= row).expect("the first starts at 0");
            let blocks = step.block_offsets[sequence] as usize..step.block_offsets[sequence + 1] as usize;
            let n = step.positions[row as usize] as usize + 1;
            let rows = self.read(&step.block_ids[blocks], n)?;
            if let Some(at) = rows.iter().zip(0..).position(|((_, position), at)| *position != at) {
                self.wrong(format!("position {at} of a sequence has the row of position {}", rows[at].1));
            }
            logits.extend(logits_of(rows.into_iter().map(|(token, _)| token)));
            if self.one_in > 0 && self.rng.u32(..self.one_in * 4) == 0 {
                *logits.last_mut().expect("just added") = f32::NAN;
            }
        }
        Ok(logits)
    }

    fn discard(&mut self, blocks: &[BlockId]) -> Result<()> {
        self.call()?;
        for block in blocks {
            let at = block.0 as usize;
            if self.slow[at].take().is_some() {
                self.cache.detach(block.0).expect("it is attached");
            }
            if self.mistake != Mistake::KeepsFreed {
                self.rows[at * BLOCK..(at + 1) * BLOCK].fill(None);
            }
        }
        Ok(())
    }

    fn renew_queue(&mut self) -> Result<()> {
        self.is_queue_lost = false;
        self.call()
    }

    fn export(&mut self, block: BlockId) -> Result<Vec<u8>> {
        self.call()?;
        let rows = self.read(&[block.0], BLOCK)?.into_iter();
        Ok(rows.flat_map(|(token, position)| bytes_of(token, position)).collect())
    }

    fn import(&mut self, block: BlockId, image: &[u8]) -> Result<()> {
        self.call()?;
        self.n_images += 1;
        let before = std::mem::replace(&mut self.last_image, image.to_vec());
        let image = if self.mistake == Mistake::OldImages { &before } else { image };
        for (offset, row) in (0..).zip(image.chunks_exact(ROW_BYTES)) {
            let slot = block.slot(offset);
            if self.rows[usize::try_from(slot).expect("a pool is in memory")].is_some_and(|have| have != row_of(row)) {
                self.wrong(format!("block {} is filled and was not discarded", block.0));
            }
            self.write(slot, row_of(row));
        }
        Ok(())
    }

    fn slow_copy(&mut self, block: BlockId, tag: u64) -> Result<Box<dyn FnOnce() -> std::io::Result<()> + Send>> {
        self.call()?;
        let mut plane = vec![0; self.layout.plane_bytes()];
        for (row, (token, position)) in plane.chunks_exact_mut(SLOW_ROW_BYTES).zip(self.read(&[block.0], BLOCK)?) {
            row[..ROW_BYTES].copy_from_slice(&bytes_of(token, position));
        }
        let (layout, seal) = (self.layout, self.seal.clone());
        let (area, offset) = (self.area.clone(), block.0 as usize * layout.block_bytes());
        Ok(Box::new(move || {
            let mut image = vec![0; layout.block_bytes()];
            layout.encode_block(&seal, &plane, tag, &mut image).expect("a plane and an image of this layout");
            area.write(offset, &image)
        }))
    }

    fn relocate(&mut self, block: BlockId, tag: u64) -> Result<()> {
        self.call()?;
        let at = block.0 as usize;
        self.rows[at * BLOCK..(at + 1) * BLOCK].fill(None);
        self.slow[at] = Some(tag);
        let offset = (at * self.layout.block_bytes()) as u64;
        self.cache.attach(block.0, offset, tag).expect("a place of the area");
        Ok(())
    }

    fn limit_cache(&mut self, bytes: u64) -> Result<()> {
        self.call()?;
        let bytes = usize::try_from(bytes).expect("a cache is in memory");
        self.cache.limit(bytes).map_err(|_| DeviceFault::NoMemory)
    }

    fn is_well(&mut self) -> bool {
        !self.is_lost && (self.one_in == 0 || self.rng.u32(..8) > 0)
    }
}

/// What follows this history, as logits.
pub(crate) fn logits_of(history: impl Iterator<Item = u32>) -> Vec<f32> {
    let seed = history.fold(7_u32, |hash, token| (hash.rotate_left(5) ^ token).wrapping_mul(0x9e37_79b1));
    let of = |token: u32| (seed ^ token.wrapping_mul(0x85eb_ca6b)).wrapping_mul(0xc2b2_ae35) >> 20;
    #[expect(clippy::cast_precision_loss, reason = "12 bits")]
    let logit = |token| of(token) as f32 / 1024.0;
    (0..VOCAB).map(logit).collect()
}

fn bytes_of(token: u32, position: u32) -> [u8; ROW_BYTES] {
    (u64::from(token) | u64::from(position) << 32).to_le_bytes()
}

fn row_of(bytes: &[u8]) -> Row {
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    (number(0), number(4))
}
