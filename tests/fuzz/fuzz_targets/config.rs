//! Can any text make the reader of `config.json` panic, or give a spec that contradicts itself?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_model::ModelSpec;

fuzz_target!(|text: &[u8]| {
    let Ok(spec) = ModelSpec::from_config(text) else { return };
    let layers = spec.n_layers as usize;
    assert_eq!(spec.rope_frequencies.len() * 2, spec.rope_row as usize);
    if let Some(indexer) = &spec.indexer {
        assert!(indexer.full.len() == layers && indexer.full[0] && indexer.rope_dim <= indexer.head_dim);
    }
    if let Some(moe) = &spec.moe {
        assert!(moe.layers.len() == layers && moe.n_active <= moe.n_experts / moe.n_groups * moe.n_groups_kept);
    }
});
