//! When another attempt is made, and when none is: bad lines, parts without an end, mistakes that stay.

use super::*;

/// A part of it without the length of the whole.
fn endless(body: &[u8], first: usize, end: usize) -> Step {
    let head = format!("206 Partial Content\r\netag: \"a\"\r\ncontent-range: bytes {first}-{}/*", end - 1);
    reply(&format!("{head}\r\ncontent-length: {}", end - first), body[first..end].to_vec())
}

fn nothing_follows(range: &str) -> Step {
    reply(&format!("416 No\r\netag: \"a\"\r\n{range}content-length: 0"), Vec::new())
}

#[test]
fn a_server_without_ranges_on_a_bad_line_is_given_up() {
    let (mut bench, body) = (Bench::new(), body());
    // Each attempt gets further than the one before the last, and loses all that was there.
    let steps = (0..9).map(|n| whole("\"a\"", &body, if n % 2 == 0 { 100_000 } else { 150_000 + n }));
    let server = Server::start(steps.collect());
    let said = bench.fetch(&server.url).unwrap_err();
    assert!(said.contains("given up"), "{said}");
    let next = bench.notes.0.iter().filter(|note| note.contains("next attempt")).count();
    assert_eq!(next, 3, "as many as there are pauses: {:?}", bench.notes.0);
}

#[test]
fn parts_without_the_length_of_the_whole_are_asked_for_until_nothing_follows() {
    let body = body();
    for end in ["content-range: bytes */300000\r\n", ""] {
        let mut bench = Bench::new();
        let steps = vec![
            endless(&body, 0, 100_000),
            endless(&body, 100_000, 250_000),
            endless(&body, 250_000, 300_000),
            nothing_follows(end),
        ];
        let server = Server::start(steps);
        bench.fetch(&server.url).unwrap();
        assert_eq!(bench.stored(), body);
        let asked: Vec<_> = server.asked().into_iter().map(|(range, _)| range).collect();
        assert_eq!(
            asked,
            [None, Some("bytes=100000-"), Some("bytes=250000-"), Some("bytes=300000-")]
                .map(|range| range.map(str::to_owned))
        );
        assert!(bench.notes.0.is_empty(), "it is no failure: {:?}", bench.notes.0);
    }
    // What nobody can go on with and nobody ends.
    let head = "206 Partial Content\r\ncontent-range: bytes 0-9/*\r\ncontent-length: 10";
    let server = Server::start((0..2).map(|_| reply(head, body[..10].to_vec())).collect());
    assert!(Bench::new().fetch(&server.url).unwrap_err().contains("never says where it ends"));
}

#[test]
fn a_part_that_is_shorter_than_it_was_asked_for_is_gone_on_from_at_once() {
    let (mut bench, body) = (Bench::new(), body());
    let head = "206 Partial Content\r\netag: \"a\"\r\ncontent-range: bytes 100000-199999/300000";
    let steps = vec![
        whole("\"a\"", &body, 100_000),
        reply(&format!("{head}\r\ncontent-length: 100000"), body[100_000..200_000].to_vec()),
        part("\"a\"", &body, 200_000, 100_000),
    ];
    bench.fetch(&Server::start(steps).url).unwrap();
    assert_eq!((bench.stored(), bench.notes.0.len()), (body, 1));
}

#[test]
fn what_no_other_attempt_would_mend_is_told_at_once() {
    let lead = |to: &str| reply(&format!("302 Found\r\nlocation: {to}\r\ncontent-length: 0"), Vec::new());
    let said = |steps: Vec<Step>, change: fn(&mut Bench)| {
        let mut bench = Bench::new();
        change(&mut bench);
        let said = bench.fetch(&Server::start(steps).url).unwrap_err();
        assert!(bench.notes.0.is_empty(), "{:?}", bench.notes.0);
        said
    };
    let circle = || (0..9).map(|_| lead("/m.gguf")).collect::<Vec<_>>();
    assert!(said(circle(), |_| {}).contains("redirects"));
    assert!(said(vec![lead("ftp://127.0.0.1/m.gguf")], |_| {}).contains("not HTTP"));
    assert!(said(vec![reply("302 Found\r\ncontent-length: 0", Vec::new())], |_| {}).contains("leads nowhere"));
    let strange = |bench: &mut Bench| bench.options.token = Some("a\nb".to_owned());
    assert!(said(Vec::new(), strange).contains("strange character"));
    let mut bench = Bench::new();
    bench.options.ca_file = Some("/no/such/authorities.pem".into());
    assert!(bench.fetch("https://127.0.0.1:9/m.gguf").unwrap_err().contains("No such file"));
    assert!(bench.notes.0.is_empty(), "{:?}", bench.notes.0);
}

#[test]
fn relative_redirects_are_followed() {
    let (mut bench, body) = (Bench::new(), body());
    let steps = vec![
        reply("302 Found\r\nlocation: files/one.gguf?x\r\ncontent-length: 0", Vec::new()),
        reply("302 Found\r\nlocation: ../two.gguf\r\ncontent-length: 0", Vec::new()),
        whole("\"a\"", &body, body.len()),
    ];
    let server = Server::start(steps);
    bench.fetch(&server.url).unwrap();
    let paths = server.heads.iter().map(|head| head.split(' ').nth(1).unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(paths, ["/m.gguf", "/files/one.gguf?x", "/two.gguf"]);
}
