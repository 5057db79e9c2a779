//! How do images of blocks get to the disk and back, and what room have they there?

use super::keeper::Keeper;
use super::readers::Found;
use crate::durable::Restore;
use crate::service::Command;
use sparsed_kv::{FileId, Save};
use sparsed_session::{ImageShape, SessionId, StoreError};

/// Bytes of the disk that blocks leave for what is said.
pub(super) const RESERVE_BYTES: u64 = 64 << 20;
/// Bytes of the disk that must be free before blocks have room again without more ado.
const EASE_BYTES: u64 = 2 * RESERVE_BYTES;
/// Windows of a session's file that the disk fetches ahead of the one that is read.
const READ_AHEAD: u32 = 2;

impl Keeper {
    /// Writes the image that waits the longest.
    pub(super) fn write_image(&mut self) {
        let Some((slot, shape, save, image)) = self.images.pop_front() else { return };
        // Of a turn that is not the last one any more, the session may say something else now.
        if let Some(&(owner, id)) = self.files.get(&save.file) {
            let was_tight = self.is_tight;
            let saved = if self.has_space(id, image.len() as u64) {
                self.store.save_block(owner, id, &shape, save.index, &image)
            } else {
                Err(StoreError::DiskFull)
            };
            if self.is_news(id, saved, was_tight)
                && let Err(error) = saved
            {
                log::warn!(session:% = id, block = save.index, reason:% = error; "block not saved, it would be computed again");
            }
            // Writing it has read the session again, as the next one would.
            let is_theirs = |file: FileId| self.files.get(&file).is_some_and(|&(_, other)| other == id);
            if !self.images.iter().any(|(_, _, next, _)| is_theirs(next.file)) {
                self.rest(owner, id);
            }
        }
        self.tell_engine(Command::Written { slot });
    }

    /// Whether what became of an image is worth a line: a want of room is said once, not for each block.
    pub(super) fn is_news(&mut self, id: SessionId, saved: Result<(), StoreError>, was_tight: bool) -> bool {
        match saved {
            Ok(()) => {
                self.over_quota.remove(&id);
                false
            }
            // It was cut meanwhile.
            Err(StoreError::NotFound | StoreError::Invalid { .. }) => false,
            Err(StoreError::DiskFull) => !was_tight,
            Err(StoreError::LimitReached { .. }) => self.over_quota.insert(id),
            Err(_) => true,
        }
    }

    /// Whether the disk has room for an image of a session beside what is left for what is said. Others' go for it.
    fn has_space(&mut self, id: SessionId, n_bytes: u64) -> bool {
        let wanted = RESERVE_BYTES + n_bytes;
        let Ok(free) = self.store.free_bytes() else { return false };
        if free >= wanted {
            self.is_tight &= free < EASE_BYTES;
            return true;
        }
        // What cannot be removed is still there afterwards, which is looked at.
        let freed = self.store.make_space(id, wanted - free).unwrap_or(0);
        if freed > 0 && !self.is_tight {
            log::warn!(bytes = freed; "the disk is full: blocks of sessions are dropped");
        }
        self.is_tight = true;
        freed > 0 && self.store.free_bytes().is_ok_and(|free| free >= wanted)
    }

    /// Has blocks read: the engine hears of them from whoever reads. Memory that is used again is not to be fetched
    /// from the system page by page, which costs as much as decryption.
    pub(super) fn restore(&mut self, slot: usize, shape: &ImageShape, restore: Restore, mut spare: Vec<Vec<u8>>) {
        self.read_ahead(shape, restore);
        let at = self.files.get(&restore.file).copied();
        let mut found = Vec::new();
        for block in restore.first..restore.first.saturating_add(restore.n) {
            let Some((owner, id)) = at else { break };
            // After the loss of a device its last blocks may be on their way to the file.
            let on_its_way = |save: &Save| (save.file, save.index) == (restore.file, block);
            if let Some((.., image)) = self.images.iter().find(|(_, _, save, _)| on_its_way(save)) {
                found.push(Found::Image(image.clone()));
                continue;
            }
            match self.store.find_block(owner, id, shape, block) {
                Ok(Some(block)) => found.push(Found::Block(block, spare.pop().unwrap_or_default())),
                Ok(None) => break,
                Err(error) => {
                    log::warn!(session:% = id, block, reason:% = error; "block cannot be read, it is computed again");
                    break;
                }
            }
        }
        self.readers.read(slot, restore, found, self.hearers());
    }

    /// A block of a file is not what was thought. Another turn's file has other blocks.
    pub(super) fn missing(&mut self, file: FileId, block: u32) {
        if let Some(&(owner, id)) = self.files.get(&file) {
            self.store.block_is_missing(owner, id, block);
        }
    }

    /// While blocks are decrypted the disk reads the next ones; a file that is in memory already costs nothing.
    fn read_ahead(&mut self, shape: &ImageShape, Restore { file, first, n, .. }: Restore) {
        let Some(&(owner, id)) = self.files.get(&file) else { return };
        // Nobody has asked for what a session begins with before.
        let ahead = n.saturating_mul(READ_AHEAD);
        let (from, n) = if first == 0 { (0, n.saturating_add(ahead)) } else { (first.saturating_add(ahead), n) };
        self.store.expect_blocks(owner, id, shape, from, n);
    }
}
