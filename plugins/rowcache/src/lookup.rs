//! What must be read so that all rows of a list are present?

use crate::layout::PAGE_BYTES;
use std::ops::Range;

/// Most pages of one read: 64 KiB, after which larger reads gain little on flash and take a buffer each.
pub const READ_PAGES_MAX: u32 = 16;

/// No slot has the row.
pub(crate) const NO_SLOT: u32 = u32::MAX;

/// A row of the latent plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowKey {
    /// A block of the pool, attached to the cache.
    pub block: u32,
    /// The pool's layer.
    pub layer: u32,
    /// The token's number in the block.
    pub token: u32,
}

/// Neighbouring pages of one block to be read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Whose pages they are: when they cannot be read, this block must be computed again.
    pub block: u32,
    /// First byte in the slow tier, a multiple of [`PAGE_BYTES`].
    pub offset: u64,
    /// 1 to [`READ_PAGES_MAX`]
    pub n_pages: u32,
}

impl Read {
    /// Bytes to be read.
    pub const fn len_bytes(&self) -> usize {
        self.n_pages as usize * PAGE_BYTES
    }
}

/// A row that is not present.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Miss {
    /// Of the page that has it.
    pub(crate) offset: u64,
    pub(crate) block: u32,
    /// See `SlowLayout::row_index`.
    pub(crate) row: u32,
}

/// One list of rows on its way into memory. Kept by the caller and used again, so that steps do not allocate.
#[derive(Debug, Default)]
pub struct Lookup {
    /// The cache's epoch in which it holds; 0: in none.
    pub(crate) epoch: u64,
    /// Sorted by page and row, each once.
    pub(crate) misses: Vec<Miss>,
    reads: Vec<Read>,
    /// The misses of each read; empty once it is admitted.
    spans: Vec<Range<u32>>,
    reads_left: usize,
}

impl Lookup {
    /// Room for lists of up to `n_rows` rows; a longer list makes it grow.
    pub fn with_capacity(n_rows: usize) -> Self {
        Self {
            epoch: 0,
            misses: Vec::with_capacity(n_rows),
            reads: Vec::with_capacity(n_rows),
            spans: Vec::with_capacity(n_rows),
            reads_left: 0,
        }
    }

    /// What must be read, by offset. The index of a read names it for [`crate::RowCache::admit`].
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// Whether all reads have been admitted.
    pub const fn is_complete(&self) -> bool {
        self.reads_left == 0
    }

    #[cfg(test)]
    pub(crate) fn capacities(&self) -> [usize; 3] {
        [self.misses.capacity(), self.reads.capacity(), self.spans.capacity()]
    }

    pub(crate) fn begin(&mut self) {
        self.epoch = 0;
        self.misses.clear();
        self.reads.clear();
        self.spans.clear();
        self.reads_left = 0;
    }

    /// Sorts the misses and makes reads of their pages; says how many different rows are missing.
    pub(crate) fn plan(&mut self) -> usize {
        self.misses.sort_unstable_by_key(|miss| (miss.offset, miss.block, miss.row));
        self.misses.dedup_by_key(|miss| (miss.block, miss.row));
        for (at, miss) in (0..).zip(&self.misses) {
            let page_offset = |n: u32| u64::from(n) * PAGE_BYTES as u64;
            let last_read = self.reads.last_mut().zip(self.spans.last_mut());
            match last_read.filter(|(read, _)| read.block == miss.block) {
                // Its page is the read's last.
                Some((read, span)) if read.offset + page_offset(read.n_pages - 1) == miss.offset => {
                    span.end = at + 1;
                }
                // Its page is the next one.
                Some((read, span))
                    if read.n_pages < READ_PAGES_MAX && read.offset + page_offset(read.n_pages) == miss.offset =>
                {
                    read.n_pages += 1;
                    span.end = at + 1;
                }
                _ => {
                    self.reads.push(Read { block: miss.block, offset: miss.offset, n_pages: 1 });
                    self.spans.push(at..at + 1);
                }
            }
        }
        self.reads_left = self.reads.len();
        self.misses.len()
    }

    /// The misses that read `read` answers.
    ///
    /// # Panics
    /// When there is no such read, or it was admitted before.
    pub(crate) fn misses_of(&self, read: usize) -> Range<usize> {
        let span = &self.spans[read];
        assert!(!span.is_empty(), "a read is admitted once");
        span.start as usize..span.end as usize
    }

    pub(crate) fn finish(&mut self, read: usize) {
        self.spans[read] = 0..0;
        self.reads_left -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reads, in pages, for misses on these pages.
    fn reads(pages: &[u64]) -> (usize, Vec<(u64, u32)>) {
        let mut lookup = Lookup::with_capacity(pages.len());
        for &page in pages {
            let row = u32::try_from(page * 3).unwrap();
            lookup.misses.push(Miss { offset: page * PAGE_BYTES as u64, block: 0, row });
        }
        let n_rows = lookup.plan();
        let covered: Vec<usize> = (0..lookup.reads.len()).flat_map(|read| lookup.misses_of(read)).collect();
        assert_eq!(covered, (0..n_rows).collect::<Vec<_>>(), "each miss belongs to one read");
        (n_rows, lookup.reads().iter().map(|read| (read.offset / PAGE_BYTES as u64, read.n_pages)).collect())
    }

    #[test]
    fn neighbouring_pages_become_one_read_and_gaps_do_not() {
        assert_eq!(reads(&[]), (0, vec![]));
        assert_eq!(reads(&[7]), (1, vec![(7, 1)]));
        assert_eq!(reads(&[9, 2, 1, 2, 4, 3, 9]), (5, vec![(1, 4), (9, 1)]));
    }

    #[test]
    fn no_read_is_longer_than_the_limit() {
        let pages: Vec<u64> = (0..40).rev().collect();
        assert_eq!(reads(&pages), (40, vec![(0, 16), (16, 16), (32, 8)]));
    }
}
