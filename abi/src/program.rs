//! How is one step of a model written down? The structs of the pointer-free blob and of compilation.

use crate::layout::abi_struct;
use crate::{SpdKvPool, SpdWeight};
use core::ffi::{c_char, c_void};

pub const PROGRAM_MAGIC: u32 = 0x5044_5053;

abi_struct! {
    SpdProgram = "spd_program" {
        magic: u32,
        struct_size: u32,
        abi_minor: u32,
        flags: u32,
        n_tensors: u32,
        tensor_stride: u32,
        tensor_offset: u32,
        n_ops: u32,
        op_stride: u32,
        op_offset: u32,
        total_size: u32,
        n_weights: u32,
        n_kvpools: u32,
        reserved: u32,
    }
}

pub const T_ACTIVATION: u32 = 0;
pub const T_INPUT: u32 = 1;
pub const T_OUTPUT: u32 = 2;
pub const T_WEIGHT: u32 = 3;
pub const T_VIEW: u32 = 4;

pub const DIM_TOKENS: i32 = -1;
pub const DIM_SEQS: i32 = -2;
pub const DIM_LOGITS: i32 = -3;

abi_struct! {
    #[derive(PartialEq, Eq)]
    SpdTensor = "spd_tensor" {
        kind: u32,
        dtype: u32,
        rank: u32,
        bind: u32,
        dim: [i32; 4],
        view_offset: i64,
        stride: [i32; 3],
        flags: u32,
    }
}

pub const NO_TENSOR: u32 = 0xffff_ffff;

abi_struct! {
    #[derive(PartialEq)]
    SpdOp = "spd_op" {
        kind: u32,
        flags: u32,
        #[doc = "`in` of the header."]
        inputs: [u32; 6],
        #[doc = "`out` of the header."]
        outputs: [u32; 3],
        layer: u32,
        kvpool: u32,
        i: [i32; 6],
        f: [f32; 4],
        attr_offset: u32,
        attr_length: u32,
        reserved: u32,
    }
}

pub const OP_EMBED: u32 = 1;
pub const OP_RMS_NORM: u32 = 2;
pub const OP_LAYER_NORM: u32 = 3;
pub const OP_LINEAR: u32 = 4;
pub const OP_ROPE: u32 = 5;
pub const OP_MLA_ABSORB: u32 = 6;
pub const OP_MLA_EXPAND: u32 = 7;
pub const OP_KV_APPEND: u32 = 8;
pub const OP_IDX_APPEND: u32 = 9;
pub const OP_IDX_TOPK: u32 = 10;
pub const OP_SPARSE_MLA: u32 = 11;
pub const OP_DENSE_MLA: u32 = 12;
pub const OP_MOE_ROUTE: u32 = 13;
pub const OP_MOE_LINEAR: u32 = 14;
pub const OP_MOE_COMBINE: u32 = 15;
pub const OP_SILU_MUL: u32 = 16;
pub const OP_ADD: u32 = 17;
pub const OP_GATHER_ROWS: u32 = 18;
pub const OP_HADAMARD: u32 = 19;
pub const OP_EXT_BASE: u32 = 0x8000_0000;

/// The header's name of an operator, for messages.
pub const fn op_name(kind: u32) -> &'static str {
    match kind {
        OP_EMBED => "EMBED",
        OP_RMS_NORM => "RMS_NORM",
        OP_LAYER_NORM => "LAYER_NORM",
        OP_LINEAR => "LINEAR",
        OP_ROPE => "ROPE",
        OP_MLA_ABSORB => "MLA_ABSORB",
        OP_MLA_EXPAND => "MLA_EXPAND",
        OP_KV_APPEND => "KV_APPEND",
        OP_IDX_APPEND => "IDX_APPEND",
        OP_IDX_TOPK => "IDX_TOPK",
        OP_SPARSE_MLA => "SPARSE_MLA",
        OP_DENSE_MLA => "DENSE_MLA",
        OP_MOE_ROUTE => "MOE_ROUTE",
        OP_MOE_LINEAR => "MOE_LINEAR",
        OP_MOE_COMBINE => "MOE_COMBINE",
        OP_SILU_MUL => "SILU_MUL",
        OP_ADD => "ADD",
        OP_GATHER_ROWS => "GATHER_ROWS",
        OP_HADAMARD => "HADAMARD",
        _ => "unknown operator",
    }
}

abi_struct! {
    SpdBucket = "spd_bucket" {
        max_tokens: u32,
        max_seqs: u32,
        max_logits: u32,
        max_context: u32,
    }
}

pub const COMPILE_DRY_RUN: u32 = 1;

abi_struct! {
    SpdCompile = "spd_compile" {
        struct_size: u32,
        flags: u32,
        blob: *const c_void,
        blob_length: u64,
        weights: *const *mut SpdWeight,
        kvpools: *const *mut SpdKvPool,
        n_weights: u32,
        n_kvpools: u32,
        buckets: *const SpdBucket,
        n_buckets: u32,
        bucket_stride: u32,
        cache_dir: *const c_char,
    }
}

abi_struct! {
    SpdPlanInfo = "spd_plan_info" {
        struct_size: u32,
        flags: u32,
        workspace_bytes: u64,
        graph_bytes: u64,
        host_bytes: u64,
        in_bytes: u64,
        out_bytes: u64,
        compile_ns: u64,
        unsupported_op: u32,
        n_launches: u32,
    }
}
