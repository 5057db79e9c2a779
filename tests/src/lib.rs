//! sparsed-tests
