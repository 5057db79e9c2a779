//! Where do weights and KV rows live?

use crate::layout::abi_struct;
use core::ffi::{c_char, c_void};

pub const W_HOST_IN_PLACE: u32 = 1;

abi_struct! {
    SpdWeightDesc = "spd_weight_desc" {
        struct_size: u32,
        dtype: u32,
        batch: u32,
        flags: u32,
        rows: u64,
        cols: u64,
        name: [c_char; 64],
    }
}

abi_struct! {
    SpdSource = "spd_source" {
        struct_size: u32,
        fd: i32,
        ptr: *const c_void,
        offset: u64,
        length: u64,
    }
}

abi_struct! {
    #[derive(PartialEq, Eq)]
    SpdRow = "spd_row" {
        dtype: u32,
        width: u32,
    }
}

pub const SLOW_AES_256_GCM: u32 = 1;
pub const SLOW_CHACHA20_POLY1305: u32 = 2;

abi_struct! {
    #[derive(PartialEq, Eq)]
    SpdKvSlow = "spd_kv_slow" {
        struct_size: u32,
        flags: u32,
        fd: i32,
        page_bytes: u32,
        ptr: *const c_void,
        offset: u64,
        length: u64,
        cache_bytes: u64,
        key: *const c_void,
        cipher: u32,
        reserved: u32,
    }
}

abi_struct! {
    #[derive(PartialEq, Eq)]
    SpdKvDesc = "spd_kv_desc" {
        struct_size: u32,
        flags: u32,
        block_tokens: u32,
        n_blocks: u32,
        n_layers: u32,
        n_index_layers: u32,
        latent: SpdRow,
        rope: SpdRow,
        index: SpdRow,
        slow: *const SpdKvSlow,
    }
}

abi_struct! {
    SpdKvInfo = "spd_kv_info" {
        struct_size: u32,
        reserved: u32,
        device_bytes: u64,
        image_bytes: u64,
        image_latent_offset: u64,
    }
}

pub const KV_COPY: u32 = 1;
pub const KV_EXPORT: u32 = 2;
pub const KV_IMPORT: u32 = 3;
pub const KV_DISCARD: u32 = 4;
pub const KV_TO_SLOW: u32 = 5;
pub const KV_TO_FAST: u32 = 6;
pub const KV_LIMIT_CACHE: u32 = 7;

abi_struct! {
    SpdKvOp = "spd_kv_op" {
        kind: u32,
        src_block: u32,
        dst_block: u32,
        n_tokens: u32,
        host_offset: u64,
        slow_offset: u64,
        tag: u64,
        cache_bytes: u64,
    }
}
