//! sparsed-surface
