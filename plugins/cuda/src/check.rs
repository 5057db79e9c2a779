//! Does an operator fit its tensors? What `lower.rs` reads of a program, checked as it is read.

use crate::memory::Weight;
use sparsed_abi::{DT_F32, NO_TENSOR, Program, SpdOp, SpdTensor, T_VIEW, T_WEIGHT};
use sparsed_plugin_kit::{PluginError, Result};
use std::sync::Arc;

/// What a program is bound to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound<'a> {
    pub(crate) program: &'a Program,
    /// Empty when only the operators themselves are asked about.
    pub(crate) weights: &'a [Arc<Weight>],
}

/// An activation `[d0, n1, n2]`, n1 = 1 for rank 2, and where its values are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Values {
    pub(crate) d0: i32,
    pub(crate) n1: u32,
    pub(crate) n2: u32,
    /// Values between steps of dim 0 and of dim 1.
    pub(crate) strides: (u32, u32),
    /// The tensor that has the memory: itself, or a view's parent.
    pub(crate) owner: u32,
    /// Bytes from the owner's start.
    pub(crate) offset: u64,
}

/// A bound weight's slot and shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    pub(crate) slot: u32,
    pub(crate) dtype: u32,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
}

/// `SPD_E_INVALID` unless it holds.
pub(crate) fn check(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(PluginError::invalid(what)) }
}

impl Values {
    pub(crate) fn shape(&self) -> (i32, u32, u32) {
        (self.d0, self.n1, self.n2)
    }
}

impl Bound<'_> {
    /// The f32 activation behind a number.
    pub(crate) fn values(&self, id: u32) -> Result<Values> {
        let tensor = self.tensor(id)?;
        check(tensor.kind != T_WEIGHT, "a weight stands where an activation belongs")?;
        check(tensor.dtype == DT_F32, "an activation is not f32")?;
        let dim = |i: usize| tensor.dim[i].unsigned_abs();
        let (n1, n2) = match tensor.rank {
            2 => (1, dim(1)),
            3 => (dim(1), dim(2)),
            rank => return Err(PluginError::unsupported(format!("an activation of rank {rank}"))),
        };
        let row = n1.checked_mul(n2).ok_or_else(|| PluginError::unsupported("a row of 2^32 values"))?;
        let (mut strides, mut owner, mut offset) = ((row, n2), id, 0);
        if tensor.kind == T_VIEW {
            (owner, offset) = (tensor.bind, tensor.view_offset.unsigned_abs() * 4);
            if tensor.stride[0] != 0 {
                let inner = if tensor.rank == 3 { tensor.stride[1].unsigned_abs() } else { n2 };
                strides = (tensor.stride[0].unsigned_abs(), inner);
            }
        }
        Ok(Values { d0: tensor.dim[0], n1, n2, strides, owner, offset })
    }

    /// The weight behind a tensor, compared with the one that is bound.
    pub(crate) fn matrix(&self, id: u32) -> Result<Matrix> {
        let tensor = self.tensor(id)?;
        check(tensor.kind == T_WEIGHT, "an activation stands where a weight belongs")?;
        let dim = |i: usize| tensor.dim[i].unsigned_abs();
        let (batch, rows, cols) = match tensor.rank {
            1 => (1, 1, dim(0)),
            2 => (1, dim(0), dim(1)),
            3 => (dim(0), dim(1), dim(2)),
            rank => return Err(PluginError::unsupported(format!("a weight of rank {rank}"))),
        };
        if let Some(bound) = self.weights.get(tensor.bind as usize) {
            let same = (bound.batch, bound.rows, bound.cols) == (batch.into(), rows.into(), cols.into());
            check(same && bound.dtype == tensor.dtype, "the bound weight has another shape or dtype")?;
        }
        check(batch == 1, "a batch of matrices stands where one belongs")?;
        Ok(Matrix { slot: tensor.bind, dtype: tensor.dtype, rows, cols })
    }

    /// A f32 vector weight of `n` values, or nothing.
    pub(crate) fn vector(&self, id: u32, n: u32) -> Result<Option<u32>> {
        if id == NO_TENSOR {
            return Ok(None);
        }
        let vector = self.matrix(id)?;
        let fits = vector.dtype == DT_F32 && (vector.rows, vector.cols) == (1, n);
        check(fits, "a vector is not f32 of the row's length")?;
        Ok(Some(vector.slot))
    }

    /// Refuses an operator that writes to what it reads, or twice to the same.
    pub(crate) fn distinct_outputs(&self, op: &SpdOp) -> Result<()> {
        let tensors = self.program.tensors();
        let owner = |id: u32| match tensors.get(id as usize) {
            Some(tensor) if tensor.kind == T_VIEW => tensor.bind,
            _ => id,
        };
        let outputs = || op.outputs.iter().filter(|&&id| id != NO_TENSOR);
        let reads = |id: u32| op.inputs.iter().any(|&input| input != NO_TENSOR && owner(input) == id);
        check(!outputs().any(|&id| reads(id)), "an output is one of the operator's inputs")?;
        let writes = |id: u32| outputs().filter(|&&other| other == id).count();
        check(outputs().all(|&id| writes(id) == 1), "two outputs are one tensor")
    }

    fn tensor(&self, id: u32) -> Result<&SpdTensor> {
        check(id != NO_TENSOR, "a mandatory tensor is absent")?;
        Ok(&self.program.tensors()[id as usize])
    }
}

/// Refuses what the operator does not have: more tensors, integers or floats than these, attributes, a pool.
pub(crate) fn only(op: &SpdOp, inputs: usize, outputs: usize, integers: usize, floats: usize) -> Result<()> {
    let no_tensor = |ids: &[u32]| ids.iter().all(|&id| id == NO_TENSOR);
    check(no_tensor(&op.inputs[inputs..]) && no_tensor(&op.outputs[outputs..]), "a tensor too many")?;
    let is_zero = op.i[integers..].iter().all(|&i| i == 0) && op.f[floats..].iter().all(|&f| f == 0.0);
    if !is_zero || op.layer != 0 || op.kvpool != 0 || op.attr_length != 0 {
        return Err(PluginError::unsupported("an attribute that the operator does not have"));
    }
    Ok(())
}
