//! Attention over a few rows in every form of words, and what it should be in f64.

use super::columns::{ColumnBlock, attend_columns};
use super::integer::{WORD_HEADS_MAX, WordHeads, attend_words};
use super::stored::{StoredBlock, StoredUnits, attend_stored, round_stored_query};
use super::words::{Bytes, Formats, Line, Widths, WordBlock, round_query};
use super::{ROWS, Softmax};
use crate::kernels::inputs::{Values, values};
use crate::level::Level;
use fastrand::Rng;
use proptest::prelude::*;
use sparsed_quant::Format;

/// As in DeepSeek-V3.2.
pub(super) const MLA: Widths = Widths { latent: 512, rope: 64, absorbed: true };

/// What a case is made of.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) values: Values,
    /// Of latent and rope rows.
    pub(super) formats: Formats,
    pub(super) widths: Widths,
    pub(super) rows: usize,
    pub(super) heads: usize,
    /// Rows and their parts differ by powers of two up to this one and down to its inverse.
    pub(super) spread: i32,
}

/// Cases of up to `rows` rows in one of `formats`, half of them with a spread of up to `spread`, the others of none.
pub(super) fn shapes(formats: &'static [Formats], rows: usize, spread: i32) -> impl Strategy<Value = Shape> {
    let narrow = (1usize..=5, 1usize..=4, any::<bool>());
    let narrow = narrow.prop_map(|(latent, rope, absorbed)| Widths { latent: 32 * latent, rope: 32 * rope, absorbed });
    let widths = prop_oneof![4 => narrow, 1 => Just(MLA)];
    let spread = prop_oneof![Just(0), 1..=spread];
    let all = (values(8.0), proptest::sample::select(formats), widths, 1..=rows, 1usize..=7, spread);
    all.prop_map(|(values, formats, widths, rows, heads, spread)| Shape {
        values,
        formats,
        widths,
        rows,
        heads,
        spread,
    })
}

/// Rows, queries, and what is made of them.
#[derive(Clone)]
pub(super) struct Case {
    pub(super) formats: Formats,
    pub(super) widths: Widths,
    /// `[row][latent slice, rope slice]`
    pub(super) rows: Vec<[Vec<f32>; 2]>,
    /// `[head][rope, latent]`
    pub(super) q: Vec<Vec<f32>>,
    scale: f32,
}

impl Case {
    pub(super) fn new(shape: &Shape) -> Self {
        let Shape { ref values, formats, widths, rows, heads, spread } = *shape;
        let (mut values, mut sizes) = (values.rows(), Rng::with_seed(rows as u64));
        let mut row = |width: usize, size: f32| values(width).iter().map(|v| v * size).collect::<Vec<_>>();
        let key = widths.rope + if widths.absorbed { widths.latent } else { 0 };
        let q = (0..heads).map(|_| row(key, 2.0)).collect();
        let mut size = || 2f32.powi(sizes.i32(-spread..=spread));
        let rows = (0..rows).map(|_| [row(widths.latent, size()), row(widths.rope, size())]).collect();
        #[allow(clippy::cast_precision_loss, reason = "a width")]
        let scale = 1.0 / (key as f32).sqrt();
        Self { formats, widths, rows, q, scale }
    }

    /// An example of no special values.
    pub(super) fn seeded(seed: u64, formats: Formats, widths: Widths, rows: usize, heads: usize) -> Self {
        Self::new(&Shape { values: Values::seeded(seed), formats, widths, rows, heads, spread: 0 })
    }

    fn bytes(&self) -> Vec<[Vec<u8>; 2]> {
        let encode = |part: usize, values: &[f32]| {
            let mut bytes = vec![0; self.formats[part].row_bytes(values.len()).unwrap()];
            sparsed_quant::encode(self.formats[part], values, &mut bytes).unwrap();
            bytes
        };
        self.rows.iter().map(|[latent, rope]| [encode(0, latent), encode(1, rope)]).collect()
    }

    /// The heads' answers, `at_once` at a time.
    pub(super) fn run(&self, level: Level, at_once: usize) -> Vec<Vec<f32>> {
        if self.formats == [Format::W16; 2] {
            return self.run_stored(level, at_once, false);
        }
        let bytes = self.bytes();
        let rows: Vec<_> = bytes.iter().map(|[latent, rope]| Bytes { latent, rope }).collect();
        let mut answers = Vec::new();
        for queries in self.q.chunks(at_once) {
            let lines = self.widths.key_lines();
            let (mut q, mut scales) = (vec![Line::ZERO; queries.len() * lines], Vec::new());
            for (query, q) in queries.iter().zip(q.chunks_exact_mut(lines)) {
                scales.push(round_query(level, query, self.widths.rope, q) * self.scale);
            }
            let width = self.widths.latent;
            let (mut states, mut out) = (vec![Softmax::EMPTY; queries.len()], vec![0.0; queries.len() * width]);
            let mut block = WordBlock::default();
            for rows in rows.chunks(ROWS) {
                block.fill(level, self.formats, rows, (self.widths, 0), &[&bytes[0][0]]);
                let mut heads = WordHeads { q: &q, scales: &scales, states: &mut states, out: &mut out };
                attend_words(level, &block, rows.len(), &[&bytes[0][1]], &mut heads);
            }
            states.iter().zip(out.chunks_exact_mut(width)).for_each(|(state, out)| state.finish(out));
            answers.extend(out.chunks_exact(width).map(<[f32]>::to_vec));
        }
        answers
    }

    /// As [`Self::run`], of stored words.
    pub(super) fn run_stored(&self, level: Level, at_once: usize, by_column: bool) -> Vec<Vec<f32>> {
        self.run_stored_seeing(level, at_once, by_column.then_some(&vec![ROWS; self.q.len()]))
    }

    /// By column, head h sees the first `seen[h]` rows of each block; otherwise all.
    fn run_stored_seeing(&self, level: Level, at_once: usize, seen: Option<&Vec<usize>>) -> Vec<Vec<f32>> {
        let bytes = self.bytes();
        let whole: Vec<Vec<u8>> = bytes.iter().map(|parts| parts.concat()).collect();
        let latent = bytes[0][0].len();
        let rows: Vec<_> = bytes.iter().map(|[latent, rope]| Bytes { latent, rope }).collect();
        let (lines, width) = (self.widths.key_lines(), self.widths.latent);
        let mut answers = Vec::new();
        for (first, queries) in self.q.chunks(at_once).enumerate() {
            let (mut q, mut scales) = (vec![Line::ZERO; queries.len() * lines], Vec::new());
            for (query, q) in queries.iter().zip(q.chunks_exact_mut(lines)) {
                scales.push(round_stored_query(level, query, self.widths, q) * self.scale);
            }
            let (mut states, mut out) = (vec![Softmax::EMPTY; queries.len()], vec![0.0; queries.len() * width]);
            let (mut units, mut columns) = (StoredUnits::default(), ColumnBlock::default());
            for (rows, whole) in rows.chunks(ROWS).zip(whole.chunks(ROWS)) {
                units.take(level, &whole.iter().map(|row| &row[..]).collect::<Vec<_>>(), latent, self.widths);
                let block = StoredBlock { rows, units: &units };
                let mut heads = WordHeads { q: &q, scales: &scales, states: &mut states, out: &mut out };
                if let Some(seen) = seen {
                    columns.fill(level, &block);
                    let seen: Vec<_> = seen[first * at_once..].iter().map(|&n| rows.len().min(n)).collect();
                    attend_columns(level, &block, &columns, &seen, &[&whole[0]], &mut heads);
                } else {
                    attend_stored(level, &block, &[&whole[0]], &mut heads);
                }
            }
            states.iter().zip(out.chunks_exact_mut(width)).for_each(|(state, out)| state.finish(out));
            answers.extend(out.chunks_exact(width).map(<[f32]>::to_vec));
        }
        answers
    }

    /// Of one block, by column, head h of the first `seen[h]` rows.
    pub(super) fn run_seeing(&self, level: Level, seen: &[usize]) -> Vec<Vec<f32>> {
        self.run_stored_seeing(level, seen.len(), Some(&seen.to_vec()))
    }

    /// In f64, over the values that the rows decode to.
    fn exact(&self) -> Vec<Vec<f64>> {
        let decode = |part: usize, bytes: &[u8], width: usize| {
            let mut values = vec![0.0; width];
            sparsed_quant::decode(self.formats[part], bytes, &mut values).unwrap();
            values
        };
        let (latent, rope) = (self.widths.latent, self.widths.rope);
        let rows = self.bytes().into_iter().map(|[a, b]| [decode(0, &a, latent), decode(1, &b, rope)]);
        let rows: Vec<_> = rows.collect();
        let answer = |q: &Vec<f32>| {
            let score = |[latent, rope]: &[Vec<f32>; 2]| {
                let z: f64 = q.iter().zip(rope.iter().chain(latent)).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                z * f64::from(self.scale)
            };
            let z: Vec<f64> = rows.iter().map(score).collect();
            let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = z.iter().map(|z| (z - most).exp()).collect();
            let total: f64 = p.iter().sum();
            let value = |i: usize| rows.iter().zip(&p).map(|([v, _], p)| f64::from(v[i]) * p).sum::<f64>() / total;
            (0..self.widths.latent).map(value).collect()
        };
        self.q.iter().map(answer).collect()
    }

    /// Whether the answers of a case of this shape are within OPS.md's class A, and 1e-7 of their size where rows are
    /// of one size.
    pub(super) fn check(shape: &Shape) -> Result<(), TestCaseError> {
        let case = Self::new(shape);
        let (error, allowed) = (case.error(), case.allowed());
        prop_assert!(error < allowed, "{error:e}, {allowed:e} allowed");
        prop_assert!(shape.spread > 0 || error < 1e-7, "{error:e}");
        Ok(())
    }

    /// The normalised mean squared error of all answers.
    pub(super) fn error(&self) -> f64 {
        let (mut wrong, mut whole) = (0.0, 0.0);
        for (found, exact) in self.run(Level::detect(), WORD_HEADS_MAX).iter().zip(self.exact()) {
            for (found, exact) in found.iter().zip(exact) {
                wrong += (f64::from(*found) - exact).powi(2);
                whole += exact * exact;
            }
        }
        wrong / whole
    }

    /// What OPS.md's class A allows.
    fn allowed(&self) -> f64 {
        let length = |v: &mut dyn Iterator<Item = &f32>| v.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let longest = |lengths: &mut dyn Iterator<Item = f64>| lengths.fold(0.0, f64::max);
        let q = longest(&mut self.q.iter().map(|q| length(&mut q.iter())));
        let key = longest(&mut self.rows.iter().map(|row| length(&mut row.iter().flatten())));
        1e-7 + (1e-5 * f64::from(self.scale) * q * key).powi(2)
    }
}
