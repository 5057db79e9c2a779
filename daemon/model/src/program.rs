//! How is a step of a model written down?

mod build;
mod layer;

pub(crate) use build::{build, kv_shape};

use crate::ModelError;
use bytes::Bytes;
use sparsed_abi::{ARENA_ALIGN, Blob, DIM_LOGITS, DT_F16, DT_F32, DT_Q8_0, SpdRow};
use sparsed_quant::Format;
use std::fs::File;
use std::sync::Arc;

/// How activations go into products with quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// As f32.
    F32,
    /// Rounded to 16 bits per 32 values where the plugin can: as good as f32, several times as fast.
    Int16,
    /// Rounded to 8 bits per 32 values where the plugin can: near ties between tokens may fall otherwise.
    Int8,
}

impl Activations {
    /// The attribute of the operators that multiply with a weight.
    pub(crate) const fn attribute(self) -> i32 {
        match self {
            Self::F32 => 0,
            Self::Int8 => 1,
            Self::Int16 => 2,
        }
    }
}

/// Which cached tokens attention reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// As many as the model was made for; all, if it has no indexer.
    Model,
    /// This many.
    TopK(u32),
    /// All of them.
    Dense,
}

/// How KV rows are stored, as `DT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvFormats {
    /// Latent rows.
    pub latent: u32,
    /// Rope rows.
    pub rope: u32,
    /// Index rows.
    pub index: u32,
}

impl Default for KvFormats {
    fn default() -> Self {
        Self { latent: DT_F16, rope: DT_F16, index: DT_Q8_0 }
    }
}

impl KvFormats {
    /// Everything in f32, for comparisons.
    pub const fn exact() -> Self {
        Self { latent: DT_F32, rope: DT_F32, index: DT_F32 }
    }
}

/// What a program is made for.
#[derive(Clone, Copy, Debug)]
pub struct ProgramOptions {
    /// How activations go into products.
    pub activations: Activations,
    /// Which tokens attention reads.
    pub selection: Selection,
    /// How rows are stored.
    pub kv: KvFormats,
    /// Whether selections are outputs.
    pub selections_out: bool,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        Self {
            activations: Activations::Int16,
            selection: Selection::Model,
            kv: KvFormats::default(),
            selections_out: false,
        }
    }
}

/// The rows that a token has in the KV pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers with a latent and a rope row.
    pub n_layers: u32,
    /// Layers with an index row.
    pub n_index_layers: u32,
    /// A latent row.
    pub latent: SpdRow,
    /// A rope row.
    pub rope: SpdRow,
    /// An index row.
    pub index: SpdRow,
}

impl KvShape {
    /// Bytes that one token holds.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn bytes_per_token(&self) -> Result<u64, ModelError> {
        self.plane_bytes_per_token().map(|(latent, index)| latent + index)
    }

    /// Bytes that one token holds in the latent plane and in the index plane.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn plane_bytes_per_token(&self) -> Result<(u64, u64), ModelError> {
        let bytes = |row: SpdRow| {
            let unknown = || ModelError::Unsupported { what: format!("KV rows of dtype {}", row.dtype), hint: "" };
            let format = Format::from_ggml_id(row.dtype).ok_or_else(unknown)?;
            let source = |source| ModelError::Quant { name: "a KV row".to_owned(), source };
            format.row_bytes(row.width as usize).map(|n| n as u64).map_err(source)
        };
        let latent = (bytes(self.latent)? + bytes(self.rope)?) * u64::from(self.n_layers);
        Ok((latent, bytes(self.index)? * u64::from(self.n_index_layers)))
    }
}

/// A weight that a program is bound to; see `spd_weight_desc`.
#[derive(Clone, Debug)]
pub struct WeightBinding {
    /// The tensor's name in the file.
    pub name: String,
    /// `DT_*`
    pub dtype: u32,
    /// Matrices in it.
    pub batch: u32,
    /// Rows of each.
    pub rows: u64,
    /// Values of a row.
    pub cols: u64,
    /// The bytes, in the mapped file or made of it.
    pub bytes: Bytes,
    /// The file and where they lie in it, if they are not made.
    pub file: Option<(Arc<File>, u64)>,
}

/// A step of a model, for steps of any size.
#[derive(Clone, Debug)]
pub struct Program {
    /// For `plan_compile`.
    pub blob: Blob,
    /// In the order of the slots.
    pub weights: Vec<WeightBinding>,
    /// For `kv_create`.
    pub kv: KvShape,
    /// Frequencies of each angle input, in tensor order.
    angles: Vec<Vec<f64>>,
    /// On every cosine and sine.
    angle_factor: f64,
    /// Row length and dim 0 of each output, in tensor order; the last is the logits.
    outputs: Vec<(usize, i32)>,
    top_k: Option<u32>,
}

impl Program {
    /// Tokens that attention selects, `None` when it reads all.
    pub fn top_k(&self) -> Option<u32> {
        self.top_k
    }

    /// Fills the input arena of a step: per token cosines, then sines, of position times frequency, with the model's
    /// factor on them.
    pub fn fill_inputs(&self, positions: &[u32], arena: &mut Blob) {
        let sizes = self.angles.iter().map(|frequencies| positions.len() * frequencies.len() * 2 * 4);
        let mut end = 0usize;
        let starts: Vec<usize> = sizes
            .map(|size| {
                let start = end.next_multiple_of(ARENA_ALIGN);
                end = start + size;
                start
            })
            .collect();
        if arena.as_bytes().len() < end {
            *arena = Blob::zeroed(end);
        }
        for (start, frequencies) in starts.into_iter().zip(&self.angles) {
            let row = frequencies.len() * 2 * 4;
            let rows = arena.as_bytes_mut()[start..start + row * positions.len()].chunks_exact_mut(row.max(1));
            for (row, &position) in rows.zip(positions) {
                let (cosines, sines) = row.split_at_mut(frequencies.len() * 4);
                for ((c, s), frequency) in
                    cosines.as_chunks_mut::<4>().0.iter_mut().zip(sines.as_chunks_mut::<4>().0).zip(frequencies)
                {
                    let (sine, cosine) = (f64::from(position) * frequency).sin_cos();
                    #[expect(clippy::cast_possible_truncation, reason = "angles are computed wide and stored single")]
                    let (cosine, sine) = ((cosine * self.angle_factor) as f32, (sine * self.angle_factor) as f32);
                    *c = cosine.to_le_bytes();
                    *s = sine.to_le_bytes();
                }
            }
        }
    }

    /// Bytes of the output arena of a step.
    pub fn out_bytes(&self, n_tokens: usize, n_logits: usize) -> usize {
        self.ranges(n_tokens, n_logits).last().map_or(0, |range| range.end)
    }

    /// The logits in an output arena, `[n_logits, vocab]` as little-endian f32.
    pub fn logits<'a>(&self, out: &'a [u8], n_tokens: usize, n_logits: usize) -> &'a [u8] {
        let ranges = self.ranges(n_tokens, n_logits);
        &out[ranges.last().expect("every program has logits").clone()]
    }

    /// The selections in an output arena: per index layer `[n_tokens, k]` as little-endian i32, ascending, -1 padded.
    /// Empty unless the program was built to give them out.
    pub fn selections<'a>(&self, out: &'a [u8], n_tokens: usize, n_logits: usize) -> Vec<&'a [u8]> {
        let ranges = self.ranges(n_tokens, n_logits);
        ranges[..ranges.len() - 1].iter().map(|range| &out[range.clone()]).collect()
    }

    fn ranges(&self, n_tokens: usize, n_logits: usize) -> Vec<std::ops::Range<usize>> {
        let mut at = 0usize;
        let place = |&(row, dim): &(usize, i32)| {
            let start = at.next_multiple_of(ARENA_ALIGN);
            at = start + row * 4 * if dim == DIM_LOGITS { n_logits } else { n_tokens };
            start..at
        };
        self.outputs.iter().map(place).collect()
    }
}
