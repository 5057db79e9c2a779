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

/// From this many rows for each thread on a product is split by rows instead of by tiles: each thread reads the whole
/// weight then, at most a byte for a hundred multiplications, and of activations only what it made itself. From one
/// core to another activations take longer than from memory where the cores share no cache.
const ROWS_OF_THREAD: usize = 64;

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

impl<'a> Matrix<'a> {
    fn pairs(&self) -> &'a [Pair] {
        &self.job.pairs[self.batch]
    }
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
        if packed.iter().all(|matrix| matrix.pairs().len() >= ROWS_OF_THREAD * team.len()) {
            // As many rows as go together, so that they are those that this thread rounded.
            let most = tokens_at_once(self.device.level, rounding, usize::MAX);
            return team.run(&|number| {
                let mut beside = Vec::new();
                for matrix in &packed {
                    let pairs = matrix.pairs();
                    let own = part(pairs.len().div_ceil(most), number, team.len());
                    let own = &pairs[own.start * most..pairs.len().min(own.end * most)];
                    self.packed(matrix, 0..matrix.packed.tiles, own, x, &mut beside);
                }
            });
        }
        let n_tiles = packed.iter().map(|matrix| matrix.packed.tiles).sum();
        // One stream of weights for each thread.
        team.run(&|number| {
            let (own, mut first, mut beside) = (part(n_tiles, number, team.len()), 0, Vec::new());
            for matrix in &packed {
                let range = first..first + matrix.packed.tiles;
                first = range.end;
                let tiles = own.start.max(range.start)..own.end.min(range.end);
                if !tiles.is_empty() {
                    let tiles = tiles.start - range.start..tiles.end - range.start;
                    self.packed(matrix, tiles, matrix.pairs(), x, &mut beside);
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

    /// Tiles `tiles` of a matrix with rounded activations `x`, for some of its pairs.
    fn packed(
        &self,
        matrix: &Matrix<'_>,
        tiles: Range<usize>,
        pairs: &[Pair],
        x: Rounded<'_>,
        beside: &mut Vec<Block>,
    ) {
        let &Matrix { job, packed, batch } = matrix;
        let (level, format, rounding) = (self.device.level, job.weight.format, x.rounding());
        // Some tiles at a time, so that they are still in the cache for the next tokens.
        for tiles in tiles
            .clone()
            .step_by(packed.tiles_in_cache())
            .map(|first| first..tiles.end.min(first + packed.tiles_in_cache()))
        {
            let mut pairs = pairs;
            while !pairs.is_empty() {
                let (now, later) = pairs.split_at(tokens_at_once(level, rounding, pairs.len()));
                pairs = later;
                let x = x.interleaved(now, beside);
                let mut sums = [Sums::default(); TOKENS_MAX];
                for tile in tiles.clone() {
                    product(level, format, rounding, packed.tile(batch, tile), x, &mut sums[..now.len()]);
                    let out = tile * TILE_ROWS..job.weight.rows.min((tile + 1) * TILE_ROWS);
                    for (&(_, to), sums) in now.iter().zip(&sums) {
                        // SAFETY: these values of a row are written by the one thread that has this tile of these
                        // pairs.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuDevice;
    use crate::level::Level;
    use crate::plan::{Plan, arena};
    use fastrand::Rng;
    use sparsed_abi::{
        Blob, DIM_TOKENS, DT_F32, DT_Q8_0, OP_LINEAR, OpSpec, Program, ProgramBuilder, SpdBucket, SpdKvDesc, SpdRow,
        SpdWeightDesc, StepArrays, T_INPUT, T_OUTPUT,
    };
    use sparsed_plugin_kit::{Device, Run, Synchronous};
    use std::sync::Arc;

    const COLS: usize = 96;
    /// Of the weights: two whole tiles and one that is not.
    const ROWS: i32 = 2 * TILE_ROWS as i32 + 5;
    /// Two threads split it by tokens, three by tiles; and no number of tokens that go together divides it.
    const TOKENS: usize = 2 * ROWS_OF_THREAD + 5;
    const BLOCK_TOKENS: u32 = 16;
    const N_BLOCKS: u32 = (TOKENS as u32).div_ceil(BLOCK_TOKENS);

    /// Two weights with the same input, side by side in the output's rows.
    fn program(rounding: i32) -> Program {
        let mut builder = ProgramBuilder::new();
        let x = builder.input(DT_F32, &[DIM_TOKENS, COLS as i32]);
        for slot in 0..2 {
            let weight = builder.weight(slot, DT_Q8_0, &[ROWS, COLS as i32]);
            let y = builder.activation(DT_F32, &[DIM_TOKENS, ROWS]);
            let (inputs, i) = ([Some(x), Some(weight)], [rounding, 0, 0, 0, 0, 0]);
            builder.op(OpSpec { kind: OP_LINEAR, inputs: &inputs, outputs: &[Some(y)], layer: 0, i, f: [0.0; 4] });
            builder.mark_output(y);
        }
        Program::parse(builder.finish(1).as_bytes()).unwrap()
    }

    /// The products of `x`'s rows, `at_once` of them in a step: the first weight's of all rows, then the second's.
    fn products(level: Level, n_threads: usize, rounding: i32, x: &[f32], at_once: usize) -> Vec<u8> {
        let device = CpuDevice::with_threads(level, n_threads);
        let weight = |seed| {
            let mut random = Rng::with_seed(seed);
            let desc =
                SpdWeightDesc { dtype: DT_Q8_0, batch: 1, rows: ROWS as u64, cols: COLS as u64, ..Default::default() };
            let block = |_| [&[0, 0x20][..], &std::array::from_fn::<u8, 32, _>(|_| random.u8(..))].concat();
            let bytes: Vec<u8> = (0..ROWS as usize * COLS / 32).flat_map(block).collect();
            Arc::new(Weight::uploaded(&desc, bytes, &device.usage))
        };
        let row = SpdRow { dtype: DT_F32, width: 1 };
        let (n_blocks, n_layers) = (N_BLOCKS, 1);
        let kv = SpdKvDesc {
            block_tokens: BLOCK_TOKENS,
            n_blocks,
            n_layers,
            latent: row,
            rope: row,
            ..SpdKvDesc::default()
        };
        let pool = Arc::new(device.kv_create(&kv, None).unwrap().0);
        let bucket = SpdBucket { max_tokens: 256, max_seqs: 1, max_context: 256, ..SpdBucket::default() };
        let plan = device.compile(program(rounding), vec![weight(1), weight(2)], vec![pool], bucket).unwrap().0;
        let mut answers = [Vec::new(), Vec::new()];
        for rows in x.chunks(at_once * COLS) {
            answers.iter_mut().zip(step(&device, &plan, rows)).for_each(|(all, rows)| all.extend(rows));
        }
        answers.concat()
    }

    fn step(device: &CpuDevice, plan: &Plan, x: &[f32]) -> [Vec<u8>; 2] {
        let n = x.len() / COLS;
        let positions: Vec<u32> = (0..n as u32).collect();
        let arrays = StepArrays {
            tokens: &vec![0; n],
            positions: &positions,
            slots: &positions.iter().map(|&p| u64::from(p)).collect::<Vec<_>>(),
            seq_offsets: &[0, n as u32],
            contexts: &[n as u32],
            block_offsets: &[0, N_BLOCKS],
            block_ids: &(0..N_BLOCKS).collect::<Vec<_>>(),
            ..StepArrays::default()
        };
        let mut input = Blob::zeroed(arena(&plan.program, T_INPUT, n, 1, 0).1);
        let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        input.as_bytes_mut()[..bytes.len()].copy_from_slice(&bytes);
        let (offsets, length) = arena(&plan.program, T_OUTPUT, n, 1, 0);
        let (mut output, encoded) = (Blob::zeroed(length), arrays.encode());
        device.run(plan, Run::new(arrays, encoded.as_bytes(), input.as_bytes(), output.as_bytes_mut())).unwrap();
        std::array::from_fn(|i| output.as_bytes()[offsets[i]..][..n * ROWS as usize * 4].to_vec())
    }

    #[test]
    fn a_rows_products_have_the_same_bits_alone_and_however_many_rows_are_split_over_threads() {
        let mut random = Rng::with_seed(9);
        let x: Vec<f32> = (0..TOKENS * COLS).map(|_| random.f32() - 0.5).collect();
        for (level, rounding) in Level::all().flat_map(|level| [0, 1, 2].map(|rounding| (level, rounding))) {
            let alone = products(level, 1, rounding, &x, 1);
            for n_threads in 1..4 {
                let together = products(level, n_threads, rounding, &x, TOKENS);
                assert!(alone == together, "{level:?}, rounding {rounding}, {n_threads} threads");
            }
        }
    }
}
