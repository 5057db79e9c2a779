//! sparsed
