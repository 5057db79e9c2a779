//! What is on the device, and how much of it is allowed? Weights, and bytes counted under one cap.

use crate::driver::{Address, Context, DeviceMemory};
use sparsed_abi::{DT_F16, DT_F32, SpdWeightDesc};
use sparsed_plugin_kit::{Held, PluginError, Result, Source, Usage};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Largest weight or arena in bytes; far more than a device has, and safe to add up.
pub(crate) const BYTES_MAX: u64 = 1 << 42;

/// Device memory that is counted in a [`Usage`] until dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    memory: DeviceMemory,
    held: Held,
}

impl Counted {
    /// Allocates `bytes` on the device, or refuses when the budget would be passed. `[control]`: calls do not overlap.
    ///
    /// # Errors
    /// `SPD_E_NOMEM_DEVICE`; nothing has changed then.
    pub(crate) fn allocate(
        context: &Arc<Context>,
        usage: &Arc<Usage>,
        kind: fn(&Usage) -> &AtomicU64,
        bytes: u64,
    ) -> Result<Self> {
        let held = usage.hold(kind, bytes)?;
        let length = usize::try_from(bytes).map_err(|_| PluginError::invalid(format!("{bytes} bytes")))?;
        Ok(Self { memory: DeviceMemory::new(context, length)?, held })
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address()
    }

    /// Zeroes the first `bytes`, no more than there are, and waits for it.
    ///
    /// # Errors
    /// The driver's own.
    pub(crate) fn zero(&self, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: no more than there are.
        unsafe { self.memory.zero(bytes.min(self.held.bytes()) as usize) }
    }

    /// Copies `from` to byte `at` on; see [`DeviceMemory::upload`].
    ///
    /// # Errors
    /// `SPD_E_INVALID` past the end, or the driver's own.
    pub(crate) fn upload(&self, at: u64, from: &[u8]) -> Result<()> {
        if at.checked_add(from.len() as u64).is_none_or(|end| end > self.held.bytes()) {
            return Err(PluginError::invalid("an upload past the end"));
        }
        let at = usize::try_from(at).map_err(|_| PluginError::invalid("an upload past the end"))?;
        // SAFETY: inside the memory, as checked.
        unsafe { self.memory.upload(at, from) }
    }
}

/// A weight: `batch` matrices `[rows, cols]` on the device.
#[derive(Debug)]
pub(crate) struct Weight {
    pub(crate) dtype: u32,
    pub(crate) batch: u64,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
    matrix_bytes: u64,
    memory: Counted,
    /// Which of the batch's matrices have been uploaded.
    uploaded: Vec<bool>,
}

impl Weight {
    pub(crate) fn create(desc: &SpdWeightDesc, context: &Arc<Context>, usage: &Arc<Usage>) -> Result<Self> {
        let value_bytes = match desc.dtype {
            DT_F16 => 2,
            DT_F32 => 4,
            dtype => {
                return Err(PluginError::unsupported(format!("weights of dtype {dtype}; this slice has F16 and F32")));
            }
        };
        if desc.flags != 0 {
            return Err(PluginError::unsupported(format!("weight flags {:#x}", desc.flags)));
        }
        let product = |a: u64, b: u64| a.checked_mul(b).filter(|&bytes| bytes <= BYTES_MAX);
        let matrix_bytes = product(desc.rows, desc.cols).and_then(|values| product(values, value_bytes));
        let total = matrix_bytes.and_then(|bytes| product(bytes, desc.batch.into()));
        let (Some(matrix_bytes), Some(total)) = (matrix_bytes, total) else {
            return Err(PluginError::invalid("a weight of more than 2^42 bytes"));
        };
        let memory = Counted::allocate(context, usage, |u| &u.weights, total)?;
        let uploaded = vec![false; desc.batch as usize];
        let (dtype, batch) = (desc.dtype, desc.batch.into());
        Ok(Self { dtype, batch, rows: desc.rows, cols: desc.cols, matrix_bytes, memory, uploaded })
    }

    pub(crate) fn upload(&mut self, first: u32, n: u32, source: Source) -> Result<()> {
        let (begin, count) = (first as usize, n as usize);
        let batch = self.uploaded.len();
        let range =
            begin.checked_add(count).and_then(|end| self.uploaded.get_mut(begin..end)).filter(|r| !r.is_empty());
        let range = range.ok_or_else(|| PluginError::invalid(format!("batches {first}..+{n} of {batch}")))?;
        let (bytes, expected) = (source.bytes(), self.matrix_bytes * u64::from(n));
        if bytes.len() as u64 != expected {
            let message = format!("{} bytes for {n} matrices of {}", bytes.len(), self.matrix_bytes);
            return Err(PluginError::invalid(message));
        }
        self.memory.upload(self.matrix_bytes * u64::from(first), bytes)?;
        range.fill(true);
        Ok(())
    }

    /// Ends the upload, of which every part has arrived.
    pub(crate) fn commit(&self, context: &Context) -> Result<()> {
        context.enter()?;
        match self.uploaded.iter().position(|uploaded| !uploaded) {
            Some(missing) => Err(PluginError::invalid(format!("matrix {missing} of the batch was not uploaded"))),
            None => Ok(()),
        }
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address()
    }
}
