//! How does work reach a device? Queues, of devices that compute inside the call and of devices that compute later.

use crate::{Device, PluginError, Result, Run};
use sparsed_abi::{E_INVALID, SpdKvOp};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A line of work on a device. `run` and `kv` are called by one thread at a time, the others by any.
///
/// Each piece of work gets a timeline value greater than any before it. Until that has completed, the memory behind
/// `run.output` and `host` stays valid for the queue to write; everything else is borrowed for the call only.
pub trait Queue<D: Device>: Send + Sync + 'static {
    /// Runs a step, or begins it.
    ///
    /// # Errors
    /// `SPD_E_INVALID` for a step that does not fit the plan; where work is done inside the call, what became of it.
    fn run(&self, plan: &Arc<D::Plan>, run: Run<'_>) -> Result<u64>;

    /// Works on blocks, or begins to.
    ///
    /// # Errors
    /// `SPD_E_INVALID` for a block or an offset out of range.
    fn kv(&self, pool: &Arc<D::Pool>, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64>;

    /// Lets work that comes from now on wait for `timeline` of `other`.
    ///
    /// # Errors
    /// A value that was never given.
    fn wait_queue(&self, other: &Self, timeline: u64) -> Result<()>;

    /// The greatest value that has completed, well or badly.
    fn completed(&self) -> u64;

    /// Waits until `timeline` has completed.
    ///
    /// # Errors
    /// What became of the work, `SPD_E_TIMEOUT` before that is known, `SPD_E_INVALID` for a value that was never given.
    fn wait(&self, timeline: u64, timeout: Duration) -> Result<()>;

    /// Ends work from this value on with `SPD_E_CANCELLED`, as soon as that can be.
    ///
    /// # Errors
    /// The device's own.
    fn cancel(&self, from: u64) -> Result<()>;
}

/// A device whose work is done when the call returns; its queue is [`InOrder`].
pub trait Synchronous: Device {
    /// Runs a step to its end.
    ///
    /// # Errors
    /// `SPD_E_INVALID` for a step that does not fit the plan, `SPD_E_CANCELLED`, `SPD_E_DATA`.
    fn run(&self, plan: &Self::Plan, run: Run<'_>) -> Result<()>;

    /// Copies, exports, imports or discards blocks.
    ///
    /// # Errors
    /// `SPD_E_INVALID` for a block or an offset out of range.
    fn kv(&self, pool: &Self::Pool, ops: &[SpdKvOp], host: &mut [u8]) -> Result<()>;
}

/// The queue of a [`Synchronous`] device.
#[derive(Debug)]
pub struct InOrder<D> {
    device: Arc<D>,
    done: AtomicU64,
}

impl<D> InOrder<D> {
    /// A queue on this device.
    pub fn new(device: &Arc<D>) -> Self {
        Self { device: Arc::clone(device), done: AtomicU64::new(0) }
    }

    fn next(&self) -> u64 {
        self.done.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl<D: Synchronous> Queue<D> for InOrder<D> {
    fn run(&self, plan: &Arc<D::Plan>, run: Run<'_>) -> Result<u64> {
        self.device.run(plan, run).map(|()| self.next())
    }

    fn kv(&self, pool: &Arc<D::Pool>, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64> {
        self.device.kv(pool, ops, host).map(|()| self.next())
    }

    fn wait_queue(&self, other: &Self, timeline: u64) -> Result<()> {
        other.wait(timeline, Duration::ZERO) // what has a value is done
    }

    fn completed(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn wait(&self, timeline: u64, _timeout: Duration) -> Result<()> {
        let done = self.completed();
        if timeline > done {
            return Err(PluginError::new(E_INVALID, format!("timeline {timeline} was never given, {done} was")));
        }
        Ok(())
    }

    fn cancel(&self, _from: u64) -> Result<()> {
        Ok(()) // nothing waits; a running step is cancelled through spd_run.cancel
    }
}
