//! Are a step's slow rows there? The row cache and the reader of one pool together.

use super::{ReadError, Reader, SlowMemory};
use crate::border::read_in;
use crate::{PluginError, Result};
use rowcache::{
    Cipher, Lookup, PAGE_BYTES, Policy, READ_PAGES_MAX, Read, RowCache, RowCacheError, RowKey, Seal, SlowKey,
    SlowLayout,
};
use sparsed_abi::{E_DATA, E_NOMEM_DEVICE, E_NOMEM_HOST, E_STEP, SpdKvSlow};
use sparsed_rowcache as rowcache;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

/// A slow area, as `spd_kv_slow` describes it.
#[derive(Debug)]
pub struct SlowArea {
    /// What it is in.
    pub place: SlowPlace,
    /// Where the area begins there, in bytes.
    pub offset: u64,
    /// Bytes of the area.
    pub length: u64,
    /// Bytes for the row cache.
    pub cache_bytes: u64,
    /// What its pages are encrypted with; plain without.
    pub key: Option<SlowKey>,
}

/// What a slow area is in.
#[derive(Debug)]
pub enum SlowPlace {
    /// Opened for reading; the plugin's own.
    File(File),
    /// Of the host's, as long as the pool lives.
    Memory(SlowMemory),
}

impl SlowArea {
    /// Takes a description apart; a file is duplicated.
    ///
    /// # Errors
    /// `SPD_E_UNSUPPORTED` for flags, pages or ciphers that this kit does not know, `SPD_E_INVALID` for an area that
    /// nothing can have.
    ///
    /// # Safety
    /// `from` points to a struct that begins with its `struct_size` and has that many readable bytes; its file is open,
    /// or its memory is there as the header says as long as the pool lives; its key, if any, can be read.
    pub(crate) unsafe fn read(from: *const SpdKvSlow) -> Result<Self> {
        // SAFETY: the caller's contract.
        let slow = unsafe { read_in(from) }?;
        if slow.flags != 0 || slow.page_bytes as usize != PAGE_BYTES {
            let (flags, page_bytes) = (slow.flags, slow.page_bytes);
            return Err(PluginError::unsupported(format!("a slow tier of flags {flags:#x}, pages of {page_bytes}")));
        }
        let end = slow.offset.checked_add(slow.length).filter(|&end| i64::try_from(end).is_ok());
        let Some(end) = end.filter(|_| slow.offset.is_multiple_of(PAGE_BYTES as u64)) else {
            let (offset, length) = (slow.offset, slow.length);
            return Err(PluginError::invalid(format!("a slow area of {length} bytes at byte {offset}")));
        };
        let place = if slow.fd > 0 {
            // SAFETY: the caller's contract: it is open now.
            let fd = unsafe { BorrowedFd::borrow_raw(slow.fd) };
            let no_file =
                |error| PluginError::new(E_NOMEM_HOST, format!("cannot duplicate the slow tier's file: {error}"));
            SlowPlace::File(File::from(fd.try_clone_to_owned().map_err(no_file)?))
        } else {
            let base = NonNull::new(slow.ptr.cast_mut().cast::<u8>());
            let base = base.filter(|base| base.addr().get().is_multiple_of(PAGE_BYTES));
            let base = base.ok_or_else(|| PluginError::invalid("a slow tier without a file or 4096-aligned memory"))?;
            let length = usize::try_from(end).map_err(|_| PluginError::invalid("a slow area longer than memory"))?;
            // SAFETY: the caller's contract.
            SlowPlace::Memory(unsafe { SlowMemory::new(base, length) })
        };
        // SAFETY: the caller's contract.
        let key = unsafe { key_of(&slow) }?;
        Ok(Self { place, offset: slow.offset, length: slow.length, cache_bytes: slow.cache_bytes, key })
    }
}

/// The key of a slow area, if it has one.
///
/// # Safety
/// It can be read, unless it is NULL.
unsafe fn key_of(slow: &SpdKvSlow) -> Result<Option<SlowKey>> {
    let number = slow.cipher;
    if slow.key.is_null() {
        let without = || PluginError::invalid(format!("a slow tier of cipher {number} without a key"));
        return if number == 0 { Ok(None) } else { Err(without()) };
    }
    let unknown = || PluginError::unsupported(format!("a slow tier of cipher {number}"));
    let cipher = Cipher::numbered(number).ok_or_else(unknown)?;
    // SAFETY: the caller's contract: 32 bytes, of any alignment.
    Ok(Some(SlowKey::new(cipher, unsafe { slow.key.cast::<[u8; 32]>().read_unaligned() })))
}

/// The slow tier of one pool. Used by one thread at a time.
#[derive(Debug)]
pub struct SlowTier {
    cache: RowCache,
    reader: Reader,
    no_uring: Option<std::io::Error>,
    lookup: Lookup,
    /// Those of the lookup, while it takes what they bring.
    reads: Vec<Read>,
}

impl SlowTier {
    /// For a pool of `n_blocks` blocks of this layout.
    ///
    /// # Errors
    /// `SPD_E_NOMEM_DEVICE` when the cache holds no row, `SPD_E_NOMEM_HOST` when the system gives no threads.
    pub fn new(slow: SlowArea, layout: SlowLayout, n_blocks: u32) -> Result<Self> {
        let limit_bytes = usize::try_from(slow.cache_bytes).unwrap_or(usize::MAX);
        let form = (layout, Seal::new(slow.key.as_ref()));
        let cache = RowCache::new(form, Policy::Clock, n_blocks, slow.length, limit_bytes)?;
        let no_reader = |error| PluginError::new(E_NOMEM_HOST, format!("cannot read the slow tier: {error}"));
        let (reader, no_uring) = match slow.place {
            SlowPlace::File(file) => Reader::open(file, slow.offset).map_err(no_reader)?,
            SlowPlace::Memory(memory) => (Reader::of_memory(memory, slow.offset), None),
        };
        Ok(Self { cache, reader, no_uring, lookup: Lookup::default(), reads: Vec::new() })
    }

    /// Why threads read instead of io_uring, if they do.
    pub const fn no_uring(&self) -> Option<&std::io::Error> {
        self.no_uring.as_ref()
    }

    /// Which rows and blocks are there.
    pub const fn cache(&self) -> &RowCache {
        &self.cache
    }

    /// As [`Self::cache`], to attach, detach and release.
    pub const fn cache_mut(&mut self) -> &mut RowCache {
        &mut self.cache
    }

    /// Makes all of `keys` present until [`RowCache::release`].
    ///
    /// # Errors
    /// `SPD_E_DATA` with the block when a page cannot be read or is not what was written, `SPD_E_NOMEM_DEVICE` when
    /// the rows do not fit into the cache together, `SPD_E_INVALID` for a row that is not in the slow tier. What was
    /// present stays right; the step may be repeated after a release.
    pub fn fetch(&mut self, keys: &[RowKey]) -> Result<()> {
        let Self { cache, reader, lookup, reads, .. } = self;
        cache.lookup(keys, lookup)?;
        reads.clear();
        reads.extend_from_slice(lookup.reads());
        reader.read(reads, |read, bytes| Ok(cache.admit(lookup, read, bytes)?))
    }

    /// Reads the latent plane of a block, past the cache: `[n_layers, block_tokens, row_bytes]`.
    ///
    /// # Errors
    /// As [`Self::fetch`]; `plane` is then half filled.
    pub fn read_block(&mut self, block: u32, plane: &mut [u8]) -> Result<()> {
        let layout = *self.cache.layout();
        let offset = self.cache.place(block).ok_or(RowCacheError::NotAttached { block })?;
        let firsts = (0..layout.block_pages()).step_by(READ_PAGES_MAX as usize);
        let read = |first: u32| {
            let n_pages = (layout.block_pages() - first).min(READ_PAGES_MAX);
            Read { block, offset: offset + u64::from(first) * PAGE_BYTES as u64, n_pages }
        };
        let reads: Vec<Read> = firsts.map(read).collect();
        let Self { cache, reader, .. } = self;
        reader.read(&reads, |index, bytes| {
            let first = u32::try_from(index).expect("fewer reads than pages") * READ_PAGES_MAX;
            for (page, bytes) in (first..).zip(bytes.as_chunks_mut().0) {
                cache.decode_page(block, page, bytes, plane)?;
            }
            Ok(())
        })
    }
}

impl From<RowCacheError> for PluginError {
    fn from(error: RowCacheError) -> Self {
        match error {
            RowCacheError::BadPage { block, .. } => Self::new(E_DATA, error.to_string()).of_block(block),
            RowCacheError::TooSmall { .. } => Self::new(E_NOMEM_DEVICE, error.to_string()),
            RowCacheError::RowBytes { .. } => Self::unsupported(error.to_string()),
            _ => Self::invalid(error.to_string()),
        }
    }
}

impl From<ReadError> for PluginError {
    fn from(error: ReadError) -> Self {
        match &error {
            ReadError::Short { read, .. } | ReadError::Io { read, .. } => {
                Self::new(E_DATA, error.to_string()).of_block(read.block)
            }
            ReadError::Queue(_) => Self::new(E_STEP, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    const TAG: u64 = 0x1234_5678_9ABC_DEF0;

    fn key() -> Option<SlowKey> {
        Some(SlowKey::new(Cipher::Aes256Gcm, [7; 32]))
    }

    /// A tier of `n_slots` rows over two blocks of 64 tokens in 3 layers, behind a page of something else; its file,
    /// and each block's latent plane.
    fn tier(n_slots: u64) -> (SlowTier, File, Vec<Vec<u8>>) {
        let layout = SlowLayout::new(656, 64, 3).unwrap();
        let mut random = fastrand::Rng::with_seed(4);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xAA; PAGE_BYTES]).unwrap();
        let mut planes = Vec::new();
        for block in 0..2 {
            let plane: Vec<u8> = (0..layout.plane_bytes()).map(|_| random.u8(..)).collect();
            let mut image = vec![0; layout.block_bytes()];
            layout.encode_block(&Seal::new(key().as_ref()), &plane, TAG + block, &mut image).unwrap();
            file.write_all(&image).unwrap();
            planes.push(plane);
        }
        let slow = SlowArea {
            place: SlowPlace::File(file.try_clone().unwrap()),
            offset: PAGE_BYTES as u64,
            length: 2 * layout.block_bytes() as u64,
            cache_bytes: n_slots * (656 + rowcache::SLOT_OVERHEAD_BYTES as u64),
            key: key(),
        };
        let mut tier = SlowTier::new(slow, layout, 5).unwrap();
        // Block 4 is the first image, block 2 the second.
        tier.cache_mut().attach(4, 0, TAG).unwrap();
        tier.cache_mut().attach(2, layout.block_bytes() as u64, TAG + 1).unwrap();
        (tier, file, planes)
    }

    fn keys(block: u32, tokens: std::ops::Range<u32>) -> Vec<RowKey> {
        tokens.map(|token| RowKey { block, layer: 2, token }).collect()
    }

    fn spoil(file: &mut File, at: u64) {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&[0x55; 7]).unwrap();
    }

    #[test]
    fn fetched_rows_are_those_of_the_blocks() {
        let (mut tier, _, planes) = tier(100);
        for (block, plane) in [(4, &planes[0]), (2, &planes[1]), (4, &planes[0])] {
            let keys = keys(block, 0..64);
            tier.fetch(&keys).unwrap();
            for key in keys {
                let at = (2 * 64 + key.token as usize) * 656;
                assert!(tier.cache().row(key).unwrap() == &plane[at..at + 656], "{key:?}");
            }
            tier.cache_mut().release();
        }
        for (block, expected) in [(4, &planes[0]), (2, &planes[1])] {
            let mut plane = vec![0; expected.len()];
            tier.read_block(block, &mut plane).unwrap();
            assert!(plane == **expected);
        }
    }

    #[test]
    fn a_bad_page_or_a_short_file_names_the_block_and_the_step_can_be_repeated() {
        let (mut tier, mut file, planes) = tier(200);
        let both: Vec<RowKey> = keys(2, 0..64).into_iter().chain(keys(4, 0..64)).collect();
        let length = file.metadata().unwrap().len();
        let image = tier.cache().layout().block_bytes() as u64;
        spoil(&mut file, 4096 + image - 2 * 4096);
        let error = tier.fetch(&both).unwrap_err();
        assert_eq!((error.status, error.block), (E_DATA, Some(4)), "{error}");
        assert_eq!(tier.read_block(4, &mut vec![0; planes[0].len()]).unwrap_err().block, Some(4));
        file.set_len(length - 100).unwrap();
        tier.cache_mut().release();
        let error = tier.fetch(&keys(2, 60..64)).unwrap_err();
        assert_eq!((error.status, error.block), (E_DATA, Some(2)), "{error}");
        // Both are written again.
        for (block, plane) in (0..).zip(&planes) {
            let mut bytes = vec![0; usize::try_from(image).unwrap()];
            tier.cache().layout().encode_block(&Seal::new(key().as_ref()), plane, TAG + block, &mut bytes).unwrap();
            file.seek(SeekFrom::Start(4096 + block * image)).unwrap();
            file.write_all(&bytes).unwrap();
        }
        tier.cache_mut().release();
        tier.fetch(&both).unwrap();
        assert!(both.iter().all(|&key| tier.cache().row(key).is_some()));
    }

    #[test]
    fn a_page_that_is_put_elsewhere_or_comes_back_from_before_is_bad() {
        let (mut tier, mut file, planes) = tier(200);
        let (layout, seal) = (*tier.cache().layout(), Seal::new(key().as_ref()));
        let image = layout.block_bytes() as u64;
        let pages = |plane: &[u8], tag| {
            let mut bytes = vec![0; layout.block_bytes()];
            layout.encode_block(&seal, plane, tag, &mut bytes).unwrap();
            bytes
        };
        let mut put = |bytes: &[u8], at: u64| {
            file.seek(SeekFrom::Start(4096 + at)).unwrap();
            file.write_all(bytes).unwrap();
        };
        let (own, other) = (pages(&planes[0], TAG), pages(&planes[1], TAG + 1));
        let page = PAGE_BYTES as u64;
        let last = usize::try_from(image - page).unwrap();
        let bad = |tier: &mut SlowTier| {
            tier.cache_mut().release();
            let error = tier.fetch(&keys(4, 0..64)).unwrap_err();
            assert_eq!((error.status, error.block), (E_DATA, Some(4)), "{error}");
        };
        // The other block's at the same number, and its own page of another number.
        for moved in [&other[last..], &own[last - PAGE_BYTES..last]] {
            put(moved, image - page);
            bad(&mut tier);
        }
        // The block is written again; then the disk has what it had before.
        put(&pages(&planes[1], TAG + 2), 0);
        tier.cache_mut().attach(4, 0, TAG + 2).unwrap();
        tier.fetch(&keys(4, 0..64)).unwrap();
        tier.cache_mut().attach(4, 0, TAG + 2).unwrap();
        put(&own, 0);
        bad(&mut tier);
        put(&pages(&planes[1], TAG + 2), 0);
        tier.cache_mut().release();
        tier.fetch(&keys(4, 0..64)).unwrap();
    }

    #[test]
    fn what_cannot_be_fetched_has_the_status_that_says_why() {
        let (mut tier, ..) = tier(63);
        assert_eq!(tier.fetch(&keys(4, 0..64)).unwrap_err().status, E_NOMEM_DEVICE);
        assert_eq!(tier.fetch(&keys(3, 0..1)).unwrap_err().status, sparsed_abi::E_INVALID);
        assert_eq!(tier.read_block(3, &mut []).unwrap_err().status, sparsed_abi::E_INVALID);
        let too_long: PluginError = SlowLayout::new(4081, 64, 3).unwrap_err().into();
        assert_eq!(too_long.status, sparsed_abi::E_UNSUPPORTED);
    }

    #[test]
    fn memory_is_read_as_a_file_is_and_not_past_its_end() {
        let layout = SlowLayout::new(656, 64, 3).unwrap();
        let mut random = fastrand::Rng::with_seed(5);
        let plane: Vec<u8> = (0..layout.plane_bytes()).map(|_| random.u8(..)).collect();
        // Behind a page of something else; the second block's last page is missing.
        let mut image = vec![0u8; 2 * layout.block_pages() as usize * PAGE_BYTES];
        for block in 0..2 {
            let mut pages = vec![0; layout.block_bytes()];
            layout.encode_block(&Seal::new(None), &plane, TAG + block, &mut pages).unwrap();
            let at = PAGE_BYTES + usize::try_from(block).unwrap() * layout.block_bytes();
            let end = image.len().min(at + pages.len());
            image[at..end].copy_from_slice(&pages[..end - at]);
        }
        let length = image.len();
        let base = NonNull::new(image.as_mut_ptr()).unwrap();
        // SAFETY: `image` lives longer than the tier, and nobody writes it meanwhile.
        let place = SlowPlace::Memory(unsafe { SlowMemory::new(base, length) });
        let (offset, cache_bytes) = (PAGE_BYTES as u64, 1 << 20);
        let area = SlowArea { place, offset, length: 2 * layout.block_bytes() as u64, cache_bytes, key: None };
        let mut tier = SlowTier::new(area, layout, 5).unwrap();
        tier.cache_mut().attach(4, 0, TAG).unwrap();
        tier.cache_mut().attach(2, layout.block_bytes() as u64, TAG + 1).unwrap();
        let rows = keys(4, 0..64);
        tier.fetch(&rows).unwrap();
        for key in rows {
            let at = (2 * 64 + key.token as usize) * 656;
            assert!(tier.cache().row(key).unwrap() == &plane[at..at + 656], "{key:?}");
        }
        tier.cache_mut().release();
        let mut found = vec![0; plane.len()];
        tier.read_block(4, &mut found).unwrap();
        assert!(found == plane);
        let error = tier.read_block(2, &mut found).unwrap_err();
        assert_eq!((error.status, error.block), (E_DATA, Some(2)), "{error}");
    }

    #[test]
    fn a_description_of_a_slow_tier_is_taken_apart_or_refused() {
        use std::os::fd::AsRawFd;
        use std::ptr;
        let (file, key) = (tempfile::tempfile().unwrap(), [5u8; 32]);
        let good = SpdKvSlow {
            struct_size: crate::struct_size::<SpdKvSlow>(),
            fd: file.as_raw_fd(),
            page_bytes: 4096,
            offset: 8192,
            length: 1 << 30,
            cache_bytes: 77,
            key: key.as_ptr().cast(),
            cipher: 2,
            ..SpdKvSlow::default()
        };
        // SAFETY: a whole struct, the file is open, and the key is there.
        let read = |slow: SpdKvSlow| unsafe { SlowArea::read(&raw const slow) };
        let slow = read(good).unwrap();
        assert_eq!((slow.offset, slow.length, slow.cache_bytes), (8192, 1 << 30, 77));
        let SlowPlace::File(own) = &slow.place else { panic!("{slow:?}") };
        assert_ne!(own.as_raw_fd(), file.as_raw_fd(), "the plugin's own");
        let found = slow.key.unwrap();
        assert_eq!((found.cipher(), found.bytes()), (Cipher::ChaCha20Poly1305, &key));
        let plain = SpdKvSlow { key: ptr::null(), cipher: 0, ..good };
        assert!(read(plain).unwrap().key.is_none());
        // As a daemon of an older minor has it.
        assert!(read(SpdKvSlow { struct_size: 48, ..good }).unwrap().key.is_none());
        let (invalid, unsupported) = (sparsed_abi::E_INVALID, sparsed_abi::E_UNSUPPORTED);
        for (bad, status) in [
            (SpdKvSlow { fd: 0, ..good }, invalid),
            (SpdKvSlow { fd: -1, ptr: ptr::without_provenance(4097), ..good }, invalid),
            (SpdKvSlow { flags: 1, ..good }, unsupported),
            (SpdKvSlow { page_bytes: 512, ..good }, unsupported),
            (SpdKvSlow { offset: 4097, ..good }, invalid),
            (SpdKvSlow { length: u64::MAX, ..good }, invalid),
            (SpdKvSlow { length: i64::MAX as u64, ..good }, invalid),
            (SpdKvSlow { struct_size: 4, ..good }, sparsed_abi::E_ABI),
            (SpdKvSlow { cipher: 0, ..good }, unsupported),
            (SpdKvSlow { cipher: 3, ..good }, unsupported),
            (SpdKvSlow { key: ptr::null(), ..good }, invalid),
        ] {
            assert_eq!(read(bad).unwrap_err().status, status, "{bad:?}");
        }
    }
}
