//! Which KV blocks of a session are on the disk?
//!
//! Nothing of it is ever needed: what is not there, or not right, is computed again.

use super::session::{KvContent, Session};
use super::{Store, find, nonce};
use crate::disk::{Disk, DiskError, ReadAt};
use crate::error::{Result, StoreError};
use crate::id::SessionId;
use crate::image::{BLOCK_TOKENS, BlockContext, HEADER_BYTES, ImageShape, KvFault, PAGE_BYTES};
use crate::suite::{ImageKeys, Suite};
use std::fmt;

/// What became of a block that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Loaded {
    /// The buffer has its image.
    Image,
    /// There is none, or none that is right: compute it. The buffer is empty.
    Missing,
}

/// The image of a block that may be there: what it takes to read it apart from the store.
pub struct FoundBlock {
    file: Box<dyn ReadAt>,
    shape: ImageShape,
    suite: Suite,
    keys: ImageKeys,
    context: BlockContext,
}

impl FoundBlock {
    /// Fills `image`, whatever it has, with the image as it was saved for just these tokens.
    pub fn read(&self, image: &mut Vec<u8>) -> Loaded {
        let n_bytes = usize::try_from(self.shape.place_bytes()).expect("IMAGE_BYTES_MAX fits");
        // Only what is new is zeroed: all of it is read over, or cut off.
        image.resize(n_bytes, 0);
        let n_read = self.file.read_at(self.shape.offset(self.context.index), image).unwrap_or(0);
        image.truncate(n_read);
        if self.shape.open(image, (&self.keys, self.suite), &self.context) {
            return Loaded::Image;
        }
        image.clear();
        Loaded::Missing
    }
}

impl fmt::Debug for FoundBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FoundBlock").field("index", &self.context.index).finish_non_exhaustive()
    }
}

impl<D: Disk> Store<D> {
    /// Keeps the image of block `index`, all of whose tokens the session has. Other sessions' images may go for it, the
    /// least recently used first.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a block or image that does not fit, [`StoreError::LimitReached`] or
    /// [`StoreError::DiskFull`] when there is no room, or as [`Store::history`].
    pub fn save_block(
        &mut self,
        owner: u64,
        id: SessionId,
        shape: &ImageShape,
        index: u32,
        image: &[u8],
    ) -> Result<()> {
        let n_tokens = self.history(owner, id)?.tokens.len();
        if !shape.is_possible() || image.len() != shape.block_bytes as usize {
            return Err(StoreError::Invalid { what: "the image has another size than its shape" });
        }
        if index as usize >= n_tokens / BLOCK_TOKENS {
            return Err(StoreError::Invalid { what: "the session has fewer full blocks" });
        }
        self.discover(owner, id, shape)?;
        let (offset, place_bytes) = (shape.offset(index), shape.place_bytes());
        let session = find(&mut self.sessions, owner, id)?;
        let grows_by = (offset + place_bytes).saturating_sub(session.kv.n_bytes);
        self.make_room(owner, id, grows_by)?;
        let session = find(&mut self.sessions, owner, id)?;
        let Some(context) = session.block(index) else { return Err(StoreError::NotFound) };
        let key = (session.key.images(), session.suite());
        shape.seal(image, key, &context, nonce(&mut *self.random), &mut self.scratch);
        loop {
            let session = find(&mut self.sessions, owner, id)?;
            match session.write_place(&mut self.disk, shape, index, &self.scratch) {
                Ok(n_bytes) => {
                    self.kv_bytes_written += n_bytes;
                    return Ok(());
                }
                Err(DiskError::Full) if self.evict(id, None)? => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// How many blocks from the first on may be there; whether they are right is seen when they are loaded.
    ///
    /// # Errors
    /// As [`Store::history`].
    pub fn saved_blocks(&mut self, owner: u64, id: SessionId, shape: &ImageShape) -> Result<u32> {
        self.discover(owner, id, shape)?;
        let session = find(&mut self.sessions, owner, id)?;
        let saved = session.kv.content.as_ref().map_or(&[][..], |content| &content.saved);
        let n_leading = saved.iter().take_while(|&&is_saved| is_saved).count();
        Ok(u32::try_from(n_leading).expect("a session has fewer than 2^32 blocks"))
    }

    /// Has the disk fetch the images of `n` blocks from `first` on, which are to be loaded soon.
    pub fn expect_blocks(&mut self, owner: u64, id: SessionId, shape: &ImageShape, first: u32, n: u32) {
        let Ok(session) = find(&mut self.sessions, owner, id) else { return };
        let offset = shape.offset(first);
        let n_bytes = (u64::from(n) * shape.place_bytes()).min(session.kv.n_bytes.saturating_sub(offset));
        if n_bytes > 0 {
            self.disk.will_read(&session.folder.kv(), offset, n_bytes);
        }
    }

    /// Where the image of block `index` is, if there may be one; it is read by [`FoundBlock::read`], on any thread.
    ///
    /// # Errors
    /// As [`Store::history`]; what is wrong with the file is `None`.
    pub fn find_block(
        &mut self,
        owner: u64,
        id: SessionId,
        shape: &ImageShape,
        index: u32,
    ) -> Result<Option<FoundBlock>> {
        self.discover(owner, id, shape)?;
        let session = find(&mut self.sessions, owner, id)?;
        let is_saved = |content: &KvContent| content.saved.get(index as usize).copied().unwrap_or(false);
        let may_be_there = session.kv.content.as_ref().is_some_and(is_saved);
        let Some(context) = session.block(index).filter(|_| may_be_there) else { return Ok(None) };
        let Ok(file) = self.disk.open(&session.folder.kv()) else {
            session.forget_image(index);
            return Ok(None);
        };
        let (shape, suite, keys) = (*shape, session.suite(), session.key.images().clone());
        Ok(Some(FoundBlock { file, shape, suite, keys, context }))
    }

    /// What [`Store::find_block`] has found is not the image: it is not looked for again.
    pub fn block_is_missing(&mut self, owner: u64, id: SessionId, index: u32) {
        // A session that is gone has no block either.
        let _gone = find(&mut self.sessions, owner, id).map(|session| session.forget_image(index)).is_err();
    }

    /// Fills `image`, whatever it has, with the image of block `index` as it was saved for just these tokens.
    ///
    /// # Errors
    /// As [`Store::find_block`]; what is wrong with the file is [`Loaded::Missing`].
    pub fn load_block(
        &mut self,
        owner: u64,
        id: SessionId,
        shape: &ImageShape,
        index: u32,
        image: &mut Vec<u8>,
    ) -> Result<Loaded> {
        let Some(found) = self.find_block(owner, id, shape, index)? else {
            image.clear();
            return Ok(Loaded::Missing);
        };
        let loaded = found.read(image);
        if loaded == Loaded::Missing {
            self.block_is_missing(owner, id, index);
        }
        Ok(loaded)
    }

    /// Gives the space of a session's images back.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the disk.
    pub fn drop_images(&mut self, owner: u64, id: SessionId) -> Result<()> {
        Ok(find(&mut self.sessions, owner, id)?.drop_kv(&mut self.disk)?)
    }

    /// Sessions whose KV file was of no use and is gone, since the last call.
    pub fn take_dropped(&mut self) -> Vec<(SessionId, KvFault)> {
        std::mem::take(&mut self.dropped)
    }

    /// Finds out what is in a session's KV file; removes the file if it is not of this shape.
    fn discover(&mut self, owner: u64, id: SessionId, shape: &ImageShape) -> Result<()> {
        self.history(owner, id)?;
        let session = find(&mut self.sessions, owner, id)?;
        if session.kv.content.as_ref().is_some_and(|content| content.shape == *shape) {
            return Ok(());
        }
        session.kv.content = None;
        if session.kv.n_bytes == 0 {
            return Ok(());
        }
        let found = session.kv_header(&mut self.disk);
        let suite = match found.and_then(|(found, suite)| if found == *shape { Ok(suite) } else { Err(KvFault::Shape) })
        {
            Ok(suite) => suite,
            Err(fault) => {
                session.drop_kv(&mut self.disk)?;
                self.dropped.push((id, fault));
                return Ok(());
            }
        };
        let n_tokens = session.history.as_ref().map_or(0, |history| history.tokens.len());
        let n_places = (shape.n_places(session.kv.n_bytes) as usize).min(n_tokens / BLOCK_TOKENS);
        // That a place is a hole is seen when it is loaded: looking at each would cost a cold file a read for every
        // block.
        session.kv.content = Some(KvContent { shape: *shape, suite, saved: vec![true; n_places] });
        Ok(())
    }
}

impl Session {
    /// What images are encrypted with: as they are in the file, where there is one.
    fn suite(&self) -> Suite {
        self.kv.content.as_ref().map_or_else(Suite::fastest, |content| content.suite)
    }

    /// There is no image of block `index`, whatever was thought.
    fn forget_image(&mut self, index: u32) {
        if let Some(saved) = self.kv.content.as_mut().and_then(|content| content.saved.get_mut(index as usize)) {
            *saved = false;
        }
    }

    /// Block `index` of the tokens in memory, if they have it whole.
    fn block(&mut self, index: u32) -> Option<BlockContext> {
        let tokens = &self.history.as_ref()?.tokens;
        if index as usize >= tokens.len() / BLOCK_TOKENS {
            return None;
        }
        Some(BlockContext { id: self.id, index, digest: self.kv.digests.of(tokens, index) })
    }

    /// Writes one place, and the header before the first; answers the bytes written.
    fn write_place(
        &mut self,
        disk: &mut impl Disk,
        shape: &ImageShape,
        index: u32,
        place: &[u8],
    ) -> std::result::Result<u64, DiskError> {
        let kv = self.folder.kv();
        let mut n_written = place.len() as u64;
        let index = index as usize;
        if self.kv.content.is_none() {
            match disk.create(&kv) {
                Err(DiskError::Exists) => disk.set_len(&kv, 0)?,
                made => made?,
            }
            let suite = self.suite();
            disk.write_at(&kv, 0, &shape.header(suite))?;
            n_written += HEADER_BYTES as u64;
            self.kv.n_bytes = PAGE_BYTES;
            self.kv.content = Some(KvContent { shape: *shape, suite, saved: Vec::new() });
        }
        let offset = shape.offset(u32::try_from(index).expect("it was one"));
        let written = disk.write_at(&kv, offset, place);
        let content = self.kv.content.as_mut().expect("it was made above");
        if content.saved.len() <= index {
            content.saved.resize(index + 1, false);
        }
        content.saved[index] = written.is_ok();
        match written {
            Ok(()) => self.kv.n_bytes = self.kv.n_bytes.max(offset + place.len() as u64),
            Err(error) => {
                // What came of it counts until it is written again; that it is wrong shows when it is loaded.
                self.kv.n_bytes = disk.len(&kv).unwrap_or(self.kv.n_bytes).max(self.kv.n_bytes);
                return Err(error);
            }
        }
        Ok(n_written)
    }

    /// What the KV file's header says; a file that cannot be read says nothing.
    fn kv_header(&self, disk: &mut impl Disk) -> std::result::Result<(ImageShape, Suite), KvFault> {
        let mut header = [0; HEADER_BYTES];
        let n_read = disk.read_at(&self.folder.kv(), 0, &mut header).unwrap_or(0);
        ImageShape::parse(header.get(..n_read).unwrap_or_default())
    }

    /// Cuts images of blocks off the KV file that the history, which is in memory, does not have.
    pub(super) fn cut_kv(&mut self, disk: &mut impl Disk) -> std::result::Result<(), DiskError> {
        if self.kv.n_bytes == 0 {
            return Ok(());
        }
        let n_blocks = self.history.as_ref().map_or(0, |history| history.tokens.len() / BLOCK_TOKENS);
        if n_blocks == 0 {
            return self.drop_kv(disk);
        }
        let Ok((shape, _)) = self.kv_header(disk) else { return self.drop_kv(disk) };
        let kv = self.folder.kv();
        let n_bytes = shape.offset(u32::try_from(n_blocks).expect("a session has fewer than 2^32 blocks"));
        if n_bytes < self.kv.n_bytes {
            if disk.set_len(&kv, n_bytes).and_then(|()| disk.sync(&kv)).is_err() {
                return self.drop_kv(disk);
            }
            self.kv.n_bytes = n_bytes;
        }
        Ok(())
    }

    /// Removes the KV file.
    pub(super) fn drop_kv(&mut self, disk: &mut impl Disk) -> std::result::Result<(), DiskError> {
        super::folder::ignore_missing(disk.remove(&self.folder.kv()))?;
        self.kv.n_bytes = 0;
        self.kv.content = None;
        Ok(())
    }
}
