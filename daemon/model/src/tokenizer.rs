//! How does text become tokens? Byte-level BPE from the file's own vocabulary, by the crate `tokenizers`.
//!
//! The pattern that cuts text before BPE is not in the file, only its name; the patterns known here are those of the
//! models' own tokenizers. Control tokens are found whole in rendered templates and never in plain text, so a user's
//! message cannot forge a turn.

use crate::ModelError;
use sparsed_quant::gguf::{Array, Metadata};
use std::collections::HashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer as Bpe};

/// Longest text in bytes that is taken in one call.
const TEXT_BYTES_MAX: usize = 16 << 20;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// The tokenizer of one model.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: Bpe,
    /// What each token adds to the text; nothing for control tokens.
    bytes: Vec<Box<[u8]>>,
    names: Vec<String>,
    /// Tokens that stand for themselves in a rendered template, longest first.
    special: Vec<(String, u32)>,
    bos: Option<u32>,
    add_bos: bool,
    ends: Vec<u32>,
}

impl Tokenizer {
    /// The file's tokenizer; `None` when it says that it has none.
    pub(crate) fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, ModelError> {
        match metadata.str("tokenizer.ggml.model")? {
            None | Some("none" | "no_vocab") => return Ok(None),
            Some("gpt2") => {}
            Some(other) => {
                let what = format!("tokenizer model '{other}'");
                return Err(ModelError::Unsupported { what, hint: ": only byte-level BPE ('gpt2') is" });
            }
        }
        let missing = |key: &str| ModelError::Tokenizer(format!("'{key}' is missing"));
        let names = metadata.strings("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
        let merges = metadata.strings("tokenizer.ggml.merges")?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
        let kinds = match metadata.array("tokenizer.ggml.token_type")? {
            Some(Array::I32(kinds)) if kinds.len() == names.len() => kinds.clone(),
            None => vec![1; names.len()],
            Some(_) => {
                return Err(ModelError::Tokenizer("token_type has another length or type than tokens".to_owned()));
            }
        };
        let id = |key: &str| -> Result<Option<u32>, ModelError> {
            let id = metadata.u32(key)?;
            match id {
                Some(id) if id as usize >= names.len() => {
                    Err(ModelError::Tokenizer(format!("'{key}' is {id}, past the vocabulary")))
                }
                id => Ok(id),
            }
        };
        let mut ends = Vec::new();
        for key in ["eos", "eot", "eom"] {
            ends.extend(id(&format!("tokenizer.ggml.{key}_token_id"))?);
        }
        ends.sort_unstable();
        ends.dedup();
        let pre = metadata.str("tokenizer.ggml.pre")?.unwrap_or("default");
        let mut special: Vec<(String, u32)> = names
            .iter()
            .zip(&kinds)
            .zip(0..)
            .filter(|((name, kind), _)| matches!(**kind, 3 | 4) && !name.is_empty())
            .map(|((name, _), id)| (name.clone(), id))
            .collect();
        special.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        let bos = id("tokenizer.ggml.bos_token_id")?;
        Ok(Some(Self {
            bpe: bpe(names, merges, pre)?,
            bytes: token_bytes(names, &kinds),
            names: names.to_vec(),
            special,
            bos,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            ends,
        }))
    }

    /// Tokens of plain text: control tokens in it are text. The begin token goes first where the file says so.
    ///
    /// # Errors
    /// Text over 16 MiB.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        self.plain(text, &mut tokens)?;
        Ok(tokens)
    }

    /// Tokens of a rendered chat template: control tokens in it are tokens.
    ///
    /// # Errors
    /// Text over 16 MiB.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let next = self.special.iter().filter_map(|(name, id)| Some((rest.find(name.as_str())?, name, id)));
            // The earliest; of those that begin together the longest, which min_by_key keeps as the first.
            let Some((at, name, id)) = next.min_by_key(|(at, _, _)| *at) else { break };
            self.plain(&rest[..at], &mut tokens)?;
            tokens.push(*id);
            rest = &rest[at + name.len()..];
        }
        self.plain(rest, &mut tokens)?;
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && tokens.first() != Some(bos)) {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    fn plain(&self, text: &str, tokens: &mut Vec<u32>) -> Result<(), ModelError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(ModelError::Tokenizer(format!("{} bytes of text, the limit is {TEXT_BYTES_MAX}", text.len())));
        }
        if text.is_empty() {
            return Ok(());
        }
        let encoding = self.bpe.encode_fast(text, false).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        tokens.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// What token `id` adds to the text: bytes, which need not be whole characters. Nothing for control tokens and
    /// ids past the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }

    /// The token's name in the file.
    pub fn token_name(&self, id: u32) -> Option<&str> {
        self.names.get(id as usize).map(String::as_str)
    }

    /// The id of the token with this name.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.names.iter().position(|known| known == name).and_then(|at| u32::try_from(at).ok())
    }

    /// The begin token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens that end an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.ends
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.names.len()
    }
}

fn bpe(names: &[String], merges: &[String], pre: &str) -> Result<Bpe, ModelError> {
    let fail = |error: tokenizers::Error| ModelError::Tokenizer(error.to_string());
    let vocab: HashMap<String, u32> = names.iter().cloned().zip(0..).collect();
    if vocab.len() != names.len() {
        return Err(ModelError::Tokenizer("a token stands twice in the vocabulary".to_owned()));
    }
    let pair = |merge: &String| {
        let bad = || ModelError::Tokenizer(format!("merge '{merge}' is not two tokens"));
        merge.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).ok_or_else(bad)
    };
    let merges = merges.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
    let vocab: Vec<(String, u32)> = vocab.into_iter().collect();
    let model = BPE::builder().vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges);
    let model = model.ignore_merges(pre == "llama-bpe").build().map_err(fail)?;
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::Split).map_err(fail)
    };
    let patterns: &[&str] = match pre {
        "smollm" => &[r"\p{N}", GPT2],
        "default" | "gpt-2" | "gpt2" => &[GPT2],
        "llama-bpe" | "llama3" => &[LLAMA3],
        "deepseek-v3" => &DEEPSEEK3,
        other => {
            let what = format!("pre-tokenizer '{other}'");
            return Err(ModelError::Unsupported { what, hint: ": smollm, default, llama-bpe and deepseek-v3 are" });
        }
    };
    let mut steps = patterns.iter().map(|pattern| split(pattern)).collect::<Result<Vec<_>, _>>()?;
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
    let mut bpe = Bpe::new(model);
    bpe.with_pre_tokenizer(Some(Sequence::new(steps)));
    Ok(bpe)
}

/// The bytes behind each token, by GPT-2's byte alphabet; none for control (3) and unused (5) tokens.
fn token_bytes(names: &[String], kinds: &[i32]) -> Vec<Box<[u8]>> {
    let alphabet = byte_alphabet();
    let decode = |(name, kind): (&String, &i32)| -> Box<[u8]> {
        match kind {
            3 | 5 => Box::default(),
            4 => name.as_bytes().into(),
            _ => {
                let bytes: Option<Vec<u8>> = name.chars().map(|c| alphabet.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| name.as_bytes().to_vec()).into()
            }
        }
    };
    names.iter().zip(kinds).map(decode).collect()
}

/// GPT-2's stand-ins: printable bytes are themselves, the others follow from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100u32;
    (0..=255u8)
        .map(|byte| {
            if printable(byte) {
                return (char::from(byte), byte);
            }
            next += 1;
            (char::from_u32(next - 1).expect("below the surrogates"), byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_quant::gguf::Value;

    /// Bytes a, b, space, the merge "ab", and one control token.
    fn tiny() -> Tokenizer {
        let mut metadata = Metadata::new();
        let strings = |list: &[&str]| Value::Array(Array::String(list.iter().map(|s| (*s).to_owned()).collect()));
        metadata.set("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
        metadata.set(
            "tokenizer.ggml.tokens",
            strings(&["<|end|>", "a", "b", "\u{120}", "ab", "<", "|", "e", "n", "d", ">"]),
        );
        metadata.set("tokenizer.ggml.merges", strings(&["a b"]));
        metadata.set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])));
        metadata.set("tokenizer.ggml.eos_token_id", Value::U32(0));
        Tokenizer::from_metadata(&metadata).unwrap().unwrap()
    }

    #[test]
    fn merges_apply_and_bytes_come_back() {
        let tokenizer = tiny();
        let tokens = tokenizer.encode("ab ba").unwrap();
        assert_eq!(tokens, [4, 3, 2, 1]);
        let bytes: Vec<u8> = tokens.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        assert_eq!(bytes, b"ab ba");
    }

    #[test]
    fn a_control_token_is_one_only_in_a_rendered_template() {
        let tokenizer = tiny();
        assert_eq!(tokenizer.encode_chat("a<|end|>b").unwrap(), [1, 0, 2]);
        assert_eq!(tokenizer.encode("<|end|>").unwrap(), [5, 6, 7, 8, 9, 6, 10]);
        assert_eq!((tokenizer.end_tokens(), tokenizer.token_bytes(0)), (&[0][..], &b""[..]));
    }
}
