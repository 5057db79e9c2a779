//! Who answers when a plugin runs in another process? The traits of the plugin kit, by asking its host.

mod keeper;
mod lane;
mod lines;
mod link;

pub use keeper::kill_plugin_hosts;

use crate::remote::HostOptions;
use crate::remote::arena::{KIND_KV, KIND_RUN, Layout};
use crate::remote::wire::{Object, Plain, PoolShape, Reply, Request, SlowShape, Source as From, Start};
use crate::slow::is_memory;
use crate::{BackendError, Found, Plugin as Loaded, taint};
use lane::{Job, Lane};
use link::Link;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use sparsed_abi::{
    E_ABI, E_NOMEM_HOST, FEAT_CANCEL_MID, FEAT_DETERMINISTIC, FEAT_GRAPH, FEAT_INVARIANT, FEAT_SLOW_FILE,
    FEAT_SLOW_HOST, FEAT_SLOW_SEALED, FEAT_UNIFIED_MEM, HEALTH_LOST, KV_EXPORT, KV_IMPORT, LAYOUT_DIGEST, Program,
    SpdApi, SpdBucket, SpdDeviceInfo, SpdHealth, SpdKvDesc, SpdKvInfo, SpdKvOp, SpdMemInfo, SpdWeightDesc, bytes_of,
};
use sparsed_plugin_kit::{
    Device, Host, InOrder, OpenOptions, PlanSizes, Plugin, PluginError, Result, Run, SlowArea, SlowPlace, Source,
    Synchronous, instance, table,
};
use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Smallest lane in bytes.
const LANE_BYTES_MIN: usize = 1 << 20;
/// Of a step's arrays at most, for each token and for each sequence, with what is there once.
const STEP_BYTES: [u64; 2] = [20, 256];
/// What goes through a host. Its queues are synchronous, and weights are not read where they lie in the daemon's
/// memory: the host has its own mapping of the file.
const FEATURES: u64 = FEAT_GRAPH
    | FEAT_UNIFIED_MEM
    | FEAT_CANCEL_MID
    | FEAT_DETERMINISTIC
    | FEAT_INVARIANT
    | FEAT_SLOW_FILE
    | FEAT_SLOW_HOST
    | FEAT_SLOW_SEALED;

static TABLE: SpdApi = table::<RemotePlugin>();

impl Loaded {
    /// As [`Plugin::load`](Loaded::load), in a process of its own: the library is opened there and nowhere else.
    ///
    /// # Errors
    /// A process that cannot be started or does not answer, and what it says against the library.
    pub fn load_isolated(
        found: &Found,
        settings: &BTreeMap<String, String>,
        options: &HostOptions,
    ) -> std::result::Result<Arc<Self>, BackendError> {
        let (id, version) = (&found.manifest.id, &found.manifest.version);
        let library = found.variant()?;
        taint::note(found);
        let refuse = |reason: String| BackendError::Host { plugin: id.clone(), reason };
        let link = Link::start(id, options).map_err(|e| refuse(format!("{}: {e}", options.program.display())))?;
        let start = Request::Start(Start {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            layout: LAYOUT_DIGEST,
            dir: std::path::absolute(&found.dir).map_err(|e| refuse(e.to_string()))?, // the host works in /
            id: id.clone(),
            plugin_version: version.clone(),
            settings: settings.clone(),
        });
        let (device_count, abi_minor) = match link.call_within(&start, &[], options.start_timeout) {
            Ok(Reply::Started { device_count, abi_minor }) => (device_count, abi_minor),
            Ok(_) => return Err(refuse(link.nonsense().message)),
            Err(error) if error.status == E_ABI => {
                return Err(BackendError::Refused { plugin: id.clone(), reason: error.message });
            }
            Err(error) => return Err(refuse(error.message)),
        };
        let host = link.pid();
        log::info!(plugin = id.as_str(), version = version.as_str(), host; "plugin loaded in a host of its own");
        let plugin = instance(RemotePlugin { link: Arc::new(link), device_count });
        let (path, sha256) = (found.dir.join(&library.path), library.sha256.clone());
        Ok(Self::of_host(found.manifest.clone(), path, sha256, &TABLE, plugin, (host, abi_minor)))
    }
}

/// The plugin in its host.
#[derive(Debug)]
struct RemotePlugin {
    link: Arc<Link>,
    device_count: u32,
}

impl Plugin for RemotePlugin {
    const ID: &'static CStr = c"plugin-host";
    const VERSION: &'static CStr = c"";
    type Device = RemoteDevice;

    fn create(_: Host) -> Result<Self> {
        Err(PluginError::unsupported("a plugin host is started by the daemon, not through its table"))
    }

    fn device_count(&self) -> Result<u32> {
        Ok(self.device_count)
    }

    fn device_info(&self, index: u32) -> Result<SpdDeviceInfo> {
        match self.link.call(&Request::DeviceInfo { index }, &[])? {
            Reply::DeviceInfo(info) => Ok(SpdDeviceInfo { features: info.0.features & FEATURES, ..info.0 }),
            _ => Err(self.link.nonsense()),
        }
    }

    fn open(&self, index: u32, options: &OpenOptions) -> Result<RemoteDevice> {
        let id = self.link.new_id();
        let OpenOptions { n_threads, mem_budget, .. } = *options;
        let request = Request::Open { device: id, index, n_threads, mem_budget };
        self.link.done(self.link.call_within(&request, &[], self.link.options().start_timeout)?)?;
        Ok(RemoteDevice {
            link: Arc::clone(&self.link),
            id,
            lanes: Mutex::default(),
            image_bytes: AtomicU64::new(0),
            files: Mutex::default(),
        })
    }
}

/// A device in the host.
#[derive(Debug)]
struct RemoteDevice {
    link: Arc<Link>,
    id: u32,
    /// Lanes that carry no job; as many are made as queues run at a time.
    lanes: Mutex<Vec<Lane>>,
    /// Bytes of the largest image of a block.
    image_bytes: AtomicU64,
    /// Files that the host has mapped, by device and inode.
    files: Mutex<HashMap<(u64, u64), u32>>,
}

/// A weight, pool or plan in the host; dropped there when it is dropped here.
#[derive(Debug)]
struct Remote {
    link: Arc<Link>,
    object: Object,
}

/// A weight before its bytes have gone to the host, and after; then with how many there are.
#[derive(Debug)]
struct RemoteWeight {
    desc: SpdWeightDesc,
    made: Option<(Remote, u64)>,
}

impl RemoteDevice {
    fn remote(&self, object: Object) -> Remote {
        Remote { link: Arc::clone(&self.link), object }
    }

    /// Does a job on a lane that is free and large enough, or on a new one.
    fn run_job(&self, mut job: Job<'_>) -> Result<()> {
        let bytes = job.layout()?.total;
        let mut lane = self.lane(bytes)?;
        let outcome = lane.run(&mut job);
        lock(&self.lanes).push(lane);
        outcome
    }

    /// A lane with room for `bytes` that carries no job: a free one, or a new one.
    fn lane(&self, bytes: usize) -> Result<Lane> {
        let mut lanes = lock(&self.lanes);
        let free = lanes.iter().position(|lane| lane.capacity() >= bytes).map(|at| lanes.swap_remove(at));
        drop(lanes);
        free.map_or_else(|| self.new_lane(bytes), Ok)
    }

    /// Has a lane ready for whatever a plan's steps carry, and for a block's image: one that a step has to open waits
    /// for the control call that is under way, which may be the compilation of another plan.
    fn provide_lane(&self, bucket: &SpdBucket, sizes: &PlanSizes) {
        let most = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        // Blocks have 16 tokens at least.
        let (token, sequence) = (STEP_BYTES[0], STEP_BYTES[1] + u64::from(bucket.max_context) / 16 * 4);
        let step = u64::from(bucket.max_tokens) * token + u64::from(bucket.max_seqs) * sequence;
        let output = sizes.output.max(self.image_bytes.load(Ordering::Relaxed));
        let bytes = Layout::of([step, sizes.input, output].map(most)).map_or(usize::MAX, |layout| layout.total);
        // A step that has none tries again, and says why.
        if let Ok(lane) = self.lane(bytes) {
            lock(&self.lanes).push(lane);
        }
    }

    fn new_lane(&self, bytes: usize) -> Result<Lane> {
        let limit = self.link.options().arena_bytes_max;
        if bytes as u64 > limit {
            let reason = format!("a step with its input and output takes {bytes} bytes, the limit is {limit}");
            return Err(PluginError::new(E_NOMEM_HOST, reason));
        }
        // Memory is taken as it is touched; twice as much spares the next larger step a new lane.
        Lane::open(&self.link, self.id, bytes.max(LANE_BYTES_MIN).next_power_of_two())
    }

    /// Tells the host where a weight's bytes are: in a file both can map, or in memory made for it.
    fn send_weight(&self, request: impl Fn(From) -> Request, source: Source) -> Result<()> {
        let length = source.bytes().len() as u64;
        let Some((file, offset)) = source.file() else {
            let memory = memory_file(source.bytes())?;
            return self.link.tell(&request(From::Memory { length }), &[memory.as_fd()]);
        };
        let none = |errno: rustix::io::Errno| PluginError::invalid(format!("the file of a weight: {errno}"));
        let stat = rustix::fs::fstat(file).map_err(none)?;
        let mut files = lock(&self.files);
        let known = files.get(&(stat.st_dev, stat.st_ino)).copied();
        let number = known.unwrap_or_else(|| self.link.new_id());
        let fds = if known.is_some() { &[][..] } else { &[file][..] };
        self.link.tell(&request(From::File { number, offset, length }), fds)?;
        files.insert((stat.st_dev, stat.st_ino), number);
        Ok(())
    }
}

impl Device for RemoteDevice {
    type Weight = RemoteWeight;
    type Pool = Remote;
    type Plan = Remote;
    type Queue = InOrder<Self>;

    /// All zero when the host is lost.
    fn mem_info(&self) -> SpdMemInfo {
        match self.link.call(&Request::Memory { device: self.id }, &[]) {
            Ok(Reply::Memory(Plain(info))) => info,
            _ => SpdMemInfo::default(),
        }
    }

    fn health(&self) -> SpdHealth {
        match self.link.call(&Request::Health { device: self.id }, &[]) {
            Ok(Reply::Health(Plain(health))) => health,
            _ => SpdHealth { state: HEALTH_LOST, ..SpdHealth::default() },
        }
    }

    fn self_test(&self, level: u32) -> Result<()> {
        self.link.tell(&Request::SelfTest { device: self.id, level }, &[])
    }

    fn supports(&self, program: &Program, op: usize) -> Result<()> {
        let op = u32::try_from(op).map_err(|_| PluginError::invalid("no such operator"))?;
        let blob = memory_file(program.bytes())?;
        let blob_bytes = program.bytes().len() as u64;
        self.link.tell(&Request::Supports { device: self.id, op, blob_bytes }, &[blob.as_fd()])
    }

    fn weight_create(&self, desc: &SpdWeightDesc) -> Result<RemoteWeight> {
        self.link.alive()?;
        Ok(RemoteWeight { desc: *desc, made: None })
    }

    fn weight_upload(&self, weight: &mut RemoteWeight, first_batch: u32, n_batch: u32, source: Source) -> Result<()> {
        if first_batch != 0 || n_batch != weight.desc.batch || weight.made.is_some() {
            return Err(PluginError::unsupported("a weight goes to a plugin host in one piece"));
        }
        let (id, desc, bytes) = (self.link.new_id(), Plain(weight.desc), source.bytes().len() as u64);
        self.send_weight(|source| Request::Upload { device: self.id, weight: id, desc, source }, source)?;
        weight.made = Some((self.remote(Object::Weight(id)), bytes));
        Ok(())
    }

    fn weight_commit(&self, weight: &mut RemoteWeight) -> Result<()> {
        self.link.alive()?;
        if weight.made.is_some() { Ok(()) } else { Err(PluginError::invalid("a batch is missing")) }
    }

    fn kv_create(&self, desc: &SpdKvDesc, slow: Option<SlowArea>) -> Result<(Remote, SpdKvInfo)> {
        let shape = PoolShape {
            block_tokens: desc.block_tokens,
            n_blocks: desc.n_blocks,
            n_layers: desc.n_layers,
            n_index_layers: desc.n_index_layers,
            rows: [desc.latent, desc.rope, desc.index].map(Plain),
        };
        let slow = slow.map(slow_file).transpose()?;
        let (file, slow) = slow.unzip();
        let fds: Vec<BorrowedFd<'_>> = file.iter().map(AsFd::as_fd).collect();
        let pool = self.link.new_id();
        match self.link.call(&Request::CreateKv { device: self.id, pool, shape, slow }, &fds)? {
            Reply::Pool(Plain(info)) => {
                self.image_bytes.fetch_max(info.image_bytes, Ordering::Relaxed);
                Ok((self.remote(Object::Pool(pool)), info))
            }
            _ => Err(self.link.nonsense()),
        }
    }

    fn compile(
        &self,
        program: Program,
        weights: Vec<Arc<RemoteWeight>>,
        pools: Vec<Arc<Remote>>,
        bucket: SpdBucket,
    ) -> Result<(Remote, PlanSizes)> {
        let (plan, blob) = (self.link.new_id(), memory_file(program.bytes())?);
        let made = weights.iter().map(|weight| weight.made.as_ref()).collect::<Option<Vec<_>>>();
        let made = made.ok_or_else(|| PluginError::invalid("a weight is not committed"))?;
        let limit = self.link.options().compile_timeout(made.iter().map(|(_, bytes)| bytes).sum());
        let request = Request::Compile {
            device: self.id,
            plan,
            weights: made.iter().map(|(weight, _)| weight.object.id()).collect(),
            pools: pools.iter().map(|pool| pool.object.id()).collect(),
            bucket: Plain(bucket),
            blob_bytes: program.bytes().len() as u64,
        };
        match self.link.call_within(&request, &[blob.as_fd()], limit)? {
            Reply::Plan { workspace, input, output } => {
                let (plan, sizes) = (self.remote(Object::Plan(plan)), PlanSizes { workspace, input, output });
                self.provide_lane(&bucket, &sizes);
                Ok((plan, sizes))
            }
            _ => Err(self.link.nonsense()),
        }
    }

    fn queue(self: &Arc<Self>, _priority: u32) -> Result<InOrder<Self>> {
        self.link.alive()?;
        Ok(InOrder::new(self))
    }
}

impl Synchronous for RemoteDevice {
    fn run(&self, plan: &Remote, run: Run<'_>) -> Result<()> {
        let (cancel, object) = (run.cancel_flag(), plan.object.id());
        let Run { step_bytes: first, input, output, .. } = run;
        self.run_job(Job { kind: KIND_RUN, object, first, input, output, output_goes_in: false, cancel })
    }

    fn kv(&self, pool: &Remote, ops: &[SpdKvOp], host: &mut [u8]) -> Result<()> {
        // What an export does not fill comes back as it was.
        let images = ops.iter().any(|op| op.kind == KV_EXPORT || op.kind == KV_IMPORT);
        let output = if images { host } else { &mut [] };
        let (first, object) = (bytes_of(ops), pool.object.id());
        self.run_job(Job { kind: KIND_KV, object, first, input: &[], output, output_goes_in: true, cancel: None })
    }
}

impl Drop for RemoteDevice {
    fn drop(&mut self) {
        lock(&self.lanes).clear();
        self.link.discard(Object::Device(self.id));
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.link.discard(self.object);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file of a slow tier as it goes to the host, and what the host is to know of it.
fn slow_file(slow: SlowArea) -> Result<(OwnedFd, SlowShape)> {
    let SlowArea { place, offset, length, cache_bytes, key } = slow;
    let SlowPlace::File(file) = place else {
        return Err(PluginError::invalid("a slow tier in memory that has no file cannot go to a plugin host"));
    };
    let is_memory = is_memory(&file);
    // Drivers pin what may be written only.
    let fd = if is_memory { file.into() } else { read_only(&file)? };
    Ok((fd, SlowShape { is_memory, offset, length, cache_bytes, key }))
}

/// The file once more, for a host that reads it and cannot write what the daemon's checks rely on.
fn read_only(file: &File) -> Result<OwnedFd> {
    let open = || {
        let direct = rustix::fs::fcntl_getfl(file)? & OFlags::DIRECT;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | direct, Mode::empty())
    };
    open().map_err(|errno| PluginError::new(E_NOMEM_HOST, format!("cannot open the slow tier's file again: {errno}")))
}

/// `bytes` in memory that can be handed to the host, which can change neither them nor their length.
fn memory_file(bytes: &[u8]) -> Result<OwnedFd> {
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = File::from(rustix::fs::memfd_create("sparsed-bytes", flags)?);
        file.write_all(bytes)?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok::<_, std::io::Error>(file.into())
    };
    make().map_err(|error| PluginError::new(E_NOMEM_HOST, format!("memory shared with the host: {error}")))
}
