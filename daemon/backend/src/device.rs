//! Which device is it, and what does it have?

use crate::arena::Arena;
use crate::call::{checked, text};
use crate::limits::Limits;
use crate::memory::{KvDesc, KvPool, Weight, WeightUpload};
use crate::slow::{SlowArea, SlowSource};
use crate::{BackendError, Plan, Plugin, Queue};
use sparsed_abi::{
    Blob, DEV_CPU, DEV_GPU, DEV_NPU, FEAT_DETERMINISTIC, FEAT_HOST_WEIGHTS, FEAT_INVARIANT, FEAT_SLOW_FILE,
    FEAT_SLOW_HOST, FEAT_SLOW_SEALED, HEALTH_LOST, SpdApi, SpdBucket, SpdDevice, SpdDeviceInfo, SpdHealth, SpdMemInfo,
    SpdOpenOptions, dtype_bit,
};
use sparsed_plugin_kit::struct_size;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Most devices of a plugin that are listed.
const DEVICES_MAX: u32 = 64;

/// An open device. Cheap to clone; closed when the last weight, pool, plan and queue is gone.
#[derive(Clone, Debug)]
pub struct Backend {
    device: Arc<Device>,
}

/// The device behind all handles.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) raw: NonNull<SpdDevice>,
    pub(crate) plugin: Arc<Plugin>,
    info: DeviceInfo,
}

// SAFETY: `[control]` functions are called under the plugin's lock, the others may be called from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device says about itself.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The plugin's id.
    pub plugin: String,
    /// What kind of silicon.
    pub kind: DeviceKind,
    /// Stable over restarts.
    pub id: String,
    /// For people.
    pub name: String,
    /// Driver or, on a CPU, the instruction level in use.
    pub driver: String,
    /// 0: it cannot run here; of several plugins' the higher is preferred.
    pub score: u32,
    /// Bytes of memory, 0 when unknown.
    pub mem_total: u64,
    /// `FEAT_*` of the ABI.
    pub features: u64,
    /// Bitmap over dtype numbers: weights that LINEAR takes.
    weight_dtypes: [u64; sparsed_abi::DTYPE_WORDS],
    /// Most tokens in a step, 0 without a limit.
    pub max_tokens: u32,
    /// Most tokens in a sequence, 0 without a limit.
    pub max_context: u32,
    limits: Limits,
}

/// What kind of silicon computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The host's own cores.
    Cpu,
    /// A graphics processor.
    Gpu,
    /// A neural processor.
    Npu,
    /// Something newer than this daemon.
    Other(u32),
}

/// How a device is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Compute threads of a CPU plugin; 0 leaves it to the plugin.
    pub n_threads: u32,
    /// Hard cap in bytes for all the plugin allocates on the device; 0 for none.
    pub mem_budget: u64,
}

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryInfo {
    /// All of it that the daemon may hold.
    pub total: u64,
    /// Free now of that.
    pub free: u64,
    /// Held by uploaded weights (0 for weights read in place).
    pub used_weights: u64,
    /// Held by KV pools.
    pub used_kv: u64,
    /// Held by plans' workspaces.
    pub used_workspace: u64,
}

impl Backend {
    /// Opens device `index` of `plugin`.
    ///
    /// # Errors
    /// [`BackendError::NoDevice`], or the plugin's own.
    pub fn open(plugin: &Arc<Plugin>, index: u32, options: &OpenOptions) -> Result<Self, BackendError> {
        let count = plugin.device_count()?;
        if index >= count {
            return Err(BackendError::NoDevice { plugin: plugin.manifest().id.clone(), count, index });
        }
        let options = SpdOpenOptions {
            struct_size: struct_size::<SpdOpenOptions>(),
            n_threads: options.n_threads,
            mem_budget: options.mem_budget,
            ..SpdOpenOptions::default()
        };
        let control = plugin.control();
        let (api, instance, mut raw) = (plugin.api(), plugin.instance(), ptr::null_mut());
        let open = api.device_open.expect("checked at load");
        // SAFETY: the instance is alive; options live through the call; the out pointer and the error are ours.
        checked("device_open", |e| unsafe { open(instance, index, &raw const options, &raw mut raw, e) })?;
        let null = || BackendError::BadTable {
            path: plugin.path().to_owned(),
            reason: "device_open answered NULL".to_owned(),
        };
        let raw = NonNull::new(raw).ok_or_else(null)?;
        // Asked after opening: what a device says may depend on how it was opened.
        let info = device_info(plugin, api, index);
        drop(control);
        let device = |info| Arc::new(Device { raw, plugin: Arc::clone(plugin), info });
        match info {
            Ok(info) => Ok(Self { device: device(info) }),
            Err(error) => {
                let _control = plugin.control();
                // SAFETY: the device was just opened and nothing of it is in use.
                unsafe { api.device_close.expect("checked at load")(raw.as_ptr()) };
                Err(error)
            }
        }
    }

    /// What the device says about itself.
    pub fn info(&self) -> &DeviceInfo {
        &self.device.info
    }

    /// Memory as the driver sees it now.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn memory(&self) -> Result<MemoryInfo, BackendError> {
        let mut out = SpdMemInfo { struct_size: struct_size::<SpdMemInfo>(), ..SpdMemInfo::default() };
        let call = self.device.api().mem_info.expect("checked at load");
        // SAFETY: the device is alive; the out struct and the error are ours.
        checked("mem_info", |e| unsafe { call(self.device.raw.as_ptr(), &raw mut out, e) })?;
        // A budget is as good as a smaller device.
        let budget = if out.budget == 0 { u64::MAX } else { out.budget };
        let used = out.used_weights.saturating_add(out.used_kv).saturating_add(out.used_workspace);
        Ok(MemoryInfo {
            total: out.total.min(budget),
            free: out.free.min(budget.saturating_sub(used)),
            used_weights: out.used_weights,
            used_kv: out.used_kv,
            used_workspace: out.used_workspace,
        })
    }

    /// How the device feels: state, temperature, errors.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn health(&self) -> Result<SpdHealth, BackendError> {
        let mut out = SpdHealth { struct_size: struct_size::<SpdHealth>(), ..SpdHealth::default() };
        let call = self.device.api().health.expect("checked at load");
        // SAFETY: the device is alive; the out struct and the error are ours.
        checked("health", |e| unsafe { call(self.device.raw.as_ptr(), &raw mut out, e) })?;
        Ok(out)
    }

    /// Succeeds when the device can run operator `op` of a program.
    ///
    /// # Errors
    /// The plugin's own, saying why not.
    pub fn supports(&self, blob: &Blob, op: u32) -> Result<(), BackendError> {
        let _control = self.device.plugin.control();
        let (call, bytes) = (self.device.api().supports.expect("checked at load"), blob.as_bytes());
        // SAFETY: the device is alive; the blob lives through the call; the error is ours.
        checked("supports", |e| unsafe {
            call(self.device.raw.as_ptr(), bytes.as_ptr().cast(), bytes.len() as u64, op, e)
        })
    }

    /// Lets the device prove that it computes: level 0 takes under a second, level 1 is thorough.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn self_test(&self, level: u32) -> Result<(), BackendError> {
        let _control = self.device.plugin.control();
        self.test(level)
    }

    /// Whether the device is well by its own word and by its test; an error says what is wrong. `None` while a control
    /// call is under way: both answers would come after its end, and a compilation may take minutes.
    pub fn examine(&self) -> Option<Result<(), String>> {
        let _control = self.device.plugin.try_control()?;
        match self.health() {
            Ok(health) if health.state == HEALTH_LOST => return Some(Err("it says that it is lost".to_owned())),
            Err(error) if !error.is_unsupported() => return Some(Err(error.to_string())),
            Ok(_) | Err(_) => {}
        }
        match self.test(0) {
            Err(error) if !error.is_unsupported() => Some(Err(format!("it fails its test: {error}"))),
            Ok(()) | Err(_) => Some(Ok(())),
        }
    }

    /// [`Self::self_test`], for whoever holds the plugin's lock.
    fn test(&self, level: u32) -> Result<(), BackendError> {
        let call = self.device.api().self_test.expect("checked at load");
        // SAFETY: the device is alive; the error is ours.
        checked("self_test", |e| unsafe { call(self.device.raw.as_ptr(), level, e) })
    }

    /// Gives the device a weight. Where the device reads host memory in place, the bytes are not copied and stay
    /// alive with the weight.
    ///
    /// # Errors
    /// The plugin's own, for example a dtype it does not have.
    pub fn upload(&self, weight: &WeightUpload) -> Result<Weight, BackendError> {
        Weight::upload(&self.device, weight)
    }

    /// Creates a KV pool whose rows read as zero, with `slow` as its slow tier.
    ///
    /// # Errors
    /// The plugin's own, for example `SPD_E_NOMEM_DEVICE`; `SPD_E_UNSUPPORTED` for rows or blocks that the device does
    /// not claim.
    pub fn create_kv(&self, desc: &KvDesc, slow: Option<&SlowArea>) -> Result<KvPool, BackendError> {
        self.create_kv_on(desc, slow.map(|area| area.source().clone()))
    }

    /// As [`Self::create_kv`], for whoever does not write into the slow tier.
    pub(crate) fn create_kv_on(&self, desc: &KvDesc, slow: Option<SlowSource>) -> Result<KvPool, BackendError> {
        self.device.info.limits.allow_pool(desc)?;
        KvPool::create(&self.device, desc, slow)
    }

    /// `length` zero bytes for the arenas of its steps.
    pub fn arena(&self, length: usize) -> Arena {
        Arena::new(&self.device, length)
    }

    /// Compiles a program for steps up to `bucket`. Weights and pools are bound in the order of their slots and stay
    /// alive with the plan.
    ///
    /// # Errors
    /// The plugin's own, naming the operator that it refuses; `SPD_E_UNSUPPORTED` for a bucket or a selection beyond
    /// the device's limits.
    pub fn compile(
        &self,
        blob: &Blob,
        weights: &[&Weight],
        pools: &[&KvPool],
        bucket: SpdBucket,
    ) -> Result<Plan, BackendError> {
        self.device.info.limits.allow_bucket(&bucket)?;
        self.device.info.limits.allow_program(blob)?;
        Plan::compile(&self.device, blob, weights, pools, bucket)
    }

    /// A new queue.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn queue(&self) -> Result<Queue, BackendError> {
        Queue::create(&self.device)
    }
}

impl DeviceInfo {
    /// The devices that a plugin sees, none of them opened: what depends on how one is opened may still be missing.
    ///
    /// # Errors
    /// The plugin's own, or that it claims more than [`DEVICES_MAX`].
    pub fn list(plugin: &Plugin) -> Result<Vec<Self>, BackendError> {
        let count = plugin.device_count()?;
        if count > DEVICES_MAX {
            let reason = format!("it claims {count} devices, {DEVICES_MAX} are possible");
            return Err(BackendError::BadTable { path: plugin.path().to_owned(), reason });
        }
        let _control = plugin.control();
        (0..count).map(|index| device_info(plugin, plugin.api(), index)).collect()
    }

    /// True when LINEAR takes weights of this dtype.
    pub fn takes_weights(&self, dtype: u32) -> bool {
        dtype_bit(dtype).is_some_and(|(word, mask)| self.weight_dtypes[word] & mask != 0)
    }

    /// True when the same step gives the same bits, whatever shares its batch and however the prompt was cut.
    pub fn is_invariant(&self) -> bool {
        self.features & (FEAT_DETERMINISTIC | FEAT_INVARIANT) == FEAT_DETERMINISTIC | FEAT_INVARIANT
    }

    /// True when latent planes may lie in a file, where they are encrypted: one that reads plain pages only gets none.
    pub fn takes_slow_file(&self) -> bool {
        self.features & (FEAT_SLOW_FILE | FEAT_SLOW_SEALED) == FEAT_SLOW_FILE | FEAT_SLOW_SEALED
    }

    /// True when latent planes may lie in host memory.
    pub fn takes_slow_memory(&self) -> bool {
        self.features & FEAT_SLOW_HOST != 0
    }

    /// True when weights are read where they lie in host memory.
    pub fn reads_host_weights(&self) -> bool {
        self.features & FEAT_HOST_WEIGHTS != 0
    }
}

impl Device {
    pub(crate) fn api(&self) -> &'static SpdApi {
        self.plugin.api()
    }

    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.info
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _control = self.plugin.control();
        let close = self.api().device_close.expect("checked at load");
        // SAFETY: weights, pools, plans and queues hold an Arc of the device, so none is left.
        unsafe { close(self.raw.as_ptr()) };
    }
}

/// What the plugin says about device `index`; the caller holds the plugin's lock.
pub(crate) fn raw_device_info(plugin: &Plugin, api: &SpdApi, index: u32) -> Result<SpdDeviceInfo, BackendError> {
    let mut out = SpdDeviceInfo { struct_size: struct_size::<SpdDeviceInfo>(), ..SpdDeviceInfo::default() };
    let call = api.device_info.expect("checked at load");
    // SAFETY: the instance is alive; the out struct and the error are ours.
    checked("device_info", |e| unsafe { call(plugin.instance(), index, &raw mut out, e) })?;
    Ok(out)
}

fn device_info(plugin: &Plugin, api: &SpdApi, index: u32) -> Result<DeviceInfo, BackendError> {
    let out = raw_device_info(plugin, api, index)?;
    Ok(DeviceInfo {
        plugin: plugin.manifest().id.clone(),
        kind: match out.kind {
            DEV_CPU => DeviceKind::Cpu,
            DEV_GPU => DeviceKind::Gpu,
            DEV_NPU => DeviceKind::Npu,
            other => DeviceKind::Other(other),
        },
        id: text(&out.id),
        name: text(&out.name),
        driver: text(&out.driver),
        score: out.score,
        mem_total: out.mem_total,
        features: out.features,
        weight_dtypes: out.weight_dtypes,
        max_tokens: out.max_tokens,
        max_context: out.max_context,
        limits: Limits::of(&out),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn a_device_is_not_examined_while_a_control_call_is_under_way_that_would_be_waited_for() {
        let plugin = Fixture::build(&["-DDEVICE"]).load().unwrap();
        let backend = Backend::open(&plugin, 0, &OpenOptions::default()).unwrap();
        let compiles = plugin.control();
        assert_eq!(backend.examine(), None);
        drop(compiles);
        let said = backend.examine().unwrap().unwrap_err();
        assert!(said.starts_with("it fails its test: self_test"), "{said}");
    }
}
