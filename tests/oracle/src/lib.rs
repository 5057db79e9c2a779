//! sparsed-oracle
