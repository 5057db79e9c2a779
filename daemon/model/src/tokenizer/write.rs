//! Which keys of a GGUF give a tokenizer that a folder has? Only those that give the same one when they are read.

use super::parts::{GLM_MARK, Kind, Parts, TOKENS_MAX};
use super::split::{self, Splitter};
use super::{Tokenizer, TokenizerConfig, json};
use crate::ModelError;
use sparsed_quant::gguf::{Array, Metadata, Value};

/// Names of pre-tokenizers, in the order in which they are tried.
const PRE: [&str; 6] = ["deepseek-v3", "glm4", "llama-bpe", "qwen2", "smollm", "gpt-2"];

impl Tokenizer {
    /// Writes the keys of this tokenizer, which is that of the `tokenizer.json` in `file` with `config` and perhaps
    /// further end tokens. Holes and ids up to `vocab_size` get the names that llama.cpp's converter gives them.
    ///
    /// # Errors
    /// A tokenizer that a GGUF has no keys for.
    pub(crate) fn write_metadata(
        &self,
        file: &[u8],
        config: &TokenizerConfig,
        vocab_size: u32,
        metadata: &mut Metadata,
    ) -> Result<(), ModelError> {
        let mut parts = json::parts(file, config)?;
        let pre = pre_tokenizer(&parts)?;
        let size = parts.names.len().max((vocab_size as usize).min(TOKENS_MAX));
        parts.names.resize(size, String::new());
        parts.kinds.resize(size, Kind::Unused);
        for (id, name) in parts.names.iter_mut().enumerate().filter(|(_, name)| name.is_empty()) {
            *name = format!("[PAD{id}]");
        }
        let merges = parts.merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        let kinds = parts.kinds.iter().map(|kind| kind.token_type()).collect();
        let mut set = |key: &str, value: Value| metadata.set(format!("tokenizer.ggml.{key}"), value);
        set("model", Value::String("gpt2".to_owned()));
        set("pre", Value::String(pre.to_owned()));
        set("tokens", Value::Array(Array::String(parts.names)));
        set("token_type", Value::Array(Array::I32(kinds)));
        set("merges", Value::Array(Array::String(merges)));
        set("add_bos_token", Value::Bool(parts.add_bos));
        for (key, id) in [("bos_token_id", parts.bos), ("eos_token_id", parts.eos)] {
            if let Some(id) = id {
                set(key, Value::U32(id));
            }
        }
        self.write_ends(metadata)?;
        let same = Self::from_metadata(metadata)?.is_some_and(|read| self.is_same(&read));
        let differs = || ModelError::Tokenizer("a GGUF has no keys that give the same one".to_owned());
        same.then_some(()).ok_or_else(differs)
    }

    /// Names end tokens that do not follow from the other keys.
    fn write_ends(&self, metadata: &mut Metadata) -> Result<(), ModelError> {
        let known = Self::from_metadata(metadata)?.map(|read| read.ends).unwrap_or_default();
        let mut missing = self.ends.iter().filter(|id| !known.contains(id));
        for key in ["eot", "eom"] {
            if let Some(&id) = missing.next() {
                metadata.set(format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
            }
        }
        match missing.next() {
            None => Ok(()),
            Some(id) => Err(ModelError::Tokenizer(format!("a GGUF has no key for one more end token, {id}"))),
        }
    }

    /// Whether `other`, which may have more tokens that are never produced, makes the same of every text.
    fn is_same(&self, other: &Self) -> bool {
        let n = self.names.len();
        let name = |(own, read): (&String, &String)| own.is_empty() || own == read;
        other.names.len() >= n
            && self.names.iter().zip(&other.names).all(name)
            && self.bytes == other.bytes[..n]
            && other.bytes[n..].iter().all(|bytes| bytes.is_empty())
            && self.splitter == other.splitter
            && self.normalizer.is_some() == other.normalizer.is_some()
            && (self.bos, self.eos, self.add_bos) == (other.bos, other.eos, other.add_bos)
            && self.ends == other.ends
            && self.bpe.ignore_merges == other.bpe.ignore_merges
    }
}

/// The name of the pre-tokenizer that cuts, normalises and merges as `parts` do.
fn pre_tokenizer(parts: &Parts) -> Result<&'static str, ModelError> {
    // GLM cuts as Llama 3 does, but other programs do more by its name.
    let glm = parts.names.iter().any(|name| name == GLM_MARK);
    for pre in PRE.into_iter().filter(|pre| glm || *pre != "glm4") {
        let patterns = split::named(pre).unwrap_or_default();
        let same = Splitter::new(patterns.iter().copied())? == parts.splitter;
        let (nfc, ignore_merges) = split::habits(pre);
        let normal = match &parts.normalizer {
            Some(tokenizers::NormalizerWrapper::NFC(_)) => nfc,
            Some(_) => false,
            None => !nfc,
        };
        if same && normal && ignore_merges == parts.ignore_merges {
            return Ok(pre);
        }
    }
    Err(ModelError::Tokenizer("a GGUF has no name for how this one cuts and merges text".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// All bytes, a merge, a hole, an added and two control tokens.
    fn file(pattern: &str, ignore_merges: bool) -> Vec<u8> {
        let mut vocab: serde_json::Map<String, serde_json::Value> =
            crate::testing::byte_names().into_iter().zip(0..).map(|(name, id)| (name, json!(id))).collect();
        vocab.insert("ab".to_owned(), json!(256));
        let added = |id: u32, content: &str, special: bool| json!({ "id": id, "content": content, "special": special });
        let file = json!({
            "added_tokens": [added(258, "<think>", false), added(259, "<|end|>", true), added(260, "<|stop|>", true)],
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated" },
                { "type": "ByteLevel", "add_prefix_space": false, "use_regex": false },
            ] },
            "model": { "type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "ignore_merges": ignore_merges },
        });
        serde_json::to_vec(&file).unwrap()
    }

    fn llama() -> &'static str {
        split::named("llama-bpe").unwrap()[0]
    }

    #[test]
    fn what_is_written_is_read_as_the_same_tokenizer() {
        let file = file(llama(), true);
        let config = TokenizerConfig { eos_token: Some("<|end|>".to_owned()), ..TokenizerConfig::default() };
        let mut tokenizer = Tokenizer::from_json(&file, &config).unwrap();
        tokenizer.add_end_tokens(&[260]).unwrap();
        let mut metadata = Metadata::new();
        tokenizer.write_metadata(&file, &config, 270, &mut metadata).unwrap();
        assert_eq!(
            metadata.str("tokenizer.ggml.pre"),
            Ok(Some("llama-bpe")),
            "Llama 3's pattern, and whole pieces stay"
        );
        assert_eq!(metadata.u32("tokenizer.ggml.eot_token_id"), Ok(Some(260)));
        let names = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
        assert_eq!((names.len(), &names[257][..], &names[269][..]), (270, "[PAD257]", "[PAD269]"));
        let read = Tokenizer::from_metadata(&metadata).unwrap().unwrap();
        for text in ["", "abab 12345 <think><|end|>", "[PAD257] \u{4e2d}\u{6587}\n\n  x"] {
            assert_eq!(read.encode(text).unwrap(), tokenizer.encode(text).unwrap(), "{text}");
            assert_eq!(read.encode_trusted(text).unwrap(), tokenizer.encode_trusted(text).unwrap(), "{text}");
        }
        assert_eq!(read.ends, [259, 260]);
    }

    #[test]
    fn a_vocabulary_of_glm_is_named_so_although_it_is_cut_as_llamas() {
        let file = String::from_utf8(file(llama(), true)).unwrap().replace("<think>", "[gMASK]");
        let tokenizer = Tokenizer::from_json(file.as_bytes(), &TokenizerConfig::default()).unwrap();
        let mut metadata = Metadata::new();
        tokenizer.write_metadata(file.as_bytes(), &TokenizerConfig::default(), 0, &mut metadata).unwrap();
        assert_eq!(metadata.str("tokenizer.ggml.pre"), Ok(Some("glm4")));
    }

    #[test]
    fn what_a_gguf_cannot_say_is_refused() {
        let refused = |file: &[u8], ends: &[u32]| {
            let mut tokenizer = Tokenizer::from_json(file, &TokenizerConfig::default()).unwrap();
            tokenizer.add_end_tokens(ends).unwrap();
            let written = tokenizer.write_metadata(file, &TokenizerConfig::default(), 0, &mut Metadata::new());
            written.unwrap_err().to_string()
        };
        assert!(refused(&file(r"\p{L}+|\s+", false), &[]).contains("cuts and merges"));
        assert!(refused(&file(llama(), false), &[]).contains("cuts and merges"), "llama-bpe means whole pieces stay");
        assert!(refused(&file(llama(), true), &[258, 259, 260]).contains("one more end token"));
    }
}
