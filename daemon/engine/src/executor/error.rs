//! Why does a model not run, and whose fault is it?

use sparsed_abi::E_NOMEM_DEVICE;
use sparsed_backend::{BackendError, Fault};
use sparsed_kv::{BlockId, KvError};
use sparsed_model::ModelError;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutorError {
    /// The model's fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device's or plugin's fault.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The pool is too small.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The device does not take a weight's dtype.
    #[error("tensor {name} has dtype {dtype}, which the device does not compute with")]
    Dtype {
        /// The tensor.
        name: String,
        /// `DT_*`
        dtype: u32,
    },
    /// A step is larger than what was compiled.
    #[error("a step of {have} tokens, at most {max} were compiled for")]
    StepTooLarge {
        /// Tokens of the step.
        have: usize,
        /// Tokens the plan takes.
        max: u32,
    },
    /// The plugin's host image is not what the program's rows take.
    #[error("the host image of a KV block is {have} bytes, its rows take {expected}")]
    Image {
        /// Bytes, as the plugin says.
        have: u64,
        /// Bytes of the rows.
        expected: u64,
    },
    /// The device gave logits that are not numbers.
    #[error("a logit is not a number")]
    NotANumber,
    /// The device does not pass its own examination.
    #[error("the device is of no use: {reason}")]
    Unfit {
        /// In its own words.
        reason: String,
    },
    /// The thread that was to have the device compile.
    #[error("no thread to compile it: {reason}")]
    NoThread {
        /// In the system's words.
        reason: String,
    },
    /// Steps fail, though the device finds nothing wrong with itself.
    #[error("steps failed for all their sequences ({failures} lately), and the device finds nothing wrong with itself")]
    Unreliable {
        /// How many within the time that counts.
        failures: usize,
    },
}

impl ExecutorError {
    /// The block whose rows in the slow tier are not what was written.
    pub(crate) fn bad_block(&self) -> Option<BlockId> {
        if let Self::Backend(error) = self { error.bad_block().map(BlockId) } else { None }
    }

    /// The plugin was not tried, for what it did before.
    pub(crate) fn is_quarantine(&self) -> bool {
        matches!(self, Self::Backend(BackendError::Quarantined { .. }))
    }

    /// The device has no room for what it was to hold.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Backend(error) if error.status() == Some(E_NOMEM_DEVICE))
    }

    pub(crate) fn is_not_a_number(&self) -> bool {
        matches!(self, Self::NotANumber)
    }

    /// What the failure says about the device.
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::Backend(error) => error.fault(),
            Self::NotANumber => Fault::Step,
            Self::Unfit { .. } | Self::Unreliable { .. } => Fault::Device,
            Self::Model(_)
            | Self::Kv(_)
            | Self::Dtype { .. }
            | Self::StepTooLarge { .. }
            | Self::Image { .. }
            | Self::NoThread { .. } => Fault::Caller,
        }
    }
}
