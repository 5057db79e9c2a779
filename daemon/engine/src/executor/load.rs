//! How does a model come onto a device? Its weights are uploaded one by one, then the rest is made of them at once.

use super::{DeviceModel, ExecutorError, LoadOptions, grow};
use sparsed_abi::SpdBucket;
use sparsed_backend::{Arena, Backend, Cipher, KvDesc, KvPool, Plan, SlowArea, Weight, WeightFile, WeightUpload};
use sparsed_kv::BLOCK_TOKENS;
use sparsed_model::Program;
use std::path::Path;
use std::sync::Arc;

impl DeviceModel {
    /// Makes pool, plan and queue for weights that are uploaded. A device that reads them in place may read all of them
    /// now, to lay them out otherwise: nobody hears from it meanwhile, and it may take as long as reading the file.
    ///
    /// # Errors
    /// What the device refuses.
    pub(crate) fn place(
        backend: &Backend,
        program: Arc<Program>,
        weights: &[Weight],
        options: LoadOptions,
        slow_dir: Option<&Path>,
    ) -> Result<Self, ExecutorError> {
        let (mut options, wanted) = (options, options.n_blocks);
        let (slow, pool, plan) = loop {
            match make(backend, &program, weights, options, slow_dir) {
                Err(error) if error.is_out_of_memory() => {
                    let block_bytes = program.kv.bytes_per_token()?.saturating_mul(u64::from(BLOCK_TOKENS));
                    options.n_blocks = fewer_blocks(options, block_bytes, backend.memory()?.free).ok_or(error)?;
                    options.n_fast = options.n_blocks;
                }
                made => break made?,
            }
        };
        if options.n_blocks < wanted {
            let (tokens, wanted) = (options.n_blocks * BLOCK_TOKENS, wanted * BLOCK_TOKENS);
            log::warn!(tokens, wanted; "the device has no room for all tokens wanted at a time, its pool is made smaller");
        }
        let queue = backend.queue()?;
        let (input, output) = (Arena::default(), Arena::default());
        let backend = backend.clone();
        Ok(Self { backend, program, plan, queue, pool, slow, has_left: false, options, step_id: 0, input, output })
    }

    /// Takes what its largest step will need, so that no step asks the device for memory: it would wait for whatever
    /// long call another model has under way there.
    pub(crate) fn provide(&mut self) {
        let LoadOptions { max_step_tokens, max_logits, .. } = self.options;
        let (tokens, rows) = (max_step_tokens as usize, max_logits.min(max_step_tokens) as usize);
        grow(&mut self.input, &self.backend, self.program.in_bytes(tokens));
        grow(&mut self.output, &self.backend, self.program.out_bytes(tokens, rows));
    }
}

/// What a model needs beside its weights: the slow tier, if any, the pool, and the compiled program.
type Placed = (Option<Arc<SlowArea>>, KvPool, Plan);

fn make(
    backend: &Backend,
    program: &Program,
    weights: &[Weight],
    options: LoadOptions,
    slow_dir: Option<&Path>,
) -> Result<Placed, ExecutorError> {
    let desc = KvDesc {
        block_tokens: BLOCK_TOKENS,
        n_blocks: options.n_blocks,
        n_layers: program.kv.n_layers,
        n_index_layers: program.kv.n_index_layers,
        latent: program.kv.latent,
        rope: program.kv.rope,
        index: program.kv.index,
    };
    let slow = match slow_dir {
        Some(dir) if options.n_fast < options.n_blocks => {
            let (row_bytes, cache_bytes) = (program.kv.latent_row_bytes()?, options.slow_cache_bytes);
            Some(Arc::new(match backend.info().takes_slow_file() {
                true => SlowArea::create(dir, cipher(), &desc, row_bytes, cache_bytes)?,
                false => SlowArea::in_memory(&desc, row_bytes, cache_bytes)?,
            }))
        }
        _ => None,
    };
    let pool = backend.create_kv(&desc, slow.as_deref())?;
    let bucket = SpdBucket {
        max_tokens: options.max_step_tokens,
        max_seqs: options.max_seqs,
        max_logits: options.max_logits,
        max_context: options.max_context,
    };
    let plan = backend.compile(&program.blob, &weights.iter().collect::<Vec<_>>(), &[&pool], bucket)?;
    Ok((slow, pool, plan))
}

/// What a slow tier is encrypted with: the faster one on this machine.
fn cipher() -> Cipher {
    if sparsed_session::has_aes() { Cipher::Aes256Gcm } else { Cipher::ChaCha20Poly1305 }
}

/// Blocks to try next on a device that has no room for these, of whose memory `free` bytes are left beside the weights;
/// the program's workspace has to fit as well, so that the last ones are given up in eighths. `None` where nothing
/// smaller is of use, or where part of the pool is slow: then memory is not what bounds it.
fn fewer_blocks(options: LoadOptions, block_bytes: u64, free: u64) -> Option<u32> {
    if options.n_fast < options.n_blocks {
        return None;
    }
    let fit = u32::try_from(free / block_bytes.max(1)).unwrap_or(u32::MAX);
    let fewer = fit.min(options.n_blocks - options.n_blocks.div_ceil(8));
    (fewer >= 2).then_some(fewer)
}

/// Gives the device the weights of `program`. `progress` hears (bytes uploaded, bytes in all).
///
/// # Errors
/// What the device refuses.
pub(crate) fn upload(
    backend: &Backend,
    program: &Program,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Weight>, ExecutorError> {
    let total = program.weights.iter().map(|weight| weight.bytes.len() as u64).sum();
    let (mut weights, mut done) = (Vec::with_capacity(program.weights.len()), 0);
    for weight in &program.weights {
        if !backend.info().takes_weights(weight.dtype) {
            return Err(ExecutorError::Dtype { name: weight.name.clone(), dtype: weight.dtype });
        }
        weights.push(backend.upload(&WeightUpload {
            name: weight.name.clone(),
            dtype: weight.dtype,
            batch: weight.batch,
            rows: weight.rows,
            cols: weight.cols,
            bytes: weight.bytes.clone(),
            file: weight.file.clone().map(|(file, offset)| WeightFile { file, offset }),
        })?);
        done += weight.bytes.len() as u64;
        progress(done, total);
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_model::ProgramOptions;

    fn options(n_blocks: u32, n_fast: u32) -> LoadOptions {
        LoadOptions {
            program: ProgramOptions::default(),
            max_context: 64,
            max_step_tokens: 8,
            max_seqs: 1,
            max_logits: 1,
            n_blocks,
            n_fast,
            slow_cache_bytes: 0,
        }
    }

    #[test]
    fn a_pool_that_does_not_fit_is_made_as_large_as_the_memory_then_smaller_by_eighths_and_never_useless() {
        assert_eq!(fewer_blocks(options(1000, 1000), 64, 64 * 100), Some(100));
        assert_eq!(fewer_blocks(options(100, 100), 64, 64 * 100), Some(87));
        assert_eq!(fewer_blocks(options(3, 3), 64, u64::MAX), Some(2));
        assert_eq!(fewer_blocks(options(2, 2), 64, u64::MAX), None);
        assert_eq!(fewer_blocks(options(1000, 1000), 64, 100), None);
        assert_eq!(fewer_blocks(options(1000, 10), 64, 64 * 100), None, "a slow tier is not bounded by the device");
    }
}
