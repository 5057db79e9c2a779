//! The lightning indexer: which positions does each token select?
//!
//! Keys in q8_0 lie as tiles of 16 (`crate::keys`), which are multiplied with all heads of up to eight tokens; keys of
//! other formats are decoded. Scores are kept for the tokens of one run only.

use super::Frame;
use crate::kernels::activations::{BLOCK, Block, Rounding, round_row};
use crate::kernels::attention::{ROWS, index_scores};
use crate::kernels::packed::{Sums, TILE_ROWS, score_keys, tokens_at_once};
use crate::kernels::rows::decode;
use crate::kernels::select::{Scratch, top_k};
use crate::memory::Pool;
use crate::tensor::Tensor;
use crate::threads::part;
use sparsed_abi::SpdOp;
use std::marker::PhantomData;
use std::ops::Range;

/// Tokens that share the reading of a key.
const RUN_TOKENS: usize = 8;

/// One IDX_TOPK of a step.
struct Indexer<'a> {
    frame: &'a Frame<'a>,
    pool: &'a Pool,
    layer: usize,
    q: Tensor<'a, f32>,
    w: Tensor<'a, f32>,
    sel: Tensor<'a, i32>,
    scale: f32,
}

/// A token's heads, rounded, in groups as `score_keys` takes them.
#[derive(Debug)]
struct Query {
    groups: Vec<(usize, Vec<Block>)>,
    /// Weight of each head, scaled.
    w: Vec<f32>,
}

impl Frame<'_> {
    pub(super) fn idx_top_k(&self, op: &SpdOp, scores: &mut Vec<f32>) {
        let job = Indexer {
            frame: self,
            pool: self.pool(),
            layer: op.layer as usize,
            q: self.tensor(op.inputs[0]),
            w: self.tensor(op.inputs[1]),
            sel: self.tensor(op.outputs[0]),
            scale: op.f[0],
        };
        let (runs, team) = (job.runs(), &self.device.team);
        if runs.len() < team.len() {
            // Few tokens: the team shares the keys of one token after another.
            (0..job.q.n0).for_each(|t| job.select_shared(t, scores));
            return;
        }
        team.run(&|number| {
            let mut rows: [Vec<f32>; RUN_TOKENS] = Default::default();
            let mut scratch = Scratch::default();
            // Dealt out in turn: later tokens have more to score.
            for run in runs.iter().skip(number).step_by(team.len()) {
                for (t, row) in run.clone().zip(&mut rows) {
                    row.resize(if job.must_score(t) { job.visible(t) } else { 0 }, 0.0);
                }
                let mut parts = rows[..run.len()].iter_mut().map(|row| &mut row[..]).collect::<Vec<_>>();
                job.score(run.clone(), 0, &mut parts);
                for (t, row) in run.clone().zip(&rows) {
                    // SAFETY: the rows of a run belong to one thread.
                    job.select(t, row, &mut scratch, unsafe { job.sel.row_mut(t, 0) });
                }
            }
        });
    }
}

impl Indexer<'_> {
    fn visible(&self, t: usize) -> usize {
        self.frame.step.positions[t] as usize + 1
    }

    /// False when all that token t sees is selected anyway.
    fn must_score(&self, t: usize) -> bool {
        self.visible(t) > self.sel.n2
    }

    /// Neighbouring tokens of one sequence.
    fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for t in 0..self.q.n0 {
            match runs.last_mut() {
                Some(run) if run.len() < RUN_TOKENS && self.frame.seq_of[run.start] == self.frame.seq_of[t] => {
                    run.end = t + 1;
                }
                _ => runs.push(t..t + 1),
            }
        }
        runs
    }

    fn select_shared(&self, t: usize, scores: &mut Vec<f32>) {
        if self.must_score(t) {
            let visible = self.visible(t);
            scores.resize(visible, 0.0);
            let team = &self.frame.device.team;
            let all = Tensor { at: scores.as_mut_ptr(), n0: 1, n1: 1, n2: visible, s0: 0, s1: 0, life: PhantomData };
            team.run(&|number| {
                let blocks = part(visible.div_ceil(ROWS), number, team.len());
                let range = blocks.start * ROWS..(blocks.end * ROWS).min(visible);
                // SAFETY: threads have disjoint ranges inside the `visible` scores.
                let own = unsafe { all.part_mut(range.clone()) };
                self.score(t..t + 1, range.start, &mut [own]);
            });
        }
        // SAFETY: one thread writes.
        self.select(t, scores, &mut Scratch::default(), unsafe { self.sel.row_mut(t, 0) });
    }

    /// Scores of tokens `run`, of each against as many positions from `first` on as `scores` has room for.
    fn score(&self, run: Range<usize>, first: usize, scores: &mut [&mut [f32]]) {
        if self.pool.has_key_tiles() {
            return self.score_packed(run, first, scores);
        }
        let level = self.frame.device.level;
        let mut keys = vec![0f32; ROWS * self.q.n2];
        for (t, scores) in run.zip(scores) {
            let heads: Vec<f32> = (0..self.q.n1).flat_map(|head| self.q.row(t, head).iter().copied()).collect();
            for (block, scores) in scores.chunks_mut(ROWS).enumerate() {
                for (i, key) in keys.chunks_exact_mut(self.q.n2).enumerate().take(scores.len()) {
                    decode(level, self.pool.index.format, self.key(t, first + block * ROWS + i), key);
                }
                index_scores(level, &heads, &self.weights(t), &keys[..scores.len() * self.q.n2], scores);
            }
        }
    }

    fn score_packed(&self, run: Range<usize>, first: usize, scores: &mut [&mut [f32]]) {
        let (level, last) = (self.frame.device.level, run.end - 1);
        let queries: Vec<Query> = run.map(|t| self.query(t)).collect();
        let longest = scores.iter().map(|scores| scores.len()).max().unwrap_or(0);
        // From position `at` on to the end of the pool's block: those tiles lie side by side.
        let tiles = |at: usize| {
            let (position, block) = (first + at, self.pool.block_tokens);
            let n = (block - position % block).min(longest.saturating_sub(at)).div_ceil(TILE_ROWS);
            let slot = || self.frame.slot(last, position);
            (n, if n > 0 { self.pool.key_tiles(self.layer, slot(), n) } else { &[] })
        };
        let (mut found, mut at) = (Vec::new(), 0);
        let (mut n, mut keys) = tiles(at);
        while n > 0 {
            let next = tiles(at + n * TILE_ROWS);
            let mut ahead = next.1;
            for (query, scores) in queries.iter().zip(&mut *scores) {
                let Some(to) = scores.get_mut(at..) else { continue };
                found.clear();
                found.resize(n, Sums::default());
                let mut head = 0;
                for (heads, x) in &query.groups {
                    score_keys(level, keys, ahead, x, &query.w[head..head + heads], &mut found);
                    ahead = &[];
                    head += heads;
                }
                to.iter_mut().zip(found.as_flattened()).for_each(|(to, score)| *to = *score);
            }
            at += n * TILE_ROWS;
            (n, keys) = next;
        }
    }

    /// The encoded key at `position` of token t's sequence.
    fn key(&self, t: usize, position: usize) -> &[u8] {
        self.pool.index_row(self.layer, self.frame.slot(t, position))
    }

    fn weights(&self, t: usize) -> Vec<f32> {
        self.w.row(t, 0).iter().map(|w| w * self.scale).collect()
    }

    fn query(&self, t: usize) -> Query {
        let (level, blocks) = (self.frame.device.level, self.q.n2 / BLOCK);
        let (mut groups, mut head) = (Vec::new(), 0);
        while head < self.q.n1 {
            let n = tokens_at_once(level, Rounding::Int16, self.q.n1 - head);
            let (mut x, mut row) = (vec![Block::default(); n * blocks], vec![Block::default(); blocks]);
            for i in 0..n {
                round_row(level, Rounding::Int16, self.q.row(t, head + i), &mut row);
                row.iter().zip(x[i..].iter_mut().step_by(n)).for_each(|(from, to)| *to = *from);
            }
            groups.push((n, x));
            head += n;
        }
        Query { groups, w: self.weights(t) }
    }

    /// Writes the selection of token t.
    fn select(&self, t: usize, scores: &[f32], scratch: &mut Scratch, sel: &mut [i32]) {
        let visible = self.visible(t);
        let n = visible.min(sel.len());
        if self.must_score(t) {
            top_k(self.frame.device.level, &scores[..visible], scratch, sel);
        } else {
            (0..).zip(&mut sel[..n]).for_each(|(position, to)| *to = position);
        }
        sel[n..].fill(-1);
    }
}
