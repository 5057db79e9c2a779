//! Where in its file does a tensor lie, and what are any of its numbers? For tools that read it in pieces: pages of a
//! mapping stay in memory, what is read into a buffer does not.

use super::fp8;
use sparsed_quant::{Format, QuantError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Most bytes of the scales of one FP8 tensor.
const SCALES_BYTES_MAX: usize = 1 << 28;

/// A tensor in a file, checked against the file's size when it was opened.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) file: Arc<File>,
    /// Where its first byte is.
    pub(crate) start: u64,
    /// ggml's order, fastest first.
    pub(crate) dims: Vec<u64>,
    pub(crate) coding: Coding,
}

/// How its numbers are written.
#[derive(Clone, Debug)]
pub(crate) enum Coding {
    /// In a format of GGUF, one after another.
    Plain(Format),
    /// e4m3, a byte each, a matrix with one scale for each block of rows and columns.
    Fp8 {
        /// `[ceil(cols / block[1]), ceil(rows / block[0])]` as [`Self::Plain`].
        scales: Box<Stored>,
        /// Rows and columns under one scale.
        block: [usize; 2],
    },
}

/// Why numbers could not be read.
#[derive(Debug)]
pub(crate) enum StoredError {
    Io(io::Error),
    Quant(QuantError),
}

impl From<io::Error> for StoredError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<QuantError> for StoredError {
    fn from(error: QuantError) -> Self {
        Self::Quant(error)
    }
}

impl Stored {
    /// The format that holds its numbers exactly.
    pub(crate) fn exact(&self) -> Result<Format, StoredError> {
        match &self.coding {
            Coding::Plain(format) => Ok(*format),
            Coding::Fp8 { scales, .. } => Ok(fp8::decoded_format(&scales.scales()?)),
        }
    }

    /// The bytes of `n` numbers from number `first` on, whole blocks of a plain `format`.
    pub(crate) fn bytes(&self, format: Format, first: u64, n: usize, bytes: &mut Vec<u8>) -> Result<(), StoredError> {
        let at = self.start + first / format.block_values() as u64 * format.block_bytes() as u64;
        bytes.resize(format.row_bytes(n)?, 0);
        Ok(self.file.read_exact_at(bytes, at)?)
    }

    /// `values.len()` numbers from number `first` on, whole blocks where it has blocks. `bytes` is for their bytes.
    pub(crate) fn values(&self, first: u64, values: &mut [f32], bytes: &mut Vec<u8>) -> Result<(), StoredError> {
        match &self.coding {
            Coding::Plain(format) => {
                self.bytes(*format, first, values.len(), bytes)?;
                sparsed_quant::decode(*format, bytes, values)?;
            }
            Coding::Fp8 { scales, block } => {
                bytes.resize(values.len(), 0);
                self.file.read_exact_at(bytes, self.start + first)?;
                let wrong = || io::Error::new(io::ErrorKind::InvalidData, "FP8 values are a matrix that fits memory");
                let cols = self.dims.first().and_then(|&cols| usize::try_from(cols).ok()).ok_or_else(wrong)?;
                let first = usize::try_from(first).map_err(|_| wrong())?;
                fp8::decode_part(bytes, &scales.scales()?, first, cols, *block, values);
            }
        }
        Ok(())
    }

    /// All its numbers; it is the scales of another one.
    fn scales(&self) -> Result<Vec<f32>, StoredError> {
        let too_many = || io::Error::new(io::ErrorKind::InvalidData, "too many FP8 scales");
        let n = self.dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).and_then(|n| usize::try_from(n).ok());
        let n = n.filter(|&n| n <= SCALES_BYTES_MAX / size_of::<f32>()).ok_or_else(too_many)?;
        let mut values = vec![0.0; n];
        self.values(0, &mut values, &mut Vec::new())?;
        Ok(values)
    }
}
