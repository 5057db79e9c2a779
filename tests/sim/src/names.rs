//! Which names of files and folders survive a power cut?

use crate::content::Luck;
use fastrand::Rng;
use std::collections::BTreeMap;

/// A folder's number and a name in it.
pub(crate) type Key = (usize, String);

/// All names, as everybody sees them and as they are on the disk.
#[derive(Debug, Default)]
pub(crate) struct Names {
    now: BTreeMap<Key, usize>,
    durable: BTreeMap<Key, usize>,
    /// What was not synced, the oldest first.
    pending: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Link(Key, usize),
    Unlink(Key),
    Rename(Key, Key, usize),
}

impl Names {
    pub(crate) fn find(&self, key: &Key) -> Option<usize> {
        self.now.get(key).copied()
    }

    /// Names in a folder, and what they are of.
    pub(crate) fn of(&self, dir: usize) -> impl Iterator<Item = (&str, usize)> {
        let entries = self.now.range((dir, String::new())..).take_while(move |((of, _), _)| *of == dir);
        entries.map(|((_, name), &node)| (name.as_str(), node))
    }

    /// Everything that has a name.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = usize> {
        self.now.values().copied()
    }

    pub(crate) fn link(&mut self, key: Key, node: usize) {
        self.change(Change::Link(key, node));
    }

    pub(crate) fn unlink(&mut self, key: Key) {
        self.change(Change::Unlink(key));
    }

    pub(crate) fn rename(&mut self, from: Key, to: Key, node: usize) {
        self.change(Change::Rename(from, to, node));
    }

    pub(crate) fn sync(&mut self, dir: usize) {
        let (synced, rest) = self.pending.drain(..).partition::<Vec<_>, _>(|change| change.is_in(dir));
        self.pending = rest;
        synced.iter().for_each(|change| change.apply(&mut self.durable));
    }

    /// Any of the changes may be there; a renaming is, or is not, as a whole.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        let luck = Luck::any(rng);
        for change in self.pending.drain(..) {
            if luck.keeps(rng) {
                change.apply(&mut self.durable);
            }
        }
        self.now.clone_from(&self.durable);
    }

    /// Forgets that anything was not synced.
    pub(crate) fn settle(&mut self) {
        self.pending.clear();
        self.durable.clone_from(&self.now);
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.now);
        self.pending.push(change);
    }
}

impl Change {
    fn is_in(&self, dir: usize) -> bool {
        match self {
            Self::Link(key, _) | Self::Unlink(key) => key.0 == dir,
            Self::Rename(from, to, _) => from.0 == dir || to.0 == dir,
        }
    }

    fn apply(&self, names: &mut BTreeMap<Key, usize>) {
        match self {
            Self::Link(key, node) => drop(names.insert(key.clone(), *node)),
            Self::Unlink(key) => drop(names.remove(key)),
            Self::Rename(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
        }
    }
}
