//! What goes wrong is said, in words and with the driver's number, and costs no more than it must.

use crate::reference::{Step, bytes, halves, singles};
use crate::rig::{Arena, Plan, Result, Rig, Weight, driver_folder, fake, program, set};
use fastrand::Rng;
use sparsed_abi::{
    Blob, DIM_TOKENS, DT_F16, DT_F32, DT_Q8_0, E_DEVICE_LOST, E_DRIVER, E_INVALID, E_NOMEM_DEVICE, E_NOMEM_HOST,
    E_STEP, E_TIMEOUT, E_UNSUPPORTED, HEALTH_LOST, HEALTH_OK, OP_ADD, OP_EMBED, OP_LINEAR, OP_RMS_NORM, OP_SILU_MUL,
    OpSpec,
};

/// `norm(embed(token))`: two kernels.
fn blob() -> Blob {
    program(|b| {
        let (w, gain) = (b.weight(0, DT_F16, &[5, 8]), b.weight(1, DT_F32, &[8]));
        let (x, y) = (b.activation(DT_F32, &[DIM_TOKENS, 8]), b.activation(DT_F32, &[DIM_TOKENS, 8]));
        b.op(OpSpec { kind: OP_EMBED, inputs: &[Some(w)], outputs: &[Some(x)], ..OpSpec::default() });
        b.op(OpSpec { kind: OP_RMS_NORM, inputs: &[Some(x), Some(gain)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    })
}

fn weights(rig: &Rig) -> Result<[Weight<'_>; 2]> {
    let mut random = Rng::with_seed(1);
    let table = rig.weight(DT_F16, 5, 8, halves(&mut random, 40).0)?;
    Ok([table, rig.weight(DT_F32, 1, 8, bytes(&singles(&mut random, 8)))?])
}

fn plan<'a>(rig: &'a Rig, weights: &[Weight<'a>; 2]) -> Result<Plan<'a>> {
    rig.plan(&blob(), &[&weights[0], &weights[1]])
}

#[test]
fn a_box_without_the_driver_gets_a_reason() {
    let rig = Rig::instance(tempfile::tempdir().unwrap());
    let failure = rig.device_count().unwrap_err();
    assert_eq!(failure.status, E_DRIVER);
    assert!(failure.message.starts_with("unavailable: ") && failure.message.contains("libcuda.so.1"), "{failure:?}");
}

#[test]
fn every_symbol_that_a_driver_lacks_is_named() {
    let library = std::fs::read(crate::rig::built("libsparsed_fake_cuda.so")).unwrap();
    let table = std::fs::read_to_string(sparsed_tests::root().join("plugins/cuda/src/driver/table.rs")).unwrap();
    let symbols: Vec<&str> = table.split("= c\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(symbols.len() > 30, "{symbols:?}");
    for symbol in symbols {
        // The name in the library's table of strings, between the NULs of its neighbours.
        let name = format!("\0{symbol}\0").into_bytes();
        let at = library.windows(name.len()).position(|window| window == name).unwrap_or_else(|| panic!("{symbol}"));
        let mut changed = library.clone();
        changed[at + 1] = b'x';
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libcuda.so.1"), changed).unwrap();
        let failure = Rig::instance(dir).device_count().unwrap_err();
        assert_eq!(failure.status, E_DRIVER);
        assert!(failure.message.contains(symbol), "{symbol}: {failure:?}");
    }
}

#[test]
fn a_driver_that_is_too_old_or_does_not_start_is_named() {
    for (key, value, status, code, text) in [
        ("version", 11_000, E_DRIVER, 0, "CUDA 11.0, older than 11.4"),
        ("init", 100, E_DRIVER, 100, "CUDA_ERROR_NO_DEVICE (100)"),
        ("init", 999, E_DRIVER, 999, "CUDA_ERROR_UNKNOWN (999)"),
    ] {
        let dir = driver_folder();
        let fake = fake(dir.path()); // stays loaded, so that the plugin gets the same one
        set(&fake, key, value);
        let failure = Rig::instance(dir).device_count().unwrap_err();
        assert_eq!((failure.status, failure.vendor_code), (status, code), "{failure:?}");
        assert!(failure.message.contains(text), "{failure:?}");
    }
}

#[test]
fn a_real_driver_hears_that_there_is_no_device_code() {
    let failure = Rig::try_open(&[("real", 1)], 0).err().unwrap();
    assert_eq!((failure.status, failure.vendor_code), (E_DRIVER, 218));
    assert!(failure.message.contains("no device code"), "{failure:?}");
}

#[test]
fn arenas_are_pinned_and_freed_with_their_device_at_the_latest() {
    let rig = Rig::open(&[]);
    let before = rig.counter("live_pinned");
    let (first, _second) = (rig.host_alloc(5000, 64).unwrap(), rig.host_alloc(1, 4096).unwrap());
    assert_eq!(rig.counter("live_pinned"), before + 2);
    rig.host_free(first);
    assert_eq!(rig.counter("live_pinned"), before + 1);
    assert_eq!(rig.host_alloc(1, 8192).unwrap_err().status, E_INVALID);
    rig.set("oom_at", rig.counter("allocations") + 1);
    assert_eq!(rig.host_alloc(1, 64).unwrap_err().status, E_NOMEM_HOST);
    // What is left goes with the device; the rig counts when it is dropped.
}

#[test]
fn the_device_passes_its_own_test_and_fails_it_when_a_kernel_hangs() {
    let rig = Rig::open(&[]);
    rig.self_test().unwrap();
    rig.expect_lost(); // what the kernel may still write to is not freed
    rig.set("hang_at", rig.counter("executed") + 1);
    assert_eq!(rig.self_test().unwrap_err().status, E_TIMEOUT);
}

#[test]
fn each_allocation_may_fail_and_nothing_has_changed_then() {
    let mut failed = 0;
    for n in 1..20 {
        let rig = Rig::open(&[("oom_at", n)]);
        let used = |rig: &Rig| {
            let info = rig.memory();
            (info.used_weights, info.used_workspace, info.used_plans, rig.counter("live_device"))
        };
        let first = weights(&rig);
        failed += u32::from(first.is_err());
        let weights = first.unwrap_or_else(|failure| {
            assert_eq!((failure.status, failure.vendor_code), (E_NOMEM_DEVICE, 2), "{failure:?}");
            assert_eq!(used(&rig), (0, 0, 0, 0));
            weights(&rig).unwrap()
        });
        let before = used(&rig);
        let first = plan(&rig, &weights);
        failed += u32::from(first.is_err());
        let plan = first.unwrap_or_else(|failure| {
            assert!(matches!(failure.status, E_NOMEM_DEVICE | E_NOMEM_HOST), "{failure:?}");
            assert_eq!((used(&rig), rig.counter("live_pinned")), (before, 0));
            plan(&rig, &weights).unwrap()
        });
        let (queue, step, mut out) = (rig.queue().unwrap(), Step::random(&mut Rng::with_seed(n), 5), Arena::new(64));
        let allocations = rig.counter("allocations");
        let timeline = queue.run(&plan, &step.arrays(), &[], &mut out).unwrap();
        queue.wait(timeline).unwrap();
        assert_eq!(rig.counter("allocations"), allocations, "a step allocates nothing");
    }
    assert_eq!(failed, 9, "two weights, a workspace, and two allocations for each of three frames");
}

#[test]
fn the_budget_is_a_cap() {
    let rig = Rig::try_open(&[], 100).unwrap();
    let failure = weights(&rig).err().unwrap();
    assert_eq!(failure.status, E_NOMEM_DEVICE);
    assert!(failure.message.contains("budget of 100"), "{failure:?}");
    let info = rig.memory();
    assert_eq!((info.budget, info.free, info.used_weights), (100, 100, 0));
}

#[test]
fn after_a_kernel_has_failed_every_call_says_that_the_device_is_lost() {
    for (at, code) in [(1, 719), (2, 700), (4, 719)] {
        let rig = Rig::open(&[("lost_at", at), ("lost_code", code)]);
        rig.expect_lost();
        assert_eq!(rig.health(), HEALTH_OK);
        let weights = weights(&rig).unwrap();
        let (plan, queue) = (plan(&rig, &weights).unwrap(), rig.queue().unwrap());
        let mut random = Rng::with_seed(at);
        let (mut last, mut outs) = (0, Vec::new());
        // The error is asynchronous: which call meets it first depends on how far the device has come.
        let met = loop {
            let mut out = Arena::new(64);
            let answer = queue.run(&plan, &Step::random(&mut random, 5).arrays(), &[], &mut out);
            outs.push(out);
            match answer.and_then(|timeline| {
                last = timeline;
                queue.wait(timeline)
            }) {
                Ok(()) => assert!(outs.len() < 4, "the kernel did not fail"),
                Err(failure) => break failure,
            }
        };
        let later = [
            met,
            queue.run(&plan, &Step::random(&mut random, 5).arrays(), &[], &mut Arena::new(64)).unwrap_err(),
            queue.wait(last).unwrap_err(),
            queue.wait_queue(&queue, last).unwrap_err(),
            queue.cancel(1).unwrap_err(),
            rig.queue().err().unwrap(),
            rig.weight(DT_F32, 1, 1, vec![0; 4]).err().unwrap(),
            self::plan(&rig, &weights).err().unwrap(),
            rig.self_test().unwrap_err(),
        ];
        for failure in later {
            assert_eq!((failure.status, failure.vendor_code), (E_DEVICE_LOST, code.cast_signed()), "{failure:?}");
        }
        assert_eq!((queue.completed(), rig.health()), (last, HEALTH_LOST));
    }
}

#[test]
fn a_launch_that_does_not_fit_fails_its_step_alone() {
    let rig = Rig::open(&[("refuse_at", 2)]);
    let weights = weights(&rig).unwrap();
    let (plan, queue, mut random) = (plan(&rig, &weights).unwrap(), rig.queue().unwrap(), Rng::with_seed(7));
    let step = Step::random(&mut random, 5);
    let mut out = Arena::new(64);
    let timeline = queue.run(&plan, &step.arrays(), &[], &mut out).unwrap();
    let failure = queue.wait(timeline).unwrap_err();
    assert_eq!((failure.status, failure.vendor_code, failure.op_index), (E_STEP, 701, 1), "{failure:?}");
    assert!(out.is_untouched());
    assert_eq!(queue.wait(timeline).unwrap_err().status, E_STEP, "asked twice");
    let again = queue.run(&plan, &step.arrays(), &[], &mut out).unwrap();
    queue.wait(again).unwrap();
    assert!(!out.is_untouched());
}

#[test]
fn what_the_slice_does_not_have_is_refused_by_name() {
    let rig = Rig::open(&[]);
    let failure = rig.weight(DT_Q8_0, 1, 32, vec![0; 34]).err().unwrap();
    assert_eq!(failure.status, E_UNSUPPORTED);
    let silu = program(|b| {
        let (x, y) = (b.input(DT_F32, &[DIM_TOKENS, 4]), b.activation(DT_F32, &[DIM_TOKENS, 4]));
        b.op(OpSpec { kind: OP_SILU_MUL, inputs: &[Some(x), Some(x)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    });
    let q8_0 = program(|b| {
        let (x, w) = (b.input(DT_F32, &[DIM_TOKENS, 32]), b.weight(0, DT_Q8_0, &[4, 32]));
        let y = b.activation(DT_F32, &[DIM_TOKENS, 4]);
        b.op(OpSpec { kind: OP_LINEAR, inputs: &[Some(x), Some(w)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    });
    for (blob, text) in [(silu, "SILU_MUL"), (q8_0, "dtype 8")] {
        let failure = rig.supports(&blob, 0).unwrap_err();
        assert_eq!((failure.status, failure.op_index), (E_UNSUPPORTED, 0), "{failure:?}");
        assert!(failure.message.contains(text), "{failure:?}");
    }
    rig.supports(&blob(), 1).unwrap();
}

#[test]
fn an_operator_that_writes_to_what_it_reads_is_refused() {
    let rig = Rig::open(&[]);
    let in_place = program(|b| {
        let (x, y) = (b.input(DT_F32, &[DIM_TOKENS, 4]), b.activation(DT_F32, &[DIM_TOKENS, 4]));
        let view = b.view(y, 1, &[DIM_TOKENS, 3], &[4]);
        let (z, first) = (b.activation(DT_F32, &[DIM_TOKENS, 3]), b.activation(DT_F32, &[DIM_TOKENS, 4]));
        b.op(OpSpec { kind: OP_ADD, inputs: &[Some(x), Some(x)], outputs: &[Some(y)], ..OpSpec::default() });
        b.op(OpSpec { kind: OP_ADD, inputs: &[Some(x), Some(y)], outputs: &[Some(y)], ..OpSpec::default() });
        b.op(OpSpec { kind: OP_ADD, inputs: &[Some(view), Some(view)], outputs: &[Some(z)], ..OpSpec::default() });
        let inputs = [Some(x), None, Some(y)];
        b.op(OpSpec { kind: OP_RMS_NORM, inputs: &inputs, outputs: &[Some(first); 2], ..OpSpec::default() });
        b.mark_output(z);
    });
    for (op, text) in [(1, "one of the operator's inputs"), (3, "two outputs are one tensor")] {
        let failure = rig.supports(&in_place, op).unwrap_err();
        assert_eq!((failure.status, failure.op_index), (E_INVALID, op), "{failure:?}");
        assert!(failure.message.contains(text), "{failure:?}");
    }
    rig.supports(&in_place, 2).unwrap();
}

#[test]
fn a_kernel_that_hangs_lets_waits_time_out_and_the_queue_end() {
    let rig = Rig::open(&[("hang_at", 2)]);
    rig.expect_lost(); // what the kernel may still write to is not freed
    let weights = weights(&rig).unwrap();
    let (plan, queue, other) = (plan(&rig, &weights).unwrap(), rig.queue().unwrap(), rig.queue().unwrap());
    let step = Step::random(&mut Rng::with_seed(9), 5);
    let mut outs = [Arena::new(64), Arena::new(64)];
    let timeline = queue.run(&plan, &step.arrays(), &[], &mut outs[0]).unwrap();
    assert_eq!(queue.wait_for(timeline, 20_000_000).unwrap_err().status, E_TIMEOUT);
    queue.cancel(timeline).unwrap();
    assert_eq!(queue.wait_for(timeline, 20_000_000).unwrap_err().status, E_TIMEOUT, "a kernel cannot be stopped");
    // The plan's workspace is not free, so a step of it behind another queue waits too.
    let behind = other.run(&plan, &step.arrays(), &[], &mut outs[1]).unwrap();
    assert_eq!(other.wait_for(behind, 20_000_000).unwrap_err().status, E_TIMEOUT);
    assert_eq!((queue.completed(), other.completed(), rig.health()), (0, 0, HEALTH_OK));
    drop((queue, other));
    assert!(outs.iter().all(Arena::is_untouched));
    assert_eq!(rig.counter("live_pinned"), 3, "the frames stay");
    std::mem::forget(outs);
}
