//! Which devices are there, and how do they feel?

use crate::layout::abi_struct;
use core::ffi::c_char;

pub const DEV_CPU: u32 = 1;
pub const DEV_GPU: u32 = 2;
pub const DEV_NPU: u32 = 3;

pub const FEAT_ASYNC: u64 = 1 << 0;
pub const FEAT_NOTIFY: u64 = 1 << 1;
pub const FEAT_GRAPH: u64 = 1 << 2;
pub const FEAT_HOST_WEIGHTS: u64 = 1 << 3;
pub const FEAT_UNIFIED_MEM: u64 = 1 << 4;
pub const FEAT_PROFILE: u64 = 1 << 5;
pub const FEAT_CANCEL_MID: u64 = 1 << 6;
pub const FEAT_DETERMINISTIC: u64 = 1 << 7;
pub const FEAT_INVARIANT: u64 = 1 << 8;
pub const FEAT_SLOW_FILE: u64 = 1 << 9;
pub const FEAT_SLOW_HOST: u64 = 1 << 10;
pub const FEAT_SLOW_SEALED: u64 = 1 << 11;

pub const DTYPE_WORDS: usize = 4;

abi_struct! {
    SpdDeviceInfo = "spd_device_info" {
        struct_size: u32,
        kind: u32,
        id: [c_char; 64],
        name: [c_char; 64],
        driver: [c_char; 64],
        pci_vendor: u32,
        pci_device: u32,
        score: u32,
        compute_major: u32,
        compute_minor: u32,
        numa_node: u32,
        mem_total: u64,
        features: u64,
        weight_dtypes: [u64; DTYPE_WORDS],
        row_dtypes: [u64; DTYPE_WORDS],
        max_tokens: u32,
        max_seqs: u32,
        max_context: u32,
        max_topk: u32,
        block_tokens_align: u32,
        reserved: u32,
    }
}

abi_struct! {
    SpdOpenOptions = "spd_open_options" {
        struct_size: u32,
        n_threads: u32,
        device_cookie: u64,
        mem_budget: u64,
        cpu_mask: *const u64,
        cpu_mask_words: u32,
        flags: u32,
    }
}

abi_struct! {
    SpdMemInfo = "spd_mem_info" {
        struct_size: u32,
        reserved: u32,
        total: u64,
        free: u64,
        budget: u64,
        used_weights: u64,
        used_kv: u64,
        used_workspace: u64,
        used_plans: u64,
        used_other: u64,
    }
}

pub const HEALTH_OK: u32 = 0;
pub const HEALTH_DEGRADED: u32 = 1;
pub const HEALTH_LOST: u32 = 2;

abi_struct! {
    SpdHealth = "spd_health" {
        struct_size: u32,
        state: u32,
        temperature_millicelsius: i32,
        power_milliwatt: i32,
        utilisation_permille: u32,
        throttle_bits: u32,
        ecc_corrected: u64,
        ecc_uncorrected: u64,
    }
}
