//! Does a daemon answer whoever asks?

use super::Check;
use crate::ctl::client::Client;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Whether it can be reached, and whether its default model answers.
///
/// # Errors
/// A runtime that cannot be started.
pub(super) fn daemon(socket: &Path) -> anyhow::Result<Vec<Check>> {
    let shown = socket.display();
    let check = match UnixStream::connect(socket) {
        Ok(_) => return health(socket),
        Err(error) => match error.kind() {
            ErrorKind::PermissionDenied => {
                let fix = "sudo usermod -aG sparsed $USER, then log in again";
                Check::fail("daemon", format!("you may not connect to {shown}"), fix)
            }
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

/// The process that listens, where one does that has made its socket itself: a service manager's is not the daemon.
pub(super) fn pid(socket: &Path) -> Option<u32> {
    let stream = UnixStream::connect(socket).ok()?;
    let listener = rustix::net::sockopt::socket_peercred(&stream).ok()?.pid;
    u32::try_from(listener.as_raw_nonzero().get()).ok().filter(|&pid| pid > 1)
}

fn health(socket: &Path) -> anyhow::Result<Vec<Check>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = Client::new(socket);
    let shown = socket.display();
    let health = match runtime.block_on(client.get("/health")) {
        Ok(health) => health,
        Err(error) => {
            let fix = "sudo journalctl -u sparsed -e";
            return Ok(vec![Check::fail("daemon", format!("{shown} does not answer: {error:#}"), fix)]);
        }
    };
    let state = health["status"].as_str().unwrap_or("unknown");
    let check = match state {
        "ok" => Check::ok("daemon", format!("answers on {shown}")),
        "loading" => Check::warn("daemon", "is loading its default model", "sparsectl status"),
        "degraded" => Check::warn("daemon", "another device has taken over", "sparsectl status; sparsectl plugins"),
        _ => Check::fail(
            "daemon",
            format!("{state}: {}", health["detail"].as_str().unwrap_or("it does not say why")),
            "sparsectl doctor --full; sudo journalctl -u sparsed -e",
        ),
    };
    Ok(vec![check])
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_daemon_that_does_not_run_is_no_failure_of_the_box() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let said = |path: &Path| daemon(path).unwrap().remove(0);
        assert_eq!(said(&path).verdict, Verdict::Warn);
        assert_eq!(pid(&path), None);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(pid(&path), Some(std::process::id()));
        drop(listener);
        assert!(said(&path).found.contains("nobody listens"));
    }
}
