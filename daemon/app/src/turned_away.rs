//! What does a client hear whose daemon cannot start?
//!
//! The service manager holds the socket: it takes connections, and starts the service for them. A connection that is
//! left there would have it started again at once, and again, until the manager gives the socket up as well; or it
//! would wait for ever for a daemon that fails each time.

use crate::door::Passed;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Pause between looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long one client may take to send its request's head and to hear the answer.
const PATIENCE: Duration = Duration::from_millis(100);
/// Bytes of a request that are taken before it is answered.
const HEAD_BYTES: usize = 16 << 10;
/// Why nobody is served. Not a word of what is wrong: who may connect need not be who may read the configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Why {
    /// The configuration is wrong, and stays so until somebody mends it.
    Misconfigured,
    /// Something else is; the service manager tries again.
    Failed,
}

impl Why {
    fn body(self) -> &'static str {
        match self {
            Self::Misconfigured => concat!(
                r#"{"error":{"message":"the daemon does not start: its configuration is wrong. "#,
                r#"On the box, `sparsectl config check` says where","#,
                r#""type":"server_error","param":null,"code":"misconfigured"}}"#
            ),
            Self::Failed => concat!(
                r#"{"error":{"message":"the daemon cannot serve, and is started again and again. "#,
                r#"On the box, `sudo journalctl -u sparsed -e` says why","#,
                r#""type":"server_error","param":null,"code":"not_started"}}"#
            ),
        }
    }

    /// For how long clients are answered by a daemon that has begun at `began`. They come at most once in that time to
    /// a service whose configuration is wrong. One that fails lives so long at least: it reads all sessions first, and
    /// systemd before 254 has no pauses that grow. What has lived longer makes room for the next one at once.
    fn until(self, began: Instant) -> Instant {
        match self {
            Self::Misconfigured => Instant::now() + Duration::from_secs(1),
            Self::Failed => began + Duration::from_secs(5),
        }
    }
}

/// Answers 503 to those who wait on these sockets, and to those who come meanwhile, for a daemon that has begun at
/// `began`. Without a socket it returns at once.
pub(crate) fn turn_away(Passed { api, tcp }: Passed, why: Why, began: Instant) {
    if api.is_none() && tcp.is_empty() {
        return;
    }
    // Whoever is not answered has the service started again, which is no worse than it was.
    let _may_block = api.iter().try_for_each(|listener| listener.set_nonblocking(true)).is_err()
        || tcp.iter().try_for_each(|listener| listener.set_nonblocking(true)).is_err();
    let end = why.until(began);
    while Instant::now() < end {
        for (stream, _) in api.iter().filter_map(|listener| listener.accept().ok()) {
            let _gone = answer(stream, why).is_err();
        }
        for (stream, _) in tcp.iter().filter_map(|listener| listener.accept().ok()) {
            let _gone = answer(stream, why).is_err();
        }
        std::thread::sleep(LOOK);
    }
}

/// Whatever was asked, the answer is the same.
fn answer(mut stream: impl Read + Write + AsFd, why: Why) -> std::io::Result<()> {
    for side in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&stream, side, Some(PATIENCE))?;
    }
    let mut head = vec![0; HEAD_BYTES];
    // What is not read makes the end of a connection an error for who has sent it.
    let _n_read = stream.read(&mut head)?;
    let head =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 5";
    let body = why.body();
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// The codes that two clients hear who wait on the sockets of a daemon that has begun at `began`.
    fn heard(why: Why, began: Instant) -> [Option<String>; 2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (unix, tcp) = (UnixListener::bind(&path).unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let mut local = UnixStream::connect(&path).unwrap();
        let mut remote = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        local.write_all(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}").unwrap();
        // One that says nothing holds nobody up for long.
        remote.shutdown(Shutdown::Write).unwrap();
        turn_away(Passed { api: Some(unix), tcp: vec![tcp] }, why, began);
        let mut heard = [String::new(), String::new()];
        // Of a socket that is closed with a client in its line the client hears of an end at most.
        let _ends = [local.read_to_string(&mut heard[0]).is_ok(), remote.read_to_string(&mut heard[1]).is_ok()];
        heard.map(|heard| {
            let (head, body) = heard.split_once("\r\n\r\n")?;
            assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            body["error"]["code"].as_str().map(str::to_owned)
        })
    }

    #[test]
    fn who_waits_hears_whether_the_configuration_is_wrong_and_without_a_socket_nobody_is_waited_for() {
        let both = |code: &str| [Some(code.to_owned()), Some(code.to_owned())];
        let now = Instant::now();
        assert_eq!(heard(Why::Misconfigured, now), both("misconfigured"));
        assert_eq!(heard(Why::Failed, Instant::now()), both("not_started"));
        turn_away(Passed::default(), Why::Failed, Instant::now());
    }

    #[test]
    fn a_daemon_that_has_served_and_fails_leaves_who_waits_to_the_next_one() {
        let Some(long_ago) = Instant::now().checked_sub(Duration::from_secs(60)) else { return };
        assert_eq!(heard(Why::Failed, long_ago), [None, None]);
    }
}
