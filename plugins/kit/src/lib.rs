//! sparsed-plugin-kit
