//! How does one program become a comparison? A program under construction with its weights, then a plan that runs.

use crate::rig::{Arena, Fault, Plan, Pool, Queue, RunParts, Session, Weight, call, entry};
use crate::step::Step;
use crate::verdict::{Wrong, ensure, skip};
use sparsed_abi::{
    ARENA_ALIGN, Blob, DIM_LOGITS, DIM_SEQS, DIM_TOKENS, DT_F32, DT_I32, E_UNSUPPORTED, OpSpec, ProgramBuilder,
    SpdBucket, TensorId, op_name,
};
use sparsed_quant::{Format, decode, encode, encode_row};
use std::rc::Rc;

/// Normalised mean squared error of class F in OPS.md.
pub(crate) const CLASS_F: f64 = 1e-7;
/// Of class Q.
pub(crate) const CLASS_Q: f64 = 5e-3;

/// A weight and the numbers it stands for.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) format: Format,
    pub(crate) batch: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: Vec<u8>,
    /// `[batch, rows, cols]`, decoded.
    pub(crate) values: Vec<f64>,
}

impl Matrix {
    /// Random values as the format stores them.
    pub(crate) fn random(rng: &mut fastrand::Rng, format: Format, (batch, rows, cols): (usize, usize, usize)) -> Self {
        let n = batch * rows * cols;
        let bytes = if format.is_encoded() {
            stored(format, &floats(rng, n))
        } else {
            random_blocks(rng, format, n / format.block_values())
        };
        let mut values = vec![0.0; n];
        decode(format, &bytes, &mut values).expect("whole blocks");
        Self { format, batch, rows, cols, bytes, values: wide(&values) }
    }

    /// A vector of f32.
    pub(crate) fn vector(rng: &mut fastrand::Rng, n: usize) -> Self {
        Self::random(rng, Format::F32, (1, 1, n))
    }

    /// Row `row` of matrix `batch`.
    pub(crate) fn row(&self, batch: usize, row: usize) -> &[f64] {
        let at = (batch * self.rows + row) * self.cols;
        &self.values[at..at + self.cols]
    }

    pub(crate) fn upload(&self, session: &Session) -> Result<Weight, Fault> {
        let batch = u32::try_from(self.batch).expect("a handful");
        session.weight(self.format.ggml_id(), (batch, self.rows as u64, self.cols as u64), &self.bytes)
    }
}

/// `values` as `format` stores them.
pub(crate) fn stored(format: Format, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; format.row_bytes(values.len()).expect("whole blocks")];
    encode(format, values, &mut bytes).expect("the lengths fit");
    bytes
}

/// Rows of `width` values as `format` stores them: a row of W16 or F8_128 has powers of two of its own.
pub(crate) fn stored_rows(format: Format, width: usize, values: &[f32]) -> Vec<u8> {
    let stored = |row: &[f32]| {
        let mut bytes = vec![0; format.row_bytes(row.len()).expect("whole blocks")];
        encode_row(format, row, &mut bytes).expect("the lengths fit");
        bytes
    };
    values.chunks(width.max(1)).flat_map(stored).collect()
}

/// Blocks of a format that nothing here encodes: any codes, and scales that keep values near 1.
fn random_blocks(rng: &mut fastrand::Rng, format: Format, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n * format.block_bytes()];
    rng.fill(&mut bytes);
    let scales: &[usize] = match format {
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        match format {
            Format::MXFP4 => block[0] = rng.u8(120..126), // a power of two below 1
            Format::F8E4M3 => block.iter_mut().for_each(|code| *code &= 0xbf), // up to 1.9, no NaN
            _ => scales.iter().for_each(|&at| block[at + 1] = 0x1c + rng.u8(0..8)), // an f16 of 0.004 to 0.03
        }
    }
    bytes
}

/// `n` values in -1..1.
pub(crate) fn floats(rng: &mut fastrand::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

/// For the oracle.
pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Values of an INPUT or OUTPUT tensor as they lie in the arena: f32 or i32, 4 bytes each.
pub(crate) type Words = Vec<u32>;

pub(crate) fn words(values: &[f32]) -> Words {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn int_words(values: &[i32]) -> Words {
    values.iter().map(|value| value.cast_unsigned()).collect()
}

pub(crate) fn as_floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&word| f32::from_bits(word)).collect()
}

pub(crate) fn as_ints(words: &[u32]) -> Vec<i32> {
    words.iter().map(|word| word.cast_signed()).collect()
}

/// A tensor in an arena.
#[derive(Clone, Copy, Debug)]
struct Port {
    dim0: i32,
    /// Values in one step of dim 0.
    row: usize,
}

impl Port {
    fn new(dims: &[i32]) -> Self {
        Self { dim0: dims[0], row: dims[1..].iter().map(|&n| n.unsigned_abs() as usize).product() }
    }

    fn values(self, step: &Step) -> usize {
        let rows = match self.dim0 {
            DIM_TOKENS => step.tokens.len(),
            DIM_SEQS => step.contexts.len(),
            DIM_LOGITS => step.rows.len(),
            n => n.unsigned_abs() as usize,
        };
        rows * self.row
    }
}

/// A program under construction.
#[derive(Debug)]
pub(crate) struct Case<'s> {
    session: &'s Session,
    pub(crate) builder: ProgramBuilder,
    weights: Vec<Rc<Weight>>,
    pool: Option<Rc<Pool>>,
    kinds: Vec<u32>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl<'s> Case<'s> {
    pub(crate) fn new(session: &'s Session) -> Self {
        Self {
            session,
            builder: ProgramBuilder::new(),
            weights: Vec::new(),
            pool: None,
            kinds: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// The program reads and writes this pool.
    pub(crate) fn with_pool(session: &'s Session, pool: &Rc<Pool>) -> Self {
        Self { pool: Some(Rc::clone(pool)), ..Self::new(session) }
    }

    /// Binds this weight in the next slot.
    pub(crate) fn bound_to(mut self, weight: Weight) -> Self {
        self.weights.push(Rc::new(weight));
        self
    }

    pub(crate) fn input(&mut self, dims: &[i32]) -> TensorId {
        self.inputs.push(Port::new(dims));
        self.builder.input(DT_F32, dims)
    }

    pub(crate) fn input_ids(&mut self, dims: &[i32]) -> TensorId {
        self.inputs.push(Port::new(dims));
        self.builder.input(DT_I32, dims)
    }

    pub(crate) fn output(&mut self, dims: &[i32]) -> TensorId {
        self.output_of(DT_F32, dims)
    }

    pub(crate) fn output_ids(&mut self, dims: &[i32]) -> TensorId {
        self.output_of(DT_I32, dims)
    }

    fn output_of(&mut self, dtype: u32, dims: &[i32]) -> TensorId {
        self.outputs.push(Port::new(dims));
        let id = self.builder.activation(dtype, dims);
        self.builder.mark_output(id);
        id
    }

    /// Uploads the matrix and binds it.
    pub(crate) fn weight(&mut self, matrix: &Matrix) -> Result<TensorId, Fault> {
        let slot = u32::try_from(self.weights.len()).expect("a handful");
        self.weights.push(Rc::new(matrix.upload(self.session)?));
        let n = |n: usize| i32::try_from(n).expect("weights of checks are small");
        let (batch, rows, cols) = (n(matrix.batch), n(matrix.rows), n(matrix.cols));
        let dtype = matrix.format.ggml_id();
        Ok(if batch > 1 {
            self.builder.weight(slot, dtype, &[batch, rows, cols])
        } else if rows > 1 {
            self.builder.weight(slot, dtype, &[rows, cols])
        } else {
            self.builder.weight(slot, dtype, &[cols])
        })
    }

    pub(crate) fn op(&mut self, spec: OpSpec<'_>) {
        self.kinds.push(spec.kind);
        self.builder.op(spec);
    }

    /// The bound weights, in order of their slots.
    pub(crate) fn bound(&self) -> Vec<Rc<Weight>> {
        self.weights.clone()
    }

    pub(crate) fn blob(&self) -> Blob {
        self.builder.finish(u32::from(self.pool.is_some()))
    }

    /// Compiles for steps up to the largest of these; skips the check when the plugin says that it lacks an operator.
    pub(crate) fn compile(self, steps: &[&Step]) -> Result<Ready<'s>, Wrong> {
        let blob = self.blob();
        for (index, &kind) in (0u32..).zip(&self.kinds) {
            if let Some(lack) = self.lack(&blob, index)? {
                return skip(format!("{}: {lack}", op_name(kind)));
            }
        }
        let most = |n: fn(&Step) -> usize| {
            let most = steps.iter().map(|step| n(step)).max().unwrap_or(0).max(1);
            u32::try_from(most).expect("steps of checks are small")
        };
        let bucket = SpdBucket {
            max_tokens: most(|step| step.tokens.len()),
            max_seqs: most(|step| step.contexts.len()),
            max_logits: most(|step| step.rows.len()),
            max_context: most(|step| step.contexts.iter().max().map_or(0, |&n| n as usize)),
        };
        let plan = self.session.compile(&blob, self.weights, self.pool.as_ref(), bucket)?;
        Ok(Ready { session: self.session, plan, inputs: self.inputs, outputs: self.outputs })
    }

    /// Whether the plugin has all of the operators.
    pub(crate) fn is_supported(&self) -> Result<bool, Fault> {
        let blob = self.blob();
        let mut lacks = (0u32..).zip(&self.kinds).map(|(index, _)| self.lack(&blob, index));
        lacks.try_fold(true, |all, lack| Ok(all && lack?.is_none()))
    }

    /// Why the plugin does not have operator `index`, if it says so.
    fn lack(&self, blob: &Blob, index: u32) -> Result<Option<Fault>, Fault> {
        let supports = entry!(self.session.api(), supports);
        let answer = call("supports", |e| {
            let bytes = blob.as_bytes();
            // SAFETY: a living device; the blob lives through the call.
            unsafe { supports(self.session.device.raw, bytes.as_ptr().cast(), bytes.len() as u64, index, e) }
        });
        match answer {
            Err(fault) if fault.status == E_UNSUPPORTED => Ok(Some(fault)),
            other => other.map(|()| None),
        }
    }
}

/// A compiled case.
#[derive(Debug)]
pub(crate) struct Ready<'s> {
    session: &'s Session,
    pub(crate) plan: Plan,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl Ready<'_> {
    /// Runs a step; `inputs` and the answer are in order of the tensors.
    pub(crate) fn run(&self, step: &Step, inputs: &[&[u32]]) -> Result<Vec<Words>, Wrong> {
        self.run_on(&self.session.queue, step, inputs)
    }

    pub(crate) fn run_on(&self, queue: &Queue, step: &Step, inputs: &[&[u32]]) -> Result<Vec<Words>, Wrong> {
        let (input, mut output) = (self.input_arena(step, inputs), self.output_arena(step));
        let blob = step.encode();
        queue.run(&self.plan, RunParts { step: &blob, input: &input, output: &mut output, cancel: None })?;
        ensure!(output.is_guarded(), "bytes past the end of the output arena were written");
        Ok(self.outputs_in(step, &output))
    }

    /// The inputs as the plugin reads them; what lies between tensors is NaN.
    pub(crate) fn input_arena(&self, step: &Step, inputs: &[&[u32]]) -> Arena {
        let (offsets, length) = arena(&self.inputs, step);
        let mut arena = Arena::filled(length, 0xff);
        assert_eq!(inputs.len(), self.inputs.len(), "a check gives every input");
        for ((values, port), at) in inputs.iter().zip(&self.inputs).zip(offsets) {
            assert_eq!(values.len(), port.values(step), "a check gives whole inputs");
            for (to, word) in arena.bytes_mut()[at..].chunks_exact_mut(4).zip(*values) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
        arena
    }

    /// Room for the outputs, all NaN.
    pub(crate) fn output_arena(&self, step: &Step) -> Arena {
        Arena::filled(arena(&self.outputs, step).1, 0xff)
    }

    pub(crate) fn outputs_in(&self, step: &Step, output: &Arena) -> Vec<Words> {
        let offsets = arena(&self.outputs, step).0;
        let one = |(port, at): (&Port, usize)| {
            let bytes = &output.bytes()[at..at + port.values(step) * 4];
            bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
        };
        self.outputs.iter().zip(offsets).map(one).collect()
    }
}

/// Where each tensor begins, and the arena's length, in bytes.
fn arena(ports: &[Port], step: &Step) -> (Vec<usize>, usize) {
    let (mut offsets, mut at) = (Vec::new(), 0usize);
    for port in ports {
        at = at.next_multiple_of(ARENA_ALIGN);
        offsets.push(at);
        at += port.values(step) * 4;
    }
    (offsets, at)
}

/// Fails unless `found` is `expected` within `class`; `what` says which case it is.
pub(crate) fn close(class: f64, what: &str, found: &[u32], expected: &[f64]) -> Result<(), Wrong> {
    let found = as_floats(found);
    assert_eq!(found.len(), expected.len(), "the oracle has a value for each");
    if let Some(at) = found.iter().position(|value| !value.is_finite()) {
        return Err(Wrong::Failed(format!("{what}: value {at} is {}, {} is right", found[at], expected[at])));
    }
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(expected).map(|(&f, &e)| square(f64::from(f) - e)).sum();
    let size: f64 = expected.iter().map(|&e| square(e)).sum();
    let nmse = if error == 0.0 { 0.0 } else { error / size.max(f64::MIN_POSITIVE) };
    let off = |at: &usize| (f64::from(found[*at]) - expected[*at]).abs();
    let worst = (0..found.len()).max_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or(0);
    ensure!(
        nmse <= class,
        "{what}: normalised mean squared error {nmse:.2e}, {class:.0e} is allowed; worst at value {worst}: {} instead \
         of {}",
        found[worst],
        expected[worst]
    );
    Ok(())
}
