//! L1: are programs read as `plugin.h` lays them out, and plans held to their buckets?

use super::{addends, adder, adds, refused};
use crate::case::{Case, Matrix};
use crate::child::Context;
use crate::rig::{Arena, Fault, Plan, RunParts, Session, call, entry, struct_size};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::{
    Blob, COMPILE_DRY_RUN, DIM_TOKENS, DT_Q8_0, E_ABI, E_INVALID, E_UNSUPPORTED, OP_EXT_BASE, OP_LINEAR, OP_ROPE,
    OpSpec, SpdBucket, SpdCompile, SpdOp, SpdPlanInfo, SpdProgram, SpdTensor,
};
use sparsed_quant::Format;
use std::ptr;

const PROGRAMS: &str = "plugin.h, programs";
const PLANS: &str = "plugin.h, compile and run";
const REFUSED: &[i32] = &[E_INVALID, E_UNSUPPORTED, E_ABI];

pub(crate) const RULES: &[Rule] = &[
    rule(Level::L1, "plan.dry_run", "SPD_COMPILE_DRY_RUN fills the info and creates nothing", PLANS, &[], dry_run),
    rule(Level::L1, "plan.arenas", "in_bytes and out_bytes are the largest step's arenas", PLANS, &[], arenas),
    rule(Level::L1, "plan.flags", "unknown flags of compile, run and step are refused", PLANS, &[], flags),
    rule(Level::L1, "plan.bucket", "a step beyond the plan's bucket is SPD_E_INVALID", PLANS, &[], beyond_bucket),
    rule(Level::L1, "plan.arena_short", "an arena that is too short is SPD_E_INVALID", PLANS, &[], arena_short),
    rule(Level::L1, "plan.empty_step", "a step without tokens runs", PLANS, &[], empty_step),
    rule(
        Level::L1,
        "program.stride",
        "tables with a longer stride are read, unless what is longer is set",
        PROGRAMS,
        &[],
        |context| appended(context, 0, 16),
    ),
    rule(
        Level::L1,
        "program.header",
        "a program with a longer header is read, unless what is longer is set",
        PROGRAMS,
        &[],
        |context| appended(context, 8, 0),
    ),
    rule(
        Level::L1,
        "step.header",
        "a step with a longer header is read, unless what is longer is set",
        "plugin.h, spd_step",
        &["abi.tail_nonzero"],
        step_header,
    ),
    rule(Level::L1, "program.malformed", "a program that contradicts itself is refused", PROGRAMS, &[], malformed),
    rule(
        Level::L1,
        "program.op_unknown",
        "supports and plan_compile refuse an operator that nobody has, and say which",
        PROGRAMS,
        &[],
        op_unknown,
    ),
    rule(
        Level::L1,
        "program.attribute_unknown",
        "an attribute value that OPS.md does not have is refused",
        "OPS.md, the table",
        &[],
        attribute_unknown,
    ),
];

/// For steps of up to `tokens` tokens, as many sequences and rows.
pub(crate) fn bucket(tokens: u32) -> SpdBucket {
    SpdBucket { max_tokens: tokens, max_seqs: tokens, max_logits: tokens, max_context: tokens }
}

/// What plan_compile takes for a program without weights and pools.
pub(crate) fn request(blob: &Blob, bucket: &SpdBucket) -> SpdCompile {
    SpdCompile {
        struct_size: struct_size::<SpdCompile>(),
        blob: blob.as_bytes().as_ptr().cast(),
        blob_length: blob.as_bytes().len() as u64,
        buckets: bucket,
        n_buckets: 1,
        bucket_stride: struct_size::<SpdBucket>(),
        ..SpdCompile::default()
    }
}

/// Compiles and destroys.
pub(crate) fn compile_raw(session: &Session, request: &SpdCompile) -> Result<SpdPlanInfo, Fault> {
    let (compile, mut raw) = (entry!(session.api(), plan_compile), ptr::null_mut());
    let mut info = SpdPlanInfo { struct_size: struct_size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
    // SAFETY: a living device; blob and bucket outlive the call; the structs say their sizes.
    call("plan_compile", |e| unsafe { compile(session.device.raw, request, &raw mut raw, &raw mut info, e) })?;
    if !raw.is_null() {
        // SAFETY: just created.
        unsafe { entry!(session.api(), plan_destroy)(raw) };
    }
    Ok(info)
}

/// A product with a weight that a plugin may want in another layout, if it takes weights of that format.
fn multiplier<'s>(session: &'s Session, rng: &mut fastrand::Rng) -> Result<Case<'s>, Fault> {
    const ROWS: i32 = 48;
    const COLS: i32 = 256;
    let takes = Session::has_dtype(&session.info.weight_dtypes, DT_Q8_0);
    let mut case = Case::new(session);
    let x = case.input(&[DIM_TOKENS, COLS]);
    let (format, n) = (if takes { Format::Q8_0 } else { Format::F32 }, |n: i32| n.unsigned_abs() as usize);
    let w = case.weight(&Matrix::random(rng, format, (1, n(ROWS), n(COLS))))?;
    let y = case.output(&[DIM_TOKENS, ROWS]);
    let i = [1, 0, 0, 0, 0, 0]; // activations may be rounded
    case.op(OpSpec { kind: OP_LINEAR, inputs: &[Some(x), Some(w)], outputs: &[Some(y)], i, ..OpSpec::default() });
    Ok(case)
}

fn dry_run(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let mut case = multiplier(&session, &mut rng)?;
    if !case.is_supported()? {
        case = adder(&session);
    }
    let (blob, bucket, bound) = (case.blob(), bucket(4), case.bound());
    let weights: Vec<_> = bound.iter().map(|weight| weight.raw).collect();
    let request = SpdCompile {
        flags: COMPILE_DRY_RUN,
        weights: weights.as_ptr(),
        n_weights: u32::try_from(weights.len()).expect("one or none"),
        ..request(&blob, &bucket)
    };
    let (compile, mut raw) = (entry!(session.api(), plan_compile), ptr::null_mut());
    let mut info = SpdPlanInfo { struct_size: struct_size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
    let before = session.mem_info()?;
    call("plan_compile", |e| {
        // SAFETY: as in compile_raw.
        unsafe { compile(session.device.raw, &raw const request, &raw mut raw, &raw mut info, e) }
    })?;
    ensure!(raw.is_null(), "a dry run hands out a plan");
    ensure!(info.in_bytes > 0, "a dry run does not fill spd_plan_info: in_bytes is 0");
    let after = session.mem_info()?;
    let used = |m: sparsed_abi::SpdMemInfo| m.used_weights + m.used_workspace + m.used_plans + m.used_other;
    let (before, after) = (used(before), used(after));
    ensure!(before == after, "of {before} bytes in use a dry run makes {after}");
    Ok(())
}

fn arenas(context: &Context) -> Outcome {
    let session = context.session()?;
    let (blob, bucket) = (adder(&session).blob(), bucket(5));
    let info = compile_raw(&session, &request(&blob, &bucket))?;
    // 5 rows of 8 values are 160 bytes; the second input begins at 192.
    ensure!(info.in_bytes == 352, "in_bytes of two inputs [5, 8] is {}, 352 is right", info.in_bytes);
    ensure!(info.out_bytes == 160, "out_bytes of one output [5, 8] is {}, 160 is right", info.out_bytes);
    Ok(())
}

fn flags(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let (blob, bucket) = (adder(&session).blob(), bucket(4));
    let request = SpdCompile { flags: 1 << 31, ..request(&blob, &bucket) };
    refused("spd_compile.flags = 1 << 31", compile_raw(&session, &request), REFUSED)?;
    let step = Step::without_pool(&[2]);
    let ready = adder(&session).compile(&[&step])?;
    let (a, b, _) = addends(&mut rng, 2);
    let (input, mut output) = (ready.input_arena(&step, &[&a, &b]), ready.output_arena(&step));
    for (flags, blob, name) in
        [(1 << 31, step.encode(), "spd_run"), (0, Step { flags: 1 << 31, ..step.clone() }.encode(), "spd_step")]
    {
        let mut parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        let run = sparsed_abi::SpdRun { flags, ..parts.raw() };
        refused(&format!("{name}.flags = 1 << 31"), session.queue.run_raw(&ready.plan, &run), REFUSED)?;
    }
    Ok(())
}

fn beyond_bucket(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let small = Step::without_pool(&[2, 1]);
    let ready = adder(&session).compile(&[&small])?;
    for (what, step) in [
        ("4 tokens for a plan of 3", Step::without_pool(&[4])),
        ("3 sequences for a plan of 2", Step::without_pool(&[1, 1, 1])),
    ] {
        let (a, b, _) = addends(&mut rng, step.tokens.len());
        let answer = run_status(&session, &ready.plan, &step, &ready.input_arena(&step, &[&a, &b]));
        refused(what, answer, &[E_INVALID])?;
    }
    adds(&ready, &mut rng, &small)
}

/// Runs a step with an output arena that is large enough.
fn run_status(session: &Session, plan: &Plan, step: &Step, input: &Arena) -> Result<u64, Fault> {
    let (blob, mut output) = (step.encode(), Arena::filled(4096, 0));
    session.queue.run(plan, RunParts { step: &blob, input, output: &mut output, cancel: None })
}

fn arena_short(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let step = Step::without_pool(&[3]);
    let ready = adder(&session).compile(&[&step])?;
    let (a, b, _) = addends(&mut rng, 3);
    let (input, blob) = (ready.input_arena(&step, &[&a, &b]), step.encode());
    for (what, in_length, out_length) in [("input", 223, 96), ("input", 0, 96), ("output", 224, 95), ("output", 224, 0)]
    {
        let mut output = ready.output_arena(&step);
        let mut parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        let run = sparsed_abi::SpdRun { in_length, out_length, ..parts.raw() };
        let name = format!("an {what} arena of {} bytes", if what == "input" { in_length } else { out_length });
        refused(&name, session.queue.run_raw(&ready.plan, &run), &[E_INVALID])?;
    }
    adds(&ready, &mut rng, &step)
}

fn empty_step(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let full = Step::without_pool(&[3]);
    let ready = adder(&session).compile(&[&full])?;
    for empty in [Step::without_pool(&[]), Step::without_pool(&[0])] {
        ready.run(&empty, &[&[], &[]])?;
    }
    adds(&ready, &mut rng, &full)
}

/// What a newer minor has appended.
#[derive(Clone, Copy, Debug)]
struct Appended {
    /// Bytes after the header.
    header: usize,
    /// Bytes after each element of both tables.
    element: usize,
    /// The last of the bytes after the header and after each table's first element.
    last: u8,
}

/// Where a field of the program's header is.
fn header_field(name: &str) -> usize {
    let fields = <SpdProgram as sparsed_abi::Layout>::LAYOUT.fields;
    fields.iter().find(|field| field.name == name).expect("a field of the header").offset
}

/// The blob as a newer minor would write it.
fn newer(blob: &Blob, appended: Appended) -> Blob {
    let word = |at: usize| {
        let bytes = blob.as_bytes()[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes) as usize
    };
    let append = |bytes: &mut Vec<u8>, n: usize, last: u8| {
        bytes.resize(bytes.len() + n, 0);
        if let (1.., Some(end)) = (n, bytes.last_mut()) {
            *end = last;
        }
    };
    let mut bytes = blob.as_bytes()[..size_of::<SpdProgram>()].to_vec();
    append(&mut bytes, appended.header, appended.last);
    let mut set = vec![(header_field("struct_size"), bytes.len())];
    for (table, count, size) in [("tensor", "n_tensors", size_of::<SpdTensor>()), ("op", "n_ops", size_of::<SpdOp>())] {
        let (stride, offset) = (header_field(&format!("{table}_stride")), header_field(&format!("{table}_offset")));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        set.extend([(offset, bytes.len()), (stride, size + appended.element)]);
        for i in 0..word(header_field(count)) {
            let at = word(offset) + i * size;
            bytes.extend_from_slice(&blob.as_bytes()[at..at + size]);
            append(&mut bytes, appended.element, if i == 0 { appended.last } else { 0 });
        }
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    set.push((header_field("total_size"), bytes.len()));
    for (at, value) in set {
        bytes[at..at + 4].copy_from_slice(&u32::try_from(value).expect("small").to_le_bytes());
    }
    Blob::copied(&bytes)
}

/// Fails unless the program is taken when what was appended is zero, and refused when it is not.
fn appended(context: &Context, header: usize, element: usize) -> Outcome {
    let session = context.session()?;
    let (blob, bucket) = (adder(&session).blob(), bucket(4));
    let clean = newer(&blob, Appended { header, element, last: 0 });
    compile_raw(&session, &request(&clean, &bucket))?;
    let dirty = newer(&blob, Appended { header, element, last: 1 });
    let answer = compile_raw(&session, &request(&dirty, &bucket));
    refused("a program with a field set that this ABI lacks", answer, REFUSED)
}

fn step_header(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let step = Step::without_pool(&[2]);
    let ready = adder(&session).compile(&[&step])?;
    let (a, b, sum) = addends(&mut rng, 2);
    let input = ready.input_arena(&step, &[&a, &b]);
    for last in [0, 1] {
        let (blob, mut output) = (step.encode_newer(last), ready.output_arena(&step));
        let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        let answer = session.queue.run(&ready.plan, parts);
        if last == 1 {
            refused("a step with a field set that this ABI lacks", answer, REFUSED)?;
        } else {
            answer?;
            let found = &ready.outputs_in(&step, &output)[0];
            crate::case::close(crate::case::CLASS_F, "ADD in a step with a longer header", found, &sum)?;
        }
    }
    Ok(())
}

fn malformed(context: &Context) -> Outcome {
    let session = context.session()?;
    let (good, bucket) = (adder(&session).blob(), bucket(4));
    let header = |name: &str, value: u32| {
        let at = header_field(name);
        let mut blob = good.clone();
        blob.as_bytes_mut()[at..at + 4].copy_from_slice(&value.to_le_bytes());
        blob
    };
    let bad = [
        ("magic = 0", header("magic", 0)),
        ("flags = 1", header("flags", 1)),
        ("n_tensors = 2^32 - 1", header("n_tensors", u32::MAX)),
        ("n_ops = 2^31", header("n_ops", 1 << 31)),
        ("op_offset = 2^32 - 8", header("op_offset", u32::MAX - 7)),
        ("tensor_stride = 8", header("tensor_stride", 8)),
        ("total_size past the blob", header("total_size", 1 << 20)),
        ("n_weights = 1 and none bound", header("n_weights", 1)),
        ("n_kvpools = 1 and none bound", header("n_kvpools", 1)),
        ("the second half cut off", Blob::copied(&good.as_bytes()[..good.as_bytes().len() / 2])),
    ];
    for (what, blob) in bad {
        refused(&format!("a program with {what}"), compile_raw(&session, &request(&blob, &bucket)), REFUSED)?;
    }
    Ok(())
}

fn op_unknown(context: &Context) -> Outcome {
    let session = context.session()?;
    for kind in [0, 999, OP_EXT_BASE, u32::MAX] {
        let mut case = adder(&session);
        let x = case.input(&[DIM_TOKENS, 8]);
        let y = case.output(&[DIM_TOKENS, 8]);
        case.op(OpSpec { kind, inputs: &[Some(x)], outputs: &[Some(y)], ..OpSpec::default() });
        let (blob, bucket, supports) = (case.blob(), bucket(4), entry!(session.api(), supports));
        let bytes = blob.as_bytes();
        let ask = |index: u32| {
            // SAFETY: a living device; the blob outlives the call.
            call("supports", |e| unsafe {
                supports(session.device.raw, bytes.as_ptr().cast(), bytes.len() as u64, index, e)
            })
        };
        refused(&format!("supports of operator {kind}"), ask(1), &[E_UNSUPPORTED])?;
        refused("supports of an operator past the program's last", ask(2), &[E_INVALID])?;
        let (compile, mut raw) = (entry!(session.api(), plan_compile), ptr::null_mut());
        let mut info = SpdPlanInfo { struct_size: struct_size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
        let (request, mut error) = (request(&blob, &bucket), crate::rig::fresh_error());
        // SAFETY: as in compile_raw.
        let status =
            unsafe { compile(session.device.raw, &raw const request, &raw mut raw, &raw mut info, &raw mut error) };
        ensure!(
            status == E_UNSUPPORTED,
            "plan_compile of operator {kind} answers {status}, SPD_E_UNSUPPORTED is right"
        );
        ensure!(error.op_index == 1, "spd_error.op_index is {}, operator 1 was refused", error.op_index);
    }
    Ok(())
}

fn attribute_unknown(context: &Context) -> Outcome {
    let session = context.session()?;
    let step = Step::without_pool(&[2]);
    for i in [[0, 8, 2, 0, 0, 0], [1, 8, 0, 0, 0, 0], [0, 7, 0, 0, 0, 0], [-2, 8, 0, 0, 0, 0]] {
        let mut case = Case::new(&session);
        let x = case.input(&[DIM_TOKENS, 8]);
        let angles = case.input(&[DIM_TOKENS, if i[1] == 8 { 8 } else { 7 }]);
        let y = case.output(&[DIM_TOKENS, 8]);
        let inputs = [Some(x), Some(angles)];
        case.op(OpSpec { kind: OP_ROPE, inputs: &inputs, outputs: &[Some(y)], i, ..OpSpec::default() });
        match case.compile(&[&step]) {
            Ok(_) => return Err(Wrong::Failed(format!("ROPE of rows of 8 with i = {:?} is taken", &i[..3]))),
            Err(Wrong::Skipped(_) | Wrong::Failed(_)) => {}
        }
    }
    Ok(())
}
