//! What does a step take beside the plan's own tensors? At most so many bytes, counted when the plan is compiled.
//!
//! Rounded activations, and what each thread has while it runs an operator. Lists of a few bytes for a token or a unit
//! are not counted.

use crate::execute::{attention_bytes, index_bytes, product_bytes, rounded_bytes};
use crate::kernels::activations::Rounding;
use crate::kernels::packed::can_pack;
use crate::memory::{Pool, Weight};
use crate::plan::rows_of;
use sparsed_abi::{
    NO_TENSOR, OP_DENSE_MLA, OP_IDX_TOPK, OP_LINEAR, OP_MLA_ABSORB, OP_MLA_EXPAND, OP_MOE_LINEAR, OP_SPARSE_MLA,
    Program, SpdBucket, SpdOp,
};
use std::sync::Arc;

/// The weight that this operator multiplies with rounded activations, if it may.
pub(super) fn rounded_weight(op: &SpdOp) -> Option<u32> {
    let attribute = if op.kind == OP_MOE_LINEAR { op.i[1] } else { op.i[0] };
    product_weight(op).filter(|_| Rounding::allowed(attribute).is_some())
}

/// The weight that this operator multiplies with.
fn product_weight(op: &SpdOp) -> Option<u32> {
    matches!(op.kind, OP_LINEAR | OP_MLA_ABSORB | OP_MLA_EXPAND | OP_MOE_LINEAR).then(|| op.inputs[1])
}

/// What a program's steps are.
pub(super) struct Steps<'a> {
    pub(super) program: &'a Program,
    pub(super) weights: &'a [Arc<Weight>],
    pub(super) pools: &'a [Arc<Pool>],
    pub(super) bucket: SpdBucket,
    pub(super) n_threads: usize,
}

impl Steps<'_> {
    /// Bytes at most, of all threads together.
    pub(super) fn bytes(&self) -> usize {
        let ops = || self.program.ops().iter();
        let rounded = ops().map(|op| self.rounded(op)).max().unwrap_or(0);
        let of_thread = ops().map(|op| self.of_thread(op)).max().unwrap_or(0);
        let scores = if ops().any(|op| op.kind == OP_IDX_TOPK) { self.context() * size_of::<f32>() } else { 0 };
        of_thread.saturating_mul(self.n_threads).saturating_add(rounded).saturating_add(scores)
    }

    /// Tokens of the longest sequence.
    fn context(&self) -> usize {
        let pool = self.pools.iter().map(|pool| pool.n_blocks.saturating_mul(pool.block_tokens));
        pool.min().unwrap_or(usize::MAX).min(self.bucket.max_context as usize)
    }

    /// Rows of a step, and the numbers of a row's parts and of a part's values.
    fn shape(&self, id: u32) -> [usize; 3] {
        let (tensor, bucket) = (&self.program.tensors()[id as usize], self.bucket);
        let dim = |i: usize| tensor.dim[i].unsigned_abs() as usize;
        let rows = rows_of(tensor, bucket.max_tokens as usize, bucket.max_seqs as usize, bucket.max_logits as usize);
        if tensor.rank == 3 { [rows, dim(1), dim(2)] } else { [rows, 1, dim(1)] }
    }

    fn weight(&self, id: u32) -> &Weight {
        &self.weights[self.program.tensors()[id as usize].bind as usize]
    }

    fn rounded(&self, op: &SpdOp) -> usize {
        let weight = rounded_weight(op).map(|id| self.weight(id));
        let Some(weight) = weight.filter(|weight| can_pack(weight.format, weight.cols)) else { return 0 };
        let [rows, parts, _] = self.shape(op.inputs[0]);
        rounded_bytes(rows * parts, weight.cols)
    }

    fn of_thread(&self, op: &SpdOp) -> usize {
        match op.kind {
            OP_DENSE_MLA | OP_SPARSE_MLA => {
                let ([_, heads, rope], [_, _, latent]) = (self.shape(op.inputs[1]), self.shape(op.outputs[0]));
                let absorbed = op.inputs[0] != NO_TENSOR;
                attention_bytes(self.bucket.max_tokens as usize, heads, [latent, rope], absorbed)
            }
            OP_IDX_TOPK => {
                let [tokens, heads, width] = self.shape(op.inputs[0]);
                index_bytes(tokens, heads, width, self.context())
            }
            _ => product_weight(op).map_or(0, |id| product_bytes(self.weight(id).cols)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuDevice;
    use crate::level::Level;
    use sparsed_abi::{Blob, DIM_TOKENS, DT_F32, DT_Q8_0, OpSpec, ProgramBuilder, SpdWeightDesc, StepArrays};
    use sparsed_plugin_kit::{Device, Run, Synchronous};

    const TOKENS: usize = 100;
    const WIDTH: usize = 256;

    #[test]
    fn a_dry_run_packs_nothing_and_what_it_says_is_what_a_step_takes_at_most() {
        let device = CpuDevice::with_threads(Level::Scalar, 1);
        let size = WIDTH as u64;
        let desc = SpdWeightDesc { dtype: DT_Q8_0, batch: 1, rows: size, cols: size, ..SpdWeightDesc::default() };
        let weights = vec![Arc::new(device.weight_create(&desc).unwrap())];
        let program = || {
            let mut builder = ProgramBuilder::new();
            let w = builder.weight(0, DT_Q8_0, &[WIDTH as i32, WIDTH as i32]);
            let x = builder.input(DT_F32, &[DIM_TOKENS, WIDTH as i32]);
            let y = builder.activation(DT_F32, &[DIM_TOKENS, WIDTH as i32]);
            let (inputs, outputs, i) = ([Some(x), Some(w)], [Some(y)], [2, 0, 0, 0, 0, 0]);
            builder.op(OpSpec { kind: OP_LINEAR, inputs: &inputs, outputs: &outputs, i, ..OpSpec::default() });
            builder.mark_output(y);
            Program::parse(builder.finish(0).as_bytes()).unwrap()
        };
        let count = TOKENS as u32;
        let bucket = SpdBucket { max_tokens: count, max_seqs: 1, max_context: count, ..SpdBucket::default() };
        let (uploaded, used) = (device.mem_info().used_weights, || device.mem_info());
        let dry = device.plan_sizes(program(), weights.clone(), Vec::new(), bucket).unwrap();
        assert_eq!((used().used_weights, used().used_workspace), (uploaded, 0));
        let (plan, sizes) = device.compile(program(), weights, Vec::new(), bucket).unwrap();
        assert!(used().used_weights > uploaded, "it is packed");
        assert_eq!((sizes.workspace, sizes.input, sizes.output), (dry.workspace, dry.input, dry.output));
        assert_eq!(used().used_workspace, sizes.workspace);

        let positions: Vec<u32> = (0..count).collect();
        let step = StepArrays {
            tokens: &[0; TOKENS],
            positions: &positions,
            slots: &[0; TOKENS],
            seq_offsets: &[0, count],
            contexts: &[count],
            block_offsets: &[0, 0],
            ..StepArrays::default()
        };
        let (input, mut output) = (Blob::zeroed(TOKENS * WIDTH * 4), Blob::zeroed(TOKENS * WIDTH * 4));
        let bytes = step.encode();
        let run = Run::new(step, bytes.as_bytes(), input.as_bytes(), output.as_bytes_mut());
        let mut answer = Ok(());
        let heap = allocation_counter::measure(|| answer = device.run(&plan, run));
        answer.unwrap();
        let rounded = TOKENS * WIDTH / 32 * 88;
        // Which row goes where, and whose it is.
        let lists = TOKENS * 40;
        assert!(heap.bytes_max >= rounded as u64 && heap.bytes_max <= sizes.workspace + lists as u64, "{heap:?}");
    }
}
