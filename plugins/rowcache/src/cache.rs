//! Which rows are present, and which make room for others?
//!
//! An attached block has a map from its rows to slots, 4 bytes a row: an array instead of a hash table, because it is
//! one load per row, neighbouring tokens share a cache line, and giving a block back finds its rows at once.
//! Rows in use are marked with the epoch in which they were asked for; [`RowCache::release`] begins the next one.

use crate::error::{Result, RowCacheError};
use crate::layout::{PAGE_BYTES, PageBytes, SlowLayout, check_length};
use crate::lookup::{Lookup, Miss, NO_SLOT, RowKey};
use crate::replacement::{Policy, Replacement};
use crate::seal::Seal;

/// Memory that a slot takes besides its row, at most.
pub const SLOT_OVERHEAD_BYTES: usize = 28;

/// Rows of the slow tier in a fixed number of slots.
#[derive(Debug)]
pub struct RowCache {
    layout: SlowLayout,
    seal: Seal,
    /// Slots that it was made with.
    n_most: usize,
    /// `[n_slots, row_bytes]`
    rows: Vec<u8>,
    /// Whose row each slot has; meaningless for free slots.
    owners: Vec<Owner>,
    /// The epoch in which each slot was last asked for.
    used: Vec<u64>,
    free: Vec<u32>,
    replacement: Replacement,
    blocks: Vec<Option<Attached>>,
    /// Length of the slow area.
    area_bytes: u64,
    epoch: u64,
    /// Slots that were asked for in this epoch.
    n_used: usize,
    /// Rows that were promised a slot in this epoch and have not come yet.
    n_promised: usize,
    counters: Counters,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    block: u32,
    row: u32,
}

/// A block in the slow tier.
#[derive(Debug)]
struct Attached {
    slow_offset: u64,
    tag: u64,
    /// The slot of each row, `[n_layers, block_tokens]`, or NO_SLOT.
    slots: Box<[u32]>,
}

/// What has happened since the cache was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Rows that were asked for and present.
    pub hits: u64,
    /// Different rows that were asked for in one lookup and not present.
    pub misses: u64,
    /// Rows that made room for others.
    pub evictions: u64,
    /// Pages that were read and found right.
    pub pages: u64,
    /// Reads that had a page which was not right.
    pub bad_reads: u64,
}

impl RowCache {
    /// A cache for a pool of `n_blocks` blocks whose slow area has `area_bytes`, in pages of this layout and seal; it
    /// takes `limit_bytes` besides the maps of attached blocks.
    ///
    /// # Errors
    /// [`RowCacheError::TooSmall`] when no row fits, [`RowCacheError::Size`] when 2^32 - 1 rows or more would.
    pub fn new(
        (layout, seal): (SlowLayout, Seal),
        policy: Policy,
        n_blocks: u32,
        area_bytes: u64,
        limit_bytes: usize,
    ) -> Result<Self> {
        let n_slots = slots_of(&layout, limit_bytes)?;
        let end = u32::try_from(n_slots).ok().filter(|&n| n < NO_SLOT);
        let end = end.ok_or(RowCacheError::Size { what: "the number of slots" })?;
        Ok(Self {
            layout,
            seal,
            n_most: n_slots,
            rows: vec![0; n_slots * layout.row_bytes()],
            owners: vec![Owner { block: 0, row: 0 }; n_slots],
            used: vec![0; n_slots],
            free: (0..end).rev().collect(),
            replacement: Replacement::new(policy, n_slots),
            blocks: (0..n_blocks).map(|_| None).collect(),
            area_bytes,
            epoch: 1,
            n_used: 0,
            n_promised: 0,
            counters: Counters::default(),
        })
    }

    /// How many slots a limit leaves.
    ///
    /// # Errors
    /// [`RowCacheError::TooSmall`] when no row fits.
    pub fn slots_in(&self, limit_bytes: usize) -> Result<usize> {
        Ok(slots_of(&self.layout, limit_bytes)?.min(self.n_most))
    }

    /// Takes `limit_bytes` from now on, and no more than it was made with: rows in slots beyond are forgotten, and
    /// their memory is given back. Ends the epoch as [`Self::release`] does.
    ///
    /// # Errors
    /// [`RowCacheError::TooSmall`] when no row fits. Nothing has changed then.
    pub fn limit(&mut self, limit_bytes: usize) -> Result<()> {
        let (before, n_slots) = (self.n_slots(), self.slots_in(limit_bytes)?);
        let row_bytes = self.layout.row_bytes();
        self.release();
        for slot in n_slots..before {
            let Owner { block, row } = self.owners[slot];
            let entry = self.blocks[block as usize].as_mut().and_then(|attached| attached.slots.get_mut(row as usize));
            // A free slot has an owner that has forgotten it.
            if let Some(entry) = entry.filter(|entry| **entry as usize == slot) {
                *entry = NO_SLOT;
            }
        }
        if n_slots < before {
            self.rows.truncate(n_slots * row_bytes);
            self.rows.shrink_to_fit();
        } else {
            // Zeroes that nobody has written take no memory yet, as at the beginning.
            let mut rows = vec![0; n_slots * row_bytes];
            rows[..self.rows.len()].copy_from_slice(&self.rows);
            self.rows = rows;
        }
        self.owners.resize(n_slots, Owner { block: 0, row: 0 });
        self.used.resize(n_slots, 0);
        self.replacement.resize(n_slots);
        self.free.retain(|&slot| (slot as usize) < n_slots);
        // What was used before is used again first.
        self.free.splice(..0, (before as u32..n_slots as u32).rev());
        Ok(())
    }

    /// How many rows can be present; a lookup of so many rows fits after [`Self::release`].
    pub fn n_slots(&self) -> usize {
        self.owners.len()
    }

    /// How many rows are present.
    pub fn n_rows(&self) -> usize {
        self.n_slots() - self.free.len()
    }

    /// What has happened so far.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether `block` lies in the slow tier.
    pub fn is_attached(&self, block: u32) -> bool {
        self.blocks.get(block as usize).is_some_and(Option::is_some)
    }

    /// From now on the latent plane of `block` lies at byte `slow_offset`, in pages with this tag; rows from where it
    /// lay before are forgotten. Ends the epoch as [`Self::release`] does.
    ///
    /// # Errors
    /// [`RowCacheError::NoSuchBlock`], or [`RowCacheError::Offset`] when the offset is not a page's or the image would
    /// end outside the area. Nothing has changed then.
    pub fn attach(&mut self, block: u32, slow_offset: u64, tag: u64) -> Result<()> {
        let image = self.layout.block_bytes() as u64;
        let end = slow_offset.checked_add(image).filter(|&end| end <= self.area_bytes);
        if end.is_none() || !slow_offset.is_multiple_of(PAGE_BYTES as u64) {
            return Err(RowCacheError::Offset { block, slow_offset });
        }
        let n_blocks = self.blocks.len() as u32;
        if block >= n_blocks {
            return Err(RowCacheError::NoSuchBlock { block, n_blocks });
        }
        self.forget(block);
        let slots = vec![NO_SLOT; self.layout.block_rows()].into();
        self.blocks[block as usize] = Some(Attached { slow_offset, tag, slots });
        Ok(())
    }

    /// The block does not lie in the slow tier any more: its rows are zeroed and forgotten. Ends the epoch as
    /// [`Self::release`] does.
    ///
    /// # Errors
    /// [`RowCacheError::NotAttached`], [`RowCacheError::NoSuchBlock`]
    pub fn detach(&mut self, block: u32) -> Result<()> {
        self.attached(block)?;
        self.forget(block);
        Ok(())
    }

    fn forget(&mut self, block: u32) {
        let attached = self.blocks[block as usize].take();
        let row_bytes = self.layout.row_bytes();
        for slot in attached.iter().flat_map(|attached| &attached.slots).filter(|&&slot| slot != NO_SLOT) {
            self.rows[*slot as usize * row_bytes..][..row_bytes].fill(0);
            self.free.push(*slot);
        }
        self.release();
    }

    /// Finds `keys` and plans what must be read for those that are not present. All of them stay from now on, or from
    /// their admission on, until [`Self::release`].
    ///
    /// # Errors
    /// For a row that is none or whose block is not attached; [`RowCacheError::TooSmall`] when `keys` and what was
    /// asked for since the last release do not fit together. No row was lost; `lookup` is empty.
    pub fn lookup(&mut self, keys: &[RowKey], lookup: &mut Lookup) -> Result<()> {
        lookup.begin();
        let found = self.find(keys, lookup);
        if found.is_err() {
            lookup.begin();
            return found;
        }
        let n_hits = keys.len() - lookup.misses.len();
        let n_missing = lookup.plan();
        let needed = self.n_used + self.n_promised + n_missing;
        if needed > self.n_slots() {
            lookup.begin();
            return Err(RowCacheError::TooSmall { needed, slots: self.n_slots() });
        }
        self.n_promised += n_missing;
        self.counters.hits += n_hits as u64;
        self.counters.misses += n_missing as u64;
        lookup.epoch = self.epoch;
        Ok(())
    }

    /// Marks the rows that are present and lists the others.
    fn find(&mut self, keys: &[RowKey], lookup: &mut Lookup) -> Result<()> {
        u32::try_from(keys.len()).map_err(|_| RowCacheError::Size { what: "a list of rows" })?;
        for key in keys {
            let row = self.layout.row_index(key.layer, key.token)?;
            let attached = self.attached(key.block)?;
            let slot = attached.slots[row];
            if slot == NO_SLOT {
                let page = u64::from(self.layout.locate(row).0);
                let offset = attached.slow_offset + page * PAGE_BYTES as u64;
                lookup.misses.push(Miss { offset, block: key.block, row: row as u32 });
            } else {
                self.keep(slot as usize);
            }
        }
        Ok(())
    }

    /// Takes what was read for read `read` of `lookup`: checks every page and decrypts it where it is, then keeps the
    /// rows that were asked for. Reads may come in any order.
    ///
    /// # Errors
    /// [`RowCacheError::Length`] when `bytes` is not the whole read, [`RowCacheError::BadPage`] when a page is not what
    /// was written. Nothing but `bytes` has changed then; the read can be tried again.
    ///
    /// # Panics
    /// When `lookup` is older than the last [`Self::release`], [`Self::attach`] or [`Self::detach`], or the read was
    /// admitted before.
    pub fn admit(&mut self, lookup: &mut Lookup, read: usize, bytes: &mut [u8]) -> Result<()> {
        assert_eq!(lookup.epoch, self.epoch, "a lookup ends with its epoch");
        let (span, wanted) = (lookup.misses_of(read), lookup.reads()[read]);
        check_length("a read", bytes.len(), wanted.len_bytes())?;
        let pages = bytes.as_chunks_mut().0;
        let page_of = |miss: &Miss| ((miss.offset - wanted.offset) / PAGE_BYTES as u64) as usize;
        // Each page once.
        for same_page in lookup.misses[span.clone()].chunk_by(|a, b| a.offset == b.offset) {
            let miss = &same_page[0];
            let number = self.layout.locate(miss.row as usize).0;
            let opened = self.open(miss.block, number, &mut pages[page_of(miss)]);
            self.counters.bad_reads += u64::from(opened.is_err());
            opened?;
        }
        for miss in &lookup.misses[span] {
            self.present(miss, self.layout.row_of(&pages[page_of(miss)], miss.row as usize));
        }
        self.counters.pages += u64::from(wanted.n_pages);
        lookup.finish(read);
        Ok(())
    }

    /// Reads page `page` of `block` into its place of the block's latent plane: the inverse of
    /// [`SlowLayout::encode_page`].
    ///
    /// # Errors
    /// [`RowCacheError::Length`] for a plane of another size, [`RowCacheError::NoSuchPage`],
    /// [`RowCacheError::NotAttached`], and [`RowCacheError::BadPage`] for a page that is not what was written; `plane`
    /// is unchanged.
    pub fn decode_page(&self, block: u32, page: u32, bytes: &mut PageBytes, plane: &mut [u8]) -> Result<()> {
        check_length("a latent plane", plane.len(), self.layout.plane_bytes())?;
        let to = &mut plane[self.layout.plane_range(page)?];
        self.open(block, page, bytes)?;
        to.copy_from_slice(&bytes[..to.len()]);
        Ok(())
    }

    /// Checks and decrypts page `page` of an attached block.
    fn open(&self, block: u32, page: u32, bytes: &mut PageBytes) -> Result<()> {
        let bad = |fault| RowCacheError::BadPage { block, layer: self.layout.layer_of_page(page), page, fault };
        self.seal.open(self.attached(block)?.tag, page, bytes).map_err(bad)
    }

    /// Gives a promised row its slot, unless it has come with another lookup of this epoch.
    fn present(&mut self, miss: &Miss, row: &[u8]) {
        self.n_promised -= 1;
        if *self.map(miss.block, miss.row) != NO_SLOT {
            return;
        }
        let slot = self.empty_slot();
        self.rows[slot as usize * row.len()..][..row.len()].copy_from_slice(row);
        self.owners[slot as usize] = Owner { block: miss.block, row: miss.row };
        *self.map(miss.block, miss.row) = slot;
        self.replacement.filled(slot as usize);
        self.used[slot as usize] = self.epoch;
        self.n_used += 1;
    }

    /// A slot without a row, if need be by forgetting one that nobody asked for in this epoch.
    fn empty_slot(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        let (used, epoch) = (&self.used, self.epoch);
        let victim = self.replacement.victim(|slot| used[slot] != epoch);
        let victim = victim.expect("lookup refuses more rows in one epoch than there are slots");
        let Owner { block, row } = self.owners[victim];
        *self.map(block, row) = NO_SLOT;
        self.counters.evictions += 1;
        victim as u32
    }

    /// The slot's row was asked for: it stays until the release.
    #[inline]
    fn keep(&mut self, slot: usize) {
        if self.used[slot] != self.epoch {
            self.used[slot] = self.epoch;
            self.n_used += 1;
            self.replacement.hit(slot);
        }
    }

    /// The row of `key`: latent bytes, then rope bytes. None when it is not present; a row that was asked for since the
    /// last [`Self::release`] is present once its lookup is complete.
    #[inline]
    pub fn row(&self, key: RowKey) -> Option<&[u8]> {
        let attached = self.blocks.get(key.block as usize)?.as_ref()?;
        let slot = attached.slots[self.layout.row_index(key.layer, key.token).ok()?];
        let at = slot as usize * self.layout.row_bytes();
        (slot != NO_SLOT).then(|| &self.rows[at..at + self.layout.row_bytes()])
    }

    /// Where the image of `block` lies in the slow area; None when it is not attached.
    pub fn place(&self, block: u32) -> Option<u64> {
        Some(self.blocks.get(block as usize)?.as_ref()?.slow_offset)
    }

    /// The layout of the blocks' images.
    pub const fn layout(&self) -> &SlowLayout {
        &self.layout
    }

    /// Nothing that was asked for is needed any more: rows may make room for others, and no lookup holds.
    pub const fn release(&mut self) {
        self.epoch += 1;
        self.n_used = 0;
        self.n_promised = 0;
    }

    #[inline]
    fn attached(&self, block: u32) -> Result<&Attached> {
        let n_blocks = self.blocks.len() as u32;
        let place = self.blocks.get(block as usize).ok_or(RowCacheError::NoSuchBlock { block, n_blocks })?;
        place.as_ref().ok_or(RowCacheError::NotAttached { block })
    }

    /// The entry of a row in its block's map.
    fn map(&mut self, block: u32, row: u32) -> &mut u32 {
        let attached = self.blocks[block as usize].as_mut().expect("a row's block is attached: detaching forgets it");
        &mut attached.slots[row as usize]
    }
}

/// Slots that fit into so many bytes: one at least.
fn slots_of(layout: &SlowLayout, limit_bytes: usize) -> Result<usize> {
    let n_slots = limit_bytes / (layout.row_bytes() + SLOT_OVERHEAD_BYTES);
    if n_slots == 0 { Err(RowCacheError::TooSmall { needed: 1, slots: 0 }) } else { Ok(n_slots) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{Cipher, PageFault, SlowKey};

    const ROW_BYTES: usize = 1152;
    /// Room for three blocks of 6 pages.
    const AREA_BYTES: u64 = 18 * PAGE_BYTES as u64;

    /// A cache of `n_slots` rows over two blocks of 8 tokens in 2 layers, and the blocks' images one after another.
    fn cache(n_slots: usize) -> (RowCache, Vec<u8>) {
        let layout = SlowLayout::new(ROW_BYTES, 8, 2).unwrap();
        let seal = Seal::new(Some(&SlowKey::new(Cipher::ChaCha20Poly1305, [3; 32])));
        let limit_bytes = n_slots * (ROW_BYTES + SLOT_OVERHEAD_BYTES);
        let mut cache = RowCache::new((layout, seal.clone()), Policy::Clock, 3, AREA_BYTES, limit_bytes).unwrap();
        assert_eq!(cache.n_slots(), n_slots);
        let mut images = vec![0; 2 * layout.block_bytes()];
        for (block, image) in (0..).zip(images.chunks_mut(layout.block_bytes())) {
            let plane: Vec<u8> = (0..layout.plane_bytes()).map(|at| (at / ROW_BYTES) as u8 + 100 * block).collect();
            layout.encode_block(&seal, &plane, u64::from(block), image).unwrap();
            cache.attach(u32::from(block), u64::from(block) * layout.block_bytes() as u64, u64::from(block)).unwrap();
        }
        (cache, images)
    }

    fn key(block: u32, layer: u32, token: u32) -> RowKey {
        RowKey { block, layer, token }
    }

    fn admit_all(cache: &mut RowCache, lookup: &mut Lookup, images: &[u8]) -> Result<()> {
        for at in 0..lookup.reads().len() {
            let read = lookup.reads()[at];
            let start = usize::try_from(read.offset).unwrap();
            cache.admit(lookup, at, &mut images[start..start + read.len_bytes()].to_vec())?;
        }
        Ok(())
    }

    #[test]
    fn rows_are_read_once_and_then_present() {
        let (mut cache, images) = cache(6);
        let mut lookup = Lookup::with_capacity(6);
        let keys = [key(1, 1, 7), key(0, 0, 0), key(1, 1, 7), key(0, 1, 2), key(0, 0, 1)];
        for expected_reads in [3, 0] {
            cache.lookup(&keys, &mut lookup).unwrap();
            assert_eq!(lookup.reads().len(), expected_reads);
            admit_all(&mut cache, &mut lookup, &images).unwrap();
            assert!(lookup.is_complete());
            let first: Vec<u8> = keys.iter().map(|&key| cache.row(key).unwrap()[0]).collect();
            assert_eq!(first, [115, 0, 115, 10, 1]);
            cache.release();
        }
        assert_eq!(cache.counters(), Counters { hits: 5, misses: 4, evictions: 0, pages: 3, bad_reads: 0 });
    }

    #[test]
    fn more_rows_than_slots_are_refused_and_fewer_at_a_time_are_not() {
        let (mut cache, images) = cache(3);
        let mut lookup = Lookup::default();
        let keys: Vec<RowKey> = (0..4).map(|token| key(0, 0, token)).collect();
        let too_small = Err(RowCacheError::TooSmall { needed: 4, slots: 3 });
        assert_eq!(cache.lookup(&keys, &mut lookup), too_small);
        cache.lookup(&keys[..3], &mut lookup).unwrap();
        assert_eq!(cache.lookup(&keys[3..], &mut Lookup::default()), too_small, "promised to the lookup before");
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        assert_eq!(cache.lookup(&keys[3..], &mut lookup), too_small, "in use");
        cache.release();
        cache.lookup(&keys[3..], &mut lookup).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        assert_eq!(cache.row(keys[3]).unwrap()[0], 3);
        assert_eq!((cache.n_rows(), cache.counters().evictions), (3, 1));
    }

    #[test]
    fn a_bad_page_changes_nothing_and_names_its_place() {
        let (mut cache, mut images) = cache(8);
        let mut lookup = Lookup::default();
        // Pages 3 to 5 of block 1 are one read; the last is bad.
        let keys = [key(1, 1, 0), key(1, 1, 3), key(1, 1, 7)];
        let at = 11 * PAGE_BYTES + 5;
        images[at] ^= 1;
        cache.lookup(&keys, &mut lookup).unwrap();
        let error = admit_all(&mut cache, &mut lookup, &images).unwrap_err();
        assert!(matches!(error, RowCacheError::BadPage { block: 1, layer: 1, page: 5, .. }), "{error}");
        assert_eq!(cache.n_rows(), 0);
        let short = cache.admit(&mut lookup, 0, &mut images[8 * PAGE_BYTES..11 * PAGE_BYTES - 1]).unwrap_err();
        assert!(matches!(short, RowCacheError::Length { .. }), "{short}");
        images[at] ^= 1;
        cache.release();
        cache.lookup(&keys, &mut lookup).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        assert_eq!(cache.row(keys[2]).unwrap()[0], 115);
    }

    #[test]
    fn a_page_is_decoded_into_its_place_or_leaves_the_plane_as_it_was() {
        let (mut cache, images) = cache(1);
        let pages = images.as_chunks::<PAGE_BYTES>().0;
        let mut plane = vec![0; cache.layout.plane_bytes()];
        for page in [4, 0, 5, 2, 1, 3] {
            cache.decode_page(1, page, &mut pages[6 + page as usize].clone(), &mut plane).unwrap();
        }
        assert!(plane.iter().zip(0..).all(|(&byte, at): (_, usize)| usize::from(byte) == 100 + at / ROW_BYTES));
        // Another block's, another page's, and its own from before it was written again.
        cache.attach(0, 0, 2).unwrap();
        let before = plane.clone();
        for (block, page, from) in [(1, 4, 4), (1, 4, 11), (0, 4, 4)] {
            let error = cache.decode_page(block, page, &mut pages[from].clone(), &mut plane).unwrap_err();
            let fault = PageFault::Seal;
            assert_eq!(error, RowCacheError::BadPage { block, layer: 1, page, fault });
        }
        let mut any = pages[0];
        let no_page = RowCacheError::NoSuchPage { page: 6, block_pages: 6 };
        assert_eq!(cache.decode_page(1, 6, &mut any, &mut plane), Err(no_page));
        assert_eq!(cache.decode_page(2, 0, &mut any, &mut plane), Err(RowCacheError::NotAttached { block: 2 }));
        assert!(matches!(cache.decode_page(1, 0, &mut any, &mut plane[1..]), Err(RowCacheError::Length { .. })));
        assert!(plane == before);
    }

    #[test]
    fn two_lookups_of_one_epoch_share_a_row() {
        let (mut cache, images) = cache(2);
        let (mut first, mut second) = (Lookup::default(), Lookup::default());
        cache.lookup(&[key(0, 0, 0)], &mut first).unwrap();
        cache.lookup(&[key(0, 0, 0)], &mut second).unwrap();
        admit_all(&mut cache, &mut second, &images).unwrap();
        admit_all(&mut cache, &mut first, &images).unwrap();
        assert_eq!((cache.n_rows(), cache.n_promised, cache.n_used), (1, 0, 1));
        assert!(first.is_complete() && second.is_complete());
        assert_eq!(cache.row(key(0, 0, 0)).unwrap(), [0; ROW_BYTES]);
    }

    #[test]
    fn a_detached_block_leaves_no_row_behind() {
        let (mut cache, images) = cache(4);
        let mut lookup = Lookup::default();
        cache.lookup(&[key(0, 0, 1), key(1, 0, 1)], &mut lookup).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        cache.detach(1).unwrap();
        assert_eq!(cache.n_rows(), 1);
        assert!(!cache.rows.contains(&101), "zeroed");
        let gone = RowCacheError::NotAttached { block: 1 };
        assert_eq!(cache.lookup(&[key(1, 0, 1)], &mut lookup), Err(gone));
        assert_eq!(cache.detach(1), Err(gone));
        assert_eq!((cache.place(0), cache.place(1), cache.place(9)), (Some(0), None, None));
    }

    #[test]
    fn a_block_that_was_moved_is_read_where_it_lies_now() {
        let (mut cache, images) = cache(4);
        let mut lookup = Lookup::default();
        cache.lookup(&[key(0, 0, 1)], &mut lookup).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        // The image and the tag of block 1.
        cache.attach(0, 6 * PAGE_BYTES as u64, 1).unwrap();
        assert_eq!((cache.n_rows(), cache.row(key(0, 0, 1))), (0, None));
        cache.lookup(&[key(0, 0, 1)], &mut lookup).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        assert_eq!(cache.row(key(0, 0, 1)).unwrap()[0], 101);
        // With another tag, the pages are refused.
        cache.attach(0, 6 * PAGE_BYTES as u64, 77).unwrap();
        cache.lookup(&[key(0, 0, 1)], &mut lookup).unwrap();
        assert!(matches!(admit_all(&mut cache, &mut lookup, &images), Err(RowCacheError::BadPage { .. })));
    }

    /// Takes every row of a token list by turns, and answers their first bytes.
    fn read_all(cache: &mut RowCache, images: &[u8], n_tokens: u32) -> Vec<u8> {
        let mut lookup = Lookup::default();
        let mut first = |token| {
            let key = key(0, 0, token);
            cache.lookup(&[key], &mut lookup).unwrap();
            admit_all(cache, &mut lookup, images).unwrap();
            cache.release();
            cache.row(key).unwrap()[0]
        };
        (0..n_tokens).map(&mut first).collect()
    }

    #[test]
    fn a_cache_that_is_made_smaller_gives_memory_back_and_knows_what_it_kept() {
        let (mut cache, images) = cache(6);
        let all: Vec<u8> = (0..6).collect();
        assert_eq!(read_all(&mut cache, &images, 6), all);
        let bytes = |n_slots: usize| n_slots * (ROW_BYTES + SLOT_OVERHEAD_BYTES);
        cache.limit(bytes(3) + 1).unwrap();
        assert_eq!((cache.n_slots(), cache.n_rows(), cache.rows.capacity()), (3, 3, 3 * ROW_BYTES));
        assert_eq!((0..6).filter(|&token| cache.row(key(0, 0, token)).is_some()).count(), 3);
        assert_eq!(read_all(&mut cache, &images, 6), all, "with others making room");
        // Half of it free, and never more than at the beginning.
        cache.detach(0).unwrap();
        cache.attach(0, 0, 0).unwrap();
        assert_eq!(read_all(&mut cache, &images, 2), [0, 1]);
        cache.limit(usize::MAX).unwrap();
        assert_eq!((cache.n_slots(), cache.n_rows()), (6, 2));
        assert_eq!(read_all(&mut cache, &images, 6), all);
        assert_eq!(cache.n_rows(), 6);
        assert!(matches!(cache.limit(ROW_BYTES), Err(RowCacheError::TooSmall { .. })));
        assert_eq!(cache.n_rows(), 6);
    }

    #[test]
    fn a_lookup_of_as_many_rows_as_announced_does_not_grow() {
        let (mut cache, images) = cache(8);
        let mut lookup = Lookup::with_capacity(8);
        let free = cache.free.capacity();
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..100 {
            let any = |random: &mut fastrand::Rng| key(random.u32(..2), random.u32(..2), random.u32(..8));
            let keys: [RowKey; 8] = std::array::from_fn(|_| any(&mut random));
            cache.lookup(&keys, &mut lookup).unwrap();
            admit_all(&mut cache, &mut lookup, &images).unwrap();
            cache.release();
        }
        assert_eq!(lookup.capacities(), Lookup::with_capacity(8).capacities());
        assert_eq!(cache.free.capacity(), free);
        assert!(cache.counters().evictions > 100);
    }

    #[test]
    fn what_is_no_block_row_or_place_is_refused() {
        let (mut cache, _) = cache(4);
        let mut lookup = Lookup::default();
        assert_eq!(cache.attach(3, 0, 0), Err(RowCacheError::NoSuchBlock { block: 3, n_blocks: 3 }));
        for slow_offset in [1, 512, AREA_BYTES - 5 * 4096, AREA_BYTES, u64::MAX - 4095] {
            assert_eq!(cache.attach(2, slow_offset, 0), Err(RowCacheError::Offset { block: 2, slow_offset }));
        }
        cache.attach(2, AREA_BYTES - 6 * 4096, 0).unwrap();
        cache.detach(2).unwrap();
        assert!(!cache.is_attached(2) && !cache.is_attached(3) && cache.is_attached(1));
        assert!(matches!(cache.lookup(&[key(3, 0, 0)], &mut lookup), Err(RowCacheError::NoSuchBlock { .. })));
        assert!(matches!(cache.lookup(&[key(0, 2, 0)], &mut lookup), Err(RowCacheError::NoSuchRow { .. })));
        assert!(matches!(cache.lookup(&[key(0, 0, 8)], &mut lookup), Err(RowCacheError::NoSuchRow { .. })));
        let form = (cache.layout, Seal::new(None));
        let none = RowCache::new(form, Policy::Lru, 1, AREA_BYTES, ROW_BYTES);
        assert!(matches!(none, Err(RowCacheError::TooSmall { .. })));
    }

    #[test]
    #[should_panic(expected = "a lookup ends with its epoch")]
    fn reads_of_an_old_lookup_are_not_taken() {
        let (mut cache, images) = cache(4);
        let mut lookup = Lookup::default();
        cache.lookup(&[key(0, 0, 1)], &mut lookup).unwrap();
        cache.release();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
    }

    #[test]
    #[should_panic(expected = "a read is admitted once")]
    fn a_read_is_not_taken_twice() {
        let (mut cache, images) = cache(4);
        let mut lookup = Lookup::default();
        cache.lookup(&[key(0, 0, 1)], &mut lookup).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
        admit_all(&mut cache, &mut lookup, &images).unwrap();
    }
}
