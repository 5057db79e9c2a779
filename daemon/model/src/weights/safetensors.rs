//! What is in a safetensors file? Its table, read with limits by the crate `safetensors`.

use crate::ModelError;
use safetensors::{Dtype, SafeTensors};
use std::ops::Range;

/// Longest header in bytes.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Most tensors of a file.
pub(super) const TENSORS_MAX: usize = 1 << 18;
/// Longest tensor name in bytes.
const NAME_BYTES_MAX: usize = 1 << 10;
/// Most dimensions of a tensor.
const DIMS_MAX: usize = 4;

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// Slowest dimension first.
    pub(super) shape: Vec<u64>,
    /// Its bytes, counted from the start of the file, inside the file.
    pub(super) range: Range<usize>,
}

/// The checked table of a safetensors file.
#[derive(Clone, Debug)]
pub struct SafetensorsHeader {
    pub(super) entries: Vec<Entry>,
}

impl SafetensorsHeader {
    /// Reads the header of a whole file, called `file` in messages.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, ModelError> {
        let refuse = |reason: String| ModelError::Config { file: file.to_owned(), reason };
        let length = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
        let length = length.ok_or_else(|| refuse("is not a safetensors file".to_owned()))?;
        if length > HEADER_BYTES_MAX {
            return Err(refuse(format!("a header of {length} bytes, the limit is {HEADER_BYTES_MAX}")));
        }
        let damaged = |error: safetensors::SafeTensorError| refuse(format!("is truncated or damaged: {error}"));
        let (header, table) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let start = header.checked_add(8).ok_or_else(|| refuse("a header without end".to_owned()))?;
        let tensors = table.tensors();
        if tensors.len() > TENSORS_MAX {
            return Err(refuse(format!("{} tensors, the limit is {TENSORS_MAX}", tensors.len())));
        }
        let mut entries = Vec::with_capacity(tensors.len());
        for (name, info) in tensors {
            let (from, to) = info.data_offsets;
            let range = start.checked_add(from).zip(start.checked_add(to)).map(|(from, to)| from..to);
            let range = range.filter(|range| range.start <= range.end && range.end <= bytes.len());
            let Some(range) = range else { return Err(refuse(format!("tensor {name} lies outside the file"))) };
            if name.len() > NAME_BYTES_MAX || info.shape.len() > DIMS_MAX {
                let limits = format!("{NAME_BYTES_MAX} bytes of name and {DIMS_MAX} dimensions");
                return Err(refuse(format!("a tensor is past the limits of {limits}")));
            }
            let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
            let bits = shape.iter().try_fold(info.dtype.bitsize() as u64, |n, &dim| n.checked_mul(dim));
            if bits != Some(range.len() as u64 * 8) {
                return Err(refuse(format!("tensor {name} does not fill its bytes")));
            }
            entries.push(Entry { name, dtype: info.dtype, shape, range });
        }
        entries.sort_by_key(|entry| entry.range.start);
        Ok(Self { entries })
    }
}

/// The name of a dtype that is read, or of any.
pub(super) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::BF16 => "BF16",
        Dtype::F8_E4M3 => "F8_E4M3",
        _ => "other",
    }
}
