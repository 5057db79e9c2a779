//! Modules and launches.

use super::{INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, LAUNCH_OUT_OF_RESOURCES, NOT_FOUND, bound, put, stream};
use crate::launches::{Launch, fits, parse};
use crate::streams::Operation;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> c_int {
    bound(|machine| {
        if image.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: an image that is text ends with a NUL.
        let text = unsafe { CStr::from_ptr(image.cast()) }.to_str().map_err(|_| INVALID_PTX)?;
        let image = parse(text).filter(|_| machine.faults.real == 0).ok_or(INVALID_PTX)?;
        let handle = machine.handle();
        machine.modules.insert(handle, image);
        put(module, handle as *mut c_void)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: *mut c_void) -> c_int {
    bound(|machine| {
        let module = module as u64;
        machine.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        machine.functions.retain(|_, (owner, _)| *owner != module);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) -> c_int {
    bound(|machine| {
        let image = machine.modules.get(&(module as u64)).ok_or(INVALID_HANDLE)?;
        // SAFETY: the caller's C string.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| NOT_FOUND)?;
        let sizes = image.get(name).ok_or(NOT_FOUND)?;
        // The image and the host function must agree on the parameters, or numbers would be read where others lie.
        let (_, expected) = crate::kernels::find(name).ok_or(NOT_FOUND)?;
        if sizes != expected {
            return Err(INVALID_PTX);
        }
        let handle = machine.handle();
        machine.functions.insert(handle, (module as u64, name.to_owned()));
        put(function, handle as *mut c_void)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    queue: *mut c_void,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    bound(|machine| {
        let (module, name) = machine.functions.get(&(function as u64)).cloned().ok_or(INVALID_HANDLE)?;
        let is_plain =
            shared_bytes == 0 && extra.is_null() && !parameters.is_null() && (grid_z, block_y, block_z) == (1, 1, 1);
        if !is_plain || !fits((grid_x, grid_y, grid_z), (block_x, block_y, block_z)) {
            return Err(INVALID_VALUE);
        }
        machine.launches += 1;
        if machine.launches == machine.faults.refuse_at {
            return Err(LAUNCH_OUT_OF_RESOURCES);
        }
        let mut words = Vec::new();
        for (index, &size) in machine.modules[&module][&name].iter().enumerate() {
            // SAFETY: the caller has a pointer for each parameter of the image, to as many bytes as the image says.
            let bytes = unsafe { std::slice::from_raw_parts((*parameters.add(index)).cast::<u8>(), size) };
            let mut word = [0; 8];
            word[..size].copy_from_slice(bytes);
            words.push(u64::from_le_bytes(word));
        }
        let launch = Launch { name, grid: (grid_x, grid_y), threads: block_x, words, hangs: false };
        stream(machine, queue)?.push_back(Operation::Launch(launch));
        Ok(())
    })
}
