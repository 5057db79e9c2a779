//! `sparsectl complete`: goes on with a text, without a conversation around it.

use super::client::Address;
use super::run::{prompt_of_stdin, written};
use super::{print, print_json};
use anyhow::bail;
use serde_json::{Value, json};
use sparsed_engine::DEFAULT_MODEL;
use std::io::IsTerminal;

/// Where completions are asked for.
const COMPLETIONS: &str = "/v1/completions";

/// Go on with a text: no chat template, no system message.
#[derive(Debug, clap::Args)]
pub(super) struct Complete {
    /// The text. Without it: what is on standard input.
    text: Option<String>,
    #[command(flatten)]
    address: Address,
    /// A configured model's name.
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: String,
    /// Most tokens of the answer.
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    /// Randomness; 0: always the likeliest token.
    #[arg(long, default_value_t = 0.2)]
    temperature: f32,
    /// Same seed, same answer.
    #[arg(long)]
    seed: Option<i64>,
    /// A text that ends the answer; may be said several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Print the whole answer as JSON instead of streaming it.
    #[arg(long)]
    json: bool,
}

impl Complete {
    pub(super) fn run(self) -> anyhow::Result<()> {
        crate::lifecycle::runtime()?.block_on(async {
            let text = match &self.text {
                Some(text) => text.clone(),
                None if std::io::stdin().is_terminal() => bail!("a text is missing"),
                None => prompt_of_stdin()?,
            };
            let (client, body) = (self.address.client(), self.body(&text));
            if self.json {
                return print_json(&client.answer_at(COMPLETIONS, &body).await?);
            }
            written(client.stream_at(COMPLETIONS, &body).await?).await?;
            print("")
        })
    }

    fn body(&self, text: &str) -> Value {
        let mut body = json!({
            "model": self.model, "prompt": text, "max_tokens": self.max_tokens, "temperature": self.temperature,
            "stream": !self.json,
        });
        if let Some(seed) = self.seed {
            body["seed"] = json!(seed);
        }
        if !self.stop.is_empty() {
            body["stop"] = json!(self.stop);
        }
        body
    }
}
