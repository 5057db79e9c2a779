//! L1: what do devices say about themselves?

use super::{adder, adds, refused};
use crate::child::Context;
use crate::report::Device;
use crate::rig::{Instance, Session, call, entry, struct_size, table, text};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_abi::{DEV_NPU, E_ABI, E_INVALID, E_UNSUPPORTED, FEAT_SLOW_SEALED, HEALTH_OK, SpdHealth, SpdOpenOptions};
use std::ffi::c_char;
use std::ptr;

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L1,
        "device.info",
        "the device is described: texts, known kind and features, f32 weights, a row dtype",
        "plugin.h, spd_device_info",
        &[],
        info,
    ),
    rule(
        Level::L1,
        "device.index",
        "a device that is not there is SPD_E_INVALID",
        "plugin.h, SPD_E_INVALID",
        &[],
        index,
    ),
    rule(
        Level::L1,
        "device.flags",
        "an unknown flag of spd_open_options is refused",
        "plugin.h, rules that hold everywhere",
        &[],
        flags,
    ),
    rule(
        Level::L1,
        "device.self_test",
        "an open device passes its own test at both levels",
        "plugin.h, self_test",
        &[],
        self_test,
    ),
    rule(Level::L1, "device.health", "an open device is healthy", "plugin.h, spd_health", &[], health),
    rule(
        Level::L1,
        "device.host_alloc",
        "host_alloc answers aligned memory that can be written",
        "plugin.h, host_alloc",
        &[],
        host_alloc,
    ),
    rule(
        Level::L1,
        "device.host_register",
        "memory of the host's may be registered and unregistered, if the device can reach it",
        "plugin.h, host_register",
        &[],
        host_register,
    ),
    rule(Level::L1, "device.extension", "an extension that nobody has is NULL", "plugin.h, extension", &[], extension),
    rule(
        Level::L1,
        "queue.timeline",
        "each piece of work has a greater timeline value, and completes",
        "plugin.h, queue_run",
        &[],
        timeline,
    ),
];

/// Every feature of this ABI.
const FEATURES: u64 = FEAT_SLOW_SEALED * 2 - 1;

fn instance(context: &Context) -> Result<Instance, Wrong> {
    Ok(Instance::create(table(context.entry)?)?)
}

fn info(context: &Context) -> Outcome {
    let instance = instance(context)?;
    let count = instance.device_count()?;
    ensure!(count > context.index, "there are {count} devices, so device {} cannot be tried", context.index);
    let info = instance.device_info(context.index)?;
    let field = |name: &str, field: &[c_char]| {
        ensure!(field.contains(&0), "{name} has no NUL");
        Ok::<_, Wrong>(text(field))
    };
    let (id, name) = (field("id", &info.id)?, field("name", &info.name)?);
    let driver = field("driver", &info.driver)?;
    context.note_device(Device { id: id.clone(), name, driver, features: info.features });
    ensure!(!id.is_empty(), "id is empty");
    ensure!((1..=DEV_NPU).contains(&info.kind), "kind {} is not SPD_DEV_*", info.kind);
    let unknown = info.features & !FEATURES;
    ensure!(unknown == 0, "features has unknown bits {unknown:#x}");
    ensure!(info.block_tokens_align > 0, "block_tokens_align is 0; 1 takes any number");
    ensure!(info.mem_total > 0, "mem_total is 0");
    ensure!(Session::has_dtype(&info.weight_dtypes, sparsed_abi::DT_F32), "weight_dtypes lacks F32, which norms need");
    ensure!(
        crate::cache::ROW_FORMATS.iter().any(|format| Session::has_dtype(&info.row_dtypes, format.ggml_id())),
        "row_dtypes has none of F32, F16, BF16, Q8_0, Q4_0, W16, F8_128 and Q6_0"
    );
    Ok(())
}

fn index(context: &Context) -> Outcome {
    let instance = instance(context)?;
    let count = instance.device_count()?;
    let options = SpdOpenOptions { struct_size: struct_size::<SpdOpenOptions>(), ..SpdOpenOptions::default() };
    for index in [count, u32::MAX] {
        refused(&format!("device_info of device {index} of {count}"), instance.device_info(index), &[E_INVALID])?;
        refused(&format!("device_open of device {index} of {count}"), instance.open(index, &options), &[E_INVALID])?;
    }
    Ok(())
}

fn flags(context: &Context) -> Outcome {
    let options = SpdOpenOptions {
        struct_size: struct_size::<SpdOpenOptions>(),
        n_threads: 1,
        flags: 1 << 31,
        ..SpdOpenOptions::default()
    };
    let answer = instance(context)?.open(context.index, &options);
    refused("spd_open_options.flags = 1 << 31", answer, &[E_INVALID, E_UNSUPPORTED, E_ABI])
}

fn self_test(context: &Context) -> Outcome {
    let session = context.session()?;
    let test = entry!(session.api(), self_test);
    for level in [0, 1] {
        // SAFETY: a living device.
        call("self_test", |e| unsafe { test(session.device.raw, level, e) })?;
    }
    Ok(())
}

fn health(context: &Context) -> Outcome {
    let session = context.session()?;
    let ask = entry!(session.api(), health);
    let mut health = SpdHealth { struct_size: struct_size::<SpdHealth>(), ..SpdHealth::default() };
    // SAFETY: a living device; the struct says its size.
    call("health", |e| unsafe { ask(session.device.raw, &raw mut health, e) })?;
    ensure!(health.state == HEALTH_OK, "state is {}", health.state);
    Ok(())
}

fn host_alloc(context: &Context) -> Outcome {
    let session = context.session()?;
    let (alloc, free) = (entry!(session.api(), host_alloc), entry!(session.api(), host_free));
    for (length, align) in [(1u64, 64u64), (4096, 64), (100_000, 4096)] {
        let mut memory = ptr::null_mut();
        // SAFETY: a living device; the out pointer lives through the call.
        call("host_alloc", |e| unsafe { alloc(session.device.raw, length, align, &raw mut memory, e) })?;
        ensure!(!memory.is_null(), "{length} bytes aligned to {align}: NULL");
        let aligned = (memory as usize as u64).is_multiple_of(align);
        ensure!(aligned, "{length} bytes aligned to {align}: {memory:?} is not");
        // SAFETY: the plugin said that there are that many bytes.
        unsafe { ptr::write_bytes(memory.cast::<u8>(), 0x5a, usize::try_from(length).expect("small")) };
        // SAFETY: from host_alloc of this device, not used again.
        unsafe { free(session.device.raw, memory) };
    }
    Ok(())
}

fn host_register(context: &Context) -> Outcome {
    let session = context.session()?;
    let (register, unregister) = (entry!(session.api(), host_register), entry!(session.api(), host_unregister));
    let mut memory = vec![0u8; 1 << 16];
    let (at, length) = (memory.as_mut_ptr().cast(), memory.len() as u64);
    // SAFETY: a living device; the memory lives until it is unregistered.
    match call("host_register", |e| unsafe { register(session.device.raw, at, length, e) }) {
        Err(fault) if fault.status == E_UNSUPPORTED => return skip(fault.to_string()),
        answer => answer?,
    }
    // SAFETY: registered above.
    unsafe { unregister(session.device.raw, at) };
    Ok(())
}

fn extension(context: &Context) -> Outcome {
    let instance = instance(context)?;
    // SAFETY: a living instance and a C string.
    let answer = unsafe { entry!(instance.api, extension)(instance.raw, c"sparsed.nothing/1".as_ptr()) };
    ensure!(answer.is_null(), "extension(\"sparsed.nothing/1\") is not NULL");
    Ok(())
}

fn timeline(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let step = Step::without_pool(&[2]);
    let ready = adder(&session).compile(&[&step])?;
    let (a, b, _) = super::addends(&mut rng, 2);
    let (input, blob) = (ready.input_arena(&step, &[&a, &b]), step.encode());
    let mut last = 0;
    for _ in 0..5 {
        let mut output = ready.output_arena(&step);
        let parts = crate::rig::RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        let timeline = session.queue.run(&ready.plan, parts)?;
        ensure!(timeline > last, "timeline value {timeline} follows {last}");
        let completed = session.queue.completed()?;
        ensure!(completed >= timeline, "queue_wait says that {timeline} is done, queue_query that {completed} is");
        last = timeline;
    }
    adds(&ready, &mut rng, &step)
}
