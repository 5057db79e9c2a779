//! L2: the lightning indexer's choice.

use super::attention::{Part, contents, step_of};
use crate::cache::{Contents, Plane, Shape, row_formats};
use crate::case::{Case, Words, as_ints, floats, stored_rows, wide, words};
use crate::child::Context;
use crate::oracle;
use crate::rig::{Pool, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::{DIM_TOKENS, OP_IDX_TOPK, OpSpec};
use sparsed_quant::Format;
use std::rc::Rc;

const PLACE: &str = "OPS.md, IDX_TOPK";

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L2,
        "op.idx_topk.golden",
        "IDX_TOPK selects the K best of its own sequence up to its own position, in ascending order, then -1",
        PLACE,
        &["op.idx_append.golden"],
        golden,
    ),
    rule(
        Level::L2,
        "op.idx_topk.ties",
        "of equal scores the lower position wins",
        PLACE,
        &["op.idx_topk.golden"],
        ties,
    ),
];

/// Heads of the indexer in these checks.
const HEADS: usize = 3;
const SCALE: f32 = 0.31;

/// Which tokens of which sequences share a step; the last sequence is the longest.
const STEPS: [&[Part]; 5] = [&[(0, 1)], &[(3, 2)], &[(2, 3), (5, 1), (4, 7)], &[(6, 1)], &[(6, 64)]];

/// A program of one IDX_TOPK; its inputs are queries and weights of heads.
pub(crate) fn program<'s>(session: &'s Session, pool: &Rc<Pool>, shape: &Shape, layer: u32, k: usize) -> Case<'s> {
    let n = |n: usize| i32::try_from(n).expect("checks are small");
    let mut case = Case::with_pool(session, pool);
    let q = case.input(&[DIM_TOKENS, n(HEADS), n(shape.index as usize)]);
    let w = case.input(&[DIM_TOKENS, n(HEADS)]);
    let sel = case.output_ids(&[DIM_TOKENS, n(k)]);
    case.op(OpSpec {
        kind: OP_IDX_TOPK,
        inputs: &[Some(q), Some(w)],
        outputs: &[Some(sel)],
        layer,
        i: [n(k), 0, 0, 0, 0, 0],
        f: [SCALE, 0.0, 0.0, 0.0],
    });
    case
}

/// Queries and head weights for [`program`], as they lie in the arena.
pub(crate) fn inputs(rng: &mut fastrand::Rng, shape: &Shape, tokens: usize) -> (Words, Words) {
    (words(&floats(rng, tokens * HEADS * shape.index as usize)), words(&floats(rng, tokens * HEADS)))
}

fn golden(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        for index in [32, 96] {
            let contents = contents(&mut rng, Shape { index, layers: 1, ..Shape::usual(&session, format) });
            let pool = contents.shape.pool(&session)?;
            contents.write(&session, &pool, &[Plane::Index])?;
            let edge = contents.shape.block_tokens as usize;
            // Around the contexts of the steps: K = p, p + 1, p + 2 for some of their tokens.
            for k in [1, edge, edge + 1, 2 * edge, 4 * edge + 3] {
                if session.info.max_topk != 0 && k > session.info.max_topk as usize {
                    continue;
                }
                for layer in 0..contents.shape.index_layers {
                    compare(&session, &mut rng, &contents, &pool, (layer, k))?;
                }
            }
        }
    }
    Ok(())
}

/// What a plugin's scores may be off by, of the largest that queries and keys of this size can have. Keys of Q8_0 may
/// be multiplied with queries in 16 bits, keys of Q4_0 with queries in 8.
fn tolerance(format: Format) -> f64 {
    match format {
        Format::Q8_0 => 4e-5,
        Format::Q4_0 => 5e-3,
        _ => 2e-6,
    }
}

fn compare(
    session: &Session,
    rng: &mut fastrand::Rng,
    contents: &Contents,
    pool: &Rc<Pool>,
    (layer, k): (u32, usize),
) -> Result<(), Wrong> {
    let shape = &contents.shape;
    let steps: Vec<Step> = STEPS.iter().map(|parts| step_of(contents, parts)).collect();
    let ready = program(session, pool, shape, layer, k).compile(&steps.iter().collect::<Vec<_>>())?;
    for (parts, step) in STEPS.iter().zip(&steps) {
        let (q, w) = inputs(rng, shape, step.tokens.len());
        let found = as_ints(&ready.run(step, &[&q, &w])?[0]);
        judge(contents, parts, step, (layer, k), &(q, w), &found)?;
    }
    Ok(())
}

/// Fails unless `found` is right for every token of the step that computes `parts` of the contents' sequences.
pub(crate) fn judge(
    contents: &Contents,
    parts: &[Part],
    step: &Step,
    (layer, k): (u32, usize),
    inputs: &(Words, Words),
    found: &[i32],
) -> Outcome {
    let (q, w) = (wide(&crate::case::as_floats(&inputs.0)), wide(&crate::case::as_floats(&inputs.1)));
    let (shape, width) = (&contents.shape, contents.shape.index as usize);
    for (t, (&position, seq)) in step.positions.iter().zip(step.seq_of()).enumerate() {
        let row = |s: usize| contents.index[layer as usize].row(contents.token(parts[seq].0, s));
        let keys: Vec<&[f64]> = (0..=position as usize).map(row).collect();
        let (q, w) = (&q[t * HEADS * width..(t + 1) * HEADS * width], &w[t * HEADS..(t + 1) * HEADS]);
        let scores = oracle::scores(q, w, f64::from(SCALE), &keys);
        let size = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let largest = keys.iter().map(|key| size(key)).fold(0.0, f64::max);
        let bound: f64 =
            q.chunks_exact(width).zip(w).map(|(q, w)| f64::from(SCALE) * w.abs() * size(q) * largest).sum();
        let judged = oracle::accepts(&found[t * k..(t + 1) * k], &scores, bound * tolerance(shape.format));
        ensure!(
            judged.is_ok(),
            "IDX_TOPK of layer {layer} over {} keys of {width}, K = {k}, token {t} at position {position}: {}",
            shape.format.name(),
            judged.err().unwrap_or_default()
        );
    }
    Ok(())
}

/// Two keys point along the query, all others against it: their scores are exactly 0.
fn ties(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        let shape = Shape { layers: 1, index_layers: 1, ..Shape::usual(&session, format) };
        let context_tokens = 2 * shape.block_tokens + 3;
        let order: Vec<u32> = (0..shape.n_blocks).rev().collect();
        let mut contents = Contents::random(&mut rng, shape, shape.sequences(&[context_tokens], &order));
        let width = shape.index as usize;
        let best = [5usize, 2 * shape.block_tokens as usize];
        for (token, row) in contents.index[0].given.chunks_exact_mut(width).enumerate() {
            let sign = if best.contains(&token) { 1.0 } else { -1.0 };
            row.iter_mut().for_each(|x| *x = sign * (x.abs() + 0.1));
        }
        contents.index[0].bytes = stored_rows(format, width, &contents.index[0].given);
        let pool = shape.pool(&session)?;
        contents.write(&session, &pool, &[Plane::Index])?;
        for tokens in [1usize, 7] {
            let step = step_of(&contents, &[(0, u32::try_from(tokens).expect("small"))]);
            let step = Step { ..step };
            let q: Vec<f32> = floats(&mut rng, tokens * HEADS * width).iter().map(|x| x.abs() + 0.1).collect();
            let w = vec![0.5; tokens * HEADS];
            let ready = program(&session, &pool, &shape, 0, 4).compile(&[&step])?;
            let found = as_ints(&ready.run(&step, &[&words(&q), &words(&w)])?[0]);
            for (found, &position) in found.chunks_exact(4).zip(&step.positions) {
                let mut scores = vec![0.0; position as usize + 1];
                best.iter().filter(|&&s| s <= position as usize).for_each(|&s| scores[s] = 1.0);
                let right: Vec<i32> =
                    oracle::top_k(&scores, 4).iter().map(|&s| i32::try_from(s).expect("small")).collect();
                ensure!(
                    found == right,
                    "{} keys, token at {position}: {found:?} is selected, {right:?} is right: all scores but those of \
                     {best:?} are 0",
                    format.name()
                );
            }
        }
    }
    Ok(())
}
