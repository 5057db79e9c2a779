//! What does a compilation wait for? Settings `late_compile` and `hang_compile`, for all but the first one.

use crate::{PLANTED, RUNS, real};
use sparsed_abi::{SpdCompile, SpdDevice, SpdError, SpdPlan, SpdPlanInfo, SpdStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::Thread;

static COMPILATIONS: AtomicU64 = AtomicU64::new(0);
/// The thread that waits in a compilation.
static WAITING: Mutex<Option<Thread>> = Mutex::new(None);

/// A step was taken.
pub(crate) fn stepped() {
    if let Some(thread) = WAITING.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
        thread.unpark();
    }
}

pub(crate) unsafe extern "C" fn plan_compile(
    device: *mut SpdDevice,
    compile: *const SpdCompile,
    out: *mut *mut SpdPlan,
    info: *mut SpdPlanInfo,
    error: *mut SpdError,
) -> SpdStatus {
    let planted = PLANTED.get().expect("set by instance_create");
    if COMPILATIONS.fetch_add(1, Ordering::Relaxed) > 0 {
        let until = RUNS.load(Ordering::Relaxed) + planted.late_compile;
        *WAITING.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        while planted.hangs_in_compile || RUNS.load(Ordering::Relaxed) < until {
            std::thread::park();
        }
    }
    let call = real().plan_compile.expect("a whole table");
    // SAFETY: as we were called.
    unsafe { call(device, compile, out, info, error) }
}
