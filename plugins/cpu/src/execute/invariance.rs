//! Does a token get the same bits alone, in a piece of its prompt, and in a step with all of it and another sequence?

use crate::device::CpuDevice;
use crate::level::Level;
use crate::plan::{Plan, arena, row_len};
use fastrand::Rng;
use sparsed_abi::{
    Blob, DIM_TOKENS, DT_F8_128, DT_F16, DT_F32, DT_I32, DT_Q4_0, DT_Q6_0, DT_Q8_0, DT_W16, OP_DENSE_MLA,
    OP_IDX_APPEND, OP_IDX_TOPK, OP_KV_APPEND, OP_SPARSE_MLA, OpSpec, Program, ProgramBuilder, STEP_NAN_GUARD,
    SpdBucket, SpdKvDesc, SpdRow, StepArrays, T_INPUT, T_OUTPUT, TensorId,
};
use sparsed_plugin_kit::{Device, Result, Run, Synchronous};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

/// Of the sequence that is compared: five blocks of rows that attention takes at a time.
pub(super) const TOKENS: u32 = 300;
/// Of the one beside it.
const OTHERS: u32 = 90;
const BLOCK_TOKENS: u32 = 16;
/// Blocks of a sequence.
const N_BLOCKS: u32 = TOKENS.div_ceil(BLOCK_TOKENS);
const INDEX_HEADS: i32 = 16;
const INDEX_WIDTH: i32 = 64;
/// So few that most keys are passed over by their high bytes; so many that the first tokens' runs read all of two
/// blocks.
const TOP_K: [i32; 2] = [24, 100];

#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Of latent and rope rows.
    pub(super) dtypes: [u32; 2],
    pub(super) index: u32,
    pub(super) groups: i32,
    /// Of a group.
    pub(super) heads: i32,
    /// Of a group's slice of the latent row; that of the rope row has half of it.
    pub(super) width: i32,
}

/// Rows in the pool, keys of the indexer, groups, heads of a group, width.
pub(super) const SHAPES: [([u32; 2], u32, i32, i32, i32); 10] = [
    ([DT_F16; 2], DT_Q8_0, 1, 8, 64),
    ([DT_F16; 2], DT_F16, 3, 2, 64),
    ([DT_W16; 2], DT_Q8_0, 1, 8, 128),
    ([DT_W16; 2], DT_Q4_0, 2, 9, 64),
    ([DT_Q8_0; 2], DT_Q8_0, 1, 8, 64),
    ([DT_F8_128; 2], DT_Q8_0, 1, 8, 64),
    ([DT_F8_128; 2], DT_Q4_0, 3, 3, 64),
    ([DT_Q6_0, DT_Q8_0], DT_Q8_0, 1, 8, 64),
    ([DT_Q6_0, DT_Q8_0], DT_Q4_0, 3, 3, 64),
    ([DT_F32; 2], DT_F32, 1, 2, 64),
];

/// Every way to attend: selections of either length, and all; with absorbed queries, and without them and the indexer's
/// in 8 bits.
fn program(shape: Shape) -> Program {
    let mut builder = ProgramBuilder::new();
    let Shape { groups, heads, width, .. } = shape;
    let mut input = |dims: &[i32]| builder.input(DT_F32, &[&[DIM_TOKENS], dims].concat());
    let (latent, rope, key) = (input(&[width * groups]), input(&[width / 2 * groups]), input(&[INDEX_WIDTH]));
    let (q, w) = (input(&[INDEX_HEADS, INDEX_WIDTH]), input(&[INDEX_HEADS]));
    let (q_latent, q_rope) = (input(&[groups * heads, width]), input(&[groups * heads, width / 2]));
    let mut op = |kind, inputs: &[Option<TensorId>], output: Option<(u32, &[i32])>, i: [i32; 2]| {
        let output = output.map(|(dtype, dims)| builder.activation(dtype, &[&[DIM_TOKENS], dims].concat()));
        let outputs: Vec<_> = output.into_iter().map(Some).collect();
        let i = [i[0], i[1], 0, 0, 0, 0];
        builder.op(OpSpec { kind, inputs, outputs: &outputs, layer: 0, i, f: [0.3, 0.0, 0.0, 0.0] });
        output.inspect(|&output| builder.mark_output(output))
    };
    op(OP_KV_APPEND, &[Some(latent), Some(rope)], None, [0; 2]);
    op(OP_IDX_APPEND, &[Some(key)], None, [0; 2]);
    let answer = Some((DT_F32, &[groups * heads, width][..]));
    for (q_latent, in_8_bits) in [(Some(q_latent), 0), (None, 1)] {
        for k in TOP_K {
            let sel = op(OP_IDX_TOPK, &[Some(q), Some(w)], Some((DT_I32, &[k])), [k, in_8_bits]);
            op(OP_SPARSE_MLA, &[q_latent, Some(q_rope), sel], answer, [groups, 0]);
        }
        op(OP_DENSE_MLA, &[q_latent, Some(q_rope)], answer, [groups, 0]);
    }
    Program::parse(builder.finish(1).as_bytes()).unwrap()
}

pub(super) struct Bed {
    device: CpuDevice,
    plan: Plan,
    workspace_bytes: u64,
    flags: u32,
    /// Most bytes that the heap had for a step at a time.
    peak_bytes: Cell<u64>,
}

impl Bed {
    pub(super) fn new(shape: Shape, level: Level, n_threads: usize) -> Self {
        let device = CpuDevice::with_threads(level, n_threads);
        let row = |dtype, width: i32| SpdRow { dtype, width: width.unsigned_abs() };
        let desc = SpdKvDesc {
            block_tokens: BLOCK_TOKENS,
            n_blocks: 2 * N_BLOCKS,
            n_layers: 1,
            n_index_layers: 1,
            latent: row(shape.dtypes[0], shape.width * shape.groups),
            rope: row(shape.dtypes[1], shape.width / 2 * shape.groups),
            index: row(shape.index, INDEX_WIDTH),
            ..SpdKvDesc::default()
        };
        let pool = Arc::new(device.kv_create(&desc, None).unwrap().0);
        let bucket = SpdBucket { max_tokens: 512, max_seqs: 2, max_context: 512, ..SpdBucket::default() };
        let (plan, sizes) = device.compile(program(shape), Vec::new(), vec![pool], bucket).unwrap();
        Self { device, plan, workspace_bytes: sizes.workspace, flags: 0, peak_bytes: Cell::new(0) }
    }

    /// Appends what positions `ranges[i]` of sequence i put out, which sequence and position alone decide, to
    /// `answers`: for each output the rows of sequence 0.
    fn step(&self, ranges: [Range<u32>; 2], answers: &mut [Vec<u8>]) {
        self.try_step(ranges, answers, |_| ()).unwrap();
    }

    /// As [`Self::step`], with other slots.
    fn try_step(
        &self,
        ranges: [Range<u32>; 2],
        answers: &mut [Vec<u8>],
        change: impl FnOnce(&mut [u64]),
    ) -> Result<()> {
        let at = (0u32..).zip(&ranges).flat_map(|(seq, range)| range.clone().map(move |p| (seq, p)));
        let at: Vec<(u32, u32)> = at.collect();
        // Blocks of the two sequences by turns, from the last to the first.
        let block_ids: Vec<u32> = (0..2).flat_map(|seq| (0..N_BLOCKS).rev().map(move |b| 2 * b + seq)).collect();
        let slot = |&(seq, p): &(u32, u32)| {
            u64::from(block_ids[(seq * N_BLOCKS + p / BLOCK_TOKENS) as usize] * BLOCK_TOKENS + p % BLOCK_TOKENS)
        };
        let (mut slots, positions): (Vec<u64>, Vec<u32>) = at.iter().map(|at| (slot(at), at.1)).unzip();
        change(&mut slots);
        let own = ranges[0].len();
        let step = StepArrays {
            flags: self.flags,
            tokens: &vec![0; at.len()],
            positions: &positions,
            slots: &slots,
            seq_offsets: &[0, own as u32, at.len() as u32],
            contexts: &ranges.map(|range| range.end),
            block_offsets: &[0, N_BLOCKS, 2 * N_BLOCKS],
            block_ids: &block_ids,
            ..StepArrays::default()
        };
        let tensors = |kind| self.plan.program.tensors().iter().filter(move |tensor| tensor.kind == kind);
        let (offsets, length) = arena(&self.plan.program, T_INPUT, at.len(), 2, 0);
        let mut input = Blob::zeroed(length);
        for ((nth, offset), tensor) in (0u64..).zip(offsets).zip(tensors(T_INPUT)) {
            let bytes = row_len(tensor) * 4;
            for (to, &(seq, p)) in input.as_bytes_mut()[offset..].chunks_exact_mut(bytes).zip(&at) {
                let mut random = Rng::with_seed(nth << 40 | u64::from(seq) << 32 | u64::from(p));
                to.as_chunks_mut().0.iter_mut().for_each(|to| *to = (random.f32() - 0.5).to_le_bytes());
            }
        }
        let (offsets, length) = arena(&self.plan.program, T_OUTPUT, at.len(), 2, 0);
        // More room than the step needs, with what an earlier one has left there: numbers that are none.
        let (mut output, bytes) = (Blob::zeroed(2 * length), step.encode());
        output.as_bytes_mut().fill(0xff);
        let run = Run::new(step, bytes.as_bytes(), input.as_bytes(), output.as_bytes_mut());
        let mut answer = Ok(());
        let heap = allocation_counter::measure(|| answer = self.device.run(&self.plan, run));
        answer?;
        self.peak_bytes.set(self.peak_bytes.get().max(heap.bytes_max));
        for ((answer, offset), tensor) in answers.iter_mut().zip(offsets).zip(tensors(T_OUTPUT)) {
            answer.extend_from_slice(&output.as_bytes()[offset..][..own * row_len(tensor) * 4]);
        }
        Ok(())
    }

    fn n_outputs(&self) -> usize {
        self.plan.program.tensors().iter().filter(|tensor| tensor.kind == T_OUTPUT).count()
    }

    /// What the sequence is answered in pieces of `cut` tokens, beside the other's first `others`.
    pub(super) fn answers(&self, cut: u32, others: u32) -> Vec<Vec<u8>> {
        let mut answers = vec![Vec::new(); self.n_outputs()];
        for first in (0..TOKENS).step_by(cut as usize) {
            let beside = if first == 0 { 0..others } else { others..others };
            self.step([first..TOKENS.min(first + cut), beside], &mut answers);
        }
        answers
    }
}

#[test]
fn attention_gives_a_token_the_same_bits_alone_in_chunks_and_in_one_step_with_others() {
    for (dtypes, index, groups, heads, width) in SHAPES {
        let shape = Shape { dtypes, index, groups, heads, width };
        for level in Level::all() {
            let whole = Bed::new(shape, level, 2).answers(TOKENS, OTHERS);
            assert!(whole.iter().all(|rows| rows.len().is_multiple_of(TOKENS as usize) && !rows.is_empty()));
            // Three threads share each of seven tokens' keys; else tokens are dealt out.
            for (cut, n_threads) in [(1, 1), (7, 3)] {
                let apart = Bed::new(shape, level, n_threads).answers(cut, 0);
                for (output, (whole, apart)) in whole.iter().zip(&apart).enumerate() {
                    let row = whole.len() / TOKENS as usize;
                    let differs = whole.chunks(row).zip(apart.chunks(row)).position(|(a, b)| a != b);
                    assert_eq!(
                        differs, None,
                        "{level:?}, {shape:?}, output {output}: the token that differs in chunks of {cut}"
                    );
                    assert_eq!(whole.len(), apart.len());
                }
            }
        }
    }
}

#[test]
fn no_step_takes_more_than_the_plan_has_counted() {
    for (dtypes, index, groups, heads, width) in SHAPES {
        for level in Level::all() {
            let bed = Bed::new(Shape { dtypes, index, groups, heads, width }, level, 1);
            // All that one thread has: in a long step, then for a token whose keys the team would share.
            bed.step([0..TOKENS - 1, 0..OTHERS], &mut vec![Vec::new(); bed.n_outputs()]);
            bed.step([TOKENS - 1..TOKENS, OTHERS..OTHERS], &mut vec![Vec::new(); bed.n_outputs()]);
            let arena_bytes = bed.plan.workspace.lock().unwrap().arena.len() as u64;
            let (peak, counted) = (bed.peak_bytes.get(), bed.workspace_bytes - arena_bytes);
            // Lists of a few bytes for a token or a block.
            let lists = u64::from(TOKENS + OTHERS) * 100;
            assert!(peak <= counted + lists, "{level:?}: {peak} bytes, {counted} counted; {dtypes:?} {heads} {width}");
            assert!(peak > lists, "{level:?}: {peak} bytes");
        }
    }
}

#[test]
fn numbers_that_are_none_are_looked_for_in_the_steps_rows_of_numbers_only() {
    let (dtypes, index, groups, heads, width) = SHAPES[0];
    let bed = Bed::new(Shape { dtypes, index, groups, heads, width }, Level::Scalar, 2);
    let bed = Bed { flags: STEP_NAN_GUARD, ..bed };
    // The first tokens' selections end with -1, which is a NaN in f32.
    let mut answers = vec![Vec::new(); bed.n_outputs()];
    bed.step([0..10, 0..1], &mut answers);
    assert!(answers.iter().any(|rows| rows.ends_with(&[0xff; 4])));
}

#[test]
fn two_tokens_do_not_write_into_one_slot() {
    let (dtypes, index, groups, heads, width) = SHAPES[0];
    let bed = Bed::new(Shape { dtypes, index, groups, heads, width }, Level::Scalar, 2);
    let mut answers = vec![Vec::new(); bed.n_outputs()];
    let error = bed.try_step([0..10, 0..3], &mut answers, |slots| slots[12] = slots[3]).unwrap_err();
    assert!(error.message.contains("one slot"), "{}", error.message);
}
