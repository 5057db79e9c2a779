//! Attention over half-precision rows: who shares a block of decoded rows?
//!
//! Tokens of one sequence that read everything before them list the same rows, so a run of them shares each block. A
//! token with a selection of its own is a run by itself. Either way a token's blocks are counted from the first row of
//! its list, so that its bits do not depend on its neighbours.

use super::attention::Attention;
use crate::kernels::blocked::{Block, HEADS_MAX, Heads, ROWS, Row, Softmax, attend, can_block, load};
use crate::tensor::Tensor;
use crate::threads::part;
use sparsed_quant::Format;
use std::ops::Range;

/// Tokens in a run: enough to pay for decoding a block, few enough to spread over a team.
const RUN_TOKENS: usize = 16;

/// What a thread keeps from unit to unit.
#[derive(Debug, Default)]
struct Room {
    block: Block,
    /// Queries `[token][head][key width]`.
    q: Vec<f32>,
    /// `[token][head]`
    states: Vec<Softmax>,
}

impl Attention<'_> {
    /// True when the pool's rows are ones that [`Self::run_blocked`] reads.
    pub(super) fn is_blocked(&self) -> bool {
        let half = self.pool.latent.format == Format::F16 && self.pool.rope.format == Format::F16;
        half && can_block(self.out.n2) && can_block(self.q_rope.n2) && self.out.s1 == self.out.n2
    }

    /// All tokens and heads.
    pub(super) fn run_blocked(&self) {
        let (runs, team) = (self.runs(), &self.frame.device.team);
        let heads = self.q_rope.n1 / self.groups;
        // A lone token's heads are dealt to the whole team.
        let split = if runs.len() * self.groups >= team.len() { 1 } else { team.len().min(heads) };
        let units = runs.len() * self.groups * split;
        team.run(&|number| {
            let mut room = Room::default();
            // Dealt out in turn: later tokens have more to read.
            for unit in (number..units).step_by(team.len()) {
                let (run, group) = (&runs[unit / split / self.groups], unit / split % self.groups);
                let own = part(heads, unit % split, split);
                self.run(run, group, group * heads + own.start..group * heads + own.end, &mut room);
            }
        });
    }

    /// Tokens `runs[i]` list the same rows, each as many as it sees; or it is one token.
    fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut shared = false;
        for t in 0..self.q_rope.n0 {
            let all = self.reads_all(t);
            match runs.last_mut() {
                Some(run)
                    if shared
                        && all
                        && run.len() < RUN_TOKENS
                        && self.frame.seq_of[run.start] == self.frame.seq_of[t] =>
                {
                    run.end = t + 1;
                }
                _ => runs.push(t..t + 1),
            }
            shared = all;
        }
        runs
    }

    /// True when token t lists every position up to its own.
    fn reads_all(&self, t: usize) -> bool {
        let Some(sel) = self.sel else { return true };
        let visible = self.visible(t);
        visible <= sel.n2 && (0..).zip(&sel.row(t, 0)[..visible]).all(|(i, &s): (i32, _)| i == s)
    }

    fn run(&self, tokens: &Range<usize>, group: usize, heads: Range<usize>, room: &mut Room) {
        let (level, width) = (self.frame.device.level, self.out.n2);
        let key_width = self.q_rope.n2 + self.q_latent.map_or(0, |q| q.n2);
        room.states.clear();
        room.states.resize(tokens.len() * heads.len(), Softmax::EMPTY);
        room.q.clear();
        for (t, head) in tokens.clone().flat_map(|t| heads.clone().map(move |head| (t, head))) {
            room.q.extend_from_slice(self.q_rope.row(t, head));
            room.q.extend_from_slice(self.q_latent.map_or(&[], |q| q.row(t, head)));
        }
        // Heads side by side are one row.
        let out = Tensor { n1: 1, n2: self.out.n1 * width, s1: 0, ..self.out };
        for t in tokens.clone() {
            // SAFETY: this thread has these heads of these tokens.
            unsafe { out.flat_part_mut(t, heads.start * width..heads.end * width) }.fill(0.0);
        }
        let listed = tokens.clone().map(|t| self.listed(t)).max().unwrap_or(0);
        for first in (0..listed).step_by(ROWS) {
            self.load(tokens.end - 1, group, first..listed.min(first + ROWS), &mut room.block);
            for (i, t) in tokens.clone().enumerate() {
                let n = self.listed(t).saturating_sub(first).min(ROWS);
                for own in (0..heads.len()).step_by(HEADS_MAX).map(|h| h..heads.len().min(h + HEADS_MAX)) {
                    let at = i * heads.len() + own.start..i * heads.len() + own.end;
                    let place = (heads.start + own.start) * width..(heads.start + own.end) * width;
                    if n > 0 {
                        let q = &room.q[at.start * key_width..at.end * key_width];
                        // SAFETY: as above.
                        let out = unsafe { out.flat_part_mut(t, place) };
                        let states = &mut room.states[at];
                        attend(level, &room.block, &mut Heads { q, n, scale: self.scale, states, out });
                    }
                }
            }
        }
        for (i, t) in tokens.clone().enumerate() {
            for (own, head) in heads.clone().enumerate() {
                // SAFETY: as above.
                let out = unsafe { out.flat_part_mut(t, head * width..(head + 1) * width) };
                room.states[i * heads.len() + own].finish(out);
            }
        }
    }

    /// Decodes rows `list` of token t's list, the slices of `group`.
    fn load(&self, t: usize, group: usize, list: Range<usize>, block: &mut Block) {
        let (latent, rope) = (self.out.n2 * 2, self.q_rope.n2 * 2); // bytes of a slice
        let mut rows = [Row { latent: &[], rope: &[] }; ROWS];
        let n = list.len();
        for (row, i) in rows.iter_mut().zip(list) {
            let slot = self.frame.slot(t, self.position(t, i));
            let (latent_row, rope_row) = self.pool.latent_rows(self.layer, slot);
            row.latent = &latent_row[group * latent..(group + 1) * latent];
            row.rope = &rope_row[group * rope..(group + 1) * rope];
        }
        load(self.frame.device.level, &rows[..n], self.q_latent.is_some(), block);
    }
}
