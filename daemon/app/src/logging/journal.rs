//! What does a line look like in the journal? Its text with all that it says, and each of its values as a field.
//!
//! A value `model` is the field `SPARSED_MODEL`, and stands behind the text too, since `journalctl` shows that alone.
//! The id of an event (`events`) is its `MESSAGE_ID`.

use super::{events, is_wanted};
use log::kv::{Error, Key, Value, VisitSource};
use log::{Log, Metadata, Record};
use std::fmt::Write as _;
use systemd_journal_logger::JournalLog;

/// What all fields of ours begin with.
const PREFIX: &str = "SPARSED_";
/// Longest value in bytes: a line of the journal is a datagram, and no value of ours is a text.
const VALUE_BYTES_MAX: usize = 4096;

/// The logger of a daemon that the service manager has started.
pub(super) struct Journal(pub(super) JournalLog);

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_wanted(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = Line::of(record);
        let mut fields = Record::builder();
        fields.metadata(record.metadata().clone()).key_values(&line.fields);
        fields.file(record.file()).line(record.line()).module_path(record.module_path());
        // A journal that does not take it cannot be told so.
        let _lost = self.0.journal_send(&fields.args(format_args!("{}", line.text)).build()).is_err();
    }

    fn flush(&self) {}
}

/// The field that a value called `key` is.
pub(super) fn field(key: &str) -> String {
    let name = match key {
        "request" => "REQUEST_ID".to_owned(),
        key => key.to_ascii_uppercase(),
    };
    format!("{PREFIX}{name}")
}

/// A line as the journal has it.
#[derive(Debug, Default)]
struct Line {
    text: String,
    fields: Vec<(String, String)>,
}

impl Line {
    fn of(record: &Record<'_>) -> Self {
        let mut line = Self { text: printable(&record.args().to_string()), fields: Vec::new() };
        // A text that is not constant is one that a plugin says.
        let id = record.args().as_str().map_or_else(|| events::relayed_id_of(&line.text), events::id_of);
        if let Some(id) = id {
            line.fields.push(("MESSAGE_ID".to_owned(), id.to_owned()));
        }
        // Its visitor does not fail.
        let _whole = record.key_values().visit(&mut line).is_ok();
        line
    }
}

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        let value = printable(&value.to_string());
        // What there is not: a request without a session.
        if value.is_empty() {
            return Ok(());
        }
        // A String takes all.
        let _whole = write!(self.text, " {key}={value}").is_ok();
        self.fields.push((field(key.as_str()), value));
        Ok(())
    }
}

/// A text that moves no cursor and begins no line, of bounded length: it may have come from a plugin or a broker.
fn printable(text: &str) -> String {
    let mut printed = String::with_capacity(text.len().min(VALUE_BYTES_MAX));
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if printed.len() + c.len_utf8() > VALUE_BYTES_MAX {
            printed.push('…');
            break;
        }
        printed.push(c);
    }
    printed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(args: std::fmt::Arguments<'_>, values: &[(&str, Value<'_>)]) -> Line {
        Line::of(&Record::builder().args(args).key_values(&values).build())
    }

    #[test]
    fn a_line_shows_its_values_and_has_each_as_a_field() {
        let values = [("model", Value::from("default")), ("request", Value::from("chatcmpl-1"))];
        let Line { text, fields } = line(format_args!("model ready"), &values);
        assert_eq!(text, "model ready model=default request=chatcmpl-1");
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let id = events::id_of("model ready").unwrap();
        let expected = [("MESSAGE_ID", id), ("SPARSED_MODEL", "default"), ("SPARSED_REQUEST_ID", "chatcmpl-1")];
        assert_eq!(fields, expected);
    }

    /// A plugin says of its process what is reduced there, and cannot say what only the daemon says.
    #[test]
    fn what_a_plugin_says_is_one_of_few_events() {
        let id = |text: &str| line(format_args!("{text}"), &[]).fields.into_iter().map(|(_, id)| id).next();
        let reduced = "this kernel has no Landlock: the plugin may open any file of its user";
        assert_eq!(id(reduced).as_deref(), events::id_of(reduced));
        let threads = "the slow tier is read by threads, as io_uring cannot be used";
        assert_eq!(id(&format!("{threads}: EPERM")).as_deref(), events::id_of(threads));
        assert_eq!(id("the daemon cannot serve"), None);
    }

    #[test]
    fn nothing_that_is_said_begins_a_line_of_its_own_and_what_is_not_there_is_no_field() {
        let values = [("reason", Value::from("a\nMESSAGE_ID=x\x1b[2J")), ("session", Value::from(""))];
        let Line { text, fields } = line(format_args!("x {}", 1), &values);
        assert_eq!((text.as_str(), fields.len()), ("x 1 reason=a MESSAGE_ID=x [2J", 1));
        let long = "é".repeat(VALUE_BYTES_MAX);
        assert!(printable(&long).len() <= VALUE_BYTES_MAX + '…'.len_utf8());
    }
}
