//! Steps are in flight together, in order, and come out as if each had been alone.

use crate::reference::{Step, add, assert_close, bytes, embed, gather, halves, linear, rms_norm, singles, wide};
use crate::rig::{Arena, Plan, Queue, Rig, Weight, program};
use fastrand::Rng;
use sparsed_abi::{
    Blob, DIM_LOGITS, DIM_TOKENS, DT_F16, DT_F32, E_CANCELLED, E_INVALID, E_TIMEOUT, OP_ADD, OP_EMBED, OP_GATHER_ROWS,
    OP_LINEAR, OP_RMS_NORM, OpSpec,
};
use std::sync::atomic::AtomicU32;

const VOCABULARY: usize = 11;
const WIDTH: usize = 12;

/// `logits = W norm((embed(token) + bias row) gathered)`: all operators of the slice in a row.
pub struct Model {
    table: Vec<f64>,
    gain: Vec<f32>,
    matrix: Vec<f64>,
    pub data: [(u32, u64, u64, Vec<u8>); 3],
}

impl Model {
    pub const VOCABULARY: u32 = VOCABULARY as u32;
    pub const WIDTH: usize = WIDTH;

    pub fn new(random: &mut Rng) -> Self {
        let (table_data, table) = halves(random, VOCABULARY * WIDTH);
        let (matrix_data, matrix) = halves(random, VOCABULARY * WIDTH);
        let gain = singles(random, WIDTH);
        let data = [
            (DT_F16, VOCABULARY as u64, WIDTH as u64, table_data),
            (DT_F32, 1, WIDTH as u64, bytes(&gain)),
            (DT_F16, VOCABULARY as u64, WIDTH as u64, matrix_data),
        ];
        Self { table, gain, matrix, data }
    }

    pub fn blob() -> Blob {
        let (v, w) = (i32::try_from(VOCABULARY).unwrap(), i32::try_from(WIDTH).unwrap());
        program(|b| {
            let input = b.input(DT_F32, &[DIM_TOKENS, w]);
            let (table, gain, matrix) =
                (b.weight(0, DT_F16, &[v, w]), b.weight(1, DT_F32, &[w]), b.weight(2, DT_F16, &[v, w]));
            let [x, sum, y] = [0; 3].map(|_| b.activation(DT_F32, &[DIM_TOKENS, w]));
            let last = b.activation(DT_F32, &[DIM_LOGITS, w]);
            let logits = b.activation(DT_F32, &[DIM_LOGITS, v]);
            let f = [1e-5, 0.0, 0.0, 0.0];
            for (kind, inputs, output, f) in [
                (OP_EMBED, &[Some(table)][..], x, [0.0; 4]),
                (OP_ADD, &[Some(x), Some(input)], sum, [0.0; 4]),
                (OP_RMS_NORM, &[Some(sum), Some(gain)], y, f),
                (OP_GATHER_ROWS, &[Some(y)], last, [0.0; 4]),
                (OP_LINEAR, &[Some(last), Some(matrix)], logits, [0.0; 4]),
            ] {
                b.op(OpSpec { kind, inputs, outputs: &[Some(output)], f, ..OpSpec::default() });
            }
            b.mark_output(logits);
        })
    }

    fn weights<'a>(&self, rig: &'a Rig) -> Vec<Weight<'a>> {
        let upload =
            |(dtype, rows, cols, data): &(u32, u64, u64, Vec<u8>)| rig.weight(*dtype, *rows, *cols, data.clone());
        self.data.iter().map(|weight| upload(weight).unwrap()).collect()
    }

    fn plan<'a>(&self, rig: &'a Rig, weights: &[Weight<'a>]) -> Plan<'a> {
        rig.plan(&Self::blob(), &weights.iter().collect::<Vec<_>>()).unwrap()
    }

    pub fn logits(&self, step: &Step, input: &[f32]) -> Vec<f64> {
        let sum = add(&embed(&self.table, &step.tokens, WIDTH), &wide(input));
        let y = rms_norm(&sum, Some(&wide(&self.gain)), WIDTH, 1e-5);
        linear(&gather(&y, &step.rows, WIDTH), &self.matrix, None, WIDTH)
    }
}

/// A step that has been put on a queue.
struct Flight {
    timeline: u64,
    expected: Vec<f64>,
    out: Arena,
}

impl Flight {
    fn begin(model: &Model, queue: &Queue<'_>, plan: &Plan<'_>, random: &mut Rng) -> Self {
        let step = Step::random(random, 11);
        let input = singles(random, step.tokens.len() * WIDTH);
        let mut out = Arena::new(step.rows.len() * VOCABULARY);
        let timeline = queue.run(plan, &step.arrays(), &input, &mut out).unwrap();
        Self { timeline, expected: model.logits(&step, &input), out }
    }
}

#[test]
fn more_steps_than_there_are_frames_come_out_right() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(1));
    let model = Model::new(&mut random);
    let weights = model.weights(&rig);
    let (plan, queue) = (model.plan(&rig, &weights), rig.queue().unwrap());
    for seed in 0..20 {
        rig.set("seed", seed);
        let flights: Vec<_> = (0..9).map(|_| Flight::begin(&model, &queue, &plan, &mut random)).collect();
        queue.wait(flights[8].timeline).unwrap();
        for flight in &flights {
            queue.wait(flight.timeline).unwrap(); // and what came before it
            assert_close(flight.out.values(), &flight.expected, &format!("seed {seed}, step {}", flight.timeline));
        }
    }
}

#[test]
fn a_program_over_two_queues_and_one_workspace_keeps_to_its_waits_under_fifty_seeds() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(2));
    let model = Model::new(&mut random);
    let weights = model.weights(&rig);
    // Each queue has a plan of its own, and one that both use.
    let plans = [0; 3].map(|_| model.plan(&rig, &weights));
    let mut held_back = 0;
    for seed in 0..50 {
        rig.set("seed", seed);
        let queues = [rig.queue().unwrap(), rig.queue().unwrap()];
        let mut flights: [Vec<Flight>; 2] = [Vec::new(), Vec::new()];
        // (queue, its value that waits, the other's value that must come before)
        let mut edges: Vec<(usize, u64, u64)> = Vec::new();
        let check = |edges: &[(usize, u64, u64)]| {
            for &(waiter, value, before) in edges {
                let is_late = queues[waiter].completed() < value;
                assert!(is_late || queues[1 - waiter].completed() >= before, "seed {seed}: {value} before {before}");
            }
        };
        for _ in 0..12 {
            let waiter = random.usize(0..2);
            if let Some(last) = flights[1 - waiter].last().filter(|_| random.u8(0..3) > 0) {
                queues[waiter].wait_queue(&queues[1 - waiter], last.timeline).unwrap();
                edges.push((waiter, flights[waiter].len() as u64 + 1, last.timeline));
                held_back += u32::from(queues[1 - waiter].completed() < last.timeline);
            }
            let plan = if random.bool() { &plans[2] } else { &plans[waiter] };
            flights[waiter].push(Flight::begin(&model, &queues[waiter], plan, &mut random));
            check(&edges);
        }
        for (queue, flights) in queues.iter().zip(&flights) {
            for flight in flights {
                queue.wait(flight.timeline).unwrap();
                check(&edges);
                assert_close(flight.out.values(), &flight.expected, &format!("seed {seed}"));
            }
        }
    }
    assert!(held_back > 50, "only {held_back} waits were for work in flight");
}

#[test]
fn cancelled_steps_say_so_and_write_nothing_and_the_queue_goes_on() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(3));
    let model = Model::new(&mut random);
    let weights = model.weights(&rig);
    let (plan, queue) = (model.plan(&rig, &weights), rig.queue().unwrap());
    let mut caught = 0;
    for seed in 0..20 {
        rig.set("seed", seed);
        let flights: Vec<_> = (0..3).map(|_| Flight::begin(&model, &queue, &plan, &mut random)).collect();
        queue.cancel(flights[1].timeline).unwrap();
        for (i, flight) in flights.iter().enumerate() {
            match queue.wait(flight.timeline) {
                Ok(()) => assert_close(flight.out.values(), &flight.expected, "a step that was not cancelled in time"),
                Err(failure) => {
                    assert!(i > 0 && failure.status == E_CANCELLED, "{failure:?}");
                    assert!(flight.out.is_untouched(), "a cancelled step wrote outputs");
                    caught += 1;
                }
            }
        }
        let after = Flight::begin(&model, &queue, &plan, &mut random);
        queue.wait(after.timeline).unwrap();
        assert_close(after.out.values(), &after.expected, "the step after");
    }
    assert!(caught > 20, "only {caught} steps were caught");
    assert!(rig.counter("skipped") > 20, "kernels of cancelled steps still compute");
}

#[test]
fn a_step_whose_flag_is_set_is_not_taken() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(4));
    let model = Model::new(&mut random);
    let weights = model.weights(&rig);
    let (plan, queue, step) = (model.plan(&rig, &weights), rig.queue().unwrap(), Step::random(&mut random, 11));
    let input = singles(&mut random, step.tokens.len() * WIDTH);
    let mut out = Arena::new(8 * VOCABULARY);
    let flag = AtomicU32::new(1);
    let refused = queue.run_with(&plan, &step.arrays(), &input, &mut out, Some(&flag)).unwrap_err();
    assert_eq!((refused.status, queue.completed(), rig.counter("launches")), (E_CANCELLED, 0, 0));
}

#[test]
fn a_wait_ends_with_its_time_and_a_value_that_was_never_given_is_refused() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(5));
    let model = Model::new(&mut random);
    let weights = model.weights(&rig);
    let (plan, queues) = (model.plan(&rig, &weights), [rig.queue().unwrap(), rig.queue().unwrap()]);
    assert_eq!(queues[0].wait(1).unwrap_err().status, E_INVALID);
    assert_eq!(queues[1].wait_queue(&queues[0], 1).unwrap_err().status, E_INVALID);
    let flights: Vec<_> = (0..3).map(|_| Flight::begin(&model, &queues[0], &plan, &mut random)).collect();
    let early = queues[0].wait_for(flights[2].timeline, 0).unwrap_err();
    assert_eq!(early.status, E_TIMEOUT, "three steps are more than one question does: {early:?}");
    queues[0].wait(flights[2].timeline).unwrap();
    assert_eq!(queues[0].completed(), flights[2].timeline);
}

#[test]
fn an_arena_that_is_too_short_or_a_step_beyond_the_bucket_is_refused_and_nothing_is_enqueued() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(6));
    let model = Model::new(&mut random);
    let weights = model.weights(&rig);
    let (plan, queue) = (model.plan(&rig, &weights), rig.queue().unwrap());
    let mut step = Step::random(&mut random, 11);
    step.rows = vec![0];
    let input = singles(&mut random, step.tokens.len() * WIDTH);
    let short_input = queue.run(&plan, &step.arrays(), &input[1..], &mut Arena::new(VOCABULARY)).unwrap_err();
    let short_output = queue.run(&plan, &step.arrays(), &input, &mut Arena::new(VOCABULARY - 1)).unwrap_err();
    let mut nine = step.arrays();
    (nine.tokens, nine.positions) = (&[0; 9], &[56, 57, 58, 59, 60, 61, 62, 63, 64]);
    (nine.slots, nine.seq_offsets, nine.contexts) = (&[0; 9], &[0, 9], &[65]);
    let large = queue.run(&plan, &nine, &[0.0; 9 * WIDTH], &mut Arena::new(VOCABULARY)).unwrap_err();
    for refused in [short_input, short_output, large] {
        assert_eq!(refused.status, E_INVALID, "{refused:?}");
    }
    assert_eq!(rig.counter("launches"), 0);
}
