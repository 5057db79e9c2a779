//! How is a file written? Header first, then each tensor's bytes in the order they were announced.

use super::value::{Array, Metadata, Value};
use crate::{Format, QuantError};
use std::io::{self, Write};

/// Bytes between multiples of which tensors begin.
const ALIGNMENT: usize = 32;

/// A file's header under construction.
#[derive(Clone, Debug)]
pub struct Writer {
    metadata: Metadata,
    tensors: Vec<(String, Vec<u64>, Format, usize)>,
}

/// The data section under construction.
#[derive(Debug)]
pub struct DataWriter<W: Write> {
    out: W,
    /// Sizes of the tensors that have not begun.
    left: std::vec::IntoIter<usize>,
    /// Bytes of the tensor that has begun, and how many of them are missing.
    size: usize,
    missing: usize,
}

impl Writer {
    /// A file with this metadata and no tensors yet. An alignment other than 32 in it is replaced.
    pub fn new(mut metadata: Metadata) -> Self {
        if metadata.get("general.alignment").is_some() {
            metadata.set("general.alignment", Value::U32(32));
        }
        Self { metadata, tensors: Vec::new() }
    }

    /// Sets a metadata entry.
    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.set(key, value);
    }

    /// Announces a tensor; `dims` has the fastest dimension first.
    ///
    /// # Errors
    /// When a row is not whole blocks, or GGUF does not have the format.
    pub fn add(&mut self, name: &str, dims: &[u64], format: Format) -> Result<usize, QuantError> {
        if !format.is_in_gguf() {
            return Err(QuantError::NotInGguf { format });
        }
        let too_large = || QuantError::TooLarge { format, values: usize::MAX };
        let row = usize::try_from(dims.first().copied().unwrap_or(0)).map_err(|_| too_large())?;
        let rows = dims.iter().skip(1).try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
        let bytes = rows.and_then(|rows| format.row_bytes(row).ok()?.checked_mul(rows));
        let Some(bytes) = bytes else {
            return Err(format.row_bytes(row).err().unwrap_or_else(too_large));
        };
        self.tensors.push((name.to_owned(), dims.to_vec(), format, bytes));
        Ok(bytes)
    }

    /// Writes the header; the tensors' bytes follow through the answer, in the order of [`Self::add`].
    ///
    /// # Errors
    /// The sink's.
    pub fn begin<W: Write>(self, mut out: W) -> io::Result<DataWriter<W>> {
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            put_string(&mut head, key);
            put_value(&mut head, value);
        }
        let mut offset = 0usize;
        let mut sizes = Vec::with_capacity(self.tensors.len());
        for (name, dims, format, bytes) in self.tensors {
            put_string(&mut head, &name);
            head.extend(u32::try_from(dims.len()).expect("few dimensions").to_le_bytes());
            dims.iter().for_each(|d| head.extend(d.to_le_bytes()));
            head.extend(format.ggml_id().to_le_bytes());
            head.extend((offset as u64).to_le_bytes());
            offset += bytes.next_multiple_of(ALIGNMENT);
            sizes.push(bytes);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&head)?;
        Ok(DataWriter { out, left: sizes.into_iter(), size: 0, missing: 0 })
    }
}

impl<W: Write> DataWriter<W> {
    /// Writes the next tensor.
    ///
    /// # Errors
    /// The sink's, or `InvalidInput` when the bytes are not those that were announced.
    pub fn tensor(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.parts(&[bytes])
    }

    /// Writes the next tensor from pieces that follow each other.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn parts(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        if self.missing != 0 || self.left.as_slice().first() != Some(&length) {
            return Err(refused(format!("{length} bytes are not the next tensor's")));
        }
        parts.iter().try_for_each(|part| self.piece(part))
    }

    /// Writes the next bytes of a tensor, which need not be all of them; after its last one the next tensor begins.
    ///
    /// # Errors
    /// The sink's, or `InvalidInput` when the bytes reach past the tensor.
    pub fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.missing == 0 {
            self.size = self.left.next().unwrap_or(0);
            self.missing = self.size;
        }
        let missing = self.missing.checked_sub(bytes.len());
        self.missing =
            missing.ok_or_else(|| refused(format!("{} bytes, {} are missing", bytes.len(), self.missing)))?;
        self.out.write_all(bytes)?;
        let padding = if self.missing == 0 { self.size.next_multiple_of(ALIGNMENT) - self.size } else { 0 };
        self.out.write_all(&[0; ALIGNMENT][..padding])
    }

    /// Seeks past all tensors that are left, each a hole of zeros; gives the sink back. For who reads the header only.
    ///
    /// # Errors
    /// The sink's.
    pub fn skip(mut self) -> io::Result<W>
    where
        W: io::Seek,
    {
        if self.missing != 0 {
            return Err(refused("a tensor has begun".to_owned()));
        }
        let left = self.left.as_slice().iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT) as u64).sum::<u64>();
        if let Some(last) = left.checked_sub(1) {
            let last = i64::try_from(last).map_err(|_| refused(format!("{left} bytes are left")))?;
            self.out.seek(io::SeekFrom::Current(last))?;
            self.out.write_all(&[0])?;
        }
        self.out.flush()?;
        Ok(self.out)
    }

    /// Ends the file and gives the sink back.
    ///
    /// # Errors
    /// The sink's, or `InvalidInput` when a tensor is missing.
    pub fn finish(mut self) -> io::Result<W> {
        if self.missing != 0 || self.left.next().is_some() {
            return Err(refused("a tensor that was announced is missing".to_owned()));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

fn refused(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($id:literal, $n:expr) => {{
            out.extend(u32::to_le_bytes($id));
            out.extend($n.to_le_bytes());
        }};
    }
    match value {
        Value::U8(n) => number!(0, n),
        Value::I8(n) => number!(1, n),
        Value::U16(n) => number!(2, n),
        Value::I16(n) => number!(3, n),
        Value::U32(n) => number!(4, n),
        Value::I32(n) => number!(5, n),
        Value::F32(n) => number!(6, n),
        Value::Bool(b) => number!(7, u8::from(*b)),
        Value::String(s) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, s);
        }
        Value::Array(array) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, array);
        }
        Value::U64(n) => number!(10, n),
        Value::I64(n) => number!(11, n),
        Value::F64(n) => number!(12, n),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($id:literal, $list:expr) => {{
            out.extend(u32::to_le_bytes($id));
            out.extend(($list.len() as u64).to_le_bytes());
            $list.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(list) => numbers!(0, list),
        Array::I8(list) => numbers!(1, list),
        Array::U16(list) => numbers!(2, list),
        Array::I16(list) => numbers!(3, list),
        Array::U32(list) => numbers!(4, list),
        Array::I32(list) => numbers!(5, list),
        Array::F32(list) => numbers!(6, list),
        Array::Bool(list) => {
            out.extend(7u32.to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            out.extend(list.iter().map(|b| u8::from(*b)));
        }
        Array::String(list) => {
            out.extend(8u32.to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            list.iter().for_each(|s| put_string(out, s));
        }
        Array::U64(list) => numbers!(10, list),
        Array::I64(list) => numbers!(11, list),
        Array::F64(list) => numbers!(12, list),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Gguf;

    fn begun(sizes: &[u64]) -> DataWriter<Vec<u8>> {
        let mut writer = Writer::new(Metadata::new());
        for (name, size) in ["a", "b", "c"].iter().zip(sizes) {
            writer.add(name, &[*size], Format::F32).unwrap();
        }
        writer.begin(Vec::new()).unwrap()
    }

    #[test]
    fn pieces_make_the_same_file_as_whole_tensors() {
        let mut whole = begun(&[3, 8]);
        whole.tensor(&[1; 12]).unwrap();
        whole.parts(&[&[2; 30], &[3; 2]]).unwrap();
        let whole = whole.finish().unwrap();
        let mut pieces = begun(&[3, 8]);
        for piece in [&[1; 5][..], &[1; 7], &[2; 30], &[3; 1], &[3; 1]] {
            pieces.piece(piece).unwrap();
        }
        assert_eq!(pieces.finish().unwrap(), whole);
        assert_eq!(Gguf::parse(&whole).unwrap().tensor("b").unwrap().range.len(), 32);
    }

    #[test]
    fn tensors_that_are_skipped_are_holes_behind_a_whole_header() {
        let mut written = begun(&[3, 8, 5]);
        [12, 32, 20].into_iter().for_each(|n| written.tensor(&vec![0; n]).unwrap());
        let written = written.finish().unwrap();
        let mut writer = Writer::new(Metadata::new());
        for (name, size) in ["a", "b", "c"].iter().zip([3, 8, 5]) {
            writer.add(name, &[size], Format::F32).unwrap();
        }
        let skipped = writer.begin(io::Cursor::new(Vec::new())).unwrap().skip().unwrap().into_inner();
        assert_eq!(skipped, written);
        let mut begun = Writer::new(Metadata::new());
        begun.add("a", &[2], Format::F32).unwrap();
        let mut begun = begun.begin(io::Cursor::new(Vec::new())).unwrap();
        begun.piece(&[0; 4]).unwrap();
        assert!(begun.skip().is_err(), "a tensor has begun");
    }

    #[test]
    fn bytes_that_were_not_announced_are_refused() {
        let mut data = begun(&[3, 8]);
        data.piece(&[1; 5]).unwrap();
        assert!(data.piece(&[1; 8]).is_err(), "past the tensor");
        assert!(data.tensor(&[1; 32]).is_err(), "a tensor inside another");
        assert!(begun(&[1]).tensor(&[0; 8]).is_err());
        assert!(begun(&[1]).finish().is_err(), "a tensor is missing");
        let mut half = begun(&[2]);
        half.piece(&[0; 4]).unwrap();
        assert!(half.finish().is_err(), "half a tensor is missing");
        let mut writer = Writer::new(Metadata::new());
        assert_eq!(
            writer.add("t", &[4], Format::F8E4M3).unwrap_err(),
            QuantError::NotInGguf { format: Format::F8E4M3 }
        );
    }
}
