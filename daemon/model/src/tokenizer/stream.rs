//! How do tokens become text while they come? Whole characters only.

use super::Tokenizer;

/// Text of one answer. A token may end in the middle of a character; its bytes wait for the rest.
///
/// The pieces in a row are what [`String::from_utf8_lossy`] makes of all bytes: what is not UTF-8 becomes U+FFFD.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    pending: Vec<u8>,
    visible: Vec<u32>,
}

impl TextStream {
    /// `visible`: control tokens whose names are part of the text, see [`crate::ChatFormat::visible_tokens`].
    pub fn new(visible: &[u32]) -> Self {
        Self { pending: Vec::new(), visible: visible.to_vec() }
    }

    /// Adds a token and takes the characters that are whole now; often empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        let bytes = match tokenizer.token_name(token) {
            Some(name) if self.visible.contains(&token) => name.as_bytes(),
            _ => tokenizer.token_bytes(token),
        };
        self.push_bytes(bytes)
    }

    /// Adds bytes and takes the characters that are whole now.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            let (valid, invalid) = (chunk.valid(), chunk.invalid());
            text.push_str(valid);
            done += valid.len();
            let last = done + invalid.len() == self.pending.len();
            if last && is_unfinished(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            done += invalid.len();
        }
        self.pending.drain(..done);
        text
    }

    /// What is left at the end of the answer: U+FFFD for a character that was never finished.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Whether more bytes could make `bytes` a character.
fn is_unfinished(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn in_pieces(bytes: &[u8], sizes: &[usize]) -> Vec<String> {
        let (mut stream, mut pieces, mut rest) = (TextStream::default(), Vec::new(), bytes);
        for size in sizes.iter().copied().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(size.clamp(1, rest.len()));
            pieces.push(stream.push_bytes(now));
            rest = later;
        }
        pieces.push(stream.finish());
        pieces
    }

    #[test]
    fn half_a_character_waits() {
        let mut stream = TextStream::default();
        assert_eq!(stream.push_bytes(&[b'h', 0xf0, 0x9f]), "h");
        assert_eq!(stream.push_bytes(&[0x98]), "");
        assert_eq!(stream.push_bytes(&[0x80, b'!']), "\u{1f600}!");
        assert_eq!(stream.push_bytes(&[0xe4, 0xb8, b'x']), "\u{fffd}x");
        assert_eq!(stream.push_bytes(&[0xff]), "\u{fffd}");
        assert_eq!((stream.push_bytes(&[0xc3]), stream.finish()), (String::new(), "\u{fffd}".to_owned()));
        assert_eq!(stream.finish(), "");
    }

    proptest! {
        #![proptest_config(crate::testing::seeded(256))]
        #[test]
        fn any_bytes_in_any_pieces_give_the_lossy_text(
            // Bytes that begin, continue and break characters more often than chance has it.
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), Just(0x80u8), Just(0xbf), Just(0xe4), Just(0xf0), Just(0x9f), Just(b'a')],
                0..64,
            ),
            sizes in prop::collection::vec(1usize..5, 1..8),
        ) {
            prop_assert_eq!(in_pieces(&bytes, &sizes).concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn valid_text_never_shows_a_replacement(text in "[a-z世界é😀 \u{e000}]{0,40}", size in 1usize..4) {
            let pieces = in_pieces(text.as_bytes(), &[size]);
            prop_assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
            prop_assert_eq!(pieces.concat(), text);
        }
    }
}
