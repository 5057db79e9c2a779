//! Does the machine have what serving wants? Processor, memory, clock, temperature.
//!
//! What the kernel says is read below a root folder, so that tests can have another machine.

use super::service::Service;
use super::{Check, sets, size};
use crate::memory::{kib_in, room};
use sparsed_session::DATE_MIN_S;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// What the daemon takes beside models, workspaces among it.
const FIXED_BYTES: u64 = 128 << 20;
/// The service's control group, if it ran.
const GROUP: &str = "/system.slice/sparsed.service";
/// No useful model is smaller.
const MODEL_BYTES_MIN: u64 = 64 << 20;
/// So near to a trip point, a processor is about to be slowed down, in thousandths of a degree.
const HOT_MARGIN: i64 = 5_000;

/// Memory of the machine, or of the control group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes that a daemon which begins now can have.
    pub(super) free: u64,
    /// Those among them that the one that runs holds.
    held: u64,
    /// Bytes of the service's limit, where there is one.
    limit: Option<u64>,
}

impl Memory {
    /// As the kernel has it. `pid`: the daemon's that runs. The service has a control group of its own, another daemon
    /// shares one with whoever started it.
    pub(super) fn of(root: &Path, service: Option<&Service>, pid: Option<u32>) -> Option<Self> {
        let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
        let machine = kib_in(info.as_bytes(), b"MemAvailable:")?;
        let own = pid.map(|pid| root.join("proc").join(pid.to_string()));
        let read = |name: &str| own.as_ref().and_then(|dir| fs::read_to_string(dir.join(name)).ok());
        let held = read("status").map_or(0, |status| {
            [&b"RssAnon:"[..], b"RssShmem:"].iter().filter_map(|key| kib_in(status.as_bytes(), key)).sum()
        });
        let room = match service {
            Some(service) => {
                let path = service.group.as_deref().unwrap_or(GROUP);
                // The one hierarchy, or that of memory before there was one. Without a group of its own, nothing of
                // those above is the service's.
                room(root, &format!("0::{path}\n1:memory:{path}\n"), service.group.is_none().then_some(0))
            }
            None => read("cgroup").map_or_else(Default::default, |text| room(root, &text, Some(held))),
        };
        let held = room.held.unwrap_or(held);
        let machine = machine.saturating_add(held);
        Some(Self { free: room.left.map_or(machine, |left| left.min(machine)), held, limit: room.limit })
    }

    /// What can be had, for people.
    fn told(&self) -> String {
        match self.held {
            0 => format!("{} can be had", size(self.free)),
            held => format!("{} can be had, of which the daemon that runs holds {}", size(self.free), size(held)),
        }
    }
}

/// What there is, and whether the kernel says when it gets short.
pub(super) fn memory(root: &Path, memory: Option<&Memory>) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(match memory {
        Some(memory) => {
            let limit = memory.limit.map_or(String::new(), |limit| format!("; the service's limit is {}", size(limit)));
            Check::ok("memory", format!("{}{limit}", memory.told()))
        }
        None => Check::warn("memory", "/proc/meminfo cannot be read", sets("memory.budget")),
    });
    checks.push(match root.join("proc/pressure/memory").exists() {
        true => Check::ok("memory pressure", "the kernel tells it (PSI)"),
        false => {
            let found = "the kernel does not tell it: PSI is off";
            Check::warn("memory pressure", found, turns_on_psi(root))
        }
    });
    checks
}

/// What has the kernel tell of pressure: its command line is kept by another program on each kind of system.
fn turns_on_psi(root: &Path) -> &'static str {
    let has = |program: &str| root.join(program).exists();
    match () {
        () if has("usr/sbin/update-grub") => {
            "add psi=1 to GRUB_CMDLINE_LINUX in /etc/default/grub, then: sudo update-grub && sudo reboot"
        }
        () if has("usr/sbin/grubby") => "sudo grubby --update-kernel=ALL --args=psi=1 && sudo reboot",
        () => "add psi=1 to the kernel's command line where the boot loader has it, then: sudo reboot",
    }
}

/// The largest model that this memory serves, reckoned: its file is mapped and a copy of it packed for the kernels, and
/// an eighth as much is for its context.
pub(super) fn largest_model(memory: &Memory) -> Check {
    const NAME: &str = "largest model";
    let file = memory.free.saturating_sub(FIXED_BYTES) / 9 * 4;
    if file < MODEL_BYTES_MIN {
        let found = format!("with {} free next to nothing can be served", size(memory.free));
        return Check::warn(
            NAME,
            found,
            "sudo systemctl edit sparsed: a larger MemoryMax=, or stop what else runs (top)",
        );
    }
    // Q4_K has 4.5 bits for a weight.
    let billions = file as f64 * 8.0 / 4.5 / 1e9;
    let text = format!(
        "a file of some {}, as Q4_K {billions:.1} G parameters; `sparsectl inspect FILE` reckons one",
        size(file)
    );
    Check::ok(NAME, text)
}

/// Who keeps a clock right, and what shows that he runs.
const KEEPERS: &[(&str, &str)] = &[
    ("systemd-timesyncd", "run/systemd/timesync/synchronized"),
    ("systemd-timesyncd", "run/systemd/timesync"),
    ("chrony", "run/chrony/chronyd.pid"),
    ("chrony", "run/chrony/chronyd.sock"),
    ("ntpd", "run/ntpd.pid"),
    ("ntpsec", "run/ntpsec/ntpd.pid"),
    ("OpenNTPD", "run/openntpd.pid"),
    ("OpenNTPD", "run/ntpd.sock"),
    // A container's clock is its host's, who sees to it.
    ("the host", "run/systemd/container"),
    ("the host", "run/host/container-manager"),
    ("the host", ".dockerenv"),
];
/// What has systemd keep the clock; who does it is a package of its own on some systems.
fn sets_clock(root: &Path) -> &'static str {
    match root.join("usr/bin/apt").exists() {
        true => "sudo timedatectl set-ntp true (or first: sudo apt install systemd-timesyncd)",
        false => "sudo timedatectl set-ntp true (or first: sudo dnf install chrony)",
    }
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
        return Check::warn(NAME, found, sets_clock(root));
    }
    let has_rtc = root.join("dev/rtc0").exists() || root.join("dev/rtc").exists();
    let rtc = if has_rtc { "" } else { "; no clock runs while the box is off" };
    let is_there = |(_, sign): &&(&str, &str)| root.join(sign).exists();
    match KEEPERS.iter().find(is_there) {
        Some((keeper, _)) => Check::ok(NAME, format!("is set, kept by {keeper}{rtc}")),
        None => {
            Check::warn(NAME, format!("is set, but nobody keeps it right: no time service runs{rtc}"), sets_clock(root))
        }
    }
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
        return Some(Check::warn(NAME, found, format!("more air, or {}", sets("fewer engine.threads"))));
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

    fn service() -> Service {
        Service { group: Some(GROUP.to_owned()), ..Service::default() }
    }

    const INFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    2048 kB\n");

    #[test]
    fn the_services_limit_counts_where_it_is_tighter_and_a_share_of_it_stays_free() {
        let free = |limit: &str, group: &str, file: [&str; 2]| {
            let dir = format!("sys/fs/cgroup/{group}system.slice/sparsed.service");
            let names = [file[0], file[1], "memory.stat"].map(|name| format!("{dir}/{name}"));
            let root = machine(&[INFO, (&names[0], limit), (&names[1], "0\n"), (&names[2], "")]);
            Memory::of(root.path(), Some(&service()), None).unwrap().free
        };
        let v2 = |limit: &str| free(limit, "", ["memory.max", "memory.current"]);
        assert_eq!((v2("max\n"), v2("1000000\n"), v2("99999999\n")), (2 << 20, 900_000, 2 << 20));
        let v1 = |limit: &str| free(limit, "memory/", ["memory.limit_in_bytes", "memory.usage_in_bytes"]);
        assert_eq!((v1("9223372036854771712\n"), v1("1000000\n")), (2 << 20, 900_000));
    }

    /// A model is not too large because it is loaded.
    #[test]
    fn what_the_daemon_that_runs_holds_is_not_missing() {
        let status =
            ("proc/7/status", "Name:\tsparsed\nRssAnon:\t    1024 kB\nRssFile:\t 99 kB\nRssShmem:\t  512 kB\n");
        let root = machine(&[INFO, status, ("proc/7/cgroup", "0::/\n")]);
        let found = Memory::of(root.path(), None, Some(7)).unwrap();
        assert_eq!((found.free, found.held), ((2048 + 1024 + 512) << 10, (1024 + 512) << 10));
        assert!(memory(root.path(), Some(&found))[0].found.contains("the daemon that runs holds"));
        // The service's group counts the processes of its plugins as well.
        let group = "sys/fs/cgroup/system.slice/sparsed.service";
        let names = ["memory.max", "memory.current", "memory.stat"].map(|name| format!("{group}/{name}"));
        let root = machine(&[
            INFO,
            status,
            (&names[0], "max\n"),
            (&names[1], "4000000\n"),
            (&names[2], "anon 2097152\nshmem 1048576\n"),
        ]);
        let found = Memory::of(root.path(), Some(&service()), Some(7)).unwrap();
        assert_eq!((found.free, found.held), (5 << 20, 3 << 20));
        // One that does not run has none: what others use of the machine's own group is theirs.
        let above = ["memory.max", "memory.current", "memory.stat"].map(|name| format!("sys/fs/cgroup/{name}"));
        let root = machine(&[INFO, (&above[0], "2000000\n"), (&above[1], "1000000\n"), (&above[2], "anon 9\n")]);
        let found = Memory::of(root.path(), Some(&Service::default()), None).unwrap();
        assert_eq!((found.free, found.held), (800_000, 0));
        let gone = Memory::of(root.path(), None, None).unwrap();
        assert_eq!((gone.free, gone.held), (2 << 20, 0));
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
        let chrony = clock_at(machine(&[("run/chrony/chronyd.pid", "7")]).path(), DATE_MIN_S);
        assert!(chrony.found.contains("kept by chrony; no clock runs"), "{chrony:?}");
        let alone = clock_at(machine(&[("dev/rtc0", "")]).path(), DATE_MIN_S);
        assert_eq!(alone.verdict, Verdict::Warn);
        assert!(alone.fix.unwrap().starts_with("sudo timedatectl set-ntp true"));
    }

    #[test]
    fn the_largest_model_leaves_room_for_its_copy_and_its_context() {
        let of = |free: u64| largest_model(&Memory { free, held: 0, limit: None });
        let small = of(FIXED_BYTES);
        assert!(small.verdict == Verdict::Warn, "{small:?}");
        let (gib, shown) = (1_u64 << 30, of(9 * (1 << 30) + FIXED_BYTES).found);
        assert!(shown.contains(&size(4 * gib)), "{shown}");
    }
}
