//! How does a model run on a device? Weights uploaded, program compiled, one sequence stepped through.

use sparsed_abi::{Blob, SpdBucket, StepArrays};
use sparsed_backend::{Backend, BackendError, KvDesc, KvPool, Plan, Queue, Weight, WeightUpload};
use sparsed_kv::{BLOCK_TOKENS, BlockTable, KvError, Pool, blocks_for};
use sparsed_model::{Model, ModelError, Program, ProgramOptions};

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutorError {
    /// The model's fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device's or plugin's fault.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The pool is too small.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The device does not take a weight's dtype.
    #[error("tensor {name} has dtype {dtype}, which the device does not compute with")]
    Dtype {
        /// The tensor.
        name: String,
        /// `DT_*`
        dtype: u32,
    },
    /// A step is larger than what was compiled.
    #[error("a step of {have} tokens, at most {max} were compiled for")]
    StepTooLarge {
        /// Tokens of the step.
        have: usize,
        /// Tokens the plan takes.
        max: u32,
    },
}

/// How a model is put on a device.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// What its steps compute.
    pub program: ProgramOptions,
    /// Most tokens of a sequence.
    pub max_context: u32,
    /// Most tokens of a step.
    pub max_step_tokens: u32,
}

/// A model on a device.
#[derive(Debug)]
pub struct DeviceModel {
    program: Program,
    plan: Plan,
    queue: Queue,
    pool: KvPool,
    options: LoadOptions,
}

/// One sequence's place in the KV pool of a [`DeviceModel`].
#[derive(Debug)]
pub struct Sequence {
    blocks: Pool,
    table: BlockTable,
}

/// What a step gives out.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// `[rows, vocab]`
    pub logits: Vec<f32>,
    /// Per index layer `[tokens, k]`, ascending, -1 padded; empty unless the program gives selections out.
    pub selections: Vec<Vec<i32>>,
}

impl DeviceModel {
    /// Uploads and compiles. `progress` hears (bytes uploaded, bytes in all).
    ///
    /// # Errors
    /// What the model lacks or the device refuses.
    pub fn load(
        backend: &Backend,
        model: &Model,
        options: LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ExecutorError> {
        let program = model.program(&options.program)?;
        let total = program.weights.iter().map(|weight| weight.bytes.len() as u64).sum();
        let (mut weights, mut done) = (Vec::<Weight>::with_capacity(program.weights.len()), 0);
        for weight in &program.weights {
            if !backend.info().takes_weights(weight.dtype) {
                return Err(ExecutorError::Dtype { name: weight.name.clone(), dtype: weight.dtype });
            }
            let upload = WeightUpload {
                name: weight.name.clone(),
                dtype: weight.dtype,
                batch: weight.batch,
                rows: weight.rows,
                cols: weight.cols,
                bytes: weight.bytes.clone(),
            };
            weights.push(backend.upload(&upload)?);
            done += weight.bytes.len() as u64;
            progress(done, total);
        }
        let pool = backend.create_kv(&KvDesc {
            block_tokens: BLOCK_TOKENS,
            n_blocks: blocks_for(options.max_context),
            n_layers: program.kv.n_layers,
            n_index_layers: program.kv.n_index_layers,
            latent: program.kv.latent,
            rope: program.kv.rope,
            index: program.kv.index,
        })?;
        let bucket = SpdBucket {
            max_tokens: options.max_step_tokens,
            max_seqs: 1,
            max_logits: options.max_step_tokens,
            max_context: options.max_context,
        };
        let plan = backend.compile(&program.blob, &weights.iter().collect::<Vec<_>>(), &[&pool], bucket)?;
        let queue = backend.queue()?;
        Ok(Self { program, plan, queue, pool, options })
    }

    /// A new, empty sequence. The pool belongs to one sequence at a time: an older one must not be stepped any more.
    pub fn sequence(&self) -> Sequence {
        Sequence { blocks: Pool::new(self.pool.desc().n_blocks), table: BlockTable::new() }
    }

    /// Tokens that attention selects, `None` when it reads all.
    pub fn top_k(&self) -> Option<u32> {
        self.program.top_k()
    }

    /// Bytes that one token holds in the KV pool.
    ///
    /// # Errors
    /// When a row is not whole blocks of its format.
    pub fn kv_bytes_per_token(&self) -> Result<u64, ExecutorError> {
        Ok(self.program.kv.bytes_per_token()?)
    }

    /// Appends `tokens` to the sequence and gives out logits of the rows `rows` (ascending, of this step).
    ///
    /// # Errors
    /// A step that is too large, a pool that is full, or the device's failure.
    pub fn step(&mut self, sequence: &mut Sequence, tokens: &[u32], rows: &[u32]) -> Result<Outputs, ExecutorError> {
        let max = self.options.max_step_tokens;
        let count = u32::try_from(tokens.len()).ok().filter(|&n| n <= max);
        let count = count.ok_or(ExecutorError::StepTooLarge { have: tokens.len(), max })?;
        let first = sequence.table.n_tokens();
        let needed = sequence.table.blocks_needed(count);
        let mut reservation = sequence.blocks.reserve(needed)?;
        let mut slots = Vec::with_capacity(tokens.len());
        sequence.table.append(count, &mut sequence.blocks, &mut reservation, &mut slots);
        sequence.blocks.forfeit(reservation);
        let positions: Vec<u32> = (first..first + count).collect();
        let block_ids: Vec<u32> = sequence.table.blocks().iter().map(|block| block.0).collect();
        let n_blocks = u32::try_from(block_ids.len()).expect("fewer blocks than tokens");
        let step = StepArrays {
            step_id: u64::from(first),
            flags: 0,
            tokens,
            positions: &positions,
            slots: &slots,
            seq_offsets: &[0, count],
            contexts: &[first + count],
            block_offsets: &[0, n_blocks],
            block_ids: &block_ids,
            rows,
        };
        let mut input = Blob::default();
        self.program.fill_inputs(&positions, &mut input);
        let mut output = Blob::zeroed(self.program.out_bytes(tokens.len(), rows.len()));
        self.queue.run(&self.plan, &step.encode(), input.as_bytes(), output.as_bytes_mut())?;
        let out = output.as_bytes();
        let selections = self.program.selections(out, tokens.len(), rows.len());
        Ok(Outputs {
            logits: floats(self.program.logits(out, tokens.len(), rows.len())),
            selections: selections.into_iter().map(integers).collect(),
        })
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}

fn integers(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().map(|chunk| i32::from_le_bytes(*chunk)).collect()
}
