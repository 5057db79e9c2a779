//! The store on a real folder. What power cuts and failing disks do to it is tried in `tests/sim`.

mod damage;
mod foreign;
mod space;

use super::*;
use crate::disk::OsDisk;
use crate::history::{Durability, Outcome, State};
use crate::image::ImageShape;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const OWNER: u64 = 1000;
const SHAPE: ImageShape = ImageShape { fingerprint: [5; 32], block_bytes: 5000 };

/// Numbers that no cipher should have, the same in every run; another stream for every store.
fn random(seed: u8) -> Box<dyn Random + Send> {
    let mut reader = blake3::Hasher::new().update(&[seed]).finalize_xof();
    Box::new(move |bytes: &mut [u8]| reader.fill(bytes))
}

fn open_as(folder: &Path, seed: u8, limits: Limits) -> (Store<OsDisk>, Report) {
    Store::open(OsDisk::open(folder).unwrap(), random(seed), MasterKey::new([1; 32]), limits).unwrap()
}

fn open(folder: &Path, seed: u8) -> (Store<OsDisk>, Report) {
    open_as(folder, seed, Limits::default())
}

fn new(durability: Durability) -> NewSession<'static> {
    let settings = Some(Settings { durability, ..Settings::default() });
    NewSession { model: "tiny", fingerprint: [9; 32], title: "one", settings, pinned: false }
}

fn say(store: &mut Store<OsDisk>, id: SessionId, prompt: &[u32], answer: &[u32]) {
    let keep_tokens = store.summary(OWNER, id).unwrap().n_tokens;
    let turn = NewTurn { keep_tokens, prompt, request: b"request", sampling: b"sampling" };
    store.begin_turn(OWNER, id, &turn, 7).unwrap();
    store.append_tokens(OWNER, id, answer).unwrap();
    store.end_turn(OWNER, id, Outcome::Complete, b"answer", 8).unwrap();
    assert_eq!(store.flush().failed, []);
}

fn file_of(folder: &Path, id: SessionId, name: &str) -> PathBuf {
    folder.join(format!("sessions/{OWNER}/{id}/{name}"))
}

#[test]
fn a_store_may_live_on_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Store<OsDisk>>();
}

#[test]
fn a_session_that_is_made_pinned_is_so_from_its_first_record_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &NewSession { pinned: true, ..new(Durability::None) }, 5).unwrap();
    // Nothing was flushed.
    drop(store);
    let (store, _) = open(folder.path(), 2);
    assert!(store.summary(OWNER, id).unwrap().pinned);
}

#[test]
fn a_session_is_there_after_the_store_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, report) = open(folder.path(), 1);
    assert_eq!(report, Report::default());
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1, 2, 3], &[4, 5]);
    say(&mut store, id, &[6], &[7]);
    store.rename(OWNER, id, "another").unwrap();
    store.pin(OWNER, id, true).unwrap();
    assert_eq!(store.flush().committed, [id]);
    let (history, summary) = (store.history(OWNER, id).unwrap().clone(), store.summary(OWNER, id).unwrap());
    drop(store);
    let (mut store, report) = open(folder.path(), 2);
    assert_eq!(report, Report { sessions: 1, ..Report::default() });
    assert_eq!(store.list(OWNER), [summary]);
    assert_eq!(store.history(OWNER, id).unwrap(), &history);
    assert_eq!(history.tokens, [1, 2, 3, 4, 5, 6, 7]);
    // And goes on.
    say(&mut store, id, &[8], &[9]);
    drop(store);
    assert_eq!(open(folder.path(), 3).0.history(OWNER, id).unwrap().tokens.len(), 9);
}

#[test]
fn a_turn_without_an_end_is_interrupted_and_can_be_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: b"", sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 7).unwrap();
    assert_eq!(store.flush().committed, [id]);
    store.append_tokens(OWNER, id, &[2]).unwrap();
    let flushed = store.flush();
    assert_eq!((flushed.written, flushed.committed), (vec![id], vec![]));
    store.append_tokens(OWNER, id, &[3]).unwrap(); // never flushed
    assert_eq!(store.begin_turn(OWNER, id, &turn, 7), Err(StoreError::Busy("answering")));
    assert_eq!(store.delete(OWNER, id), Err(StoreError::Busy("answering")));
    drop(store);
    let (mut store, report) = open(folder.path(), 2);
    assert_eq!((report.interrupted, store.summary(OWNER, id).unwrap().state), (1, State::Interrupted));
    assert_eq!(store.append_tokens(OWNER, id, &[3]), Err(StoreError::Busy("not answering")));
    store.resume_turn(OWNER, id).unwrap();
    store.append_tokens(OWNER, id, &[3]).unwrap();
    store.end_turn(OWNER, id, Outcome::Complete, b"", 9).unwrap();
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1, 2, 3]);
    assert_eq!(store.resume_turn(OWNER, id), Err(StoreError::Busy("idle")));
}

#[test]
fn tries_to_go_on_are_counted_from_token_to_token_and_from_process_to_process() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let (id, other) = (store.create(OWNER, &new(Durability::Turn), 5), store.create(OWNER, &new(Durability::Turn), 5));
    let (id, other) = (id.unwrap(), other.unwrap());
    for id in [other, id] {
        let turn = NewTurn { keep_tokens: 0, prompt: &[1, 2], request: b"request", sampling: b"sampling" };
        store.begin_turn(OWNER, id, &turn, 7).unwrap();
        store.append_tokens(OWNER, id, &[3]).unwrap();
        assert_eq!(store.flush().failed, []);
    }
    assert_eq!(store.interrupted(), [], "they are being answered");
    for n_before in 0..3 {
        drop(store);
        store = open(folder.path(), 2).0;
        assert_eq!(store.interrupted().len(), 2);
        assert_eq!(store.note_try(OWNER, id), Ok(n_before + 1));
    }
    assert_eq!(store.note_try(OWNER, other), Ok(1));
    store.resume_turn(OWNER, id).unwrap();
    store.append_tokens(OWNER, id, &[4]).unwrap();
    assert_eq!(store.note_try(OWNER, id), Ok(1), "it has got on");
    std::fs::write(file_of(folder.path(), id, "tries"), [9; 5]).unwrap();
    assert_eq!(store.note_try(OWNER, id), Ok(1), "half a file says nothing");
    assert_eq!(store.note_try(OWNER, id), Ok(2));
    store.end_turn(OWNER, id, Outcome::Complete, b"answer", 8).unwrap();
    store.delete(OWNER, id).unwrap();
    assert!(!file_of(folder.path(), id, "tries").exists());
}

#[test]
fn durability_says_which_flushes_commit() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    for (durability, expected) in [
        (Durability::Token, [true, true, true]),
        (Durability::Turn, [true, false, true]),
        (Durability::None, [false; 3]),
    ] {
        let id = store.create(OWNER, &new(durability), 5).unwrap();
        let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: b"", sampling: b"" };
        store.begin_turn(OWNER, id, &turn, 7).unwrap();
        let begun = store.flush().committed == [id];
        store.append_tokens(OWNER, id, &[2]).unwrap();
        let grown = store.flush().committed == [id];
        store.end_turn(OWNER, id, Outcome::Complete, b"", 9).unwrap();
        let ended = store.flush().committed == [id];
        assert_eq!([begun, grown, ended], expected, "{durability:?}");
    }
}

#[test]
fn nobody_sees_anothers_session() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    let other = OWNER + 1;
    let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: b"", sampling: b"" };
    assert_eq!(store.list(other), []);
    assert_eq!(store.summary(other, id), Err(StoreError::NotFound));
    assert_eq!(store.history(other, id).err(), Some(StoreError::NotFound));
    assert_eq!(store.begin_turn(other, id, &turn, 7), Err(StoreError::NotFound));
    assert_eq!(store.append_tokens(other, id, &[1]), Err(StoreError::NotFound));
    assert_eq!(store.rename(other, id, ""), Err(StoreError::NotFound));
    assert_eq!(store.truncate(other, id, 0), Err(StoreError::NotFound));
    assert_eq!(store.fork(other, id, None, 7, &|_| {}), Err(StoreError::NotFound));
    assert_eq!(store.export(other, id), Err(StoreError::NotFound));
    assert_eq!(store.delete(other, id), Err(StoreError::NotFound));
    assert_eq!(store.load_block(other, id, &SHAPE, 0, &mut Vec::new()), Err(StoreError::NotFound));
    assert_eq!(store.release(other, id), Err(StoreError::NotFound));
    assert_eq!(store.summary(OWNER, id).unwrap().n_turns, 0);
}

#[test]
fn files_are_private_and_hold_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1, 2, 3], &[4, 5]);
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(file_of(folder.path(), id, "")), 0o700);
    for name in ["key", "journal"] {
        let path = file_of(folder.path(), id, name);
        let bytes = std::fs::read(&path).unwrap();
        for text in [b"request".as_slice(), b"sampling", b"answer", b"tiny"] {
            assert!(!bytes.windows(text.len()).any(|part| part == text), "{name} has '{}'", text.escape_ascii());
        }
        assert_eq!(mode(path), 0o600);
    }
}

#[test]
fn a_second_store_on_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_store, _) = open(folder.path(), 1);
    let disk = OsDisk::open(folder.path()).unwrap();
    let second = Store::open(disk, random(2), MasterKey::new([1; 32]), Limits::default());
    assert_eq!(second.err(), Some(StoreError::Locked));
}

#[test]
fn a_cut_conversation_goes_on_from_where_it_was_cut() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1], &[2]);
    say(&mut store, id, &[3], &[4]);
    assert_eq!(store.truncate(OWNER, id, 3), Err(StoreError::Invalid { what: "there is less than is to be kept" }));
    assert_eq!(store.truncate(OWNER, id, 1), Ok(2));
    say(&mut store, id, &[5], &[6]);
    drop(store);
    let (mut store, _) = open(folder.path(), 2);
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1, 2, 5, 6]);
}

#[test]
fn a_fork_and_an_import_are_sessions_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1], &[2]);
    say(&mut store, id, &[3], &[4]);
    let fork = store.fork(OWNER, id, Some(1), 50, &|_| {}).unwrap();
    let file = store.export(OWNER, id).unwrap();
    let import = store.import(77, &file, 60, &|_| {}).unwrap();
    say(&mut store, id, &[5], &[6]);
    say(&mut store, fork, &[7], &[8]);
    drop(store);
    let (mut store, report) = open(folder.path(), 2);
    assert_eq!((report.sessions, report.findings.len()), (3, 0));
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1, 2, 3, 4, 5, 6]);
    assert_eq!(store.history(OWNER, fork).unwrap().tokens, [1, 2, 7, 8]);
    assert_eq!(store.history(77, import).unwrap().tokens, [1, 2, 3, 4]);
    // One is as old as its last use here, whatever the file says.
    assert_eq!(store.summary(77, import).unwrap().used, 60);
    for n_bytes in 0..file.len() {
        assert!(store.import(77, &file[..n_bytes], 60, &|_| {}).is_err(), "{n_bytes} bytes");
    }
    for at in 0..file.len() {
        let mut flipped = file.clone();
        flipped[at] ^= 1;
        assert!(store.import(77, &flipped, 60, &|_| {}).is_err(), "byte {at}");
    }
}

/// An exported session with these names and nothing else.
fn exported(title: String, model: String) -> Vec<u8> {
    let create = Create {
        owner: OWNER,
        created: 5,
        used: 5,
        model,
        fingerprint: [9; 32],
        title,
        settings: Settings::default(),
        pinned: false,
    };
    let record = Record::Create(create).encode();
    let body = [u32::try_from(record.len()).unwrap().to_le_bytes().as_slice(), &record].concat();
    let (n_bytes, crc) = ((body.len() as u64).to_le_bytes(), crc32c::crc32c(&body).to_le_bytes());
    [b"spdx".as_slice(), &1_u32.to_le_bytes(), &n_bytes, &crc, &body].concat()
}

#[test]
fn an_import_keeps_to_the_limits_of_what_is_made_here() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let file = |title: usize, model: usize| exported("t".repeat(title), "m".repeat(model));
    let limit = |what| Err(StoreError::LimitReached { what, limit: 1024 });
    assert_eq!(store.import(OWNER, &file(1025, 3), 6, &|_| {}), limit("bytes of a title"));
    assert_eq!(store.import(OWNER, &file(3, 1025), 6, &|_| {}), limit("bytes of a model's name"));
    // As large as a record can be, and too large for what encryption adds.
    let largest = crate::limits::RECORD_BYTES_MAX;
    let damaged = Err(StoreError::Damaged { what: "the exported session" });
    for n_bytes in [largest - 100, largest - 60, largest] {
        let refused = store.import(OWNER, &file(n_bytes, 3), 6, &|_| {});
        assert!(refused == damaged || refused == limit("bytes of a title"), "{n_bytes} bytes: {refused:?}");
    }
    let id = store.import(OWNER, &file(1024, 1024), 6, &|_| {}).unwrap();
    assert_eq!(store.summary(OWNER, id).unwrap().title.len(), 1024);
}

#[test]
fn a_cancelled_turn_can_be_resumed_and_is_what_it_was_until_more_comes() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1], &[2]);
    let turn = NewTurn { keep_tokens: 2, prompt: &[3], request: b"ask", sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 6).unwrap();
    store.append_tokens(OWNER, id, &[4]).unwrap();
    store.end_turn(OWNER, id, Outcome::Cancelled, b"four", 7).unwrap();
    store.commit(OWNER, id).unwrap();
    store.resume_turn(OWNER, id).unwrap();
    store.commit(OWNER, id).unwrap();
    drop(store);
    let (mut store, _) = open(folder.path(), 2);
    let last = |store: &mut Store<OsDisk>| {
        let history = store.history(OWNER, id).unwrap();
        (history.tokens.clone(), history.turns.len(), history.turns[1].outcome)
    };
    assert_eq!(last(&mut store), (vec![1, 2, 3, 4], 2, Some(Outcome::Cancelled)));
    store.resume_turn(OWNER, id).unwrap();
    store.append_tokens(OWNER, id, &[5]).unwrap();
    store.commit(OWNER, id).unwrap();
    drop(store);
    let (mut store, _) = open(folder.path(), 3);
    assert_eq!(last(&mut store), (vec![1, 2, 3, 4, 5], 2, None));
    store.resume_turn(OWNER, id).unwrap();
    store.end_turn(OWNER, id, Outcome::Complete, b"four five", 8).unwrap();
    assert_eq!(store.resume_turn(OWNER, id), Err(StoreError::Busy("idle")));
}
