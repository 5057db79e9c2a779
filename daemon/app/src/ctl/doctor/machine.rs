//! Does the machine have what serving wants? Memory, disk, accelerators, clock, temperature.
//!
//! What the kernel says is read below a root folder, so that tests can have another machine.

use super::{Check, size};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// Less free space than this is no good for conversations.
const DISK_FREE_MIN: u64 = 1 << 30;
/// What is written to learn the disk's speed.
const PROBE_BYTES: usize = 1 << 20;
/// A disk that takes longer for that makes durable tokens wait.
const PROBE_SLOW: Duration = Duration::from_millis(200);
/// Clocks before 2025 have not been set since the box started.
const CLOCK_MIN_S: u64 = 1_735_689_600;
/// So near to a trip point, a processor is about to be slowed down, in thousandths of a degree.
const HOT_MARGIN: i64 = 5_000;

/// Memory of the machine, or of the control group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes that can be had now.
    pub(super) free: u64,
    /// Bytes of the limit, where there is one.
    limit: Option<u64>,
}

impl Memory {
    /// As the kernel has it.
    pub(super) fn of(root: &Path) -> Option<Self> {
        let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
        let available = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let machine = available.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10;
        // systemd's unit, in the unified or the old hierarchy.
        let limits =
            ["memory.max", "memory.high"].map(|file| format!("sys/fs/cgroup/system.slice/sparsed.service/{file}"));
        let old = "sys/fs/cgroup/memory/system.slice/sparsed.service/memory.limit_in_bytes".to_owned();
        let limit = limits.iter().chain([&old]).filter_map(|file| {
            fs::read_to_string(root.join(file)).ok()?.trim().parse::<u64>().ok().filter(|&bytes| bytes < 1 << 60)
        });
        let limit = limit.min();
        Some(Self { free: limit.map_or(machine, |limit| limit.min(machine)), limit })
    }
}

/// What there is, and whether the kernel says when it gets short.
pub(super) fn memory(root: &Path, memory: Option<&Memory>) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(match memory {
        Some(Memory { free, limit: Some(limit) }) => {
            Check::ok("memory", format!("{} can be had; the service's limit is {}", size(*free), size(*limit)))
        }
        Some(Memory { free, limit: None }) => Check::ok("memory", format!("{} can be had", size(*free))),
        None => Check::warn("memory", "/proc/meminfo cannot be read", "set memory.budget"),
    });
    checks.push(match root.join("proc/pressure/memory").exists() {
        true => Check::ok("memory pressure", "the kernel tells it (PSI)"),
        false => {
            let found = "the kernel does not tell it: PSI is off";
            Check::warn("memory pressure", found, "add psi=1 to the kernel's command line, and restart")
        }
    });
    checks
}

/// Whether conversations have room, and how long a durable write takes.
pub(super) fn disk(state_dir: &Path, kv_quota: u64) -> Vec<Check> {
    let Some(dir) = state_dir.ancestors().find(|dir| dir.is_dir()) else { return Vec::new() };
    let mut checks = Vec::new();
    if let Ok(found) = rustix::fs::statvfs(dir) {
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        let text = format!("{} free below {}, sessions may take {}", size(free), dir.display(), size(kv_quota));
        checks.push(match free {
            free if free < DISK_FREE_MIN => {
                Check::warn("disk space", text, "free some, or set a smaller sessions.kv; old KV files go first")
            }
            _ => Check::ok("disk space", text),
        });
    }
    let written = tempfile::tempfile_in(dir).and_then(|mut file| {
        let start = Instant::now();
        file.write_all(&vec![0x5a; PROBE_BYTES])?;
        file.sync_all()?;
        Ok(start.elapsed())
    });
    match written {
        Ok(time) if time > PROBE_SLOW => checks.push(Check::warn(
            "disk speed",
            format!("1 MiB takes {} ms until it is safe", time.as_millis()),
            "a faster disk for state_dir, or durability \"turn\" instead of \"token\"",
        )),
        Ok(time) => checks.push(Check::ok("disk speed", format!("1 MiB is safe after {} ms", time.as_millis()))),
        // Whether the daemon may write is another check's matter.
        Err(_) => {}
    }
    checks
}

/// A kind of accelerator, how it shows, and what serves it.
struct Accelerator {
    name: &'static str,
    /// What device nodes begin with, below `/dev`.
    node: &'static str,
    plugin: &'static str,
}

const ACCELERATORS: &[Accelerator] = &[
    Accelerator { name: "NVIDIA GPU", node: "nvidia0", plugin: "cuda" },
    Accelerator { name: "Ascend NPU", node: "davinci0", plugin: "ascend" },
    Accelerator { name: "Cambricon MLU", node: "cambricon_dev0", plugin: "cambricon" },
];

/// Each accelerator found, and why it is or is not used. `plugins`: the one that is configured, then all there are.
pub(super) fn accelerators(root: &Path, plugins: &[String]) -> Vec<Check> {
    let there = ACCELERATORS.iter().filter(|kind| root.join("dev").join(kind.node).exists());
    let checks = there.map(|Accelerator { name, node, plugin }| {
        let title = format!("{name} (/dev/{node})");
        let path = root.join("dev").join(node);
        if !plugins.iter().any(|id| id == plugin) {
            let found = format!("not used: there is no plugin '{plugin}'; this version ships none for it");
            return Check::warn(title, found, "the CPU serves; see the README's table");
        }
        if rustix::fs::access(&path, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_err() {
            let found = "not used: you may not open it".to_owned();
            return Check::warn(title, found, format!("add the daemon's user to its group: ls -l /dev/{node}"));
        }
        if plugins.first().is_some_and(|id| id == plugin) {
            return Check::ok(title, format!("used by the plugin '{plugin}'"));
        }
        Check::warn(
            title,
            format!("not used: engine.plugin = \"{}\"", plugins[0]),
            format!("set engine.plugin = \"{plugin}\""),
        )
    });
    checks.collect()
}

/// Whether it has been set.
pub(super) fn clock() -> Option<Check> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    (since < CLOCK_MIN_S).then(|| {
        let found = "has not been set: TLS will fail, and sessions will look old".to_owned();
        Check::warn("clock", found, "timedatectl set-ntp true")
    })
}

/// Processors that are about to be slowed down.
pub(super) fn temperature(root: &Path) -> Option<Check> {
    let zones = fs::read_dir(root.join("sys/class/thermal")).ok()?.flatten().map(|entry| entry.path());
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<i64>().ok();
    let hot = zones.filter_map(|zone| {
        let now = number(&zone.join("temp"))?;
        let trips = (0..16).filter_map(|at| {
            let kind = fs::read_to_string(zone.join(format!("trip_point_{at}_type"))).ok()?;
            matches!(kind.trim(), "passive" | "hot").then(|| number(&zone.join(format!("trip_point_{at}_temp"))))?
        });
        let trip = trips.filter(|&trip| trip > 0).min()?;
        (now + HOT_MARGIN >= trip).then_some((now, trip))
    });
    let (now, trip) = hot.max()?;
    let found = format!("{} °C; at {} °C the processor is slowed down", now / 1000, trip / 1000);
    Some(Check::warn("temperature", found, "more air, or fewer engine.threads"))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_services_limit_counts_where_it_is_tighter() {
        let info = ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    2048 kB\n");
        let free = |limit: &str| {
            let root = machine(&[info, ("sys/fs/cgroup/system.slice/sparsed.service/memory.max", limit)]);
            Memory::of(root.path()).unwrap().free
        };
        assert_eq!((free("max\n"), free("1048576\n"), free("99999999\n")), (2 << 20, 1 << 20, 2 << 20));
    }

    #[test]
    fn a_kernel_without_psi_is_told_how_to_get_it() {
        let checks = memory(machine(&[]).path(), None);
        assert!(checks[1].fix.as_ref().unwrap().contains("psi=1"));
    }

    #[test]
    fn an_accelerator_says_why_it_is_not_used() {
        let root = machine(&[("dev/davinci0", "")]);
        let found = |plugins: &[&str]| {
            let plugins: Vec<String> = plugins.iter().map(|&id| id.to_owned()).collect();
            accelerators(root.path(), &plugins).remove(0)
        };
        assert!(found(&["cpu"]).found.contains("no plugin 'ascend'"));
        assert!(found(&["cpu", "ascend"]).fix.unwrap().contains("engine.plugin = \"ascend\""));
        assert_eq!(found(&["ascend"]).verdict, Verdict::Ok);
        assert!(accelerators(machine(&[]).path(), &[]).is_empty());
    }

    #[test]
    fn a_processor_near_its_trip_point_is_told() {
        let zone = |now: &str| {
            machine(&[
                ("sys/class/thermal/thermal_zone0/temp", now),
                ("sys/class/thermal/thermal_zone0/trip_point_0_type", "passive\n"),
                ("sys/class/thermal/thermal_zone0/trip_point_0_temp", "85000\n"),
            ])
        };
        assert!(temperature(zone("82000\n").path()).unwrap().found.starts_with("82 °C; at 85 °C"));
        assert_eq!(temperature(zone("60000\n").path()), None);
    }
}
