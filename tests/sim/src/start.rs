//! What is a daemon started with, and what are requests made of?

use crate::age::{Clock, RETENTION_S};
use crate::device::logits_of;
use crate::disk::FakeDisk;
use crate::run::Violation;
use fastrand::Rng;
use sparsed_engine::api::{Generate, Owner};
use sparsed_engine::simulation::{Machine, Setup, naive_answer};
use sparsed_engine::{Recovery, Sampling, Wishes};
use sparsed_session::{AnyDisk, Limits as Quotas, MasterKey, Store};
use std::sync::Arc;
use std::time::Duration;

/// A request, and what a model with so many tokens of context answers that has the device to itself.
pub(crate) fn answer_of(owner: Owner, prompt: Vec<u32>, wishes: u64, context: u32) -> (Generate, Arc<[u32]>) {
    let mut rng = Rng::with_seed(wishes);
    let sampling = Sampling {
        temperature: [0.0, 0.9][rng.usize(..2)],
        seed: rng.u64(..),
        repetition_penalty: [1.0, 1.3][rng.usize(..2)],
        ..Sampling::default()
    };
    let max_tokens = rng.usize(1..90);
    let n_tokens = max_tokens.min((context as usize).saturating_sub(prompt.len()));
    let expected = naive_answer(&prompt, sampling.clone(), n_tokens, |tokens| logits_of(tokens.iter().copied()));
    let wishes = Wishes { max_tokens: u32::try_from(max_tokens).ok(), sampling, ..Wishes::default() };
    (Generate { model: "m".to_owned(), prompt, ..wishes.request(owner) }, expected.into())
}

pub(crate) fn open(disk: &FakeDisk, setup: &Setup, clock: &Clock, seed: u64) -> Result<Machine, Violation> {
    let mut rng = Rng::with_seed(seed);
    let random = Box::new(move |bytes: &mut [u8]| rng.fill(bytes));
    let disk: AnyDisk = Box::new(disk.other());
    let quotas = Quotas { kv_bytes: 60_000, compact_bytes: 2000, retention_seconds: RETENTION_S, ..Quotas::default() };
    let opened = Store::open(disk, random, MasterKey::new([1; 32]), quotas);
    let (store, _) = opened.map_err(|error| Violation(format!("the store cannot be opened: {error}")))?;
    Ok(Machine::new(setup, &recovery(), store, clock.date(), clock.uptime()))
}

/// A daemon that stands in for the one that has died: on a disk of its own, which nobody looks at.
pub(crate) fn closed(setup: &Setup) -> Machine {
    open(&FakeDisk::new(0), setup, &Clock::new(), 0).expect("an empty disk without faults")
}

fn recovery() -> Recovery {
    let ms = Duration::from_millis;
    Recovery { backoff: vec![ms(1)], forget: ms(1000), watchdog: ms(60), step_failures: 3, step_window: ms(100) }
}
