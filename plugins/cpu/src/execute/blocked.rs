//! Attention over half-precision rows: who shares a pass over a block of rows?
//!
//! Tokens of one sequence that read everything before them list the same rows, so a run of them shares each block. A
//! token with a selection of its own is a run by itself. Either way a token's blocks are counted from the first row of
//! its list, so that its bits do not depend on its neighbours.

use super::attention::Attention;
use crate::kernels::blocked::{
    HEADS_MAX, Heads, ROWS, Row, Softmax, WIDENED_HEADS_MAX, Widened, attend, attend_widened, can_block, can_widen,
};
use crate::threads::part;
use sparsed_quant::Format;
use std::ops::Range;

/// Tokens in a run: enough to pay for fetching a block, few enough to spread over a team.
const RUN_TOKENS: usize = 32;

/// From this many heads of tokens that read a block on it is widened: then transposing its keys is a twentieth of the
/// work.
const WIDEN_FROM: usize = 24;

/// What a thread keeps from unit to unit, each `[group][token][head]`.
#[derive(Debug, Default)]
struct Room {
    /// Queries `[key width]`.
    q: Vec<f32>,
    states: Vec<Softmax>,
    /// Sums `[latent width]`.
    out: Vec<f32>,
    /// What a group sees of a block's rows, for many heads.
    widened: Widened,
}

impl Room {
    /// Makes room for these heads of tokens, and takes their queries.
    fn begin(&mut self, attention: &Attention<'_>, heads: &[(usize, usize)]) {
        self.q.clear();
        for &(t, head) in heads {
            self.q.extend_from_slice(attention.q_rope.row(t, head));
            self.q.extend_from_slice(attention.q_latent.map_or(&[], |q| q.row(t, head)));
        }
        self.states.clear();
        self.states.resize(heads.len(), Softmax::EMPTY);
        self.out.clear();
        self.out.resize(heads.len() * attention.out.n2, 0.0);
    }
}

/// How the blocks of a run are read.
struct Run {
    /// Heads of a token.
    own: usize,
    /// Values of a query.
    q_width: usize,
    /// A block is widened for its heads.
    widen: bool,
}

impl Run {
    /// Heads that share a pass over a block.
    fn at_once(&self) -> usize {
        if self.widen { WIDENED_HEADS_MAX } else { HEADS_MAX }
    }
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
        let heads = self.heads(tokens, groups.clone(), own.clone());
        room.begin(self, &heads);
        let listed: Vec<usize> = tokens.clone().map(|t| self.listed(t)).collect();
        let longest = listed.iter().copied().max().unwrap_or(0);
        let per_group = tokens.len() * own.len();
        let job = Run {
            own: own.len(),
            q_width: room.q.len() / heads.len(),
            widen: per_group > WIDEN_FROM && can_widen(room.q.len() / heads.len()),
        };
        // Each row once, for whoever sees it; the next block's rows are asked for in equal shares.
        let passes = groups.len() * per_group.div_ceil(job.at_once());
        let mut now = self.fetch(tokens.end - 1, 0..longest.min(ROWS));
        for first in (0..longest).step_by(ROWS) {
            let n = (longest - first).min(ROWS);
            let next = self.fetch(tokens.end - 1, first + n..longest.min(first + n + ROWS));
            let mut ahead = next[..longest.saturating_sub(first + n).min(ROWS)].chunks(ROWS.div_ceil(passes));
            let seen: Vec<usize> = listed.iter().map(|listed| listed.saturating_sub(first).min(ROWS)).collect();
            for (number, group) in groups.clone().enumerate() {
                self.block(&job, self.slices(group, &now[..n]), number * per_group, &seen, &mut ahead, room);
            }
            now = next;
        }
        for ((&(t, head), state), sums) in heads.iter().zip(&room.states).zip(room.out.chunks_exact_mut(self.out.n2)) {
            state.finish(sums);
            // SAFETY: units are disjoint in tokens or heads.
            unsafe { self.out.row_mut(t, head) }.copy_from_slice(sums);
        }
    }

    /// What a group sees of a block of rows, for the group's heads: those in [`Room`] from `first_head` on. Token i
    /// sees the first `seen[i]` rows, the last token sees them all.
    fn block<'r>(
        &self,
        job: &Run,
        rows: [Row<'_>; ROWS],
        first_head: usize,
        seen: &[usize],
        ahead: &mut impl Iterator<Item = &'r [&'r [u8]]>,
        room: &mut Room,
    ) {
        let level = self.frame.device.level;
        let Room { q, states, out, widened, .. } = room;
        let n = seen.last().copied().unwrap_or(0);
        if job.widen {
            widened.fill(level, &rows[..n], job.q_width);
        }
        let mut token = 0;
        while token < seen.len() {
            // Tokens that see as many of these rows as this one go together.
            let visible = seen[token];
            let alike = seen[token..].iter().take_while(|&&other| other == visible).count();
            let (at, end) = (first_head + token * job.own, first_head + (token + alike) * job.own);
            for at in (at..if visible > 0 { end } else { at }).step_by(job.at_once()) {
                let some = at..end.min(at + job.at_once());
                let mut heads = Heads {
                    q: &q[some.start * job.q_width..some.end * job.q_width],
                    scale: self.scale,
                    states: &mut states[some.clone()],
                    out: &mut out[some.start * self.out.n2..some.end * self.out.n2],
                };
                let ahead = ahead.next().unwrap_or_default();
                if job.widen {
                    attend_widened(level, widened, visible, ahead, &mut heads);
                } else {
                    attend(level, &rows[..visible], ahead, &mut heads);
                }
            }
            token += alike;
        }
    }

    /// Which head of which token, in the order of [`Room`].
    fn heads(&self, tokens: &Range<usize>, groups: Range<usize>, own: Range<usize>) -> Vec<(usize, usize)> {
        let per_group = self.q_rope.n1 / self.groups;
        let mut heads = Vec::with_capacity(groups.len() * tokens.len() * own.len());
        for group in groups {
            for t in tokens.clone() {
                heads.extend(own.clone().map(|head| (t, group * per_group + head)));
            }
        }
        heads
    }

    /// Rows `list` of token t's list, as the pool has them.
    fn fetch(&self, t: usize, list: Range<usize>) -> [&[u8]; ROWS] {
        let mut rows = [&[][..]; ROWS];
        for (row, i) in rows.iter_mut().zip(list) {
            *row = self.row(self.frame.slot(t, self.position(t, i)));
        }
        rows
    }

    /// What `group` sees of rows.
    fn slices<'r>(&self, group: usize, rows: &[&'r [u8]]) -> [Row<'r>; ROWS] {
        let (latent, rope) = (self.out.n2 * 2, self.q_rope.n2 * 2); // bytes of a slice
        let mut slices = [Row::default(); ROWS];
        for (slice, row) in slices.iter_mut().zip(rows) {
            let (latent_row, rope_row) = row.split_at(self.pool.latent.bytes);
            *slice = Row {
                latent: latent_row[group * latent..(group + 1) * latent].as_chunks().0,
                rope: rope_row[group * rope..(group + 1) * rope].as_chunks().0,
            };
        }
        slices
    }
}
