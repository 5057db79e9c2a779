//! Every product with a weight: LINEAR, the per-head products of MLA, and the experts.
//!
//! One routine serves all: for each matrix of the weight a list of (row of x, row of y). Output values are spread over
//! the team; a value's sum is the same whatever else is computed beside it.

use super::Frame;
use crate::kernels::int8::{BLOCK, QuantisedRow, dots as int8_dots, has_kernel, quantise_row};
use crate::kernels::{dot, rows};
use crate::memory::Weight;
use crate::tensor::Tensor;
use crate::threads::part;
use sparsed_abi::{NO_TENSOR, OP_MLA_EXPAND, SpdOp};
use sparsed_plugin_kit::{PluginError, Result};
use std::marker::PhantomData;

/// Rows of x that share one pass over a weight row.
const TILE: usize = 4;

/// Room for activations rounded to int8.
pub(crate) struct Scratch<'a> {
    pub(crate) q: &'a mut Vec<i8>,
    pub(crate) d: &'a mut Vec<f32>,
    pub(crate) sums: &'a mut Vec<i32>,
}

/// Which row of x goes through a matrix into which row of y.
type Pair = (usize, usize);

impl Frame<'_> {
    pub(super) fn linear(&self, op: &SpdOp, scratch: &mut Scratch<'_>) {
        let (x, y) = (self.tensor(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        let y = Tensor { n1: 1, n2: y.n1 * y.n2, s1: 0, ..y }; // heads side by side are one row
        let pairs: Vec<Pair> = (0..x.n0).map(|row| (row, row)).collect();
        let bias = self.vector(op.inputs[2]);
        self.matmul(self.weight(op.inputs[1]), x, y, &[pairs], op.i[0] == 1, scratch);
        if op.inputs[2] != NO_TENSOR {
            self.each(y.n0, |row| {
                // SAFETY: each row belongs to one thread.
                let y = unsafe { y.row_mut(row, 0) };
                y.iter_mut().zip(&bias).for_each(|(y, b)| *y += b);
            });
        }
    }

    pub(super) fn per_head(&self, op: &SpdOp, scratch: &mut Scratch<'_>) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        let weight = self.weight(op.inputs[1]);
        let y = if op.kind == OP_MLA_EXPAND {
            Tensor { n1: weight.batch, n2: weight.rows, s1: weight.rows, ..y }
        } else {
            y
        };
        let heads = weight.batch;
        let pairs: Vec<Vec<Pair>> =
            (0..heads).map(|head| (0..x.n0).map(|t| (t * heads + head, t * heads + head)).collect()).collect();
        self.matmul(weight, x, y, &pairs, op.i[0] == 1, scratch);
    }

    pub(super) fn moe_linear(&self, op: &SpdOp, scratch: &mut Scratch<'_>) -> Result<()> {
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
        self.matmul(weight, x, y, &pairs, op.i[1] == 1, scratch);
        Ok(())
    }

    /// `y[pair.1] = W_b x[pair.0]` for every pair of every matrix b.
    fn matmul(
        &self,
        weight: &Weight,
        x: Tensor<'_, f32>,
        y: Tensor<'_, f32>,
        pairs: &[Vec<Pair>],
        int8: bool,
        scratch: &mut Scratch<'_>,
    ) {
        let quantised = int8 && has_kernel(weight.format) && weight.cols.is_multiple_of(BLOCK);
        let rounded = quantised.then(|| self.quantise(x, scratch));
        let used: Vec<usize> = (0..pairs.len()).filter(|&b| !pairs[b].is_empty()).collect();
        let team = &self.device.team;
        team.run(&|number| {
            let mut decoded = vec![0f32; if quantised { 0 } else { weight.cols }];
            for unit in part(used.len() * weight.rows, number, team.len()) {
                let (batch, out) = (used[unit / weight.rows], unit % weight.rows);
                let row = weight.row(batch, out);
                if !quantised {
                    rows::decode(self.device.level, weight.format, row, &mut decoded);
                }
                for tile in pairs[batch].chunks(TILE) {
                    let mut values = [0f32; TILE];
                    match &rounded {
                        Some(x) => self.tile_int8(weight, row, x, tile, &mut values),
                        None => self.tile_f32(&decoded, x, tile, &mut values),
                    }
                    for (&(_, to), value) in tile.iter().zip(values) {
                        // SAFETY: value `out` of a row is written by the one thread that has this unit.
                        unsafe { y.put(to, out, value) };
                    }
                }
            }
        });
    }

    fn tile_f32(&self, w: &[f32], x: Tensor<'_, f32>, tile: &[Pair], out: &mut [f32; TILE]) {
        let mut rows = [&[][..]; TILE];
        for (row, &(from, _)) in rows.iter_mut().zip(tile) {
            *row = x.flat(from);
        }
        dot::dots(self.device.level, w, &rows[..tile.len()], &mut out[..tile.len()]);
    }

    fn tile_int8(&self, weight: &Weight, w: &[u8], x: &Rounded<'_>, tile: &[Pair], out: &mut [f32; TILE]) {
        let mut rows = [QuantisedRow { q: &[], d: &[], sums: &[] }; TILE];
        for (row, &(from, _)) in rows.iter_mut().zip(tile) {
            *row = x.row(from);
        }
        int8_dots(self.device.level, weight.format, w, &rows[..tile.len()], &mut out[..tile.len()]);
    }

    /// All rows of x rounded to int8.
    fn quantise<'s>(&self, x: Tensor<'_, f32>, scratch: &'s mut Scratch<'_>) -> Rounded<'s> {
        let (n, cols, blocks) = (x.rows(), x.n2, x.n2 / BLOCK);
        scratch.q.resize(n * cols, 0);
        scratch.d.resize(n * blocks, 0.0);
        scratch.sums.resize(n * blocks, 0);
        let q = shared(scratch.q, n, cols);
        let (d, sums) = (shared(scratch.d, n, blocks), shared(scratch.sums, n, blocks));
        self.each(n, |row| {
            // SAFETY: each row belongs to one thread.
            let (q, d, sums) = unsafe { (q.row_mut(row, 0), d.row_mut(row, 0), sums.row_mut(row, 0)) };
            quantise_row(x.flat(row), q, d, sums);
        });
        Rounded { q: scratch.q, d: scratch.d, sums: scratch.sums, cols }
    }

    /// Runs `job` for 0 .. n, spread over the team in contiguous parts.
    pub(super) fn each(&self, n: usize, job: impl Fn(usize) + Sync) {
        let team = &self.device.team;
        if n == 1 {
            return job(0);
        }
        team.run(&|number| part(n, number, team.len()).for_each(&job));
    }
}

/// Activations rounded to int8, row by row.
struct Rounded<'a> {
    q: &'a [i8],
    d: &'a [f32],
    sums: &'a [i32],
    cols: usize,
}

impl Rounded<'_> {
    fn row(&self, row: usize) -> QuantisedRow<'_> {
        let (cols, blocks) = (self.cols, self.cols / BLOCK);
        let blocks = row * blocks..(row + 1) * blocks;
        QuantisedRow { q: &self.q[row * cols..(row + 1) * cols], d: &self.d[blocks.clone()], sums: &self.sums[blocks] }
    }
}

/// Packed rows that several threads fill.
fn shared<T>(values: &mut [T], n0: usize, n2: usize) -> Tensor<'_, T> {
    assert!(values.len() >= n0 * n2, "scratch too small");
    Tensor { at: values.as_mut_ptr(), n0, n1: 1, n2, s0: n2, s1: n2, life: PhantomData }
}
