//! How does a model read and write text? Its tokenizer and chat format, from a GGUF's keys or a folder's files.

use crate::weights::Weights;
use crate::{ChatFormat, ModelError, Tokenizer, TokenizerConfig};
use serde_json::Value;
use sparsed_quant::gguf::{self, Metadata};

/// Largest `tokenizer.json` in bytes.
const TOKENIZER_BYTES_MAX: usize = 256 << 20;
/// Largest of the other files in bytes.
const FILE_BYTES_MAX: usize = 16 << 20;

/// What a model has to do with text; neither is there in a model of token ids alone.
#[derive(Debug, Default)]
pub(crate) struct Language {
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) chat: Option<ChatFormat>,
}

impl Language {
    pub(crate) fn of(weights: &Weights) -> Result<Self, ModelError> {
        match weights.metadata() {
            Some(metadata) => Self::of_gguf(metadata),
            None => Self::of_folder(weights),
        }
    }

    fn of_gguf(metadata: &Metadata) -> Result<Self, ModelError> {
        let Some(tokenizer) = Tokenizer::from_metadata(metadata)? else { return Ok(Self::default()) };
        let template = metadata.str("tokenizer.chat_template")?;
        let architecture = metadata.str("general.architecture")?.unwrap_or_default();
        let chat = ChatFormat::choose(template, architecture, &tokenizer)?;
        Ok(Self { tokenizer: Some(tokenizer), chat })
    }

    fn of_folder(weights: &Weights) -> Result<Self, ModelError> {
        let Some(Files { tokenizer, template, .. }) = Files::of(weights)? else { return Ok(Self::default()) };
        let kind = weights.config().and_then(|model| model.get("model_type"));
        let kind = kind.and_then(Value::as_str).unwrap_or_default();
        let chat = ChatFormat::choose(template.as_deref(), kind, &tokenizer)?;
        Ok(Self { tokenizer: Some(tokenizer), chat })
    }
}

/// What the files of a folder say.
struct Files {
    /// The bytes of `tokenizer.json`.
    json: Vec<u8>,
    config: TokenizerConfig,
    tokenizer: Tokenizer,
    template: Option<String>,
}

impl Files {
    /// Reads them; `None` without a tokenizer.
    fn of(weights: &Weights) -> Result<Option<Self>, ModelError> {
        let Some(json) = weights.side_file("tokenizer.json", TOKENIZER_BYTES_MAX)? else { return Ok(None) };
        let config = match weights.side_file("tokenizer_config.json", FILE_BYTES_MAX)? {
            Some(file) => TokenizerConfig::parse(&file)?,
            None => TokenizerConfig::default(),
        };
        let mut tokenizer = Tokenizer::from_json(&json, &config)?;
        let model = weights.config();
        if let Some(ids) = model.and_then(|model| model.get("eos_token_id")) {
            tokenizer.add_end_tokens(&end_tokens(ids))?;
        }
        if let Some(file) = weights.side_file("generation_config.json", FILE_BYTES_MAX)? {
            let generation: Value = serde_json::from_slice(&file).map_err(|error| ModelError::Config {
                file: "generation_config.json".to_owned(),
                reason: error.to_string(),
            })?;
            tokenizer.add_end_tokens(&end_tokens(&generation["eos_token_id"]))?;
        }
        let separate = weights.side_file("chat_template.jinja", FILE_BYTES_MAX)?;
        let separate = separate.map(String::from_utf8).transpose();
        let separate = separate.map_err(|_| ModelError::Template("chat_template.jinja is not UTF-8".to_owned()))?;
        let template = separate.or_else(|| config.chat_template.clone());
        Ok(Some(Self { json, config, tokenizer, template }))
    }
}

/// Writes what a folder says of its language as keys of a GGUF.
///
/// # Errors
/// A tokenizer that a GGUF has no keys for.
pub(crate) fn write_metadata(weights: &Weights, vocab_size: u32, metadata: &mut Metadata) -> Result<(), ModelError> {
    let Some(Files { json, config, tokenizer, template }) = Files::of(weights)? else {
        metadata.set("tokenizer.ggml.model", gguf::Value::String("none".to_owned()));
        return Ok(());
    };
    tokenizer.write_metadata(&json, &config, vocab_size, metadata)?;
    if let Some(template) = template {
        metadata.set("tokenizer.chat_template", gguf::Value::String(template));
    }
    Ok(())
}

/// `eos_token_id`: a number, a list of numbers, or nothing.
fn end_tokens(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn end_tokens_are_one_or_several() {
        assert_eq!(end_tokens(&json!(2)), [2]);
        assert_eq!(end_tokens(&json!([1, 3])), [1, 3]);
        assert_eq!(end_tokens(&Value::Null), Vec::<u32>::new());
    }
}
