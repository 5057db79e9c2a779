//! Fetches from a server that does as its script says: real sockets, no network.

mod lines;
mod more;

use super::*;
use std::collections::VecDeque;
use std::io::{BufRead, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};

/// Answers one connection: what was asked, and where to.
type Step = Box<dyn FnOnce(&str, &mut TcpStream) + Send>;

/// A server with an answer for each connection; afterwards there is none.
struct Server {
    url: String,
    heads: Receiver<String>,
}

impl Server {
    fn start(steps: Vec<Step>) -> Self {
        Self::start_at("127.0.0.1:0", steps)
    }

    fn start_at(address: &str, steps: Vec<Step>) -> Self {
        // An earlier one there may be about to end.
        let bind = || TcpListener::bind(address).inspect_err(|_| std::thread::yield_now()).ok();
        let listener = std::iter::repeat_with(bind).take(10_000).flatten().next().unwrap();
        let url = format!("http://{}/m.gguf", listener.local_addr().unwrap());
        let (sender, heads) = channel();
        std::thread::spawn(move || {
            let mut steps = VecDeque::from(steps);
            while let Some(step) = steps.pop_front() {
                let (mut stream, _) = listener.accept().unwrap();
                let mut reader = std::io::BufReader::new(stream.try_clone().unwrap());
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap() > 0 {}
                step(&head, &mut stream);
                let _unheard = sender.send(head).is_err();
            }
        });
        Self { url, heads }
    }

    /// What was asked, connection by connection: the values of `Range` and `If-Range`.
    fn asked(&self) -> Vec<(Option<String>, Option<String>)> {
        let value = |head: &str, name: &str| {
            let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        self.heads.iter().map(|head| (value(&head, "range"), value(&head, "if-range"))).collect()
    }
}

fn body() -> Vec<u8> {
    (0..300_000_u32).map(|n| (n.wrapping_mul(n) >> 7).to_le_bytes()[0]).collect()
}

/// An answer with this head (lines), and these bytes after it.
fn reply(head: &str, bytes: Vec<u8>) -> Step {
    let head = format!("HTTP/1.1 {head}\r\nconnection: close\r\n\r\n");
    Box::new(move |_, stream| {
        // A client may have heard enough.
        let _unheard = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes)).is_err();
    })
}

/// All of it, and only `sent` bytes of it.
fn whole(etag: &str, body: &[u8], sent: usize) -> Step {
    reply(&format!("200 OK\r\netag: {etag}\r\ncontent-length: {}", body.len()), body[..sent].to_vec())
}

/// From `first` on, and only `sent` bytes of it.
fn part(etag: &str, body: &[u8], first: usize, sent: usize) -> Step {
    let (last, total) = (body.len() - 1, body.len());
    let head = format!("206 Partial Content\r\netag: {etag}\r\ncontent-range: bytes {first}-{last}/{total}");
    reply(&format!("{head}\r\ncontent-length: {}", total - first), body[first..first + sent].to_vec())
}

#[derive(Default)]
struct Notes(Vec<String>);

impl Watcher for Notes {
    fn fetched(&mut self, _: u64, _: Option<u64>) -> std::io::Result<()> {
        Ok(())
    }
    fn hashed(&mut self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn note(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
}

/// A store, and what the calls that fetch into it share.
struct Bench {
    _dir: tempfile::TempDir,
    store: Store,
    options: FetchOptions,
    notes: Notes,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(&dir.path().join("models"));
        let options = FetchOptions {
            expected: None,
            bytes_max: 1 << 20,
            token: None,
            ca_file: None,
            pauses: vec![Duration::ZERO; 3],
            patience: Duration::from_secs(20),
        };
        Self { _dir: dir, store, options, notes: Notes::default() }
    }

    fn fetch(&mut self, url: &str) -> Result<Fetched, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let source = Source::parse(url, None).unwrap();
        let fetching = fetch(&self.store, "m", &source, &self.options, &mut self.notes);
        runtime.block_on(fetching).map_err(|error| format!("{error:#}"))
    }

    /// The file that the name stands for.
    fn stored(&self) -> Vec<u8> {
        std::fs::read(self.store.blob(&self.store.entry("m").unwrap().sha256)).unwrap()
    }

    fn is_empty(&self) -> bool {
        self.store.names().unwrap().is_empty() && self.store.blobs().read_dir().unwrap().next().is_none()
    }
}

#[test]
fn a_line_that_breaks_costs_what_has_not_come_yet() {
    let (mut bench, body) = (Bench::new(), body());
    let steps = vec![
        whole("\"a\"", &body, 100_000),
        part("\"a\"", &body, 100_000, 50_000),
        part("\"a\"", &body, 150_000, 150_000),
    ];
    let server = Server::start(steps);
    bench.fetch(&server.url).unwrap();
    assert_eq!(bench.stored(), body);
    let tag = || Some("\"a\"".to_owned());
    let rest = |from: &str| (Some(format!("bytes={from}-")), tag());
    assert_eq!(server.asked(), [(None, None), rest("100000"), rest("150000")]);
    assert!(bench.store.partial().read_dir().unwrap().next().is_none(), "nothing is left over");
}

#[test]
fn what_one_call_has_fetched_the_next_one_goes_on_with() {
    let (mut bench, body) = (Bench::new(), body());
    let steps = vec![
        whole("\"a\"", &body, 100_000),
        reply("503 Busy", Vec::new()),
        reply("500 Oops", Vec::new()),
        reply("503 Busy", Vec::new()),
        part("\"a\"", &body, 100_000, 200_000),
    ];
    let server = Server::start(steps);
    let said = bench.fetch(&server.url).unwrap_err();
    assert!(said.contains("503") && said.contains("goes on with it"), "{said}");
    assert!(bench.is_empty());
    assert_eq!(bench.fetch(&server.url).unwrap().resumed_bytes, 100_000);
    assert_eq!(bench.stored(), body);
}

#[test]
fn a_file_that_changes_in_between_is_never_a_mixture() {
    let (old, new) = (body(), body().into_iter().rev().collect::<Vec<u8>>());
    // One server answers as it should, one goes on with the other file and says so, one says another length.
    let longer = [new.clone(), vec![1]].concat();
    let goes_on = [
        vec![whole("\"b\"", &new, new.len())],
        vec![part("\"b\"", &new, 100_000, 200_000), whole("\"b\"", &new, new.len())],
        vec![part("\"a\"", &longer, 100_000, 200_001), whole("\"b\"", &new, new.len())],
    ];
    for steps in goes_on {
        let mut bench = Bench::new();
        let server = Server::start([vec![whole("\"a\"", &old, 100_000)], steps].into_iter().flatten().collect());
        bench.fetch(&server.url).unwrap();
        assert_eq!(bench.stored(), new);
    }
}

#[test]
fn without_a_strong_etag_or_a_digest_nothing_is_continued() {
    let (mut bench, body) = (Bench::new(), body());
    let steps = || vec![whole("W/\"a\"", &body, 100_000), whole("W/\"a\"", &body, body.len())];
    let server = Server::start(steps());
    bench.fetch(&server.url).unwrap();
    assert_eq!(server.asked(), [(None, None), (None, None)]);
    let server = Server::start(vec![whole("W/\"a\"", &body, 100_000), part("W/\"a\"", &body, 100_000, 200_000)]);
    bench.options.expected = Some(Digest::of(&body));
    bench.fetch(&server.url).unwrap();
    assert_eq!((bench.stored(), server.asked()[1].0.as_deref()), (body, Some("bytes=100000-")));
}

#[test]
fn a_server_that_ignores_ranges_sends_all_of_it_again() {
    let (mut bench, body) = (Bench::new(), body());
    let server = Server::start(vec![whole("\"a\"", &body, 100_000), whole("\"a\"", &body, body.len())]);
    bench.fetch(&server.url).unwrap();
    assert_eq!(bench.stored(), body);
}

#[test]
fn a_file_that_had_come_whole_is_taken_as_it_is() {
    let (mut bench, body) = (Bench::new(), body());
    let (n, length) = (body.len(), body.len());
    // The line breaks behind the last byte: the server has sent no end of its last chunk.
    let chunked = "200 OK\r\netag: \"a\"\r\ntransfer-encoding: chunked";
    let bytes = [format!("{n:x}\r\n").into_bytes(), body.clone(), b"\r\n".to_vec()].concat();
    let whole = format!("416 Range Not Satisfiable\r\ncontent-range: bytes */{length}\r\ncontent-length: 0");
    bench.options.expected = Some(Digest::of(&body));
    let server = Server::start(vec![reply(chunked, bytes), reply(&whole, Vec::new())]);
    bench.fetch(&server.url).unwrap();
    assert_eq!(bench.stored(), body);
}

#[test]
fn another_file_than_was_asked_for_is_removed() {
    let (mut bench, body) = (Bench::new(), body());
    bench.options.expected = Some(Digest::of(b"something else"));
    let server = Server::start(vec![whole("\"a\"", &body, body.len())]);
    let said = bench.fetch(&server.url).unwrap_err();
    assert!(said.contains(&Digest::of(&body).to_string()), "{said}");
    assert!(bench.is_empty() && bench.store.partial().read_dir().unwrap().next().is_none());
}

#[test]
fn a_length_that_is_a_lie_is_no_file() {
    let body = body();
    let more = format!("200 OK\r\netag: \"a\"\r\ncontent-length: {}", body.len() + 9);
    let nothing = || reply("416 No\r\ncontent-range: bytes */300000\r\ncontent-length: 0", Vec::new());
    let again = || -> Vec<Step> { vec![reply(&more, body.clone()), nothing()] };
    let mut bench = Bench::new();
    let server = Server::start((0..4).flat_map(|_| again()).collect());
    let said = bench.fetch(&server.url).unwrap_err();
    assert!(said.contains("changes again and again"), "{said}");
    assert!(bench.is_empty());
    // Fewer bytes than told, and the end of the connection says no more.
    let untold = || reply("200 OK\r\netag: \"a\"", body[..1000].to_vec());
    let said = Bench::new().fetch(&Server::start(vec![untold()]).url).unwrap_err();
    assert!(said.contains("tells no length"), "{said}");
    let mut bench = Bench::new();
    bench.options.expected = Some(Digest::of(&body));
    assert!(bench.fetch(&Server::start(vec![untold()]).url).unwrap_err().contains("SHA-256"));
}

#[test]
fn what_is_too_large_is_refused_by_its_length_or_when_it_comes() {
    let (mut bench, body) = (Bench::new(), body());
    bench.options.bytes_max = 200_000;
    let server = Server::start(vec![whole("\"a\"", &body, 0)]);
    assert!(bench.fetch(&server.url).unwrap_err().contains("larger than 200000 bytes"));
    let bytes = [format!("{:x}\r\n", body.len()).into_bytes(), body, b"\r\n0\r\n\r\n".to_vec()].concat();
    let server = Server::start(vec![reply("200 OK\r\ntransfer-encoding: chunked", bytes)]);
    assert!(bench.fetch(&server.url).unwrap_err().contains("larger than 200000 bytes"));
    assert!(bench.is_empty());
    let lots = format!("200 OK\r\ncontent-length: {}", 1_u64 << 60);
    bench.options.bytes_max = u64::MAX;
    let said = bench.fetch(&Server::start(vec![reply(&lots, Vec::new())]).url).unwrap_err();
    assert!(said.contains("left, the rest of the model needs"), "{said}");
}

#[test]
fn redirects_are_followed_and_the_token_stays_at_home() {
    let (mut bench, body) = (Bench::new(), body());
    bench.options.token = Some("secret".to_owned());
    let other = Server::start(vec![whole("\"a\"", &body, body.len())]);
    let digest = Digest::of(&body);
    let home = Server::start(vec![reply(
        &format!("302 Found\r\nlocation: {}\r\nx-linked-etag: \"{digest}\"\r\ncontent-length: 0", other.url),
        Vec::new(),
    )]);
    bench.fetch(&home.url).unwrap();
    assert_eq!(bench.stored(), body);
    let has_token = |server: &Server| server.heads.recv().unwrap().to_ascii_lowercase().contains("authorization");
    assert!(has_token(&home) && !has_token(&other));
}

#[test]
fn the_digest_that_a_hub_tells_is_kept_to() {
    let (mut bench, body) = (Bench::new(), body());
    let other = Server::start(vec![whole("\"a\"", &body, body.len())]);
    let digest = Digest::of(b"something else");
    let head = format!("302 Found\r\nlocation: {}\r\nx-linked-etag: \"{digest}\"\r\ncontent-length: 0", other.url);
    let home = Server::start(vec![reply(&head, Vec::new())]);
    assert!(bench.fetch(&home.url).unwrap_err().contains("SHA-256"));
}

#[test]
fn a_server_that_leads_in_circles_or_says_no_is_left() {
    let mut bench = Bench::new();
    let circle = || reply("302 Found\r\nlocation: /m.gguf\r\ncontent-length: 0", Vec::new());
    bench.options.pauses = Vec::new();
    let server = Server::start((0..9).map(|_| circle()).collect());
    assert!(bench.fetch(&server.url).unwrap_err().contains("redirects"));
    bench.options.pauses = vec![Duration::ZERO; 3];
    for (status, said) in [("404 Not Found", "no such file"), ("403 Forbidden", "token"), ("400 Bad", "400")] {
        let server = Server::start(vec![reply(status, Vec::new())]);
        assert!(bench.fetch(&server.url).unwrap_err().contains(said));
        assert_eq!(server.asked().len(), 1, "it is not asked again");
    }
    let zipped = reply("200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3", b"xyz".to_vec());
    assert!(bench.fetch(&Server::start(vec![zipped]).url).unwrap_err().contains("encoded"));
}

#[test]
fn a_silent_server_is_not_waited_for_without_end() {
    let mut bench = Bench::new();
    bench.options.patience = Duration::from_millis(50);
    bench.options.pauses = Vec::new();
    let (_hold, held) = channel::<()>();
    // Answered when the test is over, which drops the other end.
    let step: Step = Box::new(move |_, _| assert!(held.recv().is_err()));
    assert!(bench.fetch(&Server::start(vec![step]).url).unwrap_err().contains("silent"));
}

#[test]
fn a_file_of_this_box_is_copied() {
    let (mut bench, body) = (Bench::new(), body());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &body).unwrap();
    bench.fetch(&format!("file:{}", file.path().display())).unwrap();
    std::fs::write(file.path(), "other").unwrap();
    assert_eq!(bench.stored(), body);
    let folder = tempfile::tempdir().unwrap();
    assert!(bench.fetch(&format!("file:{}", folder.path().display())).unwrap_err().contains("no plain file"));
}

#[test]
fn two_do_not_fetch_the_same_file_at_a_time_and_it_is_no_garbage_meanwhile() {
    let mut bench = Bench::new();
    bench.store.make().unwrap();
    let source = Source::parse("http://127.0.0.1:9/m.gguf", None).unwrap();
    let held = Partial::open(&bench.store, &source.key()).unwrap();
    assert!(bench.fetch("http://127.0.0.1:9/m.gguf").unwrap_err().contains("another process fetches"));
    let garbage = |store: &Store| store.garbage(&store.lock().unwrap(), true, &[]).unwrap().len();
    assert_eq!(garbage(&bench.store), 0);
    drop(held);
    assert_eq!(garbage(&bench.store), 1);
}

#[test]
fn ranges_are_read_and_nonsense_is_none() {
    assert_eq!(content_range("bytes 5-9/10"), Some((5, 9, Some(10))));
    assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
    for bad in ["", "bytes", "bytes 5-9", "bytes 9-5/10", "bytes 5-10/10", "items 5-9/10", "bytes x-9/10"] {
        assert_eq!(content_range(bad), None, "{bad}");
    }
}
