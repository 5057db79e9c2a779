//! Every bit and every length of every file of a small session.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_session::{
    FindingKind, ImageShape, Limits, Loaded, MasterKey, NewSession, NewTurn, Outcome, Place, Report, SessionId, Store,
    StoreError,
};
use sparsed_sim::{FakeDisk, Said, image};

const OWNER: u64 = 1000;
const SHAPE: ImageShape = ImageShape { fingerprint: [5; 32], block_bytes: 200 };
const N_BLOCKS: u32 = 2;

fn open(disk: &FakeDisk, seed: u64) -> (Store<FakeDisk>, Report) {
    open_with(disk, seed, [1; 32])
}

fn open_with(disk: &FakeDisk, seed: u64, master: [u8; 32]) -> (Store<FakeDisk>, Report) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let random = Box::new(move |bytes: &mut [u8]| rng.fill(bytes));
    Store::open(disk.other(), random, MasterKey::new(master), Limits::default()).unwrap()
}

/// A session of three turns and two blocks, and what it was after each record.
fn session() -> (FakeDisk, SessionId, Vec<Said>) {
    let disk = FakeDisk::new(1);
    let (mut store, _) = open(&disk, 1);
    let new = NewSession { model: "tiny", fingerprint: [9; 32], title: "one", settings: None, pinned: false };
    let id = store.create(OWNER, &new, 5).unwrap();
    let mut states = vec![Said::of(store.history(OWNER, id).unwrap())];
    let mut flush = |store: &mut Store<FakeDisk>| {
        assert_eq!(store.flush().written, [id]);
        states.push(Said::of(store.history(OWNER, id).unwrap()));
    };
    for turn in 0..3_u32 {
        let prompt: Vec<u32> = (0..45).map(|at| 100 * turn + at).collect();
        let keep_tokens = store.summary(OWNER, id).unwrap().n_tokens;
        let new = NewTurn { keep_tokens, prompt: &prompt, request: b"request", sampling: b"greedy" };
        store.begin_turn(OWNER, id, &new, 6).unwrap();
        flush(&mut store);
        store.append_tokens(OWNER, id, &[turn, turn]).unwrap();
        flush(&mut store);
        store.end_turn(OWNER, id, Outcome::Complete, b"answer", 7).unwrap();
        flush(&mut store);
    }
    let tokens = states.last().unwrap().tokens.clone();
    for index in 0..N_BLOCKS {
        store.save_block(OWNER, id, &SHAPE, index, &image(&tokens, index as usize, 200)).unwrap();
    }
    (disk, id, states)
}

fn place(id: SessionId, name: &str) -> Place {
    Place::root().child("sessions").child(&OWNER.to_string()).child(&id.to_string()).child(name)
}

/// Every variant of a file with one bit flipped in a byte, and every beginning of it.
fn damaged(bytes: &[u8]) -> impl Iterator<Item = (String, Vec<u8>)> {
    let flips = (0..bytes.len()).map(|at| {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << (at % 8);
        (format!("a bit of byte {at}"), flipped)
    });
    flips.chain((0..bytes.len()).map(|n_bytes| (format!("cut to {n_bytes}"), bytes[..n_bytes].to_vec())))
}

/// Blocks that come back; each of them is right.
fn loaded(store: &mut Store<FakeDisk>, id: SessionId, context: &str) -> u32 {
    let tokens = store.history(OWNER, id).unwrap().tokens.clone();
    let mut bytes = Vec::new();
    let mut n_loaded = 0;
    for index in 0..N_BLOCKS {
        if store.load_block(OWNER, id, &SHAPE, index, &mut bytes).unwrap() == Loaded::Image {
            assert_eq!(bytes, image(&tokens, index as usize, 200), "{context}");
            n_loaded += 1;
        }
    }
    n_loaded
}

/// Says one more thing, and finds all of it after a power cut.
fn goes_on(mut store: Store<FakeDisk>, disk: &FakeDisk, id: SessionId, context: &str) {
    let keep_tokens = store.summary(OWNER, id).unwrap().n_tokens;
    let turn = NewTurn { keep_tokens, prompt: &[7], request: b"", sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 8).unwrap();
    assert_eq!(store.flush().committed, [id], "{context}");
    let said = Said::of(store.history(OWNER, id).unwrap());
    drop(store);
    disk.power_cut();
    let (mut store, report) = open(disk, 3);
    assert_eq!(report.findings, [], "{context}");
    assert_eq!(Said::of(store.history(OWNER, id).unwrap()), said, "{context}");
}

#[test]
fn of_a_damaged_journal_what_is_before_the_damage_goes_on_and_the_rest_is_reported() {
    let (original, id, states) = session();
    let journal = place(id, "journal");
    let bytes = original.bytes(&journal);
    let (mut n_usable, mut n_unusable) = (0, 0);
    for (context, damaged) in damaged(&bytes) {
        let (disk, ..) = session();
        disk.put(&journal, damaged.clone());
        let (mut store, report) = open(&disk, 2);
        let Ok(history) = store.history(OWNER, id).map(Said::of) else {
            // Its first record is gone: nothing is known, nothing is touched.
            assert_eq!(report.findings.len(), 1, "{context}");
            assert_eq!(disk.bytes(&journal), damaged, "{context}");
            n_unusable += 1;
            continue;
        };
        let at =
            states.iter().position(|said| *said == history).unwrap_or_else(|| panic!("{context}: a wrong history"));
        let n_kept = disk.bytes(&journal).len();
        let lost = damaged.len() - n_kept;
        let n_bytes = lost as u64;
        let is_told = match report.findings.as_slice() {
            [finding] => {
                let n_kept = n_bytes;
                [FindingKind::Torn { n_bytes, n_kept }, FindingKind::Cut { n_bytes, n_kept }].contains(&finding.kind)
            }
            // Cut between two records: nobody can know that there were more.
            findings => findings.is_empty() && lost == 0 && damaged == bytes[..damaged.len()],
        };
        assert!(is_told, "{context}: {:?}, {lost} bytes lost", report.findings);
        if lost > 0 {
            let kept = [place(id, "journal.cut"), place(id, "journal.torn")];
            let kept = kept
                .iter()
                .find(|file| disk.files().contains(file))
                .unwrap_or_else(|| panic!("{context}: no evidence"));
            assert_eq!(disk.bytes(kept), damaged[n_kept..], "{context}");
        }
        // Images of tokens that are lost must not come back, those of the others must.
        let n_full = u32::try_from(states[at].tokens.len() / 64).unwrap().min(N_BLOCKS);
        assert_eq!(loaded(&mut store, id, &context), n_full, "{context}");
        goes_on(store, &disk, id, &context);
        n_usable += 1;
    }
    assert!(n_usable > 2 * n_unusable && n_unusable > 100, "{n_usable} usable, {n_unusable} not");
}

#[test]
fn a_damaged_image_is_computed_again() {
    let (original, id, states) = session();
    let kv = place(id, "kv");
    let bytes = original.bytes(&kv);
    let (disk, ..) = session();
    let mut counts = [0; 3];
    for (context, damaged) in damaged(&bytes) {
        disk.put(&kv, damaged);
        let (mut store, report) = open(&disk, 2);
        assert_eq!(report.findings, [], "{context}");
        assert_eq!(Said::of(store.history(OWNER, id).unwrap()), states[states.len() - 1], "{context}");
        counts[loaded(&mut store, id, &context) as usize] += 1;
    }
    assert!(counts.iter().all(|&count| count > 100), "{counts:?}");
}

#[test]
fn a_session_with_a_damaged_key_is_left_alone() {
    let (original, id, _) = session();
    let key = place(id, "key");
    for (context, damaged) in damaged(&original.bytes(&key)) {
        let (disk, ..) = session();
        disk.put(&key, damaged.clone());
        let journal = disk.bytes(&place(id, "journal"));
        let (mut store, report) = open(&disk, 2);
        assert_eq!(report.findings.len(), 1, "{context}");
        assert_eq!(store.history(OWNER, id).err(), Some(StoreError::NotFound), "{context}");
        assert_eq!((disk.bytes(&key), disk.bytes(&place(id, "journal"))), (damaged, journal), "{context}");
    }
}

/// One that is cut is no key: the daemon says so and ends.
#[test]
fn under_a_damaged_master_key_nothing_is_read_and_nothing_is_touched() {
    let (disk, id, states) = session();
    let files = [place(id, "key"), place(id, "journal"), place(id, "kv")];
    let before = files.each_ref().map(|file| disk.bytes(file));
    for bit in 0..256 {
        let mut master = [1; 32];
        master[bit / 8] ^= 1 << (bit % 8);
        let (mut store, report) = open_with(&disk, 2, master);
        let kinds: Vec<FindingKind> = report.findings.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [FindingKind::ForeignKey], "bit {bit}");
        assert_eq!(store.history(OWNER, id).err(), Some(StoreError::NotFound), "bit {bit}");
    }
    assert_eq!(files.each_ref().map(|file| disk.bytes(file)), before);
    let (mut store, report) = open(&disk, 3);
    assert_eq!(report.findings, []);
    assert_eq!(Said::of(store.history(OWNER, id).unwrap()), states[states.len() - 1]);
    assert_eq!(loaded(&mut store, id, "under its own key again"), N_BLOCKS);
}

/// At worst an answer in the background is given up too early, or tried too often; it can be gone on with either way.
#[test]
fn a_damaged_count_of_tries_costs_no_word() {
    let (original, id, states) = session();
    let (mut store, _) = open(&original, 2);
    assert_eq!([1, 2, 3].map(|_| store.note_try(OWNER, id).unwrap()), [1, 2, 3]);
    drop(store);
    let tries = place(id, "tries");
    let bytes = original.bytes(&tries);
    for (context, damaged) in damaged(&bytes) {
        let (disk, ..) = session();
        disk.put(&tries, damaged);
        let (mut store, report) = open(&disk, 3);
        assert_eq!(report.findings, [], "{context}");
        let n_tries = store.note_try(OWNER, id).unwrap();
        assert_eq!(store.note_try(OWNER, id).unwrap(), n_tries + 1, "{context}");
        assert_eq!(Said::of(store.history(OWNER, id).unwrap()), states[states.len() - 1], "{context}");
        goes_on(store, &disk, id, &context);
    }
}

#[test]
fn a_journal_that_is_marked_is_written_again_whatever_the_mark_says() {
    for mark in [b"".as_slice(), b"x", &[0xff; 300]] {
        let (disk, id, states) = session();
        let unsure = place(id, "journal.unsure");
        disk.put(&unsure, mark.to_vec());
        let (mut store, report) = open(&disk, 2);
        assert_eq!(report.findings, []);
        assert_eq!(Said::of(store.history(OWNER, id).unwrap()), states[states.len() - 1]);
        store.flush();
        goes_on(store, &disk, id, "a mark");
        assert!(!disk.files().contains(&unsure));
    }
}

#[test]
fn files_of_another_session_are_not_believed() {
    let (disk, id, _) = session();
    let (mut store, _) = open(&disk, 2);
    let other = store.fork(OWNER, id, None, 9, &|_| {}).unwrap();
    let tokens = store.history(OWNER, other).unwrap().tokens.clone();
    store.save_block(OWNER, other, &SHAPE, 0, &image(&tokens, 0, 200)).unwrap();
    drop(store);
    // Images of the same tokens, under another key.
    disk.put(&place(id, "kv"), disk.bytes(&place(other, "kv")));
    let (mut store, _) = open(&disk, 3);
    assert_eq!(loaded(&mut store, id, "another's images"), 0);
    assert_eq!(loaded(&mut store, other, "its own"), 1);
    drop(store);
    for name in ["journal", "key"] {
        let (own, others) = (disk.bytes(&place(id, name)), disk.bytes(&place(other, name)));
        disk.put(&place(id, name), others);
        let (mut store, report) = open(&disk, 4);
        assert_eq!(report.count(|kind| kind == FindingKind::Unreadable), 1, "{name}");
        assert_eq!(store.history(OWNER, id).err(), Some(StoreError::NotFound), "{name}");
        drop(store);
        disk.put(&place(id, name), own);
    }
    assert_eq!(open(&disk, 5).1.sessions, 2);
}
