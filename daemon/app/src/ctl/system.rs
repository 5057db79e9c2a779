//! What do the tools of the system say? Asked with a time limit: one that a dead disk holds does not hold us.

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

/// How long a tool may take: the end of a long log on a slow disk comes within.
const LIMIT: Duration = Duration::from_secs(60);

/// What `program` prints.
///
/// # Errors
/// One that is not there, fails, or does not end.
pub(super) fn said(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    said_within(LIMIT, program, arguments)
}

fn said_within(limit: Duration, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().context(program.to_owned())?;
    let (pid, (sender, output)) = (Pid::from_child(&child), channel());
    // Waited for by a thread that is left behind: the kernel may not end it before its disk comes back.
    std::thread::spawn(move || drop(sender.send(child.wait_with_output())));
    let Ok(output) = output.recv_timeout(limit) else {
        let _gone = kill_process(pid, Signal::KILL).is_err();
        bail!("{program}: no answer within {:?}", limit);
    };
    let output = output.context(program.to_owned())?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}", error.lines().next().unwrap_or("failed"));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_does_not_end_is_given_up() {
        assert_eq!(said("echo", &["yes"]).unwrap(), "yes\n");
        assert!(said("false", &[]).unwrap_err().to_string().contains("false: failed"));
        let said = said_within(Duration::from_millis(20), "tail", &["-f", "/dev/null"]).unwrap_err().to_string();
        assert_eq!(said, "tail: no answer within 20ms");
    }
}
