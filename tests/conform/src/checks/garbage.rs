//! L4: is what is wrong refused, and nothing worse?

use super::layer::{Layer, WIDTH};
use super::refused;
use super::sequences::any_format;
use crate::cache::{Shape, block_tokens};
use crate::case::{Ready, floats, words};
use crate::child::Context;
use crate::rig::{Arena, OpenOptions, Pool, RunParts, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::{Blob, E_DEVICE_LOST, E_INTERNAL, E_INVALID, E_QUEUE_LOST, Layout, SpdBucket, SpdStep};
use std::rc::Rc;

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L4,
        "step.malformed",
        "a step that contradicts itself or its pool is SPD_E_INVALID",
        "plugin.h, spd_step",
        &["kv.create"],
        malformed,
    ),
    rule(
        Level::L4,
        "fuzz.step",
        "a step with changed bytes is refused or run, and the next good one gives the right bits",
        "plugin.h, spd_step",
        &["step.malformed", "step.idempotent"],
        fuzz_step,
    ),
    rule(
        Level::L4,
        "fuzz.program",
        "a program with changed bytes is refused or run",
        "plugin.h, programs",
        &["program.malformed"],
        fuzz_program,
    ),
];

/// Steps and programs that are tried with changed bytes.
const STEPS: usize = 1500;
const PROGRAMS: usize = 800;

/// Device memory that a changed program may ask for.
const BUDGET: u64 = 64 << 20;

/// A layer ready to run.
struct Setting<'s> {
    pool: Rc<Pool>,
    layer: Layer,
    step: Step,
    session: &'s Session,
}

impl<'s> Setting<'s> {
    fn new(session: &'s Session, rng: &mut fastrand::Rng) -> Result<Self, Wrong> {
        // Small blocks: two for a few tokens, all of which the step writes itself.
        let block_tokens = block_tokens(session, 4);
        let usual = Shape::usual(session, any_format(session)?);
        let shape = Shape { block_tokens, layers: 1, index_layers: 1, ..usual };
        let layer = Layer::random(rng, session, shape);
        let pool = shape.pool(session)?;
        let order: Vec<u32> = (0..shape.n_blocks).rev().collect();
        let step = Step::over(&shape.sequences(&[block_tokens + 1, 2], &order), block_tokens);
        Ok(Self { pool, layer, step, session })
    }

    fn ready(&self) -> Result<Ready<'s>, Wrong> {
        self.layer.program(self.session, &self.pool)?.compile(&[&self.step])
    }
}

fn malformed(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let setting = Setting::new(&session, &mut rng)?;
    let (ready, good) = (setting.ready()?, &setting.step);
    let x = words(&floats(&mut rng, good.tokens.len() * WIDTH));
    let slots = u64::from(setting.pool.desc.n_blocks) * u64::from(setting.pool.desc.block_tokens);
    let changed = |change: fn(&mut Step, u64)| {
        let mut step = good.clone();
        change(&mut step, slots);
        step
    };
    let bad = [
        ("a slot past the pool", changed(|step, slots| step.slots[1] = slots)),
        ("slot 2^64 - 1", changed(|step, _| step.slots[0] = u64::MAX)),
        ("a block past the pool", changed(|step, slots| step.block_ids[0] = u32::try_from(slots).expect("small"))),
        ("block 2^32 - 1", changed(|step, _| step.block_ids[1] = u32::MAX)),
        (
            "fewer blocks than its context",
            changed(|step, _| {
                step.block_ids.remove(1);
                step.block_offsets.iter_mut().skip(1).for_each(|end| *end -= 1);
            }),
        ),
        ("a context that is not its last position + 1", changed(|step, _| step.contexts[0] += 1)),
        ("positions that jump", changed(|step, _| step.positions[1] = 7)),
        ("seq_offset that is not a partition", changed(|step, _| step.seq_offsets[1] += 40)),
        ("block_offset that is not a partition", changed(|step, _| step.block_offsets[1] += 40)),
        ("a logits row past its tokens", changed(|step, _| step.rows[1] = 1000)),
    ];
    for (what, step) in bad {
        let (input, mut output) = (ready.input_arena(&step, &[&x]), ready.output_arena(&step));
        let blob = step.encode();
        let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        refused(&format!("a step with {what}"), session.queue.run(&ready.plan, parts), &[E_INVALID])?;
    }
    ready.run(good, &[&x])?;
    Ok(())
}

/// Changes a few bytes: most often one number, sometimes to an edge.
fn mutate(rng: &mut fastrand::Rng, bytes: &mut [u8]) {
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(0..bytes.len());
        match rng.u8(0..4) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes[at] ^= 1 << rng.u8(0..8),
            2 => bytes[at] = bytes[at].wrapping_add(if rng.bool() { 1 } else { 255 }),
            _ => {
                let word = at / 4 * 4;
                let edges = [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, u32::MAX - 7];
                let edge: u32 = edges[rng.usize(0..edges.len())];
                if let Some(to) = bytes.get_mut(word..word + 4) {
                    to.copy_from_slice(&edge.to_le_bytes());
                }
            }
        }
    }
}

/// Fails when the plugin gave itself up.
fn survives<T>(what: &str, answer: Result<T, crate::rig::Fault>) -> Outcome {
    let Err(fault) = answer else { return Ok(()) };
    let lost = matches!(fault.status, E_QUEUE_LOST | E_DEVICE_LOST | E_INTERNAL);
    ensure!(!lost && fault.status < 0, "{what}: {fault}");
    Ok(())
}

fn fuzz_step(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let setting = Setting::new(&session, &mut rng)?;
    let ready = setting.ready()?;
    let x = words(&floats(&mut rng, setting.step.tokens.len() * WIDTH));
    let right = ready.run(&setting.step, &[&x])?;
    let good = setting.step.encode();
    let fields = <SpdStep as Layout>::LAYOUT.fields;
    let total = fields.iter().find(|field| field.name == "total_size").expect("a field of the header").offset;
    for number in 0..STEPS {
        let mut blob = good.clone();
        mutate(&mut rng, blob.as_bytes_mut());
        // Nobody tells the plugin how long the buffer is but this field.
        blob.as_bytes_mut()[total..total + 4].copy_from_slice(&good.as_bytes()[total..total + 4]);
        let input = ready.input_arena(&setting.step, &[&x]);
        let mut output = Arena::filled(1 << 16, 0);
        let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        survives(&format!("changed step {number}"), session.queue.run(&ready.plan, parts))?;
        ensure!(output.is_guarded(), "changed step {number}: bytes past the output arena were written");
    }
    // Rows may have gone astray in between; the step writes its own again.
    let again = ready.run(&setting.step, &[&x])?;
    ensure!(again[0] == right[0], "after {STEPS} changed steps the good one selects other positions");
    let found = crate::case::wide(&crate::case::as_floats(&right[1]));
    crate::case::close(crate::case::CLASS_F, "the good step after changed ones", &again[1], &found)
}

fn fuzz_program(context: &Context) -> Outcome {
    let session = context.session_with(OpenOptions { budget: BUDGET, ..OpenOptions::default() })?;
    let mut rng = context.random();
    let setting = Setting::new(&session, &mut rng)?;
    let case = setting.layer.program(&session, &setting.pool)?;
    let (good, weights) = (case.blob(), case.bound());
    let step = setting.step.encode();
    let tokens = u32::try_from(setting.step.tokens.len()).expect("small");
    let bucket = SpdBucket { max_tokens: tokens, max_seqs: 2, max_logits: 2, max_context: tokens };
    let input = Arena::filled(1 << 16, 0);
    let mut taken = 0;
    for number in 0..PROGRAMS {
        let mut blob: Blob = good.clone();
        mutate(&mut rng, blob.as_bytes_mut());
        match session.compile(&blob, weights.clone(), Some(&setting.pool), bucket) {
            Err(fault) => survives::<()>(&format!("changed program {number}"), Err(fault))?,
            Ok(plan) => {
                taken += 1;
                let mut output = Arena::filled(1 << 16, 0);
                let parts = RunParts { step: &step, input: &input, output: &mut output, cancel: None };
                survives(&format!("a step of changed program {number}"), session.queue.run(&plan, parts))?;
                ensure!(output.is_guarded(), "changed program {number}: bytes past the output arena were written");
            }
        }
    }
    ensure!(taken < PROGRAMS, "every changed program is taken");
    let x = words(&floats(&mut rng, setting.step.tokens.len() * WIDTH));
    setting.ready()?.run(&setting.step, &[&x])?;
    Ok(())
}
