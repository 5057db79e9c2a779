//! Which accelerators are there, and why is each used or not? Device nodes, who may open them, plugins.

use super::people::{READ_AND_WRITE, USER, group_of, may};
use super::plugins::{Plugins, installs_plugin};
use super::service::{Service, drops_in};
use super::{Check, sets};
use crate::config::AUTO;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Of a file that tells something of a driver, only so much is read.
const FILE_BYTES_MAX: u64 = 16 << 10;

/// A kind of accelerator, how it shows, and what serves it.
struct Accelerator {
    name: &'static str,
    /// Files that show that there is one; of those with a text only if they have it. The first ones are device nodes.
    signs: &'static [(&'static str, &'static str)],
    /// Device nodes below `/dev` that its driver wants whatever the board.
    nodes: &'static [&'static str],
    /// And all of one of these: they differ from board to board.
    boards: &'static [&'static [&'static str]],
    /// What makes nodes that are missing.
    makes_nodes: &'static str,
    plugin: &'static str,
    /// Engines that compute with it, of those that a model can be asked of elsewhere.
    engines: &'static str,
    /// The drop-in that gives its devices to the service.
    drop_in: &'static str,
    /// Files that tell the driver's version, and what stands before it there.
    versions: &'static [(&'static str, &'static str)],
}

const JETSON: &str = "NVIDIA Jetson";

const ACCELERATORS: &[Accelerator] = &[
    Accelerator {
        name: "NVIDIA GPU",
        // Its nodes are made at the first use, by a program that needs root.
        signs: &[("dev/nvidia0", ""), ("dev/nvidiactl", ""), ("proc/driver/nvidia/version", "")],
        nodes: &["nvidia0", "nvidiactl", "nvidia-uvm"],
        boards: &[],
        makes_nodes: "sudo nvidia-modprobe -c 0 -u && sudo install -m 0644 \
                      /usr/share/sparsed/accelerators/cuda.rules /etc/udev/rules.d/71-sparsed-cuda.rules",
        plugin: "cuda",
        engines: "vLLM or SGLang",
        drop_in: "cuda",
        versions: &[("proc/driver/nvidia/version", "Kernel Module"), ("sys/module/nvidia/version", "")],
    },
    Accelerator {
        name: JETSON,
        signs: &[
            ("dev/nvhost-gpu", ""),
            ("dev/nvhost-ctrl-gpu", ""),
            ("dev/nvgpu/igpu0/ctrl", ""),
            ("etc/nv_tegra_release", ""),
            ("proc/device-tree/compatible", "nvidia,tegra"),
        ],
        nodes: &["nvmap"],
        boards: &[&["nvhost-gpu", "nvhost-ctrl-gpu"], &["nvgpu/igpu0/ctrl", "nvgpu/igpu0/channel"]],
        makes_nodes: "sudo modprobe nvgpu",
        plugin: "cuda",
        engines: "llama-server",
        drop_in: "jetson",
        versions: &[("etc/nv_tegra_release", "#")],
    },
    Accelerator {
        name: "Ascend NPU",
        signs: &[
            ("dev/davinci0", ""),
            ("dev/davinci_manager", ""),
            ("usr/local/Ascend/driver/version.info", ""),
            ("etc/ascend_install.info", ""),
        ],
        nodes: &["davinci0", "davinci_manager"],
        // Cards, and boards with a 310B.
        boards: &[&["devmm_svm", "hisi_hdc"], &["svm0", "ts_aisle", "event_sched"]],
        makes_nodes: "sudo npu-smi info",
        plugin: "ascend",
        engines: "vllm-ascend",
        drop_in: "ascend",
        versions: &[("usr/local/Ascend/driver/version.info", "Version=")],
    },
    Accelerator {
        name: "Cambricon MLU",
        signs: &[("dev/cambricon_dev0", ""), ("dev/cambricon_ctl", ""), ("sys/module/cambricon_drv/version", "")],
        nodes: &["cambricon_dev0", "cambricon_ctl"],
        boards: &[],
        makes_nodes: "sudo cnmon",
        plugin: "cambricon",
        engines: "vllm-mlu",
        drop_in: "cambricon",
        versions: &[("sys/module/cambricon_drv/version", "")],
    },
];

impl Accelerator {
    /// The file below `root` that shows that there is one.
    fn sign(&self, root: &Path) -> Option<&'static str> {
        let shows = |(file, text): &&(&'static str, &'static str)| {
            let path = root.join(file);
            path.exists() && (text.is_empty() || read(&path).is_some_and(|found| found.contains(text)))
        };
        self.signs.iter().find(shows).map(|(file, _)| *file)
    }

    /// The nodes that this board should have: of boards the one that most is there of, the first of equals.
    fn wanted(&self, root: &Path) -> Vec<&'static str> {
        let n_missing = |board: &&&[&str]| board.iter().filter(|node| !root.join("dev").join(node).exists()).count();
        let board = self.boards.iter().min_by_key(n_missing).copied().unwrap_or(&[]);
        self.nodes.iter().chain(board).copied().collect()
    }

    /// What has it compute though none of our plugins does.
    fn is_used_elsewhere(&self) -> String {
        let sets = sets("[model.NAME] upstream = \"http://127.0.0.1:8000/v1\"");
        format!("to compute with it: {} on this box, then {sets}; /usr/share/doc/sparsed/upstream.md", self.engines)
    }

    /// What lets the service see its devices.
    fn opens_sandbox(&self) -> String {
        drops_in(&format!("/usr/share/sparsed/accelerators/{}.conf", self.drop_in))
    }
}

/// Each accelerator found, and why it is or is not used. `service`: the one that serves here, unless it is another
/// daemon that is asked for.
pub(super) fn accelerators(root: &Path, plugins: &Plugins, service: Option<&Service>) -> Vec<Check> {
    let found = ACCELERATORS.iter().filter_map(|kind| Some((kind, kind.sign(root)?)));
    let found: Vec<_> = found.collect();
    // The display of a Jetson has the driver and some of the nodes of NVIDIA's cards.
    let is_jetson = found.iter().any(|(kind, _)| kind.name == JETSON);
    let counts = |(kind, _): &&(&Accelerator, &str)| !is_jetson || kind.name == JETSON || kind.plugin != "cuda";
    found.iter().filter(counts).map(|(kind, sign)| accelerator(root, kind, sign, plugins, service)).collect()
}

fn accelerator(root: &Path, kind: &Accelerator, sign: &str, plugins: &Plugins, service: Option<&Service>) -> Check {
    let Accelerator { name, makes_nodes, plugin, .. } = kind;
    let title = format!("{name} (/{sign})");
    let driver = match driver(root, kind) {
        Some(version) => format!("driver {version}"),
        None => "its driver tells no version".to_owned(),
    };
    if let Some((why, fix)) = computes_nothing(kind, plugins) {
        return Check::warn(title, format!("not used: {why}, the CPU computes; {driver}"), fix);
    }
    let node = |name: &str| root.join("dev").join(name);
    let nodes = kind.wanted(root);
    if let Some(missing) = nodes.iter().find(|name| !node(name).exists()) {
        return Check::warn(title, format!("not used: /dev/{missing} is not there; {driver}"), *makes_nodes);
    }
    if let Some(why) = service.and_then(|service| hidden(root, service, &nodes)) {
        return Check::warn(title, format!("not used: {why}; {driver}"), kind.opens_sandbox());
    }
    let groups = service.map_or(&[] as &[String], |service| service.groups.as_slice());
    if let Some(closed) = nodes.iter().find(|name| !may(root, &node(name), READ_AND_WRITE, groups)) {
        let found = format!("not used: /dev/{closed} may not be opened by the daemon's user; {driver}");
        return Check::warn(title, found, lets_in(root, &node(closed), closed));
    }
    if plugins.used == *plugin {
        return Check::ok(title, format!("used by the plugin '{plugin}'; {driver}"));
    }
    let is_chosen = plugins.why.is_some();
    let setting = if is_chosen { AUTO } else { plugins.used.as_str() };
    let why = plugins.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    let fix = match is_chosen && plugins.is_ours(plugin) == Some(true) {
        true => "sudo sparsectl plugins; sudo journalctl -u sparsed -g \"plugin chosen\"".to_owned(),
        false => sets(&format!("engine.plugin = \"{plugin}\"")),
    };
    Check::warn(title, format!("not used: engine.plugin = \"{setting}\"{why}; {driver}"), fix)
}

/// Why no plugin computes with it, if so, and what can be done then. One of others of the same id may.
fn computes_nothing(kind: &Accelerator, plugins: &Plugins) -> Option<(String, String)> {
    let (plugin, elsewhere) = (kind.plugin, kind.is_used_elsewhere());
    match (plugins.is_ours(plugin), installs_plugin(plugin, false)) {
        (Some(false), _) => None,
        (Some(true), _) if plugins.used == *plugin => {
            let back = sets("engine.plugin = \"cpu\"");
            Some((format!("the plugin '{plugin}' does not compute yet"), format!("{back}; {elsewhere}")))
        }
        (Some(true), _) => Some((format!("the plugin '{plugin}' does not compute yet"), elsewhere)),
        (None, Some(installs)) => {
            let fix = format!("{elsewhere}; to see whether its driver is found: {installs}");
            Some((format!("the plugin '{plugin}' is not installed, and does not compute yet"), fix))
        }
        (None, None) => Some(("no plugin exists for it yet".to_owned(), elsewhere)),
    }
}

/// Why the service cannot see these nodes, if so.
fn hidden(root: &Path, service: &Service, nodes: &[&str]) -> Option<String> {
    if service.hides_devices {
        return Some("sparsed.service sees no devices (PrivateDevices=yes)".to_owned());
    }
    let is_shut = |node: &&&str| !service.allows(node, driver_of(root, node).as_deref());
    nodes.iter().find(is_shut).map(|node| format!("sparsed.service may not open /dev/{node} (DeviceAllow=)"))
}

/// The name of a character device's driver in `/proc/devices`.
fn driver_of(root: &Path, node: &str) -> Option<String> {
    let major = rustix::fs::major(root.join("dev").join(node).metadata().ok()?.rdev());
    let devices = read(&root.join("proc/devices"))?;
    let characters = devices.lines().take_while(|line| !line.starts_with("Block devices"));
    let mut numbered = characters.filter_map(|line| line.trim().split_once(' '));
    numbered.find_map(|(number, name)| (number.parse() == Ok(major)).then(|| name.trim().to_owned()))
}

/// The beginning of a file of the kernel or of a driver.
fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    // A device tree's strings end in zeros.
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The version of its driver, where a file tells it.
fn driver(root: &Path, kind: &Accelerator) -> Option<String> {
    kind.versions.iter().find_map(|(file, before)| {
        let text = read(&root.join(file))?;
        let rest = text.lines().find_map(|line| Some(line.split_once(before)?.1.trim()))?;
        // In NVIDIA's line a column of its own.
        let number =
            rest.split("  ").map(str::trim).find(|part| part.starts_with(|letter: char| letter.is_ascii_digit()));
        let version = number.unwrap_or(rest);
        (!version.is_empty() && !version.chars().any(char::is_control)).then(|| version.to_owned())
    })
}

/// What lets the daemon's user in: the node's group, where it has one that may open it.
fn lets_in(root: &Path, node: &Path, name: &str) -> String {
    let group = node.metadata().ok().filter(|found| found.mode() >> 3 & 0o6 == 0o6);
    match group.and_then(|found| group_of(root, found.gid())) {
        Some((group, _)) if group != "root" => {
            format!("sudo usermod -aG {group} {USER} && sudo systemctl restart sparsed")
        }
        _ => format!("ls -l /dev/{name}; a udev rule must give it a group, and {USER} is to be in that"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::machine::tests::machine;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const NPU: [(&str, &str); 4] =
        [("dev/davinci0", ""), ("dev/davinci_manager", ""), ("dev/devmm_svm", ""), ("dev/hisi_hdc", "")];

    /// These are there, of others than us, and the first one is configured.
    fn plugins(ids: &[&str]) -> Plugins {
        let there = ids.iter().map(|&id| (id.to_owned(), false)).collect();
        Plugins { used: ids[0].to_owned(), why: None, there }
    }

    fn found(root: &Path, ids: &[&str]) -> Check {
        accelerators(root, &plugins(ids), None).remove(0)
    }

    #[test]
    fn an_accelerator_says_why_it_is_not_used() {
        let root = machine(&NPU);
        let none = found(root.path(), &["cpu"]);
        assert!(none.found.contains("no plugin exists for it yet, the CPU computes"), "{none:?}");
        assert!(none.fix.unwrap().contains("vllm-ascend on this box, then"));
        assert!(found(root.path(), &["cpu", "ascend"]).fix.unwrap().contains("engine.plugin = \"ascend\""));
        assert_eq!(found(root.path(), &["ascend"]).verdict, Verdict::Ok);
        assert!(accelerators(machine(&[]).path(), &plugins(&["cpu"]), None).is_empty());
        let part = machine(&NPU[..3]);
        assert!(found(part.path(), &["ascend"]).found.contains("/dev/hisi_hdc is not there"));
    }

    #[test]
    fn where_the_plugin_was_left_open_the_reason_is_the_choices() {
        let root = machine(&NPU);
        let why = || Some("ascend is not used: it is not of this release".to_owned());
        let said = |used: &str| {
            accelerators(root.path(), &Plugins { used: used.to_owned(), why: why(), ..plugins(&["ascend"]) }, None)
                .remove(0)
        };
        let aside = said("cpu");
        assert!(aside.found.contains("engine.plugin = \"auto\": ascend is not used: it is not of this"), "{aside:?}");
        assert!(aside.fix.unwrap().contains("engine.plugin = \"ascend\""));
        assert_eq!(said("ascend").verdict, Verdict::Ok);
    }

    #[test]
    fn a_plugin_of_ours_that_does_not_compute_yet_is_nobodys_to_configure() {
        let root = machine(&[("dev/nvidia0", "")]);
        let said = |configured: &str, there: &[&str]| {
            let there = there.iter().map(|&id| (id.to_owned(), true)).collect();
            accelerators(root.path(), &Plugins { used: configured.to_owned(), why: None, there }, None).remove(0)
        };
        let absent = said("cpu", &["cpu"]);
        assert!(absent.found.contains("'cuda' is not installed, and does not compute yet"), "{absent:?}");
        assert!(absent.fix.unwrap().contains("./sparsed-plugin-cuda"));
        let there = said("cpu", &["cpu", "cuda"]);
        assert!(there.verdict == Verdict::Warn && there.found.contains("does not compute yet"), "{there:?}");
        assert!(!there.fix.unwrap().contains("engine.plugin"));
        assert!(said("cuda", &["cpu", "cuda"]).fix.unwrap().contains("engine.plugin = \"cpu\""));
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

    #[test]
    fn a_card_whose_nodes_nobody_has_made_is_found_by_its_driver() {
        let root = machine(&[("proc/driver/nvidia/version", "NVRM version: x  Kernel Module  535.1  y\n")]);
        let check = found(root.path(), &["cuda"]);
        assert_eq!(check.name, "NVIDIA GPU (/proc/driver/nvidia/version)");
        assert!(check.found.contains("/dev/nvidia0 is not there; driver 535.1"), "{check:?}");
        assert!(check.fix.unwrap().starts_with("sudo nvidia-modprobe -c 0 -u && "));
    }

    #[test]
    fn boards_have_other_nodes_than_cards() {
        let nodes = |names: &[&str]| -> tempfile::TempDir {
            let paths: Vec<String> = names.iter().map(|name| format!("dev/{name}")).collect();
            machine(&paths.iter().map(|path| (path.as_str(), "")).collect::<Vec<_>>())
        };
        let board = ["davinci0", "davinci_manager", "svm0", "ts_aisle", "event_sched"];
        assert_eq!(found(nodes(&board).path(), &["ascend"]).verdict, Verdict::Ok);
        let part = found(nodes(&board[..4]).path(), &["ascend"]);
        assert!(part.found.contains("/dev/event_sched is not there"), "{part:?}");
        for jetson in [["nvmap", "nvhost-gpu", "nvhost-ctrl-gpu"], ["nvmap", "nvgpu/igpu0/ctrl", "nvgpu/igpu0/channel"]]
        {
            let check = found(nodes(&jetson).path(), &["cuda"]);
            assert_eq!((check.verdict, check.name.split(' ').nth(1)), (Verdict::Ok, Some("Jetson")));
        }
        // Its display has the driver of the cards, which is no second accelerator.
        let display = machine(&[
            ("proc/device-tree/compatible", "nvidia,p3701\0nvidia,tegra234\0"),
            ("proc/driver/nvidia/version", "NVRM"),
            ("dev/nvidia0", ""),
        ]);
        let checks = accelerators(display.path(), &plugins(&["cuda"]), None);
        assert_eq!(checks.len(), 1);
        assert!(checks[0].found.contains("/dev/nvmap is not there"), "{checks:?}");
    }

    /// What the sandbox hides is a finding of its own, and what it opens counts: files of a test have no major number.
    #[test]
    fn a_service_whose_sandbox_hides_the_devices_names_the_drop_in() {
        let root = machine(&[NPU[0], NPU[1], NPU[2], NPU[3], ("proc/devices", "Character devices:\n  0 davinci-x\n")]);
        let check = |more: &str| {
            let service = Service::parse(&format!("LoadState=loaded\nDevicePolicy=closed\n{more}")).unwrap();
            accelerators(root.path(), &plugins(&["ascend"]), Some(&service)).remove(0)
        };
        let private = check("PrivateDevices=yes\nDeviceAllow=/dev/davinci0 rw\n");
        assert!(private.found.contains("PrivateDevices=yes"), "{private:?}");
        let fix = private.fix.unwrap();
        assert!(fix.contains("/usr/share/sparsed/accelerators/ascend.conf") && fix.contains("daemon-reload"), "{fix}");
        let closed = check("PrivateDevices=no\nDeviceAllow=/dev/davinci0 rw\n");
        assert!(closed.found.contains("may not open /dev/davinci_manager"), "{closed:?}");
        assert_eq!(check("PrivateDevices=no\nDeviceAllow=char-davinci* rw\n").verdict, Verdict::Ok);
    }

    #[test]
    fn the_drop_ins_that_are_named_are_those_that_are_there() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../systemd/accelerators"));
        for kind in ACCELERATORS {
            let text = fs::read_to_string(folder.join(format!("{}.conf", kind.drop_in))).unwrap();
            // Whatever board it is, what the doctor asks for is what the drop-in gives, by path or by driver.
            for node in kind.nodes.iter().chain(kind.boards.iter().copied().flatten()) {
                let family = node.split(['-', '_', '/']).next().unwrap().trim_end_matches(char::is_numeric);
                let is_given = text.contains(&format!("DeviceAllow=/dev/{node} rw"))
                    || text.contains(&format!("DeviceAllow=char-{family}"));
                assert!(is_given, "{}.conf does not give /dev/{node}", kind.drop_in);
            }
        }
        assert!(folder.join("cuda.rules").exists());
    }
}
