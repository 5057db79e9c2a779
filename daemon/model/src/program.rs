//! How is a step of a model written down?

mod build;
mod fingerprint;
mod image;
mod layer;
mod unread;

pub(crate) use build::{build, kv_shape};
pub use image::LayerRows;

use crate::ModelError;
use bytes::Bytes;
use sparsed_abi::{ARENA_ALIGN, Blob, DT_F8_128, DT_F16, DT_F32, DT_Q4_0, DT_Q6_0, DT_Q8_0, DT_W16, SpdRow};
use sparsed_quant::{Format, QuantError};
use std::fs::File;
use std::ops::Range;
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
    /// Latent and rope rows as 16-bit words: as large as f16, more exact, and multiplied as they are by a plugin that
    /// takes them.
    pub const fn words() -> Self {
        Self { latent: DT_W16, rope: DT_W16, index: DT_Q8_0 }
    }

    /// Latent and rope rows as e4m3, index rows in 8 bits.
    pub const fn fp8() -> Self {
        Self { latent: DT_F8_128, rope: DT_F8_128, index: DT_Q8_0 }
    }

    /// Everything in 8 bits.
    pub const fn small() -> Self {
        Self { latent: DT_Q8_0, rope: DT_Q8_0, index: DT_Q8_0 }
    }

    /// Latent rows in 6 bits, rope rows, whose errors a softmax makes larger, in 8, index rows too.
    pub const fn six_bits() -> Self {
        Self { latent: DT_Q6_0, rope: DT_Q8_0, index: DT_Q8_0 }
    }

    /// The same, index rows in 4 bits.
    #[must_use]
    pub const fn with_4_bit_index(self) -> Self {
        Self { index: DT_Q4_0, ..self }
    }

    /// The same, index rows in 8 bits.
    #[must_use]
    pub const fn with_8_bit_index(self) -> Self {
        Self { index: DT_Q8_0, ..self }
    }

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
    /// Whether attention's queries are outputs.
    pub queries_out: bool,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        Self {
            activations: Activations::Int16,
            selection: Selection::Model,
            kv: KvFormats::default(),
            selections_out: false,
            queries_out: false,
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

    /// Bytes of a latent row and a rope row.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn latent_row_bytes(&self) -> Result<usize, ModelError> {
        Ok(row_bytes(self.latent)? + row_bytes(self.rope)?)
    }

    /// Bytes that one token holds in the latent plane and in the index plane.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn plane_bytes_per_token(&self) -> Result<(u64, u64), ModelError> {
        let latent = (row_bytes(self.latent)? + row_bytes(self.rope)?) as u64 * u64::from(self.n_layers);
        Ok((latent, row_bytes(self.index)? as u64 * u64::from(self.n_index_layers)))
    }
}

fn row_format(row: SpdRow) -> Result<Format, ModelError> {
    let unknown = || ModelError::Unsupported { what: format!("KV rows of dtype {}", row.dtype), hint: "" };
    Format::from_dtype(row.dtype).ok_or_else(unknown)
}

fn row_bytes(row: SpdRow) -> Result<usize, ModelError> {
    row_format(row)?.row_bytes(row.width as usize).map_err(bad_row)
}

fn bad_row(source: QuantError) -> ModelError {
    ModelError::Quant { name: "a KV row".to_owned(), source }
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

impl WeightBinding {
    /// Bytes that it takes, also where it is only outlined.
    pub(crate) fn size(&self) -> u64 {
        let format = Format::from_ggml_id(self.dtype);
        let row = usize::try_from(self.cols).ok().zip(format).and_then(|(cols, format)| format.row_bytes(cols).ok());
        // Dimensions are checked when it is bound.
        (row.unwrap_or(0) as u64).saturating_mul(self.rows).saturating_mul(self.batch.into())
    }
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
    /// In the order of their tensors.
    outputs: Vec<Output>,
    top_k: Option<u32>,
}

/// A tensor of the output arena: rows of 32-bit values.
#[derive(Clone, Copy, Debug)]
struct Output {
    kind: OutputKind,
    /// Values of a row.
    width: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OutputKind {
    /// A row for each token that needs logits; the others have one for each token of the step.
    Logits,
    Selection,
    QueryLatent,
    QueryRope,
}

/// Queries of one layer in an output arena, as little-endian f32; in the letters of `abi/OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct LayerQueries<'a> {
    /// `[T, H, Rk/G]`; `None` in the group form, whose keys are rope rows only.
    pub latent: Option<&'a [u8]>,
    /// `[T, H, P/G]`
    pub rope: &'a [u8],
}

impl Program {
    /// Bytes of weights that lie in memory since they were made, beside those that stay mapped from a file.
    pub fn made_bytes(&self) -> u64 {
        let made = self.weights.iter().filter(|weight| weight.file.is_none());
        made.map(WeightBinding::size).fold(0, u64::saturating_add)
    }

    /// Tokens that attention selects, `None` when it reads all.
    pub fn top_k(&self) -> Option<u32> {
        self.top_k
    }

    /// Bytes of the input arena of a step of `n_tokens` tokens.
    pub fn in_bytes(&self, n_tokens: usize) -> usize {
        self.input_ranges(n_tokens).last().map_or(0, |range| range.end)
    }

    /// Where the angles of each kind of layer lie in the input arena.
    fn input_ranges(&self, n_tokens: usize) -> impl Iterator<Item = Range<usize>> {
        self.angles.iter().scan(0usize, move |end, frequencies| {
            let start = end.next_multiple_of(ARENA_ALIGN);
            *end = start + n_tokens * frequencies.len() * 2 * 4;
            Some(start..*end)
        })
    }

    /// Fills the input arena of a step: per token cosines, then sines, of position times frequency, with the model's
    /// factor on them.
    ///
    /// # Panics
    /// When `arena` has fewer than [`in_bytes`](Self::in_bytes).
    pub fn fill_inputs(&self, positions: &[u32], arena: &mut [u8]) {
        for (range, frequencies) in self.input_ranges(positions.len()).zip(&self.angles) {
            let row = frequencies.len() * 2 * 4;
            let rows = arena[range].chunks_exact_mut(row.max(1));
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
        self.ranges(n_tokens, n_logits).last().map_or(0, |(_, range)| range.end)
    }

    /// The logits in an output arena, `[n_logits, vocab]` as little-endian f32.
    pub fn logits<'a>(&self, out: &'a [u8], n_tokens: usize, n_logits: usize) -> &'a [u8] {
        let logits = self.outputs_of(OutputKind::Logits, out, n_tokens, n_logits);
        logits.into_iter().next().expect("every program has logits")
    }

    /// The selections in an output arena: per index layer `[n_tokens, k]` as little-endian i32, ascending, -1 padded.
    /// Empty unless the program was built to give them out.
    pub fn selections<'a>(&self, out: &'a [u8], n_tokens: usize, n_logits: usize) -> Vec<&'a [u8]> {
        self.outputs_of(OutputKind::Selection, out, n_tokens, n_logits)
    }

    /// Attention's queries in an output arena, layer by layer. Empty unless the program was built to give them out.
    pub fn queries<'a>(&self, out: &'a [u8], n_tokens: usize, n_logits: usize) -> Vec<LayerQueries<'a>> {
        let latent = self.outputs_of(OutputKind::QueryLatent, out, n_tokens, n_logits);
        let latent = latent.into_iter().map(Some).chain(std::iter::repeat(None));
        let rope = self.outputs_of(OutputKind::QueryRope, out, n_tokens, n_logits);
        rope.into_iter().zip(latent).map(|(rope, latent)| LayerQueries { latent, rope }).collect()
    }

    fn outputs_of<'a>(&self, kind: OutputKind, out: &'a [u8], n_tokens: usize, n_logits: usize) -> Vec<&'a [u8]> {
        let ranges = self.ranges(n_tokens, n_logits).into_iter();
        ranges.filter(|(found, _)| *found == kind).map(|(_, range)| &out[range]).collect()
    }

    fn ranges(&self, n_tokens: usize, n_logits: usize) -> Vec<(OutputKind, Range<usize>)> {
        let mut at = 0usize;
        let place = |output: &Output| {
            let start = at.next_multiple_of(ARENA_ALIGN);
            at = start + output.width * 4 * if output.kind == OutputKind::Logits { n_logits } else { n_tokens };
            (output.kind, start..at)
        };
        self.outputs.iter().map(place).collect()
    }
}
