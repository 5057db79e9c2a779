//! What lives on a device? Weights and KV pools, each keeping the device alive.

use crate::BackendError;
use crate::call::checked;
use crate::device::Device;
use crate::slow::SlowSource;
use bytes::Bytes;
use sparsed_abi::{SpdKvDesc, SpdKvInfo, SpdKvPool, SpdRow, SpdSource, SpdWeight, SpdWeightDesc, W_HOST_IN_PLACE};
use sparsed_plugin_kit::{put_text, struct_size};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// A weight to be uploaded: `batch` matrices `[rows, cols]` of dtype `dtype` (`DT_*`), their bytes one after another.
#[derive(Clone, Debug)]
pub struct WeightUpload {
    /// For messages.
    pub name: String,
    /// `DT_*` of the ABI.
    pub dtype: u32,
    /// Experts or heads, at least 1.
    pub batch: u32,
    /// Rows of each matrix.
    pub rows: u64,
    /// Values in a row.
    pub cols: u64,
    /// The weight as it lies in the file.
    pub bytes: Bytes,
    /// Where the same bytes lie in a file, if they do: a plugin in another process maps it instead of copying them.
    pub file: Option<WeightFile>,
}

/// A place in a file.
#[derive(Clone, Debug)]
pub struct WeightFile {
    /// Open for reading.
    pub file: Arc<File>,
    /// In bytes from its start.
    pub offset: u64,
}

/// A weight on a device.
#[derive(Clone, Debug)]
pub struct Weight(pub(crate) Arc<WeightInner>);

#[derive(Debug)]
pub(crate) struct WeightInner {
    pub(crate) raw: NonNull<SpdWeight>,
    device: Arc<Device>,
    /// Read in place by the device; freed after `weight_destroy`.
    _bytes: Option<Bytes>,
}

// SAFETY: used through `[control]` functions under the plugin's lock only.
unsafe impl Send for WeightInner {}
// SAFETY: as above.
unsafe impl Sync for WeightInner {}

impl Weight {
    pub(crate) fn upload(device: &Arc<Device>, weight: &WeightUpload) -> Result<Self, BackendError> {
        let in_place = device.info().reads_host_weights();
        let mut desc = SpdWeightDesc {
            struct_size: struct_size::<SpdWeightDesc>(),
            dtype: weight.dtype,
            batch: weight.batch,
            flags: if in_place { W_HOST_IN_PLACE } else { 0 },
            rows: weight.rows,
            cols: weight.cols,
            ..SpdWeightDesc::default()
        };
        put_text(&mut desc.name, &weight.name);
        let source = SpdSource {
            struct_size: struct_size::<SpdSource>(),
            fd: weight.file.as_ref().map_or(-1, |at| at.file.as_raw_fd()),
            ptr: weight.bytes.as_ptr().cast(),
            offset: weight.file.as_ref().map_or(0, |at| at.offset),
            length: weight.bytes.len() as u64,
        };
        let control = device.plugin.control();
        let (api, mut raw) = (device.api(), ptr::null_mut());
        let create = api.weight_create.expect("checked at load");
        // SAFETY: the device is alive; the description lives through the call; the out pointer and the error are ours.
        checked("weight_create", |e| unsafe { create(device.raw.as_ptr(), &raw const desc, &raw mut raw, e) })?;
        let Some(raw) = NonNull::new(raw) else {
            let reason = "weight_create answered NULL".to_owned();
            return Err(BackendError::BadTable { path: device.plugin.path().to_owned(), reason });
        };
        let bytes = in_place.then(|| weight.bytes.clone());
        let made = Self(Arc::new(WeightInner { raw, device: Arc::clone(device), _bytes: bytes }));
        let upload = api.weight_upload.expect("checked at load");
        let commit = api.weight_commit.expect("checked at load");
        let (raw, batch) = (raw.as_ptr(), weight.batch);
        // SAFETY: the weight is new; the source's bytes live through the call, and with the weight if read in place.
        let uploaded = checked("weight_upload", |e| unsafe { upload(raw, 0, batch, &raw const source, e) });
        // SAFETY: every batch has been uploaded.
        let result = uploaded.and_then(|()| checked("weight_commit", |e| unsafe { commit(raw, e) }));
        drop(control); // a failed upload drops the weight, which takes the lock itself
        result.map(|()| made)
    }
}

impl Drop for WeightInner {
    fn drop(&mut self) {
        let _control = self.device.plugin.control();
        let destroy = self.device.api().weight_destroy.expect("checked at load");
        // SAFETY: plans hold an Arc of the weights bound to them, so no plan uses it.
        unsafe { destroy(self.raw.as_ptr()) };
    }
}

/// The shape of a KV pool; see `spd_kv_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvDesc {
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Blocks in the pool.
    pub n_blocks: u32,
    /// Layers of the latent plane.
    pub n_layers: u32,
    /// Layers of the index plane.
    pub n_index_layers: u32,
    /// One token's latent row in one layer.
    pub latent: SpdRow,
    /// One token's rope row in one layer.
    pub rope: SpdRow,
    /// One token's index row in one index layer.
    pub index: SpdRow,
}

/// The sizes of a pool in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvInfo {
    /// With every block in use.
    pub device_bytes: u64,
    /// One block's host image.
    pub image_bytes: u64,
    /// Where the latent plane begins in a host image.
    pub image_latent_offset: u64,
}

/// A KV pool on a device.
#[derive(Clone, Debug)]
pub struct KvPool(pub(crate) Arc<KvPoolInner>);

#[derive(Debug)]
pub(crate) struct KvPoolInner {
    pub(crate) raw: NonNull<SpdKvPool>,
    device: Arc<Device>,
    desc: KvDesc,
    info: KvInfo,
    /// Read by the plugin until `kv_destroy`.
    _slow: Option<SlowSource>,
}

// SAFETY: created and destroyed under the plugin's lock, used by queues, each of which one thread owns.
unsafe impl Send for KvPoolInner {}
// SAFETY: as above.
unsafe impl Sync for KvPoolInner {}

impl KvPool {
    pub(crate) fn create(device: &Arc<Device>, desc: &KvDesc, slow: Option<SlowSource>) -> Result<Self, BackendError> {
        let raw_slow = slow.as_ref().map(|slow| slow.desc(device.plugin.host_process().is_some()));
        let raw_desc = SpdKvDesc {
            struct_size: struct_size::<SpdKvDesc>(),
            flags: 0,
            block_tokens: desc.block_tokens,
            n_blocks: desc.n_blocks,
            n_layers: desc.n_layers,
            n_index_layers: desc.n_index_layers,
            latent: desc.latent,
            rope: desc.rope,
            index: desc.index,
            slow: raw_slow.as_ref().map_or_else(ptr::null, ptr::from_ref),
        };
        let mut info = SpdKvInfo { struct_size: struct_size::<SpdKvInfo>(), ..SpdKvInfo::default() };
        let _control = device.plugin.control();
        let (create, mut raw) = (device.api().kv_create.expect("checked at load"), ptr::null_mut());
        checked("kv_create", |e| {
            // SAFETY: the device is alive; the description lives through the call; out values and error are ours.
            unsafe { create(device.raw.as_ptr(), &raw const raw_desc, &raw mut raw, &raw mut info, e) }
        })?;
        let Some(raw) = NonNull::new(raw) else {
            let reason = "kv_create answered NULL".to_owned();
            return Err(BackendError::BadTable { path: device.plugin.path().to_owned(), reason });
        };
        let info = KvInfo {
            device_bytes: info.device_bytes,
            image_bytes: info.image_bytes,
            image_latent_offset: info.image_latent_offset,
        };
        Ok(Self(Arc::new(KvPoolInner { raw, device: Arc::clone(device), desc: *desc, info, _slow: slow })))
    }

    /// The shape it was created with.
    pub fn desc(&self) -> &KvDesc {
        &self.0.desc
    }

    /// Its sizes as the border has them.
    pub(crate) fn raw_info(&self) -> SpdKvInfo {
        let KvInfo { device_bytes, image_bytes, image_latent_offset } = self.0.info;
        let struct_size = struct_size::<SpdKvInfo>();
        SpdKvInfo { struct_size, device_bytes, image_bytes, image_latent_offset, ..SpdKvInfo::default() }
    }

    /// Its sizes.
    pub fn info(&self) -> KvInfo {
        self.0.info
    }
}

impl Drop for KvPoolInner {
    fn drop(&mut self) {
        let _control = self.device.plugin.control();
        let destroy = self.device.api().kv_destroy.expect("checked at load");
        // SAFETY: plans hold an Arc of the pools bound to them, and a queue's call borrows the pool while it runs.
        unsafe { destroy(self.raw.as_ptr()) };
    }
}
