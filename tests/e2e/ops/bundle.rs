//! `sparsectl support-bundle`: what must be in it, and what must not.

use serde_json::json;
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Words that are said, and secrets, each planted somewhere else; none of them may leave the box.
const PLANTED: [&str; 21] = [
    "prompt-zebra-1",
    "system-zebra-2",
    "session-zebra-3",
    "title-zebra-4",
    "api-key-zebra-5-0123",
    "mqtt-password-zebra-6",
    "environment-zebra-7",
    "user-zebra-8",
    "log-bearer-zebra-9",
    "refused-zebra-10",
    "tool-environment-zebra-11",
    "relay-key-zebra-12-0123",
    // As long as a key is.
    "master-key-zebra-13-0123456789ab",
    "signature-zebra-14",
    "address-zebra-15",
    "licence-zebra-16",
    "blank-zebra-17",
    "lines-zebra-18",
    "argument-zebra-19",
    "at-sign@zebra-20",
    "slash/zebra-21",
];

fn secret_file(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

/// Settings whose files have keys and passwords in them.
fn write_settings(dir: &Path) {
    let path = |name: &str| dir.join(name);
    secret_file(&path("keys"), &format!("hall {}\n", PLANTED[4]));
    secret_file(&path("password"), &format!("{}\n", PLANTED[5]));
    secret_file(&path("relay"), &format!("{}\n", PLANTED[11]));
    std::fs::create_dir(path("credentials")).unwrap();
    secret_file(&path("credentials/sparsed.master-key"), PLANTED[12]);
    let config = format!(
        "[log]\nlevel = \"debug\"\n[engine.set]\nlicence = \"{}\"\n\"a b\" = \"{}\"\nlines = \"a\\n{}\"\n\
         [tcp]\nlisten = \"127.0.0.1:0\"\nkeys = \"{}\"\n\
         [mqtt]\nbroker = \"mqtt://127.0.0.1:1\"\nusername = \"{}\"\npassword_file = \"{}\"\n\
         [model.big]\nupstream = \"http://127.0.0.1:1/v1\"\n[model.big.relay]\nkey_file = \"{}\"\n",
        PLANTED[15],
        PLANTED[16],
        PLANTED[17],
        path("keys").display(),
        PLANTED[7],
        path("password").display(),
        path("relay").display()
    );
    std::fs::write(path("config.toml"), config).unwrap();
}

/// Has the daemon hear everything that can be said.
fn say_everything(daemon: &Daemon) {
    let say = |messages: serde_json::Value, more: serde_json::Value| {
        let mut body = json!({ "messages": messages, "max_tokens": 4, "user": PLANTED[0] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        daemon.post("/v1/chat/completions", &body).status
    };
    let messages = json!([{ "role": "system", "content": PLANTED[1] }, { "role": "user", "content": PLANTED[0] }]);
    assert_eq!(say(messages, json!({})), 200);
    let session = daemon.post("/v1/sessions", &json!({ "title": PLANTED[3] })).json()["id"].clone();
    assert_eq!(say(json!([{ "role": "user", "content": PLANTED[2] }]), json!({ "session_id": session })), 200);
    assert_eq!(say(json!([{ "role": PLANTED[9], "content": PLANTED[9] }]), json!({ "grammar": PLANTED[9] })), 400);
}

#[test]
fn a_bundle_has_what_helps_and_nothing_that_was_said_or_is_secret() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    write_settings(dir.path());
    let argument = format!("--config={}", path("config.toml").display());
    let planted = Path::new(PLANTED[6]);
    let credentials = path("credentials");
    let variables = [("PLANTED", planted), ("CREDENTIALS_DIRECTORY", credentials.as_path())];
    let daemon = Daemon::spawn_in(&variables, Some(&chatty::write(dir.path())), &[&argument]).ready();
    say_everything(&daemon);
    // The service's log: the daemon's own, and somebody else's line with a key, an address and a name's password in it.
    let tools = path("tools");
    std::fs::create_dir(&tools).unwrap();
    let log = daemon.log_file();
    let address = format!("https://hall:{}@example.org/m.gguf?x=1&X-Amz-Signature={}&y=2", PLANTED[14], PLANTED[13]);
    let others = format!("mqtt://anna:{}@hub https://anna:{}@hub", PLANTED[19], PLANTED[20]);
    let bearer = format!("Authorization: Bearer {} for {} at {address} {others}", PLANTED[8], PLANTED[11]);
    std::fs::write(tools.join("journalctl"), format!("#!/bin/sh\ncat {}\necho '{bearer}'\n", log.display())).unwrap();
    std::fs::set_permissions(tools.join("journalctl"), PermissionsExt::from_mode(0o755)).unwrap();
    let bundle = path("bundle.tar");
    let mut tool = Command::new(sparsed_tests::sparsectl());
    tool.arg("support-bundle").arg(&bundle).arg("--config").arg(path("config.toml"));
    tool.arg("--set").arg(format!("mqtt.client_id={}", PLANTED[18]));
    tool.arg("--socket").arg(daemon.socket()).env("PLANTED", PLANTED[10]);
    tool.env("PATH", format!("{}:{}", tools.display(), std::env::var("PATH").unwrap()));
    let done = tool.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}\n{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(bundle.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let bytes = std::fs::read(&bundle).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    for word in PLANTED {
        assert!(!text.contains(word), "{word} is in the bundle");
    }
    for part in [
        "/versions.txt",
        "/config.toml",
        "/status.json",
        "/metrics.txt",
        "/doctor.json",
        "/plugins.json",
        "/log.txt",
        "/machine.txt",
        "/process.txt",
        "/missing.txt",
    ] {
        assert!(text.contains(part), "{part} is not in the bundle: {said}");
    }
    // It helps: settings with their origin, numbers, the log's events, and that something was taken out.
    let helps = [
        "tcp.listen = \"127.0.0.1:0\" # ",
        "mqtt.client_id = \"[redacted]\" # --set mqtt.client_id\n",
        "@example.org/m.gguf?x=1&X-Amz-Signature=[redacted]&y=2",
        "sparsed_memory_kv_bytes",
        "request answered",
        "[redacted]",
        "MemTotal",
    ];
    for words in helps {
        assert!(text.contains(words), "{words} is not in the bundle");
    }
    // What is there is not written over.
    assert!(!tool.output().unwrap().status.success());
    assert_eq!(std::fs::read(&bundle).unwrap(), bytes);
}

#[test]
fn without_a_daemon_and_with_a_broken_configuration_there_is_a_bundle_that_says_so() {
    let broken: [(&str, &[&str]); 6] = [
        ("[mqtt]\nbroker = 5 # password-zebra\n", &[]),
        ("[mqtt]\nbroker = \"mqtt://anna:password-zebra/p@host:99999\"\n", &[]),
        ("[models]\nhub = \"https://anna:p@password-zebra@hub\"\n", &[]),
        ("[models]\nhub = \"https://anna:password-zebra/p@hub\"\n", &[]),
        ("[engine.set]\n\n", &["engine.set.licence.key=password-zebra"]),
        ("[tcp]\nkeys = \"KEYS\"\n[limits]\nstop_s = password-zebra\n", &[]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let keys = dir.path().join("keys");
    secret_file(&keys, "hall key-zebra-0123456789\n");
    let log = dir.path().join("journalctl");
    std::fs::write(&log, "#!/bin/sh\necho 'who comes with key-zebra-0123456789?'\n").unwrap();
    std::fs::set_permissions(&log, PermissionsExt::from_mode(0o755)).unwrap();
    for (n, (text, sets)) in broken.into_iter().enumerate() {
        std::fs::write(&file, text.replace("KEYS", &keys.display().to_string())).unwrap();
        let bundle = dir.path().join(format!("bundle-{n}.tar"));
        let mut tool = Command::new(sparsed_tests::sparsectl());
        tool.arg("support-bundle").arg(&bundle).arg("--config").arg(&file);
        tool.args(sets.iter().flat_map(|set| ["--set", *set])).arg("--socket").arg(dir.path().join("none.sock"));
        tool.env("PATH", format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap()));
        let done = tool.output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let said = String::from_utf8_lossy(&std::fs::read(&bundle).unwrap()).into_owned();
        let place = if sets.is_empty() { "config.toml:" } else { "--set engine.set.licence.key: " };
        assert!(said.contains(place) && said.contains("no daemon answers"), "{text}: {said}");
        assert!(!said.contains("password-zebra"), "{text}: what is wrong is quoted");
        assert_eq!(said.contains("key-zebra"), !text.contains("KEYS"), "{text}: a key of a wrong configuration");
    }
}
