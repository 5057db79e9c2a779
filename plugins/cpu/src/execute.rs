//! How does a step run? Operators in order, each spread over the team.
//!
//! A thread's share is a function of its number; a row's arithmetic is a function of the row.

mod attention;
#[cfg(test)]
mod bits;
mod blocked;
#[cfg(test)]
mod invariance;
mod matmul;
mod refine;
mod room;
mod rounded;
mod rowwise;
mod select;
mod slow;

pub(crate) use blocked::attention_bytes;
pub(crate) use rounded::{Scratch, product_bytes, rounded_bytes};
pub(crate) use select::index_bytes;

use crate::device::CpuDevice;
use crate::memory::{Pool, Weight};
use crate::plan::{Place, Plan, Workspace, arena, row_len, rows_of};
use crate::tensor::Tensor;
use sparsed_abi::{
    DT_F32, E_CANCELLED, E_DATA, NO_TENSOR, OP_ADD, OP_DENSE_MLA, OP_EMBED, OP_GATHER_ROWS, OP_HADAMARD, OP_IDX_APPEND,
    OP_IDX_TOPK, OP_KV_APPEND, OP_LAYER_NORM, OP_LINEAR, OP_MLA_ABSORB, OP_MLA_EXPAND, OP_MOE_COMBINE, OP_MOE_LINEAR,
    OP_MOE_ROUTE, OP_RMS_NORM, OP_ROPE, OP_SILU_MUL, OP_SPARSE_MLA, STEP_NAN_GUARD, StepArrays, T_INPUT, T_OUTPUT,
};
use sparsed_plugin_kit::{PluginError, Result, Run};
use std::marker::PhantomData;
use std::sync::PoisonError;

/// A running step.
pub(crate) struct Frame<'a> {
    pub(crate) device: &'a CpuDevice,
    pub(crate) plan: &'a Plan,
    pub(crate) step: StepArrays<'a>,
    /// The sequence of each token.
    pub(crate) seq_of: Vec<usize>,
    /// The address of each tensor; null for weights and views.
    base: Vec<*mut f32>,
}

/// Runs one step to its end.
pub(crate) fn run(device: &CpuDevice, plan: &Plan, run: Run<'_>) -> Result<()> {
    check_step(plan, &run)?;
    let (tokens, seqs, logits) = (run.step.tokens.len(), run.step.contexts.len(), run.step.rows.len());
    if tokens == 0 {
        return Ok(());
    }
    let mut workspace = plan.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    let Workspace { arena: own, rounded, scores } = &mut *workspace;
    rounded.forget();
    let mut base = vec![std::ptr::null_mut::<f32>(); plan.places.len()];
    let inputs = arena(&plan.program, T_INPUT, tokens, seqs, logits).0;
    let outputs = arena(&plan.program, T_OUTPUT, tokens, seqs, logits).0;
    let (mut inputs, mut outputs) = (inputs.into_iter(), outputs.into_iter());
    for (base, place) in base.iter_mut().zip(&plan.places) {
        // Offsets come from the same shapes as the arenas' lengths, which check_step compared.
        *base = match *place {
            Place::Workspace(at) if at * 4 < own.len() => own[at * 4..].as_mut_ptr().cast(),
            Place::Input => run.input[inputs.next().unwrap_or(0)..].as_ptr().cast_mut().cast(),
            Place::Output => run.output[outputs.next().unwrap_or(0)..].as_mut_ptr().cast(),
            _ => std::ptr::null_mut(),
        };
    }
    let seq_of = run.step.seq_offsets.windows(2).enumerate();
    let seq_of = seq_of.flat_map(|(seq, range)| (range[0]..range[1]).map(move |_| seq)).collect();
    let frame = Frame { device, plan, step: run.step, seq_of, base };
    let ops = plan.program.ops();
    for together in &plan.order {
        let at = |error: PluginError| error.at(together[0]);
        if run.is_cancelled() {
            return Err(at(PluginError::new(E_CANCELLED, "cancelled between operators")));
        }
        frame.dispatch(together, rounded, scores).map_err(at)?;
        together.iter().for_each(|&op| frame.written(&ops[op], rounded));
    }
    if frame.step.flags & STEP_NAN_GUARD != 0 { frame.refuse_nan() } else { Ok(()) }
}

fn check_step(plan: &Plan, run: &Run<'_>) -> Result<()> {
    let step = &run.step;
    let (tokens, seqs, logits) = (step.tokens.len(), step.contexts.len(), step.rows.len());
    let bucket = plan.bucket;
    let fits = tokens <= bucket.max_tokens as usize
        && seqs <= bucket.max_seqs as usize
        && logits <= bucket.max_logits as usize;
    if !fits || step.contexts.iter().any(|&n| n > bucket.max_context) {
        let asked = format!("{tokens} tokens, {seqs} sequences, {logits} logits rows");
        return Err(PluginError::invalid(format!("step: {asked} or a context beyond the plan's bucket {bucket:?}")));
    }
    if step.flags & !STEP_NAN_GUARD != 0 {
        return Err(PluginError::unsupported(format!("step: flags {:#x}", step.flags)));
    }
    for (arena_kind, length, name) in [(T_INPUT, run.input.len(), "input"), (T_OUTPUT, run.output.len(), "output")] {
        let needed = arena(&plan.program, arena_kind, tokens, seqs, logits).1;
        if length < needed {
            return Err(PluginError::invalid(format!("{name} arena: {length} bytes, {needed} are needed")));
        }
    }
    // An empty arena is read by nobody, wherever its address leads.
    let aligned = |at: *const u8, length: usize| length == 0 || at.align_offset(4) == 0;
    if !aligned(run.input.as_ptr(), run.input.len()) || !aligned(run.output.as_ptr(), run.output.len()) {
        return Err(PluginError::invalid("an arena is not 4-aligned"));
    }
    let Some(pool) = plan.pools.first() else { return Ok(()) };
    let slots = (pool.n_blocks * pool.block_tokens) as u64;
    let ids_fit =
        step.block_ids.iter().all(|&id| (id as usize) < pool.n_blocks) && step.slots.iter().all(|&s| s < slots);
    let blocks_fit = step
        .block_offsets
        .windows(2)
        .zip(step.contexts)
        .all(|(range, &context)| (range[1] - range[0]) as usize * pool.block_tokens >= context as usize);
    if !ids_fit || !blocks_fit {
        return Err(PluginError::invalid("step: a slot or block outside the pool or the context"));
    }
    let mut slots = step.slots.to_vec();
    slots.sort_unstable();
    if slots.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(PluginError::invalid("step: two tokens have one slot"));
    }
    let block = |slot: u64| usize::try_from(slot).expect("inside the pool") / pool.block_tokens;
    match step.slots.iter().map(|&slot| block(slot)).find(|&block| pool.is_slow(block)) {
        None => Ok(()),
        Some(block) => Err(PluginError::invalid(format!("step: a token for block {block}, which is in the slow tier"))),
    }
}

// SAFETY: the addresses lead into arenas that outlive the frame; threads write disjoint rows.
unsafe impl Sync for Frame<'_> {}

impl<'a> Frame<'a> {
    /// The tensor `id` as rows of T (f32 or i32, by the validated dtype).
    pub(crate) fn tensor<T>(&self, id: u32) -> Tensor<'a, T> {
        let tensor = &self.plan.program.tensors()[id as usize];
        let step = &self.step;
        let n0 = rows_of(tensor, step.tokens.len(), step.contexts.len(), step.rows.len());
        let dim = |i: usize| tensor.dim[i].unsigned_abs() as usize;
        let (n0, n1, n2) = match tensor.rank {
            1 => (1, 1, dim(0)),
            2 => (n0, 1, dim(1)),
            _ => (n0, dim(1), dim(2)),
        };
        let view = matches!(self.plan.places[id as usize], Place::View);
        let base = self.base[if view { tensor.bind } else { id } as usize];
        assert!(!base.is_null(), "a weight is not rows of activations");
        let stride = |i: usize, packed: usize| match tensor.stride[i] {
            s if view && s > 0 => s.unsigned_abs() as usize,
            _ => packed,
        };
        let s1 = if tensor.rank == 3 { stride(1, n2) } else { n2 };
        let s0 = stride(0, row_len(tensor));
        // Only views are checked by the parser, and only they have an offset.
        let offset = if view { tensor.view_offset } else { 0 };
        let offset = usize::try_from(offset).expect("the parser refuses a view before its parent");
        // SAFETY: the parser refuses a view outside its parent; other tensors have offset 0.
        let at = unsafe { base.add(offset) };
        Tensor { at: at.cast(), n0, n1, n2, s0, s1, life: PhantomData }
    }

    /// The tensor, if the operator has it.
    pub(crate) fn optional<T>(&self, id: u32) -> Option<Tensor<'a, T>> {
        (id != NO_TENSOR).then(|| self.tensor(id))
    }

    /// The rows of this step in outputs of f32: ids and selections have bits that a NaN may have.
    fn refuse_nan(&self) -> Result<()> {
        for (id, tensor) in (0..).zip(self.plan.program.tensors()) {
            if tensor.kind == T_OUTPUT && tensor.dtype == DT_F32 {
                let rows = self.tensor::<f32>(id);
                if (0..rows.rows()).any(|row| rows.flat(row).iter().any(|value| value.is_nan())) {
                    return Err(PluginError::new(E_DATA, format!("a NaN in output tensor {id}")));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn weight(&self, id: u32) -> &'a Weight {
        &self.plan.weights[self.plan.program.tensors()[id as usize].bind as usize]
    }

    /// The values of a f32 vector weight; empty when the operator has none.
    pub(crate) fn vector(&self, id: u32) -> &'a [f32] {
        if id == NO_TENSOR { &[] } else { self.weight(id).vector() }
    }

    pub(crate) fn pool(&self) -> &'a Pool {
        &self.plan.pools[0]
    }

    /// The pool slot of position `position` in the sequence of token `token`.
    pub(crate) fn slot(&self, token: usize, position: usize) -> usize {
        let block_tokens = self.pool().block_tokens;
        let first = self.step.block_offsets[self.seq_of[token]] as usize;
        self.step.block_ids[first + position / block_tokens] as usize * block_tokens + position % block_tokens
    }

    /// The blocks of the pool that have the first `n` positions of the sequence of token `token`.
    pub(crate) fn blocks(&self, token: usize, n: usize) -> &[u32] {
        let first = self.step.block_offsets[self.seq_of[token]] as usize;
        &self.step.block_ids[first..first + n.div_ceil(self.pool().block_tokens)]
    }

    /// Runs an operator, or the products that the plan has put together.
    fn dispatch(&self, together: &[usize], scratch: &mut Scratch, scores: &mut Vec<f32>) -> Result<()> {
        let ops = self.plan.program.ops();
        let op = &ops[together[0]];
        let all = || together.iter().map(|&op| &ops[op]).collect::<Vec<_>>();
        match op.kind {
            OP_EMBED => self.embed(op)?,
            OP_RMS_NORM => self.rms_norm(op),
            OP_LAYER_NORM => self.layer_norm(op),
            OP_LINEAR => self.linear(&all(), scratch),
            OP_ROPE => self.rope(op),
            OP_MLA_ABSORB | OP_MLA_EXPAND => self.per_head(op, scratch),
            OP_KV_APPEND => self.kv_append(op),
            OP_IDX_APPEND => self.idx_append(op),
            OP_IDX_TOPK => self.idx_top_k(op, scores),
            OP_SPARSE_MLA | OP_DENSE_MLA => self.attention(op)?,
            OP_MOE_ROUTE => self.moe_route(op),
            OP_MOE_LINEAR => self.moe_linear(&all(), scratch)?,
            OP_MOE_COMBINE => self.moe_combine(op),
            OP_SILU_MUL => self.silu_mul(op),
            OP_ADD => self.add(op),
            OP_GATHER_ROWS => self.gather_rows(op),
            OP_HADAMARD => self.hadamard(op),
            kind => return Err(PluginError::unsupported(format!("operator {kind}"))),
        }
        Ok(())
    }
}
