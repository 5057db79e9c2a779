//! Which kernel computes an operator, with which parameters? Launches, whose addresses a step fills in.

use crate::check::{Bound, Values, check, only};
use sparsed_abi::{
    DIM_LOGITS, DIM_TOKENS, DT_F16, DT_F32, NO_TENSOR, OP_ADD, OP_EMBED, OP_GATHER_ROWS, OP_LINEAR, OP_RMS_NORM, SpdOp,
    op_name,
};
use sparsed_plugin_kit::{PluginError, Result};
use std::ffi::CStr;

/// Warps of a block of `linear_*`, and so the outputs that it computes.
const LINEAR_WARPS: u32 = 4;
/// Most blocks along y (the driver's reference, table of compute capabilities).
const GRID_Y_MAX: usize = 65_535;
/// Most blocks along x.
const GRID_X_MAX: usize = (1 << 31) - 1;

/// A kernel of `kernels/sparsed.kernels`, which has the order of its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    EmbedF16,
    EmbedF32,
    RmsNorm,
    LinearF16,
    LinearF32,
    Add,
    GatherRows,
}

impl Kernel {
    /// All, in the order of their discriminants.
    pub(crate) const ALL: [(Self, &CStr); 7] = [
        (Self::EmbedF16, c"embed_f16"),
        (Self::EmbedF32, c"embed_f32"),
        (Self::RmsNorm, c"rms_norm"),
        (Self::LinearF16, c"linear_f16"),
        (Self::LinearF32, c"linear_f32"),
        (Self::Add, c"add"),
        (Self::GatherRows, c"gather_rows"),
    ];
}

/// A parameter of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Parameter {
    /// The word that ends the step's kernels.
    Cancel,
    /// The step's token ids.
    Tokens,
    /// The step's rows that need logits.
    Rows,
    /// An absent tensor.
    Null,
    /// The weight in this slot.
    Weight(u32),
    /// A byte of the memory of this tensor.
    Tensor { owner: u32, offset: u64 },
    /// What this symbolic dimension is in the step.
    Dim(i32),
    /// A number that no step changes.
    Word(u32),
}

/// How many blocks compute it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Grid {
    /// A block for each of so many rows of a step of this dim 0.
    Rows { d0: i32, n1: u32 },
    /// Blocks of outputs along x, rows of dim 0 along y.
    Product { d0: i32, outputs: u32 },
}

/// One kernel of a plan.
#[derive(Clone, Debug)]
pub(crate) struct Lowered {
    pub(crate) kernel: Kernel,
    pub(crate) grid: Grid,
    pub(crate) parameters: Vec<Parameter>,
}

impl Grid {
    /// Blocks along x and y when dim 0 is `rows`; `None`: nothing to compute.
    pub(crate) fn blocks(self, rows: impl Fn(i32) -> usize) -> Option<(u32, u32)> {
        let (x, y) = match self {
            Self::Rows { d0, n1 } => (rows(d0).saturating_mul(n1 as usize), 1),
            Self::Product { d0, outputs } => (outputs.div_ceil(LINEAR_WARPS) as usize, rows(d0).min(GRID_Y_MAX)),
        };
        if x == 0 || y == 0 {
            return None;
        }
        // Larger than any arena of 2^42 bytes allows, so the cut is never seen.
        Some((u32::try_from(x.min(GRID_X_MAX)).unwrap_or(u32::MAX), u32::try_from(y).unwrap_or(u32::MAX)))
    }
}

/// The launch of operator `op`.
///
/// # Errors
/// `SPD_E_UNSUPPORTED` for an operator or a dtype that this slice does not have, `SPD_E_INVALID` for tensors that do
/// not fit it.
pub(crate) fn lower(bound: Bound<'_>, op: &SpdOp) -> Result<Lowered> {
    bound.distinct_outputs(op)?;
    match op.kind {
        OP_EMBED => embed(bound, op),
        OP_RMS_NORM => rms_norm(bound, op),
        OP_LINEAR => linear(bound, op),
        OP_ADD => add(bound, op),
        OP_GATHER_ROWS => gather_rows(bound, op),
        kind => Err(PluginError::unsupported(format!(
            "{} ({kind:#x}): this slice has EMBED, RMS_NORM, LINEAR, ADD and GATHER_ROWS",
            op_name(kind)
        ))),
    }
}

fn at(values: &Values) -> Parameter {
    Parameter::Tensor { owner: values.owner, offset: values.offset }
}

/// An input: its address and both strides.
fn strided(values: &Values) -> [Parameter; 3] {
    [at(values), Parameter::Word(values.strides.0), Parameter::Word(values.strides.1)]
}

fn optional(slot: Option<u32>) -> Parameter {
    slot.map_or(Parameter::Null, Parameter::Weight)
}

/// The kernel for matrices of this dtype.
fn of_dtype(dtype: u32, f16: Kernel, f32: Kernel) -> Result<Kernel> {
    match dtype {
        DT_F16 => Ok(f16),
        DT_F32 => Ok(f32),
        _ => Err(PluginError::unsupported(format!("a matrix of dtype {dtype}; this slice has F16 and F32"))),
    }
}

fn embed(bound: Bound<'_>, op: &SpdOp) -> Result<Lowered> {
    only(op, 1, 1, 0, 0)?;
    let (weight, y) = (bound.matrix(op.inputs[0])?, bound.values(op.outputs[0])?);
    let kernel = of_dtype(weight.dtype, Kernel::EmbedF16, Kernel::EmbedF32)?;
    check(y.shape() == (DIM_TOKENS, 1, weight.cols), "y is not [T, D]")?;
    let parameters = vec![
        Parameter::Cancel,
        Parameter::Weight(weight.slot),
        Parameter::Tokens,
        at(&y),
        Parameter::Dim(y.d0),
        Parameter::Word(y.n2),
    ];
    Ok(Lowered { kernel, grid: Grid::Rows { d0: y.d0, n1: 1 }, parameters })
}

fn rms_norm(bound: Bound<'_>, op: &SpdOp) -> Result<Lowered> {
    only(op, 3, 2, 0, 1)?;
    let (x, y) = (bound.values(op.inputs[0])?, bound.values(op.outputs[0])?);
    check(y.shape() == x.shape(), "y is not as x")?;
    let gain = bound.vector(op.inputs[1], x.n2)?;
    check((op.inputs[2] == NO_TENSOR) == (op.outputs[1] == NO_TENSOR), "a residual or a sum alone")?;
    let (mut residual, mut sum) = ([Parameter::Null, Parameter::Word(0), Parameter::Word(0)], Parameter::Null);
    if op.inputs[2] != NO_TENSOR {
        let (r, s) = (bound.values(op.inputs[2])?, bound.values(op.outputs[1])?);
        check(r.shape() == x.shape() && s.shape() == x.shape(), "residual or sum are not as x")?;
        (residual, sum) = (strided(&r), at(&s));
    }
    let mut parameters = vec![Parameter::Cancel];
    parameters.extend(strided(&x));
    parameters.push(optional(gain));
    parameters.extend(residual);
    parameters.extend([at(&y), sum, Parameter::Dim(x.d0), Parameter::Word(x.n1), Parameter::Word(x.n2)]);
    parameters.push(Parameter::Word(op.f[0].to_bits()));
    Ok(Lowered { kernel: Kernel::RmsNorm, grid: Grid::Rows { d0: x.d0, n1: x.n1 }, parameters })
}

fn linear(bound: Bound<'_>, op: &SpdOp) -> Result<Lowered> {
    only(op, 3, 1, 1, 0)?;
    let (x, y) = (bound.values(op.inputs[0])?, bound.values(op.outputs[0])?);
    let weight = bound.matrix(op.inputs[1])?;
    let kernel = of_dtype(weight.dtype, Kernel::LinearF16, Kernel::LinearF32)?;
    let bias = bound.vector(op.inputs[2], weight.rows)?;
    check(matches!(op.i[0], 0..=2), "unknown rounding of activations")?; // allowed, and not made use of
    check(x.n1 == 1 && x.n2 == weight.cols, "x does not fit the weight")?;
    check(y.d0 == x.d0 && y.n1 * y.n2 == weight.rows, "y does not fit the weight")?;
    let parameters = vec![
        Parameter::Cancel,
        at(&x),
        Parameter::Word(x.strides.0),
        Parameter::Weight(weight.slot),
        optional(bias),
        at(&y),
        Parameter::Dim(x.d0),
        Parameter::Word(weight.cols),
        Parameter::Word(weight.rows),
    ];
    Ok(Lowered { kernel, grid: Grid::Product { d0: x.d0, outputs: weight.rows }, parameters })
}

fn add(bound: Bound<'_>, op: &SpdOp) -> Result<Lowered> {
    only(op, 2, 1, 0, 0)?;
    let (a, b, y) = (bound.values(op.inputs[0])?, bound.values(op.inputs[1])?, bound.values(op.outputs[0])?);
    check(a.shape() == b.shape() && a.shape() == y.shape(), "shapes differ")?;
    let mut parameters = vec![Parameter::Cancel];
    parameters.extend(strided(&a));
    parameters.extend(strided(&b));
    parameters.extend([at(&y), Parameter::Dim(a.d0), Parameter::Word(a.n1), Parameter::Word(a.n2)]);
    Ok(Lowered { kernel: Kernel::Add, grid: Grid::Rows { d0: a.d0, n1: a.n1 }, parameters })
}

fn gather_rows(bound: Bound<'_>, op: &SpdOp) -> Result<Lowered> {
    only(op, 1, 1, 0, 0)?;
    let (x, y) = (bound.values(op.inputs[0])?, bound.values(op.outputs[0])?);
    let dims = x.d0 == DIM_TOKENS && y.d0 == DIM_LOGITS;
    check(dims && (x.n1, x.n2) == (y.n1, y.n2), "not [T, C] to [L, C]")?;
    let mut parameters = vec![Parameter::Cancel];
    parameters.extend(strided(&x));
    parameters.extend([Parameter::Rows, at(&y), Parameter::Dim(y.d0), Parameter::Word(y.n1), Parameter::Word(y.n2)]);
    Ok(Lowered { kernel: Kernel::GatherRows, grid: Grid::Rows { d0: y.d0, n1: 1 }, parameters })
}
