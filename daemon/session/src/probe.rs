//! What can any bytes make the readers of this crate do? Called by the fuzz targets and the test of their seeds.
//!
//! No fuzzer gets past a tag or a CRC, so what is behind them is read from the same bytes without them, too.

use crate::cipher::SessionKey;
use crate::error::{Result, StoreError};
use crate::history::History;
use crate::id::SessionId;
use crate::image::ImageShape;
use crate::journal::{Tail, Unreadable, from_memory, replay};
use crate::record::Record;
use crate::store::{parse, parse_body};
use zeroize::Zeroizing;

/// Reads a journal of owner 1000's session 07...07 with the key 01...01. Answers what is in it.
///
/// # Errors
/// As the store's when nothing can be read.
pub fn journal(file: &[u8]) -> Result<String> {
    plain_records(file);
    let key = SessionKey::new(Zeroizing::new([1; 32]));
    match replay(&mut from_memory(file), &key, 1000, SessionId::from_bytes([7; 16])) {
        Ok(replay) => {
            assert!(replay.position.n_bytes <= file.len() as u64, "more was read than there is");
            let end = match replay.tail {
                Tail::Clean => "",
                Tail::Torn => ", torn",
                Tail::Damaged => ", damaged",
            };
            Ok(format!("{}{end}", said(&replay.history)))
        }
        Err(Unreadable::Damaged) => Err(StoreError::Damaged { what: "the journal" }),
        Err(Unreadable::Version(version)) => Err(StoreError::UnknownVersion { what: "the journal", version }),
        Err(Unreadable::Record) => Err(StoreError::UnknownRecord { what: "the journal" }),
        Err(Unreadable::Disk(error)) => Err(error.into()),
    }
}

/// Reads an exported session. Answers what is in it.
///
/// # Errors
/// As the import's.
pub fn export(file: &[u8]) -> Result<String> {
    if let Some(history) = parse_body(file) {
        let again = history.records().into_iter().skip(1).try_for_each(|record| match record {
            Record::Kept(_) | Record::Past(_) => Ok(()),
            record => Err(record),
        });
        assert_eq!(again, Ok(()), "an export has other records than it may have");
    }
    parse(file).map(|history| said(&history))
}

/// Reads the header of a KV file. Answers the bytes of an image.
pub fn kv(file: &[u8]) -> Option<u32> {
    let (shape, suite) = ImageShape::parse(file).ok()?;
    assert_eq!(ImageShape::parse(&shape.header(suite)), Ok((shape, suite)));
    let n_places = shape.n_places(u64::MAX);
    assert!(shape.offset(n_places) > shape.offset(n_places - 1), "places overlap");
    Some(shape.block_bytes)
}

/// The bytes as records one after the other, as if nobody had encrypted or counted them.
fn plain_records(mut rest: &[u8]) {
    let mut history = None::<History>;
    while let Ok((record, after)) = postcard::take_from_bytes::<Record>(rest) {
        assert_eq!(Record::decode(&record.encode()).as_ref(), Some(&record));
        match (&mut history, record) {
            (None, Record::Create(create)) => history = Some(History::new(create)),
            (Some(history), record) => {
                let before = history.clone();
                if history.apply(&record).is_err() {
                    assert_eq!(*history, before, "a refused record has changed something");
                }
                assert!(history.tokens_after(history.turns.len()) <= history.tokens.len());
            }
            (None, _) => return,
        }
        rest = after;
    }
}

fn said(history: &History) -> String {
    format!("{} turns, {} tokens", history.turns.len(), history.tokens.len())
}
