//! Which bytes do the daemon and a plugin host share? A sealed memory file per lane: a header, then one job's bytes.
//!
//! The daemon writes a job and then raises `submitted`; the host sees `submitted` and then reads the job, works, writes
//! the outcome and then raises `completed`; the daemon sees `completed` and then reads the outcome. One job is under
//! way at a time, so neither side touches what the other is writing. The host may break this rule: therefore the daemon
//! copies bytes in and out, never holds a reference to them, and believes no length but its own.

use super::bell::Counter;
use super::wire::Failure;
use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, SealFlags};
use std::io::{Error, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};

/// Where a job's bytes begin.
const BODY: usize = 1024;
/// Longest text of an outcome in bytes.
pub(super) const MESSAGE_BYTES_MAX: usize = 256;
/// Where the text of an outcome begins; it ends before the body.
const MESSAGE: usize = 512;
/// Parts of a job begin at multiples of this.
const ALIGN: usize = sparsed_abi::ARENA_ALIGN;

/// A job is a step.
pub(super) const KIND_RUN: u32 = 1;
/// A job is a list of KV operations.
pub(super) const KIND_KV: u32 = 2;

/// What one side tells the other. On two cache lines: what the daemon writes, and what the host does.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Header {
    /// The number of the last job given.
    pub(super) submitted: Counter,
    /// Not 0: the job is to end early.
    pub(super) cancel: AtomicU32,
    pub(super) kind: AtomicU32,
    /// The plan or the pool.
    pub(super) object: AtomicU32,
    _daemon_gap: u32,
    /// Bytes of the step or of the operations, of the input, and of the output or host images.
    pub(super) lengths: [AtomicU64; 3],
    _daemon_line: [u64; 2],
    /// The number of the last job done.
    pub(super) completed: Counter,
    /// Its outcome.
    pub(super) status: AtomicI32,
    pub(super) op_index: AtomicU32,
    pub(super) message_length: AtomicU32,
    pub(super) block: AtomicU32,
    pub(super) vendor_code: AtomicI64,
    _host_line: [u64; 4],
}
const _: () =
    assert!(size_of::<Header>() == 128 && size_of::<Header>() <= MESSAGE && MESSAGE + MESSAGE_BYTES_MAX <= BODY);

/// Where the three parts of a job lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    at: [usize; 3],
    lengths: [usize; 3],
    /// Bytes of an arena that has room for it.
    pub(super) total: usize,
}

impl Layout {
    /// `None` when the lengths have no sum.
    pub(super) fn of(lengths: [usize; 3]) -> Option<Self> {
        let mut at = [0; 3];
        let mut end = BODY;
        for (at, length) in at.iter_mut().zip(lengths) {
            *at = end;
            end = end.checked_add(length)?.checked_next_multiple_of(ALIGN)?;
        }
        Some(Self { at, lengths, total: end })
    }
}

/// The mapped memory file.
#[derive(Debug)]
pub(super) struct Arena {
    map: MmapRaw,
}

impl Arena {
    /// Makes one of `bytes`, and the descriptor for the other side. Nobody can change its size: a mapping past the end
    /// of a file would be a trap. Memory is taken as it is touched.
    pub(super) fn create(bytes: usize) -> Result<(Self, OwnedFd), Error> {
        let file = rustix::fs::memfd_create("sparsed-lane", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(&file, bytes)?, file))
    }

    /// Maps one that the other side made.
    pub(super) fn open(file: &OwnedFd, bytes: usize) -> Result<Self, Error> {
        let sealed = rustix::fs::fcntl_get_seals(file)?.contains(SealFlags::SHRINK);
        let size = rustix::fs::fstat(file)?.st_size;
        if !sealed || u64::try_from(size) != Ok(bytes as u64) {
            return Err(Error::new(ErrorKind::InvalidData, "an arena of another size, or without its seal"));
        }
        Self::map(file, bytes)
    }

    fn map(file: &OwnedFd, bytes: usize) -> Result<Self, Error> {
        if bytes < BODY {
            return Err(Error::new(ErrorKind::InvalidData, "an arena that is too small"));
        }
        Ok(Self { map: memmap2::MmapOptions::new().len(bytes).map_raw(file)? })
    }

    /// Bytes in all.
    pub(super) fn capacity(&self) -> usize {
        self.map.len()
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: a mapping begins at a page and is longer than the header; all-atomic fields may change at any time.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    /// Copies `from` to part `part` of a job.
    ///
    /// # Panics
    /// When the layout does not fit the arena, or `from` not the part.
    pub(super) fn write(&self, layout: &Layout, part: usize, from: &[u8]) {
        assert!(layout.total <= self.capacity() && from.len() == layout.lengths[part], "the lane was made for it");
        // SAFETY: the part lies inside the mapping, which no reference covers on this side.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.map.as_mut_ptr().add(layout.at[part]), from.len()) };
    }

    /// Copies part `part` of a job to `to`; whatever the other side is doing to it meanwhile, `to` is bytes.
    ///
    /// # Panics
    /// As [`Self::write`].
    pub(super) fn read(&self, layout: &Layout, part: usize, to: &mut [u8]) {
        assert!(layout.total <= self.capacity() && to.len() == layout.lengths[part], "the lane was made for it");
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.map.as_ptr().add(layout.at[part]), to.as_mut_ptr(), to.len()) };
    }

    /// Why the job failed, if its status says so.
    pub(super) fn failure(&self) -> Failure {
        let header = self.header();
        let number = |field: &AtomicU32| Some(field.load(Ordering::Relaxed)).filter(|&n| n != u32::MAX);
        Failure {
            status: header.status.load(Ordering::Relaxed),
            op_index: number(&header.op_index),
            block: number(&header.block),
            vendor_code: header.vendor_code.load(Ordering::Relaxed),
            message: self.message(),
        }
    }

    /// Leaves why the job failed.
    pub(super) fn set_failure(&self, failure: &Failure) {
        let header = self.header();
        header.status.store(failure.status, Ordering::Relaxed);
        header.op_index.store(failure.op_index.unwrap_or(u32::MAX), Ordering::Relaxed);
        header.block.store(failure.block.unwrap_or(u32::MAX), Ordering::Relaxed);
        header.vendor_code.store(failure.vendor_code, Ordering::Relaxed);
        self.set_message(&failure.message);
    }

    fn message(&self) -> String {
        let length = self.header().message_length.load(Ordering::Relaxed) as usize;
        let mut text = vec![0; length.min(MESSAGE_BYTES_MAX)];
        // SAFETY: the text lies between header and body, inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.map.as_ptr().add(MESSAGE), text.as_mut_ptr(), text.len()) };
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Cut to what there is room for.
    fn set_message(&self, text: &str) {
        let length = text.len().min(MESSAGE_BYTES_MAX);
        // SAFETY: as in `message`.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), self.map.as_mut_ptr().add(MESSAGE), length) };
        let length = u32::try_from(length).expect("cut above");
        self.header().message_length.store(length, Ordering::Relaxed);
    }

    /// The host's view of a job: step or operations, input, output.
    ///
    /// # Panics
    /// When the layout does not fit the arena.
    ///
    /// # Safety
    /// The daemon has submitted a job of this layout and it is not completed: until then the daemon leaves the body
    /// alone, and the caller holds no other view of it.
    #[expect(clippy::mut_from_ref, reason = "memory shared with another process has no owner here")]
    pub(super) unsafe fn job(&self, layout: &Layout) -> (&[u8], &[u8], &mut [u8]) {
        assert!(layout.total <= self.capacity(), "the daemon made the lane for it");
        let part = |n: usize| (self.map.as_mut_ptr().wrapping_add(layout.at[n]), layout.lengths[n]);
        let ((first, first_length), (input, input_length), (output, output_length)) = (part(0), part(1), part(2));
        // SAFETY: the parts lie inside the mapping and do not overlap; nobody else touches them, see above.
        unsafe {
            (
                std::slice::from_raw_parts(first, first_length),
                std::slice::from_raw_parts(input, input_length),
                std::slice::from_raw_parts_mut(output, output_length),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_one_side_writes_the_other_reads() {
        let layout = Layout::of([3, 0, 70]).unwrap();
        let (near, file) = Arena::create(layout.total).unwrap();
        let far = Arena::open(&file, layout.total).unwrap();
        near.write(&layout, 0, b"abc");
        near.header().submitted.raise(1, file.as_fd());
        assert_eq!(far.header().submitted.value(), 1);
        // SAFETY: submitted above, and this thread plays both sides.
        let (step, input, output) = unsafe { far.job(&layout) };
        assert_eq!((step, input.len(), output.len()), (&b"abc"[..], 0, 70));
        output.fill(7);
        let said = Failure { block: Some(4), vendor_code: -700, ..Failure::new(-9, "é".repeat(200)) };
        far.set_failure(&said);
        let mut out = [0; 70];
        near.read(&layout, 2, &mut out);
        assert_eq!(out, [7; 70]);
        let heard = near.failure();
        assert_eq!((heard.status, heard.op_index, heard.block, heard.vendor_code), (-9, None, Some(4), -700));
        assert_eq!(heard.message.len(), MESSAGE_BYTES_MAX);
    }

    #[test]
    fn nobody_can_shrink_an_arena() {
        let (_arena, file) = Arena::create(1 << 20).unwrap();
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        assert!(Arena::open(&file, 1 << 21).is_err());
    }

    #[test]
    fn lengths_without_a_sum_have_no_layout() {
        assert_eq!(Layout::of([usize::MAX, 1, 0]), None);
        assert!(Layout::of([0, 1, usize::MAX - 200]).is_none());
    }
}
