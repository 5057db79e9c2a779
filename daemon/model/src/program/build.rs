//! The frame of a program: weights bound once, angle inputs, embedding, layers, head.

use super::{KvFormats, KvShape, Output, OutputKind, Program, ProgramOptions, Selection, WeightBinding, unread};
use crate::weights::{Tensor, Weights};
use crate::{IndexerSpec, ModelError, ModelSpec};
use sparsed_abi::{
    DIM_LOGITS, DIM_TOKENS, DT_F8_128, DT_F16, DT_F32, DT_Q4_0, DT_Q8_0, DT_W16, OP_EMBED, OP_GATHER_ROWS, OP_LINEAR,
    OP_RMS_NORM, OpSpec, ProgramBuilder, SpdRow, TensorId,
};
use sparsed_quant::Format;
use std::collections::HashMap;

/// A program under construction.
pub(super) struct Builder<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) weights: &'a Weights,
    pub(super) options: &'a ProgramOptions,
    pub(super) kv: KvShape,
    pub(super) program: ProgramBuilder,
    bindings: Vec<WeightBinding>,
    bound: HashMap<String, TensorId>,
    angles: Vec<(Vec<f64>, TensorId)>,
    pub(super) selections: Vec<TensorId>,
    outputs: Vec<(TensorId, Output)>,
    /// The residual stream.
    pub(super) x: TensorId,
    /// What is still to be added to it.
    pub(super) pending: Option<TensorId>,
}

/// The rows that a token has in the pool.
pub(crate) fn kv_shape(spec: &ModelSpec, kv: &KvFormats, dense: bool) -> Result<KvShape, ModelError> {
    let index = spec.indexer.as_ref().filter(|_| !dense);
    let kv = together(spec, *kv);
    let shape = KvShape {
        n_layers: spec.n_layers,
        n_index_layers: index.map_or(0, IndexerSpec::n_full),
        latent: row(kv.latent, spec.kv_lora_rank, spec.group_count),
        rope: row(kv.rope, spec.rope_row, spec.group_count),
        index: index_row(kv.index, index.map_or(0, |index| index.head_dim)),
    };
    shape.bytes_per_token()?;
    Ok(shape)
}

/// Words and e4m3 are for latent and rope rows together: of one kind alone nobody has use.
fn together(spec: &ModelSpec, kv: KvFormats) -> KvFormats {
    let either = |dtype: u32| {
        let fits = |width| row(dtype, width, spec.group_count).dtype == dtype;
        let both = fits(spec.kv_lora_rank) && fits(spec.rope_row);
        if matches!(dtype, DT_W16 | DT_F8_128) && !both { DT_F16 } else { dtype }
    };
    KvFormats { latent: either(kv.latent), rope: either(kv.rope), index: kv.index }
}

/// A row format; f16 takes the place of a block format that a group's slice does not fill in whole blocks.
fn row(dtype: u32, width: u32, groups: u32) -> SpdRow {
    let block = Format::from_dtype(dtype).map_or(1, Format::block_values);
    let whole = ((width / groups.max(1)) as usize).is_multiple_of(block);
    SpdRow { dtype: if whole { dtype } else { DT_F16 }, width }
}

/// An index row. Keys in 4 bits are rotated by a Hadamard matrix, whose size is a power of two; others stay in 8 bits.
fn index_row(dtype: u32, width: u32) -> SpdRow {
    row(if dtype == DT_Q4_0 && !width.is_power_of_two() { DT_Q8_0 } else { dtype }, width, 1)
}

/// Writes down a step of the model.
pub(crate) fn build(spec: &ModelSpec, weights: &Weights, options: &ProgramOptions) -> Result<Program, ModelError> {
    let top_k = top_k(spec, options)?;
    let kv = kv_shape(spec, &options.kv, top_k.is_none())?;
    let mut program = ProgramBuilder::new();
    let x = program.activation(DT_F32, &[DIM_TOKENS, dim(spec.hidden_size)]);
    let mut builder = Builder {
        spec,
        weights,
        options,
        kv,
        program,
        bindings: Vec::new(),
        bound: HashMap::new(),
        angles: Vec::new(),
        selections: Vec::new(),
        outputs: Vec::new(),
        x,
        pending: None,
    };
    let embedding = builder.matrix("token_embd.weight", spec.hidden_size, spec.vocab_size)?;
    builder.op(OP_EMBED, &[Some(embedding)], &[x], [0; 6], 0.0);
    for layer in 0..spec.n_layers {
        builder.layer(layer, top_k)?;
    }
    let logits = builder.head()?;
    builder.output(logits, OutputKind::Logits, spec.vocab_size);
    unread::check(spec, weights, &|name| builder.bound.contains_key(name))?;
    // The arena holds them in the order of their tensors.
    builder.outputs.sort_unstable_by_key(|(tensor, _)| *tensor);
    Ok(Program {
        blob: builder.program.finish(1),
        weights: builder.bindings,
        kv,
        angles: builder.angles.into_iter().map(|(frequencies, _)| frequencies).collect(),
        angle_factor: spec.rope_factor,
        outputs: builder.outputs.into_iter().map(|(_, output)| output).collect(),
        top_k,
    })
}

fn top_k(spec: &ModelSpec, options: &ProgramOptions) -> Result<Option<u32>, ModelError> {
    match (options.selection, &spec.indexer) {
        (Selection::Dense, _) | (Selection::Model, None) => Ok(None),
        (Selection::Model, Some(indexer)) => Ok(Some(indexer.top_k)),
        (Selection::TopK(k), Some(_)) if k > 0 && k <= 1 << 24 => Ok(Some(k)),
        (Selection::TopK(k), Some(_)) => {
            let reason = "must be 1 to 16777216".to_owned();
            Err(ModelError::Hyperparameter { key: "top_k".to_owned(), value: k.to_string(), reason })
        }
        (Selection::TopK(_), None) => {
            let what = "selecting tokens with a model that has no indexer".to_owned();
            Err(ModelError::Unsupported { what, hint: ": leave top_k out, or convert the model" })
        }
    }
}

/// A dimension as the blob has it.
pub(super) fn dim(n: u32) -> i32 {
    i32::try_from(n).expect("the spec's dimensions are below 2^24")
}

impl Builder<'_> {
    /// Appends an operator with f0 = `f`.
    pub(super) fn op(&mut self, kind: u32, inputs: &[Option<TensorId>], outputs: &[TensorId], i: [i32; 6], f: f32) {
        self.layer_op(kind, 0, inputs, outputs, i, f);
    }

    /// Appends an operator on layer `layer` of the pool.
    pub(super) fn layer_op(
        &mut self,
        kind: u32,
        layer: u32,
        inputs: &[Option<TensorId>],
        outputs: &[TensorId],
        i: [i32; 6],
        f: f32,
    ) {
        let outputs: Vec<_> = outputs.iter().copied().map(Some).collect();
        self.program.op(OpSpec { kind, inputs, outputs: &outputs, layer, i, f: [f, 0.0, 0.0, 0.0] });
    }

    /// Makes an activation an output whose rows have `width` values.
    pub(super) fn output(&mut self, tensor: TensorId, kind: OutputKind, width: u32) {
        self.program.mark_output(tensor);
        self.outputs.push((tensor, Output { kind, width: width as usize }));
    }

    /// An activation `[T, dims..]`.
    pub(super) fn tokens(&mut self, dims: &[u32]) -> TensorId {
        let dims: Vec<i32> = std::iter::once(DIM_TOKENS).chain(dims.iter().map(|&n| dim(n))).collect();
        self.program.activation(DT_F32, &dims)
    }

    /// The matrix `name`, `[rows, cols]`.
    pub(super) fn matrix(&mut self, name: &str, cols: u32, rows: u32) -> Result<TensorId, ModelError> {
        let tensor = self.weights.get(name, &[cols, rows])?;
        Ok(self.bind(name, tensor, 1, rows, cols, &[dim(rows), dim(cols)]))
    }

    /// The matrices `name`, `batch` of `[rows, cols]`.
    pub(super) fn matrices(&mut self, name: &str, cols: u32, rows: u32, batch: u32) -> Result<TensorId, ModelError> {
        let tensor = self.weights.get(name, &[cols, rows, batch])?;
        Ok(self.bind(name, tensor, batch, rows, cols, &[dim(batch), dim(rows), dim(cols)]))
    }

    /// The vector `name` as f32, whatever it is in the file.
    pub(super) fn vector(&mut self, name: &str, n: u32) -> Result<TensorId, ModelError> {
        let tensor = self.weights.get(name, &[n])?.single(name)?;
        Ok(self.bind(name, tensor, 1, 1, n, &[dim(n)]))
    }

    fn bind(&mut self, name: &str, tensor: Tensor, batch: u32, rows: u32, cols: u32, dims: &[i32]) -> TensorId {
        if let Some(&id) = self.bound.get(name) {
            return id;
        }
        let slot = u32::try_from(self.bindings.len()).expect("fewer than 2^18 tensors in a file");
        let dtype = tensor.format.ggml_id();
        let id = self.program.weight(slot, dtype, dims);
        let (rows, cols) = (rows.into(), cols.into());
        let file = self.weights.place(&tensor.bytes);
        let bytes = tensor.bytes;
        self.bindings.push(WeightBinding { name: name.to_owned(), dtype, batch, rows, cols, bytes, file });
        self.bound.insert(name.to_owned(), id);
        id
    }

    /// The input with the angles of these frequencies.
    pub(super) fn angle_input(&mut self, frequencies: &[f64]) -> TensorId {
        if let Some((_, id)) = self.angles.iter().find(|(known, _)| known == frequencies) {
            return *id;
        }
        let width = i32::try_from(frequencies.len() * 2).expect("a small dimension");
        let id = self.program.input(DT_F32, &[DIM_TOKENS, width]);
        self.angles.push((frequencies.to_vec(), id));
        id
    }

    /// `[T, rows] = W [rows, cols] x`; x rounded as the options allow unless `exact`.
    pub(super) fn linear(
        &mut self,
        name: &str,
        x: TensorId,
        cols: u32,
        rows: u32,
        exact: bool,
    ) -> Result<TensorId, ModelError> {
        let weight = self.matrix(name, cols, rows)?;
        let y = self.tokens(&[rows]);
        let rounding = if exact { 0 } else { self.rounding() };
        self.op(OP_LINEAR, &[Some(x), Some(weight)], &[y], [rounding, 0, 0, 0, 0, 0], 0.0);
        Ok(y)
    }

    /// The attribute of products whose activations the options allow to round.
    pub(super) fn rounding(&self) -> i32 {
        self.options.activations.attribute()
    }

    /// The normalised residual stream, with what was pending added to it first.
    pub(super) fn norm(&mut self, gain: &str) -> Result<TensorId, ModelError> {
        let (hidden, eps) = (self.spec.hidden_size, self.spec.rms_norm_eps);
        let gain = self.vector(gain, hidden)?;
        let y = self.tokens(&[hidden]);
        match self.pending.take() {
            None => self.op(OP_RMS_NORM, &[Some(self.x), Some(gain)], &[y], [0; 6], eps),
            Some(pending) => {
                let sum = self.tokens(&[hidden]);
                self.op(OP_RMS_NORM, &[Some(pending), Some(gain), Some(self.x)], &[y, sum], [0; 6], eps);
                self.x = sum;
            }
        }
        Ok(y)
    }

    /// Logits of the rows that need them.
    fn head(&mut self) -> Result<TensorId, ModelError> {
        let (hidden, vocab, eps) = (self.spec.hidden_size, self.spec.vocab_size, self.spec.rms_norm_eps);
        let gather = |builder: &mut Self, from: TensorId| {
            let to = builder.program.activation(DT_F32, &[DIM_LOGITS, dim(hidden)]);
            builder.op(OP_GATHER_ROWS, &[Some(from)], &[to], [0; 6], 0.0);
            to
        };
        let x = gather(self, self.x);
        let pending = self.pending.take().expect("a layer leaves its feed-forward output pending");
        let pending = gather(self, pending);
        let gain = self.vector("output_norm.weight", hidden)?;
        let rows = |builder: &mut Self, n: u32| builder.program.activation(DT_F32, &[DIM_LOGITS, dim(n)]);
        let (y, sum) = (rows(self, hidden), rows(self, hidden));
        self.op(OP_RMS_NORM, &[Some(pending), Some(gain), Some(x)], &[y, sum], [0; 6], eps);
        let head = if self.spec.tied_embeddings { "token_embd.weight" } else { "output.weight" };
        let weight = self.matrix(head, hidden, vocab)?;
        let logits = rows(self, vocab);
        self.op(OP_LINEAR, &[Some(y), Some(weight)], &[logits], [self.rounding(), 0, 0, 0, 0, 0], 0.0);
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activations, Model};
    use sparsed_abi::{OP_HADAMARD, OP_IDX_TOPK};
    use std::path::Path;

    fn tiny(name: &str, kv: KvFormats) -> Program {
        tiny_with(name, &ProgramOptions { kv, ..ProgramOptions::default() })
    }

    fn tiny_with(name: &str, options: &ProgramOptions) -> Program {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
        Model::open(&root.join(name).join("model.gguf")).unwrap().program(options).unwrap()
    }

    fn rotations(program: &Program) -> usize {
        let program = sparsed_abi::Program::parse(program.blob.as_bytes()).unwrap();
        program.ops().iter().filter(|op| op.kind == OP_HADAMARD).count()
    }

    /// What IDX_TOPK says of its queries: the same in every layer.
    fn queries_mark(activations: Activations, kv: KvFormats) -> i32 {
        let program = tiny_with("glm5", &ProgramOptions { activations, kv, ..ProgramOptions::default() });
        let program = sparsed_abi::Program::parse(program.blob.as_bytes()).unwrap();
        let marks: Vec<i32> = program.ops().iter().filter(|op| op.kind == OP_IDX_TOPK).map(|op| op.i[1]).collect();
        assert!(!marks.is_empty() && marks.iter().all(|mark| *mark == marks[0]), "{marks:?}");
        marks[0]
    }

    #[test]
    fn index_queries_may_have_8_bits_where_activations_or_keys_are_as_coarse() {
        let usual = KvFormats::default();
        assert_eq!(queries_mark(Activations::Int16, usual), 0);
        assert_eq!(queries_mark(Activations::F32, KvFormats::exact()), 0);
        assert_eq!(queries_mark(Activations::Int8, usual), 1);
        assert_eq!(queries_mark(Activations::Int16, usual.with_4_bit_index()), 1);
    }

    #[test]
    fn index_keys_in_4_bits_are_rotated_as_their_queries_are_and_are_no_others_rows() {
        let (usual, small) = (KvFormats::default(), KvFormats::default().with_4_bit_index());
        let [a, b] = [usual, small].map(|kv| tiny("glm5", kv));
        assert_eq!((a.kv.index.dtype, b.kv.index.dtype), (DT_Q8_0, DT_Q4_0));
        assert_eq!((rotations(&a), rotations(&b)), (0, 2 * b.kv.n_index_layers as usize));
        assert_ne!(a.fingerprint(0), b.fingerprint(0));
        assert!(a.fingerprint(1) != a.fingerprint(0) && a.fingerprint(1) != a.fingerprint(2), "another arithmetic");
        assert_eq!(a.weights_fingerprint(), b.weights_fingerprint());
        assert_ne!(a.weights_fingerprint(), tiny("v32", usual).weights_fingerprint());
        // Keys of 24 values: no such matrix, and no whole blocks.
        let [a, b] = [usual, small].map(|kv| tiny("v32", kv));
        assert_eq!((a.kv, rotations(&b), a.fingerprint(0)), (b.kv, 0, b.fingerprint(0)));
    }

    #[test]
    fn where_a_row_is_no_whole_blocks_the_other_is_not_words_nor_e4m3_either() {
        // Latent rows of 32 values, rope rows of 16.
        for kv in [KvFormats::words(), KvFormats::fp8()] {
            let rows = tiny("glm5", kv).kv;
            assert_eq!((rows.latent.dtype, rows.rope.dtype), (DT_F16, DT_F16));
        }
    }
}
