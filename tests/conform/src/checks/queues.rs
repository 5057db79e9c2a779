//! Is a queue's timeline kept? Values that were never given, waits, cancelling, memory of what has been, and order.
//!
//! Most of it binds a plugin that computes inside the call as well: the daemon asks in the same way.

use super::sequences::any_format;
use super::{addends, adder, adds, refused};
use crate::cache::Shape;
use crate::case::{CLASS_F, Ready, close};
use crate::child::Context;
use crate::rig::{Arena, Fault, Queue, RunParts, Session};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_abi::{
    E_CANCELLED, E_DATA, E_INVALID, E_TIMEOUT, E_UNSUPPORTED, FEAT_ASYNC, KV_EXPORT, KV_IMPORT, STEP_NAN_GUARD, SpdKvOp,
};
use std::time::{Duration, Instant};

const NEEDS: &[&str] = &["queue.in_flight"];

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L3,
        "queue.in_flight",
        "steps in flight come out as each alone, whatever becomes of their `step` and `in` after the call",
        "plugin.h, spd_run",
        &["queue.timeline"],
        in_flight,
    ),
    rule(
        Level::L3,
        "queue.unknown_value",
        "a timeline value that was never given is SPD_E_INVALID, to queue_wait and to queue_wait_queue",
        "plugin.h, queue_wait",
        NEEDS,
        unknown_value,
    ),
    rule(
        Level::L3,
        "queue.wait_ends",
        "a wait ends with its time, SPD_E_TIMEOUT only while work goes on, and takes any time there is",
        "plugin.h, queue_wait",
        NEEDS,
        wait_ends,
    ),
    rule(
        Level::L3,
        "queue.remembers",
        "what became of each of the last 1000 values is known",
        "plugin.h, queue_wait",
        NEEDS,
        remembers,
    ),
    rule(
        Level::L3,
        "queue.cancel",
        "queue_cancel ends work from its value on as SPD_E_CANCELLED or not at all, and nothing before or after it",
        "plugin.h, queue_cancel",
        NEEDS,
        cancel,
    ),
    rule(
        Level::L3,
        "queue.order",
        "work behind queue_wait_queue sees what the other queue has done",
        "plugin.h, queue_wait_queue",
        &["queue.timeline"],
        order,
    ),
    rule(
        Level::L3,
        "queue.failure",
        "with SPD_FEAT_ASYNC a step that fails was taken, and queue_wait says so for as long as it remembers",
        "plugin.h, queue_run",
        &["run.nan_guard", "queue.remembers"],
        failure,
    ),
];

/// Values that a plugin remembers at least.
const REMEMBERED: usize = 1000;
/// How long a wait of no time may take on a loaded machine.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Tokens of a step here.
const TOKENS: u32 = 5;

/// A step of the adder that a queue has been given.
struct Flight<'s> {
    queue: &'s Queue,
    output: Arena,
    sum: Vec<f64>,
    timeline: u64,
}

impl<'s> Flight<'s> {
    /// Begins a step with random addends, and overwrites what the plugin has been shown as soon as that is allowed.
    fn begin(ready: &Ready<'_>, queue: &'s Queue, rng: &mut fastrand::Rng, step: &Step) -> Result<Self, Fault> {
        let (a, b, sum) = addends(rng, step.tokens.len());
        Self::begin_with(ready, queue, step, [&a, &b], sum)
    }

    fn begin_with(
        ready: &Ready<'_>,
        queue: &'s Queue,
        step: &Step,
        inputs: [&[u32]; 2],
        sum: Vec<f64>,
    ) -> Result<Self, Fault> {
        let (mut input, mut output) = (ready.input_arena(step, &inputs), ready.output_arena(step));
        let mut blob = step.encode();
        let raw = RunParts { step: &blob, input: &input, output: &mut output, cancel: None }.raw();
        let timeline = queue.begin(&ready.plan, &raw)?;
        input.bytes_mut().fill(0xff);
        blob.as_bytes_mut().fill(0xff);
        Ok(Self { queue, output, sum, timeline })
    }

    fn wait(&self) -> Result<(), Fault> {
        self.queue.wait(self.timeline)
    }

    /// Fails unless the step, which has completed well, has added.
    fn has_added(&self, ready: &Ready<'_>, step: &Step) -> Outcome {
        ensure!(self.output.is_guarded(), "bytes past the end of the output arena were written");
        let what = format!("the sum of the step with timeline value {}", self.timeline);
        close(CLASS_F, &what, &ready.outputs_in(step, &self.output)[0], &self.sum)
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        // The arena is the plugin's until the value completes. What became of it has been looked at.
        let _over = self.wait();
    }
}

fn unknown_value(context: &Context) -> Outcome {
    let (session, mut rng, step) = (context.session()?, context.random(), Step::without_pool(&[TOKENS]));
    let (ready, other) = (adder(&session).compile(&[&step])?, Queue::create(&session.device)?);
    let flight = Flight::begin(&ready, &session.queue, &mut rng, &step)?;
    for unknown in [flight.timeline + 1, flight.timeline + (1 << 40), u64::MAX] {
        let what = format!("{unknown}, after value {}, ", flight.timeline);
        refused(&format!("queue_wait for {what}"), session.queue.wait_once(unknown, 0), &[E_INVALID])?;
        refused(&format!("queue_wait_queue for {what}"), other.wait_for(&session.queue, unknown), &[E_INVALID])?;
    }
    flight.wait()?;
    flight.has_added(&ready, &step)?;
    adds(&ready, &mut rng, &step)
}

fn wait_ends(context: &Context) -> Outcome {
    let (session, mut rng, step) = (context.session()?, context.random(), Step::without_pool(&[TOKENS]));
    let ready = adder(&session).compile(&[&step])?;
    for _ in 0..4 {
        let flight = Flight::begin(&ready, &session.queue, &mut rng, &step)?;
        let begun = Instant::now();
        match session.queue.wait_once(flight.timeline, 0) {
            Err(fault) if fault.status == E_TIMEOUT && session.claims(FEAT_ASYNC) => {}
            Err(fault) if fault.status == E_TIMEOUT => {
                return Err(Wrong::Failed("without SPD_FEAT_ASYNC a step goes on after its call".to_owned()));
            }
            answer => answer?,
        }
        ensure!(begun.elapsed() < AT_ONCE, "a wait of no time takes {:?}", begun.elapsed());
        session.queue.wait_once(flight.timeline, u64::MAX)?;
        session.queue.wait_once(flight.timeline, 0)?; // it has completed, so there is nothing to wait for
        flight.has_added(&ready, &step)?;
    }
    Ok(())
}

fn remembers(context: &Context) -> Outcome {
    let (session, mut rng, step) = (context.session()?, context.random(), Step::without_pool(&[1]));
    let ready = adder(&session).compile(&[&step])?;
    let mut given = Vec::with_capacity(REMEMBERED);
    for _ in 0..REMEMBERED {
        given.push(Flight::begin(&ready, &session.queue, &mut rng, &step)?.timeline);
    }
    for (age, &timeline) in given.iter().rev().enumerate() {
        let wait = session.queue.wait(timeline);
        wait.map_err(|fault| Wrong::Failed(format!("asked for a value that {age} have followed: {fault}")))?;
    }
    Ok(())
}

fn cancel(context: &Context) -> Outcome {
    let (session, mut rng, step) = (context.session()?, context.random(), Step::without_pool(&[TOKENS]));
    let ready = adder(&session).compile(&[&step])?;
    for _ in 0..8 {
        let mut flights = Vec::new();
        for _ in 0..3 {
            flights.push(Flight::begin(&ready, &session.queue, &mut rng, &step)?);
        }
        session.queue.cancel(flights[1].timeline)?;
        let after = Flight::begin(&ready, &session.queue, &mut rng, &step)?;
        for (place, flight) in flights.iter().enumerate() {
            match flight.wait() {
                Err(fault) if fault.status == E_CANCELLED && place > 0 && session.claims(FEAT_ASYNC) => {}
                Err(fault) => return Err(Wrong::Failed(format!("step {place}, cancelled from step 1 on: {fault}"))),
                Ok(()) => flight.has_added(&ready, &step)?,
            }
        }
        after.wait().map_err(|fault| Wrong::Failed(format!("the step after those that were cancelled: {fault}")))?;
        after.has_added(&ready, &step)?;
        // What has completed is not touched, and what will come is not either.
        session.queue.cancel(after.timeline)?;
        after.wait()?;
        session.queue.cancel(u64::MAX)?;
    }
    adds(&ready, &mut rng, &step)
}

fn in_flight(context: &Context) -> Outcome {
    let (session, mut rng, step) = (context.session()?, context.random(), Step::without_pool(&[TOKENS]));
    let ready = adder(&session).compile(&[&step])?;
    for _ in 0..4 {
        let mut flights = Vec::new();
        for _ in 0..9 {
            flights.push(Flight::begin(&ready, &session.queue, &mut rng, &step)?);
        }
        let last = flights.last().expect("nine");
        last.wait()?;
        let completed = session.queue.completed()?;
        ensure!(completed >= last.timeline, "{} has completed, queue_query says {completed}", last.timeline);
        for flight in &flights {
            // Values complete in order, so those before the last are over too.
            session.queue.wait_once(flight.timeline, 0)?;
            flight.has_added(&ready, &step)?;
        }
    }
    Ok(())
}

fn order(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let shape = Shape { n_blocks: 2, ..Shape::usual(&session, any_format(&session)?) };
    let pool = shape.pool(&session)?;
    let queues = [Queue::create(&session.device)?, Queue::create(&session.device)?];
    let length = usize::try_from(pool.info.image_bytes).expect("a small pool");
    let import = SpdKvOp { kind: KV_IMPORT, dst_block: 1, ..SpdKvOp::default() };
    let export = SpdKvOp { kind: KV_EXPORT, src_block: 1, ..SpdKvOp::default() };
    let (mut image, mut found) = (vec![0x3c; length], vec![0x77; length]);
    queues[0].kv(&pool, &[import], &mut image)?;
    queues[0].kv(&pool, &[export], &mut found)?;
    if found != image {
        return skip("what is imported does not come out again, whatever the order");
    }
    for round in 0..16 {
        let (writer, reader) = (&queues[round % 2], &queues[1 - round % 2]);
        let mut image: Vec<u8> = (0..length).map(|_| rng.u8(..)).collect();
        let (wanted, mut found) = (image.clone(), vec![0x77; length]);
        let written = writer.begin_kv(&pool, &[import], &mut image)?;
        reader.wait_for(writer, written)?;
        let read = reader.begin_kv(&pool, &[export], &mut found)?;
        reader.wait(read)?;
        writer.wait(written)?;
        ensure!(found == wanted, "round {round}: a queue that waits for an import exports what was there before it");
    }
    Ok(())
}

fn failure(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let guarded = Step { flags: STEP_NAN_GUARD, ..Step::without_pool(&[TOKENS]) };
    let ready = adder(&session).compile(&[&guarded])?;
    let (mut a, b, sum) = addends(&mut rng, TOKENS as usize);
    a[3] = f32::NAN.to_bits();
    let bad = match Flight::begin_with(&ready, &session.queue, &guarded, [&a, &b], sum) {
        Err(fault) if fault.status == E_UNSUPPORTED => return skip(fault.to_string()),
        Err(fault) if fault.status == E_DATA && !session.claims(FEAT_ASYNC) => {
            return adds(&ready, &mut rng, &guarded); // its status is the work's
        }
        Err(fault) => return Err(Wrong::Failed(format!("a step that will fail is not taken: {fault}"))),
        Ok(flight) => flight,
    };
    ensure!(session.claims(FEAT_ASYNC), "without SPD_FEAT_ASYNC queue_run takes a step and does not say that it fails");
    has_failed(&session, bad.timeline, "a step with a NaN in its output")?;
    for _ in 1..REMEMBERED {
        Flight::begin(&ready, &session.queue, &mut rng, &guarded)?.wait()?;
    }
    has_failed(&session, bad.timeline, "asked again 999 values later")?;
    adds(&ready, &mut rng, &guarded)
}

/// Fails unless the work of this value has ended as `SPD_E_DATA`.
fn has_failed(session: &Session, timeline: u64, what: &str) -> Outcome {
    refused(what, session.queue.wait(timeline), &[E_DATA])
}
