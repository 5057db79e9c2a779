//! What do the operators compute? `OPS.md` in f64, a function an operator, as plain as the page itself.
//!
//! Shares no code with any plugin. Rows come one at a time; the checks loop over tokens and heads.

mod attention;
mod experts;
mod rowwise;
mod selection;

pub(crate) use attention::attend;
pub(crate) use experts::{Routing, best_experts, chances};
pub(crate) use rowwise::{hadamard, layer_norm, product, rms_norm, rope, silu_mul};
pub(crate) use selection::{accepts, scores, top_k};
