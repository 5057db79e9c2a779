//! Power cuts, deaths and failing disks, at random and at every call.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test")]

use sparsed_session::{
    Durability, Limits, MasterKey, NewSession, NewTurn, Outcome, SessionId, Settings, Store, StoreError,
};
use sparsed_sim::{FakeDisk, Faults, Outline, Plant, Said, run, seeds};

const STEPS: u64 = 1000;
const OWNER: u64 = 1000;

#[test]
fn no_committed_token_is_lost_and_no_wrong_one_comes() {
    let mut sum = Outline::default();
    for seed in seeds(200) {
        let outline = run(seed, STEPS, Plant::Nothing).unwrap_or_else(|violation| panic!("{}", violation.0));
        sum.steps += outline.steps;
        sum.cuts += outline.cuts;
        sum.failures += outline.failures;
        sum.shortened += outline.shortened;
        sum.images += outline.images;
    }
    println!("{sum:?}");
    // The runs must have been about something.
    let n = sum.steps / STEPS;
    assert!(sum.cuts > 20 * n && sum.failures > 20 * n && sum.shortened > 10 * n && sum.images > 4 * n, "{sum:?}");
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    for seed in seeds(5) {
        let (first, second) = (run(seed, STEPS, Plant::Nothing).unwrap(), run(seed, STEPS, Plant::Nothing).unwrap());
        assert_eq!(first, second, "seed {seed}");
        assert_ne!(first.digest, run(seed + 1, STEPS, Plant::Nothing).unwrap().digest);
    }
}

#[test]
fn a_store_that_does_not_sync_is_found_out() {
    for (plant, n_seeds) in [(Plant::NoSync, 3), (Plant::NoSyncDir, 3), (Plant::SomeSyncs(20), 20)] {
        let found = (0..n_seeds).find_map(|seed| run(seed, STEPS, plant).err());
        let Some(violation) = found else { panic!("{plant:?} is not found in {n_seeds} runs") };
        println!("{plant:?}: {}", violation.0);
    }
}

fn open(disk: &FakeDisk, seed: u64) -> Store<FakeDisk> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let random = Box::new(move |bytes: &mut [u8]| rng.fill(bytes));
    Store::open(disk.other(), random, MasterKey::new([1; 32]), Limits::default()).unwrap().0
}

/// A small life of a session, until something fails as often as it is tried. Answers what was committed last, what it
/// might be by now, and whether nothing was left undone.
fn live(
    store: &mut Store<FakeDisk>,
    durability: Durability,
    n_tries: u32,
    n_renames: u64,
) -> (Option<(SessionId, Said)>, Vec<Said>, bool) {
    let settings = Settings { durability, ..Settings::default() };
    let new = NewSession { model: "tiny", fingerprint: [9; 32], title: "one", settings: Some(settings), pinned: false };
    let mut said = Said::new("one", settings);
    let mut after = vec![said.clone()];
    let id = (0..n_tries).find_map(|_| store.create(OWNER, &new, 5).ok());
    let Some(id) = id else { return (None, after, false) };
    let mut committed = said.clone();
    let mut flush = |store: &mut Store<FakeDisk>, said: &Said, after: &mut Vec<Said>| {
        after.push(said.clone());
        (0..n_tries).any(|_| {
            let flushed = store.flush();
            if flushed.committed == [id] {
                committed = said.clone();
                *after = vec![said.clone()];
            }
            flushed.failed.is_empty()
        })
    };
    let mut lives = || -> Result<bool, StoreError> {
        for turn in 0..3_u32 {
            let (kept, prompt) = (said.tokens.len(), [turn; 5]);
            let keep_tokens = u32::try_from(kept).unwrap();
            // Large enough for a compaction at the end.
            let request = vec![7; 40_000];
            let new = NewTurn { keep_tokens, prompt: &prompt, request: &request, sampling: b"" };
            store.begin_turn(OWNER, id, &new, 6)?;
            said.begin(kept, &prompt, &request);
            if !flush(store, &said, &mut after) {
                return Ok(false);
            }
            for token in 0..3 {
                store.append_tokens(OWNER, id, &[token])?;
                said.grow(&[token]);
                if !flush(store, &said, &mut after) {
                    return Ok(false);
                }
            }
            store.end_turn(OWNER, id, Outcome::Complete, b"answer", 7)?;
            said.end(Outcome::Complete, b"answer");
            if !flush(store, &said, &mut after) {
                return Ok(false);
            }
        }
        store.truncate(OWNER, id, 1)?;
        said.truncate(1);
        // The journal is compacted here; what comes after it must find the new one.
        if !flush(store, &said, &mut after) {
            return Ok(false);
        }
        if n_renames > 0 {
            store.rename(OWNER, id, "two")?;
            said.title = "two".into();
        }
        Ok(flush(store, &said, &mut after))
    };
    let is_over = lives() == Ok(true);
    (Some((id, committed)), after, is_over)
}

#[test]
fn the_power_may_go_at_every_call() {
    for durability in [Durability::Token, Durability::Turn, Durability::None] {
        let mut n_cuts = 0;
        let (mut was_shorter, mut is_over) = (false, false);
        for at in 0.. {
            for seed in seeds(4) {
                let disk = FakeDisk::new(seed);
                let mut store = open(&disk, 1);
                disk.set_faults(Faults { off_after: Some(at), ..Faults::NONE });
                let (session, after, whole) = live(&mut store, durability, 1, 1);
                is_over |= whole && !disk.is_off();
                drop(store);
                disk.power_cut();
                let mut store = open(&disk, 2);
                let context = format!("{durability:?}, cut at {at}, seed {seed}");
                let Some((id, committed)) = session else {
                    assert!(store.list(OWNER).iter().all(|summary| summary.n_turns == 0), "{context}");
                    continue;
                };
                let found = Said::of(store.history(OWNER, id).unwrap_or_else(|error| panic!("{context}: {error}")));
                assert!(found == committed || after.contains(&found), "{context}: {} tokens", found.tokens.len());
                was_shorter |= Some(&found) != after.last();
                n_cuts += 1;
                // It goes on.
                let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: b"", sampling: b"" };
                store.begin_turn(OWNER, id, &turn, 8).unwrap();
                store.commit(OWNER, id).unwrap();
                drop(store);
                disk.power_cut();
                let tokens = &open(&disk, 3).history(OWNER, id).unwrap().tokens.clone();
                assert_eq!(tokens, &[1], "{context}");
            }
            if is_over {
                break;
            }
        }
        assert!(n_cuts > 40, "{durability:?}: {n_cuts} cuts");
        assert!(was_shorter || durability == Durability::Token, "{durability:?}: nothing was ever lost");
    }
}

#[test]
fn any_call_may_fail_once_and_the_second_try_makes_it_good() {
    for durability in [Durability::Token, Durability::Turn] {
        let mut n_failures = 0;
        for at in 0.. {
            let mut has_failed = false;
            for seed in seeds(24) {
                let disk = FakeDisk::new(seed);
                let mut store = open(&disk, 1);
                disk.set_faults(Faults { fail_after: Some(at), ..Faults::NONE });
                let (session, _, whole) = live(&mut store, durability, 2, seed % 2);
                let context = format!("{durability:?}, call {at} fails, seed {seed}");
                let (id, committed) = session.unwrap_or_else(|| panic!("{context}: not made"));
                assert!(whole && committed.turns.len() == 1, "{context}: not committed");
                has_failed |= disk.has_failed();
                drop(store);
                disk.power_cut();
                let mut store = open(&disk, 2);
                let found = store.history(OWNER, id).map(Said::of).unwrap_or_else(|error| panic!("{context}: {error}"));
                assert!(found == committed, "{context}: {} tokens", found.tokens.len());
                n_failures += 1;
            }
            if !has_failed {
                break;
            }
        }
        assert!(n_failures > 900, "{durability:?}: {n_failures} failures");
    }
}

#[test]
fn a_full_disk_fails_the_verb_and_nothing_else() {
    let disk = FakeDisk::new(1);
    let mut store = open(&disk, 1);
    let settings = Some(Settings { durability: Durability::Token, ..Settings::default() });
    let new = NewSession { model: "tiny", fingerprint: [9; 32], title: "one", settings, pinned: false };
    let id = store.create(OWNER, &new, 5).unwrap();
    let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: &[7; 5000], sampling: b"" };
    disk.set_faults(Faults { capacity_bytes: 3000, ..Faults::NONE });
    assert_eq!(store.create(OWNER, &NewSession { title: &"x".repeat(1000), ..new }, 5).map(drop), Ok(()));
    store.begin_turn(OWNER, id, &turn, 6).unwrap();
    assert_eq!(store.flush().failed, [(id, StoreError::DiskFull)]);
    // With room the same records are written.
    disk.set_faults(Faults::NONE);
    assert_eq!(store.flush().committed, [id]);
    drop(store);
    disk.power_cut();
    let mut store = open(&disk, 2);
    assert_eq!(store.history(OWNER, id).unwrap().turns.len(), 1);
    // Without room the session can go back to what the disk has.
    store.resume_turn(OWNER, id).unwrap();
    disk.set_faults(Faults { capacity_bytes: 0, ..Faults::NONE });
    store.append_tokens(OWNER, id, &[2]).unwrap();
    assert_eq!(store.flush().failed, [(id, StoreError::DiskFull)]);
    store.revert(OWNER, id).unwrap();
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1]);
    assert_eq!(store.flush().failed, []);
}

#[test]
fn an_answer_that_failed_lets_its_session_go_although_the_disk_cannot_be_read() {
    let disk = FakeDisk::new(1);
    let mut store = open(&disk, 1);
    let new = NewSession { model: "tiny", fingerprint: [9; 32], title: "one", settings: None, pinned: false };
    let id = store.create(OWNER, &new, 5).unwrap();
    let turn = NewTurn { keep_tokens: 0, prompt: &[1], request: b"", sampling: b"" };
    store.begin_turn(OWNER, id, &turn, 6).unwrap();
    assert_eq!(store.flush().written, [id]);
    store.append_tokens(OWNER, id, &[2]).unwrap();
    // The second call of the store fails too, which is the journal being read.
    disk.set_faults(Faults { capacity_bytes: 0, ..Faults::NONE });
    assert_eq!(store.flush().failed.len(), 1);
    disk.set_faults(Faults { fail_after: Some(0), ..Faults::NONE });
    assert!(store.revert(OWNER, id).is_err());
    disk.set_faults(Faults::NONE);
    store.resume_turn(OWNER, id).unwrap();
    store.append_tokens(OWNER, id, &[3]).unwrap();
    assert_eq!(store.flush().failed, []);
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1, 2, 3]);
}

/// A failed write may have come to the disk after all, and its cut may not: behind what is written instead, which is as
/// long as its beginning, its end would be the next record.
#[test]
fn what_was_reverted_does_not_go_on_behind_what_was_written_instead() {
    let (mut n_old, mut n_new) = (0_u32, 0_u32);
    for seed in seeds(1000) {
        let disk = FakeDisk::new(seed);
        let mut store = open(&disk, 1);
        // Nothing is synced unless it is asked for.
        let settings = Some(Settings { durability: Durability::None, ..Settings::default() });
        let new = NewSession { model: "tiny", fingerprint: [9; 32], title: "one", settings, pinned: false };
        let id = store.create(OWNER, &new, 5).unwrap();
        let turn = NewTurn { keep_tokens: 0, prompt: &[7], request: b"", sampling: b"" };
        store.begin_turn(OWNER, id, &turn, 6).unwrap();
        store.commit(OWNER, id).unwrap();
        store.append_tokens(OWNER, id, &[1]).unwrap();
        store.end_turn(OWNER, id, Outcome::Complete, b"old", 7).unwrap();
        disk.set_faults(Faults { one_in: 1, ..Faults::NONE });
        assert_eq!(store.flush().failed.len(), 1);
        disk.set_faults(Faults::NONE);
        store.revert(OWNER, id).unwrap();
        store.resume_turn(OWNER, id).unwrap();
        store.append_tokens(OWNER, id, &[2]).unwrap();
        assert_eq!(store.flush().written, [id]);
        drop(store);
        disk.power_cut();
        let mut store = open(&disk, 2);
        let history = store.history(OWNER, id).unwrap();
        match (history.tokens.as_slice(), history.turns[0].outcome) {
            ([7], None) => {}
            ([7, 1], None | Some(Outcome::Complete)) => n_old += 1,
            ([7, 2], None) => n_new += 1,
            mixed => panic!("seed {seed}: {mixed:?}"),
        }
    }
    assert!(n_old > 10 && n_new > 100, "{n_old} {n_new}");
}
