//! How is a program written? Collects tensors and operators, then lays the blob out.
//!
//! Checks nothing that [`crate::Program::parse`] checks: what is built wrong is refused there, once for both sides.

use crate::pod::{bytes_of, bytes_of_mut};
use crate::{
    ABI_MINOR, NO_TENSOR, PROGRAM_MAGIC, SpdOp, SpdProgram, SpdTensor, T_ACTIVATION, T_INPUT, T_OUTPUT, T_VIEW,
    T_WEIGHT,
};
use alloc::vec;
use alloc::vec::Vec;

/// The number of a tensor in its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId(pub u32);

/// Bytes at an 8-aligned address, as the border wants programs and steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blob {
    words: Vec<u64>,
    length: usize,
}

impl Blob {
    /// `length` zero bytes.
    pub fn zeroed(length: usize) -> Self {
        Self { words: vec![0; length.div_ceil(8)], length }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &bytes_of(&self.words)[..self.length]
    }

    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut bytes_of_mut(&mut self.words)[..self.length]
    }

    /// A copy of `bytes` at an aligned address.
    pub fn copied(bytes: &[u8]) -> Self {
        let mut blob = Self::zeroed(bytes.len());
        blob.as_bytes_mut().copy_from_slice(bytes);
        blob
    }
}

/// One operator as its author sees it; absent tensors are `None`, trailing ones may be left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpSpec<'a> {
    pub kind: u32,
    pub inputs: &'a [Option<TensorId>],
    pub outputs: &'a [Option<TensorId>],
    pub layer: u32,
    pub i: [i32; 6],
    pub f: [f32; 4],
}

/// A program under construction.
#[derive(Clone, Debug, Default)]
pub struct ProgramBuilder {
    tensors: Vec<SpdTensor>,
    ops: Vec<SpdOp>,
    n_weights: u32,
}

impl ProgramBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// A tensor inside the plan.
    pub fn activation(&mut self, dtype: u32, dims: &[i32]) -> TensorId {
        self.tensor(T_ACTIVATION, dtype, dims, 0)
    }

    /// A tensor read from the step's input arena.
    pub fn input(&mut self, dtype: u32, dims: &[i32]) -> TensorId {
        self.tensor(T_INPUT, dtype, dims, 0)
    }

    /// The weight in slot `slot` of the bind array.
    pub fn weight(&mut self, slot: u32, dtype: u32, dims: &[i32]) -> TensorId {
        self.n_weights = self.n_weights.max(slot + 1);
        self.tensor(T_WEIGHT, dtype, dims, slot)
    }

    /// A strided look at `parent`: `offset` and `strides` (of all dimensions but the last) in elements.
    pub fn view(&mut self, parent: TensorId, offset: i64, dims: &[i32], strides: &[i32]) -> TensorId {
        let dtype = self.tensors[parent.0 as usize].dtype;
        let id = self.tensor(T_VIEW, dtype, dims, parent.0);
        let tensor = &mut self.tensors[id.0 as usize];
        tensor.view_offset = offset;
        tensor.stride[..strides.len()].copy_from_slice(strides);
        id
    }

    /// Makes an activation an output: it is also written to the step's output arena.
    pub fn mark_output(&mut self, id: TensorId) {
        let tensor = &mut self.tensors[id.0 as usize];
        assert_eq!(tensor.kind, T_ACTIVATION, "only an activation can become an output");
        tensor.kind = T_OUTPUT;
    }

    /// Appends an operator on KV pool 0.
    pub fn op(&mut self, spec: OpSpec<'_>) {
        let mut op = SpdOp {
            kind: spec.kind,
            inputs: [NO_TENSOR; 6],
            outputs: [NO_TENSOR; 3],
            layer: spec.layer,
            i: spec.i,
            f: spec.f,
            ..SpdOp::default()
        };
        for (to, from) in op.inputs.iter_mut().zip(spec.inputs) {
            *to = from.map_or(NO_TENSOR, |id| id.0);
        }
        for (to, from) in op.outputs.iter_mut().zip(spec.outputs) {
            *to = from.map_or(NO_TENSOR, |id| id.0);
        }
        self.ops.push(op);
    }

    /// Lays out the blob: header, tensors, operators.
    pub fn finish(&self, n_kvpools: u32) -> Blob {
        let tensor_offset = size_of::<SpdProgram>().next_multiple_of(8);
        let op_offset = (tensor_offset + size_of_val(&self.tensors[..])).next_multiple_of(8);
        let total_size = (op_offset + size_of_val(&self.ops[..])).next_multiple_of(8);
        let small = |size: usize| u32::try_from(size).expect("a program stays far below 4 GiB");
        let header = SpdProgram {
            magic: PROGRAM_MAGIC,
            struct_size: small(size_of::<SpdProgram>()),
            abi_minor: ABI_MINOR,
            n_tensors: small(self.tensors.len()),
            tensor_stride: small(size_of::<SpdTensor>()),
            tensor_offset: small(tensor_offset),
            n_ops: small(self.ops.len()),
            op_stride: small(size_of::<SpdOp>()),
            op_offset: small(op_offset),
            total_size: small(total_size),
            n_weights: self.n_weights,
            n_kvpools,
            ..SpdProgram::default()
        };
        let mut blob = Blob::zeroed(total_size);
        let mut put =
            |offset: usize, bytes: &[u8]| blob.as_bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, bytes_of(&[header]));
        put(tensor_offset, bytes_of(&self.tensors));
        put(op_offset, bytes_of(&self.ops));
        blob
    }

    fn tensor(&mut self, kind: u32, dtype: u32, dims: &[i32], bind: u32) -> TensorId {
        let mut tensor = SpdTensor { kind, dtype, bind, ..SpdTensor::default() };
        tensor.dim[..dims.len()].copy_from_slice(dims);
        tensor.rank = u32::try_from(dims.len()).expect("at most four dimensions");
        let id = TensorId(u32::try_from(self.tensors.len()).expect("fewer than 2^32 tensors"));
        self.tensors.push(tensor);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DIM_TOKENS, DT_F32, OP_ADD, Program};

    #[test]
    fn a_built_program_parses_back() {
        let mut builder = ProgramBuilder::new();
        let x = builder.input(DT_F32, &[DIM_TOKENS, 8]);
        let half = builder.view(x, 4, &[DIM_TOKENS, 4], &[8]);
        let y = builder.activation(DT_F32, &[DIM_TOKENS, 4]);
        builder.op(OpSpec {
            kind: OP_ADD,
            inputs: &[Some(half), Some(half)],
            outputs: &[Some(y)],
            ..OpSpec::default()
        });
        builder.mark_output(y);
        let blob = builder.finish(0);
        let program = Program::parse(blob.as_bytes()).expect("what the builder writes is valid");
        assert_eq!((program.tensors().len(), program.ops().len()), (3, 1));
        assert_eq!(program.tensors()[1].view_offset, 4);
        assert_eq!(program.ops()[0].inputs[..3], [1, 1, NO_TENSOR]);
    }
}
