//! Which functions does a plugin offer? The table behind the one exported symbol.

use crate::layout::abi_struct;
use crate::{
    SpdCompile, SpdDeviceInfo, SpdError, SpdHealth, SpdHost, SpdKvDesc, SpdKvInfo, SpdKvOp, SpdMemInfo, SpdOpenOptions,
    SpdPlanInfo, SpdRun, SpdSource, SpdStatus, SpdWeightDesc,
};
use core::ffi::{c_char, c_void};

/// Declares types whose inside only the plugin knows.
macro_rules! opaque {
    ($($(#[$meta:meta])* $name:ident,)*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name { _opaque: [u8; 0], _not_send: core::marker::PhantomData<*mut u8> }
    )*};
}

opaque! {
    /// `spd_instance`
    SpdInstance,
    /// `spd_device`
    SpdDevice,
    /// `spd_weight`
    SpdWeight,
    /// `spd_kvpool`
    SpdKvPool,
    /// `spd_plan`
    SpdPlan,
    /// `spd_queue`
    SpdQueue,
}

type Err = *mut SpdError;

abi_struct! {
    SpdApi = "spd_api" {
        struct_size: u32,
        abi_minor: u32,
        #[doc = "[`LAYOUT_DIGEST`](crate::LAYOUT_DIGEST) of the header that the plugin was compiled with."]
        layout: u64,
        plugin_id: *const c_char,
        plugin_version: *const c_char,
        required_host_features: u64,
        instance_create: Option<unsafe extern "C" fn(*const SpdHost, *mut *mut SpdInstance, Err) -> SpdStatus>,
        instance_destroy: Option<unsafe extern "C" fn(*mut SpdInstance)>,
        device_count: Option<unsafe extern "C" fn(*mut SpdInstance, *mut u32, Err) -> SpdStatus>,
        device_info: Option<unsafe extern "C" fn(*mut SpdInstance, u32, *mut SpdDeviceInfo, Err) -> SpdStatus>,
        device_open: Option<
            unsafe extern "C" fn(*mut SpdInstance, u32, *const SpdOpenOptions, *mut *mut SpdDevice, Err) -> SpdStatus,
        >,
        device_close: Option<unsafe extern "C" fn(*mut SpdDevice)>,
        self_test: Option<unsafe extern "C" fn(*mut SpdDevice, u32, Err) -> SpdStatus>,
        mem_info: Option<unsafe extern "C" fn(*mut SpdDevice, *mut SpdMemInfo, Err) -> SpdStatus>,
        health: Option<unsafe extern "C" fn(*mut SpdDevice, *mut SpdHealth, Err) -> SpdStatus>,
        supports: Option<unsafe extern "C" fn(*mut SpdDevice, *const c_void, u64, u32, Err) -> SpdStatus>,
        host_alloc: Option<unsafe extern "C" fn(*mut SpdDevice, u64, u64, *mut *mut c_void, Err) -> SpdStatus>,
        host_free: Option<unsafe extern "C" fn(*mut SpdDevice, *mut c_void)>,
        host_register: Option<unsafe extern "C" fn(*mut SpdDevice, *mut c_void, u64, Err) -> SpdStatus>,
        host_unregister: Option<unsafe extern "C" fn(*mut SpdDevice, *mut c_void)>,
        weight_create: Option<
            unsafe extern "C" fn(*mut SpdDevice, *const SpdWeightDesc, *mut *mut SpdWeight, Err) -> SpdStatus,
        >,
        weight_upload: Option<unsafe extern "C" fn(*mut SpdWeight, u32, u32, *const SpdSource, Err) -> SpdStatus>,
        weight_commit: Option<unsafe extern "C" fn(*mut SpdWeight, Err) -> SpdStatus>,
        weight_destroy: Option<unsafe extern "C" fn(*mut SpdWeight)>,
        kv_create: Option<
            unsafe extern "C" fn(*mut SpdDevice, *const SpdKvDesc, *mut *mut SpdKvPool, *mut SpdKvInfo, Err) -> SpdStatus,
        >,
        kv_destroy: Option<unsafe extern "C" fn(*mut SpdKvPool)>,
        plan_compile: Option<
            unsafe extern "C" fn(*mut SpdDevice, *const SpdCompile, *mut *mut SpdPlan, *mut SpdPlanInfo, Err) -> SpdStatus,
        >,
        plan_destroy: Option<unsafe extern "C" fn(*mut SpdPlan)>,
        queue_create: Option<unsafe extern "C" fn(*mut SpdDevice, u32, u64, *mut *mut SpdQueue, Err) -> SpdStatus>,
        queue_destroy: Option<unsafe extern "C" fn(*mut SpdQueue)>,
        queue_run: Option<unsafe extern "C" fn(*mut SpdQueue, *mut SpdPlan, *const SpdRun, *mut u64, Err) -> SpdStatus>,
        queue_kv: Option<
            unsafe extern "C" fn(
                *mut SpdQueue,
                *mut SpdKvPool,
                *const SpdKvOp,
                u32,
                u32,
                *mut c_void,
                u64,
                *mut u64,
                Err,
            ) -> SpdStatus,
        >,
        queue_wait_queue: Option<unsafe extern "C" fn(*mut SpdQueue, *mut SpdQueue, u64, Err) -> SpdStatus>,
        queue_query: Option<unsafe extern "C" fn(*mut SpdQueue, *mut u64, Err) -> SpdStatus>,
        queue_wait: Option<unsafe extern "C" fn(*mut SpdQueue, u64, u64, Err) -> SpdStatus>,
        queue_cancel: Option<unsafe extern "C" fn(*mut SpdQueue, u64, Err) -> SpdStatus>,
        extension: Option<unsafe extern "C" fn(*mut SpdInstance, *const c_char) -> *const c_void>,
    }
}

// SAFETY: a table is static and immutable; its pointers lead to static strings and code.
unsafe impl Sync for SpdApi {}
// SAFETY: as above.
unsafe impl Send for SpdApi {}

/// The type of the exported symbol.
pub type SpdGetApiFn = unsafe extern "C" fn(abi_major: u32, host_minor: u32) -> *const SpdApi;
