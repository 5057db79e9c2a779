//! What does the plugin call? The driver's functions, in files by what they are about.
//!
//! Every function first asks whether the library was initialised (3), whether the thread has the context (201) and
//! whether the context is dead (the sticky error), in that order, as the driver's reference describes them.
#![allow(non_snake_case, unreachable_pub, reason = "the driver's names, exported by name and not by path")]

mod device;
mod errors;
mod memory;
mod modules;
mod streams;

use crate::machine::{Machine, machine};
use crate::streams::{Event, Operation};
use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::{c_char, c_int, c_uint, c_void};

pub(super) const INVALID_VALUE: c_int = 1;
pub(super) const OUT_OF_MEMORY: c_int = 2;
pub(super) const NOT_INITIALIZED: c_int = 3;
pub(super) const INVALID_DEVICE: c_int = 101;
pub(super) const INVALID_CONTEXT: c_int = 201;
pub(super) const INVALID_PTX: c_int = 218;
pub(super) const INVALID_HANDLE: c_int = 400;
pub(super) const NOT_FOUND: c_int = 500;
pub(super) const NOT_READY: c_int = 600;
pub(super) const LAUNCH_OUT_OF_RESOURCES: c_int = 701;

thread_local! {
    /// The context that is current in this thread.
    pub(super) static CURRENT: Cell<u64> = const { Cell::new(0) };
}

pub(super) type Answer = Result<(), c_int>;

/// Runs the body of a function that needs no context.
pub(super) fn plain(body: impl FnOnce(&mut Machine) -> Answer) -> c_int {
    let mut machine = machine();
    let answer = if machine.is_initialised { body(&mut machine) } else { Err(NOT_INITIALIZED) };
    let code = answer.err().unwrap_or(0);
    if matches!(code, INVALID_VALUE | NOT_INITIALIZED | INVALID_CONTEXT | INVALID_HANDLE | NOT_FOUND) {
        machine.misuses += 1;
    }
    code
}

/// Runs the body of a function that needs the context.
pub(super) fn bound(body: impl FnOnce(&mut Machine) -> Answer) -> c_int {
    plain(|machine| {
        if machine.context == 0 || CURRENT.get() != machine.context {
            return Err(INVALID_CONTEXT);
        }
        if machine.sticky != 0 {
            return Err(machine.sticky);
        }
        body(machine)
    })
}

/// Writes to an out pointer.
pub(super) fn put<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's pointer, not NULL.
    unsafe { to.write(value) };
    Ok(())
}

pub(super) fn put_text(to: *mut c_char, length: c_int, text: &str) -> Answer {
    let length = usize::try_from(length).map_err(|_| INVALID_VALUE)?;
    if to.is_null() || text.len() >= length {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's buffer has `length` bytes, more than the text.
    let buffer = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), length) };
    buffer[..text.len()].copy_from_slice(text.as_bytes());
    buffer[text.len()] = 0;
    Ok(())
}

pub(super) fn device(device: c_int) -> Answer {
    if device == 0 { Ok(()) } else { Err(INVALID_DEVICE) }
}

pub(super) fn has_zero_flags(flags: c_uint) -> Answer {
    if flags == 0 { Ok(()) } else { Err(INVALID_VALUE) }
}

pub(super) fn stream(machine: &mut Machine, handle: *mut c_void) -> Result<&mut VecDeque<Operation>, c_int> {
    machine.streams.queues.get_mut(&(handle as u64)).ok_or(INVALID_HANDLE)
}

pub(super) fn event(machine: &mut Machine, handle: *mut c_void) -> Result<&mut Event, c_int> {
    machine.streams.events.get_mut(&(handle as u64)).filter(|event| !event.is_destroyed).ok_or(INVALID_HANDLE)
}

/// The bytes of `length` at `from`, which the host owns.
pub(super) fn host_bytes(from: *const c_void, length: usize) -> Result<Vec<u8>, c_int> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller says that so many bytes can be read.
    Ok(unsafe { std::slice::from_raw_parts(from.cast::<u8>(), length) }.to_vec())
}
