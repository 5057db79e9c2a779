//! How do pointer-free structs become bytes and back?

use crate::{
    SpdBucket, SpdDeviceInfo, SpdHealth, SpdKvInfo, SpdKvOp, SpdMemInfo, SpdOp, SpdProgram, SpdRow, SpdStep, SpdTensor,
    SpdWeightDesc,
};

/// A mirrored struct of integers and floats without padding: any bytes of its size are a value of it.
///
/// # Safety
/// The type has no padding, no pointer and no field with forbidden bit patterns.
pub unsafe trait Pod: Copy {}
// SAFETY: u32 fields only, 14 of them.
unsafe impl Pod for SpdProgram {}
// SAFETY: u32 x 4, i32 x 4, i64 (8-aligned at 32), i32 x 3, u32: 56 bytes without gaps.
unsafe impl Pod for SpdTensor {}
// SAFETY: 26 fields of 4 bytes each.
unsafe impl Pod for SpdOp {}
// SAFETY: u32 x 6, u64 (8-aligned at 24), u32 x 10: 72 bytes without gaps.
unsafe impl Pod for SpdStep {}
// SAFETY: u32 x 4, u64 x 3 (8-aligned at 16): 40 bytes without gaps.
unsafe impl Pod for SpdKvOp {}
// SAFETY: u32 x 4.
unsafe impl Pod for SpdBucket {}
// SAFETY: u32 x 2, 192 bytes of text, u32 x 6, u64 x 10 (8-aligned at 224), u32 x 6: 328 bytes without gaps.
unsafe impl Pod for SpdDeviceInfo {}
// SAFETY: 6 fields of 4 bytes, u64 x 2 (8-aligned at 24).
unsafe impl Pod for SpdHealth {}
// SAFETY: u32 x 2, u64 x 3.
unsafe impl Pod for SpdKvInfo {}
// SAFETY: u32 x 2, u64 x 8.
unsafe impl Pod for SpdMemInfo {}
// SAFETY: u32 x 2.
unsafe impl Pod for SpdRow {}
// SAFETY: u32 x 4, u64 x 2 (8-aligned at 16), 64 bytes of text.
unsafe impl Pod for SpdWeightDesc {}
// SAFETY: an integer.
unsafe impl Pod for u32 {}
// SAFETY: an integer.
unsafe impl Pod for u64 {}

/// The bytes of a slice of plain values.
pub fn bytes_of<T: Pod>(values: &[T]) -> &[u8] {
    // SAFETY: Pod has no padding, so every byte is initialised; the length is the slice's size in bytes.
    unsafe { core::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The bytes of a slice of plain values, to write to.
pub(crate) fn bytes_of_mut<T: Pod>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; any bytes written are a value of a Pod.
    unsafe { core::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The value at the start of `bytes`, if there are enough.
pub(crate) fn read_prefix<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: there are size_of::<T>() readable bytes; Pod takes any of them; unaligned is allowed here.
    Some(unsafe { core::ptr::read_unaligned(bytes.as_ptr().cast::<T>()) })
}

/// The value that `bytes` are; `None` when they are fewer or more than it has.
pub fn read_exact<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() == size_of::<T>() { read_prefix(bytes) } else { None }
}

/// The value in an element or header of exactly these bytes, written by a side that knows fewer or more fields: what is
/// missing reads as zero, what is unknown must be zero.
pub(crate) fn read_extended<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.iter().skip(size_of::<T>()).any(|&byte| byte != 0) {
        return None;
    }
    // SAFETY: Pod takes any bytes, zeros too.
    let mut value: T = unsafe { core::mem::zeroed() };
    let known = bytes.len().min(size_of::<T>());
    bytes_of_mut(core::slice::from_mut(&mut value))[..known].copy_from_slice(&bytes[..known]);
    Some(value)
}

/// `bytes` as a slice of `count` values, if they fit and are aligned.
pub(crate) fn cast_slice<T: Pod>(bytes: &[u8], count: usize) -> Option<&[T]> {
    let size = count.checked_mul(size_of::<T>())?;
    if bytes.len() < size || bytes.as_ptr().align_offset(align_of::<T>()) != 0 {
        return None;
    }
    // SAFETY: aligned, `count` values long by the check above, and Pod takes any bytes.
    Some(unsafe { core::slice::from_raw_parts(bytes.as_ptr().cast::<T>(), count) })
}
