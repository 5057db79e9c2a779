//! How can a disk fail?

use crate::content::Content;
use crate::machine::{Fate, Machine, Node, Result, finish};
use sparsed_session::{Disk, DiskError, Entry, Place, ReadAt};
use std::hash::{Hash, Hasher};
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard};

/// A disk in memory, or one process's view of it: a lock is held until its view is dropped.
#[derive(Debug)]
pub struct FakeDisk {
    machine: Arc<Mutex<Machine>>,
    locks: Vec<Place>,
}

/// What may go wrong. Two failures are always some calls apart: what a store does about a failure may need the disk.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// One call in so many fails, before or after it is carried out, or half-way; 0 is never.
    pub one_in: u32,
    /// This call fails, counted from now.
    pub fail_after: Option<u64>,
    /// Bytes that fit.
    pub capacity_bytes: usize,
    /// The power goes at this change, counted from now, which may still be carried out.
    pub off_after: Option<u64>,
    /// One call in so many takes long; 0 is never.
    pub slow_one_in: u32,
}

/// A mistake that the disk makes, or, which looks the same, that the store makes in calling it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// None.
    Nothing,
    /// Files are never synced.
    NoSync,
    /// Folders are never synced.
    NoSyncDir,
    /// One sync in so many does nothing.
    SomeSyncs(u32),
}

impl Faults {
    /// A disk that works.
    pub const NONE: Self =
        Self { one_in: 0, fail_after: None, capacity_bytes: usize::MAX, off_after: None, slow_one_in: 0 };
}

impl FakeDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> Self {
        let machine = Machine::new(seed);
        Self { machine: Arc::new(Mutex::new(machine)), locks: Vec::new() }
    }

    /// The same disk as another process sees it.
    #[must_use]
    pub fn other(&self) -> Self {
        Self { machine: Arc::clone(&self.machine), locks: Vec::new() }
    }

    /// The power goes and comes back: of what was not synced any part may be lost. Faults are over.
    pub fn power_cut(&self) {
        let machine = &mut *self.machine();
        machine.names.power_cut(&mut machine.rng);
        let mut is_named = vec![false; machine.nodes.len()];
        machine.names.nodes().for_each(|node| is_named[node] = true);
        for (node, is_named) in machine.nodes.iter_mut().zip(is_named) {
            match node {
                Node::File(content) if is_named => content.power_cut(&mut machine.rng),
                Node::File(content) => *content = Content::default(),
                Node::Dir => {}
            }
        }
        machine.locked.clear();
        (machine.is_off, machine.off_at, machine.fail_at, machine.faults) = (false, None, None, Faults::NONE);
    }

    /// What may go wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        let machine = &mut *self.machine();
        machine.faults = faults;
        machine.off_at = faults.off_after.map(|n| machine.n_changes + n);
        machine.fail_at = faults.fail_after.map(|n| machine.n_calls + n + 1);
    }

    /// Plants a mistake.
    pub fn set_plant(&self, plant: Plant) {
        self.machine().plant = plant;
    }

    /// Whether the power has gone: every call fails until [`FakeDisk::power_cut`].
    pub fn is_off(&self) -> bool {
        self.machine().is_off
    }

    /// Whether a call has failed for another reason than the power.
    pub fn has_failed(&self) -> bool {
        self.machine().last_failure > 0
    }

    /// Calls so far that change something.
    pub fn n_changes(&self) -> u64 {
        self.machine().n_changes
    }

    /// Time that the calls have taken.
    pub fn elapsed_us(&self) -> u64 {
        self.machine().elapsed_us
    }

    /// Of all calls so far and their bytes.
    pub fn digest(&self) -> u64 {
        self.machine().digest.finish()
    }

    /// All files.
    pub fn files(&self) -> Vec<Place> {
        let machine = self.machine();
        let (mut files, mut folders) = (Vec::new(), vec![(Place::root(), 0)]);
        while let Some((place, dir)) = folders.pop() {
            for (name, node) in machine.names.of(dir) {
                match machine.nodes[node] {
                    Node::File(_) => files.push(place.child(name)),
                    Node::Dir => folders.push((place.child(name), node)),
                }
            }
        }
        files.sort_unstable();
        files
    }

    /// A file's bytes.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn bytes(&self, file: &Place) -> Vec<u8> {
        let machine = self.machine();
        let node = machine.find(file).expect("the file is there");
        let Node::File(content) = &machine.nodes[node] else { panic!("{file:?} is a folder") };
        content.now.clone()
    }

    /// Puts other bytes into a file, or a file into a folder that is there, as if they had been there always.
    ///
    /// # Panics
    /// When there is no such folder.
    pub fn put(&self, file: &Place, bytes: Vec<u8>) {
        let machine = &mut *self.machine();
        let node = Node::File(Content::durable(bytes));
        let key = machine.key(file).expect("the folder is there");
        let number = machine.add(node);
        machine.names.link(key, number);
        machine.names.settle();
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().expect("nobody panics with it")
    }
}

/// A file of the disk by its name: nobody replaces one while it is read here.
struct OpenFile {
    machine: Arc<Mutex<Machine>>,
    file: Place,
}

impl ReadAt for OpenFile {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        self.machine.lock().expect("nobody panics with it").read(&self.file, offset, bytes)
    }
}

impl Drop for FakeDisk {
    fn drop(&mut self) {
        if let Ok(mut machine) = self.machine.lock() {
            machine.locked.retain(|file| !self.locks.contains(file));
        }
    }
}

impl Disk for FakeDisk {
    fn list(&mut self, dir: &Place) -> Result<Vec<Entry>> {
        let machine = &mut *self.machine();
        finish(machine.call("list", dir, false)?)?;
        let dir = machine.find(dir)?;
        let is_dir = |node: usize| matches!(machine.nodes[node], Node::Dir);
        let entries = machine.names.of(dir);
        Ok(entries.map(|(name, node)| Entry { name: name.to_owned(), is_dir: is_dir(node) }).collect())
    }

    fn create_dir(&mut self, dir: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("create_dir", dir, true)?;
        let key = machine.key(dir)?;
        if machine.names.find(&key).is_some() {
            return Err(DiskError::Exists);
        }
        let node = machine.add(Node::Dir);
        machine.names.link(key, node);
        finish(fate)
    }

    fn create(&mut self, file: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("create", file, true)?;
        let key = machine.key(file)?;
        if machine.names.find(&key).is_some() {
            return Err(DiskError::Exists);
        }
        let node = machine.add(Node::File(Content::default()));
        machine.names.link(key, node);
        finish(fate)
    }

    fn len(&mut self, file: &Place) -> Result<u64> {
        let machine = &mut *self.machine();
        finish(machine.call("len", file, false)?)?;
        Ok(machine.file(file)?.now.len() as u64)
    }

    fn read_at(&mut self, file: &Place, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        self.machine().read(file, offset, bytes)
    }

    fn open(&mut self, file: &Place) -> Result<Box<dyn ReadAt>> {
        self.machine().file(file)?;
        Ok(Box::new(OpenFile { machine: Arc::clone(&self.machine), file: file.clone() }))
    }

    fn write_at(&mut self, file: &Place, offset: u64, bytes: &[u8]) -> Result<()> {
        let machine = &mut *self.machine();
        (offset, bytes).hash(&mut machine.digest);
        let fate = machine.call("write", file, true)?;
        machine.write(file, offset, bytes, fate)
    }

    fn set_len(&mut self, file: &Place, n_bytes: u64) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("set_len", file, true)?;
        let n_bytes = usize::try_from(n_bytes).map_err(|_| DiskError::Full)?;
        machine.file(file)?.set_len(n_bytes);
        finish(fate)
    }

    fn sync(&mut self, file: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("sync", file, true)?;
        let is_forgotten = match machine.plant {
            Plant::NoSync => true,
            Plant::SomeSyncs(one_in) => machine.rng.u32(..one_in) == 0,
            Plant::Nothing | Plant::NoSyncDir => false,
        };
        let content = machine.file(file)?;
        match fate {
            Fate::Half => content.forget_pending(),
            _ if is_forgotten => {}
            _ => content.sync(),
        }
        finish(fate)
    }

    fn sync_dir(&mut self, dir: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("sync_dir", dir, true)?;
        let dir = machine.find(dir)?;
        if fate != Fate::Half && machine.plant != Plant::NoSyncDir {
            machine.names.sync(dir);
        }
        finish(fate)
    }

    fn rename(&mut self, from: &Place, to: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("rename", from, true)?;
        let node = machine.find(from)?;
        let (from, to) = (machine.key(from)?, machine.key(to)?);
        if machine.names.find(&to).is_some_and(|node| matches!(machine.nodes[node], Node::Dir)) {
            return Err(DiskError::Exists);
        }
        machine.names.rename(from, to, node);
        finish(fate)
    }

    fn remove(&mut self, file: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("remove", file, true)?;
        machine.file(file)?;
        let key = machine.key(file)?;
        machine.names.unlink(key);
        finish(fate)
    }

    fn remove_dir(&mut self, dir: &Place) -> Result<()> {
        let machine = &mut *self.machine();
        let fate = machine.call("remove_dir", dir, true)?;
        let node = machine.find(dir)?;
        if machine.names.of(node).next().is_some() {
            return Err(DiskError::Io(ErrorKind::DirectoryNotEmpty));
        }
        let key = machine.key(dir)?;
        machine.names.unlink(key);
        finish(fate)
    }

    fn free_bytes(&mut self) -> Result<u64> {
        let machine = self.machine();
        Ok(machine.faults.capacity_bytes.saturating_sub(machine.used_bytes()) as u64)
    }

    fn lock(&mut self, file: &Place) -> Result<()> {
        let machine = &mut *self.machine.lock().expect("nobody panics with it");
        if machine.locked.contains(file) {
            return Err(DiskError::Locked);
        }
        machine.locked.push(file.clone());
        self.locks.push(file.clone());
        Ok(())
    }
}
