//! A whole attention layer as one program, for rules that must hold for everything at once: projections, appends,
//! selection, sparse attention, expansion.

use crate::cache::Shape;
use crate::case::{Case, Matrix};
use crate::rig::{Pool, Session};
use crate::verdict::Wrong;
use sparsed_abi::{
    DIM_TOKENS, DT_F32, OP_IDX_APPEND, OP_IDX_TOPK, OP_KV_APPEND, OP_LINEAR, OP_MLA_ABSORB, OP_MLA_EXPAND,
    OP_SPARSE_MLA, OpSpec, TensorId,
};
use sparsed_quant::Format;
use std::rc::Rc;

/// Width of the layer's input.
pub(crate) const WIDTH: usize = 64;
const HEADS: usize = 4;
const NOPE: usize = 32;
const INDEX_HEADS: usize = 2;
const VALUE: usize = 16;
/// Positions that a token reads.
pub(crate) const K: usize = 8;

/// The layer's weights.
#[derive(Debug)]
pub(crate) struct Layer {
    shape: Shape,
    query: Matrix,
    absorb: Matrix,
    latent: Matrix,
    index_query: Matrix,
    index_weight: Matrix,
    index_key: Matrix,
    expand: Matrix,
}

impl Layer {
    /// Random weights for a pool of this shape; in Q8_0 where the device has it.
    pub(crate) fn random(rng: &mut fastrand::Rng, session: &Session, shape: Shape) -> Self {
        let q8 = Session::has_dtype(&session.info.weight_dtypes, Format::Q8_0.ggml_id());
        let format = if q8 { Format::Q8_0 } else { Format::F32 };
        let (latent, rope, index) = (shape.latent as usize, shape.rope as usize, shape.index as usize);
        let mut matrix = |batch, rows, cols| Matrix::random(rng, format, (batch, rows, cols));
        Self {
            shape,
            query: matrix(1, HEADS * (NOPE + rope), WIDTH),
            absorb: matrix(HEADS, latent, NOPE),
            latent: matrix(1, latent + rope, WIDTH),
            index_query: matrix(1, INDEX_HEADS * index, WIDTH),
            index_weight: matrix(1, INDEX_HEADS, WIDTH),
            index_key: matrix(1, index, WIDTH),
            expand: matrix(HEADS, VALUE, latent),
        }
    }

    /// x `[T, WIDTH]` in; the selection `[T, K]` and the heads' values `[T, HEADS * VALUE]` out.
    pub(crate) fn program<'s>(&self, session: &'s Session, pool: &Rc<Pool>) -> Result<Case<'s>, Wrong> {
        let n = |n: usize| i32::try_from(n).expect("checks are small");
        let (latent, rope) = (n(self.shape.latent as usize), n(self.shape.rope as usize));
        let (nope, heads, index) = (n(NOPE), n(HEADS), n(self.shape.index as usize));
        let mut case = Case::with_pool(session, pool);
        let x = case.input(&[DIM_TOKENS, n(WIDTH)]);
        let head = nope + rope;
        let q = linear(&mut case, x, &self.query)?;
        let q_nope = case.builder.view(q, 0, &[DIM_TOKENS, heads, nope], &[heads * head, head]);
        let q_rope = case.builder.view(q, i64::from(nope), &[DIM_TOKENS, heads, rope], &[heads * head, head]);
        let kv = linear(&mut case, x, &self.latent)?;
        let latent_row = case.builder.view(kv, 0, &[DIM_TOKENS, latent], &[latent + rope]);
        let rope_row = case.builder.view(kv, i64::from(latent), &[DIM_TOKENS, rope], &[latent + rope]);
        op(&mut case, OP_KV_APPEND, &[latent_row, rope_row], &[], [0; 6], 0.0);
        let key = linear(&mut case, x, &self.index_key)?;
        op(&mut case, OP_IDX_APPEND, &[key], &[], [0; 6], 0.0);
        let index_q = linear(&mut case, x, &self.index_query)?;
        let index_heads = n(INDEX_HEADS);
        let index_q = case.builder.view(index_q, 0, &[DIM_TOKENS, index_heads, index], &[index_heads * index, index]);
        let index_w = linear(&mut case, x, &self.index_weight)?;
        let sel = case.output_ids(&[DIM_TOKENS, n(K)]);
        op(&mut case, OP_IDX_TOPK, &[index_q, index_w], &[sel], [n(K), 0, 0, 0, 0, 0], 0.1);
        let q_latent = case.builder.activation(DT_F32, &[DIM_TOKENS, heads, latent]);
        let absorb = case.weight(&self.absorb)?;
        op(&mut case, OP_MLA_ABSORB, &[q_nope, absorb], &[q_latent], [2, 0, 0, 0, 0, 0], 0.0);
        let attended = case.builder.activation(DT_F32, &[DIM_TOKENS, heads, latent]);
        op(&mut case, OP_SPARSE_MLA, &[q_latent, q_rope, sel], &[attended], [1, 0, 0, 0, 0, 0], 0.02);
        let (expand, out) = (case.weight(&self.expand)?, case.output(&[DIM_TOKENS, heads * n(VALUE)]));
        op(&mut case, OP_MLA_EXPAND, &[attended, expand], &[out], [2, 0, 0, 0, 0, 0], 0.0);
        Ok(case)
    }
}

fn op(case: &mut Case<'_>, kind: u32, inputs: &[TensorId], outputs: &[TensorId], i: [i32; 6], f0: f32) {
    let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
    let outputs: Vec<_> = outputs.iter().copied().map(Some).collect();
    case.op(OpSpec { kind, inputs: &inputs, outputs: &outputs, i, f: [f0, 0.0, 0.0, 0.0], ..OpSpec::default() });
}

fn linear(case: &mut Case<'_>, x: TensorId, matrix: &Matrix) -> Result<TensorId, Wrong> {
    let w = case.weight(matrix)?;
    let y = case.builder.activation(DT_F32, &[DIM_TOKENS, i32::try_from(matrix.rows).expect("checks are small")]);
    op(case, OP_LINEAR, &[x, w], &[y], [2, 0, 0, 0, 0, 0], 0.0);
    Ok(y)
}
