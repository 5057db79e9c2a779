//! L2: the operators that work on a row at a time.

use super::refused;
use crate::case::{CLASS_F, Case, Matrix, Words, close, floats, wide, words};
use crate::child::Context;
use crate::oracle;
use crate::rig::{RunParts, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong};
use sparsed_abi::{
    DIM_LOGITS, DIM_TOKENS, E_INVALID, OP_ADD, OP_EMBED, OP_GATHER_ROWS, OP_HADAMARD, OP_LAYER_NORM, OP_RMS_NORM,
    OP_ROPE, OP_SILU_MUL, OpSpec, TensorId,
};
use sparsed_quant::Format;

pub(crate) const RULES: &[Rule] = &[
    golden("op.embed.golden", "EMBED decodes the rows of its tokens, in every claimed dtype", "OPS.md, EMBED", embed),
    golden("op.embed.range", "a token id past the table is SPD_E_INVALID", "OPS.md, EMBED", embed_range),
    golden("op.rms_norm.golden", "RMS_NORM is the oracle's", "OPS.md, RMS_NORM", rms_norm),
    golden("op.layer_norm.golden", "LAYER_NORM is the oracle's", "OPS.md, LAYER_NORM", layer_norm),
    golden("op.rope.golden", "ROPE is the oracle's, in both layouts", "OPS.md, ROPE", rope),
    golden("op.silu_mul.golden", "SILU_MUL is the oracle's", "OPS.md, SILU_MUL", silu_mul),
    golden("op.add.golden", "ADD is the oracle's", "OPS.md, the table", add),
    golden("op.gather_rows.golden", "GATHER_ROWS copies the rows that need logits", "OPS.md, GATHER_ROWS", gather_rows),
    golden("op.hadamard.golden", "HADAMARD is the oracle's", "OPS.md, HADAMARD", hadamard),
    rule(
        Level::L2,
        "op.views",
        "an input may be a strided view",
        "OPS.md, and plugin.h, spd_tensor",
        &["op.add.golden"],
        views,
    ),
];

const fn golden(id: &'static str, says: &'static str, place: &'static str, check: fn(&Context) -> Outcome) -> Rule {
    rule(Level::L2, id, says, place, &[], check)
}

/// Tokens of each sequence of the steps that are tried.
pub(crate) const STEPS: [&[u32]; 5] = [&[1], &[2], &[3, 1, 3], &[64], &[30, 4, 30]];

/// The same numbers for each step: one compiled program runs all of them.
pub(crate) fn steps() -> Vec<Step> {
    STEPS.iter().map(|lengths| Step::without_pool(lengths)).collect()
}

fn n(n: usize) -> i32 {
    i32::try_from(n).expect("checks are small")
}

/// Builds a program with one operator whose outputs are compared for every step. `build` makes the tensors and the
/// operator; `expect` makes random inputs for T tokens, and the outputs.
fn compare(
    context: &Context,
    what: &str,
    build: impl FnOnce(&Session, &mut Case<'_>) -> Result<(), Wrong>,
    mut expect: impl FnMut(&mut fastrand::Rng, usize) -> (Vec<Vec<f32>>, Vec<Vec<f64>>),
) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let mut case = Case::new(&session);
    build(&session, &mut case)?;
    let steps = steps();
    let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
    for step in &steps {
        let tokens = step.tokens.len();
        let (inputs, expected) = expect(&mut rng, tokens);
        let inputs: Vec<Words> = inputs.iter().map(|input| words(input)).collect();
        let found = ready.run(step, &inputs.iter().map(|input| &input[..]).collect::<Vec<_>>())?;
        for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let seqs = step.contexts.len();
            let what = format!("{what}, {tokens} tokens of {seqs} sequences, output {number}");
            close(CLASS_F, &what, found, expected)?;
        }
    }
    Ok(())
}

fn one(kind: u32, case: &mut Case<'_>, inputs: &[Option<TensorId>], outputs: &[Option<TensorId>]) {
    case.op(OpSpec { kind, inputs, outputs, ..OpSpec::default() });
}

/// The formats of weights that the device claims.
pub(crate) fn weight_formats(session: &Session) -> Vec<Format> {
    let all = (0..192).filter_map(Format::from_dtype);
    all.filter(|format| Session::has_dtype(&session.info.weight_dtypes, format.ggml_id())).collect()
}

fn embed(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in weight_formats(&session) {
        let (rows, cols) = (37, format.block_values().max(16) * 2);
        let table = Matrix::random(&mut rng, format, (1, rows, cols));
        let mut case = Case::new(&session);
        let w = case.weight(&table)?;
        let x = case.output(&[DIM_TOKENS, n(cols)]);
        one(OP_EMBED, &mut case, &[Some(w)], &[Some(x)]);
        let mut steps = steps();
        for step in &mut steps {
            step.tokens.iter_mut().for_each(|token| *token = rng.u32(0..37));
        }
        let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
        for step in &steps {
            let found = ready.run(step, &[])?;
            let expected: Vec<f64> =
                step.tokens.iter().flat_map(|&token| table.row(0, token as usize)).copied().collect();
            let what = format!("EMBED of {}, {} tokens", format.name(), step.tokens.len());
            close(CLASS_F, &what, &found[0], &expected)?;
        }
    }
    Ok(())
}

fn embed_range(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let table = Matrix::random(&mut rng, Format::F32, (1, 10, 16));
    let mut case = Case::new(&session);
    let w = case.weight(&table)?;
    let x = case.output(&[DIM_TOKENS, 16]);
    one(OP_EMBED, &mut case, &[Some(w)], &[Some(x)]);
    let mut step = Step::without_pool(&[3]);
    let ready = case.compile(&[&step])?;
    for token in [10, u32::MAX] {
        step.tokens[1] = token;
        let (blob, input, mut output) = (step.encode(), ready.input_arena(&step, &[]), ready.output_arena(&step));
        let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        refused(&format!("token {token} of 10"), session.queue.run(&ready.plan, parts), &[E_INVALID])?;
    }
    Ok(())
}

/// Rows of usual size, and every second one so small that eps matters.
fn uneven(rng: &mut fastrand::Rng, rows: usize, width: usize) -> Vec<f32> {
    let size = |at: usize| if (at / width).is_multiple_of(2) { 0.003 } else { 1.0 };
    floats(rng, rows * width).iter().enumerate().map(|(at, x)| x * size(at)).collect()
}

fn rms_norm(context: &Context) -> Outcome {
    let eps = 1e-5f32;
    for (width, heads) in [(33usize, 1usize), (96, 1), (32, 3)] {
        for (with_gain, with_residual) in [(true, false), (false, false), (true, true)] {
            let gain = Matrix::vector(&mut context.random(), width);
            let shape: &[i32] = if heads > 1 { &[DIM_TOKENS, n(heads), n(width)] } else { &[DIM_TOKENS, n(width)] };
            let what = format!("RMS_NORM of rows of {width}, gain: {with_gain}, residual: {with_residual}");
            let build = |_: &Session, case: &mut Case<'_>| {
                let x = case.input(shape);
                let residual = with_residual.then(|| case.input(shape));
                let gain = if with_gain { Some(case.weight(&gain)?) } else { None };
                let y = case.output(shape);
                let sum = with_residual.then(|| case.output(shape));
                let f = [eps, 0.0, 0.0, 0.0];
                let (inputs, outputs) = ([Some(x), gain, residual], [Some(y), sum]);
                case.op(OpSpec { kind: OP_RMS_NORM, inputs: &inputs, outputs: &outputs, f, ..OpSpec::default() });
                Ok(())
            };
            compare(context, &what, build, |rng, tokens| {
                let inputs: Vec<_> =
                    (0..=usize::from(with_residual)).map(|_| uneven(rng, tokens * heads, width)).collect();
                // The sum is rounded once, as every activation is.
                let sum: Vec<f32> = match &inputs[..] {
                    [x, residual] => x.iter().zip(residual).map(|(a, b)| a + b).collect(),
                    _ => inputs[0].clone(),
                };
                let sum = wide(&sum);
                let gain = with_gain.then_some(&gain.values[..]);
                let y = sum.chunks_exact(width).flat_map(|row| oracle::rms_norm(row, gain, f64::from(eps))).collect();
                (inputs, vec![y, sum])
            })?;
        }
    }
    Ok(())
}

fn layer_norm(context: &Context) -> Outcome {
    let eps = 1e-5f32;
    for width in [33usize, 128] {
        let mut rng = context.random();
        let (gain, bias) = (Matrix::vector(&mut rng, width), Matrix::vector(&mut rng, width));
        let build = |_: &Session, case: &mut Case<'_>| {
            let x = case.input(&[DIM_TOKENS, n(width)]);
            let inputs = [Some(x), Some(case.weight(&gain)?), Some(case.weight(&bias)?)];
            let outputs = [Some(case.output(&[DIM_TOKENS, n(width)]))];
            let f = [eps, 0.0, 0.0, 0.0];
            case.op(OpSpec { kind: OP_LAYER_NORM, inputs: &inputs, outputs: &outputs, f, ..OpSpec::default() });
            Ok(())
        };
        compare(context, &format!("LAYER_NORM of rows of {width}"), build, |rng, tokens| {
            // Off centre, so that the mean matters.
            let x: Vec<f32> = uneven(rng, tokens, width).iter().map(|x| x + 0.01).collect();
            let norm = |row: &[f64]| oracle::layer_norm(row, &gain.values, &bias.values, f64::from(eps));
            let y = wide(&x).chunks_exact(width).flat_map(norm).collect();
            (vec![x], vec![y])
        })?;
    }
    Ok(())
}

fn rope(context: &Context) -> Outcome {
    // Heads (0: rows without heads), their width, the first value that is turned, how many, half-split.
    for (heads, width, first, turned, split) in
        [(0usize, 16usize, 0usize, 16usize, false), (3, 24, 8, 16, false), (0, 20, 2, 10, true), (3, 16, 0, 6, true)]
    {
        let per_token = heads.max(1);
        let shape = [DIM_TOKENS, n(heads), n(width)];
        let shape: Vec<i32> = shape.into_iter().filter(|&dim| dim != 0).collect();
        let build = |_: &Session, case: &mut Case<'_>| {
            let inputs = [Some(case.input(&shape)), Some(case.input(&[DIM_TOKENS, n(turned)]))];
            let outputs = [Some(case.output(&shape))];
            let i = [n(first), n(turned), i32::from(split), 0, 0, 0];
            case.op(OpSpec { kind: OP_ROPE, inputs: &inputs, outputs: &outputs, i, ..OpSpec::default() });
            Ok(())
        };
        let layout = if split { "half-split" } else { "interleaved" };
        let what = format!("ROPE, {layout}, values {first}..+{turned} of {width}, {per_token} heads");
        compare(context, &what, build, |rng, tokens| {
            let x = floats(rng, tokens * per_token * width);
            let turns: Vec<f32> = (0..tokens * turned / 2).map(|_| rng.f32() * std::f32::consts::TAU).collect();
            let of_token = |turns: &[f32]| turns.iter().map(|a| a.cos()).chain(turns.iter().map(|a| a.sin())).collect();
            let angles: Vec<f32> =
                turns.chunks_exact(turned / 2).flat_map(|turns| -> Vec<f32> { of_token(turns) }).collect();
            let (wide_x, wide_angles) = (wide(&x), wide(&angles));
            let heads = wide_x.chunks_exact(width).enumerate();
            let angles_of = |head: usize| &wide_angles[head / per_token * turned..(head / per_token + 1) * turned];
            let y = heads.flat_map(|(head, row)| oracle::rope(row, angles_of(head), first, split)).collect();
            (vec![x, angles], vec![y])
        })?;
    }
    Ok(())
}

/// An operator of two inputs of one shape.
fn binary(context: &Context, kind: u32, what: &str, f: fn(f64, f64) -> f64, size: f32) -> Outcome {
    for shape in [&[DIM_TOKENS, 33][..], &[DIM_TOKENS, 2, 40]] {
        let width: usize = shape[1..].iter().map(|n| n.unsigned_abs() as usize).product();
        let build = |_: &Session, case: &mut Case<'_>| {
            let (a, b, y) = (case.input(shape), case.input(shape), case.output(shape));
            one(kind, case, &[Some(a), Some(b)], &[Some(y)]);
            Ok(())
        };
        compare(context, &format!("{what} of rows of {width}"), build, |rng, tokens| {
            let a: Vec<f32> = floats(rng, tokens * width).iter().map(|x| x * size).collect();
            let b = floats(rng, tokens * width);
            let y = a.iter().zip(&b).map(|(a, b)| f(f64::from(*a), f64::from(*b))).collect();
            (vec![a, b], vec![y])
        })?;
    }
    Ok(())
}

fn silu_mul(context: &Context) -> Outcome {
    binary(context, OP_SILU_MUL, "SILU_MUL", |gate, up| oracle::silu_mul(&[gate], &[up])[0], 20.0)
}

fn add(context: &Context) -> Outcome {
    binary(context, OP_ADD, "ADD", |a, b| a + b, 1.0)
}

fn gather_rows(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let mut case = Case::new(&session);
    let (x, y) = (case.input(&[DIM_TOKENS, 24]), case.output(&[DIM_LOGITS, 24]));
    one(OP_GATHER_ROWS, &mut case, &[Some(x)], &[Some(y)]);
    let mut steps = steps();
    steps.extend(STEPS.map(Step::without_pool).into_iter().map(|mut step| {
        step.rows = (0u32..).zip(&step.tokens).map(|(row, _)| row).filter(|row| row % 3 != 1).collect();
        step
    }));
    let ready = case.compile(&steps.iter().collect::<Vec<_>>())?;
    for step in &steps {
        let x = floats(&mut rng, step.tokens.len() * 24);
        let found = ready.run(step, &[&words(&x)])?;
        let rows = step.rows.iter().flat_map(|&row| &x[row as usize * 24..][..24]);
        let expected: Vec<f64> = rows.map(|&x| f64::from(x)).collect();
        close(0.0, &format!("GATHER_ROWS of {:?}", step.rows), &found[0], &expected)?;
    }
    Ok(())
}

fn hadamard(context: &Context) -> Outcome {
    for (heads, width) in [(0usize, 1usize), (0, 64), (3, 16), (0, 128)] {
        let shape: Vec<i32> = [DIM_TOKENS, n(heads), n(width)].into_iter().filter(|&dim| dim != 0).collect();
        let build = |_: &Session, case: &mut Case<'_>| {
            let (x, y) = (case.input(&shape), case.output(&shape));
            one(OP_HADAMARD, case, &[Some(x)], &[Some(y)]);
            Ok(())
        };
        compare(context, &format!("HADAMARD of {width} values"), build, |rng, tokens| {
            let x = floats(rng, tokens * heads.max(1) * width);
            let y = wide(&x).chunks_exact(width).flat_map(oracle::hadamard).collect();
            (vec![x], vec![y])
        })?;
    }
    Ok(())
}

/// The middle values of rows, and one head's part of every head, through ADD.
fn views(context: &Context) -> Outcome {
    let build = |_: &Session, case: &mut Case<'_>| {
        let (flat, heads) = (case.input(&[DIM_TOKENS, 40]), case.input(&[DIM_TOKENS, 3, 8]));
        let middle = case.builder.view(flat, 7, &[DIM_TOKENS, 12], &[40]);
        let parts = case.builder.view(heads, 2, &[DIM_TOKENS, 3, 4], &[24, 8]);
        let (y, z) = (case.output(&[DIM_TOKENS, 12]), case.output(&[DIM_TOKENS, 3, 4]));
        one(OP_ADD, case, &[Some(middle), Some(middle)], &[Some(y)]);
        one(OP_ADD, case, &[Some(parts), Some(parts)], &[Some(z)]);
        Ok(())
    };
    compare(context, "ADD of views", build, |rng, tokens| {
        let (flat, heads) = (floats(rng, tokens * 40), floats(rng, tokens * 24));
        let twice = |x: &f32| 2.0 * f64::from(*x);
        let y = flat.chunks_exact(40).flat_map(|row| row[7..19].iter().map(twice)).collect();
        let z = heads.chunks_exact(8).flat_map(|head| head[2..6].iter().map(twice)).collect();
        (vec![flat, heads], vec![y, z])
    })
}
