//! What is said of models and of the daemon as a whole? Objects that every door gives out.

use super::load;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Reach, UpstreamStatus};
use sparsed_engine::{DEFAULT_MODEL, DeviceState, DeviceStatus, ModelState, ModelStatus, ServedModel, Service, Target};

/// Whether a request for the default model would be served.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    /// starting, ready, degraded (another device computes), recovering or failed.
    pub(crate) state: &'static str,
    /// The same for people.
    pub(crate) text: String,
}

/// How the daemon is.
pub(crate) fn health(service: &Service) -> Health {
    let device = service.device();
    let (state, text) = match service.target(DEFAULT_MODEL) {
        Ok(Target::Elsewhere(upstream)) => match upstream.reach {
            Reach::Up => ("ready", format!("{} computes", upstream.address)),
            Reach::Unknown => ("starting", format!("{} is being asked", upstream.address)),
            Reach::Down(reason) => ("recovering", reason),
        },
        Ok(_) if device.state == DeviceState::Recovering => {
            ("recovering", format!("{} is being opened again; requests wait", device.name))
        }
        Ok(_) if device.backend_changed => ("degraded", format!("{} computes in another one's place", device.name)),
        Ok(_) => ("ready", "requests are served".to_owned()),
        Err(failure @ Failure::ModelLoading { .. }) => ("starting", failure.to_string()),
        Err(failure) => ("failed", failure.to_string()),
    };
    Health { state, text }
}

/// Names of the models that answer.
pub(crate) fn ready(service: &Service) -> Vec<String> {
    let models = service.models().into_iter();
    models.filter(|model| model.state.answers()).map(|model| model.name).collect()
}

/// Models that answer, as OpenAI lists them, and those of engines elsewhere, which say whether they do.
pub(crate) fn list(service: &Service) -> Value {
    let models = service.models();
    let data = models.iter().filter_map(|status| match &status.state {
        ModelState::Ready(served) => Some(entry(&status.name, served)),
        ModelState::Elsewhere(upstream) => Some(entry_elsewhere(&status.name, upstream)),
        ModelState::Loading { .. } | ModelState::Failed(_) => None,
    });
    let data: Vec<Value> = data.collect();
    json!({ "object": "list", "data": data })
}

/// The device, every configured model with its state and load, and whether code of others runs in the daemon; what
/// `sparsectl status` shows.
pub(crate) fn status(service: &Service) -> Value {
    let models: Vec<Value> = service.models().iter().map(|model| model_status(service, model)).collect();
    let third_party = service.third_party_plugins();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "tainted": !third_party.is_empty(),
        "third_party_plugins": third_party,
        "device": device_status(&service.device()),
        "memory": load::memory(service),
        "models": models,
    })
}

fn device_status(device: &DeviceStatus) -> Value {
    let state = match device.state {
        DeviceState::Loading => "loading",
        DeviceState::Ready => "ready",
        DeviceState::Recovering => "recovering",
        DeviceState::Unused => "unused",
    };
    json!({
        "name": device.name,
        "state": state,
        "faults": device.n_faults,
        "last_fault": device.last_fault,
        "backend_changed": device.backend_changed,
    })
}

/// The model `id` as OpenAI lists it.
///
/// # Errors
/// Not configured, or of this box and not there.
pub(crate) fn one(service: &Service, id: &str) -> Result<Value, Failure> {
    Ok(match service.target(id)? {
        Target::Here(served) => entry(id, &served),
        Target::Elsewhere(upstream) => entry_elsewhere(id, &upstream),
    })
}

/// A model of an engine elsewhere. The list is made without asking it, so when it was made is not known.
fn entry_elsewhere(id: &str, upstream: &UpstreamStatus) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": 0,
        "owned_by": "upstream",
        "max_model_len": upstream.max_context,
        "upstream": true,
        "reachable": upstream.is_up(),
        "meta": meta_elsewhere(upstream),
    })
}

fn meta_elsewhere(upstream: &UpstreamStatus) -> Value {
    let reason = match &upstream.reach {
        Reach::Down(reason) => Some(reason),
        Reach::Unknown | Reach::Up => None,
    };
    json!({
        "name": upstream.model,
        "address": upstream.address,
        "software": upstream.software,
        "label": format!("computed elsewhere, by {}", upstream.address),
        "reason": reason,
    })
}

/// A model as OpenAI lists it, with vLLM's `max_model_len` and llama.cpp's `meta`.
fn entry(id: &str, served: &ServedModel) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": served.created,
        "owned_by": "sparsed",
        "max_model_len": served.max_context,
        "meta": meta(served),
    })
}

fn meta(served: &ServedModel) -> Value {
    let (spec, summary) = (served.model.spec(), served.model.summary());
    json!({
        "name": served.model.name(),
        "n_vocab": spec.vocab_size,
        "n_ctx_train": spec.context_length,
        "n_embd": spec.hidden_size,
        "n_params": summary.parameters,
        "size": served.model.file_bytes(),
        "top_k": served.top_k,
        "kv_bytes_per_token": served.kv_bytes_per_token,
        "label": served.model.label(),
        "has_chat_template": served.model.chat_format().is_some(),
    })
}

fn model_status(service: &Service, status: &ModelStatus) -> Value {
    let (state, detail) = match &status.state {
        ModelState::Loading { progress_permille } => ("loading", json!({ "progress_permille": progress_permille })),
        ModelState::Ready(served) => ("ready", json!({ "max_context": served.max_context, "meta": meta(served) })),
        ModelState::Failed(reason) => ("failed", json!({ "reason": reason })),
        ModelState::Elsewhere(upstream) => {
            let state = match &upstream.reach {
                Reach::Up => "ready",
                Reach::Unknown => "connecting",
                Reach::Down(_) => "unreachable",
            };
            let meta = meta_elsewhere(upstream);
            (state, json!({ "max_context": upstream.max_context, "reason": meta["reason"].clone(), "meta": meta }))
        }
    };
    let (stats, load) = (&status.stats, &status.stats.load);
    json!({
        "name": status.name,
        "state": state,
        "upstream": matches!(status.state, ModelState::Elsewhere(_)),
        "detail": detail,
        "running": load.running,
        "waiting": load.waiting,
        "kv_blocks_used": load.blocks_used,
        "kv_blocks_cached": load.blocks_cached,
        "kv_blocks_slow": load.blocks_slow,
        "kv_blocks_total": load.blocks_total,
        "computed_tokens": stats.computed_tokens,
        "sampled_tokens": stats.sampled_tokens,
        "steps": stats.steps,
        "scheduling": load::scheduling(service, status),
    })
}
