//! How does Python write JSON? Templates and encodings were written for `json.dumps`.

use super::marks::is_private;
use crate::ModelError;
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;
use std::io::{self, Write};

/// Widest indentation in spaces.
pub(super) const INDENT_MAX: usize = 16;

/// Options of `json.dumps`.
#[derive(Clone, Debug)]
pub(super) struct Dumps {
    /// Spaces per level; `None`: all in one line.
    pub(super) indent: Option<usize>,
    /// Whether characters past ASCII are escaped; marks of messages never are.
    pub(super) ensure_ascii: bool,
    /// Between items, and between key and value.
    pub(super) separators: (String, String),
}

impl Default for Dumps {
    fn default() -> Self {
        Self { indent: None, ensure_ascii: false, separators: (", ".to_owned(), ": ".to_owned()) }
    }
}

impl Dumps {
    /// # Errors
    /// A value that JSON does not have.
    pub(super) fn write(&self, value: &impl Serialize) -> Result<String, ModelError> {
        let mut bytes = Vec::new();
        let formatter = Python { options: self, level: 0, empty: true };
        let fail = |error: &dyn std::fmt::Display| ModelError::Template(format!("json: {error}"));
        value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter)).map_err(|error| fail(&error))?;
        let text = String::from_utf8(bytes).map_err(|error| fail(&error))?;
        Ok(if self.ensure_ascii { escape(&text) } else { text })
    }
}

/// One line, Python's default separators, characters as they are.
///
/// # Errors
/// A value that JSON does not have.
pub(super) fn dumps(value: &impl Serialize) -> Result<String, ModelError> {
    Dumps::default().write(value)
}

/// Escapes what is not ASCII; outside of strings JSON has none of it.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() || is_private(c) {
            escaped.push(c);
        } else {
            let mut units = [0; 2];
            escaped.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    escaped
}

struct Python<'o> {
    options: &'o Dumps,
    level: usize,
    /// Whether the innermost list or object has no item yet.
    empty: bool,
}

impl Python<'_> {
    fn open(&mut self, out: &mut (impl Write + ?Sized), mark: &[u8]) -> io::Result<()> {
        self.level += 1;
        self.empty = true;
        out.write_all(mark)
    }

    fn close(&mut self, out: &mut (impl Write + ?Sized), mark: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if !self.empty {
            self.new_line(out)?;
        }
        self.empty = false;
        out.write_all(mark)
    }

    fn item(&mut self, out: &mut (impl Write + ?Sized), first: bool) -> io::Result<()> {
        if !first {
            let separator = &self.options.separators.0;
            // Python drops the space before a line's end.
            let separator = if self.options.indent.is_some() { separator.trim_end() } else { separator };
            out.write_all(separator.as_bytes())?;
        }
        self.empty = false;
        self.new_line(out)
    }

    fn new_line(&self, out: &mut (impl Write + ?Sized)) -> io::Result<()> {
        match self.options.indent {
            Some(indent) => write!(out, "\n{:width$}", "", width = indent * self.level),
            None => Ok(()),
        }
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.options.separators.1.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    /// Python's exponents have a sign and two digits: `1e-05`, `1e+16`.
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        let text = format!("{value:?}");
        match text.split_once('e') {
            None => out.write_all(text.as_bytes()),
            Some((mantissa, exponent)) => {
                let (sign, digits) = exponent.strip_prefix('-').map_or(("+", exponent), |digits| ("-", digits));
                write!(out, "{mantissa}e{sign}{digits:0>2}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_written_as_python_writes_them() {
        let value = json!({"b": [1, 2.0, null, true], "a": {}, "e": [], "t": "é\u{1}\"\u{1f600}"});
        assert_eq!(dumps(&value).unwrap(), r#"{"b": [1, 2.0, null, true], "a": {}, "e": [], "t": "é\u0001\"😀"}"#);
        let ascii = Dumps { ensure_ascii: true, ..Dumps::default() };
        assert_eq!(ascii.write(&json!("é😀\u{f0000}")).unwrap(), "\"\\u00e9\\ud83d\\ude00\u{f0000}\"");
        let compact = Dumps { separators: (",".to_owned(), ":".to_owned()), ..Dumps::default() };
        assert_eq!(compact.write(&json!({"a": [1, 2]})).unwrap(), r#"{"a":[1,2]}"#);
    }

    #[test]
    fn indented_values_break_lines_as_python_does() {
        let indented = Dumps { indent: Some(2), ..Dumps::default() };
        let text = indented.write(&json!({"a": [1, {}], "b": [[]], "c": {"d": 2}})).unwrap();
        assert_eq!(
            text,
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": [\n    []\n  ],\n  \"c\": {\n    \"d\": 2\n  }\n}"
        );
    }

    #[test]
    fn numbers_have_pythons_exponents() {
        assert_eq!(
            dumps(&json!([1e16, 1e-5, 0.0001, 1.5e300, 100_000.0])).unwrap(),
            "[1e+16, 1e-05, 0.0001, 1.5e+300, 100000.0]"
        );
    }
}
