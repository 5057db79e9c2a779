//! Models of several files, and a server by another hand over TLS.

use super::*;

#[test]
fn the_parts_of_a_model_come_with_the_first_and_those_that_were_there_are_not_fetched_again() {
    let mut bench = Bench::new();
    let bodies: Vec<Vec<u8>> = (1..=3_u8).map(|n| body().into_iter().map(|byte| byte ^ n).collect()).collect();
    let all = |n: usize| whole(&format!("\"{n}\""), &bodies[n], bodies[n].len());
    let first = |server: &Server| server.url.replace("m.gguf", "m-00001-of-00003.gguf");
    // The third one is not there yet.
    let server = Server::start(vec![all(0), all(1), reply("404 No\r\ncontent-length: 0", Vec::new())]);
    let url = first(&server);
    assert!(bench.fetch(&url).unwrap_err().contains("no such file"));
    assert!(bench.is_empty());
    // The same address again, as after the server's end.
    let (address, rest) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    drop(server);
    let there = || reply("416 No\r\ncontent-range: bytes */300000\r\ncontent-length: 0", Vec::new());
    let server = Server::start_at(address, vec![there(), there(), all(2)]);
    assert_eq!(bench.fetch(&format!("http://{address}/{rest}")).unwrap().resumed_bytes, 600_000);
    let paths = server.heads.iter().map(|head| head.split(' ').nth(1).unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(paths, [1, 2, 3].map(|n| format!("/m-0000{n}-of-00003.gguf")));
    let entry = bench.store.entry("m").unwrap();
    for ((path, _), body) in bench.store.files(&entry).iter().zip(&bodies) {
        assert!(std::fs::read(path).unwrap() == *body, "{}", path.display());
    }
    assert!(bench.store.partial().read_dir().unwrap().next().is_none(), "nothing is left over");
}

/// A server by another hand, over TLS, with a certificate for `localhost` in its folder; killed at the end.
struct TlsServer {
    dir: tempfile::TempDir,
    process: std::process::Child,
    url: String,
}

impl TlsServer {
    /// `handler` is Python's, of the name `Handler`.
    fn start(files: &[(&str, &[u8])], handler: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key \
                        -out server.pem -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
                        -addext basicConstraints=critical,CA:FALSE";
        let made = std::process::Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        files.iter().for_each(|(name, bytes)| std::fs::write(dir.path().join(name), bytes).unwrap());
        let script = format!(
            "import http.server, ssl\n\
             {handler}\n\
             server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)\n\
             context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n\
             context.load_cert_chain('server.pem', 'server.key')\n\
             server.socket = context.wrap_socket(server.socket, server_side=True)\n\
             print(server.server_address[1], flush=True)\n\
             server.serve_forever()\n"
        );
        let mut command = std::process::Command::new("python3");
        command.args(["-c", &script]).current_dir(dir.path());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
        let mut process = command.spawn().unwrap();
        let mut port = String::new();
        std::io::BufReader::new(process.stdout.take().unwrap()).read_line(&mut port).unwrap();
        Self { dir, process, url: format!("https://localhost:{}/m.gguf", port.trim()) }
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
fn a_server_whose_certificate_nobody_vouches_for_is_refused_at_once_and_believed_with_its_authority() {
    let body = body();
    let server = TlsServer::start(&[("m.gguf", &body)], "Handler = http.server.SimpleHTTPRequestHandler");
    let mut bench = Bench::new();
    assert!(bench.fetch(&server.url).unwrap_err().contains("certificate"), "nobody vouches for it");
    assert!(bench.notes.0.is_empty(), "{:?}", bench.notes.0);
    bench.options.ca_file = Some(server.dir.path().join("server.pem"));
    bench.fetch(&server.url).unwrap();
    assert_eq!(bench.stored(), body);
}

#[test]
fn a_server_with_tls_that_leads_to_one_without_is_left_and_the_other_one_not_asked() {
    let plain = Server::start(vec![whole("\"a\"", &body(), 300_000)]);
    let handler = format!(
        "class Handler(http.server.BaseHTTPRequestHandler):\n    \
             def do_GET(self):\n        \
                 self.send_response(302)\n        \
                 self.send_header('Location', '{}')\n        \
                 self.send_header('Content-Length', '0')\n        \
                 self.end_headers()\n",
        plain.url
    );
    let server = TlsServer::start(&[], &handler);
    let mut bench = Bench::new();
    bench.options.ca_file = Some(server.dir.path().join("server.pem"));
    let said = bench.fetch(&server.url).unwrap_err();
    assert!(said.contains("without TLS") && bench.is_empty(), "{said}");
    assert!(bench.notes.0.is_empty() && plain.heads.try_recv().is_err(), "{:?}", bench.notes.0);
}
