//! Where does a row of the latent plane lie in the slow tier, and is the page that holds it whole?
//!
//! The format is normative in `abi/OPS.md`. A *block image* is `n_layers * pages_per_layer` pages of [`PAGE_BYTES`];
//! a layer's rows begin on a new page. A page has whole rows (latent bytes, then rope bytes) from its start, zero
//! filler, and 16 bytes at its end: `u64 tag, u32 page, u32 crc`, little-endian. The tag is the daemon's choice per
//! block, so that a page of an older owner of the same place is refused; `page` is its number in the block, so that a
//! page at a wrong place is refused; the CRC32C covers all bytes before it.

use crate::error::{Result, RowCacheError};

/// Size of a page: what flash and file systems read at least.
pub const PAGE_BYTES: usize = 4096;
/// What a page has besides rows and filler.
pub const TRAILER_BYTES: usize = 16;
/// Most pages of a block's image, 1 GiB: sizes, page numbers and row numbers stay far from the ends of `u32`.
pub const BLOCK_PAGES_MAX: usize = 1 << 18;

const ROWS_BYTES: usize = PAGE_BYTES - TRAILER_BYTES;
const TAG_AT: usize = ROWS_BYTES;
const NUMBER_AT: usize = TAG_AT + 8;
const CRC_AT: usize = NUMBER_AT + 4;

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

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageFault {
    /// Its bytes are not those that were written.
    #[error("CRC32C {stored:08x}, its bytes have {computed:08x}")]
    Crc {
        /// In the page.
        stored: u32,
        /// Of its bytes.
        computed: u32,
    },
    /// It belongs to another block.
    #[error("tag {stored:016x} instead of {expected:016x}")]
    Tag {
        /// In the page.
        stored: u64,
        /// Of the block.
        expected: u64,
    },
    /// It belongs to another place of the block.
    #[error("it is page {stored}")]
    Number {
        /// In the page.
        stored: u32,
    },
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

    /// The bytes of row `row_index` in its page, which [`Self::check_page`] has found right.
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
    pub fn encode_page(&self, plane: &[u8], tag: u64, page: u32, to: &mut PageBytes) -> Result<()> {
        check_length("a latent plane", plane.len(), self.plane_bytes())?;
        let rows = &plane[self.plane_range(page)?];
        to[..rows.len()].copy_from_slice(rows);
        to[rows.len()..TAG_AT].fill(0);
        to[TAG_AT..NUMBER_AT].copy_from_slice(&tag.to_le_bytes());
        to[NUMBER_AT..CRC_AT].copy_from_slice(&page.to_le_bytes());
        let crc = crc32c::crc32c(&to[..CRC_AT]);
        to[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        Ok(())
    }

    /// Writes all pages of a block.
    ///
    /// # Errors
    /// [`RowCacheError::Length`] when `plane` or `image` has another size than the layout says.
    pub fn encode_block(&self, plane: &[u8], tag: u64, image: &mut [u8]) -> Result<()> {
        check_length("a block's image", image.len(), self.block_bytes())?;
        for (page, to) in (0..).zip(image.as_chunks_mut().0) {
            self.encode_page(plane, tag, page, to)?;
        }
        Ok(())
    }

    /// Checks a page that was read as page `page` of the block with tag `tag`.
    ///
    /// # Errors
    /// What is wrong with it; nothing of such a page may be used.
    pub fn check_page(&self, bytes: &PageBytes, tag: u64, page: u32) -> std::result::Result<(), PageFault> {
        let (covered, crc) = bytes.split_last_chunk().expect("a page is longer than its checksum");
        let (stored, computed) = (u32::from_le_bytes(*crc), crc32c::crc32c(covered));
        if stored != computed {
            return Err(PageFault::Crc { stored, computed });
        }
        let (covered, number) = covered.split_last_chunk().expect("a page is longer than its trailer");
        let (_, found_tag) = covered.split_last_chunk().expect("a page is longer than its trailer");
        let (number, found_tag) = (u32::from_le_bytes(*number), u64::from_le_bytes(*found_tag));
        if found_tag != tag {
            return Err(PageFault::Tag { stored: found_tag, expected: tag });
        }
        if number != page {
            return Err(PageFault::Number { stored: number });
        }
        Ok(())
    }

    /// Reads page `page` back into its place of the latent plane: the inverse of [`Self::encode_page`]. `block` is
    /// named in errors only.
    ///
    /// # Errors
    /// [`RowCacheError::Length`] for a plane of another size, [`RowCacheError::NoSuchPage`], and
    /// [`RowCacheError::BadPage`] for a page that is not what was written; `plane` is unchanged.
    pub fn decode_page(&self, block: u32, bytes: &PageBytes, tag: u64, page: u32, plane: &mut [u8]) -> Result<()> {
        check_length("a latent plane", plane.len(), self.plane_bytes())?;
        let to = &mut plane[self.plane_range(page)?];
        let bad = |fault| RowCacheError::BadPage { block, layer: self.layer_of_page(page), page, fault };
        self.check_page(bytes, tag, page).map_err(bad)?;
        to.copy_from_slice(&bytes[..to.len()]);
        Ok(())
    }

    /// The bytes of the latent plane that page `page` holds.
    fn plane_range(&self, page: u32) -> Result<std::ops::Range<usize>> {
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

fn check_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
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
        layout.encode_block(&plane, tag, &mut image).unwrap();
        (layout, plane, image)
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
                let bytes = image.as_chunks().0[page as usize];
                layout.check_page(&bytes, 7, page).unwrap();
                assert_eq!(bytes[row * row_bytes..][..row_bytes], plane[index * row_bytes..][..row_bytes]);
                assert_eq!(layout.row_of(&bytes, index), &plane[index * row_bytes..][..row_bytes]);
            }
            let mut back = vec![0; plane.len()];
            for (page, bytes) in (0..).zip(image.as_chunks().0) {
                layout.decode_page(0, bytes, 7, page, &mut back).unwrap();
            }
            assert_eq!(back, plane);
        }
    }

    #[test]
    fn the_trailer_is_as_written_down() {
        let (_, plane, image) = block(1152, 64, 1, 0x0807_0605_0403_0201);
        let last = &image[21 * PAGE_BYTES..];
        assert_eq!(last[..1152], plane[63 * 1152..]);
        assert!(last[1152..4080].iter().all(|&byte| byte == 0));
        assert_eq!(last[4080..4092], [1, 2, 3, 4, 5, 6, 7, 8, 21, 0, 0, 0]);
        assert_eq!(last[4092..], crc32c::crc32c(&last[..4092]).to_le_bytes());
        // The polynomial, by the check value of the catalogue of CRCs.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_page_with_any_wrong_bit_is_refused() {
        let (layout, _, image) = block(656, 64, 1, 3);
        let mut page = image.as_chunks().0[4];
        for bit in 0..PAGE_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(layout.check_page(&page, 3, 4), Err(PageFault::Crc { .. })), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        layout.check_page(&page, 3, 4).unwrap();
        assert!(matches!(layout.check_page(&[0; PAGE_BYTES], 0, 0), Err(PageFault::Crc { .. })), "a hole in a file");
    }

    #[test]
    fn a_whole_page_of_another_block_or_place_is_refused() {
        let (layout, _, image) = block(656, 64, 2, 3);
        let page = image.as_chunks().0[4];
        assert_eq!(layout.check_page(&page, 2, 4).unwrap_err(), PageFault::Tag { stored: 3, expected: 2 });
        assert_eq!(layout.check_page(&page, 3, 5).unwrap_err(), PageFault::Number { stored: 4 });
        let mut plane = vec![0; layout.plane_bytes()];
        let error = layout.decode_page(9, &page, 3, 15, &mut plane).unwrap_err();
        let fault = PageFault::Number { stored: 4 };
        assert_eq!(error, RowCacheError::BadPage { block: 9, layer: 1, page: 15, fault });
        assert!(plane.iter().all(|&byte| byte == 0), "nothing of it is used");
        let no_page = RowCacheError::NoSuchPage { page: 22, block_pages: 22 };
        assert_eq!(layout.decode_page(9, &page, 3, 22, &mut plane), Err(no_page));
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
        assert_eq!(layout.encode_page(&plane, 3, 22, &mut page), Err(no_page));
        assert!(matches!(layout.encode_page(&plane[1..], 3, 0, &mut page), Err(RowCacheError::Length { .. })));
        assert!(matches!(layout.encode_block(&plane, 3, &mut image[1..]), Err(RowCacheError::Length { .. })));
        assert!(matches!(layout.row_index(2, 0), Err(RowCacheError::NoSuchRow { layer: 2, .. })));
        assert!(matches!(layout.row_index(0, 64), Err(RowCacheError::NoSuchRow { token: 64, .. })));
    }
}
