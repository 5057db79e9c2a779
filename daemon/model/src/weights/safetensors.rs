//! What is in a safetensors file? Its table, read with limits by the crate `safetensors`.

use crate::ModelError;
use safetensors::{Dtype, SafeTensors};
use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use std::fmt;
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
        let listed = bytes.get(8..start).and_then(count_keys);
        if listed != Some(tensors.len() + usize::from(table.metadata().is_some())) {
            return Err(refuse("a tensor is in the header twice".to_owned()));
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

    /// Each tensor's name and its bytes, counted from the start of the file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        self.entries.iter().map(|entry| (entry.name.as_str(), entry.range.clone()))
    }
}

/// Entries of a JSON object, those of one name counted each: a map of them would keep the last only, other readers
/// perhaps the first.
fn count_keys(json: &[u8]) -> Option<usize> {
    struct Count;
    impl<'de> Visitor<'de> for Count {
        type Value = usize;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
            let mut n = 0;
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                n += 1;
            }
            Ok(n)
        }
    }
    serde_json::Deserializer::from_slice(json).deserialize_map(Count).ok()
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
