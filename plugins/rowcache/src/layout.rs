//! Where does a row of the latent plane lie in the slow tier?
//!
//! The format is normative in `abi/OPS.md`. A *block image* is `n_layers * pages_per_layer` pages of [`PAGE_BYTES`];
//! a layer's rows begin on a new page. A page has whole rows (latent bytes, then rope bytes) from its start, zero
//! filler, and 16 bytes at its end by which the page is known ([`Seal`]): as one of its block, whose tag the daemon
//! chooses, so that a page of an older owner of the same place is refused, and by its number in the block, so that a
//! page at a wrong place is refused.

use crate::error::{Result, RowCacheError};
use crate::seal::Seal;

/// Size of a page: what flash and file systems read at least.
pub const PAGE_BYTES: usize = 4096;
/// What a page has besides rows and filler.
pub const TRAILER_BYTES: usize = 16;
/// Most pages of a block's image, 1 GiB: sizes, page numbers and row numbers stay far from the ends of `u32`.
pub const BLOCK_PAGES_MAX: usize = 1 << 18;

const ROWS_BYTES: usize = PAGE_BYTES - TRAILER_BYTES;

/// A page's bytes.
pub type PageBytes = [u8; PAGE_BYTES];

/// Sizes of a block's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowLayout {
    row_bytes: usize,
    block_tokens: usize,
    n_layers: usize,
    rows_per_page: usize,
    pages_per_layer: usize,
}

impl SlowLayout {
    /// The layout of blocks of `block_tokens` tokens in `n_layers` layers with `row_bytes` bytes (latent and rope row)
    /// per token and layer.
    ///
    /// # Errors
    /// [`RowCacheError::RowBytes`] for rows that fit into no page, [`RowCacheError::Size`] for a block without rows or
    /// with more than [`BLOCK_PAGES_MAX`] pages.
    pub fn new(row_bytes: usize, block_tokens: u32, n_layers: u32) -> Result<Self> {
        if row_bytes == 0 || row_bytes > ROWS_BYTES {
            return Err(RowCacheError::RowBytes { row_bytes, row_bytes_max: ROWS_BYTES });
        }
        let (block_tokens, n_layers) = (block_tokens as usize, n_layers as usize);
        let rows_per_page = ROWS_BYTES / row_bytes;
        let pages_per_layer = block_tokens.div_ceil(rows_per_page);
        let pages = pages_per_layer.checked_mul(n_layers).filter(|&n| n > 0 && n <= BLOCK_PAGES_MAX);
        pages.ok_or(RowCacheError::Size { what: "a block's image" })?;
        Ok(Self { row_bytes, block_tokens, n_layers, rows_per_page, pages_per_layer })
    }

    /// Bytes of a row: latent and rope row.
    pub const fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Rows of a page; the last page of a layer may have fewer.
    pub const fn rows_per_page(&self) -> usize {
        self.rows_per_page
    }

    /// Rows of a block in all layers.
    pub const fn block_rows(&self) -> usize {
        self.n_layers * self.block_tokens
    }

    /// Pages of a block's image.
    pub fn block_pages(&self) -> u32 {
        u32::try_from(self.n_layers * self.pages_per_layer).expect("at most BLOCK_PAGES_MAX")
    }

    /// Bytes of a block's image in the slow tier.
    pub const fn block_bytes(&self) -> usize {
        self.n_layers * self.pages_per_layer * PAGE_BYTES
    }

    /// Bytes of a block's latent plane as in a host image: `[n_layers, block_tokens, row_bytes]`.
    pub const fn plane_bytes(&self) -> usize {
        self.block_rows() * self.row_bytes
    }

    /// The number of a row in `[n_layers, block_tokens]`.
    ///
    /// # Errors
    /// [`RowCacheError::NoSuchRow`]
    pub fn row_index(&self, layer: u32, token: u32) -> Result<usize> {
        if layer as usize >= self.n_layers || token as usize >= self.block_tokens {
            let (n_layers, block_tokens) = (self.n_layers as u32, self.block_tokens as u32);
            return Err(RowCacheError::NoSuchRow { layer, n_layers, token, block_tokens });
        }
        Ok(layer as usize * self.block_tokens + token as usize)
    }

    /// The page that has row `row_index` (of [`Self::row_index`]), and the row's number in it.
    pub(crate) fn locate(&self, row_index: usize) -> (u32, usize) {
        let (layer, token) = (row_index / self.block_tokens, row_index % self.block_tokens);
        let page = layer * self.pages_per_layer + token / self.rows_per_page;
        (u32::try_from(page).expect("at most BLOCK_PAGES_MAX"), token % self.rows_per_page)
    }

    /// The bytes of row `row_index` in its page, which [`Seal::open`] has found right.
    pub(crate) fn row_of<'a>(&self, page: &'a PageBytes, row_index: usize) -> &'a [u8] {
        &page[self.locate(row_index).1 * self.row_bytes..][..self.row_bytes]
    }

    /// The layer whose rows page `page` holds.
    pub(crate) fn layer_of_page(&self, page: u32) -> u32 {
        page / u32::try_from(self.pages_per_layer).expect("at most BLOCK_PAGES_MAX")
    }

    /// Writes page `page` of the block whose latent plane is `plane` (see [`Self::plane_bytes`]).
    ///
    /// # Errors
    /// [`RowCacheError::Length`] for a plane of another size, [`RowCacheError::NoSuchPage`].
    pub fn encode_page(&self, seal: &Seal, plane: &[u8], tag: u64, page: u32, to: &mut PageBytes) -> Result<()> {
        check_length("a latent plane", plane.len(), self.plane_bytes())?;
        let rows = &plane[self.plane_range(page)?];
        to[..rows.len()].copy_from_slice(rows);
        to[rows.len()..ROWS_BYTES].fill(0);
        seal.close(tag, page, to);
        Ok(())
    }

    /// Writes all pages of a block.
    ///
    /// # Errors
    /// [`RowCacheError::Length`] when `plane` or `image` has another size than the layout says.
    pub fn encode_block(&self, seal: &Seal, plane: &[u8], tag: u64, image: &mut [u8]) -> Result<()> {
        check_length("a block's image", image.len(), self.block_bytes())?;
        for (page, to) in (0..).zip(image.as_chunks_mut().0) {
            self.encode_page(seal, plane, tag, page, to)?;
        }
        Ok(())
    }

    /// The bytes of the latent plane that page `page` holds.
    pub(crate) fn plane_range(&self, page: u32) -> Result<std::ops::Range<usize>> {
        let block_pages = self.block_pages();
        if page >= block_pages {
            return Err(RowCacheError::NoSuchPage { page, block_pages });
        }
        let (layer, nth) = (page as usize / self.pages_per_layer, page as usize % self.pages_per_layer);
        let first = nth * self.rows_per_page;
        let end = (first + self.rows_per_page).min(self.block_tokens);
        let row = layer * self.block_tokens;
        Ok((row + first) * self.row_bytes..(row + end) * self.row_bytes)
    }
}

pub(crate) fn check_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(RowCacheError::Length { what, found, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layout, a random latent plane, and its image.
    fn block(row_bytes: usize, block_tokens: u32, n_layers: u32, tag: u64) -> (SlowLayout, Vec<u8>, Vec<u8>) {
        let layout = SlowLayout::new(row_bytes, block_tokens, n_layers).unwrap();
        let mut random = fastrand::Rng::with_seed(row_bytes as u64);
        let plane: Vec<u8> = (0..layout.plane_bytes()).map(|_| random.u8(..)).collect();
        let mut image = vec![0xEE; layout.block_bytes()];
        layout.encode_block(&plain(), &plane, tag, &mut image).unwrap();
        (layout, plane, image)
    }

    fn plain() -> Seal {
        Seal::new(None)
    }

    #[test]
    fn every_row_of_an_image_is_where_the_layout_says() {
        // One row a page, several, a last page that is not full, a page that is filled to the last byte.
        for (row_bytes, rows_per_page, pages_per_layer) in
            [(4080, 1, 64), (1152, 3, 22), (656, 6, 11), (408, 10, 7), (255, 16, 4), (1, 4080, 1)]
        {
            let (layout, plane, image) = block(row_bytes, 64, 3, 7);
            assert_eq!(layout.rows_per_page(), rows_per_page);
            assert_eq!(layout.block_bytes(), 3 * pages_per_layer * PAGE_BYTES);
            for (layer, token) in (0..3).flat_map(|layer| (0..64).map(move |token| (layer, token))) {
                let index = layout.row_index(layer, token).unwrap();
                let (page, row) = layout.locate(index);
                assert_eq!(page as usize, layer as usize * pages_per_layer + token as usize / rows_per_page);
                assert_eq!(layout.layer_of_page(page), layer);
                let mut bytes = image.as_chunks().0[page as usize];
                plain().open(7, page, &mut bytes).unwrap();
                assert_eq!(bytes[row * row_bytes..][..row_bytes], plane[index * row_bytes..][..row_bytes]);
                assert_eq!(layout.row_of(&bytes, index), &plane[index * row_bytes..][..row_bytes]);
            }
            let ranges: Vec<_> = (0..layout.block_pages()).map(|page| layout.plane_range(page).unwrap()).collect();
            assert_eq!((ranges[0].start, ranges.last().unwrap().end), (0, plane.len()));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "pages have all rows, each once");
        }
    }

    #[test]
    fn what_a_page_has_no_rows_for_is_zero() {
        let (_, plane, image) = block(1152, 64, 1, 1);
        let last = &image[21 * PAGE_BYTES..];
        assert_eq!(last[..1152], plane[63 * 1152..]);
        assert!(last[1152..4080].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn sizes_that_no_file_can_have_are_refused() {
        let size = Err(RowCacheError::Size { what: "a block's image" });
        for (row_bytes, tokens, layers, expected) in [
            (4080, 64, 1, None),
            (0, 64, 1, Some(Err(RowCacheError::RowBytes { row_bytes: 0, row_bytes_max: 4080 }))),
            (4081, 64, 1, Some(Err(RowCacheError::RowBytes { row_bytes: 4081, row_bytes_max: 4080 }))),
            (408, 0, 1, Some(size)),
            (408, 64, 0, Some(size)),
            (4080, 1, 1 << 18, None),
            (4080, 1, (1 << 18) + 1, Some(size)),
            (4080, u32::MAX, u32::MAX, Some(size)),
        ] {
            let found = SlowLayout::new(row_bytes, tokens, layers);
            assert_eq!(Some(found).filter(std::result::Result::is_err), expected, "{row_bytes} {tokens} {layers}");
        }
        let (layout, plane, mut image) = block(656, 64, 2, 3);
        let mut page = [0; PAGE_BYTES];
        let no_page = RowCacheError::NoSuchPage { page: 22, block_pages: 22 };
        assert_eq!(layout.encode_page(&plain(), &plane, 3, 22, &mut page), Err(no_page));
        assert!(matches!(
            layout.encode_page(&plain(), &plane[1..], 3, 0, &mut page),
            Err(RowCacheError::Length { .. })
        ));
        assert!(matches!(layout.encode_block(&plain(), &plane, 3, &mut image[1..]), Err(RowCacheError::Length { .. })));
        assert!(matches!(layout.row_index(2, 0), Err(RowCacheError::NoSuchRow { layer: 2, .. })));
        assert!(matches!(layout.row_index(0, 64), Err(RowCacheError::NoSuchRow { token: 64, .. })));
    }
}
