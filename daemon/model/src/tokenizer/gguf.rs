//! What does a GGUF file say about its tokenizer? Keys `tokenizer.ggml.*`.

use super::parts::{Kind, Parts};
use super::split::{self, Splitter};
use crate::ModelError;
use sparsed_quant::gguf::{Array, Metadata};
use tokenizers::NormalizerWrapper;
use tokenizers::normalizers::NFC;

/// The parts of the file's tokenizer; `None` when it says that it has none.
pub(super) fn parts(metadata: &Metadata) -> Result<Option<Parts>, ModelError> {
    match metadata.str("tokenizer.ggml.model")? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some("gpt2") => {}
        Some(other) => {
            let what = format!("tokenizer model '{other}'");
            return Err(ModelError::Unsupported { what, hint: ": only byte-level BPE ('gpt2') is" });
        }
    }
    let strings = |key: &str| -> Result<&[String], ModelError> {
        metadata.strings(key)?.ok_or_else(|| ModelError::Tokenizer(format!("'{key}' is missing")))
    };
    let names = strings("tokenizer.ggml.tokens")?;
    let merges = strings("tokenizer.ggml.merges")?;
    let kinds = match metadata.array("tokenizer.ggml.token_type")? {
        Some(Array::I32(kinds)) if kinds.len() == names.len() => kinds.iter().map(|kind| Kind::of(*kind)).collect(),
        None => vec![Kind::Normal; names.len()],
        Some(_) => {
            return Err(ModelError::Tokenizer("token_type has another length or type than tokens".to_owned()));
        }
    };
    let id = |key: &str| -> Result<Option<u32>, ModelError> { Ok(metadata.u32(key)?) };
    let mut ends = Vec::new();
    for key in ["eot", "eom"] {
        ends.extend(id(&format!("tokenizer.ggml.{key}_token_id"))?);
    }
    let pre = metadata.str("tokenizer.ggml.pre")?.unwrap_or("default");
    let patterns = split::named(pre).ok_or_else(|| ModelError::Unsupported {
        what: format!("pre-tokenizer '{pre}'"),
        hint: ": smollm, gpt-2, llama-bpe, qwen2, glm4 and deepseek-v3 are",
    })?;
    let (nfc, ignore_merges) = split::habits(pre);
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let pair = |merge: &String| {
        let bad = || ModelError::Tokenizer(format!("merge '{merge}' is not two tokens"));
        merge.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).ok_or_else(bad)
    };
    Ok(Some(Parts {
        names: names.to_vec(),
        kinds,
        merges: merges.iter().map(pair).collect::<Result<_, _>>()?,
        splitter: Splitter::new(patterns.iter().copied())?,
        normalizer: nfc.then_some(NormalizerWrapper::NFC(NFC)),
        ignore_merges,
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        // Llama 3 files of the first weeks lack the key.
        add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(llama3),
        ends,
    }))
}
