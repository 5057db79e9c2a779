//! What is in a GGUF file? Version 3, little-endian: metadata, then tensor infos, then data.
//!
//! The reader takes the whole (mapped) file. Nothing in it is trusted: every count is compared with the bytes that are
//! left before anything is allocated, every tensor's extent lies inside the file, and every limit has a name here.
//! Source: the GGUF specification, version 3.

mod reader;
mod value;
mod writer;

pub use reader::{Gguf, TensorInfo};
pub use value::{Array, Metadata, Value};
pub use writer::{DataWriter, Writer};

/// Most metadata entries.
pub const METADATA_MAX: u64 = 1 << 16;
/// Most tensors.
pub const TENSORS_MAX: u64 = 1 << 18;
/// Longest key or tensor name in bytes.
pub const NAME_BYTES_MAX: u64 = 1 << 10;
/// Longest string value in bytes.
pub const STRING_BYTES_MAX: u64 = 16 << 20;
/// Most elements of an array.
pub const ARRAY_MAX: u64 = 1 << 24;
/// Largest alignment of the data section.
pub const ALIGNMENT_MAX: u64 = 1 << 20;
/// Most dimensions of a tensor.
pub const DIMS_MAX: u32 = 4;

/// Why a file was refused: what, where, which limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The first bytes are not "GGUF".
    #[error("not a GGUF file")]
    NotGguf,
    /// Another version, or big-endian.
    #[error("GGUF version {0} is not read, only little-endian version 3")]
    Version(u32),
    /// The file ends inside something.
    #[error("the file ends inside {what} at byte {at}: it is truncated or damaged")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where.
        at: usize,
    },
    /// A number is past its limit.
    #[error("{what} is {value} at byte {at}, the limit is {limit}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Its limit.
        limit: u64,
        /// Where.
        at: usize,
    },
    /// Something is not what it must be.
    #[error("{what} at byte {at}")]
    Malformed {
        /// What, and how.
        what: &'static str,
        /// Where.
        at: usize,
    },
    /// Two entries or tensors have one name.
    #[error("'{0}' is in the file twice")]
    Duplicate(String),
    /// A tensor has a format that this version does not read.
    #[error("tensor {name} has ggml type {id} ({known}), which this version does not read")]
    Format {
        /// The tensor.
        name: String,
        /// ggml's number.
        id: u32,
        /// ggml's name for it.
        known: &'static str,
    },
    /// A tensor's shape or place is impossible.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is impossible.
        reason: String,
    },
    /// A metadata entry has another type than it must.
    #[error("metadata '{key}' is {found}, not {wanted}")]
    Type {
        /// The key.
        key: String,
        /// What it is.
        found: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
    /// A metadata entry is missing.
    #[error("metadata '{0}' is missing")]
    Missing(String),
}

/// ggml's name of a tensor type, for messages.
fn ggml_name(id: u32) -> &'static str {
    const NAMES: [&str; 43] = [
        "F32", "F16", "Q4_0", "Q4_1", "removed", "removed", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K",
        "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8",
        "I16", "I32", "I64", "F64", "IQ1_M", "BF16", "removed", "removed", "removed", "TQ1_0", "TQ2_0", "removed",
        "removed", "removed", "MXFP4", "NVFP4", "Q1_0", "Q2_0",
    ];
    NAMES.get(id as usize).copied().unwrap_or("unknown")
}
