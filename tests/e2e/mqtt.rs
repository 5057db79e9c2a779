//! Real brokers and real clients: the promise of `packaging/mqtt.md` through the deaths of brokers and daemons.
//! `LONG=1` asks 2000 times instead of 200.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test")]

use serde_json::Value;
use sparsed_tests::broker::Broker;
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use sparsed_tests::small_disk::SmallDisk;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Lines of a broker's configuration: what it has survives its death, mostly.
const PERSISTENT: &str = "persistence true\nautosave_interval 1\nmax_inflight_messages 20\n";

struct Node {
    daemon: Daemon,
    _model: TempDir,
    sets: Vec<String>,
}

impl Node {
    fn start(broker: &str, node: &str, sets: &[&str]) -> Self {
        let model = tempfile::tempdir().unwrap();
        let own = ["engine.threads=1", "limits.stop_s=5", "model.default.max_context=4096", "mqtt.keepalive_s=5"];
        let mut all: Vec<String> = own.iter().chain(sets).map(|set| (*set).to_owned()).collect();
        all.extend([format!("mqtt.broker={broker}"), format!("mqtt.node={node}")]);
        let daemon = Daemon::start(&chatty::write(model.path()), &strs(&all));
        Self { daemon, _model: model, sets: all }
    }

    fn on(broker: &Broker, sets: &[&str]) -> Self {
        Self::start(&url(broker), "box", sets)
    }

    fn kill_and_restart(&mut self) {
        self.daemon.kill_and_restart(&strs(&self.sets));
    }
}

fn url(broker: &Broker) -> String {
    format!("mqtt://127.0.0.1:{}", broker.port())
}

fn strs(sets: &[String]) -> Vec<&str> {
    sets.iter().map(String::as_str).collect()
}

/// Runs the Python clients.
fn client(arguments: &[&str], port: u16) -> Command {
    let python = sparsed_tests::root().join(".venv/python");
    assert!(python.exists(), "{} is not there: run `make test`", python.display());
    let path = [python.into_os_string(), std::env::var_os("PYTHONPATH").unwrap_or_default()].join(":".as_ref());
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", path).arg(sparsed_tests::root().join("tests/e2e/mqtt_client.py"));
    command.arg(arguments[0]).arg(port.to_string()).args(&arguments[1..]);
    command
}

fn succeeds(mut command: Command, daemon: &Daemon) -> String {
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}\n{}\n{}", String::from_utf8_lossy(&done.stderr), daemon.log());
    said
}

/// Clients that ask until all have a result, with something happening each time that 20 more have one.
struct Flood {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Flood {
    fn start(port: u16, prefix: &str, n: usize) -> Self {
        let mut command = client(&["flood", prefix, &n.to_string(), "8"], port);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next count of results; `None` at the end.
    fn next(&mut self) -> Option<String> {
        self.lines.next().map(Result::unwrap)
    }

    fn summary(mut self, last: &str, log: &str) -> Value {
        let mut last = last.to_owned();
        while let Some(line) = self.next() {
            last = line;
        }
        let done = self.child.wait_with_output().unwrap();
        assert!(done.status.success(), "{last}\n{}\n{log}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_str(&last).unwrap()
    }
}

fn n_requests() -> usize {
    if std::env::var_os("LONG").is_some() { 2000 } else { 200 }
}

#[test]
fn clients_of_both_versions_are_served() {
    let broker = Broker::start("");
    let node = Node::on(&broker, &["mqtt.pool=fleet"]);
    succeeds(client(&["basics"], broker.port()), &node.daemon);
    succeeds(client(&["v311"], broker.port()), &node.daemon);
    succeeds(client(&["big"], broker.port()), &node.daemon);
}

#[test]
fn what_one_client_asks_takes_no_result_of_another_one_away() {
    let broker = Broker::start("");
    let node = Node::on(&broker, &["mqtt.inbox=1MiB"]);
    assert!(succeeds(client(&["share"], broker.port()), &node.daemon).contains("ok"));
}

#[test]
fn ten_thousand_malformed_requests_harm_nobody() {
    let broker = Broker::start("");
    let node = Node::on(&broker, &["mqtt.per_client=64", "mqtt.inbox=16MiB", "sessions.max_per_user=20"]);
    let n = if std::env::var_os("LONG").is_some() { "100000" } else { "10000" };
    let pid = node.daemon.pid().to_string();
    println!("{}", succeeds(client(&["fuzz", &pid, n], broker.port()), &node.daemon));
    assert!(!node.daemon.log().contains("panicked"), "{}", node.daemon.log());
}

#[test]
fn each_request_has_one_result_though_brokers_and_daemons_die() {
    let mut broker = Broker::start(PERSISTENT);
    let mut node = Node::on(&broker, &["mqtt.keep_s=3600"]);
    let n = n_requests();
    let mut flood = Flood::start(broker.port(), "sparsed/v1/box", n);
    let (mut last, mut blows) = (String::new(), 0);
    while let Some(line) = flood.next() {
        last = line;
        if last.starts_with('{') {
            break;
        }
        match blows {
            0 | 2 | 4 => broker.kill_and_restart(),
            1 | 5 => node.kill_and_restart(),
            3 => {
                // Longer than two keepalives: the daemon must find out by itself that nobody is there.
                broker.signal("STOP");
                node.daemon.wait_until("alone", || node.daemon.log().matches("no connection to the MQTT").count() >= 3);
                broker.signal("CONT");
            }
            _ => {}
        }
        blows += 1;
    }
    let summary = flood.summary(&last, &node.daemon.log());
    assert_eq!(summary["results"], n, "{summary}");
    assert!(blows > 5, "{blows} blows");
}

#[test]
fn what_is_kept_under_the_key_in_the_state_folder_is_kept_under_a_credential_that_is_given_later() {
    let broker = Broker::start("");
    let mut node = Node::on(&broker, &["mqtt.keep_s=3600"]);
    let asked = Flood::start(broker.port(), "sparsed/v1/box", 8).summary("", "");
    assert_eq!(asked["results"], 8, "{asked}");
    let credentials = tempfile::tempdir().unwrap();
    let key = credentials.path().join("sparsed.master-key");
    std::fs::write(&key, [7; 32]).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o400)).unwrap();
    node.daemon.signal("KILL");
    node.daemon.wait();
    let environment = [("CREDENTIALS_DIRECTORY", credentials.path())];
    node.daemon.restart_in(&environment, &strs(&node.sets));
    let log = || node.daemon.log();
    node.daemon.wait_until("MQTT is served", || log().matches("connected to the MQTT broker").count() == 2);
    assert!(log().contains("which nothing needs that is kept") && !log().contains("MQTT is not served"), "{}", log());
    // Then the file may go.
    std::fs::remove_file(node.daemon.state_dir().join("master.key")).unwrap();
    node.daemon.signal("KILL");
    node.daemon.wait();
    node.daemon.restart_in(&environment, &strs(&node.sets));
    let log = || node.daemon.log();
    node.daemon.wait_until("MQTT is served", || log().matches("connected to the MQTT broker").count() == 3);
    assert!(!log().contains("another key;") && !log().contains("MQTT is not served"), "{}", log());
}

#[test]
fn a_broker_that_forgets_everything_takes_no_result_away() {
    let mut broker = Broker::start("persistence false\n");
    let node = Node::on(&broker, &[]);
    let mut flood = Flood::start(broker.port(), "sparsed/v1/box", 60);
    let first = flood.next().unwrap();
    broker.kill_and_restart();
    assert_eq!(flood.summary(&first, &node.daemon.log())["results"], 60);
}

#[test]
fn the_work_of_a_node_that_dies_for_good_is_done_by_the_others() {
    let broker = Broker::start(PERSISTENT);
    let pool = ["mqtt.pool=fleet"];
    let (a, b) = (Node::start(&url(&broker), "a", &pool), Node::start(&url(&broker), "b", &pool));
    let n = n_requests();
    let mut flood = Flood::start(broker.port(), "sparsed/v1/pool/fleet", n);
    let first = flood.next().unwrap();
    drop(b); // killed, and nobody starts it again
    let summary = flood.summary(&first, &a.daemon.log());
    println!("{summary}");
    assert_eq!(summary["results"], n, "{summary}");
    assert_eq!(summary["nodes"], serde_json::json!(["a", "b"]), "both had their share before");
}

#[test]
fn a_broker_that_takes_small_packets_only_gets_answers_in_parts() {
    let broker = Broker::start("max_packet_size 2000\n");
    let node = Node::on(&broker, &[]);
    let said = succeeds(client(&["small"], broker.port()), &node.daemon);
    assert!(said.contains("parts"), "{said}");
    assert!(!node.daemon.log().contains("no connection"), "{}", node.daemon.log());
}

#[test]
fn a_full_disk_is_told_and_nothing_is_lost() {
    // Without the right to mount, the desk's own tests have a disk that fails.
    let Some(disk) = SmallDisk::mount(256) else {
        return sparsed_tests::skipped("MQTT on a full disk", "this user may not mount a disk");
    };
    let broker = Broker::start("");
    let state = format!("state_dir={}", disk.path().display());
    let node = Node::on(&broker, &[state.as_str(), "sessions.enabled=false"]);
    let said = succeeds(client(&["full", &disk.path().display().to_string()], broker.port()), &node.daemon);
    assert!(said.contains("ok"), "{said}");
}

/// Certificates for an authority, the broker, the node and a client, by openssl.
fn certificates(dir: &Path) {
    let script = "
        set -e
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 \
          -subj /CN=authority -addext basicConstraints=critical,CA:TRUE
        for name in server box lamp tv; do
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $name.key -out $name.csr -subj /CN=$name
          printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > ext
          openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $name.pem -days 2 -extfile ext
        done";
    let done = Command::new("sh").args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn over_tls_everybody_has_a_certificate_and_only_what_the_acl_gives() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    // Client ids are the certificates' names here, whatever the client says.
    let acl = "user box\ntopic readwrite sparsed/v1/#\n\
               pattern write sparsed/v1/+/req/%c/#\npattern read sparsed/v1/+/res/%c/#\npattern read sparsed/v1/reply/%c/#\n";
    let broker = Broker::start_with_tls(dir, acl);
    let file = |key: &str, name: &str| format!("mqtt.{key}={}", broker.dir().join(name).display());
    let files = [file("ca_file", "ca.pem"), file("cert_file", "box.pem"), file("key_file", "box.key")];
    let mut sets = strs(&files);
    // The daemon lets answers go there, the broker does not.
    sets.push("mqtt.reply_topics=[\"elsewhere/#\"]");
    let node = Node::start(&format!("mqtts://localhost:{}", broker.port()), "box", &sets);
    let tls = |name: &str| {
        let path = |file: String| broker.dir().join(file).display().to_string();
        format!(
            "-h localhost -p {} --cafile {} --cert {} --key {} -i lamp",
            broker.port(),
            path("ca.pem".to_owned()),
            path(format!("{name}.pem")),
            path(format!("{name}.key")),
        )
    };
    let body =
        r#""body":{"messages":[{"role":"user","content":"Hi"}],"max_tokens":4,"temperature":0,"ignore_eos":true}"#;
    let shell = |script: String| {
        let done = Command::new("sh").arg("-c").arg(script).output().unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    node.daemon.wait_until("subscribed", || node.daemon.log().contains("connected to the MQTT broker"));
    let asked = |name: &str, id: &str, segment: &str, reply: &str, wait_s: u32| {
        let payload = format!(r#"{{"id":"{id}",{body}}}"#);
        shell(format!(
            "mosquitto_rr -V 5 {} -q 1 -W {wait_s} -t sparsed/v1/box/req/{segment}/chat -e {reply} -m '{payload}'",
            tls(name)
        ))
    };
    let said = asked("lamp", "1", "lamp", "sparsed/v1/box/res/lamp/1", 60);
    assert!(said.contains(r#""kind":"final""#), "{said}\n{}", node.daemon.log());
    // Under another client's name nothing reaches the node, and another client's answers are not heard.
    assert_eq!(asked("tv", "2", "lamp", "sparsed/v1/box/res/tv/2", 3), "");
    // A reply topic that the broker denies costs the daemon a line of its log, not its connection.
    let lost = format!(r#"{{"id":"3","reply_to":"elsewhere/x",{body}}}"#);
    shell(format!("mosquitto_pub -V 311 {} -q 1 -t sparsed/v1/box/req/lamp/chat -m '{lost}'", tls("lamp")));
    node.daemon.wait_until("denied", || node.daemon.log().contains("the broker did not take an answer"));
    let said = asked("tv", "4", "tv", "sparsed/v1/box/res/tv/4", 60);
    assert!(said.contains(r#""kind":"final""#), "{said}");
    assert!(!node.daemon.log().contains("no connection"), "{}", node.daemon.log());
}

#[test]
fn each_command_of_the_manual_does_what_it_says() {
    let manual = std::fs::read_to_string(sparsed_tests::root().join("packaging/mqtt.md")).unwrap();
    let commands: Vec<&str> = manual.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(commands.len() >= 4);
    let broker = Broker::start("");
    let node = Node::start(&url(&broker), "kitchen", &["mqtt.pool=fleet"]);
    node.daemon.wait_until("subscribed", || node.daemon.log().matches("connected to the MQTT broker").count() == 2);
    let tools =
        format!("{}:{}", sparsed_tests::root().join("target/release").display(), std::env::var("PATH").unwrap());
    for command in commands {
        let mut shell = Command::new("bash");
        shell.args(["-euo", "pipefail", "-c", command]).env("PORT", broker.port().to_string()).env("PATH", &tools);
        let done = shell.output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && !said.is_empty(), "{command}\n{said}\n{errors}\n{}", node.daemon.log());
    }
}
