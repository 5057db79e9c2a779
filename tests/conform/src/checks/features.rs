//! L3: does the device keep what its feature bits claim?

use super::blocks::export;
use super::layer::{K, Layer, WIDTH};
use crate::cache::{Shape, row_formats};
use crate::case::{Ready, Words, floats, words};
use crate::child::Context;
use crate::rig::{Pool, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::{Sequence, Step};
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_abi::{FEAT_DETERMINISTIC, FEAT_INVARIANT};
use std::rc::Rc;

const PLACE: &str = "plugin.h, SPD_FEAT_*";
const NEEDS: &[&str] = &["op.sparse_mla.golden", "op.idx_topk.golden", "step.appends_visible"];

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L3,
        "feature.deterministic",
        "with SPD_FEAT_DETERMINISTIC the same step gives the same bits",
        PLACE,
        NEEDS,
        deterministic,
    ),
    rule(
        Level::L3,
        "feature.invariant_batch",
        "with SPD_FEAT_INVARIANT a row's bits do not depend on what shares its batch",
        PLACE,
        &["feature.deterministic"],
        invariant_batch,
    ),
    rule(
        Level::L3,
        "feature.invariant_chunk",
        "with SPD_FEAT_INVARIANT a row's bits do not depend on how the prompt was cut",
        PLACE,
        &["feature.invariant_batch"],
        invariant_chunk,
    ),
];

/// Most tokens of a step here.
const TOKENS: u32 = 45;

/// A layer with its pool, which is new for every run.
struct Setting<'s> {
    session: &'s Session,
    shape: Shape,
    layer: Layer,
}

impl<'s> Setting<'s> {
    fn each(session: &'s Session, rng: &mut fastrand::Rng) -> Vec<Self> {
        let one = |format| {
            let shape = Shape { layers: 1, index_layers: 1, ..Shape::usual(session, format) };
            Self { session, shape, layer: Layer::random(rng, session, shape) }
        };
        row_formats(session).into_iter().map(one).collect()
    }

    fn fresh(&self) -> Result<(Rc<Pool>, Ready<'s>), Wrong> {
        let pool = self.shape.pool(self.session)?;
        let largest = Step::over(&self.sequences(&[TOKENS, 1, 1]), self.shape.block_tokens);
        let ready = self.layer.program(self.session, &pool)?.compile(&[&largest])?;
        Ok((pool, ready))
    }

    /// Sequences in blocks from the last to the first.
    fn sequences(&self, contexts: &[u32]) -> Vec<Sequence> {
        self.shape.sequences(contexts, &(0..self.shape.n_blocks).rev().collect::<Vec<_>>())
    }

    fn run(&self, ready: &Ready<'_>, sequences: &[Sequence], x: &[f32]) -> Result<Vec<Words>, Wrong> {
        ready.run(&Step::over(sequences, self.shape.block_tokens), &[&words(x)])
    }
}

fn deterministic(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    if !session.claims(FEAT_DETERMINISTIC) {
        return skip("SPD_FEAT_DETERMINISTIC is not claimed");
    }
    for setting in Setting::each(&session, &mut rng) {
        let sequences = setting.sequences(&[30, 1, 14]);
        let x = floats(&mut rng, 45 * WIDTH);
        let mut first = None;
        for repetition in 1..=4 {
            let (_pool, ready) = setting.fresh()?;
            let found = setting.run(&ready, &sequences, &x)?;
            let same = *first.get_or_insert_with(|| found.clone()) == found;
            ensure!(same, "run {repetition} of a step over {} rows gives other bits", setting.shape.format.name());
        }
    }
    Ok(())
}

fn invariant_batch(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    if !session.claims(FEAT_INVARIANT) {
        return skip("SPD_FEAT_INVARIANT is not claimed");
    }
    for setting in Setting::each(&session, &mut rng) {
        let lengths = [21u32, 1, 18];
        let sequences = setting.sequences(&lengths);
        let x = floats(&mut rng, 40 * WIDTH);
        let (_pool, ready) = setting.fresh()?;
        let together = setting.run(&ready, &sequences, &x)?;
        let mut at = 0;
        for (sequence, n) in sequences.iter().zip(lengths.map(|n| n as usize)) {
            let (_pool, ready) = setting.fresh()?;
            let alone = setting.run(&ready, std::slice::from_ref(sequence), &x[at * WIDTH..(at + n) * WIDTH])?;
            let tokens = (at..at + n, n);
            same_rows(&together, &alone, tokens, &format!("{n} tokens alone or among 40"), &setting.shape)?;
            at += n;
        }
    }
    Ok(())
}

/// Compares rows of two answers: tokens `range` of the first are all of the second.
fn same_rows(
    whole: &[Words],
    part: &[Words],
    (range, n): (std::ops::Range<usize>, usize),
    what: &str,
    shape: &Shape,
) -> Outcome {
    let width = part[1].len() / n;
    let (start, end) = (range.start, range.end);
    let name = shape.format.name();
    ensure!(whole[0][start * K..end * K] == part[0], "{what}, {name} rows: other positions are selected");
    ensure!(whole[1][start * width..end * width] == part[1], "{what}, {name} rows: other bits");
    Ok(())
}

fn invariant_chunk(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    if !session.claims(FEAT_INVARIANT) {
        return skip("SPD_FEAT_INVARIANT is not claimed");
    }
    for setting in Setting::each(&session, &mut rng) {
        let sequence = setting.sequences(&[TOKENS]).swap_remove(0);
        let x = floats(&mut rng, TOKENS as usize * WIDTH);
        let (pool, ready) = setting.fresh()?;
        let whole = setting.run(&ready, std::slice::from_ref(&sequence), &x)?;
        let images = export(&session, &pool, &sequence.blocks)?;
        let edge = setting.shape.block_tokens.min(20);
        for cut in [1u32, 7, edge, edge + 1] {
            let (pool, ready) = setting.fresh()?;
            for first in (0..TOKENS).step_by(cut as usize) {
                let n = cut.min(TOKENS - first);
                let part = Sequence { first, n, ..sequence.clone() };
                let range = first as usize..(first + n) as usize;
                let found = setting.run(&ready, &[part], &x[range.start * WIDTH..range.end * WIDTH])?;
                let what = format!("position {first} on, in chunks of {cut} or of {TOKENS}");
                same_rows(&whole, &found, (range, n as usize), &what, &setting.shape)?;
            }
            let same = export(&session, &pool, &sequence.blocks)? == images;
            ensure!(same, "{} rows written in chunks of {cut} differ", setting.shape.format.name());
        }
    }
    Ok(())
}
