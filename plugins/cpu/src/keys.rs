//! How do index keys lie in the pool? Keys in q8_0 as tiles of 16 tokens, so that the indexer multiplies 16 at a time
//! without packing them anew for every query; keys of other formats row by row.
//!
//! A tile takes the bytes of its rows. Block after block of 32 values it has the codes, vector g of 64 bytes holding
//! bytes 4g .. 4g + 4 of each row's codes, then the rows' scales. A block's host image has rows, as `abi/OPS.md` says.

use crate::kernels::packed::TILE_ROWS;
use crate::memory::Pool;
use sparsed_quant::Format;

/// Bytes of an encoded block of 32 values.
const BLOCK_BYTES: usize = 34;
/// Bytes of 16 of them.
const TILE_BLOCK_BYTES: usize = TILE_ROWS * BLOCK_BYTES;

impl Pool {
    /// Whether index keys lie as tiles.
    pub(crate) fn has_key_tiles(&self) -> bool {
        self.index.format == Format::Q8_0
    }

    /// `n` tiles of 16 keys of one block; the first key is at `slot`.
    pub(crate) fn key_tiles(&self, layer: usize, slot: usize, n: usize) -> &[u8] {
        debug_assert!(slot % self.block_tokens + n * TILE_ROWS <= self.block_tokens, "tiles of one block");
        let (at, row) = (self.index_offset(layer, slot), self.index.bytes);
        self.index_plane.bytes(at, n * row * TILE_ROWS)
    }

    /// Stores the encoded key of `slot`.
    ///
    /// # Safety
    /// No other thread uses this key now.
    pub(crate) unsafe fn put_key(&self, layer: usize, slot: usize, row: &[u8]) {
        if !self.has_key_tiles() {
            // SAFETY: the caller's contract.
            return unsafe { self.index_plane.put(self.index_offset(layer, slot), row) };
        }
        let (lane, tile) = (slot % TILE_ROWS, self.index_offset(layer, slot - slot % TILE_ROWS));
        for (place, part) in places(lane, row.len()) {
            // SAFETY: these bytes of the tile are this key's; otherwise the caller's contract.
            unsafe { self.index_plane.put(tile + place, &row[part]) };
        }
    }

    /// Writes the index part of a block's host image.
    pub(crate) fn export_keys(&self, block: usize, image: &mut [u8]) {
        let length = self.index_plane.block_bytes;
        let keys = self.index_plane.bytes(block * length, length);
        if !self.has_key_tiles() {
            return image.copy_from_slice(keys);
        }
        let row = self.index.bytes;
        for (tile, rows) in keys.chunks_exact(row * TILE_ROWS).zip(image.chunks_exact_mut(row * TILE_ROWS)) {
            for (lane, to) in rows.chunks_exact_mut(row).enumerate() {
                for (place, part) in places(lane, row) {
                    let from = &tile[place..place + part.len()];
                    to[part].copy_from_slice(from);
                }
            }
        }
    }

    /// Takes the index part of a block's host image.
    ///
    /// # Safety
    /// Nobody else uses the block now.
    pub(crate) unsafe fn import_keys(&self, block: usize, image: &[u8]) {
        let length = self.index_plane.block_bytes;
        // SAFETY: the caller's contract.
        let keys = unsafe { self.index_plane.bytes_mut(block * length, length) };
        if !self.has_key_tiles() {
            return keys.copy_from_slice(image);
        }
        let row = self.index.bytes;
        for (tile, rows) in keys.chunks_exact_mut(row * TILE_ROWS).zip(image.chunks_exact(row * TILE_ROWS)) {
            for (lane, from) in rows.chunks_exact(row).enumerate() {
                for (place, part) in places(lane, row) {
                    tile[place..place + part.len()].copy_from_slice(&from[part]);
                }
            }
        }
    }

    /// Copies the keys of the first `n_tokens` of a block.
    ///
    /// # Safety
    /// Nobody else uses block `dst` now, which is not `src`.
    pub(crate) unsafe fn copy_keys(&self, src: usize, dst: usize, n_tokens: usize) {
        let (row, length) = (self.index.bytes, self.index_plane.block_bytes);
        let from = self.index_plane.bytes(src * length, length);
        // SAFETY: the caller's contract.
        let to = unsafe { self.index_plane.bytes_mut(dst * length, length) };
        let layer = row * self.block_tokens;
        let whole = if self.has_key_tiles() { n_tokens - n_tokens % TILE_ROWS } else { n_tokens };
        for (from, to) in from.chunks_exact(layer.max(1)).zip(to.chunks_exact_mut(layer.max(1))) {
            to[..whole * row].copy_from_slice(&from[..whole * row]);
            for lane in 0..n_tokens - whole {
                for (place, part) in places(lane, row) {
                    let place = whole * row + place..whole * row + place + part.len();
                    to[place.clone()].copy_from_slice(&from[place]);
                }
            }
        }
    }
}

/// Where the parts of a row lie in its tile.
fn places(lane: usize, row_bytes: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    (0..row_bytes / BLOCK_BYTES).flat_map(move |block| {
        let (row, tile) = (block * BLOCK_BYTES, block * TILE_BLOCK_BYTES);
        let codes = (0..8).map(move |g| (tile + 64 * g + 4 * lane, row + 2 + 4 * g..row + 6 + 4 * g));
        codes.chain(std::iter::once((tile + TILE_ROWS * 32 + 2 * lane, row..row + 2)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{DT_F16, DT_Q8_0, SpdKvDesc, SpdRow};
    use sparsed_plugin_kit::Usage;
    use std::sync::Arc;

    fn pool(dtype: u32) -> Pool {
        let desc = SpdKvDesc {
            block_tokens: 32,
            n_blocks: 3,
            n_layers: 1,
            n_index_layers: 2,
            latent: SpdRow { dtype: DT_F16, width: 32 },
            rope: SpdRow { dtype: DT_F16, width: 32 },
            index: SpdRow { dtype, width: 64 },
            ..SpdKvDesc::default()
        };
        Pool::create(&desc, None, &Arc::new(Usage::default())).unwrap().0
    }

    #[test]
    fn rows_come_out_of_a_block_as_they_went_in() {
        for dtype in [DT_Q8_0, DT_F16] {
            let pool = pool(dtype);
            let (row, mut random) = (pool.index.bytes, fastrand::Rng::with_seed(5));
            // Two layers of 32 tokens.
            let image: Vec<u8> = (0..64 * row).map(|_| random.u8(..)).collect();
            for (i, row) in image.chunks_exact(row).enumerate() {
                // SAFETY: this thread alone has the pool.
                unsafe { pool.put_key(i / 32, 32 + i % 32, row) };
            }
            let mut found = vec![0; image.len()];
            pool.export_keys(1, &mut found);
            assert_eq!(found, image);
            // SAFETY: as above.
            unsafe { pool.import_keys(2, &image) };
            pool.export_keys(2, &mut found);
            assert_eq!(found, image);
            // SAFETY: as above.
            unsafe { pool.copy_keys(2, 0, 21) };
            pool.export_keys(0, &mut found);
            for (i, (found, row)) in found.chunks_exact(row).zip(image.chunks_exact(row)).enumerate() {
                assert!(if i % 32 < 21 { found == row } else { found.iter().all(|&byte| byte == 0) }, "row {i}");
            }
        }
    }
}
