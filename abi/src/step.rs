//! What does one step work on?

use crate::layout::abi_struct;
use core::ffi::c_void;

pub const STEP_PROFILE: u32 = 1;
pub const STEP_NAN_GUARD: u32 = 2;

abi_struct! {
    SpdStep = "spd_step" {
        struct_size: u32,
        flags: u32,
        n_tokens: u32,
        n_seqs: u32,
        n_logits: u32,
        n_blocks: u32,
        step_id: u64,
        token_offset: u32,
        position_offset: u32,
        slot_offset: u32,
        seq_offset: u32,
        context_offset: u32,
        block_offset: u32,
        block_id_offset: u32,
        row_offset: u32,
        total_size: u32,
        reserved: u32,
    }
}

abi_struct! {
    SpdProfile = "spd_profile" {
        first_op: u32,
        n_ops: u32,
        begin_ns: u64,
        end_ns: u64,
    }
}

abi_struct! {
    SpdRun = "spd_run" {
        struct_size: u32,
        flags: u32,
        step: *const SpdStep,
        #[doc = "`in` of the header."]
        input: *const c_void,
        in_length: u64,
        out: *mut c_void,
        out_length: u64,
        cancel: *const u32,
        profile: *mut SpdProfile,
        profile_capacity: u32,
        profile_stride: u32,
    }
}
