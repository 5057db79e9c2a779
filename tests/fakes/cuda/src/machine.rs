//! What does the fake remember? One machine a copy, behind one lock.

use crate::device_memory::DeviceMemory;
use crate::faults::Faults;
use crate::launches::Image;
use crate::streams::Streams;
use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// The first handle; the host cannot touch what it points to.
const HANDLE_FIRST: u64 = 0x1000;

/// The driver and its one device.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) faults: Faults,
    pub(crate) is_initialised: bool,
    pub(crate) memory: DeviceMemory,
    pub(crate) streams: Streams,
    pub(crate) modules: BTreeMap<u64, Image>,
    /// Module and name of each function that was asked for.
    pub(crate) functions: BTreeMap<u64, (u64, String)>,
    /// How often the primary context is retained, and its handle.
    pub(crate) retained: u64,
    pub(crate) context: u64,
    /// The error after which there is no other answer.
    pub(crate) sticky: i32,
    pub(crate) allocations: u64,
    pub(crate) launches: u64,
    pub(crate) records: u64,
    /// Kernels that have begun.
    pub(crate) executed: u64,
    /// Of those, the ones that found themselves cancelled.
    pub(crate) skipped: u64,
    /// Calls that were wrong in themselves: an answer of 1, 201, 400 or 500.
    pub(crate) misuses: u64,
    next_handle: u64,
}

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| {
    let faults = Faults::from_environment();
    Mutex::new(Machine {
        is_initialised: false,
        memory: DeviceMemory::new(),
        streams: Streams::new(faults.seed),
        modules: BTreeMap::new(),
        functions: BTreeMap::new(),
        retained: 0,
        context: 0,
        sticky: 0,
        allocations: 0,
        launches: 0,
        records: 0,
        executed: 0,
        skipped: 0,
        misuses: 0,
        next_handle: HANDLE_FIRST,
        faults,
    })
});

/// The machine of this copy.
pub(crate) fn machine() -> MutexGuard<'static, Machine> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// A handle that nothing has had before.
    pub(crate) fn handle(&mut self) -> u64 {
        self.next_handle += 16;
        self.next_handle
    }

    /// True when this allocation is to fail.
    pub(crate) fn is_out_of_memory(&mut self) -> bool {
        self.allocations += 1;
        self.allocations == self.faults.oom_at
    }

    /// A counter by name.
    pub(crate) fn counter(&self, name: &str) -> Option<u64> {
        let n = |n: usize| n as u64;
        Some(match name {
            "allocations" => self.allocations,
            "launches" => self.launches,
            "records" => self.records,
            "executed" => self.executed,
            "skipped" => self.skipped,
            "misuses" => self.misuses,
            "overruns" => self.memory.overruns,
            "live_device" => n(self.memory.live()),
            "live_pinned" => n(self.memory.live_pinned()),
            "live_streams" => n(self.streams.queues.len() - 1),
            "live_events" => n(self.streams.events.values().filter(|event| !event.is_destroyed).count()),
            "live_modules" => n(self.modules.len()),
            "retained" => self.retained,
            "used" => self.memory.used,
            _ => return None,
        })
    }
}
