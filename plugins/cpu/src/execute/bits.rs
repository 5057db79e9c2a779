//! Which bits has the arithmetic that the manifest names? The same at every level: KV rows are kept in files, and
//! whoever reads them computes the next ones beside them.

use super::invariance::{Bed, SHAPES, Shape, TOKENS};
use crate::device::CpuDevice;
use crate::level::Level;
use crate::memory::Weight;
use crate::plan::arena;
use fastrand::Rng;
use sparsed_abi::{
    Blob, DIM_TOKENS, DT_F32, DT_I32, DT_IQ4_NL, DT_Q4_0, DT_Q4_1, DT_Q4_K, DT_Q5_0, DT_Q5_1, DT_Q5_K, DT_Q6_K,
    DT_Q8_0, OP_ADD, OP_EMBED, OP_HADAMARD, OP_LAYER_NORM, OP_LINEAR, OP_MLA_ABSORB, OP_MLA_EXPAND, OP_MOE_COMBINE,
    OP_MOE_LINEAR, OP_MOE_ROUTE, OP_RMS_NORM, OP_ROPE, OP_SILU_MUL, OpSpec, Program, ProgramBuilder, SpdBucket,
    SpdKvDesc, SpdRow, SpdWeightDesc, StepArrays, T_INPUT, T_OUTPUT, TensorId,
};
use sparsed_plugin_kit::{Device, Run, Synchronous};
use sparsed_quant::Format;
use std::sync::Arc;

/// Of all that attention and the indexer answer to a sequence (`super::invariance`), as FNV-1a.
const ATTENTION: u64 = 0xe435_cd61_72f2_966e;
/// Of all that the other operators make of some rows.
const ROWS: u64 = 0x0d15_42bf_9aba_6d44;

/// Rows of the step.
const N: u32 = 5;
/// Values of a row: a block of every format.
const WIDTH: i32 = 256;
/// Rows of a weight: a whole tile and one that is not.
const OUT: i32 = 21;
const HEADS: i32 = 3;
const HEAD: i32 = 64;
const EXPERTS: i32 = 8;
const ACTIVE: i32 = 3;

/// Formats that are multiplied by tiles, then such as are decoded.
const FORMATS: [u32; 10] = [DT_Q4_0, DT_Q4_1, DT_Q5_0, DT_Q5_1, DT_Q8_0, DT_Q4_K, DT_Q5_K, DT_Q6_K, DT_IQ4_NL, DT_F32];

/// A program in the making, whose results are all put out.
#[derive(Default)]
struct Rows {
    builder: ProgramBuilder,
    weights: Vec<SpdWeightDesc>,
}

impl Rows {
    fn input(&mut self, dims: &[i32]) -> Option<TensorId> {
        Some(self.builder.input(DT_F32, &[&[DIM_TOKENS], dims].concat()))
    }

    /// `[rows, cols]`, `[batch, rows, cols]`, or a vector.
    fn weight(&mut self, dtype: u32, dims: &[i32]) -> Option<TensorId> {
        let [batch, rows, cols] = std::array::from_fn(|i| (dims.len() + i).checked_sub(3).map_or(1, |at| dims[at]));
        let [rows, cols] = [rows, cols].map(|n: i32| u64::from(n.unsigned_abs()));
        self.weights.push(SpdWeightDesc { dtype, batch: batch.unsigned_abs(), rows, cols, ..Default::default() });
        Some(self.builder.weight(self.weights.len() as u32 - 1, dtype, dims))
    }

    fn op<const K: usize>(
        &mut self,
        kind: u32,
        inputs: &[Option<TensorId>],
        outputs: [(u32, &[i32]); K],
        i: &[i32],
    ) -> [Option<TensorId>; K] {
        let outputs =
            outputs.map(|(dtype, dims)| Some(self.builder.activation(dtype, &[&[DIM_TOKENS], dims].concat())));
        let mut attributes = [0; 6];
        attributes[..i.len()].copy_from_slice(i);
        let f = [if kind == OP_MOE_ROUTE { 2.5 } else { 1e-5 }, 0.0, 0.0, 0.0];
        self.builder.op(OpSpec { kind, inputs, outputs: &outputs, layer: 0, i: attributes, f });
        outputs.into_iter().flatten().for_each(|output| self.builder.mark_output(output));
        outputs
    }

    fn one(&mut self, kind: u32, inputs: &[Option<TensorId>], dims: &[i32], i: &[i32]) -> Option<TensorId> {
        self.op(kind, inputs, [(DT_F32, dims)], i)[0]
    }

    fn products(&mut self, x: Option<TensorId>, heads: Option<TensorId>) {
        let bias = self.weight(DT_F32, &[OUT]);
        for dtype in FORMATS {
            let weight = self.weight(dtype, &[OUT, WIDTH]);
            for rounding in 0..3 {
                self.one(OP_LINEAR, &[x, weight, bias], &[OUT], &[rounding]);
            }
        }
        for dtype in [DT_Q8_0, DT_F32] {
            let weight = self.weight(dtype, &[HEADS, OUT, HEAD]);
            for rounding in 0..3 {
                self.one(OP_MLA_ABSORB, &[heads, weight], &[HEADS, OUT], &[rounding]);
                self.one(OP_MLA_EXPAND, &[heads, weight], &[HEADS * OUT], &[rounding]);
            }
        }
    }

    fn experts(&mut self, x: Option<TensorId>, logits: Option<TensorId>) {
        let lists = [(DT_I32, &[ACTIVE][..]), (DT_F32, &[ACTIVE][..])];
        let bias = self.weight(DT_F32, &[EXPERTS]);
        let [ids, shares] = self.op(OP_MOE_ROUTE, &[logits, bias], lists, &[ACTIVE, 4, 2, 0, 1, 0]);
        self.op(OP_MOE_ROUTE, &[logits], lists, &[ACTIVE, 1, 1, 1, 0, 1]);
        for (dtype, rounding) in [(DT_Q4_K, 2), (DT_Q8_0, 1), (DT_F32, 0)] {
            let (up, down) = (self.weight(dtype, &[EXPERTS, WIDTH, WIDTH]), self.weight(dtype, &[EXPERTS, OUT, WIDTH]));
            let hidden = self.one(OP_MOE_LINEAR, &[x, up, ids], &[ACTIVE, WIDTH], &[0, rounding]);
            let y = self.one(OP_MOE_LINEAR, &[hidden, down, ids], &[ACTIVE, OUT], &[1, rounding]);
            self.one(OP_MOE_COMBINE, &[y, shares], &[OUT], &[]);
        }
    }
}

/// Every operator that makes rows of rows, but for attention.
fn rows() -> Rows {
    let mut p = Rows::default();
    let (x, residual, heads) = (p.input(&[WIDTH]), p.input(&[WIDTH]), p.input(&[HEADS, HEAD]));
    let (logits, angles) = (p.input(&[EXPERTS]), p.input(&[HEAD / 2]));
    let (gain, bias, table) = (p.weight(DT_F32, &[WIDTH]), p.weight(DT_F32, &[WIDTH]), p.weight(DT_Q6_K, &[9, WIDTH]));
    let row = &[WIDTH][..];
    p.one(OP_EMBED, &[table], row, &[]);
    p.one(OP_RMS_NORM, &[x], row, &[]);
    let [normed, _] = p.op(OP_RMS_NORM, &[x, gain, residual], [(DT_F32, row), (DT_F32, row)], &[]);
    p.one(OP_LAYER_NORM, &[x, gain, bias], row, &[]);
    for layout in 0..2 {
        p.one(OP_ROPE, &[heads, angles], &[HEADS, HEAD], &[HEAD / 4, HEAD / 2, layout]);
    }
    p.one(OP_HADAMARD, &[heads], &[HEADS, HEAD], &[]);
    p.one(OP_SILU_MUL, &[x, residual], row, &[]);
    p.one(OP_ADD, &[x, residual], row, &[]);
    p.products(normed, heads);
    p.experts(normed, logits);
    p
}

/// Some bytes for a weight. Codes may be any; scales are near 2^-7, at the beginning of a block or at its end.
fn bytes(desc: &SpdWeightDesc, random: &mut Rng) -> Vec<u8> {
    let n = (u64::from(desc.batch) * desc.rows * desc.cols) as usize;
    if desc.dtype == DT_F32 {
        return (0..n).flat_map(|_| (random.f32() - 0.5).to_le_bytes()).collect();
    }
    let format = Format::from_dtype(desc.dtype).unwrap();
    let mut bytes: Vec<u8> = (0..format.row_bytes(n).unwrap()).map(|_| random.u8(..)).collect();
    for block in bytes.chunks_exact_mut(format.row_bytes(format.block_values()).unwrap()) {
        for at in [1, 3, block.len() - 1] {
            block[at] = 0x20;
        }
    }
    bytes
}

/// What the operators of [`rows`] put out for some seeded rows.
fn put_out(level: Level) -> Vec<u8> {
    let device = CpuDevice::with_threads(level, 2);
    let Rows { builder, weights } = rows();
    let program = Program::parse(builder.finish(1).as_bytes()).unwrap();
    let mut random = Rng::with_seed(8);
    let mut weight = |desc| Arc::new(Weight::uploaded(desc, bytes(desc, &mut random), &device.usage));
    let weights = weights.iter().map(&mut weight).collect();
    let row = SpdRow { dtype: DT_F32, width: 1 };
    let kv = SpdKvDesc { block_tokens: 16, n_blocks: 1, n_layers: 1, latent: row, rope: row, ..SpdKvDesc::default() };
    let pool = Arc::new(device.kv_create(&kv, None).unwrap().0);
    let bucket = SpdBucket { max_tokens: N, max_seqs: 1, max_context: N, ..SpdBucket::default() };
    let plan = device.compile(program, weights, vec![pool], bucket).unwrap().0;
    let positions: Vec<u32> = (0..N).collect();
    let step = StepArrays {
        tokens: &positions,
        positions: &positions,
        slots: &positions.iter().map(|&position| u64::from(position)).collect::<Vec<_>>(),
        seq_offsets: &[0, N],
        contexts: &[N],
        block_offsets: &[0, 1],
        block_ids: &[0],
        ..StepArrays::default()
    };
    let arena_len = |kind| arena(&plan.program, kind, N as usize, 1, 0).1;
    let (mut input, mut output) = (Blob::zeroed(arena_len(T_INPUT)), Blob::zeroed(arena_len(T_OUTPUT)));
    input.as_bytes_mut().as_chunks_mut().0.iter_mut().for_each(|to| *to = (random.f32() - 0.5).to_le_bytes());
    let bytes = step.encode();
    device.run(&plan, Run::new(step, bytes.as_bytes(), input.as_bytes(), output.as_bytes_mut())).unwrap();
    output.as_bytes().to_vec()
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn the_arithmetic_that_the_manifest_names_gives_these_bits_at_every_level() {
    assert!(include_str!("../../plugin.toml.in").contains("\narithmetic = 2\n"));
    for level in Level::all() {
        let attention = |(dtypes, index, groups, heads, width)| {
            Bed::new(Shape { dtypes, index, groups, heads, width }, level, 2).answers(TOKENS, 0).concat()
        };
        let attention: Vec<u8> = SHAPES.into_iter().flat_map(attention).collect();
        let found = [hash(&attention), hash(&put_out(level))];
        assert_eq!(
            found,
            [ATTENTION, ROWS],
            "{level:?}: {found:#x?}; rows get other bits: raise `arithmetic` in plugin.toml.in, here and above"
        );
    }
}
