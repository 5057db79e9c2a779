//! Every product with a weight: LINEAR, the per-head products of MLA, and the experts.
//!
//! One routine serves all: for each matrix of the weight a list of (row of x, row of y). Output values are spread over
//! the team; a value's sum is the same whatever else is computed beside it. Where the operator allows rounded
//! activations and the weight's format can be packed, 16 rows of the weight are multiplied at a time
//! (`kernels::packed`); everything else decodes a row and multiplies in f32.

use super::Frame;
use super::rounded::{Rounded, Scratch};
use crate::kernels::activations::{Block, Rounding};
use crate::kernels::packed::{Sums, TILE_ROWS, TOKENS_MAX, product, tokens_at_once};
use crate::kernels::{dot, rows};
use crate::memory::Weight;
use crate::packing::Packed;
use crate::plan::owner;
use crate::tensor::Tensor;
use crate::threads::part;
use sparsed_abi::{NO_TENSOR, OP_MLA_EXPAND, SpdOp};
use sparsed_plugin_kit::{PluginError, Result};
use std::ops::Range;

/// Rows of x that share one pass over a decoded weight row.
const DECODED_ROWS: usize = 4;

/// What treats fewer values than these is done before another thread has begun.
const VALUES_TO_SPREAD: usize = 4096;

/// Which row of x goes through a matrix into which row of y.
pub(super) type Pair = (usize, usize);

/// Rows of activations and where the products go.
struct Product<'a> {
    weight: &'a Weight,
    x: Tensor<'a, f32>,
    /// The tensor that `x` is, for [`Scratch`].
    x_id: u32,
    y: Tensor<'a, f32>,
    /// Per matrix.
    pairs: Vec<Vec<Pair>>,
    /// What the operator allows.
    rounding: Option<Rounding>,
}

impl Product<'_> {
    /// Matrices that any row goes through.
    fn used(&self) -> impl Iterator<Item = usize> {
        (0..self.pairs.len()).filter(|&batch| !self.pairs[batch].is_empty())
    }
}

/// A packed matrix that rows go through.
struct Matrix<'a> {
    job: &'a Product<'a>,
    packed: &'a Packed,
    batch: usize,
}

impl Frame<'_> {
    /// Operators that read the same rows, rounded alike.
    pub(super) fn linear(&self, ops: &[&SpdOp], scratch: &mut Scratch) {
        let product = |op: &&SpdOp| {
            let (x, y) = (self.tensor(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
            let y = Tensor { n1: 1, n2: y.n1 * y.n2, s1: 0, ..y }; // heads side by side are one row
            let pairs = vec![(0..x.n0).map(|row| (row, row)).collect()];
            let (weight, rounding) = (self.weight(op.inputs[1]), Rounding::allowed(op.i[0]));
            Product { weight, x, x_id: op.inputs[0], y, pairs, rounding }
        };
        let jobs: Vec<Product<'_>> = ops.iter().map(product).collect();
        self.matmul(&jobs, scratch);
        for (op, job) in ops.iter().zip(&jobs).filter(|(op, _)| op.inputs[2] != NO_TENSOR) {
            let (y, bias) = (job.y, self.vector(op.inputs[2]));
            self.each(y.n0, y.n2, |row| {
                // SAFETY: each row belongs to one thread.
                let y = unsafe { y.row_mut(row, 0) };
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            });
        }
    }

    pub(super) fn per_head(&self, op: &SpdOp, scratch: &mut Scratch) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        let weight = self.weight(op.inputs[1]);
        let y = if op.kind == OP_MLA_EXPAND {
            Tensor { n1: weight.batch, n2: weight.rows, s1: weight.rows, ..y }
        } else {
            y
        };
        let heads = weight.batch;
        let pairs = (0..heads).map(|head| (0..x.n0).map(|t| (t * heads + head, t * heads + head)).collect()).collect();
        let rounding = Rounding::allowed(op.i[0]);
        self.matmul(&[Product { weight, x, x_id: op.inputs[0], y, pairs, rounding }], scratch);
    }

    /// Operators that read the same rows and experts, rounded alike.
    pub(super) fn moe_linear(&self, ops: &[&SpdOp], scratch: &mut Scratch) -> Result<()> {
        let product = |op: &&SpdOp| {
            let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
            let ids = self.tensor::<i32>(op.inputs[2]);
            let weight = self.weight(op.inputs[1]);
            let mut pairs = vec![Vec::new(); weight.batch];
            for t in 0..ids.n0 {
                for (a, &id) in ids.row(t, 0).iter().enumerate() {
                    let list = usize::try_from(id).ok().and_then(|id| pairs.get_mut(id));
                    let list = list.ok_or_else(|| PluginError::invalid(format!("expert {id} of {}", weight.batch)))?;
                    list.push((if op.i[0] == 1 { t * ids.n2 + a } else { t }, t * ids.n2 + a));
                }
            }
            Ok(Product { weight, x, x_id: op.inputs[0], y, pairs, rounding: Rounding::allowed(op.i[1]) })
        };
        let jobs: Result<Vec<Product<'_>>> = ops.iter().map(product).collect();
        self.matmul(&jobs?, scratch);
        Ok(())
    }

    /// `y[pair.1] = W_b x[pair.0]` for every pair of every matrix b of every job. All have the same x and rounding.
    fn matmul(&self, jobs: &[Product<'_>], scratch: &mut Scratch) {
        let (team, mut packed) = (&self.device.team, Vec::new());
        for job in jobs {
            match job.weight.packed.get().filter(|_| job.rounding.is_some()) {
                Some(tiles) => packed.extend(job.used().map(|batch| Matrix { job, packed: tiles, batch })),
                None => self.matmul_decoded(job),
            }
        }
        let Some(&Matrix { job: &Product { x, x_id, rounding: Some(rounding), .. }, .. }) = packed.first() else {
            return;
        };
        let x = self.round(x, x_id, rounding, scratch);
        let n_tiles = packed.iter().map(|matrix| matrix.packed.tiles).sum();
        // One stream of weights for each thread.
        team.run(&|number| {
            let (own, mut first, mut beside) = (part(n_tiles, number, team.len()), 0, Vec::new());
            for matrix in &packed {
                let range = first..first + matrix.packed.tiles;
                first = range.end;
                let tiles = own.start.max(range.start)..own.end.min(range.end);
                if !tiles.is_empty() {
                    self.packed(matrix, tiles.start - range.start..tiles.end - range.start, x, &mut beside);
                }
            }
        });
    }

    /// As [`Self::matmul`], for one job whose weight has no tiles, or whose rows may not be rounded.
    fn matmul_decoded(&self, job: &Product<'_>) {
        let (team, used) = (&self.device.team, job.used().collect::<Vec<_>>());
        team.run(&|number| {
            let mut decoded = vec![0f32; job.weight.cols];
            for unit in part(used.len() * job.weight.rows, number, team.len()) {
                self.decoded(job, used[unit / job.weight.rows], unit % job.weight.rows, &mut decoded);
            }
        });
    }

    /// Row `out` of matrix `batch` in f32.
    fn decoded(&self, job: &Product<'_>, batch: usize, out: usize, row: &mut [f32]) {
        rows::decode(self.device.level, job.weight.format, job.weight.row(batch, out), row);
        for pairs in job.pairs[batch].chunks(DECODED_ROWS) {
            let (mut x, mut values) = ([&[][..]; DECODED_ROWS], [0f32; DECODED_ROWS]);
            for (x, &(from, _)) in x.iter_mut().zip(pairs) {
                *x = job.x.flat(from);
            }
            dot::dots(self.device.level, row, &x[..pairs.len()], &mut values[..pairs.len()]);
            for (&(_, to), value) in pairs.iter().zip(values) {
                // SAFETY: value `out` of a row is written by the one thread that has this unit.
                unsafe { job.y.put(to, out, value) };
            }
        }
    }

    /// Tiles `tiles` of a matrix with rounded activations `x`.
    fn packed(&self, matrix: &Matrix<'_>, tiles: Range<usize>, x: Rounded<'_>, beside: &mut Vec<Block>) {
        let &Matrix { job, packed, batch } = matrix;
        let (level, format, rounding) = (self.device.level, job.weight.format, x.rounding());
        // Some tiles at a time, so that they are still in the cache for the next tokens.
        for tiles in tiles
            .clone()
            .step_by(packed.tiles_in_cache())
            .map(|first| first..tiles.end.min(first + packed.tiles_in_cache()))
        {
            let mut pairs = &job.pairs[batch][..];
            while !pairs.is_empty() {
                let (now, later) = pairs.split_at(tokens_at_once(level, rounding, pairs.len()));
                pairs = later;
                let x = x.interleaved(now, beside);
                let mut sums = [Sums::default(); TOKENS_MAX];
                for tile in tiles.clone() {
                    product(level, format, rounding, packed.tile(batch, tile), x, &mut sums[..now.len()]);
                    let out = tile * TILE_ROWS..job.weight.rows.min((tile + 1) * TILE_ROWS);
                    for (&(_, to), sums) in now.iter().zip(&sums) {
                        // SAFETY: these values of a row are written by the one thread that has this tile.
                        let y = unsafe { job.y.flat_part_mut(to, out.clone()) };
                        // A whole tile's sums by a few instructions, not by a call for each token.
                        match y.first_chunk_mut() {
                            Some(whole) => *whole = *sums,
                            None => y.copy_from_slice(&sums[..y.len()]),
                        }
                    }
                }
            }
        }
    }

    /// Called after an operator: rounded activations of a tensor that it wrote are out of date.
    pub(super) fn written(&self, op: &SpdOp, scratch: &mut Scratch) {
        let owner = |id: u32| owner(&self.plan.program, id);
        let outputs = || op.outputs.iter().filter(|&&id| id != NO_TENSOR);
        if scratch.held().is_some_and(|held| outputs().any(|&id| owner(id) == owner(held))) {
            scratch.forget();
        }
    }

    /// Runs `job` for 0 .. n, each of which treats some `width` values, spread over the team in contiguous parts.
    pub(super) fn each(&self, n: usize, width: usize, job: impl Fn(usize) + Sync) {
        let team = &self.device.team;
        if n == 1 || n * width < VALUES_TO_SPREAD {
            return (0..n).for_each(job);
        }
        team.run(&|number| part(n, number, team.len()).for_each(&job));
    }
}
