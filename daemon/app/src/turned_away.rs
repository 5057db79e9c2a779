//! What does a client hear whose daemon cannot start, since its configuration is wrong?
//!
//! The service manager holds the socket: it takes connections, and starts the service for them. A connection that is
//! left there would have it started again at once, and again, until the manager gives the socket up as well.

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

/// For how long clients are answered: they come at most that often to a service that does not start.
const OPEN: Duration = Duration::from_secs(1);
/// Pause between looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long one client may take to send its request's head and to hear the answer.
const PATIENCE: Duration = Duration::from_millis(100);
/// Bytes of a request that are taken before it is answered.
const HEAD_BYTES: usize = 16 << 10;
/// Not a word of what is wrong: who may connect need not be who may read the configuration.
const BODY: &str = concat!(
    r#"{"error":{"message":"the daemon does not start: its configuration is wrong. "#,
    r#"On the box, `sparsectl config check` says where","type":"server_error","param":null,"code":"misconfigured"}}"#
);

/// Answers 503 to those who wait on these sockets, and to those who come within [`OPEN`]. Without a socket it returns
/// at once.
pub(crate) fn turn_away(unix: Option<UnixListener>, tcp: Vec<TcpListener>) {
    if unix.is_none() && tcp.is_empty() {
        return;
    }
    // Whoever is not answered has the service started again, which is no worse than it was.
    let _may_block = unix.iter().try_for_each(|listener| listener.set_nonblocking(true)).is_err()
        || tcp.iter().try_for_each(|listener| listener.set_nonblocking(true)).is_err();
    let end = Instant::now() + OPEN;
    while Instant::now() < end {
        for (stream, _) in unix.iter().filter_map(|listener| listener.accept().ok()) {
            let _gone = answer(stream).is_err();
        }
        for (stream, _) in tcp.iter().filter_map(|listener| listener.accept().ok()) {
            let _gone = answer(stream).is_err();
        }
        std::thread::sleep(LOOK);
    }
}

/// Whatever was asked, the answer is the same.
fn answer(mut stream: impl Read + Write + AsFd) -> std::io::Result<()> {
    for side in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&stream, side, Some(PATIENCE))?;
    }
    let mut head = vec![0; HEAD_BYTES];
    // What is not read makes the end of a connection an error for who has sent it.
    let _n_read = stream.read(&mut head)?;
    let head =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 5";
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpStream};
    use std::os::unix::net::UnixStream;

    #[test]
    fn who_waits_hears_that_the_configuration_is_wrong_and_without_a_socket_nobody_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (unix, tcp) = (UnixListener::bind(&path).unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let mut local = UnixStream::connect(&path).unwrap();
        let mut remote = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        local.write_all(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}").unwrap();
        // One that says nothing holds nobody up for long.
        remote.shutdown(Shutdown::Write).unwrap();
        turn_away(Some(unix), vec![tcp]);
        let mut heard = [String::new(), String::new()];
        local.read_to_string(&mut heard[0]).unwrap();
        remote.read_to_string(&mut heard[1]).unwrap();
        for heard in heard {
            let (head, body) = heard.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(body["error"]["code"], "misconfigured");
        }
        turn_away(None, Vec::new());
    }
}
