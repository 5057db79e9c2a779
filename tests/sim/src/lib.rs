//! What is left when the power goes at the worst moment?
#![forbid(unsafe_code)]
