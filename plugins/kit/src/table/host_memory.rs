//! What lies in memory that the daemon fills and the device reads? Arenas: in memory of the device's own, in ordinary
//! memory where that is as good, and in memory of the daemon's that the device is let reach.

use super::{Err, open_device, put};
use crate::border::{PluginError, entry};
use crate::{Device, HostMemory, Result};
use sparsed_abi::{E_NOMEM_HOST, SpdDevice, SpdStatus};
use std::alloc::Layout;
use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Largest alignment: a huge page.
const ALIGN_MAX: u64 = 2 << 20;

/// What a device's arenas lie in, by address; freed with the device at the latest.
#[derive(Default)]
pub(super) struct Arenas {
    allocated: Mutex<HashMap<usize, Box<dyn HostMemory>>>,
    registered: Mutex<HashMap<usize, Box<dyn Any + Send>>>,
}

/// Ordinary memory.
struct Ordinary {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory that nobody else frees.
unsafe impl Send for Ordinary {}

// SAFETY: the allocation lives as long as this, and has the size and alignment of its layout.
unsafe impl HostMemory for Ordinary {
    fn as_ptr(&self) -> NonNull<u8> {
        self.base
    }
}

impl Ordinary {
    fn new(length: usize, align: usize) -> Result<Self> {
        let bad = |_| PluginError::invalid(format!("{length} bytes aligned to {align}"));
        let layout = Layout::from_size_align(length, align).map_err(bad)?;
        // SAFETY: the layout is not empty, see `alloc`.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) });
        let base = base.ok_or_else(|| PluginError::new(E_NOMEM_HOST, format!("{length} bytes")))?;
        Ok(Self { base, layout })
    }
}

impl Drop for Ordinary {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, not used again.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl Arenas {
    fn alloc<D: Device>(&self, device: &D, length: u64, align: u64) -> Result<NonNull<u8>> {
        let align = align.max(16);
        if !align.is_power_of_two() || align > ALIGN_MAX {
            return Err(PluginError::invalid(format!("{length} bytes aligned to {align}")));
        }
        let size = |n: u64| usize::try_from(n).map_err(|_| PluginError::invalid(format!("{length} bytes")));
        let (length, align) = (size(length.max(1))?, size(align)?);
        let memory = match device.host_alloc(length, align)? {
            Some(memory) => memory,
            None => Box::new(Ordinary::new(length, align)?),
        };
        let at = memory.as_ptr();
        lock(&self.allocated).insert(at.as_ptr() as usize, memory);
        Ok(at)
    }

    fn register<D: Device>(&self, device: &D, memory: *mut c_void, length: u64) -> Result<()> {
        let bad = || PluginError::invalid("host_register: no memory");
        let (at, length) = (NonNull::new(memory.cast::<u8>()), usize::try_from(length).ok().filter(|&n| n > 0));
        let (at, length) = at.zip(length).ok_or_else(bad)?;
        if lock(&self.registered).contains_key(&(memory as usize)) {
            return Err(PluginError::invalid("host_register: this memory is registered already"));
        }
        let registered = device.host_register(at, length)?;
        lock(&self.registered).insert(memory as usize, registered);
        Ok(())
    }
}

fn lock<T>(map: &Mutex<HashMap<usize, T>>) -> MutexGuard<'_, HashMap<usize, T>> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) unsafe extern "C" fn host_alloc<D: Device>(
    handle: *mut SpdDevice,
    length: u64,
    align: u64,
    out: *mut *mut c_void,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle.
        let open = unsafe { open_device::<D>(handle) }?;
        if out.is_null() {
            return Err(PluginError::invalid("the out pointer is NULL"));
        }
        let memory = open.arenas.alloc(&*open.device, length, align)?;
        // SAFETY: the caller's out pointer.
        unsafe { put(out, memory.as_ptr().cast()) }
    })
}

pub(super) unsafe extern "C" fn host_free<D: Device>(handle: *mut SpdDevice, memory: *mut c_void) {
    entry(std::ptr::null_mut(), || {
        // SAFETY: a living handle.
        let open = unsafe { open_device::<D>(handle) }?;
        let freed = lock(&open.arenas.allocated).remove(&(memory as usize));
        drop(freed); // outside the lock
        Ok(())
    });
}

pub(super) unsafe extern "C" fn host_register<D: Device>(
    handle: *mut SpdDevice,
    memory: *mut c_void,
    length: u64,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        // SAFETY: a living handle.
        let open = unsafe { open_device::<D>(handle) }?;
        open.arenas.register(&*open.device, memory, length)
    })
}

pub(super) unsafe extern "C" fn host_unregister<D: Device>(handle: *mut SpdDevice, memory: *mut c_void) {
    entry(std::ptr::null_mut(), || {
        // SAFETY: a living handle.
        let open = unsafe { open_device::<D>(handle) }?;
        let released = lock(&open.arenas.registered).remove(&(memory as usize));
        drop(released); // outside the lock
        Ok(())
    });
}
