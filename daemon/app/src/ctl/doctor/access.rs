//! Does a daemon answer whoever asks?

use super::Check;
use super::service::{Rest, Service};
use crate::ctl::client::{Client, soon};
use rustix::fs::Access;
use serde_json::Value;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// What says why a service does not start.
const WHY: &str = "systemctl status sparsed; sudo journalctl -u sparsed -e";

/// Whether it can be reached, whether its default model answers, and which models it could not load. A service that is
/// at rest is not connected to, which would start it.
///
/// # Errors
/// A runtime that cannot be started.
pub(super) fn daemon(socket: &Path, service: Option<&Service>) -> anyhow::Result<Vec<Check>> {
    let shown = socket.display();
    if let Some(rest) = service.and_then(|service| service.rest).filter(|_| socket.exists()) {
        return Ok(vec![at_rest(socket, rest)]);
    }
    let check = match UnixStream::connect(socket) {
        Ok(_) => return answers(socket, service),
        Err(error) => match error.kind() {
            ErrorKind::PermissionDenied => shut(socket),
            ErrorKind::NotFound => {
                let fix = "sudo systemctl enable --now sparsed.socket, or start `sparsed`";
                Check::warn("daemon", format!("does not run: {shown} is not there"), fix)
            }
            ErrorKind::ConnectionRefused => {
                let fix = "sudo systemctl restart sparsed, or start `sparsed`";
                Check::warn("daemon", format!("does not run: nobody listens on {shown}"), fix)
            }
            _ => Check::fail("daemon", format!("{shown}: {error}"), "sudo systemctl status sparsed"),
        },
    };
    Ok(vec![check])
}

fn shut(socket: &Path) -> Check {
    let fix = "sudo usermod -aG sparsed $USER, then log in again";
    Check::fail("daemon", format!("you may not connect to {}", socket.display()), fix)
}

fn at_rest(socket: &Path, rest: Rest) -> Check {
    if rustix::fs::access(socket, Access::WRITE_OK).is_err() {
        return shut(socket);
    }
    match rest {
        Rest::Stopped => {
            Check::ok("daemon", format!("is stopped; who connects to {} has it started", socket.display()))
        }
        Rest::Failed => Check::fail("daemon", "has failed, and is started again for the next client only", WHY),
    }
}

/// What a daemon says of itself, where one answers.
///
/// # Errors
/// A runtime that cannot be started.
pub(super) fn status(socket: &Path) -> anyhow::Result<Option<Value>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(soon(Client::new(socket).get("/v1/status"))).ok())
}

/// The process that listens, where one does that has made its socket itself: a service manager's is not the daemon.
pub(super) fn pid(socket: &Path) -> Option<u32> {
    let stream = UnixStream::connect(socket).ok()?;
    let listener = rustix::net::sockopt::socket_peercred(&stream).ok()?.pid;
    u32::try_from(listener.as_raw_nonzero().get()).ok().filter(|&pid| pid > 1)
}

fn answers(socket: &Path, service: Option<&Service>) -> anyhow::Result<Vec<Check>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = Client::new(socket);
    let health = match runtime.block_on(soon(client.get("/health"))) {
        Ok(health) => health,
        Err(error) => {
            let found = match service.is_some_and(|service| !service.is_active) {
                true => "its socket listens, and the service does not start".to_owned(),
                false => format!("{}: {error:#}", socket.display()),
            };
            return Ok(vec![Check::fail("daemon", found, WHY)]);
        }
    };
    let mut checks = vec![health_of(&health, socket)];
    // Who may ask how it is may ask for its state as well.
    checks.extend(status(socket)?.iter().flat_map(failed_models));
    Ok(checks)
}

fn health_of(health: &Value, socket: &Path) -> Check {
    let state = health["status"].as_str().unwrap_or("unknown");
    match state {
        "ok" => Check::ok("daemon", format!("answers on {}", socket.display())),
        "loading" => Check::warn("daemon", "is loading its default model", "sparsectl status"),
        "degraded" => Check::warn("daemon", "another device has taken over", "sparsectl status; sparsectl plugins"),
        _ => Check::fail(
            "daemon",
            format!("{state}: {}", health["detail"].as_str().unwrap_or("it does not say why")),
            "sparsectl doctor --full; sudo journalctl -u sparsed -e",
        ),
    }
}

/// What the daemon says of models that it could not load: its user may not read what whoever asks here may.
fn failed_models(status: &Value) -> Vec<Check> {
    let failed = status["models"].as_array().into_iter().flatten().filter(|model| model["state"] == "failed");
    let told = failed.map(|model| {
        let reason = model["detail"]["reason"].as_str().unwrap_or("it does not say why");
        let title = format!("model {}", model["name"].as_str().unwrap_or("unknown"));
        Check::fail(title, format!("the daemon could not load it: {reason}"), "sudo -u sparsed sparsectl doctor --full")
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_daemon_that_does_not_run_is_no_failure_of_the_box() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let said = |path: &Path| daemon(path, None).unwrap().remove(0);
        assert_eq!(said(&path).verdict, Verdict::Warn);
        assert_eq!(pid(&path), None);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(pid(&path), Some(std::process::id()));
        drop(listener);
        assert!(said(&path).found.contains("nobody listens"));
    }

    #[test]
    fn a_service_at_rest_is_not_connected_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        for (rest, verdict) in [(Rest::Stopped, Verdict::Ok), (Rest::Failed, Verdict::Fail)] {
            let service = Service { rest: Some(rest), ..Service::default() };
            assert_eq!(daemon(&path, Some(&service)).unwrap().remove(0).verdict, verdict);
        }
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        // A socket that is not there starts nothing either.
        drop(std::fs::remove_file(&path));
        let stopped = Service { rest: Some(Rest::Stopped), ..Service::default() };
        assert_eq!(daemon(&path, Some(&stopped)).unwrap().remove(0).verdict, Verdict::Warn);
    }

    #[test]
    fn a_model_that_the_daemon_could_not_load_is_told_by_its_name() {
        let status = serde_json::json!({ "models": [
            { "name": "small", "state": "failed", "detail": { "reason": "Permission denied" } },
            { "name": "default", "state": "ready", "detail": {} },
        ] });
        let told = failed_models(&status);
        assert_eq!((told.len(), told[0].name.as_str(), told[0].verdict), (1, "model small", Verdict::Fail));
        assert!(told[0].found.contains("Permission denied"), "{told:?}");
    }
}
