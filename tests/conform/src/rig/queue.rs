//! How is work given to a queue and waited for?

use super::session::Device;
use super::{Fault, Plan, Pool, call, entry, struct_size};
use sparsed_abi::{ARENA_ALIGN, Blob, E_TIMEOUT, NOT_READY, SpdKvOp, SpdQueue, SpdRun};
use std::ptr;
use std::rc::Rc;

/// How long one wait lasts before it is asked again, in nanoseconds. The run's deadline ends a wait that never ends.
const WAIT_NS: u64 = 100_000_000;

/// Bytes that guard the end of an output arena.
const GUARD: [u8; ARENA_ALIGN] = [0xa5; ARENA_ALIGN];

/// Memory for INPUT or OUTPUT tensors, begun at a multiple of [`ARENA_ALIGN`].
#[derive(Clone, Debug)]
pub(crate) struct Arena {
    lines: Vec<Line>,
    length: usize,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through Arena's slices")] [u8; ARENA_ALIGN]);

impl Arena {
    /// `length` bytes of `value`, followed by a guard.
    pub(crate) fn filled(length: usize, value: u8) -> Self {
        let mut arena = Self { lines: vec![Line(GUARD); length.div_ceil(ARENA_ALIGN) + 1], length };
        arena.bytes_mut().fill(value);
        arena
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.all()[..self.length]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        // SAFETY: the lines are plain bytes without padding, as many as the vector has.
        let all = unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<u8>(), length) };
        &mut all[..length]
    }

    /// True when nothing was written past the end.
    pub(crate) fn is_guarded(&self) -> bool {
        self.all()[self.length..].iter().all(|&byte| byte == GUARD[0])
    }

    fn all(&self) -> &[u8] {
        // SAFETY: the lines are plain bytes without padding, as many as the vector has.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast::<u8>(), size_of_val(&self.lines[..])) }
    }
}

/// The arguments of one run.
#[derive(Debug)]
pub(crate) struct RunParts<'a> {
    pub(crate) step: &'a Blob,
    pub(crate) input: &'a Arena,
    pub(crate) output: &'a mut Arena,
    pub(crate) cancel: Option<&'a u32>,
}

impl RunParts<'_> {
    /// The struct of the border for these arguments.
    pub(crate) fn raw(&mut self) -> SpdRun {
        let output = self.output.bytes_mut();
        SpdRun {
            struct_size: struct_size::<SpdRun>(),
            step: self.step.as_bytes().as_ptr().cast(),
            input: self.input.bytes().as_ptr().cast(),
            in_length: self.input.bytes().len() as u64,
            out_length: output.len() as u64,
            out: output.as_mut_ptr().cast(),
            cancel: self.cancel.map_or(ptr::null(), ptr::from_ref),
            ..SpdRun::default()
        }
    }
}

/// An array of operations on blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvList {
    pub(crate) first: *const SpdKvOp,
    pub(crate) n: u32,
    pub(crate) stride: u32,
}

impl KvList {
    /// The operations one behind the other; they live as long as the list is used.
    fn of(ops: &[SpdKvOp]) -> Self {
        let n = u32::try_from(ops.len()).expect("a handful");
        Self { first: ops.as_ptr(), n, stride: struct_size::<SpdKvOp>() }
    }
}

/// A queue of the device.
#[derive(Debug)]
pub(crate) struct Queue {
    device: Rc<Device>,
    pub(crate) raw: *mut SpdQueue,
}

impl Queue {
    pub(crate) fn create(device: &Rc<Device>) -> Result<Self, Fault> {
        let (create, mut raw) = (entry!(device.api, queue_create), ptr::null_mut());
        // SAFETY: a living device; the out pointer lives through the call.
        call("queue_create", |e| unsafe { create(device.raw, 0, 0, &raw mut raw, e) })?;
        Ok(Self { device: Rc::clone(device), raw })
    }

    /// Runs a step and waits for its end; answers its timeline value.
    pub(crate) fn run(&self, plan: &Plan, mut parts: RunParts<'_>) -> Result<u64, Fault> {
        let raw = parts.raw();
        self.run_raw(plan, &raw)
    }

    pub(crate) fn run_raw(&self, plan: &Plan, raw: &SpdRun) -> Result<u64, Fault> {
        let timeline = self.begin(plan, raw)?;
        self.wait(timeline)?;
        Ok(timeline)
    }

    /// Gives the queue a step, whose output arena lives until the value that is answered has completed.
    pub(crate) fn begin(&self, plan: &Plan, raw: &SpdRun) -> Result<u64, Fault> {
        let (run, mut timeline) = (entry!(self.device.api, queue_run), 0);
        // SAFETY: living handles; step and arenas live as long as they must.
        call("queue_run", |e| unsafe { run(self.raw, plan.raw, raw, &raw mut timeline, e) })?;
        Ok(timeline)
    }

    /// Works on blocks and waits for the end.
    pub(crate) fn kv(&self, pool: &Pool, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64, Fault> {
        self.kv_raw(pool, KvList::of(ops), host)
    }

    /// Gives the queue work on blocks; `host` lives until the value that is answered has completed.
    pub(crate) fn begin_kv(&self, pool: &Pool, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64, Fault> {
        self.begin_kv_raw(pool, KvList::of(ops), host)
    }

    /// As [`Self::kv`], from an array of any stride that lives through the call.
    pub(crate) fn kv_raw(&self, pool: &Pool, list: KvList, host: &mut [u8]) -> Result<u64, Fault> {
        let timeline = self.begin_kv_raw(pool, list, host)?;
        self.wait(timeline)?;
        Ok(timeline)
    }

    fn begin_kv_raw(&self, pool: &Pool, list: KvList, host: &mut [u8]) -> Result<u64, Fault> {
        let (kv, mut timeline) = (entry!(self.device.api, queue_kv), 0);
        call("queue_kv", |e| {
            let (length, host) = (host.len() as u64, host.as_mut_ptr().cast());
            // SAFETY: living handles; operations and buffer live until the work has been waited for.
            unsafe { kv(self.raw, pool.raw, list.first, list.n, list.stride, host, length, &raw mut timeline, e) }
        })?;
        Ok(timeline)
    }

    pub(crate) fn wait(&self, timeline: u64) -> Result<(), Fault> {
        loop {
            match self.wait_once(timeline, WAIT_NS) {
                Err(fault) if matches!(fault.status, E_TIMEOUT | NOT_READY) => {}
                done => return done,
            }
        }
    }

    /// As [`Self::wait`], for this time only.
    pub(crate) fn wait_once(&self, timeline: u64, timeout_ns: u64) -> Result<(), Fault> {
        let wait = entry!(self.device.api, queue_wait);
        // SAFETY: a living queue.
        call("queue_wait", |e| unsafe { wait(self.raw, timeline, timeout_ns, e) })
    }

    pub(crate) fn cancel(&self, from: u64) -> Result<(), Fault> {
        let cancel = entry!(self.device.api, queue_cancel);
        // SAFETY: a living queue.
        call("queue_cancel", |e| unsafe { cancel(self.raw, from, e) })
    }

    pub(crate) fn completed(&self) -> Result<u64, Fault> {
        let (query, mut completed) = (entry!(self.device.api, queue_query), 0);
        // SAFETY: a living queue; the out pointer lives through the call.
        call("queue_query", |e| unsafe { query(self.raw, &raw mut completed, e) })?;
        Ok(completed)
    }

    pub(crate) fn wait_for(&self, other: &Self, timeline: u64) -> Result<(), Fault> {
        let wait = entry!(self.device.api, queue_wait_queue);
        // SAFETY: living queues.
        call("queue_wait_queue", |e| unsafe { wait(self.raw, other.raw, timeline, e) })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: everything given to the queue has been waited for.
        unsafe { entry!(self.device.api, queue_destroy)(self.raw) };
    }
}
