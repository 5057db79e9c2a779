//! The plain C example, `abi/examples/minimal.c`: it answers as the CPU plugin and the references do, it chats, and
//! what the Rust reader of programs and steps refuses, its reader refuses too.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use fastrand::Rng;
use sparsed_abi::{
    Blob, DIM_LOGITS, DIM_TOKENS, DT_F16, DT_F32, DT_I32, E_INVALID, E_NOMEM_DEVICE, E_UNSUPPORTED, KV_COPY,
    KV_DISCARD, KV_EXPORT, KV_IMPORT, KV_TO_SLOW, OP_EMBED, OP_GATHER_ROWS, OP_HADAMARD, OP_IDX_APPEND, OP_IDX_TOPK,
    OP_KV_APPEND, OP_LINEAR, OP_MOE_COMBINE, OP_MOE_LINEAR, OP_MOE_ROUTE, OP_RMS_NORM, OP_ROPE, OP_SILU_MUL,
    OP_SPARSE_MLA, OpSpec, Program, ProgramBuilder, SpdBucket, SpdKvOp, SpdRow, StepArrays, TensorId,
};
use sparsed_backend::{Backend, KvDesc, KvPool, OpenOptions, Plan, Plugin, SearchPath, Weight, WeightUpload};
use sparsed_tests::default_model::{TOLERANCE, VOCAB, argmax, golden};
use sparsed_tests::{logits, model, sparsectl, tiny::Tiny, worst};
use std::collections::BTreeMap;
use std::process::Command;

/// Bytes that the device of the mutation tests may hold, and that an arena there may have.
const SMALL: u64 = 16 << 20;
/// Mutations tried.
const ROUNDS: usize = 20_000;

#[test]
fn a_short_prompt_of_the_default_model_gets_the_cpu_plugins_logits_and_selections() {
    let ids = &golden::<u32>("ids")[..24];
    let path = model("smollm2-135m-dsa.gguf");
    let [cpu, own] = ["cpu", "minimal"]
        .map(|plugin| logits(&path, ids, true, &["--act", "f32", "--top-k", "8", "--plugin", plugin]));
    let largest = worst(&cpu.logits, &own.logits);
    assert!(largest < TOLERANCE, "logits differ by {largest}");
    let argmaxes = |logits: &[f32]| logits.chunks_exact(VOCAB).map(argmax).collect::<Vec<_>>();
    assert_eq!(argmaxes(&own.logits), argmaxes(&cpu.logits));
    assert_eq!(own.selections, cpu.selections);
}

#[test]
fn tiny_models_with_experts_get_what_hugging_face_answers() {
    for name in ["v32", "v3", "v2"] {
        let tiny = Tiny::open(name);
        let sparse = !tiny.selections.is_empty();
        for chunk in ["256", "7"] {
            let extra = ["--act", "f32", "--plugin", "minimal", "--chunk", chunk];
            let answer = logits(&tiny.gguf(), &tiny.ids, sparse, &extra);
            let largest = worst(&answer.logits, &tiny.logits_of_gguf);
            assert!(largest < sparsed_tests::tiny::TOLERANCE, "{name} in chunks of {chunk}: differs by {largest}");
            assert_eq!(tiny.other_selections(&answer.selections), 0, "{name} in chunks of {chunk}");
        }
    }
}

#[test]
fn it_chats() {
    let mut command = Command::new(sparsectl());
    command.arg("run").arg(model("smollm2-135m-dsa.gguf")).arg("What is the capital of France?");
    let done = command.args(["--plugin", "minimal", "--temperature", "0"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "The capital of France is Paris.");
}

/// The open example, a program that uses most operators, and what it is bound to.
struct Bench {
    backend: Backend,
    weights: Vec<Weight>,
    pool: KvPool,
    blob: Blob,
}

const BUCKET: SpdBucket = SpdBucket { max_tokens: 4, max_seqs: 2, max_logits: 2, max_context: 24 };
const STEP: StepArrays<'static> = StepArrays {
    step_id: 1,
    flags: 0,
    tokens: &[5, 6, 9],
    positions: &[0, 1, 9],
    slots: &[0, 1, 17],
    seq_offsets: &[0, 2, 3],
    contexts: &[2, 10],
    block_offsets: &[0, 1, 3],
    block_ids: &[0, 1, 2],
    rows: &[1, 2],
};

impl Bench {
    fn open() -> Self {
        let dir = sparsed_tests::root().join("target/release/plugins");
        let scan = SearchPath::only(vec![dir]).scan();
        let plugin = Plugin::load(scan.select(Some("minimal")).unwrap(), &BTreeMap::new()).unwrap();
        let backend = Backend::open(&plugin, 0, &OpenOptions { mem_budget: SMALL, ..OpenOptions::default() }).unwrap();
        let mut random = Rng::with_seed(3);
        let shapes = [(1, 16, 8), (4, 8, 8)];
        let weights = shapes.map(|(batch, rows, cols)| {
            let values = (0..batch as usize * rows as usize * cols as usize).map(|_| random.f32() - 0.5);
            let bytes = values.flat_map(f32::to_le_bytes).collect::<Vec<_>>().into();
            backend
                .upload(&WeightUpload { name: "w".to_owned(), dtype: DT_F32, batch, rows, cols, bytes, file: None })
                .unwrap()
        });
        let row = SpdRow { dtype: DT_F16, width: 8 };
        let shape =
            KvDesc { block_tokens: 8, n_blocks: 3, n_layers: 1, n_index_layers: 1, latent: row, rope: row, index: row };
        let pool = backend.create_kv(&shape, None).unwrap();
        Self { backend, weights: weights.into(), pool, blob: program() }
    }

    fn compile(&self, blob: &Blob) -> Option<Plan> {
        let weights: Vec<&Weight> = self.weights.iter().collect();
        self.backend.compile(blob, &weights, &[&self.pool], BUCKET).ok()
    }

    /// Runs the step; true when it went well.
    fn run(&self, plan: &Plan, step: &Blob) -> bool {
        let info = plan.info();
        if info.in_bytes.max(info.out_bytes) > SMALL {
            return false;
        }
        let input = vec![0x3c00_0000u32; usize::try_from(info.in_bytes.div_ceil(4)).unwrap()];
        let input: Vec<u8> = input.into_iter().flat_map(u32::to_le_bytes).collect();
        let mut input_blob = Blob::zeroed(input.len());
        input_blob.as_bytes_mut().copy_from_slice(&input);
        let mut out = Blob::zeroed(usize::try_from(info.out_bytes).unwrap());
        self.backend.queue().unwrap().run(plan, step, input_blob.as_bytes(), out.as_bytes_mut()).is_ok()
    }
}

fn program() -> Blob {
    let mut b = ProgramBuilder::new();
    let rows = |b: &mut ProgramBuilder, dims: &[i32]| b.activation(DT_F32, &[&[DIM_TOKENS], dims].concat());
    let op = |b: &mut ProgramBuilder, kind, inputs: &[TensorId], outputs: &[TensorId], i, f| {
        let some = |ids: &[TensorId]| ids.iter().copied().map(Some).collect::<Vec<_>>();
        b.op(OpSpec {
            kind,
            inputs: &some(inputs),
            outputs: &some(outputs),
            i,
            f: [f, 0.0, 0.0, 0.0],
            ..OpSpec::default()
        });
    };
    let (table, experts) = (b.weight(0, DT_F32, &[16, 8]), b.weight(1, DT_F32, &[4, 8, 8]));
    let angles = b.input(DT_F32, &[DIM_TOKENS, 4]);
    let [x, normed, key, gated, z] = [(); 5].map(|()| rows(&mut b, &[8]));
    let q = rows(&mut b, &[2, 8]);
    let (wide, logits) = (rows(&mut b, &[16]), rows(&mut b, &[4]));
    let (heads, turned, o) =
        (b.view(wide, 0, &[DIM_TOKENS, 2, 8], &[16, 8]), rows(&mut b, &[2, 8]), rows(&mut b, &[2, 8]));
    let (four, two) = (b.view(x, 2, &[DIM_TOKENS, 4], &[8]), b.view(x, 4, &[DIM_TOKENS, 2], &[8]));
    let (sel, ids) = (b.activation(DT_I32, &[DIM_TOKENS, 2]), b.activation(DT_I32, &[DIM_TOKENS, 2]));
    let (weights, routed) = (rows(&mut b, &[2]), rows(&mut b, &[2, 8]));
    let last = b.activation(DT_F32, &[DIM_LOGITS, 8]);
    let none = [0; 6];
    op(&mut b, OP_EMBED, &[table], &[x], none, 0.0);
    b.op(OpSpec {
        kind: OP_RMS_NORM,
        inputs: &[Some(x)],
        outputs: &[Some(normed)],
        f: [1e-5, 0.0, 0.0, 0.0],
        ..OpSpec::default()
    });
    op(&mut b, OP_LINEAR, &[normed, table], &[wide], none, 0.0);
    op(&mut b, OP_ROPE, &[heads, angles], &[turned], [2, 4, 1, 0, 0, 0], 0.0);
    op(&mut b, OP_HADAMARD, &[turned], &[q], none, 0.0);
    op(&mut b, OP_SILU_MUL, &[normed, x], &[key], none, 0.0);
    op(&mut b, OP_KV_APPEND, &[key, normed], &[], none, 0.0);
    op(&mut b, OP_IDX_APPEND, &[key], &[], none, 0.0);
    op(&mut b, OP_IDX_TOPK, &[q, two], &[sel], [2, 0, 0, 0, 0, 0], 0.5);
    op(&mut b, OP_SPARSE_MLA, &[q, turned, sel], &[o], [1, 0, 0, 0, 0, 0], 0.3);
    op(&mut b, OP_SILU_MUL, &[four, four], &[logits], none, 0.0);
    op(&mut b, OP_MOE_ROUTE, &[logits], &[ids, weights], [2, 2, 1, 0, 1, 0], 2.0);
    op(&mut b, OP_MOE_LINEAR, &[x, experts, ids], &[routed], none, 0.0);
    op(&mut b, OP_MOE_COMBINE, &[routed, weights, normed], &[z], none, 0.0);
    op(&mut b, OP_SILU_MUL, &[z, x], &[gated], none, 0.0);
    op(&mut b, OP_GATHER_ROWS, &[gated], &[last], none, 0.0);
    b.mark_output(last);
    b.mark_output(o);
    b.finish(1)
}

/// Changes one to three words to numbers that are likely to hurt.
fn mutate(good: &Blob, random: &mut Rng) -> Blob {
    let mut blob = good.clone();
    for _ in 0..random.usize(1..=3) {
        let at = random.usize(0..blob.as_bytes().len() / 4) * 4;
        let word = &mut blob.as_bytes_mut()[at..at + 4];
        let old = u32::from_le_bytes(word.try_into().unwrap());
        let choices = [0, 1, 2, 4, 8, 16, old ^ 1, old.wrapping_add(8), old ^ (1 << random.u32(0..32)), 1 << 30];
        let more = [u32::MAX, u32::MAX - 1, u32::MAX - 2, 0x7fff_ffff, 0x8000_0000, random.u32(..), random.u32(0..40)];
        let new = *random.choice(choices.iter().chain(&more).collect::<Vec<_>>()).unwrap();
        word.copy_from_slice(&new.to_le_bytes());
    }
    blob
}

#[test]
fn mutated_programs_are_refused_where_the_rust_reader_refuses_them_and_never_crash() {
    let bench = Bench::open();
    let step = STEP.encode();
    assert!(bench.run(&bench.compile(&bench.blob).expect("the good program"), &step), "the good step");
    let mut random = Rng::with_seed(11);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let blob = mutate(&bench.blob, &mut random);
        let readable = Program::parse(blob.as_bytes());
        match bench.compile(&blob) {
            Some(plan) => {
                assert!(readable.is_ok(), "round {round}: taken, but {readable:?}");
                taken += 1;
                bench.run(&plan, &step);
            }
            None => refused += 1,
        }
    }
    assert!(taken > ROUNDS / 50 && refused > ROUNDS / 5, "{taken} taken, {refused} refused");
    assert!(bench.run(&bench.compile(&bench.blob).expect("still the good program"), &step), "still the good step");
}

#[test]
fn mutated_steps_are_refused_where_the_rust_reader_refuses_them_and_never_crash() {
    let bench = Bench::open();
    let (plan, good) = (bench.compile(&bench.blob).expect("the good program"), STEP.encode());
    let mut random = Rng::with_seed(12);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let step = mutate(&good, &mut random);
        let total_size = u32::from_le_bytes(step.as_bytes()[64..68].try_into().unwrap());
        if total_size as usize > step.as_bytes().len() {
            continue; // a step is total_size bytes: the caller's promise
        }
        let readable = StepArrays::parse(step.as_bytes());
        if bench.run(&plan, &step) {
            assert!(readable.is_ok(), "round {round}: taken, but {readable:?}");
            taken += 1;
        } else {
            refused += 1;
        }
    }
    assert!(taken > ROUNDS / 50 && refused > ROUNDS / 5, "{taken} taken, {refused} refused");
}

#[test]
fn blocks_are_exported_imported_copied_and_discarded() {
    let bench = Bench::open();
    let plan = bench.compile(&bench.blob).unwrap();
    assert!(bench.run(&plan, &STEP.encode()));
    let image = usize::try_from(bench.pool.info().image_bytes).unwrap();
    assert_eq!(image, 8 * (16 + 16 + 16), "eight tokens with three rows of eight f16 values");
    let mut queue = bench.backend.queue().unwrap();
    let mut kv = |ops: &[SpdKvOp], host: &mut [u8]| queue.kv(&bench.pool, ops, host).map_err(|error| error.status());
    let op = |kind, src_block, dst_block| SpdKvOp { kind, src_block, dst_block, ..SpdKvOp::default() };
    let mut host = vec![0; 2 * image];
    kv(&[op(KV_EXPORT, 0, 0)], &mut host).unwrap();
    let exported = host[..image].to_vec();
    assert!(exported[..32].iter().any(|&byte| byte != 0) && exported[32..128].iter().all(|&byte| byte == 0));
    let second = SpdKvOp { host_offset: image as u64, ..op(KV_EXPORT, 1, 0) };
    kv(&[op(KV_IMPORT, 0, 1), second], &mut host).unwrap();
    assert_eq!(host[image..], exported);
    kv(&[op(KV_DISCARD, 0, 1), second], &mut host).unwrap();
    assert!(host[image..].iter().all(|&byte| byte == 0));
    kv(&[SpdKvOp { n_tokens: 1, ..op(KV_COPY, 0, 1) }, second], &mut host).unwrap();
    let mut first_token = vec![0; image];
    for range in [0..16, 128..160] {
        first_token[range.clone()].copy_from_slice(&exported[range]);
    }
    assert_eq!(host[image..], first_token);
    // Nothing of a list is done when one of it is wrong.
    let past = SpdKvOp { host_offset: image as u64 + 1, ..op(KV_EXPORT, 0, 0) };
    for (wrong, status) in [
        (op(KV_DISCARD, 0, 3), E_INVALID),
        (op(KV_EXPORT, 3, 0), E_INVALID),
        (SpdKvOp { n_tokens: 9, ..op(KV_COPY, 0, 2) }, E_INVALID),
        (past, E_INVALID),
        (SpdKvOp { host_offset: u64::MAX, ..past }, E_INVALID),
        (op(KV_TO_SLOW, 0, 0), E_UNSUPPORTED),
        (op(7, 0, 0), E_UNSUPPORTED),
    ] {
        assert_eq!(kv(&[op(KV_DISCARD, 0, 1), wrong], &mut host), Err(Some(status)), "{wrong:?}");
    }
    kv(&[second], &mut host).unwrap();
    assert_eq!(host[image..], first_token);
}

#[test]
fn the_budget_is_kept_and_what_was_held_is_given_back() {
    let bench = Bench::open();
    let backend = bench.backend.clone();
    let used = || backend.memory().map(|m| [m.used_weights, m.used_kv, m.used_workspace]).unwrap();
    let plan = bench.compile(&bench.blob);
    assert!(used().iter().all(|&bytes| bytes > 0), "{:?}", used());
    let held = used();
    let (rows, bytes) = (SMALL / 4, vec![0; usize::try_from(SMALL).unwrap()].into());
    let large = WeightUpload { name: "large".to_owned(), dtype: DT_F32, batch: 1, rows, cols: 1, bytes, file: None };
    assert_eq!(backend.upload(&large).unwrap_err().status(), Some(E_NOMEM_DEVICE));
    assert_eq!(used(), held);
    drop((plan, bench));
    assert_eq!(used(), [0; 3]);
}
