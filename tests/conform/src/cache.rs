//! What is in the cache before a step? A pool filled through KV_APPEND and IDX_APPEND, and the same rows in f64.

use crate::case::{Case, Words, floats, stored_rows, wide, words};
use crate::rig::{Fault, Pool, Session, struct_size};
use crate::step::{Sequence, Step};
use crate::verdict::Wrong;
use sparsed_abi::{DIM_TOKENS, OP_IDX_APPEND, OP_KV_APPEND, OpSpec, SpdKvDesc, SpdRow};
use sparsed_quant::{Format, decode};
use std::rc::Rc;

/// The formats that a row may have.
pub(crate) const ROW_FORMATS: [Format; 8] =
    [Format::F32, Format::F16, Format::BF16, Format::Q8_0, Format::Q4_0, Format::W16, Format::F8_128, Format::Q6_0];

/// What a pool is like; width 0 for rows that it lacks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Of all rows but rope rows.
    pub(crate) format: Format,
    pub(crate) rope_format: Format,
    pub(crate) block_tokens: u32,
    pub(crate) n_blocks: u32,
    pub(crate) layers: u32,
    pub(crate) index_layers: u32,
    pub(crate) latent: u32,
    pub(crate) rope: u32,
    pub(crate) index: u32,
}

impl Shape {
    /// Latents of 64 values, rope rows and index keys of 32, in two layers. Beside rows of Q6_0 rope rows are in Q8_0,
    /// as the daemon has them, where the device claims that.
    pub(crate) fn usual(session: &Session, format: Format) -> Self {
        let beside = Some(Format::Q8_0).filter(|_| format == Format::Q6_0);
        Self {
            format,
            rope_format: beside.filter(|format| is_claimed(session, *format)).unwrap_or(format),
            block_tokens: block_tokens(session, 16),
            n_blocks: 24,
            layers: 2,
            index_layers: 2,
            latent: 64,
            rope: 32,
            index: 32,
        }
    }

    fn format_of(&self, plane: Plane) -> Format {
        if plane == Plane::Rope { self.rope_format } else { self.format }
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self, plane: Plane) -> usize {
        let width = match plane {
            Plane::Latent => self.latent,
            Plane::Rope => self.rope,
            Plane::Index => self.index,
        };
        self.format_of(plane).row_bytes(width as usize).expect("whole blocks")
    }

    pub(crate) fn desc(&self) -> SpdKvDesc {
        let row = |plane, width| SpdRow { dtype: self.format_of(plane).ggml_id(), width };
        SpdKvDesc {
            struct_size: struct_size::<SpdKvDesc>(),
            flags: 0,
            block_tokens: self.block_tokens,
            n_blocks: self.n_blocks,
            n_layers: self.layers,
            n_index_layers: self.index_layers,
            latent: row(Plane::Latent, self.latent),
            rope: row(Plane::Rope, self.rope),
            index: row(Plane::Index, self.index),
            ..SpdKvDesc::default()
        }
    }

    pub(crate) fn pool(&self, session: &Session) -> Result<Rc<Pool>, Fault> {
        Ok(Rc::new(session.pool(&self.desc())?))
    }

    /// Blocks for `tokens` tokens.
    pub(crate) fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// A sequence of `n` tokens from position 0 for each of `contexts`, in blocks as `order` deals them.
    pub(crate) fn sequences(&self, contexts: &[u32], order: &[u32]) -> Vec<Sequence> {
        let mut order = order.iter().copied();
        let mut blocks = |n| order.by_ref().take(n as usize).collect();
        contexts.iter().map(|&n| Sequence { blocks: blocks(self.blocks_for(n)), first: 0, n }).collect()
    }
}

/// A block size near `wanted` that the device takes.
pub(crate) fn block_tokens(session: &Session, wanted: u32) -> u32 {
    wanted.next_multiple_of(session.info.block_tokens_align.max(1))
}

/// The formats of rows that the device claims.
pub(crate) fn row_formats(session: &Session) -> Vec<Format> {
    ROW_FORMATS.into_iter().filter(|format| is_claimed(session, *format)).collect()
}

fn is_claimed(session: &Session, format: Format) -> bool {
    Session::has_dtype(&session.info.row_dtypes, format.ggml_id())
}

/// Rows of one layer, all tokens of a fill one after another.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pub(crate) format: Format,
    width: usize,
    pub(crate) given: Vec<f32>,
    /// As the pool stores them.
    pub(crate) bytes: Vec<u8>,
    /// As the pool answers them.
    values: Vec<f64>,
}

impl Rows {
    fn random(rng: &mut fastrand::Rng, format: Format, width: u32, tokens: usize) -> Self {
        let width = width as usize;
        let given = floats(rng, tokens * width);
        let bytes = stored_rows(format, width, &given);
        let mut values = vec![0.0; given.len()];
        let rows = bytes.chunks((bytes.len() / tokens.max(1)).max(1));
        for (row, values) in rows.zip(values.chunks_mut(width.max(1))) {
            decode(format, row, values).expect("a whole row");
        }
        Self { format, width, given, bytes, values: wide(&values) }
    }

    pub(crate) fn row(&self, token: usize) -> &[f64] {
        &self.values[token * self.width..(token + 1) * self.width]
    }

    /// A token's row before it was stored.
    pub(crate) fn given_row(&self, token: usize) -> &[f32] {
        &self.given[token * self.width..(token + 1) * self.width]
    }

    /// The stored bytes of a token's row.
    pub(crate) fn stored(&self, token: usize) -> &[u8] {
        let length = self.bytes.len() * self.width / self.given.len().max(1);
        &self.bytes[token * length..(token + 1) * length]
    }
}

/// The rows of some sequences.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    pub(crate) shape: Shape,
    pub(crate) sequences: Vec<Sequence>,
    /// By layer.
    pub(crate) latent: Vec<Rows>,
    pub(crate) rope: Vec<Rows>,
    pub(crate) index: Vec<Rows>,
}

impl Contents {
    pub(crate) fn random(rng: &mut fastrand::Rng, shape: Shape, sequences: Vec<Sequence>) -> Self {
        let tokens = sequences.iter().map(|sequence| sequence.n as usize).sum();
        let mut rows = |plane: Plane, layers: u32, width: u32| {
            (0..layers).map(|_| Rows::random(rng, shape.format_of(plane), width, tokens)).collect::<Vec<_>>()
        };
        let latent = rows(Plane::Latent, shape.layers, shape.latent);
        let rope = rows(Plane::Rope, shape.layers, shape.rope);
        let index = rows(Plane::Index, shape.index_layers, shape.index);
        Self { shape, sequences, latent, rope, index }
    }

    /// Which row of [`Rows`] is position `position` of sequence `seq`.
    pub(crate) fn token(&self, seq: usize, position: usize) -> usize {
        self.sequences[..seq].iter().map(|sequence| sequence.n as usize).sum::<usize>() + position
    }

    /// The step that writes all rows.
    pub(crate) fn step(&self) -> Step {
        Step::over(&self.sequences, self.shape.block_tokens)
    }

    /// Writes all rows of `planes` into `pool` in one step.
    pub(crate) fn write(&self, session: &Session, pool: &Rc<Pool>, planes: &[Plane]) -> Result<(), Wrong> {
        let step = self.step();
        let mut case = Case::with_pool(session, pool);
        let inputs = append_all(&mut case, &self.shape, planes);
        let inputs: Vec<Words> = inputs.iter().map(|source| words(&source.rows(self).given)).collect();
        let inputs: Vec<&[u32]> = inputs.iter().map(|input| &input[..]).collect();
        case.compile(&[&step])?.run(&step, &inputs)?;
        Ok(())
    }
}

/// A kind of row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plane {
    Latent,
    Rope,
    Index,
}

impl Plane {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Latent, Self::Rope, Self::Index];
}

/// Which rows an input of an appending program holds: a plane's, of this layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source(pub(crate) Plane, pub(crate) usize);

impl Source {
    pub(crate) fn rows(self, contents: &Contents) -> &Rows {
        match self.0 {
            Plane::Latent => &contents.latent[self.1],
            Plane::Rope => &contents.rope[self.1],
            Plane::Index => &contents.index[self.1],
        }
    }
}

/// Appends rows of `planes` (latent and rope together) to every layer of the pool; answers what the inputs are, in
/// order.
pub(crate) fn append_all(case: &mut Case<'_>, shape: &Shape, planes: &[Plane]) -> Vec<Source> {
    let width = |n: u32| i32::try_from(n).expect("rows of checks are small");
    let mut inputs = Vec::new();
    let latent_layers = if planes.contains(&Plane::Latent) { shape.layers } else { 0 };
    for layer in 0..latent_layers {
        let latent = case.input(&[DIM_TOKENS, width(shape.latent)]);
        let rope = case.input(&[DIM_TOKENS, width(shape.rope)]);
        inputs.extend([Source(Plane::Latent, layer as usize), Source(Plane::Rope, layer as usize)]);
        let tensors = [Some(latent), Some(rope)];
        case.op(OpSpec { kind: OP_KV_APPEND, inputs: &tensors, layer, ..OpSpec::default() });
    }
    let index_layers = if planes.contains(&Plane::Index) { shape.index_layers } else { 0 };
    for layer in 0..index_layers {
        let key = case.input(&[DIM_TOKENS, width(shape.index)]);
        inputs.push(Source(Plane::Index, layer as usize));
        case.op(OpSpec { kind: OP_IDX_APPEND, inputs: &[Some(key)], layer, ..OpSpec::default() });
    }
    inputs
}
