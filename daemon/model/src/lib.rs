//! What is computed?
//!
//! A model file or folder becomes a [`ModelSpec`] (every hyperparameter checked), mapped weights, a tokenizer, a chat
//! format, and on demand a [`Program`]: one step written down in the operators of the plugin ABI. Knows no device, no
//! session and no time; opens the model's own files.

mod chat;
mod error;
mod inspect;
mod language;
mod model;
mod new_file;
mod program;
mod spec;
#[cfg(test)]
mod testing;
mod tokenizer;
mod weights;

pub mod convert;
pub mod quantize;

pub use chat::{ChatFormat, ChatMessage, ChatRequest, OutputEvent, OutputParser, Prompt, Role, ToolCall, laid_out};
pub use error::ModelError;
pub use inspect::{FormatCount, Held, Inspection};
pub use model::{Model, Summary};
pub use program::{
    Activations, KvFormats, KvShape, LayerQueries, LayerRows, Program, ProgramOptions, Selection, WeightBinding,
};
pub use spec::{Architecture, GroupScore, IndexerSpec, ModelSpec, MoeSpec, RopeLayout, RouterScore};
pub use tokenizer::{TextStream, Tokenizer, TokenizerConfig};
pub use weights::SafetensorsHeader;
