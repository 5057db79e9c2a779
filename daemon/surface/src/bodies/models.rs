//! What is said of models and of the daemon as a whole? Objects that every door gives out.

use super::load;
use crate::refusal::Refusal;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Owner, Reach, UpstreamStatus};
use sparsed_engine::{
    DEFAULT_MODEL, DeviceState, DeviceStatus, Held, ModelState, ModelStatus, ServedModel, Service, Sessions,
};

/// The model `name` of this box for `owner`, loaded if it is not there, and kept as long as what this answers. Dropped,
/// nobody waits any more.
///
/// # Errors
/// Not configured, not to be loaded, or not within the time that a request waits for a model.
pub(crate) async fn held(service: &Service, owner: Owner, name: &str) -> Result<Held, Refusal> {
    let arriving = service.hold(owner, name)?;
    let patience = arriving.patience();
    let waited = tokio::time::timeout(patience, arriving).await;
    Ok(waited.unwrap_or_else(|_| Err(Failure::ModelLoading { name: name.to_owned() }))?)
}

/// Whether a request for the model `name` has to wait until it is loaded.
pub(crate) fn is_absent(service: &Service, name: &str) -> bool {
    matches!(service.model(name), Err(Failure::ModelUnloaded { .. } | Failure::ModelLoading { .. }))
}

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
    if let Some(upstream) = service.elsewhere(DEFAULT_MODEL) {
        let (state, text) = match upstream.reach {
            Reach::Up => ("ready", format!("{} computes", upstream.address)),
            Reach::Unknown => ("starting", format!("{} is being asked", upstream.address)),
            Reach::Down(reason) => ("recovering", reason),
        };
        return Health { state, text };
    }
    let (state, text) = match service.model(DEFAULT_MODEL) {
        Ok(_) if device.state == DeviceState::Recovering => {
            ("recovering", format!("{} is being opened again; requests wait", device.name))
        }
        Ok(_) if device.backend_changed => ("degraded", format!("{} computes in another one's place", device.name)),
        Ok(_) => ("ready", "requests are served".to_owned()),
        // It is loaded when somebody asks.
        Err(Failure::ModelUnloaded { .. }) => match device.state {
            DeviceState::Loading => ("starting", format!("{} is being opened", device.name)),
            DeviceState::Ready | DeviceState::Unused => {
                ("ready", "the default model is loaded with the first request".to_owned())
            }
            DeviceState::Recovering => ("recovering", format!("{} is being opened again", device.name)),
        },
        // Requests wait for it.
        Err(Failure::ModelLoading { .. }) if is_on_demand(service) && device.state == DeviceState::Ready => {
            ("ready", "the default model is being loaded".to_owned())
        }
        Err(failure @ Failure::ModelLoading { .. }) => ("starting", failure.to_string()),
        Err(failure) => ("failed", failure.to_string()),
    };
    Health { state, text }
}

/// Whether the default model is loaded when somebody asks for it.
fn is_on_demand(service: &Service) -> bool {
    let models = service.models();
    let default = models.iter().find(|model| model.name == DEFAULT_MODEL).or_else(|| models.first());
    default.is_some_and(|model| !model.keeping.at_start)
}

/// Names of the models that answer.
pub(crate) fn ready(service: &Service) -> Vec<String> {
    let models = service.models().into_iter();
    models.filter(|model| model.state.answers()).map(|model| model.name).collect()
}

/// Models that may be asked for, as OpenAI lists them: those that answer, those that are loaded then, and those of
/// engines elsewhere, which say whether they answer.
pub(crate) fn list(service: &Service) -> Value {
    let data: Vec<Value> = service.models().iter().filter(|status| is_offered(status)).map(listed).collect();
    json!({ "object": "list", "data": data })
}

/// Whether a request for the model would be answered, now or after it is loaded.
pub(crate) fn is_offered(status: &ModelStatus) -> bool {
    match status.state {
        ModelState::Ready(_) | ModelState::Unloaded | ModelState::Elsewhere(_) => true,
        ModelState::Loading { .. } => !status.keeping.at_start,
        ModelState::Failed(_) => false,
    }
}

/// A model as OpenAI lists it, one of this box with llama.cpp's `status`.
fn listed(status: &ModelStatus) -> Value {
    let mut entry = match &status.state {
        ModelState::Ready(served) => entry(&status.name, served),
        ModelState::Elsewhere(upstream) => {
            let mut entry = entry_elsewhere(&status.name, upstream);
            entry["aliases"] = json!(status.aliases);
            return entry;
        }
        _ => json!({ "id": status.name, "object": "model", "created": 0, "owned_by": "sparsed" }),
    };
    let value = match &status.state {
        ModelState::Ready(_) | ModelState::Elsewhere(_) => "loaded",
        ModelState::Unloaded => "unloaded",
        ModelState::Loading { .. } => "loading",
        ModelState::Failed(_) => "failed",
    };
    (entry["status"], entry["aliases"]) = (json!({ "value": value }), json!(status.aliases));
    entry
}

/// The device, every configured model with its state and load, and whether code of others runs in the daemon; what
/// `sparsectl status` shows. Of whose load it is `asker` sees what is its own.
pub(crate) fn status(service: &Service, asker: Owner) -> Value {
    let models: Vec<Value> = service.models().iter().map(|model| model_status(service, model, asker)).collect();
    let third_party = service.third_party_plugins();
    let usage = service.sessions().ok().and_then(Sessions::usage);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "tainted": !third_party.is_empty(),
        "third_party_plugins": third_party,
        "device": device_status(&service.device()),
        "memory": load::memory(service),
        "sessions": load::sessions(usage),
        "sessions_away": service.sessions().is_ok_and(Sessions::are_away),
        "sessions_of_other_key": usage.map_or(0, |usage| usage.of_other_key),
        "models": models,
    })
}

/// One word.
pub(crate) fn device_state(state: DeviceState) -> &'static str {
    match state {
        DeviceState::Loading => "loading",
        DeviceState::Ready => "ready",
        DeviceState::Recovering => "recovering",
        DeviceState::Unused => "unused",
    }
}

fn device_status(device: &DeviceStatus) -> Value {
    json!({
        "name": device.name,
        "state": device_state(device.state),
        "faults": device.n_faults,
        "last_fault": device.last_fault,
        "backend_changed": device.backend_changed,
        "chosen": device.chosen,
    })
}

/// The model `id` as OpenAI lists it.
///
/// # Errors
/// Not configured, or of this box and not offered.
pub(crate) fn one(service: &Service, id: &str) -> Result<Value, Failure> {
    if let Some(upstream) = service.elsewhere(id) {
        return Ok(entry_elsewhere(id, &upstream));
    }
    let all = service.models();
    match all.iter().find(|status| status.name == id).filter(|status| is_offered(status)) {
        Some(status) => Ok(listed(status)),
        // Another name of the first one, or what is wrong with it.
        None => Ok(entry(id, &*service.model(id)?)),
    }
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

/// A model that answers as OpenAI lists it, with vLLM's `max_model_len` and llama.cpp's `meta`. Who lists models knows
/// no sessions, so that `max_model_len` is for requests without one.
fn entry(id: &str, served: &ServedModel) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": served.created,
        "owned_by": "sparsed",
        "max_model_len": served.stateless_context,
        "max_session_len": served.max_context,
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

/// A model's name and how it is, in one word.
pub(crate) fn named_state(status: &ModelStatus) -> (String, String) {
    (status.name.clone(), state_of(&status.state).to_owned())
}

fn state_of(state: &ModelState) -> &'static str {
    match state {
        ModelState::Unloaded => "unloaded",
        ModelState::Loading { .. } => "loading",
        ModelState::Ready(_) => "ready",
        ModelState::Failed(_) => "failed",
        ModelState::Elsewhere(upstream) => match upstream.reach {
            Reach::Up => "ready",
            Reach::Unknown => "connecting",
            Reach::Down(_) => "unreachable",
        },
    }
}

fn model_status(service: &Service, status: &ModelStatus, asker: Owner) -> Value {
    let detail = match &status.state {
        ModelState::Unloaded => json!({}),
        ModelState::Loading { progress_permille } => json!({ "progress_permille": progress_permille }),
        ModelState::Ready(served) => json!({
            "max_context": served.max_context, "stateless_context": served.stateless_context, "meta": meta(served),
        }),
        ModelState::Failed(reason) => json!({ "reason": reason }),
        ModelState::Elsewhere(upstream) => {
            let meta = meta_elsewhere(upstream);
            json!({ "max_context": upstream.max_context, "reason": meta["reason"].clone(), "meta": meta })
        }
    };
    let (stats, load) = (&status.stats, &status.stats.load);
    json!({
        "name": status.name,
        "state": state_of(&status.state),
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
        "scheduling": load::scheduling(service, status, asker),
        "keeping": load::keeping(service, status),
    })
}
