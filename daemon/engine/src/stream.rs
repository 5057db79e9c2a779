//! Which text may be sent? Nothing past a stop string, and nothing that may still become the start of one.

/// The stop strings of one answer, and the text they hold back.
#[derive(Debug, Default)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// Text that may be the start of a stop string.
    held: String,
    /// The one that was reached.
    reached: Option<String>,
}

/// What more text made sendable.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Text to send.
    pub(crate) text: String,
    /// Whether a stop string was reached; the text ends before it.
    pub(crate) stopped: bool,
}

impl StopStrings {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), reached: None }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        self.release(false)
    }

    /// The rest, when no text follows: the start of a stop string is text then.
    pub(crate) fn finish(&mut self) -> Piece {
        self.release(true)
    }

    /// The stop string that was reached.
    pub(crate) fn reached(&self) -> Option<&str> {
        self.reached.as_deref()
    }

    fn release(&mut self, everything: bool) -> Piece {
        // The first to be complete, so that it does not matter how the text was cut; of those the longest.
        let found = |stop: &String| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at, stop.clone()));
        if let Some((_, at, stop)) = self.stops.iter().filter_map(found).min() {
            self.held.truncate(at);
            self.reached = Some(stop);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let longest = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let keep = if everything { 0 } else { longest };
        let rest = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }
}

/// Bytes at the end of `text` that are the start of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let mut lengths = stop.char_indices().map(|(at, _)| at).rev();
    lengths.find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn streamed(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut stream = StopStrings::new(stops.iter().map(|&s| s.to_owned()).collect());
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
    fn a_stop_string_is_found_across_tokens_and_not_sent() {
        assert_eq!(streamed(&["END"], &["a E", "N", "D b"]), ("a ".to_owned(), true));
        assert_eq!(streamed(&["END"], &["a E", "N"]), ("a EN".to_owned(), false));
        assert_eq!(streamed(&["bc", "abcd"], &["xab", "cd"]), ("xa".to_owned(), true));
    }

    #[test]
    fn the_stop_string_that_was_reached_is_known() {
        let mut stream = StopStrings::new(vec!["no".to_owned(), "END".to_owned()]);
        assert_eq!((stream.push("a EN").text.as_str(), stream.reached()), ("a ", None));
        assert!(stream.push("D").stopped);
        assert_eq!(stream.reached(), Some("END"));
    }

    #[test]
    fn what_cannot_become_a_stop_string_is_sent_at_once() {
        let mut stream = StopStrings::new(vec!["aab".to_owned()]);
        assert_eq!(stream.push("aa").text, "");
        assert_eq!(stream.push("a").text, "a");
        assert_eq!(stream.push("c").text, "aac");
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        /// However the text is cut, what is sent is the same.
        #[test]
        fn cuts_do_not_change_the_text(text in "[abc\u{e9}]{0,60}", cut in 1usize..7) {
            let stops = ["abc", "bb", "\u{e9}a"];
            let whole = streamed(&stops, &[&text]);
            let chars: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = chars.chunks(cut).map(|piece| piece.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(&streamed(&stops, &pieces), &whole);
            prop_assert!(!stops.iter().any(|stop| whole.0.contains(stop)));
        }
    }
}
