//! How is a program or a step read? Bytes become checked values here, once, for both sides of the border.

use crate::pod::{bytes_of, cast_slice, read_extended, read_prefix};
use crate::{
    Blob, DIM_LOGITS, DIM_TOKENS, NO_TENSOR, PROGRAM_MAGIC, SpdOp, SpdProgram, SpdStep, SpdTensor, T_VIEW, T_WEIGHT,
};
use alloc::vec::Vec;

/// Largest program in bytes: a 100-layer model needs less than a hundredth.
const PROGRAM_BYTES_MAX: usize = 64 << 20;
/// Largest header in bytes.
const HEADER_BYTES_MAX: usize = 4096;
/// Largest dimension or stride in elements.
const DIM_MAX: i32 = 1 << 30;

/// Why a blob or a step was refused; the text names the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobError(pub &'static str);

impl core::fmt::Display for BlobError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.0)
    }
}

impl core::error::Error for BlobError {}

/// A program that has been read and found well-formed: every number it refers to by exists, every view lies inside
/// its parent. Whether operators fit their tensors is the plugin's to say.
#[derive(Clone, Debug)]
pub struct Program {
    header: SpdProgram,
    tensors: Vec<SpdTensor>,
    ops: Vec<SpdOp>,
    bytes: Vec<u8>,
}

impl Program {
    /// Reads a blob.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(blob: &[u8]) -> Result<Self, BlobError> {
        let header: SpdProgram = header(blob, 4)?;
        check(header.magic == PROGRAM_MAGIC, "program: wrong magic")?;
        check(header.flags == 0 && header.reserved == 0, "program: unknown flag")?;
        check(blob.len() <= PROGRAM_BYTES_MAX, "program: larger than 64 MiB")?;
        check(header.total_size as usize == blob.len(), "program: total_size is not the blob's length")?;
        let tensors = read_table(blob, header.n_tensors, header.tensor_stride, header.tensor_offset)?;
        let ops = read_table(blob, header.n_ops, header.op_stride, header.op_offset)?;
        let program = Self { header, tensors, ops, bytes: blob.to_vec() };
        for tensor in &program.tensors {
            program.check_tensor(tensor)?;
        }
        for op in &program.ops {
            program.check_op(op, blob.len())?;
        }
        Ok(program)
    }

    pub fn header(&self) -> &SpdProgram {
        &self.header
    }

    pub fn tensors(&self) -> &[SpdTensor] {
        &self.tensors
    }

    pub fn ops(&self) -> &[SpdOp] {
        &self.ops
    }

    /// The blob it was read from, for whoever passes it on.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn check_tensor(&self, tensor: &SpdTensor) -> Result<(), BlobError> {
        check(tensor.kind <= T_VIEW && tensor.flags == 0, "tensor: unknown kind or flag")?;
        check((1..=4).contains(&tensor.rank), "tensor: rank is not 1 to 4")?;
        let dims = &tensor.dim[..tensor.rank as usize];
        check(dims[0] >= DIM_LOGITS && dims[0] != 0 && dims[0] <= DIM_MAX, "tensor: dim 0 out of range")?;
        check(dims[1..].iter().all(|d| (1..=DIM_MAX).contains(d)), "tensor: dim out of range")?;
        let elements = dims.iter().try_fold(1i64, |n, &d| n.checked_mul(i64::from(d.max(1))));
        check(elements.is_some_and(|n| n <= 1 << 40), "tensor: more than 2^40 elements")?;
        if tensor.kind == T_WEIGHT {
            check(tensor.bind < self.header.n_weights && dims[0] > 0, "tensor: weight slot out of range")?;
        }
        if tensor.kind == T_VIEW { self.check_view(tensor) } else { Ok(()) }
    }

    fn check_view(&self, view: &SpdTensor) -> Result<(), BlobError> {
        let parent = self.tensors.get(view.bind as usize).ok_or(BlobError("view: no such parent"))?;
        check(parent.kind != T_VIEW && parent.kind != T_WEIGHT, "view: parent is a view or a weight")?;
        check(parent.dtype == view.dtype && parent.dim[0] == view.dim[0], "view: dtype or dim 0 not the parent's")?;
        let row = |t: &SpdTensor| t.dim[1..t.rank as usize].iter().fold(1i64, |n, &d| n.saturating_mul(i64::from(d)));
        let strides = &view.stride[..view.rank as usize - 1];
        check(strides.iter().all(|s| (0..=DIM_MAX).contains(s)), "view: stride out of range")?;
        check(strides.iter().all(|&s| s == 0) || strides.iter().all(|&s| s > 0), "view: strides partly packed")?;
        let parent_row = row(parent);
        let last = if strides.first().is_none_or(|&s| s == 0) {
            row(view) - 1
        } else {
            check(i64::from(strides[0]) == parent_row, "view: stride 0 is not the parent's row")?;
            let inner = view.dim[1..view.rank as usize].iter().zip(strides[1..].iter().chain(core::iter::once(&1)));
            inner.fold(0i64, |at, (&d, &s)| at.saturating_add(i64::from(d - 1).saturating_mul(i64::from(s))))
        };
        let inside = view.view_offset >= 0 && view.view_offset.saturating_add(last) < parent_row;
        check(inside && (strides.iter().any(|&s| s > 0) || row(view) == parent_row), "view: outside its parent's row")
    }

    fn check_op(&self, op: &SpdOp, blob_length: usize) -> Result<(), BlobError> {
        check(op.flags == 0 && op.reserved == 0, "operator: unknown flag")?;
        let known = |&id: &u32| id == NO_TENSOR || (id as usize) < self.tensors.len();
        check(op.inputs.iter().all(known), "operator: no such input tensor")?;
        check(op.outputs.iter().all(known), "operator: no such output tensor")?;
        let writable =
            |&id: &u32| id == NO_TENSOR || self.tensors[id as usize].kind <= 2 && self.tensors[id as usize].kind != 1;
        check(op.outputs.iter().all(writable), "operator: writes to an input, a weight or a view")?;
        check(op.f.iter().all(|f| f.is_finite()), "operator: a float is not finite")?;
        let end = u64::from(op.attr_offset) + u64::from(op.attr_length);
        check(end <= blob_length as u64, "operator: attributes outside the blob")
    }
}

/// What one step works on; see `spd_step` in the header for the meaning of each array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepArrays<'a> {
    pub step_id: u64,
    /// `STEP_*`
    pub flags: u32,
    pub tokens: &'a [u32],        // [T]
    pub positions: &'a [u32],     // [T]
    pub slots: &'a [u64],         // [T]
    pub seq_offsets: &'a [u32],   // [S + 1]
    pub contexts: &'a [u32],      // [S]
    pub block_offsets: &'a [u32], // [S + 1]
    pub block_ids: &'a [u32],
    pub rows: &'a [u32], // [L]
}

impl<'a> StepArrays<'a> {
    /// Writes the step as one aligned buffer.
    pub fn encode(&self) -> Blob {
        let small = |n: usize| u32::try_from(n).expect("a step stays far below 4 GiB");
        let parts: [&[u8]; 8] = [
            bytes_of(self.tokens),
            bytes_of(self.positions),
            bytes_of(self.slots),
            bytes_of(self.seq_offsets),
            bytes_of(self.contexts),
            bytes_of(self.block_offsets),
            bytes_of(self.block_ids),
            bytes_of(self.rows),
        ];
        let mut offsets = [0; 8];
        let mut at = size_of::<SpdStep>();
        for (offset, part) in offsets.iter_mut().zip(&parts) {
            *offset = at;
            at = (at + part.len()).next_multiple_of(8);
        }
        let header = SpdStep {
            struct_size: small(size_of::<SpdStep>()),
            flags: self.flags,
            n_tokens: small(self.tokens.len()),
            n_seqs: small(self.contexts.len()),
            n_logits: small(self.rows.len()),
            n_blocks: small(self.block_ids.len()),
            step_id: self.step_id,
            token_offset: small(offsets[0]),
            position_offset: small(offsets[1]),
            slot_offset: small(offsets[2]),
            seq_offset: small(offsets[3]),
            context_offset: small(offsets[4]),
            block_offset: small(offsets[5]),
            block_id_offset: small(offsets[6]),
            row_offset: small(offsets[7]),
            total_size: small(at),
            reserved: 0,
        };
        let mut blob = Blob::zeroed(at);
        let bytes = blob.as_bytes_mut();
        bytes[..size_of::<SpdStep>()].copy_from_slice(bytes_of(&[header]));
        for (offset, part) in offsets.iter().zip(&parts) {
            bytes[*offset..offset + part.len()].copy_from_slice(part);
        }
        blob
    }

    /// Reads a step and checks that its arrays agree with each other.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BlobError> {
        let h: SpdStep = header(bytes, 0)?;
        check(h.total_size as usize <= bytes.len(), "step: total_size past the buffer")?;
        let bytes = &bytes[..h.total_size as usize];
        let (t, s) = (h.n_tokens as usize, h.n_seqs as usize);
        let step = Self {
            step_id: h.step_id,
            flags: h.flags,
            tokens: array(bytes, h.token_offset, t)?,
            positions: array(bytes, h.position_offset, t)?,
            slots: wide_array(bytes, h.slot_offset, t)?,
            seq_offsets: array(bytes, h.seq_offset, s + 1)?,
            contexts: array(bytes, h.context_offset, s)?,
            block_offsets: array(bytes, h.block_offset, s + 1)?,
            block_ids: array(bytes, h.block_id_offset, h.n_blocks as usize)?,
            rows: array(bytes, h.row_offset, h.n_logits as usize)?,
        };
        step.check(h.n_tokens, h.n_blocks)?;
        Ok(step)
    }

    /// How many rows a tensor with this dim 0 has in this step.
    pub fn dim(&self, dim: i32) -> usize {
        match dim {
            DIM_TOKENS => self.tokens.len(),
            DIM_LOGITS => self.rows.len(),
            d if d < 0 => self.contexts.len(),
            d => d.unsigned_abs() as usize,
        }
    }

    fn check(&self, n_tokens: u32, n_blocks: u32) -> Result<(), BlobError> {
        let ranges = |offsets: &[u32], end| offsets[0] == 0 && offsets.last() == Some(&end) && offsets.is_sorted();
        check(ranges(self.seq_offsets, n_tokens), "step: seq_offset is not a partition of the tokens")?;
        check(ranges(self.block_offsets, n_blocks), "step: block_offset is not a partition of the block ids")?;
        check(self.rows.is_sorted_by(|a, b| a < b), "step: rows are not ascending")?;
        check(self.rows.last().is_none_or(|&r| r < n_tokens), "step: a row is past the tokens")?;
        for (range, &context) in self.seq_offsets.windows(2).zip(self.contexts) {
            let positions = &self.positions[range[0] as usize..range[1] as usize];
            let consecutive = positions.windows(2).all(|p| p[0].checked_add(1) == Some(p[1]));
            check(consecutive, "step: positions of a sequence are not consecutive")?;
            let last = positions.last().map(|&p| u64::from(p) + 1);
            check(last.is_none_or(|n| n == u64::from(context)), "step: context is not the last position + 1")?;
        }
        Ok(())
    }
}

fn check(holds: bool, what: &'static str) -> Result<(), BlobError> {
    if holds { Ok(()) } else { Err(BlobError(what)) }
}

/// The header at the start of a blob, as long as its `struct_size`, which lies at byte `at`, says.
fn header<T: crate::pod::Pod>(blob: &[u8], at: usize) -> Result<T, BlobError> {
    let size = blob.get(at..).and_then(read_prefix::<u32>).ok_or(BlobError("shorter than a header"))? as usize;
    check((8..=HEADER_BYTES_MAX).contains(&size), "header: an impossible struct_size")?;
    let bytes = blob.get(..size).ok_or(BlobError("header: longer than the blob"))?;
    read_extended(bytes).ok_or(BlobError("header: an unknown field is set"))
}

fn read_table<T: crate::pod::Pod>(blob: &[u8], n: u32, stride: u32, offset: u32) -> Result<Vec<T>, BlobError> {
    check(stride > 0 && stride.is_multiple_of(8) && offset.is_multiple_of(8), "program: bad stride or offset")?;
    let end = u64::from(offset) + u64::from(n) * u64::from(stride);
    check(end <= blob.len() as u64, "program: a table reaches past the blob")?;
    let (stride, offset) = (stride as usize, offset as usize);
    let element = |i: usize| &blob[offset + i * stride..offset + (i + 1) * stride];
    let mut table = Vec::with_capacity(n as usize);
    for i in 0..n as usize {
        table.push(read_extended(element(i)).ok_or(BlobError("program: an unknown field is set"))?);
    }
    Ok(table)
}

fn array(bytes: &[u8], offset: u32, n: usize) -> Result<&[u32], BlobError> {
    let tail = bytes.get(offset as usize..).ok_or(BlobError("step: an array begins past the end"))?;
    cast_slice(tail, n).ok_or(BlobError("step: an array reaches past the end or is not aligned"))
}

fn wide_array(bytes: &[u8], offset: u32, n: usize) -> Result<&[u64], BlobError> {
    let tail = bytes.get(offset as usize..).ok_or(BlobError("step: an array begins past the end"))?;
    cast_slice(tail, n).ok_or(BlobError("step: an array reaches past the end or is not aligned"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: StepArrays<'static> = StepArrays {
        step_id: 7,
        flags: 0,
        tokens: &[5, 6, 9],
        positions: &[0, 1, 64],
        slots: &[0, 1, 128],
        seq_offsets: &[0, 2, 3],
        contexts: &[2, 65],
        block_offsets: &[0, 1, 3],
        block_ids: &[0, 1, 2],
        rows: &[1, 2],
    };

    #[test]
    fn a_step_survives_encoding() {
        let blob = STEP.encode();
        assert_eq!(StepArrays::parse(blob.as_bytes()), Ok(STEP));
    }

    /// The step as a side writes it whose header has eight bytes more.
    fn from_a_newer_minor(tail: u64) -> Vec<u64> {
        let old = STEP.encode();
        let header = size_of::<SpdStep>();
        let mut h: SpdStep = read_prefix(old.as_bytes()).expect("a header");
        h.struct_size += 8;
        for offset in [
            &mut h.token_offset,
            &mut h.position_offset,
            &mut h.slot_offset,
            &mut h.seq_offset,
            &mut h.context_offset,
            &mut h.block_offset,
            &mut h.block_id_offset,
            &mut h.row_offset,
            &mut h.total_size,
        ] {
            *offset += 8;
        }
        let mut words = alloc::vec![0; (old.as_bytes().len() + 8) / 8];
        let bytes = crate::pod::bytes_of_mut(&mut words);
        bytes[..header].copy_from_slice(bytes_of(&[h]));
        bytes[header..header + 8].copy_from_slice(&tail.to_le_bytes());
        bytes[header + 8..].copy_from_slice(&old.as_bytes()[header..]);
        words
    }

    #[test]
    fn a_newer_header_is_read_unless_its_new_field_is_set() {
        let (unset, set) = (from_a_newer_minor(0), from_a_newer_minor(1));
        assert_eq!(StepArrays::parse(bytes_of(&unset)), Ok(STEP));
        let refused = StepArrays::parse(bytes_of(&set));
        assert_eq!(refused, Err(BlobError("header: an unknown field is set")));
    }

    #[test]
    fn a_cut_step_is_refused_at_every_length() {
        let blob = STEP.encode();
        for length in 0..blob.as_bytes().len() {
            assert!(StepArrays::parse(&blob.as_bytes()[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn steps_whose_arrays_disagree_are_refused() {
        let bad = [
            StepArrays { positions: &[0, 2, 64], ..STEP },
            StepArrays { contexts: &[2, 66], ..STEP },
            StepArrays { rows: &[2, 1], ..STEP },
            StepArrays { rows: &[1, 3], ..STEP },
            StepArrays { seq_offsets: &[0, 3, 2], ..STEP },
            StepArrays { block_offsets: &[0, 1, 2], ..STEP },
        ];
        for step in bad {
            assert!(StepArrays::parse(step.encode().as_bytes()).is_err(), "{step:?}");
        }
    }

    #[test]
    fn no_flipped_byte_makes_the_parser_panic() {
        let mut builder = crate::ProgramBuilder::new();
        let x = builder.input(crate::DT_F32, &[DIM_TOKENS, 8]);
        builder.view(x, 4, &[DIM_TOKENS, 2, 2], &[8, 2]);
        let y = builder.activation(crate::DT_F32, &[DIM_TOKENS, 8]);
        builder.op(crate::OpSpec {
            kind: crate::OP_ADD,
            inputs: &[Some(x)],
            outputs: &[Some(y)],
            ..Default::default()
        });
        let good = builder.finish(0);
        assert!(Program::parse(good.as_bytes()).is_ok());
        for at in 0..good.as_bytes().len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut blob = good.clone();
                blob.as_bytes_mut()[at] = value;
                drop(Program::parse(blob.as_bytes()));
            }
        }
    }
}
