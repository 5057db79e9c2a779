//! Which accelerators are there, and why is each used or not? Device nodes, who may open them, plugins.

use super::Check;
use rustix::fs::Access;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Of a file that tells a version, only so much is read.
const VERSION_BYTES_MAX: u64 = 4096;

/// The user of the service.
const USER: &str = "sparsed";

/// A kind of accelerator, how it shows, and what serves it.
struct Accelerator {
    name: &'static str,
    /// Device nodes below `/dev` that its driver wants; the first one shows that there is such a chip.
    nodes: &'static [&'static str],
    /// What makes nodes that are missing.
    makes_nodes: &'static str,
    plugin: &'static str,
    /// Files that tell the driver's version, and what stands before it there.
    versions: &'static [(&'static str, &'static str)],
}

const ACCELERATORS: &[Accelerator] = &[
    Accelerator {
        name: "NVIDIA GPU",
        nodes: &["nvidia0", "nvidiactl", "nvidia-uvm"],
        makes_nodes: "sudo nvidia-modprobe -c 0 -u",
        plugin: "cuda",
        versions: &[("proc/driver/nvidia/version", "Kernel Module"), ("sys/module/nvidia/version", "")],
    },
    Accelerator {
        name: "NVIDIA Jetson",
        nodes: &["nvhost-gpu", "nvmap", "nvhost-ctrl"],
        makes_nodes: "sudo modprobe nvgpu",
        plugin: "cuda",
        versions: &[("etc/nv_tegra_release", "#")],
    },
    Accelerator {
        name: "Ascend NPU",
        nodes: &["davinci0", "davinci_manager", "devmm_svm", "hisi_hdc"],
        makes_nodes: "npu-smi info; then install its driver again",
        plugin: "ascend",
        versions: &[("usr/local/Ascend/driver/version.info", "Version=")],
    },
    Accelerator {
        name: "Cambricon MLU",
        nodes: &["cambricon_dev0", "cambricon_ctl"],
        makes_nodes: "cnmon; then install its driver again",
        plugin: "cambricon",
        versions: &[("sys/module/cambricon_drv/version", "")],
    },
];

/// Each accelerator found, and why it is or is not used. `plugins`: the one that is configured, then all there are.
pub(super) fn accelerators(root: &Path, plugins: &[String]) -> Vec<Check> {
    let is_there = |kind: &&Accelerator| root.join("dev").join(kind.nodes[0]).exists();
    ACCELERATORS.iter().filter(is_there).map(|kind| accelerator(root, kind, plugins)).collect()
}

fn accelerator(root: &Path, kind: &Accelerator, plugins: &[String]) -> Check {
    let Accelerator { name, nodes, makes_nodes, plugin, .. } = kind;
    let title = format!("{name} (/dev/{})", nodes[0]);
    let driver = match driver(root, kind) {
        Some(version) => format!("driver {version}"),
        None => "its driver tells no version".to_owned(),
    };
    if !plugins.iter().any(|id| id == plugin) {
        let found = format!("not used: there is no plugin '{plugin}', this version ships none for it; {driver}");
        return Check::warn(title, found, "the CPU serves; see the README's table");
    }
    let node = |node: &&&str| root.join("dev").join(node);
    if let Some(missing) = nodes.iter().find(|name| !node(name).exists()) {
        return Check::warn(title, format!("not used: /dev/{missing} is not there; {driver}"), *makes_nodes);
    }
    if let Some(closed) = nodes.iter().find(|name| !may_be_opened(root, &node(name))) {
        let found = format!("not used: /dev/{closed} may not be opened by the daemon's user; {driver}");
        return Check::warn(title, found, lets_in(root, &node(&closed), closed));
    }
    if plugins.first().is_some_and(|id| id == plugin) {
        return Check::ok(title, format!("used by the plugin '{plugin}'; {driver}"));
    }
    let found = format!("not used: engine.plugin = \"{}\"; {driver}", plugins[0]);
    Check::warn(title, found, format!("set engine.plugin = \"{plugin}\""))
}

/// The version of its driver, where a file tells it.
fn driver(root: &Path, kind: &Accelerator) -> Option<String> {
    kind.versions.iter().find_map(|(file, before)| {
        let file = fs::File::open(root.join(file)).ok()?;
        let mut text = String::new();
        file.take(VERSION_BYTES_MAX).read_to_string(&mut text).ok()?;
        let rest = text.lines().find_map(|line| Some(line.split_once(before)?.1.trim()))?;
        // In NVIDIA's line a column of its own.
        let number =
            rest.split("  ").map(str::trim).find(|part| part.starts_with(|letter: char| letter.is_ascii_digit()));
        let version = number.unwrap_or(rest);
        (!version.is_empty() && !version.chars().any(char::is_control)).then(|| version.to_owned())
    })
}

/// Whether the daemon's user may read and write `node`; where there is no such user, whether whoever asks may.
fn may_be_opened(root: &Path, node: &Path) -> bool {
    let (Some((uid, gid)), Ok(found)) = (user(root), node.metadata()) else {
        return rustix::fs::access(node, Access::READ_OK | Access::WRITE_OK).is_ok();
    };
    let allows = |shift: u32| found.mode() >> shift & 0o6 == 0o6;
    match found {
        _ if found.uid() == uid => allows(6),
        _ if found.gid() == gid || is_member(root, found.gid()) => allows(3),
        _ => allows(0),
    }
}

/// What lets the daemon's user in: the node's group, where it has one that may open it.
fn lets_in(root: &Path, node: &Path, name: &str) -> String {
    let group = node.metadata().ok().filter(|found| found.mode() >> 3 & 0o6 == 0o6);
    match group.and_then(|found| group_of(root, found.gid())) {
        Some((group, _)) if group != "root" => {
            format!("sudo usermod -aG {group} {USER} && sudo systemctl restart sparsed")
        }
        _ => format!("ls -l /dev/{name}: give it a group by a udev rule of its driver, and {USER} that group"),
    }
}

/// Ids of the daemon's user and of its first group, if it is a user of this box.
fn user(root: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(root.join("etc/passwd")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(USER)?.strip_prefix(':'))?;
    let mut ids = line.split(':').skip(1);
    Some((ids.next()?.parse().ok()?, ids.next()?.parse().ok()?))
}

fn is_member(root: &Path, gid: u32) -> bool {
    group_of(root, gid).is_some_and(|(_, members)| members.iter().any(|member| member == USER))
}

/// A group's name and members.
fn group_of(root: &Path, gid: u32) -> Option<(String, Vec<String>)> {
    let text = fs::read_to_string(root.join("etc/group")).ok()?;
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let (name, id, members) = (parts.next()?, parts.nth(1)?, parts.next()?);
        (id.parse() == Ok(gid)).then(|| (name.to_owned(), members.split(',').map(str::to_owned).collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::machine::tests::machine;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const NPU: [(&str, &str); 4] =
        [("dev/davinci0", ""), ("dev/davinci_manager", ""), ("dev/devmm_svm", ""), ("dev/hisi_hdc", "")];

    fn found(root: &Path, plugins: &[&str]) -> Check {
        let plugins: Vec<String> = plugins.iter().map(|&id| id.to_owned()).collect();
        accelerators(root, &plugins).remove(0)
    }

    #[test]
    fn an_accelerator_says_why_it_is_not_used() {
        let root = machine(&NPU);
        assert!(found(root.path(), &["cpu"]).found.contains("no plugin 'ascend'"));
        assert!(found(root.path(), &["cpu", "ascend"]).fix.unwrap().contains("engine.plugin = \"ascend\""));
        assert_eq!(found(root.path(), &["ascend"]).verdict, Verdict::Ok);
        assert!(accelerators(machine(&[]).path(), &[]).is_empty());
        let part = machine(&NPU[..3]);
        assert!(found(part.path(), &["ascend"]).found.contains("/dev/hisi_hdc is not there"));
    }

    #[test]
    fn a_driver_tells_its_version_where_each_maker_has_it() {
        let nvidia =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:\n";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (builder)\n";
        let cases = [
            ("dev/nvidia0", "proc/driver/nvidia/version", nvidia, "driver 535.129.03"),
            ("dev/nvidia0", "proc/driver/nvidia/version", open, "driver 540.4.0"),
            ("dev/nvidia0", "sys/module/nvidia/version", "550.90.07\n", "driver 550.90.07"),
            (
                "dev/nvhost-gpu",
                "etc/nv_tegra_release",
                "# R35 (release), REVISION: 4.1, GCID: 1\n",
                "driver R35 (release), REVISION: 4.1, GCID: 1",
            ),
            (
                "dev/davinci0",
                "usr/local/Ascend/driver/version.info",
                "Version=23.0.3\nascendhal_version=7\n",
                "driver 23.0.3",
            ),
            ("dev/cambricon_dev0", "sys/module/cambricon_drv/version", "5.10.22\n", "driver 5.10.22"),
            ("dev/davinci0", "usr/local/Ascend/driver/other", "", "its driver tells no version"),
        ];
        for (node, file, text, expected) in cases {
            let check = found(machine(&[(node, ""), (file, text)]).path(), &["cpu"]);
            assert!(check.found.ends_with(&format!("; {expected}")), "{check:?}");
        }
    }

    /// The files of a test have its own group, whoever runs it.
    #[test]
    fn a_node_of_a_group_that_the_daemon_is_not_in_names_the_command_that_lets_it_in() {
        let gid = machine(&[("x", "")]).path().join("x").metadata().unwrap().gid();
        let group = |members: &str| format!("other:x:4999:\nnpu:x:{gid}:{members}\n");
        let passwd = ("etc/passwd", "root:x:0:0::/:/bin/sh\nsparsed:x:4711:4712::/:/bin/false\n");
        let check = |members: &str| {
            let group = group(members);
            let files: Vec<(&str, &str)> = NPU.into_iter().chain([passwd, ("etc/group", group.as_str())]).collect();
            let root = machine(&files);
            for (name, _) in NPU {
                fs::set_permissions(root.path().join(name), fs::Permissions::from_mode(0o660)).unwrap();
            }
            found(root.path(), &["ascend"])
        };
        assert_eq!(check("hall,sparsed").verdict, Verdict::Ok);
        let closed = check("hall");
        assert_eq!(closed.verdict, Verdict::Warn);
        assert_eq!(closed.fix.unwrap(), "sudo usermod -aG npu sparsed && sudo systemctl restart sparsed");
    }
}
