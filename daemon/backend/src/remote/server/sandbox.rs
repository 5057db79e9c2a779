//! What may a plugin in its own process not do? Start programs or processes, look into other ones, reach the network,
//! open files that are not its own.
//!
//! Best effort: what the kernel does not have is said in the log and left out. Drivers need ioctl, mmap and threads, so
//! system calls are denied by name; the list is not a proof against hostile code, which the loader's checks keep out.

use crate::Manifest;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    Scope, path_beneath_rules,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::io::Error;
use std::path::{Path, PathBuf};

/// What may be read: libraries, what the kernel says about the machine, and of its configuration what the linker, the C
/// library and drivers ask for. The rest of `/etc` is none of a plugin's business.
const READABLE: &[&str] = &[
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    // the dynamic linker
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/ld.so.preload",
    // the C library: time, the user's name and home, the system's name
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/group",
    "/etc/os-release",
    "/etc/alternatives",
    // drivers: OpenCL and Vulkan loaders, NVIDIA (Tegra too), Ascend
    "/etc/OpenCL",
    "/etc/vulkan",
    "/etc/nvidia",
    "/etc/nv_tegra_release",
    "/etc/ascend_install.info",
    "/etc/sys_version.conf",
    "/etc/hdcBasic.cfg",
];
/// Devices that every program may use.
const COMMON_DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
/// Landlock's rules as they are written below; an older kernel takes a part of them.
const LANDLOCK: ABI = ABI::V6;
/// Most devices that one pattern of a manifest may name.
const DEVICES_MAX: usize = 256;

/// System calls that are always refused with EPERM.
const DENIED: &[i64] = &[
    // other programs
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    // out of the group that ends with the host
    libc::SYS_setsid,
    libc::SYS_setpgid,
    // other processes
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_perf_event_open,
    // the machine
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Makes sockets and opens files past this filter.
    libc::SYS_io_uring_setup,
];

/// Gives up what the plugin in `dir` does not need, for this thread and those it starts: call it before any other.
///
/// # Errors
/// When the kernel refuses what it has.
pub fn confine(dir: &Path, manifest: &Manifest) -> Result<(), Error> {
    rustix::thread::set_no_new_privs(true)?;
    restrict_files(dir, manifest).map_err(Error::other)?;
    for filter in [processes(), filter()] {
        let filter = BpfProgram::try_from(filter.map_err(Error::other)?).map_err(Error::other)?;
        if let Err(error) = seccompiler::apply_filter(&filter) {
            log::warn!("system calls of the plugin are not filtered: {error}");
        }
    }
    Ok(())
}

fn restrict_files(dir: &Path, manifest: &Manifest) -> Result<(), landlock::RulesetError> {
    let mut readable: Vec<PathBuf> = READABLE.iter().map(PathBuf::from).collect();
    readable.push(dir.to_owned());
    readable.extend(manifest.reads.iter().map(PathBuf::from));
    let mut writable: Vec<PathBuf> = COMMON_DEVICES.iter().map(PathBuf::from).collect();
    writable.extend(manifest.devices.iter().flat_map(|pattern| matching_devices(pattern)));
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(readable, AccessFs::from_read(LANDLOCK)))?
        .add_rules(path_beneath_rules(writable, AccessFs::from_all(LANDLOCK)))?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => log::info!("this kernel's Landlock confines the plugin in part only"),
        RulesetStatus::NotEnforced => {
            log::warn!("this kernel has no Landlock: the plugin may open any file of its user")
        }
    }
    Ok(())
}

/// The device nodes that `/dev/name` or `/dev/prefix*` names; see [`crate::Manifest::devices`].
pub(crate) fn matching_devices(pattern: &str) -> Vec<PathBuf> {
    let Some(prefix) = pattern.strip_suffix('*') else { return vec![PathBuf::from(pattern)] };
    let (dir, start) = prefix.rsplit_once('/').unwrap_or(("", prefix));
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let named = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    named.map(|entry| entry.path()).take(DEVICES_MAX).collect()
}

/// No clone3(2): where its flags lie a filter cannot look. The C library then takes clone(2), whose flags are an
/// argument, as it does on a kernel without the newer call.
fn processes() -> Result<SeccompFilter, seccompiler::BackendError> {
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    SeccompFilter::new(rules, SeccompAction::Allow, missing, std::env::consts::ARCH.try_into()?)
}

/// Everything is allowed but what is denied.
fn filter() -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = DENIED.iter().map(|&call| (call, Vec::new())).collect();
    // Sockets but those of this machine.
    let not = |value: i32| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(value.unsigned_abs()))
    };
    let foreign = SeccompRule::new(vec![not(libc::AF_UNIX)?, not(libc::AF_NETLINK)?])?;
    rules.insert(libc::SYS_socket, vec![foreign]);
    // Threads may be started, processes not: none outlives the host, and none computes unseen.
    let flag = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let no_thread = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), 0)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_thread])?]);
    // Signals but to its own threads: abort() sends itself one.
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![not(own)?])?]);
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, denied, arch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_can_be_made_for_this_machine() {
        let program = BpfProgram::try_from(filter().unwrap()).unwrap();
        assert!(program.len() > DENIED.len());
    }

    #[test]
    fn patterns_name_the_devices_that_are_there() {
        assert_eq!(matching_devices("/dev/null"), [PathBuf::from("/dev/null")]);
        assert!(matching_devices("/dev/nul*").contains(&PathBuf::from("/dev/null")));
        assert!(matching_devices("/nowhere/x*").is_empty());
    }
}
