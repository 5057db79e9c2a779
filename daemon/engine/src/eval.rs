//! How good is a model's answer? The arithmetic of `sparsectl eval`: losses, windows of text, recall prompts, and what
//! a selection keeps of attention.
//!
//! Pure: everything random comes from a seed, nothing here knows a device.

mod loss;
mod mass;
mod recall;
mod windows;

pub use loss::{Comparison, LossError, WindowLoss, compare, cross_entropy, mean, standard_error};
pub use mass::{AttentionShape, Kept, Keys, MassError, Query, SINKS, attention_mass, query_positions};
pub use recall::{
    Answered, RECALL_NOTES_MAX, RecallContext, RecallError, RecallQuestion, RecallShape, RecallSummary, Vocabulary,
    recall_contexts, windowed,
};
pub use windows::windows;
