//! Memory that the daemon fills and the device reads.

use super::{Err, put};
use crate::border::{PluginError, entry};
use sparsed_abi::{SpdDevice, SpdStatus};
use std::alloc::Layout;
use std::ffi::c_void;

/// Bytes in front of each host allocation that remember its layout.
const ALLOC_HEADER: usize = 4096;

pub(super) unsafe extern "C" fn host_alloc(
    _: *mut SpdDevice,
    length: u64,
    align: u64,
    out: *mut *mut c_void,
    e: Err,
) -> SpdStatus {
    entry(e, || {
        let bad = || PluginError::invalid(format!("{length} bytes aligned to {align}"));
        let align = usize::try_from(align.max(16)).map_err(|_| bad())?;
        let total = usize::try_from(length).ok().and_then(|n| n.checked_add(ALLOC_HEADER)).ok_or_else(bad)?;
        let layout =
            Layout::from_size_align(total, align).ok().filter(|l| l.align() <= ALLOC_HEADER).ok_or_else(bad)?;
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            return Err(PluginError::new(sparsed_abi::E_NOMEM_HOST, format!("{length} bytes")));
        }
        // SAFETY: the header has room for a Layout, and base is aligned to 16.
        unsafe { base.cast::<Layout>().write(layout) };
        // SAFETY: inside the allocation; the out pointer is the caller's.
        unsafe { put(out, base.add(ALLOC_HEADER).cast()) }
    })
}

pub(super) unsafe extern "C" fn host_free(_: *mut SpdDevice, memory: *mut c_void) {
    if !memory.is_null() {
        // SAFETY: the pointer came from host_alloc, so its header precedes it.
        let base = unsafe { memory.cast::<u8>().sub(ALLOC_HEADER) };
        // SAFETY: written by host_alloc.
        let layout = unsafe { base.cast::<Layout>().read() };
        // SAFETY: allocated with this layout, not used again.
        unsafe { std::alloc::dealloc(base, layout) };
    }
}

pub(super) unsafe extern "C" fn host_register(_: *mut SpdDevice, _: *mut c_void, _: u64, e: Err) -> SpdStatus {
    entry(e, || Err(PluginError::unsupported("host_register: this device reads the host's memory as it is")))
}

pub(super) unsafe extern "C" fn host_unregister(_: *mut SpdDevice, _: *mut c_void) {}
