//! `sparsectl inspect`: what is in a model file, what does it take to serve it, and why is it not served?

use crate::config::Config;
use anyhow::bail;
use serde_json::{Value, json};
use sparsed_kv::{BLOCK_TOKENS, blocks_for};
use sparsed_model::{Held, Inspection, KvFormats, ModelSpec};
use std::fmt::Write;
use std::path::PathBuf;

/// Longest context that is asked about.
const CONTEXT_MAX: u32 = 1 << 24;

/// Show what is in a model file and what it takes to serve it.
///
/// Works on files that are not served, as far as they can be read; then every reason is told last, and the exit code is
/// 1. Headers and metadata are read, and the scales of FP8 weights; other weights are not. Every tensor is looked for.
///
/// Memory: weights are those that serving reads: mapped from the file, or made of what it holds (FP8 decoded to BF16
/// or F32, experts stacked, an unsplit kv_b split). COPY is what a plugin may hold besides, in its own layout, at most:
/// the CPU plugin copies matrices of Q4_0, Q4_1 and Q8_0. The total counts both. KV is whole blocks for one sequence
/// of --context tokens. Workspace is an estimate by a formula from the model's widths, for the daemon's default limits
/// of a step; no plugin was asked.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Inspect {
    /// GGUF file (the first part of a split one) or Hugging Face folder.
    file: PathBuf,
    /// Tokens of context that memory is told for. Default: as many as the model was trained for.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONTEXT_MAX)))]
    context: Option<u32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let found = Inspection::read(&self.file)?;
        let report = report(&found, self.context)?;
        if self.json {
            super::print_json(&report)?
        } else {
            super::print(&table(&report))?
        }
        if !found.refusals.is_empty() {
            bail!("{} is not served: {}", self.file.display(), found.refusals.join("; "));
        }
        Ok(())
    }
}

fn report(found: &Inspection, context: Option<u32>) -> anyhow::Result<Value> {
    let formats: serde_json::Map<String, Value> = found
        .formats
        .iter()
        .map(|(name, count)| {
            let count = json!({ "tensors": count.tensors, "values": count.values, "bytes": count.bytes });
            ((*name).to_owned(), count)
        })
        .collect();
    let tokenizer = found.tokenizer.as_ref().map(|(kind, tokens)| json!({ "kind": kind, "tokens": tokens }));
    let spec = found.spec.as_ref();
    Ok(json!({
        "name": found.name,
        "architecture": found.architecture,
        "container": if found.is_folder { "Hugging Face folder" } else { "GGUF" },
        "file_bytes": found.file_bytes,
        "parameters": found.parameters(),
        "formats": formats,
        "layers": spec.map(|spec| spec.n_layers),
        "context_length": spec.map(|spec| spec.context_length),
        "top_k": spec.and_then(|spec| spec.indexer.as_ref()).map(|indexer| indexer.top_k),
        "label": spec.and_then(ModelSpec::label),
        "tokenizer": tokenizer,
        "chat_template": found.has_template,
        "memory": spec.map(|spec| memory(found, spec, context.unwrap_or(spec.context_length))).transpose()?,
        "refusals": found.refusals,
    }))
}

/// Bytes that serving takes with the daemon's row formats and a context of `context` tokens, or the model's own; `None`
/// where the model is not served.
pub(super) fn bytes_to_serve(found: &Inspection, context: Option<u32>) -> Option<u64> {
    let spec = found.spec.as_ref()?;
    memory(found, spec, context.unwrap_or(spec.context_length)).ok()?["default"]["total_bytes"].as_u64()
}

/// What serving takes, for the daemon's row formats and for exact ones.
fn memory(found: &Inspection, spec: &ModelSpec, context: u32) -> anyhow::Result<Value> {
    let tokens = u64::from(blocks_for(context)) * u64::from(BLOCK_TOKENS);
    let workspace = workspace_bytes(spec);
    let held = found.held.unwrap_or_else(|| Held { mapped: found.file_bytes, ..Held::default() });
    let weights = held.mapped.saturating_add(held.made);
    let kv = |formats: KvFormats| -> anyhow::Result<Value> {
        let Some(shape) = found.kv(&formats, false).transpose()? else { return Ok(Value::Null) };
        let (latent, index) = shape.plane_bytes_per_token()?;
        let kv_bytes = (latent + index).saturating_mul(tokens);
        Ok(json!({
            "latent_bytes_per_token": latent,
            "index_bytes_per_token": index,
            "kv_bytes": kv_bytes,
            "total_bytes": weights.saturating_add(held.copies).saturating_add(kv_bytes).saturating_add(workspace),
        }))
    };
    Ok(json!({
        "context": context,
        "weights_bytes": weights,
        "weights_mapped_bytes": held.mapped,
        "weights_made_bytes": held.made,
        "copy_bytes_at_most": held.copies,
        "workspace_bytes_estimated": workspace,
        "default": kv(KvFormats::default())?,
        "exact": kv(KvFormats::exact())?,
    }))
}

/// The widest that a step's intermediate tensors are, in attention or in the feed-forward network, and the logits: an
/// estimate, since how they share memory is the plugin's choice.
fn workspace_bytes(spec: &ModelSpec) -> u64 {
    let limits = Config::default().limits;
    let wide = |n: u32| u64::from(n);
    let heads = wide(spec.n_heads);
    let latent = wide(spec.kv_lora_rank / spec.group_count.max(1));
    let query = heads * (wide(spec.qk_nope_head_dim) + 2 * wide(spec.qk_rope_head_dim));
    let attention = query + 2 * heads * latent + wide(spec.kv_lora_rank) + wide(spec.rope_row);
    let select = spec.indexer.as_ref().map_or(0, |indexer| {
        2 * wide(indexer.n_heads) * wide(indexer.head_dim) + wide(indexer.head_dim) + wide(indexer.top_k)
    });
    let experts = spec.moe.as_ref().map_or(0, |moe| {
        wide(moe.n_active) * (3 * wide(moe.feed_forward) + wide(spec.hidden_size)) + 2 * wide(moe.n_experts)
    });
    let feed_forward = 3 * wide(spec.feed_forward).max(experts / 3);
    let per_token = 4 * wide(spec.hidden_size) + (attention + select).max(feed_forward);
    (per_token * wide(limits.max_batched_tokens) + wide(spec.vocab_size) * wide(limits.max_running)) * 4
}

fn table(report: &Value) -> String {
    let word = |key: &str| report[key].as_str().unwrap_or("-");
    let number = |key: &str| super::number(&report[key]);
    let mut text = format!(
        "name          {}\narchitecture  {} ({})\nparameters    {}\nfile          {}\nlayers        {}\ncontext       {}\n",
        word("name"),
        word("architecture"),
        word("container"),
        number("parameters"),
        size(&report["file_bytes"]),
        number("layers"),
        number("context_length"),
    );
    let attention =
        report["top_k"].as_u64().map_or_else(|| word("label").to_owned(), |k| format!("selects {k} tokens"));
    let tokenizer = &report["tokenizer"];
    let tokenizer = tokenizer["kind"]
        .as_str()
        .map_or_else(|| "none".to_owned(), |kind| format!("{kind}, {} tokens", tokenizer["tokens"]));
    let template = if report["chat_template"] == true { "yes" } else { "none" };
    text += &format!("attention     {attention}\ntokenizer     {tokenizer}\ntemplate      {template}\n");
    text += &format!("\n{:<8} {:>8} {:>16} {:>12}\n", "FORMAT", "TENSORS", "VALUES", "SIZE");
    for (name, count) in report["formats"].as_object().into_iter().flatten() {
        let (tensors, values) = (super::number(&count["tensors"]), super::number(&count["values"]));
        let written = writeln!(text, "{name:<8} {tensors:>8} {values:>16} {:>12}", size(&count["bytes"]));
        written.expect("writing to a String cannot fail");
    }
    let memory = &report["memory"];
    if !memory.is_null() {
        text += &format!(
            "\nMemory for one sequence of {} tokens\n{:<8} {:>14} {:>14} {:>12} {:>12} {:>12} {:>12} {:>12}\n",
            memory["context"],
            "KV ROWS",
            "LATENT B/TOKEN",
            "INDEX B/TOKEN",
            "KV",
            "WEIGHTS",
            "COPY<=",
            "WORKSPACE~",
            "TOTAL~",
        );
        for kind in ["default", "exact"] {
            let kv = &memory[kind];
            let written = writeln!(
                text,
                "{kind:<8} {:>14} {:>14} {:>12} {:>12} {:>12} {:>12} {:>12}",
                super::number(&kv["latent_bytes_per_token"]),
                super::number(&kv["index_bytes_per_token"]),
                size(&kv["kv_bytes"]),
                size(&memory["weights_bytes"]),
                size(&memory["copy_bytes_at_most"]),
                size(&memory["workspace_bytes_estimated"]),
                size(&kv["total_bytes"]),
            );
            written.expect("writing to a String cannot fail");
        }
    }
    text.trim_end().to_owned()
}

fn size(bytes: &Value) -> String {
    bytes.as_u64().map_or_else(|| "-".to_owned(), |bytes| indicatif::HumanBytes(bytes).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_served_still_has_a_table() {
        let report = json!({
            "name": null, "architecture": "mamba", "container": "GGUF", "parameters": 96, "file_bytes": 2048,
            "formats": { "Q8_0": { "tensors": 1, "values": 96, "bytes": 102 } }, "top_k": null, "label": null,
            "tokenizer": null, "chat_template": false, "memory": null,
        });
        let text = table(&report);
        assert!(text.contains("architecture  mamba (GGUF)") && text.contains("tokenizer     none"), "{text}");
        assert_eq!(
            text.lines().last().unwrap().split_whitespace().collect::<Vec<_>>(),
            ["Q8_0", "1", "96", "102", "B"]
        );
    }
}
