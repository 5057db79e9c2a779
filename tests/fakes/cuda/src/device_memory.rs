//! Where do device addresses lead? Allocations behind addresses that the host cannot touch, and pinned host memory.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::collections::BTreeMap;

/// Bytes of addresses that are reserved; they are never used twice.
const RESERVED: usize = 1 << 36;
/// Distance of allocations, and what the driver promises of their alignment at least.
const ALIGN: u64 = 256;
/// Bytes in front of and behind each allocation that nobody may change.
const CANARY: usize = 64;
const CANARY_BYTE: u8 = 0xc5;
/// What fresh device memory holds: NaNs, so that reading it is seen.
const FRESH_BYTE: u8 = 0xff;

/// The memory of the device, and pinned memory of the host.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    base: u64,
    next: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Address and bytes of pinned memory.
    pinned: BTreeMap<u64, usize>,
    pub(crate) used: u64,
    /// Allocations whose canary was found changed.
    pub(crate) overruns: u64,
}

/// An address where nothing, or not enough, is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wild;

impl DeviceMemory {
    pub(crate) fn new() -> Self {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping that nobody may touch; it is never unmapped.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), RESERVED, ProtFlags::empty(), flags) };
        let base = base.expect("addresses can be reserved") as u64;
        Self { base, next: 0, blocks: BTreeMap::new(), pinned: BTreeMap::new(), used: 0, overruns: 0 }
    }

    /// `bytes` of device memory, unless `limit` would be passed.
    pub(crate) fn allocate(&mut self, bytes: usize, limit: u64) -> Option<u64> {
        if bytes == 0 || self.used + bytes as u64 > limit {
            return None;
        }
        let address = self.base + self.next;
        // A gap behind each, so that the next address is not valid either.
        self.next += (bytes as u64).next_multiple_of(ALIGN) + ALIGN;
        let mut block = vec![CANARY_BYTE; bytes + 2 * CANARY];
        block[CANARY..CANARY + bytes].fill(FRESH_BYTE);
        self.blocks.insert(address, block);
        self.used += bytes as u64;
        Some(address)
    }

    /// Frees an allocation; false when it is none.
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let Some(block) = self.blocks.remove(&address) else { return false };
        let (front, back) = (&block[..CANARY], &block[block.len() - CANARY..]);
        if front.iter().chain(back).any(|&byte| byte != CANARY_BYTE) {
            self.overruns += 1;
        }
        self.used -= (block.len() - 2 * CANARY) as u64;
        true
    }

    pub(crate) fn live(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn live_pinned(&self) -> usize {
        self.pinned.len()
    }

    /// Pinned host memory, aligned to a page as the driver's is.
    pub(crate) fn pin(&mut self, bytes: usize) -> Option<u64> {
        let layout = std::alloc::Layout::from_size_align(bytes, 4096).ok().filter(|layout| layout.size() > 0)?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc(layout) };
        (!memory.is_null()).then(|| {
            self.pinned.insert(memory as u64, bytes);
            memory as u64
        })
    }

    /// Frees pinned memory; false when it is none.
    pub(crate) fn unpin(&mut self, address: u64) -> bool {
        let Some(bytes) = self.pinned.remove(&address) else { return false };
        let layout = std::alloc::Layout::from_size_align(bytes, 4096).expect("was valid in pin");
        // SAFETY: allocated in pin with this layout, and forgotten now.
        unsafe { std::alloc::dealloc(address as *mut u8, layout) };
        true
    }

    /// True when pinned memory has these bytes.
    pub(crate) fn is_pinned(&self, address: u64, bytes: usize) -> bool {
        let before = self.pinned.range(..=address).next_back();
        before.is_some_and(|(&start, &length)| address - start + bytes as u64 <= length as u64)
    }

    /// `bytes` at a device address, or at the mapped address of pinned memory, as a kernel reads them.
    pub(crate) fn read(&self, address: u64, bytes: usize) -> Result<&[u8], Wild> {
        if self.is_pinned(address, bytes) {
            // SAFETY: inside pinned memory. The host may write to it meanwhile, to words that it makes atomic; here
            // one thread at a time calls the driver, and it is the one that copies.
            return Ok(unsafe { std::slice::from_raw_parts(address as *const u8, bytes) });
        }
        let (start, block) = self.blocks.range(..=address).next_back().ok_or(Wild)?;
        let at = (address - start) as usize;
        let inside = at.checked_add(bytes).is_some_and(|end| end <= block.len() - 2 * CANARY);
        if inside { Ok(&block[CANARY + at..CANARY + at + bytes]) } else { Err(Wild) }
    }

    /// As [`Self::read`], to write.
    pub(crate) fn write(&mut self, address: u64, bytes: usize) -> Result<&mut [u8], Wild> {
        if self.is_pinned(address, bytes) {
            // SAFETY: as in `read`.
            return Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) });
        }
        let (start, block) = self.blocks.range_mut(..=address).next_back().ok_or(Wild)?;
        let at = (address - start) as usize;
        let inside = at.checked_add(bytes).is_some_and(|end| end <= block.len() - 2 * CANARY);
        if inside { Ok(&mut block[CANARY + at..CANARY + at + bytes]) } else { Err(Wild) }
    }
}
