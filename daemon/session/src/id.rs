//! What is a session called?

use std::fmt;
use std::str::FromStr;

const PREFIX: &str = "sess_";
const HEX_DIGITS: usize = 32;

/// The name of a session: 128 random bits, written `sess_` and 32 hexadecimal digits in lower case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId([u8; 16]);

/// A text that names no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a session is named sess_ and 32 hexadecimal digits in lower case")]
pub struct IdError;

impl SessionId {
    /// The session with these bits.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bits.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SessionId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let digits = text.strip_prefix(PREFIX).ok_or(IdError)?.as_bytes();
        if digits.len() != HEX_DIGITS {
            return Err(IdError);
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

fn digit(letter: u8) -> Result<u8, IdError> {
    match letter {
        b'0'..=b'9' => Ok(letter - b'0'),
        b'a'..=b'f' => Ok(letter - b'a' + 10),
        _ => Err(IdError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_back_and_nothing_like_it_is() {
        let id = SessionId::from_bytes(*b"\x00\x01\xfe0123456789abc");
        let text = id.to_string();
        assert_eq!(text.parse(), Ok(id));
        let wrong = [&text[1..], &text[..36], &format!("{text}0"), &text.to_uppercase(), &text.replace('f', "g"), ""];
        wrong.into_iter().for_each(|text| assert_eq!(text.parse::<SessionId>(), Err(IdError), "{text}"));
        assert_eq!("sess_0000000000000000000000000000000é".parse::<SessionId>(), Err(IdError));
    }
}
