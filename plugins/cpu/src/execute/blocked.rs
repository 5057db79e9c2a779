//! Attention over rows in f16, q8_0, f8_128, q6_0 and w16: who shares a pass over a block of rows?
//!
//! Tokens of one sequence that read everything before them list the same rows, so a run of them shares each block. A
//! token with a selection of its own is a run by itself. Either way a token's blocks are counted from the first row of
//! its list, so that its bits do not depend on its neighbours.

use super::attention::Attention;
use super::room::Room;
use crate::kernels::blocked::{
    Bytes, Formats, HEADS_MAX, Heads, ROWS, Row, StoredBlock, WIDENED_HEADS_MAX, WORD_HEADS_MAX, Widths, WordHeads,
    attend, attend_columns, attend_stored, attend_widened, attend_words, can_be_columns, can_be_stored, can_be_words,
    can_block, can_widen,
};
use crate::threads::part;
use sparsed_quant::Format;
use std::ops::Range;

/// Tokens in a run: enough to pay for fetching a block, few enough to spread over a team.
const RUN_TOKENS: usize = 32;

/// From this many heads of tokens that read a block on it is widened: then transposing its keys is a twentieth of the
/// work.
const WIDEN_FROM: usize = 24;

/// From this many heads that share a half-precision row on it is turned into words, which costs as much as three heads'
/// products. Rows of 8 and 6 bits always are.
const WORDS_FROM: usize = 8;

/// From this many heads of tokens that read a block of stored words on it is prepared for them: keys by column, at the
/// price of four heads' products, or, where keys are wide, only pairs of values.
const COLUMNS_FROM: usize = 16;
const PAIRS_FROM: usize = 32;

/// What is made of a block before it is multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Nothing; the same bits as [`Form::Widened`].
    Halves,
    Widened,
    Words,
    /// Nothing: it has words already.
    Stored,
    /// The same bits as [`Form::Stored`].
    Prepared,
}

/// How the blocks of a run are read.
struct Run {
    /// Heads of a token.
    own: usize,
    /// Values of a query.
    q_width: usize,
    form: Form,
}

impl Run {
    /// Heads that share a pass over a block.
    fn at_once(&self) -> usize {
        match self.form {
            Form::Halves => HEADS_MAX,
            Form::Widened => WIDENED_HEADS_MAX,
            Form::Words | Form::Stored | Form::Prepared => WORD_HEADS_MAX,
        }
    }

    /// Heads of each pass over a block, if `heads` are to pass: as many as can, but in passes of one size.
    fn per_pass(&self, heads: usize) -> usize {
        heads.div_ceil(heads.div_ceil(self.at_once()).max(1)).max(1)
    }

    /// Passes of `heads` over a block, that which makes it among them.
    fn passes(&self, heads: usize) -> usize {
        heads.div_ceil(self.at_once()) + usize::from(self.form == Form::Words)
    }
}

/// Bytes at most that a thread has while it attends: for a step of so many tokens with so many heads, which see slices
/// of these widths (latent, rope) or keep decoded rows of them.
pub(crate) fn attention_bytes(tokens: usize, heads: usize, [latent, rope]: [usize; 2], absorbed: bool) -> usize {
    Room::bytes(heads * tokens.min(RUN_TOKENS), Widths { latent, rope, absorbed })
}

impl Attention<'_> {
    /// True when the pool's rows are ones that [`Self::run_blocked`] reads.
    pub(super) fn is_blocked(&self) -> bool {
        if self.is_words() || self.is_stored() {
            return true;
        }
        let half = self.formats() == [Format::F16; 2];
        half && can_block(self.out.n2) && can_block(self.q_rope.n2) && self.out.s1 == self.out.n2
    }

    /// True when blocks of rows become words. It depends on the model's shape and the pool only: it shows in the bits.
    pub(super) fn is_words(&self) -> bool {
        can_be_words(self.formats(), self.widths())
            && (self.pool.latent.format != Format::F16 || self.q_rope.n1 / self.groups >= WORDS_FROM)
            && self.out.s1 == self.out.n2
    }

    /// True when the pool has rows of words that are multiplied as they are.
    pub(super) fn is_stored(&self) -> bool {
        let [latent, rope] = self.formats();
        latent == rope && can_be_stored(latent, self.widths()) && self.out.s1 == self.out.n2
    }

    fn formats(&self) -> Formats {
        [self.pool.latent.format, self.pool.rope.format]
    }

    /// What a group sees of a row.
    pub(super) fn widths(&self) -> Widths {
        Widths { latent: self.out.n2, rope: self.q_rope.n2, absorbed: self.q_latent.is_some() }
    }

    /// All tokens and heads.
    pub(super) fn run_blocked(&self) {
        let (runs, team) = (self.runs(), &self.frame.device.team);
        // Few tokens: the heads of each are dealt to the whole team.
        let parts = team.len().div_ceil(runs.len().max(1)).min(self.q_rope.n1);
        let (n, per_group) = (runs.len() * parts, self.q_rope.n1 / self.groups);
        team.deal(n, &|units| {
            let mut room = Room::default();
            for unit in units {
                // The last tokens, which have most to read, come first: no thread is left with one of them.
                let unit = n - 1 - unit;
                for (groups, own) in groups_of(part(self.q_rope.n1, unit % parts, parts), per_group) {
                    self.run(&runs[unit / parts], groups, own, &mut room);
                }
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
            form: match room.q.len() / heads.len() {
                _ if self.is_words() => Form::Words,
                _ if self.is_stored() => {
                    let from = if can_be_columns(self.widths()) { COLUMNS_FROM } else { PAIRS_FROM };
                    if per_group >= from { Form::Prepared } else { Form::Stored }
                }
                width if per_group > WIDEN_FROM && can_widen(width) => Form::Widened,
                _ => Form::Halves,
            },
        };
        // Each row once, for whoever sees it; the next block's rows are asked for in equal shares.
        let passes = groups.len() * job.passes(per_group);
        let mut now = self.fetch(tokens.end - 1, 0..longest.min(ROWS));
        for first in (0..longest).step_by(ROWS) {
            let n = (longest - first).min(ROWS);
            let next = self.fetch(tokens.end - 1, first + n..longest.min(first + n + ROWS));
            let mut ahead = next[..longest.saturating_sub(first + n).min(ROWS)].chunks(ROWS.div_ceil(passes));
            if matches!(job.form, Form::Stored | Form::Prepared) {
                room.units.take(self.frame.device.level, &now[..n], self.pool.latent.bytes, self.widths());
            }
            let seen: Vec<usize> = listed.iter().map(|listed| listed.saturating_sub(first).min(ROWS)).collect();
            for (number, group) in groups.clone().enumerate() {
                let rows = self.slices(group, &now[..n]);
                self.block(&job, (group, rows), number * per_group, &seen, &mut ahead, room);
            }
            now = next;
        }
        for ((&(t, head), state), sums) in
            heads.iter().zip(&room.states).zip(room.out.all().chunks_exact_mut(self.out.n2))
        {
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
        (group, rows): (usize, [Bytes<'_>; ROWS]),
        first_head: usize,
        seen: &[usize],
        ahead: &mut impl Iterator<Item = &'r [&'r [u8]]>,
        room: &mut Room,
    ) {
        let (level, n) = (self.frame.device.level, seen.last().copied().unwrap_or(0));
        let mut halves = [Row::default(); ROWS];
        match job.form {
            Form::Stored => {}
            Form::Prepared => {
                room.columns.fill(level, &StoredBlock { rows: &rows[..n], units: &room.units });
                return self.prepared(job, &rows[..n], first_head, seen, ahead, room);
            }
            Form::Words => {
                let ahead = ahead.next().unwrap_or_default();
                room.words.fill(level, self.formats(), &rows[..n], (self.widths(), group), ahead);
            }
            form => {
                for (halves, row) in halves.iter_mut().zip(&rows) {
                    *halves = Row { latent: row.latent.as_chunks().0, rope: row.rope.as_chunks().0 };
                }
                if form == Form::Widened {
                    room.widened.fill(level, &halves[..n], job.q_width);
                }
            }
        }
        let mut token = 0;
        while token < seen.len() {
            // Tokens that see as many of these rows as this one go together.
            let visible = seen[token];
            let alike = seen[token..].iter().take_while(|&&other| other == visible).count();
            let (at, end) = (first_head + token * job.own, first_head + (token + alike) * job.own);
            let step = job.per_pass(end - at);
            for at in (at..if visible > 0 { end } else { at }).step_by(step) {
                let ahead = ahead.next().unwrap_or_default();
                let heads = at..end.min(at + step);
                if job.form == Form::Stored {
                    self.stored(heads, &rows[..visible], ahead, room);
                } else {
                    self.pass(job, heads, &halves[..visible], ahead, room);
                }
            }
            token += alike;
        }
    }

    /// Some heads of [`Room`] with a block of rows that are words.
    fn stored(&self, heads: Range<usize>, rows: &[Bytes<'_>], ahead: &[&[u8]], room: &mut Room) {
        let block = StoredBlock { rows, units: &room.units };
        let lines = self.widths().key_lines();
        let q = &room.q_words[heads.start * lines..heads.end * lines];
        let out = &mut room.out.all()[heads.start * self.out.n2..heads.end * self.out.n2];
        let (scales, states) = (&room.scales[heads.clone()], &mut room.states[heads]);
        attend_stored(self.frame.device.level, &block, ahead, &mut WordHeads { q, scales, states, out });
    }

    /// As [`Self::block`], for a block of words that was prepared: heads that see different numbers of its rows go
    /// together.
    fn prepared<'r>(
        &self,
        job: &Run,
        rows: &[Bytes<'_>],
        first_head: usize,
        seen: &[usize],
        ahead: &mut impl Iterator<Item = &'r [&'r [u8]]>,
        room: &mut Room,
    ) {
        let (lines, width) = (self.widths().key_lines(), self.out.n2);
        let block = StoredBlock { rows, units: &room.units };
        let blind = seen.iter().take_while(|&&seen| seen == 0).count() * job.own;
        let end = seen.len() * job.own;
        let step = job.per_pass(end - blind);
        for at in (blind..end).step_by(step) {
            let mut of_head = [0; WORD_HEADS_MAX];
            let own = at..end.min(at + step);
            own.clone().zip(&mut of_head).for_each(|(head, of_head)| *of_head = seen[head / job.own]);
            let heads = first_head + own.start..first_head + own.end;
            let mut these = WordHeads {
                q: &room.q_words[heads.start * lines..heads.end * lines],
                scales: &room.scales[heads.clone()],
                states: &mut room.states[heads.clone()],
                out: &mut room.out.all()[heads.start * width..heads.end * width],
            };
            let ahead = ahead.next().unwrap_or_default();
            attend_columns(self.frame.device.level, &block, &room.columns, &of_head[..own.len()], ahead, &mut these);
        }
    }

    /// Some heads of [`Room`] with the first rows of a block, which may have been made into another form.
    fn pass(&self, job: &Run, heads: Range<usize>, rows: &[Row<'_>], ahead: &[&[u8]], room: &mut Room) {
        let level = self.frame.device.level;
        let states = &mut room.states[heads.clone()];
        let out = &mut room.out.all()[heads.start * self.out.n2..heads.end * self.out.n2];
        if job.form == Form::Words {
            let lines = self.widths().key_lines();
            let q = &room.q_words[heads.start * lines..heads.end * lines];
            let mut heads = WordHeads { q, scales: &room.scales[heads], states, out };
            return attend_words(level, &room.words, rows.len(), ahead, &mut heads);
        }
        let q = &room.q[heads.start * job.q_width..heads.end * job.q_width];
        let mut heads = Heads { q, scale: self.scale, states, out };
        match job.form {
            Form::Widened => attend_widened(level, &room.widened, rows.len(), ahead, &mut heads),
            _ => attend(level, rows, ahead, &mut heads),
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
    fn slices<'r>(&self, group: usize, rows: &[&'r [u8]]) -> [Bytes<'r>; ROWS] {
        let (latent, rope) = (self.pool.latent.bytes / self.groups, self.pool.rope.bytes / self.groups);
        let mut slices = [Bytes::default(); ROWS];
        for (slice, row) in slices.iter_mut().zip(rows) {
            let (latent_row, rope_row) = row.split_at(self.pool.latent.bytes);
            if self.pool.latent.format == Format::F8_128 {
                *slice = Bytes { latent: latent_row, rope: rope_row };
                continue;
            }
            *slice = Bytes {
                latent: &latent_row[group * latent..(group + 1) * latent],
                rope: &rope_row[group * rope..(group + 1) * rope],
            };
        }
        slices
    }
}

/// Neighbouring heads as groups of which they have the same heads, and those heads.
fn groups_of(heads: Range<usize>, per_group: usize) -> Vec<(Range<usize>, Range<usize>)> {
    let mut found: Vec<(Range<usize>, Range<usize>)> = Vec::new();
    for group in heads.start / per_group..heads.end.div_ceil(per_group) {
        let first = group * per_group;
        let own = heads.start.max(first) - first..heads.end.min(first + per_group) - first;
        match found.last_mut() {
            Some((groups, heads)) if *heads == own => groups.end = group + 1,
            _ => found.push((group..group + 1, own)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_are_whole_go_together_and_others_alone() {
        assert_eq!(groups_of(0..12, 4), [(0..3, 0..4)]);
        assert_eq!(groups_of(2..14, 4), [(0..1, 2..4), (1..3, 0..4), (3..4, 0..2)]);
        assert_eq!(groups_of(5..7, 8), [(0..1, 5..7)]);
        assert_eq!(groups_of(3..6, 1), [(3..6, 0..1)]);
    }
}
