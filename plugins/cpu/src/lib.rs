//! sparsed-plugin-cpu
