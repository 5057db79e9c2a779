//! L1: are structs of another size than the plugin's taken as `struct_size` says?

use super::{addends, adder, refused};
use crate::case::{CLASS_F, close};
use crate::child::Context;
use crate::rig::{Fault, Instance, RunParts, Session, call, entry, fresh_error, struct_size, table, weight_desc};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::{
    DT_F32, E_ABI, SpdCompile, SpdDeviceInfo, SpdError, SpdHealth, SpdKvDesc, SpdKvInfo, SpdMemInfo, SpdOpenOptions,
    SpdPlanInfo, SpdRun, SpdSource, SpdWeightDesc,
};
use std::ptr;

const PLACE: &str = "plugin.h, rules that hold everywhere";

pub(crate) const RULES: &[Rule] = &[
    rule(Level::L1, "abi.tail_zero", "a longer struct with a zero tail is taken", PLACE, &[], tail_zero),
    rule(Level::L1, "abi.tail_nonzero", "a longer struct with a set tail is SPD_E_ABI", PLACE, &[], tail_nonzero),
    rule(Level::L1, "abi.struct_short", "what a shorter struct lacks is read as zero", PLACE, &[], struct_short),
    rule(Level::L1, "abi.out_short", "nothing is written past a shorter out-struct", PLACE, &[], out_short),
    rule(Level::L1, "abi.out_long", "a longer out-struct keeps its tail and its size", PLACE, &[], out_long),
    rule(Level::L1, "abi.error_null", "a NULL error is legal", "plugin.h, spd_error", &[], error_null),
    rule(
        Level::L1,
        "abi.error_filled",
        "a failure fills the caller's error: status, and words that end in a NUL",
        "plugin.h, spd_error",
        &["abi.error_null"],
        error_filled,
    ),
];

/// Bytes that a newer caller's struct has after those of this ABI.
const TAIL: usize = 16;

/// A newer caller's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Longer<T> {
    value: T,
    tail: [u8; TAIL],
}

impl<T> Longer<T> {
    fn new(value: T, tail: u8) -> Self {
        let mut longer = Self { value, tail: [0; TAIL] };
        longer.tail[TAIL - 1] = tail;
        let size = struct_size::<Self>();
        // SAFETY: every struct that is passed begins with its u32 struct_size.
        unsafe { (&raw mut longer.value).cast::<u32>().write(size) };
        longer
    }
}

/// A struct's name, and what came of handing it over.
type Answer = (&'static str, Result<(), Fault>);

/// Hands each in-struct to the plugin, longer and with `last` as its last byte; answers what came of each.
fn longer_in_structs(context: &Context, last: u8) -> Result<Vec<Answer>, Wrong> {
    let session = context.session()?;
    let api = session.api();
    let mut answers = Vec::new();
    let instance = session.instance();
    let options = Longer::new(SpdOpenOptions { n_threads: 1, ..SpdOpenOptions::default() }, last);
    let opened = instance.open(context.index, &options.value);
    if let Ok(raw) = opened {
        // SAFETY: just opened, and nothing was made on it.
        unsafe { entry!(api, device_close)(raw) };
    }
    answers.push(("spd_open_options", opened.map(drop)));
    let desc = Longer::new(weight_desc(DT_F32, (1, 2, 4)), last);
    answers.push(("spd_weight_desc", crate::rig::Weight::create(&session.device, &desc.value).map(drop)));
    let weight = crate::rig::Weight::create(&session.device, &weight_desc(DT_F32, (1, 2, 4)))?;
    let bytes = [0u8; 32];
    let source = SpdSource { fd: -1, ptr: bytes.as_ptr().cast(), length: 32, ..SpdSource::default() };
    answers.push(("spd_source", weight.upload_from(0, 1, &Longer::new(source, last).value)));
    let shape = crate::cache::Shape::usual(&session, row_format(&session)?);
    answers.push(("spd_kv_desc", session.pool(&Longer::new(shape.desc(), last).value).map(drop)));
    answers.push(("spd_compile", compile_longer(&session, last)));
    answers.push(("spd_run", run_longer(&session, &mut context.random(), last)?));
    Ok(answers)
}

/// A row format that the device claims.
fn row_format(session: &Session) -> Result<sparsed_quant::Format, Wrong> {
    let formats = crate::cache::row_formats(session);
    formats.first().copied().ok_or_else(|| Wrong::Failed("the device claims no row_dtypes".to_owned()))
}

fn compile_longer(session: &Session, last: u8) -> Result<(), Fault> {
    let (blob, bucket) = (adder(session).blob(), super::plans::bucket(4));
    let request = Longer::new(super::plans::request(&blob, &bucket), last);
    super::plans::compile_raw(session, &request.value).map(drop)
}

fn run_longer(session: &Session, rng: &mut fastrand::Rng, last: u8) -> Result<Result<(), Fault>, Wrong> {
    let step = Step::without_pool(&[3]);
    let ready = adder(session).compile(&[&step])?;
    let (a, b, sum) = addends(rng, 3);
    let (input, mut output, blob) = (ready.input_arena(&step, &[&a, &b]), ready.output_arena(&step), step.encode());
    let mut parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
    let run = Longer::new(parts.raw(), last);
    let answer = session.queue.run_raw(&ready.plan, &run.value);
    if answer.is_ok() {
        close(CLASS_F, "ADD through a longer spd_run", &ready.outputs_in(&step, &output)[0], &sum)?;
    }
    Ok(answer.map(drop))
}

fn tail_zero(context: &Context) -> Outcome {
    for (name, answer) in longer_in_structs(context, 0)? {
        answer.map_err(|fault| Wrong::Failed(format!("{name} of {TAIL} bytes more, all zero: {fault}")))?;
    }
    Ok(())
}

fn tail_nonzero(context: &Context) -> Outcome {
    for (name, answer) in longer_in_structs(context, 1)? {
        refused(&format!("{name} with a byte set that this ABI does not have"), answer, &[E_ABI])?;
    }
    Ok(())
}

fn struct_short(context: &Context) -> Outcome {
    let session = context.session()?;
    let garbage = u64::MAX as *const u64;
    let size = u32::try_from(std::mem::offset_of!(SpdOpenOptions, cpu_mask)).expect("a small struct");
    // Mask and flags lie past the size: reading them would be reading what the caller does not have.
    let options = SpdOpenOptions {
        struct_size: size,
        n_threads: 1,
        cpu_mask: garbage,
        cpu_mask_words: 1,
        flags: u32::MAX,
        ..SpdOpenOptions::default()
    };
    let raw = session.instance().open(context.index, &options)?;
    // SAFETY: just opened, and nothing was made on it.
    unsafe { entry!(session.api(), device_close)(raw) };
    let step = Step::without_pool(&[3]);
    let ready = adder(&session).compile(&[&step])?;
    let (a, b, sum) = addends(&mut context.random(), 3);
    let (input, mut output, blob) = (ready.input_arena(&step, &[&a, &b]), ready.output_arena(&step), step.encode());
    let mut parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: Some(&1) };
    let size = u32::try_from(std::mem::offset_of!(SpdRun, cancel)).expect("a small struct");
    let run = SpdRun { struct_size: size, ..parts.raw() };
    session.queue.run_raw(&ready.plan, &run)?;
    close(CLASS_F, "ADD through a shorter spd_run", &ready.outputs_in(&step, &output)[0], &sum)
}

/// Calls everything that fills an out-struct with one that is `size(whole)` long, in front of guard bytes; fails when
/// its size, a byte after it, or the bytes after those that this ABI has are written.
fn out_structs(context: &Context, size: fn(usize) -> usize) -> Outcome {
    let session = context.session()?;
    let (api, device) = (session.api(), session.device.raw);
    let shape = crate::cache::Shape::usual(&session, row_format(&session)?);
    let (desc, blob, bucket) = (shape.desc(), adder(&session).blob(), super::plans::bucket(4));
    guarded::<SpdDeviceInfo>("spd_device_info", size, |out| {
        // SAFETY: living handles; the out-struct says its size and lies in a larger buffer.
        call("device_info", |e| unsafe { entry!(api, device_info)(session.instance().raw, 0, out, e) })
    })?;
    guarded::<SpdMemInfo>("spd_mem_info", size, |out| {
        // SAFETY: as above.
        call("mem_info", |e| unsafe { entry!(api, mem_info)(device, out, e) })
    })?;
    guarded::<SpdHealth>("spd_health", size, |out| {
        // SAFETY: as above.
        call("health", |e| unsafe { entry!(api, health)(device, out, e) })
    })?;
    guarded::<SpdKvInfo>("spd_kv_info", size, |out| {
        let mut pool = ptr::null_mut();
        // SAFETY: as above.
        call("kv_create", |e| unsafe { entry!(api, kv_create)(device, &raw const desc, &raw mut pool, out, e) })?;
        // SAFETY: just created.
        unsafe { entry!(api, kv_destroy)(pool) };
        Ok(())
    })?;
    guarded::<SpdPlanInfo>("spd_plan_info", size, |out| {
        let (request, mut plan) = (super::plans::request(&blob, &bucket), ptr::null_mut());
        let compile = entry!(api, plan_compile);
        // SAFETY: as above.
        call("plan_compile", |e| unsafe { compile(device, &raw const request, &raw mut plan, out, e) })?;
        // SAFETY: just created.
        unsafe { entry!(api, plan_destroy)(plan) };
        Ok(())
    })
}

fn guarded<T>(name: &str, size: fn(usize) -> usize, fill: impl FnOnce(*mut T) -> Result<(), Fault>) -> Outcome {
    let size = size(size_of::<T>());
    let mut buffer = [u64::MAX; 128];
    assert!(size + TAIL <= size_of_val(&buffer), "the buffer is larger than every struct");
    // The struct is zero, as a caller hands it over; what follows it is not.
    buffer[..size / 8].fill(0);
    buffer[0] = size as u64;
    fill(buffer.as_mut_ptr().cast())?;
    let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_le_bytes()).collect();
    ensure!(bytes[..4] == (size as u64).to_le_bytes()[..4], "{name}: struct_size was overwritten");
    let end = size.min(size_of::<T>());
    let untouched = |(at, &byte): (usize, &u8)| byte == if at < size { 0 } else { 0xff };
    let written = bytes.iter().enumerate().skip(end).position(|(at, byte)| !untouched((at, byte)));
    ensure!(
        written.is_none(),
        "{name} of struct_size {size}: byte {} was written, {end} are the plugin's to write",
        end + written.unwrap_or(0)
    );
    Ok(())
}

fn out_short(context: &Context) -> Outcome {
    out_structs(context, |whole| whole / 16 * 8)
}

fn out_long(context: &Context) -> Outcome {
    out_structs(context, |whole| whole + TAIL)
}

/// A failing call of each kind, with this error.
fn failing(context: &Context, error: *mut SpdError) -> Result<Vec<(&'static str, i32)>, Wrong> {
    let session = context.session()?;
    let (api, device) = (session.api(), session.device.raw);
    let (mut weight, mut pool, mut plan) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    let desc = SpdWeightDesc { dtype: 127, ..weight_desc(DT_F32, (1, 2, 4)) };
    let kv = SpdKvDesc { n_blocks: 0, ..crate::cache::Shape::usual(&session, row_format(&session)?).desc() };
    let bucket = super::plans::bucket(4);
    let blob = sparsed_abi::Blob::zeroed(64);
    let request = SpdCompile { ..super::plans::request(&blob, &bucket) };
    let mut info = SpdPlanInfo { struct_size: struct_size::<SpdPlanInfo>(), ..SpdPlanInfo::default() };
    let mut kv_info = SpdKvInfo { struct_size: struct_size::<SpdKvInfo>(), ..SpdKvInfo::default() };
    // SAFETY: a living device; the structs say their sizes; the out pointers live through the calls.
    let weight = unsafe { entry!(api, weight_create)(device, &raw const desc, &raw mut weight, error) };
    let create = entry!(api, kv_create);
    // SAFETY: as above.
    let pool = unsafe { create(device, &raw const kv, &raw mut pool, &raw mut kv_info, error) };
    let compile = entry!(api, plan_compile);
    // SAFETY: as above.
    let plan = unsafe { compile(device, &raw const request, &raw mut plan, &raw mut info, error) };
    Ok(vec![
        ("weight_create of dtype 127", weight),
        ("kv_create without blocks", pool),
        ("plan_compile of zeros", plan),
    ])
}

fn error_null(context: &Context) -> Outcome {
    for (what, status) in failing(context, ptr::null_mut())? {
        ensure!(status < 0, "{what}, which must fail, answers {status} when the error is NULL");
    }
    Ok(())
}

fn error_filled(context: &Context) -> Outcome {
    let instance = Instance::create(table(context.entry)?)?;
    let ask = entry!(instance.api, device_info);
    let mut info = SpdDeviceInfo { struct_size: struct_size::<SpdDeviceInfo>(), ..SpdDeviceInfo::default() };
    let mut error = SpdError { message: [0x55; 224], ..fresh_error() };
    // SAFETY: a living instance; the structs say their sizes.
    let status = unsafe { ask(instance.raw, u32::MAX, &raw mut info, &raw mut error) };
    ensure!(status < 0, "device_info of device {} answers {status}", u32::MAX);
    ensure!(error.struct_size == struct_size::<SpdError>(), "spd_error.struct_size was overwritten");
    ensure!(error.status == status, "spd_error.status is {}, the call answered {status}", error.status);
    ensure!(error.message.contains(&0), "spd_error.message has no NUL");
    ensure!(error.message[0] != 0, "spd_error.message is empty");
    // An older caller's error ends before the message.
    let mut short = SpdError { struct_size: 24, message: [0x55; 224], ..fresh_error() };
    // SAFETY: as above.
    let status = unsafe { ask(instance.raw, u32::MAX, &raw mut info, &raw mut short) };
    ensure!(short.status == status, "a shorter spd_error is not filled as far as it goes");
    ensure!(short.message.iter().all(|&c| c == 0x55), "bytes past a shorter spd_error were written");
    Ok(())
}
