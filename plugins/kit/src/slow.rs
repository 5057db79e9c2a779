//! How do pages of the slow tier come into memory?
//!
//! [`SlowTier`] is what a plugin uses: the row cache of a pool and the reader that fills it.
//!
//! A [`Reader`] reads a list of [`Read`]s from one file and hands out each as it arrives: by io_uring where the kernel
//! allows it, else by threads that call `pread`. Both give the same bytes and the same errors. Buffers belong to the
//! reader, as many as reads are in flight, aligned for `O_DIRECT`: memory does not grow with the list, and pages are
//! checked and copied while others are still on their way. A slow tier in host memory goes the same
//! way, each read a copy.
//!
//! Measured by `examples/slow_tier.rs`, figures in `tests/bench/RESULTS.md`: there one decoded token's misses, layer by
//! layer, take io_uring 7 to 10 ms and threads 25 ms, with four times the CPU time.

mod memory;
mod threads;
mod tier;
mod uring;

pub use memory::SlowMemory;
pub use sparsed_rowcache as rowcache;
pub use tier::{SlowArea, SlowPlace, SlowTier};

use rowcache::{PAGE_BYTES, READ_PAGES_MAX, Read};
use std::fs::File;
use std::io;

/// Reads in flight at once; each has a buffer of 64 KiB.
pub const QUEUE_DEPTH: u32 = 32;
/// Threads that read where io_uring is not allowed.
pub const READ_THREADS: u32 = 8;
/// Most reads in flight that may be asked for.
pub const QUEUE_DEPTH_MAX: u32 = 1024;

const BUFFER_BYTES: usize = READ_PAGES_MAX as usize * PAGE_BYTES;

/// Room for one read, aligned as `O_DIRECT` wants it.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Buffer([u8; BUFFER_BYTES]);

impl Buffer {
    fn new() -> Box<Self> {
        Box::new(Self([0; BUFFER_BYTES]))
    }
}

/// A read that did not bring what it should.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReadError {
    /// The file ends before the read does.
    Short {
        /// Which read.
        read: Read,
        /// Bytes that came.
        found: usize,
    },
    /// The system refused it, or the medium failed.
    Io {
        /// Which read.
        read: Read,
        /// Why.
        error: io::Error,
    },
    /// Reads cannot be started or awaited any more; the file itself may be whole.
    Queue(io::Error),
}

impl std::fmt::Display for ReadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Short { read, found } => {
                let wanted = read.len_bytes();
                write!(f, "block {}: {found} of {wanted} bytes at byte {}", read.block, read.offset)
            }
            Self::Io { read, error } => write!(f, "block {}: at byte {}: {error}", read.block, read.offset),
            Self::Queue(error) => write!(f, "the queue of reads: {error}"),
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Short { .. } => None,
            Self::Io { error, .. } | Self::Queue(error) => Some(error),
        }
    }
}

/// How a reader reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// io_uring with so many reads in flight.
    Uring {
        /// 1 to [`QUEUE_DEPTH_MAX`]
        depth: u32,
    },
    /// So many threads that call `pread`.
    Threads {
        /// 1 to [`QUEUE_DEPTH_MAX`]
        n_threads: u32,
    },
}

/// One way of having several reads in flight.
trait Flights: std::fmt::Debug + Send {
    /// Starts reading `length` bytes (at most a buffer) at `offset`; false when all buffers are in use.
    fn start(&mut self, index: usize, offset: u64, length: usize) -> io::Result<bool>;

    /// Reads that were started and have not landed.
    fn n_in_flight(&self) -> usize;

    /// Waits until a read lands.
    fn wait(&mut self) -> io::Result<Landed>;

    /// What a read that landed has brought, to be decrypted there; until the next start.
    fn bytes(&mut self, slot: usize) -> &mut [u8; BUFFER_BYTES];
}

/// A read that has ended.
#[derive(Debug)]
struct Landed {
    /// As it was started.
    index: usize,
    /// Where its bytes are.
    slot: usize,
    /// Bytes that came: fewer than wanted at the end of the file only.
    found: io::Result<usize>,
}

/// Reads pages from one file, or from memory.
#[derive(Debug)]
pub struct Reader {
    flights: Box<dyn Flights>,
    area_offset: u64,
}

impl Reader {
    /// A reader by io_uring, or by threads together with the reason why not by io_uring. Offsets of reads count from
    /// byte `area_offset` of `file`.
    ///
    /// # Errors
    /// When threads cannot be started either.
    pub fn open(file: File, area_offset: u64) -> io::Result<(Self, Option<io::Error>)> {
        Self::by_or_threads(Method::Uring { depth: QUEUE_DEPTH }, file, area_offset)
    }

    /// A reader of memory, where a read is a copy.
    pub fn of_memory(memory: SlowMemory, area_offset: u64) -> Self {
        Self { flights: Box::new(memory::Copies::new(memory)), area_offset }
    }

    fn by_or_threads(method: Method, file: File, area_offset: u64) -> io::Result<(Self, Option<io::Error>)> {
        let for_threads = file.try_clone()?;
        match Self::by(method, file, area_offset) {
            Ok(reader) => Ok((reader, None)),
            Err(reason) => {
                let threads = Method::Threads { n_threads: READ_THREADS };
                Ok((Self::by(threads, for_threads, area_offset)?, Some(reason)))
            }
        }
    }

    /// As [`Self::open`], by this method or not at all.
    ///
    /// # Errors
    /// When the system does not allow it, or the number of reads is out of range.
    pub fn by(method: Method, file: File, area_offset: u64) -> io::Result<Self> {
        let (Method::Uring { depth: n } | Method::Threads { n_threads: n }) = method;
        if n == 0 || n > QUEUE_DEPTH_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{n} reads in flight")));
        }
        let flights: Box<dyn Flights> = match method {
            Method::Uring { depth } => Box::new(uring::Uring::new(file, depth)?),
            Method::Threads { n_threads } => Box::new(threads::Threads::new(file, n_threads)?),
        };
        Ok(Self { flights, area_offset })
    }

    /// Carries out `reads` and gives each one's index and bytes to `take`, which may decrypt them where they are, in
    /// the order in which they land. After the first failure, of a read or of `take`, no other read is started, and
    /// those in flight are awaited.
    ///
    /// # Errors
    /// The first failure.
    ///
    /// # Panics
    /// When a read has more than [`READ_PAGES_MAX`] pages.
    pub fn read<E: From<ReadError>>(
        &mut self,
        reads: &[Read],
        mut take: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        // What a call before left behind that was cut off by a panic or a failing queue.
        while self.flights.n_in_flight() > 0 {
            self.flights.wait().map_err(ReadError::Queue)?;
        }
        let (mut failure, mut next) = (None, 0);
        loop {
            while failure.is_none() && next < reads.len() {
                match self.start(next, reads[next]) {
                    Ok(true) => next += 1,
                    Ok(false) => break,
                    Err(error) => failure = Some(error.into()),
                }
            }
            if self.flights.n_in_flight() == 0 {
                break;
            }
            let landed = self.flights.wait().map_err(ReadError::Queue)?;
            if failure.is_none() {
                let bytes = self.whole(&landed, reads[landed.index]).map_err(E::from);
                failure = bytes.and_then(|bytes| take(landed.index, bytes)).err();
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn start(&mut self, index: usize, read: Read) -> Result<bool, ReadError> {
        assert!(read.n_pages <= READ_PAGES_MAX, "a read of {} pages", read.n_pages);
        let past_end = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = self.area_offset.checked_add(read.offset).filter(|&offset| i64::try_from(offset).is_ok());
        let offset = offset.ok_or_else(|| ReadError::Io { read, error: past_end() })?;
        self.flights.start(index, offset, read.len_bytes()).map_err(ReadError::Queue)
    }

    /// The bytes of a read that has brought all of them.
    fn whole(&mut self, landed: &Landed, read: Read) -> Result<&mut [u8], ReadError> {
        match &landed.found {
            Ok(found) if *found == read.len_bytes() => Ok(&mut self.flights.bytes(landed.slot)[..*found]),
            Ok(found) => Err(ReadError::Short { read, found: *found }),
            Err(error) => Err(ReadError::Io { read, error: copy(error) }),
        }
    }
}

/// The same error once more.
fn copy(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// Whether a read that has brought `found` bytes more, `done` in all, of `length` goes on: the kernel cuts a read at
/// a page when a signal comes, anything else is the end of the file (where `O_DIRECT` would refuse the rest).
const fn goes_on(found: usize, done: usize, length: usize) -> bool {
    found > 0 && done < length && done.is_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    const METHODS: [Method; 5] = [
        Method::Uring { depth: 1 },
        Method::Uring { depth: 4 },
        Method::Uring { depth: QUEUE_DEPTH },
        Method::Threads { n_threads: 1 },
        Method::Threads { n_threads: 4 },
    ];

    /// A reader; none where this system does not allow io_uring, which is said.
    fn reader(method: Method, file: &File, area_offset: u64) -> Option<Reader> {
        match Reader::by(method, file.try_clone().unwrap(), area_offset) {
            Ok(reader) => Some(reader),
            Err(error) if matches!(method, Method::Uring { .. }) => {
                let mut stderr = io::stderr();
                writeln!(stderr, "not tested, no io_uring here: {error}").unwrap();
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// A file of `length` random bytes, and the bytes.
    fn random_file(length: usize) -> (File, Vec<u8>) {
        let mut random = fastrand::Rng::with_seed(length as u64);
        let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    fn page(n: usize) -> u64 {
        (n * PAGE_BYTES) as u64
    }

    /// Random reads inside a file of `n_pages` pages.
    fn random_reads(n: usize, n_pages: usize) -> Vec<Read> {
        let mut random = fastrand::Rng::with_seed(n as u64);
        let one = |_| {
            let first = random.usize(..n_pages);
            let most = (n_pages - first).min(READ_PAGES_MAX as usize) as u32;
            Read { block: 3, offset: page(first), n_pages: random.u32(1..=most) }
        };
        (0..n).map(one).collect()
    }

    /// Reads everything; the reads that arrived whole, in the order of the list.
    fn read_all(reader: &mut Reader, reads: &[Read]) -> Result<Vec<Option<Vec<u8>>>, ReadError> {
        let mut found = vec![None; reads.len()];
        reader.read(reads, |index, bytes| {
            assert!(found[index].replace(bytes.to_vec()).is_none(), "read {index} arrived twice");
            Ok::<(), ReadError>(())
        })?;
        Ok(found)
    }

    #[test]
    fn every_method_reads_the_same_bytes_many_times_over() {
        let (file, bytes) = random_file(200 * PAGE_BYTES);
        for (method, area) in METHODS.into_iter().flat_map(|method| [(method, 0), (method, 40)]) {
            let Some(mut reader) = reader(method, &file, page(area)) else { continue };
            for n in [0, 1, 5, 300, 40] {
                let reads = random_reads(n, 200 - area);
                for (found, read) in read_all(&mut reader, &reads).unwrap().into_iter().zip(&reads) {
                    let at = usize::try_from(read.offset).unwrap() + area * PAGE_BYTES;
                    assert!(found.unwrap() == bytes[at..at + read.len_bytes()], "{method:?}: {read:?}");
                }
            }
        }
    }

    #[test]
    fn buffers_are_fit_for_direct_io() {
        let (file, bytes) = random_file(64 * PAGE_BYTES);
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let Ok(file) = File::options().read(true).custom_flags(direct).open(path) else {
            writeln!(io::stderr(), "not tested, no O_DIRECT here").unwrap();
            return;
        };
        for method in METHODS {
            let Some(mut reader) = reader(method, &file, 0) else { continue };
            let reads = random_reads(100, 64);
            for (found, read) in read_all(&mut reader, &reads).unwrap().into_iter().zip(&reads) {
                let at = usize::try_from(read.offset).unwrap();
                assert!(found.unwrap() == bytes[at..at + read.len_bytes()], "{method:?}: {read:?}");
            }
        }
    }

    #[test]
    fn a_truncated_file_is_a_short_read_that_says_where() {
        // The file ends inside, at the end, and before the first page of the second read.
        let reads = [0, 4, 0].map(|first| Read { block: 9, offset: page(first), n_pages: 4 });
        for (length, expected) in
            [(page(6) + 100, 2 * PAGE_BYTES + 100), (page(7), 3 * PAGE_BYTES), (page(4), 0), (page(4) + 1, 1)]
        {
            let (file, _) = random_file(usize::try_from(length).unwrap());
            for method in METHODS {
                let Some(mut reader) = reader(method, &file, 0) else { continue };
                match read_all(&mut reader, &reads) {
                    Err(ReadError::Short { read, found }) => assert_eq!((read, found), (reads[1], expected)),
                    other => panic!("{method:?}: {other:?}"),
                }
                read_all(&mut reader, &reads[..1]).unwrap();
            }
        }
    }

    #[test]
    fn an_error_of_the_system_is_given_with_its_read() {
        let directory = File::open("/").unwrap();
        let reads = random_reads(70, 70);
        for method in METHODS {
            let Some(mut reader) = reader(method, &directory, 0) else { continue };
            match read_all(&mut reader, &reads) {
                Err(ReadError::Io { read, error }) => {
                    assert_eq!(error.kind(), io::ErrorKind::IsADirectory, "{method:?}");
                    assert!(reads.contains(&read));
                }
                other => panic!("{method:?}: {other:?}"),
            }
        }
        let (file, _) = random_file(PAGE_BYTES);
        for area_offset in [u64::MAX, i64::MAX as u64] {
            let mut reader = Reader::by(METHODS[3], file.try_clone().unwrap(), area_offset).unwrap();
            let past_end = Read { block: 0, offset: page(1), n_pages: 1 };
            assert!(matches!(read_all(&mut reader, &[past_end]), Err(ReadError::Io { read, .. }) if read == past_end));
        }
    }

    #[test]
    fn after_a_failure_or_a_panic_of_the_receiver_the_reader_goes_on() {
        let (file, bytes) = random_file(100 * PAGE_BYTES);
        let reads = random_reads(90, 100);
        for method in METHODS {
            let Some(mut reader) = reader(method, &file, 0) else { continue };
            let mut n = 0;
            let failed = reader.read(&reads, |index, _| {
                n += 1;
                if n < 10 { Ok(()) } else { Err(ReadError::Queue(io::Error::other(index.to_string()))) }
            });
            assert!(matches!(failed, Err(ReadError::Queue(_))) && n == 10, "{method:?}");
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                reader.read(&reads, |_, _| -> Result<(), ReadError> { std::panic::resume_unwind(Box::new(())) })
            }));
            assert!(panicked.is_err());
            for (found, read) in read_all(&mut reader, &reads).unwrap().into_iter().zip(&reads) {
                let at = usize::try_from(read.offset).unwrap();
                assert!(found.unwrap() == bytes[at..at + read.len_bytes()], "{method:?}: {read:?}");
            }
        }
    }

    #[test]
    fn threads_take_the_place_of_what_is_refused_and_the_reason_is_told() {
        let (file, bytes) = random_file(3 * PAGE_BYTES);
        let refused = Method::Uring { depth: 0 };
        let (mut reader, reason) = Reader::by_or_threads(refused, file.try_clone().unwrap(), page(1)).unwrap();
        assert_eq!(reason.unwrap().to_string(), "0 reads in flight");
        let reads = [Read { block: 0, offset: page(1), n_pages: 1 }];
        assert_eq!(read_all(&mut reader, &reads).unwrap(), [Some(bytes[2 * PAGE_BYTES..].to_vec())]);
        let (mut reader, _) = Reader::open(file, page(2)).unwrap();
        assert!(matches!(read_all(&mut reader, &reads), Err(ReadError::Short { found: 0, .. })));
    }

    #[test]
    fn a_number_of_reads_that_makes_no_sense_is_refused() {
        let (file, _) = random_file(PAGE_BYTES);
        for n in [0, QUEUE_DEPTH_MAX + 1, u32::MAX] {
            for method in [Method::Uring { depth: n }, Method::Threads { n_threads: n }] {
                let error = Reader::by(method, file.try_clone().unwrap(), 0).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            }
        }
    }
}
