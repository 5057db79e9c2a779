//! Does an operator fit its tensors? Every shape, dtype and attribute is checked here, before anything runs.

use crate::memory::{Pool, Weight};
use sparsed_abi::{
    DIM_TOKENS, DT_F32, DT_I32, NO_TENSOR, OP_ADD, OP_DENSE_MLA, OP_EMBED, OP_GATHER_ROWS, OP_HADAMARD, OP_IDX_APPEND,
    OP_IDX_TOPK, OP_KV_APPEND, OP_LAYER_NORM, OP_LINEAR, OP_MLA_ABSORB, OP_MLA_EXPAND, OP_MOE_COMBINE, OP_MOE_LINEAR,
    OP_MOE_ROUTE, OP_RMS_NORM, OP_ROPE, OP_SILU_MUL, OP_SPARSE_MLA, Program, SpdOp, SpdTensor, T_VIEW, T_WEIGHT,
};
use sparsed_plugin_kit::{PluginError, Result};
use sparsed_quant::Format;
use std::sync::Arc;

/// What a program is bound to.
#[derive(Debug)]
pub(crate) struct Bound<'a> {
    pub(crate) program: &'a Program,
    /// Empty when only the operators themselves are asked about.
    pub(crate) weights: &'a [Arc<Weight>],
    pub(crate) pools: &'a [Arc<Pool>],
}

/// A tensor's dimensions with rank 1 and 2 filled up: `[d0, n1, n2]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    d0: i32,
    n1: usize,
    n2: usize,
}

impl Shape {
    fn of(tensor: &SpdTensor) -> Result<Self> {
        let n = |i: usize| tensor.dim[i].unsigned_abs() as usize;
        match tensor.rank {
            1 => Ok(Self { d0: 1, n1: 1, n2: n(0) }),
            2 => Ok(Self { d0: tensor.dim[0], n1: 1, n2: n(1) }),
            3 => Ok(Self { d0: tensor.dim[0], n1: n(1), n2: n(2) }),
            _ => Err(PluginError::unsupported("a tensor of rank 4")),
        }
    }

    fn row(self) -> usize {
        self.n1 * self.n2
    }
}

fn check(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(PluginError::invalid(what)) }
}

/// A shape with a row for each token of the step, as slots and positions have.
fn per_token(shape: Shape) -> Result<Shape> {
    check(shape.d0 == DIM_TOKENS, "a tensor that goes with the tokens has another first dimension than T")?;
    Ok(shape)
}

impl Bound<'_> {
    /// Checks operator `op`.
    pub(crate) fn check_op(&self, op: &SpdOp) -> Result<()> {
        check(op.kvpool == 0, "kvpool is not 0")?;
        check(!self.overwrites_its_input(op), "an output is one of the operator's inputs")?;
        let outputs = op.outputs.iter().enumerate().filter(|&(_, &id)| id != NO_TENSOR);
        check(outputs.clone().all(|(at, id)| !op.outputs[..at].contains(id)), "two outputs are one tensor")?;
        match op.kind {
            OP_EMBED => self.embed(op),
            OP_RMS_NORM | OP_LAYER_NORM => self.norm(op),
            OP_LINEAR => self.linear(op),
            OP_ROPE => self.rope(op),
            OP_MLA_ABSORB | OP_MLA_EXPAND => self.per_head(op),
            OP_KV_APPEND | OP_IDX_APPEND => self.append(op),
            OP_IDX_TOPK => self.index_top_k(op),
            OP_SPARSE_MLA | OP_DENSE_MLA => self.attention(op),
            OP_MOE_ROUTE => self.route(op),
            OP_MOE_LINEAR => self.moe_linear(op),
            OP_MOE_COMBINE => self.combine(op),
            OP_SILU_MUL | OP_ADD => self.same_shapes(op),
            OP_GATHER_ROWS => self.gather(op),
            OP_HADAMARD => self.hadamard(op),
            kind => Err(PluginError::unsupported(format!("operator {kind}"))),
        }
    }

    fn tensor(&self, id: u32) -> Result<&SpdTensor> {
        check(id != NO_TENSOR, "a mandatory tensor is absent")?;
        Ok(&self.program.tensors()[id as usize])
    }

    fn overwrites_its_input(&self, op: &SpdOp) -> bool {
        let tensors = self.program.tensors();
        let owner = |id: u32| match tensors.get(id as usize) {
            Some(tensor) if tensor.kind == T_VIEW => tensor.bind,
            _ => id,
        };
        op.inputs.iter().filter(|&&id| id != NO_TENSOR).any(|&id| op.outputs.contains(&owner(id)))
    }

    /// The shape of an activation of dtype `dtype`.
    fn shape(&self, id: u32, dtype: u32) -> Result<Shape> {
        let tensor = self.tensor(id)?;
        check(tensor.kind != T_WEIGHT, "a weight stands where an activation belongs")?;
        check(tensor.dtype == dtype, "activations are f32, ids and selections i32")?;
        Shape::of(tensor)
    }

    fn f32(&self, id: u32) -> Result<Shape> {
        self.shape(id, DT_F32)
    }

    /// The weight behind a tensor as (batch, rows, cols), compared with the one that is bound.
    fn weight(&self, id: u32) -> Result<(usize, usize, usize)> {
        let tensor = self.tensor(id)?;
        check(tensor.kind == T_WEIGHT, "an activation stands where a weight belongs")?;
        let shape = Shape::of(tensor)?;
        let d0 = shape.d0.unsigned_abs() as usize;
        let shape = if tensor.rank == 3 { (d0, shape.n1, shape.n2) } else { (1, d0, shape.n2) };
        if let Some(bound) = self.weights.get(tensor.bind as usize) {
            let same = (bound.batch, bound.rows, bound.cols) == shape && bound.format.ggml_id() == tensor.dtype;
            check(same, "the bound weight has another shape or dtype")?;
        } else if Format::from_dtype(tensor.dtype).is_none() {
            return Err(PluginError::unsupported(format!("weights of dtype {}", tensor.dtype)));
        }
        Ok(shape)
    }

    /// A f32 vector weight of `n` values, or nothing.
    fn vector(&self, id: u32, n: usize, optional: bool) -> Result<()> {
        if id == NO_TENSOR && optional {
            return Ok(());
        }
        check(
            self.weight(id)? == (1, 1, n) && self.tensor(id)?.dtype == DT_F32,
            "a vector is not f32 of the row's length",
        )
    }

    fn pool(&self) -> Result<Option<&Pool>> {
        check(self.program.header().n_kvpools == 1, "the program has no KV pool")?;
        Ok(self.pools.first().map(|pool| &**pool))
    }

    fn embed(&self, op: &SpdOp) -> Result<()> {
        let (batch, _, cols) = self.weight(op.inputs[0])?;
        let out = self.f32(op.outputs[0])?;
        check(batch == 1 && out == Shape { d0: DIM_TOKENS, n1: 1, n2: cols }, "EMBED: shapes differ")
    }

    fn norm(&self, op: &SpdOp) -> Result<()> {
        let x = self.f32(op.inputs[0])?;
        let rms = op.kind == OP_RMS_NORM;
        check(self.f32(op.outputs[0])? == x, "norm: output differs from input")?;
        self.vector(op.inputs[1], x.n2, rms)?;
        if !rms {
            return self.vector(op.inputs[2], x.n2, false);
        }
        if op.inputs[2] != NO_TENSOR {
            check(self.f32(op.inputs[2])? == x, "RMS_NORM: residual differs from input")?;
            check(self.f32(op.outputs[1])? == x, "RMS_NORM: sum differs from input")?;
        }
        Ok(())
    }

    fn linear(&self, op: &SpdOp) -> Result<()> {
        let (x, y) = (self.f32(op.inputs[0])?, self.f32(op.outputs[0])?);
        let (batch, rows, cols) = self.weight(op.inputs[1])?;
        self.vector(op.inputs[2], rows, true)?;
        check(matches!(op.i[0], 0..=2), "LINEAR: unknown rounding of activations")?;
        check(batch == 1 && x.n1 == 1 && x.n2 == cols, "LINEAR: x does not fit the weight")?;
        check(y.d0 == x.d0 && y.row() == rows, "LINEAR: y does not fit the weight")
    }

    fn rope(&self, op: &SpdOp) -> Result<()> {
        let (x, angles) = (self.f32(op.inputs[0])?, self.f32(op.inputs[1])?);
        check(self.f32(op.outputs[0])? == x, "ROPE: output differs from input")?;
        let (start, width) = (op.i[0], op.i[1]);
        let inside = start >= 0 && width > 0 && width % 2 == 0 && i64::from(start) + i64::from(width) <= x.n2 as i64;
        check(inside && matches!(op.i[2], 0 | 1), "ROPE: range or layout")?;
        let width = width.unsigned_abs() as usize;
        check(angles == Shape { d0: x.d0, n1: 1, n2: width }, "ROPE: angles are not [T, P]")
    }

    fn per_head(&self, op: &SpdOp) -> Result<()> {
        let (x, y) = (self.f32(op.inputs[0])?, self.f32(op.outputs[0])?);
        let (heads, rows, cols) = self.weight(op.inputs[1])?;
        check(matches!(op.i[0], 0..=2), "unknown rounding of activations")?;
        check(x.n1 == heads && x.n2 == cols, "x does not fit the heads' weights")?;
        let whole =
            if op.kind == OP_MLA_ABSORB { y.n1 == heads && y.n2 == rows } else { y.n1 == 1 && y.n2 == heads * rows };
        check(y.d0 == x.d0 && whole, "y does not fit the heads' weights")
    }

    fn append(&self, op: &SpdOp) -> Result<()> {
        let row = per_token(self.f32(op.inputs[0])?)?;
        let Some(pool) = self.pool()? else { return Ok(()) };
        if op.kind == OP_IDX_APPEND {
            check((op.layer as usize) < pool.n_index_layers, "IDX_APPEND: layer outside the pool")?;
            return check(row.n1 == 1 && row.n2 == pool.index.width, "IDX_APPEND: not the pool's row width");
        }
        let rope = self.f32(op.inputs[1])?;
        check((op.layer as usize) < pool.n_layers && row.d0 == rope.d0, "KV_APPEND: layer outside the pool")?;
        check(row.row() == pool.latent.width && rope.row() == pool.rope.width, "KV_APPEND: not the pool's row widths")
    }

    fn index_top_k(&self, op: &SpdOp) -> Result<()> {
        let (q, w) = (per_token(self.f32(op.inputs[0])?)?, self.f32(op.inputs[1])?);
        let sel = self.shape(op.outputs[0], DT_I32)?;
        check(q.d0 == w.d0 && w.n1 == 1 && w.n2 == q.n1, "IDX_TOPK: w is not [T, heads]")?;
        let k = usize::try_from(op.i[0]).unwrap_or(0);
        check(k > 0 && sel == Shape { d0: q.d0, n1: 1, n2: k }, "IDX_TOPK: sel is not [T, K]")?;
        let Some(pool) = self.pool()? else { return Ok(()) };
        check(
            (op.layer as usize) < pool.n_index_layers && q.n2 == pool.index.width,
            "IDX_TOPK: not the pool's index row",
        )
    }

    fn attention(&self, op: &SpdOp) -> Result<()> {
        let (q, out) = (per_token(self.f32(op.inputs[1])?)?, self.f32(op.outputs[0])?);
        let groups = usize::try_from(op.i[0]).unwrap_or(0);
        check(groups > 0 && q.n1 % groups.max(1) == 0, "attention: heads do not divide into groups")?;
        check(out.d0 == q.d0 && out.n1 == q.n1, "attention: output heads differ")?;
        if op.inputs[0] != NO_TENSOR {
            check(self.f32(op.inputs[0])? == out, "attention: latent query differs from output")?;
        }
        if op.kind == OP_SPARSE_MLA {
            let sel = self.shape(op.inputs[2], DT_I32)?;
            check(sel.d0 == q.d0 && sel.n1 == 1, "SPARSE_MLA: sel is not [T, K]")?;
        }
        let Some(pool) = self.pool()? else { return Ok(()) };
        check((op.layer as usize) < pool.n_layers, "attention: layer outside the pool")?;
        let fits = q.n2 * groups == pool.rope.width && out.n2 * groups == pool.latent.width;
        check(fits, "attention: a group's slice is not the pool's row divided by the groups")?;
        for (row, slice) in [(pool.latent, out.n2), (pool.rope, q.n2)] {
            if slice % row.format.block_values() != 0 {
                return Err(PluginError::unsupported(format!(
                    "a group slice of {slice} values in {} rows",
                    row.format.name()
                )));
            }
        }
        Ok(())
    }

    fn route(&self, op: &SpdOp) -> Result<()> {
        let logits = per_token(self.f32(op.inputs[0])?)?;
        let (ids, weights) = (self.shape(op.outputs[0], DT_I32)?, self.f32(op.outputs[1])?);
        self.vector(op.inputs[1], logits.n2, true)?;
        let [active, groups, kept, score, renormalise, by] = op.i.map(|i| usize::try_from(i).unwrap_or(usize::MAX));
        check(score <= 1 && renormalise <= 1 && by <= 1, "MOE_ROUTE: an attribute is unknown")?;
        check(
            groups >= 1 && groups <= logits.n2 && logits.n2 % groups == 0,
            "MOE_ROUTE: experts do not divide into groups",
        )?;
        check(kept >= 1 && kept <= groups, "MOE_ROUTE: groups kept")?;
        check(active >= 1 && active <= logits.n2 / groups * kept, "MOE_ROUTE: more active than reachable experts")?;
        let list = Shape { d0: logits.d0, n1: 1, n2: active };
        check(logits.n1 == 1 && ids == list && weights == list, "MOE_ROUTE: ids or weights are not [T, A]")
    }

    fn moe_linear(&self, op: &SpdOp) -> Result<()> {
        let (x, y) = (self.f32(op.inputs[0])?, self.f32(op.outputs[0])?);
        let ids = per_token(self.shape(op.inputs[2], DT_I32)?)?;
        let (_, rows, cols) = self.weight(op.inputs[1])?;
        let per_expert = if op.i[0] == 1 { ids.n2 } else { 1 };
        check(matches!(op.i[1], 0..=2), "MOE_LINEAR: unknown rounding of activations")?;
        check(x.n1 == per_expert && x.n2 == cols && x.d0 == ids.d0, "MOE_LINEAR: x does not fit")?;
        check(y == Shape { d0: ids.d0, n1: ids.n2, n2: rows }, "MOE_LINEAR: y is not [T, A, O]")
    }

    fn combine(&self, op: &SpdOp) -> Result<()> {
        let (y, w, z) = (self.f32(op.inputs[0])?, self.f32(op.inputs[1])?, self.f32(op.outputs[0])?);
        check(w == Shape { d0: y.d0, n1: 1, n2: y.n1 }, "MOE_COMBINE: weights are not [T, A]")?;
        check(z == Shape { d0: y.d0, n1: 1, n2: y.n2 }, "MOE_COMBINE: z is not [T, D]")?;
        check(op.inputs[2] == NO_TENSOR || self.f32(op.inputs[2])? == z, "MOE_COMBINE: shared is not [T, D]")
    }

    fn same_shapes(&self, op: &SpdOp) -> Result<()> {
        let x = self.f32(op.inputs[0])?;
        check(self.f32(op.inputs[1])? == x && self.f32(op.outputs[0])? == x, "shapes differ")
    }

    fn gather(&self, op: &SpdOp) -> Result<()> {
        let (x, y) = (self.f32(op.inputs[0])?, self.f32(op.outputs[0])?);
        let dims = x.d0 == DIM_TOKENS && y.d0 == sparsed_abi::DIM_LOGITS;
        check(dims && (x.n1, x.n2) == (y.n1, y.n2), "GATHER_ROWS: not [T, C] to [L, C]")
    }

    fn hadamard(&self, op: &SpdOp) -> Result<()> {
        let x = self.f32(op.inputs[0])?;
        check(self.f32(op.outputs[0])? == x && x.n2.is_power_of_two(), "HADAMARD: width is not a power of two")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{OpSpec, ProgramBuilder};

    #[test]
    fn an_operator_that_would_write_one_tensor_twice_is_refused() {
        for is_one in [false, true] {
            let mut builder = ProgramBuilder::new();
            let [x, residual] = [(); 2].map(|()| builder.input(DT_F32, &[DIM_TOKENS, 8]));
            let y = builder.activation(DT_F32, &[DIM_TOKENS, 8]);
            let sum = if is_one { y } else { builder.activation(DT_F32, &[DIM_TOKENS, 8]) };
            let (inputs, outputs) = ([Some(x), None, Some(residual)], [Some(y), Some(sum)]);
            builder.op(OpSpec { kind: OP_RMS_NORM, inputs: &inputs, outputs: &outputs, ..OpSpec::default() });
            let program = Program::parse(builder.finish(0).as_bytes()).unwrap();
            let answer = Bound { program: &program, weights: &[], pools: &[] }.check_op(&program.ops()[0]);
            assert_eq!(answer.is_err(), is_one, "{answer:?}");
        }
    }
}
