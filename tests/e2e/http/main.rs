//! The real daemon over HTTP: fields of requests, clients of others, responses that are kept, loopback TCP, and what no
//! client should send.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs, reason = "a test")]

mod abuse;
mod clients;
mod fields;
mod large;
mod quotas;
mod schema;
mod shapes;
mod stored;
mod strangers;
mod tcp;
