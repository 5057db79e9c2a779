//! How do tokens become text that may be sent? Whole characters only, and nothing past a stop string.

/// The text of one answer, as far as it may be sent.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    stops: Vec<String>,
    /// Bytes that may be the start of a character.
    bytes: Vec<u8>,
    /// Text that may be the start of a stop string.
    held: String,
}

/// What a token added.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Text to send.
    pub(crate) text: String,
    /// Whether a stop string was reached; the text ends before it.
    pub(crate) stopped: bool,
}

impl TextStream {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Takes a token's bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Piece {
        self.bytes.extend_from_slice(bytes);
        self.held.push_str(&whole_characters(&mut self.bytes));
        self.release(false)
    }

    /// The rest, when no token follows: half a character becomes U+FFFD, the start of a stop string is text.
    pub(crate) fn finish(&mut self) -> Piece {
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        self.held.push_str(&rest);
        self.release(true)
    }

    fn release(&mut self, everything: bool) -> Piece {
        // The first to be complete, so that it does not matter how the text was cut; of those the longest.
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = ends.min() {
            self.held.truncate(at);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep =
            if everything { 0 } else { self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0) };
        let rest = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }
}

/// Bytes at the end of `text` that are the start of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).rev();
    lengths.into_iter().find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

/// Takes the whole characters from the front; what may be the start of one stays.
fn whole_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(whole) => {
                text.push_str(whole);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                match error.error_len() {
                    None => *bytes = rest.to_vec(),
                    Some(bad) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        *bytes = rest[bad..].to_vec();
                        continue;
                    }
                }
                return text;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn streamed(stops: &[&str], pieces: &[&[u8]]) -> (String, bool) {
        let mut stream = TextStream::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let Piece { text: more, stopped } = stream.push(piece);
            text += &more;
            if stopped {
                return (text, true);
            }
        }
        let last = stream.finish();
        (text + &last.text, last.stopped)
    }

    #[test]
    fn characters_are_never_cut() {
        let mut stream = TextStream::new(Vec::new());
        assert_eq!(stream.push(b"h\xc3").text, "h");
        assert_eq!(stream.push(b"\xa9").text, "\u{e9}");
        assert_eq!(stream.push(b"\xffx\xe2\x82").text, "\u{fffd}x");
        assert_eq!(stream.finish().text, "\u{fffd}");
    }

    #[test]
    fn a_stop_string_is_found_across_tokens_and_not_sent() {
        assert_eq!(streamed(&["END"], &[b"a E", b"N", b"D b"]), ("a ".to_owned(), true));
        assert_eq!(streamed(&["END"], &[b"a E", b"N"]), ("a EN".to_owned(), false));
        assert_eq!(streamed(&["bc", "abcd"], &[b"xab", b"cd"]), ("xa".to_owned(), true));
    }

    #[test]
    fn what_cannot_become_a_stop_string_is_sent_at_once() {
        let mut stream = TextStream::new(vec!["aab".to_owned()]);
        assert_eq!(stream.push(b"aa").text, "");
        assert_eq!(stream.push(b"a").text, "a");
        assert_eq!(stream.push(b"c").text, "aac");
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        /// However the bytes are cut, the text is the same.
        #[test]
        fn cuts_do_not_change_the_text(
            bytes in proptest::collection::vec(prop_oneof![3 => 97u8..100, 1 => any::<u8>()], 0..60),
            cut in 1usize..7,
        ) {
            let stops = ["abc", "bb"];
            let whole = streamed(&stops, &[&bytes]);
            let pieces: Vec<&[u8]> = bytes.chunks(cut).collect();
            prop_assert_eq!(&streamed(&stops, &pieces), &whole);
            prop_assert!(!stops.iter().any(|stop| whole.0.contains(stop)));
        }
    }
}
