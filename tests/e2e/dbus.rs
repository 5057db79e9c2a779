//! `org.sparsed1` with clients that are not ours, on both message buses: what is said, what ends, what is whose.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test")]

use serde_json::json;
use sparsed_tests::bus::{Broker, Bus};
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// nobody: dbus-daemon lets in only users that the system knows.
const STRANGER: &str = "65534";

/// A daemon for the tiny chatting model on `bus`.
fn start(bus: &Bus, sets: &[&str]) -> Daemon {
    let on_bus = format!("dbus.bus={}", bus.address());
    let always = [on_bus.as_str(), "model.default.max_context=4096"];
    let daemon = Daemon::start(&chatty::write(bus.folder()), &[&always, sets].concat());
    bus.client("waits", &[]);
    daemon
}

/// A daemon that takes the bus for the system's. Its store is in the bus's folder.
fn on_the_systems_bus() -> (Bus, Daemon) {
    let bus = Bus::start(Broker::DbusDaemon);
    let address = bus.address();
    let environment = [("DBUS_SYSTEM_BUS_ADDRESS", Path::new(&address))];
    let model = chatty::write(bus.folder());
    let daemon = Daemon::spawn_in(&environment, Some(&model), &["dbus.bus=system", &store_of(&bus)]).ready();
    bus.client("waits", &[]);
    (bus, daemon)
}

/// The setting for a store of models in the bus's folder.
fn store_of(bus: &Bus) -> String {
    format!("models.dir={}", models_of(bus))
}

fn models_of(bus: &Bus) -> String {
    bus.folder().join("models").display().to_string()
}

/// Tries the same on each message bus, with a daemon of its own.
fn on_each_bus(sets: &[&str], check: impl Fn(&Bus, &Daemon)) {
    for broker in [Broker::DbusDaemon, Broker::DbusBroker] {
        let bus = Bus::start(broker);
        let daemon = start(&bus, sets);
        check(&bus, &daemon);
    }
}

#[test]
fn an_answer_is_what_http_gives_and_refusals_have_names() {
    on_each_bus(&[], |bus, daemon| {
        bus.client("answers", &[daemon.socket().to_str().unwrap()]);
        bus.client("refusals", &[]);
    });
}

/// GLib's own tool: it introspects before it calls, and shows a message only of an error that has nothing else.
#[test]
fn glibs_tool_can_look_call_and_read_what_went_wrong() {
    on_each_bus(&[], |bus, _| {
        let gdbus = |arguments: &[&str]| {
            let mut command = Command::new("gdbus");
            command.arg(arguments[0]).args(["--address", &bus.address(), "--dest", "org.sparsed1"]);
            let done = command.args(["--object-path", "/org/sparsed1"]).args(&arguments[1..]).output().unwrap();
            (done.status.success(), String::from_utf8([done.stdout, done.stderr].concat()).unwrap())
        };
        let method = |name: &str| format!("org.sparsed1.Manager.{name}");
        let (looked, said) = gdbus(&["introspect"]);
        assert!(looked && said.contains("interface org.sparsed1.Manager"), "{said}");
        let (called, said) = gdbus(&["call", "--method", &method("ListModels")]);
        assert!(called && said.contains("\"id\":\"default\""), "{said}");
        let body = r#"{"model": "none", "messages": [{"role": "user", "content": "x"}]}"#;
        let (called, said) = gdbus(&["call", "--method", &method("Generate"), body, "{}"]);
        assert!(!called && said.contains("org.sparsed1.Error.ModelNotFound: model 'none' is not configured"), "{said}");
    });
}

#[test]
fn objects_have_what_is_installed_and_say_when_it_changes() {
    let folder = sparsed_tests::root().join("packaging/dbus/interfaces");
    on_each_bus(&[], |bus, _| {
        bus.client("interface", &[folder.to_str().unwrap()]);
        bus.client("announces", &[]);
    });
}

#[test]
fn a_descriptor_keeps_a_model_in_memory() {
    let bus = Bus::start(Broker::DbusDaemon);
    let _daemon = start(&bus, &["model.default.load=demand", "model.default.keep_alive=0"]);
    bus.client("leases", &[]);
}

#[test]
fn a_request_ends_with_its_reader_its_sender_or_its_client() {
    on_each_bus(&[], |bus, daemon| {
        bus.client("ends", &[daemon.socket().to_str().unwrap()]);
    });
}

#[test]
fn large_bodies_come_in_sealed_memory_and_in_nothing_else() {
    on_each_bus(&["limits.body=3MiB"], |bus, _| {
        bus.client("large", &[&(3 << 20).to_string()]);
    });
}

#[test]
fn a_model_comes_as_a_descriptor_and_is_in_the_store_as_it_was() {
    for broker in [Broker::DbusDaemon, Broker::DbusBroker] {
        let bus = Bus::start(broker);
        // One that the configuration has already, and that is loaded when somebody asks for it.
        let late = ["model.late.path=store:late", "model.late.load=demand", "model.late.max_context=4096"];
        let daemon = start(&bus, &[&[store_of(&bus).as_str()], &late[..]].concat());
        let model = bus.folder().join("chatty.gguf");
        bus.client("adds", &[model.to_str().unwrap(), &models_of(&bus)]);
        let mut verify = Command::new(sparsed_tests::sparsectl());
        let verified =
            verify.args(["model", "verify", "--config=/dev/null", "--set", &store_of(&bus)]).output().unwrap();
        let said = String::from_utf8(verified.stdout).unwrap();
        assert!(said.contains("late: whole") && said.contains("small: whole"), "{said}");
        let question = json!({ "model": "late", "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2 });
        assert_eq!(daemon.post("/v1/chat/completions", &question).status, 200, "{}", daemon.log());
        assert!(daemon.log().contains("model added to the store"), "{}", daemon.log());
    }
}

#[test]
fn adding_a_model_ends_with_its_pipe_its_sender_or_its_daemon_and_leaves_nothing() {
    let bus = Bus::start(Broker::DbusDaemon);
    let mut daemon = start(&bus, &[&store_of(&bus)]);
    bus.client("stops_adding", &[bus.folder().to_str().unwrap(), &models_of(&bus)]);
    let left = || std::fs::read_dir(bus.folder().join("models/partial")).unwrap().count();
    for signal in ["KILL", "TERM"] {
        let mut client = bus.client_command("holds_adding", &[bus.folder().to_str().unwrap()]);
        let mut client = client.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "holds");
        daemon.signal(signal);
        assert_eq!(daemon.wait().success(), signal == "TERM");
        let last = lines.next().unwrap().unwrap_or_default();
        assert_eq!(last.contains("shutting_down"), signal == "TERM", "{last}");
        assert!(client.wait().unwrap().success());
        assert_eq!(left(), usize::from(signal == "KILL"));
        daemon.restart(&[&format!("dbus.bus={}", bus.address()), &store_of(&bus)]);
        bus.client("waits", &[]);
        assert_eq!(left(), 0);
    }
}

/// In a mount namespace of its own, as a sandboxed app has one.
#[test]
fn a_file_whose_reads_never_end_is_not_read() {
    if !Path::new("/dev/fuse").exists() {
        return println!("not tried: no /dev/fuse");
    }
    let bus = Bus::start(Broker::DbusDaemon);
    let _daemon = start(&bus, &[&store_of(&bus)]);
    let client = bus.client_command("fuse", &[bus.folder().to_str().unwrap(), &models_of(&bus)]);
    let mut apart = Command::new("unshare");
    apart.args(["--mount", "--kill-child"]).arg(client.get_program()).args(client.get_args());
    apart.envs(client.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let done = apart.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_session_does_what_its_owner_says() {
    on_each_bus(&[], |bus, _| {
        bus.client("sessions", &[]);
    });
}

#[test]
fn another_user_sees_changes_and_cancels_nothing() {
    on_each_bus(&["limits.per_user_requests=4"], |bus, _| {
        bus.client("others", &[STRANGER]);
    });
}

#[test]
fn a_session_goes_on_after_the_daemon_was_killed() {
    after_a_kill("goes_on");
}

#[test]
fn a_new_turn_of_a_session_that_was_cut_is_replied_to_at_once() {
    after_a_kill("asks_on");
}

/// What the client does with a session whose answer the daemon's end has cut.
fn after_a_kill(does: &str) {
    let bus = Bus::start(Broker::DbusDaemon);
    let mut daemon = start(&bus, &[]);
    let mut cut = bus.client_command("cut", &[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(cut.stdout.take().unwrap()).lines();
    let path = lines.next().expect("the turn has begun").unwrap();
    daemon.kill_and_restart(&[&format!("dbus.bus={}", bus.address())]);
    let begun = lines.next().expect("the pipe has ended with the daemon").unwrap();
    assert!(cut.wait().unwrap().success());
    bus.client("waits", &[]);
    bus.client(does, &[&path, &begun]);
}

#[test]
fn a_bus_may_come_late_and_go() {
    let mut bus = Bus::new(Broker::DbusDaemon);
    let on_bus = format!("dbus.bus={}", bus.address());
    let mut daemon = Daemon::start(&chatty::write(bus.folder()), &[&on_bus]);
    assert!(daemon.log().contains("not on D-Bus; tried again later"), "{}", daemon.log());
    for _ in 0..2 {
        bus.run();
        bus.client("waits", &[]);
        bus.stop();
        daemon.wait_until("told", || daemon.log().contains("the bus is gone"));
    }
    assert_eq!(daemon.get("/health").status, 200);
    daemon.signal("TERM");
    assert!(daemon.wait().success());
}

#[test]
fn slow_readers_cost_no_memory_and_nobody_elses_time() {
    let sets = ["limits.max_running=256", "limits.per_user_requests=256", "limits.slow_consumer_s=3600"];
    on_each_bus(&sets, |bus, daemon| {
        let said = bus.client("slow", &[&daemon.pid().to_string()]);
        println!("{said}");
    });
}

#[test]
fn who_may_act_for_others_is_asked_of_polkit() {
    let (bus, _daemon) = on_the_systems_bus();
    bus.client("polkit", &[STRANGER, bus.folder().join("chatty.gguf").to_str().unwrap()]);
}

#[test]
fn the_tool_gets_the_same_on_the_bus_as_on_the_socket() {
    let bus = Bus::start(Broker::DbusDaemon);
    let daemon = start(&bus, &[&store_of(&bus)]);
    let tool = |arguments: &[&str]| {
        let on = |way: String| {
            let done = Command::new(sparsed_tests::sparsectl()).args(arguments).arg(way).output().unwrap();
            assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
            String::from_utf8(done.stdout).unwrap()
        };
        (on(format!("--dbus={}", bus.address())), on(format!("--socket={}", daemon.socket().display())))
    };
    let session = tool(&["sessions", "new", "--title=trains"]).0;
    let session = session.trim();
    let turn = ["run", "--session", session, "--max-tokens=8", "--temperature=0", "Hello!"];
    assert!(!tool(&turn).0.trim().is_empty());
    for arguments in [
        &["run", "--max-tokens=20", "--temperature=0", "Hello!"][..],
        &["complete", "--max-tokens=20", "--temperature=0", "Once"],
        &["models"],
        &["sessions", "list"],
        &["sessions", "show", session],
        &["status", "--ready"],
    ] {
        let (on_bus, on_socket) = tool(arguments);
        // Where the daemon is, is another place; and what it has done is more at the second look.
        let told =
            |text: &str| if arguments[0] == "status" { text.lines().count().to_string() } else { text.to_owned() };
        assert!(!on_bus.trim().is_empty());
        assert_eq!(told(&on_bus), told(&on_socket), "{arguments:?}");
    }
    assert_eq!(tool(&["sessions", "set", session, "--pinned=true"]).0.trim(), session);
    assert_ne!(tool(&["sessions", "fork", session, "--turns=1"]).0.trim(), session);
    let files = [bus.folder().join("on-bus"), bus.folder().join("on-socket")];
    for (file, way) in
        files.iter().zip([format!("--dbus={}", bus.address()), format!("--socket={}", daemon.socket().display())])
    {
        for verb in [&["export", session, file.to_str().unwrap()][..], &["import", file.to_str().unwrap()]] {
            let done = Command::new(sparsed_tests::sparsectl()).arg("sessions").args(verb).arg(&way).output().unwrap();
            assert!(done.status.success(), "{verb:?}: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
    assert_eq!(tool(&["sessions", "list"]).0.lines().count(), 1 + 2 + 2 + 2, "a session is made on each way");
    assert!(tool(&["top", "--once"]).0.contains("device"));
    let model = format!("file:{}", bus.folder().join("chatty.gguf").display());
    let pull = |way: &[&str]| {
        let done = Command::new(sparsed_tests::sparsectl()).args(["model", "pull", &model]).args(way).output().unwrap();
        assert!(done.status.success(), "{way:?}: {}", String::from_utf8_lossy(&done.stderr));
        (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap())
    };
    let pulled = pull(&[&format!("--dbus={}", bus.address())]);
    assert_eq!(pulled.0, pull(&["--config=/dev/null", "--set", &store_of(&bus)]).0);
    assert!(pulled.0.contains("path = \"store:chatty\""), "{}", pulled.0);
    let nobody =
        Command::new(sparsed_tests::sparsectl()).args(["status", "--dbus=unix:path=/nonexistent/bus"]).output();
    assert!(String::from_utf8(nobody.unwrap().stderr).unwrap().contains("no bus to be reached"));
}

#[test]
fn ten_thousand_malformed_calls_harm_nobody() {
    let n = if std::env::var_os("LONG").is_some() { "100000" } else { "10000" };
    let bus = Bus::start(Broker::DbusDaemon);
    let sets = ["sessions.max_per_user=20", "model.default.max_context=128", &store_of(&bus)];
    let daemon = start(&bus, &sets);
    println!("{}", bus.client("fuzz", &[&daemon.pid().to_string(), n]));
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

/// Every command of the manual, as it stands there.
#[test]
fn the_manuals_commands_do_what_it_says() {
    let (bus, _daemon) = on_the_systems_bus();
    let manual = std::fs::read_to_string(sparsed_tests::root().join("packaging/dbus.md")).unwrap();
    let blocks: Vec<&str> = manual.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 4);
    std::fs::copy(bus.folder().join("chatty.gguf"), bus.folder().join("small.gguf")).unwrap();
    let python = bus.client_command("", &[]);
    let python = python.get_envs().find(|(name, _)| *name == "PYTHONPATH").unwrap().1.unwrap().to_owned();
    for block in blocks {
        let mut shell = Command::new("bash");
        shell.args(["-eu", "-o", "pipefail", "-c", block]).current_dir(bus.folder());
        shell.env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).env("PYTHONPATH", &python);
        let tools = sparsed_tests::root().join("target/release");
        shell.env("PATH", format!("{}:{}", tools.display(), std::env::var("PATH").unwrap()));
        let done = shell.output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success() && !out.trim().is_empty(), "{block}\n{out}\n{err}");
    }
}
