//! A block of rows as 16-bit words: filled once where many heads read it, multiplied at twice the speed of f32.
//!
//! A row's latent and its rope slice become integers below 2^[`VALUE_BITS`] times a power of two each (block floating
//! point), so that half-precision values down to a 16th of the largest are exact. Sums of words' products are exact,
//! too: they have no order. Words lie in pairs, as they are multiplied: in keys value i beside value i + 16, in values
//! row i beside row i + 16.

mod read;

use super::{Ahead, ROWS, ask};
use crate::level::Level;
use crate::simd::{LANES, Words, on_level};
use read::{Codes, Eights, Halves, Scale, Sixes, Stored, magic, power_of_two};
use sparsed_quant::Format;

/// Magnitudes of a block's words are below 2 to this power.
pub(super) const VALUE_BITS: i32 = 15;
/// Sum of the magnitudes of what is multiplied with a block's words for one sum: the sum is at most 2^31 then.
pub(super) const FACTORS: f32 = (1 << (31 - VALUE_BITS)) as f32;
/// Largest word.
pub(super) const WORD_MAX: f32 = 32767.0;
/// Values of a pair of vectors: widths are multiples of it.
const PAIR: usize = 2 * LANES;
/// Widest slice of a row: what a query's rounding may add to a sum stays far below [`FACTORS`].
const WIDTH_MAX: usize = 1 << 14;
/// Pairs of rows in a block.
pub(super) const ROW_PAIRS: usize = ROWS / 2;
/// Vectors of values that lie together for all pairs of rows.
pub(super) const TOGETHER: usize = 4;

/// 32 words, on a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct Line(pub(super) [i32; LANES]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; LANES]);
}

/// What a head group sees of a row, as the pool has it; of a row in F8_128, whose powers of two are at its end, all.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bytes<'a> {
    pub(crate) latent: &'a [u8],
    pub(crate) rope: &'a [u8],
}

/// Values of a head group's rows and keys.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Widths {
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    /// Keys are the latent slice and the rope slice; otherwise the rope slice alone.
    pub(crate) absorbed: bool,
}

impl Widths {
    /// Lines of a key's latent part.
    pub(super) fn latent_lines(self) -> usize {
        if self.absorbed { self.latent / PAIR } else { 0 }
    }

    /// Lines of a key.
    pub(crate) fn key_lines(self) -> usize {
        self.latent_lines() + self.rope / PAIR
    }
}

/// Formats of a row's latent and rope part.
pub(crate) type Formats = [Format; 2];

/// True when rows of such formats and such widths can become words.
pub(crate) fn can_be_words(formats: Formats, widths: Widths) -> bool {
    let [latent, rope] = formats;
    let alike = latent == rope && matches!(latent, Format::F16 | Format::Q8_0 | Format::F8_128);
    (alike || formats == [Format::Q6_0, Format::Q8_0]) && are_lines(widths)
}

/// True when what a head group sees of a row is whole lines of words.
pub(super) fn are_lines(widths: Widths) -> bool {
    let fits = |width: usize| (PAIR..=WIDTH_MAX).contains(&width) && width.is_multiple_of(PAIR);
    fits(widths.latent) && fits(widths.rope)
}

/// Up to [`ROWS`] rows.
#[derive(Debug, Default)]
pub(crate) struct WordBlock {
    /// `[row][line]`, the latent part first.
    pub(super) keys: Vec<Line>,
    /// `[TOGETHER vectors][pair of rows][vector]`.
    pub(super) values: Vec<Line>,
    pub(super) latent_lines: usize,
    pub(super) key_lines: usize,
    /// What the words of a row are times; NaN where a value is none or infinite.
    pub(super) units: Units,
}

#[derive(Debug)]
pub(super) struct Units {
    /// Of a score that was shifted by [`super::integer::SUM_SHIFT`].
    pub(super) key: [f32; ROWS],
    pub(super) value: [f32; ROWS],
    /// How far a latent part's sum is shifted to be in the unit of the rope part, where that is greater.
    pub(super) shift: [i32; ROWS],
}

impl Default for Units {
    fn default() -> Self {
        Self { key: [0.0; ROWS], value: [0.0; ROWS], shift: [0; ROWS] }
    }
}

impl WordBlock {
    /// Takes the place of what was there before: of the slices of `group`. Memory is asked for the rows `ahead`
    /// meanwhile.
    pub(crate) fn fill(
        &mut self,
        level: Level,
        formats: Formats,
        rows: &[Bytes<'_>],
        (widths, group): (Widths, usize),
        ahead: &[&[u8]],
    ) {
        debug_assert!(!rows.is_empty() && rows.len() <= ROWS && can_be_words(formats, widths), "a block");
        (self.latent_lines, self.key_lines) = (widths.latent_lines(), widths.key_lines());
        self.keys.resize(ROWS * self.key_lines, Line::ZERO);
        let groups = (widths.latent / LANES).div_ceil(TOGETHER);
        self.values.resize(groups * ROW_PAIRS * TOGETHER, Line::ZERO);
        match formats[0] {
            Format::F16 => fill_halves(level, rows, (widths, group), ahead, self),
            Format::F8_128 => fill_eights(level, rows, (widths, group), ahead, self),
            Format::Q6_0 => fill_sixes(level, rows, (widths, group), ahead, self),
            _ => fill_bytes(level, rows, (widths, group), ahead, self),
        }
    }
}

on_level! {
    fn fill_halves(rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) = halves_body
}
on_level! {
    fn fill_bytes(rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) = bytes_body
}
on_level! {
    fn fill_eights(rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) = eights_body
}
on_level! {
    fn fill_sixes(rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) = sixes_body
}

#[inline(always)]
fn halves_body<L: Words>(l: L, rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) {
    fill_body::<L, Halves, Halves>(l, rows, slices, ahead, to);
}

#[inline(always)]
fn bytes_body<L: Words>(l: L, rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) {
    fill_body::<L, Codes, Codes>(l, rows, slices, ahead, to);
}

#[inline(always)]
fn eights_body<L: Words>(l: L, rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) {
    fill_body::<L, Eights, Eights>(l, rows, slices, ahead, to);
}

#[inline(always)]
fn sixes_body<L: Words>(l: L, rows: &[Bytes<'_>], slices: (Widths, usize), ahead: &[&[u8]], to: &mut WordBlock) {
    fill_body::<L, Sixes, Codes>(l, rows, slices, ahead, to);
}

/// Sets the units of a block's rows; returns the exponents of their latent slices and of what their keys' words are in.
#[inline(always)]
fn find_units<L: Words, S: Stored, R: Stored>(
    l: L,
    rows: &[Bytes<'_>],
    (widths, group): (Widths, usize),
    ahead: &[&[u8]],
    to: &mut WordBlock,
) -> ([i32; ROWS], [i32; ROWS]) {
    let latent_of = |row: usize| S::slice(rows[row].latent, widths.latent, group);
    let rope_of = |row: usize| R::slice(rows[row].rope, widths.rope, group);
    let mut ahead = Ahead { rows: ahead, share: ahead.len(), rest: 0 };
    let (mut latents, mut keys) = ([0; ROWS], [0; ROWS]);
    for r in 0..rows.len() {
        ask(l, &mut ahead, ROWS / rows.len());
        let (latent, rope) = (S::exponent(l, latent_of(r)), R::exponent(l, rope_of(r)));
        let unit = |exponent: Option<i32>| exponent.map_or(f32::NAN, |e| power_of_two(e - (VALUE_BITS - 1)));
        to.units.value[r] = unit(latent);
        let key = if to.latent_lines > 0 { latent.zip(rope).map(|(a, b)| a.max(b)) } else { rope };
        to.units.key[r] = unit(key.map(|e| e + super::integer::SUM_SHIFT));
        let (latent, key) = (latent.unwrap_or(0), key.unwrap_or(0));
        to.units.shift[r] = if to.latent_lines > 0 { (key - latent).clamp(0, 31) } else { 0 };
        (latents[r], keys[r]) = (latent, key);
    }
    (latents, keys)
}

/// Of rows whose latent part is stored as S, whose rope part as R.
#[inline(always)]
fn fill_body<L: Words, S: Stored, R: Stored>(
    l: L,
    rows: &[Bytes<'_>],
    (widths, group): (Widths, usize),
    ahead: &[&[u8]],
    to: &mut WordBlock,
) {
    let latent_of = |row: usize| S::slice(rows[row].latent, widths.latent, group);
    let rope_of = |row: usize| R::slice(rows[row].rope, widths.rope, group);
    let (latents, keys) = find_units::<L, S, R>(l, rows, (widths, group), ahead, to);
    let lines = to.key_lines;
    for first in (0..rows.len()).step_by(2 * LANES) {
        for a in first..rows.len().min(first + LANES) {
            // In the place of a row that is missing stands another, which is weighed with 0.
            let b = if a + LANES < rows.len() { a + LANES } else { a };
            let (key_a, key_b) = to.keys[a * lines..].split_at_mut(LANES * lines);
            let (key_a, rope_a) = key_a[..lines].split_at_mut(to.latent_lines);
            let (key_b, rope_b) = key_b[..lines].split_at_mut(to.latent_lines);
            let scale_a = Scale::<L> { exponent: latents[a], magic: l.splat(magic(latents[a])) };
            let scale_b = Scale::<L> { exponent: latents[b], magic: l.splat(magic(latents[b])) };
            let mut key_lines = key_a.iter_mut().zip(key_b);
            let (of_a, of_b) = (latent_of(a), latent_of(b));
            let (lines_a, lines_b) =
                (of_a.lines.chunks(TOGETHER / 2 * S::BYTES), of_b.lines.chunks(TOGETHER / 2 * S::BYTES));
            let values = to.values.as_chunks_mut::<{ ROW_PAIRS * TOGETHER }>().0;
            for (pair, ((latent_a, latent_b), values)) in lines_a.zip(lines_b).zip(values).enumerate() {
                let values = &mut values.as_chunks_mut::<TOGETHER>().0[first / 2 + a - first];
                let both = latent_a.chunks_exact(S::BYTES).zip(latent_b.chunks_exact(S::BYTES));
                let numbered = (pair * (TOGETHER / 2)..).zip(both.zip(values.as_chunks_mut::<2>().0));
                for (line, ((line_a, line_b), values)) in numbered {
                    let a = S::words(l, line_a, of_a, line, scale_a);
                    let b = S::words(l, line_b, of_b, line, scale_b);
                    l.store_i(l.pair_words(a[0], b[0]), &mut values[0].0);
                    l.store_i(l.pair_words(a[1], b[1]), &mut values[1].0);
                    if let Some((key_a, key_b)) = key_lines.next() {
                        l.store_i(l.pair_words(a[0], a[1]), &mut key_a.0);
                        l.store_i(l.pair_words(b[0], b[1]), &mut key_b.0);
                    }
                }
            }
            for (row, to) in [(a, rope_a), (b, rope_b)] {
                let slice = rope_of(row);
                let scale = Scale::<L> { exponent: keys[row], magic: l.splat(magic(keys[row])) };
                for (line, (bytes, key)) in slice.lines.chunks_exact(R::BYTES).zip(to).enumerate() {
                    let [low, high] = R::words(l, bytes, slice, line, scale);
                    l.store_i(l.pair_words(low, high), &mut key.0);
                }
            }
        }
    }
}

/// What a query's words are times, and its inverse, of sums of the magnitudes of `each` values and the largest of all;
/// nothing for a query that is not finite.
pub(super) fn query_unit(sums: &[f32], each: usize, most: f32) -> Option<(f32, f32)> {
    if sums.iter().any(|sum| !sum.is_finite()) {
        return None;
    }
    #[allow(clippy::cast_precision_loss, reason = "a row's width is a small number")]
    let roundings = each as f32; // a half at most
    let largest = sums.iter().copied().fold(0.0, f32::max);
    let unit = (largest / (FACTORS - roundings)).max(most / WORD_MAX);
    // Nothing to see of such a query.
    Some(if unit < power_of_two(-100) { (0.0, 0.0) } else { (unit, 1.0 / unit) })
}

on_level! {
    /// Rounds a head's query (for the rope slice of `rope` values, then for the latent slice) to words beside those of
    /// [`WordBlock::keys`], and returns what they are times: NaN for a query that is not finite.
    ///
    /// What is multiplied with a lane of a key sums to [`FACTORS`] at most, so that a lane's sum has room in 32 bits.
    fn round_query(q: &[f32], rope: usize, to: &mut [Line]) -> f32 = round_query_body
}

#[inline(always)]
fn round_query_body<L: Words>(l: L, q: &[f32], rope: usize, to: &mut [Line]) -> f32 {
    let zero = l.splat(0.0);
    let (mut sums, mut most) = (zero, zero);
    for v in q.as_chunks().0 {
        let v = l.load(v);
        let magnitude = l.max(v, l.sub(zero, v)); // in this order a NaN stays
        (sums, most) = (l.add(sums, magnitude), l.max(magnitude, most));
    }
    let mut lanes = [0.0; LANES];
    l.store(sums, &mut lanes);
    let Some((unit, inverse)) = query_unit(&lanes, q.len() / LANES, l.largest(most)) else { return f32::NAN };
    let (rope, latent) = q.split_at(rope);
    let inverse = l.splat(inverse);
    for (v, to) in latent.as_chunks::<PAIR>().0.iter().chain(rope.as_chunks().0).zip(to) {
        let halves = v.as_chunks().0;
        let (a, b) = (l.round(l.mul(l.load(&halves[0]), inverse)), l.round(l.mul(l.load(&halves[1]), inverse)));
        l.store_i(l.pair_words(a, b), &mut to.0);
    }
    unit
}
