//! L2: mixture of experts.

use super::products::class;
use super::rowwise::{steps, weight_formats};
use crate::case::{CLASS_F, Case, Matrix, as_floats, as_ints, close, floats, int_words, wide, words};
use crate::child::Context;
use crate::oracle::{self, Routing};
use crate::rig::Session;
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::{DIM_TOKENS, OP_MOE_COMBINE, OP_MOE_LINEAR, OP_MOE_ROUTE, OpSpec};
use sparsed_quant::Format;

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L2,
        "op.moe_route.golden",
        "MOE_ROUTE chooses and weighs as the oracle, with every score, group rule and bias",
        "OPS.md, MOE_ROUTE",
        &[],
        route,
    ),
    rule(
        Level::L2,
        "op.moe_route.ties",
        "of equal experts the lower id comes first",
        "OPS.md, MOE_ROUTE",
        &["op.moe_route.golden"],
        route_ties,
    ),
    rule(
        Level::L2,
        "op.moe_linear.golden",
        "MOE_LINEAR multiplies with the chosen experts, in every claimed dtype",
        "OPS.md, MOE_LINEAR",
        &[],
        linear,
    ),
    rule(Level::L2, "op.moe_combine.golden", "MOE_COMBINE is the oracle's", "OPS.md, MOE_COMBINE", &[], combine),
];

/// What two values of b may differ by and still be in either order.
const TIE: f64 = 1e-6;

fn n(n: usize) -> i32 {
    i32::try_from(n).expect("checks are small")
}

/// A program of one MOE_ROUTE over `experts` logits.
fn router<'s>(
    session: &'s Session,
    routing: &Routing,
    experts: usize,
    scale: f32,
    bias: Option<&Matrix>,
) -> Result<Case<'s>, Wrong> {
    let mut case = Case::new(session);
    let logits = case.input(&[DIM_TOKENS, n(experts)]);
    let bias = match bias {
        Some(bias) => Some(case.weight(bias)?),
        None => None,
    };
    let (ids, weights) =
        (case.output_ids(&[DIM_TOKENS, n(routing.active)]), case.output(&[DIM_TOKENS, n(routing.active)]));
    let bit = i32::from;
    case.op(OpSpec {
        kind: OP_MOE_ROUTE,
        inputs: &[Some(logits), bias],
        outputs: &[Some(ids), Some(weights)],
        i: [
            n(routing.active),
            n(routing.groups),
            n(routing.groups_kept),
            bit(routing.softmax),
            bit(routing.renormalise),
            bit(routing.group_by_best),
        ],
        f: [scale, 0.0, 0.0, 0.0],
        ..OpSpec::default()
    });
    Ok(case)
}

fn route(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let plain =
        Routing { active: 2, groups: 1, groups_kept: 1, softmax: false, renormalise: false, group_by_best: false };
    let kinds = [
        plain,
        Routing { softmax: true, active: 3, ..plain },
        Routing { renormalise: true, active: 8, ..plain },
        Routing { groups: 4, groups_kept: 2, renormalise: true, ..plain },
        Routing { groups: 4, groups_kept: 2, softmax: true, group_by_best: true, active: 5, ..plain },
    ];
    let (experts, scale) = (16, 2.5f32);
    for routing in kinds {
        for with_bias in [false, true] {
            let bias = Matrix::vector(&mut rng, experts);
            let steps = steps();
            let case = router(&session, &routing, experts, scale, with_bias.then_some(&bias))?;
            let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
            for step in &steps {
                let logits: Vec<f32> = floats(&mut rng, step.tokens.len() * experts).iter().map(|x| x * 3.0).collect();
                let found = ready.run(step, &[&words(&logits)])?;
                let (ids, weights) = (as_ints(&found[0]), as_floats(&found[1]));
                let rows = logits.chunks_exact(experts);
                let answers = ids.chunks_exact(routing.active).zip(weights.chunks_exact(routing.active));
                for (t, (logits, answer)) in rows.zip(answers).enumerate() {
                    let bias = with_bias.then_some(&bias.values[..]);
                    let judged = judge(&routing, f64::from(scale), &wide(logits), bias, answer);
                    ensure!(
                        judged.is_ok(),
                        "{routing:?}, bias: {with_bias}, token {t} of {}: {}",
                        step.tokens.len(),
                        judged.err().unwrap_or_default()
                    );
                }
            }
        }
    }
    Ok(())
}

/// Compares one token's experts and weights with the oracle's.
fn judge(
    routing: &Routing,
    scale: f64,
    logits: &[f64],
    bias: Option<&[f64]>,
    (ids, weights): (&[i32], &[f32]),
) -> Result<(), String> {
    let p = oracle::chances(routing, logits);
    let b: Vec<f64> = p.iter().enumerate().map(|(e, p)| p + bias.map_or(0.0, |bias| bias[e])).collect();
    let right = oracle::best_experts(routing, &b);
    let chosen: Vec<usize> = ids.iter().map(|&id| usize::try_from(id).unwrap_or(usize::MAX)).collect();
    let same = |(&chosen, &right): (&usize, &usize)| {
        chosen == right || b.get(chosen).is_some_and(|b_chosen| (b_chosen - b[right]).abs() <= TIE)
    };
    if !chosen.iter().zip(&right).all(same) {
        return Err(format!("experts {ids:?}, {right:?} are right"));
    }
    let sum: f64 = chosen.iter().map(|&e| p[e]).sum();
    for (&e, &weight) in chosen.iter().zip(weights) {
        let right = scale * if routing.renormalise { p[e] / (sum + 1e-20) } else { p[e] };
        // The root of class F's error, for a single value.
        let off = (f64::from(weight) - right).abs();
        if weight.is_nan() || off > right.abs() * 3e-4 {
            return Err(format!("the weight of expert {e} is {weight}, {right} is right"));
        }
    }
    Ok(())
}

fn route_ties(context: &Context) -> Outcome {
    let session = context.session()?;
    let plain =
        Routing { active: 4, groups: 1, groups_kept: 1, softmax: false, renormalise: true, group_by_best: false };
    let step = Step::without_pool(&[2]);
    // All equal; then the last two ahead, all others equal.
    let logits: Vec<f32> = (0..16).map(|e| if e < 14 { 0.0 } else { 1.0 }).collect();
    let logits: Vec<f32> = [0.0; 16].into_iter().chain(logits).collect();
    for (routing, right) in [
        (plain, [[0, 1, 2, 3], [14, 15, 0, 1]]),
        (Routing { groups: 4, groups_kept: 2, ..plain }, [[0, 1, 2, 3], [14, 15, 0, 1]]),
        (Routing { softmax: true, ..plain }, [[0, 1, 2, 3], [14, 15, 0, 1]]),
    ] {
        let ready = router(&session, &routing, 16, 1.0, None)?.compile(&[&step])?;
        let found = as_ints(&ready.run(&step, &[&words(&logits)])?[0]);
        ensure!(found == right.as_flattened(), "{routing:?}: experts {found:?}, {right:?} are right");
    }
    Ok(())
}

fn linear(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in weight_formats(&session) {
        for rounding in [0, 1, 2] {
            for per_expert in [false, true] {
                one_linear(&session, &mut rng, format, rounding, per_expert)?;
            }
        }
    }
    Ok(())
}

fn one_linear(
    session: &Session,
    rng: &mut fastrand::Rng,
    format: Format,
    rounding: i32,
    per_expert: bool,
) -> Result<(), Wrong> {
    let (experts, active, rows) = (5usize, 2usize, 9usize);
    let cols = format.block_values().max(32);
    let matrix = Matrix::random(rng, format, (experts, rows, cols));
    let mut case = Case::new(session);
    let x = if per_expert { case.input(&[DIM_TOKENS, n(active), n(cols)]) } else { case.input(&[DIM_TOKENS, n(cols)]) };
    let w = case.weight(&matrix)?;
    let ids = case.input_ids(&[DIM_TOKENS, n(active)]);
    let y = case.output(&[DIM_TOKENS, n(active), n(rows)]);
    let i = [i32::from(per_expert), rounding, 0, 0, 0, 0];
    let (inputs, outputs) = ([Some(x), Some(w), Some(ids)], [Some(y)]);
    case.op(OpSpec { kind: OP_MOE_LINEAR, inputs: &inputs, outputs: &outputs, i, ..OpSpec::default() });
    let steps = steps();
    let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
    for step in &steps {
        let tokens = step.tokens.len();
        let x = floats(rng, tokens * cols * if per_expert { active } else { 1 });
        let two = |rng: &mut fastrand::Rng| {
            let first = rng.usize(0..experts);
            [first, (first + rng.usize(1..experts)) % experts]
        };
        let ids: Vec<usize> = (0..tokens).flat_map(|_| two(rng)).collect();
        let words_of_ids = int_words(&ids.iter().map(|&id| n(id)).collect::<Vec<_>>());
        let found = ready.run(step, &[&words(&x), &words_of_ids])?;
        let values = wide(&x);
        let one = |(at, &id): (usize, &usize)| {
            let row = if per_expert { at } else { at / active };
            let size = rows * cols;
            oracle::product(&matrix.values[id * size..(id + 1) * size], &values[row * cols..(row + 1) * cols])
        };
        let expected: Vec<f64> = ids.iter().enumerate().flat_map(one).collect();
        let what = format!(
            "MOE_LINEAR, {experts} experts of {} [{rows}, {cols}], {tokens} tokens, i0 = {}, i1 = {rounding}",
            format.name(),
            i32::from(per_expert)
        );
        close(class(rounding), &what, &found[0], &expected)?;
    }
    Ok(())
}

fn combine(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let (active, width) = (3usize, 33usize);
    for with_shared in [false, true] {
        let mut case = Case::new(&session);
        let y = case.input(&[DIM_TOKENS, n(active), n(width)]);
        let w = case.input(&[DIM_TOKENS, n(active)]);
        let shared = with_shared.then(|| case.input(&[DIM_TOKENS, n(width)]));
        let z = case.output(&[DIM_TOKENS, n(width)]);
        let (inputs, outputs) = ([Some(y), Some(w), shared], [Some(z)]);
        case.op(OpSpec { kind: OP_MOE_COMBINE, inputs: &inputs, outputs: &outputs, ..OpSpec::default() });
        let steps = steps();
        let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
        for step in &steps {
            let tokens = step.tokens.len();
            let (y, w, shared) = (
                floats(&mut rng, tokens * active * width),
                floats(&mut rng, tokens * active),
                floats(&mut rng, tokens * width),
            );
            let given = [words(&y), words(&w), words(&shared)];
            let given: Vec<&[u32]> = given[..if with_shared { 3 } else { 2 }].iter().map(|words| &words[..]).collect();
            let found = ready.run(step, &given)?;
            let value = |at: usize| {
                let (t, c) = (at / width, at % width);
                let sum: f64 = (0..active)
                    .map(|a| f64::from(w[t * active + a]) * f64::from(y[(t * active + a) * width + c]))
                    .sum();
                sum + if with_shared { f64::from(shared[at]) } else { 0.0 }
            };
            let expected: Vec<f64> = (0..tokens * width).map(value).collect();
            close(CLASS_F, &format!("MOE_COMBINE, {tokens} tokens, shared: {with_shared}"), &found[0], &expected)?;
        }
    }
    Ok(())
}
