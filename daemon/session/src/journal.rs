//! What do the bytes of a journal say, and where do they stop making sense?
//!
//! A journal is a header (`magic "spdj", u32 version, 16 random bytes, 4 zero bytes, u32 CRC32C` of what is before it)
//! and records: `u32 n_bytes, u32 CRC32C` of what follows, then `n_bytes` bytes: nonce, ciphertext, tag. Numbers are
//! little-endian; what is encrypted is `postcard`'s form of a [`Record`].
//!
//! A tag covers the session, the header's random bytes, the record's number and the tag before it. So a record stands
//! nowhere but after the one it was written after: not in another journal, and not behind a record that was written
//! again after a failure, whose old successor may still lie in the file after a power cut.

use crate::cipher::{NONCE_BYTES, SessionKey, TAG_BYTES};
use crate::disk::DiskError;
use crate::history::History;
use crate::id::SessionId;
use crate::limits::RECORD_BYTES_MAX;
use crate::record::Record;

/// Bytes before the first record.
pub(crate) const HEADER_BYTES: usize = 32;

const MAGIC: &[u8; 4] = b"spdj";
const VERSION: u32 = 1;
const FRAME_BYTES: usize = 8;
/// Bytes that are read first, and at a time after that.
const FIRST_BYTES: usize = 64 << 10;
const PIECE_BYTES: usize = 1 << 20;
const RECORD_BYTES_MIN: usize = NONCE_BYTES + TAG_BYTES;
/// Longest record that is looked for behind damage: most are far shorter, and what is looked at is any four bytes.
const SOUGHT_BYTES_MAX: usize = 64 << 10;
/// Most bytes of a record before it is encrypted.
pub(crate) const RECORD_TEXT_BYTES_MAX: usize = RECORD_BYTES_MAX - RECORD_BYTES_MIN;

/// Where the next record of a journal goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    id: SessionId,
    /// The header's random bytes.
    generation: [u8; 16],
    n_records: u64,
    last_tag: [u8; TAG_BYTES],
    /// Bytes up to there.
    pub(crate) n_bytes: u64,
}

/// What comes after the last record that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Nothing.
    Clean,
    /// The beginning of a record, or nothing but zeros: a write that never came to its end, or the last record damaged
    /// so that nobody can tell.
    Torn,
    /// Bytes that are not those that were written, with more behind them.
    Damaged,
}

/// What a journal gives.
#[derive(Debug)]
pub(crate) struct Replay {
    pub(crate) history: History,
    pub(crate) position: Position,
    pub(crate) tail: Tail,
    /// The bytes of it.
    pub(crate) rest: Vec<u8>,
}

/// A journal that is left as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// It has no beginning.
    Damaged,
    /// Its header has another version.
    Version(u32),
    /// One of its records is as it was written, and nobody here knows what it says: a newer version's. What is before
    /// it is not all that was said.
    Record,
    /// The disk did not give it.
    Disk(DiskError),
}

/// Where there is no more to read.
enum Stop {
    Tail(Tail),
    Record,
    Disk(DiskError),
}

/// Reads the bytes of a journal from an offset on; answers how many there were, fewer only at its end.
pub(crate) type ReadFrom<'a> = dyn FnMut(u64, &mut [u8]) -> Result<usize, DiskError> + 'a;

/// What is in memory of a journal: about as much as a record has.
struct Pieces<'a> {
    read: &'a mut ReadFrom<'a>,
    bytes: Vec<u8>,
    /// Of them, those that are passed.
    n_passed: usize,
    /// Where in the file they end.
    offset: u64,
    is_at_end: bool,
}

impl From<Tail> for Stop {
    fn from(tail: Tail) -> Self {
        Self::Tail(tail)
    }
}

impl From<DiskError> for Stop {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

impl<'a> Pieces<'a> {
    fn new(read: &'a mut ReadFrom<'a>) -> Self {
        Self { read, bytes: Vec::new(), n_passed: 0, offset: 0, is_at_end: false }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.n_passed..]
    }

    /// Has the next `n_bytes` bytes in memory, or all there are; answers what is there.
    fn fill(&mut self, n_bytes: usize) -> Result<&[u8], DiskError> {
        while self.rest().len() < n_bytes && !self.is_at_end {
            self.bytes.drain(..self.n_passed);
            self.n_passed = 0;
            let before = self.bytes.len();
            // Most journals are short.
            let n_wanted = if self.offset == 0 { FIRST_BYTES } else { PIECE_BYTES };
            self.bytes.resize(before + n_wanted, 0);
            let n_read = (self.read)(self.offset, &mut self.bytes[before..])?;
            self.bytes.truncate(before + n_read);
            self.offset += n_read as u64;
            self.is_at_end = n_read < n_wanted;
        }
        Ok(self.rest())
    }

    fn record(&mut self, key: &SessionKey, position: &mut Position) -> Result<Record, Stop> {
        let n_bytes = self.fill(FRAME_BYTES)?.first_chunk().map_or(0, |n_bytes| u32::from_le_bytes(*n_bytes) as usize);
        self.fill(FRAME_BYTES + n_bytes.min(RECORD_BYTES_MAX))?;
        loop {
            let mut rest = self.rest();
            let n_bytes = rest.len();
            match read_record(&mut rest, key, position) {
                // What it is depends on all that is behind it.
                Err(Stop::Tail(_)) if !self.is_at_end => {
                    self.fill(usize::MAX)?;
                }
                read => {
                    let n_left = rest.len();
                    self.n_passed += n_bytes - n_left;
                    return read;
                }
            }
        }
    }
}

impl Position {
    /// The beginning of a new journal, and its header.
    pub(crate) fn start(id: SessionId, generation: [u8; 16]) -> (Self, [u8; HEADER_BYTES]) {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(MAGIC);
        header[4..8].copy_from_slice(&VERSION.to_le_bytes());
        header[8..24].copy_from_slice(&generation);
        let crc = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&crc.to_le_bytes());
        let n_bytes = HEADER_BYTES as u64;
        (Self { id, generation, n_records: 0, last_tag: [0; TAG_BYTES], n_bytes }, header)
    }

    /// Writes `record` to the end of `bytes`, encrypted, and moves on.
    pub(crate) fn append(&mut self, record: &Record, key: &SessionKey, nonce: [u8; NONCE_BYTES], bytes: &mut Vec<u8>) {
        self.append_text(record.encode(), key, nonce, bytes);
    }

    /// As [`Self::append`], of a record's form.
    pub(crate) fn append_text(
        &mut self,
        mut text: Vec<u8>,
        key: &SessionKey,
        nonce: [u8; NONCE_BYTES],
        bytes: &mut Vec<u8>,
    ) {
        let tag = key.seal(&nonce, &self.context(), &mut text);
        let n_bytes = NONCE_BYTES + text.len() + TAG_BYTES;
        assert!(n_bytes <= RECORD_BYTES_MAX, "a record of {n_bytes} bytes");
        let n_bytes_written = u32::try_from(n_bytes).expect("RECORD_BYTES_MAX is below 2^32");
        let crc = [nonce.as_slice(), &text, &tag].iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part));
        bytes.extend_from_slice(&n_bytes_written.to_le_bytes());
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(&text);
        bytes.extend_from_slice(&tag);
        self.pass(tag, n_bytes);
    }

    /// What a record at this place is bound to.
    fn context(&self) -> [u8; 60] {
        let mut context = [0; 60];
        context[..4].copy_from_slice(MAGIC);
        context[4..20].copy_from_slice(self.id.as_bytes());
        context[20..36].copy_from_slice(&self.generation);
        context[36..44].copy_from_slice(&self.n_records.to_le_bytes());
        context[44..].copy_from_slice(&self.last_tag);
        context
    }

    fn pass(&mut self, tag: [u8; TAG_BYTES], n_bytes: usize) {
        self.last_tag = tag;
        self.n_records += 1;
        self.n_bytes += (FRAME_BYTES + n_bytes) as u64;
    }
}

/// The history in a journal of the session `id` of `owner`.
///
/// # Errors
/// When its header or first record make no sense, or any record is one that is not known: then nothing of it is used.
pub(crate) fn replay<'a>(
    read: &'a mut ReadFrom<'a>,
    key: &SessionKey,
    owner: u64,
    id: SessionId,
) -> Result<Replay, Unreadable> {
    let mut pieces = Pieces::new(read);
    let generation = read_header(pieces.fill(HEADER_BYTES).map_err(Unreadable::Disk)?)?;
    pieces.n_passed = HEADER_BYTES;
    let (mut position, _) = Position::start(id, generation);
    let create = match pieces.record(key, &mut position) {
        Ok(Record::Create(create)) if create.owner == owner => create,
        Ok(_) | Err(Stop::Tail(_)) => return Err(Unreadable::Damaged),
        Err(Stop::Record) => return Err(Unreadable::Record),
        Err(Stop::Disk(error)) => return Err(Unreadable::Disk(error)),
    };
    let mut history = History::new(create);
    loop {
        match pieces.record(key, &mut position) {
            // Who writes a record has applied it: one that does not fit here did so where more is allowed.
            Ok(record) => history.apply(&record).map_err(|_| Unreadable::Record)?,
            Err(Stop::Tail(tail)) => return Ok(Replay { history, position, tail, rest: pieces.rest().to_vec() }),
            Err(Stop::Record) => return Err(Unreadable::Record),
            Err(Stop::Disk(error)) => return Err(Unreadable::Disk(error)),
        }
    }
}

/// As [`ReadFrom`], of a journal that is in memory.
pub(crate) fn from_memory(file: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<usize, DiskError> {
    move |offset, bytes| {
        let rest = usize::try_from(offset).ok().and_then(|offset| file.get(offset..)).unwrap_or_default();
        let n_bytes = rest.len().min(bytes.len());
        bytes[..n_bytes].copy_from_slice(&rest[..n_bytes]);
        Ok(n_bytes)
    }
}

fn read_header(file: &[u8]) -> Result<[u8; 16], Unreadable> {
    let header = file.first_chunk::<HEADER_BYTES>().ok_or(Unreadable::Damaged)?;
    let (body, crc) = header.split_last_chunk::<4>().ok_or(Unreadable::Damaged)?;
    if body[..4] != *MAGIC {
        return Err(Unreadable::Damaged);
    }
    // Another version may keep its CRC elsewhere.
    let version = u32::from_le_bytes([body[4], body[5], body[6], body[7]]);
    if version != VERSION {
        return Err(Unreadable::Version(version));
    }
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(Unreadable::Damaged);
    }
    let generation = body[8..24].first_chunk().ok_or(Unreadable::Damaged)?;
    Ok(*generation)
}

/// The record at the head of `rest`, which moves on behind it; or what its bytes are instead.
fn read_record(rest: &mut &[u8], key: &SessionKey, position: &mut Position) -> Result<Record, Stop> {
    let (body, after) = split_frame(rest)?;
    // The last record may be one whose last sectors never came.
    let bad = if after.is_empty() { Tail::Torn } else { Tail::Damaged };
    let (nonce, sealed) = body.split_first_chunk().ok_or(bad)?;
    let (text, tag) = sealed.split_last_chunk().ok_or(bad)?;
    let mut text = text.to_vec();
    key.open(nonce, &position.context(), &mut text, tag).map_err(|_| bad)?;
    let record = Record::decode(&text).ok_or(Stop::Record)?;
    position.pass(*tag, body.len());
    *rest = after;
    Ok(record)
}

/// A frame's content, whose CRC is right, and what follows it.
fn split_frame(file: &[u8]) -> Result<(&[u8], &[u8]), Tail> {
    if file.is_empty() {
        return Err(Tail::Clean);
    }
    // A file may have grown before any of its bytes came.
    if file.iter().all(|&byte| byte == 0) {
        return Err(Tail::Torn);
    }
    let (frame, rest) = file.split_first_chunk::<FRAME_BYTES>().ok_or(Tail::Torn)?;
    let [n0, n1, n2, n3, crc @ ..] = *frame;
    let n_bytes = u32::from_le_bytes([n0, n1, n2, n3]) as usize;
    if !(RECORD_BYTES_MIN..=RECORD_BYTES_MAX).contains(&n_bytes) {
        return Err(Tail::Damaged);
    }
    let crc_of = u32::from_le_bytes(crc);
    let Some((body, after)) = rest.split_at_checked(n_bytes) else {
        // One write cannot end so: it has no record behind the one that is not whole, nor all of that one.
        let is_damaged = is_whole_but_for_length(rest, crc_of) || has_record(rest);
        return Err(if is_damaged { Tail::Damaged } else { Tail::Torn });
    };
    if crc32c::crc32c(body) == crc_of {
        return Ok((body, after));
    }
    Err(if after.is_empty() { Tail::Torn } else { Tail::Damaged })
}

/// Whether some beginning of `rest` is what `crc` is of: then the length before it is not the one that was written.
fn is_whole_but_for_length(rest: &[u8], crc: u32) -> bool {
    let (least, more) = rest.split_at(rest.len().min(RECORD_BYTES_MIN));
    let mut so_far = crc32c::crc32c(least);
    let mut longer = more.iter().take(RECORD_TEXT_BYTES_MAX).map(|byte| {
        so_far = crc32c::crc32c_append(so_far, std::slice::from_ref(byte));
        so_far
    });
    least.len() == RECORD_BYTES_MIN && (crc32c::crc32c(least) == crc || longer.any(|longer| longer == crc))
}

/// Whether there is a whole record anywhere in `bytes`.
fn has_record(bytes: &[u8]) -> bool {
    let is_record = |at: usize| {
        let (frame, rest) = bytes.get(at..)?.split_first_chunk::<FRAME_BYTES>()?;
        let [n0, n1, n2, n3, crc @ ..] = *frame;
        let n_bytes = u32::from_le_bytes([n0, n1, n2, n3]) as usize;
        let body = rest.get(..n_bytes).filter(|_| (RECORD_BYTES_MIN..=SOUGHT_BYTES_MAX).contains(&n_bytes))?;
        (crc32c::crc32c(body) == u32::from_le_bytes(crc)).then_some(())
    };
    (0..bytes.len()).any(|at| is_record(at).is_some())
}

/// What is in a journal, record by record.
#[cfg(test)]
pub(crate) fn records_of(file: &[u8], key: &SessionKey, id: SessionId) -> Vec<Record> {
    let (mut position, _) = Position::start(id, read_header(file).expect("a header"));
    let mut rest = &file[HEADER_BYTES..];
    std::iter::from_fn(|| read_record(&mut rest, key, &mut position).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Outcome;
    use crate::history::tests::{empty, end, turn};
    use zeroize::Zeroizing;

    const ID: SessionId = SessionId::from_bytes([7; 16]);

    fn key() -> SessionKey {
        SessionKey::new(Zeroizing::new([1; 32]))
    }

    /// A journal, where its records end, and the histories after each.
    fn journal(generation: u8, records: &[Record]) -> (Vec<u8>, Vec<usize>, Vec<History>) {
        let (mut position, header) = Position::start(ID, [generation; 16]);
        let (mut file, mut history) = (header.to_vec(), empty());
        position.append(&empty().records()[0], &key(), [0; NONCE_BYTES], &mut file);
        let (mut ends, mut histories) = (vec![file.len()], vec![history.clone()]);
        for (at, record) in records.iter().enumerate() {
            position.append(record, &key(), [u8::try_from(at).unwrap(); NONCE_BYTES], &mut file);
            history.apply(record).unwrap();
            ends.push(file.len());
            histories.push(history.clone());
        }
        assert_eq!(position.n_bytes, file.len() as u64);
        (file, ends, histories)
    }

    fn records() -> [Record; 4] {
        [turn(0, &[1, 2, 3]), Record::Tokens(vec![4]), Record::Tokens(vec![5]), end(Outcome::Complete)]
    }

    fn read(file: &[u8]) -> Result<Replay, Unreadable> {
        replay(&mut from_memory(file), &key(), 1000, ID)
    }

    #[test]
    fn a_journal_cut_at_any_byte_gives_its_whole_records() {
        let (file, ends, histories) = journal(3, &records());
        for n_bytes in 0..=file.len() {
            let n_whole = ends.iter().filter(|&&end| end <= n_bytes).count();
            let Ok(replay) = read(&file[..n_bytes]) else {
                assert_eq!(n_whole, 0, "cut at {n_bytes}");
                continue;
            };
            assert_eq!(replay.history, histories[n_whole - 1], "cut at {n_bytes}");
            assert_eq!(replay.position.n_bytes, ends[n_whole - 1] as u64);
            assert_eq!(replay.tail, if ends.contains(&n_bytes) { Tail::Clean } else { Tail::Torn });
        }
    }

    #[test]
    fn after_a_flipped_bit_only_the_records_before_it_are_believed() {
        let (file, ends, histories) = journal(3, &records());
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let n_whole = ends.iter().filter(|&&end| end <= bit / 8).count();
            let Ok(replay) = read(&flipped) else {
                assert_eq!(n_whole, 0, "bit {bit}");
                continue;
            };
            assert_eq!(replay.history, histories[n_whole - 1], "bit {bit}");
            assert_ne!(replay.tail, Tail::Clean, "bit {bit}");
        }
    }

    #[test]
    fn a_wrong_length_is_damage_wherever_it_is_and_whatever_it_says() {
        let (file, ends, histories) = journal(3, &records());
        for (at, pair) in ends.windows(2).enumerate() {
            for bit in 0..32 {
                let mut flipped = file.clone();
                flipped[pair[0] + bit / 8] ^= 1 << (bit % 8);
                let replay = read(&flipped).unwrap();
                assert_eq!((replay.tail, &replay.history), (Tail::Damaged, &histories[at]), "record {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn what_lies_before_whole_records_was_damaged_and_not_torn() {
        let (mut spoilt, ends, histories) = journal(3, &records());
        // As long as a record may be, and longer than what is left.
        spoilt[ends[1]..ends[1] + 4].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        spoilt[ends[1] + 4..ends[2] - 3].fill(0xa5);
        let replay = read(&spoilt).unwrap();
        assert_eq!((replay.tail, &replay.history), (Tail::Damaged, &histories[1]));
        // Without those behind it nobody can tell.
        assert_eq!(read(&spoilt[..ends[2]]).unwrap().tail, Tail::Torn);
    }

    #[test]
    fn a_record_is_believed_in_its_own_place_only() {
        let (file, ends, histories) = journal(3, &records());
        let part = |at: usize| &file[ends[at - 1]..ends[at]];
        // Two records swapped, one left out, one twice.
        for (parts, n_whole) in [([1, 3, 2, 4], 1), ([1, 2, 4, 4], 2), ([1, 2, 2, 3], 2)] {
            let swapped = [&file[..ends[0]], &parts.map(part).concat()].concat();
            let replay = read(&swapped).unwrap();
            assert_eq!((replay.history, replay.tail), (histories[n_whole].clone(), Tail::Damaged), "{parts:?}");
        }
        // Of another generation, another session, another owner.
        let (other, ..) = journal(4, &records());
        let mixed = [&file[..ends[1]], &other[ends[1]..]].concat();
        assert_eq!(read(&mixed).unwrap().history, histories[1]);
        assert!(replay(&mut from_memory(&file), &key(), 1000, SessionId::from_bytes([8; 16])).is_err());
        assert!(replay(&mut from_memory(&file), &key(), 1001, ID).is_err());
    }

    #[test]
    fn the_successor_of_a_record_that_was_written_again_is_not_believed() {
        let (old, ends, _) = journal(3, &records());
        let again = [turn(0, &[1, 2, 3]), Record::Tokens(vec![9])];
        let (new, new_ends, histories) = journal(3, &again);
        assert_eq!(ends[2], new_ends[2], "the test means nothing");
        let mixed = [new.as_slice(), &old[ends[2]..]].concat();
        let replay = read(&mixed).unwrap();
        assert_eq!((replay.history, replay.tail), (histories[2].clone(), Tail::Damaged));
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let (mut file, ..) = journal(3, &[]);
        file[4] = 2;
        assert_eq!(read(&file).err(), Some(Unreadable::Version(2)));
        file[0] = b'x';
        assert_eq!(read(&file).err(), Some(Unreadable::Damaged));
    }

    #[test]
    fn a_record_that_is_as_it_was_written_is_no_damage_whatever_it_says() {
        let (file, ..) = journal(3, &records());
        let misfit = Record::Truncate { n_turns: 9, n_tokens: 0 }.encode();
        for text in [vec![200, 1, 2, 3], misfit] {
            let mut position = read(&file).unwrap().position;
            let mut newer = file.clone();
            position.append_text(text, &key(), [9; NONCE_BYTES], &mut newer);
            position.append(&Record::Pin { pinned: true }, &key(), [9; NONCE_BYTES], &mut newer);
            assert_eq!(read(&newer).err(), Some(Unreadable::Record));
            // Damaged, it is damage.
            newer[file.len() + FRAME_BYTES] ^= 1;
            assert_eq!(read(&newer).unwrap().tail, Tail::Damaged);
        }
        // The first one of a journal too.
        let (mut position, header) = Position::start(ID, [3; 16]);
        let mut first = header.to_vec();
        position.append_text(vec![200], &key(), [9; NONCE_BYTES], &mut first);
        assert_eq!(read(&first).err(), Some(Unreadable::Record));
    }

    #[test]
    fn a_long_journal_is_read_in_pieces_and_gives_what_it_would_give_as_a_whole() {
        let long = |n: usize| Record::Tokens(vec![u32::MAX; n]);
        // Records that end anywhere in a piece, and one that is longer.
        let many = [1_000, 200_000, 7, 150_000, 1 << 20, 3, 250_000].map(long);
        let records = [std::slice::from_ref(&turn(0, &[1, 2, 3])), &many].concat();
        let (file, ends, histories) = journal(3, &records);
        assert!(file.len() > 5 * PIECE_BYTES, "the test means nothing");
        let largest = std::cell::Cell::new(0);
        let pieces = |file: &[u8]| {
            let mut read = from_memory(file);
            let mut counted = |offset, bytes: &mut [u8]| {
                largest.set(largest.get().max(bytes.len()));
                read(offset, bytes)
            };
            replay(&mut counted, &key(), 1000, ID).unwrap()
        };
        let whole = pieces(&file);
        assert_eq!((&whole.history, whole.tail, whole.rest.len()), (&histories[8], Tail::Clean, 0));
        assert_eq!((whole.position.n_bytes, largest.get()), (file.len() as u64, PIECE_BYTES));
        // A cut is what is left of a write only if there is nothing behind it, however far.
        let torn = pieces(&file[..ends[7] + 900]);
        assert_eq!((&torn.history, torn.tail), (&histories[7], Tail::Torn));
        assert!(torn.rest == file[ends[7]..ends[7] + 900]);
        let mut damaged = file;
        damaged[ends[1] + 100] ^= 1;
        let damaged_from = pieces(&damaged);
        assert_eq!((&damaged_from.history, damaged_from.tail), (&histories[1], Tail::Damaged));
        assert!(damaged_from.rest == damaged[ends[1]..]);
    }

    #[test]
    fn a_file_that_grew_without_its_bytes_is_torn() {
        let (mut file, ends, _) = journal(3, &[]);
        file.resize(file.len() + 700, 0);
        let replay = read(&file).unwrap();
        assert_eq!((replay.tail, replay.position.n_bytes), (Tail::Torn, ends[0] as u64));
    }
}
