//! Streams and events.

use super::{INVALID_HANDLE, INVALID_VALUE, NOT_READY, OUT_OF_MEMORY, bound, event, has_zero_flags, put, stream};
use crate::streams::{Event, Operation};
use std::collections::VecDeque;
use std::ffi::{c_int, c_uint, c_void};

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreateWithPriority(queue: *mut *mut c_void, flags: c_uint, priority: c_int) -> c_int {
    bound(|machine| {
        if flags > 1 || !(-5..=0).contains(&priority) {
            return Err(INVALID_VALUE);
        }
        let handle = machine.handle();
        machine.streams.queues.insert(handle, VecDeque::new());
        put(queue, handle as *mut c_void)
    })
}

/// The driver lets the work end first; here, work that is left is a misuse.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(queue: *mut c_void) -> c_int {
    bound(|machine| {
        if queue.is_null() {
            return Err(INVALID_HANDLE);
        }
        if !stream(machine, queue)?.is_empty() {
            machine.misuses += 1;
        }
        machine.streams.queues.remove(&(queue as u64));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(queue: *mut c_void, handle: *mut c_void, flags: c_uint) -> c_int {
    bound(|machine| {
        has_zero_flags(flags)?;
        let record = event(machine, handle)?.recorded;
        stream(machine, queue)?.push_back(Operation::Wait { event: handle as u64, record });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(out: *mut *mut c_void, flags: c_uint) -> c_int {
    bound(|machine| {
        if flags > 3 {
            return Err(INVALID_VALUE);
        }
        let handle = machine.handle();
        machine.streams.events.insert(handle, Event::default());
        put(out, handle as *mut c_void)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(handle: *mut c_void, queue: *mut c_void) -> c_int {
    bound(|machine| {
        machine.records += 1;
        if machine.records == machine.faults.unrecorded_at {
            return Err(OUT_OF_MEMORY);
        }
        let recorded = event(machine, handle)?;
        recorded.recorded += 1;
        let record = recorded.recorded;
        stream(machine, queue)?.push_back(Operation::Record { event: handle as u64, record });
        Ok(())
    })
}

/// Here is where work is done.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(handle: *mut c_void) -> c_int {
    bound(|machine| {
        event(machine, handle)?;
        machine.progress();
        if machine.sticky != 0 {
            return Err(machine.sticky);
        }
        let state = event(machine, handle)?;
        if state.reached == state.recorded { Ok(()) } else { Err(NOT_READY) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(handle: *mut c_void) -> c_int {
    bound(|machine| {
        let state = event(machine, handle)?;
        state.is_destroyed = true;
        if state.reached == state.recorded {
            machine.streams.events.remove(&(handle as u64));
        }
        Ok(())
    })
}
