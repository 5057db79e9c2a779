//! How is a device opened for a check?

use super::{Fault, Plan, Pool, Queue, Weight, call, entry, host, struct_size};
use crate::verdict::{Wrong, ensure};
use sparsed_abi::{
    ABI_MAJOR, ABI_MINOR, ABI_MINOR_FIRST, Blob, FieldLayout, Layout, SpdApi, SpdBucket, SpdDevice, SpdDeviceInfo,
    SpdGetApiFn, SpdInstance, SpdKvDesc, SpdMemInfo, SpdOpenOptions,
};
use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;

/// How a device is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenOptions {
    pub(crate) threads: u32,
    /// Bytes; 0: none.
    pub(crate) budget: u64,
}

impl Default for OpenOptions {
    /// Two threads: results must not depend on how work is shared out.
    fn default() -> Self {
        Self { threads: 2, budget: 0 }
    }
}

/// Length of the first minor's table: `spd_api` up to and including `extension`.
const TABLE_BYTES_MIN: usize = std::mem::offset_of!(SpdApi, extension) + size_of::<usize>();
/// A longer table is nonsense.
const TABLE_BYTES_MAX: usize = 1 << 16;

/// The plugin's table; what an older plugin's lacks is NULL.
///
/// # Errors
/// When there is none that this kit can read.
pub(crate) fn readable_table(get_api: SpdGetApiFn) -> Result<SpdApi, Wrong> {
    // SAFETY: the header's entry; it touches nothing and answers NULL or a static table.
    let api = unsafe { get_api(ABI_MAJOR, ABI_MINOR) };
    // SAFETY: a table begins with its size and minor in every version.
    let head = unsafe { api.cast::<[u32; 2]>().as_ref() };
    let Some(&[size, minor]) = head else {
        return Err(Wrong::Failed(format!("spd_get_api({ABI_MAJOR}, {ABI_MINOR}) answers NULL")));
    };
    let size = size as usize;
    ensure!(
        minor >= ABI_MINOR_FIRST,
        "the table is of ABI {ABI_MAJOR}.{minor}, {ABI_MAJOR}.{ABI_MINOR_FIRST} is the first"
    );
    let possible = TABLE_BYTES_MIN..=TABLE_BYTES_MAX;
    ensure!(possible.contains(&size), "the table's struct_size is {size}, the first minor's is {TABLE_BYTES_MIN}");
    let mut known = SpdApi::default();
    // SAFETY: the plugin's table has `size` bytes, ours at least as many as are copied.
    unsafe {
        let length = size.min(size_of::<SpdApi>());
        ptr::copy_nonoverlapping(api.cast::<u8>(), (&raw mut known).cast::<u8>(), length);
    }
    Ok(known)
}

/// As [`readable_table`], and every function that is called is there.
///
/// # Errors
/// As above, and the hole's name.
pub(crate) fn table(get_api: SpdGetApiFn) -> Result<&'static SpdApi, Wrong> {
    let known = readable_table(get_api)?;
    if let Some(hole) = hole(&known) {
        return Err(Wrong::Failed(format!("the table's {hole} is NULL")));
    }
    Ok(Box::leak(Box::new(known)))
}

/// The first pointer up to `extension` that is NULL.
pub(crate) fn hole(api: &SpdApi) -> Option<&'static str> {
    let end = std::mem::offset_of!(SpdApi, extension);
    let pointer = |field: &&FieldLayout| {
        field.size == 8 && field.offset <= end && !["layout", "required_host_features"].contains(&field.name)
    };
    let fields = SpdApi::LAYOUT.fields.iter().filter(pointer);
    fields
        .map(|field| {
            let at = ptr::from_ref(api).cast::<u8>();
            // SAFETY: a pointer-sized field inside the table.
            let pointer = unsafe { at.add(field.offset).cast::<*const c_void>().read() };
            (field.name, pointer)
        })
        .find(|(_, pointer)| pointer.is_null())
        .map(|(name, _)| name)
}

/// An instance of the plugin.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) api: &'static SpdApi,
    pub(crate) raw: *mut SpdInstance,
}

impl Instance {
    pub(crate) fn create(api: &'static SpdApi) -> Result<Self, Fault> {
        let (create, mut raw) = (entry!(api, instance_create), ptr::null_mut());
        // SAFETY: the host is static; the out pointer and the error live through the call.
        call("instance_create", |e| unsafe { create(host(), &raw mut raw, e) })?;
        Ok(Self { api, raw })
    }

    pub(crate) fn device_count(&self) -> Result<u32, Fault> {
        let (count, mut n) = (entry!(self.api, device_count), 0);
        // SAFETY: a living instance; the out pointer and the error live through the call.
        call("device_count", |e| unsafe { count(self.raw, &raw mut n, e) })?;
        Ok(n)
    }

    pub(crate) fn device_info(&self, index: u32) -> Result<SpdDeviceInfo, Fault> {
        let ask = entry!(self.api, device_info);
        let mut info = SpdDeviceInfo { struct_size: struct_size::<SpdDeviceInfo>(), ..SpdDeviceInfo::default() };
        // SAFETY: a living instance; the struct says its size.
        call("device_info", |e| unsafe { ask(self.raw, index, &raw mut info, e) })?;
        Ok(info)
    }

    pub(crate) fn open(&self, index: u32, options: &SpdOpenOptions) -> Result<*mut SpdDevice, Fault> {
        let (open, mut raw) = (entry!(self.api, device_open), ptr::null_mut());
        // SAFETY: a living instance; the struct says its size; the out pointer lives through the call.
        call("device_open", |e| unsafe { open(self.raw, index, options, &raw mut raw, e) })?;
        Ok(raw)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: the last user of the instance.
        unsafe { entry!(self.api, instance_destroy)(self.raw) };
    }
}

/// An open device; its objects hold it.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) api: &'static SpdApi,
    pub(crate) raw: *mut SpdDevice,
    instance: Instance,
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: every object of the device holds it, so none is left.
        unsafe { entry!(self.api, device_close)(self.raw) };
    }
}

/// The device that is tried, with a queue.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) info: SpdDeviceInfo,
    pub(crate) queue: Queue,
    pub(crate) device: Rc<Device>,
}

impl Session {
    pub(crate) fn open(api: &'static SpdApi, index: u32, options: OpenOptions) -> Result<Self, Fault> {
        let instance = Instance::create(api)?;
        let info = instance.device_info(index)?;
        let options = SpdOpenOptions {
            struct_size: struct_size::<SpdOpenOptions>(),
            n_threads: options.threads,
            mem_budget: options.budget,
            ..SpdOpenOptions::default()
        };
        let raw = instance.open(index, &options)?;
        let device = Rc::new(Device { api, raw, instance });
        Ok(Self { info, queue: Queue::create(&device)?, device })
    }

    pub(crate) fn api(&self) -> &'static SpdApi {
        self.device.api
    }

    pub(crate) fn instance(&self) -> &Instance {
        &self.device.instance
    }

    /// True when the device claims this `FEAT_*`.
    pub(crate) fn claims(&self, feature: u64) -> bool {
        self.info.features & feature != 0
    }

    /// True when the bit of `dtype` is set in one of the device's bitmaps.
    pub(crate) fn has_dtype(map: &[u64; 4], dtype: u32) -> bool {
        sparsed_abi::dtype_bit(dtype).is_some_and(|(word, mask)| map[word] & mask != 0)
    }

    pub(crate) fn mem_info(&self) -> Result<SpdMemInfo, Fault> {
        let ask = entry!(self.api(), mem_info);
        let mut info = SpdMemInfo { struct_size: struct_size::<SpdMemInfo>(), ..SpdMemInfo::default() };
        // SAFETY: a living device; the struct says its size.
        call("mem_info", |e| unsafe { ask(self.device.raw, &raw mut info, e) })?;
        Ok(info)
    }

    /// A committed weight.
    pub(crate) fn weight(&self, dtype: u32, shape: (u32, u64, u64), bytes: &[u8]) -> Result<Weight, Fault> {
        let weight = Weight::create(&self.device, &super::weight_desc(dtype, shape))?;
        weight.upload(0, shape.0, bytes)?;
        weight.commit()?;
        Ok(weight)
    }

    pub(crate) fn pool(&self, desc: &SpdKvDesc) -> Result<Pool, Fault> {
        Pool::create(&self.device, desc)
    }

    pub(crate) fn compile(
        &self,
        blob: &Blob,
        weights: Vec<Rc<Weight>>,
        pool: Option<&Rc<Pool>>,
        bucket: SpdBucket,
    ) -> Result<Plan, Fault> {
        Plan::compile(&self.device, blob, weights, pool.cloned(), bucket)
    }
}
