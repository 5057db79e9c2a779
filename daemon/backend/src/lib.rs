//! sparsed-backend
