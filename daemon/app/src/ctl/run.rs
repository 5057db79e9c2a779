//! `sparsectl run`: asks a model of the daemon, or runs a model file in a private daemon of its own.

use super::client::{Address, Client, Events};
use super::private::{PrivateDaemon, PrivateOptions};
use super::repl;
use super::sessions::whole_id;
use anyhow::bail;
use serde_json::{Value, json};
use sparsed_engine::DEFAULT_MODEL;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Longest prompt that is read from standard input.
const STDIN_BYTES_MAX: u64 = 8 << 20;

/// Ask a model: one answer for a prompt, a conversation on a terminal.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// A configured model's name, or a model file (which needs no daemon), then the prompt. Without a name: `default`.
    /// Without a prompt: a conversation on a terminal, or else the prompt is read from standard input.
    #[arg(value_name = "MODEL_OR_FILE] [PROMPT", num_args = 0..=2)]
    words: Vec<String>,
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    options: ChatOptions,
    /// Print the whole answer as JSON instead of streaming it.
    #[arg(long)]
    json: bool,
    // Last: its heading would go on over what follows.
    #[command(flatten)]
    private: PrivateOptions,
}

/// How the answer is made.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ChatOptions {
    /// Go on with this conversation, which the daemon keeps (`sparsectl sessions`).
    #[arg(long)]
    pub(super) session: Option<String>,
    /// The system message.
    #[arg(long)]
    pub(super) system: Option<String>,
    /// Randomness; 0: always the likeliest token.
    #[arg(long, default_value_t = 0.2)]
    temperature: f32,
    /// Only the likeliest tokens that make up this share.
    #[arg(long, default_value_t = 0.9)]
    top_p: f32,
    /// Same seed, same answer.
    #[arg(long)]
    seed: Option<u64>,
    /// Most tokens of an answer.
    #[arg(long)]
    max_tokens: Option<u32>,
}

impl ChatOptions {
    /// A chat request with these messages.
    pub(super) fn request(&self, model: &str, messages: &[Value], stream: bool) -> Value {
        let mut body = json!({
            "messages": messages,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": stream,
        });
        match &self.session {
            // It has a model.
            Some(session) => body["session_id"] = json!(session),
            None => body["model"] = json!(model),
        }
        if let Some(seed) = self.seed {
            body["seed"] = json!(seed.cast_signed());
        }
        if let Some(max_tokens) = self.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        body
    }

    /// The conversation before the first question.
    pub(super) fn opening(&self) -> Vec<Value> {
        self.system.iter().map(|text| json!({ "role": "system", "content": text })).collect()
    }
}

/// What the words on the command line mean.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Named(String),
    File(PathBuf),
}

impl Run {
    pub(super) fn run(self) -> anyhow::Result<()> {
        crate::lifecycle::runtime()?.block_on(self.converse())
    }

    async fn converse(mut self) -> anyhow::Result<()> {
        let (target, prompt) = target(&self.words, self.options.session.is_some())?;
        let (client, model, private) = match target {
            Target::Named(name) => {
                if self.private.any() {
                    bail!(
                        "options for a model file do not go with a model of the daemon; set them in its configuration"
                    );
                }
                let client = self.address.client();
                if let Some(session) = &mut self.options.session {
                    *session = whole_id(&client, session).await?;
                }
                (client, name, None)
            }
            Target::File(file) => {
                let private = PrivateDaemon::start(&file, &self.private).await?;
                (Client::new(private.socket()), DEFAULT_MODEL.to_owned(), Some(private))
            }
        };
        let outcome = match &private {
            // So that a private daemon's folder goes too. A conversation takes Ctrl-C itself.
            Some(_) if prompt.is_some() => tokio::select! {
                outcome = self.ask(&client, &model, prompt) => outcome,
                _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("stopped")),
            },
            _ => self.ask(&client, &model, prompt).await,
        };
        if let Some(private) = private {
            private.stop().await?;
        }
        outcome
    }

    async fn ask(&self, client: &Client, model: &str, prompt: Option<String>) -> anyhow::Result<()> {
        let prompt = match prompt {
            Some(prompt) => prompt,
            None if std::io::stdin().is_terminal() => return repl::run(client, model, &self.options).await,
            None => prompt_of_stdin()?,
        };
        let mut messages = self.options.opening();
        messages.push(json!({ "role": "user", "content": prompt }));
        if self.json {
            let answer = client.chat(&self.options.request(model, &messages, false)).await?;
            return super::print_json(&answer);
        }
        let answer = stream_answer(client, &self.options.request(model, &messages, true)).await?;
        if !answer.ends_with('\n') {
            write_out("\n")?;
        }
        Ok(())
    }
}

/// The prompt that is on standard input.
///
/// # Errors
/// There is none, it is too long, or no text.
pub(super) fn prompt_of_stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin().take(STDIN_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > STDIN_BYTES_MAX {
        bail!("the prompt on standard input has more than {STDIN_BYTES_MAX} bytes");
    }
    if text.trim().is_empty() {
        bail!("there is no prompt, neither among the arguments nor on standard input");
    }
    Ok(text)
}

/// Writes an answer to standard output as it comes, and gives it back whole.
///
/// # Errors
/// The daemon's, or that nobody reads standard output.
pub(super) async fn stream_answer(client: &Client, request: &Value) -> anyhow::Result<String> {
    written(client.stream(request).await?).await
}

/// Writes the pieces of an answer to standard output as they come, and gives it back whole.
///
/// # Errors
/// As [`stream_answer`].
pub(super) async fn written(mut events: Events) -> anyhow::Result<String> {
    let mut answer = String::new();
    while let Some(event) = events.next().await? {
        let choice = &event["choices"][0];
        // A chat's piece, or a completion's.
        if let Some(text) = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()) {
            write_out(text)?;
            answer += text;
        }
    }
    Ok(answer)
}

fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// One word is a file if there is such a file, a model if it looks like a name, and a prompt otherwise. A session is
/// the daemon's and has a model, so that one word is a prompt there.
fn target(words: &[String], has_session: bool) -> anyhow::Result<(Target, Option<String>)> {
    let is_file = |word: &str| Path::new(word).exists() || has_file_extension(word);
    let is_path = |word: &str| is_file(word) || word.starts_with(['/', '.', '~']);
    Ok(match words {
        [] => (Target::Named(DEFAULT_MODEL.to_owned()), None),
        [prompt] if has_session => (Target::Named(DEFAULT_MODEL.to_owned()), Some(prompt.clone())),
        [_, _] if has_session => bail!("a session has a model; leave the model out"),
        [file] if is_file(file) => (Target::File(file.into()), None),
        [name] if is_name(name) => (Target::Named(name.clone()), None),
        [prompt] => (Target::Named(DEFAULT_MODEL.to_owned()), Some(prompt.clone())),
        [file, prompt] if is_path(file) => (Target::File(file.into()), Some(prompt.clone())),
        [name, prompt] => (Target::Named(name.clone()), Some(prompt.clone())),
        _ => bail!("a model and a prompt are all that fits; put the prompt in quotes"),
    })
}

fn has_file_extension(word: &str) -> bool {
    Path::new(word).extension().is_some_and(|extension| extension == "gguf")
}

fn is_name(word: &str) -> bool {
    !word.is_empty()
        && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':'))
        && !word.ends_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_a_model_a_file_or_a_prompt() {
        let owned = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
        let words = |list: &[&str]| target(&owned(list), false).unwrap();
        let named = |name: &str| Target::Named(name.to_owned());
        assert_eq!(words(&[]), (named("default"), None));
        assert_eq!(words(&["default"]), (named("default"), None));
        assert_eq!(words(&["What is 1 + 1?"]), (named("default"), Some("What is 1 + 1?".to_owned())));
        assert_eq!(words(&["big", "Hi"]), (named("big"), Some("Hi".to_owned())));
        assert_eq!(words(&["m.gguf", "Hi"]), (Target::File("m.gguf".into()), Some("Hi".to_owned())));
        assert_eq!(words(&["./folder", "Hi"]), (Target::File("./folder".into()), Some("Hi".to_owned())));
        assert_eq!(words(&["maker/big", "Hi"]), (named("maker/big"), Some("Hi".to_owned())));
        let (_, prompt) = target(&owned(&["Hello"]), true).unwrap();
        assert_eq!(prompt.as_deref(), Some("Hello"), "a session has a model");
        assert!(target(&owned(&["big", "Hello"]), true).is_err());
    }
}
