//! `sparsectl run`: answers one prompt in this process, greedily. Becomes a client of the daemon when that is there.

use super::local::Local;
use anyhow::{Context, ensure};
use sparsed_model::ChatMessage;
use std::io::Write;

/// Tokens of one prefill step.
const CHUNK: u32 = 256;

/// Answer one prompt at temperature 0, without a daemon.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    #[command(flatten)]
    local: Local,
    /// The user's message.
    prompt: String,
    /// Most tokens of the answer.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_tokens: u32,
}

impl Run {
    #[expect(clippy::print_stdout, reason = "the answer goes to standard output")]
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (model, backend) = self.local.open()?;
        let tokenizer = model.tokenizer().context("the model has no tokenizer: use `sparsectl logits`")?;
        let template = model.chat_template().context("the model has no chat template")?;
        let message = ChatMessage { role: "user".to_owned(), content: self.prompt.clone() };
        let prompt = tokenizer.encode_chat(&template.render(&[message])?)?;
        let length = u32::try_from(prompt.len())?;
        let limit = model.spec().context_length;
        ensure!(length < limit, "the prompt has {length} tokens, the model's context is {limit}");
        let context = limit.min(length + self.max_tokens);
        let mut device = self.local.load(&model, &backend, context, CHUNK, false)?;
        let mut sequence = device.sequence();
        let mut logits = Vec::new();
        for chunk in prompt.chunks(CHUNK as usize) {
            let last = u32::try_from(chunk.len() - 1)?;
            logits = device.step(&mut sequence, chunk, &[last])?.logits;
        }
        let mut pending = Vec::new();
        for position in length..context {
            let token = greedy(&logits);
            if tokenizer.end_tokens().contains(&token) {
                break;
            }
            pending.extend_from_slice(tokenizer.token_bytes(token));
            print!("{}", whole_characters(&mut pending));
            std::io::stdout().flush()?;
            if position + 1 < context {
                logits = device.step(&mut sequence, &[token], &[0])?.logits;
            }
        }
        println!("{}", String::from_utf8_lossy(&pending));
        Ok(())
    }
}

/// The token of greatest logit, the lowest of equals.
fn greedy(logits: &[f32]) -> u32 {
    let best =
        (0u32..).zip(logits).fold((0, f32::NEG_INFINITY), |best, (id, &v)| if v > best.1 { (id, v) } else { best });
    best.0
}

/// Takes the whole characters from the front; what may be the start of one stays.
fn whole_characters(bytes: &mut Vec<u8>) -> String {
    let end = match std::str::from_utf8(bytes) {
        Ok(text) => text.len(),
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        Err(_) => bytes.len(),
    };
    String::from_utf8_lossy(&bytes.drain(..end).collect::<Vec<_>>()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_never_cut() {
        let mut bytes = "h\u{e9}".as_bytes()[..2].to_vec();
        assert_eq!(whole_characters(&mut bytes), "h");
        bytes.push(0xa9);
        assert_eq!(whole_characters(&mut bytes), "\u{e9}");
        bytes.extend([0xff, b'x']);
        assert_eq!(whole_characters(&mut bytes), "\u{fffd}x");
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, f32::NAN]), 1);
    }
}
