//! sparsed-model
