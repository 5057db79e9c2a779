//! What can be wrong with a model.

use sparsed_quant::QuantError;
use sparsed_quant::gguf::GgufError;
use std::path::PathBuf;

/// Every failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not a well-formed GGUF.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        source: GgufError,
    },
    /// Parts of a split file do not belong together.
    #[error("{}: {reason}", path.display())]
    Split {
        /// The part.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A metadata entry has the wrong type or is missing.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// A file of a Hugging Face folder is not what it must be.
    #[error("{file}: {reason}")]
    Config {
        /// The file's name.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A hyperparameter is impossible or not served.
    #[error("'{key}' is {value}: {reason}")]
    Hyperparameter {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it must be.
        reason: String,
    },
    /// The model needs something that this version does not have.
    #[error("{what} is not supported{hint}")]
    Unsupported {
        /// What.
        what: String,
        /// What to do, or when it comes; begins with punctuation.
        hint: &'static str,
    },
    /// A tensor is missing or has the wrong shape.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Numbers could not be encoded.
    #[error("tensor {name}: {source}")]
    Quant {
        /// The tensor.
        name: String,
        /// Why.
        source: QuantError,
    },
    /// The tokenizer could not be built or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template could not be compiled or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// Converting was refused.
    #[error("convert: {0}")]
    Convert(String),
    /// Quantising was refused.
    #[error("quantize: {0}")]
    Quantize(String),
}
