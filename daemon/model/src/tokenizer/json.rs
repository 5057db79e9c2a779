//! What does a Hugging Face folder say about its tokenizer? `tokenizer.json` and `tokenizer_config.json`.
//!
//! Only byte-level BPE is read, and everything in the file that would change its tokens is either understood or
//! refused by name.

use super::parts::{Kind, Parts, TOKENS_MAX};
use super::split::{DIGITS, GPT2, Splitter};
use crate::ModelError;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::NormalizerWrapper;

/// Largest `tokenizer.json` in bytes.
const FILE_BYTES_MAX: usize = 256 << 20;
/// Largest `tokenizer_config.json` in bytes.
const CONFIG_BYTES_MAX: usize = 16 << 20;

/// What `tokenizer_config.json` adds: special tokens and the chat template.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TokenizerConfig {
    /// The begin token's name.
    pub bos_token: Option<String>,
    /// The end token's name.
    pub eos_token: Option<String>,
    /// Whether plain text begins with the begin token; absent: as `tokenizer.json` has it.
    pub add_bos_token: Option<bool>,
    /// The chat template. Newer folders have it in a file of its own, `chat_template.jinja`.
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`.
    ///
    /// # Errors
    /// No JSON object, over 16 MiB.
    pub fn parse(bytes: &[u8]) -> Result<Self, ModelError> {
        check_length("tokenizer_config.json", bytes, CONFIG_BYTES_MAX)?;
        let file: HashMap<String, Value> = parse("tokenizer_config.json", bytes)?;
        // A token is a string or an object with its text in `content`.
        let name = |key: &str| {
            let token = file.get(key)?;
            token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
        };
        let template = match file.get("chat_template") {
            Some(Value::Array(named)) => {
                let default = named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
                default.and_then(|entry| entry.get("template"))
            }
            template => template,
        };
        Ok(Self {
            bos_token: name("bos_token"),
            eos_token: name("eos_token"),
            add_bos_token: file.get("add_bos_token").and_then(Value::as_bool),
            chat_template: template.and_then(Value::as_str).map(str::to_owned),
        })
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Written as one string until 2024, as a pair since.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

/// The parts of the tokenizer in `tokenizer.json`.
pub(super) fn parts(bytes: &[u8], config: &TokenizerConfig) -> Result<Parts, ModelError> {
    check_length("tokenizer.json", bytes, FILE_BYTES_MAX)?;
    let file: File = parse("tokenizer.json", bytes)?;
    check_model(&file.model)?;
    let mut parts = Parts {
        names: Vec::new(),
        kinds: Vec::new(),
        merges: file.model.merges.into_iter().map(pair).collect::<Result<_, _>>()?,
        splitter: splitter(file.pre_tokenizer.as_ref())?,
        normalizer: file.normalizer.filter(|normalizer| !is_empty(normalizer)),
        ignore_merges: file.model.ignore_merges,
        bos: None,
        eos: None,
        add_bos: false,
        ends: Vec::new(),
    };
    for (name, id) in file.model.vocab {
        parts.set(id, name, Kind::Normal)?;
    }
    for added in file.added_tokens {
        if added.single_word || added.lstrip || added.rstrip {
            return Err(unsupported(format!("added token '{}' that strips or needs word bounds", added.content)));
        }
        let kind = if added.special || looks_special(&added.content) { Kind::Control } else { Kind::Added };
        parts.set(added.id, added.content, kind)?;
    }
    let id = |name: &Option<String>| -> Result<Option<u32>, ModelError> {
        let Some(name) = name else { return Ok(None) };
        let at = parts.names.iter().position(|known| known == name).and_then(|at| u32::try_from(at).ok());
        at.map(Some).ok_or_else(|| ModelError::Tokenizer(format!("special token '{name}' is not in the vocabulary")))
    };
    (parts.bos, parts.eos) = (id(&config.bos_token)?, id(&config.eos_token)?);
    let prepends = || file.post_processor.as_ref().zip(config.bos_token.as_ref()).is_some_and(|(p, b)| prepends(p, b));
    parts.add_bos = config.add_bos_token.unwrap_or_else(prepends);
    Ok(parts)
}

impl Parts {
    fn set(&mut self, id: u32, name: String, kind: Kind) -> Result<(), ModelError> {
        let at = id as usize;
        if at >= TOKENS_MAX {
            return Err(ModelError::Tokenizer(format!("token id {id}, the limit is {TOKENS_MAX}")));
        }
        if at >= self.names.len() {
            self.names.resize(at + 1, String::new());
            self.kinds.resize(at + 1, Kind::Unused);
        }
        if !self.names[at].is_empty() && self.names[at] != name {
            return Err(ModelError::Tokenizer(format!("token id {id} is '{}' and '{name}'", self.names[at])));
        }
        (self.names[at], self.kinds[at]) = (name, kind);
        Ok(())
    }
}

fn check_length(what: &str, bytes: &[u8], limit: usize) -> Result<(), ModelError> {
    if bytes.len() > limit {
        return Err(ModelError::Tokenizer(format!("{what} has {} bytes, the limit is {limit}", bytes.len())));
    }
    Ok(())
}

fn parse<'b, T: Deserialize<'b>>(what: &str, bytes: &'b [u8]) -> Result<T, ModelError> {
    serde_json::from_slice(bytes).map_err(|error| ModelError::Tokenizer(format!("{what}: {error}")))
}

fn unsupported(what: String) -> ModelError {
    ModelError::Unsupported { what, hint: ": only byte-level BPE is" }
}

fn check_model(model: &Model) -> Result<(), ModelError> {
    let some = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    match model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(other) => return Err(unsupported(format!("tokenizer model '{other}'"))),
    }
    if model.byte_fallback || some(&model.continuing_subword_prefix) || some(&model.end_of_word_suffix) {
        return Err(unsupported("a BPE with byte fallback, subword prefix or word suffix".to_owned()));
    }
    Ok(())
}

fn pair(merge: Merge) -> Result<(String, String), ModelError> {
    match merge {
        Merge::Pair(a, b) => Ok((a, b)),
        Merge::Joined(text) => match text.split_once(' ') {
            Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
            None => Err(ModelError::Tokenizer(format!("merge '{text}' is not two tokens"))),
        },
    }
}

fn is_empty(normalizer: &NormalizerWrapper) -> bool {
    matches!(normalizer, NormalizerWrapper::Sequence(steps) if steps.as_ref().is_empty())
}

/// Whether a token that the file does not call special steers the model all the same, as `<｜User｜>`; the rule of
/// llama.cpp's converter, so that both files of a model agree.
fn looks_special(name: &str) -> bool {
    (name.starts_with("<|") && name.ends_with("|>")) || (name.starts_with("<｜") && name.ends_with("｜>"))
}

/// The pre-tokenizer as patterns.
fn splitter(pre_tokenizer: Option<&Value>) -> Result<Splitter, ModelError> {
    let none = || unsupported("a tokenizer without pre-tokenizer".to_owned());
    let root = pre_tokenizer.ok_or_else(none)?;
    let steps = match root.get("pretokenizers").and_then(Value::as_array) {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(root),
    };
    let (last, cuts) = steps.split_last().ok_or_else(none)?;
    let is = |step: &Value, key: &str, value: bool| step.get(key).and_then(Value::as_bool).unwrap_or(value);
    let refuse = |step: &Value| unsupported(format!("pre-tokenizer {step}"));
    let mut patterns = Vec::new();
    for step in cuts {
        let pattern = step.get("pattern").and_then(|pattern| pattern.get("Regex")).and_then(Value::as_str);
        match (step.get("type").and_then(Value::as_str), pattern) {
            (Some("Split"), Some(pattern))
                if step.get("behavior").is_some_and(|how| how == "Isolated") && !is(step, "invert", false) =>
            {
                patterns.push(pattern);
            }
            (Some("Digits"), _) if is(step, "individual_digits", false) => patterns.push(DIGITS),
            _ => return Err(refuse(step)),
        }
    }
    if last.get("type").is_none_or(|kind| kind != "ByteLevel") || is(last, "add_prefix_space", true) {
        return Err(refuse(last));
    }
    if is(last, "use_regex", true) {
        patterns.push(GPT2);
    }
    Splitter::new(patterns)
}

/// Whether a post-processor puts the token `bos` before a text: `TemplateProcessing`, alone or in a sequence.
fn prepends(post_processor: &Value, bos: &str) -> bool {
    if let Some(steps) = post_processor.get("processors").and_then(Value::as_array) {
        return steps.iter().any(|step| prepends(step, bos));
    }
    let first = post_processor.get("single").and_then(|single| single.get(0));
    first.and_then(|first| first.get("SpecialToken")?.get("id")).is_some_and(|id| id == bos)
}
