//! Where does an event of a stream end? Server-sent events as the HTML standard has them; only their data counts.

use crate::trouble::Trouble;

/// Most bytes of an event, and so of what is held of a stream.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// Most bytes of an answer with all that goes with it.
pub(crate) const STREAM_BYTES_MAX: u64 = 256 << 20;

/// A stream of events, as far as it has come.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// What has come of the line that is coming.
    line: Vec<u8>,
    /// The data of the event that is coming.
    data: Vec<u8>,
    /// It has a data line, which may be empty.
    has_data: bool,
    n_bytes: u64,
}

impl Events {
    /// Takes bytes in; `each` has the data of every event that is whole then, and says whether to go on.
    ///
    /// # Errors
    /// What `each` finds wrong; an event or a stream beyond its limit.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        self.n_bytes = self.n_bytes.saturating_add(bytes.len() as u64);
        if self.n_bytes > STREAM_BYTES_MAX {
            return Err(Trouble::Broken(format!("its answer has more than {STREAM_BYTES_MAX} bytes")));
        }
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.extend(&rest[..end])?;
            rest = &rest[end + 1..];
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
            if self.line.is_empty() {
                if std::mem::take(&mut self.has_data) {
                    let data = std::mem::take(&mut self.data);
                    each(&data)?;
                }
            } else {
                self.take_line();
            }
            self.line.clear();
        }
        self.extend(rest)
    }

    fn extend(&mut self, part: &[u8]) -> Result<(), Trouble> {
        if self.data.len() + self.line.len() + part.len() > EVENT_BYTES_MAX {
            return Err(Trouble::Broken(format!("it sent an event of more than {EVENT_BYTES_MAX} bytes")));
        }
        self.line.extend_from_slice(part);
        Ok(())
    }

    /// Comments and other fields are none of ours.
    fn take_line(&mut self) {
        let Some(value) = self.line.strip_prefix(b"data:") else { return };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(parts: &[&[u8]]) -> Result<Vec<String>, Trouble> {
        let (mut events, mut heard) = (Events::default(), Vec::new());
        for part in parts {
            events.push(part, |data| {
                heard.push(String::from_utf8(data.to_vec()).unwrap());
                Ok(())
            })?;
        }
        Ok(heard)
    }

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let stream = b": ping\r\n\r\ndata: {\"a\"\r\ndata::1}\r\n\r\nevent: x\ndata:\n\nid: 3\n\ndata: [DONE]\n\n";
        let whole = heard(&[stream]).unwrap();
        assert_eq!(whole, ["{\"a\"\n:1}", "", "[DONE]"]);
        for size in 1..stream.len() {
            let parts: Vec<&[u8]> = stream.chunks(size).collect();
            assert_eq!(heard(&parts).unwrap(), whole, "in pieces of {size}");
        }
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let piece = vec![b'x'; 1 << 16];
        let parts: Vec<&[u8]> = std::iter::repeat_n(piece.as_slice(), 17).collect();
        assert!(matches!(heard(&parts), Err(Trouble::Broken(said)) if said.contains("1048576")));
        let line = [b"data: ".as_slice(), &piece, b"\n"].concat();
        let parts: Vec<&[u8]> = std::iter::repeat_n(line.as_slice(), 17).collect();
        assert!(heard(&parts).is_err(), "many lines of one event");
    }
}
