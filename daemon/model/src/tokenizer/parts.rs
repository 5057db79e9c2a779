//! What is a byte-level BPE made of, whichever file it came from?

use super::alphabet::Alphabet;
use super::control::ControlTokens;
use super::split::Splitter;
use super::{Tokenizer, token_map};
use crate::ModelError;
use std::collections::HashSet;
use std::sync::Arc;
use tokenizers::NormalizerWrapper;
use tokenizers::models::bpe::{BPE, Vocab};

/// Most tokens of a vocabulary.
pub(super) const TOKENS_MAX: usize = 1 << 22;

/// Tokens that end an answer wherever a vocabulary has them as control tokens; files name one of them only.
const END_NAMES: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<|EOT|>",
];
/// GLM's answers end where the next turn begins; `[gMASK]` tells that it is GLM.
const GLM_END_NAMES: &[&str] = &["<|user|>", "<|observation|>"];
pub(super) const GLM_MARK: &str = "[gMASK]";

/// What a token is for; GGUF's `token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Part of text.
    Normal,
    /// Steers the model; adds nothing to text.
    Control,
    /// Found whole in templates, and text as well.
    Added,
    /// Never produced.
    Unused,
}

impl Kind {
    pub(super) fn of(token_type: i32) -> Self {
        match token_type {
            3 => Self::Control,
            4 => Self::Added,
            5 => Self::Unused,
            _ => Self::Normal,
        }
    }

    /// What [`Self::of`] reads as this kind.
    pub(super) fn token_type(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Control => 3,
            Self::Added => 4,
            Self::Unused => 5,
        }
    }
}

/// A tokenizer before it is built.
pub(super) struct Parts {
    /// By id; an empty name is a hole.
    pub(super) names: Vec<String>,
    /// By id.
    pub(super) kinds: Vec<Kind>,
    pub(super) merges: Vec<(String, String)>,
    pub(super) splitter: Splitter,
    pub(super) normalizer: Option<NormalizerWrapper>,
    /// Whether a piece that is a token stays one although no merges lead to it.
    pub(super) ignore_merges: bool,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) add_bos: bool,
    /// Further tokens that end an answer; may hold duplicates.
    pub(super) ends: Vec<u32>,
}

impl Parts {
    /// # Errors
    /// Ids past the vocabulary, a token that stands twice, merges of what is no token.
    pub(super) fn build(mut self) -> Result<Tokenizer, ModelError> {
        let bad = |what: String| Err(ModelError::Tokenizer(what));
        if self.names.len() > TOKENS_MAX {
            return bad(format!("{} tokens, the limit is {TOKENS_MAX}", self.names.len()));
        }
        self.ends.extend(self.eos);
        if let Some(id) = self.ends.iter().chain(&self.bos).find(|id| **id as usize >= self.names.len()) {
            return bad(format!("begin or end token {id} is past the vocabulary of {}", self.names.len()));
        }
        let ids = token_map(&self.names)?;
        let glm = if ids.contains_key(GLM_MARK) { GLM_END_NAMES } else { &[] };
        let known = END_NAMES.iter().chain(glm).filter_map(|name| ids.get(*name).copied());
        self.ends.extend(known.filter(|id| self.kinds[*id as usize] == Kind::Control));
        self.ends.sort_unstable();
        self.ends.dedup();
        let control: Vec<(&str, u32)> = self
            .names
            .iter()
            .zip(&self.kinds)
            .zip(0..)
            .filter(|((name, kind), _)| matches!(kind, Kind::Control | Kind::Added) && !name.is_empty())
            .map(|((name, _), id)| (name.as_str(), id))
            .collect();
        let control = Arc::new(ControlTokens::new(&control)?);
        let alphabet = Alphabet::new();
        let bytes = self.token_bytes(&alphabet);
        let bpe = self.bpe()?;
        let Self { names, splitter, normalizer, bos, eos, add_bos, ends, .. } = self;
        Ok(Tokenizer { bpe, splitter, normalizer, alphabet, bytes, names, ids, control, bos, eos, add_bos, ends })
    }

    /// The merging part. Control tokens are not in its vocabulary, so that no piece of text can be one.
    fn bpe(&mut self) -> Result<BPE, ModelError> {
        let merges = std::mem::take(&mut self.merges);
        let merged: HashSet<String> =
            merges.iter().flat_map(|(a, b)| [a.clone(), b.clone(), format!("{a}{b}")]).collect();
        let textual = |name: &String, kind: &Kind| match kind {
            Kind::Normal | Kind::Unused => !name.is_empty(),
            Kind::Control | Kind::Added => merged.contains(name),
        };
        let tokens = self.names.iter().zip(&self.kinds).zip(0..);
        let vocab: Vocab =
            tokens.filter(|((name, kind), _)| textual(name, kind)).map(|((name, _), id)| (name.clone(), id)).collect();
        let builder = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(self.ignore_merges);
        builder.build().map_err(|error| ModelError::Tokenizer(error.to_string()))
    }

    /// What each token adds to the text.
    fn token_bytes(&self, alphabet: &Alphabet) -> Vec<Box<[u8]>> {
        let decode = |(name, kind): (&String, &Kind)| -> Box<[u8]> {
            match kind {
                Kind::Control | Kind::Unused => Box::default(),
                Kind::Added => name.as_bytes().into(),
                Kind::Normal => alphabet.read(name).unwrap_or_else(|| name.as_bytes().to_vec()).into(),
            }
        };
        self.names.iter().zip(&self.kinds).map(decode).collect()
    }
}
