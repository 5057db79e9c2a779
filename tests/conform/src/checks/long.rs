//! L2: are operators right where numbers are large? Contexts past 2^15 positions, selections and weights of a real
//! model's size. The rules before these have shapes with all edges, and small ones.

use super::attention::{self, Heads, Op};
use super::blocks::import;
use super::sequences::any_format;
use super::{products, selection};
use crate::cache::{Contents, Shape, block_tokens};
use crate::case::{CLASS_F, Case, Matrix, as_ints, close, floats, wide, words};
use crate::child::Context;
use crate::oracle;
use crate::rig::{Pool, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, skip};
use sparsed_abi::{DIM_TOKENS, OP_LINEAR, OP_SPARSE_MLA, OpSpec};
use sparsed_quant::Format;
use std::rc::Rc;

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L2,
        "op.linear.wide",
        "LINEAR with 513 rows of 2048 columns is the oracle's, whatever i0 allows",
        "OPS.md, LINEAR",
        &["op.linear.golden", "op.linear.int8", "op.linear.int16"],
        linear,
    ),
    rule(
        Level::L2,
        "op.idx_topk.long",
        "IDX_TOPK selects 2048 of 40000 keys",
        "OPS.md, IDX_TOPK",
        &["op.idx_topk.golden", "kv.export_import"],
        top_k,
    ),
    rule(
        Level::L2,
        "op.sparse_mla.long",
        "SPARSE_MLA is the oracle's over 2048 rows of 40000",
        "OPS.md, SPARSE_MLA",
        &["op.sparse_mla.golden", "kv.export_import"],
        sparse,
    ),
];

/// Tokens of the one sequence: past what 16 bits with a sign can name.
const CONTEXT: u32 = 40_000;
/// As DeepSeek-V3.2 has it.
const K: usize = 2048;
const ROWS: usize = 513;
const COLS: usize = 2048;

fn linear(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let claimed = |format: &&Format| Session::has_dtype(&session.info.weight_dtypes, format.ggml_id());
    let Some(&format) = [Format::Q4_K, Format::Q8_0, Format::F16, Format::F32].iter().find(claimed) else {
        return skip("none of Q4_K, Q8_0, F16 and F32 is claimed");
    };
    let matrix = Matrix::random(&mut rng, format, (1, ROWS, COLS));
    let step = Step::without_pool(&[3]);
    for rounding in [0, 1, 2] {
        let n = |n: usize| i32::try_from(n).expect("thousands");
        let mut case = Case::new(&session);
        let (x, w) = (case.input(&[DIM_TOKENS, n(COLS)]), case.weight(&matrix)?);
        let (inputs, outputs) = ([Some(x), Some(w)], [Some(case.output(&[DIM_TOKENS, n(ROWS)]))]);
        let i = [rounding, 0, 0, 0, 0, 0];
        case.op(OpSpec { kind: OP_LINEAR, inputs: &inputs, outputs: &outputs, i, ..OpSpec::default() });
        let x = floats(&mut rng, step.tokens.len() * COLS);
        let found = case.compile(&[&step])?.run(&step, &[&words(&x)])?;
        let expected: Vec<f64> = wide(&x).chunks_exact(COLS).flat_map(|x| oracle::product(&matrix.values, x)).collect();
        let what = format!("LINEAR, {} [{ROWS}, {COLS}], i0 = {rounding}", format.name());
        close(products::class(rounding), &what, &found[0], &expected)?;
    }
    Ok(())
}

/// A sequence of [`CONTEXT`] tokens in a pool, narrow rows, in blocks from the last to the first; or why not.
fn filled(session: &Session, rng: &mut fastrand::Rng) -> Result<(Contents, Rc<Pool>), Wrong> {
    let limits = [(session.info.max_context, CONTEXT), (session.info.max_topk, u32::try_from(K).expect("thousands"))];
    if limits.iter().any(|(limit, wanted)| *limit != 0 && limit < wanted) {
        return skip(format!("the device takes no context of {CONTEXT} tokens, or no selection of {K}"));
    }
    let (format, block_tokens) = (any_format(session)?, block_tokens(session, 1024));
    let n_blocks = CONTEXT.div_ceil(block_tokens);
    let usual = Shape::usual(session, format);
    let shape = Shape { block_tokens, n_blocks, layers: 1, index_layers: 1, latent: 32, ..usual };
    let order: Vec<u32> = (0..n_blocks).rev().collect();
    let contents = Contents::random(rng, shape, shape.sequences(&[CONTEXT], &order));
    let pool = shape.pool(session)?;
    let length = usize::try_from(pool.info.image_bytes).expect("a small pool");
    for (i, &block) in contents.sequences[0].blocks.iter().enumerate() {
        let first = i * block_tokens as usize;
        let tokens = first..(first + block_tokens as usize).min(CONTEXT as usize);
        let mut image = Vec::with_capacity(length);
        tokens.clone().for_each(|token| image.extend_from_slice(contents.index[0].stored(token)));
        image.resize(usize::try_from(pool.info.image_latent_offset).expect("a small pool"), 0);
        for token in tokens {
            image.extend_from_slice(contents.latent[0].stored(token));
            image.extend_from_slice(contents.rope[0].stored(token));
        }
        image.resize(length, 0);
        import(session, &pool, block, &image)?;
    }
    Ok((contents, pool))
}

fn top_k(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let (contents, pool) = filled(&session, &mut rng)?;
    let step = attention::step_of(&contents, &[(0, 1)]);
    let ready = selection::program(&session, &pool, &contents.shape, 0, K).compile(&[&step])?;
    let given = selection::inputs(&mut rng, &contents.shape, step.tokens.len());
    let found = as_ints(&ready.run(&step, &[&given.0, &given.1])?[0]);
    selection::judge(&contents, &[(0, 1)], &step, (0, K), &given, &found)
}

fn sparse(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let (contents, pool) = filled(&session, &mut rng)?;
    let heads = Heads { heads: 2, groups: 1, with_latent_query: true, scale: 0.17 };
    let op = Op { kind: OP_SPARSE_MLA, layer: 0, heads };
    let step = attention::step_of(&contents, &[(0, 1)]);
    let ready = attention::program(&session, &pool, &contents.shape, op, K).compile(&[&step])?;
    let q = attention::queries(&mut rng, &contents.shape, heads, 1);
    let mut sel = rng.choose_multiple(0..CONTEXT.cast_signed(), K);
    sel.sort_unstable();
    let given = attention::inputs(heads, &q, Some(&sel));
    let found = ready.run(&step, &given.iter().map(|input| &input[..]).collect::<Vec<_>>())?;
    let expected = attention::expected(&contents, &[(0, 1)], &step, op, &q, Some(&sel));
    close(CLASS_F, &format!("SPARSE_MLA over {K} of {CONTEXT} rows"), &found[0], &expected)
}
