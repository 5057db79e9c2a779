//! sparsed-quant
