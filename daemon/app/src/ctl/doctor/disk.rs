//! Has the disk of the state room for conversations, and is it fast enough for them?

use super::service::Service;
use super::state::{ELSEWHERE, moves};
use super::{Check, OPERATORS_FILE, sets, size};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Less free space than this is no good for conversations.
const DISK_FREE_MIN: u64 = 1 << 30;
/// What is written to learn the disk's speed.
const PROBE_BYTES: usize = 1 << 20;
/// A disk that takes longer for that makes durable tokens wait.
const PROBE_SLOW: Duration = Duration::from_millis(200);

/// Whether conversations have room, and how long a durable write takes.
pub(super) fn disk(state_dir: &Path, kv_quota: u64, service: Option<&Service>) -> Vec<Check> {
    let Some(dir) = state_dir.ancestors().find(|dir| dir.is_dir()) else { return Vec::new() };
    let mut checks = Vec::new();
    if let Ok(found) = rustix::fs::statvfs(dir) {
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        let text = format!("{} free below {}, sessions may take {}", size(free), dir.display(), size(kv_quota));
        checks.push(match free {
            free if free < DISK_FREE_MIN => Check::warn(
                "disk space",
                text,
                format!("free some, or (old KV files go first) {}", sets("a smaller sessions.kv")),
            ),
            _ => Check::ok("disk space", text),
        });
    }
    let written = tempfile::tempfile_in(dir).and_then(|mut file| {
        let start = Instant::now();
        file.write_all(&vec![0x5a; PROBE_BYTES])?;
        file.sync_all()?;
        Ok(start.elapsed())
    });
    // Whether the daemon may write is another check's matter.
    checks.extend(written.ok().map(|time| disk_speed(time, state_dir, Path::new(ELSEWHERE), service)));
    checks
}

/// The device that `path` lies on, or would.
fn device(path: &Path) -> Option<u64> {
    path.ancestors().find_map(|path| path.metadata().ok()).map(|found| found.dev())
}

/// `time`: what the probe took; `elsewhere`: where the service's state could be as well.
fn disk_speed(time: Duration, state_dir: &Path, elsewhere: &Path, service: Option<&Service>) -> Check {
    const NAME: &str = "disk speed";
    let lasts = "sessions.durability = \"none\", which a power cut makes forget more";
    if time <= PROBE_SLOW {
        return Check::ok(NAME, format!("1 MiB is safe after {} ms", time.as_millis()));
    }
    let fix = match service {
        Some(_) if device(elsewhere) != device(state_dir) => format!(
            "sudoedit {OPERATORS_FILE}: state_dir = \"{}\", then {}; another folder on a faster disk does as well; \
             another way: {}",
            elsewhere.display(),
            moves(state_dir, elsewhere),
            sets(lasts)
        ),
        // It would move, and be as slow there.
        Some(_) => {
            let mounted = format!("mount a faster disk at {}, once what is there is on it", state_dir.display());
            format!("{mounted}: sudoedit /etc/fstab; another way: {}", sets(lasts))
        }
        None => sets(&format!("state_dir on a faster disk, or {lasts}")),
    };
    Check::warn(NAME, format!("1 MiB takes {} ms until it is safe", time.as_millis()), fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only a setting would leave the service without its conversations: its sandbox is opened, and they are moved.
    #[test]
    fn a_slow_disk_is_told_with_all_that_moves_the_services_state_to_another() {
        let service = Service::default();
        let (state, elsewhere) = (Path::new("/var/lib/sparsed"), Path::new("/proc/none"));
        let fix = |time, service: Option<&Service>| disk_speed(time, state, elsewhere, service).fix;
        assert_eq!(fix(PROBE_SLOW, Some(&service)), None);
        let slow = fix(2 * PROBE_SLOW, Some(&service)).unwrap();
        let moves = moves(state, elsewhere);
        let sets = "sudoedit /etc/sparsed/config.toml: state_dir = \"/proc/none\", then ";
        assert!(slow.starts_with(&format!("{sets}{moves}; another ")) && slow.contains("durability"), "{slow}");
        // A daemon that is somebody's own is in no sandbox.
        assert!(!fix(2 * PROBE_SLOW, None).unwrap().contains("ReadWritePaths"));
    }

    #[test]
    fn a_slow_disks_state_is_not_sent_to_the_same_disk() {
        let disk = tempfile::tempdir().unwrap();
        let (state, elsewhere) = (disk.path().join("sparsed"), disk.path().join("srv/sparsed"));
        for elsewhere in [&elsewhere, &state] {
            let said = disk_speed(2 * PROBE_SLOW, &state, elsewhere, Some(&Service::default())).fix.unwrap();
            assert!(said.starts_with(&format!("mount a faster disk at {}, ", state.display())), "{said}");
            assert!(!said.contains("mv -n") && said.contains("durability"), "{said}");
        }
    }
}
