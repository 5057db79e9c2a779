//! How are weights, pools and plans made? Each holds what it needs and is destroyed before that.

use super::session::Device;
use super::{Fault, call, entry, struct_size};
use sparsed_abi::{
    Blob, SpdBucket, SpdCompile, SpdKvDesc, SpdKvInfo, SpdKvPool, SpdPlan, SpdPlanInfo, SpdSource, SpdWeight,
    SpdWeightDesc,
};
use std::ptr;
use std::rc::Rc;

/// A description of `shape` = (batch, rows, cols).
pub(crate) fn weight_desc(dtype: u32, (batch, rows, cols): (u32, u64, u64)) -> SpdWeightDesc {
    let struct_size = struct_size::<SpdWeightDesc>();
    SpdWeightDesc { struct_size, dtype, batch, rows, cols, ..SpdWeightDesc::default() }
}

/// A weight.
#[derive(Debug)]
pub(crate) struct Weight {
    device: Rc<Device>,
    pub(crate) raw: *mut SpdWeight,
}

impl Weight {
    pub(crate) fn create(device: &Rc<Device>, desc: &SpdWeightDesc) -> Result<Self, Fault> {
        let (create, mut raw) = (entry!(device.api, weight_create), ptr::null_mut());
        // SAFETY: a living device; the struct says its size; the out pointer lives through the call.
        call("weight_create", |e| unsafe { create(device.raw, desc, &raw mut raw, e) })?;
        Ok(Self { device: Rc::clone(device), raw })
    }

    pub(crate) fn upload(&self, first: u32, n: u32, bytes: &[u8]) -> Result<(), Fault> {
        let source = SpdSource {
            struct_size: struct_size::<SpdSource>(),
            fd: -1,
            ptr: bytes.as_ptr().cast(),
            length: bytes.len() as u64,
            ..SpdSource::default()
        };
        self.upload_from(first, n, &source)
    }

    pub(crate) fn upload_from(&self, first: u32, n: u32, source: &SpdSource) -> Result<(), Fault> {
        let upload = entry!(self.device.api, weight_upload);
        // SAFETY: a living weight; the bytes live through the call.
        call("weight_upload", |e| unsafe { upload(self.raw, first, n, source, e) })
    }

    pub(crate) fn commit(&self) -> Result<(), Fault> {
        let commit = entry!(self.device.api, weight_commit);
        // SAFETY: a living weight.
        call("weight_commit", |e| unsafe { commit(self.raw, e) })
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        // SAFETY: plans that use the weight hold it, so none is left.
        unsafe { entry!(self.device.api, weight_destroy)(self.raw) };
    }
}

/// A KV pool.
#[derive(Debug)]
pub(crate) struct Pool {
    device: Rc<Device>,
    pub(crate) raw: *mut SpdKvPool,
    pub(crate) desc: SpdKvDesc,
    pub(crate) info: SpdKvInfo,
}

impl Pool {
    pub(crate) fn create(device: &Rc<Device>, desc: &SpdKvDesc) -> Result<Self, Fault> {
        let (create, mut raw) = (entry!(device.api, kv_create), ptr::null_mut());
        let mut info = SpdKvInfo { struct_size: struct_size::<SpdKvInfo>(), ..SpdKvInfo::default() };
        // SAFETY: a living device; the structs say their sizes; the out pointer lives through the call.
        call("kv_create", |e| unsafe { create(device.raw, desc, &raw mut raw, &raw mut info, e) })?;
        Ok(Self { device: Rc::clone(device), raw, desc: *desc, info })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: plans that use the pool hold it, so none is left.
        unsafe { entry!(self.device.api, kv_destroy)(self.raw) };
    }
}

/// A plan.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) device: Rc<Device>,
    pub(crate) raw: *mut SpdPlan,
    /// What the plan reads and writes; destroyed after it.
    _bound: (Vec<Rc<Weight>>, Option<Rc<Pool>>),
}

impl Plan {
    pub(crate) fn compile(
        device: &Rc<Device>,
        blob: &Blob,
        weights: Vec<Rc<Weight>>,
        pool: Option<Rc<Pool>>,
        bucket: SpdBucket,
    ) -> Result<Self, Fault> {
        let (compile, mut raw) = (entry!(device.api, plan_compile), ptr::null_mut());
        let raw_weights: Vec<_> = weights.iter().map(|weight| weight.raw).collect();
        let raw_pools: Vec<_> = pool.iter().map(|pool| pool.raw).collect();
        let request = SpdCompile {
            struct_size: struct_size::<SpdCompile>(),
            blob: blob.as_bytes().as_ptr().cast(),
            blob_length: blob.as_bytes().len() as u64,
            weights: raw_weights.as_ptr(),
            kvpools: raw_pools.as_ptr(),
            n_weights: u32::try_from(raw_weights.len()).expect("a handful"),
            n_kvpools: u32::try_from(raw_pools.len()).expect("one or none"),
            buckets: &raw const bucket,
            n_buckets: 1,
            bucket_stride: struct_size::<SpdBucket>(),
            ..SpdCompile::default()
        };
        let mut info = SpdPlanInfo { struct_size: struct_size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
        // SAFETY: a living device; blob, arrays and bucket live through the call; the structs say their sizes.
        call("plan_compile", |e| unsafe { compile(device.raw, &raw const request, &raw mut raw, &raw mut info, e) })?;
        Ok(Self { device: Rc::clone(device), raw, _bound: (weights, pool) })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: every call that used the plan has been waited for.
        unsafe { entry!(self.device.api, plan_destroy)(self.raw) };
    }
}
