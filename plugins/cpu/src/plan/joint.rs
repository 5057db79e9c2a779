//! Which operators run together? Products that read the same rows: the team parts once for all of them.
//!
//! A lone token's product is a few microseconds of reading for each thread, and what begins and ends it costs as much
//! as a small one takes. So the projections of a layer that read the same tensor run as one, at the place of the first.

use sparsed_abi::{NO_TENSOR, OP_LINEAR, OP_MOE_LINEAR, Program, SpdOp, T_VIEW};

/// Operators by number, in the order in which they run. Those of an entry run together; most are alone.
pub(super) fn order(program: &Program) -> Vec<Vec<usize>> {
    let ops = program.ops();
    let mut is_taken = vec![false; ops.len()];
    let mut order = Vec::with_capacity(ops.len());
    for first in 0..ops.len() {
        if is_taken[first] {
            continue;
        }
        let mut entry = vec![first];
        let reads_on = |later: &usize| !overwrites(program, &ops[*later], &ops[first]);
        let is_product = matches!(ops[first].kind, OP_LINEAR | OP_MOE_LINEAR);
        if is_product && reads_on(&first) {
            for later in (first + 1..ops.len()).take_while(reads_on) {
                if reads_alike(&ops[first], &ops[later]) && !is_taken[later] && may_come_to(program, first, later) {
                    is_taken[later] = true;
                    entry.push(later);
                }
            }
        }
        order.push(entry);
    }
    order
}

/// The tensor itself, or the one that it is a view of.
pub(crate) fn owner(program: &Program, id: u32) -> usize {
    let tensor = &program.tensors()[id as usize];
    if tensor.kind == T_VIEW { tensor.bind as usize } else { id as usize }
}

/// True when both are products of the same rows, rounded alike.
fn reads_alike(a: &SpdOp, b: &SpdOp) -> bool {
    let experts = |op: &SpdOp| (op.kind == OP_MOE_LINEAR).then_some(op.inputs[2]);
    a.kind == b.kind && a.inputs[0] == b.inputs[0] && experts(a) == experts(b) && a.i == b.i
}

/// True when after `op` something that `product` reads is another thing.
fn overwrites(program: &Program, op: &SpdOp, product: &SpdOp) -> bool {
    product.inputs.iter().any(|&id| has(program, &op.outputs, id))
}

/// True when nothing from `first` on, and before `later`, reads or writes what `later` writes.
fn may_come_to(program: &Program, first: usize, later: usize) -> bool {
    let ops = program.ops();
    let touches = |op: &SpdOp, id: u32| has(program, &op.inputs, id) || has(program, &op.outputs, id);
    ops[later].outputs.iter().all(|&id| !ops[first..later].iter().any(|op| touches(op, id)))
}

/// True when one of `ids` is the tensor `id`, a view of it, or what it is a view of.
fn has(program: &Program, ids: &[u32], id: u32) -> bool {
    let known = |&&other: &&u32| other != NO_TENSOR && id != NO_TENSOR;
    ids.iter().filter(known).any(|&other| owner(program, other) == owner(program, id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{DIM_TOKENS, DT_F32, DT_Q8_0, OP_ADD, OP_SILU_MUL, OpSpec, ProgramBuilder, TensorId};

    const WIDTH: i32 = 64;

    /// Operators over rows that are all alike: which kind, what it reads, what it writes.
    #[derive(Default)]
    struct Bench {
        builder: ProgramBuilder,
    }

    impl Bench {
        fn rows(&mut self) -> TensorId {
            self.builder.activation(DT_F32, &[DIM_TOKENS, WIDTH])
        }

        fn input(&mut self) -> TensorId {
            self.builder.input(DT_F32, &[DIM_TOKENS, WIDTH])
        }

        fn op(&mut self, kind: u32, inputs: &[TensorId], output: TensorId, rounding: i32) {
            let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
            let i = [rounding, 0, 0, 0, 0, 0];
            let spec = OpSpec { kind, inputs: &inputs, outputs: &[Some(output)], layer: 0, i, f: [0.0; 4] };
            self.builder.op(spec);
        }

        fn linear(&mut self, x: TensorId, y: TensorId, rounding: i32) {
            let weight = self.builder.weight(0, DT_Q8_0, &[WIDTH, WIDTH]);
            self.op(OP_LINEAR, &[x, weight], y, rounding);
        }

        fn order(self) -> Vec<Vec<usize>> {
            order(&Program::parse(self.builder.finish(0).as_bytes()).unwrap())
        }
    }

    #[test]
    fn products_of_the_same_rows_run_together_and_others_alone() {
        let mut bench = Bench::default();
        let x = bench.input();
        let [a, b, c, d, e, f] = std::array::from_fn(|_| bench.rows());
        bench.linear(x, a, 2);
        bench.op(OP_ADD, &[a, x], b, 0);
        bench.linear(x, c, 2);
        bench.linear(x, d, 1); // other codes
        bench.linear(b, e, 2); // other rows
        bench.op(OP_SILU_MUL, &[c, d], f, 0);
        bench.linear(x, a, 2); // `a` was read
        assert_eq!(bench.order(), [vec![0, 2], vec![1], vec![3], vec![4], vec![5], vec![6]]);
    }

    #[test]
    fn a_product_does_not_pass_what_changes_its_rows_or_touches_its_output() {
        let mut bench = Bench::default();
        let input = bench.input();
        let [x, a, b, c, d] = std::array::from_fn(|_| bench.rows());
        bench.op(OP_ADD, &[input, input], x, 0);
        bench.linear(x, a, 2);
        bench.op(OP_ADD, &[a, a], b, 0);
        bench.linear(x, b, 2); // what is in `b` would be overwritten
        bench.op(OP_ADD, &[b, b], x, 0);
        bench.linear(x, c, 2); // another x
        let part = bench.builder.view(c, 0, &[DIM_TOKENS, 32], &[WIDTH]);
        bench.op(OP_ADD, &[part, part], d, 0);
        bench.linear(x, c, 2); // a part of `c` was read
        assert_eq!(bench.order(), (0..8).map(|op| vec![op]).collect::<Vec<_>>());
    }
}
