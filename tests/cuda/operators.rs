//! Each operator is what `abi/OPS.md` says.

use crate::reference::{Step, add, assert_close, bytes, embed, gather, halves, linear, rms_norm, singles, wide};
use crate::rig::{Arena, Plan, Rig, program};
use fastrand::Rng;
use sparsed_abi::{
    DIM_LOGITS, DIM_TOKENS, DT_F16, DT_F32, E_INVALID, OP_ADD, OP_EMBED, OP_GATHER_ROWS, OP_LINEAR, OP_RMS_NORM, OpSpec,
};

/// Runs a step to its end: `n` values of output.
fn run(rig: &Rig, plan: &Plan<'_>, step: &Step, input: &[f32], n: usize) -> Vec<f32> {
    let (queue, mut out) = (rig.queue().unwrap(), Arena::new(n));
    let timeline = queue.run(plan, &step.arrays(), input, &mut out).unwrap();
    queue.wait(timeline).unwrap();
    out.values().to_vec()
}

/// The bytes and the values of a matrix.
fn matrix(random: &mut Rng, dtype: u32, n: usize) -> (Vec<u8>, Vec<f64>) {
    if dtype == DT_F16 {
        return halves(random, n);
    }
    let values = singles(random, n);
    (bytes(&values), wide(&values))
}

#[test]
fn embed_looks_rows_up() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(1));
    for dtype in [DT_F16, DT_F32] {
        let (data, values) = matrix(&mut random, dtype, 10 * 48);
        let weight = rig.weight(dtype, 10, 48, data).unwrap();
        let blob = program(|b| {
            let (w, y) = (b.weight(0, dtype, &[10, 48]), b.activation(DT_F32, &[DIM_TOKENS, 48]));
            b.op(OpSpec { kind: OP_EMBED, inputs: &[Some(w)], outputs: &[Some(y)], ..OpSpec::default() });
            b.mark_output(y);
        });
        let plan = rig.plan(&blob, &[&weight]).unwrap();
        for _ in 0..5 {
            let step = Step::random(&mut random, 10);
            let found = run(&rig, &plan, &step, &[], step.tokens.len() * 48);
            assert_close(&found, &embed(&values, &step.tokens, 48), &format!("EMBED, dtype {dtype}"));
        }
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let rig = Rig::open(&[]);
    let weight = rig.weight(DT_F16, 3, 4, vec![0; 24]).unwrap();
    let blob = program(|b| {
        let (w, y) = (b.weight(0, DT_F16, &[3, 4]), b.activation(DT_F32, &[DIM_TOKENS, 4]));
        b.op(OpSpec { kind: OP_EMBED, inputs: &[Some(w)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    });
    let (plan, queue) = (rig.plan(&blob, &[&weight]).unwrap(), rig.queue().unwrap());
    let mut step = Step::random(&mut Rng::with_seed(4), 3);
    *step.tokens.last_mut().unwrap() = 3;
    let refused = queue.run(&plan, &step.arrays(), &[], &mut Arena::new(32)).unwrap_err();
    assert_eq!(refused.status, E_INVALID);
    assert!(refused.message.contains("token 3"), "{}", refused.message);
}

#[test]
fn rms_norm_scales_rows_with_and_without_gain_and_residual() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(2));
    let gains = singles(&mut random, 24);
    let gain = rig.weight(DT_F32, 1, 24, bytes(&gains)).unwrap();
    for (with_gain, with_residual) in [(false, false), (true, false), (false, true), (true, true)] {
        let blob = program(|b| {
            // x is the middle of wider rows.
            let wide_row = b.input(DT_F32, &[DIM_TOKENS, 40]);
            let x = b.view(wide_row, 8, &[DIM_TOKENS, 24], &[40]);
            let r = b.input(DT_F32, &[DIM_TOKENS, 24]);
            let w = b.weight(0, DT_F32, &[24]);
            let y = b.activation(DT_F32, &[DIM_TOKENS, 24]);
            let sum = b.activation(DT_F32, &[DIM_TOKENS, 24]);
            let inputs = [Some(x), with_gain.then_some(w), with_residual.then_some(r)];
            let outputs = [Some(y), with_residual.then_some(sum)];
            let f = [0.01, 0.0, 0.0, 0.0];
            b.op(OpSpec { kind: OP_RMS_NORM, inputs: &inputs, outputs: &outputs, f, ..OpSpec::default() });
            b.mark_output(y);
            b.mark_output(sum);
        });
        let plan = rig.plan(&blob, &[&gain]).unwrap();
        let step = Step::random(&mut random, 10);
        let n = step.tokens.len();
        // Arenas begin tensors at multiples of 16 values.
        let (second, n_out) = ((n * 40).next_multiple_of(16), (n * 24).next_multiple_of(16));
        let input = singles(&mut random, second + n * 24);
        let found = run(&rig, &plan, &step, &input, n_out + n * 24);
        let x: Vec<f64> = wide(&input[..n * 40]).chunks(40).flat_map(|row| row[8..32].to_vec()).collect();
        let x = if with_residual { add(&x, &wide(&input[second..])) } else { x };
        let expected = rms_norm(&x, with_gain.then_some(&wide(&gains)[..]), 24, 0.01);
        assert_close(&found[..n * 24], &expected, &format!("RMS_NORM, gain {with_gain}, residual {with_residual}"));
        if with_residual {
            assert_close(&found[n_out..], &x, "its sum");
        }
    }
}

#[test]
fn linear_multiplies_every_row() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(3));
    let cases = [(1, 1, false), (4, 32, true), (7, 33, true), (129, 8, false)];
    for (dtype, (outputs, cols, with_bias)) in [DT_F16, DT_F32].into_iter().flat_map(|d| cases.map(|case| (d, case))) {
        let (data, values) = matrix(&mut random, dtype, outputs * cols);
        let weight = rig.weight(dtype, outputs as u64, cols as u64, data).unwrap();
        let biases = singles(&mut random, outputs);
        let bias = rig.weight(DT_F32, 1, outputs as u64, bytes(&biases)).unwrap();
        let (o, c) = (i32::try_from(outputs).unwrap(), i32::try_from(cols).unwrap());
        let blob = program(|b| {
            let row = b.input(DT_F32, &[DIM_TOKENS, c + 3]);
            let x = b.view(row, 3, &[DIM_TOKENS, c], &[c + 3]);
            let (w, bias) = (b.weight(0, dtype, &[o, c]), b.weight(1, DT_F32, &[o]));
            let y = b.activation(DT_F32, &[DIM_TOKENS, o]);
            let inputs = [Some(x), Some(w), with_bias.then_some(bias)];
            b.op(OpSpec { kind: OP_LINEAR, inputs: &inputs, outputs: &[Some(y)], ..OpSpec::default() });
            b.mark_output(y);
        });
        let plan = rig.plan(&blob, &[&weight, &bias]).unwrap();
        let step = Step::random(&mut random, 10);
        let input = singles(&mut random, step.tokens.len() * (cols + 3));
        let found = run(&rig, &plan, &step, &input, step.tokens.len() * outputs);
        let x: Vec<f64> = wide(&input).chunks(cols + 3).flat_map(|row| row[3..].to_vec()).collect();
        let expected = linear(&x, &values, with_bias.then_some(&wide(&biases)[..]), cols);
        assert_close(&found, &expected, &format!("LINEAR [{outputs}, {cols}], dtype {dtype}"));
    }
}

#[test]
fn add_takes_views_of_three_dimensions() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(5));
    let blob = program(|b| {
        let x = b.input(DT_F32, &[DIM_TOKENS, 24]);
        // Heads of 5 values, 12 apart; and the same row cut otherwise.
        let a = b.view(x, 1, &[DIM_TOKENS, 2, 5], &[24, 12]);
        let c = b.view(x, 7, &[DIM_TOKENS, 2, 5], &[24, 6]);
        let y = b.activation(DT_F32, &[DIM_TOKENS, 2, 5]);
        b.op(OpSpec { kind: OP_ADD, inputs: &[Some(a), Some(c)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    });
    let plan = rig.plan(&blob, &[]).unwrap();
    let step = Step::random(&mut random, 10);
    let input = singles(&mut random, step.tokens.len() * 24);
    let found = run(&rig, &plan, &step, &input, step.tokens.len() * 10);
    let row = |row: &[f64]| {
        let at = |h: usize, i: usize| row[1 + h * 12 + i] + row[7 + h * 6 + i];
        (0..2).flat_map(|h| (0..5).map(move |i| (h, i))).map(|(h, i)| at(h, i)).collect::<Vec<_>>()
    };
    let expected: Vec<f64> = wide(&input).chunks(24).flat_map(row).collect();
    assert_close(&found, &expected, "ADD");
}

#[test]
fn gather_rows_takes_the_rows_that_need_logits_and_none_of_none() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(6));
    let blob = program(|b| {
        let (x, y) = (b.input(DT_F32, &[DIM_TOKENS, 6]), b.activation(DT_F32, &[DIM_LOGITS, 6]));
        b.op(OpSpec { kind: OP_GATHER_ROWS, inputs: &[Some(x)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    });
    let plan = rig.plan(&blob, &[]).unwrap();
    for i in 0..6 {
        let mut step = Step::random(&mut random, 10);
        if i == 0 {
            step.rows.clear();
        }
        let input = singles(&mut random, step.tokens.len() * 6);
        let found = run(&rig, &plan, &step, &input, step.rows.len() * 6);
        assert_close(&found, &gather(&wide(&input), &step.rows, 6), "GATHER_ROWS");
    }
}

#[test]
fn a_tensor_keeps_its_values_until_it_is_last_read() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(8));
    let blob = program(|b| {
        let x = b.input(DT_F32, &[DIM_TOKENS, 7]);
        let [double, triple, six, all] = [0; 4].map(|_| b.activation(DT_F32, &[DIM_TOKENS, 7]));
        for (left, right, y) in [(x, x, double), (double, x, triple), (triple, triple, six), (six, double, all)] {
            b.op(OpSpec { kind: OP_ADD, inputs: &[Some(left), Some(right)], outputs: &[Some(y)], ..OpSpec::default() });
        }
        b.mark_output(all);
    });
    let plan = rig.plan(&blob, &[]).unwrap();
    let step = Step::random(&mut random, 10);
    let input = singles(&mut random, step.tokens.len() * 7);
    let found = run(&rig, &plan, &step, &input, input.len());
    let expected: Vec<f64> = wide(&input).iter().map(|x| 8.0 * x).collect();
    assert_close(&found, &expected, "8 x");
}
