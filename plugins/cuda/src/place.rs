//! Where does each tensor lie? Offsets in the workspace and in the arenas, in bytes.

use crate::memory::BYTES_MAX;
use sparsed_abi::{
    ARENA_ALIGN, DIM_LOGITS, DIM_SEQS, DIM_TOKENS, NO_TENSOR, Program, SpdBucket, SpdTensor, StepArrays, T_ACTIVATION,
    T_VIEW,
};
use sparsed_plugin_kit::{PluginError, Result};

/// Tensors of the workspace begin at multiples of this, as the driver's own allocations do.
pub(crate) const ALIGN: u64 = 256;

/// How many rows symbolic dimensions have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) tokens: u64,
    pub(crate) seqs: u64,
    pub(crate) logits: u64,
}

impl Sizes {
    pub(crate) fn of_bucket(bucket: &SpdBucket) -> Self {
        Self { tokens: bucket.max_tokens.into(), seqs: bucket.max_seqs.into(), logits: bucket.max_logits.into() }
    }

    pub(crate) fn of_step(step: &StepArrays<'_>) -> Self {
        let n = |length: usize| length as u64;
        Self { tokens: n(step.tokens.len()), seqs: n(step.contexts.len()), logits: n(step.rows.len()) }
    }

    /// Rows of a tensor with this dim 0.
    pub(crate) fn rows(&self, dim: i32) -> u64 {
        match dim {
            DIM_TOKENS => self.tokens,
            DIM_SEQS => self.seqs,
            DIM_LOGITS => self.logits,
            n => n.unsigned_abs().into(),
        }
    }

    /// Bytes of a tensor of 4-byte values, at most [`BYTES_MAX`].
    pub(crate) fn bytes(&self, tensor: &SpdTensor) -> Result<u64> {
        let dims = tensor.dim[1..tensor.rank as usize].iter().map(|n| u64::from(n.unsigned_abs()));
        let values = dims.chain([self.rows(tensor.dim[0]), 4]).try_fold(1u64, u64::checked_mul);
        values.filter(|&bytes| bytes <= BYTES_MAX).ok_or_else(too_large)
    }
}

fn too_large() -> PluginError {
    PluginError::invalid("tensors of more than 2^42 bytes")
}

/// Calls `each` with the number, the offset and the bytes of each tensor of `kind`; answers the arena's length.
pub(crate) fn arena(program: &Program, kind: u32, sizes: Sizes, mut each: impl FnMut(usize, u64, u64)) -> Result<u64> {
    let mut end = 0u64;
    for (id, tensor) in program.tensors().iter().enumerate().filter(|(_, tensor)| tensor.kind == kind) {
        let (at, bytes) = (end.next_multiple_of(ARENA_ALIGN as u64), sizes.bytes(tensor)?);
        each(id, at, bytes);
        end = at.saturating_add(bytes);
        if end > BYTES_MAX {
            return Err(too_large());
        }
    }
    Ok(end)
}

/// Gives every tensor inside the plan a range of the workspace that no tensor alive at the same time has: offsets by
/// tensor number (`None`: it is not in the workspace), and the workspace's length.
pub(crate) fn place(program: &Program, sizes: Sizes) -> Result<(Vec<Option<u64>>, u64)> {
    let tensors = program.tensors();
    let owner = |id: u32| {
        let tensor = &tensors[id as usize];
        if tensor.kind == T_VIEW { tensor.bind as usize } else { id as usize }
    };
    let mut last_use = vec![0; tensors.len()];
    for (step, op) in program.ops().iter().enumerate() {
        for &id in op.inputs.iter().chain(&op.outputs).filter(|&&id| id != NO_TENSOR) {
            last_use[owner(id)] = step;
        }
    }
    let mut places = vec![None; tensors.len()];
    let (mut alive, mut end): (Vec<(u64, u64, usize)>, u64) = (Vec::new(), 0); // (offset, bytes, tensor)
    for (step, op) in program.ops().iter().enumerate() {
        let unwritten =
            |&&id: &&u32| id != NO_TENSOR && tensors[owner(id)].kind == T_ACTIVATION && places[owner(id)].is_none();
        if op.inputs.iter().any(|id| unwritten(&id)) {
            return Err(PluginError::invalid("reads a tensor that nothing has written").at(step));
        }
        for id in op.outputs.iter().filter(|&&id| id != NO_TENSOR).map(|&id| id as usize) {
            if tensors[id].kind != T_ACTIVATION || places[id].is_some() {
                continue;
            }
            let bytes = sizes.bytes(&tensors[id])?.next_multiple_of(ALIGN);
            let at = first_gap(&mut alive, bytes);
            if at > BYTES_MAX {
                return Err(too_large());
            }
            alive.push((at, bytes, id));
            end = end.max(at + bytes);
            places[id] = Some(at);
        }
        alive.retain(|&(_, _, id)| last_use[id] > step);
    }
    Ok((places, end))
}

/// The lowest offset at which `bytes` fit between what is alive.
fn first_gap(alive: &mut [(u64, u64, usize)], bytes: u64) -> u64 {
    alive.sort_unstable();
    let mut at = 0;
    for &(offset, taken, _) in alive.iter() {
        if offset >= at + bytes {
            break;
        }
        at = at.max(offset + taken);
    }
    at
}
