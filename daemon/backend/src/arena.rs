//! Where do a step's inputs and outputs lie? In memory that the device gives, if it has such, else in ordinary memory.

use crate::call::checked;
use crate::device::Device;
use sparsed_abi::{ARENA_ALIGN, Blob};
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Bytes for the arenas of `plugin.h`, zero at first.
#[derive(Debug)]
pub struct Arena(Memory);

#[derive(Debug)]
enum Memory {
    Ordinary(Blob),
    Device(DeviceMemory),
}

/// Memory of `host_alloc`.
#[derive(Debug)]
struct DeviceMemory {
    base: NonNull<u8>,
    length: usize,
    device: Arc<Device>,
}

// SAFETY: memory that only this uses; it is freed under the plugin's lock.
unsafe impl Send for DeviceMemory {}

impl Arena {
    pub(crate) fn new(device: &Arc<Device>, length: usize) -> Self {
        let memory = DeviceMemory::new(device, length);
        Self(memory.map_or_else(|| Memory::Ordinary(Blob::zeroed(length)), Memory::Device))
    }

    /// All of it.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Ordinary(blob) => blob.as_bytes(),
            // SAFETY: `length` bytes that `new` has set, and that nobody changes while this is borrowed.
            Memory::Device(memory) => unsafe { std::slice::from_raw_parts(memory.base.as_ptr(), memory.length) },
        }
    }

    /// All of it, to be written.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Ordinary(blob) => blob.as_bytes_mut(),
            // SAFETY: as above.
            Memory::Device(memory) => unsafe { std::slice::from_raw_parts_mut(memory.base.as_ptr(), memory.length) },
        }
    }
}

impl Default for Arena {
    /// One without bytes.
    fn default() -> Self {
        Self(Memory::Ordinary(Blob::default()))
    }
}

impl DeviceMemory {
    /// `None` where the device gives none, for whatever reason: a device that is lost says so at its next step.
    fn new(device: &Arc<Device>, length: usize) -> Option<Self> {
        let alloc = device.api().host_alloc.expect("checked at load");
        let (raw, align, mut memory) = (device.raw.as_ptr(), ARENA_ALIGN as u64, ptr::null_mut::<c_void>());
        let control = device.plugin.control();
        // SAFETY: the device is alive; the out pointer and the error are ours.
        let given = checked("host_alloc", |e| unsafe { alloc(raw, length as u64, align, &raw mut memory, e) });
        drop(control); // what is given and cannot be used is freed under it
        if let Err(error) = given {
            let plugin = device.plugin.manifest().id.as_str();
            log::debug!(plugin, reason:% = error; "the device gives no memory for arenas");
            return None;
        }
        let memory = Self { base: NonNull::new(memory.cast())?, length, device: Arc::clone(device) };
        if !memory.base.addr().get().is_multiple_of(ARENA_ALIGN) {
            return None;
        }
        // SAFETY: the plugin has given so many bytes; the header does not say that they are set.
        unsafe { memory.base.as_ptr().write_bytes(0, length) };
        Some(memory)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _control = self.device.plugin.control();
        let free = self.device.api().host_free.expect("checked at load");
        // SAFETY: given by `host_alloc` of this device, which is alive; every call that was lent it has come back.
        unsafe { free(self.device.raw.as_ptr(), self.base.as_ptr().cast()) };
    }
}
