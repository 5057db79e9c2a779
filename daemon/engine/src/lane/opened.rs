//! What does a model's file say of how it is served? All that is to be known before a device is there.

use super::ModelOptions;
use crate::executor::LoadOptions;
use crate::grammar::Compiler;
use crate::residence::Take;
use crate::room::{Need, Room, SlowTier, least_fast};
use crate::scheduler::{Footprint, Limits};
use crate::service::ServedModel;
use sparsed_kv::BLOCK_TOKENS;
use sparsed_model::{Model, ModelError, Program};
use sparsed_session::ImageShape;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model's file, read as far as it takes no device.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(super) served: ServedModel,
    pub(super) program: Arc<Program>,
    pub(super) load: LoadOptions,
    pub(super) footprint: Footprint,
    /// Where the slow tier's file will be, if there is to be one.
    pub(super) slow_dir: Option<PathBuf>,
}

/// Why a model was not opened.
#[derive(Debug)]
pub(crate) enum Unopened {
    /// Its file may not be used as it is now; there may be another one in its place later.
    NoFile(String),
    /// What is in it is not served.
    Unfit(String),
}

impl Opened {
    /// Finds and reads the file of the model `name`; `created` is the time in seconds since 1970. Takes long for long
    /// files: an engine that serves somebody has a thread of its own do it.
    ///
    /// # Errors
    /// Why the model cannot be served.
    pub(crate) fn open(name: &str, options: &ModelOptions, limits: Limits, created: u64) -> Result<Self, Unopened> {
        let file = options.source.locate().map_err(Unopened::NoFile)?;
        Self::read(&file, name, options, limits, created).map_err(Unopened::Unfit)
    }

    fn read(file: &Path, name: &str, options: &ModelOptions, limits: Limits, created: u64) -> Result<Self, String> {
        let text = |error: ModelError| error.to_string();
        let model = Model::open(file).map_err(text)?;
        let program = Arc::new(model.program(&options.program).map_err(text)?);
        let top_k = program.top_k();
        let (latent_bytes, index_bytes) = program.kv.plane_bytes_per_token().map_err(text)?;
        let context = wanted_context(name, &model, options);
        let layers = program.kv.n_layers.into();
        let need = Need { index_bytes, latent_bytes, layers, top_k: top_k.unwrap_or(0).into(), context };
        // Who reads everything at every token is not helped by a slow tier.
        let slow_tier = options.slow_tier.as_ref().filter(|_| top_k.is_some());
        let room = room(name, &need, options.kv_bytes, limits, slow_tier)?;
        let Room { max_context, n_blocks, n_fast, cache_bytes, least_cache_bytes } = room;
        let load = LoadOptions {
            program: options.program,
            max_context,
            max_step_tokens: limits.max_batched_tokens,
            max_seqs: limits.max_running,
            max_logits: limits.max_running,
            n_blocks,
            n_fast,
            slow_cache_bytes: cache_bytes,
        };
        let kv_bytes_per_token = latent_bytes + index_bytes;
        let block_bytes = u32::try_from(kv_bytes_per_token * u64::from(BLOCK_TOKENS));
        let block_bytes = block_bytes.map_err(|_| "its KV rows are too long".to_owned())?;
        let images = ImageShape { fingerprint: program.fingerprint(options.arithmetic), block_bytes };
        let (vocabularies, weights) = (model.vocabulary_fingerprints(), program.weights_fingerprint());
        let grammars = Compiler::default();
        let served = ServedModel {
            model,
            max_context,
            stateless_context: room.stateless_context(limits),
            kv_bytes_per_token,
            top_k,
            created,
            vocabularies,
            weights,
            images,
            grammars,
        };
        let footprint = Footprint {
            block_bytes: need.block_bytes(),
            latent_bytes: latent_bytes * u64::from(BLOCK_TOKENS),
            least_fast: least_fast(limits).min(n_fast),
            pool_bytes: need.bytes_of(&room),
            cache_bytes,
            least_cache_bytes,
        };
        Ok(Self { served, program, load, footprint, slow_dir: slow_tier.map(|tier| tier.dir.clone()) })
    }

    /// What the host images of its blocks are.
    pub(crate) fn images(&self) -> ImageShape {
        self.served.images
    }

    /// What it will take of the memory.
    pub(crate) fn take(&self) -> Take {
        Take { weights_bytes: self.served.model.file_bytes(), pool_bytes: self.footprint.pool_bytes }
    }
}

/// Most tokens of a sequence that the configuration wants.
fn wanted_context(name: &str, model: &Model, options: &ModelOptions) -> u32 {
    let trained = model.spec().context_length;
    let wanted = options.max_context.unwrap_or(trained);
    if wanted > trained {
        log::warn!(model:% = name, max_context = wanted, trained; "longer than the model was trained for");
    }
    wanted
}

/// What fits the memory there is.
fn room(name: &str, need: &Need, budget: u64, limits: Limits, slow: Option<&SlowTier>) -> Result<Room, String> {
    let room = match slow {
        Some(tier) => need.with_slow_tier(budget, limits, tier.hot_share),
        None => need.without_slow_tier(budget, limits),
    };
    let Room { max_context, n_blocks, n_fast, cache_bytes, .. } = room;
    let without_session = room.stateless_context(limits);
    if n_blocks < 2 {
        let needed = 2 * need.block_bytes();
        return Err(format!("{budget} bytes are left for its KV cache, {needed} are the least; raise memory.budget"));
    }
    if max_context < need.context {
        log::warn!(model:% = name, max_context, wanted = need.context; "memory.budget holds a shorter context");
    }
    if without_session < max_context {
        log::warn!(
            model:% = name, max_context, without_session;
            "requests without a session get a shorter context, as their rows may not be in the slow tier"
        );
    }
    log::info!(
        model:% = name, max_context, without_session, kv_blocks = n_blocks, fast_blocks = n_fast,
        slow_cache_mib = cache_bytes >> 20;
        "model open"
    );
    Ok(room)
}
