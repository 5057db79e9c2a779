//! What does a child say, and how much of it is logged? Bytes become lines, and lines a flow with a limit.

use crate::call::clean;
use std::time::{Duration, Instant};

/// Longest line in bytes; what is longer becomes several.
const LINE_BYTES_MAX: usize = 1024;
/// Most lines in each [`Flow::TIME`]: more than a driver says as it starts, less than fills a journal.
const LINES_MAX: u32 = 200;

/// Bytes on their way to lines. A line `<N>text` has the priority N of syslog, as services write it.
#[derive(Debug)]
pub(super) struct Lines {
    /// Of lines without one of their own.
    level: log::Level,
    partial: Vec<u8>,
}

impl Lines {
    pub(super) fn new(level: log::Level) -> Self {
        Self { level, partial: Vec::new() }
    }

    pub(super) fn push(&mut self, bytes: &[u8], said: &mut impl FnMut(log::Level, String)) {
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
            }
            if byte == b'\n' || self.partial.len() == LINE_BYTES_MAX {
                let line = std::mem::take(&mut self.partial);
                let (level, text) = match line.as_slice() {
                    [b'<', n @ b'0'..=b'7', b'>', text @ ..] => (priority(*n), text),
                    text => (self.level, text),
                };
                let text = clean(&String::from_utf8_lossy(text));
                if !text.is_empty() {
                    said(level, text);
                }
            }
        }
    }

    /// Gives out what has no line's end.
    pub(super) fn finish(&mut self, said: &mut impl FnMut(log::Level, String)) {
        if !self.partial.is_empty() {
            self.push(b"\n", said);
        }
    }
}

fn priority(digit: u8) -> log::Level {
    match digit {
        b'0'..=b'3' => log::Level::Error,
        b'4' => log::Level::Warn,
        b'5' | b'6' => log::Level::Info,
        _ => log::Level::Debug,
    }
}

/// How many lines were logged lately, and how many were not.
#[derive(Debug)]
pub(super) struct Flow {
    since: Instant,
    lines: u32,
    dropped: u64,
}

impl Flow {
    /// What [`LINES_MAX`] is counted in.
    pub(super) const TIME: Duration = Duration::from_secs(1);

    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, lines: 0, dropped: 0 }
    }

    /// Whether a line that comes now is logged, and how many were dropped, if that is to be told.
    pub(super) fn admit(&mut self, now: Instant) -> (bool, Option<u64>) {
        let told = self.look(now);
        let is_logged = self.lines < LINES_MAX;
        if is_logged {
            self.lines += 1;
        } else {
            self.dropped += 1;
        }
        (is_logged, told)
    }

    /// How many lines were dropped, once their time is over.
    pub(super) fn look(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) < Self::TIME {
            return None;
        }
        (self.since, self.lines) = (now, 0);
        self.end()
    }

    /// How many lines were dropped and not told yet.
    pub(super) fn end(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.dropped)).filter(|&dropped| dropped > 0)
    }

    pub(super) fn has_dropped(&self) -> bool {
        self.dropped > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(parts: &[&[u8]]) -> Vec<(log::Level, String)> {
        let (mut lines, mut all) = (Lines::new(log::Level::Warn), Vec::new());
        parts.iter().for_each(|part| lines.push(part, &mut |level, line| all.push((level, line))));
        all
    }

    #[test]
    fn lines_are_put_together_cut_and_cleaned() {
        let found = lines(&[b"<6>he", b"llo\n\n  \n<9>x\x1b[2J\n"]);
        assert_eq!(found, [(log::Level::Info, "hello".to_owned()), (log::Level::Warn, "<9>x [2J".to_owned())]);
        let long = lines(&[&vec![b'a'; 2 * LINE_BYTES_MAX]]);
        assert_eq!(long.len(), 2);
        assert_eq!(lines(&[b"\xff\n"])[0].1, "\u{fffd}");
    }

    #[test]
    fn lines_past_the_limit_are_dropped_counted_and_told_once() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut flow = Flow::new(start);
        let logged = (0..1000).filter(|_| flow.admit(at(10)).0).count();
        assert_eq!(logged, LINES_MAX as usize);
        assert!(flow.has_dropped() && flow.look(at(999)).is_none());
        assert_eq!(flow.admit(at(1000)), (true, Some(1000 - u64::from(LINES_MAX))));
        assert_eq!((flow.look(at(3000)), flow.end()), (None, None));
    }
}
