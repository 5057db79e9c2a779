//! sparsed-kv
