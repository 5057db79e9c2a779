//! How is each rule tried? A file a family, each with its list of rules.

pub(crate) mod attention;
pub(crate) mod blocks;
pub(crate) mod confined;
pub(crate) mod devices;
pub(crate) mod experts;
pub(crate) mod features;
pub(crate) mod files;
pub(crate) mod garbage;
mod layer;
pub(crate) mod long;
pub(crate) mod memory;
pub(crate) mod negotiation;
pub(crate) mod objects;
pub(crate) mod plans;
pub(crate) mod pool_rows;
pub(crate) mod products;
pub(crate) mod queues;
pub(crate) mod repetition;
pub(crate) mod rowwise;
pub(crate) mod selection;
pub(crate) mod sequences;
pub(crate) mod slow;
pub(crate) mod structs;

use crate::case::{Case, Ready, floats, words};
use crate::rig::{Fault, Session};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong};
use sparsed_abi::{DIM_TOKENS, OP_ADD, OpSpec, SpdStatus, status_name};

/// Row width of [`adder`].
const ADDER_WIDTH: i32 = 8;

/// The smallest program: the sum of two inputs.
fn adder(session: &Session) -> Case<'_> {
    let mut case = Case::new(session);
    let dims = [DIM_TOKENS, ADDER_WIDTH];
    let (a, b) = (case.input(&dims), case.input(&dims));
    let y = case.output(&dims);
    case.op(OpSpec { kind: OP_ADD, inputs: &[Some(a), Some(b)], outputs: &[Some(y)], ..OpSpec::default() });
    case
}

/// Inputs for [`adder`], and the sum.
fn addends(rng: &mut fastrand::Rng, tokens: usize) -> (Vec<u32>, Vec<u32>, Vec<f64>) {
    let n = tokens * ADDER_WIDTH.unsigned_abs() as usize;
    let (a, b) = (floats(rng, n), floats(rng, n));
    let sum = a.iter().zip(&b).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
    (words(&a), words(&b), sum)
}

/// Fails unless the compiled adder adds.
fn adds(ready: &Ready<'_>, rng: &mut fastrand::Rng, step: &Step) -> Outcome {
    let (a, b, sum) = addends(rng, step.tokens.len());
    let found = ready.run(step, &[&a, &b])?;
    crate::case::close(crate::case::CLASS_F, "the sum of two inputs", &found[0], &sum)
}

/// Fails unless the call was refused with one of `statuses`.
fn refused<T>(what: &str, answer: Result<T, Fault>, statuses: &[SpdStatus]) -> Outcome {
    let names = || statuses.iter().map(|&status| status_name(status)).collect::<Vec<_>>().join(" or ");
    match answer {
        Ok(_) => Err(Wrong::Failed(format!("{what} is taken, {} is right", names()))),
        Err(fault) if statuses.contains(&fault.status) => Ok(()),
        Err(fault) => Err(Wrong::Failed(format!("{what}: {fault}, {} is right", names()))),
    }
}
