//! Allocations and copies.

use super::{INVALID_VALUE, OUT_OF_MEMORY, bound, has_zero_flags, host_bytes, put, stream};
use crate::streams::Operation;
use std::ffi::{c_int, c_uchar, c_uint, c_void};

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    bound(|machine| {
        put(free, machine.faults.memory.saturating_sub(machine.memory.used) as usize)?;
        put(total, machine.faults.memory as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    bound(|machine| {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if machine.is_out_of_memory() {
            return Err(OUT_OF_MEMORY);
        }
        let limit = machine.faults.memory;
        put(address, machine.memory.allocate(bytes, limit).ok_or(OUT_OF_MEMORY)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    bound(|machine| if machine.memory.free(address) { Ok(()) } else { Err(INVALID_VALUE) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(memory: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int {
    bound(|machine| {
        if bytes == 0 || flags > 7 {
            return Err(INVALID_VALUE);
        }
        if machine.is_out_of_memory() {
            return Err(OUT_OF_MEMORY);
        }
        put(memory, machine.memory.pin(bytes).ok_or(OUT_OF_MEMORY)? as *mut c_void)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(memory: *mut c_void) -> c_int {
    bound(|machine| if machine.memory.unpin(memory as u64) { Ok(()) } else { Err(INVALID_VALUE) })
}

/// With unified addressing the device's address is the host's.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostGetDevicePointer_v2(address: *mut u64, memory: *mut c_void, flags: c_uint) -> c_int {
    bound(|machine| {
        has_zero_flags(flags)?;
        if machine.memory.is_pinned(memory as u64, 1) { put(address, memory as u64) } else { Err(INVALID_VALUE) }
    })
}

/// Pageable memory goes through a buffer of the driver's: read now, written when the default stream comes to it.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> c_int {
    bound(|machine| {
        machine.memory.read(to, bytes).map_err(|_| INVALID_VALUE)?;
        let bytes = host_bytes(from, bytes)?;
        stream(machine, std::ptr::null_mut())?.push_back(Operation::Bytes { to, bytes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, queue: *mut c_void) -> c_int {
    bound(|machine| {
        let from = from as u64;
        if !machine.memory.is_pinned(from, bytes) || machine.memory.read(to, bytes).is_err() {
            return Err(INVALID_VALUE);
        }
        stream(machine, queue)?.push_back(Operation::CopyIn { to, from, bytes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, queue: *mut c_void) -> c_int {
    bound(|machine| {
        let to = to as u64;
        if !machine.memory.is_pinned(to, bytes) || machine.memory.read(from, bytes).is_err() {
            return Err(INVALID_VALUE);
        }
        stream(machine, queue)?.push_back(Operation::CopyOut { to, from, bytes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, queue: *mut c_void) -> c_int {
    bound(|machine| {
        if bytes == 0 || machine.memory.read(from, bytes).is_err() || machine.memory.read(to, bytes).is_err() {
            return Err(INVALID_VALUE);
        }
        stream(machine, queue)?.push_back(Operation::Copy { to, from, bytes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: c_uchar, n: usize, queue: *mut c_void) -> c_int {
    bound(|machine| {
        if n == 0 || machine.memory.read(to, n).is_err() {
            return Err(INVALID_VALUE);
        }
        stream(machine, queue)?.push_back(Operation::Bytes { to, bytes: vec![value; n] });
        Ok(())
    })
}
