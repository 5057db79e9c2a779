//! Where does each number of a packed weight lie?
//!
//! A tile is 16 rows, block after block of 32 values, so that memory is read from front to back: a block's codes, then
//! its scales; before every 8 blocks of a K format the 16 scales of their scales.
//!
//! Codes are vectors of 64 bytes, 4 to a row. Nibbles: byte b of a row in vector g has value 4g + b in its low half
//! and value 16 + 4g + b in its high half. Bits above the nibble follow: the fifth bits as one vector, in whose byte b
//! bit n belongs to value 4n + b; or the upper two of six bits as two vectors, in whose first bits 2n, 2n + 1 of byte b
//! belong to value 4n + b and in whose second to value 16 + 4n + b. Codes of 8 bits: byte b in vector g is value 4g +
//! b, made unsigned by adding 128.

use crate::kernels::activations::BLOCK;
use crate::simd::LANES;
use sparsed_quant::Format;

/// Rows of a weight in a tile.
pub(crate) const TILE_ROWS: usize = LANES;
/// Blocks that share scales of scales.
const BLOCKS_OF_K: usize = 8;

/// How a format is packed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Bits of a code.
    pub(super) bits: usize,
    /// Bytes of a block's scales: 16 x f16 d (and 16 x f16 m), or 16 + 16 bytes of a K format.
    pub(super) scale_bytes: usize,
    /// Bytes before the blocks of a K format: 16 x f16 d (and 16 x f16 dmin).
    pub(super) head_bytes: usize,
}

impl Layout {
    /// `None`: weights of this format are not packed.
    pub(super) const fn of(format: Format) -> Option<Self> {
        let (bits, scale_bytes, head_bytes) = match format {
            Format::Q4_0 => (4, 32, 0),
            Format::Q4_1 => (4, 64, 0),
            Format::Q5_0 => (5, 32, 0),
            Format::Q5_1 => (5, 64, 0),
            Format::Q8_0 => (8, 32, 0),
            Format::Q4_K => (4, 32, 64),
            Format::Q5_K => (5, 32, 64),
            Format::Q6_K => (6, 32, 32),
            _ => return None,
        };
        Some(Self { bits, scale_bytes, head_bytes })
    }

    /// Bytes of a block's codes, of 16 rows.
    pub(super) const fn code_bytes(self) -> usize {
        TILE_ROWS * BLOCK * self.bits / 8
    }

    /// Blocks of a group that has a head; one where there is none.
    pub(super) const fn group_blocks(self) -> usize {
        if self.head_bytes == 0 { 1 } else { BLOCKS_OF_K }
    }

    /// Bytes of a group.
    pub(super) const fn group_bytes(self) -> usize {
        self.head_bytes + self.group_blocks() * (self.code_bytes() + self.scale_bytes)
    }
}

/// True when weights of this format and row length can be packed.
pub(crate) fn can_pack(format: Format, cols: usize) -> bool {
    Layout::of(format).is_some_and(|layout| cols > 0 && cols.is_multiple_of(BLOCK * layout.group_blocks()))
}

/// Bytes of a packed tile.
pub(crate) fn tile_bytes(format: Format, cols: usize) -> usize {
    let layout = Layout::of(format).expect("can_pack was asked");
    cols / (BLOCK * layout.group_blocks()) * layout.group_bytes()
}

/// Packs up to 16 encoded rows; rows that are missing are zero.
pub(crate) fn pack_tile<'a>(format: Format, cols: usize, row: impl Fn(usize) -> Option<&'a [u8]>, to: &mut [u8]) {
    debug_assert_eq!(to.len(), tile_bytes(format, cols));
    let layout = Layout::of(format).expect("can_pack was asked");
    to.fill(0);
    for lane in 0..TILE_ROWS {
        let Some(row) = row(lane) else { continue };
        for (from, to) in row.chunks_exact(format.block_bytes()).zip(to.chunks_exact_mut(layout.group_bytes())) {
            let (head, blocks) = to.split_at_mut(layout.head_bytes);
            let blocks = blocks.chunks_exact_mut(layout.code_bytes() + layout.scale_bytes);
            let mut place = Lane { lane, layout, head, blocks: blocks.collect() };
            match format {
                Format::Q4_K | Format::Q5_K => place.put_k(format, from),
                Format::Q6_K => place.put_q6_k(from),
                _ => place.put_plain(from),
            }
        }
    }
}

/// One row's places in a group of blocks.
struct Lane<'a> {
    lane: usize,
    layout: Layout,
    head: &'a mut [u8],
    blocks: Vec<&'a mut [u8]>,
}

impl Lane<'_> {
    /// A block of ggml's plain formats: scales, fifth bits if there are any, codes in the order they have here.
    fn put_plain(&mut self, from: &[u8]) {
        let (scales, codes) = from.split_at(self.layout.scale_bytes / TILE_ROWS);
        let lane = self.lane;
        let (to, to_scales) = self.blocks[0].split_at_mut(self.layout.code_bytes());
        for (to, scale) in to_scales.as_chunks_mut::<{ 2 * TILE_ROWS }>().0.iter_mut().zip(scales.as_chunks::<2>().0) {
            to[lane * 2..lane * 2 + 2].copy_from_slice(scale);
        }
        let (fifth, codes) = codes.split_at(if self.layout.bits == 5 { 4 } else { 0 });
        let offset = if self.layout.bits == 8 { 0x80 } else { 0 };
        let to = to.as_chunks_mut::<{ 4 * TILE_ROWS }>().0;
        for (to, four) in to.iter_mut().zip(codes.as_chunks::<4>().0) {
            to[lane * 4..lane * 4 + 4].copy_from_slice(&four.map(|byte| byte ^ offset));
        }
        if let Some(fifth) = fifth.first_chunk::<4>() {
            let fifth = u32::from_le_bytes(*fifth); // bit i: value i
            for b in 0..4 {
                to[4][lane * 4 + b] = (0..8).fold(0, |bits, n| bits | u8::from(fifth >> (4 * n + b) & 1 == 1) << n);
            }
        }
    }

    /// 256 values of Q4_K or Q5_K: d, dmin, 12 bytes of scales and minimums, 32 of fifth bits (Q5_K), 128 of nibbles.
    fn put_k(&mut self, format: Format, from: &[u8]) {
        let (head, rest) = from.split_at(16);
        let (fifth, nibbles) = rest.split_at(if format == Format::Q5_K { 32 } else { 0 });
        self.put_half(0, &head[..2]);
        self.put_half(1, &head[2..4]);
        for j in 0..BLOCKS_OF_K {
            let code = |i: usize| {
                let nibble = nibbles[j / 2 * 32 + i] >> (j % 2 * 4) & 15;
                nibble | fifth.get(i).map_or(0, |byte| (byte >> j & 1) << 4)
            };
            let (scale, minimum) = scale_and_minimum(&head[4..], j);
            self.put_block(j, code, [scale, minimum]);
        }
    }

    /// 256 values of Q6_K: 128 bytes of nibbles, 64 of upper bits, 16 scales, d.
    fn put_q6_k(&mut self, from: &[u8]) {
        self.put_half(0, &from[208..210]);
        for j in 0..BLOCKS_OF_K {
            // Value 32 k + l of a half has its nibble in byte l or l + 32 and bits 2 k of upper byte l.
            let (half, k) = (j / 4, j % 4);
            let code = |l: usize| {
                let nibble = from[64 * half + k % 2 * 32 + l] >> (k / 2 * 4) & 15;
                nibble | (from[128 + 32 * half + l] >> (2 * k) & 3) << 4
            };
            self.put_block(j, code, [from[192 + 2 * j], from[193 + 2 * j]]);
        }
    }

    /// The `n`-th f16 of the group.
    fn put_half(&mut self, n: usize, bytes: &[u8]) {
        let at = 2 * (n * TILE_ROWS + self.lane);
        self.head[at..at + 2].copy_from_slice(bytes);
    }

    /// Block `j`: codes of up to 6 bits, and its two bytes of scales.
    fn put_block(&mut self, j: usize, code: impl Fn(usize) -> u8, scales: [u8; 2]) {
        let (codes, to_scales) = self.blocks[j].split_at_mut(self.layout.code_bytes());
        let codes = codes.as_chunks_mut::<{ 4 * TILE_ROWS }>().0;
        for i in 0..BLOCK {
            let (code, n, at) = (code(i), i / 4, self.lane * 4 + i % 4);
            codes[n % 4][at] |= (code & 15) << (n / 4 * 4);
            match self.layout.bits {
                5 => codes[4][at] |= (code >> 4) << n,
                6 => codes[4 + n / 4][at] |= (code >> 4) << (n % 4 * 2),
                _ => {}
            }
        }
        for (to, scale) in to_scales.chunks_exact_mut(TILE_ROWS).zip(scales) {
            to[self.lane] = scale;
        }
    }
}

/// Scale and minimum of sub-block `j`, 6 bits each: for j < 4 the low bits of bytes j and j + 4; for the others byte
/// j + 4 holds both low nibbles, and the upper bits fill bytes j - 4 and j.
fn scale_and_minimum(bytes: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (bytes[j] & 63, bytes[j + 4] & 63)
    } else {
        (bytes[j + 4] & 15 | bytes[j - 4] >> 6 << 4, bytes[j + 4] >> 4 | bytes[j] >> 6 << 4)
    }
}
