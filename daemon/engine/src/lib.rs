//! sparsed-engine
