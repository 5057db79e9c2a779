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
    /// One per group.
    blocks: Vec<Block>,
    /// Queries `[token][head][key width]`.
    q: Vec<f32>,
    /// `[token][head]`
    states: Vec<Softmax>,
    /// Rows that each token lists.
    listed: Vec<usize>,
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
        // Few tokens: their groups, or the heads of a lone group, are dealt to the whole team.
        let parts = team.len().div_ceil(runs.len().max(1));
        let (groups, split) = if self.groups > 1 { (parts.min(self.groups), 1) } else { (1, parts.min(heads)) };
        let units = runs.len() * groups * split;
        team.run(&|number| {
            let mut room = Room::default();
            // Dealt out in turn: later tokens have more to read.
            for unit in (number..units).step_by(team.len()) {
                let (run, groups) = (&runs[unit / split / groups], part(self.groups, unit / split % groups, groups));
                self.run(run, groups, part(heads, unit % split, split), &mut room);
            }
        });
    }

    /// Tokens `runs[i]` list the same rows, each as many as it sees; or it is one token.
    fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut shared = false;
        for t in self.tokens.clone() {
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

    /// Heads `own` of each of `groups`, for some tokens.
    fn run(&self, tokens: &Range<usize>, groups: Range<usize>, own: Range<usize>, room: &mut Room) {
        let per_group = self.q_rope.n1 / self.groups;
        let heads = |group: usize| group * per_group + own.start..group * per_group + own.end;
        let Room { blocks, q, states, listed } = room;
        blocks.resize_with(groups.len(), Block::default);
        states.clear();
        states.resize(groups.len() * tokens.len() * own.len(), Softmax::EMPTY);
        q.clear();
        for group in groups.clone() {
            for (t, head) in tokens.clone().flat_map(|t| heads(group).map(move |head| (t, head))) {
                q.extend_from_slice(self.q_rope.row(t, head));
                q.extend_from_slice(self.q_latent.map_or(&[], |q| q.row(t, head)));
                self.out_of(t, head..head + 1).fill(0.0);
            }
        }
        let key_width = q.len() / states.len();
        listed.clear();
        listed.extend(tokens.clone().map(|t| self.listed(t)));
        let longest = listed.iter().copied().max().unwrap_or(0);
        for first in (0..longest).step_by(ROWS) {
            let list = first..longest.min(first + ROWS);
            self.load(tokens.end - 1, groups.clone(), list, blocks);
            let mut at = 0; // the state of the next head
            for (group, block) in groups.clone().zip(&*blocks) {
                for (t, listed) in tokens.clone().zip(&*listed) {
                    let n = listed.saturating_sub(first).min(ROWS);
                    for head in heads(group).step_by(HEADS_MAX) {
                        let some = head..heads(group).end.min(head + HEADS_MAX);
                        let now = at..at + some.len();
                        at = now.end;
                        if n > 0 {
                            let q = &q[now.start * key_width..now.end * key_width];
                            let (states, out) = (&mut states[now], self.out_of(t, some));
                            let mut heads = Heads { q, n, scale: self.scale, states, out };
                            attend(self.frame.device.level, block, &mut heads);
                        }
                    }
                }
            }
        }
        let mut states = states.iter();
        for group in groups {
            for (t, head) in tokens.clone().flat_map(|t| heads(group).map(move |head| (t, head))) {
                states.next().expect("one per head").finish(self.out_of(t, head..head + 1));
            }
        }
    }

    /// The sums of `heads` of token t, to write: only the thread that has these heads of this token calls it.
    #[allow(clippy::mut_from_ref, reason = "disjoint heads are written by several threads")]
    fn out_of(&self, t: usize, heads: Range<usize>) -> &mut [f32] {
        let width = self.out.n2;
        // Heads side by side are one row.
        let out = Tensor { n1: 1, n2: self.out.n1 * width, s1: 0, ..self.out };
        // SAFETY: units are disjoint in tokens or heads, and `run` holds one of these slices at a time.
        unsafe { out.flat_part_mut(t, heads.start * width..heads.end * width) }
    }

    /// Decodes rows `list` of token t's list, the slices of each group into its block.
    fn load(&self, t: usize, groups: Range<usize>, list: Range<usize>, blocks: &mut [Block]) {
        let (latent, rope) = (self.out.n2 * 2, self.q_rope.n2 * 2); // bytes of a slice
        let mut whole = [(&[][..], &[][..], &[][..]); ROWS];
        let n = list.len();
        for (row, i) in whole.iter_mut().zip(list) {
            let both = self.row(self.frame.slot(t, self.position(t, i)));
            let (latent, rope) = both.split_at(self.pool.latent.bytes);
            *row = (both, latent, rope);
        }
        let mut rows = [Row { latent: &[], rope: &[], whole: &[] }; ROWS];
        for (i, (group, block)) in groups.zip(blocks).enumerate() {
            for (row, (both, latent_row, rope_row)) in rows.iter_mut().zip(&whole[..n]) {
                *row = Row {
                    latent: &latent_row[group * latent..(group + 1) * latent],
                    rope: &rope_row[group * rope..(group + 1) * rope],
                    whole: if i == 0 { both } else { &[] },
                };
            }
            load(self.frame.device.level, &rows[..n], self.q_latent.is_some(), block);
        }
    }
}
