//! L2: attention over rows of the pool. Selections come from the kit, so that a wrong IDX_TOPK does not show here.

use crate::cache::{Contents, Plane, Shape, block_tokens, row_formats};
use crate::case::{CLASS_F, Case, Words, close, floats, int_words, wide, words};
use crate::child::Context;
use crate::oracle;
use crate::rig::{Pool, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong};
use sparsed_abi::{DIM_TOKENS, OP_DENSE_MLA, OP_SPARSE_MLA, OpSpec};
use sparsed_quant::Format;
use std::rc::Rc;

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L2,
        "op.dense_mla.golden",
        "DENSE_MLA is the oracle's, around block edges, with and without groups, in every claimed format",
        "OPS.md, DENSE_MLA",
        &["op.kv_append.golden"],
        |context| attention(context, false),
    ),
    rule(
        Level::L2,
        "op.sparse_mla.golden",
        "SPARSE_MLA is the oracle's over the selected rows",
        "OPS.md, SPARSE_MLA",
        &["op.kv_append.golden"],
        |context| attention(context, true),
    ),
];

/// Positions that a token may select in these checks.
pub(crate) const K: usize = 24;

/// The shape of one attention operator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) groups: usize,
    pub(crate) with_latent_query: bool,
    pub(crate) scale: f32,
}

/// A sequence's number and how many of its last tokens a step computes.
pub(crate) type Part = (usize, u32);

/// Which tokens of which sequences of [`contents`] share a step.
const STEPS: [&[Part]; 6] = [&[(0, 1)], &[(3, 2)], &[(4, 7)], &[(2, 3), (5, 1), (1, 3)], &[(6, 1)], &[(6, 64)]];

/// Sequences around the block edge and beyond a tile of rows, in shuffled blocks.
pub(crate) fn contents(rng: &mut fastrand::Rng, shape: Shape) -> Contents {
    let edge = shape.block_tokens;
    let contexts = [1, edge - 1, edge, edge + 1, 2 * edge + 1, 3 * edge, 8 * edge + 5];
    let blocks = contexts.iter().map(|&n| shape.blocks_for(n)).sum::<u32>() + 2;
    let shape = Shape { n_blocks: blocks, ..shape };
    let mut order: Vec<u32> = (0..blocks).collect();
    rng.shuffle(&mut order);
    let sequences = shape.sequences(&contexts, &order);
    Contents::random(rng, shape, sequences)
}

/// The step that computes the last tokens of some sequences.
pub(crate) fn step_of(contents: &Contents, parts: &[Part]) -> Step {
    let sequences: Vec<_> = parts.iter().map(|&(seq, n)| contents.sequences[seq].last(n)).collect();
    Step::over(&sequences, contents.shape.block_tokens)
}

fn attention(context: &Context, sparse: bool) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let heads = Heads { heads: 4, groups: 1, with_latent_query: true, scale: 0.17 };
    for format in row_formats(&session) {
        let usual = Shape { index_layers: 0, index: 0, ..Shape::usual(&session, format) };
        let grouped = Heads { groups: 2, scale: -0.3, ..heads };
        let mut kinds = vec![
            (usual, heads),
            (Shape { rope: 64, ..usual }, grouped),
            (Shape { rope: 64, ..usual }, Heads { with_latent_query: false, ..grouped }),
            // Many heads that share a row, as in DeepSeek's models: a plugin may take other ways for them.
            (usual, Heads { heads: 16, ..heads }),
            (Shape { rope: 64, ..usual }, Heads { heads: 16, ..grouped }),
        ];
        if format.block_values() == 1 {
            let odd = Shape { block_tokens: block_tokens(&session, 5), latent: 40, rope: 6, ..usual };
            kinds.push((odd, Heads { heads: 3, ..heads }));
        }
        if format == Format::F8_128 {
            // Groups that begin in the midst of what shares a scale.
            let wide = Shape { latent: 192, rope: 192, ..usual };
            kinds.push((wide, Heads { heads: 6, groups: 3, ..heads }));
        }
        if usual.rope_format != format {
            kinds.push((Shape { rope_format: format, ..usual }, heads));
        }
        for (shape, heads) in kinds {
            let contents = contents(&mut rng, shape);
            let pool = contents.shape.pool(&session)?;
            contents.write(&session, &pool, &[Plane::Latent])?;
            for layer in 0..contents.shape.layers {
                let kind = if sparse { OP_SPARSE_MLA } else { OP_DENSE_MLA };
                let parts: Vec<Vec<Part>> = STEPS.iter().map(|parts| parts.to_vec()).collect();
                compare(&session, &mut rng, &contents, &pool, Op { kind, layer, heads }, &parts)?;
            }
        }
    }
    Ok(())
}

/// One attention operator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) kind: u32,
    pub(crate) layer: u32,
    pub(crate) heads: Heads,
}

/// A program of one attention operator; its inputs are the latent query (if it has one), the rope query, and the
/// selection (if it takes one).
pub(crate) fn program<'s>(session: &'s Session, pool: &Rc<Pool>, shape: &Shape, op: Op, k: usize) -> Case<'s> {
    let n = |n: usize| i32::try_from(n).expect("checks are small");
    let (heads, groups) = (op.heads.heads, op.heads.groups);
    let (latent, rope) = (n(shape.latent as usize / groups), n(shape.rope as usize / groups));
    let mut case = Case::with_pool(session, pool);
    let q_latent = op.heads.with_latent_query.then(|| case.input(&[DIM_TOKENS, n(heads), latent]));
    let q_rope = case.input(&[DIM_TOKENS, n(heads), rope]);
    let sel = (op.kind == OP_SPARSE_MLA).then(|| case.input_ids(&[DIM_TOKENS, n(k)]));
    let out = case.output(&[DIM_TOKENS, n(heads), latent]);
    case.op(OpSpec {
        kind: op.kind,
        inputs: &[q_latent, Some(q_rope), sel],
        outputs: &[Some(out)],
        layer: op.layer,
        i: [n(groups), 0, 0, 0, 0, 0],
        f: [op.heads.scale, 0.0, 0.0, 0.0],
    });
    case
}

/// Queries for a step: latent and rope, `[T, heads, width]`.
pub(crate) fn queries(rng: &mut fastrand::Rng, shape: &Shape, heads: Heads, tokens: usize) -> (Vec<f32>, Vec<f32>) {
    let per_token = |width: u32| heads.heads * width as usize / heads.groups;
    (floats(rng, tokens * per_token(shape.latent)), floats(rng, tokens * per_token(shape.rope)))
}

/// The inputs of [`program`] in order.
pub(crate) fn inputs(heads: Heads, q: &(Vec<f32>, Vec<f32>), sel: Option<&[i32]>) -> Vec<Words> {
    let latent = heads.with_latent_query.then(|| words(&q.0));
    latent.into_iter().chain([words(&q.1)]).chain(sel.map(int_words)).collect()
}

fn compare(
    session: &Session,
    rng: &mut fastrand::Rng,
    contents: &Contents,
    pool: &Rc<Pool>,
    op: Op,
    parts: &[Vec<Part>],
) -> Result<(), Wrong> {
    let steps: Vec<Step> = parts.iter().map(|parts| step_of(contents, parts)).collect();
    let ready = program(session, pool, &contents.shape, op, K).compile(&steps.iter().collect::<Vec<_>>())?;
    for (parts, step) in parts.iter().zip(&steps) {
        let q = queries(rng, &contents.shape, op.heads, step.tokens.len());
        let selection = if op.kind == OP_SPARSE_MLA { Some(selections(rng, step)) } else { None };
        let given = inputs(op.heads, &q, selection.as_deref());
        let found = ready.run(step, &given.iter().map(|input| &input[..]).collect::<Vec<_>>())?;
        let expected = expected(contents, parts, step, op, &q, selection.as_deref());
        let name = if op.kind == OP_SPARSE_MLA { "SPARSE_MLA" } else { "DENSE_MLA" };
        let what = format!(
            "{name} of layer {} over {} rows, {:?}, contexts {:?}, {} tokens",
            op.layer,
            contents.shape.format.name(),
            op.heads,
            step.contexts,
            step.tokens.len()
        );
        // What class A allows beyond F is nothing beside it where queries and keys are as short as here.
        close(CLASS_F, &what, &found[0], &expected)?;
    }
    Ok(())
}

/// For each token some positions up to its own, ascending, then -1: all of them where they are few.
pub(crate) fn selections(rng: &mut fastrand::Rng, step: &Step) -> Vec<i32> {
    let one = |&position: &u32| {
        let visible = i32::try_from(position).expect("small") + 1;
        let mut all: Vec<i32> = (0..visible).collect();
        rng.shuffle(&mut all);
        all.truncate(K);
        all.sort_unstable();
        all.resize(K, -1);
        all
    };
    step.positions.iter().flat_map(one).collect()
}

/// The oracle's output for every token and head of a step.
pub(crate) fn expected(
    contents: &Contents,
    parts: &[Part],
    step: &Step,
    op: Op,
    q: &(Vec<f32>, Vec<f32>),
    sel: Option<&[i32]>,
) -> Vec<f64> {
    let (heads, groups, layer) = (op.heads.heads, op.heads.groups, op.layer as usize);
    let (latent, rope) = (contents.shape.latent as usize / groups, contents.shape.rope as usize / groups);
    let (q_latent, q_rope) = (wide(&q.0), wide(&q.1));
    let mut out = Vec::new();
    for (t, (&position, seq)) in step.positions.iter().zip(step.seq_of()).enumerate() {
        let read: Vec<usize> = match sel {
            Some(sel) => {
                let k = sel.len() / step.tokens.len();
                let own = &sel[t * k..(t + 1) * k];
                own.iter().filter(|&&s| s >= 0).map(|s| s.unsigned_abs() as usize).collect()
            }
            None => (0..=position as usize).collect(),
        };
        for head in 0..heads {
            let group = head * groups / heads;
            let row = |&s: &usize| {
                let token = contents.token(parts[seq].0, s);
                let latent_row = &contents.latent[layer].row(token)[group * latent..(group + 1) * latent];
                (latent_row, &contents.rope[layer].row(token)[group * rope..(group + 1) * rope])
            };
            let rows: Vec<(&[f64], &[f64])> = read.iter().map(row).collect();
            let at = t * heads + head;
            let own_latent = op.heads.with_latent_query.then(|| &q_latent[at * latent..(at + 1) * latent]);
            out.extend(oracle::attend(
                own_latent,
                &q_rope[at * rope..(at + 1) * rope],
                &rows,
                f64::from(op.heads.scale),
            ));
        }
    }
    out
}
