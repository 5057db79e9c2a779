//! Which device is there, which context is current, and what shall go wrong?

use super::{CURRENT, INVALID_CONTEXT, INVALID_VALUE, bound, device, plain, put, put_text};
use crate::machine::machine;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// Sets a fault of this copy; 1 when there is no such setting.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_cuda_set(key: *const c_char, value: u64) -> c_int {
    // SAFETY: the caller's C string.
    let key = unsafe { CStr::from_ptr(key) }.to_string_lossy();
    let mut machine = machine();
    if key == "seed" {
        machine.streams.reseed(value);
    }
    c_int::from(!machine.faults.set(&key, value))
}

/// A counter of this copy; `u64::MAX` when there is no such counter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_cuda_get(key: *const c_char) -> u64 {
    // SAFETY: the caller's C string.
    let key = unsafe { CStr::from_ptr(key) }.to_string_lossy();
    machine().counter(&key).unwrap_or(u64::MAX)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> c_int {
    let mut machine = machine();
    let code = c_int::try_from(machine.faults.init).unwrap_or(999);
    machine.is_initialised = code == 0 && flags == 0;
    if flags == 0 { code } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    plain(|machine| put(version, c_int::try_from(machine.faults.version).unwrap_or(0)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    plain(|_| put(count, 1))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(handle: *mut c_int, ordinal: c_int) -> c_int {
    plain(|_| device(ordinal).and_then(|()| put(handle, 0)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, handle: c_int) -> c_int {
    plain(|_| device(handle).and_then(|()| put_text(name, length, "Fake GPU")))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, length: c_int, handle: c_int) -> c_int {
    plain(|_| device(handle).and_then(|()| put_text(id, length, "0000:01:00.0")))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, handle: c_int) -> c_int {
    plain(|_| {
        device(handle)?;
        let known = match attribute {
            18 => 0, // INTEGRATED
            75 => 8, // COMPUTE_CAPABILITY_MAJOR
            76 => 7, // COMPUTE_CAPABILITY_MINOR
            _ => return Err(INVALID_VALUE),
        };
        put(value, known)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, handle: c_int) -> c_int {
    plain(|machine| device(handle).and_then(|()| put(bytes, machine.faults.memory as usize)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, handle: c_int) -> c_int {
    plain(|machine| {
        device(handle)?;
        if machine.sticky != 0 {
            return Err(machine.sticky);
        }
        if machine.retained == 0 {
            machine.context = machine.handle();
        }
        machine.retained += 1;
        put(context, machine.context as *mut c_void)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(handle: c_int) -> c_int {
    plain(|machine| {
        device(handle)?;
        machine.retained = machine.retained.checked_sub(1).ok_or(INVALID_CONTEXT)?;
        if machine.retained == 0 {
            machine.context = 0;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    plain(|machine| {
        if !context.is_null() && context as u64 != machine.context {
            return Err(INVALID_CONTEXT);
        }
        CURRENT.set(context as u64);
        Ok(())
    })
}

/// Blocks for ever behind a kernel that hangs, as the driver does.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    loop {
        let mut is_idle = false;
        let code = bound(|machine| {
            is_idle = !machine.step() && machine.streams.is_idle();
            if machine.sticky == 0 { Ok(()) } else { Err(machine.sticky) }
        });
        if code != 0 || is_idle {
            return code;
        }
        std::thread::yield_now();
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> c_int {
    bound(|_| put(least, 0).and_then(|()| put(greatest, -5)))
}
