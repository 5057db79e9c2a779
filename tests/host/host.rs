//! Plugins in a process of their own: what they compute, what they may not do, and how they end.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod probe;
mod slow;

use probe::{ALONE, Probe, host_options, log_lines, signal, wait_until};
use sparsed_abi::{
    DT_F32, E_CANCELLED, E_DATA, E_DEVICE_LOST, E_NOMEM_HOST, E_STEP, E_UNSUPPORTED, HEALTH_DEGRADED, HEALTH_LOST,
    KV_EXPORT, KV_IMPORT, SpdKvOp, SpdRow,
};
use sparsed_backend::{
    Backend, Found, HostOptions, KvDesc, OpenOptions, Plugin, SearchPath, WeightFile, WeightUpload, kill_plugin_hosts,
};
use sparsed_tests::tiny::Tiny;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

/// What a host that has just been killed may take to be noticed.
const NOTICE: Duration = Duration::from_secs(1);

#[test]
fn logits_through_a_host_are_the_same_bits() {
    let tiny = Tiny::open("v32");
    for extra in [&[][..], &["--act", "f32", "--chunk", "5"]] {
        let own = sparsed_tests::logits(&tiny.gguf(), &tiny.ids, true, extra);
        let isolated =
            sparsed_tests::logits(&tiny.gguf(), &tiny.ids, true, &[extra, &["--isolation", "process"]].concat());
        assert!(own.logits.iter().zip(&isolated.logits).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!((own.logits.len(), own.selections), (isolated.logits.len(), isolated.selections));
    }
}

#[test]
fn a_device_says_through_a_host_what_it_says_itself() {
    let probe = Probe::open(&[]);
    let info = probe.backend.info();
    assert_eq!((info.name.as_str(), probe.backend.memory().unwrap().free), ("probe", 600));
    assert_eq!(info.driver, "1.0 [2J erased", "no word of a plugin moves a cursor");
    assert!(!info.reads_host_weights(), "the daemon's memory is not the host's");
    assert_eq!(probe.backend.health().unwrap().state, HEALTH_DEGRADED);
    assert!(probe.backend.self_test(0).is_ok());
    let failed = probe.backend.self_test(1).unwrap_err();
    assert_eq!(failed.status(), Some(E_DATA));
    assert!(failed.to_string().contains("level 1 always fails here"), "{failed}");
    assert!(probe.backend.supports(&probe::program(), 0).is_ok());
    assert!(probe.backend.supports(&probe::program(), 9).unwrap_err().to_string().contains("operator 9"));
    let refused = Probe::try_open(&[("refuse", "x")], &host_options()).unwrap_err().to_string();
    assert!(refused.contains("told to refuse"), "{refused}");
}

#[test]
fn a_plugin_proves_that_it_computes_or_says_what_it_lacks() {
    let _not_killed = ALONE.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let scan = SearchPath::only(vec![sparsed_tests::root().join("target/release/plugins")]).scan();
    let prove = |found: &Found| found.prove(&BTreeMap::new(), 0, &OpenOptions::default(), &host_options());
    for id in ["cpu", "minimal"] {
        let device = prove(scan.select(Some(id)).unwrap()).unwrap();
        assert!(device.score > 0 && !device.name.is_empty(), "{device:?}");
    }
    let useless = prove(&probe::found()).unwrap_err().to_string();
    assert!(useless.contains("its device says that it cannot run here"), "{useless}");
}

#[test]
fn steps_of_any_size_come_back_as_they_went() {
    let probe = Probe::open(&[]);
    let (mut queue, plan) = probe.queue_and_plan();
    for length in [0usize, 1, 63, 4096, 3 << 20, 100, 5 << 20] {
        let input: Vec<u8> = (0..length).map(|i| (i % 89) as u8 + b'\x80').collect();
        let mut output = vec![0; length];
        queue.run(&plan, &probe::step(), &input, &mut output).unwrap();
        assert_eq!(input, output, "{length} bytes");
    }
}

#[test]
fn queues_run_side_by_side() {
    let probe = Probe::open(&[]);
    std::thread::scope(|scope| {
        for n in 0..4u8 {
            let (mut queue, plan) = probe.queue_and_plan();
            scope.spawn(move || {
                for round in 0..200u8 {
                    let (input, mut output) = ([0x80 | n, round, n, round], [0; 4]);
                    queue.run(&plan, &probe::step(), &input, &mut output).unwrap();
                    assert_eq!(input, output);
                }
            });
        }
    });
}

#[test]
fn a_failed_step_has_the_plugins_words_and_the_host_goes_on() {
    let probe = Probe::open(&[]);
    let failed = probe.run(b"f").unwrap_err();
    assert_eq!(failed.status(), Some(E_STEP));
    let said = "queue_run: told to fail (SPD_E_STEP) at operator 5, block 9, the driver's code -719";
    assert_eq!(failed.to_string(), said);
    assert!(probe.run(&[0x80]).is_ok());
}

#[test]
fn a_host_killed_during_a_step_is_noticed_within_a_second() {
    let probe = Probe::open(&[]);
    let pid = probe.plugin.host_process().unwrap();
    let (failed, took) = std::thread::scope(|scope| {
        let step = scope.spawn(|| (probe.run(b"d").unwrap_err(), Instant::now()));
        wait_until("the step runs", || probe::blocked_in_pause(pid));
        let killed = Instant::now();
        signal(pid, "KILL");
        let (failed, ended) = step.join().unwrap();
        (failed, ended - killed)
    });
    assert!(took < NOTICE, "{took:?}");
    assert_eq!(failed.status(), Some(E_DEVICE_LOST));
    assert!(
        failed.to_string().contains("signal 9") && failed.to_string().contains("it said last: will not end"),
        "{failed}"
    );
    // From now on everything answers so, at once, and nothing that is dropped waits.
    let began = Instant::now();
    assert_eq!(probe.run(&[0x80]).unwrap_err().status(), Some(E_DEVICE_LOST));
    assert_eq!(probe.backend.self_test(0).unwrap_err().status(), Some(E_DEVICE_LOST));
    assert_eq!(probe.backend.health().unwrap().state, HEALTH_LOST);
    assert_eq!(
        probe
            .backend
            .queue()
            .and_then(|mut queue| {
                let plan = probe.plan()?;
                queue.run(&plan, &probe::step(), &[], &mut [])
            })
            .unwrap_err()
            .status(),
        Some(E_DEVICE_LOST)
    );
    drop(probe);
    assert!(began.elapsed() < NOTICE);
}

#[test]
fn however_a_host_ends_it_is_told() {
    for (input, told) in [(b"a", "signal 6"), (b"e", "exit status 7")] {
        let failed = Probe::open(&[]).run(input).unwrap_err();
        assert_eq!(failed.status(), Some(E_DEVICE_LOST));
        assert!(failed.to_string().contains(told), "{failed}");
    }
}

#[test]
fn a_host_that_answers_nonsense_is_lost() {
    let positive = Probe::open(&[]);
    assert_eq!(positive.run(b"+").unwrap_err().status(), Some(E_DEVICE_LOST));
    let closed = Probe::open_with(&[], &HostOptions { step_timeout: Duration::from_millis(200), ..host_options() });
    // The doorbell is gone, so the step seems to hang; whichever is seen first, the host is lost.
    let failed = closed.run(b"c").and_then(|()| closed.backend.self_test(0));
    assert_eq!(failed.unwrap_err().status(), Some(E_DEVICE_LOST));
}

#[test]
fn a_stopped_host_is_killed_by_the_watchdog() {
    let options =
        HostOptions { step_timeout: Duration::from_millis(100), grace: Duration::from_millis(100), ..host_options() };
    let probe = Probe::open_with(&[], &options);
    let (mut queue, plan) = probe.queue_and_plan();
    queue.run(&plan, &probe::step(), &[0x80], &mut [0]).unwrap();
    let pid = probe.plugin.host_process().unwrap();
    signal(pid, "STOP");
    let failed = queue.run(&plan, &probe::step(), &[0x80], &mut [0]).unwrap_err();
    assert_eq!(failed.status(), Some(E_DEVICE_LOST));
    assert!(failed.to_string().contains("longer than 100 ms"), "{failed}");
    drop((queue, plan, probe));
    assert!(!probe::exists(pid));
}

#[test]
fn an_interrupt_of_the_terminal_does_not_reach_a_host() {
    let probe = Probe::open(&[]);
    let pid = probe.plugin.host_process().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let group = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(2).unwrap().to_owned();
    assert_eq!(group, pid.to_string());
}

#[test]
fn dropping_what_a_stopped_host_has_ends() {
    let probe = Probe::open(&[]);
    let pid = probe.plugin.host_process().unwrap();
    signal(pid, "STOP");
    drop(probe);
    assert!(!probe::exists(pid));
}

#[test]
fn a_step_past_its_time_is_cancelled_and_the_host_goes_on() {
    let probe = Probe::open_with(&[], &HostOptions { step_timeout: Duration::from_millis(50), ..host_options() });
    let failed = probe.run(b"w").unwrap_err();
    assert_eq!(failed.status(), Some(E_STEP));
    assert!(failed.to_string().contains("longer than 50 ms"), "{failed}");
    assert!(probe.run(&[0x80]).is_ok());
}

#[test]
fn a_caller_can_cancel_a_step() {
    let probe = Probe::open(&[]);
    let (mut queue, plan) = probe.queue_and_plan();
    let cancel = AtomicU32::new(1);
    let failed = queue.run_cancellable(&plan, &probe::step(), b"w", &mut [], Some(&cancel)).unwrap_err();
    assert_eq!(failed.status(), Some(E_CANCELLED));
}

#[test]
fn a_host_that_does_not_start_in_time_is_killed() {
    let options = HostOptions { start_timeout: Duration::from_millis(200), ..host_options() };
    let refused = Probe::try_open(&[("linger", "x")], &options).unwrap_err().to_string();
    assert!(refused.contains("did not answer for 200 ms"), "{refused}");
    let missing = HostOptions { program: "/nowhere/sparsed".into(), ..host_options() };
    assert!(Probe::try_open(&[], &missing).unwrap_err().to_string().contains("/nowhere/sparsed"));
    let other = HostOptions { program: "/bin/false".into(), ..host_options() };
    let refused = Probe::try_open(&[], &other).unwrap_err().to_string();
    assert!(refused.contains("exit status 1"), "{refused}");
}

#[test]
fn a_step_larger_than_shared_memory_may_be_is_refused() {
    let probe = Probe::open_with(&[], &HostOptions { arena_bytes_max: 1 << 20, ..host_options() });
    assert_eq!(probe.run(&vec![0x80; 1 << 20]).unwrap_err().status(), Some(E_NOMEM_HOST));
    assert!(probe.run(&[0x80]).is_ok());
}

#[test]
fn what_a_plugin_says_reaches_the_log() {
    let probe = Probe::open(&[]);
    let pid = probe.plugin.host_process().unwrap();
    for (line, level) in [("said on stdout", "INFO"), ("said on stderr", "WARN")] {
        wait_until(line, || log_lines(pid).iter().any(|logged| logged == &format!("{level} probe {line}")));
    }
}

#[test]
fn a_plugin_that_says_too_much_is_cut_and_works_on() {
    let probe = Probe::open(&[("flood", "x")]);
    let pid = probe.plugin.host_process().unwrap();
    let dropped = || {
        let lines = log_lines(pid).into_iter().filter(|line| line.starts_with("WARN probe lines of the plugin host"));
        lines.map(|line| line.rsplit_once("lines=").unwrap().1.parse::<usize>().unwrap()).sum::<usize>()
    };
    let logged = || log_lines(pid).iter().filter(|line| line.contains("water")).count();
    wait_until("every line is logged or counted", || dropped() + logged() >= 20_000);
    assert!(logged() < 10_000, "{} lines are logged", logged());
    assert!(probe.run(&[0x80]).is_ok());
}

#[test]
fn every_host_can_be_killed_at_once() {
    let _alone = ALONE.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let probe = Probe::open_alone(&[]);
    std::thread::scope(|scope| {
        let step = scope.spawn(|| probe.run(b"d").unwrap_err());
        wait_until("the step runs", || probe::blocked_in_pause(probe.plugin.host_process().unwrap()));
        kill_plugin_hosts();
        assert_eq!(step.join().unwrap().status(), Some(E_DEVICE_LOST));
    });
}

#[test]
fn a_plugin_cannot_leave_its_process() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    let probe = Probe::open(&[("outside", outside.path().to_str().unwrap())]);
    let pid = probe.plugin.host_process().unwrap();
    wait_until("every attempt", || log_lines(pid).iter().any(|line| line.contains("tried execve")));
    let tried = |what: &str| {
        let lines = log_lines(pid);
        let line = lines.iter().find_map(|line| Some(line.split_once(&format!("tried {what}: "))?.1.to_owned()));
        line.unwrap_or_else(|| panic!("{what} was not tried: {lines:?}"))
    };
    for denied in ["inet", "inet6", "packet", "kill-parent", "fork", "clone", "setsid", "execve"] {
        assert_eq!(tried(denied), "Operation not permitted", "{denied}");
    }
    for allowed in ["unix", "open-usr", "open-loader-cache", "thread"] {
        assert_eq!(tried(allowed), "done", "{allowed}");
    }
    let without = log_lines(pid).iter().any(|line| line.contains("has no Landlock"));
    for file in ["open-outside", "write-outside", "open-etc"] {
        assert_eq!(tried(file), if without { "done" } else { "Permission denied" }, "{file}");
    }
}

#[test]
fn a_weight_in_a_file_is_not_copied() {
    const LENGTH: usize = 64 << 20;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![1; LENGTH]).unwrap();
    file.write_all(&[42]).unwrap();
    let map = std::fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    let probe = Probe::open(&[]);
    let pid = probe.plugin.host_process().unwrap();
    let upload = WeightUpload {
        name: "w".to_owned(),
        dtype: DT_F32,
        batch: 1,
        rows: 1,
        cols: (LENGTH / 4) as u64,
        bytes: bytes::Bytes::from(map).slice(1..),
        file: Some(WeightFile { file: Arc::new(file), offset: 1 }),
    };
    let before = probe::rss_anon_bytes(pid);
    let weight = probe.backend.upload(&upload).unwrap();
    assert!(probe::rss_anon_bytes(pid) < before + (LENGTH as u64 / 8), "the weight was copied");
    assert!(probe::rss_file_bytes(pid) > LENGTH as u64, "the weight is not mapped");
    // The bytes are those at the offset: the last one differs.
    let (mut queue, plan) = probe.queue_and_plan();
    let mut output = [0];
    queue.run(&plan, &probe::step(), b"s", &mut output).unwrap();
    assert_eq!(output, [42]);
    // Without a file they go through memory.
    let made = WeightUpload { file: None, bytes: vec![7; 4096].into(), cols: 1024, ..upload };
    let _made = probe.backend.upload(&made).unwrap();
    queue.run(&plan, &probe::step(), b"s", &mut output).unwrap();
    assert_eq!(output, [7]);
    drop(weight);
    // A place past the file's end is refused, not trapped.
    let past =
        WeightUpload { file: Some(WeightFile { file: Arc::new(tempfile::tempfile().unwrap()), offset: 9 }), ..made };
    assert!(probe.backend.upload(&past).is_err());
    assert!(probe.backend.self_test(0).is_ok());
}

/// The CPU plugin in a host of its own.
fn isolated_cpu() -> (Arc<Plugin>, Backend) {
    let scan = SearchPath::only(vec![sparsed_tests::root().join("target/release/plugins")]).scan();
    let plugin = Plugin::load_isolated(scan.select(Some("cpu")).unwrap(), &BTreeMap::new(), &host_options()).unwrap();
    let backend = Backend::open(&plugin, 0, &OpenOptions::default()).unwrap();
    (plugin, backend)
}

#[test]
fn blocks_go_out_of_a_host_and_come_back() {
    let _not_killed = ALONE.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (_plugin, backend) = isolated_cpu();
    let row = |width| SpdRow { dtype: DT_F32, width };
    let desc = KvDesc {
        block_tokens: 16,
        n_blocks: 3,
        n_layers: 2,
        n_index_layers: 1,
        latent: row(8),
        rope: row(4),
        index: row(4),
    };
    let pool = backend.create_kv(&desc, None).unwrap();
    let mut queue = backend.queue().unwrap();
    let image = usize::try_from(pool.info().image_bytes).unwrap();
    let filled: Vec<u8> = (0..image).map(|i| (i % 251) as u8 >> 2).collect();
    let op = |kind, host_offset| SpdKvOp {
        kind,
        src_block: 2,
        dst_block: 2,
        n_tokens: 4,
        host_offset,
        ..SpdKvOp::default()
    };
    queue.kv(&pool, &[op(KV_IMPORT, 0)], &mut filled.clone()).unwrap();
    let mut host = vec![0xee; image + 64];
    queue.kv(&pool, &[op(KV_EXPORT, 64)], &mut host).unwrap();
    assert_eq!((&host[..64], &host[64..]), (&[0xee; 64][..], &filled[..]));
    let refused = queue.kv(&pool, &[op(77, 0)], &mut []).unwrap_err();
    assert!(refused.status() != Some(E_DEVICE_LOST) && refused.status().is_some(), "{refused}");
    assert_eq!(probe::status_of_pool(&Probe::open(&[]).backend, &desc), Some(E_UNSUPPORTED));
}

#[test]
fn fifty_hosts_leave_nothing_behind() {
    let _alone = ALONE.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let once = || {
        let probe = Probe::open_alone(&[]);
        probe.run(&[0x80]).unwrap();
        probe.plugin.host_process().unwrap()
    };
    once();
    let (fds, memory) = (probe::open_fds(), probe::rss_anon_bytes(std::process::id()));
    let pids: Vec<u32> = (0..50).map(|_| once()).collect();
    // Hosts of tests before may have ended meanwhile.
    assert!(probe::open_fds() <= fds);
    assert!(probe::rss_anon_bytes(std::process::id()) < memory + (4 << 20));
    // A zombie would still be there.
    assert!(pids.iter().all(|&pid| !probe::exists(pid)));
}
