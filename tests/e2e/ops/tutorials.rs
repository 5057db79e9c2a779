//! Each command of the tutorials, run against a daemon with the default model. `sudo` and the service manager are
//! stand-ins that do to this daemon what the real ones do to the service; `tests/systemd` has the real ones, and there
//! `tutorials.py` runs the commands that are in no `sh` block.

use sparsed_tests::broker::Broker;
use sparsed_tests::bus::{self, Bus};
use sparsed_tests::daemon::Daemon;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A box of whoever follows a tutorial.
struct Desk {
    daemon: Daemon,
    dir: TempDir,
    environment: Vec<(&'static str, String)>,
}

fn page(name: &str) -> String {
    std::fs::read_to_string(sparsed_tests::root().join("packaging/tutorials").join(name)).unwrap()
}

fn blocks(page: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    page.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

impl Desk {
    fn start(sets: &[&str], environment: &[(&str, &Path)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let conf_d = dir.path().join("conf.d");
        std::fs::create_dir(&conf_d).unwrap();
        let file = dir.path().join("config.toml");
        let model = sparsed_tests::model("smollm2-135m-dsa.gguf");
        let base = format!("[model.default]\npath = \"{}\"\n", model.display());
        std::fs::write(&file, &base).unwrap();
        std::fs::write(conf_d.join("00-base.toml"), &base).unwrap();
        let config = format!("--config={}", file.display());
        let sets: Vec<&str> = std::iter::once(config.as_str()).chain(sets.iter().copied()).collect();
        let daemon = Daemon::spawn_in(environment, None, &sets).ready();
        let python = sparsed_tests::root().join(".venv/python");
        let release = sparsed_tests::root().join("target/release");
        let tools = dir.path().join("tools");
        std::fs::create_dir(&tools).unwrap();
        let path = format!("{}:{}:{}", tools.display(), release.display(), std::env::var("PATH").unwrap());
        let environment = vec![
            ("PATH", path),
            ("PYTHONPATH", python.display().to_string()),
            ("SPARSED_SOCKET", daemon.socket().display().to_string()),
            ("CONF_D", conf_d.display().to_string()),
        ];
        let desk = Self { daemon, dir, environment };
        desk.stand_ins(&file, &conf_d);
        desk
    }

    /// What the service manager's tools do to the service, done to this daemon.
    fn stand_ins(&self, file: &Path, conf_d: &Path) {
        let (pid, log) = (self.daemon.pid(), self.dir.path().join("journal"));
        let release = sparsed_tests::root().join("target/release/sparsectl");
        let (file, conf_d, release) = (file.display(), conf_d.display(), release.display());
        let daemons_log = self.daemon.log_file();
        self.tool("sudo", "exec \"$@\"");
        // One file stands for the folder of drop-ins; the reload is over when the log says so.
        self.tool(
            "systemctl",
            &format!(
                "test \"$*\" = 'reload sparsed'\ncat {conf_d}/*.toml > {file}\nkill -HUP {pid}\n\
                 for n in $(seq 600); do\n  grep -q 'configuration reloaded' {daemons_log} && exit 0\n  sleep 0.1\n\
                 done\nexit 1",
                daemons_log = daemons_log.display()
            ),
        );
        self.tool("journalctl", &format!("cat {} {}", daemons_log.display(), log.display()));
        std::fs::write(&log, "").unwrap();
        // The system's files are this desk's.
        let config = format!(
            "case \"$1\" in\ndoctor|config|plugins|support-bundle) exec {release} \"$@\" --config {file};;\n\
             *) exec {release} \"$@\";;\nesac"
        );
        self.tool("sparsectl", &config);
    }

    fn tool(&self, name: &str, text: &str) {
        let path: PathBuf = self.dir.path().join("tools").join(name);
        std::fs::write(&path, format!("#!/bin/bash\nset -eu\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// Runs the shell commands of a page, block by block; each must succeed and say something.
    fn follow(&self, name: &str, environment: &[(&str, String)]) {
        let page = page(name);
        let commands = blocks(&page, "sh");
        assert!(commands.len() >= 3, "{name}: {} blocks", commands.len());
        for command in commands {
            let mut shell = Command::new("bash");
            shell.args(["-euo", "pipefail", "-c", &command]).current_dir(self.dir.path());
            shell.envs(self.environment.iter().map(|(key, value)| (*key, value)));
            shell.envs(environment.iter().map(|(key, value)| (*key, value)));
            let done = shell.output().unwrap();
            let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
            assert!(
                done.status.success() && !said.trim().is_empty(),
                "{name}: {command}\n{said}\n{}",
                self.daemon.log()
            );
        }
    }
}

#[test]
fn the_tutorial_of_the_unix_socket_works() {
    Desk::start(&[], &[]).follow("unix-socket.md", &[]);
}

#[test]
fn the_tutorial_of_dbus_works() {
    let bus = Bus::start(bus::Broker::DbusDaemon);
    let models = format!("models.dir={}", bus.folder().join("models").display());
    let desk = Desk::start(&[&format!("dbus.bus={}", bus.address()), &models], &[]);
    std::fs::copy(sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf"), desk.dir.path().join("small.gguf"))
        .unwrap();
    desk.daemon.wait_until("on the bus", || desk.daemon.log().contains("on D-Bus"));
    desk.follow("dbus.md", &[("DBUS_SYSTEM_BUS_ADDRESS", bus.address())]);
}

#[test]
fn the_tutorial_of_mqtt_works_and_home_assistant_is_told_the_same_topics() {
    let broker = Broker::start("");
    let page = page("mqtt-home-assistant.md");
    // The tutorial's own settings, with the broker's port.
    let settings = blocks(&page, "toml").remove(0);
    let table: toml::Table = settings.parse().unwrap();
    let mut sets = vec![format!("mqtt.broker=mqtt://127.0.0.1:{}", broker.port())];
    for (key, value) in table["mqtt"].as_table().unwrap().iter().filter(|(key, _)| *key != "broker") {
        sets.push(format!("mqtt.{key}={value}"));
    }
    let desk = Desk::start(&sets.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    desk.daemon.wait_until("connected", || desk.daemon.log().contains("connected to the MQTT broker"));
    desk.follow("mqtt-home-assistant.md", &[("PORT", broker.port().to_string())]);
    let (yaml, shell) = (blocks(&page, "yaml").remove(0), blocks(&page, "sh").join(""));
    let topics = |text: &str| -> Vec<String> {
        let words = text.split(|c: char| c.is_whitespace() || "\"',".contains(c));
        let mut topics: Vec<String> =
            words.filter(|word| word.contains("/house/") || word.ends_with("/status")).map(str::to_owned).collect();
        topics.sort();
        topics.dedup();
        topics
    };
    assert_eq!(topics(&yaml), topics(&shell));
}

#[test]
fn the_tutorial_for_operators_works() {
    let desk = Desk::start(&[], &[]);
    desk.follow("operators.md", &[]);
    assert!(desk.daemon.log().contains("limits.max_waiting = 64 (was 256)"), "{}", desk.daemon.log());
}

#[test]
fn the_commands_of_the_readme_that_use_a_build_work_one_after_the_other() {
    let readme = std::fs::read_to_string(sparsed_tests::root().join("README.md")).unwrap();
    let block = readme.split("\n## Use\n").nth(1).unwrap().split("```").nth(1).unwrap();
    let (dir, lengths) = (tempfile::tempdir().unwrap(), "-p 512 -n 128 -d 0,2048");
    assert!(block.contains(lengths) && sparsed_tests::model("smollm2-135m-dsa.gguf").exists());
    let place = dir.path().join("s").display().to_string();
    let block = block.replace("/tmp/sparsed", &place).replace(lengths, "-p 16 -n 4 -d 0,64");
    let mut shell = Command::new("timeout");
    // What is a conversation on a terminal takes its prompt from here.
    let script = format!("trap 'kill %1; wait' EXIT\n{block}");
    shell.args(["300", "bash", "-euo", "pipefail", "-c", &script]).current_dir(sparsed_tests::root());
    let prompt = dir.path().join("prompt");
    std::fs::write(&prompt, "Name a colour.").unwrap();
    let done = shell.stdin(std::fs::File::open(prompt).unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    assert!(done.status.success(), "{said}");
    for words in ["\"choices\"", "KV blocks", "TOKENS/S"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
