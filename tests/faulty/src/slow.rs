//! What can be wrong with a slow tier? Faults of the setting `slow`.

use crate::{PLANTED, real, refuse};
use sparsed_abi::{
    E_DATA, E_DRIVER, KV_TO_SLOW, OK, SpdDevice, SpdError, SpdKvDesc, SpdKvInfo, SpdKvOp, SpdKvPool, SpdStatus,
};
use std::str::FromStr;

/// A fault of the slow tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlowFault {
    /// A step over a bad page says that it went well.
    Swallow,
    /// Blocks are read a page before where they lie.
    Shift,
    /// A pool with a slow tier wants to write a file of its own.
    Spill,
}

impl FromStr for SlowFault {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let all = [("swallow", Self::Swallow), ("shift", Self::Shift), ("spill", Self::Spill)];
        all.into_iter().find(|(own, _)| *own == name).map(|(_, fault)| fault).ok_or(())
    }
}

/// Whether this fault is planted.
fn has(fault: SlowFault) -> bool {
    PLANTED.get().is_some_and(|planted| planted.slow == Some(fault))
}

/// What a step's status becomes.
///
/// # Safety
/// `error` is NULL or the caller's own, filled by the library.
pub(crate) unsafe fn swallowed(status: SpdStatus, error: *mut SpdError) -> SpdStatus {
    // SAFETY: the caller's contract.
    let names_a_block = unsafe { error.as_ref() }.is_some_and(|error| error.block != u64::MAX);
    if status == E_DATA && names_a_block && has(SlowFault::Swallow) { OK } else { status }
}

/// The operations of a call as the library gets them, if they are others.
///
/// # Safety
/// `ops` has `count` elements that are `stride` bytes apart.
pub(crate) unsafe fn shifted(ops: *const SpdKvOp, count: u32, stride: u32) -> Option<Vec<SpdKvOp>> {
    if !has(SlowFault::Shift) || stride as usize != size_of::<SpdKvOp>() {
        return None;
    }
    let shift = |i: usize| {
        // SAFETY: the caller's contract; an element may lie at any address.
        let mut op = unsafe { ops.byte_add(i * stride as usize).read_unaligned() };
        op.slow_offset = op.slow_offset.saturating_sub(if op.kind == KV_TO_SLOW { 4096 } else { 0 });
        op
    };
    Some((0..count as usize).map(shift).collect())
}

pub(crate) unsafe extern "C" fn kv_create(
    device: *mut SpdDevice,
    desc: *const SpdKvDesc,
    out: *mut *mut SpdKvPool,
    info: *mut SpdKvInfo,
    error: *mut SpdError,
) -> SpdStatus {
    // SAFETY: the caller's struct; an older one's would be shorter, and no caller here is older.
    let is_slow = unsafe { desc.as_ref() }.is_some_and(|desc| !desc.slow.is_null());
    if is_slow && has(SlowFault::Spill) {
        let spill = std::env::temp_dir().join(format!("sparsed-faulty-{}", std::process::id()));
        if std::fs::write(&spill, b"rows").and_then(|()| std::fs::remove_file(&spill)).is_err() {
            // SAFETY: the caller's error.
            return unsafe { refuse(error, E_DRIVER, "nowhere to spill rows to") };
        }
    }
    let create = real().kv_create.expect("a whole table");
    // SAFETY: as we were called.
    unsafe { create(device, desc, out, info, error) }
}
