//! L2: products with weights.

use super::rowwise::{steps, weight_formats};
use crate::case::{CLASS_F, CLASS_Q, Case, Matrix, close, floats, wide, words};
use crate::child::Context;
use crate::oracle;
use crate::rig::Session;
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::Outcome;
use sparsed_abi::{DIM_TOKENS, OP_LINEAR, OP_MLA_ABSORB, OP_MLA_EXPAND, OpSpec};
use sparsed_quant::Format;

const LINEAR: &str = "OPS.md, LINEAR";

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L2,
        "op.linear.golden",
        "LINEAR with i0 = 0 is the oracle's in class F, in every claimed dtype",
        LINEAR,
        &[],
        |context| linear(context, 0),
    ),
    rule(Level::L2, "op.linear.int8", "LINEAR with i0 = 1 is in class Q", LINEAR, &["op.linear.golden"], |context| {
        linear(context, 1)
    }),
    rule(Level::L2, "op.linear.int16", "LINEAR with i0 = 2 is in class F", LINEAR, &["op.linear.golden"], |context| {
        linear(context, 2)
    }),
    rule(
        Level::L2,
        "op.linear.nan",
        "a NaN in a row of x does not get lost",
        LINEAR,
        &["op.linear.golden"],
        linear_nan,
    ),
    rule(Level::L2, "op.mla_absorb.golden", "MLA_ABSORB is the oracle's", "OPS.md, MLA_ABSORB", &[], |context| {
        per_head(context, OP_MLA_ABSORB)
    }),
    rule(Level::L2, "op.mla_expand.golden", "MLA_EXPAND is the oracle's", "OPS.md, MLA_EXPAND", &[], |context| {
        per_head(context, OP_MLA_EXPAND)
    }),
];

fn n(n: usize) -> i32 {
    i32::try_from(n).expect("checks are small")
}

/// The class in which products with rounding `i0` are compared.
pub(crate) fn class(rounding: i32) -> f64 {
    if rounding == 1 { CLASS_Q } else { CLASS_F }
}

/// Widths of rows that a format can have: one block, and an odd number of them.
fn widths(format: Format) -> [usize; 2] {
    match format.block_values() {
        1 => [33, 80],
        block => [block, 3 * block],
    }
}

fn linear(context: &Context, rounding: i32) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in weight_formats(&session) {
        for (cols, rows, with_bias) in [(widths(format)[0], 7, false), (widths(format)[1], 37, true)] {
            let matrix = Matrix::random(&mut rng, format, (1, rows, cols));
            let bias = Matrix::vector(&mut rng, rows);
            let mut case = Case::new(&session);
            let x = case.input(&[DIM_TOKENS, n(cols)]);
            let w = case.weight(&matrix)?;
            let b = if with_bias { Some(case.weight(&bias)?) } else { None };
            let y = case.output(&[DIM_TOKENS, n(rows)]);
            let i = [rounding, 0, 0, 0, 0, 0];
            let (inputs, outputs) = ([Some(x), Some(w), b], [Some(y)]);
            case.op(OpSpec { kind: OP_LINEAR, inputs: &inputs, outputs: &outputs, i, ..OpSpec::default() });
            let steps = steps();
            let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
            for step in &steps {
                let tokens = step.tokens.len();
                let x = floats(&mut rng, tokens * cols);
                let found = ready.run(step, &[&words(&x)])?;
                let with_bias = |y: Vec<f64>| -> Vec<f64> {
                    let bias = bias.values.iter().map(|b| if with_bias { *b } else { 0.0 });
                    y.iter().zip(bias).map(|(y, b)| y + b).collect()
                };
                let products = wide(&x);
                let products = products.chunks_exact(cols).map(|x| oracle::product(&matrix.values, x));
                let expected: Vec<f64> = products.flat_map(with_bias).collect();
                let what = format!("LINEAR, {} [{rows}, {cols}], {tokens} tokens, i0 = {rounding}", format.name());
                close(class(rounding), &what, &found[0], &expected)?;
            }
        }
    }
    Ok(())
}

fn linear_nan(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for rounding in [0, 1, 2] {
        for format in weight_formats(&session) {
            let cols = widths(format)[1].max(64).next_multiple_of(format.block_values());
            let matrix = Matrix::random(&mut rng, format, (1, 7, cols));
            let mut case = Case::new(&session);
            let (x, w) = (case.input(&[DIM_TOKENS, n(cols)]), case.weight(&matrix)?);
            let y = case.output(&[DIM_TOKENS, 7]);
            let i = [rounding, 0, 0, 0, 0, 0];
            let (inputs, outputs) = ([Some(x), Some(w)], [Some(y)]);
            case.op(OpSpec { kind: OP_LINEAR, inputs: &inputs, outputs: &outputs, i, ..OpSpec::default() });
            let step = Step::without_pool(&[2]);
            let ready = case.compile(&[&step])?;
            let mut values = floats(&mut rng, 2 * cols);
            values[cols + 5] = f32::NAN;
            let found = crate::case::as_floats(&ready.run(&step, &[&words(&values)])?[0]);
            let what = format!("LINEAR, {}, i0 = {rounding}", format.name());
            crate::verdict::ensure!(
                found[..7].iter().all(|y| y.is_finite()),
                "{what}: a NaN in row 1 of x reaches row 0 of y: {:?}",
                &found[..7]
            );
            crate::verdict::ensure!(
                found[7..].iter().all(|y| !y.is_finite()),
                "{what}: a NaN in row 1 of x does not reach row 1 of y: {:?}",
                &found[7..]
            );
        }
    }
    Ok(())
}

fn per_head(context: &Context, kind: u32) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in weight_formats(&session) {
        for rounding in [0, 1, 2] {
            one_per_head(&session, &mut rng, kind, format, rounding)?;
        }
    }
    Ok(())
}

fn one_per_head(session: &Session, rng: &mut fastrand::Rng, kind: u32, format: Format, rounding: i32) -> Outcome {
    let (heads, rows, cols) = (3, 9, widths(format)[1].min(2 * format.block_values().max(20)));
    let matrix = Matrix::random(rng, format, (heads, rows, cols));
    let mut case = Case::new(session);
    let (x, w) = (case.input(&[DIM_TOKENS, n(heads), n(cols)]), case.weight(&matrix)?);
    let absorb = kind == OP_MLA_ABSORB;
    let shape = if absorb { &[DIM_TOKENS, n(heads), n(rows)][..] } else { &[DIM_TOKENS, n(heads * rows)] };
    let (inputs, outputs) = ([Some(x), Some(w)], [Some(case.output(shape))]);
    case.op(OpSpec { kind, inputs: &inputs, outputs: &outputs, i: [rounding, 0, 0, 0, 0, 0], ..OpSpec::default() });
    let steps = steps();
    let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
    for step in &steps {
        let x = floats(rng, step.tokens.len() * heads * cols);
        let found = ready.run(step, &[&words(&x)])?;
        let per_head = |(head, x): (usize, &[f64])| {
            let size = rows * cols;
            oracle::product(&matrix.values[head % heads * size..(head % heads + 1) * size], x)
        };
        let expected: Vec<f64> = wide(&x).chunks_exact(cols).enumerate().flat_map(per_head).collect();
        let what = format!(
            "{} heads of {} [{rows}, {cols}], {} tokens, i0 = {rounding}",
            heads,
            format.name(),
            step.tokens.len()
        );
        close(class(rounding), &what, &found[0], &expected)?;
    }
    Ok(())
}
