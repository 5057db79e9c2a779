//! What a thread keeps while it computes attention, from unit to unit.

use super::attention::Attention;
use crate::kernels::blocked::{
    ColumnBlock, Line, ROWS, Softmax, StoredUnits, Widened, Widths, WordBlock, round_query, round_stored_query,
};

/// Values from the beginning of a cache line on: vectors that lie across two lines cost twice as much.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    values: Vec<f32>,
    start: usize,
}

impl Aligned {
    pub(super) fn zeroed(&mut self, n: usize) {
        const LINE: usize = 64;
        const SPARE: usize = LINE / size_of::<f32>() - 1;
        anew(&mut self.values, n + SPARE, 0.0);
        self.start = self.values.as_ptr().align_offset(LINE).min(SPARE);
    }

    pub(super) fn all(&mut self) -> &mut [f32] {
        &mut self.values[self.start..]
    }
}

/// Makes room for `n` values in all and no more. Where there was less, what was there goes first, so that no more than
/// `n` are held at any time.
pub(super) fn make_room<T>(values: &mut Vec<T>, n: usize) {
    if values.capacity() < n {
        *values = Vec::new();
        values.reserve_exact(n);
    }
}

/// `n` values.
fn anew<T: Clone>(values: &mut Vec<T>, n: usize, value: T) {
    make_room(values, n);
    values.clear();
    values.resize(n, value);
}

/// What a thread keeps from unit to unit, each `[group][token][head]`.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Queries `[key width]`.
    pub(super) q: Vec<f32>,
    pub(super) states: Vec<Softmax>,
    /// Sums `[latent width]`.
    pub(super) out: Aligned,
    /// What a group sees of a block's rows, for many heads.
    pub(super) widened: Widened,
    pub(super) words: WordBlock,
    pub(super) units: StoredUnits,
    pub(super) columns: ColumnBlock,
    /// Queries as words `[line of a key]`.
    pub(super) q_words: Vec<Line>,
    /// What a head's are times, and the softmax scale.
    pub(super) scales: Vec<f32>,
}

impl Room {
    /// Bytes at most of a room for `heads` heads of tokens that see slices of these widths, the latent one as a part of
    /// their keys if it is `absorbed`.
    pub(super) fn bytes(heads: usize, widths: Widths) -> usize {
        let query = widths.rope + if widths.absorbed { widths.latent } else { 0 };
        let words = widths.key_lines() * size_of::<Line>();
        let floats = (query + widths.latent + 1) * size_of::<f32>();
        let head = floats + words + size_of::<Softmax>() + size_of::<(usize, usize)>();
        // Of all forms a widened block is the largest: its keys and its values in single precision.
        let block = ROWS * (query + widths.latent.next_multiple_of(ROWS)) * size_of::<f32>();
        (heads * head).saturating_add(block).saturating_add(size_of::<Self>())
    }

    /// Makes room for these heads of tokens, and takes their queries.
    pub(super) fn begin(&mut self, attention: &Attention<'_>, heads: &[(usize, usize)]) {
        let width = attention.q_rope.n2 + attention.q_latent.map_or(0, |q| q.n2);
        make_room(&mut self.q, heads.len() * width);
        self.q.clear();
        for &(t, head) in heads {
            self.q.extend_from_slice(attention.q_rope.row(t, head));
            self.q.extend_from_slice(attention.q_latent.map_or(&[], |q| q.row(t, head)));
        }
        if attention.is_words() || attention.is_stored() {
            self.round(attention, heads.len());
        }
        anew(&mut self.states, heads.len(), Softmax::EMPTY);
        self.out.zeroed(heads.len() * attention.out.n2);
    }

    /// Rounds the queries.
    fn round(&mut self, attention: &Attention<'_>, heads: usize) {
        let (level, widths, stored) = (attention.frame.device.level, attention.widths(), attention.is_stored());
        let lines = widths.key_lines();
        anew(&mut self.q_words, heads * lines, Line::ZERO);
        make_room(&mut self.scales, heads);
        self.scales.clear();
        for (q, words) in self.q.chunks_exact(self.q.len() / heads).zip(self.q_words.chunks_exact_mut(lines)) {
            let unit = if stored {
                round_stored_query(level, q, widths, words)
            } else {
                round_query(level, q, widths.rope, words)
            };
            self.scales.push(unit * attention.scale);
        }
    }
}
