//! Where do latent planes lie that have no room in fast memory? In a file without a name: what it holds is of no use to
//! another process, and goes with this one however it ends. Should the power go first, what is left on the disk cannot
//! be read: pages are encrypted under a key that is in memory only. For a device that reads no file it is memory, which
//! such a file is too; a device reads that where it lies, so it is plain.
//!
//! Every block of the pool has its place in it, so nothing has to be found. Pages are written as `abi/OPS.md` has them,
//! past the page cache where the file system can: what the cache would hold counts as the daemon's memory. The place of
//! a block that nobody holds any more is given back to the file system, by whoever writes.

use crate::error::BackendError;
use crate::memory::KvDesc;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use sparsed_abi::SpdKvSlow;
use sparsed_plugin_kit::slow::rowcache::{Cipher, PAGE_BYTES, Seal, SlowKey, SlowLayout};
use sparsed_plugin_kit::struct_size;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages that are written at a time.
const PAGES_AT_ONCE: usize = 64;

/// Bytes of the disk that the slow tier leaves for what is said in sessions.
const RESERVE_BYTES: u64 = 64 << 20;

/// The slow tier of one pool.
#[derive(Debug)]
pub struct SlowArea {
    layout: SlowLayout,
    seal: Seal,
    source: SlowSource,
    places: Mutex<Places>,
}

/// Which blocks' places take room, and what was written last.
#[derive(Debug, Default)]
struct Places {
    /// Written, at least in part.
    used: BTreeSet<u32>,
    /// Of these, whose content nobody needs any more.
    left: BTreeSet<u32>,
    /// The greatest tag so far: a page's nonce is made of it.
    last_tag: Option<u64>,
}

/// Where a plugin reads it; the pool keeps it open.
#[derive(Clone, Debug)]
pub(crate) struct SlowSource {
    pub(crate) file: Arc<File>,
    /// The file's bytes, where the plugin is to find them there.
    pub(crate) memory: Option<Arc<MmapRaw>>,
    /// Where the area begins, in bytes.
    pub(crate) offset: u64,
    /// Bytes of the area.
    pub(crate) length: u64,
    /// Bytes for the row cache.
    pub(crate) cache_bytes: u64,
    /// What the pages are encrypted with.
    pub(crate) key: Option<SlowKey>,
}

impl SlowSource {
    /// As the border has it, good as long as this lives and stays where it is. A plugin in a process of its own is
    /// given the file whatever it is to make of it.
    pub(crate) fn desc(&self, is_remote: bool) -> SpdKvSlow {
        let (fd, ptr) = match &self.memory {
            Some(memory) if !is_remote => (0, memory.as_ptr().cast()),
            _ => (self.file.as_raw_fd(), ptr::null()),
        };
        SpdKvSlow {
            struct_size: struct_size::<SpdKvSlow>(),
            fd,
            page_bytes: 4096,
            ptr,
            offset: self.offset,
            length: self.length,
            cache_bytes: self.cache_bytes,
            key: self.key.as_ref().map_or(ptr::null(), |key| key.bytes().as_ptr().cast()),
            cipher: self.key.as_ref().map_or(0, |key| key.cipher().number()),
            ..SpdKvSlow::default()
        }
    }
}

/// A page where the kernel may take it from directly.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

impl SlowArea {
    /// An area for a pool of this shape, in a file below `dir`, encrypted with a key that no other one has had. Rows
    /// that were read are kept in `cache_bytes` of memory.
    ///
    /// # Errors
    /// [`BackendError::Io`] for a folder that takes no file, [`BackendError::Slow`] for rows that fit into no page, and
    /// where the system gives no random numbers.
    pub fn create(
        dir: &Path,
        cipher: Cipher,
        desc: &KvDesc,
        row_bytes: usize,
        cache_bytes: u64,
    ) -> Result<Self, BackendError> {
        let (layout, length) = measure(desc, row_bytes)?;
        let io = |error: Errno| BackendError::Io { path: dir.to_owned(), source: error.into() };
        let file = File::from(unnamed(dir).map_err(io)?);
        rustix::fs::ftruncate(&file, length).map_err(io)?;
        let source = SlowSource {
            file: Arc::new(file),
            memory: None,
            offset: 0,
            length,
            cache_bytes,
            key: Some(fresh(cipher)?),
        };
        Ok(Self::of(layout, source))
    }

    fn of(layout: SlowLayout, source: SlowSource) -> Self {
        Self { layout, seal: Seal::new(source.key.as_ref()), source, places: Mutex::default() }
    }

    /// As [`Self::create`], in memory, which is taken as it is written, and plain.
    ///
    /// # Errors
    /// [`BackendError::Slow`] for rows that fit into no page, and where the system gives no memory.
    pub fn in_memory(desc: &KvDesc, row_bytes: usize, cache_bytes: u64) -> Result<Self, BackendError> {
        let (layout, length) = measure(desc, row_bytes)?;
        let none = |error: std::io::Error| BackendError::Slow { reason: format!("no memory for it: {error}") };
        let make = || {
            let file = rustix::fs::memfd_create("sparsed-slow", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            rustix::fs::ftruncate(&file, length)?;
            // A mapping past the end of a file would be a trap.
            rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(File::from(file))
        };
        let file = make().map_err(|errno: Errno| none(errno.into()))?;
        let memory = Some(map(&file, length).map_err(none)?);
        let source = SlowSource { file: Arc::new(file), memory, offset: 0, length, cache_bytes, key: None };
        Ok(Self::of(layout, source))
    }

    pub(crate) fn source(&self) -> &SlowSource {
        &self.source
    }

    /// Where the block lies in the area.
    pub fn offset_of(&self, block: u32) -> u64 {
        u64::from(block) * self.layout.block_bytes() as u64
    }

    /// Nobody needs what was written of the block any more. Waits for nothing; answers whether that leaves anything to
    /// be [reclaimed](Self::reclaim).
    pub fn leave(&self, block: u32) -> bool {
        let places = &mut *self.places();
        places.used.contains(&block) && places.left.insert(block)
    }

    /// Gives the places of blocks that were left back to the file system. May wait for the disk; not while a block is
    /// written.
    ///
    /// # Errors
    /// The disk's: the places that are left stay, for the next call.
    pub fn reclaim(&self) -> std::io::Result<()> {
        let mut left = std::mem::take(&mut self.places().left).into_iter();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        while let Some(block) = left.next() {
            let (offset, n_bytes) = (self.source.offset + self.offset_of(block), self.layout.block_bytes() as u64);
            if let Err(error) = rustix::fs::fallocate(&*self.source.file, flags, offset, n_bytes) {
                self.places().left.extend(std::iter::once(block).chain(left));
                return Err(error.into());
            }
            self.places().used.remove(&block);
        }
        Ok(())
    }

    /// Takes the block's place, for which there must be room on the disk, and the tag, which must be a new one.
    fn enter(&self, block: u32, tag: u64) -> std::io::Result<()> {
        let is_new = {
            let mut places = self.places();
            if places.last_tag.is_some_and(|last| last >= tag) {
                let reason = format!("tag {tag} comes after others that are no smaller");
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, reason));
            }
            places.last_tag = Some(tag);
            places.left.remove(&block);
            places.used.insert(block)
        };
        if is_new && self.source.memory.is_none() {
            let stat = rustix::fs::fstatvfs(&*self.source.file)?;
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            if free < self.layout.block_bytes() as u64 + RESERVE_BYTES {
                self.places().used.remove(&block);
                return Err(std::io::ErrorKind::StorageFull.into());
            }
        }
        Ok(())
    }

    /// Never held while anything waits.
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a block's latent plane, as a host image has it. May wait for the disk. Tags ascend from call to call, so
    /// that none is used twice.
    ///
    /// # Errors
    /// The disk's, which keeps a reserve for sessions' journals; a plane of another size, a tag that does not ascend.
    pub fn write(&self, block: u32, tag: u64, plane: &[u8]) -> std::io::Result<()> {
        self.enter(block, tag)?;
        let mut pages = vec![Page([0; PAGE_BYTES]); PAGES_AT_ONCE.min(self.layout.block_pages() as usize)];
        let mut offset = self.offset_of(block);
        let mut next = 0;
        while next < self.layout.block_pages() {
            let n = pages.len().min((self.layout.block_pages() - next) as usize);
            for (page, number) in pages[..n].iter_mut().zip(next..) {
                self.layout.encode_page(&self.seal, plane, tag, number, &mut page.0).map_err(std::io::Error::other)?;
            }
            self.write_pages(&pages[..n], offset)?;
            offset += (n * PAGE_BYTES) as u64;
            next += u32::try_from(n).expect("at most PAGES_AT_ONCE");
        }
        Ok(())
    }

    fn write_pages(&self, pages: &[Page], mut offset: u64) -> std::io::Result<()> {
        let mut done = 0;
        while done < pages.len() {
            let slices: Vec<IoSlice<'_>> = pages[done..].iter().map(|page| IoSlice::new(&page.0)).collect();
            let n_bytes = match rustix::io::pwritev(&*self.source.file, &slices, offset) {
                Err(Errno::INTR) => continue,
                written => written?,
            };
            // Whole pages count; what was written of another one is written again.
            let whole = n_bytes / PAGE_BYTES;
            if whole == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            done += whole;
            offset += (whole * PAGE_BYTES) as u64;
        }
        Ok(())
    }
}

/// A key that no other area has had.
fn fresh(cipher: Cipher) -> Result<SlowKey, BackendError> {
    let mut bytes = [0; 32];
    let none = |error| BackendError::Slow { reason: format!("no random numbers: {error}") };
    getrandom::fill(&mut bytes).map_err(none)?;
    Ok(SlowKey::new(cipher, bytes))
}

/// The layout of an area for a pool of this shape, and its bytes.
fn measure(desc: &KvDesc, row_bytes: usize) -> Result<(SlowLayout, u64), BackendError> {
    let layout = SlowLayout::new(row_bytes, desc.block_tokens, desc.n_layers);
    let layout = layout.map_err(|error| BackendError::Slow { reason: error.to_string() })?;
    Ok((layout, layout.block_bytes() as u64 * u64::from(desc.n_blocks)))
}

/// Whether the file is memory that nobody can shorten, as [`SlowArea::in_memory`] makes it.
pub(crate) fn is_memory(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// Maps the first `length` bytes of such a file.
///
/// # Errors
/// A file that is shorter, or may become so; the system's.
pub(crate) fn map(file: &File, length: u64) -> std::io::Result<Arc<MmapRaw>> {
    let length = usize::try_from(length).map_err(|_| std::io::ErrorKind::InvalidData)?;
    if !is_memory(file) || file.metadata()?.len() < length as u64 {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    Ok(Arc::new(MmapOptions::new().len(length).map_raw(file)?))
}

/// An open file without a name.
fn unnamed(dir: &Path) -> Result<std::os::fd::OwnedFd, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    // A memory file system cannot go past its cache.
    match rustix::fs::open(dir, flags | OFlags::DIRECT, Mode::RUSR | Mode::WUSR) {
        Err(Errno::INVAL) => rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{DT_F16, SpdRow};
    use std::os::unix::fs::FileExt;

    const CIPHER: Cipher = Cipher::ChaCha20Poly1305;

    fn desc() -> KvDesc {
        let row = |width| SpdRow { dtype: DT_F16, width };
        let (latent, rope, index) = (row(96), row(32), row(32));
        KvDesc { block_tokens: 64, n_blocks: 3, n_layers: 30, n_index_layers: 1, latent, rope, index }
    }

    #[test]
    fn the_place_of_a_block_that_was_left_takes_no_room() {
        let (dir, desc) = (tempfile::tempdir().unwrap(), desc());
        let plane = vec![7; 30 * 64 * 256];
        let in_file = SlowArea::create(dir.path(), CIPHER, &desc, 256, 1 << 20);
        for area in [in_file, SlowArea::in_memory(&desc, 256, 1 << 20)] {
            let area = area.unwrap();
            let blocks = |area: &SlowArea| rustix::fs::fstat(&*area.source.file).unwrap().st_blocks;
            (0..3).for_each(|block| area.write(block, u64::from(block), &plane).unwrap());
            let full = blocks(&area);
            assert!(area.leave(1) && !area.leave(1), "left once");
            assert!(area.leave(2));
            area.write(2, 3, &plane).unwrap(); // Somebody else's before it was reclaimed.
            area.reclaim().unwrap();
            let expected = full - (area.layout.block_bytes() / 512) as i64;
            assert_eq!(blocks(&area), expected, "of three places one is a hole");
            assert!(!area.leave(1), "it has nothing to give back any more");
            area.write(1, 4, &plane).unwrap();
            assert_eq!(blocks(&area), full);
        }
    }

    /// What is in the area's file at the place of `block`.
    fn found(area: &SlowArea, block: u32) -> Vec<u8> {
        let mut pages = vec![Page([0; PAGE_BYTES]); area.layout.block_pages() as usize];
        for (page, at) in pages.iter_mut().zip(0..) {
            area.source.file.read_exact_at(&mut page.0, area.offset_of(block) + at * PAGE_BYTES as u64).unwrap();
        }
        pages.iter().flat_map(|page| page.0).collect()
    }

    /// Whether eight bytes that follow each other in `plane` do so anywhere in `bytes`.
    fn has_any_of(bytes: &[u8], plane: &[u8]) -> bool {
        let known: std::collections::HashSet<&[u8]> = plane.chunks_exact(8).collect();
        bytes.windows(8).any(|eight| known.contains(eight))
    }

    #[test]
    fn what_is_written_is_what_the_layout_says_and_has_no_name() {
        let (dir, desc) = (tempfile::tempdir().unwrap(), desc());
        let area = SlowArea::create(dir.path(), CIPHER, &desc, 256, 1 << 20).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let plane: Vec<u8> = (0..30 * 64 * 256).map(|at| (at % 251) as u8).collect();
        area.write(2, 77, &plane).unwrap();
        let mut expected = vec![0; area.layout.block_bytes()];
        area.layout.encode_block(&Seal::new(area.source.key.as_ref()), &plane, 77, &mut expected).unwrap();
        assert!(found(&area, 2) == expected);
        assert!(area.write(1, 78, &plane[1..]).is_err());
        assert!(SlowArea::create(dir.path(), CIPHER, &desc, 5000, 1).is_err());
        // In memory it is plain.
        let area = SlowArea::in_memory(&desc, 256, 1 << 20).unwrap();
        area.write(2, 77, &plane).unwrap();
        area.layout.encode_block(&Seal::new(None), &plane, 77, &mut expected).unwrap();
        let memory = area.source.memory.as_ref().unwrap();
        let at = usize::try_from(area.offset_of(2)).unwrap();
        assert!(at + expected.len() <= memory.len());
        // SAFETY: inside the mapping, which nobody writes any more.
        let found = unsafe { std::slice::from_raw_parts(memory.as_ptr().add(at), expected.len()) };
        assert!(found == expected && has_any_of(found, &plane));
        assert!(map(&area.source.file, area.source.length + 1).is_err(), "no mapping past the end");
        assert!(map(&tempfile::tempfile().unwrap(), 0).is_err(), "nor of what can become shorter");
    }

    #[test]
    fn who_has_the_disk_finds_nothing_of_the_rows_there_nor_that_they_are_the_same_ones() {
        let (dir, desc) = (tempfile::tempdir().unwrap(), desc());
        let plane: Vec<u8> = (0..30 * 64 * 256).map(|at| (at % 251) as u8).collect();
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            let [one, other] = [(); 2].map(|()| SlowArea::create(dir.path(), cipher, &desc, 256, 1 << 20).unwrap());
            let mut seen: Vec<Vec<u8>> = Vec::new();
            // In another area, at another place, and once more at the same.
            for (area, block, tag) in [(&one, 0, 1), (&other, 0, 1), (&one, 1, 2), (&one, 0, 3)] {
                area.write(block, tag, &plane).unwrap();
                let bytes = found(area, block);
                assert!(!has_any_of(&bytes, &plane));
                let pages = |image: &[u8]| image.as_chunks::<PAGE_BYTES>().0.to_vec();
                let before: Vec<_> = seen.iter().flat_map(|image| pages(image)).collect();
                assert!(pages(&bytes).iter().all(|page| !before.contains(page)));
                seen.push(bytes);
            }
        }
    }

    #[test]
    fn no_tag_is_used_twice_whatever_becomes_of_a_write() {
        let (dir, desc) = (tempfile::tempdir().unwrap(), desc());
        let area = SlowArea::create(dir.path(), CIPHER, &desc, 256, 1 << 20).unwrap();
        let plane = vec![7; 30 * 64 * 256];
        area.write(0, 5, &plane).unwrap();
        area.write(1, 6, &plane[1..]).unwrap_err();
        for tag in [5, 6, 0] {
            let error = area.write(1, tag, &plane).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
        }
    }
}
