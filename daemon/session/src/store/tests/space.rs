//! What takes room, and what goes for it.

use super::*;
use crate::limits::DATE_MIN_S;

#[test]
fn a_deleted_session_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1; 64], &[4]);
    store.save_block(OWNER, id, &SHAPE, 0, &[3; 5000]).unwrap();
    store.delete(OWNER, id).unwrap();
    assert_eq!(store.summary(OWNER, id), Err(StoreError::NotFound));
    assert_eq!(std::fs::read_dir(folder.path().join("sessions/1000")).unwrap().count(), 0);
    assert_eq!(store.usage().sessions, 0);
}

#[test]
fn of_what_is_forgotten_nothing_is_left_in_a_sessions_files() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::None), 5).unwrap();
    for prompt in [[1; 64], [1_000_000; 64], [2_000_000; 64]] {
        say(&mut store, id, &prompt, &[]);
    }
    (0..3).for_each(|at| store.save_block(OWNER, id, &SHAPE, at, &[3; 5000]).unwrap());
    store.truncate(OWNER, id, 1).unwrap();
    store.forget(OWNER, id).unwrap();
    let session = &store.sessions[&id];
    let journal = std::fs::read(file_of(folder.path(), id, "journal")).unwrap();
    let records = crate::journal::records_of(&journal, &session.key, id);
    assert!(matches!(records[..], [Record::Create(_), Record::Kept(_), Record::Past(_)]), "{records:?}");
    assert!(!format!("{records:?}").contains("000000"), "{records:?}");
    assert_eq!(std::fs::metadata(file_of(folder.path(), id, "kv")).unwrap().len(), 4096 + 8192);
    // What is left is whole.
    let said = store.history(OWNER, id).unwrap().clone();
    drop(store);
    let (mut store, report) = open(folder.path(), 2);
    assert_eq!((report.findings.len(), store.history(OWNER, id).unwrap()), (0, &said));
    assert_eq!(store.load_block(OWNER, id, &SHAPE, 0, &mut Vec::new()), Ok(Loaded::Image));
    store.truncate(OWNER, id, 0).unwrap();
    store.forget(OWNER, id).unwrap();
    assert!(!file_of(folder.path(), id, "kv").exists());
}

#[test]
fn images_come_back_for_the_tokens_they_were_made_of() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &(0..128).collect::<Vec<u32>>(), &[4]);
    let image = |fill: u8| vec![fill; 5000];
    let mut loaded = Vec::new();
    assert_eq!(store.saved_blocks(OWNER, id, &SHAPE), Ok(0));
    assert!(store.save_block(OWNER, id, &SHAPE, 2, &image(2)).is_err(), "a block that is not full");
    assert!(store.save_block(OWNER, id, &SHAPE, 0, &image(2)[1..]).is_err(), "an image of another size");
    store.save_block(OWNER, id, &SHAPE, 1, &image(1)).unwrap();
    assert_eq!(store.saved_blocks(OWNER, id, &SHAPE), Ok(0));
    store.save_block(OWNER, id, &SHAPE, 0, &image(7)).unwrap();
    drop(store);
    let (mut store, _) = open(folder.path(), 2);
    assert_eq!(store.saved_blocks(OWNER, id, &SHAPE), Ok(2));
    // Whatever the buffer has had before.
    for (index, fill, before) in [(0, 7, 0), (1, 1, 12_000), (0, 7, 10)] {
        loaded = vec![9; before];
        assert_eq!(store.load_block(OWNER, id, &SHAPE, index, &mut loaded), Ok(Loaded::Image));
        assert_eq!(loaded, image(fill));
    }
    // Other tokens in the second block.
    let turn = NewTurn { keep_tokens: 100, prompt: &[1; 28], request: b"", sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 7).unwrap();
    assert_eq!(store.load_block(OWNER, id, &SHAPE, 0, &mut loaded), Ok(Loaded::Image));
    assert_eq!(store.load_block(OWNER, id, &SHAPE, 1, &mut loaded), Ok(Loaded::Missing));
    assert!(loaded.is_empty());
    loaded = vec![9; 12_000];
    assert_eq!(store.load_block(OWNER, id, &SHAPE, 2, &mut loaded), Ok(Loaded::Missing));
    assert!(loaded.is_empty(), "nothing of another image is left");
    store.end_turn(OWNER, id, Outcome::Complete, b"", 9).unwrap();
    assert_eq!(store.flush().failed, []);
    drop(store);
    // The file still has the old image, which must not be believed.
    let (mut store, _) = open(folder.path(), 3);
    assert_eq!(store.saved_blocks(OWNER, id, &SHAPE), Ok(2));
    loaded = vec![9; 12_000];
    assert_eq!(store.load_block(OWNER, id, &SHAPE, 1, &mut loaded), Ok(Loaded::Missing));
    assert!(loaded.is_empty());
    // Another model's.
    let other = ImageShape { fingerprint: [6; 32], ..SHAPE };
    assert_eq!(store.load_block(OWNER, id, &other, 0, &mut loaded), Ok(Loaded::Missing));
    assert!(!file_of(folder.path(), id, "kv").exists());
}

#[test]
fn the_oldest_images_go_first_and_pinned_ones_last() {
    let folder = tempfile::tempdir().unwrap();
    // Room for two files of one place.
    let limits = Limits { kv_bytes_per_owner: 2 * (4096 + 8192), ..Limits::default() };
    let (mut store, _) = open_as(folder.path(), 1, limits);
    let ids: Vec<SessionId> = (0..4)
        .map(|_| {
            let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
            say(&mut store, id, &[1; 64], &[2]);
            id
        })
        .collect();
    let has = |store: &mut Store<OsDisk>, id| store.saved_blocks(OWNER, id, &SHAPE).unwrap() == 1;
    store.pin(OWNER, ids[0], true).unwrap();
    for &id in &ids[..3] {
        store.save_block(OWNER, id, &SHAPE, 0, &[3; 5000]).unwrap();
    }
    assert!(has(&mut store, ids[0]) && !has(&mut store, ids[1]) && has(&mut store, ids[2]));
    store.pin(OWNER, ids[2], true).unwrap();
    let refused = store.save_block(OWNER, ids[3], &SHAPE, 0, &[3; 5000]);
    let limit = limits.kv_bytes_per_owner;
    assert_eq!(refused, Err(StoreError::LimitReached { what: "bytes of one owner's KV files", limit }));
    // Another pinned one has as much right to the room, and was used later.
    store.pin(OWNER, ids[3], true).unwrap();
    store.save_block(OWNER, ids[3], &SHAPE, 0, &[3; 5000]).unwrap();
    assert!(!has(&mut store, ids[0]) && has(&mut store, ids[2]) && has(&mut store, ids[3]));
    // What is said goes before all images.
    store.pin(OWNER, ids[2], false).unwrap();
    assert_eq!(store.reclaim(1), Ok(4096 + 8192));
    assert!(has(&mut store, ids[3]) && !has(&mut store, ids[2]));
    assert_eq!(store.reclaim(1), Ok(4096 + 8192));
    assert!(!has(&mut store, ids[3]));
}

/// Sessions with one image each, the first one used longest ago.
fn with_images(store: &mut Store<OsDisk>, n: usize) -> Vec<SessionId> {
    let make = |_| {
        let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
        say(store, id, &[1; 64], &[2]);
        store.save_block(OWNER, id, &SHAPE, 0, &[3; 5000]).unwrap();
        id
    };
    (0..n).map(make).collect()
}

#[test]
fn images_that_cannot_be_removed_keep_no_others_from_going() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { kv_bytes_per_owner: 2 * (4096 + 8192), ..Limits::default() };
    let (mut store, _) = open_as(folder.path(), 1, limits);
    let ids = with_images(&mut store, 2);
    let stuck = file_of(folder.path(), ids[0], "kv");
    std::fs::remove_file(&stuck).unwrap();
    std::fs::create_dir(&stuck).unwrap();
    let third = with_images(&mut store, 1)[0];
    assert_eq!(store.saved_blocks(OWNER, ids[1], &SHAPE), Ok(0), "it went in the place of the oldest");
    assert_eq!(store.saved_blocks(OWNER, third, &SHAPE), Ok(1));
    assert_eq!(store.reclaim(u64::MAX), Ok(4096 + 8192));
    assert!(store.reclaim(u64::MAX).is_err(), "only that one is left");
}

#[test]
fn a_journal_that_is_mostly_dead_is_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Token), 5).unwrap();
    say(&mut store, id, &[1], &[2]);
    let request = vec![1; 100_000];
    let turn = NewTurn { keep_tokens: 2, prompt: &[3], request: &request, sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 7).unwrap();
    store.end_turn(OWNER, id, Outcome::Complete, b"", 9).unwrap();
    store.flush();
    assert!(store.usage().journal_bytes > 100_000);
    store.truncate(OWNER, id, 1).unwrap();
    assert_eq!(store.flush().committed, [id]);
    assert!(store.usage().journal_bytes < 1000);
    say(&mut store, id, &[4], &[5]);
    let history = store.history(OWNER, id).unwrap().clone();
    drop(store);
    let (mut store, report) = open(folder.path(), 2);
    assert_eq!((store.history(OWNER, id).unwrap(), report.findings.len()), (&history, 0));
}

#[test]
fn limits_are_told_by_name_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { sessions_per_owner: 1, sessions: 2, journal_bytes: 2000, ..Limits::default() };
    let (mut store, _) = open_as(folder.path(), 1, limits);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    let own = StoreError::LimitReached { what: "sessions of one owner", limit: 1 };
    assert_eq!(store.create(OWNER, &new(Durability::Turn), 5), Err(own));
    store.create(1, &new(Durability::Turn), 5).unwrap();
    let all = StoreError::LimitReached { what: "sessions of all owners", limit: 2 };
    assert_eq!(store.create(2, &new(Durability::Turn), 5), Err(all));
    let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: b"", sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 7).unwrap();
    let journal = StoreError::LimitReached { what: "bytes of a journal", limit: 2000 };
    assert_eq!(store.append_tokens(OWNER, id, &[1; 1000]), Err(journal));
    store.end_turn(OWNER, id, Outcome::Failed, b"an end finds room", 9).unwrap();
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1]);
    let title = "x".repeat(1025);
    let refused = StoreError::LimitReached { what: "bytes of a title", limit: 1024 };
    assert_eq!(store.rename(OWNER, id, &title), Err(refused));
}

#[test]
fn journals_have_limits_together_and_an_answer_that_has_begun_comes_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { journals_bytes_per_owner: 5000, journals_bytes: 8000, ..Limits::default() };
    let (mut store, _) = open_as(folder.path(), 1, limits);
    let ids: Vec<SessionId> = (0..3).map(|_| store.create(OWNER, &new(Durability::Turn), 5).unwrap()).collect();
    let request = vec![b' '; 1500];
    let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: &request, sampling: b"" };
    for &id in &ids[..2] {
        store.begin_turn(OWNER, id, &turn, 7).unwrap();
        assert_eq!(store.flush().failed, []);
    }
    let own = StoreError::LimitReached { what: "bytes of one owner's journals", limit: 5000 };
    assert_eq!(store.begin_turn(OWNER, ids[2], &turn, 7), Err(own));
    assert_eq!(store.summary(OWNER, ids[2]).unwrap().state, State::Idle);
    store.append_tokens(OWNER, ids[0], &[7; 2000]).unwrap();
    store.end_turn(OWNER, ids[0], Outcome::Complete, &request, 9).unwrap();
    assert_eq!(store.flush().failed, []);
    assert_eq!(store.fork(OWNER, ids[0], None, 9, &|_| {}), Err(own));
    // Others have what is left for all.
    let all = StoreError::LimitReached { what: "bytes of all journals", limit: 8000 };
    assert!(store.usage().journal_bytes > 7000, "{:?}", store.usage());
    assert_eq!(store.create(7, &new(Durability::Turn), 5).and_then(|id| store.begin_turn(7, id, &turn, 7)), Err(all));
    store.delete(OWNER, ids[0]).unwrap();
    store.begin_turn(OWNER, ids[2], &turn, 7).unwrap();
}

#[test]
fn old_sessions_go_and_those_from_the_future_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open_as(folder.path(), 1, Limits { retention_seconds: 100, ..Limits::default() });
    let day = DATE_MIN_S + 1000;
    let old = store.create(OWNER, &new(Durability::Turn), day).unwrap();
    let pinned = store.create(OWNER, &new(Durability::Turn), day).unwrap();
    let future = store.create(OWNER, &new(Durability::Turn), 1 << 40).unwrap();
    store.pin(OWNER, pinned, true).unwrap();
    assert_eq!(store.expired(0), []);
    assert_eq!(store.expired(day + 100), []);
    assert_eq!(store.expired(day + 101), [(OWNER, old)]);
    assert!(!store.is_expired(OWNER, old, day + 100), "it was used meanwhile");
    assert!(store.is_expired(OWNER, old, day + 101) && !store.is_expired(OWNER + 1, old, day + 101));
    assert!(![pinned, future].into_iter().any(|id| store.is_expired(OWNER, id, day + 101)));
}

#[test]
fn a_session_from_before_the_clock_was_set_is_as_old_as_the_clock_that_was_set() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open_as(folder.path(), 1, Limits { retention_seconds: 100, ..Limits::default() });
    let early = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    assert_eq!(store.expired(200), [], "the clock is not set");
    let day = DATE_MIN_S + 1000;
    assert_eq!(store.expired(day), []);
    assert_eq!(store.expired(day + 100), []);
    assert_eq!(store.expired(day + 101), [(OWNER, early)]);
}
