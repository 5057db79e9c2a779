//! How does a vocabulary of strings hold arbitrary bytes? By GPT-2's alphabet: one printable character per byte.

use std::collections::HashMap;

/// The alphabet, both ways.
#[derive(Debug)]
pub(super) struct Alphabet {
    chars: [char; 256],
    bytes: HashMap<char, u8>,
}

impl Alphabet {
    /// Printable bytes stand for themselves, the others follow from U+0100 on.
    pub(super) fn new() -> Self {
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let mut chars = ['\0'; 256];
        let mut next = 0x100u32;
        for byte in 0..=255u8 {
            let own = if printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            chars[usize::from(byte)] = char::from_u32(own).expect("below the surrogates");
        }
        let bytes = chars.iter().copied().zip(0..=255).collect();
        Self { chars, bytes }
    }

    /// `text` in the alphabet, into `out`, which is cleared.
    pub(super) fn write(&self, text: &str, out: &mut String) {
        out.clear();
        out.extend(text.bytes().map(|byte| self.chars[usize::from(byte)]));
    }

    /// The bytes behind a token's name; `None` when a character is not of the alphabet.
    pub(super) fn read(&self, name: &str) -> Option<Vec<u8>> {
        name.chars().map(|c| self.bytes.get(&c).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_back() {
        let alphabet = Alphabet::new();
        let all: String = alphabet.chars.iter().collect();
        assert_eq!(alphabet.read(&all).unwrap(), (0..=255).collect::<Vec<u8>>());
        let mut name = String::new();
        alphabet.write(" \u{e9}\n", &mut name);
        assert_eq!(name, "\u{120}\u{c3}\u{a9}\u{10a}");
        assert_eq!(alphabet.read("世"), None);
    }
}
