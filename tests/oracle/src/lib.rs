//! What should a DSA model answer?
//!
//! A slow forward that the product is tested against. It shares nothing with the daemon but `quant`: [`Model`] reads
//! the metadata itself, and [`forward`] is the paper's plain form (keys and values of every head written out, attention
//! over all tokens under a mask) where the plugin absorbs the projections and gathers the selected rows.
#![forbid(unsafe_code)]

mod forward;
mod model;
mod rope;
mod rows;

pub use forward::{Mistake, Options, Output, Selection, forward};
pub use model::{Config, Indexer, Model, Moe};
pub use rope::Rope;
pub use rows::{Real, Rows};
