//! Does the machine have what serving wants? Processor, memory, disk, clock, temperature.
//!
//! What the kernel says is read below a root folder, so that tests can have another machine.

use super::{Check, size};
use sparsed_session::DATE_MIN_S;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// What the daemon takes beside models, workspaces among it.
const FIXED_BYTES: u64 = 128 << 20;
/// No useful model is smaller.
const MODEL_BYTES_MIN: u64 = 64 << 20;
/// Less free space than this is no good for conversations.
const DISK_FREE_MIN: u64 = 1 << 30;
/// What is written to learn the disk's speed.
const PROBE_BYTES: usize = 1 << 20;
/// A disk that takes longer for that makes durable tokens wait.
const PROBE_SLOW: Duration = Duration::from_millis(200);
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

/// The largest model that this memory serves, reckoned: its file is mapped and a copy of it packed for the kernels, and
/// an eighth as much is for its context.
pub(super) fn largest_model(memory: &Memory) -> Check {
    const NAME: &str = "largest model";
    let file = memory.free.saturating_sub(FIXED_BYTES) / 9 * 4;
    if file < MODEL_BYTES_MIN {
        let found = format!("with {} free next to nothing can be served", size(memory.free));
        return Check::warn(NAME, found, "stop what else runs, or raise MemoryMax= of the service");
    }
    // Q4_K has 4.5 bits for a weight.
    let billions = file as f64 * 8.0 / 4.5 / 1e9;
    let text = format!(
        "a file of some {}, as Q4_K {billions:.1} G parameters; `sparsectl inspect FILE` reckons one",
        size(file)
    );
    Check::ok(NAME, text)
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

/// Whether the clock has been set, and whether somebody keeps it right.
pub(super) fn clock(root: &Path) -> Check {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    clock_at(root, since)
}

fn clock_at(root: &Path, seconds: u64) -> Check {
    const NAME: &str = "clock";
    if seconds < DATE_MIN_S {
        let found = "has not been set: TLS will fail, and no session is deleted for its age".to_owned();
        return Check::warn(NAME, found, "timedatectl set-ntp true");
    }
    let has_rtc = root.join("dev/rtc0").exists() || root.join("dev/rtc").exists();
    let kept = match root.join("run/systemd/timesync/synchronized").exists() {
        true => ", kept by systemd-timesyncd",
        false => "",
    };
    Check::ok(NAME, format!("is set{kept}{}", if has_rtc { "" } else { "; no clock runs while the box is off" }))
}

/// What the CPU plugin has to compute with.
pub(super) fn processor() -> Check {
    const NAME: &str = "processor";
    let n = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    match instructions() {
        "" => Check::warn(
            NAME,
            format!("{n} threads, no vector instructions that the CPU plugin knows"),
            "a newer processor, or an accelerator",
        ),
        known => Check::ok(NAME, format!("{n} threads, {known}")),
    }
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    match () {
        () if std::is_x86_feature_detected!("avx512vnni") => "AVX-512 with VNNI",
        () if std::is_x86_feature_detected!("avx512f") => "AVX-512",
        () if std::is_x86_feature_detected!("avx2") => "AVX2",
        () => "",
    }
}

#[cfg(target_arch = "aarch64")]
fn instructions() -> &'static str {
    match () {
        () if std::arch::is_aarch64_feature_detected!("i8mm") => "NEON with i8mm",
        () if std::arch::is_aarch64_feature_detected!("dotprod") => "NEON with dot products",
        () => "NEON",
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn instructions() -> &'static str {
    ""
}

/// How warm the warmest part is, and whether a processor is about to be slowed down. Nothing where nobody measures.
pub(super) fn temperature(root: &Path) -> Option<Check> {
    const NAME: &str = "temperature";
    let zones = fs::read_dir(root.join("sys/class/thermal")).ok()?.flatten().map(|entry| entry.path());
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<i64>().ok();
    let measured = zones.filter_map(|zone| {
        let trips = (0..16).filter_map(|at| {
            let kind = fs::read_to_string(zone.join(format!("trip_point_{at}_type"))).ok()?;
            matches!(kind.trim(), "passive" | "hot").then(|| number(&zone.join(format!("trip_point_{at}_temp"))))?
        });
        Some((number(&zone.join("temp"))?, trips.filter(|&trip| trip > 0).min()))
    });
    let measured: Vec<(i64, Option<i64>)> = measured.collect();
    let hot =
        measured.iter().filter_map(|&(now, trip)| Some((now, trip?))).filter(|(now, trip)| now + HOT_MARGIN >= *trip);
    if let Some((now, trip)) = hot.max() {
        let found = format!("{} °C; at {} °C the processor is slowed down", now / 1000, trip / 1000);
        return Some(Check::warn(NAME, found, "more air, or fewer engine.threads"));
    }
    let warmest = measured.iter().map(|&(now, _)| now).max()?;
    Some(Check::ok(NAME, format!("{} °C at the warmest place", warmest / 1000)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Verdict;
    use super::*;

    /// A folder with these files, as a machine's root.
    pub(in super::super) fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
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
    fn a_processor_near_its_trip_point_is_told() {
        let zone = |now: &str| {
            machine(&[
                ("sys/class/thermal/thermal_zone0/temp", now),
                ("sys/class/thermal/thermal_zone0/trip_point_0_type", "passive\n"),
                ("sys/class/thermal/thermal_zone0/trip_point_0_temp", "85000\n"),
            ])
        };
        assert!(temperature(zone("82000\n").path()).unwrap().found.starts_with("82 °C; at 85 °C"));
        let cool = temperature(zone("60000\n").path()).unwrap();
        assert_eq!((cool.verdict, cool.found.as_str()), (Verdict::Ok, "60 °C at the warmest place"));
        assert_eq!(temperature(machine(&[]).path()), None);
    }

    #[test]
    fn a_clock_that_was_never_set_is_told_and_one_that_is_kept_says_by_whom() {
        let root = machine(&[("run/systemd/timesync/synchronized", ""), ("dev/rtc0", "")]);
        assert_eq!(clock_at(root.path(), 1000).verdict, Verdict::Warn);
        let set = clock_at(root.path(), DATE_MIN_S);
        assert_eq!((set.verdict, set.found.as_str()), (Verdict::Ok, "is set, kept by systemd-timesyncd"));
        assert!(clock_at(machine(&[]).path(), DATE_MIN_S).found.contains("no clock runs"));
    }

    #[test]
    fn the_largest_model_leaves_room_for_its_copy_and_its_context() {
        let of = |free: u64| largest_model(&Memory { free, limit: None });
        let small = of(FIXED_BYTES);
        assert!(small.verdict == Verdict::Warn, "{small:?}");
        let (gib, shown) = (1_u64 << 30, of(9 * (1 << 30) + FIXED_BYTES).found);
        assert!(shown.contains(&size(4 * gib)), "{shown}");
    }
}
