//! L3: is memory counted, capped and given back?

use super::layer::Layer;
use super::refused;
use super::sequences::any_format;
use crate::cache::Shape;
use crate::child::Context;
use crate::rig::{OpenOptions, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, ensure};
use sparsed_abi::{DT_F32, E_NOMEM_DEVICE, SpdMemInfo};

const PLACE: &str = "plugin.h, spd_mem_info and spd_open_options";

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L3,
        "mem.budget",
        "what would pass mem_budget is SPD_E_NOMEM_DEVICE and changes nothing",
        PLACE,
        &["kv.create"],
        budget,
    ),
    rule(Level::L3, "mem.counted", "weights and pools are counted in mem_info", PLACE, &["kv.create"], counted),
    rule(
        Level::L3,
        "mem.base",
        "mem_info returns to where it was when everything is destroyed",
        PLACE,
        &["kv.create"],
        base,
    ),
];

/// Bytes in use, by what they are for.
fn used(info: &SpdMemInfo) -> [u64; 5] {
    [info.used_weights, info.used_kv, info.used_workspace, info.used_plans, info.used_other]
}

fn budget(context: &Context) -> Outcome {
    let budget = 8 << 20;
    let session = context.session_with(OpenOptions { budget, ..OpenOptions::default() })?;
    let shape = Shape::usual(&session, any_format(&session)?);
    let per_block = shape.pool(&session)?.info.image_bytes;
    let before = session.mem_info()?;
    ensure!(before.budget == budget, "mem_info.budget is {}, the device was opened with {budget}", before.budget);
    let weight = |rows| session.weight(DT_F32, (1, rows, 1024), &vec![0; usize::try_from(rows).expect("small") * 4096]);
    refused("a weight of 16 MiB under a budget of 8 MiB", weight(4096), &[E_NOMEM_DEVICE])?;
    let n_blocks = u32::try_from((16u64 << 20) / per_block).expect("small");
    let pool = Shape { n_blocks, ..shape }.pool(&session);
    refused("a pool of 16 MiB under a budget of 8 MiB", pool, &[E_NOMEM_DEVICE])?;
    let after = session.mem_info()?;
    ensure!(used(&before) == used(&after), "refusals left {:?} in use, {:?} was before", used(&after), used(&before));
    // Pieces that fit one by one and not together.
    let mut held = Vec::new();
    let refusal = loop {
        ensure!(held.len() < 8, "8 weights of 1 MiB and more fit into a budget of 8 MiB");
        match weight(400) {
            Ok(weight) => held.push(weight),
            Err(fault) => break fault,
        }
        let sum: u64 = used(&session.mem_info()?).iter().sum();
        ensure!(sum <= budget, "{sum} bytes are in use under a budget of {budget}");
    };
    refused::<()>("weights of 1.6 MiB each under a budget of 8 MiB", Err(refusal), &[E_NOMEM_DEVICE])?;
    drop(held.pop());
    held.push(weight(400)?);
    Ok(())
}

fn counted(context: &Context) -> Outcome {
    let session = context.session()?;
    let before = session.mem_info()?;
    let bytes = vec![0; 1 << 20];
    let weight = session.weight(DT_F32, (1, 256, 1024), &bytes)?;
    let with_weight = session.mem_info()?;
    let grown = with_weight.used_weights.saturating_sub(before.used_weights);
    ensure!(grown >= 1 << 20, "used_weights grows by {grown} with a weight of {} bytes", 1 << 20);
    let pool = Shape::usual(&session, any_format(&session)?).pool(&session)?;
    let grown = session.mem_info()?.used_kv.saturating_sub(before.used_kv);
    ensure!(grown > 0, "used_kv does not grow with a pool of {} bytes", pool.info.device_bytes);
    drop(weight);
    Ok(())
}

fn base(context: &Context) -> Outcome {
    let session = context.session()?;
    let shape = one_layer(&session)?;
    let layer = Layer::random(&mut context.random(), &session, shape);
    let before = used(&session.mem_info()?);
    for _ in 0..3 {
        make_everything(&session, &layer, shape)?;
        let after = used(&session.mem_info()?);
        let names = "[weights, kv, workspace, plans, other]";
        ensure!(after == before, "{names} are {after:?} after everything was destroyed, {before:?} before");
    }
    Ok(())
}

/// A small pool of one layer.
pub(crate) fn one_layer(session: &Session) -> Result<Shape, crate::verdict::Wrong> {
    Ok(Shape { n_blocks: 8, layers: 1, index_layers: 1, ..Shape::usual(session, any_format(session)?) })
}

/// A pool, the layer's weights and a plan; a step is run and everything destroyed.
pub(crate) fn make_everything(session: &Session, layer: &Layer, shape: Shape) -> Outcome {
    let pool = shape.pool(session)?;
    let step = Step::over(&shape.sequences(&[1], &[3]), shape.block_tokens);
    let ready = layer.program(session, &pool)?.compile(&[&step])?;
    ready.run(&step, &[&[0x3f00_0000; super::layer::WIDTH]])?;
    Ok(())
}
