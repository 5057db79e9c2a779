//! Which devices, weights, pools, plans and lanes has the daemon made here?

use super::lane::LaneThread;
use crate::call::text;
use crate::device::raw_device_info;
use crate::memory::{KvDesc, KvPool, Weight, WeightUpload};
use crate::remote::wire::{Object, Plain, PoolShape, Reply, Request, SlowShape, Source};
use crate::slow::SlowSource;
use crate::{Backend, BackendError, OpenOptions, Plan, Plugin};
use bytes::Bytes;
use memmap2::Mmap;
use sparsed_abi::{Blob, E_INVALID, E_NOMEM_HOST, SpdMemInfo, SpdStatus, SpdWeightDesc};
use sparsed_plugin_kit::struct_size;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Result<T> = std::result::Result<T, BackendError>;

/// Everything the daemon has a number for.
#[derive(Debug, Default)]
pub(super) struct Objects {
    devices: HashMap<u32, Device>,
    weights: HashMap<u32, Uploaded>,
    lanes: HashMap<u32, LaneThread>,
    jobs: Arc<JobObjects>,
}

#[derive(Debug)]
struct Uploaded {
    weight: Weight,
    /// The device's number.
    device: u32,
    /// Bytes of it in memory that this process keeps mapped for the plugin.
    kept: u64,
}

#[derive(Debug)]
struct Device {
    backend: Backend,
    /// Files with weights, mapped as a whole.
    files: HashMap<u32, Bytes>,
}

/// What jobs of lanes work on.
#[derive(Debug, Default)]
pub(super) struct JobObjects {
    plans: Mutex<HashMap<u32, Arc<Plan>>>,
    pools: Mutex<HashMap<u32, KvPool>>,
}

impl JobObjects {
    pub(super) fn plan(&self, id: u32) -> Result<Arc<Plan>> {
        lock(&self.plans).get(&id).cloned().ok_or_else(|| unknown("plan", id))
    }

    pub(super) fn pool(&self, id: u32) -> Result<KvPool> {
        lock(&self.pools).get(&id).cloned().ok_or_else(|| unknown("pool", id))
    }
}

impl Objects {
    /// Does one request; `fds` are the descriptors that came with it.
    pub(super) fn answer(&mut self, plugin: &Arc<Plugin>, request: Request, fds: Vec<OwnedFd>) -> Result<Reply> {
        let mut fds = fds.into_iter();
        match request {
            Request::Start(_) => return Err(refuse(E_INVALID, "started already".to_owned())),
            Request::DeviceInfo { index } => {
                let _control = plugin.control();
                return raw_device_info(plugin, plugin.api(), index)
                    .map(|info| Reply::DeviceInfo(Box::new(Plain(info))));
            }
            Request::Open { device, index, n_threads, mem_budget } => {
                let backend = Backend::open(plugin, index, &OpenOptions { n_threads, mem_budget })?;
                self.devices.insert(device, Device { backend, files: HashMap::new() });
            }
            Request::Memory { device } => return self.memory(device),
            Request::Health { device } => return Ok(Reply::Health(Plain(self.device(device)?.backend.health()?))),
            Request::SelfTest { device, level } => self.device(device)?.backend.self_test(level)?,
            Request::Supports { device, op, blob_bytes } => {
                self.device(device)?.backend.supports(&blob(fds.next(), blob_bytes)?, op)?;
            }
            Request::Upload { device, weight, desc: Plain(desc), source } => {
                let (made, kept) = self.device(device)?.upload(&desc, &source, fds.next())?;
                self.weights.insert(weight, Uploaded { weight: made, device, kept });
            }
            Request::CreateKv { device, pool, shape, slow } => {
                let slow = slow.map(|slow| slow_source(slow, fds.next())).transpose()?;
                return self.create_kv(device, pool, &shape, slow);
            }
            Request::Compile { device, plan, weights, pools, bucket: Plain(bucket), blob_bytes } => {
                let find = |id: &u32| self.weights.get(id).ok_or_else(|| unknown("weight", *id));
                let weights = weights.iter().map(|id| find(id).map(|uploaded| uploaded.weight.clone()));
                let weights = weights.collect::<Result<Vec<_>>>()?;
                let pools = pools.iter().map(|&id| self.jobs.pool(id)).collect::<Result<Vec<_>>>()?;
                let (weights, pools) = (weights.iter().collect::<Vec<_>>(), pools.iter().collect::<Vec<_>>());
                let blob = blob(fds.next(), blob_bytes)?;
                let made = self.device(device)?.backend.compile(&blob, &weights, &pools, bucket)?;
                let info = made.info();
                lock(&self.jobs.plans).insert(plan, Arc::new(made));
                let (workspace, input, output) = (info.workspace_bytes, info.in_bytes, info.out_bytes);
                return Ok(Reply::Plan { workspace, input, output });
            }
            Request::Lane { device, lane, arena_bytes } => {
                let queue = self.device(device)?.backend.queue()?;
                let (Some(arena), Some(bell), Some(answer)) = (fds.next(), fds.next(), fds.next()) else {
                    return Err(refuse(E_INVALID, "a lane comes with three descriptors".to_owned()));
                };
                let thread = LaneThread::start(&arena, arena_bytes, bell, answer, queue, Arc::clone(&self.jobs));
                let thread = thread.map_err(|error| refuse(E_NOMEM_HOST, format!("a lane: {error}")))?;
                self.lanes.insert(lane, thread);
            }
            Request::Drop(object) => self.forget(object),
        }
        Ok(Reply::Done)
    }

    fn device(&mut self, id: u32) -> Result<&mut Device> {
        self.devices.get_mut(&id).ok_or_else(|| unknown("device", id))
    }

    /// As the plugin has it, with what weights take here that it reads in place.
    fn memory(&mut self, device: u32) -> Result<Reply> {
        let info = self.device(device)?.backend.memory()?;
        let kept = self.weights.values().filter(|uploaded| uploaded.device == device).map(|uploaded| uploaded.kept);
        let kept: u64 = kept.sum();
        Ok(Reply::Memory(Plain(SpdMemInfo {
            struct_size: struct_size::<SpdMemInfo>(),
            total: info.total,
            free: info.free,
            used_weights: info.used_weights.saturating_add(kept),
            used_kv: info.used_kv,
            used_workspace: info.used_workspace,
            ..SpdMemInfo::default()
        })))
    }

    fn create_kv(&mut self, device: u32, pool: u32, shape: &PoolShape, slow: Option<SlowSource>) -> Result<Reply> {
        let [Plain(latent), Plain(rope), Plain(index)] = shape.rows;
        let PoolShape { block_tokens, n_blocks, n_layers, n_index_layers, .. } = *shape;
        let desc = KvDesc { block_tokens, n_blocks, n_layers, n_index_layers, latent, rope, index };
        let made = self.device(device)?.backend.create_kv_on(&desc, slow)?;
        let info = made.raw_info();
        lock(&self.jobs.pools).insert(pool, made);
        Ok(Reply::Pool(Plain(info)))
    }

    /// What is not there any more is forgotten already.
    fn forget(&mut self, object: Object) {
        match object {
            Object::Device(id) => drop(self.devices.remove(&id)),
            Object::Weight(id) => drop(self.weights.remove(&id)),
            Object::Lane(id) => drop(self.lanes.remove(&id)),
            Object::Pool(id) => {
                let pool = lock(&self.jobs.pools).remove(&id);
                drop(pool); // outside the lock
            }
            Object::Plan(id) => {
                let plan = lock(&self.jobs.plans).remove(&id);
                drop(plan); // outside the lock
            }
        }
    }
}

impl Device {
    /// The weight, and the bytes of memory that stay mapped for it.
    fn upload(&mut self, desc: &SpdWeightDesc, source: &Source, fd: Option<OwnedFd>) -> Result<(Weight, u64)> {
        let bytes = match *source {
            Source::Memory { length } => part(&map(fd)?, 0, length)?,
            Source::File { number, offset, length } => {
                if let Some(fd) = fd {
                    self.files.insert(number, map(Some(fd))?);
                }
                part(self.files.get(&number).ok_or_else(|| unknown("file", number))?, offset, length)?
            }
        };
        let kept = match *source {
            Source::Memory { length } if self.backend.info().reads_host_weights() => length,
            _ => 0,
        };
        let weight = self.backend.upload(&WeightUpload {
            name: text(&desc.name),
            dtype: desc.dtype,
            batch: desc.batch,
            rows: desc.rows,
            cols: desc.cols,
            bytes,
            file: None,
        })?;
        Ok((weight, kept))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A refusal of the host's own.
pub(super) fn refuse(status: SpdStatus, message: String) -> BackendError {
    BackendError::refused("plugin host", status, message)
}

fn unknown(what: &str, id: u32) -> BackendError {
    refuse(E_INVALID, format!("no {what} has the number {id}"))
}

/// The slow tier in the file that came with it.
fn slow_source(slow: SlowShape, fd: Option<OwnedFd>) -> Result<SlowSource> {
    let fd = fd.ok_or_else(|| refuse(E_INVALID, "a slow tier comes with its file".to_owned()))?;
    let SlowShape { is_memory, offset, length, cache_bytes, key } = slow;
    let file = File::from(fd);
    let end = offset.checked_add(length).ok_or_else(|| refuse(E_INVALID, "a slow area without an end".to_owned()))?;
    let memory = is_memory.then(|| crate::slow::map(&file, end)).transpose();
    let memory = memory.map_err(|error| refuse(E_NOMEM_HOST, format!("the memory of the slow tier: {error}")))?;
    Ok(SlowSource { file: Arc::new(file), memory, offset, length, cache_bytes, key })
}

/// A program, copied out of the file it came in.
fn blob(fd: Option<OwnedFd>, length: u64) -> Result<Blob> {
    Ok(Blob::copied(&part(&map(fd)?, 0, length)?))
}

fn part(file: &Bytes, offset: u64, length: u64) -> Result<Bytes> {
    let range = usize::try_from(offset).ok().zip(offset.checked_add(length).and_then(|end| usize::try_from(end).ok()));
    match range {
        Some((from, to)) if to <= file.len() => Ok(file.slice(from..to)),
        _ => Err(refuse(E_INVALID, format!("{length} bytes at {offset} of a file of {}", file.len()))),
    }
}

/// Maps a whole file.
fn map(fd: Option<OwnedFd>) -> Result<Bytes> {
    let fd = fd.ok_or_else(|| refuse(E_INVALID, "a request lacks its file".to_owned()))?;
    // SAFETY: the mapping is read-only. The daemon sends sealed memory, or a model's file, which it has mapped itself:
    // such files belong to the operator and are replaced by rename, never rewritten.
    let map = unsafe { Mmap::map(&fd) };
    map.map(Bytes::from_owner).map_err(|error| refuse(E_NOMEM_HOST, format!("a file with weights: {error}")))
}
