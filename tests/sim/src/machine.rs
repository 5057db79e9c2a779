//! What does a call do to a disk, and does it fail?

use crate::content::Content;
use crate::disk::{Faults, Plant};
use crate::names::{Key, Names};
use fastrand::Rng;
use sparsed_session::{DiskError, Place};
use std::hash::{DefaultHasher, Hash};
use std::io::ErrorKind;
use std::ops::Range;

pub(crate) type Result<T> = std::result::Result<T, DiskError>;
const FAILED: DiskError = DiskError::Io(ErrorKind::Other);

/// Calls between two failures, at least.
const CALM: u64 = 6;
/// What a slow call takes.
const STALL_US: Range<u64> = 50_000..400_000;

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) rng: Rng,
    /// By number; folder 0 is the root.
    pub(crate) nodes: Vec<Node>,
    pub(crate) names: Names,
    pub(crate) locked: Vec<Place>,
    pub(crate) faults: Faults,
    pub(crate) plant: Plant,
    /// Calls that change something.
    pub(crate) n_changes: u64,
    pub(crate) off_at: Option<u64>,
    pub(crate) fail_at: Option<u64>,
    pub(crate) is_off: bool,
    pub(crate) n_calls: u64,
    pub(crate) last_failure: u64,
    pub(crate) elapsed_us: u64,
    pub(crate) digest: DefaultHasher,
}

#[derive(Debug)]
pub(crate) enum Node {
    File(Content),
    Dir,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Done,
    /// Carried out, and reported as failed.
    DoneAndFailed,
    Half,
}

impl Machine {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            nodes: vec![Node::Dir],
            names: Names::default(),
            locked: Vec::new(),
            faults: Faults::NONE,
            plant: Plant::Nothing,
            n_changes: 0,
            off_at: None,
            fail_at: None,
            is_off: false,
            n_calls: 0,
            last_failure: 0,
            elapsed_us: 0,
            digest: DefaultHasher::new(),
        }
    }

    pub(crate) fn find(&self, place: &Place) -> Result<usize> {
        let step = |dir: usize, name: &str| self.names.find(&(dir, name.to_owned())).ok_or(DiskError::NotFound);
        place.names().try_fold(0, step)
    }

    pub(crate) fn key(&self, place: &Place) -> Result<Key> {
        let mut names = place.names();
        let name = names.next_back().ok_or(DiskError::NotFound)?.to_owned();
        let step = |dir: usize, name: &str| self.names.find(&(dir, name.to_owned())).ok_or(DiskError::NotFound);
        Ok((names.try_fold(0, step)?, name))
    }

    pub(crate) fn file(&mut self, place: &Place) -> Result<&mut Content> {
        let node = self.find(place)?;
        match &mut self.nodes[node] {
            Node::File(content) => Ok(content),
            Node::Dir => Err(DiskError::Io(ErrorKind::IsADirectory)),
        }
    }

    pub(crate) fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    pub(crate) fn used_bytes(&self) -> usize {
        let bytes = |node: usize| match &self.nodes[node] {
            Node::File(content) => content.now.len(),
            Node::Dir => 0,
        };
        self.names.nodes().map(bytes).sum()
    }

    /// Counts a call; whether it fails at once, and how it will fail otherwise.
    pub(crate) fn call(&mut self, what: &str, place: &Place, changes: bool) -> Result<Fate> {
        what.hash(&mut self.digest);
        place.names().for_each(|name| name.hash(&mut self.digest));
        self.n_calls += 1;
        self.elapsed_us += self.rng.u64(1..200);
        if self.faults.slow_one_in > 0 && self.rng.u32(..self.faults.slow_one_in) == 0 {
            self.elapsed_us += self.rng.u64(STALL_US);
        }
        if self.is_off {
            return Err(FAILED);
        }
        if changes {
            self.n_changes += 1;
            if self.off_at.is_some_and(|at| self.n_changes > at) {
                self.is_off = true;
                return if self.rng.bool() { Ok(Fate::DoneAndFailed) } else { Err(FAILED) };
            }
        }
        let may_fail = self.faults.one_in > 0 && self.n_calls >= self.last_failure + CALM;
        let fails = self.fail_at == Some(self.n_calls) || may_fail && self.rng.u32(..self.faults.one_in) == 0;
        if !fails {
            return Ok(Fate::Done);
        }
        self.last_failure = self.n_calls;
        match self.rng.u32(..3) {
            0 => Err(if self.rng.bool() { DiskError::Full } else { FAILED }),
            1 => Ok(Fate::DoneAndFailed),
            _ => Ok(Fate::Half),
        }
    }

    pub(crate) fn read(&mut self, file: &Place, offset: u64, bytes: &mut [u8]) -> Result<usize> {
        finish(self.call("read", file, false)?)?;
        let content = self.file(file)?;
        let rest = usize::try_from(offset).ok().and_then(|offset| content.now.get(offset..)).unwrap_or_default();
        let n_bytes = rest.len().min(bytes.len());
        bytes[..n_bytes].copy_from_slice(&rest[..n_bytes]);
        Ok(n_bytes)
    }

    pub(crate) fn write(&mut self, file: &Place, offset: u64, bytes: &[u8], fate: Fate) -> Result<()> {
        let offset = usize::try_from(offset).map_err(|_| DiskError::Full)?;
        let (used, capacity) = (self.used_bytes(), self.faults.capacity_bytes);
        let half = self.rng.usize(..=bytes.len());
        let content = self.file(file)?;
        let grows_by = (offset + bytes.len()).saturating_sub(content.now.len());
        let (n_bytes, result) = match fate {
            Fate::Half => (half, Err(FAILED)),
            _ if used.saturating_add(grows_by) > capacity => (half, Err(DiskError::Full)),
            fate => (bytes.len(), finish(fate)),
        };
        content.write(offset, &bytes[..n_bytes]);
        result
    }
}

pub(crate) fn finish(fate: Fate) -> Result<()> {
    if fate == Fate::Done { Ok(()) } else { Err(FAILED) }
}
