//! What became of the work? A queue's timeline: what is in flight, what has completed, what has failed.

use crate::driver::Context;
use crate::frame::{Copied, Frame};
use crate::plan::Plan;
use crate::pool::Pool;
use sparsed_abi::{E_CANCELLED, E_DATA, E_INVALID};
use sparsed_plugin_kit::{PluginError, Result};
use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Failures that are kept to be asked for: those of the last 1000 values at least, as `plugin.h` demands.
const FAILURES_KEPT: usize = 1024;

/// A queue's timeline. Any thread may move it on by looking at the events.
#[derive(Debug)]
pub(crate) struct Ledger {
    context: Arc<Context>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The greatest value that was given.
    given: u64,
    /// The greatest value that has completed.
    completed: u64,
    in_flight: VecDeque<Entry>,
    failures: BTreeMap<u64, PluginError>,
    /// Of values up to this one, failures have been forgotten.
    forgotten: u64,
}

/// A plan with its weights and workspace, or a pool.
#[derive(Debug)]
pub(crate) enum Object {
    Plan(#[expect(dead_code, reason = "only kept")] Arc<Plan>),
    Pool(#[expect(dead_code, reason = "only kept")] Arc<Pool>),
}

/// Work in flight.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) frame: Arc<Frame>,
    /// Kept alive until the work is over.
    pub(crate) _object: Object,
    /// The caller's output arena or image buffer; ours until the value completes.
    pub(crate) out: NonNull<u8>,
    /// A NaN in an output is a failure.
    pub(crate) guards_nan: bool,
    pub(crate) is_cancelled: bool,
    /// It was enqueued in part only.
    pub(crate) failure: Option<PluginError>,
}

// SAFETY: the output arena is written by whoever moves the ledger on, under its lock.
unsafe impl Send for Entry {}

impl Ledger {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self { context: Arc::clone(context), state: Mutex::default() }
    }

    /// Gives work that has been enqueued its value.
    pub(crate) fn push(&self, entry: Entry) -> u64 {
        let mut state = self.state();
        state.given += 1;
        state.in_flight.push_back(entry);
        state.given
    }

    /// Completes what is over; the context must be current. Answers the greatest value that has completed.
    pub(crate) fn advance(&self) -> u64 {
        let mut state = self.state();
        while let Some(entry) = state.in_flight.front() {
            let outcome = match entry.frame.event.is_over() {
                Ok(false) => break,
                Ok(true) => entry.finish(),
                Err(error) => Err(error),
            };
            // After a sticky error the frame's memory is never used again: nothing is enqueued on a lost device.
            entry.frame.release();
            state.in_flight.pop_front();
            state.completed += 1;
            if let Err(error) = outcome {
                let value = state.completed;
                state.failures.insert(value, error);
                if state.failures.len() > FAILURES_KEPT {
                    state.forgotten = state.failures.pop_first().map_or(0, |(value, _)| value);
                }
            }
        }
        state.completed
    }

    /// The greatest value that was given.
    pub(crate) fn given(&self) -> u64 {
        self.state().given
    }

    /// What became of `timeline`; `None` while it is in flight.
    pub(crate) fn outcome(&self, timeline: u64) -> Option<Result<()>> {
        let state = self.state();
        if timeline > state.given {
            let message = format!("timeline {timeline} was never given, {} was", state.given);
            return Some(Err(PluginError::new(E_INVALID, message)));
        }
        if timeline > state.completed {
            return None;
        }
        if let Some(failure) = state.failures.get(&timeline) {
            return Some(Err(failure.clone()));
        }
        if timeline <= state.forgotten {
            return Some(Err(PluginError::invalid(format!(
                "what became of timeline {timeline} is not known any more"
            ))));
        }
        Some(Ok(()))
    }

    /// The frame of `timeline` while it is in flight.
    pub(crate) fn frame(&self, timeline: u64) -> Option<Arc<Frame>> {
        let state = self.state();
        let index = timeline.checked_sub(state.completed + 1)?;
        state.in_flight.get(usize::try_from(index).ok()?).map(|entry| Arc::clone(&entry.frame))
    }

    /// Marks what is in flight from this value on: its kernels that have not begun do nothing, its outcome is
    /// `SPD_E_CANCELLED`.
    pub(crate) fn cancel(&self, from: u64) {
        let mut state = self.state();
        let first = from.saturating_sub(state.completed + 1);
        for entry in state.in_flight.iter_mut().skip(usize::try_from(first).unwrap_or(usize::MAX)) {
            entry.is_cancelled = true;
            entry.frame.cancel_word().store(1, Ordering::Relaxed);
        }
    }

    /// Lets what is in flight from this value on end as a failure that writes nothing to the caller's memory.
    pub(crate) fn void(&self, from: u64, why: &PluginError) {
        let mut state = self.state();
        let first = from.saturating_sub(state.completed + 1);
        for entry in state.in_flight.iter_mut().skip(usize::try_from(first).unwrap_or(usize::MAX)) {
            entry.failure.get_or_insert_with(|| why.clone());
        }
    }

    /// Keeps what is in flight from ever being freed: the device may still use it. Answers how many steps.
    pub(crate) fn abandon(&self) -> usize {
        let entries = std::mem::take(&mut self.state().in_flight);
        let n = entries.len();
        std::mem::forget(entries);
        n
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// What became of a step that is over; its outputs go to the caller.
    fn finish(&self) -> Result<()> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        if self.is_cancelled {
            return Err(PluginError::new(E_CANCELLED, "the work was cancelled"));
        }
        for &Copied { from, to, bytes, is_f32 } in &self.frame.scratch().outputs {
            // SAFETY: the frame is taken by this work, which is over; its list lies in its output part.
            let values = unsafe { self.frame.output(from, bytes) };
            let mut floats = values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            if self.guards_nan && is_f32 && floats.any(f32::is_nan) {
                return Err(PluginError::new(E_DATA, "a NaN in an output"));
            }
            // SAFETY: the caller's memory was long enough, and is the plugin's until the value completes.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.out.as_ptr().add(to as usize), values.len()) };
        }
        Ok(())
    }
}
