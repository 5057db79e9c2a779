//! L4: does nothing pile up, and do two queues keep out of each other's way?

use super::layer::{Layer, WIDTH};
use super::memory::{make_everything, one_layer};
use super::sequences::any_format;
use crate::cache::Shape;
use crate::case::{CLASS_F, Ready, Words, as_floats, close, floats, wide, words};
use crate::child::Context;
use crate::rig::{OpenOptions, Queue, Session, table};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure};

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L4,
        "life.open_close",
        "a device that is opened and closed 1000 times leaves no descriptor, thread or memory behind",
        "plugin.h, the table",
        &[],
        open_close,
    ),
    rule(
        Level::L4,
        "life.objects",
        "weights, pools, plans and queues that are made and destroyed 1000 times leave no memory behind",
        "plugin.h, the table",
        &["mem.base"],
        objects,
    ),
    rule(
        Level::L4,
        "queue.parallel",
        "two queues in two threads answer what each answers alone",
        "plugin.h, tags",
        &["step.idempotent"],
        parallel,
    ),
];

const TIMES: usize = 1000;
/// Resident memory that may grow between the first tenth and the end, in bytes: room for what an allocator keeps.
const GROWTH_BYTES_MAX: u64 = 4 << 20;
/// What the system counts resident memory in; a larger page only makes the limit larger.
const PAGE_BYTES: u64 = 4096;

/// What the process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    resident_bytes: u64,
}

impl Held {
    fn now() -> Result<Self, Wrong> {
        let io = |error: std::io::Error| Wrong::Failed(format!("/proc/self: {error}"));
        let entries = |folder: &str| Ok::<_, Wrong>(std::fs::read_dir(folder).map_err(io)?.count());
        let statm = std::fs::read_to_string("/proc/self/statm").map_err(io)?;
        let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
        Ok(Self {
            descriptors: entries("/proc/self/fd")?,
            threads: entries("/proc/self/task")?,
            resident_bytes: pages * PAGE_BYTES,
        })
    }

    /// Fails when more is held than after the first tenth. A thread that has been joined may still be listed for a
    /// moment, so the counts are asked for until they agree; a leak ends at the run's deadline.
    fn is_base(self) -> Outcome {
        let mut now = Self::now()?;
        for _ in 0..1000 {
            if now.threads <= self.threads {
                break;
            }
            std::thread::yield_now();
            now = Self::now()?;
        }
        ensure!(now.descriptors <= self.descriptors, "{} descriptors, {} were open", now.descriptors, self.descriptors);
        ensure!(now.threads <= self.threads, "{} threads, there were {}", now.threads, self.threads);
        let grown = now.resident_bytes.saturating_sub(self.resident_bytes);
        ensure!(grown <= GROWTH_BYTES_MAX, "resident memory has grown by {grown} bytes");
        Ok(())
    }
}

/// Does `once` many times, and fails when the process holds more at the end than after the first tenth.
fn repeated(mut once: impl FnMut() -> Outcome) -> Outcome {
    let mut base = None;
    for time in 0..TIMES {
        once()?;
        if time == TIMES / 10 {
            base = Some(Held::now()?);
        }
    }
    base.map_or(Ok(()), Held::is_base)
}

fn open_close(context: &Context) -> Outcome {
    let api = table(context.entry)?;
    repeated(|| Ok(Session::open(api, context.index, OpenOptions::default()).map(drop)?))
}

fn objects(context: &Context) -> Outcome {
    let session = context.session()?;
    let shape = one_layer(&session)?;
    let layer = Layer::random(&mut context.random(), &session, shape);
    repeated(|| {
        let _queue = Queue::create(&session.device)?;
        make_everything(&session, &layer, shape)
    })
}

/// What one thread works with: a queue and a plan of its own.
struct Work<'s> {
    queue: Queue,
    ready: Ready<'s>,
    step: Step,
    x: Words,
}

/// Moves a value with raw handles into a thread.
struct Sent<T>(T);

// SAFETY: `[queue]` functions may be called from one thread at a time per queue, and each thread has a queue and a plan
// of its own; reference counts are changed by neither while both run.
unsafe impl<T> Send for Sent<T> {}

impl<T> Sent<T> {
    /// The value; a method, so that a closure takes the whole of this with it.
    fn get(&self) -> &T {
        &self.0
    }
}

fn parallel(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let shape = Shape { layers: 1, index_layers: 1, ..Shape::usual(&session, any_format(&session)?) };
    let mut work = |tokens: u32| {
        let layer = Layer::random(&mut rng, &session, shape);
        let pool = shape.pool(&session)?;
        let step = Step::over(&shape.sequences(&[tokens], &[5, 2, 9]), shape.block_tokens);
        let ready = layer.program(&session, &pool)?.compile(&[&step])?;
        let x = words(&floats(&mut rng, step.tokens.len() * WIDTH));
        Ok::<_, Wrong>(Work { queue: Queue::create(&session.device)?, ready, step, x })
    };
    let both = [work(17)?, work(5)?];
    let run = |work: &Work<'_>| work.ready.run_on(&work.queue, &work.step, &[&work.x]);
    let alone = [run(&both[0])?, run(&both[1])?];
    let answers = std::thread::scope(|scope| {
        let threads = both.each_ref().map(|work| {
            let sent = Sent(work);
            scope.spawn(move || Sent((0..50).map(|_| run_sent(&sent)).collect::<Vec<_>>()))
        });
        threads.map(|thread| thread.join().map(|answers| answers.0))
    });
    for (answers, alone) in answers.into_iter().zip(&alone) {
        let answers = answers.map_err(|_| Wrong::Failed("a thread panicked".to_owned()))?;
        for answer in answers {
            let answer = answer?;
            ensure!(answer[0] == alone[0], "two queues in parallel: other positions are selected");
            close(CLASS_F, "two queues in parallel", &answer[1], &wide(&as_floats(&alone[1])))?;
        }
    }
    Ok(())
}

fn run_sent(sent: &Sent<&Work<'_>>) -> Result<Vec<Words>, Wrong> {
    let work = sent.get();
    work.ready.run_on(&work.queue, &work.step, &[&work.x])
}
