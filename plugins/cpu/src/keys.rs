//! How do index keys lie in the pool? Keys in q8_0 and q4_0 as tiles of 16 tokens, so that the indexer multiplies 16 at
//! a time without packing them anew for every query; keys of other formats row by row.
//!
//! A tile takes the bytes of its rows. Block after block of 32 values it has the codes, vector g of 64 bytes holding
//! bytes 4g .. 4g + 4 of each row's codes, then the rows' scales. A block's host image has rows, as `abi/OPS.md` says.
//!
//! Of keys in q8_0 each block's longest is known for each layer, for the bound of `execute/refine.rs`.

use crate::kernels::activations::BLOCK;
use crate::kernels::packed::{NIBBLES, TILE_ROWS, tile_block_bytes};
use crate::memory::Pool;
use sparsed_quant::Format;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of a block's scale, which is before its codes in a row.
const SCALE: usize = 2;
/// Bytes of four codes of each row of a tile.
const GROUP: usize = 4 * TILE_ROWS;

/// Bytes of the codes of a block of 32 values, of formats whose keys lie as tiles.
const fn code_bytes(format: Format) -> Option<usize> {
    match format {
        Format::Q8_0 => Some(BLOCK),
        Format::Q4_0 => Some(NIBBLES),
        _ => None,
    }
}

/// For each layer and block of a pool: no key is longer (its Euclidean length).
///
/// A length is the bits of an f32, which order as its value does, a NaN last. Relaxed: each is a number of its own;
/// operators of a step, and calls of the host, follow each other.
#[derive(Debug)]
pub(crate) struct LongestKeys {
    /// `[layer][block]`
    lengths: Vec<AtomicU32>,
    n_blocks: usize,
}

impl LongestKeys {
    /// The longest key was overwritten, or whole rows came: it must be looked for. As bits it is the greatest, so it
    /// stays beside keys that are written at the same time.
    const UNKNOWN: u32 = u32::MAX;

    /// Of a pool of zeros.
    pub(crate) fn new(n_layers: u32, n_blocks: u32) -> Self {
        let lengths = (0..u64::from(n_layers) * u64::from(n_blocks)).map(|_| AtomicU32::new(0)).collect();
        Self { lengths, n_blocks: n_blocks as usize }
    }

    fn of(&self, layer: usize, block: usize) -> &AtomicU32 {
        &self.lengths[layer * self.n_blocks + block]
    }

    /// A key of length `before` became one of length `after`.
    fn replaced(&self, layer: usize, block: usize, before: f32, after: f32) {
        let (own, before) = (self.of(layer, block), before.to_bits());
        if before > 0 && before >= own.load(Ordering::Relaxed) {
            own.store(Self::UNKNOWN, Ordering::Relaxed);
        } else {
            own.fetch_max(after.to_bits(), Ordering::Relaxed);
        }
    }

    /// All keys of a block, in all layers, became others.
    fn all_replaced(&self, block: usize, length: u32) {
        for layer in self.lengths.chunks_exact(self.n_blocks) {
            layer[block].store(length, Ordering::Relaxed);
        }
    }
}

impl Pool {
    /// Bytes of the codes of a block of 32 values, where index keys lie as tiles.
    pub(crate) fn key_codes(&self) -> Option<usize> {
        code_bytes(self.index.format)
    }

    /// `n` tiles of 16 keys of one block; the first key is at `slot`.
    pub(crate) fn key_tiles(&self, layer: usize, slot: usize, n: usize) -> &[u8] {
        debug_assert!(slot % self.block_tokens + n * TILE_ROWS <= self.block_tokens, "tiles of one block");
        let (at, row) = (self.index_offset(layer, slot), self.index.bytes);
        self.index_plane.bytes(at, n * row * TILE_ROWS)
    }

    /// No key in q8_0 of these blocks of a layer is longer; a NaN where one has no length. Nobody writes keys now.
    pub(crate) fn longest_key(&self, layer: usize, blocks: &[u32]) -> f32 {
        let Some(longest) = &self.longest_keys else { return f32::NAN };
        let of_block = |&block: &u32| {
            let own = longest.of(layer, block as usize);
            match own.load(Ordering::Relaxed) {
                LongestKeys::UNKNOWN => {
                    // Whoever else looks for it finds the same.
                    let found = self.find_longest(layer, block as usize);
                    own.store(found, Ordering::Relaxed);
                    found
                }
                known => known,
            }
        };
        f32::from_bits(blocks.iter().map(of_block).max().unwrap_or(0))
    }

    /// Bits of the length of the longest key of a block in a layer.
    fn find_longest(&self, layer: usize, block: usize) -> u32 {
        let (mut row, mut longest) = (vec![0; self.index.bytes], 0);
        let tiles = self.key_tiles(layer, block * self.block_tokens, self.block_tokens / TILE_ROWS);
        for tile in tiles.chunks_exact(self.index.bytes * TILE_ROWS) {
            for lane in 0..TILE_ROWS {
                pick(BLOCK, lane, tile, &mut row);
                longest = longest.max(length(&row).to_bits());
            }
        }
        longest
    }

    /// The keys of a block are zeros now, of no length.
    pub(crate) fn forget_lengths(&self, block: usize) {
        if let Some(longest) = &self.longest_keys {
            longest.all_replaced(block, 0);
        }
    }

    /// Stores the encoded key of `slot`.
    ///
    /// # Safety
    /// No other thread uses this key now.
    pub(crate) unsafe fn put_key(&self, layer: usize, slot: usize, row: &[u8]) {
        let Some(codes) = self.key_codes() else {
            // SAFETY: the caller's contract.
            return unsafe { self.index_plane.put(self.index_offset(layer, slot), row) };
        };
        let (lane, tile) = (slot % TILE_ROWS, self.index_offset(layer, slot - slot % TILE_ROWS));
        if let Some(longest) = &self.longest_keys {
            let mut before = vec![0; row.len()];
            for (place, part) in places(codes, lane, row.len()) {
                before[part.clone()].copy_from_slice(self.index_plane.bytes(tile + place, part.len()));
            }
            longest.replaced(layer, slot / self.block_tokens, length(&before), length(row));
        }
        for (place, part) in places(codes, lane, row.len()) {
            // SAFETY: these bytes of the tile are this key's; otherwise the caller's contract.
            unsafe { self.index_plane.put(tile + place, &row[part]) };
        }
    }

    /// Writes the index part of a block's host image.
    pub(crate) fn export_keys(&self, block: usize, image: &mut [u8]) {
        let length = self.index_plane.block_bytes;
        let keys = self.index_plane.bytes(block * length, length);
        let Some(codes) = self.key_codes() else { return image.copy_from_slice(keys) };
        let row = self.index.bytes;
        for (tile, rows) in keys.chunks_exact(row * TILE_ROWS).zip(image.chunks_exact_mut(row * TILE_ROWS)) {
            rows.chunks_exact_mut(row).enumerate().for_each(|(lane, row)| pick(codes, lane, tile, row));
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
        let Some(codes) = self.key_codes() else { return keys.copy_from_slice(image) };
        let row = self.index.bytes;
        if let Some(longest) = &self.longest_keys {
            longest.all_replaced(block, LongestKeys::UNKNOWN);
        }
        for (tile, rows) in keys.chunks_exact_mut(row * TILE_ROWS).zip(image.chunks_exact(row * TILE_ROWS)) {
            rows.chunks_exact(row).enumerate().for_each(|(lane, row)| lay(codes, lane, row, tile));
        }
    }

    /// Copies the keys of the first `n_tokens` of a block.
    ///
    /// # Safety
    /// Nobody else uses block `dst` now, which is not `src`.
    pub(crate) unsafe fn copy_keys(&self, src: usize, dst: usize, n_tokens: usize) {
        let (row, length) = (self.index.bytes, self.index_plane.block_bytes);
        if let Some(longest) = &self.longest_keys {
            longest.all_replaced(dst, LongestKeys::UNKNOWN);
        }
        let from = self.index_plane.bytes(src * length, length);
        // SAFETY: the caller's contract.
        let to = unsafe { self.index_plane.bytes_mut(dst * length, length) };
        let layer = row * self.block_tokens;
        let codes = self.key_codes();
        let whole = if codes.is_some() { n_tokens - n_tokens % TILE_ROWS } else { n_tokens };
        for (from, to) in from.chunks_exact(layer.max(1)).zip(to.chunks_exact_mut(layer.max(1))) {
            to[..whole * row].copy_from_slice(&from[..whole * row]);
            for lane in 0..n_tokens - whole {
                for (place, part) in codes.into_iter().flat_map(|codes| places(codes, lane, row)) {
                    let place = whole * row + place..whole * row + place + part.len();
                    to[place.clone()].copy_from_slice(&from[place]);
                }
            }
        }
    }
}

/// Copies the key in lane `from` of a tile to lane `to` of another one; keys in q8_0.
pub(crate) fn copy_key(tile: &[u8], from: usize, to_tile: &mut [u8], to: usize) {
    const TILE_BLOCK_BYTES: usize = tile_block_bytes(BLOCK);
    let (from, to) = (from % TILE_ROWS, to % TILE_ROWS);
    let (tile, _) = tile.as_chunks::<TILE_BLOCK_BYTES>();
    for (tile, to_tile) in tile.iter().zip(to_tile.as_chunks_mut::<TILE_BLOCK_BYTES>().0) {
        for group in 0..BLOCK / 4 {
            let (from, to) = (64 * group + 4 * from, 64 * group + 4 * to);
            to_tile[to..to + 4].copy_from_slice(&tile[from..from + 4]);
        }
        let (from, to) = (TILE_ROWS * BLOCK + 2 * from, TILE_ROWS * BLOCK + 2 * to);
        to_tile[to..to + 2].copy_from_slice(&tile[from..from + 2]);
    }
}

/// The Euclidean length of an encoded key in q8_0, rounded up.
fn length(row: &[u8]) -> f32 {
    // Of blocks of zeros, which have no scale, nothing need be summed: so are keys that nobody has written yet.
    let blocks = row.as_chunks::<{ SCALE + BLOCK }>().0.iter().filter(|block| block[..SCALE] != [0; SCALE]);
    let squares = blocks.map(|block| {
        // Squares in 16 bits: every x86-64 multiplies eight at once.
        let square = |code: &u8| i32::from(i16::from(code.cast_signed()).pow(2));
        let sum: i32 = block[SCALE..].iter().map(square).sum();
        #[allow(clippy::cast_precision_loss, reason = "32 squares of bytes are below 2^24")]
        let sum = sum as f32;
        half::f16::from_le_bytes([block[0], block[1]]).to_f32().powi(2) * sum
    });
    // From +0 on: an empty sum is -0, whose bits are not the least. A NaN must not lose against other keys, whatever
    // its sign.
    match squares.fold(0.0, |sum: f32, square| sum + square).sqrt() * 1.0001 {
        length if length.is_nan() => f32::NAN.abs(),
        length => length,
    }
}

/// Puts a row into its tile. The sizes of copies are constants, so that they are moves and no calls.
fn lay(codes: usize, lane: usize, row: &[u8], tile: &mut [u8]) {
    for (block, tile) in row.chunks_exact(SCALE + codes).zip(tile.chunks_exact_mut(tile_block_bytes(codes))) {
        let (scale, fours) = block.split_at(SCALE);
        let (groups, scales) = tile.split_at_mut(TILE_ROWS * codes);
        for (four, group) in fours.as_chunks::<4>().0.iter().zip(groups.as_chunks_mut::<GROUP>().0) {
            group.as_chunks_mut().0[lane] = *four;
        }
        scales.as_chunks_mut::<SCALE>().0[lane].copy_from_slice(scale);
    }
}

/// Takes a row out of its tile.
fn pick(codes: usize, lane: usize, tile: &[u8], row: &mut [u8]) {
    for (block, tile) in row.chunks_exact_mut(SCALE + codes).zip(tile.chunks_exact(tile_block_bytes(codes))) {
        let (scale, fours) = block.split_at_mut(SCALE);
        let (groups, scales) = tile.split_at(TILE_ROWS * codes);
        for (four, group) in fours.as_chunks_mut().0.iter_mut().zip(groups.as_chunks::<GROUP>().0) {
            *four = group.as_chunks::<4>().0[lane];
        }
        scale.copy_from_slice(&scales.as_chunks::<SCALE>().0[lane]);
    }
}

/// Where the parts of a row lie in its tile.
fn places(codes: usize, lane: usize, row_bytes: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let block_bytes = codes + SCALE;
    (0..row_bytes / block_bytes).flat_map(move |block| {
        let (row, tile) = (block * block_bytes, block * tile_block_bytes(codes));
        let fours = (0..codes / 4).map(move |g| (tile + 64 * g + 4 * lane, row + 2 + 4 * g..row + 6 + 4 * g));
        fours.chain(std::iter::once((tile + TILE_ROWS * codes + 2 * lane, row..row + 2)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{DT_F16, DT_Q4_0, DT_Q8_0, KV_DISCARD, SpdKvDesc, SpdKvOp, SpdRow};
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
    fn a_key_copied_between_tiles_is_the_same_key_and_the_longest_is_known() {
        let pool = pool(DT_Q8_0);
        let (row, mut random) = (pool.index.bytes, fastrand::Rng::with_seed(6));
        let mut longest = 0f64;
        let rows: Vec<Vec<u8>> = (0..16)
            .map(|_| {
                let values: Vec<f32> = (0..64).map(|_| random.f32() - 0.5).collect();
                let mut bytes = vec![0; row];
                sparsed_quant::encode(Format::Q8_0, &values, &mut bytes).unwrap();
                let mut back = vec![0.0; 64];
                sparsed_quant::decode(Format::Q8_0, &bytes, &mut back).unwrap();
                longest = longest.max(back.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt());
                bytes
            })
            .collect();
        for (slot, row) in rows.iter().enumerate() {
            // SAFETY: this thread alone has the pool.
            unsafe { pool.put_key(1, slot, row) };
        }
        let found = f64::from(pool.longest_key(1, &[0]));
        assert!(found >= longest && found < 1.001 * longest, "{found} {longest}");
        assert_eq!([pool.longest_key(0, &[0, 1, 2]), pool.longest_key(1, &[1, 2])], [0.0; 2]);
        let mut turned = vec![0; 16 * row];
        for lane in 0..16 {
            copy_key(pool.key_tiles(1, 0, 1), lane, &mut turned, 15 - lane);
        }
        for (slot, row) in rows.iter().rev().enumerate() {
            // SAFETY: as above.
            unsafe { pool.put_key(0, slot, row) };
        }
        assert_eq!(pool.key_tiles(0, 0, 1), turned);
        let mut image = vec![0; pool.index_plane.block_bytes];
        pool.export_keys(0, &mut image);
        let other = self::pool(DT_Q8_0);
        // SAFETY: as above.
        unsafe { other.import_keys(2, &image) };
        assert_eq!(other.longest_key(1, &[2]), pool.longest_key(1, &[0]));
        // Its sign does not matter.
        // SAFETY: as above.
        unsafe { other.put_key(1, 67, &[0, 0xfe].repeat(row / 2)) };
        assert!(other.longest_key(1, &[1, 2]).is_nan() && other.longest_key(1, &[0, 1]) == 0.0);
    }

    #[test]
    fn a_longest_key_that_is_overwritten_copied_over_or_discarded_is_forgotten() {
        let pool = pool(DT_Q8_0);
        // SAFETY: this thread alone has the pool.
        let put_row = |slot: usize, row: &[u8]| unsafe { pool.put_key(1, slot, row) };
        let put = |slot: usize, length: f32| {
            let (mut key, mut row) = (vec![0.0; 64], vec![0; pool.index.bytes]);
            key[slot % 64] = length;
            sparsed_quant::encode(Format::Q8_0, &key, &mut row).unwrap();
            put_row(slot, &row);
        };
        let longest = |block: u32| pool.longest_key(1, &[block]).round();
        (0..32).for_each(|slot| put(slot, 1.0 + (slot % 4) as f32));
        put(5, 20.0);
        put_row(17, &[0, 0xfe].repeat(pool.index.bytes / 2));
        assert!(longest(0).is_nan());
        put(17, 3.0);
        assert_eq!(longest(0), 20.0);
        put(9, 2.0);
        put(5, 7.0);
        put(6, 9.0);
        assert_eq!(longest(0), 9.0);
        put(6, 9.0);
        assert_eq!(longest(0), 9.0);
        // Of a copy the first eight keys are those of the other block.
        (32..64).for_each(|slot| put(slot, if slot < 40 { 30.0 } else { 5.0 }));
        // SAFETY: as above.
        unsafe { pool.copy_keys(0, 1, 8) };
        assert_eq!([longest(0), longest(1)], [9.0; 2]);
        pool.apply(&[SpdKvOp { kind: KV_DISCARD, dst_block: 1, ..SpdKvOp::default() }], &mut []).unwrap();
        assert_eq!([longest(0), longest(1)], [9.0, 0.0]);
    }

    #[test]
    fn rows_come_out_of_a_block_as_they_went_in() {
        for dtype in [DT_Q8_0, DT_Q4_0, DT_F16] {
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
