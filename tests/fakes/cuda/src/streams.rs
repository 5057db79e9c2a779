//! What waits, and what runs next? Streams of operations, done in the order that a seed gives.

use crate::device_memory::Wild;
use crate::launches::Launch;
use crate::machine::Machine;
use std::collections::{BTreeMap, VecDeque};

/// `CUDA_ERROR_ILLEGAL_ADDRESS`
const ILLEGAL_ADDRESS: i32 = 700;

/// Something in a stream.
#[derive(Debug)]
pub(crate) enum Operation {
    /// Bytes that were read when the copy was asked for, to a device address.
    Bytes {
        to: u64,
        bytes: Vec<u8>,
    },
    /// From pinned memory, read when the copy is done.
    CopyIn {
        to: u64,
        from: u64,
        bytes: usize,
    },
    /// To pinned memory.
    CopyOut {
        to: u64,
        from: u64,
        bytes: usize,
    },
    /// On the device.
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Launch(Launch),
    /// The event has this many records behind it.
    Record {
        event: u64,
        record: u64,
    },
    /// Goes on once the event has reached this record.
    Wait {
        event: u64,
        record: u64,
    },
}

/// Events count how often they were recorded, and how many of the records have been reached.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Event {
    pub(crate) recorded: u64,
    pub(crate) reached: u64,
    /// Destroyed, but a stream still waits for it.
    pub(crate) is_destroyed: bool,
}

/// All streams, by handle; 0 is the default stream.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) queues: BTreeMap<u64, VecDeque<Operation>>,
    pub(crate) events: BTreeMap<u64, Event>,
    random: u64,
}

impl Streams {
    pub(crate) fn new(seed: u64) -> Self {
        Self { queues: BTreeMap::from([(0, VecDeque::new())]), events: BTreeMap::new(), random: seed }
    }

    pub(crate) fn reseed(&mut self, seed: u64) {
        self.random = seed;
    }

    /// The next number of the generator (splitmix64: Steele, Lea and Flood 2014).
    pub(crate) fn random(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.queues.values().all(VecDeque::is_empty)
    }

    /// A stream whose first operation can be done.
    fn pick(&mut self) -> Option<u64> {
        let can_run = |queue: &VecDeque<Operation>| match queue.front() {
            Some(Operation::Wait { event, record }) => self.events.get(event).is_none_or(|e| e.reached >= *record),
            Some(Operation::Launch(launch)) => !launch.hangs,
            Some(_) => true,
            None => false,
        };
        let ready: Vec<u64> = self.queues.iter().filter(|(_, queue)| can_run(queue)).map(|(&id, _)| id).collect();
        (!ready.is_empty()).then(|| ready[self.random(ready.len())])
    }
}

impl Machine {
    /// Does some operations, none among the numbers that may come up.
    pub(crate) fn progress(&mut self) {
        for _ in 0..self.streams.random(4) {
            self.step();
        }
    }

    /// Does one operation; false when none can be done.
    pub(crate) fn step(&mut self) -> bool {
        if self.sticky != 0 {
            return false;
        }
        let Some(id) = self.streams.pick() else { return false };
        let queue = self.streams.queues.get_mut(&id).expect("was just picked");
        let operation = queue.pop_front().expect("has a first");
        match self.perform(operation) {
            Ok(()) => (),
            Err(Failure::Wild) => self.sticky = ILLEGAL_ADDRESS,
            Err(Failure::Code(code)) => self.sticky = code,
            Err(Failure::Hangs(launch)) => {
                self.streams.queues.get_mut(&id).expect("still there").push_front(Operation::Launch(launch));
            }
        }
        true
    }

    fn perform(&mut self, operation: Operation) -> Result<(), Failure> {
        match operation {
            Operation::Bytes { to, bytes } => self.memory.write(to, bytes.len())?.copy_from_slice(&bytes),
            Operation::CopyIn { to, from, bytes } => {
                self.pinned(from, bytes)?;
                let copied = self.memory.read(from, bytes)?.to_vec();
                self.memory.write(to, bytes)?.copy_from_slice(&copied);
            }
            Operation::CopyOut { to, from, bytes } => {
                self.pinned(to, bytes)?;
                let copied = self.memory.read(from, bytes)?.to_vec();
                self.memory.write(to, bytes)?.copy_from_slice(&copied);
            }
            Operation::Copy { to, from, bytes } => {
                let copied = self.memory.read(from, bytes)?.to_vec();
                self.memory.write(to, bytes)?.copy_from_slice(&copied);
            }
            Operation::Launch(mut launch) => {
                self.executed += 1;
                if self.executed == self.faults.lost_at {
                    return Err(Failure::Code(i32::try_from(self.faults.lost_code).unwrap_or(719)));
                }
                if self.executed == self.faults.hang_at {
                    launch.hangs = true;
                    return Err(Failure::Hangs(launch));
                }
                self.skipped += u64::from(!crate::kernels::run(&mut self.memory, &launch)?);
            }
            Operation::Record { event, record } => {
                if let Some(state) = self.streams.events.get_mut(&event) {
                    state.reached = state.reached.max(record);
                    if state.is_destroyed && state.reached == state.recorded {
                        self.streams.events.remove(&event);
                    }
                }
            }
            Operation::Wait { .. } => (),
        }
        Ok(())
    }

    /// Pinned memory may have been freed since the copy was asked for.
    fn pinned(&self, address: u64, bytes: usize) -> Result<(), Wild> {
        if self.memory.is_pinned(address, bytes) { Ok(()) } else { Err(Wild) }
    }
}

/// Why an operation did not come to its end.
enum Failure {
    Wild,
    Code(i32),
    Hangs(Launch),
}

impl From<Wild> for Failure {
    fn from(_: Wild) -> Self {
        Self::Wild
    }
}
