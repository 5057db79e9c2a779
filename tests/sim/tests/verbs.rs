//! What has a verb done that failed? What it says: nothing, or what the disk has taken all the same.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_engine::api::Owner;
use sparsed_engine::simulation::{Machine, Setup};
use sparsed_engine::{Limits, Recovery, SessionId};
use sparsed_session::{AnyDisk, Limits as Quotas, MasterKey, NewSession, NewTurn, Outcome, Store};
use sparsed_sim::{FakeDisk, Faults};
use std::time::Duration;

const OWNER: Owner = Owner::Uid(1000);

fn store(disk: &FakeDisk) -> Store<AnyDisk> {
    let mut rng = fastrand::Rng::with_seed(7);
    let random = Box::new(move |bytes: &mut [u8]| rng.fill(bytes));
    let disk: AnyDisk = Box::new(disk.other());
    Store::open(disk, random, MasterKey::new([1; 32]), Quotas::default()).unwrap().0
}

fn daemon(disk: &FakeDisk) -> Machine {
    let ms = Duration::from_millis;
    let recovery =
        Recovery { backoff: vec![ms(1)], forget: ms(1000), watchdog: ms(60), step_failures: 3, step_window: ms(100) };
    let setup = Setup {
        limits: Limits::default(),
        n_blocks: 20,
        n_fast: 20,
        max_context: 400,
        secret: [1; 32],
        block_bytes: 64,
        cache_bytes: [64, 64],
    };
    Machine::new(&setup, &recovery, store(disk), || 1_800_000_000, || Duration::ZERO)
}

/// A session with two turns.
fn session(disk: &FakeDisk) -> SessionId {
    let (mut store, owner) = (store(disk), OWNER.number());
    let new = NewSession { model: "m", fingerprint: [9; 32], title: "", settings: None, pinned: false };
    let id = store.create(owner, &new, 5).unwrap();
    for at in 0..2 {
        let turn = NewTurn { keep_tokens: 2 * at, prompt: &[at], request: b"", sampling: b"" };
        store.begin_turn(owner, id, &turn, 6).unwrap();
        store.append_tokens(owner, id, &[7]).unwrap();
        store.end_turn(owner, id, Outcome::Complete, b"", 8).unwrap();
    }
    store.commit(owner, id).unwrap();
    id
}

/// Each call that the verb makes fails in turn, before it is carried out, after it or half-way.
#[test]
fn a_truncation_that_failed_is_not_carried_out_later() {
    let (mut n_failed, mut n_undone) = (0, 0);
    for (seed, fail_after) in (0..20).flat_map(|seed| (0..8).map(move |at| (seed, at))) {
        let disk = FakeDisk::new(seed);
        let id = session(&disk);
        let mut machine = daemon(&disk);
        disk.set_faults(Faults { fail_after: Some(fail_after), ..Faults::NONE });
        let done = machine.truncate(OWNER, id, 1);
        disk.set_faults(Faults::NONE);
        let said = machine.history(OWNER, id).unwrap();
        machine.sessions_turn(usize::MAX);
        assert_eq!(machine.history(OWNER, id).unwrap(), said, "seed {seed}, call {fail_after}");
        drop(machine);
        let found = store(&disk).history(OWNER.number(), id).unwrap().clone();
        assert_eq!(found, said, "seed {seed}, call {fail_after}");
        n_failed += u32::from(done.is_err());
        n_undone += u32::from(done.is_err() && said.turns.len() == 2);
        assert!(done.is_err() || said.turns.len() == 1);
    }
    assert!(n_failed > 20 && n_undone > n_failed / 4, "{n_undone} of {n_failed} were undone");
}
