//! The lightning indexer: which positions does each token select?
//!
//! Keys in q8_0 and q4_0 lie as tiles of 16 (`crate::keys`), which are multiplied with all heads of up to eight tokens;
//! keys of other formats are decoded. Scores are kept for the tokens of one run only. Where many keys are to be passed
//! over, `refine` finds the same selection with half of the products.

use super::Frame;
use super::refine::Candidates;
use super::room::make_room;
use crate::kernels::activations::{BLOCK, Block, Rounding, round_row};
use crate::kernels::attention::{ROWS, index_scores};
use crate::kernels::packed::{KeyTiles, Sums, TILE_ROWS, groups_at_once, score_keys};
use crate::kernels::rows::decode;
use crate::kernels::select::{Scratch, top_k};
use crate::level::Level;
use crate::memory::Pool;
use crate::tensor::Tensor;
use crate::threads::part;
use sparsed_abi::SpdOp;
use std::marker::PhantomData;
use std::ops::Range;

/// Tokens that share the reading of a key.
const RUN_TOKENS: usize = 8;

/// Bytes at most that a thread has while it selects: for queries of `heads` heads of `width` values, of sequences of up
/// to `context` tokens.
pub(crate) fn index_bytes(tokens: usize, heads: usize, width: usize, context: usize) -> usize {
    // Of a key its score, or its copy's position and score, whose lists may have grown to twice of what they hold.
    const KEY: usize = size_of::<f32>() + 2 * size_of::<(u32, f32)>() / 2;
    // Of a key that may be among the best: its position, or its score with its position and the score once more.
    const OPEN: usize = 2 * (size_of::<u32>() + 2 * size_of::<u64>());
    // Rounded, their high bytes alone, and what these leave out.
    let query = heads * (2 * width.div_ceil(BLOCK) * size_of::<Block>() + width * size_of::<f32>());
    let keys = context.saturating_mul(tokens.min(RUN_TOKENS) * KEY + OPEN);
    let decoded = ROWS * width * size_of::<f32>();
    keys.saturating_add(tokens.min(RUN_TOKENS) * query).saturating_add(decoded)
}

/// One IDX_TOPK of a step.
pub(super) struct Indexer<'a> {
    pub(super) frame: &'a Frame<'a>,
    pub(super) pool: &'a Pool,
    pub(super) layer: usize,
    pub(super) q: Tensor<'a, f32>,
    pub(super) w: Tensor<'a, f32>,
    pub(super) sel: Tensor<'a, i32>,
    pub(super) scale: f32,
    /// How finely queries are rounded for keys in tiles.
    pub(super) rounding: Rounding,
}

/// A token's heads, rounded, in groups as `score_keys` takes them.
#[derive(Debug)]
pub(super) struct Query {
    groups: Vec<Group>,
    rounding: Rounding,
    /// Weight of each head, scaled.
    pub(super) w: Vec<f32>,
}

/// Heads that are multiplied together, block by block.
#[derive(Debug)]
struct Group {
    heads: Range<usize>,
    x: Vec<Block>,
}

impl Query {
    /// Sets the scores of 16 keys of each tile.
    pub(super) fn score(&self, level: Level, mut keys: KeyTiles<'_>, scores: &mut [Sums]) {
        scores.fill(Sums::default());
        for Group { heads, x } in &self.groups {
            score_keys(level, self.rounding, keys, x, &self.w[heads.clone()], scores);
            keys.ahead = &[];
        }
    }

    /// Of a query in 16 bits its high bytes, as one in 8.
    pub(super) fn coarse(&self) -> Self {
        let group = |Group { heads, x }: &Group| {
            let x = x.iter().map(Block::coarse).collect();
            Group { heads: heads.clone(), x }
        };
        Self { groups: self.groups.iter().map(group).collect(), rounding: Rounding::Int8, w: self.w.clone() }
    }

    /// What the high bytes leave out of each head's values, one head after another.
    pub(super) fn rest(&self) -> Vec<f32> {
        let of_group = |group: &Group| {
            let n = group.heads.len();
            let head = move |head: usize, x: &[Block]| -> Vec<f32> {
                x[head..].iter().step_by(n).flat_map(Block::rest).collect()
            };
            (0..n).flat_map(|i| head(i, &group.x)).collect::<Vec<f32>>()
        };
        self.groups.iter().flat_map(of_group).collect()
    }
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
            rounding: if op.i[1] == 1 { Rounding::Int8 } else { Rounding::Int16 },
        };
        let (runs, team) = (job.runs(), &self.device.team);
        if runs.len() < team.len() {
            // Few tokens: the team shares the keys of one token after another.
            (0..job.q.n0).for_each(|t| job.select_shared(t, scores));
            return;
        }
        team.deal(runs.len(), &|units| {
            let mut rows: [Vec<f32>; RUN_TOKENS] = Default::default();
            let mut scratch = Scratch::default();
            let mut candidates: [Candidates; RUN_TOKENS] = Default::default();
            // The last tokens, which have most to score, first.
            for run in units.map(|unit| &runs[runs.len() - 1 - unit]) {
                if job.refine_run(run, &mut candidates, &mut scratch) {
                    continue;
                }
                for (t, row) in run.clone().zip(&mut rows) {
                    make_room(row, job.visible(t));
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
    pub(super) fn visible(&self, t: usize) -> usize {
        self.frame.step.positions[t] as usize + 1
    }

    /// False when all that token t sees is selected anyway.
    fn must_score(&self, t: usize) -> bool {
        self.visible(t) > self.sel.n2
    }

    /// Neighbouring tokens of one sequence, so that no thread of the team has many more than another.
    fn runs(&self) -> Vec<Range<usize>> {
        let (n, threads) = (self.q.n0, self.frame.device.team.len());
        let most = n.div_ceil(threads * n.div_ceil(threads * RUN_TOKENS).max(1));
        let mut runs: Vec<Range<usize>> = Vec::new();
        for t in 0..n {
            match runs.last_mut() {
                Some(run) if run.len() < most && self.frame.seq_of[run.start] == self.frame.seq_of[t] => {
                    run.end = t + 1;
                }
                _ => runs.push(t..t + 1),
            }
        }
        runs
    }

    fn select_shared(&self, t: usize, scores: &mut Vec<f32>) {
        // SAFETY: one thread writes.
        if self.refine_shared(t, unsafe { self.sel.row_mut(t, 0) }) {
            return;
        }
        if self.must_score(t) {
            let visible = self.visible(t);
            make_room(scores, visible);
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
    pub(super) fn score(&self, run: Range<usize>, first: usize, scores: &mut [&mut [f32]]) {
        if self.pool.key_codes().is_some() {
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
        let longest = scores.iter().map(|scores| scores.len()).max().unwrap_or(0);
        if longest == 0 {
            return; // everything is selected
        }
        let queries: Vec<Query> = run.map(|t| self.query(t)).collect();
        let mut found = Vec::new();
        self.walk(last, first..first + longest, |position, keys| {
            let at = position - first;
            found.resize(keys.tiles.len() / self.tile_bytes(), Sums::default());
            for (number, (query, scores)) in queries.iter().zip(&mut *scores).enumerate() {
                let Some(to) = scores.get_mut(at..) else { continue };
                let keys = KeyTiles { ahead: if number == 0 { keys.ahead } else { &[] }, ..keys };
                query.score(level, keys, &mut found);
                to.iter_mut().zip(found.as_flattened()).for_each(|(to, score)| *to = *score);
            }
        });
    }

    /// Calls `each` with the position of the first key of tiles that lie side by side, and the tiles, those of the next
    /// call ahead; `positions`, of which the first is the first of a tile, are those of token t's sequence.
    pub(super) fn walk(&self, t: usize, positions: Range<usize>, mut each: impl FnMut(usize, KeyTiles<'_>)) {
        // To the end of the pool's block.
        let tiles = |at: usize| {
            let block = self.pool.block_tokens;
            let n = (block - at % block).min(positions.end.saturating_sub(at)).div_ceil(TILE_ROWS);
            if n > 0 { self.pool.key_tiles(self.layer, self.frame.slot(t, at), n) } else { &[] }
        };
        let mut at = positions.start;
        let mut keys = tiles(at);
        while !keys.is_empty() {
            let next = at + keys.len() / self.tile_bytes() * TILE_ROWS;
            let ahead = tiles(next);
            each(at, self.tiles(keys, ahead));
            (at, keys) = (next, ahead);
        }
    }

    /// Tiles of the pool's format.
    pub(super) fn tiles<'k>(&self, tiles: &'k [u8], ahead: &'k [u8]) -> KeyTiles<'k> {
        KeyTiles { codes: self.pool.key_codes().expect("of a pool with tiles"), tiles, ahead }
    }

    pub(super) fn tile_bytes(&self) -> usize {
        self.pool.index.bytes * TILE_ROWS
    }

    /// The encoded key at `position` of token t's sequence.
    fn key(&self, t: usize, position: usize) -> &[u8] {
        self.pool.index_row(self.layer, self.frame.slot(t, position))
    }

    fn weights(&self, t: usize) -> Vec<f32> {
        self.w.row(t, 0).iter().map(|w| w * self.scale).collect()
    }

    pub(super) fn query(&self, t: usize) -> Query {
        let (level, blocks) = (self.frame.device.level, self.q.n2 / BLOCK);
        let group = |heads: Range<usize>| {
            let mut x = vec![Block::default(); heads.len() * blocks];
            for (i, head) in heads.clone().enumerate() {
                round_row(level, self.rounding, self.q.row(t, head), &mut x[i..], heads.len());
            }
            Group { heads, x }
        };
        // Groups that `score_keys` takes with either rounding.
        let groups = groups_at_once(level, Rounding::Int16, 0..self.q.n1).map(group).collect();
        Query { groups, rounding: self.rounding, w: self.weights(t) }
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
