//! What is a model, from the outside?

use crate::language::Language;
use crate::program::{Program, ProgramOptions, build};
use crate::weights::Weights;
use crate::{ChatFormat, KvFormats, ModelError, ModelSpec, Tokenizer};
use std::collections::BTreeMap;
use std::path::Path;

/// An opened model: a file or a folder.
#[derive(Debug)]
pub struct Model {
    name: String,
    spec: ModelSpec,
    weights: Weights,
    tokenizer: Option<Tokenizer>,
    chat: Option<ChatFormat>,
}

/// What `sparsectl models` shows.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Weights in all.
    pub parameters: u64,
    /// Bytes by format name.
    pub formats: BTreeMap<&'static str, u64>,
}

impl Model {
    /// Opens a GGUF file (the first part of a split one opens all) or a Hugging Face folder (`config.json` and
    /// safetensors): maps it, checks it, builds its tokenizer.
    ///
    /// # Errors
    /// What is wrong with the file, with the key or tensor.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(path)?;
        let spec = ModelSpec::parse(&weights)?;
        let Language { tokenizer, chat } = Language::of(&weights)?;
        if let Some(tokenizer) = &tokenizer
            && tokenizer.vocab_size() > spec.vocab_size as usize
        {
            let (tokens, rows) = (tokenizer.vocab_size(), spec.vocab_size);
            return Err(ModelError::Tokenizer(format!("{tokens} tokens, but the embedding has {rows} rows")));
        }
        let metadata = weights.metadata();
        let said = metadata.map_or(Ok(None), |metadata| metadata.str("general.name"))?;
        // A folder's name may have a dot, as in "V3.2".
        let file_name = if metadata.is_some() { path.file_stem() } else { path.file_name() };
        let file_name = file_name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let name = said.map_or(file_name, str::to_owned);
        Ok(Self { name, spec, weights, tokenizer, chat })
    }

    /// Hyperparameters.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The name that the file gives itself, or the file's or folder's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        self.weights.path()
    }

    /// Bytes of all its files with tensors.
    pub fn file_bytes(&self) -> u64 {
        self.weights.file_bytes()
    }

    /// The tokenizer, if the file has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// How the model writes conversations, if the file says it or its tokens show it.
    pub fn chat_format(&self) -> Option<&ChatFormat> {
        self.chat.as_ref()
    }

    /// What a user should know about how the model is served.
    pub fn label(&self) -> Option<&'static str> {
        self.spec.label()
    }

    /// Bytes that one token holds in the KV pool.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn kv_bytes_per_token(&self, kv: &KvFormats, dense: bool) -> Result<u64, ModelError> {
        crate::program::kv_shape(&self.spec, kv, dense)?.bytes_per_token()
    }

    /// Parameters and formats.
    pub fn summary(&self) -> Summary {
        let mut summary = Summary { parameters: 0, formats: BTreeMap::new() };
        for tensor in self.weights.listed() {
            summary.parameters += tensor.values;
            *summary.formats.entry(tensor.format).or_default() += tensor.bytes;
        }
        summary
    }

    /// The program that [`Self::program`] makes, without the work: weights that would be made of others have no bytes.
    pub(crate) fn outline(&self, options: &ProgramOptions) -> Result<Program, ModelError> {
        build(&self.spec, &self.weights.outline(), options)
    }

    /// One step of this model as a program for a plugin.
    ///
    /// # Errors
    /// A tensor that is missing or has the wrong shape.
    pub fn program(&self, options: &ProgramOptions) -> Result<Program, ModelError> {
        build(&self.spec, &self.weights, options)
    }
}
