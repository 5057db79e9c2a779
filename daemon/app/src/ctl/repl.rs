//! A conversation on a terminal: lines with history, answers that stream, Ctrl-C that stops an answer.

use super::client::Client;
use super::run::{ChatOptions, stream_answer};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

const HELP: &str = "\
/clear          forget the conversation
/system TEXT    set the system message and begin anew
/help           this list
/exit           leave (Ctrl-D too)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one.";

/// Talks until the user leaves.
///
/// # Errors
/// A terminal that cannot be used.
pub(super) async fn run(client: &Client, model: &str, options: &ChatOptions) -> anyhow::Result<()> {
    let mut options = options.clone();
    let mut editor = DefaultEditor::new()?;
    let mut messages = options.opening();
    super::print("Type a message, /help for help, Ctrl-D to leave.")?;
    loop {
        let line = tokio::task::block_in_place(|| read(&mut editor))?;
        let Some(line) = line else { return Ok(()) };
        match command(&line) {
            Command::Nothing => {}
            Command::Exit => return Ok(()),
            Command::Help => super::print(HELP)?,
            Command::Clear | Command::System(_) if options.session.is_some() => {
                super::print("A session keeps what was said; /exit, then begin another one.")?;
            }
            Command::Clear => messages = options.opening(),
            Command::System(text) => {
                options.system = Some(text);
                messages = options.opening();
            }
            Command::Unknown => super::print("There is no such command; /help lists them.")?,
            Command::Message(text) => turn(client, model, &options, &mut messages, text).await?,
        }
    }
}

/// One question and its answer. What fails is said and forgotten: the conversation goes on as it was.
async fn turn(
    client: &Client,
    model: &str,
    options: &ChatOptions,
    messages: &mut Vec<Value>,
    text: String,
) -> anyhow::Result<()> {
    messages.push(json!({ "role": "user", "content": text }));
    let request = options.request(model, messages, true);
    let answer = tokio::select! {
        answer = stream_answer(client, &request) => answer,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("stopped")),
    };
    match answer {
        // The daemon keeps it.
        Ok(_) if options.session.is_some() => {
            super::print("")?;
            messages.clear();
        }
        Ok(answer) => {
            super::print("")?;
            messages.push(json!({ "role": "assistant", "content": answer }));
        }
        Err(error) => {
            super::print(&format!("\n[{error:#}]"))?;
            messages.pop();
        }
    }
    Ok(())
}

/// One message, perhaps of several lines. `None`: the user leaves.
fn read(editor: &mut DefaultEditor) -> anyhow::Result<Option<String>> {
    let mut text = String::new();
    loop {
        match editor.readline(if text.is_empty() { "> " } else { "| " }) {
            Ok(line) => match line.strip_suffix('\\') {
                Some(line) => {
                    text += line;
                    text.push('\n');
                }
                None => {
                    text += &line;
                    if !text.trim().is_empty() {
                        editor.add_history_entry(text.as_str())?;
                    }
                    return Ok(Some(text));
                }
            },
            Err(ReadlineError::Interrupted) => text.clear(),
            Err(ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Nothing,
    Exit,
    Help,
    Clear,
    System(String),
    Unknown,
    Message(String),
}

fn command(line: &str) -> Command {
    let line = line.trim();
    match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
        ("", _) => Command::Nothing,
        ("/exit" | "/quit" | "/bye", _) => Command::Exit,
        ("/help" | "/?", _) => Command::Help,
        ("/clear", _) => Command::Clear,
        ("/system", text) => Command::System(text.trim().to_owned()),
        (word, _) if word.starts_with('/') && !word[1..].contains('/') => Command::Unknown,
        _ => Command::Message(line.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_messages() {
        assert_eq!(command("  "), Command::Nothing);
        assert_eq!(command("/system  Be brief. "), Command::System("Be brief.".to_owned()));
        assert_eq!(command("/bogus"), Command::Unknown);
        assert_eq!(command("/etc/fstab says?"), Command::Message("/etc/fstab says?".to_owned()));
        assert_eq!(command(" Hi "), Command::Message("Hi".to_owned()));
    }
}
