//! What can go wrong between the daemon and a plugin.

use crate::quarantine::{Left, Quarantined};
use sparsed_abi::{
    E_ABI, E_BUSY, E_CANCELLED, E_DATA, E_INVALID, E_NOMEM_DEVICE, E_NOMEM_HOST, E_QUEUE_LOST, E_STEP, E_UNSUPPORTED,
    SpdStatus, status_name,
};
use std::path::PathBuf;

/// Every failure of this crate. `Call` carries the plugin's own words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The pool cannot have a slow tier.
    #[error("no slow tier: {reason}")]
    Slow {
        /// Why not.
        reason: String,
    },
    /// No plugin was found, or none with the id asked for.
    #[error("no usable plugin{}: looked in {}{}", id.as_ref().map(|id| format!(" '{id}'")).unwrap_or_default(), searched.join(", "),
        if refused.is_empty() { "; run `make build`, or set plugins.dir".to_owned() } else { format!("; refused: {}", refused.join("; ")) })]
    NoPlugin {
        /// The id asked for, if any.
        id: Option<String>,
        /// The folders looked at.
        searched: Vec<String>,
        /// What was found there and refused, with the reason.
        refused: Vec<String>,
    },
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// `plugin.toml` does not say what it must.
    #[error("{}: {reason}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong, with the key.
        reason: String,
    },
    /// A file could have been written by somebody else.
    #[error("{}: {reason}; plugins and the folders above them must belong to root or to the daemon's user and be writable by nobody else", path.display())]
    Untrusted {
        /// The file or folder.
        path: PathBuf,
        /// Owner or mode.
        reason: String,
    },
    /// The library is not the one the manifest speaks of.
    #[error("{}: sha256 is {found}, plugin.toml says {expected}; stage the plugin again", path.display())]
    Checksum {
        /// The library.
        path: PathBuf,
        /// As the manifest has it.
        expected: String,
        /// As it is.
        found: String,
    },
    /// The library is not built as a plugin must be.
    #[error("{}: {reason}", path.display())]
    Elf {
        /// The library.
        path: PathBuf,
        /// The rule it breaks.
        reason: String,
    },
    /// No library of the plugin can run on this machine.
    #[error("{}: no library for this machine: {lacks}", path.display())]
    NoVariant {
        /// The manifest.
        path: PathBuf,
        /// What each library lacks.
        lacks: String,
    },
    /// The library has failed too often.
    #[error("plugin {} is quarantined for another {left} (time {}): {}; `sparsectl plugins unquarantine {}` lifts it",
        library.plugin, library.times, library.reason, library.plugin)]
    Quarantined {
        /// Which, and why.
        library: Quarantined,
        /// How long it lasts.
        left: Left,
    },
    /// The dynamic linker refused the library.
    #[error("{}: cannot be loaded: {reason}", path.display())]
    Load {
        /// The library.
        path: PathBuf,
        /// The linker's words.
        reason: String,
    },
    /// The library does not export the entry symbol.
    #[error("{}: does not export the symbol spd_get_api, so it is not a sparsed plugin", path.display())]
    MissingSymbol {
        /// The library.
        path: PathBuf,
    },
    /// The library speaks another version of the ABI.
    #[error("{}: speaks plugin ABI {found}, this daemon speaks {}.{}; build the plugin against this daemon's header",
        path.display(), sparsed_abi::ABI_MAJOR, sparsed_abi::ABI_MINOR)]
    AbiVersion {
        /// The library.
        path: PathBuf,
        /// What it speaks, as far as it says.
        found: String,
    },
    /// A mandatory function is missing from the table, or the table contradicts the manifest.
    #[error("{}: {reason}", path.display())]
    BadTable {
        /// The library.
        path: PathBuf,
        /// Which.
        reason: String,
    },
    /// A call into the plugin failed.
    #[error("{call}: {} ({}){}", message, status_name(*status), place(*op_index, *block, *vendor_code))]
    Call {
        /// The function of the ABI.
        call: &'static str,
        /// Its status.
        status: SpdStatus,
        /// The plugin's words.
        message: String,
        /// The operator that failed, if one did.
        op_index: Option<u32>,
        /// The block whose slow pages are bad, if one's are.
        block: Option<u32>,
        /// What the driver said, as a number of its own; 0: it said nothing.
        vendor_code: i64,
    },
    /// A plugin host has looked at the plugin and does not take it: it would not the next time either.
    #[error("plugin {plugin} in a process of its own: {reason}")]
    Refused {
        /// The plugin's id.
        plugin: String,
        /// Why.
        reason: String,
    },
    /// A plugin host could not be started, or died or hung as it was.
    #[error("plugin {plugin} in a process of its own: {reason}")]
    Host {
        /// The plugin's id.
        plugin: String,
        /// Why.
        reason: String,
    },
    /// The plugin has no such device.
    #[error("plugin {plugin} has {count} device(s), device {index} was asked for")]
    NoDevice {
        /// The plugin's id.
        plugin: String,
        /// How many it has.
        count: u32,
        /// Which was asked for.
        index: u32,
    },
    /// Bytes do not have the size that their description says.
    #[error("weight {name}: {found} bytes, but its description needs {expected}")]
    WeightSize {
        /// The weight.
        name: String,
        /// By its description.
        expected: u64,
        /// As given.
        found: u64,
    },
}

/// Where a call failed, as far as the plugin says.
fn place(op_index: Option<u32>, block: Option<u32>, vendor_code: i64) -> String {
    let mut place = op_index.map(|index| format!(" at operator {index}")).unwrap_or_default();
    if let Some(block) = block {
        place += &format!(", block {block}");
    }
    if vendor_code != 0 {
        place += &format!(", the driver's code {vendor_code}");
    }
    place
}

/// What a failure says about the device: from here the daemon decides what it tries next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The work was called off; nothing is broken.
    Cancelled,
    /// This step failed, or its numbers are no numbers; the queue can go on.
    Step,
    /// There was no memory for it.
    Memory,
    /// The queue is poisoned; another one of the same device may work.
    Queue,
    /// The device is gone, hangs or has contradicted itself: it has to be opened again.
    Device,
    /// What was asked for is refused, and would be again; the device is sound.
    Caller,
}

impl BackendError {
    /// The failure of a call that says no more than this.
    pub fn refused(call: &'static str, status: SpdStatus, message: String) -> Self {
        Self::Call { call, status, message, op_index: None, block: None, vendor_code: 0 }
    }

    /// What the failure says about the device.
    pub fn fault(&self) -> Fault {
        // A host that dies, hangs or talks nonsense before there is a device.
        if matches!(self, Self::Host { .. }) {
            return Fault::Device;
        }
        // Without a call there was no device yet: a file, a manifest or a table is not as it must be.
        let Some(status) = self.status() else { return Fault::Caller };
        match status {
            E_CANCELLED => Fault::Cancelled,
            // Nothing was taken, so it may be asked again.
            E_STEP | E_DATA | E_BUSY => Fault::Step,
            E_NOMEM_DEVICE | E_NOMEM_HOST => Fault::Memory,
            E_QUEUE_LOST => Fault::Queue,
            E_INVALID | E_UNSUPPORTED | E_ABI => Fault::Caller,
            // E_DEVICE_LOST, E_INTERNAL, a driver's trouble, and what no header knows.
            _ => Fault::Device,
        }
    }

    /// The plugin's status, when a call failed.
    pub fn status(&self) -> Option<SpdStatus> {
        if let Self::Call { status, .. } = self { Some(*status) } else { None }
    }

    /// The block whose pages in the slow tier are not what was written.
    pub fn bad_block(&self) -> Option<u32> {
        match self {
            Self::Call { status: E_DATA, block, .. } => *block,
            _ => None,
        }
    }

    /// True when a file or folder is not there.
    pub(crate) fn is_missing_file(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }

    /// True when the plugin says that it does not have what was asked for.
    pub fn is_unsupported(&self) -> bool {
        self.status() == Some(E_UNSUPPORTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{E_DEVICE_LOST, E_DRIVER, E_INTERNAL, E_TIMEOUT, NOT_READY};

    fn call(status: SpdStatus) -> BackendError {
        BackendError::refused("queue_run", status, String::new())
    }

    #[test]
    fn every_status_has_its_fault() {
        let table = [
            (Fault::Cancelled, &[E_CANCELLED][..]),
            (Fault::Step, &[E_STEP, E_DATA, E_BUSY]),
            (Fault::Memory, &[E_NOMEM_DEVICE, E_NOMEM_HOST]),
            (Fault::Queue, &[E_QUEUE_LOST]),
            (Fault::Device, &[E_DEVICE_LOST, E_INTERNAL, E_DRIVER, E_TIMEOUT, NOT_READY, -99]),
            (Fault::Caller, &[E_INVALID, E_UNSUPPORTED, E_ABI]),
        ];
        for (fault, statuses) in table {
            statuses.iter().for_each(|&status| assert_eq!(call(status).fault(), fault, "{}", status_name(status)));
        }
        assert_eq!(BackendError::MissingSymbol { path: PathBuf::new() }.fault(), Fault::Caller);
    }
}
