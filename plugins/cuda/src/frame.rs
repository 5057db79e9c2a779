//! What does a step in flight occupy? Its arguments in pinned memory, its arenas on the device, its event.

use crate::driver::{Address, Context, Event, PinnedMemory};
use crate::ledger::Ledger;
use crate::memory::Counted;
use crate::place::ALIGN;
use sparsed_plugin_kit::{PluginError, Result, Usage};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Bytes in front of the pinned arenas: the word by which kernels learn that the step is cancelled.
const CANCEL_BYTES: usize = ALIGN as usize;

/// Where the parts of a frame begin, in bytes, on the device and, behind the cancel word, in pinned memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Rows that need logits; token ids begin at 0.
    pub(crate) rows: u64,
    pub(crate) input: u64,
    pub(crate) output: u64,
    pub(crate) end: u64,
}

/// Room for one step of a plan, or for the images of one call on a pool.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) event: Event,
    layout: Layout,
    device: Counted,
    pinned: PinnedMemory,
    cancel: Address,
    is_taken: AtomicBool,
    /// Whose step it is.
    owner: Mutex<Weak<Ledger>>,
    scratch: Mutex<Scratch>,
}

/// Lists that a step fills without allocating.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The device address of each tensor; 0 for weights and views.
    pub(crate) addresses: Vec<Address>,
    /// What goes to the caller.
    pub(crate) outputs: Vec<Copied>,
}

/// Bytes that go from a frame's output part to the caller's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copied {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: u64,
    /// They are f32 values, among which a NaN can be.
    pub(crate) is_f32: bool,
}

impl Frame {
    /// A free frame, whose first `device_bytes` have memory on the device too.
    pub(crate) fn new(
        context: &Arc<Context>,
        usage: &Arc<Usage>,
        layout: Layout,
        device_bytes: u64,
        scratch: Scratch,
    ) -> Result<Self> {
        let bytes = usize::try_from(layout.end).map_err(|_| PluginError::invalid("arenas too large"))?;
        let pinned = PinnedMemory::new(context, CANCEL_BYTES + bytes)?;
        let device = Counted::allocate(context, usage, |u| &u.plans, device_bytes)?;
        // What an earlier owner of the device's memory has left must not come out of an output that nothing writes.
        device.zero(device_bytes)?;
        let (cancel, event) = (pinned.device_address()?, Event::new(context)?);
        let (is_taken, owner, scratch) = (AtomicBool::new(false), Mutex::new(Weak::new()), Mutex::new(scratch));
        Ok(Self { event, layout, device, pinned, cancel, is_taken, owner, scratch })
    }

    /// Takes the frame for a step of this queue, unless it is taken.
    pub(crate) fn take(&self, ledger: &Arc<Ledger>) -> bool {
        let is_ours = !self.is_taken.swap(true, Ordering::Acquire);
        if is_ours {
            *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(ledger);
            self.cancel_word().store(0, Ordering::Relaxed);
        }
        is_ours
    }

    pub(crate) fn release(&self) {
        self.is_taken.store(false, Ordering::Release);
    }

    /// The queue whose step it is or was.
    pub(crate) fn owner(&self) -> Option<Arc<Ledger>> {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    pub(crate) fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Where kernels read the cancel word.
    pub(crate) fn cancel_address(&self) -> Address {
        self.cancel
    }

    /// Not 0: kernels of this step that have not begun do nothing.
    pub(crate) fn cancel_word(&self) -> &AtomicU32 {
        // SAFETY: the pinned memory begins with a word that is only used as an atomic.
        unsafe { AtomicU32::from_ptr(self.pinned.as_ptr().cast()) }
    }

    /// The device address of byte `at`.
    pub(crate) fn address(&self, at: u64) -> Address {
        self.device.address() + at
    }

    /// The pinned byte that mirrors byte `at` of the device.
    pub(crate) fn host(&self, at: u64) -> NonNull<u8> {
        debug_assert!(at <= self.layout.end);
        // SAFETY: inside the pinned memory, which is longer than the layout.
        let at = unsafe { self.pinned.as_ptr().add(CANCEL_BYTES + at as usize) };
        NonNull::new(at).expect("an allocation is not NULL")
    }

    /// Writes `values` into pinned memory from byte `at` on.
    ///
    /// # Safety
    /// They fit between `at` and the layout's end; the frame is taken and its step not yet enqueued.
    pub(crate) unsafe fn stage<T: Copy>(&self, at: u64, values: &[T]) {
        let to = self.host(at).as_ptr();
        // SAFETY: the caller's contract; the sides do not overlap, since nobody else has the pinned memory.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), to, size_of_val(values)) };
    }

    /// A tensor of the output arena, `bytes` from `at` on.
    ///
    /// # Safety
    /// It lies inside the output arena; the frame is taken and its step is over.
    pub(crate) unsafe fn output(&self, at: u64, bytes: u64) -> &[u8] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts(self.host(self.layout.output + at).as_ptr(), bytes as usize) }
    }
}
