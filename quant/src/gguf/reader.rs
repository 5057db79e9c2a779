//! How is a file read? One pass with checked arithmetic; the data section is only measured.

use super::value::{Array, Metadata, Value};
use super::{
    ALIGNMENT_MAX, ARRAY_MAX, DIMS_MAX, GgufError, METADATA_MAX, NAME_BYTES_MAX, STRING_BYTES_MAX, TENSORS_MAX,
    ggml_name,
};
use crate::Format;
use std::collections::HashMap;
use std::ops::Range;

/// A file's header. The data is where the caller mapped it, at the tensors' ranges.
#[derive(Clone, Debug)]
pub struct Gguf {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    alignment: u64,
}

/// A tensor: where it is and what it looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the file.
    pub name: String,
    /// ggml's order: the fastest dimension (a row's values) first; 1 to 4 of them.
    pub dims: Vec<u64>,
    /// How its values are stored.
    pub format: Format,
    /// Its bytes, counted from the start of the file, inside the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Values in all.
    pub fn values(&self) -> u64 {
        self.dims.iter().product()
    }
}

impl Gguf {
    /// Reads the header of a whole file.
    ///
    /// # Errors
    /// The first thing that is wrong with it, and where.
    pub fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor { file, at: 0 };
        if cursor.take(4, "the magic")? != b"GGUF" {
            return Err(GgufError::NotGguf);
        }
        let version = cursor.u32("the version")?;
        if version != 3 {
            return Err(GgufError::Version(version));
        }
        let n_tensors = cursor.count("the number of tensors", TENSORS_MAX)?;
        let n_metadata = cursor.count("the number of metadata entries", METADATA_MAX)?;
        let metadata = cursor.metadata(n_metadata)?;
        let alignment = metadata.u64("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
            let what = "general.alignment, which must be a power of two,";
            return Err(GgufError::Limit { what, value: alignment, limit: ALIGNMENT_MAX, at: cursor.at });
        }
        let raw: Vec<RawInfo> = (0..n_tensors).map(|_| cursor.tensor_info()).collect::<Result<_, _>>()?;
        let aligned = (cursor.at as u64).checked_next_multiple_of(alignment);
        let data = aligned.ok_or(GgufError::Malformed { what: "the data section begins nowhere", at: cursor.at })?;
        let mut gguf = Self { metadata, tensors: Vec::with_capacity(raw.len()), index: HashMap::new(), alignment };
        for info in raw {
            let tensor = info.place(data, alignment, file.len())?;
            if gguf.index.insert(tensor.name.clone(), gguf.tensors.len()).is_some() {
                return Err(GgufError::Duplicate(tensor.name));
            }
            gguf.tensors.push(tensor);
        }
        Ok(gguf)
    }

    /// Always 3.
    pub fn version(&self) -> u32 {
        3
    }

    /// Of tensor data, in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&at| &self.tensors[at])
    }
}

/// A tensor info as it stands in the file.
struct RawInfo {
    name: String,
    dims: Vec<u64>,
    type_id: u32,
    offset: u64,
}

impl RawInfo {
    fn place(self, data: u64, alignment: u64, file_len: usize) -> Result<TensorInfo, GgufError> {
        let Self { name, dims, type_id, offset } = self;
        let Some(format) = Format::from_ggml_id(type_id) else {
            return Err(GgufError::Format { name, id: type_id, known: ggml_name(type_id) });
        };
        let refuse = |reason: String| GgufError::Tensor { name: name.clone(), reason };
        if offset % alignment != 0 {
            return Err(refuse(format!("offset {offset} is not a multiple of the alignment {alignment}")));
        }
        let overflow = || refuse(format!("dimensions {dims:?} overflow"));
        let rows = dims[1..].iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
        let row = usize::try_from(dims[0]).map_err(|_| overflow())?;
        let row_bytes = format.row_bytes(row).map_err(|error| refuse(error.to_string()))? as u64;
        let bytes = row_bytes.checked_mul(rows).ok_or_else(overflow)?;
        let start = data.checked_add(offset).ok_or_else(overflow)?;
        let end = start.checked_add(bytes).ok_or_else(overflow)?;
        if end > file_len as u64 {
            return Err(refuse(format!("reaches to byte {end}, the file has {file_len}: it is truncated or damaged")));
        }
        let small = |n: u64| usize::try_from(n).expect("not past the file's length");
        Ok(TensorInfo { range: small(start)..small(end), name, dims, format })
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], GgufError> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.file.len());
        let end = end.ok_or(GgufError::Truncated { what, at: self.at })?;
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        Ok(self.take(N, what)?.try_into().expect("take gives what was asked for"))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &'static str, limit: u64) -> Result<u64, GgufError> {
        let at = self.at;
        let value = self.u64(what)?;
        if value > limit { Err(GgufError::Limit { what, value, limit, at }) } else { Ok(value) }
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<String, GgufError> {
        let at = self.at;
        let length = self.count(what, limit)?;
        let bytes = self.take(usize::try_from(length).expect("below a small limit"), what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| GgufError::Malformed { what: "a string is not UTF-8", at })
    }

    fn metadata(&mut self, n: u64) -> Result<Metadata, GgufError> {
        let mut metadata = Metadata::new();
        for _ in 0..n {
            let key = self.string("a metadata key", NAME_BYTES_MAX)?;
            if metadata.get(&key).is_some() {
                return Err(GgufError::Duplicate(key));
            }
            let kind = self.u32("a metadata type")?;
            let value = self.value(kind)?;
            metadata.set(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
        const WHAT: &str = "a metadata value";
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(WHAT)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(WHAT)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(WHAT)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(WHAT)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(WHAT)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(WHAT)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(WHAT)?)),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string(WHAT, STRING_BYTES_MAX)?),
            9 => Value::Array(self.values()?),
            10 => Value::U64(u64::from_le_bytes(self.array(WHAT)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(WHAT)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(WHAT)?)),
            _ => return Err(GgufError::Malformed { what: "a metadata type is unknown", at: self.at }),
        })
    }

    fn bool(&mut self) -> Result<bool, GgufError> {
        match self.array("a bool")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [_] => Err(GgufError::Malformed { what: "a bool is neither 0 nor 1", at: self.at - 1 }),
        }
    }

    fn values(&mut self) -> Result<Array, GgufError> {
        let kind = self.u32("an array's type")?;
        let n = usize::try_from(self.count("an array's length", ARRAY_MAX)?).expect("below a small limit");
        Ok(match kind {
            0 => Array::U8(self.numbers(n, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(n, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(n, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(n, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(n, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(n, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(n, f32::from_le_bytes)?),
            7 => Array::Bool((0..n).map(|_| self.bool()).collect::<Result<_, _>>()?),
            // Strings are pushed as they are read: a false count ends at the end of the file, not in the allocator.
            8 => {
                let mut strings = Vec::new();
                for _ in 0..n {
                    strings.push(self.string("a string of an array", STRING_BYTES_MAX)?);
                }
                Array::String(strings)
            }
            9 => return Err(GgufError::Malformed { what: "an array of arrays is not read", at: self.at }),
            10 => Array::U64(self.numbers(n, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(n, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(n, f64::from_le_bytes)?),
            _ => return Err(GgufError::Malformed { what: "an array's type is unknown", at: self.at }),
        })
    }

    /// `n` numbers; the bytes are there before the vector is made.
    fn numbers<T, const N: usize>(&mut self, n: usize, read: fn([u8; N]) -> T) -> Result<Vec<T>, GgufError> {
        let bytes = self.take(n.saturating_mul(N), "an array")?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect())
    }

    fn tensor_info(&mut self) -> Result<RawInfo, GgufError> {
        let name = self.string("a tensor's name", NAME_BYTES_MAX)?;
        let at = self.at;
        let n_dims = self.u32("a tensor's number of dimensions")?;
        if n_dims == 0 || n_dims > DIMS_MAX {
            let what = "a tensor's number of dimensions";
            return Err(GgufError::Limit { what, value: n_dims.into(), limit: DIMS_MAX.into(), at });
        }
        let dims = (0..n_dims).map(|_| self.u64("a dimension")).collect::<Result<Vec<_>, _>>()?;
        if dims.contains(&0) || dims.iter().any(|&d| d > i64::MAX.unsigned_abs()) {
            return Err(GgufError::Tensor { name, reason: format!("dimensions {dims:?} are impossible") });
        }
        Ok(RawInfo { name, dims, type_id: self.u32("a tensor's type")?, offset: self.u64("a tensor's offset")? })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::*;
    use proptest::prelude::*;

    /// A small file with every kind of value and two tensors.
    fn sample() -> Vec<u8> {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::String("llama".to_owned()));
        metadata.set("a.bool", Value::Bool(true));
        metadata.set("a.f", Value::F32(0.5));
        metadata.set("a.names", Value::Array(Array::String(vec!["x".to_owned(), "y\u{e9}".to_owned()])));
        metadata.set("a.numbers", Value::Array(Array::I32(vec![-1, 2])));
        let mut writer = Writer::new(metadata);
        writer.add("w", &[64, 2], Format::Q8_0).unwrap();
        writer.add("g", &[3], Format::F32).unwrap();
        let mut file = Vec::new();
        let mut data = writer.begin(&mut file).unwrap();
        data.tensor(&[1; 136]).unwrap();
        data.tensor(&[2; 12]).unwrap();
        data.finish().unwrap();
        file
    }

    #[test]
    fn what_is_written_is_read_back() {
        let file = sample();
        let gguf = Gguf::parse(&file).unwrap();
        assert_eq!(gguf.metadata().str("general.architecture"), Ok(Some("llama")));
        assert_eq!(gguf.metadata().strings("a.names").unwrap().unwrap()[1], "y\u{e9}");
        let w = gguf.tensor("w").unwrap();
        assert_eq!((w.dims.as_slice(), w.format, &file[w.range.clone()]), (&[64, 2][..], Format::Q8_0, &[1; 136][..]));
        assert_eq!(&file[gguf.tensor("g").unwrap().range.clone()], &[2; 12]);
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let file = sample();
        let needed = Gguf::parse(&file).unwrap().tensor("g").unwrap().range.end;
        for length in 0..needed {
            assert!(Gguf::parse(&file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn other_versions_are_named() {
        let mut file = sample();
        file[4] = 2;
        assert_eq!(Gguf::parse(&file).unwrap_err(), GgufError::Version(2));
        file[4..8].copy_from_slice(&[0, 0, 0, 3]);
        assert_eq!(Gguf::parse(&file).unwrap_err(), GgufError::Version(0x0300_0000));
    }

    #[test]
    fn a_huge_count_is_refused_before_anything_is_allocated() {
        for at in [8, 16] {
            let mut file = sample();
            file[at..at + 8].copy_from_slice(&(1u64 << 60).to_le_bytes());
            assert!(matches!(Gguf::parse(&file), Err(GgufError::Limit { .. })));
        }
    }

    /// A file with one tensor info written by hand.
    fn crafted(name: &str, dims: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend((name.len() as u64).to_le_bytes());
        file.extend(name.as_bytes());
        file.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
        dims.iter().for_each(|d| file.extend(d.to_le_bytes()));
        file.extend(type_id.to_le_bytes());
        file.extend(offset.to_le_bytes());
        file.resize(file.len().next_multiple_of(32) + 128, 0);
        file
    }

    #[test]
    fn hostile_tensors_are_refused_with_the_reason() {
        let reason = |file: &[u8]| Gguf::parse(file).expect_err("hostile").to_string();
        assert!(Gguf::parse(&crafted("t", &[32], 0, 0)).is_ok());
        assert!(reason(&crafted("t", &[64], 0, 0)).contains("truncated"), "extent past the file");
        assert!(reason(&crafted("t", &[4], 0, u64::MAX - 31)).contains("overflow"), "offset wraps");
        assert!(reason(&crafted("t", &[1 << 32, 1 << 32, 2], 0, 0)).contains("overflow"), "dimensions wrap");
        assert!(reason(&crafted("t", &[0], 0, 0)).contains("impossible"), "an empty dimension");
        assert!(reason(&crafted("t", &[u64::MAX], 0, 0)).contains("impossible"), "a negative dimension");
        assert!(reason(&crafted("t", &[4], 0, 8)).contains("alignment"), "unaligned");
        assert!(reason(&crafted("t", &[33], 8, 0)).contains("Q8_0"), "a partial block");
        assert!(reason(&crafted("t", &[255], 12, 0)).contains("Q4_K"), "a partial block of 256");
        assert!(reason(&crafted("t", &[256], 16, 0)).contains("16 (IQ2_XXS)"), "a type that is not read");
        assert!(reason(&crafted("t", &[32], 129, 0)).contains("129 (unknown)"), "a number of ours, not of ggml");
        assert!(reason(&crafted("t", &[4; 5], 0, 0)).contains("limit is 4"), "five dimensions");
    }

    /// A file with one metadata entry of this type and these bytes.
    fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend((key.len() as u64).to_le_bytes());
        file.extend(key.as_bytes());
        file.extend(kind.to_le_bytes());
        file.extend(value);
        file
    }

    #[test]
    fn hostile_metadata_is_refused_with_the_reason() {
        let reason = |kind: u32, value: &[u8]| {
            Gguf::parse(&entry("general.alignment", kind, value)).expect_err("hostile").to_string()
        };
        assert!(Gguf::parse(&entry("general.alignment", 4, &64u32.to_le_bytes())).is_ok());
        for alignment in [0u32, 3, 1 << 31] {
            assert!(reason(4, &alignment.to_le_bytes()).contains("power of two"), "alignment {alignment}");
        }
        assert!(reason(5, &(-32i32).to_le_bytes()).contains("general.alignment"), "a negative alignment");
        assert!(reason(u32::MAX, &[0; 8]).contains("type is unknown"), "a negative type");
        assert!(reason(7, &[2]).contains("neither 0 nor 1"), "a bool of 2");
        assert!(reason(8, &u64::MAX.to_le_bytes()).contains("limit"), "a string as long as memory");
        assert!(reason(8, &1000u64.to_le_bytes()).contains("truncated"), "a string past the end");
        assert!(reason(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).contains("UTF-8"), "a string of half a character");
        let array = |kind: u32, n: u64| [&kind.to_le_bytes()[..], &n.to_le_bytes()].concat();
        assert!(reason(9, &array(4, 1 << 60)).contains("limit"), "an array as long as memory");
        for kind in [0, 4, 7, 8, 12] {
            assert!(reason(9, &array(kind, ARRAY_MAX)).contains("truncated"), "an array of {kind} past the end");
        }
        assert!(reason(9, &array(9, 1)).contains("array of arrays"), "arrays nest");
        assert!(reason(9, &array(99, 0)).contains("type is unknown"), "an array of nothing known");
    }

    #[test]
    fn a_tensor_name_may_stand_only_once() {
        let mut writer = Writer::new(Metadata::new());
        writer.add("t1", &[1], Format::F32).unwrap();
        writer.add("t2", &[1], Format::F32).unwrap();
        let mut file = Vec::new();
        let mut data = writer.begin(&mut file).unwrap();
        data.tensor(&[0; 4]).unwrap();
        data.tensor(&[0; 4]).unwrap();
        data.finish().unwrap();
        let at = file.windows(2).position(|w| w == b"t2").unwrap();
        file[at + 1] = b'1';
        assert_eq!(Gguf::parse(&file).unwrap_err(), GgufError::Duplicate("t1".to_owned()));
    }

    #[test]
    fn a_name_may_stand_only_once() {
        let mut metadata = Metadata::new();
        metadata.set("k1", Value::U8(1));
        metadata.set("k2", Value::U8(1));
        let mut file = Vec::new();
        Writer::new(metadata).begin(&mut file).unwrap().finish().unwrap();
        let at = file.windows(2).position(|w| w == b"k2").unwrap();
        file[at + 1] = b'1';
        assert_eq!(Gguf::parse(&file).unwrap_err(), GgufError::Duplicate("k1".to_owned()));
    }

    proptest! {
        #[test]
        fn no_mutation_makes_it_panic(at in 0usize..400, value: u8, cut in 0usize..600) {
            let mut file = sample();
            let at = at % file.len();
            file[at] = value;
            file.truncate(cut.max(1));
            drop(Gguf::parse(&file));
        }
    }
}
