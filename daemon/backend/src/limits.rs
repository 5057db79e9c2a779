//! What does a device not take, by its own description? Looked at before it is asked, so that who is refused hears the
//! limit by name.

use crate::{BackendError, KvDesc};
use sparsed_abi::{
    Blob, DTYPE_WORDS, E_UNSUPPORTED, OP_IDX_TOPK, Program, SpdBucket, SpdDeviceInfo, SpdOp, SpdRow, dtype_bit,
};

/// The limits of a device; 0 is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    /// Bitmap over dtype numbers: rows of pools.
    row_dtypes: [u64; DTYPE_WORDS],
    tokens: u32,
    seqs: u32,
    context: u32,
    topk: u32,
    /// A block's tokens are a multiple of this.
    block_tokens_align: u32,
}

impl Limits {
    pub(crate) fn of(info: &SpdDeviceInfo) -> Self {
        Self {
            row_dtypes: info.row_dtypes,
            tokens: info.max_tokens,
            seqs: info.max_seqs,
            context: info.max_context,
            topk: info.max_topk,
            block_tokens_align: info.block_tokens_align,
        }
    }

    /// # Errors
    /// `SPD_E_UNSUPPORTED` for rows of a dtype, or blocks of a size, that the device does not claim.
    pub(crate) fn allow_pool(&self, desc: &KvDesc) -> Result<(), BackendError> {
        let claimed = |row: &SpdRow| {
            row.width == 0 || dtype_bit(row.dtype).is_some_and(|(word, mask)| self.row_dtypes[word] & mask != 0)
        };
        if let Some(row) = [desc.latent, desc.rope, desc.index].iter().find(|row| !claimed(row)) {
            return Err(refused("kv_create", format!("the device has no KV rows of dtype {}", row.dtype)));
        }
        let (tokens, unit) = (desc.block_tokens, self.block_tokens_align.max(1));
        if tokens.is_multiple_of(unit) {
            return Ok(());
        }
        Err(refused("kv_create", format!("the device takes blocks of a multiple of {unit} tokens, not of {tokens}")))
    }

    /// # Errors
    /// `SPD_E_UNSUPPORTED` for a step that is larger than the device takes any.
    pub(crate) fn allow_bucket(&self, bucket: &SpdBucket) -> Result<(), BackendError> {
        let wanted = [
            ("tokens in a step", bucket.max_tokens, self.tokens),
            ("sequences in a step", bucket.max_seqs, self.seqs),
            ("tokens of context", bucket.max_context, self.context),
        ];
        match wanted.iter().find(|(_, wanted, limit)| *limit != 0 && wanted > limit) {
            None => Ok(()),
            Some((what, wanted, limit)) => {
                Err(refused("plan_compile", format!("the device takes {limit} {what}, {wanted} are wanted")))
            }
        }
    }

    /// # Errors
    /// `SPD_E_UNSUPPORTED` for an operator that selects more tokens than the device can.
    pub(crate) fn allow_program(&self, blob: &Blob) -> Result<(), BackendError> {
        // What is wrong with a program is the plugin's to say.
        let Ok(program) = Program::parse(blob.as_bytes()) else { return Ok(()) };
        let is_too_wide = |op: &SpdOp| op.kind == OP_IDX_TOPK && i64::from(op.i[0]) > i64::from(self.topk);
        let Some(op) = program.ops().iter().position(is_too_wide).filter(|_| self.topk != 0) else { return Ok(()) };
        let wanted = program.ops()[op].i[0];
        let message = format!("the device selects {} tokens, {wanted} are wanted: set the model's top_k", self.topk);
        Err(refused_op("plan_compile", message, u32::try_from(op).ok()))
    }
}

/// What the plugin would say, said for it.
fn refused(call: &'static str, message: String) -> BackendError {
    refused_op(call, message, None)
}

fn refused_op(call: &'static str, message: String, op_index: Option<u32>) -> BackendError {
    BackendError::Call { call, status: E_UNSUPPORTED, message, op_index, block: None, vendor_code: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{DIM_TOKENS, DT_F16, DT_F32, DT_I32, DT_Q8_0, OpSpec, ProgramBuilder};

    fn limits() -> Limits {
        let mut info =
            SpdDeviceInfo { max_tokens: 64, max_context: 4096, block_tokens_align: 16, ..Default::default() };
        info.row_dtypes[0] = 1 << DT_F16;
        Limits::of(&info)
    }

    fn pool(dtype: u32, block_tokens: u32) -> KvDesc {
        let (row, none) = (SpdRow { dtype, width: 32 }, SpdRow { dtype: DT_Q8_0, width: 0 });
        KvDesc { block_tokens, n_blocks: 1, n_layers: 1, n_index_layers: 0, latent: row, rope: row, index: none }
    }

    #[test]
    fn a_pool_is_refused_by_the_dtype_of_its_rows_and_by_its_blocks() {
        limits().allow_pool(&pool(DT_F16, 32)).unwrap();
        let dtype = limits().allow_pool(&pool(DT_Q8_0, 32)).unwrap_err().to_string();
        assert!(dtype.contains("no KV rows of dtype 8"), "{dtype}");
        let blocks = limits().allow_pool(&pool(DT_F16, 24)).unwrap_err().to_string();
        assert!(blocks.contains("a multiple of 16 tokens, not of 24"), "{blocks}");
    }

    #[test]
    fn a_step_is_refused_by_the_limit_that_it_passes_and_zero_is_no_limit() {
        let bucket = SpdBucket { max_tokens: 64, max_seqs: 1000, max_logits: 64, max_context: 4096 };
        limits().allow_bucket(&bucket).unwrap();
        let long = limits().allow_bucket(&SpdBucket { max_context: 4097, ..bucket }).unwrap_err().to_string();
        assert!(long.contains("4096 tokens of context, 4097 are wanted"), "{long}");
        assert!(limits().allow_bucket(&SpdBucket { max_tokens: 65, ..bucket }).is_err());
    }

    #[test]
    fn a_selection_is_refused_by_the_operator_that_is_wider_than_the_device() {
        let selects = |k: i32| {
            let mut builder = ProgramBuilder::new();
            let q = builder.input(DT_F32, &[DIM_TOKENS, 1, 32]);
            let w = builder.input(DT_F32, &[DIM_TOKENS, 1]);
            let sel = builder.activation(DT_I32, &[DIM_TOKENS, k]);
            let (inputs, outputs) = (&[Some(q), Some(w)][..], &[Some(sel)][..]);
            builder.op(OpSpec { kind: OP_IDX_TOPK, inputs, outputs, i: [k, 0, 0, 0, 0, 0], ..OpSpec::default() });
            builder.finish(0)
        };
        let limits = Limits { topk: 512, ..limits() };
        limits.allow_program(&selects(512)).unwrap();
        let wide = limits.allow_program(&selects(513)).unwrap_err().to_string();
        assert!(wide.contains("selects 512 tokens, 513 are wanted") && wide.contains("operator 0"), "{wide}");
        Limits::default().allow_program(&selects(513)).unwrap();
    }
}
