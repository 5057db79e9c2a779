//! How does a backend become a plugin without writing C?
//!
//! A plugin implements [`Plugin`] and [`Device`] in safe Rust; [`export_plugin!`] turns them into the one symbol and
//! the table of `plugin.h`. The kit keeps the border's rules: no panic leaves, struct sizes are checked, errors are
//! written into the caller's struct, handles are boxes that only this crate opens.
//!
//! A device that computes inside the call implements [`Synchronous`] and takes [`InOrder`] for its queue; one with
//! queues of its own implements [`Queue`].
#![allow(unsafe_code, reason = "the plugin's side of the C ABI")]

mod border;
mod queue;
pub mod slow;
mod table;
mod usage;

pub use border::{Host, PluginError, Run, Source, put_text, struct_size};
pub use queue::{InOrder, Queue, Synchronous};
pub use slow::{SlowArea, SlowMemory, SlowPlace};
pub use table::{instance, table};
pub use usage::{Held, Usage};

use sparsed_abi::{Program, SpdBucket, SpdDeviceInfo, SpdHealth, SpdKvDesc, SpdKvInfo, SpdMemInfo, SpdWeightDesc};
use std::any::Any;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Arc;

/// What one call answers.
pub type Result<T> = std::result::Result<T, PluginError>;

/// A plugin: who it is and which devices it has.
pub trait Plugin: Sized + Send + Sync + 'static {
    /// Equal to the manifest's id.
    const ID: &'static CStr;
    /// Equal to the manifest's version.
    const VERSION: &'static CStr;
    /// Its devices.
    type Device: Device;

    /// Called once; must be quick.
    ///
    /// # Errors
    /// Why the plugin cannot work here at all.
    fn create(host: Host) -> Result<Self>;

    /// How many devices there are. The first call that may load a vendor's libraries.
    ///
    /// # Errors
    /// Why there can be none: a library, a symbol or a driver that is missing or too old.
    fn device_count(&self) -> Result<u32>;

    /// What device `index` is; `struct_size` is filled by the kit.
    ///
    /// # Errors
    /// `SPD_E_INVALID` when there is no such device.
    fn device_info(&self, index: u32) -> Result<SpdDeviceInfo>;

    /// Opens device `index`.
    ///
    /// # Errors
    /// Why it cannot be opened.
    fn open(&self, index: u32, options: &OpenOptions) -> Result<Self::Device>;
}

/// How a device is opened; see `spd_open_options`.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Compute threads, 0: the plugin's choice.
    pub n_threads: u32,
    /// Hard cap in bytes, 0: none.
    pub mem_budget: u64,
    /// Affinity words, empty: the process's own mask.
    pub cpu_mask: Vec<u64>,
}

/// An open device. Methods are called as the header's tags allow.
pub trait Device: Sized + Send + Sync + 'static {
    /// A weight.
    type Weight: Send + Sync + 'static;
    /// A KV pool.
    type Pool: Send + Sync + 'static;
    /// A compiled program.
    type Plan: Send + Sync + 'static;
    /// A line of work.
    type Queue: Queue<Self>;

    /// Bytes in use and free.
    fn mem_info(&self) -> SpdMemInfo;

    /// How the device feels.
    fn health(&self) -> SpdHealth;

    /// Proves that the device computes.
    ///
    /// # Errors
    /// What came out wrong.
    fn self_test(&self, level: u32) -> Result<()>;

    /// Says whether operator `op` of `program` can be run.
    ///
    /// # Errors
    /// `SPD_E_UNSUPPORTED` and why.
    fn supports(&self, program: &Program, op: usize) -> Result<()>;

    /// Memory for arenas that the device reads faster than other memory, such as pinned memory: at least `length` zero
    /// bytes, aligned to `align`, a power of two. `None`, as it is without this, where ordinary memory is as good.
    ///
    /// # Errors
    /// No memory.
    fn host_alloc(&self, _length: usize, _align: usize) -> Result<Option<Box<dyn HostMemory>>> {
        Ok(None)
    }

    /// Lets the device reach `length` bytes of the daemon's at `memory`, until the answer is dropped; they live longer.
    ///
    /// # Errors
    /// `SPD_E_UNSUPPORTED`, as it is without this: arenas there are copied.
    fn host_register(&self, _memory: NonNull<u8>, _length: usize) -> Result<Box<dyn Any + Send>> {
        Err(PluginError::unsupported("host_register: this device reaches no memory of the host's"))
    }

    /// Makes room for a weight.
    ///
    /// # Errors
    /// An unknown dtype, or no memory.
    fn weight_create(&self, desc: &SpdWeightDesc) -> Result<Self::Weight>;

    /// Takes the bytes of `n_batch` matrices from `first_batch` on.
    ///
    /// # Errors
    /// A wrong length, or a source that cannot be read.
    fn weight_upload(&self, weight: &mut Self::Weight, first_batch: u32, n_batch: u32, source: Source) -> Result<()>;

    /// Ends the upload; the weight does not change any more.
    ///
    /// # Errors
    /// When a batch is missing.
    fn weight_commit(&self, weight: &mut Self::Weight) -> Result<()>;

    /// Makes a pool whose rows read as zero; `slow` is its slow tier (`desc.slow` is not to be followed).
    ///
    /// # Errors
    /// An unknown row format, or no memory.
    fn kv_create(&self, desc: &SpdKvDesc, slow: Option<SlowArea>) -> Result<(Self::Pool, SpdKvInfo)>;

    /// Compiles a program for steps up to `bucket` (component-wise largest of those asked for).
    ///
    /// # Errors
    /// Which operator is refused and why.
    fn compile(
        &self,
        program: Program,
        weights: Vec<Arc<Self::Weight>>,
        pools: Vec<Arc<Self::Pool>>,
        bucket: SpdBucket,
    ) -> Result<(Self::Plan, PlanSizes)>;

    /// What [`Self::compile`] would make, if only its sizes are asked for (`SPD_COMPILE_DRY_RUN`). Nothing of it may
    /// stay: without this a plan is made and dropped, which is not enough where weights are changed for it.
    ///
    /// # Errors
    /// Which operator is refused and why.
    fn plan_sizes(
        &self,
        program: Program,
        weights: Vec<Arc<Self::Weight>>,
        pools: Vec<Arc<Self::Pool>>,
        bucket: SpdBucket,
    ) -> Result<PlanSizes> {
        self.compile(program, weights, pools, bucket).map(|(_, sizes)| sizes)
    }

    /// Makes a queue; of several, the one with the higher priority goes first where the device knows such a thing.
    ///
    /// # Errors
    /// The device's own.
    fn queue(self: &Arc<Self>, priority: u32) -> Result<Self::Queue>;
}

/// Memory that both sides reach; freed when it is dropped.
///
/// # Safety
/// [`Self::as_ptr`] always answers the same address, where until the drop there are as many bytes, aligned so, as
/// [`Device::host_alloc`] was asked for, which nobody else uses.
pub unsafe trait HostMemory: Send {
    /// Where it begins.
    fn as_ptr(&self) -> NonNull<u8>;
}

/// What a plan needs, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanSizes {
    /// For tensors inside the plan.
    pub workspace: u64,
    /// The input arena of the largest step.
    pub input: u64,
    /// The output arena of the largest step.
    pub output: u64,
}

/// The version of the crate that says so, as a C string.
#[macro_export]
macro_rules! cargo_version {
    () => {
        match ::core::ffi::CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("the version has no NUL inside"),
        }
    };
}

/// Exports `$plugin` (a type that implements [`Plugin`]) as this library's plugin.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        static SPD_TABLE: $crate::abi::SpdApi = $crate::table::<$plugin>();

        /// The one symbol of the library; see `plugin.h`.
        #[unsafe(no_mangle)]
        pub extern "C" fn spd_get_api(abi_major: u32, _host_minor: u32) -> *const $crate::abi::SpdApi {
            if abi_major == $crate::abi::ABI_MAJOR { &raw const SPD_TABLE } else { ::core::ptr::null() }
        }
    };
}

#[doc(hidden)]
pub use sparsed_abi as abi;
