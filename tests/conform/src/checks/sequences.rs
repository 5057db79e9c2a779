//! L3: does a step see its own sequence, all of it and nothing else, wherever the rows lie?

use super::attention::{self, Heads, Op, contents, queries, step_of};
use super::blocks::{export, import};
use super::layer::{Layer, WIDTH};
use super::selection;
use super::{addends, adder, adds, refused};
use crate::cache::{Contents, Plane, Shape, append_all, row_formats};
use crate::case::{CLASS_F, Case, Words, as_floats, as_ints, close, floats, wide, words};
use crate::child::Context;
use crate::rig::{Pool, RunParts, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_abi::{
    DIM_TOKENS, E_CANCELLED, E_DATA, E_UNSUPPORTED, OP_DENSE_MLA, OP_SPARSE_MLA, OpSpec, STEP_NAN_GUARD,
};
use sparsed_quant::Format;
use std::rc::Rc;

const DENSE: &str = "op.dense_mla.golden";
const SPARSE: &str = "op.sparse_mla.golden";
const TOPK: &str = "op.idx_topk.golden";
const HEADS: Heads = Heads { heads: 4, groups: 1, with_latent_query: true, scale: 0.17 };

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L3,
        "step.paging",
        "where the blocks of a sequence lie does not matter",
        "plugin.h, spd_step",
        &[DENSE, TOPK],
        paging,
    ),
    rule(
        Level::L3,
        "step.causality",
        "rows after a token's position change nothing, not even as NaN",
        "OPS.md, IDX_TOPK and DENSE_MLA",
        &[DENSE, TOPK, "kv.export_import"],
        causality,
    ),
    rule(
        Level::L3,
        "step.appends_visible",
        "rows of a step are seen by the operators after their append",
        "OPS.md, KV_APPEND",
        &[DENSE],
        appends_visible,
    ),
    rule(
        Level::L3,
        "step.idempotent",
        "a step that is repeated writes the same rows and answers the same",
        "plugin.h, the table",
        &["step.appends_visible", SPARSE, TOPK],
        idempotent,
    ),
    rule(
        Level::L3,
        "mla.dense_is_sparse",
        "DENSE_MLA is SPARSE_MLA over every position",
        "OPS.md, DENSE_MLA",
        &[DENSE, SPARSE],
        dense_is_sparse,
    ),
    rule(
        Level::L3,
        "idx_topk.shared",
        "two layers may read one selection",
        "OPS.md, SPARSE_MLA",
        &[SPARSE, TOPK],
        shared,
    ),
    rule(
        Level::L3,
        "run.cancel",
        "a step whose cancel flag is set when it is taken ends as SPD_E_CANCELLED, and the next one runs",
        "plugin.h, spd_run",
        &[],
        cancel,
    ),
    rule(
        Level::L3,
        "run.nan_guard",
        "SPD_STEP_NAN_GUARD makes a NaN in an output SPD_E_DATA, if the plugin takes the flag",
        "plugin.h, spd_step",
        &[],
        nan_guard,
    ),
];

/// One format for rules that have nothing to do with formats.
pub(crate) fn any_format(session: &Session) -> Result<Format, Wrong> {
    let formats = row_formats(session);
    let wanted = formats.iter().find(|&&format| format == Format::F16).or_else(|| formats.first());
    wanted.copied().ok_or_else(|| Wrong::Failed("the device claims no row_dtypes".to_owned()))
}

/// What DENSE_MLA and IDX_TOPK answer for the last tokens of every sequence.
fn answers(
    session: &Session,
    contents: &Contents,
    pool: &Rc<Pool>,
    q: &(Vec<f32>, Vec<f32>),
    index: &(Words, Words),
) -> Result<(Words, Vec<i32>), Wrong> {
    let step = everyone(contents);
    let op = Op { kind: OP_DENSE_MLA, layer: 1, heads: HEADS };
    let dense = attention::program(session, pool, &contents.shape, op, 0).compile(&[&step])?;
    let given = attention::inputs(HEADS, q, None);
    let dense = dense.run(&step, &given.iter().map(|words| &words[..]).collect::<Vec<_>>())?.swap_remove(0);
    let top_k = selection::program(session, pool, &contents.shape, 1, 11).compile(&[&step])?;
    let sel = as_ints(&top_k.run(&step, &[&index.0, &index.1])?[0]);
    Ok((dense, sel))
}

/// The last two tokens of every sequence.
pub(crate) fn everyone(contents: &Contents) -> Step {
    step_of(contents, &(0..contents.sequences.len()).map(|seq| (seq, 2)).collect::<Vec<_>>())
}

/// Fails unless both answers are equal: selections to the number, values in class F.
fn same(what: &str, a: &(Words, Vec<i32>), b: &(Words, Vec<i32>)) -> Outcome {
    close(CLASS_F, &format!("DENSE_MLA {what}"), &b.0, &wide(&as_floats(&a.0)))?;
    ensure!(a.1 == b.1, "IDX_TOPK {what} selects {:?} instead of {:?}", b.1, a.1);
    Ok(())
}

fn paging(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        let first = contents(&mut rng, Shape::usual(&session, format));
        let tokens = everyone(&first).tokens.len();
        let q = queries(&mut rng, &first.shape, HEADS, tokens);
        let index = selection::inputs(&mut rng, &first.shape, tokens);
        let mut before = None;
        for _ in 0..3 {
            let mut contents = first.clone();
            let mut order: Vec<u32> = (0..contents.shape.n_blocks).collect();
            rng.shuffle(&mut order);
            let contexts: Vec<u32> = contents.sequences.iter().map(|sequence| sequence.n).collect();
            contents.sequences = contents.shape.sequences(&contexts, &order);
            let pool = contents.shape.pool(&session)?;
            contents.write(&session, &pool, &Plane::ALL)?;
            let now = answers(&session, &contents, &pool, &q, &index)?;
            let what = format!("over {} rows in blocks of another order", format.name());
            same(&what, before.get_or_insert_with(|| now.clone()), &now)?;
        }
    }
    Ok(())
}

fn causality(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        let contents = contents(&mut rng, Shape::usual(&session, format));
        let tokens = everyone(&contents).tokens.len();
        let q = queries(&mut rng, &contents.shape, HEADS, tokens);
        let index = selection::inputs(&mut rng, &contents.shape, tokens);
        let mut before = None;
        for garbage in [0u8, 0xff, 0x7f] {
            let pool = contents.shape.pool(&session)?;
            let image = vec![garbage; usize::try_from(pool.info.image_bytes).expect("a small pool")];
            for block in 0..contents.shape.n_blocks {
                import(&session, &pool, block, &image)?;
            }
            contents.write(&session, &pool, &Plane::ALL)?;
            let now = answers(&session, &contents, &pool, &q, &index)?;
            let what = format!("over {} rows with {garbage:#04x} in the slots after the context", format.name());
            same(&what, before.get_or_insert_with(|| now.clone()), &now)?;
        }
    }
    Ok(())
}

fn appends_visible(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let shape = Shape { layers: 1, index_layers: 0, index: 0, ..Shape::usual(&session, any_format(&session)?) };
    let contents = contents(&mut rng, shape);
    let (pool, step) = (contents.shape.pool(&session)?, contents.step());
    let op = Op { kind: OP_DENSE_MLA, layer: 0, heads: HEADS };
    let mut case = Case::with_pool(&session, &pool);
    append_all(&mut case, &contents.shape, &[Plane::Latent]);
    attend(&mut case, &contents.shape);
    let q = queries(&mut rng, &contents.shape, HEADS, step.tokens.len());
    let given = [words(&contents.latent[0].given), words(&contents.rope[0].given), words(&q.0), words(&q.1)];
    let found = case.compile(&[&step])?.run(&step, &given.iter().map(|words| &words[..]).collect::<Vec<_>>())?;
    let parts: Vec<_> = contents.sequences.iter().enumerate().map(|(seq, sequence)| (seq, sequence.n)).collect();
    let expected = attention::expected(&contents, &parts, &step, op, &q, None);
    close(CLASS_F, "DENSE_MLA after the KV_APPEND of the same step", &found[0], &expected)
}

/// Appends DENSE_MLA of layer 0 over inputs of its own.
fn attend(case: &mut Case<'_>, shape: &Shape) {
    let n = |n: usize| i32::try_from(n).expect("checks are small");
    let (heads, latent, rope) = (n(HEADS.heads), n(shape.latent as usize), n(shape.rope as usize));
    let (q_latent, q_rope) = (case.input(&[DIM_TOKENS, heads, latent]), case.input(&[DIM_TOKENS, heads, rope]));
    let out = case.output(&[DIM_TOKENS, heads, latent]);
    let (inputs, outputs) = ([Some(q_latent), Some(q_rope)], [Some(out)]);
    let f = [HEADS.scale, 0.0, 0.0, 0.0];
    case.op(OpSpec { kind: OP_DENSE_MLA, inputs: &inputs, outputs: &outputs, i: [1, 0, 0, 0, 0, 0], f, layer: 0 });
}

fn idempotent(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        let shape = Shape { layers: 1, index_layers: 1, ..Shape::usual(&session, format) };
        let layer = Layer::random(&mut rng, &session, shape);
        let pool = shape.pool(&session)?;
        let order: Vec<u32> = (0..shape.n_blocks).rev().collect();
        let sequences = shape.sequences(&[shape.block_tokens + 2, 7], &order);
        let step = Step::over(&sequences, shape.block_tokens);
        let ready = layer.program(&session, &pool)?.compile(&[&step])?;
        let x = words(&floats(&mut rng, step.tokens.len() * WIDTH));
        let blocks: Vec<u32> = sequences.iter().flat_map(|sequence| sequence.blocks.clone()).collect();
        let (first, rows) = (ready.run(&step, &[&x])?, export(&session, &pool, &blocks)?);
        let (again, rows_again) = (ready.run(&step, &[&x])?, export(&session, &pool, &blocks)?);
        ensure!(rows == rows_again, "{} rows differ after the step was repeated", format.name());
        ensure!(first[0] == again[0], "the repeated step selects other positions");
        close(CLASS_F, "a repeated step", &again[1], &wide(&as_floats(&first[1])))?;
    }
    Ok(())
}

fn dense_is_sparse(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        let contents = contents(&mut rng, Shape::usual(&session, format));
        let pool = contents.shape.pool(&session)?;
        contents.write(&session, &pool, &[Plane::Latent])?;
        let step = everyone(&contents);
        let q = queries(&mut rng, &contents.shape, HEADS, step.tokens.len());
        let k = step.positions.iter().max().map_or(1, |&p| p as usize + 1);
        let all = |&position: &u32| {
            let visible = i32::try_from(position).expect("small") + 1;
            (0..visible).chain(std::iter::repeat(-1)).take(k).collect::<Vec<_>>()
        };
        let sel: Vec<i32> = step.positions.iter().flat_map(all).collect();
        let run = |kind, sel: Option<&[i32]>| {
            let op = Op { kind, layer: 0, heads: HEADS };
            let ready = attention::program(&session, &pool, &contents.shape, op, k).compile(&[&step])?;
            let given = attention::inputs(HEADS, &q, sel);
            ready.run(&step, &given.iter().map(|words| &words[..]).collect::<Vec<_>>())
        };
        let (sparse, dense) = (run(OP_SPARSE_MLA, Some(&sel))?, run(OP_DENSE_MLA, None)?);
        let what = format!("DENSE_MLA against SPARSE_MLA of all, over {} rows", format.name());
        close(CLASS_F, &what, &dense[0], &wide(&as_floats(&sparse[0])))?;
    }
    Ok(())
}

fn shared(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let contents = contents(&mut rng, Shape::usual(&session, any_format(&session)?));
    let pool = contents.shape.pool(&session)?;
    contents.write(&session, &pool, &Plane::ALL)?;
    let k = attention::K;
    let mut case = selection::program(&session, &pool, &contents.shape, 0, k);
    let n = |n: usize| i32::try_from(n).expect("checks are small");
    let (heads, latent) = (n(HEADS.heads), n(contents.shape.latent as usize));
    let q_latent = case.input(&[DIM_TOKENS, heads, latent]);
    let q_rope = case.input(&[DIM_TOKENS, heads, n(contents.shape.rope as usize)]);
    // The selection is the program's third tensor, after its two inputs.
    let sel = sparsed_abi::TensorId(2);
    for layer in [0, 1] {
        let out = case.output(&[DIM_TOKENS, heads, latent]);
        let (inputs, outputs) = ([Some(q_latent), Some(q_rope), Some(sel)], [Some(out)]);
        let f = [HEADS.scale, 0.0, 0.0, 0.0];
        case.op(OpSpec { kind: OP_SPARSE_MLA, inputs: &inputs, outputs: &outputs, layer, i: [1, 0, 0, 0, 0, 0], f });
    }
    let parts: Vec<_> = (0..contents.sequences.len()).map(|seq| (seq, 2)).collect();
    let step = step_of(&contents, &parts);
    let q = queries(&mut rng, &contents.shape, HEADS, step.tokens.len());
    let index = selection::inputs(&mut rng, &contents.shape, step.tokens.len());
    let found = case.compile(&[&step])?.run(&step, &[&index.0, &index.1, &words(&q.0), &words(&q.1)])?;
    let sel = as_ints(&found[0]);
    for layer in [0, 1] {
        let op = Op { kind: OP_SPARSE_MLA, layer, heads: HEADS };
        let expected = attention::expected(&contents, &parts, &step, op, &q, Some(&sel));
        let what = format!("SPARSE_MLA of layer {layer} over the selection that both layers read");
        close(CLASS_F, &what, &found[1 + layer as usize], &expected)?;
    }
    Ok(())
}

fn cancel(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let step = Step::without_pool(&[3]);
    let ready = adder(&session).compile(&[&step])?;
    let (a, b, _) = addends(&mut rng, 3);
    let (input, blob) = (ready.input_arena(&step, &[&a, &b]), step.encode());
    for flag in [1, u32::MAX] {
        let mut output = ready.output_arena(&step);
        let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: Some(&flag) };
        refused(&format!("a step with cancel = {flag}"), session.queue.run(&ready.plan, parts), &[E_CANCELLED])?;
    }
    let mut output = ready.output_arena(&step);
    let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: Some(&0) };
    session.queue.run(&ready.plan, parts)?;
    adds(&ready, &mut rng, &step)
}

fn nan_guard(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let step = Step { flags: STEP_NAN_GUARD, ..Step::without_pool(&[3]) };
    let ready = adder(&session).compile(&[&step])?;
    let (mut a, b, _) = addends(&mut rng, 3);
    a[5] = f32::NAN.to_bits();
    let (input, mut output, blob) = (ready.input_arena(&step, &[&a, &b]), ready.output_arena(&step), step.encode());
    let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
    match session.queue.run(&ready.plan, parts) {
        Err(fault) if fault.status == E_UNSUPPORTED => return skip(fault.to_string()),
        answer => refused("a NaN in an output under SPD_STEP_NAN_GUARD", answer, &[E_DATA])?,
    }
    adds(&ready, &mut rng, &step)
}
