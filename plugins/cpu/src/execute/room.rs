//! What a thread keeps while it computes attention, from unit to unit.

use super::attention::Attention;
use crate::kernels::blocked::{
    ColumnBlock, Line, Softmax, StoredUnits, Widened, WordBlock, round_query, round_stored_query,
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
        self.values.clear();
        self.values.resize(n + SPARE, 0.0);
        self.start = self.values.as_ptr().align_offset(LINE).min(SPARE);
    }

    pub(super) fn all(&mut self) -> &mut [f32] {
        &mut self.values[self.start..]
    }
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
    /// Makes room for these heads of tokens, and takes their queries.
    pub(super) fn begin(&mut self, attention: &Attention<'_>, heads: &[(usize, usize)]) {
        self.q.clear();
        for &(t, head) in heads {
            self.q.extend_from_slice(attention.q_rope.row(t, head));
            self.q.extend_from_slice(attention.q_latent.map_or(&[], |q| q.row(t, head)));
        }
        if attention.is_words() || attention.is_stored() {
            self.round(attention, heads.len());
        }
        self.states.clear();
        self.states.resize(heads.len(), Softmax::EMPTY);
        self.out.zeroed(heads.len() * attention.out.n2);
    }

    /// Rounds the queries.
    fn round(&mut self, attention: &Attention<'_>, heads: usize) {
        let (level, widths, stored) = (attention.frame.device.level, attention.widths(), attention.is_stored());
        let lines = widths.key_lines();
        self.q_words.resize(heads * lines, Line::ZERO);
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
